//! The loop of PID 1: one thread, two descriptors.

use std::fs;
use std::io;
use std::path::PathBuf;

use clawhq_init::{Claim, Exit, Hello, Oom, ProtocolError, Started, State, Step, Timings, ToAgent, ToInit, VERSION};

use crate::link::Link;
use crate::program::Strings;
use crate::{files, sys};

/// How long the last words may take when we end.
const FAREWELL_MS: u64 = 200;

struct Supervisor {
    boot: [u8; 16],
    is_pid_1: bool,
    link: Link,
    /// Whom this container belongs to, once and for all.
    owner: Option<Owner>,
    /// What a run is started with; gone after a Forget.
    held: Option<Claim>,
    state: State,
    /// The answer to whoever asks about the run that is on.
    started: Option<Started>,
    /// SIGTERM or Shutdown came: when the tenant's process has ended, so do we.
    ending: bool,
    oom_kills_before: Option<u64>,
}

struct Owner {
    claim_id: String,
    generation: u64,
}

/// Runs until told to end; the exit code is then the tenant's.
pub fn supervise(socket: PathBuf) -> io::Result<u8> {
    sys::hide()?;
    sys::adopt_orphans()?;
    let signals = sys::signal_fd()?;
    let mut this = Supervisor {
        boot: sys::random()?,
        is_pid_1: sys::pid() == 1,
        link: Link::new(socket),
        owner: None,
        held: None,
        state: State::Waiting,
        started: None,
        ending: false,
        oom_kills_before: None,
    };
    loop {
        let now = sys::monotonic_ns();
        this.link.expire(now);
        if this.link.dial(now) {
            this.greet();
        }
        let wait_ms = this.link.wake_at().map(|at| at.saturating_sub(now).div_ceil(1_000_000));
        let (has_signal, has_socket) = sys::poll(&signals, this.link.interest(), wait_ms)?;
        if has_signal {
            while let Some(signal) = sys::next_signal(&signals) {
                this.on_signal(signal);
            }
            this.reap();
        }
        if has_socket {
            this.link.flush();
            while let Some(frame) = this.link.receive(sys::monotonic_ns()) {
                let received_ns = sys::monotonic_ns();
                match ToInit::decode(&frame) {
                    Ok(frame) => this.on_frame(frame, received_ns),
                    // From a node agent newer than us.
                    Err(ProtocolError::UnknownFrame(_)) => {}
                    Err(error) => {
                        eprintln!("clawhq: the node agent sent a bad frame: {error}");
                        this.link.hang_up();
                    }
                }
            }
        }
        if this.ending && this.running_pid().is_none() {
            this.farewell(&signals);
            return Ok(this.exit_code());
        }
    }
}

impl Supervisor {
    fn greet(&mut self) {
        let hello = ToAgent::Hello(Hello { version: VERSION, boot: self.boot, state: self.state.clone() });
        self.link.send(&hello.encode());
    }

    fn on_signal(&mut self, signal: i32) {
        match signal {
            libc::SIGTERM => {
                self.ending = true;
                self.signal_tenant(self.stop_signal());
            }
            libc::SIGINT | libc::SIGHUP | libc::SIGQUIT | libc::SIGUSR1 | libc::SIGUSR2 | libc::SIGWINCH => {
                self.signal_tenant(signal)
            }
            _ => {}
        }
    }

    fn on_frame(&mut self, frame: ToInit, received_ns: u64) {
        match frame {
            ToInit::Claim(claim) => self.on_claim(claim, received_ns),
            ToInit::Run { claim_id, run } => self.on_run(claim_id, run, received_ns),
            ToInit::Files { request, claim_id, uid, gid, files } => {
                let owned = self.owner.as_ref().is_some_and(|owner| owner.claim_id == claim_id);
                let result = if owned { files::write_all(&files, uid, gid) } else { Err((libc::EBUSY, String::new())) };
                let (errno, what) = result.err().unwrap_or_default();
                self.say(&ToAgent::FilesWritten { request, errno, what });
            }
            ToInit::Signal { signo } => self.signal_tenant(i32::from(signo)),
            ToInit::Kill => self.kill_all(),
            ToInit::Ping => self.say(&ToAgent::Pong),
            ToInit::Forget => self.held = None,
            ToInit::Shutdown => {
                self.ending = true;
                self.kill_all();
            }
            // Answers to `init run`, which is another process.
            ToInit::ExecSpec(_) | ToInit::ExecRefused { .. } => {}
        }
    }

    fn on_claim(&mut self, claim: Claim, received_ns: u64) {
        match &mut self.owner {
            None => {
                let run = claim.run;
                self.owner = Some(Owner { claim_id: claim.claim_id.clone(), generation: claim.generation });
                self.held = Some(claim);
                self.start(run, received_ns);
            }
            Some(owner) if owner.claim_id != claim.claim_id => {
                self.refuse(claim.claim_id.clone(), claim.run, libc::EBUSY);
            }
            Some(owner) if claim.generation < owner.generation => {
                self.refuse(claim.claim_id.clone(), claim.run, libc::ESTALE);
            }
            Some(owner) => {
                if claim.generation > owner.generation || self.held.is_none() {
                    owner.generation = claim.generation;
                    self.held = Some(claim);
                }
                self.say_state();
            }
        }
    }

    fn on_run(&mut self, claim_id: String, run: u32, received_ns: u64) {
        let owned = self.owner.as_ref().is_some_and(|owner| owner.claim_id == claim_id);
        let last = match &self.state {
            State::Waiting => 0,
            State::Running { run, .. } | State::Exited { run, .. } | State::Failed { run, .. } => *run,
        };
        if !owned {
            self.refuse(claim_id, run, libc::EINVAL);
        } else if run < last {
            self.refuse(claim_id, run, libc::ESTALE);
        } else if run == last {
            self.say_state();
        } else if self.running_pid().is_some() {
            self.refuse(claim_id, run, libc::EBUSY);
        } else if self.held.is_none() {
            self.refuse(claim_id, run, libc::ENOKEY);
        } else {
            self.start(run, received_ns);
        }
    }

    fn start(&mut self, run: u32, received_ns: u64) {
        let Some(claim) = &self.held else { return };
        let claim_id = claim.claim_id.clone();
        let mut timings = Timings { received_ns, ..Timings::default() };
        self.oom_kills_before = oom_kills();
        let result = files::write_all(&claim.files, claim.uid, claim.gid)
            .map_err(|(errno, path)| (Step::File, errno, path))
            .and_then(|()| {
                timings.prepared_ns = sys::monotonic_ns();
                spawn(claim)
            });
        match result {
            Ok(pid) => {
                timings.started_ns = sys::monotonic_ns();
                self.state = State::Running { claim_id: claim_id.clone(), run, pid };
                self.started = Some(Started { claim_id, run, pid, timings });
            }
            Err((step, errno, what)) => {
                let error = io::Error::from_raw_os_error(errno);
                let doing = match step {
                    Step::File => "write",
                    Step::Cwd => "enter",
                    Step::Ids => "become",
                    _ => "start",
                };
                // For the tenant's log: the only place besides the event where the reason shows.
                eprintln!("clawhq: cannot {doing} {what}: {error}");
                self.state = State::Failed { claim_id, run, errno, step, what };
            }
        }
        self.say_state();
    }

    /// Takes every child that has ended, also those that were orphaned to us.
    fn reap(&mut self) {
        while let Some((pid, status)) = sys::reap() {
            if self.running_pid() == Some(pid) {
                self.on_exit(status);
            }
        }
    }

    fn on_exit(&mut self, status: i32) {
        // A run is all of its processes, as in a container whose PID 1 ends: nothing may linger into the next.
        self.kill_all();
        let State::Running { claim_id, run, .. } = std::mem::replace(&mut self.state, State::Waiting) else {
            return;
        };
        let exit = if libc::WIFSIGNALED(status) {
            Exit::Signal(libc::WTERMSIG(status) as u8)
        } else {
            Exit::Code(libc::WEXITSTATUS(status) as u8)
        };
        let oom = match (self.oom_kills_before, oom_kills()) {
            (Some(before), Some(after)) if after > before => Oom::Yes,
            (Some(_), Some(_)) => Oom::No,
            _ => Oom::Unknown,
        };
        self.state = State::Exited { claim_id, run, exit, oom };
        self.say_state();
    }

    fn say_state(&mut self) {
        let frame = match self.state.clone() {
            State::Waiting => return,
            State::Running { .. } => match self.started.clone() {
                Some(started) => ToAgent::Started(started),
                None => return,
            },
            State::Exited { claim_id, run, exit, oom } => ToAgent::Exited { claim_id, run, exit, oom },
            State::Failed { claim_id, run, errno, step, what } => {
                ToAgent::StartFailed { claim_id, run, errno, step, what }
            }
        };
        self.say(&frame);
    }

    /// An answer that changes nothing.
    fn refuse(&mut self, claim_id: String, run: u32, errno: i32) {
        self.say(&ToAgent::StartFailed { claim_id, run, errno, step: Step::Claim, what: String::new() });
    }

    fn say(&mut self, frame: &ToAgent) {
        self.link.send(&frame.encode());
    }

    fn running_pid(&self) -> Option<i32> {
        match self.state {
            State::Running { pid, .. } => Some(pid),
            _ => None,
        }
    }

    fn stop_signal(&self) -> i32 {
        match self.held.as_ref().map_or(0, |claim| claim.stop_signal) {
            0 => libc::SIGTERM,
            signal => i32::from(signal),
        }
    }

    /// The process leads its session, so its pid is its group's.
    fn signal_tenant(&self, signal: i32) {
        if let Some(pid) = self.running_pid() {
            sys::kill(-pid, signal);
        }
    }

    fn kill_all(&self) {
        if self.is_pid_1 {
            sys::kill(-1, libc::SIGKILL);
        } else if let Some(pid) = self.running_pid() {
            sys::kill(-pid, libc::SIGKILL);
        }
    }

    fn exit_code(&self) -> u8 {
        match self.state {
            State::Waiting | State::Running { .. } => 0,
            State::Exited { exit, .. } => exit.shell_code(),
            State::Failed { errno, .. } => crate::failure_code(errno),
        }
    }

    /// Gets the last frames out, if the node agent reads.
    fn farewell(&mut self, signals: &std::os::fd::OwnedFd) {
        let end = sys::monotonic_ns() + FAREWELL_MS * 1_000_000;
        loop {
            self.link.flush();
            let now = sys::monotonic_ns();
            let waiting = self.link.interest().filter(|(_, output)| *output);
            if waiting.is_none() || now >= end {
                return;
            }
            let left_ms = (end - now).div_ceil(1_000_000);
            if sys::poll(signals, waiting, Some(left_ms)).is_err() {
                return;
            }
            while sys::next_signal(signals).is_some() {}
        }
    }
}

fn spawn(claim: &Claim) -> Result<i32, (Step, i32, String)> {
    let ids = (claim.uid, claim.gid);
    let change = (ids != sys::ids()).then_some(ids);
    Strings::new(&claim.argv, &claim.env, claim.inherit_env, claim.cwd.as_deref())
        .and_then(|strings| sys::spawn(&strings.program(change)))
        .map_err(|(step, errno)| {
            let what = match step {
                Step::Cwd => claim.cwd.clone().unwrap_or_default(),
                Step::Ids => format!("{}:{}", claim.uid, claim.gid),
                _ => claim.argv.first().cloned().unwrap_or_default(),
            };
            (step, errno, what)
        })
}

/// How often the kernel has killed something of this container's memory cgroup, where that can be seen.
fn oom_kills() -> Option<u64> {
    ["/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control"]
        .iter()
        .find_map(|path| fs::read_to_string(path).ok())?
        .lines()
        .find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}
