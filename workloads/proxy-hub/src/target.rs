//! Who a customer says they are and which exit they ask for.
//!
//! Both habits of the trade are understood: parameters behind the user name (`alice-cc-de-session-7:KEY`, also
//! with a leading `customer-`) and behind the key (`alice:KEY-country-us-city-new_york`). A parameter given twice
//! counts as given last, and the password is read after the user name. An unknown parameter is an error that
//! names it: silently ignoring a misspelt country would exit from the wrong one.

use std::fmt;
use std::time::Duration;

/// Longest user name or password looked at.
pub const MAX_CREDENTIAL: usize = 255;
const MAX_VALUE: usize = 64;
/// A sticky session lives this long when no lifetime is asked for.
pub const DEFAULT_LIFETIME: Duration = Duration::from_secs(10 * 60);
/// The longest lifetime that may be asked for.
pub const MAX_LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// Two upper-case letters of ISO 3166-1.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Country([u8; 2]);

impl Country {
    /// What is not known.
    pub const UNKNOWN: Country = Country(*b"XX");

    /// Takes two letters of either case.
    pub fn parse(s: &str) -> Option<Self> {
        match s.as_bytes() {
            [a, b] if a.is_ascii_alphabetic() && b.is_ascii_alphabetic() => {
                // "UK" is what people write for GB.
                let pair = [a.to_ascii_uppercase(), b.to_ascii_uppercase()];
                Some(Self(if &pair == b"UK" { *b"GB" } else { pair }))
            }
            _ => None,
        }
    }

    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).unwrap_or("XX")
    }
}

impl fmt::Display for Country {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for Country {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What to do when the peer of a sticky session is gone, or a chosen peer cannot connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Failover {
    /// Another peer that fits everything asked for; a sticky session moves to it.
    #[default]
    Same,
    /// Another peer of the same country, though city, state or ASN may differ.
    Country,
    /// Refuse rather than change the exit.
    None,
}

/// The exit that is asked for. Names are folded by [`fold`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Target {
    pub country: Option<Country>,
    pub state: Option<String>,
    pub city: Option<String>,
    pub asn: Option<u32>,
    pub session: Option<String>,
    pub lifetime: Option<Duration>,
    /// A new exit for every request, whatever the session says.
    pub rotate: bool,
    pub failover: Failover,
}

impl Target {
    /// The session's name if the exit is to stay the same.
    pub fn sticky(&self) -> Option<&str> {
        if self.rotate { None } else { self.session.as_deref() }
    }
}

/// Why credentials were turned down. The text goes to the customer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    #[error("unknown parameter '{0}'; known are country, state, city, asn, session, lifetime, rotate, failover")]
    Unknown(String),
    #[error("parameter '{0}' has no value")]
    NoValue(&'static str),
    #[error("parameter '{0}': {1}")]
    BadValue(&'static str, &'static str),
    #[error("parameter '{0}' is not offered by this hub")]
    NotOffered(String),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Key {
    Country,
    State,
    City,
    Asn,
    Session,
    Lifetime,
    Rotate,
    SessionType,
    Failover,
}

impl Key {
    fn parse(s: &str) -> Option<Key> {
        const NAMES: &[(&str, Key)] = &[
            ("country", Key::Country),
            ("cc", Key::Country),
            ("region", Key::Country),
            ("state", Key::State),
            ("st", Key::State),
            ("city", Key::City),
            ("asn", Key::Asn),
            ("session", Key::Session),
            ("sessid", Key::Session),
            ("sid", Key::Session),
            ("lifetime", Key::Lifetime),
            ("sesstime", Key::Lifetime),
            ("ttl", Key::Lifetime),
            ("rotate", Key::Rotate),
            ("sesstype", Key::SessionType),
            ("failover", Key::Failover),
        ];
        NAMES.iter().find(|(name, _)| name.eq_ignore_ascii_case(s)).map(|(_, key)| *key)
    }

    fn name(self) -> &'static str {
        match self {
            Key::Country => "country",
            Key::State => "state",
            Key::City => "city",
            Key::Asn => "asn",
            Key::Session => "session",
            Key::Lifetime => "lifetime",
            Key::Rotate => "rotate",
            Key::SessionType => "sesstype",
            Key::Failover => "failover",
        }
    }

    /// May a value hold `-`?
    fn takes_many(self) -> bool {
        matches!(self, Key::State | Key::City | Key::Session)
    }
}

/// One form for the spellings of a place: lower case, with `-`, `_`, `+` and blanks all one blank.
pub fn fold(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    for c in name.chars() {
        let c = if matches!(c, '-' | '_' | '+' | ' ') { ' ' } else { c };
        if c == ' ' && (out.is_empty() || out.ends_with(' ')) {
            continue;
        }
        out.extend(c.to_lowercase());
    }
    out.truncate(out.trim_end().len());
    out
}

/// Reads `key-value-key-value` into `target`. An empty string is no parameters.
pub fn parse_params(params: &str, target: &mut Target) -> Result<(), TargetError> {
    if params.is_empty() {
        return Ok(());
    }
    let mut tokens = params.split('-').peekable();
    while let Some(token) = tokens.next() {
        let Some(key) = Key::parse(token) else {
            return Err(match token.to_ascii_lowercase().as_str() {
                "profile" | "speed" | "latency" | "type" | "zip" => TargetError::NotOffered(token.to_owned()),
                _ => TargetError::Unknown(clip(token)),
            });
        };
        let mut value = String::new();
        let optional = key == Key::Rotate;
        if let Some(first) = tokens.next_if(|t| !(optional && Key::parse(t).is_some())) {
            value.push_str(first);
            if key.takes_many() {
                while let Some(more) = tokens.next_if(|t| Key::parse(t).is_none()) {
                    value.push('-');
                    value.push_str(more);
                }
            }
        }
        if value.is_empty() && !optional {
            return Err(TargetError::NoValue(key.name()));
        }
        apply(key, &unescape(&value), target)?;
    }
    Ok(())
}

fn apply(key: Key, value: &str, target: &mut Target) -> Result<(), TargetError> {
    let bad = |why| TargetError::BadValue(key.name(), why);
    if value.len() > MAX_VALUE {
        return Err(bad("longer than 64 bytes"));
    }
    match key {
        Key::Country if value.eq_ignore_ascii_case("any") => target.country = None,
        Key::Country => target.country = Some(Country::parse(value).ok_or(bad("not a two-letter country code"))?),
        Key::State => target.state = Some(fold(value)),
        Key::City => target.city = Some(fold(value)),
        Key::Asn => {
            let digits = value.strip_prefix("AS").or(value.strip_prefix("as")).unwrap_or(value);
            target.asn = Some(digits.parse().map_err(|_| bad("not an AS number"))?);
        }
        Key::Session if value.chars().any(char::is_control) => return Err(bad("holds control characters")),
        Key::Session => target.session = Some(value.to_owned()),
        Key::Lifetime => {
            target.lifetime = Some(lifetime(value).ok_or(bad("not a time of 1s to 24h (30 means minutes)"))?)
        }
        Key::Rotate => {
            target.rotate = match value.to_ascii_lowercase().as_str() {
                "" | "1" | "true" | "request" | "yes" | "on" => true,
                "0" | "false" | "no" | "off" | "sticky" => false,
                _ => return Err(bad("not 1, 0, request or sticky")),
            }
        }
        Key::SessionType => {
            target.rotate = match value.to_ascii_lowercase().as_str() {
                "sticky" => false,
                "rotating" => true,
                _ => return Err(bad("not sticky or rotating")),
            }
        }
        Key::Failover => {
            target.failover = match value.to_ascii_lowercase().as_str() {
                "same" => Failover::Same,
                "country" => Failover::Country,
                "none" | "fail" => Failover::None,
                _ => return Err(bad("not same, country or none")),
            }
        }
    }
    Ok(())
}

fn lifetime(value: &str) -> Option<Duration> {
    let (digits, unit) = match value.as_bytes().last()? {
        b's' | b'S' => (&value[..value.len() - 1], 1),
        b'm' | b'M' => (&value[..value.len() - 1], 60),
        b'h' | b'H' => (&value[..value.len() - 1], 3600),
        _ => (value, 60),
    };
    let number: u64 = digits.parse().ok()?;
    let life = Duration::from_secs(number.checked_mul(unit)?);
    (life >= Duration::from_secs(1) && life <= MAX_LIFETIME).then_some(life)
}

/// Undoes `%xx`; anything else stays as it is.
pub fn unescape(s: &str) -> String {
    if !s.contains('%') {
        return s.to_owned();
    }
    let bytes = s.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        let hex = |b: u8| (b as char).to_digit(16).map(|d| d as u8);
        match bytes[i..] {
            [b'%', high, low, ..] if hex(high).is_some() && hex(low).is_some() => {
                out.push(hex(high).unwrap_or(0) << 4 | hex(low).unwrap_or(0));
                i += 3;
            }
            _ => {
                out.push(bytes[i]);
                i += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Cuts what a customer sent to a length fit for a message.
fn clip(s: &str) -> String {
    s.chars().filter(|c| !c.is_control()).take(32).collect()
}

/// Every way to read `text` as a base and parameters, the longest base first: `a-b-c` gives `(a-b-c, "")`,
/// `(a-b, "c")`, `(a, "b-c")`. At most 32 are tried.
pub fn splits(text: &str) -> impl Iterator<Item = (&str, &str)> {
    let cuts = text.rmatch_indices('-').take(32).map(move |(i, _)| (&text[..i], &text[i + 1..]));
    std::iter::once((text, "")).chain(cuts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parsed(params: &str) -> Result<Target, TargetError> {
        let mut target = Target::default();
        parse_params(params, &mut target).map(|()| target)
    }

    #[test]
    fn the_grammars_of_the_trade() {
        let t = parsed("country-us-city-new_york-session-abc-sesstype-sticky").expect("IPLoop");
        assert_eq!((t.country, t.city.as_deref(), t.sticky()), (Country::parse("US"), Some("new york"), Some("abc")));
        let t = parsed("cc-DE-sessid-abc-sesstime-10").expect("Oxylabs");
        assert_eq!((t.country, t.lifetime), (Country::parse("de"), Some(Duration::from_secs(600))));
        let t = parsed("region-gb-state-england-asn-AS2856-ttl-90s-failover-none").expect("all");
        assert_eq!((t.asn, t.lifetime, t.failover), (Some(2856), Some(Duration::from_secs(90)), Failover::None));
        assert_eq!(parsed("country-uk").expect("alias").country, Country::parse("GB"));
    }

    #[test]
    fn values_may_hold_dashes_and_escapes() {
        let t = parsed("city-saint-denis-session-6f1c-4b-aa-country-fr").expect("parses");
        assert_eq!((t.city.as_deref(), t.session.as_deref()), (Some("saint denis"), Some("6f1c-4b-aa")));
        assert_eq!(parsed("city-state%2Dcollege").expect("escape").city.as_deref(), Some("state college"));
        assert_eq!(parsed("city-S%C3%A3o%20Paulo").expect("utf8").city.as_deref(), Some("são paulo"));
    }

    #[test]
    fn rotation_beats_a_session_and_last_wins() {
        assert_eq!(parsed("session-a-rotate").expect("flag").sticky(), None);
        assert_eq!(parsed("rotate-session-a").expect("flag before a key").sticky(), None);
        assert_eq!(parsed("rotate-request-rotate-0-session-a").expect("last wins").sticky(), Some("a"));
        assert_eq!(parsed("country-us-country-de").expect("last wins").country, Country::parse("DE"));
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert_eq!(parsed("contry-us"), Err(TargetError::Unknown("contry".into())));
        assert_eq!(parsed("country-us-foo-bar"), Err(TargetError::Unknown("foo".into())));
        assert_eq!(parsed("country"), Err(TargetError::NoValue("country")));
        assert_eq!(parsed("city-"), Err(TargetError::NoValue("city")));
        assert!(matches!(parsed("country-usa"), Err(TargetError::BadValue("country", _))));
        assert!(matches!(parsed("lifetime-25h"), Err(TargetError::BadValue("lifetime", _))));
        assert!(matches!(parsed("lifetime-0"), Err(TargetError::BadValue("lifetime", _))));
        assert!(matches!(parsed("asn-x"), Err(TargetError::BadValue("asn", _))));
        assert_eq!(parsed("speed-50"), Err(TargetError::NotOffered("speed".into())));
    }

    #[test]
    fn splits_go_from_long_to_short() {
        let all: Vec<_> = splits("a-b-c").collect();
        assert_eq!(all, [("a-b-c", ""), ("a-b", "c"), ("a", "b-c")]);
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".{0,255}") {
            let _ = parsed(&text);
            prop_assert!(splits(&text).count() <= 33);
            let _ = fold(&text);
        }
    }
}
