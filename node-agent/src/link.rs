//! The stream to the control plane: enrolment, certificates, dialling, and frames to and from the agent.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use clawhq_domain::ids::NodeId;
use clawhq_proto::FRAME_BYTES_MAX;
use clawhq_proto::v1::enrolment_client::EnrolmentClient;
use clawhq_proto::v1::node_link_client::NodeLinkClient;
use clawhq_proto::v1::{self, down, up};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use zeroize::Zeroize;

use crate::agent::{Event, LinkEvent, Tools};
use crate::channels::Channels;
use crate::ledger::replace_synced;

const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
const CALL_DEADLINE: Duration = Duration::from_secs(30);
const FIRST_WAIT: Duration = Duration::from_millis(200);
const LONGEST_WAIT: Duration = Duration::from_secs(10);
/// Heartbeats are answered every five seconds: a stream that is silent for this long is dead.
const SILENCE: Duration = Duration::from_secs(20);

/// Who this node is, as enrolled.
#[derive(Clone, Deserialize, Serialize)]
pub struct Identity {
    pub node: String,
    key_pem: String,
    certificate_pem: String,
    ca_pem: String,
    issued_at_ms: i64,
    not_after_ms: i64,
}

impl Drop for Identity {
    fn drop(&mut self) {
        self.key_pem.zeroize();
    }
}

impl Identity {
    pub fn load(path: &Path) -> Option<Self> {
        let text = std::fs::read(path).ok()?;
        serde_json::from_slice(&text)
            .map_err(|error| tracing::error!(path = %path.display(), %error, "the identity cannot be read"))
            .ok()
    }

    fn save(&self, path: &Path) -> anyhow::Result<()> {
        // The join token is burnt and the former certificate on its way out: this one must not be lost with the power.
        Ok(replace_synced(path, &serde_json::to_vec(self)?)?)
    }

    pub fn node_id(&self) -> Option<NodeId> {
        self.node.parse().ok()
    }

    /// At half of its life.
    fn renew_at_ms(&self) -> i64 {
        self.issued_at_ms + (self.not_after_ms - self.issued_at_ms) / 2
    }
}

pub struct Link {
    pub tools: Arc<Tools>,
    pub channels: Channels,
    pub facts: v1::NodeFacts,
    pub identity_path: PathBuf,
    pub stop: CancellationToken,
}

/// For people and other machines: it may be set.
pub fn wall_ms() -> i64 {
    chrono::Utc::now().timestamp_millis()
}

/// A new key and a request for its certificate. What a request says about names is not believed anyway.
fn request() -> anyhow::Result<(String, String)> {
    let key = rcgen::KeyPair::generate()?;
    let request = rcgen::CertificateParams::default().serialize_request(&key)?.pem()?;
    Ok((key.serialize_pem(), request))
}

impl Link {
    /// Dials for as long as the agent runs.
    pub async fn run(self) {
        let mut session = 0_u64;
        let mut wait = FIRST_WAIT;
        loop {
            session += 1;
            let began = Instant::now();
            let result = tokio::select! {
                () = self.stop.cancelled() => return,
                result = self.session(session) => result,
            };
            self.channels.close_all();
            let _ = self.tools.events.send(Event::Link(LinkEvent::Down { session })).await;
            match result {
                Ok(why) => tracing::info!(why, "the stream to the control plane ended"),
                Err(error) => tracing::warn!("no stream to the control plane: {error:#}"),
            }
            if began.elapsed() > LONGEST_WAIT {
                wait = FIRST_WAIT;
            }
            // Spread by half, so that many nodes do not come back at once.
            let pause = wait.mul_f64(0.5 + rand::random::<f64>() / 2.0);
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
            wait = (wait * 2).min(LONGEST_WAIT);
        }
    }

    fn endpoint(&self, ca_pem: &str, identity: Option<&Identity>) -> anyhow::Result<Endpoint> {
        let config = &self.tools.config;
        let mut tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(ca_pem))
            .domain_name(config.server_name.clone());
        if let Some(identity) = identity {
            tls = tls.identity(tonic::transport::Identity::from_pem(&identity.certificate_pem, &identity.key_pem));
        }
        Ok(Endpoint::from_shared(config.control_plane.clone())?
            .tls_config(tls)?
            .connect_timeout(CONNECT_DEADLINE)
            .tcp_nodelay(true)
            .initial_stream_window_size(1 << 20)
            .initial_connection_window_size(4 << 20)
            .http2_keep_alive_interval(Duration::from_secs(10))
            .keep_alive_timeout(Duration::from_secs(10))
            .keep_alive_while_idle(true))
    }

    async fn enrolled(&self) -> anyhow::Result<Identity> {
        if let Some(identity) = Identity::load(&self.identity_path)
            && identity.not_after_ms > wall_ms()
        {
            return Ok(identity);
        }
        let config = &self.tools.config;
        let token = match (&config.join_token, &config.join_token_file) {
            (Some(token), _) => token.expose().to_owned(),
            (None, Some(path)) => std::fs::read_to_string(path)
                .map_err(|error| anyhow::anyhow!("the join token {}: {error}", path.display()))?
                .trim()
                .to_owned(),
            (None, None) => anyhow::bail!("this node is not enrolled and has no join token"),
        };
        let ca_pem = std::fs::read_to_string(&config.ca_file)
            .map_err(|error| anyhow::anyhow!("the authority {}: {error}", config.ca_file.display()))?;
        let channel = self.endpoint(&ca_pem, None)?.connect().await?;
        let (key_pem, csr_pem) = request()?;
        let mut client = EnrolmentClient::new(channel);
        let call = client.enroll(v1::EnrollRequest { join_token: token, csr_pem, facts: Some(self.facts.clone()) });
        let reply = tokio::time::timeout(CALL_DEADLINE, call).await??.into_inner();
        let identity = Identity {
            node: reply.node_id,
            key_pem,
            certificate_pem: reply.certificate_pem,
            ca_pem: if reply.ca_pem.is_empty() { ca_pem } else { reply.ca_pem },
            issued_at_ms: wall_ms(),
            not_after_ms: reply.not_after_ms,
        };
        let node = identity.node_id().ok_or_else(|| anyhow::anyhow!("the control plane gave no node id"))?;
        identity.save(&self.identity_path)?;
        if let Some(path) = &config.join_token_file {
            let _ = std::fs::remove_file(path);
        }
        tracing::info!(%node, "enrolled");
        Ok(identity)
    }

    async fn renew(&self, channel: Channel, identity: &Identity) -> anyhow::Result<()> {
        let (key_pem, csr_pem) = request()?;
        let mut client = NodeLinkClient::new(channel);
        let call = client.renew(v1::RenewRequest { csr_pem });
        let reply = tokio::time::timeout(CALL_DEADLINE, call).await??.into_inner();
        let renewed = Identity {
            node: identity.node.clone(),
            key_pem,
            certificate_pem: reply.certificate_pem,
            ca_pem: if reply.ca_pem.is_empty() { identity.ca_pem.clone() } else { reply.ca_pem },
            issued_at_ms: wall_ms(),
            not_after_ms: reply.not_after_ms,
        };
        renewed.save(&self.identity_path)?;
        tracing::info!("the certificate was renewed");
        Ok(())
    }

    /// One stream, until it ends. Returns why it was ended when that was in order.
    async fn session(&self, session: u64) -> anyhow::Result<&'static str> {
        let identity = self.enrolled().await?;
        if let Some(node) = identity.node_id() {
            let _ = self.tools.events.send(Event::Enrolled(node)).await;
        }
        let channel = self.endpoint(&identity.ca_pem, Some(&identity))?.connect().await?;
        if wall_ms() >= identity.renew_at_ms() {
            self.renew(channel, &identity).await?;
            return Ok("a new certificate is used");
        }
        let (frames, mut control) = mpsc::unbounded_channel::<up::Frame>();
        let mut data = self.channels.attach();
        // What the agent says goes before what the channels carry.
        let outbound = futures::stream::poll_fn(move |context| {
            if let Poll::Ready(frame) = control.poll_recv(context) {
                return Poll::Ready(frame.map(|frame| v1::Up { frame: Some(frame) }));
            }
            match data.poll_recv(context) {
                Poll::Ready(Some(frame)) => Poll::Ready(Some(v1::Up { frame: Some(frame) })),
                // A later session has taken the channels over; this one ends by its own.
                Poll::Ready(None) | Poll::Pending => Poll::Pending,
            }
        });
        let mut client = NodeLinkClient::new(channel.clone())
            .max_decoding_message_size(FRAME_BYTES_MAX)
            .max_encoding_message_size(FRAME_BYTES_MAX);
        // Said first, so that the opening frame is there when the call is made.
        self.event(LinkEvent::Up { session, frames }).await?;
        let mut inbound = tokio::time::timeout(CALL_DEADLINE, client.link(outbound)).await??.into_inner();
        tracing::info!("linked to the control plane");
        let renewal = Duration::from_millis(u64::try_from(identity.renew_at_ms() - wall_ms()).unwrap_or(0));
        let renewal = tokio::time::sleep(renewal);
        tokio::pin!(renewal);
        loop {
            let frame = tokio::select! {
                () = &mut renewal => {
                    self.renew(channel, &identity).await?;
                    return Ok("a new certificate is used");
                }
                frame = tokio::time::timeout(SILENCE, inbound.message()) => {
                    frame.map_err(|_| anyhow::anyhow!("the control plane is silent"))??
                }
            };
            let at = Instant::now();
            match frame {
                None => return Ok("the control plane closed it"),
                Some(v1::Down { frame: None }) => tracing::debug!("a frame of a newer control plane is skipped"),
                Some(v1::Down { frame: Some(frame) }) => match frame {
                    down::Frame::Full(set) => self.event(LinkEvent::Full(set, at)).await?,
                    down::Frame::DesiredPart(part) => self.event(LinkEvent::Part(part, at)).await?,
                    down::Frame::TellAll(v1::TellAll {}) => self.event(LinkEvent::TellAll).await?,
                    down::Frame::Upsert(desired) => self.event(LinkEvent::Upsert(Box::new(desired), at)).await?,
                    down::Frame::Ack(ack) => self.event(LinkEvent::Ack(ack.index)).await?,
                    down::Frame::HeartbeatAck(ack) => self.event(LinkEvent::HeartbeatAck(ack)).await?,
                    down::Frame::ChannelOpen(open) => {
                        // Registered here: what follows it on the stream does not pass through the agent.
                        let accepted = self.channels.accept(open);
                        self.event(LinkEvent::Open(Box::new(accepted))).await?;
                    }
                    down::Frame::ChannelData(data) => self.channels.data(data),
                    down::Frame::ChannelCredit(credit) => self.channels.credit(credit),
                    down::Frame::ChannelClosed(closed) => self.channels.closed(&closed),
                },
            }
        }
    }

    async fn event(&self, event: LinkEvent) -> anyhow::Result<()> {
        self.tools.events.send(Event::Link(event)).await.map_err(|_| anyhow::anyhow!("the agent has ended"))
    }
}
