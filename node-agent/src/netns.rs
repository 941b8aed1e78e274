//! Doing things inside a container's network namespace, on threads of their own.
//!
//! `setns` changes one thread, so the runtime's threads must never do it. A thread goes in for one short job and comes
//! back; it must not stay, or the namespace would outlive its container.

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio::sync::oneshot;

/// Loopback answers or refuses at once; a full accept queue does neither.
const CONNECT_DEADLINE: Duration = Duration::from_millis(500);
const THREADS: usize = 4;

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
pub struct Workers(Arc<Mutex<Sender<Job>>>);

impl Workers {
    pub fn start() -> io::Result<Self> {
        let (jobs, queue) = channel::<Job>();
        let queue = Arc::new(Mutex::new(queue));
        for n in 0..THREADS {
            let queue = queue.clone();
            std::thread::Builder::new().name(format!("netns-{n}")).stack_size(128 << 10).spawn(move || work(&queue))?;
        }
        Ok(Self(Arc::new(Mutex::new(jobs))))
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
        self.0.lock().send(job).map_err(|_| io::Error::other("the namespace threads are gone"))?;
        take.await.map_err(|_| io::Error::other("a namespace thread ended"))?
    }

    /// [`Self::connect`], asking again for some milliseconds: a process that was just started is not there at the first
    /// try, and the runtime's timers are too coarse to wait for it.
    pub async fn connect_soon(&self, netns: &Netns, port: u16) -> io::Result<TcpStream> {
        let stream = self
            .run(netns, move || {
                let mut wait = Duration::from_micros(150);
                loop {
                    match loopback(port) {
                        Err(error)
                            if error.kind() == io::ErrorKind::ConnectionRefused && wait < Duration::from_millis(4) =>
                        {
                            std::thread::sleep(wait);
                            wait += wait / 4;
                        }
                        other => return other,
                    }
                }
            })
            .await?;
        let stream = TcpStream::from_std(stream)?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    /// Connects to 127.0.0.1:`port` as seen inside `netns`.
    pub async fn connect(&self, netns: &Netns, port: u16) -> io::Result<TcpStream> {
        let stream = self.run(netns, move || loopback(port)).await?;
        let stream = TcpStream::from_std(stream)?;
        stream.set_nodelay(true)?;
        Ok(stream)
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

fn loopback(port: u16) -> io::Result<std::net::TcpStream> {
    let stream =
        std::net::TcpStream::connect_timeout(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)), CONNECT_DEADLINE)?;
    stream.set_nonblocking(true)?;
    Ok(stream)
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
}
