//! Names people choose, parsed once at the edge and valid from then on.

use std::fmt;

/// Why a name was refused; the message is for the person who typed it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidName(pub &'static str);

impl fmt::Display for InvalidName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for InvalidName {}

macro_rules! names {
    ($($(#[$doc:meta])* $name:ident, $check:path;)+) => {$(
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(String);

        impl $name {
            pub fn parse(text: &str) -> Result<Self, InvalidName> {
                $check(text).map(|()| Self(text.to_owned()))
            }

            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    )+};
}

names! {
    /// A workload's name: part of a host name together with the org's slug, so that both must fit one DNS label.
    WorkloadName, dns_label_of_40;
    /// An org's name in addresses: at most 20 characters, so that `<workload>-<slug>` stays within 63.
    OrgSlug, slug;
    /// A secret's name; the form of an environment variable.
    SecretName, variable;
    /// An environment variable's name.
    EnvName, variable;
    /// A template's name in the catalogue.
    TemplateName, dns_label_of_40;
    /// An e-mail address as typed, checked for shape only: the proof of an address is a delivered mail.
    Email, email;
    /// An OCI image reference: `[host[:port]/]path[:tag][@sha256:hex]`.
    ImageRef, image_ref;
}

fn dns_label(text: &str, longest: usize, why: &'static str) -> Result<(), InvalidName> {
    let bytes = text.as_bytes();
    let inner = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || *byte == b'-';
    let edge = |byte: Option<&u8>| byte.is_some_and(|byte| *byte != b'-');
    let fits = !bytes.is_empty() && bytes.len() <= longest;
    // A doubled hyphen is how internationalised labels (`xn--`) are marked.
    let plain = !text.contains("--") && bytes.first().is_some_and(u8::is_ascii_lowercase);
    if fits && plain && bytes.iter().all(inner) && edge(bytes.last()) { Ok(()) } else { Err(InvalidName(why)) }
}

fn dns_label_of_40(text: &str) -> Result<(), InvalidName> {
    dns_label(
        text,
        40,
        "must be 1 to 40 characters of a-z, 0-9 and single hyphens, starting with a letter and not ending with a hyphen",
    )
}

fn slug(text: &str) -> Result<(), InvalidName> {
    // No hyphen: `<workload>-<slug>` must split in one way only, at its last hyphen.
    let why = "must be 1 to 20 characters of a-z and 0-9, starting with a letter";
    if text.contains('-') { Err(InvalidName(why)) } else { dns_label(text, 20, why) }
}

fn variable(text: &str) -> Result<(), InvalidName> {
    let bytes = text.as_bytes();
    let head = bytes.first().is_some_and(|byte| byte.is_ascii_alphabetic() || *byte == b'_');
    let tail = bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || *byte == b'_');
    if head && tail && bytes.len() <= 128 {
        Ok(())
    } else {
        Err(InvalidName("must be 1 to 128 letters, digits and underscores, not starting with a digit"))
    }
}

fn email(text: &str) -> Result<(), InvalidName> {
    let why = InvalidName("must be an e-mail address such as name@example.org, at most 254 characters");
    let (local, domain) = text.rsplit_once('@').ok_or(why.clone())?;
    let printable = |part: &str| part.chars().all(|c| !c.is_control() && !c.is_whitespace());
    let dotted = domain.split('.').all(|label| !label.is_empty() && label.len() <= 63);
    let sized = text.len() <= 254 && !local.is_empty() && local.len() <= 64;
    if sized && dotted && !domain.is_empty() && printable(text) && !local.contains('@') { Ok(()) } else { Err(why) }
}

fn image_ref(text: &str) -> Result<(), InvalidName> {
    let why = InvalidName(
        "must be an image reference such as registry.example/team/agent:1.2 or name@sha256:<64 hex>, at most 255 characters",
    );
    if text.is_empty() || text.len() > 255 {
        return Err(why);
    }
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => (rest, Some(digest)),
        None => (text, None),
    };
    if let Some(digest) = digest {
        let hex = digest.strip_prefix("sha256:").ok_or(why.clone())?;
        if hex.len() != 64 || !hex.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte)) {
            return Err(why);
        }
    }
    // A colon after the last slash is a tag; one before it belongs to the host's port.
    let (path, tag) = match rest.rsplit_once(':') {
        Some((path, tag)) if !tag.contains('/') => (path, Some(tag)),
        _ => (rest, None),
    };
    if let Some(tag) = tag {
        let body = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
        let head = tag.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        if !head || tag.len() > 128 || !tag.bytes().all(body) {
            return Err(why);
        }
    }
    let mut parts = path.split('/').peekable();
    let mut first = true;
    while let Some(part) = parts.next() {
        let is_host = first && parts.peek().is_some() && (part.contains(['.', ':']) || part == "localhost");
        first = false;
        let valid = if is_host {
            let (host, port) = part.split_once(':').unwrap_or((part, "1"));
            !host.is_empty()
                && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-'))
                && port.parse::<u16>().is_ok()
        } else {
            let edge = |byte: Option<u8>| byte.is_some_and(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
            let body =
                |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'.' | b'_' | b'-');
            edge(part.bytes().next()) && edge(part.bytes().last()) && part.bytes().all(body)
        };
        if !valid {
            return Err(why);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn workload_names_are_dns_labels() {
        for good in ["a", "hello", "my-agent-2"] {
            assert!(WorkloadName::parse(good).is_ok(), "{good}");
        }
        let long = "a".repeat(41);
        for bad in ["", "-a", "a-", "A", "a_b", "a b", "1a", "xn--a", "é", &long] {
            assert!(WorkloadName::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn images_are_oci_references() {
        let hex = "0123456789abcdef".repeat(4);
        let pinned = format!("ghcr.example/a/b:1@sha256:{hex}");
        for good in ["alpine", "clawhq/hello:dev", "localhost:5000/a/b:1.2", "a.b/c", pinned.as_str()] {
            assert!(ImageRef::parse(good).is_ok(), "{good}");
        }
        for bad in ["", "UPPER", "a//b", "a:", "a@sha256:12", "a b", "-a", "a:b/c:", "../../etc", "a@md5:00"] {
            assert!(ImageRef::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn emails_have_a_shape() {
        assert!(Email::parse("a@b.c").is_ok());
        for bad in ["", "a", "@b", "a@", "a b@c", "a@b..c", "a@b@c"] {
            assert!(Email::parse(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "\\PC{0,300}") {
            let _ = (WorkloadName::parse(&text), OrgSlug::parse(&text), ImageRef::parse(&text));
            let _ = (Email::parse(&text), SecretName::parse(&text));
        }

        #[test]
        fn host_labels_always_fit(name in "[a-z][a-z0-9-]{0,50}", slug in "[a-z0-9]{1,30}") {
            if let (Ok(name), Ok(slug)) = (WorkloadName::parse(&name), OrgSlug::parse(&slug)) {
                let label = format!("{name}-{slug}");
                prop_assert!(label.len() <= 63);
            }
        }
    }
}
