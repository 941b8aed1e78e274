//! Frames, their bounds and their encoding. No I/O besides [`read_frame`].
//!
//! ```text
//! frame  = u32 LE length of what follows, u8 kind, body
//! body   = records
//! record = u8 kind, u32 LE length, bytes          integers are little endian
//! ```
//! Unknown records are skipped, so that either side may be the older one; an unknown frame is
//! [`ProtocolError::UnknownFrame`] and the receiver may go on; any other error ends the connection.

use std::fmt;
use std::io::{self, Read};

use zeroize::Zeroize;

/// Version of the protocol, said in [`Hello`].
pub const VERSION: u32 = 1;
/// Longest frame (kind and body) the node agent may send, bytes.
pub const MAX_TO_INIT: usize = 4 << 20;
/// Longest frame (kind and body) `init` may send, bytes: the sender is a container, so it is small.
pub const MAX_TO_AGENT: usize = 16 << 10;
/// Longest claim id or ticket, bytes.
pub const MAX_CLAIM_ID: usize = 64;
/// Most arguments, and most variables, of one process.
pub const MAX_ARGS: usize = 4096;
/// Most files of one frame.
pub const MAX_FILES: usize = 1024;
/// Longest path, bytes (Linux' own PATH_MAX with its NUL).
const MAX_PATH: usize = 4095;

/// Everything a tenant's process is started with. Its memory is overwritten when it is dropped, and `Debug`
/// shows names and sizes only.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Claim {
    /// Opaque, 1 to [`MAX_CLAIM_ID`] bytes of printable ASCII. The first one an `init` sees is the only one
    /// it ever serves: one slot, one tenant, once.
    pub claim_id: String,
    /// Fences: a lower generation than the held one is refused (ESTALE), a higher one replaces what is held.
    pub generation: u64,
    /// The run to start at once if this `init` has not started any yet; 1 for a first start, more when the
    /// container was restarted under a claim that has run before. Otherwise the claim is only held.
    pub run: u32,
    /// Program and arguments; a program without `/` is looked up in the `PATH` of `env`.
    pub argv: Vec<String>,
    /// Variables, later ones win.
    pub env: Vec<(String, String)>,
    /// Start from the container's own environment (the image's `ENV`) and lay `env` over it.
    pub inherit_env: bool,
    /// Working directory, absolute; none: the container's.
    pub cwd: Option<String>,
    /// Who the process runs as. When `init` itself is not root these must be its own ids.
    pub uid: u32,
    pub gid: u32,
    /// Written before the process starts.
    pub files: Vec<File>,
    /// What SIGTERM to `init` becomes for the tenant's process, 1 to 64; 0 is SIGTERM.
    pub stop_signal: u8,
}

/// A file to be put in the container, by rename over what was there.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct File {
    /// Absolute, without `..`; missing directories are made (0755, or 0700 for a secret).
    pub path: String,
    /// Permission bits; a secret is always 0400.
    pub mode: u32,
    pub bytes: Vec<u8>,
    /// Refused (EINVAL) unless its directory is on a tmpfs, so that it is never on a disk.
    pub secret: bool,
    /// Leave alone what is there: the file is only a seed of a state volume.
    pub only_if_absent: bool,
}

/// What `init run TICKET` executes on its own terminal.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Exec {
    pub argv: Vec<String>,
    pub env: Vec<(String, String)>,
    /// As in [`Claim`].
    pub inherit_env: bool,
    pub cwd: Option<String>,
}

/// First frame of every connection of an `init`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// [`VERSION`] of the sender.
    pub version: u32,
    /// Random, of this `init` process: a new one means that the container was restarted.
    pub boot: [u8; 16],
    pub state: State,
}

/// Where the tenant's process is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Never claimed.
    Waiting,
    Running {
        claim_id: String,
        run: u32,
        pid: i32,
    },
    Exited {
        claim_id: String,
        run: u32,
        exit: Exit,
        oom: Oom,
    },
    /// The last run could not be started; another [`ToInit::Run`] may try again.
    Failed {
        claim_id: String,
        run: u32,
        errno: i32,
        step: Step,
        what: String,
    },
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    Code(u8),
    Signal(u8),
}

impl Exit {
    /// As a shell says it: the code, or 128 and the signal.
    pub fn shell_code(self) -> u8 {
        match self {
            Exit::Code(code) => code,
            Exit::Signal(signal) => 128u8.saturating_add(signal),
        }
    }
}

/// Whether the kernel killed something in the container for want of memory during the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Oom {
    /// The container does not show its memory cgroup: ask the host's.
    #[default]
    Unknown,
    No,
    Yes,
}

/// What a start was doing when it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The frame does not fit the state: EBUSY (another claim, or still running), ESTALE (older generation
    /// or run), ENOKEY (forgotten: send the claim again), EINVAL.
    Claim,
    /// Writing a file; `what` is its path.
    File,
    /// Changing to the working directory; `what` is its path.
    Cwd,
    /// Becoming uid and gid; `what` is `uid:gid`.
    Ids,
    /// Executing; `what` is the program.
    Exec,
    /// Making the process itself (EAGAIN: the pids limit).
    Spawn,
}

/// CLOCK_MONOTONIC, nanoseconds; the same clock the node agent reads on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Timings {
    /// The frame that caused the start was read whole.
    pub received_ns: u64,
    /// All files were in place.
    pub prepared_ns: u64,
    /// `execve` had succeeded.
    pub started_ns: u64,
}

/// A run that was started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Started {
    pub claim_id: String,
    pub run: u32,
    /// In the container's pid namespace.
    pub pid: i32,
    pub timings: Timings,
}

/// From a container to the node agent. Untrusted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToAgent {
    Hello(Hello),
    Started(Started),
    StartFailed {
        claim_id: String,
        run: u32,
        errno: i32,
        step: Step,
        what: String,
    },
    Exited {
        claim_id: String,
        run: u32,
        exit: Exit,
        oom: Oom,
    },
    /// Answer to [`ToInit::Files`]: errno is 0 when all were written, else `what` is the path that failed.
    FilesWritten {
        request: u64,
        errno: i32,
        what: String,
    },
    Pong,
    /// First and only frame of `init run TICKET`.
    ExecHello {
        ticket: String,
    },
}

/// From the node agent to a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToInit {
    /// Answered by `Started`, `Exited` or `StartFailed`: of the run it starts, or, when a run was started
    /// before, of the last run (the claim is then only held for the next [`ToInit::Run`]).
    Claim(Claim),
    /// Starts the held claim (again); `run` must be higher than the last one. The same run again is
    /// answered with what became of it.
    Run {
        claim_id: String,
        run: u32,
    },
    /// Writes files now, while the tenant's process runs. Only for the held claim id.
    Files {
        request: u64,
        claim_id: String,
        uid: u32,
        gid: u32,
        files: Vec<File>,
    },
    /// To the process group of the tenant's process; nothing if it is not running.
    Signal {
        signo: u8,
    },
    /// SIGKILL to every process of the container but `init`.
    Kill,
    Ping,
    /// Overwrites the held claim: a later run needs the claim again.
    Forget,
    /// Kills the tenant's process and ends `init`, and so the container, with its code.
    Shutdown,
    ExecSpec(Exec),
    /// The ticket is unknown, used or late.
    ExecRefused {
        reason: String,
    },
}

/// Why bytes are not a frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProtocolError {
    /// Longer than the limit, or without a kind.
    Length(usize),
    /// From a newer peer; the frame may be skipped.
    UnknownFrame(u8),
    /// A record goes past the end of its frame.
    Truncated,
    /// A record is missing, of the wrong size, not UTF-8, or breaks a bound; which.
    Invalid(&'static str),
}

impl fmt::Display for ProtocolError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProtocolError::Length(len) => write!(f, "a frame of {len} bytes is out of bounds"),
            ProtocolError::UnknownFrame(kind) => write!(f, "unknown frame kind {kind}"),
            ProtocolError::Truncated => f.write_str("a record goes past the end of its frame"),
            ProtocolError::Invalid(what) => write!(f, "invalid {what}"),
        }
    }
}

impl std::error::Error for ProtocolError {}

/// How many bytes (kind and body) follow the four of `header`.
pub fn frame_len(header: [u8; 4], max: usize) -> Result<usize, ProtocolError> {
    let len = u32::from_le_bytes(header) as usize;
    if len == 0 || len > max {
        return Err(ProtocolError::Length(len));
    }
    Ok(len)
}

/// Reads one frame's kind and body from a blocking stream; `None` at a clean end of it. A frame out of bounds
/// is `InvalidData` with the [`ProtocolError`] inside.
pub fn read_frame(stream: &mut impl Read, max: usize) -> io::Result<Option<Vec<u8>>> {
    let mut header = [0; 4];
    match stream.read(&mut header)? {
        0 => return Ok(None),
        n => stream.read_exact(&mut header[n..])?,
    }
    let len = frame_len(header, max).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    let mut frame = vec![0; len];
    stream.read_exact(&mut frame)?;
    Ok(Some(frame))
}

impl Zeroize for Claim {
    fn zeroize(&mut self) {
        self.argv.zeroize();
        wipe_env(&mut self.env);
        for file in &mut self.files {
            file.bytes.zeroize();
        }
        self.files.clear();
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.zeroize();
    }
}

impl Drop for File {
    fn drop(&mut self) {
        self.bytes.zeroize();
    }
}

impl Drop for Exec {
    fn drop(&mut self) {
        self.argv.zeroize();
        wipe_env(&mut self.env);
    }
}

fn wipe_env(env: &mut Vec<(String, String)>) {
    for (_, value) in env.iter_mut() {
        value.zeroize();
    }
    env.clear();
}

impl fmt::Debug for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Claim")
            .field("claim_id", &self.claim_id)
            .field("generation", &self.generation)
            .field("run", &self.run)
            .field("program", &self.argv.first())
            .field("args", &self.argv.len().saturating_sub(1))
            .field("env", &Names(&self.env))
            .field("cwd", &self.cwd)
            .field("uid", &self.uid)
            .field("gid", &self.gid)
            .field("files", &self.files)
            .field("stop_signal", &self.stop_signal)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for File {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("File")
            .field("path", &self.path)
            .field("mode", &format_args!("{:o}", self.mode))
            .field("len", &self.bytes.len())
            .field("secret", &self.secret)
            .finish()
    }
}

impl fmt::Debug for Exec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exec")
            .field("program", &self.argv.first())
            .field("args", &self.argv.len().saturating_sub(1))
            .field("env", &Names(&self.env))
            .field("cwd", &self.cwd)
            .finish_non_exhaustive()
    }
}

struct Names<'a>(&'a [(String, String)]);

impl fmt::Debug for Names<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|(name, _)| name)).finish()
    }
}

/// Frame kinds. Those of `init` have the high bit.
mod kind {
    pub const CLAIM: u8 = 1;
    pub const RUN: u8 = 2;
    pub const FILES: u8 = 3;
    pub const SIGNAL: u8 = 4;
    pub const KILL: u8 = 5;
    pub const PING: u8 = 6;
    pub const FORGET: u8 = 7;
    pub const SHUTDOWN: u8 = 8;
    pub const EXEC_SPEC: u8 = 9;
    pub const EXEC_REFUSED: u8 = 10;
    pub const HELLO: u8 = 0x81;
    pub const STARTED: u8 = 0x82;
    pub const START_FAILED: u8 = 0x83;
    pub const EXITED: u8 = 0x84;
    pub const FILES_WRITTEN: u8 = 0x85;
    pub const PONG: u8 = 0x86;
    pub const EXEC_HELLO: u8 = 0x87;
}

/// Record kinds, one space for all frames.
mod rec {
    pub const CLAIM_ID: u8 = 1;
    pub const GENERATION: u8 = 2;
    pub const RUN: u8 = 3;
    pub const ARG: u8 = 4;
    /// `NAME=value`.
    pub const ENV: u8 = 5;
    pub const INHERIT_ENV: u8 = 6;
    pub const CWD: u8 = 7;
    pub const UID: u8 = 8;
    pub const GID: u8 = 9;
    /// u32 mode, u8 flags (1 secret, 2 only if absent), u32 path length, path, bytes.
    pub const FILE: u8 = 10;
    pub const STOP_SIGNAL: u8 = 11;
    pub const SIGNO: u8 = 12;
    pub const REQUEST: u8 = 13;
    pub const VERSION: u8 = 14;
    pub const BOOT: u8 = 15;
    pub const STATE: u8 = 16;
    pub const PID: u8 = 17;
    pub const ERRNO: u8 = 18;
    pub const STEP: u8 = 19;
    pub const WHAT: u8 = 20;
    /// u8 0 code or 1 signal, u8 which.
    pub const EXIT: u8 = 21;
    pub const OOM: u8 = 22;
    /// Three u64.
    pub const TIMINGS: u8 = 23;
    pub const TICKET: u8 = 24;
    pub const REASON: u8 = 25;
}

/// Builds one frame; the buffer is sized once, so that no reallocation leaves a copy of a secret behind.
struct Writer(Vec<u8>);

impl Writer {
    fn new(kind: u8, body: usize) -> Self {
        let mut bytes = Vec::with_capacity(5 + body);
        bytes.extend_from_slice(&[0, 0, 0, 0, kind]);
        Writer(bytes)
    }
    fn record(&mut self, kind: u8, parts: &[&[u8]]) {
        let len: usize = parts.iter().map(|part| part.len()).sum();
        self.0.push(kind);
        self.0.extend_from_slice(&(len as u32).to_le_bytes());
        for part in parts {
            self.0.extend_from_slice(part);
        }
    }
    fn text(&mut self, kind: u8, text: &str) {
        self.record(kind, &[text.as_bytes()]);
    }
    fn u8(&mut self, kind: u8, value: u8) {
        self.record(kind, &[&[value]]);
    }
    fn u32(&mut self, kind: u8, value: u32) {
        self.record(kind, &[&value.to_le_bytes()]);
    }
    fn u64(&mut self, kind: u8, value: u64) {
        self.record(kind, &[&value.to_le_bytes()]);
    }
    fn file(&mut self, file: &File) {
        self.record(
            rec::FILE,
            &[
                &file.mode.to_le_bytes(),
                &[u8::from(file.secret) | u8::from(file.only_if_absent) << 1],
                &(file.path.len() as u32).to_le_bytes(),
                file.path.as_bytes(),
                &file.bytes,
            ],
        );
    }
    fn finish(mut self) -> Vec<u8> {
        let len = (self.0.len() - 4) as u32;
        self.0[..4].copy_from_slice(&len.to_le_bytes());
        self.0
    }
}

const HEAD: usize = 5;

fn process_size(argv: &[String], env: &[(String, String)], cwd: Option<&String>) -> usize {
    argv.iter().map(|arg| HEAD + arg.len()).sum::<usize>()
        + env.iter().map(|(name, value)| HEAD + 1 + name.len() + value.len()).sum::<usize>()
        + cwd.map_or(0, |cwd| HEAD + cwd.len())
}

fn files_size(files: &[File]) -> usize {
    files.iter().map(|file| HEAD + 9 + file.path.len() + file.bytes.len()).sum()
}

fn write_process(out: &mut Writer, argv: &[String], env: &[(String, String)], inherit_env: bool, cwd: Option<&String>) {
    for arg in argv {
        out.text(rec::ARG, arg);
    }
    for (name, value) in env {
        out.record(rec::ENV, &[name.as_bytes(), b"=", value.as_bytes()]);
    }
    out.u8(rec::INHERIT_ENV, u8::from(inherit_env));
    if let Some(cwd) = cwd {
        out.text(rec::CWD, cwd);
    }
}

impl ToInit {
    /// The whole frame, header included; may hold secrets, so overwrite it after sending. An error says
    /// which bound is broken: `init` would refuse it.
    pub fn encode(&self) -> Result<Vec<u8>, ProtocolError> {
        self.check()?;
        let out = match self {
            ToInit::Claim(claim) => {
                let size = process_size(&claim.argv, &claim.env, claim.cwd.as_ref())
                    + files_size(&claim.files)
                    + 8 * (HEAD + 8)
                    + claim.claim_id.len();
                let mut out = Writer::new(kind::CLAIM, size);
                out.text(rec::CLAIM_ID, &claim.claim_id);
                out.u64(rec::GENERATION, claim.generation);
                out.u32(rec::RUN, claim.run);
                out.u32(rec::UID, claim.uid);
                out.u32(rec::GID, claim.gid);
                out.u8(rec::STOP_SIGNAL, claim.stop_signal);
                write_process(&mut out, &claim.argv, &claim.env, claim.inherit_env, claim.cwd.as_ref());
                claim.files.iter().for_each(|file| out.file(file));
                out
            }
            ToInit::Run { claim_id, run } => {
                let mut out = Writer::new(kind::RUN, 128);
                out.text(rec::CLAIM_ID, claim_id);
                out.u32(rec::RUN, *run);
                out
            }
            ToInit::Files { request, claim_id, uid, gid, files } => {
                let mut out = Writer::new(kind::FILES, files_size(files) + 160);
                out.u64(rec::REQUEST, *request);
                out.text(rec::CLAIM_ID, claim_id);
                out.u32(rec::UID, *uid);
                out.u32(rec::GID, *gid);
                files.iter().for_each(|file| out.file(file));
                out
            }
            ToInit::Signal { signo } => {
                let mut out = Writer::new(kind::SIGNAL, 8);
                out.u8(rec::SIGNO, *signo);
                out
            }
            ToInit::Kill => Writer::new(kind::KILL, 0),
            ToInit::Ping => Writer::new(kind::PING, 0),
            ToInit::Forget => Writer::new(kind::FORGET, 0),
            ToInit::Shutdown => Writer::new(kind::SHUTDOWN, 0),
            ToInit::ExecSpec(exec) => {
                let size = process_size(&exec.argv, &exec.env, exec.cwd.as_ref()) + 16;
                let mut out = Writer::new(kind::EXEC_SPEC, size);
                write_process(&mut out, &exec.argv, &exec.env, exec.inherit_env, exec.cwd.as_ref());
                out
            }
            ToInit::ExecRefused { reason } => {
                let mut out = Writer::new(kind::EXEC_REFUSED, HEAD + reason.len());
                out.text(rec::REASON, reason);
                out
            }
        };
        let mut frame = out.finish();
        if frame.len() - 4 > MAX_TO_INIT {
            let len = frame.len() - 4;
            frame.zeroize();
            return Err(ProtocolError::Length(len));
        }
        Ok(frame)
    }

    /// From kind and body, as [`read_frame`] gives them. What is returned keeps every bound.
    pub fn decode(frame: &[u8]) -> Result<Self, ProtocolError> {
        let (kind, fields) = Fields::read(frame)?;
        let frame = match kind {
            kind::CLAIM => ToInit::Claim(Claim {
                claim_id: fields.text(rec::CLAIM_ID, "claim id")?,
                generation: fields.u64(rec::GENERATION, "generation")?,
                run: fields.u32(rec::RUN, "run")?,
                argv: fields.args()?,
                env: fields.env()?,
                inherit_env: fields.flag(rec::INHERIT_ENV)?,
                cwd: fields.optional_text(rec::CWD, "cwd")?,
                uid: fields.u32(rec::UID, "uid")?,
                gid: fields.u32(rec::GID, "gid")?,
                files: fields.files()?,
                stop_signal: fields.u8(rec::STOP_SIGNAL, "stop signal")?,
            }),
            kind::RUN => {
                ToInit::Run { claim_id: fields.text(rec::CLAIM_ID, "claim id")?, run: fields.u32(rec::RUN, "run")? }
            }
            kind::FILES => ToInit::Files {
                request: fields.u64(rec::REQUEST, "request")?,
                claim_id: fields.text(rec::CLAIM_ID, "claim id")?,
                uid: fields.u32(rec::UID, "uid")?,
                gid: fields.u32(rec::GID, "gid")?,
                files: fields.files()?,
            },
            kind::SIGNAL => ToInit::Signal { signo: fields.u8(rec::SIGNO, "signal")? },
            kind::KILL => ToInit::Kill,
            kind::PING => ToInit::Ping,
            kind::FORGET => ToInit::Forget,
            kind::SHUTDOWN => ToInit::Shutdown,
            kind::EXEC_SPEC => ToInit::ExecSpec(Exec {
                argv: fields.args()?,
                env: fields.env()?,
                inherit_env: fields.flag(rec::INHERIT_ENV)?,
                cwd: fields.optional_text(rec::CWD, "cwd")?,
            }),
            kind::EXEC_REFUSED => ToInit::ExecRefused { reason: fields.text(rec::REASON, "reason")? },
            other => return Err(ProtocolError::UnknownFrame(other)),
        };
        frame.check()?;
        Ok(frame)
    }

    fn check(&self) -> Result<(), ProtocolError> {
        match self {
            ToInit::Claim(claim) => {
                check_id(&claim.claim_id)?;
                check_run(claim.run)?;
                check_process(&claim.argv, &claim.env, claim.cwd.as_deref())?;
                check_files(&claim.files)?;
                ensure(claim.stop_signal <= 64, "stop signal")
            }
            ToInit::Run { claim_id, run } => {
                check_id(claim_id)?;
                check_run(*run)
            }
            ToInit::Files { claim_id, files, .. } => {
                check_id(claim_id)?;
                check_files(files)
            }
            ToInit::Signal { signo } => ensure((1..=64).contains(signo), "signal"),
            ToInit::ExecSpec(exec) => check_process(&exec.argv, &exec.env, exec.cwd.as_deref()),
            ToInit::ExecRefused { .. } | ToInit::Kill | ToInit::Ping | ToInit::Forget | ToInit::Shutdown => Ok(()),
        }
    }
}

impl ToAgent {
    /// The whole frame, header included.
    pub fn encode(&self) -> Vec<u8> {
        let out = match self {
            ToAgent::Hello(hello) => {
                let mut out = Writer::new(kind::HELLO, 256);
                out.u32(rec::VERSION, hello.version);
                out.record(rec::BOOT, &[&hello.boot]);
                match &hello.state {
                    State::Waiting => out.u8(rec::STATE, 0),
                    State::Running { claim_id, run, pid } => {
                        out.u8(rec::STATE, 1);
                        write_run(&mut out, claim_id, *run);
                        out.u32(rec::PID, *pid as u32);
                    }
                    State::Exited { claim_id, run, exit, oom } => {
                        out.u8(rec::STATE, 2);
                        write_run(&mut out, claim_id, *run);
                        write_exit(&mut out, *exit, *oom);
                    }
                    State::Failed { claim_id, run, errno, step, what } => {
                        out.u8(rec::STATE, 3);
                        write_run(&mut out, claim_id, *run);
                        write_failure(&mut out, *errno, *step, what);
                    }
                }
                out
            }
            ToAgent::Started(started) => {
                let mut out = Writer::new(kind::STARTED, 192);
                write_run(&mut out, &started.claim_id, started.run);
                out.u32(rec::PID, started.pid as u32);
                out.record(
                    rec::TIMINGS,
                    &[
                        &started.timings.received_ns.to_le_bytes(),
                        &started.timings.prepared_ns.to_le_bytes(),
                        &started.timings.started_ns.to_le_bytes(),
                    ],
                );
                out
            }
            ToAgent::StartFailed { claim_id, run, errno, step, what } => {
                let mut out = Writer::new(kind::START_FAILED, 256);
                write_run(&mut out, claim_id, *run);
                write_failure(&mut out, *errno, *step, what);
                out
            }
            ToAgent::Exited { claim_id, run, exit, oom } => {
                let mut out = Writer::new(kind::EXITED, 128);
                write_run(&mut out, claim_id, *run);
                write_exit(&mut out, *exit, *oom);
                out
            }
            ToAgent::FilesWritten { request, errno, what } => {
                let mut out = Writer::new(kind::FILES_WRITTEN, 128);
                out.u64(rec::REQUEST, *request);
                out.u32(rec::ERRNO, *errno as u32);
                out.text(rec::WHAT, cut(what));
                out
            }
            ToAgent::Pong => Writer::new(kind::PONG, 0),
            ToAgent::ExecHello { ticket } => {
                let mut out = Writer::new(kind::EXEC_HELLO, 128);
                out.text(rec::TICKET, ticket);
                out
            }
        };
        out.finish()
    }

    /// From kind and body. Ids keep their bound; everything else is a claim of the container's.
    pub fn decode(frame: &[u8]) -> Result<Self, ProtocolError> {
        if frame.len() > MAX_TO_AGENT {
            return Err(ProtocolError::Length(frame.len()));
        }
        let (kind, fields) = Fields::read(frame)?;
        Ok(match kind {
            kind::HELLO => ToAgent::Hello(Hello {
                version: fields.u32(rec::VERSION, "version")?,
                boot: fields.array(rec::BOOT, "boot")?,
                state: match fields.u8(rec::STATE, "state")? {
                    0 => State::Waiting,
                    1 => State::Running {
                        claim_id: fields.id()?,
                        run: fields.u32(rec::RUN, "run")?,
                        pid: fields.u32(rec::PID, "pid")? as i32,
                    },
                    2 => State::Exited {
                        claim_id: fields.id()?,
                        run: fields.u32(rec::RUN, "run")?,
                        exit: fields.exit()?,
                        oom: fields.oom()?,
                    },
                    3 => State::Failed {
                        claim_id: fields.id()?,
                        run: fields.u32(rec::RUN, "run")?,
                        errno: fields.u32(rec::ERRNO, "errno")? as i32,
                        step: fields.step()?,
                        what: fields.text(rec::WHAT, "what")?,
                    },
                    _ => return Err(ProtocolError::Invalid("state")),
                },
            }),
            kind::STARTED => ToAgent::Started(Started {
                claim_id: fields.id()?,
                run: fields.u32(rec::RUN, "run")?,
                pid: fields.u32(rec::PID, "pid")? as i32,
                timings: {
                    let bytes: [u8; 24] = fields.array(rec::TIMINGS, "timings")?;
                    let at = |i: usize| {
                        let mut word = [0; 8];
                        word.copy_from_slice(&bytes[i * 8..i * 8 + 8]);
                        u64::from_le_bytes(word)
                    };
                    Timings { received_ns: at(0), prepared_ns: at(1), started_ns: at(2) }
                },
            }),
            kind::START_FAILED => ToAgent::StartFailed {
                claim_id: fields.id()?,
                run: fields.u32(rec::RUN, "run")?,
                errno: fields.u32(rec::ERRNO, "errno")? as i32,
                step: fields.step()?,
                what: fields.text(rec::WHAT, "what")?,
            },
            kind::EXITED => ToAgent::Exited {
                claim_id: fields.id()?,
                run: fields.u32(rec::RUN, "run")?,
                exit: fields.exit()?,
                oom: fields.oom()?,
            },
            kind::FILES_WRITTEN => ToAgent::FilesWritten {
                request: fields.u64(rec::REQUEST, "request")?,
                errno: fields.u32(rec::ERRNO, "errno")? as i32,
                what: fields.text(rec::WHAT, "what")?,
            },
            kind::PONG => ToAgent::Pong,
            kind::EXEC_HELLO => {
                let ticket = fields.text(rec::TICKET, "ticket")?;
                check_id(&ticket)?;
                ToAgent::ExecHello { ticket }
            }
            other => return Err(ProtocolError::UnknownFrame(other)),
        })
    }
}

fn write_run(out: &mut Writer, claim_id: &str, run: u32) {
    out.text(rec::CLAIM_ID, claim_id);
    out.u32(rec::RUN, run);
}

fn write_exit(out: &mut Writer, exit: Exit, oom: Oom) {
    let pair = match exit {
        Exit::Code(code) => [0, code],
        Exit::Signal(signal) => [1, signal],
    };
    out.record(rec::EXIT, &[&pair]);
    out.u8(
        rec::OOM,
        match oom {
            Oom::Unknown => 0,
            Oom::No => 1,
            Oom::Yes => 2,
        },
    );
}

fn write_failure(out: &mut Writer, errno: i32, step: Step, what: &str) {
    out.u32(rec::ERRNO, errno as u32);
    out.u8(
        rec::STEP,
        match step {
            Step::Claim => 0,
            Step::File => 1,
            Step::Cwd => 2,
            Step::Ids => 3,
            Step::Exec => 4,
            Step::Spawn => 5,
        },
    );
    out.text(rec::WHAT, cut(what));
}

/// Keeps a frame to the node agent under its limit.
fn cut(text: &str) -> &str {
    text.get(..text.floor_char_boundary(MAX_PATH)).unwrap_or_default()
}

fn ensure(held: bool, what: &'static str) -> Result<(), ProtocolError> {
    if held { Ok(()) } else { Err(ProtocolError::Invalid(what)) }
}

fn check_id(id: &str) -> Result<(), ProtocolError> {
    ensure((1..=MAX_CLAIM_ID).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_graphic()), "claim id")
}

fn check_run(run: u32) -> Result<(), ProtocolError> {
    ensure(run > 0, "run")
}

fn check_path(path: &str, what: &'static str) -> Result<(), ProtocolError> {
    ensure(
        path.starts_with('/')
            && path.len() <= MAX_PATH
            && !path.contains('\0')
            && path.split('/').all(|part| part != ".."),
        what,
    )
}

fn check_process(argv: &[String], env: &[(String, String)], cwd: Option<&str>) -> Result<(), ProtocolError> {
    ensure((1..=MAX_ARGS).contains(&argv.len()) && argv.iter().all(|arg| !arg.contains('\0')), "argv")?;
    ensure(!argv[0].is_empty(), "argv")?;
    ensure(env.len() <= MAX_ARGS, "env")?;
    for (name, value) in env {
        ensure(!name.is_empty() && !name.contains(['=', '\0']) && !value.contains('\0'), "env")?;
    }
    cwd.map_or(Ok(()), |cwd| check_path(cwd, "cwd"))
}

fn check_files(files: &[File]) -> Result<(), ProtocolError> {
    ensure(files.len() <= MAX_FILES, "files")?;
    for file in files {
        check_path(&file.path, "file path")?;
        ensure(!file.path.ends_with('/'), "file path")?;
        ensure(file.mode <= 0o7777, "file mode")?;
    }
    Ok(())
}

/// The records of one frame, borrowed from it.
struct Fields<'a>(Vec<(u8, &'a [u8])>);

impl<'a> Fields<'a> {
    fn read(frame: &'a [u8]) -> Result<(u8, Self), ProtocolError> {
        let (&kind, mut rest) = frame.split_first().ok_or(ProtocolError::Length(0))?;
        let mut records = Vec::new();
        while !rest.is_empty() {
            let (head, tail) = rest.split_first_chunk::<HEAD>().ok_or(ProtocolError::Truncated)?;
            let len = u32::from_le_bytes([head[1], head[2], head[3], head[4]]) as usize;
            let (bytes, tail) = tail.split_at_checked(len).ok_or(ProtocolError::Truncated)?;
            // Twice what a valid frame can hold: a frame of empty records must not become a big list.
            if records.len() > 2 * (2 * MAX_ARGS + MAX_FILES) {
                return Err(ProtocolError::Invalid("number of records"));
            }
            records.push((head[0], bytes));
            rest = tail;
        }
        Ok((kind, Fields(records)))
    }

    fn all(&self, kind: u8) -> impl Iterator<Item = &'a [u8]> + '_ {
        self.0.iter().filter(move |record| record.0 == kind).map(|record| record.1)
    }

    fn one(&self, kind: u8, what: &'static str) -> Result<&'a [u8], ProtocolError> {
        self.all(kind).next().ok_or(ProtocolError::Invalid(what))
    }

    fn array<const N: usize>(&self, kind: u8, what: &'static str) -> Result<[u8; N], ProtocolError> {
        self.one(kind, what)?.try_into().map_err(|_| ProtocolError::Invalid(what))
    }

    fn u8(&self, kind: u8, what: &'static str) -> Result<u8, ProtocolError> {
        self.array::<1>(kind, what).map(|[byte]| byte)
    }

    fn u32(&self, kind: u8, what: &'static str) -> Result<u32, ProtocolError> {
        self.array(kind, what).map(u32::from_le_bytes)
    }

    fn u64(&self, kind: u8, what: &'static str) -> Result<u64, ProtocolError> {
        self.array(kind, what).map(u64::from_le_bytes)
    }

    fn flag(&self, kind: u8) -> Result<bool, ProtocolError> {
        match self.all(kind).next() {
            None | Some([0]) => Ok(false),
            Some([1]) => Ok(true),
            Some(_) => Err(ProtocolError::Invalid("flag")),
        }
    }

    fn text(&self, kind: u8, what: &'static str) -> Result<String, ProtocolError> {
        text(self.one(kind, what)?, what)
    }

    fn optional_text(&self, kind: u8, what: &'static str) -> Result<Option<String>, ProtocolError> {
        self.all(kind).next().map(|bytes| text(bytes, what)).transpose()
    }

    fn id(&self) -> Result<String, ProtocolError> {
        let id = self.text(rec::CLAIM_ID, "claim id")?;
        check_id(&id)?;
        Ok(id)
    }

    fn args(&self) -> Result<Vec<String>, ProtocolError> {
        self.all(rec::ARG).map(|arg| text(arg, "argv")).collect()
    }

    fn env(&self) -> Result<Vec<(String, String)>, ProtocolError> {
        self.all(rec::ENV)
            .map(|pair| {
                let at = pair.iter().position(|&byte| byte == b'=').ok_or(ProtocolError::Invalid("env"))?;
                Ok((text(&pair[..at], "env")?, text(&pair[at + 1..], "env")?))
            })
            .collect()
    }

    fn files(&self) -> Result<Vec<File>, ProtocolError> {
        self.all(rec::FILE)
            .map(|bytes| {
                let invalid = ProtocolError::Invalid("file");
                let (head, rest) = bytes.split_first_chunk::<9>().ok_or(invalid.clone())?;
                ensure(head[4] <= 3, "file")?;
                let path_len = u32::from_le_bytes([head[5], head[6], head[7], head[8]]) as usize;
                let (path, bytes) = rest.split_at_checked(path_len).ok_or(invalid)?;
                Ok(File {
                    path: text(path, "file path")?,
                    mode: u32::from_le_bytes([head[0], head[1], head[2], head[3]]),
                    secret: head[4] & 1 != 0,
                    only_if_absent: head[4] & 2 != 0,
                    bytes: bytes.to_vec(),
                })
            })
            .collect()
    }

    fn exit(&self) -> Result<Exit, ProtocolError> {
        match self.array(rec::EXIT, "exit")? {
            [0, code] => Ok(Exit::Code(code)),
            [1, signal] => Ok(Exit::Signal(signal)),
            _ => Err(ProtocolError::Invalid("exit")),
        }
    }

    fn oom(&self) -> Result<Oom, ProtocolError> {
        match self.u8(rec::OOM, "oom")? {
            0 => Ok(Oom::Unknown),
            1 => Ok(Oom::No),
            2 => Ok(Oom::Yes),
            _ => Err(ProtocolError::Invalid("oom")),
        }
    }

    fn step(&self) -> Result<Step, ProtocolError> {
        Ok(match self.u8(rec::STEP, "step")? {
            0 => Step::Claim,
            1 => Step::File,
            2 => Step::Cwd,
            3 => Step::Ids,
            4 => Step::Exec,
            5 => Step::Spawn,
            _ => return Err(ProtocolError::Invalid("step")),
        })
    }
}

fn text(bytes: &[u8], what: &'static str) -> Result<String, ProtocolError> {
    std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| ProtocolError::Invalid(what))
}
