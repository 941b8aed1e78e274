//! The one place that maps files into memory.
#![allow(unsafe_code)]

use memmap2::{Mmap, MmapRaw};
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::atomic::AtomicU64;

/// Maps a file for reading. Files are replaced by renaming, as geoipupdate and every package manager do; a file cut
/// short in place would end the process with SIGBUS.
pub fn read_only(path: &Path) -> io::Result<Mmap> {
    let file = File::open(path)?;
    // SAFETY: the map is only read, and handed out as bytes that are validated at every use; by the contract above
    // nobody writes to the file itself while it is mapped.
    unsafe { Mmap::map(&file) }
}

/// A file of `u64` cells, shared with the page cache: what is stored survives the end of the process by any signal,
/// and a power cut after `sync`.
pub struct Cells {
    map: MmapRaw,
    len: usize,
}

impl Cells {
    /// Maps `cells` cells of `file`, growing it (sparsely) to that size.
    pub fn open(file: &File, cells: usize) -> io::Result<Self> {
        let bytes = (cells * 8) as u64;
        if file.metadata()?.len() < bytes {
            file.set_len(bytes)?;
        }
        Ok(Self { map: memmap2::MmapOptions::new().len(cells * 8).map_raw(file)?, len: cells })
    }

    pub fn cell(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.len);
        // SAFETY: the map is page-aligned, writable and `len * 8` bytes long for as long as `self` lives, the index is in
        // range, and every access in this process goes through atomics. The file is locked against other processes.
        unsafe { AtomicU64::from_ptr(self.map.as_mut_ptr().cast::<u64>().add(index)) }
    }

    /// Writes dirty pages to the disk and waits for it.
    pub fn sync(&self) -> io::Result<()> {
        self.map.flush()
    }
}
