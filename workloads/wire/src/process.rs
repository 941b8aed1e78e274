//! Worker processes: as many as the descriptor limit asks for, started by a parent and restarted when they die.
//!
//! A worker is the same executable again, with a socket to its parent as standard input. The parent's end closing (its
//! death included) is the worker's order to drain; the worker's end closing tells the parent that it is gone.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A worker process as its parent sees it.
pub struct Worker {
    pub child: Child,
    /// Our end of the socket that is the worker's standard input.
    pub control: UnixStream,
}

/// Starts this executable again with `args`.
pub fn start(args: &[OsString]) -> io::Result<Worker> {
    let (ours, theirs) = UnixStream::pair()?;
    let child = Command::new("/proc/self/exe").args(args).stdin(Stdio::from(OwnedFd::from(theirs))).spawn()?;
    Ok(Worker { child, control: ours })
}

/// In a worker: the socket to the parent.
pub fn parent() -> io::Result<UnixStream> {
    Ok(UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?))
}

/// Waiting times between restarts: doubled after each early death up to `most`, forgotten after a life of ten times `most`.
#[derive(Debug)]
pub struct Backoff {
    first: Duration,
    most: Duration,
    next: Duration,
    started: Instant,
}

impl Backoff {
    pub fn new(first: Duration, most: Duration, now: Instant) -> Self {
        Backoff { first, most, next: first, started: now }
    }

    /// The process died at `now`: when to start it again.
    pub fn died(&mut self, now: Instant) -> Instant {
        if now.duration_since(self.started) >= self.most * 10 {
            self.next = self.first;
        }
        let wait = self.next;
        self.next = (self.next * 2).min(self.most);
        now + wait
    }

    /// The process was started at `now`.
    pub fn started(&mut self, now: Instant) {
        self.started = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_doubles_and_forgets() {
        let mut now = Instant::now();
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_millis(400), now);
        for expected in [100, 200, 400, 400] {
            assert_eq!(backoff.died(now) - now, Duration::from_millis(expected));
            backoff.started(now);
        }
        now += Duration::from_secs(4);
        assert_eq!(backoff.died(now) - now, Duration::from_millis(100));
    }
}
