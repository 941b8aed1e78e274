//! Doing things inside a container's network namespace, on threads of their own.
//!
//! `setns` changes one thread, so the runtime's threads must never do it. A thread goes in for one short job and comes
//! back; it must not stay, or the namespace would outlive its container. Nothing waits in there: a socket keeps the
//! namespace that it was made in, so one is made inside and connected outside, or a tenant that does not accept would hold
//! up everyone else's connections.

use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc::linger;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, connect, setsockopt, socket, sockopt};
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio::sync::oneshot;

/// Loopback answers or refuses at once; a full accept queue does neither.
const CONNECT_DEADLINE: Duration = Duration::from_millis(500);
const THREADS: usize = 4;
/// Between the tries for a process that was just started: the first wait, and the one that is too long to try again.
const SOON: (Duration, Duration) = (Duration::from_micros(150), Duration::from_millis(4));

type Job = Box<dyn FnOnce() + Send>;

/// An open network namespace. Dropping the last one lets it go.
#[derive(Clone, Debug)]
pub struct Netns(Arc<OwnedFd>);

impl Netns {
    /// The namespace of a process.
    pub fn of_pid(pid: u32) -> io::Result<Self> {
        Ok(Self(Arc::new(File::open(format!("/proc/{pid}/ns/net"))?.into())))
    }

    pub fn as_raw_fd(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

/// The threads.
#[derive(Clone)]
pub struct Workers {
    jobs: Arc<Mutex<Sender<Job>>>,
    soon: Arc<Mutex<Sender<Soon>>>,
}

impl Workers {
    pub fn start() -> io::Result<Self> {
        let (jobs, queue) = channel::<Job>();
        let queue = Arc::new(Mutex::new(queue));
        let thread = |name: String| std::thread::Builder::new().name(name).stack_size(128 << 10);
        for n in 0..THREADS {
            let queue = queue.clone();
            thread(format!("netns-{n}")).spawn(move || work(&queue))?;
        }
        let (soon, tries) = channel();
        thread("netns-soon".to_owned()).spawn(move || try_again(&tries))?;
        Ok(Self { jobs: Arc::new(Mutex::new(jobs)), soon: Arc::new(Mutex::new(soon)) })
    }

    /// Runs `job` inside `netns` and returns what it returns.
    pub async fn run<T: Send + 'static>(
        &self,
        netns: &Netns,
        job: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let (give, take) = oneshot::channel();
        let netns = netns.clone();
        let job: Job = Box::new(move || {
            let _ = give.send(inside(&netns, job));
        });
        self.jobs.lock().send(job).map_err(|_| io::Error::other("the namespace threads are gone"))?;
        take.await.map_err(|_| io::Error::other("a namespace thread ended"))?
    }

    /// [`Self::connect`], asking again for some milliseconds: a process that was just started is not there at the first
    /// try, and the runtime's timers are too coarse to wait for it.
    pub async fn connect_soon(&self, netns: &Netns, port: u16) -> io::Result<TcpStream> {
        let mut wait = SOON.0;
        loop {
            let socket = self.run(netns, stream_socket).await?;
            let (give, take) = oneshot::channel();
            let soon = Soon { socket, port, wait, due: Instant::now(), give };
            self.soon.lock().send(soon).map_err(|_| io::Error::other("the connecting thread is gone"))?;
            let (socket, tried, waits) = take.await.map_err(|_| io::Error::other("the connecting thread ended"))??;
            match connected(socket, tried).await {
                // On a busy machine the refusal may come behind the try.
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused && waits < SOON.1 => {
                    wait = longer(waits)
                }
                connected => return connected,
            }
        }
    }

    /// Connects to 127.0.0.1:`port` as seen inside `netns`.
    pub async fn connect(&self, netns: &Netns, port: u16) -> io::Result<TcpStream> {
        let socket = self.run(netns, stream_socket).await?;
        let tried = Tried::at(&socket, port)?;
        connected(socket, tried).await
    }
}

fn stream_socket() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    Ok(socket(AddressFamily::Inet, SockType::Stream, flags, None)?)
}

/// How far a connection on loopback is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tried {
    Connected,
    /// Nobody has answered: the accept queue is full.
    Waiting,
}

impl Tried {
    /// Tries once, without waiting. A refused socket may be tried again.
    fn at(socket: &OwnedFd, port: u16) -> io::Result<Self> {
        let address = SockaddrIn::from(std::net::SocketAddrV4::new(Ipv4Addr::LOCALHOST, port));
        // The first call begins. Loopback has answered when it returns, and the second one says what; where that is a
        // refusal, it is the end of the try as well.
        for _ in 0..2 {
            match connect(socket.as_raw_fd(), &address) {
                Ok(()) | Err(Errno::EISCONN) => return Ok(Self::Connected),
                Err(Errno::EINPROGRESS | Errno::EALREADY | Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(Self::Waiting)
    }
}

async fn connected(socket: OwnedFd, tried: Tried) -> io::Result<TcpStream> {
    let stream = TcpStream::from_std(socket.into())?;
    if tried == Tried::Waiting {
        tokio::time::timeout(CONNECT_DEADLINE, stream.writable()).await.map_err(|_| io::ErrorKind::TimedOut)??;
        if let Some(error) = stream.take_error()? {
            return Err(error);
        }
    }
    // Where nobody listens on a port that outgoing connections are given, a try may be given it and meet itself.
    if stream.local_addr()? == stream.peer_addr()? {
        // Closed in order, it would keep the port from whoever is about to listen on it.
        setsockopt(&stream, sockopt::Linger, &linger { l_onoff: 1, l_linger: 0 })?;
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// A connection to a process that may not listen yet.
struct Soon {
    socket: OwnedFd,
    port: u16,
    wait: Duration,
    due: Instant,
    give: oneshot::Sender<io::Result<(OwnedFd, Tried, Duration)>>,
}

fn longer(wait: Duration) -> Duration {
    wait + wait / 4
}

/// One thread for all of them: a try is a system call that does not wait.
fn try_again(queue: &Receiver<Soon>) {
    let mut waiting: Vec<Soon> = Vec::new();
    loop {
        let next = waiting.iter().map(|soon| soon.due).min();
        let came = match next {
            Some(due) => queue.recv_timeout(due.saturating_duration_since(Instant::now())),
            None => queue.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match came {
            Ok(soon) => waiting.push(soon),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        let now = Instant::now();
        let (due, later): (Vec<_>, Vec<_>) = waiting.into_iter().partition(|soon| soon.due <= now);
        waiting = later;
        for mut soon in due {
            match Tried::at(&soon.socket, soon.port) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused && soon.wait < SOON.1 => {
                    if !soon.give.is_closed() {
                        soon.due = now + soon.wait;
                        soon.wait = longer(soon.wait);
                        waiting.push(soon);
                    }
                }
                tried => {
                    let Soon { socket, wait, give, .. } = soon;
                    let _ = give.send(tried.map(|tried| (socket, tried, wait)));
                }
            }
        }
    }
}

fn work(queue: &Mutex<Receiver<Job>>) {
    loop {
        let next = queue.lock().recv();
        match next {
            Ok(job) => job(),
            Err(_) => return,
        }
    }
}

fn inside<T>(netns: &Netns, job: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let home = File::open("/proc/thread-self/ns/net")?;
    setns(netns.0.as_fd(), CloneFlags::CLONE_NEWNET)?;
    let result = job();
    // A thread that cannot come home would do the next job in a stranger's network.
    if let Err(error) = setns(home.as_fd(), CloneFlags::CLONE_NEWNET) {
        tracing::error!(%error, "cannot leave a container's network namespace");
        std::process::abort();
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn connects_in_a_namespace_and_comes_back() {
        let workers = Workers::start().unwrap();
        let own = Netns::of_pid(std::process::id()).unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (dialled, accepted) = tokio::join!(workers.connect(&own, port), listener.accept());
        assert_eq!(dialled.unwrap().local_addr().unwrap(), accepted.unwrap().1);
        drop(listener);
        assert_eq!(workers.connect(&own, port).await.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }

    #[tokio::test]
    async fn a_process_that_listens_later_is_found() {
        let (workers, own) = (Workers::start().unwrap(), Netns::of_pid(std::process::id()).unwrap());
        // Bound, so that nobody else has the port, and not listening.
        let late = tokio::net::TcpSocket::new_v4().unwrap();
        late.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let port = late.local_addr().unwrap().port();
        // It gives up in the end.
        let refused = workers.connect_soon(&own, port).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        // Until then the same socket is tried again.
        let socket = stream_socket().unwrap();
        for _ in 0..3 {
            let refused = loop {
                match Tried::at(&socket, port) {
                    // The refusal is on its way.
                    Ok(Tried::Waiting) => tokio::task::yield_now().await,
                    other => break other.unwrap_err(),
                }
            };
            assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        }
        let listener = late.listen(1).unwrap();
        let tried = Tried::at(&socket, port).unwrap();
        let (dialled, accepted) = tokio::join!(connected(socket, tried), listener.accept());
        assert_eq!(dialled.unwrap().local_addr().unwrap(), accepted.unwrap().1);
        // The thread finds one that begins while it is at it.
        let late = tokio::net::TcpSocket::new_v4().unwrap();
        late.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let port = late.local_addr().unwrap().port();
        let begins = async { late.listen(1).unwrap().accept().await.unwrap().1 };
        let (dialled, from) = tokio::join!(workers.connect_soon(&own, port), begins);
        assert_eq!(dialled.unwrap().local_addr().unwrap(), from);
    }

    #[tokio::test]
    async fn who_does_not_accept_holds_up_nobody_else() {
        let (workers, own) = (Workers::start().unwrap(), Netns::of_pid(std::process::id()).unwrap());
        // A queue of one, and nobody who takes from it.
        let deaf = tokio::net::TcpSocket::new_v4().unwrap();
        deaf.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let deaf = deaf.listen(1).unwrap();
        let full = deaf.local_addr().unwrap().port();
        let mut queued = Vec::new();
        while let Ok(stream) = workers.connect(&own, full).await {
            queued.push(stream);
            assert!(queued.len() < 10, "it takes everyone");
        }
        let hearing = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = hearing.local_addr().unwrap().port();
        let mut held: tokio::task::JoinSet<_> = (0..2 * THREADS)
            .map(|n| {
                let (workers, own) = (workers.clone(), own.clone());
                async move {
                    if n % 2 == 0 { workers.connect(&own, full).await } else { workers.connect_soon(&own, full).await }
                }
            })
            .collect();
        for n in 0..THREADS {
            let dial = async {
                if n % 2 == 0 { workers.connect(&own, port).await } else { workers.connect_soon(&own, port).await }
            };
            // Before any of the others is through its deadline.
            tokio::select! {
                dialled = dial => drop(dialled.unwrap()),
                held = held.join_next() => panic!("{held:?} came first"),
            }
        }
        while let Some(one) = held.join_next().await {
            assert_eq!(one.unwrap().unwrap_err().kind(), io::ErrorKind::TimedOut);
        }
    }
}
