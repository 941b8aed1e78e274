//! The door for node agents: TLS by our own certificate authority, a client certificate asked for but not needed (a node
//! that enrols has none yet), and bounds on who may stand in it.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use clawhq_app::App;
use parking_lot::RwLock;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

use crate::config::Config;
use crate::state::Backend;

/// Longest handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// The server's certificate is made anew this often, long before it ends.
const RENEW: Duration = Duration::from_secs(24 * 3600);

#[derive(Debug)]
struct Resolver(RwLock<Arc<CertifiedKey>>);

impl ResolvesServerCert for Resolver {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.read().clone())
    }
}

fn server_key(app: &App, config: &Config, address: SocketAddr) -> anyhow::Result<Arc<CertifiedKey>> {
    let mut names = Vec::new();
    let mut addresses: Vec<IpAddr> = vec![address.ip()];
    for name in &config.node_names {
        match name.parse() {
            Ok(address) => addresses.push(address),
            Err(_) => names.push(name.clone()),
        }
    }
    let identity = app.ca().server(&names, &addresses).context("the node stream's certificate")?;
    let chain = CertificateDer::pem_slice_iter(identity.certificate_pem.as_bytes()).collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::from_pem_slice(identity.key_pem.as_bytes())?;
    let provider =
        rustls::crypto::CryptoProvider::get_default().ok_or_else(|| anyhow!("no TLS provider is installed"))?;
    Ok(Arc::new(CertifiedKey::new(chain, provider.key_provider.load_private_key(key)?)))
}

/// A connection with its place in the count.
pub struct Connection {
    tls: TlsStream<TcpStream>,
    _place: OwnedSemaphorePermit,
}

/// Accepts, shakes hands beside each other, and hands connections on.
pub fn accept(
    backend: &Backend,
    listener: TcpListener,
    address: SocketAddr,
    shutdown: CancellationToken,
) -> anyhow::Result<mpsc::Receiver<io::Result<Connection>>> {
    let app = backend.app().clone();
    let config = backend.config().clone();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(app.ca().pem().as_bytes())?)?;
    let verifier = WebPkiClientVerifier::builder(Arc::new(roots)).allow_unauthenticated().build()?;
    let resolver = Arc::new(Resolver(RwLock::new(server_key(&app, &config, address)?)));
    let mut tls =
        rustls::ServerConfig::builder().with_client_cert_verifier(verifier).with_cert_resolver(resolver.clone());
    tls.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(tls));
    let places = Arc::new(Semaphore::new(config.limits.node_connections));
    let (sender, receiver) = mpsc::channel(16);
    let renewing = shutdown.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                () = renewing.cancelled() => return,
                () = tokio::time::sleep(RENEW) => {}
            }
            match server_key(&app, &config, address) {
                Ok(key) => *resolver.0.write() = key,
                Err(error) => tracing::error!(%error, "the node stream's certificate could not be renewed"),
            }
        }
    });
    tokio::spawn(async move {
        loop {
            let place = tokio::select! {
                () = shutdown.cancelled() => return,
                place = places.clone().acquire_owned() => place,
            };
            let Ok(place) = place else { return };
            let (stream, peer) = tokio::select! {
                () = shutdown.cancelled() => return,
                accepted = listener.accept() => match accepted {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        tracing::warn!(%error, "a node's connection could not be accepted");
                        tokio::time::sleep(Duration::from_millis(50)).await;
                        continue;
                    }
                },
            };
            // A claim is one small frame: it must not wait for an acknowledgement of the last.
            let _ = stream.set_nodelay(true);
            let (acceptor, sender) = (acceptor.clone(), sender.clone());
            tokio::spawn(async move {
                match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
                    Ok(Ok(tls)) => {
                        let _ = sender.send(Ok(Connection { tls, _place: place })).await;
                    }
                    Ok(Err(error)) => tracing::debug!(%peer, %error, "a node's handshake failed"),
                    Err(_) => tracing::debug!(%peer, "a node's handshake took too long"),
                }
            });
        }
    });
    Ok(receiver)
}

impl Connected for Connection {
    type ConnectInfo = <TlsStream<TcpStream> as Connected>::ConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.tls.connect_info()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.tls.is_write_vectored()
    }
}
