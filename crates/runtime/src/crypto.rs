//! The process-wide TLS provider.

/// Installs *ring* as rustls' provider. The first line of every `main`, and of every test that opens a TLS connection.
///
/// Several crates below us would each pick a provider by feature flag, and rustls panics on the first connection when two
/// are compiled in and none is chosen. May be called any number of times.
pub fn install() {
    // An error means that a provider is in place already, which is what was wanted.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

#[cfg(test)]
mod tests {
    #[test]
    fn twice_is_fine() {
        super::install();
        super::install();
        assert!(rustls::crypto::CryptoProvider::get_default().is_some());
    }
}
