//! The connection to the node agent: dialled, lost, dialled again.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use clawhq_init::{MAX_TO_INIT, frame_len};
use zeroize::Zeroizing;

use crate::sys;

const MS: u64 = 1_000_000;
const FIRST_RETRY_NS: u64 = 5 * MS;
const LAST_RETRY_NS: u64 = 1_000 * MS;
/// A frame that has begun must be whole by then.
const FRAME_DEADLINE_NS: u64 = 10_000 * MS;
/// What may wait for a node agent that does not read; then the connection is given up, for the next Hello
/// says everything anyway.
const MAX_OUTPUT: usize = 64 << 10;

/// Overwritten when dropped: it may hold a claim.
pub type Frame = Zeroizing<Vec<u8>>;

pub struct Link {
    path: PathBuf,
    stream: Option<UnixStream>,
    retry_at: u64,
    retry_ns: u64,
    header: [u8; 4],
    header_got: usize,
    body: Frame,
    body_got: usize,
    begun_at: u64,
    output: Vec<u8>,
}

impl Link {
    pub fn new(path: PathBuf) -> Self {
        Link {
            path,
            stream: None,
            retry_at: 0,
            retry_ns: FIRST_RETRY_NS,
            header: [0; 4],
            header_got: 0,
            body: Frame::default(),
            body_got: 0,
            begun_at: 0,
            output: Vec::new(),
        }
    }

    /// What to poll: the descriptor, and whether output waits.
    pub fn interest(&self) -> Option<(RawFd, bool)> {
        self.stream.as_ref().map(|stream| (stream.as_raw_fd(), !self.output.is_empty()))
    }

    /// When [`Link::dial`] or [`Link::expire`] has work, monotonic nanoseconds.
    pub fn wake_at(&self) -> Option<u64> {
        match self.stream {
            None => Some(self.retry_at),
            Some(_) if self.header_got > 0 => Some(self.begun_at + FRAME_DEADLINE_NS),
            Some(_) => None,
        }
    }

    /// Dials if it is time to; true when a new connection is up.
    pub fn dial(&mut self, now: u64) -> bool {
        if self.stream.is_some() || now < self.retry_at {
            return false;
        }
        self.stream = sys::connect(&self.path).ok();
        self.retry_at = now + self.retry_ns;
        self.retry_ns = (self.retry_ns * 2).min(LAST_RETRY_NS);
        self.stream.is_some()
    }

    pub fn expire(&mut self, now: u64) {
        if self.stream.is_some() && self.wake_at().is_some_and(|at| at <= now) {
            self.hang_up();
        }
    }

    /// Ends the connection; the next dial is after the present back-off.
    pub fn hang_up(&mut self) {
        self.stream = None;
        self.header_got = 0;
        self.body = Frame::default();
        self.body_got = 0;
        self.output.clear();
    }

    /// The next whole frame (kind and body) that has arrived. Ends the connection on any error.
    pub fn receive(&mut self, now: u64) -> Option<Frame> {
        match self.try_receive(now) {
            Ok(frame) => frame,
            Err(_) => {
                self.hang_up();
                None
            }
        }
    }

    fn try_receive(&mut self, now: u64) -> io::Result<Option<Frame>> {
        loop {
            let Some(stream) = &mut self.stream else {
                return Ok(None);
            };
            let into =
                if self.header_got < 4 { &mut self.header[self.header_got..] } else { &mut self.body[self.body_got..] };
            let got = match stream.read(into) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(got) => got,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            if self.header_got < 4 {
                if self.header_got == 0 {
                    self.begun_at = now;
                }
                self.header_got += got;
                if self.header_got == 4 {
                    let len = frame_len(self.header, MAX_TO_INIT).map_err(io::Error::other)?;
                    self.body = Zeroizing::new(vec![0; len]);
                    self.body_got = 0;
                }
                continue;
            }
            self.body_got += got;
            if self.body_got == self.body.len() {
                self.header_got = 0;
                // A peer that speaks: the next loss is retried soon.
                self.retry_ns = FIRST_RETRY_NS;
                return Ok(Some(std::mem::take(&mut self.body)));
            }
        }
    }

    /// Sends, or keeps what does not fit now. Nothing is said to nobody: the Hello of the next connection
    /// tells how things are.
    pub fn send(&mut self, frame: &[u8]) {
        if self.stream.is_none() {
            return;
        }
        self.output.extend_from_slice(frame);
        self.flush();
    }

    pub fn flush(&mut self) {
        while let Some(stream) = &mut self.stream {
            if self.output.is_empty() {
                return;
            }
            match stream.write(&self.output) {
                Ok(sent) => drop(self.output.drain(..sent)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && self.output.len() <= MAX_OUTPUT => {
                    return;
                }
                Err(_) => self.hang_up(),
            }
        }
    }
}
