//! Puts the hub together: ledger, shards, resolver, directory, API; and takes it apart again.

use crate::account::{AccountSpec, Accounts};
use crate::api;
use crate::config::Config;
use crate::geo::Geo;
use crate::hub::{Hub, Listeners, unix_now};
use crate::ledger::{Ledger, month_start};
use crate::names::Names;
use crate::places::Places;
use crate::shared::{Command, Lookup, OtherHub, Shared};
use crate::tally::Tally;
use anyhow::Context as _;
use clawhq_wire::{Handle, Limits, budget, socket, spawn};
use redis::AsyncCommands as _;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinHandle;

/// Names that may wait to be resolved.
const LOOKUPS_WAITING: usize = 8192;
const LOOKUPS_AT_ONCE: usize = 512;
/// How often counters are folded into the ledger.
const FOLD_EVERY: Duration = Duration::from_secs(1);
/// How often the directory is renewed; an entry lives three times as long.
const DIRECTORY_EVERY: Duration = Duration::from_secs(2);
/// Descriptors beside connections: listeners, epoll, ledger, API.
const RESERVE: u64 = 256;

/// A running hub.
pub struct Server {
    pub shared: Arc<Shared>,
    pub ledger: Arc<Ledger>,
    pub peers: SocketAddr,
    pub customers: SocketAddr,
    pub api: SocketAddr,
    pub relay: Option<SocketAddr>,
    tally: Arc<Tally>,
    handle: Option<Handle<Command>>,
    stop: watch::Sender<bool>,
    tasks: Vec<JoinHandle<()>>,
}

impl Server {
    /// Starts everything on the current tokio runtime; connections are served by threads of their own.
    pub async fn start(config: Config) -> anyhow::Result<Self> {
        let data = config.hub.data.clone();
        std::fs::create_dir_all(&data).with_context(|| format!("cannot make the data directory {}", data.display()))?;
        let tally = Tally::open(&data.join("tally")).context("opening the byte counters")?;
        let ledger = match &config.ledger.postgres {
            Some(url) => Ledger::postgres(url, &config.hub.name).await.context("opening the ledger in PostgreSQL")?,
            None => Ledger::embedded(&data.join("ledger.redb")).context("opening the ledger")?,
        };
        let ledger = Arc::new(ledger);
        ledger.recover(&tally, unix_now()).await?;

        let accounts = Accounts::new(tally.clone());
        for (name, body) in ledger.customers().await? {
            match serde_json::from_str::<AccountSpec>(&body)
                .map_err(|e| e.to_string())
                .and_then(|spec| accounts.put(&spec))
            {
                Ok(()) => {}
                Err(error) => tracing::error!(name, error, "a stored customer is unusable"),
            }
        }
        for spec in &config.customer {
            accounts.put(spec).map_err(anyhow::Error::msg)?;
        }
        let geo = Geo::open(&config.geo.databases)?;
        if geo.is_empty() && !config.geo.trust_hint {
            tracing::warn!(
                "no geo database: every peer's country is unknown, and a customer who asks for one is refused"
            );
        }
        let (lookups, lookups_rx) = mpsc::channel(LOOKUPS_WAITING);
        let shared = Arc::new(Shared::new(config, accounts, geo, lookups));
        load_periods(&shared, &ledger).await?;
        if shared.config.peers.bytes_per_day > 0 {
            for (device, bytes) in ledger.peers_of_day(unix_now()).await? {
                shared.registry.carried_before(&device, bytes);
            }
        }

        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let shards = if shared.config.hub.shards == 0 { cores } else { shared.config.hub.shards };
        let descriptors = budget::raise_limit();
        let room = descriptors.saturating_sub(RESERVE) as usize / shards;
        anyhow::ensure!(
            room >= 64,
            "the descriptor limit of {descriptors} leaves {room} connections a shard; raise it (LimitNOFILE=, --ulimit nofile)"
        );
        tracing::info!(descriptors, shards, connections = room * shards, "descriptor budget");
        let limits = Limits { sockets: room, ..Limits::default() };

        let mut peers = socket::listen_group(shared.config.peers.listen, shards)
            .with_context(|| format!("listening for peers on {}", shared.config.peers.listen))?;
        let mut customers = socket::listen_group(shared.config.customers.listen, shards)
            .with_context(|| format!("listening for customers on {}", shared.config.customers.listen))?;
        let mut relays = match &shared.config.directory {
            Some(d) => socket::listen_group(d.relay_listen, shards)
                .with_context(|| format!("listening for hubs on {}", d.relay_listen))?,
            None => Vec::new(),
        };
        let (peers_addr, customers_addr) = (peers[0].local_addr()?, customers[0].local_addr()?);
        let relay_addr = relays.first().map(|l| l.local_addr()).transpose()?;
        let handle = spawn(shards, limits, |place| {
            if place.shard == 0 {
                let _ = shared.remotes.set(place.remotes.to_vec());
            }
            let next = |list: &mut Vec<std::net::TcpListener>| list.pop();
            let (peers, customers) = match (next(&mut peers), next(&mut customers)) {
                (Some(p), Some(c)) => (p, c),
                _ => unreachable!("one listener was made for each shard"),
            };
            Hub::new(shared.clone(), place.shard, Listeners { peers, customers, relay: next(&mut relays) })
        })?;

        let (stop, stopped) = watch::channel(false);
        let api_listener = tokio::net::TcpListener::bind(shared.config.api.listen)
            .await
            .with_context(|| format!("listening for the API on {}", shared.config.api.listen))?;
        let api = api_listener.local_addr()?;
        let mut tasks = vec![
            tokio::spawn(resolve(shared.clone(), lookups_rx)),
            tokio::spawn(fold_for_ever(shared.clone(), ledger.clone(), tally.clone(), stopped.clone())),
            tokio::spawn(api::serve(api_listener, shared.clone(), ledger.clone(), stopped.clone())),
        ];
        if let (Some(directory), Some(bound)) = (&shared.config.directory, relay_addr) {
            let advertise = directory.relay_advertise.unwrap_or(bound);
            tasks.push(tokio::spawn(directory_for_ever(
                shared.clone(),
                directory.redis.clone(),
                advertise,
                stopped.clone(),
            )));
        }
        tracing::info!(peers = %peers_addr, customers = %customers_addr, api = %api, "hub is up");
        Ok(Self {
            shared,
            ledger,
            peers: peers_addr,
            customers: customers_addr,
            api,
            relay: relay_addr,
            tally,
            handle: Some(handle),
            stop,
            tasks,
        })
    }

    /// Whether a shard has ended by itself.
    pub fn is_broken(&self) -> bool {
        self.handle.as_ref().is_none_or(Handle::any_ended)
    }

    /// Takes no more, lets tunnels finish for up to `within`, writes the ledger.
    pub async fn drain(mut self, within: Duration) -> anyhow::Result<()> {
        self.shared.draining.store(true, Relaxed);
        if let Some(handle) = self.handle.take() {
            handle.broadcast(|| Command::DrainAll);
            handle.drain(within);
            let joined = tokio::task::spawn_blocking(move || handle.join()).await;
            joined.context("joining the shards")??;
        }
        let _ = self.stop.send(true);
        // The resolver waits for ever; all others end by themselves. Only then are the files free for a successor.
        for (number, task) in self.tasks.drain(..).enumerate() {
            if number == 0 {
                task.abort();
            }
            let _ = tokio::time::timeout(Duration::from_secs(5), task).await;
        }
        fold(&self.shared, &self.ledger, &self.tally).await?;
        self.tally.sync()?;
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.stop.send(true);
        if let Some(handle) = self.handle.take() {
            handle.stop();
            let _ = handle.join();
        }
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// Reads how much of each account's quota is used.
async fn load_periods(shared: &Shared, ledger: &Ledger) -> anyhow::Result<()> {
    let now = unix_now();
    for account in shared.accounts.all() {
        load_period(ledger, &account, now).await?;
    }
    Ok(())
}

pub(crate) async fn load_period(ledger: &Ledger, account: &crate::account::Account, now: i64) -> anyhow::Result<()> {
    let limits = &account.spec.limits;
    if limits.quota_bytes.is_none() {
        return Ok(());
    }
    let from = if limits.quota_monthly { month_start(now) } else { 0 };
    // What this hub has not folded yet is in the counters alone.
    let before = ledger.folded().await?.get(&account.name).copied().unwrap_or_default();
    let unfolded = account.counter.totals().minus(before).bytes();
    let all: u64 = ledger.usage(&account.name, from, i64::MAX).await?.iter().map(|w| w.totals.bytes()).sum();
    account.set_period(all.min(before.bytes()) + unfolded, all.saturating_sub(before.bytes()));
    Ok(())
}

async fn fold(shared: &Shared, ledger: &Ledger, tally: &Arc<Tally>) -> Result<(), crate::ledger::LedgerError> {
    let peers = std::mem::take(&mut *shared.peer_bytes.lock());
    let outcome = ledger.fold(&tally.all(), &peers, unix_now()).await;
    if outcome.is_err() {
        let mut bytes = shared.peer_bytes.lock();
        for (device, n) in peers {
            *bytes.entry(device).or_default() += n;
        }
    }
    outcome
}

async fn fold_for_ever(
    shared: Arc<Shared>,
    ledger: Arc<Ledger>,
    tally: Arc<Tally>,
    mut stopped: watch::Receiver<bool>,
) {
    let mut month = month_start(unix_now());
    let day_of = |now: i64| now.div_euclid(86_400);
    let mut day = day_of(unix_now());
    let mut rounds = 0u64;
    let mut every = tokio::time::interval(FOLD_EVERY);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut last = (tally.all(), false);
    loop {
        tokio::select! {
            _ = every.tick() => {}
            _ = stopped.changed() => return,
        }
        rounds += 1;
        let now = tally.all();
        // An idle hub does not write.
        if now != last.0 || last.1 || !shared.peer_bytes.lock().is_empty() {
            let failed = fold(&shared, &ledger, &tally).await;
            if let Err(error) = &failed {
                tracing::error!(%error, "the ledger cannot be written; the counters keep what is not folded");
            }
            if let Err(error) = tally.sync() {
                tracing::error!(%error, "the byte counters cannot be synced");
            }
            last = (now, failed.is_err());
        }
        if day_of(unix_now()) != day {
            day = day_of(unix_now());
            shared.registry.new_day();
        }
        let this_month = month_start(unix_now());
        let several = matches!(*ledger, Ledger::Postgres { .. });
        if this_month != month || (several && rounds.is_multiple_of(5)) {
            month = this_month;
            if let Err(error) = load_periods(&shared, &ledger).await {
                tracing::error!(%error, "quotas cannot be read from the ledger");
            }
        }
    }
}

async fn resolve(shared: Arc<Shared>, mut lookups: mpsc::Receiver<Lookup>) {
    let names = Names::system();
    let room = Arc::new(Semaphore::new(LOOKUPS_AT_ONCE));
    while let Some(lookup) = lookups.recv().await {
        let Ok(permit) = room.clone().acquire_owned().await else { return };
        let (names, shared) = (names.clone(), shared.clone());
        tokio::spawn(async move {
            let addrs = names.resolve(&lookup.name).await;
            drop(permit);
            let command =
                Command::Resolved { slot: lookup.slot, serial: lookup.serial, addrs, datagram: lookup.datagram };
            if let Some(remote) = shared.remotes.get().and_then(|r| r.get(lookup.shard)) {
                let _ = remote.send(command);
            }
        });
    }
}

/// Tells other hubs what this one has, and learns what they have. A hub that stops saying so is forgotten.
async fn directory_for_ever(
    shared: Arc<Shared>,
    url: String,
    advertise: SocketAddr,
    mut stopped: watch::Receiver<bool>,
) {
    let mut every = tokio::time::interval(DIRECTORY_EVERY);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut connection: Option<redis::aio::MultiplexedConnection> = None;
    let mut known = Vec::new();
    loop {
        tokio::select! {
            _ = every.tick() => {}
            _ = stopped.changed() => return,
        }
        let round = async {
            let mut redis = match connection.take() {
                Some(redis) => redis,
                None => redis::Client::open(url.as_str())?.get_multiplexed_async_connection().await?,
            };
            let seen = exchange(&shared, &mut redis, advertise, &known).await?;
            connection = Some(redis);
            Ok::<_, redis::RedisError>(seen)
        };
        match tokio::time::timeout(Duration::from_secs(5), round).await {
            Ok(Ok(seen)) => {
                known.clone_from(&seen);
                *shared.others.write() = seen;
            }
            Ok(Err(error)) => {
                // Without the directory the hub serves its own peers.
                tracing::warn!(%error, "the directory of hubs is not reachable");
                shared.others.write().clear();
            }
            Err(_) => {
                tracing::warn!("the directory of hubs does not answer");
                shared.others.write().clear();
            }
        }
    }
}

/// Says what this hub has and reads what others have. Lists of places are written and read only when they changed.
async fn exchange(
    shared: &Shared,
    redis: &mut redis::aio::MultiplexedConnection,
    advertise: SocketAddr,
    known: &[OtherHub],
) -> Result<Vec<OtherHub>, redis::RedisError> {
    const HUBS: &str = "proxyhub:hubs";
    let places_of = |hub: &str| format!("proxyhub:places:{hub}");
    let life = 3 * DIRECTORY_EVERY.as_secs() as i64;
    let name = &shared.config.hub.name;
    let places = if shared.is_draining() { Places::default() } else { shared.registry.places() };

    #[derive(serde::Serialize, serde::Deserialize)]
    struct Entry {
        relay: SocketAddr,
        time: i64,
        /// The version of the list of places; 0 if there are none.
        places: u64,
    }
    let version = if places.is_empty() { 0 } else { places.version };
    let before: Option<String> = redis.hget(HUBS, name).await?;
    let written = before.and_then(|body| serde_json::from_str::<Entry>(&body).ok()).map(|e| e.places);
    // The list's own life is renewed; if Redis has lost it, it is written again.
    let there = written == Some(version) && redis.expire::<_, bool>(places_of(name), life * 10).await?;
    if version != 0 && !there {
        let _: () = redis.set_ex(places_of(name), places.bytes(), life as u64 * 10).await?;
    }
    // The directory's own clock: hubs need not agree on the time.
    let (now, _): (i64, i64) = redis::cmd("TIME").query_async(redis).await?;
    let mine = Entry { relay: advertise, time: now, places: version };
    let _: () = redis.hset(HUBS, name, serde_json::to_string(&mine).unwrap_or_default()).await?;

    let all: HashMap<String, String> = redis.hgetall(HUBS).await?;
    let mut entries: Vec<_> = all.into_iter().collect();
    entries.sort();
    let mut out = Vec::new();
    for (hub, body) in entries {
        let Ok(entry) = serde_json::from_str::<Entry>(&body) else { continue };
        let age = (now - entry.time).abs();
        if age > life * 100 {
            let _: () = redis.hdel(HUBS, &hub).await?;
        }
        if hub == *name || age > life || entry.places == 0 {
            continue;
        }
        let same = known.iter().find(|k| *k.name == *hub && k.places.version == entry.places);
        let places = match same {
            Some(known) => known.places.clone(),
            None => {
                let bytes: Option<Vec<u8>> = redis.get(places_of(&hub)).await?;
                Arc::new(bytes.as_deref().and_then(Places::parse).unwrap_or_default())
            }
        };
        out.push(OtherHub { name: hub.into(), relay: entry.relay, places });
    }
    Ok(out)
}
