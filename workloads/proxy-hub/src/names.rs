//! Names to addresses, without the C library: a static binary in an empty image has no NSS.

use hickory_resolver::TokioResolver;
use hickory_resolver::config::LookupIpStrategy;
use std::net::IpAddr;
use std::time::Duration;

/// A caching resolver after `/etc/resolv.conf` and `/etc/hosts`.
#[derive(Clone)]
pub struct Names {
    resolver: Option<TokioResolver>,
}

/// Time a name may take.
const PATIENCE: Duration = Duration::from_secs(8);

impl Names {
    /// Without a usable resolv.conf only addresses and `localhost` resolve.
    pub fn system() -> Self {
        let made = TokioResolver::builder_tokio().and_then(|mut builder| {
            let options = builder.options_mut();
            options.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
            options.cache_size = 4096;
            options.timeout = Duration::from_secs(3);
            options.attempts = 2;
            options.negative_min_ttl = Some(Duration::from_secs(5));
            builder.build()
        });
        match made {
            Ok(resolver) => Self { resolver: Some(resolver) },
            Err(error) => {
                tracing::warn!(%error, "no resolver: only addresses can be reached");
                Self { resolver: None }
            }
        }
    }

    /// The addresses of a name, IPv4 first; empty if it has none or did not resolve in time.
    pub async fn resolve(&self, name: &str) -> Vec<IpAddr> {
        if name == "localhost" || name.ends_with(".localhost") {
            return vec![IpAddr::from([127, 0, 0, 1])];
        }
        let Some(resolver) = &self.resolver else { return Vec::new() };
        // With the dot no search domain is tried: a customer's name never becomes one of the host's network.
        let full = format!("{name}.");
        match tokio::time::timeout(PATIENCE, resolver.lookup_ip(full)).await {
            Ok(Ok(found)) => {
                let mut addrs: Vec<IpAddr> = found.iter().collect();
                addrs.sort_by_key(|ip| ip.is_ipv6());
                addrs
            }
            Ok(Err(_)) | Err(_) => Vec::new(),
        }
    }
}
