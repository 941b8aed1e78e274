//! Threads that run shards, and the way to talk to them.

use crate::io::{Inbox, Limits, Order, Service, Shard};
use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

/// Most orders that may wait for one shard.
const MOST_ORDERS: usize = 1 << 16;

struct Mailbox<C> {
    orders: Mutex<Vec<Order<C>>>,
    wake: OwnedFd,
}

impl<C> Inbox<C> for Arc<Mailbox<C>> {
    fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    fn take(&self, into: &mut Vec<Order<C>>) {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.wake, &mut count);
        into.append(&mut self.orders.lock());
    }
}

/// The command did not reach the shard; it is handed back.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the shard has too many commands waiting, or has stopped")]
pub struct NotSent<C>(pub C);

/// Sends commands to one shard from any thread.
pub struct Remote<C> {
    mailbox: Arc<Mailbox<C>>,
}

impl<C> Clone for Remote<C> {
    fn clone(&self) -> Self {
        Remote { mailbox: self.mailbox.clone() }
    }
}

impl<C: Send + 'static> Remote<C> {
    fn new() -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        Ok(Remote { mailbox: Arc::new(Mailbox { orders: Mutex::new(Vec::new()), wake }) })
    }

    /// Queues a command and wakes the shard. Commands of one sender arrive in order.
    pub fn send(&self, command: C) -> Result<(), NotSent<C>> {
        match self.push(Order::Command(command), MOST_ORDERS) {
            Ok(()) => Ok(()),
            Err(Order::Command(command)) => Err(NotSent(command)),
            Err(_) => unreachable!("the order handed back is the one handed in"),
        }
    }

    fn push(&self, order: Order<C>, most: usize) -> Result<(), Order<C>> {
        let first = {
            let mut orders = self.mailbox.orders.lock();
            if orders.len() >= most {
                return Err(order);
            }
            orders.push(order);
            orders.len() == 1
        };
        if first {
            // Fails only when the counter is full, and then the shard is awake anyway.
            let _ = rustix::io::write(&self.mailbox.wake, &1u64.to_ne_bytes());
        }
        Ok(())
    }
}

/// Where a service is being made: its shard among the others.
pub struct Place<'a, C> {
    /// 0-based number of the shard.
    pub shard: usize,
    /// The mailboxes of all shards, this one's included, by number.
    pub remotes: &'a [Remote<C>],
}

/// Running shards.
pub struct Handle<C: Send + 'static> {
    remotes: Vec<Remote<C>>,
    threads: Vec<JoinHandle<io::Result<()>>>,
}

/// Starts `shards` threads. `make` is called on the caller's thread, once a shard, in order; make listeners with
/// [`crate::socket::listen_group`] and hand each service its own.
pub fn spawn<S, F>(shards: usize, limits: Limits, mut make: F) -> io::Result<Handle<S::Command>>
where
    S: Service + Send + 'static,
    F: FnMut(Place<'_, S::Command>) -> S,
{
    let remotes = (0..shards).map(|_| Remote::new()).collect::<io::Result<Vec<_>>>()?;
    let made = (0..shards)
        .map(|shard| Shard::new(make(Place { shard, remotes: &remotes }), limits))
        .collect::<io::Result<Vec<_>>>()?;
    let mut handle = Handle { remotes, threads: Vec::new() };
    for (number, shard) in made.into_iter().enumerate() {
        let mailbox = handle.remotes[number].mailbox.clone();
        let thread = std::thread::Builder::new()
            .name(format!("shard-{number}"))
            .stack_size(1 << 20)
            .spawn(move || shard.run(&mailbox))?;
        handle.threads.push(thread);
    }
    Ok(handle)
}

impl<C: Send + 'static> Handle<C> {
    pub fn remotes(&self) -> &[Remote<C>] {
        &self.remotes
    }

    /// Sends one command to every shard; `false` if any of them did not take it.
    pub fn broadcast(&self, mut command: impl FnMut() -> C) -> bool {
        let mut all = true;
        for remote in &self.remotes {
            all &= remote.send(command()).is_ok();
        }
        all
    }

    /// Accept no more; each shard stops when its last connection ends, or after `within`.
    pub fn drain(&self, within: Duration) {
        for remote in &self.remotes {
            let _ = remote.push(Order::Drain(within), usize::MAX);
        }
    }

    /// Stop now; connections are closed.
    pub fn stop(&self) {
        for remote in &self.remotes {
            let _ = remote.push(Order::Stop, usize::MAX);
        }
    }

    /// Whether a shard has ended.
    pub fn any_ended(&self) -> bool {
        self.threads.iter().any(JoinHandle::is_finished)
    }

    /// Waits for all shards to end; the first error among them.
    pub fn join(self) -> io::Result<()> {
        let mut outcome = Ok(());
        for thread in self.threads {
            let ended = thread.join().unwrap_or_else(|_| Err(io::Error::other("a shard panicked")));
            if outcome.is_ok() {
                outcome = ended;
            }
        }
        outcome
    }
}
