//! Logs, exec and terminals: byte channels over the control plane's stream, each with its own credit, each with an end
//! that says why.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use clawhq_init::{Exec, INIT_PATH};
use clawhq_proto::v1;
use clawhq_proto::v1::up::Frame;
use futures::StreamExt;
use parking_lot::Mutex;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::cgroup;
use crate::inits::Tickets;
use crate::metrics::Counters;
use crate::runtime::{ContainerRuntime, LogQuery, Output, RuntimeError};

/// Largest piece in one frame.
const PIECE: usize = 16 << 10;
/// Frames of one channel that may wait for its program to read.
const INBOX: usize = 256;
/// Frames of all channels that may wait for the stream.
const OUTBOX: usize = 64;
const CREDIT_MAX: usize = 4 << 20;
const START_DEADLINE: Duration = Duration::from_secs(15);

/// What a channel is about, as far as it exists.
pub struct Target {
    pub container: Option<String>,
    /// The tenant's process is up.
    pub runs: bool,
    pub env: Vec<(String, String)>,
    pub cwd: Option<String>,
}

struct Entry {
    inbox: mpsc::Sender<v1::ChannelData>,
    credit: Arc<Semaphore>,
    cancel: CancellationToken,
}

struct Inner {
    most: usize,
    open: Mutex<HashMap<u64, Entry>>,
    up: Mutex<Option<mpsc::Sender<Frame>>>,
    counters: Counters,
}

/// All channels of this agent. Cheap to clone.
#[derive(Clone)]
pub struct Channels(Arc<Inner>);

/// A channel that is registered and not served yet: what is sent into it waits in its inbox.
pub struct Accepted {
    pub open: v1::ChannelOpen,
    /// The way up of the session it came with.
    up: Option<mpsc::Sender<Frame>>,
    frames: mpsc::Receiver<v1::ChannelData>,
    credit: Arc<Semaphore>,
    cancel: CancellationToken,
    /// It could not be registered: there are too many, or one of its number.
    full: bool,
}

/// Why a channel ended.
struct End {
    reason: &'static str,
    message: String,
    exit_code: Option<i32>,
}

fn end(reason: &'static str, message: impl Into<String>) -> End {
    End { reason, message: message.into(), exit_code: None }
}

impl From<RuntimeError> for End {
    fn from(error: RuntimeError) -> Self {
        match error {
            RuntimeError::Gone => end("not_found", "The container is gone."),
            error => end("runtime_failed", error.to_string()),
        }
    }
}

impl Channels {
    pub fn new(most: usize, counters: Counters) -> Self {
        Self(Arc::new(Inner { most, open: Mutex::default(), up: Mutex::default(), counters }))
    }

    /// The frames of a new session of the stream. Numbers begin anew: whatever spoke over an earlier one is over.
    pub fn attach(&self) -> mpsc::Receiver<Frame> {
        self.close_all();
        let (send, receive) = mpsc::channel(OUTBOX);
        *self.0.up.lock() = Some(send);
        receive
    }

    /// The session is over: so is everything that spoke over it.
    pub fn close_all(&self) {
        for (_, entry) in self.0.open.lock().drain() {
            entry.cancel.cancel();
        }
    }

    pub fn data(&self, data: v1::ChannelData) {
        let mut open = self.0.open.lock();
        let Some(entry) = open.get(&data.id) else { return };
        let id = data.id;
        if entry.inbox.try_send(data).is_err() {
            // The other side sends more than it was given credit for.
            if let Some(entry) = open.remove(&id) {
                entry.cancel.cancel();
            }
        }
    }

    pub fn credit(&self, credit: v1::ChannelCredit) {
        if let Some(entry) = self.0.open.lock().get(&credit.id) {
            let room = CREDIT_MAX.saturating_sub(entry.credit.available_permits());
            entry.credit.add_permits((credit.bytes as usize).min(room));
        }
    }

    pub fn closed(&self, closed: &v1::ChannelClosed) {
        if let Some(entry) = self.0.open.lock().remove(&closed.id) {
            entry.cancel.cancel();
        }
    }

    /// Registers a channel as its opening comes in, so that the frames behind it on the stream find it.
    pub fn accept(&self, open: v1::ChannelOpen) -> Accepted {
        let (inbox, frames) = mpsc::channel(INBOX);
        let window = (open.credit as usize).clamp(PIECE, CREDIT_MAX);
        let credit = Arc::new(Semaphore::new(window));
        let cancel = CancellationToken::new();
        let mut all = self.0.open.lock();
        let full = all.len() >= self.0.most || all.contains_key(&open.id);
        if !full {
            all.insert(open.id, Entry { inbox, credit: credit.clone(), cancel: cancel.clone() });
        }
        drop(all);
        Accepted { open, up: self.0.up.lock().clone(), frames, credit, cancel, full }
    }

    /// Serves a channel until its end; `target` is `None` when there is no such slot or it is another instance's.
    pub fn serve(
        &self,
        accepted: Accepted,
        target: Option<Target>,
        tickets: Tickets,
        runtime: Arc<dyn ContainerRuntime>,
    ) {
        let Accepted { open, up, frames, credit, cancel, full } = accepted;
        let (this, id) = (self.clone(), open.id);
        let Some(up) = up.filter(|_| !cancel.is_cancelled()) else { return };
        tokio::spawn(async move {
            let wire = Wire { id, up, credit };
            let ended = if full {
                end("overflow", "Too many channels are open on this node.")
            } else {
                this.0.counters.channels.inc();
                let served = async {
                    match serve(&wire, open, target, tickets, runtime, frames, &cancel).await {
                        Ok(end) | Err(end) => end,
                    }
                };
                let ended = served.await;
                this.0.counters.channels.dec();
                let mut open = this.0.open.lock();
                // A later session may have given the number to another.
                if open.get(&id).is_some_and(|entry| Arc::ptr_eq(&entry.credit, &wire.credit)) {
                    open.remove(&id);
                }
                ended
            };
            let End { reason, message, exit_code } = ended;
            let closed = v1::ChannelClosed { id, reason: reason.to_owned(), message, exit_code };
            let _ = wire.up.send(Frame::ChannelClosed(closed)).await;
        });
    }
}

/// The way up of one channel.
#[derive(Clone)]
struct Wire {
    id: u64,
    up: mpsc::Sender<Frame>,
    credit: Arc<Semaphore>,
}

impl Wire {
    async fn send(&self, output: Output, bytes: Bytes, at_ms: i64) -> Result<(), End> {
        let gone = || end("cancelled", "The stream is gone.");
        let cost = u32::try_from(bytes.len().clamp(1, PIECE)).unwrap_or(u32::MAX);
        self.credit.acquire_many(cost).await.map_err(|_| gone())?.forget();
        let stream = match output {
            Output::Stdout => v1::Stream::Stdout,
            Output::Stderr => v1::Stream::Stderr,
        };
        let data =
            v1::ChannelData { id: self.id, stream: stream.into(), bytes: bytes.into(), at_ms, ..Default::default() };
        self.up.send(Frame::ChannelData(data)).await.map_err(|_| gone())
    }
}

async fn serve(
    wire: &Wire,
    open: v1::ChannelOpen,
    target: Option<Target>,
    tickets: Tickets,
    runtime: Arc<dyn ContainerRuntime>,
    frames: mpsc::Receiver<v1::ChannelData>,
    cancel: &CancellationToken,
) -> Result<End, End> {
    use v1::channel_open::Kind;
    let target = target.ok_or_else(|| end("not_found", "There is no such instance on this node."))?;
    let container = target.container.clone().ok_or_else(|| end("not_running", "It has no container."))?;
    match open.kind.ok_or_else(|| end("not_found", "This node agent does not know that kind of channel."))? {
        Kind::Logs(logs) => tokio::select! {
            result = serve_logs(wire, &container, logs, &*runtime) => result,
            () = cancel.cancelled() => Ok(end("cancelled", "")),
        },
        Kind::Exec(exec) => {
            let deadline = (exec.timeout_ms > 0).then(|| Duration::from_millis(u64::from(exec.timeout_ms)));
            let program = Program { container, argv: exec.argv, size: None, deadline };
            program.serve(wire, target, tickets, runtime, frames, cancel).await
        }
        Kind::Terminal(terminal) => {
            let size = Some((side(terminal.cols, 80), side(terminal.rows, 24)));
            let program = Program { container, argv: terminal.argv, size, deadline: None };
            program.serve(wire, target, tickets, runtime, frames, cancel).await
        }
    }
}

async fn serve_logs(wire: &Wire, container: &str, logs: v1::Logs, runtime: &dyn ContainerRuntime) -> Result<End, End> {
    let both = !logs.stdout && !logs.stderr;
    let query = LogQuery {
        follow: logs.follow,
        since_ms: logs.since_ms.max(0),
        tail: (logs.tail > 0).then_some(logs.tail),
        stdout: logs.stdout || both,
        stderr: logs.stderr || both,
    };
    let mut lines = runtime.logs(container, query);
    while let Some(line) = lines.next().await {
        let line = line?;
        let mut bytes = line.line;
        // Docker splits longer lines itself at this size; this is for whatever does not.
        while bytes.len() > PIECE {
            wire.send(line.output, bytes.split_to(PIECE), line.at_ms).await?;
        }
        wire.send(line.output, bytes, line.at_ms).await?;
    }
    Ok(end("ended", if logs.follow { "The container has ended." } else { "" }))
}

fn side(asked: u32, otherwise: u16) -> u16 {
    match u16::try_from(asked) {
        Ok(0) | Err(_) => otherwise,
        Ok(side) => side.min(1_000),
    }
}

struct Program {
    container: String,
    argv: Vec<String>,
    /// Of the terminal, if it has one.
    size: Option<(u16, u16)>,
    deadline: Option<Duration>,
}

impl Program {
    async fn serve(
        self,
        wire: &Wire,
        target: Target,
        tickets: Tickets,
        runtime: Arc<dyn ContainerRuntime>,
        mut frames: mpsc::Receiver<v1::ChannelData>,
        cancel: &CancellationToken,
    ) -> Result<End, End> {
        if !target.runs {
            return Err(end("not_running", "It does not run."));
        }
        if self.argv.is_empty() {
            return Err(end("not_found", "There is no command."));
        }
        let mut env = target.env;
        if self.size.is_some() && !env.iter().any(|(name, _)| name == "TERM") {
            env.push(("TERM".to_owned(), "xterm-256color".to_owned()));
        }
        // Docker is told the ticket alone: what is run, and with what, stays between the init and us.
        let exec = Exec { argv: self.argv.clone(), env, inherit_env: true, cwd: target.cwd };
        let (ticket, pid) = tickets.issue(&self.container, exec);
        let argv = vec![INIT_PATH.to_owned(), "run".to_owned(), ticket];
        let started = runtime.exec(&self.container, argv, self.size.is_some());
        let mut io = tokio::time::timeout(START_DEADLINE, started)
            .await
            .map_err(|_| end("runtime_failed", "Docker did not start it in time."))??;
        if let Some((cols, rows)) = self.size {
            let _ = runtime.resize(&io.id, cols, rows).await;
        }
        let (input, fed) = mpsc::channel(INBOX);
        let feeder = tokio::spawn(feed(wire.clone(), io.input, fed));
        let mut input = Some(input);
        let deadline = async {
            match self.deadline {
                Some(deadline) => tokio::time::sleep(deadline).await,
                None => std::future::pending().await,
            }
        };
        tokio::pin!(deadline);
        let stopped = loop {
            tokio::select! {
                output = io.output.next() => match output {
                    Some(Ok((output, mut bytes))) => {
                        while !bytes.is_empty() {
                            let piece = bytes.split_to(bytes.len().min(PIECE));
                            tokio::select! {
                                sent = wire.send(output, piece, 0) => sent?,
                                () = cancel.cancelled() => break,
                            }
                        }
                    }
                    Some(Err(error)) => break Some(End::from(error)),
                    None => break None,
                },
                frame = frames.recv(), if input.is_some() => match frame {
                    Some(frame) => {
                        if let (Some(size), true) = (frame.resize, self.size.is_some()) {
                            let _ = runtime.resize(&io.id, side(size.cols, 80), side(size.rows, 24)).await;
                        }
                        if !frame.bytes.is_empty()
                            && input.as_ref().is_some_and(|input| input.try_send(frame.bytes).is_err())
                        {
                            break Some(end("overflow", "More input was sent than the program reads."));
                        }
                        if frame.end_of_input {
                            input = None;
                        }
                    }
                    None => input = None,
                },
                () = &mut deadline => break Some(end("timeout", "It ran longer than allowed and was killed.")),
                () = cancel.cancelled() => break Some(end("cancelled", "")),
            }
        };
        feeder.abort();
        match stopped {
            Some(why) => {
                kill(pid, &self.container).await;
                Err(why)
            }
            None => Ok(exited(&*runtime, &io.id).await),
        }
    }
}

/// Writes a program's input and gives credit for what it took; its end is the input's.
async fn feed(wire: Wire, mut input: std::pin::Pin<Box<dyn AsyncWrite + Send>>, mut fed: mpsc::Receiver<Vec<u8>>) {
    while let Some(bytes) = fed.recv().await {
        if input.write_all(&bytes).await.is_err() || input.flush().await.is_err() {
            return;
        }
        let credit = v1::ChannelCredit { id: wire.id, bytes: u32::try_from(bytes.len()).unwrap_or(u32::MAX) };
        if wire.up.send(Frame::ChannelCredit(credit)).await.is_err() {
            return;
        }
    }
    let _ = input.shutdown().await;
    // Dropping it would close the connection its output comes on.
    std::future::pending::<()>().await;
}

async fn exited(runtime: &dyn ContainerRuntime, exec: &str) -> End {
    // Docker closes the output a moment before it knows the code.
    for wait in [0, 5, 20, 50, 200, 500, 1_000] {
        tokio::time::sleep(Duration::from_millis(wait)).await;
        match runtime.exec_state(exec).await {
            Ok((Some(code), _)) => {
                return End { reason: "exited", message: String::new(), exit_code: Some(code) };
            }
            Ok((None, _)) => {}
            Err(error) => return error.into(),
        }
    }
    end("runtime_failed", "Docker does not say how it ended.")
}

/// Docker has no way to end an exec: its process group is killed from the host.
async fn kill(mut pid: oneshot::Receiver<u32>, container: &str) {
    let Ok(pid) = pid.try_recv() else { return };
    let Ok(raw) = i32::try_from(pid) else { return };
    let inside = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))
        .is_ok_and(|text| cgroup::container_id(&text) == Some(container));
    if !inside {
        return;
    }
    let process = nix::unistd::Pid::from_raw(raw);
    let signal = nix::sys::signal::Signal::SIGKILL;
    // It leads its group unless somebody moved it: then only itself.
    let _ = match nix::unistd::getpgid(Some(process)) {
        Ok(group) if group == process => nix::sys::signal::killpg(group, signal),
        _ => nix::sys::signal::kill(process, signal),
    };
}
