//! Byte counters that outlive the process.
//!
//! Each account has a slot in a mapped file. A byte is counted by one atomic addition in shared memory, and is then
//! safe from any death of the process, `kill -9` included; the ledger folds the counters into its database once a
//! second. Counters only ever grow, so folding twice bills once.

use crate::mapped::Cells;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

/// Cells of a slot: state, up, down, requests, name length, name.
const SLOT: usize = 16;
const NAME_AT: usize = 5;
/// Longest account name, in bytes.
pub const NAME_MOST: usize = (SLOT - NAME_AT) * 8;
const HEADER: usize = 8;
const MAGIC: u64 = u64::from_be_bytes(*b"PXTALLY1");
/// Most accounts, sub-users included.
pub const SLOTS: usize = 65_536;
/// Behind the slots: for each, bytes on their way up and down.
const PENDING: usize = HEADER + SLOTS * SLOT;

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// From the customer.
    Up,
    /// To the customer.
    Down,
}

/// What an account has moved since its slot exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize, utoipa::ToSchema)]
pub struct Totals {
    /// Bytes from the customer to destinations.
    pub up: u64,
    /// Bytes from destinations to the customer.
    pub down: u64,
    pub requests: u64,
}

impl Totals {
    pub fn bytes(&self) -> u64 {
        self.up + self.down
    }

    pub fn minus(self, other: Totals) -> Totals {
        Totals {
            up: self.up.saturating_sub(other.up),
            down: self.down.saturating_sub(other.down),
            requests: self.requests.saturating_sub(other.requests),
        }
    }

    pub fn plus(self, other: Totals) -> Totals {
        Totals { up: self.up + other.up, down: self.down + other.down, requests: self.requests + other.requests }
    }
}

/// The file of counters.
pub struct Tally {
    cells: Cells,
    slots: Mutex<HashMap<String, usize>>,
    /// Held for its lock.
    _file: File,
}

impl Tally {
    /// Opens or makes the file. Refused while another process has it open.
    pub fn open(path: &Path) -> io::Result<Arc<Self>> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        file.try_lock().map_err(|_| io::Error::other(format!("{} is in use by another hub", path.display())))?;
        let cells = Cells::open(&file, PENDING + 2 * SLOTS)?;
        match cells.cell(0).load(Acquire) {
            0 => cells.cell(0).store(MAGIC, Release),
            MAGIC => {}
            _ => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("{} is not a tally file", path.display()),
                ));
            }
        }
        let mut slots = HashMap::new();
        for at in (0..SLOTS).map(|i| HEADER + i * SLOT) {
            if cells.cell(at).load(Acquire) == 0 {
                break;
            }
            let len = (cells.cell(at + 4).load(Relaxed) as usize).min(NAME_MOST);
            let mut name: Vec<u8> =
                (0..len.div_ceil(8)).flat_map(|i| cells.cell(at + NAME_AT + i).load(Relaxed).to_le_bytes()).collect();
            name.truncate(len);
            slots.insert(String::from_utf8_lossy(&name).into_owned(), at);
            // A process that was killed left these between its books and the kernel: they are billed.
            for (way, total) in [(Way::Up, at + 1), (Way::Down, at + 2)] {
                let pending = cells.cell(pending_at(at, way)).swap(0, Relaxed);
                cells.cell(total).fetch_add(pending, Relaxed);
            }
        }
        Ok(Arc::new(Self { cells, slots: Mutex::new(slots), _file: file }))
    }

    /// The account's counter, made at first use.
    pub fn counter(self: &Arc<Self>, name: &str) -> io::Result<Counter> {
        let mut slots = self.slots.lock();
        if let Some(&at) = slots.get(name) {
            return Ok(Counter { tally: self.clone(), at });
        }
        if name.len() > NAME_MOST || slots.len() >= SLOTS {
            return Err(io::Error::other(format!("no room in the tally for account '{name}'")));
        }
        let at = HEADER + slots.len() * SLOT;
        self.cells.cell(at + 4).store(name.len() as u64, Relaxed);
        for (i, part) in name.as_bytes().chunks(8).enumerate() {
            let mut word = [0; 8];
            word[..part.len()].copy_from_slice(part);
            self.cells.cell(at + NAME_AT + i).store(u64::from_le_bytes(word), Relaxed);
        }
        // The slot exists once this is set: a death before it leaves a free slot.
        self.cells.cell(at).store(1, Release);
        slots.insert(name.to_owned(), at);
        Ok(Counter { tally: self.clone(), at })
    }

    /// All accounts and what they moved.
    pub fn all(self: &Arc<Self>) -> Vec<(String, Totals)> {
        let slots = self.slots.lock();
        slots.iter().map(|(name, &at)| (name.clone(), self.totals(at))).collect()
    }

    fn totals(&self, at: usize) -> Totals {
        let load = |i| self.cells.cell(at + i).load(Relaxed);
        Totals { up: load(1), down: load(2), requests: load(3) }
    }

    pub fn sync(&self) -> io::Result<()> {
        self.cells.sync()
    }
}

fn pending_at(slot: usize, way: Way) -> usize {
    PENDING + 2 * ((slot - HEADER) / SLOT) + usize::from(way == Way::Down)
}

/// One account's counter. Bytes are noted as on their way before they are handed to the kernel and counted after, so a
/// process that is killed in between does not lose them.
#[derive(Clone)]
pub struct Counter {
    tally: Arc<Tally>,
    at: usize,
}

impl Counter {
    fn pending_cell(&self, way: Way) -> &std::sync::atomic::AtomicU64 {
        self.tally.cells.cell(pending_at(self.at, way))
    }

    /// Bytes set out.
    pub fn sets_out(&self, way: Way, bytes: u64) {
        self.pending_cell(way).fetch_add(bytes, Relaxed);
    }

    /// Bytes that had set out were moved.
    pub fn moved(&self, way: Way, bytes: u64) {
        self.count(way, bytes);
        self.stays(way, bytes);
    }

    /// Bytes that had set out were not moved after all.
    pub fn stays(&self, way: Way, bytes: u64) {
        self.pending_cell(way).fetch_sub(bytes, Relaxed);
    }

    /// Bytes on their way now.
    pub fn pending(&self) -> u64 {
        [Way::Up, Way::Down].iter().map(|way| self.pending_cell(*way).load(Relaxed)).sum()
    }

    pub fn count(&self, way: Way, bytes: u64) {
        let total = if way == Way::Up { 1 } else { 2 };
        self.tally.cells.cell(self.at + total).fetch_add(bytes, Relaxed);
    }

    pub fn request(&self) {
        self.tally.cells.cell(self.at + 3).fetch_add(1, Relaxed);
    }

    pub fn totals(&self) -> Totals {
        self.tally.totals(self.at)
    }

    /// Lifts the counter to at least `floor`: after the file was lost, what was folded before must not be billed again.
    pub fn raise(&self, floor: Totals) {
        for (i, value) in [(1, floor.up), (2, floor.down), (3, floor.requests)] {
            self.tally.cells.cell(self.at + i).fetch_max(value, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_found_again_and_two_hubs_cannot_share_a_file() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("tally");
        let name = "customer-with-a-name-of-some-length.and-a-sub-user";
        {
            let tally = Tally::open(&path).expect("open");
            assert!(Tally::open(&path).is_err(), "locked");
            let counter = tally.counter(name).expect("counter");
            counter.count(Way::Up, 5);
            counter.count(Way::Down, 7);
            counter.request();
            tally.counter("other").expect("counter").count(Way::Up, 1);
        }
        let tally = Tally::open(&path).expect("open again");
        assert_eq!(tally.counter(name).expect("counter").totals(), Totals { up: 5, down: 7, requests: 1 });
        assert_eq!(tally.all().len(), 2);
        tally.counter(name).expect("counter").raise(Totals { up: 9, down: 1, requests: 1 });
        assert_eq!(tally.counter(name).expect("counter").totals(), Totals { up: 9, down: 7, requests: 1 });
        assert!(tally.counter(&"x".repeat(NAME_MOST + 1)).is_err());
    }

    #[test]
    fn what_was_on_its_way_when_the_process_was_killed_is_billed() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("tally");
        {
            let tally = Tally::open(&path).expect("open");
            for (name, left) in [("a", 7), ("b", 0)] {
                let counter = tally.counter(name).expect("counter");
                counter.sets_out(Way::Down, 100);
                counter.sets_out(Way::Up, 10);
                counter.moved(Way::Down, 60);
                counter.stays(Way::Down, 40 - left);
                counter.moved(Way::Up, 10 - left);
                counter.stays(Way::Up, left);
                assert_eq!(counter.pending(), left);
            }
        }
        for _ in 0..2 {
            let tally = Tally::open(&path).expect("open again");
            let totals = |name| tally.counter(name).expect("counter").totals();
            assert_eq!(totals("a"), Totals { up: 3, down: 67, requests: 0 });
            assert_eq!(totals("b"), Totals { up: 10, down: 60, requests: 0 });
        }
    }

    #[test]
    fn many_threads_count_exactly() {
        let dir = tempfile::tempdir().expect("dir");
        let tally = Tally::open(&dir.path().join("tally")).expect("open");
        std::thread::scope(|scope| {
            for t in 0..8 {
                let tally = tally.clone();
                scope.spawn(move || {
                    for i in 0..10_000u64 {
                        tally.counter(&format!("a{}", (t + i) % 5)).expect("counter").count(Way::Up, i % 7);
                    }
                });
            }
        });
        let want: u64 = 8 * (0..10_000u64).map(|i| i % 7).sum::<u64>();
        assert_eq!(tally.all().iter().map(|(_, t)| t.up).sum::<u64>(), want);
    }
}
