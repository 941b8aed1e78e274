//! The table that connections of one kind stand in.

use std::collections::VecDeque;

/// A table whose entries are named by place and serial number. Each place counts its own tenants.
pub(super) struct Table<T> {
    entries: Vec<Option<T>>,
    serials: Vec<u32>,
    free: VecDeque<u32>,
    /// Free places that wait before the longest-free one is given out again.
    rest: usize,
}

impl<T> Table<T> {
    pub(super) fn new(rest: usize) -> Self {
        Self { entries: Vec::new(), serials: Vec::new(), free: VecDeque::new(), rest }
    }

    pub(super) fn insert(&mut self, make: impl FnOnce(u32) -> T) -> u32 {
        if self.free.len() > self.rest
            && let Some(slot) = self.free.pop_front()
        {
            let serial = self.renew(slot);
            self.entries[slot as usize] = Some(make(serial));
            return slot;
        }
        self.entries.push(Some(make(0)));
        self.serials.push(0);
        (self.entries.len() - 1) as u32
    }

    /// Gives the tenant of a place another serial number, which it must note.
    pub(super) fn renew(&mut self, slot: u32) -> u32 {
        let serial = &mut self.serials[slot as usize];
        *serial = serial.wrapping_add(1);
        *serial
    }

    pub(super) fn get(&self, slot: u32) -> Option<&T> {
        self.entries.get(slot as usize)?.as_ref()
    }

    pub(super) fn get_mut(&mut self, slot: u32) -> Option<&mut T> {
        self.entries.get_mut(slot as usize)?.as_mut()
    }

    pub(super) fn remove(&mut self, slot: u32) -> Option<T> {
        let value = self.entries.get_mut(slot as usize)?.take()?;
        self.free.push_back(slot);
        Some(value)
    }

    /// One more than the highest place ever used.
    pub(super) fn places(&self) -> u32 {
        self.entries.len() as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_rests_before_it_is_used_again_and_then_has_another_serial() {
        let mut table = Table::new(3);
        let slots: Vec<u32> = (0..5).map(|_| table.insert(|serial| serial)).collect();
        assert_eq!(slots, [0, 1, 2, 3, 4]);
        for slot in [1, 3, 0] {
            assert_eq!(table.remove(slot), Some(0));
        }
        assert_eq!(table.remove(1), None);
        assert_eq!(table.insert(|serial| serial), 5, "three rest: a new place is made");
        table.remove(4);
        assert_eq!(table.insert(|serial| serial), 1, "the longest-free one");
        assert_eq!((table.get(1), table.get(3), table.places()), (Some(&1), None, 6));
    }
}
