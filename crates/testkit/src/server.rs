//! The PostgreSQL server that tests share.
//!
//! `CLAWHQ_TEST_PG` names one (a superuser's URL); without it a private cluster is started in the temporary directory, on
//! a unix socket, without fsync, and stops by itself when no test has asked for it for ten minutes.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result, bail, ensure};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use tokio::sync::OnceCell;

const ADMIN: &str = "clawhq_admin";
/// Owns the test databases: no superuser, so that what holds for it holds in production.
const OWNER: &str = "clawhq_test";
const OWNER_PASSWORD: &str = "clawhq_test";
/// Serialises the making of roles and templates among the processes of a test run.
const LOCK: i64 = 0x636c_6177_7465;

pub(crate) struct Server {
    /// A superuser's URL, with `{}` where the database goes.
    admin: String,
    /// The owner's.
    owner: String,
    template: String,
}

static SERVER: OnceCell<Server> = OnceCell::const_new();
static NEXT: AtomicU32 = AtomicU32::new(0);

pub(crate) async fn server() -> Result<&'static Server> {
    SERVER.get_or_try_init(Server::start).await
}

impl Server {
    async fn start() -> Result<Self> {
        let (admin, owner) = match std::env::var("CLAWHQ_TEST_PG") {
            Ok(url) => from_url(&url)?,
            Err(_) => {
                let socket = tokio::task::spawn_blocking(private_cluster).await??;
                let host = socket.display().to_string().replace('/', "%2F");
                let url = |role: &str| format!("postgres://{role}@localhost/{{}}?host={host}");
                (url(ADMIN), url(OWNER))
            }
        };
        let template = format!("clawhq_template_{:016x}", clawhq_migrations::fingerprint());
        let server = Self { admin, owner, template };
        server.prepare().await?;
        Ok(server)
    }

    pub(crate) fn url(&self, database: &str) -> String {
        self.owner.replace("{}", database)
    }

    async fn admin(&self) -> Result<PgConnection> {
        let url = self.admin.replace("{}", "postgres");
        PgConnection::connect(&url).await.with_context(|| format!("connect to the test server at {url}"))
    }

    /// Makes role and template unless they are there, and drops what dead test processes left.
    async fn prepare(&self) -> Result<()> {
        let mut admin = self.admin().await?;
        run(&mut admin, &format!("select pg_advisory_lock({LOCK})")).await?;
        let known: bool = sqlx::query_scalar("select exists (select 1 from pg_roles where rolname = $1)")
            .bind(OWNER)
            .fetch_one(&mut admin)
            .await?;
        if !known {
            run(&mut admin, &format!("create role {OWNER} login createrole createdb password '{OWNER_PASSWORD}'"))
                .await?;
        }
        let databases: Vec<String> =
            sqlx::query_scalar("select datname from pg_database where datname like 'clawhq_t%'")
                .fetch_all(&mut admin)
                .await?;
        for database in &databases {
            let dead = database
                .strip_prefix("clawhq_test_")
                .and_then(|rest| rest.split('_').next())
                .is_some_and(|pid| !Path::new("/proc").join(pid).exists());
            let outdated = database.starts_with("clawhq_template_") && *database != self.template;
            if dead || outdated {
                // Somebody of another checkout may be cloning it just now; then it stays.
                let _ = run(&mut admin, &format!("drop database if exists {database} with (force)")).await;
            }
        }
        if !databases.contains(&self.template) {
            // Half a template must not be found by its name.
            let half = format!("{}_half", self.template);
            run(&mut admin, &format!("drop database if exists {half} with (force)")).await?;
            run(&mut admin, &format!("create database {half} owner {OWNER}")).await?;
            let mut options = clawhq_store::StoreOptions::new(self.url(&half));
            options.max_connections = 1;
            let store = clawhq_store::Store::connect(&options).await?;
            store.migrate().await.context("migrate the template")?;
            store.close().await;
            run(&mut admin, &format!("alter database {half} rename to {}", self.template)).await?;
        }
        run(&mut admin, &format!("select pg_advisory_unlock({LOCK})")).await?;
        admin.close().await?;
        Ok(())
    }

    pub(crate) async fn clone_template(&self) -> Result<String> {
        self.create(&format!("template {}", self.template)).await
    }

    pub(crate) async fn create_empty(&self) -> Result<String> {
        self.create("template template0").await
    }

    async fn create(&self, template: &str) -> Result<String> {
        let name = format!("clawhq_test_{}_{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let mut admin = self.admin().await?;
        // A process id that was used before may have left one of this name.
        run(&mut admin, &format!("drop database if exists {name} with (force)")).await?;
        // Copying waits for nobody but another copier of the same template, which holds it for a moment.
        let mut tries = 0;
        loop {
            match run(&mut admin, &format!("create database {name} owner {OWNER} {template}")).await {
                Ok(()) => break,
                Err(error) if tries < 100 && error.to_string().contains("being accessed by other users") => {
                    tries += 1;
                    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                }
                Err(error) => return Err(error),
            }
        }
        admin.close().await?;
        Ok(name)
    }

    pub(crate) async fn drop(&self, name: &str) -> Result<()> {
        let mut admin = self.admin().await?;
        run(&mut admin, &format!("drop database if exists {name} with (force)")).await
    }
}

async fn run(connection: &mut PgConnection, sql: &str) -> Result<()> {
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await.with_context(|| sql.to_owned())?;
    Ok(())
}

/// `scheme://user[:password]@host[:port]/database[?parameters]`, taken apart by hand: only the database changes, and for
/// the owner the name and password.
fn from_url(url: &str) -> Result<(String, String)> {
    let (scheme, rest) = url.split_once("://").context("CLAWHQ_TEST_PG is no URL")?;
    let (authority, rest) = rest.split_once('/').context("CLAWHQ_TEST_PG names no database")?;
    let (_, parameters) = rest.split_once('?').unwrap_or((rest, ""));
    let parameters = if parameters.is_empty() { String::new() } else { format!("?{parameters}") };
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    Ok((
        format!("{scheme}://{authority}/{{}}{parameters}"),
        format!("{scheme}://{OWNER}:{OWNER_PASSWORD}@{host}/{{}}{parameters}"),
    ))
}

/// The newest PostgreSQL of the machine.
fn binaries() -> Result<PathBuf> {
    let mut found: Vec<(u32, PathBuf)> = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let version = entry.file_name().to_str()?.parse().ok()?;
            let bin = entry.path().join("bin");
            bin.join("initdb").exists().then_some((version, bin))
        })
        .collect();
    found.sort();
    found.pop().map(|(_, bin)| bin).context("no PostgreSQL under /usr/lib/postgresql: install the package postgresql")
}

/// Whom PostgreSQL runs as: not root, which it refuses.
fn unprivileged() -> Result<Option<(u32, u32)>> {
    if fs::metadata("/proc/self")?.uid() != 0 {
        return Ok(None);
    }
    let users = fs::read_to_string("/etc/passwd")?;
    let user = ["postgres", "nobody"].into_iter().find_map(|name| {
        let line = users.lines().find(|line| line.split(':').next() == Some(name))?;
        let mut fields = line.split(':').skip(2);
        Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
    });
    user.map(Some).context("neither a user postgres nor nobody to run PostgreSQL as")
}

/// Starts the shared private cluster unless it runs; returns the directory of its socket.
fn private_cluster() -> Result<PathBuf> {
    let bin = binaries()?;
    let me = fs::metadata("/proc/self")?.uid();
    let home = std::env::temp_dir().join(format!("clawhq-testpg-{me}"));
    match fs::create_dir(&home) {
        Ok(()) => fs::set_permissions(&home, fs::Permissions::from_mode(0o711))?,
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error.into()),
    }
    // In a directory for all, the name may have been taken by another.
    ensure!(fs::symlink_metadata(&home)?.uid() == me, "{} belongs to somebody else", home.display());

    let lock = File::create(home.join("lock"))?;
    lock.lock()?;
    let data = home.join("data");
    let socket = home.join("socket");
    File::create(home.join("used"))?;
    let user = unprivileged()?;
    let command = |program: &str| {
        let mut command = Command::new(bin.join(program));
        command.current_dir("/").stdin(Stdio::null());
        if let Some((uid, gid)) = user {
            command.uid(uid).gid(gid);
        }
        command
    };
    let running = command("pg_ctl").args(["status", "-D"]).arg(&data).output()?.status.success();
    if running {
        return Ok(socket);
    }
    if !data.join("clawhq_ready").exists() {
        let _ = fs::remove_dir_all(&data);
        for dir in [&data, &socket] {
            fs::create_dir_all(dir)?;
            fs::set_permissions(dir, fs::Permissions::from_mode(0o700))?;
            if let Some((uid, gid)) = user {
                std::os::unix::fs::chown(dir, Some(uid), Some(gid))?;
            }
        }
        let mut initdb = command("initdb");
        initdb.args(["--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync", "--username", ADMIN, "-D"]);
        checked(initdb.arg(&data))?;
        // Tests connect from other users too (root, when the server runs as postgres).
        fs::set_permissions(&socket, fs::Permissions::from_mode(0o711))?;
        fs::write(data.join("clawhq_ready"), "")?;
    }
    let settings = [
        "listen_addresses=",
        "max_connections=500",
        "fsync=off",
        "full_page_writes=off",
        "synchronous_commit=on",
        "shared_buffers=128MB",
        "autovacuum_naptime=10min",
        "max_wal_size=4GB",
        "checkpoint_timeout=30min",
        "wal_level=minimal",
        "max_wal_senders=0",
    ];
    let mut options = settings.map(|setting| format!("-c {setting}")).join(" ");
    options.push_str(&format!(" -c unix_socket_directories={}", socket.display()));
    let mut start = command("pg_ctl");
    start.args(["start", "-w", "-t", "60", "-o", &options, "-D"]).arg(&data).arg("-l").arg(data.join("log"));
    start.stdout(Stdio::null()).stderr(Stdio::null());
    if !start.status()?.success() {
        let log = fs::read_to_string(data.join("log")).unwrap_or_default();
        let tail: Vec<&str> = log.lines().rev().take(10).collect();
        bail!("PostgreSQL for tests did not start: {}", tail.join(" | "));
    }
    // Stops the server when nobody has touched `used` for ten minutes.
    let watch = format!(
        "while sleep 60; do [ -n \"$(find '{used}' -mmin -10 2>/dev/null)\" ] || exec '{ctl}' stop -m fast -D '{data}'; done",
        used = home.join("used").display(),
        ctl = bin.join("pg_ctl").display(),
        data = data.display(),
    );
    let mut watcher = Command::new("sh");
    watcher.args(["-c", &watch]).current_dir("/").process_group(0);
    if let Some((uid, gid)) = user {
        watcher.uid(uid).gid(gid);
    }
    watcher.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    Ok(socket)
}

fn checked(command: &mut Command) -> Result<()> {
    let output = command.output()?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
