//! PID 1 of every container: waits for a claim, becomes the supervisor of the tenant's process.
//!
//! ```text
//! init [--socket PATH]              supervise
//! init [--socket PATH] run TICKET   what `docker exec` calls: fetch what to execute, and become it
//! init --version
//! ```

mod files;
mod link;
mod program;
mod supervisor;
mod sys;

use std::ffi::OsString;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clawhq_init::{Exec, MAX_CLAIM_ID, MAX_TO_INIT, SOCKET_PATH, Step, ToAgent, ToInit, VERSION, read_frame};
use zeroize::Zeroizing;

/// The node agent has the spec ready before it calls us.
const EXEC_DEADLINE: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1).peekable();
    let mut socket = PathBuf::from(SOCKET_PATH);
    if args.next_if(|arg| arg == "--socket").is_some() {
        match args.next() {
            Some(path) => socket = path.into(),
            None => return usage(),
        }
    }
    let rest: Vec<OsString> = args.collect();
    match rest.as_slice() {
        [] => match supervisor::supervise(socket) {
            Ok(code) => ExitCode::from(code),
            Err(error) => {
                eprintln!("clawhq: init cannot go on: {error}");
                ExitCode::from(125)
            }
        },
        [run, ticket] if run == "run" => match ticket.to_str() {
            Some(ticket) if (1..=MAX_CLAIM_ID).contains(&ticket.len()) => execute(&socket, ticket),
            _ => usage(),
        },
        [version] if version == "--version" => {
            println!("clawhq-init {} protocol {VERSION}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        _ => usage(),
    }
}

fn usage() -> ExitCode {
    eprintln!("usage: init [--socket PATH] [run TICKET | --version]");
    ExitCode::from(125)
}

/// By convention: 127 not found, 126 found but not executable, or not started at all.
fn failure_code(errno: i32) -> u8 {
    if errno == libc::ENOENT { 127 } else { 126 }
}

fn execute(socket: &Path, ticket: &str) -> ExitCode {
    let exec = match sys::hide().and_then(|()| fetch(socket, ticket)) {
        Ok(exec) => exec,
        Err(error) => {
            eprintln!("clawhq: cannot run: {error}");
            return ExitCode::from(126);
        }
    };
    let (step, errno) = match program::Strings::of_exec(&exec) {
        Ok(strings) => sys::exec(&strings.program(None)),
        Err(failure) => failure,
    };
    let what = match step {
        Step::Cwd => exec.cwd.as_deref().unwrap_or_default(),
        _ => exec.argv.first().map(String::as_str).unwrap_or_default(),
    };
    let error = io::Error::from_raw_os_error(errno);
    eprintln!("clawhq: cannot run {what}: {error}");
    ExitCode::from(failure_code(errno))
}

fn fetch(socket: &Path, ticket: &str) -> io::Result<Exec> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(EXEC_DEADLINE))?;
    stream.set_write_timeout(Some(EXEC_DEADLINE))?;
    let hello = ToAgent::ExecHello { ticket: ticket.to_owned() };
    stream.write_all(&hello.encode())?;
    let frame = read_frame(&mut stream, MAX_TO_INIT).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => io::Error::other("the node agent did not answer in time"),
        _ => error,
    })?;
    let frame = Zeroizing::new(frame.ok_or_else(|| io::Error::other("the node agent hung up"))?);
    match ToInit::decode(&frame).map_err(io::Error::other)? {
        ToInit::ExecSpec(exec) => Ok(exec),
        ToInit::ExecRefused { reason } => Err(io::Error::other(reason)),
        _ => Err(io::Error::other("the node agent answered something else")),
    }
}
