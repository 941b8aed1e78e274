//! Hierarchical timer wheel: arm, cancel and expire in constant time, 40 bytes a timer.
//!
//! Six levels of 64 slots cover 64^6 ticks (20 years at 10 ms). A level holds the timers whose deadline first
//! differs from the wheel's clock in that level's six bits, so a timer cascades at most five times in its life.
//! Each level keeps a bitmap of its occupied slots: the next deadline is found without walking empty slots.

const BITS: u32 = 6;
const SLOTS: usize = 1 << BITS;
const LEVELS: usize = 6;
const NIL: u32 = u32::MAX;
/// Furthest deadline from the wheel's clock, in ticks; anything later is clamped to it.
const HORIZON: u64 = (1 << (BITS * LEVELS as u32)) - 1;

/// Names an armed timer. A handle whose timer fired or was cancelled is harmless: `cancel` then does nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Timer {
    index: u32,
    generation: u32,
}

impl Timer {
    /// The handle of no timer.
    pub const NONE: Timer = Timer { index: NIL, generation: 0 };
}

struct Entry<T> {
    deadline: u64,
    next: u32,
    prev: u32,
    generation: u32,
    /// `level * SLOTS + slot` while armed, `FREE` otherwise.
    place: u16,
    payload: T,
}

const FREE: u16 = u16::MAX;

/// A wheel of timers that carry `T`. Time is a tick count chosen by the caller; it never goes back.
pub struct Wheel<T> {
    now: u64,
    entries: Vec<Entry<T>>,
    free: u32,
    armed: usize,
    heads: [u32; LEVELS * SLOTS],
    occupied: [u64; LEVELS],
}

impl<T: Copy> Default for Wheel<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T: Copy> Wheel<T> {
    pub fn new() -> Self {
        Wheel { now: 0, entries: Vec::new(), free: NIL, armed: 0, heads: [NIL; LEVELS * SLOTS], occupied: [0; LEVELS] }
    }

    /// Number of armed timers.
    pub fn len(&self) -> usize {
        self.armed
    }

    pub fn is_empty(&self) -> bool {
        self.armed == 0
    }

    /// Arms a timer for tick `deadline`. A deadline that is not after the wheel's clock fires at the next `advance` past it.
    pub fn arm(&mut self, deadline: u64, payload: T) -> Timer {
        let deadline = deadline.clamp(self.now + 1, self.now + HORIZON);
        let index = if self.free != NIL {
            let index = self.free;
            let entry = &mut self.entries[index as usize];
            self.free = entry.next;
            entry.deadline = deadline;
            entry.payload = payload;
            index
        } else {
            let index = self.entries.len() as u32;
            self.entries.push(Entry { deadline, next: NIL, prev: NIL, generation: 0, place: FREE, payload });
            index
        };
        self.link(index);
        self.armed += 1;
        Timer { index, generation: self.entries[index as usize].generation }
    }

    /// Disarms; returns what the timer carried, or `None` when it had fired or been cancelled already.
    pub fn cancel(&mut self, timer: Timer) -> Option<T> {
        let entry = self.entries.get(timer.index as usize)?;
        if entry.generation != timer.generation || entry.place == FREE {
            return None;
        }
        let payload = entry.payload;
        self.unlink(timer.index);
        self.release(timer.index);
        Some(payload)
    }

    /// Moves the clock to `now` and appends what fell due to `due`, in order of deadline (to a tick).
    pub fn advance(&mut self, now: u64, due: &mut Vec<T>) {
        while let Some((level, slot, at)) = self.next_slot() {
            if at > now {
                break;
            }
            self.now = at;
            let place = level * SLOTS + slot;
            let mut index = std::mem::replace(&mut self.heads[place], NIL);
            self.occupied[level] &= !(1 << slot);
            while index != NIL {
                let next = self.entries[index as usize].next;
                if self.entries[index as usize].deadline <= self.now {
                    due.push(self.entries[index as usize].payload);
                    self.release(index);
                } else {
                    self.link(index);
                }
                index = next;
            }
        }
        self.now = self.now.max(now);
    }

    /// Earliest tick at which `advance` has something to do, or `None` while nothing is armed. Never later than the
    /// earliest deadline; may be earlier, when timers have to cascade first.
    pub fn next_tick(&self) -> Option<u64> {
        self.next_slot().map(|(_, _, at)| at)
    }

    fn next_slot(&self) -> Option<(usize, usize, u64)> {
        for level in 0..LEVELS {
            let occupied = self.occupied[level];
            if occupied == 0 {
                continue;
            }
            let shift = BITS * level as u32;
            let here = (self.now >> shift) & (SLOTS as u64 - 1);
            let ahead = occupied.rotate_right(here as u32).trailing_zeros() as u64;
            let slot = (here + ahead) % SLOTS as u64;
            let base = self.now & !((1u64 << (shift + BITS)) - 1);
            let mut at = base + (slot << shift);
            if at <= self.now && !(level == 0 && at == self.now) {
                at += 1 << (shift + BITS);
            }
            return Some((level, slot as usize, at));
        }
        None
    }

    fn link(&mut self, index: u32) {
        let deadline = self.entries[index as usize].deadline;
        let differs = (self.now ^ deadline) | (SLOTS as u64 - 1);
        let level = (((63 - differs.leading_zeros()) / BITS) as usize).min(LEVELS - 1);
        let slot = ((deadline >> (BITS * level as u32)) & (SLOTS as u64 - 1)) as usize;
        let place = level * SLOTS + slot;
        let head = std::mem::replace(&mut self.heads[place], index);
        if head != NIL {
            self.entries[head as usize].prev = index;
        }
        let entry = &mut self.entries[index as usize];
        entry.next = head;
        entry.prev = NIL;
        entry.place = place as u16;
        self.occupied[level] |= 1 << slot;
    }

    fn unlink(&mut self, index: u32) {
        let (next, prev, place) = {
            let entry = &self.entries[index as usize];
            (entry.next, entry.prev, entry.place as usize)
        };
        if prev == NIL {
            self.heads[place] = next;
        } else {
            self.entries[prev as usize].next = next;
        }
        if next != NIL {
            self.entries[next as usize].prev = prev;
        }
        if self.heads[place] == NIL {
            self.occupied[place / SLOTS] &= !(1 << (place % SLOTS));
        }
    }

    fn release(&mut self, index: u32) {
        let free = std::mem::replace(&mut self.free, index);
        let entry = &mut self.entries[index as usize];
        entry.generation = entry.generation.wrapping_add(1);
        entry.place = FREE;
        entry.next = free;
        self.armed -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    #[test]
    fn fires_at_its_tick_and_not_before() {
        for delay in [1, 2, 63, 64, 65, 4095, 4096, 4097, 262_143, 262_144, 300_000] {
            let mut wheel = Wheel::new();
            let mut due = Vec::new();
            wheel.advance(77, &mut due);
            wheel.arm(77 + delay, 1u8);
            wheel.advance(77 + delay - 1, &mut due);
            assert!(due.is_empty(), "delay {delay} fired early");
            wheel.advance(77 + delay, &mut due);
            assert_eq!(due, [1], "delay {delay}");
            assert!(wheel.is_empty());
        }
    }

    #[test]
    fn a_stale_handle_cancels_nothing() {
        let mut wheel = Wheel::new();
        let mut due = Vec::new();
        let first = wheel.arm(5, 'a');
        wheel.advance(5, &mut due);
        let second = wheel.arm(9, 'b');
        assert_eq!(wheel.cancel(first), None);
        assert_eq!(wheel.cancel(Timer::NONE), None);
        assert_eq!(wheel.cancel(second), Some('b'));
        assert_eq!(wheel.cancel(second), None);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Arm(u64),
        Cancel(usize),
        Advance(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => prop_oneof![0..100u64, 0..10_000u64, 0..100_000_000u64].prop_map(Step::Arm),
            1 => any::<usize>().prop_map(Step::Cancel),
            2 => prop_oneof![0..70u64, 0..5_000u64, 0..50_000_000u64].prop_map(Step::Advance),
        ]
    }

    proptest! {
        /// Against a sorted map: the same timers fire at the same advance, in order of deadline, and `next_tick` is never late.
        #[test]
        fn agrees_with_a_sorted_map(steps in prop::collection::vec(step(), 1..200)) {
            let mut wheel = Wheel::new();
            let mut model: BTreeMap<(u64, u32), Timer> = BTreeMap::new();
            let (mut now, mut id) = (0u64, 0u32);
            for step in steps {
                match step {
                    Step::Arm(delay) => {
                        let deadline = (now + delay).max(now + 1);
                        model.insert((deadline, id), wheel.arm(now + delay, (deadline, id)));
                        id += 1;
                    }
                    Step::Cancel(n) if !model.is_empty() => {
                        let key = *model.keys().nth(n % model.len()).unwrap();
                        let timer = model.remove(&key).unwrap();
                        prop_assert_eq!(wheel.cancel(timer), Some(key));
                    }
                    Step::Cancel(_) => {}
                    Step::Advance(by) => {
                        now += by;
                        let mut due = Vec::new();
                        wheel.advance(now, &mut due);
                        let expected: Vec<_> = model.keys().copied().take_while(|(at, _)| *at <= now).collect();
                        prop_assert!(due.is_sorted_by_key(|(at, _)| *at));
                        due.sort();
                        prop_assert_eq!(&due, &expected);
                        for key in expected {
                            model.remove(&key);
                        }
                    }
                }
                prop_assert_eq!(wheel.len(), model.len());
                match (wheel.next_tick(), model.keys().next()) {
                    (Some(tick), Some((deadline, _))) => prop_assert!(tick <= *deadline),
                    (tick, first) => prop_assert_eq!(tick.is_some(), first.is_some()),
                }
            }
        }
    }
}
