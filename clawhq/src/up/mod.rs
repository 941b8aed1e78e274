//! `clawhq up`: from a built program to a running ClawHQ with a first workload, and again in seconds.

mod first_run;
mod postgres;
mod process;
mod progress;

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clawhq_runtime::config::Secret;

use self::first_run::{Client, FIRST_WORKLOAD_TIER, FirstRun};
use self::postgres::Postgres;
use self::process::Record;
use self::progress::Progress;
use crate::config::Settings;

/// Of the first org: the least that has room for OpenClaw.
const FIRST_TIER: &str = "business";
/// The longest data directory under which every Unix socket's path still fits (108 bytes with the longest name).
const LONGEST_DATA: usize = 70;
/// How long the roles may take until they answer `/readyz`.
const READY_WITHIN: Duration = Duration::from_secs(90);
/// How long `up` waits for a first warm slot before it deploys anyway.
const WARM_WITHIN: Duration = Duration::from_secs(20);
/// A log that grew past this is begun anew at the next start; one older is kept.
const LOG_LIMIT: u64 = 50 << 20;

/// What `up` was asked.
pub struct Options {
    /// Milliseconds that `dev` spent before, for the closing line.
    pub spent_ms: u64,
    /// The environment asks for no colour.
    pub no_colour: bool,
    /// The configuration file, handed on to the roles.
    pub config_file: Option<PathBuf>,
    /// What is known of the templates' images on this machine.
    pub images: crate::catalogue::Images,
}

/// Prepares `settings` for roles that run under `up`: without a `DATABASE_URL` the private server is used.
///
/// # Errors
/// When the private server cannot be located.
pub fn with_database(settings: &mut Settings) -> Result<Option<Postgres>> {
    if !settings.database.url.is_empty() {
        return Ok(None);
    }
    let server = Postgres::locate(&settings.data)?;
    settings.database.url = Secret::new(server.url());
    Ok(Some(server))
}

/// Runs `up`. Whatever this call started is stopped again when it fails.
///
/// # Errors
/// One line that says what to do.
pub async fn up(mut settings: Settings, options: Options) -> Result<()> {
    let begun = Instant::now();
    let progress = Progress::new(options.no_colour);
    let data = settings.data.clone();
    preflight(&settings)?;
    let record = Record::new(&data, "clawhq");
    let program = std::env::current_exe().context("finding this program's own file")?;

    let server = with_database(&mut settings)?;
    let mut started = Started::default();
    if let Some(server) = server {
        let step = progress.step("Database started");
        if server.start().context("the private PostgreSQL does not start")? {
            step.done("private, in the data directory");
            started.postgres = Some(server);
        }
    }

    match record.alive() {
        Some(pid) if process::runs_binary(pid, &program) => {}
        running => {
            if let Some(pid) = running {
                let step = progress.step("Older build stopped");
                terminate(pid, &record).await?;
                step.done("");
            }
            need_ports(&settings)?;
            let step = progress.step("Database migrated");
            crate::roles::migrate(&settings, &options.images).await?;
            step.done("");
            let step = progress.step("All roles started");
            started.clawhq = Some(Record::new(&data, "clawhq"));
            start(&program, &settings, &options, &record).await?;
            step.done("");
        }
    }
    wait_ready(&settings, &record).await?;

    let mut first = FirstRun::load_or_generate(&data)?;
    let client = Client::new(reach(settings.api.listen))?;
    let fresh = first.workload.is_none();
    if fresh {
        let step = progress.step("First org and person created");
        let org = client.enter(&data, &mut first).await?;
        let app = crate::roles::open(&settings).await?;
        // Whoever set it up owns the machine: every template is to be had.
        app.set_org_tier(&org, FIRST_TIER).await?;
        step.done(&org);
        let step = progress.step("Warm pool has a slot");
        let deadline = Instant::now() + WARM_WITHIN;
        let warm = loop {
            let pools = app.pool_depths().await?;
            let ready =
                pools.iter().any(|pool| pool.template == "hello" && pool.tier == FIRST_WORKLOAD_TIER && pool.ready > 0);
            if ready || Instant::now() > deadline {
                break ready;
            }
            step.note("starting containers ahead of time");
            tokio::time::sleep(Duration::from_millis(100)).await;
        };
        step.done(if warm { "" } else { "none yet: the first deploy will be a cold one" });
        let step = progress.step("First workload deployed through the API");
        let workload = client.deploy_hello(&data, &mut first, &org).await?;
        step.done(&format!("{}, {:.1} ms", workload.placement, workload.total_ms));
        first_run::answers(&workload.url, reach(settings.edge.listen), Duration::from_secs(30)).await?;
    }
    // From here on nothing is undone: it all works.
    started.keep();
    summary_of(&settings, &first, &progress, Some(Duration::from_millis(options.spent_ms) + begun.elapsed()));
    Ok(())
}

/// Removes every container of this data directory and its table of the firewall. Networks go with their containers; volumes and
/// files are the caller's to remove.
///
/// # Errors
/// When the roles still run, or Docker refuses.
pub fn purge(settings: &Settings) -> Result<()> {
    if Record::new(&settings.data, "clawhq").alive().is_some() {
        bail!("clawhq still runs on {}", settings.data.display());
    }
    let docker = |args: &[&str]| -> Result<String> {
        let output = std::process::Command::new("docker")
            .args(args)
            .env("DOCKER_HOST", &settings.docker.host)
            .output()
            .context("running docker")?;
        if !output.status.success() {
            bail!("docker {}: {}", args[0], String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let found = match clawhq_node_agent::installation(&settings.node_agent).context("the node agent's ledger")? {
        Some(ours) => {
            let filter = format!("label={}={ours}", clawhq_node_agent::LABEL_DATA);
            docker(&["ps", "-aq", "--no-trunc", "--filter", &filter])?
        }
        None => String::new(),
    };
    let containers: Vec<&str> = found.split_whitespace().collect();
    for some in containers.chunks(50) {
        docker(&[&["rm", "--force", "--volumes"], some].concat())?;
    }
    println!("Removed {} containers.", containers.len());
    let key = &settings.node_agent.network.key;
    let table = if key.is_empty() { "clawhq".to_owned() } else { format!("clawhq_{key}") };
    // Not there is fine: egress may be off, or nothing ever ran.
    let _ = std::process::Command::new("nft").args(["delete", "table", "inet", &table]).stderr(Stdio::null()).status();
    Ok(())
}

/// Prints the closing lines of `up` again.
///
/// # Errors
/// When `up` has not run in this data directory.
pub fn summary(settings: &Settings, no_colour: bool) -> Result<()> {
    let first = FirstRun::load(&settings.data).context("nothing was set up here yet: run ./dev up")?;
    summary_of(settings, &first, &Progress::new(no_colour), None);
    Ok(())
}

fn summary_of(settings: &Settings, first: &FirstRun, progress: &Progress, took: Option<Duration>) {
    let line = |name: &str, value: &str| progress.say(&format!("  {name:<10} {value}"));
    progress.say("");
    match took {
        Some(took) => {
            progress.say(&format!(
                "{} {}",
                progress.bold("ClawHQ is up."),
                progress.dim(&format!("({:.1} s)", took.as_secs_f64()))
            ));
        }
        None => progress.say(&progress.bold("ClawHQ")),
    }
    line("Console", &progress.bold(&format!("http://localhost:{}", settings.api.listen.port())));
    line("Sign in", &format!("{}   password {}", first.email, progress.bold(&first.password)));
    if let Some(workload) = &first.workload {
        line("Workload", &progress.bold(&workload.url));
        let steps: Vec<String> = workload.steps.iter().map(|(name, ms)| format!("{name} {ms:.1}")).collect();
        let steps = if steps.is_empty() { String::new() } else { progress.dim(&format!("  ({})", steps.join(", "))) };
        line("Placed", &format!("{} in {:.1} ms{steps}", workload.placement, workload.total_ms));
    }
    line("API", &format!("http://localhost:{}/docs", settings.api.listen.port()));
    progress.say(&progress.dim("  ./dev logs -f   ./dev status   ./dev down"));
}

/// What this very call started, and so must stop if it fails.
#[derive(Default)]
struct Started {
    postgres: Option<Postgres>,
    clawhq: Option<Record>,
}

impl Started {
    fn keep(mut self) {
        self.postgres = None;
        self.clawhq = None;
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        if let Some(record) = self.clawhq.take() {
            if let Some(pid) = record.alive() {
                let _ = signal(pid, nix::sys::signal::Signal::SIGTERM);
                let deadline = Instant::now() + Duration::from_secs(30);
                while record.alive().is_some() && Instant::now() < deadline {
                    std::thread::sleep(Duration::from_millis(50));
                }
                if record.alive().is_some() {
                    let _ = signal(pid, nix::sys::signal::Signal::SIGKILL);
                }
            }
            record.clear();
        }
        if let Some(server) = self.postgres.take()
            && let Err(error) = server.stop()
        {
            eprintln!("PostgreSQL could not be stopped: {error:#}");
        }
    }
}

fn preflight(settings: &Settings) -> Result<()> {
    let data = &settings.data;
    if !nix::unistd::geteuid().is_root() {
        bail!("clawhq up runs containers and needs root: use ./dev up, which asks for it, or sudo");
    }
    if data.as_os_str().len() > LONGEST_DATA {
        bail!(
            "the data directory's path is longer than {LONGEST_DATA} bytes, too long for Unix sockets below it: \
             set CLAWHQ_DATA to a shorter one than {}",
            data.display()
        );
    }
    for dir in ["", "run", "log"] {
        let dir = data.join(dir);
        fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
    }
    // Others may pass through (PostgreSQL's user must), but neither list nor read.
    fs::set_permissions(data, fs::Permissions::from_mode(0o711))?;
    fs::set_permissions(data.join("log"), fs::Permissions::from_mode(0o700))?;
    let free = nix::sys::statvfs::statvfs(data).map(|stat| stat.blocks_available() * stat.fragment_size())?;
    if free < 512 << 20 {
        bail!("only {} MiB are free on the disk of {}: free some space first", free >> 20, data.display());
    }
    Ok(())
}

fn need_ports(settings: &Settings) -> Result<()> {
    for (address, key) in settings.listeners() {
        if let Err(error) = std::net::TcpListener::bind(address) {
            let variable = format!("CLAWHQ_{}", key.to_ascii_uppercase().replace('.', "__"));
            bail!(
                "{address} cannot be listened on ({error}): stop the other program, or set {variable} to another address"
            );
        }
    }
    Ok(())
}

async fn start(program: &Path, settings: &Settings, options: &Options, record: &Record) -> Result<()> {
    let path = settings.data.join("log/clawhq.log");
    if fs::metadata(&path).is_ok_and(|log| log.len() > LOG_LIMIT) {
        fs::rename(&path, path.with_extension("log.1"))?;
    }
    let log = fs::OpenOptions::new().create(true).append(true).open(&path)?;
    let mut command = std::process::Command::new(program);
    if let Some(file) = &options.config_file {
        command.arg("--config").arg(file);
    }
    // The address travels in the environment: a command line is for all to read.
    let child = command
        .arg("serve-all")
        .arg("--daemon")
        .env("CLAWHQ_DATA", &settings.data)
        .env("DATABASE_URL", settings.database.url.expose())
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("starting {}", program.display()))?;
    record.write(child.id()).context("the roles ended at once; see ./dev logs")
}

async fn wait_ready(settings: &Settings, record: &Record) -> Result<()> {
    let url = format!("http://{}/readyz", reach(settings.api.listen));
    let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(2)).build()?;
    let deadline = Instant::now() + READY_WITHIN;
    loop {
        let state = match client.get(&url).send().await {
            Ok(response) if response.status().is_success() => return Ok(()),
            Ok(response) => format!("{}: {}", response.status(), response.text().await.unwrap_or_default()),
            Err(error) => format!("{error:#}"),
        };
        if record.alive().is_none() {
            bail!("the roles ended while they started:\n{}", log_tail(&settings.data));
        }
        if Instant::now() > deadline {
            bail!("not ready after {} s ({state}):\n{}", READY_WITHIN.as_secs(), log_tail(&settings.data));
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
}

fn log_tail(data: &Path) -> String {
    let text = fs::read(data.join("log/clawhq.log")).unwrap_or_default();
    let text = String::from_utf8_lossy(&text[text.len().saturating_sub(16 << 10)..]).into_owned();
    let lines: Vec<&str> = text.lines().rev().take(8).collect();
    lines.into_iter().rev().map(|line| format!("    {line}")).collect::<Vec<_>>().join("\n")
}

async fn terminate(pid: u32, record: &Record) -> Result<()> {
    signal(pid, nix::sys::signal::Signal::SIGTERM)?;
    let deadline = Instant::now() + Duration::from_secs(40);
    while record.alive().is_some() {
        if Instant::now() > deadline {
            signal(pid, nix::sys::signal::Signal::SIGKILL)?;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    record.clear();
    Ok(())
}

fn signal(pid: u32, signal: nix::sys::signal::Signal) -> Result<()> {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid)?);
    Ok(nix::sys::signal::kill(pid, signal)?)
}

/// Where a listener is reached from this machine: one on every address answers on the loopback.
fn reach(listen: SocketAddr) -> SocketAddr {
    if listen.ip().is_unspecified() { SocketAddr::from(([127, 0, 0, 1], listen.port())) } else { listen }
}
