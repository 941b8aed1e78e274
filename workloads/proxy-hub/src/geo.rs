//! Country, state, city and AS number of an address, from MaxMind DB files (format 2.0) that the operator supplies.
//!
//! The file is mapped, not loaded: a city database of 60 MB costs the pages that are looked at. It is treated as
//! hostile: every offset is checked, and nesting and pointers are bounded.

use crate::target::{Country, fold};
use std::net::IpAddr;
use std::ops::Deref;
use std::path::Path;

const MARKER: &[u8] = b"\xab\xcd\xefMaxMind.com";
/// Nested values looked into before a file counts as malformed.
const DEPTH_MOST: u8 = 12;

/// Where an address is. Names are folded like a customer's target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub country: Country,
    pub state: String,
    pub city: String,
    pub asn: u32,
}

impl Default for Place {
    fn default() -> Self {
        Self { country: Country::UNKNOWN, state: String::new(), city: String::new(), asn: 0 }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum GeoError {
    #[error("{path}: {source}")]
    Io { path: String, source: std::io::Error },
    #[error("{path}: not a MaxMind DB file: {why}")]
    Format { path: String, why: &'static str },
}

/// One open database.
pub struct Reader<B> {
    bytes: B,
    nodes: usize,
    /// Bits of a record: 24, 28 or 32.
    record: usize,
    v6: bool,
    data: usize,
    /// The node under which IPv4 lies in an IPv6 tree.
    v4_start: usize,
}

/// A decoded value, as far as look-ups need it.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Value<'a> {
    Text(&'a str),
    Number(u64),
    /// Offset of the first entry, and how many.
    Map(usize, usize),
    Array(usize, usize),
    Other,
}

impl Reader<memmap2::Mmap> {
    pub fn open(path: &Path) -> Result<Self, GeoError> {
        let name = path.display().to_string();
        let map = crate::mapped::read_only(path).map_err(|source| GeoError::Io { path: name.clone(), source })?;
        Self::new(map).map_err(|why| GeoError::Format { path: name, why })
    }
}

impl<B: Deref<Target = [u8]>> Reader<B> {
    pub fn new(bytes: B) -> Result<Self, &'static str> {
        let window = bytes.len().saturating_sub(128 * 1024);
        let at = bytes[window..].windows(MARKER.len()).rposition(|w| w == MARKER).ok_or("no metadata")?;
        let meta = window + at + MARKER.len();
        let section = Section { bytes: &bytes[meta..] };
        let (root, _) = section.value(0, 0).ok_or("unreadable metadata")?;
        let number = |name| match section.get(root, name) {
            Some(Value::Number(n)) => Some(n as usize),
            _ => None,
        };
        let (nodes, record) =
            (number("node_count").ok_or("no node count")?, number("record_size").ok_or("no record size")?);
        if number("binary_format_major_version") != Some(2) || !matches!(record, 24 | 28 | 32) {
            return Err("unknown version or record size");
        }
        let v6 = number("ip_version") == Some(6);
        let tree = nodes.checked_mul(record / 4).ok_or("absurd node count")?;
        if tree + 16 > meta {
            return Err("the search tree is cut short");
        }
        let mut reader = Self { bytes, nodes, record, v6, data: tree + 16, v4_start: 0 };
        if v6 {
            for _ in 0..96 {
                if reader.v4_start >= nodes {
                    break;
                }
                reader.v4_start = reader.child(reader.v4_start, 0);
            }
        }
        Ok(reader)
    }

    fn child(&self, node: usize, bit: usize) -> usize {
        let b = &self.bytes[node * (self.record / 4)..];
        match (self.record, bit) {
            (24, _) => {
                let b = &b[bit * 3..];
                usize::from(b[0]) << 16 | usize::from(b[1]) << 8 | usize::from(b[2])
            }
            (28, 0) => {
                usize::from(b[3] >> 4) << 24 | usize::from(b[0]) << 16 | usize::from(b[1]) << 8 | usize::from(b[2])
            }
            (28, _) => {
                usize::from(b[3] & 15) << 24 | usize::from(b[4]) << 16 | usize::from(b[5]) << 8 | usize::from(b[6])
            }
            _ => {
                let b = &b[bit * 4..];
                u32::from_be_bytes([b[0], b[1], b[2], b[3]]) as usize
            }
        }
    }

    /// The offset of an address's data.
    fn find(&self, ip: IpAddr) -> Option<usize> {
        let (bits, len, mut node) = match crate::dest::unmapped(ip) {
            IpAddr::V4(ip) if self.v6 => (u128::from(ip.to_bits()) << 96, 32, self.v4_start),
            IpAddr::V4(ip) => (u128::from(ip.to_bits()) << 96, 32, 0),
            IpAddr::V6(ip) if self.v6 => (ip.to_bits(), 128, 0),
            IpAddr::V6(_) => return None,
        };
        for i in 0..len {
            if node >= self.nodes {
                break;
            }
            node = self.child(node, (bits >> (127 - i)) as usize & 1);
        }
        if node <= self.nodes {
            return None;
        }
        (node - self.nodes).checked_sub(16)
    }

    /// Adds what this database knows of an address.
    pub fn look_up(&self, ip: IpAddr, place: &mut Place) {
        let Some(at) = self.find(ip) else { return };
        let section = Section { bytes: &self.bytes[self.data.min(self.bytes.len())..] };
        let Some((root, _)) = section.value(at, 0) else { return };
        let path = |names: &[&str]| names.iter().try_fold(root, |value, name| section.get(value, name));
        let text = |value: Option<Value<'_>>| match value {
            Some(Value::Text(text)) => Some(fold(text)),
            _ => None,
        };
        let code = path(&["country", "iso_code"]).or_else(|| path(&["registered_country", "iso_code"]));
        if let Some(Value::Text(code)) = code
            && let Some(country) = Country::parse(code)
        {
            place.country = country;
        }
        if let Some(city) = text(path(&["city", "names", "en"])) {
            place.city = city;
        }
        if let Some(Value::Array(first, count)) = path(&["subdivisions"])
            && count > 0
            && let Some((division, _)) = section.value(first, 0)
        {
            let name = section.get(division, "names").and_then(|names| section.get(names, "en"));
            if let Some(state) = text(name).or_else(|| text(section.get(division, "iso_code"))) {
                place.state = state;
            }
        }
        if let Some(Value::Number(asn)) = path(&["autonomous_system_number"]) {
            place.asn = u32::try_from(asn).unwrap_or(0);
        }
    }
}

/// The data or metadata section.
#[derive(Clone, Copy)]
struct Section<'a> {
    bytes: &'a [u8],
}

impl<'a> Section<'a> {
    /// The value at `at` and the offset behind it.
    fn value(&self, at: usize, depth: u8) -> Option<(Value<'a>, usize)> {
        if depth > DEPTH_MOST {
            return None;
        }
        let control = *self.bytes.get(at)?;
        let mut at = at + 1;
        let mut kind = control >> 5;
        if kind == 1 {
            let size = usize::from(control >> 3 & 3);
            let b = self.bytes.get(at..at + size + 1)?;
            let start = if size == 3 { 0 } else { usize::from(control & 7) };
            let low = b.iter().fold(start, |n, b| n << 8 | usize::from(*b));
            let to = low + [0, 2048, 526_336, 0][size];
            // A pointer may not point to a pointer; counting it as depth bounds it all the same.
            return Some((self.value(to, depth + 1)?.0, at + size + 1));
        }
        if kind == 0 {
            kind = self.bytes.get(at)?.checked_add(7)?;
            at += 1;
        }
        let mut size = usize::from(control & 31);
        if size > 28 {
            let more = size - 28;
            let b = self.bytes.get(at..at + more)?;
            size = b.iter().fold(0, |n, b| n << 8 | usize::from(*b)) + [29, 285, 65_821][more - 1];
            at += more;
        }
        match kind {
            7 => Some((Value::Map(at, size), self.skip(at, size.checked_mul(2)?, depth)?)),
            11 => Some((Value::Array(at, size), self.skip(at, size, depth)?)),
            14 => Some((Value::Other, at)),
            _ => {
                let b = self.bytes.get(at..at.checked_add(size)?)?;
                let value = match kind {
                    2 => Value::Text(std::str::from_utf8(b).ok()?),
                    5 | 6 | 9 if size <= 8 => Value::Number(b.iter().fold(0, |n, b| n << 8 | u64::from(*b))),
                    _ => Value::Other,
                };
                Some((value, at + size))
            }
        }
    }

    fn skip(&self, mut at: usize, count: usize, depth: u8) -> Option<usize> {
        // Every value is at least a byte: a count beyond the section is a lie.
        if count > self.bytes.len() {
            return None;
        }
        for _ in 0..count {
            // Pointers are stepped over, not followed: a damaged file could otherwise make this exponential.
            at = match self.bytes.get(at)? {
                control if control >> 5 == 1 => at + 2 + usize::from(control >> 3 & 3),
                _ => self.value(at, depth + 1)?.1,
            };
        }
        Some(at)
    }

    fn get(&self, map: Value<'a>, name: &str) -> Option<Value<'a>> {
        let Value::Map(mut at, count) = map else { return None };
        for _ in 0..count {
            let (key, next) = self.value(at, 1)?;
            let (value, after) = self.value(next, 1)?;
            if key == Value::Text(name) {
                return Some(value);
            }
            at = after;
        }
        None
    }
}

/// The databases in use: usually a city and an ASN one.
#[derive(Default)]
pub struct Geo {
    readers: Vec<Reader<memmap2::Mmap>>,
}

impl Geo {
    pub fn open<P: AsRef<Path>>(paths: &[P]) -> Result<Self, GeoError> {
        Ok(Self { readers: paths.iter().map(|p| Reader::open(p.as_ref())).collect::<Result<_, _>>()? })
    }

    pub fn is_empty(&self) -> bool {
        self.readers.is_empty()
    }

    pub fn look_up(&self, ip: IpAddr) -> Place {
        let mut place = Place::default();
        for reader in &self.readers {
            reader.look_up(ip, &mut place);
        }
        place
    }
}

pub mod build {
    //! Writes small databases, for tests and for the load mode, whose peers sit on loopback addresses.

    use super::{MARKER, Place};
    use std::net::Ipv4Addr;

    fn text(out: &mut Vec<u8>, s: &str) {
        header(out, 2, s.len());
        out.extend_from_slice(s.as_bytes());
    }

    fn header(out: &mut Vec<u8>, kind: u8, size: usize) {
        let (low, extra) = match size {
            0..=28 => (size as u8, None),
            _ => (29, Some((size - 29) as u8)),
        };
        if kind <= 7 {
            out.push(kind << 5 | low);
        } else {
            out.push(low);
            out.push(kind - 7);
        }
        out.extend(extra);
    }

    fn number(out: &mut Vec<u8>, kind: u8, value: u64) {
        let bytes = value.to_be_bytes();
        let first = bytes.iter().position(|b| *b != 0).unwrap_or(8);
        header(out, kind, 8 - first);
        out.extend_from_slice(&bytes[first..]);
    }

    fn place(out: &mut Vec<u8>, place: &Place) {
        header(out, 7, 4);
        text(out, "country");
        header(out, 7, 1);
        text(out, "iso_code");
        text(out, place.country.as_str());
        text(out, "subdivisions");
        header(out, 11, 1);
        header(out, 7, 1);
        text(out, "names");
        header(out, 7, 1);
        text(out, "en");
        text(out, &place.state);
        text(out, "city");
        header(out, 7, 1);
        text(out, "names");
        header(out, 7, 1);
        text(out, "en");
        text(out, &place.city);
        text(out, "autonomous_system_number");
        number(out, 6, u64::from(place.asn));
    }

    /// An IPv4 database in the format's 28-bit form (or 24 or 32). Blocks must not contain one another.
    pub fn database(blocks: &[(Ipv4Addr, u8, Place)], record: usize) -> Vec<u8> {
        #[derive(Clone, Copy)]
        enum Slot {
            Empty,
            Node(usize),
            Data(usize),
        }
        let mut data = Vec::new();
        let mut nodes = vec![[Slot::Empty; 2]];
        for (net, bits, what) in blocks {
            let at = data.len();
            place(&mut data, what);
            let mut node = 0;
            for i in 0..*bits {
                let bit = (net.to_bits() >> (31 - i)) as usize & 1;
                if i + 1 == *bits {
                    nodes[node][bit] = Slot::Data(at);
                } else if let Slot::Node(next) = nodes[node][bit] {
                    node = next;
                } else {
                    nodes.push([Slot::Empty; 2]);
                    nodes[node][bit] = Slot::Node(nodes.len() - 1);
                    node = nodes.len() - 1;
                }
            }
        }
        let count = nodes.len();
        let mut out = Vec::new();
        for pair in &nodes {
            let [a, b] = pair.map(|slot| match slot {
                Slot::Empty => count,
                Slot::Node(n) => n,
                Slot::Data(at) => count + 16 + at,
            } as u32);
            let (x, y) = (a.to_be_bytes(), b.to_be_bytes());
            match record {
                24 => out.extend([x[1], x[2], x[3], y[1], y[2], y[3]]),
                28 => out.extend([x[1], x[2], x[3], x[0] << 4 | y[0], y[1], y[2], y[3]]),
                _ => out.extend(x.iter().chain(&y)),
            }
        }
        out.extend([0; 16]);
        out.extend(data);
        out.extend(MARKER);
        header(&mut out, 7, 5);
        for (name, kind, value) in [
            ("binary_format_major_version", 5, 2),
            ("binary_format_minor_version", 5, 0),
            ("ip_version", 5, 4),
            ("record_size", 5, record as u64),
            ("node_count", 6, count as u64),
        ] {
            text(&mut out, name);
            number(&mut out, kind, value);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::net::Ipv4Addr;

    fn place(country: &str, state: &str, city: &str, asn: u32) -> Place {
        Place { country: Country::parse(country).expect("code"), state: state.into(), city: city.into(), asn }
    }

    fn blocks() -> Vec<(Ipv4Addr, u8, Place)> {
        vec![
            (Ipv4Addr::new(127, 1, 0, 0), 16, place("US", "florida", "miami", 7018)),
            (Ipv4Addr::new(127, 2, 0, 0), 16, place("DE", "berlin", "berlin", 3320)),
            (
                Ipv4Addr::new(198, 51, 100, 7),
                32,
                place("GB", "a state whose name is longer than 28 bytes", "london", 65536),
            ),
        ]
    }

    #[test]
    fn every_record_size_finds_what_was_put_in() {
        for record in [24, 28, 32] {
            let reader = Reader::new(build::database(&blocks(), record)).expect("valid");
            let find = |ip: &str| {
                let mut place = Place::default();
                reader.look_up(ip.parse().expect("ip"), &mut place);
                place
            };
            assert_eq!(find("127.1.255.9"), blocks()[0].2);
            assert_eq!(find("::ffff:127.2.0.1"), blocks()[1].2);
            assert_eq!(find("198.51.100.7"), blocks()[2].2);
            for nowhere in ["127.3.0.1", "198.51.100.6", "0.0.0.0", "2001:db8::1"] {
                assert_eq!(find(nowhere), Place::default(), "{nowhere}");
            }
        }
    }

    #[test]
    fn what_is_no_database_is_refused() {
        assert!(Reader::new(Vec::new()).is_err());
        assert!(Reader::new(b"hello".to_vec()).is_err());
        let mut cut = build::database(&blocks(), 28);
        let tail = cut.windows(MARKER.len()).position(|w| w == MARKER).expect("metadata");
        cut.drain(..tail);
        assert!(Reader::new(cut).is_err());
    }

    proptest! {
        #[test]
        fn a_damaged_database_never_panics(flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12), ip: u32) {
            let mut bytes = build::database(&blocks(), 28);
            for (at, with) in flips {
                let at = at.index(bytes.len());
                bytes[at] = with;
            }
            if let Ok(reader) = Reader::new(bytes) {
                for ip in [ip, 0x7f01_0001, 0x7f02_0001, 0xc633_6407] {
                    let mut place = Place::default();
                    reader.look_up(IpAddr::V4(Ipv4Addr::from_bits(ip)), &mut place);
                }
            }
        }
    }
}
