//! Where a page begins, as an opaque word. It is no credential: a made-up one only begins elsewhere in the same org.

use clawhq_domain::Reason;
use data_encoding::BASE64URL_NOPAD;

use crate::{Error, Result};

pub fn invalid() -> Error {
    Error::invalid(
        "/cursor",
        Reason::new("invalid_cursor", "The cursor is not one of this list's.").with_hint("Begin without one."),
    )
}

pub fn write_number(number: i64) -> String {
    BASE64URL_NOPAD.encode(&number.to_be_bytes())
}

pub fn read_number(text: &str) -> Result<i64> {
    let bytes = BASE64URL_NOPAD.decode(text.as_bytes()).map_err(|_| invalid())?;
    Ok(i64::from_be_bytes(bytes.try_into().map_err(|_| invalid())?))
}

pub fn write_id(id: u128) -> String {
    BASE64URL_NOPAD.encode(&id.to_be_bytes())
}

pub fn read_id(text: &str) -> Result<u128> {
    let bytes = BASE64URL_NOPAD.decode(text.as_bytes()).map_err(|_| invalid())?;
    Ok(u128::from_be_bytes(bytes.try_into().map_err(|_| invalid())?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cursors_read_back_and_others_are_refused() {
        assert_eq!(read_number(&write_number(-5)).unwrap(), -5);
        assert_eq!(read_id(&write_id(u128::MAX)).unwrap(), u128::MAX);
        for wrong in ["", "!", "AAAA", "x".repeat(300).as_str()] {
            assert!(read_number(wrong).is_err() && read_id(wrong).is_err(), "{wrong}");
        }
        assert!(read_number(&write_id(1)).is_err());
    }
}
