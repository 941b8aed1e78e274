//! The counters that all workers and the controller share: layout and typed access.
//!
//! The controller alone writes *control words* (what a backend's weight is now); each worker alone writes its own *lane*.
//! Least connections reads a backend's active count over all lanes, which lie side by side in one or two cache lines.

use crate::config::{MOST_BACKENDS, MOST_LISTENERS, MOST_WORKERS};
use clawhq_wire::admission::Clients;
use clawhq_wire::shared::Board as Memory;
use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Buckets of eight clients in the per-client table of one worker.
const CLIENT_BUCKETS: usize = 1 << 14;

/// Connect-latency buckets: upper bounds in microseconds; the last is unbounded.
pub const LATENCY_BOUNDS: [u64; 15] =
    [50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 5_000_000];
pub const LATENCY_BUCKETS: usize = LATENCY_BOUNDS.len() + 1;

/// Countries are two letters; place 0 is for clients whose country is unknown.
pub const COUNTRIES: usize = 26 * 26 + 1;

/// Counters of one backend in one worker's lane.
#[derive(Clone, Copy)]
#[repr(usize)]
pub enum B {
    Total,
    ConnectFailed,
    ConnectTimeout,
    BytesIn,
    BytesOut,
    LatencySum,
    Latency,
}
const PER_BACKEND: usize = B::Latency as usize + LATENCY_BUCKETS;

/// Counters of one listener in one worker's lane.
#[derive(Clone, Copy)]
#[repr(usize)]
pub enum L {
    Active,
    Total,
    RejectedClient,
    RejectedLimit,
    RejectedProxy,
    NoBackend,
    BytesIn,
    BytesOut,
    Spliced,
    DatagramsIn,
    DatagramsOut,
    DatagramsDropped,
    EndedIdle,
    EndedReset,
}
const PER_LISTENER: usize = 16;

/// Counters of one worker.
#[derive(Clone, Copy)]
#[repr(usize)]
pub enum W {
    Active,
    Sockets,
    Pipes,
    Turns,
    Table,
    Beat,
}
const PER_WORKER: usize = 8;

const LANE: usize = MOST_BACKENDS * PER_BACKEND + MOST_LISTENERS * PER_LISTENER + COUNTRIES * 2 + PER_WORKER;
const HEAD: usize = 8;
const CONTROL_AT: usize = HEAD;
const STREAK_AT: usize = CONTROL_AT + MOST_BACKENDS;
const ACTIVE_AT: usize = STREAK_AT + MOST_BACKENDS;

/// A backend's control word: whether it is up, and its present weight in 1/256.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Control(u64);

impl Control {
    const DOWN: u64 = 1 << 63;

    /// In service with `weight` (1/256); weight 0 keeps what it has and takes no more.
    pub fn up(weight: u64) -> Self {
        Control(weight.min(u64::from(u32::MAX)))
    }

    /// Out of service: UDP flows pinned to it move on too.
    pub fn down() -> Self {
        Control(Self::DOWN)
    }

    pub fn is_down(self) -> bool {
        self.0 & Self::DOWN != 0
    }

    /// What new connections are shared by; 0 takes none.
    pub fn weight(self) -> u64 {
        if self.is_down() { 0 } else { self.0 & u64::from(u32::MAX) }
    }
}

/// The shared counters, as the controller or one worker uses them.
#[derive(Clone, Copy)]
pub struct Board {
    memory: Memory,
    workers: usize,
    stride: usize,
}

impl Board {
    fn words(workers: usize) -> usize {
        ACTIVE_AT + MOST_BACKENDS * Self::stride(workers) + workers * LANE + Clients::words(workers, CLIENT_BUCKETS)
    }

    /// Lanes of a backend's active counts: whole cache lines.
    fn stride(workers: usize) -> usize {
        workers.next_multiple_of(8)
    }

    /// A board for `workers`, and the descriptor they inherit it by.
    pub fn create(workers: usize) -> io::Result<(Board, RawFd)> {
        let workers = workers.clamp(1, MOST_WORKERS);
        let (memory, fd) = Memory::create(Self::words(workers))?;
        memory.slice(0, 2)[0].store(workers as u64, Relaxed);
        memory.slice(0, 2)[1].store(Clients::random_key(), Relaxed);
        Ok((Board { memory, workers, stride: Self::stride(workers) }, fd))
    }

    /// The board of the parent.
    pub fn inherit(fd: RawFd) -> io::Result<Board> {
        let memory = Memory::inherit(fd)?;
        let workers = memory.slice(0, 1)[0].load(Relaxed) as usize;
        if !(1..=MOST_WORKERS).contains(&workers) || memory.len() != Self::words(workers) {
            return Err(io::Error::other("the inherited table is not a board of this version"));
        }
        Ok(Board { memory, workers, stride: Self::stride(workers) })
    }

    pub fn workers(&self) -> usize {
        self.workers
    }

    fn word(&self, at: usize) -> &'static AtomicU64 {
        &self.memory.slice(at, 1)[0]
    }

    /// Grows whenever which backends take new flows has changed.
    pub fn epoch(&self) -> &'static AtomicU64 {
        self.word(2)
    }

    pub fn control(&self, slot: usize) -> Control {
        Control(self.word(CONTROL_AT + slot).load(Relaxed))
    }

    pub fn set_control(&self, slot: usize, control: Control) {
        if self.word(CONTROL_AT + slot).swap(control.0, Relaxed) != control.0 {
            self.epoch().fetch_add(1, Relaxed);
        }
    }

    /// Failed connects in a row, over all workers.
    pub fn streak(&self, slot: usize) -> &'static AtomicU64 {
        self.word(STREAK_AT + slot)
    }

    /// The active counts of a backend, one for each worker.
    pub fn active(&self, slot: usize) -> &'static [AtomicU64] {
        self.memory.slice(ACTIVE_AT + slot * self.stride, self.workers)
    }

    /// Connections and flows a backend holds now.
    pub fn active_total(&self, slot: usize) -> u64 {
        self.active(slot).iter().map(|word| word.load(Relaxed)).sum()
    }

    fn lane(&self, worker: usize) -> usize {
        ACTIVE_AT + MOST_BACKENDS * self.stride + worker * LANE
    }

    pub fn backend(&self, worker: usize, slot: usize, what: B) -> &'static AtomicU64 {
        self.word(self.lane(worker) + slot * PER_BACKEND + what as usize)
    }

    pub fn latency(&self, worker: usize, slot: usize) -> &'static [AtomicU64] {
        self.memory.slice(self.lane(worker) + slot * PER_BACKEND + B::Latency as usize, LATENCY_BUCKETS)
    }

    pub fn listener(&self, worker: usize, listener: usize, what: L) -> &'static AtomicU64 {
        self.word(self.lane(worker) + MOST_BACKENDS * PER_BACKEND + listener * PER_LISTENER + what as usize)
    }

    fn countries_at(&self, worker: usize) -> usize {
        self.lane(worker) + MOST_BACKENDS * PER_BACKEND + MOST_LISTENERS * PER_LISTENER
    }

    /// Clients of a country now, and in all.
    pub fn country(&self, worker: usize, country: usize) -> &'static [AtomicU64] {
        self.memory.slice(self.countries_at(worker) + country * 2, 2)
    }

    pub fn worker(&self, worker: usize, what: W) -> &'static AtomicU64 {
        self.word(self.countries_at(worker) + COUNTRIES * 2 + what as usize)
    }

    pub fn clients(&self, worker: usize) -> Clients {
        let key = self.word(1).load(Relaxed);
        Clients::new(self.memory, self.lane(self.workers), worker, self.workers, CLIENT_BUCKETS, key)
    }

    pub fn sum_backend(&self, slot: usize, what: B) -> u64 {
        (0..self.workers).map(|worker| self.backend(worker, slot, what).load(Relaxed)).sum()
    }

    pub fn sum_listener(&self, listener: usize, what: L) -> u64 {
        (0..self.workers).map(|worker| self.listener(worker, listener, what).load(Relaxed)).sum()
    }

    /// What a dead worker held is gone with it: its active counts are cleared, its totals stay.
    pub fn bury(&self, worker: usize) {
        for slot in 0..MOST_BACKENDS {
            self.active(slot)[worker].store(0, Relaxed);
        }
        for listener in 0..MOST_LISTENERS {
            self.listener(worker, listener, L::Active).store(0, Relaxed);
        }
        for country in 0..COUNTRIES {
            self.country(worker, country)[0].store(0, Relaxed);
        }
        self.worker(worker, W::Active).store(0, Relaxed);
        self.worker(worker, W::Sockets).store(0, Relaxed);
        self.worker(worker, W::Pipes).store(0, Relaxed);
        self.clients(worker).wipe(worker);
    }

    /// Clears a backend's counters for its next owner.
    pub fn clear_backend(&self, slot: usize) {
        self.streak(slot).store(0, Relaxed);
        for worker in 0..self.workers {
            for word in self.memory.slice(self.lane(worker) + slot * PER_BACKEND, PER_BACKEND) {
                word.store(0, Relaxed);
            }
        }
    }

    /// Clears a listener's counters for its next owner.
    pub fn clear_listener(&self, listener: usize) {
        for worker in 0..self.workers {
            let at = self.lane(worker) + MOST_BACKENDS * PER_BACKEND + listener * PER_LISTENER;
            for word in self.memory.slice(at, PER_LISTENER) {
                word.store(0, Relaxed);
            }
        }
    }
}

/// The place of a two-letter country code; 0 for anything else.
pub fn country_place(code: &str) -> usize {
    match code.as_bytes() {
        [a @ b'A'..=b'Z', b @ b'A'..=b'Z'] => usize::from(a - b'A') * 26 + usize::from(b - b'A') + 1,
        _ => 0,
    }
}

/// The code at a place; `??` for the unknown.
pub fn country_code(place: usize) -> String {
    match place {
        1..COUNTRIES => {
            let place = place - 1;
            [b'A' + (place / 26) as u8, b'A' + (place % 26) as u8].iter().map(|byte| char::from(*byte)).collect()
        }
        _ => "??".into(),
    }
}

/// The latency bucket of a duration in microseconds.
pub fn latency_bucket(micros: u64) -> usize {
    LATENCY_BOUNDS.iter().position(|bound| micros <= *bound).unwrap_or(LATENCY_BUCKETS - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_worker_leaves_totals_and_no_active_counts() {
        let (board, fd) = Board::create(2).unwrap();
        let worker = Board::inherit(fd).unwrap();
        worker.active(3)[1].store(7, Relaxed);
        worker.active(3)[0].store(2, Relaxed);
        worker.backend(1, 3, B::Total).store(9, Relaxed);
        worker.listener(1, 0, L::Active).store(7, Relaxed);
        worker.country(1, country_place("DE"))[0].store(7, Relaxed);
        let clients = worker.clients(1);
        let client = clients.client([1, 2, 3, 4].into());
        assert!(clients.admit(client, 9));
        board.bury(1);
        assert_eq!((board.active_total(3), board.sum_backend(3, B::Total)), (2, 9));
        assert_eq!(board.sum_listener(0, L::Active), 0);
        assert_eq!(board.country(1, country_place("DE"))[0].load(Relaxed), 0);
        assert_eq!(clients.held(client), 0);
    }

    #[test]
    fn nothing_overlaps() {
        let (board, _) = Board::create(3).unwrap();
        let last = MOST_BACKENDS - 1;
        let words = [
            std::ptr::from_ref(board.epoch()),
            std::ptr::from_ref(board.streak(last)),
            std::ptr::from_ref(&board.active(0)[0]),
            std::ptr::from_ref(&board.active(last)[2]),
            std::ptr::from_ref(board.backend(0, 0, B::Total)),
            std::ptr::from_ref(&board.latency(0, last)[LATENCY_BUCKETS - 1]),
            std::ptr::from_ref(board.listener(0, 0, L::Active)),
            std::ptr::from_ref(board.listener(0, MOST_LISTENERS - 1, L::EndedReset)),
            std::ptr::from_ref(&board.country(0, 0)[0]),
            std::ptr::from_ref(&board.country(0, COUNTRIES - 1)[1]),
            std::ptr::from_ref(board.worker(0, W::Active)),
            std::ptr::from_ref(board.worker(0, W::Beat)),
            std::ptr::from_ref(board.backend(1, 0, B::Total)),
            std::ptr::from_ref(board.worker(2, W::Beat)),
        ];
        assert!(words.is_sorted_by(|a, b| a < b));
    }

    #[test]
    fn country_codes_go_there_and_back() {
        for code in ["AA", "DE", "IR", "US", "ZZ"] {
            assert_eq!(country_code(country_place(code)), code);
        }
        assert_eq!((country_place("d"), country_place("éa"), country_code(0).as_str()), (0, 0, "??"));
        assert!((1..COUNTRIES).all(|place| country_place(&country_code(place)) == place));
    }

    #[test]
    fn a_change_of_control_moves_the_epoch() {
        let (board, _) = Board::create(1).unwrap();
        board.set_control(0, Control::up(256));
        let epoch = board.epoch().load(Relaxed);
        board.set_control(0, Control::up(256));
        assert_eq!(board.epoch().load(Relaxed), epoch);
        board.set_control(0, Control::down());
        assert!(board.epoch().load(Relaxed) > epoch && board.control(0).is_down() && board.control(0).weight() == 0);
    }

    #[test]
    fn latency_buckets_are_upper_bounds() {
        assert_eq!(
            (latency_bucket(0), latency_bucket(50), latency_bucket(51), latency_bucket(u64::MAX)),
            (0, 0, 1, LATENCY_BUCKETS - 1)
        );
    }
}
