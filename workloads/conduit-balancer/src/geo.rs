//! Country of an address, from an MMDB file that the operator supplies.

use crate::board::country_place;
use maxminddb::{Reader, path};
use std::io;
use std::net::IpAddr;
use std::path::Path;

/// An open country database (GeoLite2-Country, GeoLite2-City, DB-IP and others of that shape).
pub struct Countries(Reader<Vec<u8>>);

impl Countries {
    /// Largest file taken: city databases have some 60 MiB.
    const MOST: u64 = 256 << 20;

    pub fn open(file: &Path) -> io::Result<Self> {
        let size = std::fs::metadata(file)?.len();
        if size > Self::MOST {
            return Err(io::Error::other(format!(
                "{} has {size} bytes, more than any country database",
                file.display()
            )));
        }
        Reader::open_readfile(file).map(Countries).map_err(io::Error::other)
    }

    /// The place of the country in the board; 0 when the database does not know.
    pub fn place(&self, addr: IpAddr) -> usize {
        let Ok(found) = self.0.lookup(addr.to_canonical()) else { return 0 };
        let code: Option<&str> = found.decode_path(&path!["country", "iso_code"]).ok().flatten();
        code.map_or(0, country_place)
    }
}
