//! Command line of the proxy hub.

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use proxy_hub::account::hash_key;
use proxy_hub::config::Config;
use proxy_hub::dest::Policy;
use proxy_hub::peer::{self, Fleet, Options};
use proxy_hub::server::Server;
use proxy_hub::{api, load};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a hub.
    Serve {
        #[arg(long, default_value = "proxy-hub.toml", env = "PROXY_HUB_CONFIG")]
        config: PathBuf,
    },
    /// Check a configuration file and say what is wrong with it.
    Check {
        #[arg(long, default_value = "proxy-hub.toml")]
        config: PathBuf,
    },
    /// Run as a peer, or with --count as many.
    Peer(PeerArgs),
    /// Run a hub, simulated peers and customers here, and report.
    Load(LoadArgs),
    /// Ask a running hub whether it takes connections; for health checks in images without a shell.
    Health {
        #[arg(long, default_value = "127.0.0.1:8080")]
        api: SocketAddr,
    },
    /// Print the API's OpenAPI document.
    Openapi,
    /// Print the hash under which a key is configured. The key is read from standard input.
    HashKey,
}

#[derive(Args)]
struct PeerArgs {
    /// Address of the hub.
    #[arg(long, env = "PROXY_HUB_ADDRESS")]
    hub: String,
    /// Name of this device.
    #[arg(long, env = "PROXY_HUB_DEVICE", default_value = "peer")]
    device: String,
    #[arg(long, env = "PROXY_HUB_TOKEN", default_value = "")]
    token: String,
    /// The owner of this device agrees to carry the traffic of others.
    #[arg(long)]
    consent: bool,
    /// Allow destinations in this block although it is not public; may be given again.
    #[arg(long)]
    allow: Vec<String>,
    #[arg(long)]
    max_tunnels: Option<u16>,
    /// Simulate this many peers from loopback addresses.
    #[arg(long)]
    count: Option<usize>,
    /// Number of the first simulated peer.
    #[arg(long, default_value_t = 0)]
    first: usize,
    /// Simulated peers started a second.
    #[arg(long, default_value_t = 1000.0)]
    pace: f64,
}

#[derive(Args)]
struct LoadArgs {
    #[arg(long, default_value_t = 2000)]
    peers: usize,
    #[arg(long, default_value_t = 5000)]
    requests: usize,
    #[arg(long, default_value_t = 50)]
    at_once: usize,
    /// Stay up after the report, to be looked at.
    #[arg(long)]
    stay: bool,
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .json()
        .with_env_filter(tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into()))
        .with_writer(std::io::stderr)
        .init();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    match cli.command {
        Command::Serve { config } => runtime.block_on(serve(Config::load(&config)?, config)),
        Command::Check { config } => {
            Config::load(&config)?;
            println!("{} is valid", config.display());
            Ok(())
        }
        Command::Peer(args) => runtime.block_on(run_peer(args)),
        Command::Load(args) => runtime.block_on(run_load(args)),
        Command::Health { api } => health(api),
        Command::Openapi => {
            println!("{}", api::openapi().to_pretty_json()?);
            Ok(())
        }
        Command::HashKey => {
            let key = std::io::read_to_string(std::io::stdin())?;
            println!("{}", hash_key(key.trim_end_matches('\n')).iter().map(|b| format!("{b:02x}")).collect::<String>());
            Ok(())
        }
    }
}

fn health(api: SocketAddr) -> anyhow::Result<()> {
    use std::io::{Read as _, Write as _};
    let patience = Duration::from_secs(3);
    let mut stream = std::net::TcpStream::connect_timeout(&api, patience)?;
    stream.set_read_timeout(Some(patience))?;
    stream.write_all(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.take(4096).read_to_string(&mut answer)?;
    anyhow::ensure!(answer.starts_with("HTTP/1.1 200 "), "{}", answer.lines().last().unwrap_or("no answer"));
    Ok(())
}

async fn serve(config: Config, path: PathBuf) -> anyhow::Result<()> {
    let server = Server::start(config).await?;
    let (mut term, mut int, mut hup) =
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?, signal(SignalKind::hangup())?);
    let mut every = tokio::time::interval(Duration::from_secs(1));
    loop {
        tokio::select! {
            _ = term.recv() => break,
            _ = int.recv() => break,
            _ = hup.recv() => reload(&server, &path),
            _ = every.tick() => anyhow::ensure!(!server.is_broken(), "a shard has ended"),
        }
    }
    tracing::info!("draining");
    server.drain(Duration::from_secs(25)).await
}

/// Takes over what can change while running: customers, policy and geo databases. All of it or nothing.
fn reload(server: &Server, path: &std::path::Path) {
    let config = match Config::load(path) {
        Ok(config) => config,
        Err(error) => return tracing::error!(%error, "the new configuration is refused; the old one stays"),
    };
    let geo = match proxy_hub::geo::Geo::open(&config.geo.databases) {
        Ok(geo) => geo,
        Err(error) => return tracing::error!(%error, "the new configuration is refused; the old one stays"),
    };
    let shared = &server.shared;
    for spec in &config.customer {
        if let Err(error) = shared.accounts.put(spec) {
            tracing::error!(error, customer = spec.name, "not taken over");
        }
    }
    let names: Vec<String> = config.customer.iter().map(|c| c.name.clone()).collect();
    let before = std::mem::replace(&mut *shared.listed.write(), names.clone());
    for gone in before.iter().filter(|name| !names.contains(name)) {
        shared.accounts.remove(gone);
    }
    *shared.policy.write() = Arc::new(config.policy());
    *shared.geo.write() = Arc::new(geo);
    tracing::info!(customers = config.customer.len(), "configuration reloaded");
}

async fn run_peer(args: PeerArgs) -> anyhow::Result<()> {
    clawhq_wire::budget::raise_limit();
    let fleet = Fleet::default();
    let hub = match args.hub.parse::<SocketAddr>() {
        Ok(addr) => addr,
        Err(_) => {
            let (host, port) = args.hub.rsplit_once(':').context("--hub must be host:port")?;
            let addrs = fleet.names.resolve(host).await;
            let ip = addrs.first().with_context(|| format!("{host} does not resolve"))?;
            SocketAddr::new(*ip, port.parse().context("--hub must be host:port")?)
        }
    };
    let allow = args.allow.iter().map(|n| n.parse()).collect::<Result<Vec<_>, String>>().map_err(anyhow::Error::msg)?;
    let options = Options {
        host: args.hub.clone(),
        token: args.token,
        consent: args.consent || args.count.is_some(),
        max_tunnels: args.max_tunnels,
        policy: Arc::new(Policy { allow, ..Policy::default() }),
        version: "1.1.0".into(),
        ..Options::new(hub, args.device)
    };
    let (stop, stopped) = watch::channel(false);
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    match args.count {
        None => {
            let task = tokio::spawn(peer::run(options, fleet, stopped));
            tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
            let _ = stop.send(true);
            let _ = task.await;
        }
        Some(count) => {
            let (first, pace) = (args.first, args.pace);
            let spawned = {
                let fleet = fleet.clone();
                tokio::spawn(async move { load::peers(hub, first, count, pace, &fleet, &options, &stopped).await })
            };
            let mut every = tokio::time::interval(Duration::from_secs(1));
            loop {
                tokio::select! {
                    _ = term.recv() => break,
                    _ = int.recv() => break,
                    _ = every.tick() => {
                        let c = &fleet.counts;
                        println!("ready {} registered {} lost {} cooldowns {} tunnels {}", c.ready.load(Relaxed), c.registered.load(Relaxed), c.lost.load(Relaxed), c.cooldowns.load(Relaxed), c.tunnels.load(Relaxed));
                    }
                }
            }
            spawned.abort();
            let _ = stop.send(true);
        }
    }
    Ok(())
}

async fn run_load(args: LoadArgs) -> anyhow::Result<()> {
    let dir = std::env::temp_dir().join(format!("proxy-hub-load-{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    let geo = dir.join("load.mmdb");
    load::geo_database(&geo)?;
    let text = format!(
        "[hub]\nname = \"load\"\ndata = {dir:?}\n[peers]\nlisten = \"127.0.0.1:0\"\nmin_version = \"0.1\"\n[customers]\nlisten = \"127.0.0.1:0\"\n\
         [api]\nlisten = \"127.0.0.1:0\"\n[policy]\nallow = [\"127.0.0.0/8\"]\n[geo]\ndatabases = [{geo:?}]\n\
         [[customer]]\nname = \"load\"\nkey_sha256 = [\"{}\"]\n",
        hash_key("key").iter().map(|b| format!("{b:02x}")).collect::<String>()
    );
    let server = Server::start(Config::parse(&text, "load")?).await?;
    let fleet = Fleet::default();
    let (stop, stopped) = watch::channel(false);
    let options = Options {
        policy: Arc::new(Policy {
            allow: vec!["127.0.0.0/8".parse().map_err(anyhow::Error::msg)?],
            ..Policy::default()
        }),
        ..Options::new(server.peers, "sim")
    };
    let began = std::time::Instant::now();
    load::peers(server.peers, 0, args.peers, 2000.0, &fleet, &options, &stopped).await;
    while fleet.counts.ready.load(Relaxed) < args.peers && began.elapsed() < Duration::from_secs(120) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    println!(
        "{} of {} peers registered in {:.1} s",
        fleet.counts.ready.load(Relaxed),
        args.peers,
        began.elapsed().as_secs_f64()
    );
    let origin = load::echo().await?;
    for (what, user) in [
        ("any exit", "load"),
        ("exit in Germany", "load-country-de"),
        ("sticky in Miami", "load-country-us-city-miami-session-1-failover-same"),
    ] {
        let began = std::time::Instant::now();
        let (took, failed) = load::requests(
            server.customers,
            user,
            "key",
            origin,
            args.requests,
            if user.contains("session") { 20 } else { args.at_once },
            1000,
        )
        .await;
        println!(
            "{what}: {} requests in {:.1} s, {failed} failed, p50 {:.2} ms, p99 {:.2} ms",
            took.len(),
            began.elapsed().as_secs_f64(),
            load::percentile(&took, 50.0) as f64 / 1000.0,
            load::percentile(&took, 99.0) as f64 / 1000.0
        );
    }
    println!("live page: http://{}/", server.api);
    if args.stay {
        tokio::signal::ctrl_c().await?;
    }
    let _ = stop.send(true);
    server.drain(Duration::from_secs(2)).await?;
    std::fs::remove_dir_all(&dir)?;
    Ok(())
}
