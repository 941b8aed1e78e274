//! Which places a hub has peers in, as hubs tell each other: a sorted list of hashes, one for each country, state, city
//! and network. A hash that two places share costs one request in vain, no more.

use crate::target::{Country, Target};
use sha2::{Digest as _, Sha256};

/// What a place is named by, beside its country (`None`: in whatever country).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place<'a> {
    Country,
    State(&'a str),
    City(&'a str),
    Asn(u32),
}

/// The same on every hub and in every version.
pub fn hash(country: Option<Country>, place: Place<'_>) -> u64 {
    let (kind, text) = match place {
        Place::Country => (b'C', String::new()),
        Place::State(name) => (b'S', name.to_owned()),
        Place::City(name) => (b'I', name.to_owned()),
        Place::Asn(number) => (b'A', number.to_string()),
    };
    let code = country.as_ref().map_or("", Country::as_str);
    let digest = Sha256::new().chain_update([kind]).chain_update(code).chain_update([0]).chain_update(text).finalize();
    digest.iter().take(8).fold(0, |n, b| n << 8 | u64::from(*b))
}

/// The places that must all be there for a target to be served. A state is known within its country only.
pub fn wanted(target: &Target) -> impl Iterator<Item = Place<'_>> {
    let state = target.state.as_deref().filter(|_| target.country.is_some()).map(Place::State);
    let city = target.city.as_deref().map(Place::City);
    [Some(Place::Country), state, city, target.asn.map(Place::Asn)].into_iter().flatten()
}

/// The places of one hub.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Places {
    sorted: Vec<u64>,
    pub version: u64,
}

impl Places {
    pub fn new(mut hashes: Vec<u64>) -> Self {
        hashes.sort_unstable();
        hashes.dedup();
        let version = Sha256::digest(bytes(&hashes)).iter().take(8).fold(0, |n, b| n << 8 | u64::from(*b));
        Self { sorted: hashes, version }
    }

    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let (words, rest) = bytes.as_chunks::<8>();
        rest.is_empty().then(|| Self::new(words.iter().map(|w| u64::from_be_bytes(*w)).collect()))
    }

    pub fn bytes(&self) -> Vec<u8> {
        bytes(&self.sorted)
    }

    pub fn is_empty(&self) -> bool {
        self.sorted.is_empty()
    }

    /// Whether the hub may have a peer for the target.
    pub fn serve(&self, target: &Target) -> bool {
        wanted(target).all(|place| self.sorted.binary_search(&hash(target.country, place)).is_ok())
    }
}

fn bytes(hashes: &[u64]) -> Vec<u8> {
    hashes.iter().flat_map(|h| h.to_be_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_served_where_all_it_names_is() {
        let us = Country::parse("us");
        let places = Places::new(vec![
            hash(None, Place::Country),
            hash(us, Place::Country),
            hash(us, Place::City("miami")),
            hash(None, Place::City("miami")),
            hash(us, Place::State("florida")),
            hash(us, Place::Asn(7018)),
        ]);
        let back = Places::parse(&places.bytes()).expect("parses");
        assert_eq!(back, places);
        let serves = |text: &str| {
            let mut target = Target::default();
            crate::target::parse_params(text, &mut target).expect("valid");
            back.serve(&target)
        };
        for text in ["rotate", "country-us", "country-us-city-miami", "city-miami", "country-us-state-florida-asn-7018"]
        {
            assert!(serves(text), "{text}");
        }
        for text in ["country-de", "country-us-city-boston", "city-boston", "asn-7018", "country-us-asn-1"] {
            assert!(!serves(text), "{text}");
        }
        assert!(Places::parse(&[0; 7]).is_none());
        assert!(!Places::default().serve(&Target::default()));
    }
}
