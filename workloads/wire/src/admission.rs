//! Connections by client address, counted over all workers in a fixed table.
//!
//! A set-associative table of counters in a [`Board`]: each worker writes only its own lane, and a client's count is the sum
//! of its cells over the lanes. A cell is 48 bits of a keyed hash of the address and a 16-bit count; a bucket is a cache line of
//! eight. When a bucket is full of other clients the newcomer is admitted uncounted: the table errs towards letting in.
//! A lane whose worker died is wiped by the parent.

use crate::shared::Board;
use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

const WAYS: usize = 8;
const COUNT: u64 = 0xffff;

/// A client's place in the table: what has to be kept to release it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Client(u64);

/// The table as one worker uses it.
#[derive(Clone, Copy)]
pub struct Clients {
    cells: &'static [AtomicU64],
    lane: usize,
    lanes: usize,
    buckets: usize,
    key: u64,
}

impl Clients {
    /// Counters needed for `lanes` workers and `buckets` (a power of two) buckets of eight clients.
    pub const fn words(lanes: usize, buckets: usize) -> usize {
        lanes * buckets * WAYS
    }

    /// A random key for `new`, the same for all workers of a board.
    pub fn random_key() -> u64 {
        RandomState::new().hash_one(0u8)
    }

    /// The table at word `at` of `board`, writing to `lane`.
    pub fn new(board: Board, at: usize, lane: usize, lanes: usize, buckets: usize, key: u64) -> Self {
        assert!(buckets.is_power_of_two() && lane < lanes);
        Clients { cells: board.slice(at, Self::words(lanes, buckets)), lane, lanes, buckets, key }
    }

    /// The client behind an address: an IPv4 address, or the /64 of an IPv6 address.
    pub fn client(&self, addr: IpAddr) -> Client {
        let bits = match addr.to_canonical() {
            IpAddr::V4(addr) => u64::from(u32::from(addr)),
            IpAddr::V6(addr) => (u128::from(addr) >> 64) as u64 ^ 0x6a09_e667_f3bc_c908,
        };
        // Two rounds of multiply and fold: the key keeps strangers from steering addresses into one bucket.
        let fold = |a: u64, b: u64| {
            let wide = u128::from(a) * u128::from(b);
            (wide >> 64) as u64 ^ wide as u64
        };
        let mixed = fold(bits ^ self.key, 0x9e37_79b9_7f4a_7c15 ^ self.key.rotate_left(32) | 1);
        Client(fold(mixed ^ self.key, 0xbf58_476d_1ce4_e5b9))
    }

    fn bucket(&self, lane: usize, client: Client) -> &'static [AtomicU64] {
        let bucket = client.0 as usize & (self.buckets - 1);
        let at = (lane * self.buckets + bucket) * WAYS;
        &self.cells[at..at + WAYS]
    }

    fn print(client: Client) -> u64 {
        // Never zero, so that an empty cell matches nobody.
        (client.0 | 1 << 63) & !COUNT
    }

    /// Connections the client holds now, over all workers.
    pub fn held(&self, client: Client) -> u64 {
        let print = Self::print(client);
        (0..self.lanes)
            .flat_map(|lane| self.bucket(lane, client))
            .map(|cell| cell.load(Relaxed))
            .filter(|cell| cell & !COUNT == print)
            .map(|cell| cell & COUNT)
            .sum()
    }

    /// Counts one more if the client holds fewer than `most`; `false` when it does not.
    pub fn admit(&self, client: Client, most: u64) -> bool {
        if self.held(client) >= most {
            return false;
        }
        let print = Self::print(client);
        let bucket = self.bucket(self.lane, client);
        let own = bucket.iter().find(|cell| cell.load(Relaxed) & !COUNT == print);
        match own.or_else(|| bucket.iter().find(|cell| cell.load(Relaxed) & COUNT == 0)) {
            Some(cell) => {
                let before = cell.load(Relaxed);
                let count = if before & !COUNT == print { before & COUNT } else { 0 };
                cell.store(print | (count + 1).min(COUNT), Relaxed);
                true
            }
            None => true,
        }
    }

    /// Counts one less.
    pub fn release(&self, client: Client) {
        let print = Self::print(client);
        if let Some(cell) = self.bucket(self.lane, client).iter().find(|cell| cell.load(Relaxed) & !COUNT == print) {
            let before = cell.load(Relaxed);
            cell.store(if before & COUNT <= 1 { 0 } else { before - 1 }, Relaxed);
        }
    }

    /// Forgets what the worker of `lane` held.
    pub fn wipe(&self, lane: usize) {
        let size = self.buckets * WAYS;
        for cell in &self.cells[lane * size..(lane + 1) * size] {
            if cell.load(Relaxed) != 0 {
                cell.store(0, Relaxed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    #[test]
    fn a_limit_holds_over_all_lanes_and_a_dead_lane_is_forgotten() {
        let board = Board::private(Clients::words(2, 64));
        let (a, b) = (Clients::new(board, 0, 0, 2, 64, 99), Clients::new(board, 0, 1, 2, 64, 99));
        let client = a.client("192.0.2.7".parse().unwrap());
        assert_eq!(client, b.client("::ffff:192.0.2.7".parse().unwrap()));
        assert!(a.admit(client, 3) && a.admit(client, 3) && b.admit(client, 3));
        assert!(!a.admit(client, 3) && !b.admit(client, 3));
        a.release(client);
        assert!(b.admit(client, 3));
        b.wipe(0);
        assert_eq!(a.held(client), 2);
        let (x, y) = ("2001:db8:1:2::1".parse().unwrap(), "2001:db8:1:2:ffff::9".parse().unwrap());
        assert_eq!(a.client(x), a.client(y), "one /64 is one client");
        assert_ne!(a.client(x), a.client("2001:db8:1:3::1".parse().unwrap()));
    }

    proptest! {
        #[test]
        fn counts_as_a_map_does_while_buckets_have_room(steps in prop::collection::vec((0u8..6, any::<bool>(), 0usize..2), 0..300)) {
            let board = Board::private(Clients::words(2, 1024));
            let lanes = [Clients::new(board, 0, 0, 2, 1024, 7), Clients::new(board, 0, 1, 2, 1024, 7)];
            let mut model: HashMap<(u8, usize), u64> = HashMap::new();
            for (who, come, lane) in steps {
                let client = lanes[lane].client(IpAddr::from([10, 0, 0, who]));
                if come {
                    let total: u64 = (0..2).filter_map(|lane| model.get(&(who, lane))).sum();
                    prop_assert_eq!(lanes[lane].admit(client, 5), total < 5);
                    if total < 5 {
                        *model.entry((who, lane)).or_default() += 1;
                    }
                } else if let Some(count) = model.get_mut(&(who, lane)).filter(|count| **count > 0) {
                    *count -= 1;
                    lanes[lane].release(client);
                }
                let total: u64 = (0..2).filter_map(|lane| model.get(&(who, lane))).sum();
                prop_assert_eq!(lanes[0].held(client), total);
            }
        }
    }
}
