//! The parent: what is configured, how backends stand, which workers live. Every change, from the file or the API, is the
//! same step: make a new configuration, check it, bind what is new, tell all workers, and keep it only if all agree.

use crate::board::{Board, Control};
use crate::check;
use crate::conduit;
use crate::config::{Backend, Config, MOST_BACKENDS, MOST_LISTENERS, Pool, Protocol, check_backend};
use crate::health::{Health, Standing};
use crate::table::{Entry, FromWorker, Table, Target, Targets, ToWorker};
use anyhow::{Context, bail};
use clawhq_wire::process::{self, Backoff};
use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Child;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use tokio::sync::{Mutex as TurnMutex, mpsc};
use tokio::task::AbortHandle;

/// Turn of the loop that ejects, readmits, ramps up and restarts.
const TURN: Duration = Duration::from_millis(50);
/// How long workers may take to put a table in place.
const APPLY: Duration = Duration::from_secs(5);

/// A backend in use.
pub struct Member {
    pub slot: usize,
    pub health: Health,
    pub standing: Standing,
    addr: SocketAddr,
    task: Option<(AbortHandle, String)>,
}

/// Key of a member: pool and backend by name.
type Key = (String, String);

/// A worker process.
pub struct Worker {
    process: Option<(Child, UnixStream)>,
    backoff: Backoff,
    restart: Option<Instant>,
    /// Of the process's life: answers of the one before do not count.
    life: u64,
    pub restarts: u64,
}

pub struct State {
    pub config: Config,
    pub table: Table,
    pub members: HashMap<Key, Member>,
    /// Listener names by their place in the board.
    ids: HashMap<String, usize>,
    /// TCP ports held for their listeners, so that a port asked for as 0 stays ours.
    reserved: HashMap<String, (SocketAddr, Option<tokio::net::TcpSocket>)>,
    /// Slots that a removed backend's last connections still use.
    retired: Vec<usize>,
    free: Vec<usize>,
    pub workers: Vec<Worker>,
    pub conduits: conduit::Summary,
    pub reloads: (u64, u64),
    stopping: bool,
}

/// The parent's state and its handles.
pub struct Controller {
    state: Mutex<State>,
    pub board: Board,
    board_fd: RawFd,
    file: Option<PathBuf>,
    pub started: Instant,
    /// One change at a time.
    turn: TurnMutex<()>,
    answers: mpsc::Sender<(usize, u64, FromWorker)>,
    heard: TurnMutex<mpsc::Receiver<(usize, u64, FromWorker)>>,
}

impl Controller {
    /// Starts the workers and puts the first configuration in place.
    pub async fn start(config: Config, workers: usize, file: Option<PathBuf>) -> anyhow::Result<Arc<Self>> {
        let (board, board_fd) = Board::create(workers).context("shared counters")?;
        let (answers, heard) = mpsc::channel(1024);
        let empty = Config { listeners: Vec::new(), pools: Vec::new(), conduits: Vec::new(), ..config.clone() };
        let controller = Arc::new(Controller {
            state: Mutex::new(State {
                config: empty,
                table: Table::default(),
                members: HashMap::new(),
                ids: HashMap::new(),
                reserved: HashMap::new(),
                retired: Vec::new(),
                free: (0..MOST_BACKENDS).rev().collect(),
                workers: Vec::new(),
                conduits: conduit::Summary::default(),
                reloads: (0, 0),
                stopping: false,
            }),
            board,
            board_fd,
            file,
            started: Instant::now(),
            turn: TurnMutex::new(()),
            answers,
            heard: TurnMutex::new(heard),
        });
        for number in 0..board.workers() {
            let worker = Worker {
                process: None,
                backoff: Backoff::new(Duration::from_millis(100), Duration::from_secs(5), Instant::now()),
                restart: None,
                life: 0,
                restarts: 0,
            };
            controller.lock().workers.push(worker);
            controller.start_worker(&mut controller.lock(), number)?;
        }
        if let Err(error) = controller.put(config).await {
            controller.stop(Duration::ZERO).await;
            return Err(error);
        }
        tokio::spawn(controller.clone().turns());
        tokio::spawn(controller.clone().conduits());
        Ok(controller)
    }

    pub fn lock(&self) -> MutexGuard<'_, State> {
        // A panic while it was held has been logged; the state is only ever replaced whole.
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    // --- workers -----------------------------------------------------------------------------------------------

    fn start_worker(&self, state: &mut State, number: usize) -> anyhow::Result<()> {
        let args: Vec<OsString> = ["worker", "--number", &number.to_string(), "--board", &self.board_fd.to_string()]
            .map(OsString::from)
            .into();
        let process = process::start(&args).context("cannot start a worker process")?;
        process.control.set_write_timeout(Some(Duration::from_secs(2)))?;
        let reader = process.control.try_clone()?;
        let worker = &mut state.workers[number];
        worker.life += 1;
        worker.backoff.started(Instant::now());
        let (life, answers) = (worker.life, self.answers.clone());
        std::thread::Builder::new().name(format!("worker-{number}")).stack_size(128 << 10).spawn(move || {
            for line in BufReader::new(reader).lines() {
                let Ok(Ok(answer)) = line.map(|line| serde_json::from_str(&line)) else { break };
                if answers.blocking_send((number, life, answer)).is_err() {
                    break;
                }
            }
        })?;
        worker.process = Some((process.child, process.control));
        if state.table.version > 0 {
            let table = state.table.clone();
            Self::tell(state, number, &ToWorker::Table(table));
        }
        Ok(())
    }

    fn tell(state: &mut State, number: usize, order: &ToWorker) {
        let Ok(mut line) = serde_json::to_vec(order) else { return };
        line.push(b'\n');
        if let Some((child, control)) = &mut state.workers[number].process
            && control.write_all(&line).is_err()
        {
            // It does not listen: its successor will.
            let _ = child.kill();
        }
    }

    fn tell_all(&self, order: &ToWorker) {
        let mut state = self.lock();
        for number in 0..state.workers.len() {
            Self::tell(&mut state, number, order);
        }
    }

    /// Waits until every living worker has put `version` in place.
    async fn agreed(&self, version: u64) -> anyhow::Result<()> {
        let mut heard = self.heard.lock().await;
        let mut waiting: HashSet<(usize, u64)> = {
            let state = self.lock();
            let living = state.workers.iter().enumerate().filter(|(_, worker)| worker.process.is_some());
            living.map(|(number, worker)| (number, worker.life)).collect()
        };
        let deadline = tokio::time::Instant::now() + APPLY;
        while !waiting.is_empty() {
            match tokio::time::timeout_at(deadline, heard.recv()).await {
                Ok(Some((number, life, FromWorker::Applied { version: applied }))) if applied == version => {
                    waiting.remove(&(number, life));
                }
                Ok(Some((_, _, FromWorker::Failed { version: failed, message }))) if failed == version => {
                    bail!(message)
                }
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(_) => {
                    // A worker that died meanwhile gets the table when it starts again.
                    let state = self.lock();
                    waiting.retain(|(number, life)| {
                        state.workers[*number].process.is_some() && state.workers[*number].life == *life
                    });
                    if !waiting.is_empty() {
                        bail!("{} workers did not put the change in place within {} s", waiting.len(), APPLY.as_secs());
                    }
                }
            }
        }
        Ok(())
    }

    // --- change ------------------------------------------------------------------------------------------------

    /// Reads the file again and puts it in place; on any error everything stays as it was.
    pub async fn reload(&self) -> anyhow::Result<()> {
        let Some(file) = &self.file else { bail!("there is no configuration file to read again") };
        let result = match Config::load(file) {
            Ok(config) => self.put(config).await,
            Err(error) => Err(error.into()),
        };
        let mut state = self.lock();
        match &result {
            Ok(()) => state.reloads.0 += 1,
            Err(_) => state.reloads.1 += 1,
        }
        result
    }

    /// Changes the present configuration.
    pub async fn change<T>(&self, edit: impl FnOnce(&mut Config) -> anyhow::Result<T>) -> anyhow::Result<T> {
        let _turn = self.turn.lock().await;
        let mut config = self.lock().config.clone();
        let told = edit(&mut config)?;
        self.put_in_turn(config).await?;
        Ok(told)
    }

    async fn put(&self, config: Config) -> anyhow::Result<()> {
        let _turn = self.turn.lock().await;
        self.put_in_turn(config).await
    }

    async fn put_in_turn(&self, config: Config) -> anyhow::Result<()> {
        let (table, before, ids, reserved, slots) = {
            let mut state = self.lock();
            let mut ids: HashMap<String, usize> = state.ids.clone();
            ids.retain(|name, _| config.listeners.iter().any(|listener| listener.name == *name));
            let mut reserved = HashMap::new();
            let mut entries = Vec::new();
            for listener in &config.listeners {
                let id = match ids.get(&listener.name) {
                    Some(id) => *id,
                    None => {
                        let taken: HashSet<usize> = ids.values().copied().chain(state.ids.values().copied()).collect();
                        let busy = |id: &usize| self.board.sum_listener(*id, crate::board::L::Active) > 0;
                        let id = (0..MOST_LISTENERS).find(|id| !taken.contains(id) && !busy(id)).context(
                            "connections of removed listeners still hold all places; try again when they have ended",
                        )?;
                        self.board.clear_listener(id);
                        id
                    }
                };
                ids.insert(listener.name.clone(), id);
                let old = state.config.listeners.iter().find(|old| old.name == listener.name);
                let same = old.is_some_and(|old| (old.protocol, old.listen) == (listener.protocol, listener.listen));
                let hold = match state.reserved.get(&listener.name) {
                    Some((addr, _)) if same => (*addr, None),
                    _ => reserve(listener.protocol, listener.listen)
                        .with_context(|| format!("listener {}: cannot listen on {}", listener.name, listener.listen))?,
                };
                let mut bound = listener.clone();
                bound.listen = hold.0;
                reserved.insert(listener.name.clone(), (hold.0, hold.1, same));
                let pool = config
                    .pools
                    .iter()
                    .position(|pool| pool.name == listener.pool)
                    .context("a listener without its pool")?;
                entries.push(Entry { id, listener: bound, pool });
            }
            // Slots: a backend keeps its own for as long as its name and address stay.
            let mut slots: HashMap<Key, (usize, bool)> = HashMap::new();
            let mut pools = Vec::new();
            let mut taken = Vec::new();
            for pool in &config.pools {
                let mut targets = Vec::new();
                for backend in &pool.backends {
                    let key = (pool.name.clone(), backend.name.clone());
                    let kept =
                        state.members.get(&key).filter(|member| member.addr == backend.addr).map(|member| member.slot);
                    let slot = match kept.or_else(|| state.free.pop()) {
                        Some(slot) => slot,
                        None => {
                            state.free.append(&mut taken);
                            bail!("{MOST_BACKENDS} backends are in use, those that still drain included");
                        }
                    };
                    if kept.is_none() {
                        taken.push(slot);
                    }
                    slots.insert(key, (slot, kept.is_none()));
                    targets.push(Target {
                        slot,
                        name: backend.name.clone(),
                        addr: backend.addr,
                        connections: backend.connections,
                    });
                }
                pools.push(Targets { name: pool.name.clone(), source: pool.source, targets });
            }
            let table = Table {
                version: state.table.version + 1,
                connections: u64::from(config.connections),
                splice_after: config.splice_after,
                country_database: config.country_database.clone(),
                entries,
                pools,
            };
            // New slots must say what they take before the first worker sees them.
            let first = state.table.version == 0;
            let now = Instant::now();
            for pool in &config.pools {
                for backend in &pool.backends {
                    let (slot, new) = slots[&(pool.name.clone(), backend.name.clone())];
                    if new {
                        self.board.clear_backend(slot);
                        let health = Health::new((!first).then_some(now));
                        let (_, control) = health.control(backend.weight, backend.drain, pool.slow_start.0, now);
                        self.board.set_control(slot, control);
                    }
                }
            }
            let before = std::mem::replace(&mut state.table, table.clone());
            (table, before, ids, reserved, slots)
        };

        let version = table.version;
        self.tell_all(&ToWorker::Table(table));
        if let Err(error) = self.agreed(version).await {
            let mut back = before;
            let mut state = self.lock();
            back.version = version + 1;
            state.table = back.clone();
            for (slot, new) in slots.into_values() {
                if new {
                    self.board.set_control(slot, Control::up(0));
                    state.retired.push(slot);
                }
            }
            for number in 0..state.workers.len() {
                Self::tell(&mut state, number, &ToWorker::Table(back.clone()));
            }
            return Err(error.context("the change was not put in place"));
        }

        let mut state = self.lock();
        let first = version == 1;
        let now = Instant::now();
        let mut members = HashMap::new();
        for pool in &config.pools {
            for backend in &pool.backends {
                let key = (pool.name.clone(), backend.name.clone());
                let (slot, new) = slots[&key];
                let member = match state.members.remove(&key) {
                    Some(member) if !new => member,
                    gone => {
                        if let Some(gone) = gone {
                            self.retire(&mut state, gone);
                        }
                        let health = Health::new((!first).then_some(now));
                        Member { slot, health, standing: Standing::Up, addr: backend.addr, task: None }
                    }
                };
                members.insert(key, member);
            }
        }
        for (_, gone) in std::mem::take(&mut state.members) {
            self.retire(&mut state, gone);
        }
        state.members = members;
        for (name, (addr, socket, same)) in reserved {
            let old = state.reserved.remove(&name);
            state.reserved.insert(name, (addr, if same { old.and_then(|(_, socket)| socket) } else { socket }));
        }
        state.reserved.retain(|name, _| ids.contains_key(name));
        state.ids = ids;
        state.config = config;
        self.set_controls(&mut state, now);
        Ok(())
    }

    fn retire(&self, state: &mut State, member: Member) {
        if let Some((task, _)) = member.task {
            task.abort();
        }
        self.board.set_control(member.slot, Control::up(0));
        state.retired.push(member.slot);
    }

    /// Ends every flow of a backend.
    pub fn evict(&self, pool: &str, backend: &str) -> bool {
        let slot = self.lock().members.get(&(pool.to_owned(), backend.to_owned())).map(|member| member.slot);
        if let Some(slot) = slot {
            self.tell_all(&ToWorker::Evict { slot });
        }
        slot.is_some()
    }

    pub async fn add_backend(&self, pool: &str, backend: Backend) -> anyhow::Result<()> {
        check_backend(&backend).map_err(anyhow::Error::msg)?;
        self.change(|config| {
            let pool = pool_mut(config, pool)?;
            if pool.backends.iter().any(|other| other.name == backend.name || other.addr == backend.addr) {
                bail!(Refusal::Conflict(format!(
                    "pool {} has a backend {} or {} already",
                    pool.name, backend.name, backend.addr
                )));
            }
            if pool.source.is_some_and(|source| source.is_ipv4() != backend.addr.is_ipv4()) {
                bail!("{} cannot be reached from the pool's source address", backend.addr);
            }
            pool.backends.push(backend);
            Ok(())
        })
        .await
    }

    /// Changes weight, limit or drain of a backend.
    pub async fn edit_backend(&self, pool: &str, name: &str, edit: impl FnOnce(&mut Backend)) -> anyhow::Result<()> {
        self.change(|config| {
            let pool = pool_mut(config, pool)?;
            let Some(backend) = pool.backends.iter_mut().find(|backend| backend.name == name) else {
                bail!(Refusal::Missing(format!("there is no backend {name}")));
            };
            edit(backend);
            check_backend(backend).map_err(anyhow::Error::msg)
        })
        .await
    }

    pub async fn remove_backend(&self, pool: &str, name: &str) -> anyhow::Result<()> {
        self.change(|config| {
            let pool = pool_mut(config, pool)?;
            let before = pool.backends.len();
            pool.backends.retain(|backend| backend.name != name);
            if pool.backends.len() == before {
                bail!(Refusal::Missing(format!("there is no backend {name}")));
            }
            Ok(())
        })
        .await
    }

    // --- turns -------------------------------------------------------------------------------------------------

    fn set_controls(&self, state: &mut State, now: Instant) {
        let State { config, members, .. } = state;
        for pool in &config.pools {
            for backend in &pool.backends {
                if let Some(member) = members.get_mut(&(pool.name.clone(), backend.name.clone())) {
                    let (standing, control) =
                        member.health.control(backend.weight, backend.drain, pool.slow_start.0, now);
                    if standing != member.standing {
                        log(&format!("backend {}/{} is {}", pool.name, backend.name, standing.word()));
                        member.standing = standing;
                    }
                    self.board.set_control(member.slot, control);
                }
            }
        }
    }

    async fn turns(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(TURN);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let now = Instant::now();
            let mut state = self.lock();
            if state.stopping {
                return;
            }
            self.eject(&mut state, now);
            self.set_controls(&mut state, now);
            self.keep_checking(&mut state);
            let State { retired, free, .. } = &mut *state;
            retired.retain(|slot| {
                let done = self.board.active_total(*slot) == 0;
                if done {
                    free.push(*slot);
                }
                !done
            });
            self.keep_workers(&mut state, now);
        }
    }

    fn eject(&self, state: &mut State, now: Instant) {
        let State { config, members, .. } = state;
        for pool in &config.pools {
            let Some(outlier) = &pool.outlier else { continue };
            let mut out = pool.backends.iter().filter(|backend| {
                members.get(&(pool.name.clone(), backend.name.clone())).is_some_and(|member| member.health.is_ejected())
            });
            let mut ejected = out.by_ref().count();
            for backend in &pool.backends {
                let Some(member) = members.get_mut(&(pool.name.clone(), backend.name.clone())) else { continue };
                if member.health.readmit(now) {
                    self.board.streak(member.slot).store(0, Relaxed);
                    ejected -= 1;
                }
                let streak = self.board.streak(member.slot).load(Relaxed);
                let allowed = (ejected + 1) * 100 <= outlier.most_percent as usize * pool.backends.len();
                if allowed && member.health.wants_ejection(streak, outlier) {
                    member.health.eject(outlier, now);
                    ejected += 1;
                }
            }
        }
    }

    /// Sees that exactly the configured checks run.
    fn keep_checking(self: &Arc<Self>, state: &mut State) {
        let State { config, members, .. } = state;
        for pool in &config.pools {
            for backend in &pool.backends {
                let Some(member) = members.get_mut(&(pool.name.clone(), backend.name.clone())) else { continue };
                let wanted = pool.check.as_ref().map(|check| format!("{check:?} {:?}", pool.source));
                if member.task.as_ref().map(|(_, kind)| kind) == wanted.as_ref() {
                    continue;
                }
                if let Some((task, _)) = member.task.take() {
                    task.abort();
                }
                if let (Some(check), Some(wanted)) = (pool.check.clone(), wanted) {
                    let (controller, key) = (self.clone(), (pool.name.clone(), backend.name.clone()));
                    let (addr, source, slot) = (backend.addr, pool.source, member.slot);
                    let task = tokio::spawn(async move {
                        // Checks of many backends are spread over the interval.
                        tokio::time::sleep(check.interval.0.mul_f64(rand::random::<f64>() * 0.5)).await;
                        let mut next = tokio::time::Instant::now();
                        loop {
                            tokio::time::sleep_until(next).await;
                            let started = tokio::time::Instant::now();
                            let result = check::run(&check, addr, source).await;
                            let mut state = controller.lock();
                            let now = Instant::now();
                            let Some(member) = state.members.get_mut(&key).filter(|member| member.slot == slot) else {
                                return;
                            };
                            let changed = member.health.checked(result, &check, now);
                            // On its way down it is asked four times as often: a dead backend is out soon after the first failure.
                            let wait =
                                if member.health.is_doubtful() { check.interval.0 / 4 } else { check.interval.0 };
                            next = started + wait;
                            if changed {
                                controller.set_controls(&mut state, now);
                            }
                        }
                    });
                    member.task = Some((task.abort_handle(), wanted));
                }
            }
        }
    }

    fn keep_workers(&self, state: &mut State, now: Instant) {
        for number in 0..state.workers.len() {
            let worker = &mut state.workers[number];
            if let Some((child, _)) = &mut worker.process
                && let Ok(Some(status)) = child.try_wait()
            {
                log(&format!("worker {number} ended ({status}) and will be started again"));
                worker.process = None;
                worker.restart = Some(worker.backoff.died(now));
                self.board.bury(number);
            }
            if worker.restart.is_some_and(|at| now >= at) {
                worker.restart = None;
                worker.restarts += 1;
                if let Err(error) = self.start_worker(state, number) {
                    log(&format!("worker {number}: {error:#}"));
                    let worker = &mut state.workers[number];
                    worker.restart = Some(worker.backoff.died(now));
                }
            }
        }
    }

    async fn conduits(self: Arc<Self>) {
        loop {
            let (conduits, every, capacity) = {
                let state = self.lock();
                (state.config.conduits.clone(), state.config.conduit_interval.0, state.config.capacity.clone())
            };
            if !conduits.is_empty() {
                let read = conduit::read_all(&conduits).await;
                let cpus = std::thread::available_parallelism().map_or(1, usize::from);
                self.lock().conduits = conduit::sum(read, &capacity, cpus, memory_gib());
            } else {
                self.lock().conduits = conduit::Summary::default();
            }
            tokio::time::sleep(every.max(Duration::from_millis(200))).await;
        }
    }

    /// Stops accepting, gives connections `within` to end, and waits for the workers.
    pub async fn stop(&self, within: Duration) {
        self.lock().stopping = true;
        self.tell_all(&ToWorker::Drain { within_ms: within.as_millis() as u64 });
        let deadline = Instant::now() + within + Duration::from_secs(2);
        let mut ticks = tokio::time::interval(Duration::from_millis(20));
        loop {
            ticks.tick().await;
            let mut state = self.lock();
            let mut living = 0;
            for worker in &mut state.workers {
                if let Some((child, _)) = &mut worker.process {
                    match child.try_wait() {
                        Ok(None) if Instant::now() >= deadline => {
                            let _ = child.kill();
                            let _ = child.wait();
                            worker.process = None;
                        }
                        Ok(None) => living += 1,
                        _ => worker.process = None,
                    }
                }
            }
            if living == 0 {
                return;
            }
        }
    }
}

impl State {
    pub fn is_alive(&self, number: usize) -> bool {
        self.workers.get(number).is_some_and(|worker| worker.process.is_some())
    }

    pub fn pid(&self, number: usize) -> Option<u32> {
        self.workers.get(number)?.process.as_ref().map(|(child, _)| child.id())
    }

    /// Process ids of the workers that live.
    pub fn pids(&self) -> Vec<u32> {
        self.workers.iter().filter_map(|worker| worker.process.as_ref().map(|(child, _)| child.id())).collect()
    }
}

/// Why the API refuses: the difference between "not there" and "there already" is the caller's to see.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    #[error("{0}")]
    Missing(String),
    #[error("{0}")]
    Conflict(String),
}

fn pool_mut<'a>(config: &'a mut Config, name: &str) -> anyhow::Result<&'a mut Pool> {
    let pool = config.pools.iter_mut().find(|pool| pool.name == name);
    pool.ok_or_else(|| Refusal::Missing(format!("there is no pool {name}")).into())
}

/// Finds out whether the address can be bound, and which port 0 stands for. A TCP socket is kept bound, without
/// listening: it receives nothing and keeps the port ours. A UDP socket would receive, so it is closed again.
fn reserve(protocol: Protocol, addr: SocketAddr) -> std::io::Result<(SocketAddr, Option<tokio::net::TcpSocket>)> {
    match protocol {
        Protocol::Tcp => {
            // With listeners of its own kind only: another service on the port is an error.
            let socket =
                if addr.is_ipv4() { tokio::net::TcpSocket::new_v4()? } else { tokio::net::TcpSocket::new_v6()? };
            socket.set_reuseaddr(true)?;
            socket.set_reuseport(true)?;
            socket.bind(addr)?;
            Ok((socket.local_addr()?, Some(socket)))
        }
        Protocol::Udp => Ok((clawhq_wire::socket::udp(addr)?.local_addr()?, None)),
    }
}

fn memory_gib() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib: Option<u64> =
        text.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().trim_end_matches(" kB").parse().ok());
    // Rounded: a machine of 16 GiB shows a little less.
    kib.map_or(0, |kib| (kib + (1 << 19)) >> 20)
}

/// One line on standard error.
pub fn log(message: &str) {
    eprintln!("conduit-balancer: {message}");
}
