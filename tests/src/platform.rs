//! A whole ClawHQ of one test's own.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

use crate::process::{Process, free_ports, pids_mentioning, run};
use crate::{Api, eventually};

/// Which processes the roles run in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// One process, as `./dev up` leaves it.
    Together,
    /// A process for each role, as in production.
    Apart,
}

/// A process of the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    All,
    Api,
    Worker,
    PoolManager,
    Edge,
    NodeAgent,
}

impl Role {
    fn command(self) -> &'static str {
        match self {
            Self::All => "serve-all",
            Self::Api => "api",
            Self::Worker => "worker",
            Self::PoolManager => "pool-manager",
            Self::Edge => "edge",
            Self::NodeAgent => "node-agent",
        }
    }
}

impl Layout {
    pub fn roles(self) -> &'static [Role] {
        match self {
            Self::Together => &[Role::All],
            Self::Apart => &[Role::Api, Role::Worker, Role::PoolManager, Role::Edge, Role::NodeAgent],
        }
    }
}

/// How a test wants its platform.
pub struct Options {
    pub layout: Layout,
    /// Further settings, as `CLAWHQ_…` variables.
    pub env: Vec<(&'static str, String)>,
    /// SQL that is run after the migration and before the roles: tiers are rows.
    pub tune: String,
    /// Images beside hello that are copied from the daemon of `CLAWHQ_TEST_DOCKER_HOST` or `DOCKER_HOST` when it has them.
    pub images: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self { layout: Layout::Together, env: Vec::new(), tune: String::new(), images: Vec::new() }
    }
}

/// Everything it started goes when this is dropped, also by a panic; what a killed test left goes with the next start.
pub struct Platform {
    root: PathBuf,
    /// Its data directory.
    pub data: PathBuf,
    pub api: SocketAddr,
    pub edge: SocketAddr,
    pub layout: Layout,
    env: Vec<(String, String)>,
    key: String,
    roles: BTreeMap<Role, Process>,
    docker: Option<Process>,
    postgres: Option<Process>,
    /// Of the node's stream when it was last ready.
    epoch: i64,
    /// An end of that stream was started since.
    unlinked: bool,
    stopping: bool,
}

impl Platform {
    /// Starts everything and returns when it is ready and its node is connected.
    ///
    /// # Errors
    /// When a part does not start, with the end of its log.
    pub async fn start(options: Options) -> Result<Self> {
        ensure!(nix::unistd::geteuid().is_root(), "whole-system tests run containers and need root");
        clawhq_runtime::crypto::install();
        sweep_the_dead();
        let root = tempfile::Builder::new().prefix("cq-").rand_bytes(4).tempdir()?.keep();
        fs::set_permissions(&root, fs::Permissions::from_mode(0o711))?;
        let key = format!("c{:03x}", std::process::id() & 0xfff);
        fs::write(root.join("owner"), format!("{} {} {key}", std::process::id(), started_at(std::process::id())))?;
        let data = root.join("d");
        for dir in [&data, &root.join("log")] {
            fs::create_dir(dir)?;
        }
        let [api, edge, node] = free_ports()?;
        let local = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
        let mut platform = Self {
            data: data.clone(),
            api: local(api),
            edge: local(edge),
            layout: options.layout,
            env: Vec::new(),
            key: key.clone(),
            roles: BTreeMap::new(),
            docker: None,
            postgres: None,
            epoch: 0,
            unlinked: false,
            stopping: false,
            root,
        };
        platform.env = [
            ("CLAWHQ_DATA", data.display().to_string()),
            ("DATABASE_URL", platform.url("clawhq")),
            ("DOCKER_HOST", platform.docker_host()),
            ("CLAWHQ_API__LISTEN", platform.api.to_string()),
            ("CLAWHQ_API__NODE_LISTEN", local(node).to_string()),
            ("CLAWHQ_EDGE__LISTEN", platform.edge.to_string()),
            ("CLAWHQ_NODE_AGENT__NETWORK__KEY", key),
            ("CLAWHQ_TELEMETRY__FORMAT", "json".to_owned()),
            // One client makes all the load here.
            ("CLAWHQ_API__LIMITS__ADDRESS_PER_SECOND", "100000".to_owned()),
            ("CLAWHQ_API__LIMITS__ADDRESS_BURST", "100000".to_owned()),
            ("CLAWHQ_API__LIMITS__ORG_RATE_FACTOR", "1000".to_owned()),
        ]
        .into_iter()
        .chain(options.env)
        .map(|(name, value)| (name.to_owned(), value))
        // For whoever looks for a cause.
        .chain(std::env::vars().filter(|(name, _)| name.starts_with("CLAWHQ_TELEMETRY__")))
        .collect();
        platform.initdb()?;
        platform.start_postgres().await?;
        platform.start_docker().await?;
        platform.images(&options.images)?;
        platform.clawhq(&["migrate"])?;
        if !options.tune.is_empty() {
            platform.execute(&options.tune).await?;
        }
        if options.layout == Layout::Apart {
            let token = platform.clawhq(&["admin", "join-token", "local"])?;
            let file = platform.root.join("join-token");
            fs::write(&file, token.trim())?;
            platform.env.push(("CLAWHQ_NODE_AGENT__JOIN_TOKEN_FILE".to_owned(), file.display().to_string()));
        }
        for role in options.layout.roles() {
            platform.start_role(*role)?;
        }
        platform.ready(Duration::from_secs(60)).await?;
        Ok(platform)
    }

    // ------------------------------------------------------------------------------------------------ roles

    /// Starts a role's process.
    ///
    /// # Errors
    /// When the program cannot be run.
    pub fn start_role(&mut self, role: Role) -> Result<()> {
        let binary = program()?;
        let log = self.log(role.command());
        let command = [binary.to_str().context("path")?, role.command()];
        self.roles.insert(role, Process::start(role.command(), &[], &command, &self.env, &log)?);
        self.unlinked |= matches!(role, Role::All | Role::Api | Role::NodeAgent);
        Ok(())
    }

    /// `kill -9` of a role's process.
    pub fn kill_role(&mut self, role: Role) {
        self.roles.remove(&role);
    }

    /// Stops a role as an operator does.
    ///
    /// # Errors
    /// When it does not end by itself in time.
    pub fn stop_role(&mut self, role: Role) -> Result<()> {
        let Some(mut process) = self.roles.remove(&role) else { return Ok(()) };
        let status = process.stop(Signal::SIGTERM, Duration::from_secs(40))?;
        ensure!(status.success(), "{} ended with {status}:\n{}", process.name, self.log_tail(role.command(), 10));
        Ok(())
    }

    /// The process of a role.
    pub fn pid(&self, role: Role) -> Option<u32> {
        self.roles.get(&role).map(Process::pid)
    }

    pub fn dockerd_pid(&self) -> Option<u32> {
        self.docker.as_ref().map(Process::pid)
    }

    /// Waits until the API says it is ready, the edge listens and the node is connected and says it is ready. After a start of
    /// the API or the node agent it must have linked anew.
    ///
    /// # Errors
    /// When a process ended, or it takes longer than `within`.
    pub async fn ready(&mut self, within: Duration) -> Result<()> {
        let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(2)).build()?;
        let url = format!("http://{}/readyz", self.api);
        let end = Instant::now() + within;
        loop {
            let why = match client.get(&url).send().await {
                Ok(answer) if answer.status().is_success() => match tokio::net::TcpStream::connect(self.edge).await {
                    Ok(_) => match self.node_is_ready().await {
                        Ok(()) => return Ok(()),
                        Err(error) => format!("node: {error:#}"),
                    },
                    Err(error) => format!("edge: {error}"),
                },
                Ok(answer) => format!("{}: {}", answer.status(), answer.text().await.unwrap_or_default()),
                Err(error) => format!("{error:#}"),
            };
            for (role, process) in &mut self.roles {
                if let Some(status) = process.ended() {
                    let name = role.command();
                    bail!("{name} ended with {status}:\n{}", tail(&self.root.join(format!("log/{name}.log")), 12));
                }
            }
            if Instant::now() > end {
                let logs: Vec<String> = self.roles.keys().map(|role| self.log_tail(role.command(), 8)).collect();
                bail!("not ready within {within:?}: {why}\n{}", logs.join("\n"));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Whether the node says that it is ready. Its row goes on saying so for seconds after the node agent, or what it is
    /// linked to, has gone.
    async fn node_is_ready(&mut self) -> Result<()> {
        let sql = "select coalesce(ready and lease_until > now(), false), stream_epoch from nodes";
        let (ready, epoch): (bool, i64) = sqlx::query_as(sql).fetch_one(&mut self.sql().await?).await?;
        ensure!(!self.unlinked || epoch > self.epoch, "it has not linked anew");
        ensure!(ready, "it is not ready");
        (self.epoch, self.unlinked) = (epoch, false);
        Ok(())
    }

    /// Runs the program with this platform's settings; its standard output.
    ///
    /// # Errors
    /// When it fails.
    pub fn clawhq(&self, arguments: &[&str]) -> Result<String> {
        let binary = program()?;
        let command: Vec<&str> =
            std::iter::once(binary.to_str().context("path")?).chain(arguments.iter().copied()).collect();
        run(&command, &self.env)
    }

    /// A new person with an org on a tier.
    ///
    /// # Errors
    /// When the API refuses.
    pub async fn tenant(&self, name: &str, tier: &str) -> Result<Api> {
        let api = Api::sign_up(self.api, self.edge, name).await?;
        if tier != "free" {
            self.clawhq(&["admin", "set-tier", &api.org, tier])?;
        }
        Ok(api)
    }

    /// Waits until the pool of a template and tier has so many slots ready.
    pub async fn pool(&self, template: &str, tier: &str, ready: i64, within: Duration) {
        let sql = format!(
            "select count(*) from slots where template = '{template}' and tier = '{tier}' and org_id is null \
             and desired = 'present' and observed in ('waiting', 'frozen') and removed_at is null"
        );
        eventually(&format!("{ready} slots of {template} on {tier}"), within, async || match self.number(&sql).await {
            Ok(have) if have >= ready => Ok(()),
            other => Err(format!("{other:?}")),
        })
        .await;
    }

    fn log(&self, name: &str) -> PathBuf {
        self.root.join(format!("log/{name}.log"))
    }

    /// The last lines of a part's log.
    pub fn log_tail(&self, name: &str, lines: usize) -> String {
        tail(&self.log(name), lines)
    }

    /// Where the logs of all parts are.
    pub fn logs(&self) -> PathBuf {
        self.root.join("log")
    }

    /// What the names of its network interfaces begin with.
    pub fn interface_prefix(&self) -> String {
        format!("cq{}", self.key)
    }

    // ------------------------------------------------------------------------------------------------ Docker

    pub fn docker_host(&self) -> String {
        format!("unix://{}/docker/docker.sock", self.root.display())
    }

    /// Runs the Docker client against its daemon; its standard output.
    ///
    /// # Errors
    /// When it fails.
    pub fn docker(&self, arguments: &[&str]) -> Result<String> {
        docker(&self.root, arguments)
    }

    /// Starts the daemon, and waits until it answers.
    ///
    /// # Errors
    /// When it does not within a minute.
    pub async fn start_docker(&mut self) -> Result<()> {
        let mut process = start_dockerd(&self.root)?;
        let end = Instant::now() + Duration::from_secs(60);
        while self.docker(&["version"]).is_err() {
            if process.ended().is_some() || Instant::now() > end {
                bail!("dockerd does not run:\n{}", self.log_tail("dockerd", 12));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        self.docker = Some(process);
        Ok(())
    }

    /// `kill -9` of the daemon; its containers go on.
    pub fn kill_docker(&mut self) {
        self.docker = None;
    }

    fn images(&self, further: &[String]) -> Result<()> {
        let source = std::env::var("CLAWHQ_TEST_DOCKER_HOST").or_else(|_| std::env::var("DOCKER_HOST"));
        let source = source.ok().filter(|host| !host.is_empty());
        let copy = |image: &str| -> bool {
            let Some(source) = &source else { return false };
            let has = ["docker", "-H", source, "image", "inspect", image];
            let script = format!("docker -H '{source}' save '{image}' | docker -H '{}' load", self.docker_host());
            run(&has, &[]).is_ok() && run(&["bash", "-o", "pipefail", "-c", &script], &[]).is_ok()
        };
        if !copy("clawhq/hello:dev") {
            let build = concat!(env!("CARGO_MANIFEST_DIR"), "/../images/build");
            let target = program()?.ancestors().nth(2).context("target directory")?.display().to_string();
            let env = [("DOCKER_HOST".to_owned(), self.docker_host()), ("CARGO_TARGET_DIR".to_owned(), target)];
            run(&[build, "hello"], &env)?;
        }
        for image in further {
            copy(image);
        }
        Ok(())
    }

    /// Whether the daemon has an image.
    pub fn has_image(&self, image: &str) -> bool {
        self.docker(&["image", "inspect", image]).is_ok()
    }

    /// Makes an image of this machine's shell, what it links with, and `/hello`.
    ///
    /// # Errors
    /// When the shell cannot be copied.
    pub fn shell_image(&self, name: &str, changes: &[&str]) -> Result<()> {
        let dir = self.root.join("shell");
        let shell = fs::canonicalize("/bin/sh")?;
        let libraries = run(&["ldd", shell.to_str().context("path")?], &[])?;
        let libraries = libraries.split_whitespace().filter(|word| word.starts_with('/'));
        for file in libraries.chain([shell.to_str().context("path")?]) {
            let to = dir.join(file.trim_start_matches('/'));
            fs::create_dir_all(to.parent().context("parent")?)?;
            fs::copy(file, to)?;
        }
        fs::create_dir_all(dir.join("bin"))?;
        fs::copy(&shell, dir.join("bin/sh"))?;
        // Its commands that misbehave in known ways are of use in any image.
        let container = self.docker(&["create", "clawhq/hello:dev"])?;
        self.docker(&["cp", &format!("{}:/hello", container.trim()), &format!("{}/hello", dir.display())])?;
        self.docker(&["rm", container.trim()])?;
        let changes: Vec<String> = changes.iter().map(|change| format!("-c '{change}'")).collect();
        let script = format!(
            "tar -C '{}' -c . | docker -H '{}' import {} - '{name}'",
            dir.display(),
            self.docker_host(),
            changes.join(" ")
        );
        run(&["bash", "-o", "pipefail", "-c", &script], &[])?;
        Ok(())
    }

    /// Makes an image of `/hello` alone.
    ///
    /// # Errors
    /// When it cannot be copied.
    pub fn bare_image(&self, name: &str) -> Result<()> {
        let container = self.docker(&["create", "clawhq/hello:dev"])?;
        let script = format!(
            "docker -H '{0}' cp '{1}:/hello' - | docker -H '{0}' import - '{name}'",
            self.docker_host(),
            container.trim()
        );
        run(&["bash", "-o", "pipefail", "-c", &script], &[])?;
        self.docker(&["rm", container.trim()])?;
        Ok(())
    }

    // ------------------------------------------------------------------------------------------------ PostgreSQL

    /// Its address for a role of the server; `postgres` is the superuser, who sees every org's rows.
    pub fn url(&self, role: &str) -> String {
        let sockets = self.root.join("pg/sock").display().to_string().replace('/', "%2F");
        format!("postgres://{role}@localhost/clawhq?host={sockets}")
    }

    /// A connection of the superuser.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn sql(&self) -> Result<PgConnection> {
        Ok(PgConnection::connect(&self.url("postgres")).await?)
    }

    /// Runs statements as the superuser.
    ///
    /// # Errors
    /// When one fails.
    pub async fn execute(&self, sql: &str) -> Result<()> {
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut self.sql().await?).await.with_context(|| sql.to_owned())?;
        Ok(())
    }

    /// One number.
    ///
    /// # Errors
    /// When the statement fails or answers nothing.
    pub async fn number(&self, sql: &str) -> Result<i64> {
        let mut connection = self.sql().await?;
        sqlx::query_scalar(AssertSqlSafe(sql)).fetch_one(&mut connection).await.with_context(|| sql.to_owned())
    }

    /// The first column of every row, as text.
    ///
    /// # Errors
    /// When the statement fails.
    pub async fn column(&self, sql: &str) -> Result<Vec<String>> {
        let mut connection = self.sql().await?;
        sqlx::query_scalar(AssertSqlSafe(sql)).fetch_all(&mut connection).await.with_context(|| sql.to_owned())
    }

    /// The whole database as text.
    ///
    /// # Errors
    /// When pg_dump fails.
    pub fn dump(&self) -> Result<String> {
        let (bin, url) = (postgres_bin()?.join("pg_dump"), self.url("postgres"));
        run(&[bin.to_str().context("path")?, &url], &[])
    }

    /// Starts the server and waits until it answers.
    ///
    /// # Errors
    /// When it does not within a minute.
    pub async fn start_postgres(&mut self) -> Result<()> {
        let (bin, data) = (postgres_bin()?.join("postgres"), self.root.join("pg/data"));
        let command = [bin.to_str().context("path")?, "-D", data.to_str().context("path")?];
        let user = ["--reuid", "postgres", "--regid", "postgres", "--clear-groups"];
        let end = Instant::now() + Duration::from_secs(60);
        let admin = self.url("postgres").replace("/clawhq?", "/postgres?");
        let mut process = Process::start("postgres", &user, &command, &[], &self.log("postgres"))?;
        let mut connection = loop {
            match PgConnection::connect(&admin).await {
                Ok(connection) => break connection,
                Err(error) if process.ended().is_some() || Instant::now() > end => {
                    bail!("PostgreSQL does not run: {error}:\n{}", self.log_tail("postgres", 8))
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        };
        self.postgres = Some(process);
        let made: bool = sqlx::query_scalar("select exists (select 1 from pg_database where datname = 'clawhq')")
            .fetch_one(&mut connection)
            .await?;
        if !made {
            // As `clawhq up` makes them: neither superuser nor exempt from row-level security.
            for sql in ["create role clawhq login createdb createrole", "create database clawhq owner clawhq"] {
                sqlx::raw_sql(sql).execute(&mut connection).await?;
            }
        }
        Ok(())
    }

    /// Ends the server as a crash does: no checkpoint, every connection cut.
    pub fn crash_postgres(&mut self) {
        if let Some(mut process) = self.postgres.take() {
            let _ = process.stop(Signal::SIGQUIT, Duration::from_secs(20));
        }
    }

    fn initdb(&self) -> Result<()> {
        let user =
            nix::unistd::User::from_name("postgres")?.context("there is no user postgres: install PostgreSQL")?;
        let (home, sockets) = (self.root.join("pg"), self.root.join("pg/sock"));
        for dir in [&home, &sockets] {
            fs::create_dir(dir)?;
            chown(dir, Some(user.uid.as_raw()), Some(user.gid.as_raw()))?;
        }
        let data = home.join("data");
        let initdb = postgres_bin()?.join("initdb");
        let command = [
            &["setpriv", "--reuid", "postgres", "--regid", "postgres", "--clear-groups"],
            [initdb.to_str().context("path")?, "-D", data.to_str().context("path")?].as_slice(),
            &["-U", "postgres", "--auth-local=peer", "--auth-host=reject", "--encoding=UTF8", "--locale=C.UTF-8"],
            &["--data-checksums"],
        ]
        .concat();
        run(&command, &[])?;
        // As `clawhq up` sets it, so that what is measured is what runs.
        let conf = format!(
            "\nlisten_addresses = ''\nunix_socket_directories = '{}'\nfsync = on\nfull_page_writes = on\n\
             synchronous_commit = on\nmax_connections = 120\nshared_buffers = '128MB'\nmax_wal_size = '1GB'\n\
             checkpoint_timeout = '15min'\njit = off\ntimezone = 'UTC'\nlog_min_duration_statement = '500ms'\n",
            sockets.display()
        );
        let path = data.join("postgresql.conf");
        fs::write(&path, fs::read_to_string(&path)? + &conf)?;
        fs::write(data.join("pg_hba.conf"), "local all all peer map=m\n")?;
        fs::write(data.join("pg_ident.conf"), "m root clawhq\nm root postgres\nm postgres postgres\n")?;
        Ok(())
    }

    // ------------------------------------------------------------------------------------------------ the end

    /// Stops every role by signal, and fails if one did not end well.
    ///
    /// # Errors
    /// When a role had to be killed or ended with an error.
    pub fn stop(mut self) -> Result<()> {
        self.stopping = true;
        let roles: Vec<Role> = self.roles.keys().copied().collect();
        roles.into_iter().try_for_each(|role| self.stop_role(role))
    }
}

impl Drop for Platform {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for name in self.layout.roles().iter().map(|role| role.command()).chain(["dockerd", "postgres"]) {
                eprintln!("--- the end of {name}'s log\n{}", self.log_tail(name, 25));
            }
        }
        self.roles.clear();
        clear(&self.root, &self.key, self.docker.take());
        if let Some(mut postgres) = self.postgres.take() {
            let _ = postgres.stop(Signal::SIGQUIT, Duration::from_secs(10));
        }
        remove(&self.root);
    }
}

/// The program under test: `CLAWHQ_BIN`, else the one built beside this test.
fn program() -> Result<PathBuf> {
    let path = match std::env::var_os("CLAWHQ_BIN") {
        Some(path) => PathBuf::from(path),
        None => {
            let own = std::env::current_exe()?;
            let found = own.ancestors().skip(1).take(2).map(|dir| dir.join("clawhq")).find(|path| path.is_file());
            found.context("the program clawhq is not built: cargo build -p clawhq")?
        }
    };
    Ok(path)
}

fn postgres_bin() -> Result<PathBuf> {
    let mut found: Vec<(u32, PathBuf)> = fs::read_dir("/usr/lib/postgresql")
        .context("PostgreSQL is not installed")?
        .flatten()
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path().join("bin"))))
        .collect();
    found.sort();
    found.pop().map(|(_, bin)| bin).context("PostgreSQL is not installed")
}

fn docker(root: &Path, arguments: &[&str]) -> Result<String> {
    let host = format!("unix://{}/docker/docker.sock", root.display());
    run(&[&["docker", "-H", &host], arguments].concat(), &[])
}

fn start_dockerd(root: &Path) -> Result<Process> {
    let home = root.join("docker");
    fs::create_dir_all(&home)?;
    let config = home.join("daemon.json");
    let at = home.display();
    let text = format!(
        r#"{{"data-root": "{at}/root", "exec-root": "{at}/exec", "pidfile": "{at}/dockerd.pid", "hosts": ["unix://{at}/docker.sock"],
"bridge": "none", "iptables": false, "ip6tables": false, "ip-masq": false, "userland-proxy": false, "live-restore": true}}"#
    );
    fs::write(&config, text)?;
    // A killed daemon leaves its pidfile, and refuses to start when that pid is somebody's by now. The containerd that dies with
    // it leaves one too, and is waited for in vain when it is dying still or its pid is somebody's.
    let _ = fs::remove_file(home.join("dockerd.pid"));
    let containerd = home.join("exec/containerd/containerd.pid");
    if let Some(pid) = fs::read_to_string(&containerd).ok().and_then(|pid| pid.trim().parse::<u32>().ok()) {
        let end = Instant::now() + Duration::from_secs(10);
        while pids_mentioning(&format!("{at}/exec/containerd/containerd.toml")).contains(&pid) && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = fs::remove_file(&containerd);
    }
    // As `./dev up` starts it: what it does gives way to claims.
    let start = "echo 10 2>/dev/null >/proc/self/autogroup; exec nice -n 10 dockerd --config-file \"$0\"";
    let command = ["setsid", "sh", "-c", start, config.to_str().context("path")?];
    Process::start("dockerd", &[], &command, &[], &root.join("log/dockerd.log"))
}

/// Removes containers, processes, interfaces, rules and mounts of a platform whose roles are dead.
fn clear(root: &Path, key: &str, daemon: Option<Process>) {
    let mut daemon = daemon.or_else(|| start_dockerd(root).ok());
    let end = Instant::now() + Duration::from_secs(20);
    while docker(root, &["version"]).is_err() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(50));
    }
    let containers = docker(root, &["ps", "-aq", "--no-trunc"]).unwrap_or_default();
    let containers: Vec<&str> = containers.split_whitespace().collect();
    for some in containers.chunks(40) {
        if let Err(error) = docker(root, &[&["rm", "--force", "--volumes"], some].concat()) {
            eprintln!("clearing {}: {error:#}", root.display());
        }
    }
    if let Some(daemon) = &mut daemon {
        let _ = daemon.stop(Signal::SIGTERM, Duration::from_secs(20));
    }
    // Shims and a containerd whose daemon was killed: this directory's name is on no other command line.
    for pid in pids_mentioning(&format!("{}/docker", root.display())) {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid.cast_signed()), Signal::SIGKILL);
    }
    let quiet = |command: &[&str]| {
        let _ = Command::new(command[0]).args(&command[1..]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    };
    quiet(&["nft", "delete", "table", "inet", &format!("clawhq_{key}")]);
    for link in fs::read_dir("/sys/class/net").into_iter().flatten().flatten() {
        let name = link.file_name();
        if let Some(name) = name.to_str().filter(|name| name.starts_with(&format!("cq{key}"))) {
            quiet(&["ip", "link", "delete", name]);
        }
    }
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    let below = format!("{}/", root.display());
    for mount in mounts.lines().rev().filter_map(|line| line.split(' ').nth(1)).filter(|path| path.starts_with(&below))
    {
        quiet(&["umount", "--lazy", mount]);
    }
}

fn remove(root: &Path) {
    if std::env::var_os("CLAWHQ_TEST_KEEP").is_some() {
        let kept = root.with_file_name("cq-kept-logs");
        let _ = fs::remove_dir_all(&kept);
        let _ = fs::rename(root.join("log"), &kept);
        eprintln!("logs kept in {}", kept.display());
    }
    if let Err(error) = fs::remove_dir_all(root) {
        eprintln!("removing {}: {error}", root.display());
    }
}

/// What tests that were killed left behind.
fn sweep_the_dead() {
    for entry in fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten() {
        let root = entry.path();
        if !entry.file_name().to_string_lossy().starts_with("cq-") {
            continue;
        }
        let owner = fs::read_to_string(root.join("owner")).unwrap_or_default();
        let mut fields = owner.split(' ');
        let (Some(pid), Some(start), Some(key)) = (fields.next(), fields.next(), fields.next()) else { continue };
        if pid.parse().is_ok_and(|pid| started_at(pid) == start) {
            continue;
        }
        clear(&root, key, None);
        remove(&root);
    }
}

/// When a process began, in ticks since the machine's start; empty when it is dead.
fn started_at(pid: u32) -> String {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let after_name = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
    after_name.split(' ').nth(19).unwrap_or_default().to_owned()
}

fn tail(path: &Path, lines: usize) -> String {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text[text.len().saturating_sub(256 << 10)..]).into_owned();
    let last: Vec<&str> = text.lines().rev().take(lines).collect();
    last.into_iter().rev().map(|line| line.chars().take(600).collect::<String>()).collect::<Vec<_>>().join("\n")
}
