//! The socket the containers' inits dial. Who dials is read from the kernel, never from what is said.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clawhq_init::{Exec, Hello, MAX_TO_AGENT, ProtocolError, ToAgent, ToInit, frame_len};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::Pid;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

use crate::cgroup;
use crate::runtime::INIT_MOUNT;

const FIRST_FRAME: Duration = Duration::from_secs(5);
const WRITE_DEADLINE: Duration = Duration::from_secs(10);
/// Of one container at once: its init and its execs; a tenant's own dialling ends here.
const PER_CONTAINER: usize = 64;
const TICKET_LIFE: Duration = Duration::from_secs(30);
/// Frames that may wait for an init that does not read.
const OUTBOX: usize = 64;

/// What the inits said.
pub enum InitEvent {
    Hello { container: String, pid: u32, connection: Connection, hello: Hello },
    Frame { container: String, connection: u64, frame: ToAgent },
    Gone { container: String, connection: u64 },
}

/// Where frames for one init go.
#[derive(Clone, Debug)]
pub struct Connection {
    pub id: u64,
    outbox: mpsc::Sender<Zeroizing<Vec<u8>>>,
}

impl Connection {
    /// False: the init does not read, or is gone; it will dial again.
    pub fn send(&self, frame: &ToInit) -> Result<bool, ProtocolError> {
        Ok(self.outbox.try_send(Zeroizing::new(frame.encode()?)).is_ok())
    }
}

#[cfg(test)]
impl Connection {
    /// Nobody's, and where its frames come out.
    pub fn loose() -> (Self, mpsc::Receiver<Zeroizing<Vec<u8>>>) {
        let (outbox, frames) = mpsc::channel(OUTBOX);
        (Self { id: 0, outbox }, frames)
    }
}

/// What `init run TICKET` may fetch, once, from inside the container it was made for.
#[derive(Clone, Default)]
pub struct Tickets(Arc<Mutex<HashMap<String, Ticket>>>);

struct Ticket {
    container: String,
    exec: Exec,
    until: Instant,
    /// Told the host pid of who fetched it.
    fetched: oneshot::Sender<u32>,
}

impl Tickets {
    /// A ticket, and the host pid of the process that becomes it.
    pub fn issue(&self, container: &str, exec: Exec) -> (String, oneshot::Receiver<u32>) {
        let name = hex::encode(rand::random::<[u8; 16]>());
        let (fetched, pid) = oneshot::channel();
        let now = Instant::now();
        let mut tickets = self.0.lock();
        tickets.retain(|_, ticket| ticket.until > now);
        let ticket = Ticket { container: container.to_owned(), exec, until: now + TICKET_LIFE, fetched };
        tickets.insert(name.clone(), ticket);
        (name, pid)
    }

    fn take(&self, name: &str, container: &str, pid: u32) -> Option<Exec> {
        let mut tickets = self.0.lock();
        if tickets.get(name)?.container != container {
            return None;
        }
        let ticket = tickets.remove(name)?;
        if ticket.until <= Instant::now() {
            return None;
        }
        let _ = ticket.fetched.send(pid);
        Some(ticket.exec)
    }
}

/// Who is at the other end of a socket.
struct Peer {
    pid: u32,
    container: String,
    /// It is PID 1 of its container.
    is_init: bool,
}

impl Peer {
    fn of(stream: &UnixStream) -> io::Result<Self> {
        let pid = getsockopt(stream, sockopt::PeerCredentials)?.pid();
        let pid = u32::try_from(pid).map_err(|_| io::Error::other("the peer has no pid here"))?;
        // Pins the process, so that what is read about the pid is not about a successor. Kernels before 6.5 have no
        // such thing; what is then left is a race over a pid that would have to come round within microseconds.
        let pin = getsockopt(stream, sockopt::PeerPidfd).ok();
        let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        if let Some(pin) = pin
            && !lives(&pin, pid)
        {
            return Err(io::Error::other("the peer is gone"));
        }
        let container = cgroup::container_id(&groups).ok_or_else(|| io::Error::other("the peer is in no container"))?;
        Ok(Self { pid, container: container.to_owned(), is_init: is_pid_1(&status) })
    }
}

fn lives(pin: &OwnedFd, pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pin.as_raw_fd())).is_ok_and(|text| {
        text.lines().any(|line| line.strip_prefix("Pid:").is_some_and(|rest| rest.trim().parse() == Ok(pid)))
    })
}

/// In exactly one namespace below ours, and the first process there.
fn is_pid_1(status: &str) -> bool {
    status
        .lines()
        .find_map(|line| line.strip_prefix("NSpid:"))
        .is_some_and(|pids| pids.split_whitespace().skip(1).eq(["1"]))
}

#[derive(Clone)]
struct Server {
    events: mpsc::Sender<InitEvent>,
    tickets: Tickets,
    open: Arc<Mutex<HashMap<String, usize>>>,
    stop: CancellationToken,
}

/// Binds the socket (replacing one that a former agent left) and serves it until `stop`.
pub fn serve(
    path: PathBuf,
    events: mpsc::Sender<InitEvent>,
    tickets: Tickets,
    stop: CancellationToken,
) -> io::Result<()> {
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&path)?;
    // Containers run as many users; whoever dials is known by the kernel.
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o666))?;
    let server = Server { events, tickets, open: Arc::default(), stop };
    tokio::spawn(async move {
        let mut next = 0_u64;
        loop {
            let stream = tokio::select! {
                () = server.stop.cancelled() => return,
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => stream,
                    Err(error) => {
                        // Out of descriptors: those in use will be given back.
                        tracing::warn!(%error, "an init's connection could not be accepted");
                        tokio::time::sleep(Duration::from_millis(50)).await;
                        continue;
                    }
                },
            };
            next += 1;
            let (server, id) = (server.clone(), next);
            tokio::spawn(async move {
                let stop = server.stop.clone();
                tokio::select! {
                    () = stop.cancelled() => {}
                    result = server.connection(stream, id) => if let Err(error) = result {
                        tracing::debug!(%error, "an init's connection ended");
                    }
                }
            });
        }
    });
    Ok(())
}

impl Server {
    async fn connection(&self, stream: UnixStream, id: u64) -> io::Result<()> {
        let peer = Peer::of(&stream)?;
        let _seat = Seat::take(self.open.clone(), &peer.container)
            .ok_or_else(|| io::Error::other(format!("container {} dials too often", peer.container)))?;
        let (mut read, mut write) = stream.into_split();
        let first = tokio::time::timeout(FIRST_FRAME, receive(&mut read)).await??;
        match first {
            Some(ToAgent::ExecHello { ticket }) => {
                let answer = match self.tickets.take(&ticket, &peer.container, peer.pid) {
                    Some(exec) => ToInit::ExecSpec(exec),
                    None => ToInit::ExecRefused { reason: "the ticket is not valid".to_owned() },
                };
                let frame = Zeroizing::new(answer.encode().map_err(io::Error::other)?);
                tokio::time::timeout(WRITE_DEADLINE, write.write_all(&frame)).await?
            }
            Some(ToAgent::Hello(hello)) if peer.is_init => self.init(peer, hello, read, write, id).await,
            Some(ToAgent::Hello(_)) => Err(io::Error::other(format!(
                "a process of container {} that is not its init said hello",
                peer.container
            ))),
            Some(_) => Err(io::Error::other("the first frame was no hello")),
            None => Ok(()),
        }
    }

    async fn init(
        &self,
        peer: Peer,
        hello: Hello,
        mut read: OwnedReadHalf,
        mut write: OwnedWriteHalf,
        id: u64,
    ) -> io::Result<()> {
        let Peer { pid, container, .. } = peer;
        let (outbox, mut frames) = mpsc::channel::<Zeroizing<Vec<u8>>>(OUTBOX);
        let send = |event| async { self.events.send(event).await.map_err(io::Error::other) };
        let connection = Connection { id, outbox };
        send(InitEvent::Hello { container: container.clone(), pid, connection, hello }).await?;
        let reader = async {
            while let Some(frame) = receive(&mut read).await? {
                send(InitEvent::Frame { container: container.clone(), connection: id, frame }).await?;
            }
            Ok(())
        };
        let writer = async {
            while let Some(frame) = frames.recv().await {
                tokio::time::timeout(WRITE_DEADLINE, write.write_all(&frame)).await??;
            }
            // The agent has dropped this connection for a newer one.
            Ok(())
        };
        let result: io::Result<()> = tokio::select! { result = reader => result, result = writer => result };
        send(InitEvent::Gone { container: container.clone(), connection: id }).await?;
        result
    }
}

/// The next frame that is known; `None` at the end.
async fn receive(read: &mut OwnedReadHalf) -> io::Result<Option<ToAgent>> {
    let invalid = |error: ProtocolError| io::Error::new(io::ErrorKind::InvalidData, error);
    loop {
        let mut header = [0; 4];
        match read.read_exact(&mut header).await {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            other => other?,
        };
        let mut frame = vec![0; frame_len(header, MAX_TO_AGENT).map_err(invalid)?];
        read.read_exact(&mut frame).await?;
        match ToAgent::decode(&frame) {
            Ok(frame) => return Ok(Some(frame)),
            // From a newer init.
            Err(ProtocolError::UnknownFrame(kind)) => tracing::debug!(kind, "an unknown frame is skipped"),
            Err(error) => return Err(invalid(error)),
        }
    }
}

/// One of a container's connections.
struct Seat(Arc<Mutex<HashMap<String, usize>>>, String);

impl Seat {
    fn take(open: Arc<Mutex<HashMap<String, usize>>>, container: &str) -> Option<Self> {
        let mut counts = open.lock();
        let count = counts.entry(container.to_owned()).or_default();
        if *count >= PER_CONTAINER {
            return None;
        }
        *count += 1;
        drop(counts);
        Some(Self(open, container.to_owned()))
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut counts = self.0.lock();
        if let Some(count) = counts.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.1);
            }
        }
    }
}

/// A process that was to become a container's init and has not begun to be one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unborn {
    pub pid: u32,
    pub container: String,
}

impl Unborn {
    /// Those of containers that `init_dir` is mounted into, of every stage before the init's own program. They wait for
    /// the runtime's word to go on; if that was killed, for ever, and nobody else knows of them. Reads all of `/proc`.
    pub fn all(init_dir: &Path) -> Vec<Self> {
        let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter_map(|pid| Self::of(pid, init_dir)).collect()
    }

    fn of(pid: u32, init_dir: &Path) -> Option<Self> {
        let read = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/{name}")).ok();
        if !read("comm")?.starts_with("runc:[") || !is_pid_1(&read("status")?) {
            return None;
        }
        let place = |path: &Path| std::fs::metadata(path).map(|found| (found.dev(), found.ino())).ok();
        let theirs = place(Path::new(&format!("/proc/{pid}/root{INIT_MOUNT}")))?;
        let container = cgroup::container_id(&read("cgroup")?)?.to_owned();
        (place(init_dir)? == theirs).then_some(Self { pid, container })
    }

    /// Ends it, if it is still what it was.
    pub fn end(&self, init_dir: &Path) -> bool {
        let Ok(pid) = i32::try_from(self.pid) else { return false };
        Self::of(self.pid, init_dir).as_ref() == Some(self) && kill(Pid::from_raw(pid), Signal::SIGKILL).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_process_of_a_container_is_an_init() {
        assert!(is_pid_1("Name:\tinit\nNSpid:\t4711\t1\n"));
        assert!(!is_pid_1("NSpid:\t4711\t7\n"));
        assert!(!is_pid_1("NSpid:\t1\n"), "the host's own");
        assert!(!is_pid_1("NSpid:\t4711\t7\t1\n"), "first in a namespace the tenant made");
        assert!(!is_pid_1("Name:\tinit\n"));
    }

    #[test]
    fn a_ticket_is_good_once_in_its_container() {
        let tickets = Tickets::default();
        let (ticket, mut pid) = tickets.issue("a", Exec::default());
        assert!(tickets.take(&ticket, "b", 9).is_none(), "another container's");
        assert!(tickets.take(&ticket, "a", 10).is_some());
        assert_eq!(pid.try_recv(), Ok(10));
        assert!(tickets.take(&ticket, "a", 11).is_none(), "used");
    }

    #[tokio::test]
    async fn a_process_outside_of_containers_is_not_heard() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        let (events, mut seen) = mpsc::channel(1);
        let stop = CancellationToken::new();
        serve(path.clone(), events, Tickets::default(), stop.clone()).unwrap();
        let mut stream = UnixStream::connect(&path).await.unwrap();
        let hello = ToAgent::Hello(Hello { version: 1, boot: [0; 16], state: clawhq_init::State::Waiting });
        let _ = stream.write_all(&hello.encode()).await;
        let mut rest = Vec::new();
        // Reset or closed: either way nothing is answered, and nothing reaches the agent.
        let _ = stream.read_to_end(&mut rest).await;
        assert!(rest.is_empty());
        stop.cancel();
        assert!(seen.try_recv().is_err());
    }

    #[test]
    fn seats_are_bounded_and_given_back() {
        let open = Arc::default();
        let seats: Vec<_> = (0..PER_CONTAINER).map(|_| Seat::take(Arc::clone(&open), "a").unwrap()).collect();
        assert!(Seat::take(Arc::clone(&open), "a").is_none());
        assert!(Seat::take(Arc::clone(&open), "b").is_some());
        drop(seats);
        assert!(open.lock().is_empty());
    }
}
