//! Between hubs: one TCP connection a tunnel, opened with a signed order.
//!
//! The hub that the customer came to admits and bills; the hub that has the peer chooses and carries. A sticky session
//! is kept by one hub, found by every other by rendezvous hashing, so it holds wherever the customer lands.

use crate::shared::{OtherHub, Shared};
use crate::target::{Failover, Target};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::sync::Arc;
use subtle::ConstantTimeEq as _;

const MAGIC: &[u8] = b"PXRELAY1 ";
const MOST: usize = 2048;
/// An order older or younger than this is not believed, seconds.
const SKEW: i64 = 60;

/// What a hub asks of another.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    pub account: String,
    /// Empty for a UDP association.
    pub dest: String,
    #[serde(default)]
    pub udp: bool,
    /// Parameters as a customer writes them.
    pub target: String,
    /// Seconds since 1970.
    pub time: i64,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Parsed {
    More,
    Bad,
    Done(Order, usize),
}

/// HMAC-SHA-256 (RFC 2104).
fn sign(secret: &str, body: &[u8]) -> [u8; 32] {
    let mut key = [0u8; 64];
    if secret.len() > 64 {
        key[..32].copy_from_slice(&Sha256::digest(secret.as_bytes()));
    } else {
        key[..secret.len()].copy_from_slice(secret.as_bytes());
    }
    let inner = Sha256::new().chain_update(key.map(|b| b ^ 0x36)).chain_update(body).finalize();
    Sha256::new().chain_update(key.map(|b| b ^ 0x5c)).chain_update(inner).finalize().into()
}

pub fn encode(order: &Order, secret: &str) -> Vec<u8> {
    let body = serde_json::to_vec(order).unwrap_or_default();
    let mut out = MAGIC.to_vec();
    for byte in sign(secret, &body) {
        out.extend(format!("{byte:02x}").bytes());
    }
    out.push(b' ');
    out.extend(body);
    out.push(b'\n');
    out
}

pub fn parse(buf: &[u8], secret: &str, now: i64) -> Parsed {
    if !buf.starts_with(&MAGIC[..buf.len().min(MAGIC.len())]) {
        return Parsed::Bad;
    }
    let Some(end) = buf.iter().take(MOST).position(|b| *b == b'\n') else {
        return if buf.len() >= MOST { Parsed::Bad } else { Parsed::More };
    };
    let line = buf.get(MAGIC.len()..end).unwrap_or_default();
    if line.len() < 65 || line[64] != b' ' || !line[..64].is_ascii() {
        return Parsed::Bad;
    }
    let (signature, body) = (&line[..64], &line[65..]);
    let expected: Vec<u8> = sign(secret, body).iter().flat_map(|b| format!("{b:02x}").into_bytes()).collect();
    if !bool::from(expected.ct_eq(signature)) {
        return Parsed::Bad;
    }
    match serde_json::from_slice::<Order>(body) {
        Ok(order) if (order.time - now).abs() <= SKEW => Parsed::Done(order, end + 1),
        _ => Parsed::Bad,
    }
}

/// A target in the form that customers write.
pub fn params(target: &Target) -> String {
    let escape = |s: &str| -> String {
        s.bytes()
            .map(|b| if b.is_ascii_alphanumeric() { (b as char).to_string() } else { format!("%{b:02x}") })
            .collect()
    };
    let mut parts = Vec::new();
    let mut put = |key: &str, value: String| parts.push(format!("{key}-{value}"));
    if let Some(country) = target.country {
        put("country", country.to_string());
    }
    if let Some(state) = &target.state {
        put("state", escape(state));
    }
    if let Some(city) = &target.city {
        put("city", escape(city));
    }
    if let Some(asn) = target.asn {
        put("asn", asn.to_string());
    }
    if let Some(session) = &target.session {
        put("session", escape(session));
    }
    if let Some(life) = target.lifetime {
        put("lifetime", format!("{}s", life.as_secs()));
    }
    if target.rotate {
        put("rotate", "1".into());
    }
    put(
        "failover",
        match target.failover {
            Failover::Same => "same",
            Failover::Country => "country",
            Failover::None => "none",
        }
        .into(),
    );
    parts.join("-")
}

/// The hub that keeps a sticky session, if it is another than this: of all hubs that have peers for the target and did
/// not refuse it, the one whose name and the session's together hash highest.
pub fn keeper(shared: &Shared, target: &Target, owner: &str, session: &str, tried: &[Arc<str>]) -> Option<OtherHub> {
    let weight = |hub: &str| -> [u8; 32] {
        Sha256::new()
            .chain_update(hub)
            .chain_update([0])
            .chain_update(owner)
            .chain_update([0])
            .chain_update(session)
            .finalize()
            .into()
    };
    let mine = shared.registry.serves(target).then(|| weight(&shared.config.hub.name));
    let others = shared.others.read();
    let able = others.iter().filter(|hub| !tried.contains(&hub.name) && hub.places.serve(target));
    let best = able.max_by_key(|hub| weight(&hub.name))?;
    (mine.is_none_or(|mine| weight(&best.name) > mine)).then(|| best.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::target::Country;
    use proptest::prelude::*;

    fn order() -> Order {
        Order {
            account: "alice".into(),
            dest: "example.com:443".into(),
            udp: false,
            target: "country-US".into(),
            time: 1000,
        }
    }

    #[test]
    fn orders_are_believed_only_if_signed_and_fresh() {
        let bytes = encode(&order(), "secret of the hubs");
        assert_eq!(parse(&bytes, "secret of the hubs", 1030), Parsed::Done(order(), bytes.len()));
        assert_eq!(parse(&bytes, "another secret", 1030), Parsed::Bad);
        assert_eq!(parse(&bytes, "secret of the hubs", 1061), Parsed::Bad);
        for cut in 0..bytes.len() {
            assert_eq!(parse(&bytes[..cut], "secret of the hubs", 1000), Parsed::More, "{cut}");
        }
        let mut forged = bytes.clone();
        let at = forged.len() - 4;
        forged[at] ^= 1;
        assert_eq!(parse(&forged, "secret of the hubs", 1000), Parsed::Bad);
    }

    #[test]
    fn the_signature_is_hmac_sha_256() {
        // RFC 4231, test case 2.
        let hex: String = sign("Jefe", b"what do ya want for nothing?").iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hex, "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
    }

    proptest! {
        #[test]
        fn a_target_survives_the_way_to_another_hub(city in proptest::option::of("[a-z -]{1,20}"), session in proptest::option::of("[ -~]{1,15}"), asn: Option<u32>, rotate: bool) {
            let city = city.map(|c| crate::target::fold(&c)).filter(|c| !c.is_empty());
            let target = Target { country: Country::parse("de"), city, session, asn, rotate, failover: Failover::None, ..Target::default() };
            let mut back = Target::default();
            crate::target::parse_params(&params(&target), &mut back).expect("parses");
            prop_assert_eq!(back, target);
        }

        #[test]
        fn hostile_orders_never_panic(data in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut bytes = MAGIC.to_vec();
            bytes.extend(data);
            let _ = parse(&bytes, "s", 0);
        }
    }
}
