//! The door for node agents: TLS by our own certificate authority, a client certificate asked for but not needed (a node
//! that enrols has none yet), and bounds on who may stand in it.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use clawhq_app::App;
use parking_lot::{Mutex, RwLock};
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
use crate::limits::Network;
use crate::state::Backend;

/// Longest handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// Whoever shows no node's certificate, handshakes under way included: that is a node for the seconds of its enrolment,
/// and everybody else. They have a room of their own, so that they cannot keep nodes out of theirs.
#[derive(Clone, Copy)]
struct Strangers {
    at_once: usize,
    of_one_address: usize,
    life: Duration,
}

const STRANGERS: Strangers = Strangers { at_once: 256, of_one_address: 32, life: Duration::from_secs(30) };

/// The places taken in that room, by address.
type Taken = Arc<Mutex<HashMap<Network, usize>>>;

/// One of them, given back when it is dropped.
struct Seat(Taken, Network);

impl Seat {
    fn take(taken: &Taken, address: Network, most: Strangers) -> Option<Self> {
        let mut places = taken.lock();
        if places.values().sum::<usize>() >= most.at_once
            || places.get(&address).is_some_and(|one| *one >= most.of_one_address)
        {
            return None;
        }
        *places.entry(address).or_default() += 1;
        Some(Self(taken.clone(), address))
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut places = self.0.lock();
        if let Some(count) = places.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                places.remove(&self.1);
            }
        }
    }
}
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
    _node: Option<OwnedSemaphorePermit>,
    _stranger: Option<Seat>,
    /// A stranger's time is over then.
    ends: Option<Pin<Box<tokio::time::Sleep>>>,
}

impl Connection {
    /// `None`: as many nodes are connected as may be.
    fn new(tls: TlsStream<TcpStream>, seat: Seat, nodes: &Arc<Semaphore>, life: Duration) -> Option<Self> {
        if tls.get_ref().1.peer_certificates().is_none_or(|chain| chain.is_empty()) {
            let ends = Some(Box::pin(tokio::time::sleep(life)));
            return Some(Self { tls, _node: None, _stranger: Some(seat), ends });
        }
        let place = nodes.clone().try_acquire_owned().ok()?;
        Some(Self { tls, _node: Some(place), _stranger: None, ends: None })
    }
}

/// Accepts, shakes hands beside each other, and hands connections on.
pub fn accept(
    backend: &Backend,
    listener: TcpListener,
    address: SocketAddr,
    shutdown: CancellationToken,
) -> anyhow::Result<mpsc::Receiver<io::Result<Connection>>> {
    accept_some(backend, listener, address, STRANGERS, shutdown)
}

fn accept_some(
    backend: &Backend,
    listener: TcpListener,
    address: SocketAddr,
    strangers: Strangers,
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
    let nodes = Arc::new(Semaphore::new(config.limits.node_connections));
    let taken = Taken::default();
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
            let Some(seat) = Seat::take(&taken, peer.ip().into(), strangers) else {
                tracing::debug!(%peer, "too many connections without a node's certificate");
                continue;
            };
            let (acceptor, sender, nodes) = (acceptor.clone(), sender.clone(), nodes.clone());
            tokio::spawn(async move {
                match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
                    Ok(Ok(tls)) => match Connection::new(tls, seat, &nodes, strangers.life) {
                        Some(connection) => drop(sender.send(Ok(connection)).await),
                        None => tracing::warn!(%peer, "as many nodes are connected as may be"),
                    },
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
        if self.ends.as_mut().is_some_and(|ends| ends.as_mut().poll(context).is_ready()) {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "an enrolment does not take that long")));
        }
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

#[cfg(test)]
mod tests {
    use clawhq_app::AppConfig;
    use clawhq_app::ca::Ca;
    use clawhq_domain::ids::NodeId;
    use clawhq_runtime::clock::Clock;
    use clawhq_runtime::metrics::Metrics;
    use clawhq_sealing::KeyRing;
    use clawhq_testkit::TestDb;
    use tokio::io::AsyncReadExt as _;
    use tokio_rustls::TlsConnector;

    use super::*;

    type Client = tokio_rustls::client::TlsStream<TcpStream>;

    async fn dial(app: &App, address: SocketAddr, node: Option<NodeId>) -> io::Result<Client> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(app.ca().pem().as_bytes()).unwrap()).unwrap();
        let client = rustls::ClientConfig::builder().with_root_certificates(roots);
        let mut client = match node {
            None => client.with_no_client_auth(),
            Some(node) => {
                let key = rcgen::KeyPair::generate().unwrap();
                let request = rcgen::CertificateParams::default().serialize_request(&key).unwrap().pem().unwrap();
                let signed = app.ca().sign_node(node, &request, chrono::Utc::now().timestamp_millis()).unwrap();
                let chain = vec![CertificateDer::from_pem_slice(signed.pem.as_bytes()).unwrap()];
                let key = PrivateKeyDer::from_pem_slice(key.serialize_pem().as_bytes()).unwrap();
                client.with_client_auth_cert(chain, key).unwrap()
            }
        };
        client.alpn_protocols = vec![b"h2".to_vec()];
        let name = rustls::pki_types::ServerName::try_from(clawhq_app::ca::SERVER_NAME).unwrap();
        TlsConnector::from(Arc::new(client)).connect(name, TcpStream::connect(address).await?).await
    }

    /// Whether the other side has hung up; waits until it is certain.
    async fn is_cut(mut client: Client) -> bool {
        matches!(client.read(&mut [0; 1]).await, Ok(0) | Err(_))
    }

    #[tokio::test]
    async fn strangers_cannot_keep_nodes_out() {
        clawhq_runtime::crypto::install();
        let (db, folder) = (TestDb::new().await.unwrap(), tempfile::tempdir().unwrap());
        let ring = KeyRing::open(&folder.path().join("keys")).unwrap();
        let ca = Ca::open(&folder.path().join("ca")).unwrap();
        let app = App::new(AppConfig::default(), db.store.clone(), ring, ca, Clock::system());
        let stop = CancellationToken::new();
        let backend = Backend::new(Config::default(), app.clone(), Metrics::new(), stop.clone());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        // Nobody's time ends here, however slow the machine is.
        let few = Strangers { at_once: 3, of_one_address: 2, life: Duration::from_secs(3600) };
        let mut accepted = accept_some(&backend, listener, address, few, stop.clone()).unwrap();
        let mut open = Vec::new();
        let mut next = async || accepted.recv().await.unwrap().unwrap();

        // A node's connection gives its place among the strangers back as soon as it is known for one.
        let mut nodes = Vec::new();
        for node in 1..=5 {
            nodes.push(dial(&app, address, Some(NodeId::from_u128(node))).await.unwrap());
            open.push(next().await);
        }
        let _first = dial(&app, address, None).await.unwrap();
        open.push(next().await);
        let _second = dial(&app, address, None).await.unwrap();
        open.push(next().await);
        assert!(dial(&app, address, None).await.is_err(), "a third of one address");

        // Whatever it says or does not say, a stranger's time ends, and its place is free again.
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let brief = Strangers { at_once: 1, of_one_address: 1, life: Duration::from_millis(100) };
        let mut accepted = accept_some(&backend, listener, address, brief, stop.clone()).unwrap();
        let first = dial(&app, address, None).await.unwrap();
        let mut stranger = accepted.recv().await.unwrap().unwrap();
        let silence = stranger.read(&mut [0; 1]).await.unwrap_err();
        assert_eq!(silence.kind(), io::ErrorKind::TimedOut);
        drop(stranger);
        assert!(is_cut(first).await);
        let _second = dial(&app, address, None).await.unwrap();
        open.push(accepted.recv().await.unwrap().unwrap());
        stop.cancel();
    }
}
