//! Memory shared by the worker processes of a service: plain 64-bit counters, nothing else.
//!
//! The parent makes a [`Board`] before it starts workers; each worker maps the same pages by the inherited descriptor.
//! Everything in it is an `AtomicU64`, for which any bit pattern is valid, so a worker that dies mid-way leaves numbers
//! behind and never a broken structure. Pages that nobody touched cost nothing.

#![allow(unsafe_code)]

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fstat, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A fixed table of counters, zero at first, mapped for the life of the process.
#[derive(Clone, Copy)]
pub struct Board {
    words: &'static [AtomicU64],
}

impl Board {
    /// A new table of `words` counters, and the descriptor number that workers started by this process inherit.
    pub fn create(words: usize) -> io::Result<(Board, RawFd)> {
        let bytes = words.checked_mul(8).filter(|bytes| *bytes > 0).ok_or(io::ErrorKind::InvalidInput)?;
        // Not close-on-exec: this descriptor is how a worker finds the table.
        let fd = memfd_create("counters", MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&fd, bytes as u64)?;
        let board = Self::map(&fd)?;
        let number = fd.as_raw_fd();
        // Held open for the life of the process: workers may be started at any time.
        std::mem::forget(fd);
        Ok((board, number))
    }

    /// The table behind a descriptor inherited from the parent.
    pub fn inherit(number: RawFd) -> io::Result<Board> {
        let file: File = OpenOptions::new().read(true).write(true).open(format!("/proc/self/fd/{number}"))?;
        Self::map(&file.into())
    }

    /// A table of this process alone.
    pub fn private(words: usize) -> Board {
        let words: Vec<AtomicU64> = (0..words).map(|_| AtomicU64::new(0)).collect();
        Board { words: Vec::leak(words) }
    }

    fn map(fd: &OwnedFd) -> io::Result<Board> {
        // From here on nobody can change the file's size, so the pages below stay backed.
        fcntl_add_seals(fd, SealFlags::SHRINK | SealFlags::GROW)?;
        let bytes = usize::try_from(fstat(fd)?.st_size).map_err(io::Error::other)?;
        if bytes == 0 || !bytes.is_multiple_of(8) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel picks the address, so nothing of ours is overlaid; `bytes` is the sealed size of the file.
        let start = unsafe { mmap(std::ptr::null_mut(), bytes, protection, MapFlags::SHARED, fd, 0)? };
        // SAFETY: the mapping is `bytes` long, page-aligned, never unmapped, and backed whole (the size is sealed). Every
        // bit pattern is a valid AtomicU64 and all access by any process goes through atomics.
        let words = unsafe { std::slice::from_raw_parts(start.cast::<AtomicU64>(), bytes / 8) };
        Ok(Board { words })
    }

    /// `count` counters from `at`; panics when they are not within the table (a layout error, not a run-time state).
    pub fn slice(&self, at: usize, count: usize) -> &'static [AtomicU64] {
        &self.words[at..at + count]
    }

    /// Number of counters.
    pub fn len(&self) -> usize {
        self.words.len()
    }

    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }
}

/// Adds to a counter that only this thread writes: no locked instruction.
pub fn bump(word: &AtomicU64, by: u64) {
    word.store(word.load(Relaxed).wrapping_add(by), Relaxed);
}

/// Subtracts from a counter that only this thread writes.
pub fn drop_by(word: &AtomicU64, by: u64) {
    word.store(word.load(Relaxed).saturating_sub(by), Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_mappings_see_the_same_counters() {
        let (ours, number) = Board::create(1000).unwrap();
        let theirs = Board::inherit(number).unwrap();
        assert_eq!((ours.len(), theirs.len()), (1000, 1000));
        ours.slice(10, 1)[0].fetch_add(5, Relaxed);
        assert_eq!(theirs.slice(0, 1000)[10].load(Relaxed), 5);
        bump(&theirs.slice(10, 1)[0], 2);
        drop_by(&theirs.slice(11, 1)[0], 2);
        assert_eq!(ours.slice(10, 2).iter().map(|word| word.load(Relaxed)).sum::<u64>(), 7);
    }
}
