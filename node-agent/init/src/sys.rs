//! The system calls `std` has no safe form of. Everything unsafe of this crate is here.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::ptr;

use clawhq_init::Step;

fn check(result: c_int) -> io::Result<c_int> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// No other process of our uid may read our memory, descriptors or environment.
pub fn hide() -> io::Result<()> {
    // SAFETY: takes integers only.
    check(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) }).map(drop)
}

/// Orphans of the tenant become our children also where we are not PID 1.
pub fn adopt_orphans() -> io::Result<()> {
    // SAFETY: takes integers only.
    check(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) }).map(drop)
}

pub fn pid() -> i32 {
    // SAFETY: cannot fail, takes nothing.
    unsafe { libc::getpid() }
}

pub fn ids() -> (u32, u32) {
    // SAFETY: cannot fail, take nothing.
    unsafe { (libc::geteuid(), libc::getegid()) }
}

/// CLOCK_MONOTONIC in nanoseconds.
pub fn monotonic_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a valid timespec for the call to fill; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

pub fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    // SAFETY: the pointer and length are those of `bytes`; up to 256 bytes are never cut short.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), N, 0) };
    if got == N as isize { Ok(bytes) } else { Err(io::Error::last_os_error()) }
}

/// Blocks every signal that can be waited for and returns the descriptor they are read from.
pub fn signal_fd() -> io::Result<OwnedFd> {
    // SAFETY: an all-zero sigset_t is valid, and every call gets a pointer to it. The signals the processor
    // raises stay unblocked, so that a fault ends us as usual.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut set);
        for fault in [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP, libc::SIGABRT] {
            libc::sigdelset(&mut set, fault);
        }
        check(libc::sigprocmask(libc::SIG_BLOCK, &set, ptr::null_mut::<libc::sigset_t>()))?;
        let fd = check(libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK))?;
        // A fresh descriptor that nobody else owns.
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// The next pending signal, if any.
pub fn next_signal(fd: &OwnedFd) -> Option<i32> {
    // SAFETY: all-zero is a valid signalfd_siginfo, and the length is its size; the kernel writes whole ones.
    unsafe {
        let mut info: libc::signalfd_siginfo = std::mem::zeroed();
        let size = size_of::<libc::signalfd_siginfo>();
        let got = libc::read(fd.as_raw_fd(), (&raw mut info).cast(), size);
        (got == size as isize).then_some(info.ssi_signo as i32)
    }
}

/// Waits for input (and room for output) on up to two descriptors; `None` waits for ever.
/// Returns whether each has something to do. A signal that interrupts is a turn without work.
pub fn poll(signals: &OwnedFd, socket: Option<(RawFd, bool)>, timeout_ms: Option<u64>) -> io::Result<(bool, bool)> {
    let watch = |fd, events| libc::pollfd { fd, events, revents: 0 };
    let output = socket.is_some_and(|(_, wants_output)| wants_output);
    let mut fds = [
        watch(signals.as_raw_fd(), libc::POLLIN),
        watch(
            // A negative descriptor is skipped by the kernel.
            socket.map_or(-1, |(fd, _)| fd),
            libc::POLLIN | if output { libc::POLLOUT } else { 0 },
        ),
    ];
    let timeout = timeout_ms.map_or(-1, |ms| ms.min(i32::MAX as u64) as c_int);
    // SAFETY: the pointer and count are those of `fds`.
    match check(unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout) }) {
        Ok(_) => Ok((fds[0].revents != 0, fds[1].revents != 0)),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok((false, false)),
        Err(error) => Err(error),
    }
}

/// Connects without ever blocking (a full backlog is an error), and leaves the stream non-blocking.
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    // SAFETY: all-zero is a valid sockaddr_un.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let bytes = path.as_os_str().as_bytes();
    if bytes.is_empty() || bytes.len() >= address.sun_path.len() || bytes.contains(&0) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as c_char;
    }
    // SAFETY: the first call takes integers; its result is a fresh descriptor that only `socket` owns. The
    // second gets a valid address and its size.
    unsafe {
        let socket = OwnedFd::from_raw_fd(check(libc::socket(
            libc::AF_UNIX,
            libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
            0,
        ))?);
        check(libc::connect(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_un>() as libc::socklen_t,
        ))?;
        Ok(UnixStream::from(socket))
    }
}

/// Whether what the descriptor is on lives in memory only.
pub fn is_in_memory(dir: &impl AsRawFd) -> io::Result<bool> {
    const RAMFS_MAGIC: i64 = 0x8584_58f6;
    // SAFETY: all-zero is a valid statfs for the call to fill.
    let kind = unsafe {
        let mut stat: libc::statfs = std::mem::zeroed();
        check(libc::fstatfs(dir.as_raw_fd(), &mut stat))?;
        stat.f_type
    };
    Ok(kind == libc::TMPFS_MAGIC || kind == RAMFS_MAGIC)
}

/// `target` as in kill(2): a negative one is a group, -1 everything but ourselves.
pub fn kill(target: i32, signal: i32) {
    // SAFETY: takes integers only. A target that is gone already is no error to anybody here.
    unsafe { libc::kill(target, signal) };
}

/// One dead child (its pid and wait status), if there is one.
pub fn reap() -> Option<(i32, c_int)> {
    let mut status = 0;
    // SAFETY: `status` is valid for the call to fill.
    let pid = unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) };
    (pid > 0).then_some((pid, status))
}

/// A process as the kernel wants it: everything allocated before the clone.
pub struct Program<'a> {
    /// Tried in this order, as execvp does.
    pub paths: &'a [CString],
    pub argv: &'a [CString],
    pub env: &'a [CString],
    pub cwd: Option<&'a CStr>,
    /// To become; none: stay who we are.
    pub ids: Option<(u32, u32)>,
}

struct Child {
    paths: *const *const c_char,
    argv: *const *const c_char,
    env: *const *const c_char,
    cwd: *const c_char,
    ids: Option<(u32, u32)>,
    errno: c_int,
    step: Step,
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).chain([ptr::null()]).collect()
}

/// Starts the program in a session of its own with default signals. Its address space is ours until it
/// executes, so nothing is copied and the answer comes after `execve`: the pid, or what failed.
pub fn spawn(program: &Program<'_>) -> Result<i32, (Step, i32)> {
    let (paths, argv, env) = (pointers(program.paths), pointers(program.argv), pointers(program.env));
    let mut child = Child {
        paths: paths.as_ptr(),
        argv: argv.as_ptr(),
        env: env.as_ptr(),
        cwd: program.cwd.map_or(ptr::null(), CStr::as_ptr),
        ids: program.ids,
        errno: 0,
        step: Step::Spawn,
    };
    // 64 KiB; u128 keeps it aligned as the ABI asks.
    let mut stack: Vec<u128> = Vec::with_capacity(4096);
    // SAFETY: `top` is one past the end of the allocation of `stack`, which nothing else uses. CLONE_VFORK
    // suspends us until the child has executed or exited, so `child`, the arrays it points to, their strings
    // and the stack outlive its use of them, and it alone runs on the shared memory. `in_child` only makes
    // raw system calls and writes to `child`. We are single-threaded, so nothing holds a lock meanwhile.
    let pid = unsafe {
        let top = stack.as_mut_ptr().add(stack.capacity());
        libc::clone(in_child, top.cast(), libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD, (&raw mut child).cast())
    };
    if pid == -1 {
        let errno = io::Error::last_os_error().raw_os_error();
        return Err((Step::Spawn, errno.unwrap_or(libc::EAGAIN)));
    }
    // The child wrote through the pointer.
    // SAFETY: `child` is ours and initialised; volatile because the compiler cannot know of that write.
    let (errno, step) = unsafe { (ptr::read_volatile(&child.errno), ptr::read_volatile(&child.step)) };
    if errno == 0 {
        return Ok(pid);
    }
    // SAFETY: takes a pid of ours and no status; the child has exited, so this does not block.
    unsafe { libc::waitpid(pid, ptr::null_mut(), 0) };
    Err((step, errno))
}

/// Becomes the program; returns only when that fails.
pub fn exec(program: &Program<'_>) -> (Step, i32) {
    let (paths, argv, env) = (pointers(program.paths), pointers(program.argv), pointers(program.env));
    let mut child = Child {
        paths: paths.as_ptr(),
        argv: argv.as_ptr(),
        env: env.as_ptr(),
        cwd: program.cwd.map_or(ptr::null(), CStr::as_ptr),
        ids: program.ids,
        errno: 0,
        step: Step::Exec,
    };
    // SAFETY: `child` and all it points to live until the call returns.
    unsafe { become_program(&mut child) };
    (child.step, child.errno)
}

extern "C" fn in_child(child: *mut c_void) -> c_int {
    // SAFETY: `spawn` passes a valid `Child` that it does not touch while we run; the calls take integers.
    unsafe {
        let child = &mut *child.cast::<Child>();
        libc::setsid();
        become_program(child);
        libc::_exit(127)
    }
}

/// # Safety
/// The pointers of `child` are valid, NULL-terminated where they are lists. May run on memory shared with a
/// suspended parent: no allocation, no lock, raw system calls for what glibc would do to all threads.
unsafe fn become_program(child: &mut Child) {
    let mut fail = |step: Step| {
        child.step = step;
        // SAFETY: glibc's errno always has an address.
        child.errno = unsafe { *libc::__errno_location() };
    };
    // SAFETY: by the contract above; everything else is integers, or local and valid for its call.
    unsafe {
        if let Some((uid, gid)) = child.ids {
            let (uid, gid) = (libc::c_long::from(uid), libc::c_long::from(gid));
            if libc::syscall(libc::SYS_setgroups, 0, ptr::null::<libc::gid_t>()) == -1
                || libc::syscall(libc::SYS_setresgid, gid, gid, gid) == -1
                || libc::syscall(libc::SYS_setresuid, uid, uid, uid) == -1
            {
                return fail(Step::Ids);
            }
        }
        if !child.cwd.is_null() && libc::chdir(child.cwd) == -1 {
            return fail(Step::Cwd);
        }
        // Ignored signals stay ignored across execve, and std ignores SIGPIPE. Not by signal(3), which leaves
        // out the two that glibc uses: we may have been started with those ignored, too.
        let default = [0u64; 4];
        for signal in 1..=64 {
            libc::syscall(libc::SYS_rt_sigaction, signal, &default, ptr::null::<u64>(), 8usize);
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &none, ptr::null_mut::<libc::sigset_t>());
        // Everything of ours is CLOEXEC; this is for what we may have been started with.
        libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC);
        let mut denied = false;
        let mut path = child.paths;
        while !(*path).is_null() {
            libc::execve(*path, child.argv, child.env);
            match *libc::__errno_location() {
                libc::ENOENT | libc::ENOTDIR => {}
                libc::EACCES => denied = true,
                _ => return fail(Step::Exec),
            }
            path = path.add(1);
        }
        *libc::__errno_location() = if denied { libc::EACCES } else { libc::ENOENT };
        fail(Step::Exec);
    }
}
