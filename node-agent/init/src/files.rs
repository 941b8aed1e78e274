//! Puts a claim's files in place.

use std::fs::{self, DirBuilder, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, chown, fchown};
use std::path::Path;

use clawhq_init::File;

use crate::sys;

/// Writes all; an error comes with the path that failed.
pub fn write_all(files: &[File], uid: u32, gid: u32) -> Result<(), (i32, String)> {
    for file in files {
        write(file, uid, gid).map_err(|error| (error.raw_os_error().unwrap_or(libc::EIO), file.path.clone()))?;
    }
    Ok(())
}

/// Written beside its place and renamed, so that a reader (a tenant's process that reloads) sees the old one
/// or the new one, and a link that was planted in its place is replaced, not followed.
fn write(file: &File, uid: u32, gid: u32) -> io::Result<()> {
    // Without being root, what we make is already the tenant's.
    let owner = (sys::ids().0 == 0 && (uid, gid) != sys::ids()).then_some((uid, gid));
    let path = Path::new(&file.path);
    if file.only_if_absent && path.symlink_metadata().is_ok() {
        return Ok(());
    }
    let dir = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    make_dirs(dir, if file.secret { 0o700 } else { 0o755 }, owner)?;
    if file.secret && !sys::is_in_memory(&fs::File::open(dir)?)? {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let suffix = u64::from_le_bytes(sys::random()?);
    let temporary = dir.join(format!(".clawhq-{suffix:016x}"));
    let written = (|| {
        let mut out = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&temporary)?;
        out.write_all(&file.bytes)?;
        if let Some((uid, gid)) = owner {
            fchown(&out, Some(uid), Some(gid))?;
        }
        let mode = if file.secret { 0o400 } else { file.mode };
        out.set_permissions(Permissions::from_mode(mode))?;
        fs::rename(&temporary, path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

fn make_dirs(dir: &Path, mode: u32, owner: Option<(u32, u32)>) -> io::Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    if let Some(parent) = dir.parent() {
        make_dirs(parent, mode, owner)?;
    }
    match DirBuilder::new().mode(mode).create(dir) {
        Ok(()) => {}
        // Somebody was quicker, or something else is in the way.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            return match dir.is_dir() {
                true => Ok(()),
                false => Err(io::Error::from_raw_os_error(libc::ENOTDIR)),
            };
        }
        Err(error) => return Err(error),
    }
    match owner {
        Some((uid, gid)) => chown(dir, Some(uid), Some(gid)),
        None => Ok(()),
    }
}
