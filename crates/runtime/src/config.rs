//! Configuration: defaults, then a file, then the environment; an unknown key is an error and a secret prints as stars.

use std::fmt;
use std::path::Path;

use figment::Figment;
use figment::providers::{Format, Serialized, Toml};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zeroize::Zeroize;

/// Why a configuration was refused. The text names the key and where it came from.
#[derive(Debug, thiserror::Error)]
#[error("configuration: {0}")]
pub struct Error(String);

/// Reads `T`: its `Default`, overlaid by the TOML file if one is given (which must then exist), overlaid by
/// `<PREFIX>_<KEY>__<KEY>` variables taken from `env`.
///
/// `env` is passed in rather than read here, so that a test says what it means and `main` is the only reader of the
/// process's environment. Names in `ignore` (without the prefix) are for other programs and skipped. Whether an unknown key
/// is refused is up to `T`: every configuration struct of ours has `#[serde(deny_unknown_fields)]`.
pub fn load<T>(
    file: Option<&Path>,
    prefix: &str,
    env: impl IntoIterator<Item = (String, String)>,
    ignore: &[&str],
) -> Result<T, Error>
where
    T: Default + Serialize + DeserializeOwned,
{
    // Serialising the defaults must not star out their secrets, or the stars would be read back as values.
    let defaults = reveal_while(|| {
        figment::value::Value::serialize(T::default())
            .map_err(|error| Error(format!("the built-in defaults cannot be written down: {error}")))
    })?;
    let mut figment = Figment::from(Serialized::defaults(defaults));
    if let Some(path) = file {
        let text = std::fs::read_to_string(path).map_err(|error| Error(format!("{}: {error}", path.display())))?;
        figment = figment.merge(Named { name: path.display().to_string(), inner: Toml::string(&text) });
    }
    let prefix = format!("{prefix}_");
    for (name, value) in env {
        let Some(rest) = name.strip_prefix(&prefix) else { continue };
        if ignore.contains(&rest) {
            continue;
        }
        let key = rest.to_ascii_lowercase().replace("__", ".");
        // Parsed as figment's own `Env` does: numbers, booleans, [lists] and {tables}, else a string.
        let parsed: figment::value::Value = value.parse().unwrap_or_else(|_| value.clone().into());
        figment = figment
            .merge(Named { name: format!("environment variable {name}"), inner: Serialized::global(&key, parsed) });
    }
    figment.extract().map_err(|error| {
        let all: Vec<String> = error.into_iter().map(|one| one.to_string()).collect();
        Error(all.join("; "))
    })
}

struct Named<P> {
    name: String,
    inner: P,
}

impl<P: figment::Provider> figment::Provider for Named<P> {
    fn metadata(&self) -> figment::Metadata {
        figment::Metadata::named(self.name.clone())
    }

    fn data(&self) -> Result<figment::value::Map<figment::Profile, figment::value::Dict>, figment::Error> {
        self.inner.data()
    }
}

thread_local! {
    static REVEAL: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

fn reveal_while<T>(work: impl FnOnce() -> T) -> T {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            REVEAL.set(self.0);
        }
    }
    let _restore = Restore(REVEAL.replace(true));
    work()
}

/// The stars a secret prints as.
pub const MASK: &str = "********";

/// A configured secret: reads like a string, prints and serialises as [`MASK`], and is wiped when dropped.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps a value.
    pub fn new(value: impl Into<String>) -> Self {
        Secret(value.into())
    }

    /// The value itself, for the one place that needs it.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether nothing was configured.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "\"\"" } else { MASK })
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "" } else { MASK })
    }
}

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(if self.0.is_empty() || REVEAL.get() { &self.0 } else { MASK })
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl serde::de::Visitor<'_> for Text {
            type Value = String;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }
            fn visit_str<E: serde::de::Error>(self, v: &str) -> Result<String, E> {
                Ok(v.to_owned())
            }
            fn visit_string<E: serde::de::Error>(self, v: String) -> Result<String, E> {
                Ok(v)
            }
            // A variable such as PASSWORD=1234 is parsed as a number before we see it.
            fn visit_u64<E: serde::de::Error>(self, v: u64) -> Result<String, E> {
                Ok(v.to_string())
            }
            fn visit_i64<E: serde::de::Error>(self, v: i64) -> Result<String, E> {
                Ok(v.to_string())
            }
        }
        deserializer.deserialize_any(Text).map(Secret)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Serialize, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields, default)]
    struct Outer {
        name: String,
        token: Secret,
        inner: Inner,
    }

    impl Default for Outer {
        fn default() -> Self {
            Outer { name: "default".into(), token: Secret::new("built in"), inner: Inner::default() }
        }
    }

    #[derive(Debug, Default, Serialize, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields, default)]
    struct Inner {
        port: u16,
        on: bool,
    }

    fn env(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn environment_beats_file_beats_defaults() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        std::fs::write(&path, "name = \"file\"\n[inner]\nport = 1\non = true\n").unwrap();
        let got: Outer = load(Some(&path), "T", env(&[("T_INNER__PORT", "2"), ("OTHER", "x")]), &[]).unwrap();
        assert_eq!(got.name, "file");
        assert_eq!(got.inner, Inner { port: 2, on: true });
        assert_eq!(got.token.expose(), "built in");
    }

    #[test]
    fn unknown_keys_and_wrong_types_are_errors_that_name_their_source() {
        let error = load::<Outer>(None, "T", env(&[("T_INNER__PROT", "2")]), &[]).unwrap_err().to_string();
        assert!(error.contains("prot") && error.contains("T_INNER__PROT"), "{error}");
        let error = load::<Outer>(None, "T", env(&[("T_INNER__PORT", "many")]), &[]).unwrap_err().to_string();
        assert!(error.contains("port") && error.contains("T_INNER__PORT"), "{error}");
        load::<Outer>(None, "T", env(&[("T_DATA", "/x")]), &["DATA"]).unwrap();
    }

    #[test]
    fn a_missing_file_is_an_error() {
        let error = load::<Outer>(Some(Path::new("/nowhere/at/all.toml")), "T", [], &[]).unwrap_err().to_string();
        assert!(error.contains("/nowhere/at/all.toml"), "{error}");
    }

    #[test]
    fn secrets_never_print() {
        let got: Outer = load(None, "T", env(&[("T_TOKEN", "12345")]), &[]).unwrap();
        assert_eq!(got.token.expose(), "12345");
        for text in [format!("{got:?}"), format!("{}", got.token), serde_json::to_string(&got).unwrap()] {
            assert!(!text.contains("12345"), "{text}");
            assert!(text.contains(MASK), "{text}");
        }
    }
}
