//! The private PostgreSQL: in the data directory, on a Unix socket only, fsync on, as an unprivileged user.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use super::process::Record;

/// Where the server lives and who runs it.
pub struct Postgres {
    bin: PathBuf,
    home: PathBuf,
    user: nix::unistd::User,
    record: Record,
}

impl Postgres {
    /// Finds the programs and the place for `data`. Nothing is started.
    ///
    /// # Errors
    /// When no PostgreSQL is installed, or the data was made by a version that is gone.
    pub fn locate(data: &Path) -> Result<Self> {
        let user = unprivileged_user()?;
        let home = home(data, &user)?;
        let made_by = fs::read_to_string(home.join("data/PG_VERSION")).ok().map(|version| version.trim().to_owned());
        let bin = programs(made_by.as_deref())?;
        Ok(Postgres { bin, home, user, record: Record::new(data, "postgres") })
    }

    /// The address for the program's own role, which is neither superuser nor exempt from row-level security.
    pub fn url(&self) -> String {
        let path = self.sockets().display().to_string();
        let encoded: String = path
            .bytes()
            .map(|b| if b.is_ascii_alphanumeric() { (b as char).to_string() } else { format!("%{b:02X}") })
            .collect();
        format!("postgres://clawhq@localhost/clawhq?host={encoded}")
    }

    /// Creates what is missing and starts the server. Says whether it was this call that started it.
    ///
    /// # Errors
    /// When a program of PostgreSQL fails; the text holds the end of its output.
    pub fn start(&self) -> Result<bool> {
        if self.record.alive().is_some() {
            return Ok(false);
        }
        self.create()?;
        self.configure()?;
        let log = self.home.join("server.log");
        if fs::metadata(&log).is_ok_and(|log| log.len() > 20 << 20) {
            let _ = fs::remove_file(&log);
        }
        let (data, log) = (self.data(), log);
        let started = self.run("pg_ctl", &["-D", path(&data)?, "-l", path(&log)?, "-w", "-t", "120", "start"]);
        if let Err(error) = started {
            let tail = fs::read_to_string(&log).unwrap_or_default();
            let tail: Vec<&str> = tail.lines().rev().take(5).collect();
            bail!("{error:#}\n{}", tail.into_iter().rev().collect::<Vec<_>>().join("\n"));
        }
        let pid = fs::read_to_string(data.join("postmaster.pid")).context("PostgreSQL left no pid file")?;
        let pid =
            pid.lines().next().unwrap_or_default().trim().parse().context("PostgreSQL's pid file is unreadable")?;
        self.record.write(pid)?;
        self.bootstrap()?;
        Ok(true)
    }

    /// Stops the server that [`Postgres::start`] started: clients are disconnected, everything committed is safe.
    pub fn stop(&self) -> Result<()> {
        if self.record.alive().is_some() {
            self.run("pg_ctl", &["-D", path(&self.data())?, "-m", "fast", "-w", "-t", "60", "stop"])?;
        }
        self.record.clear();
        Ok(())
    }

    fn data(&self) -> PathBuf {
        self.home.join("data")
    }

    fn sockets(&self) -> PathBuf {
        self.home.join("sock")
    }

    fn create(&self) -> Result<()> {
        for dir in [self.home.clone(), self.sockets()] {
            fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
            fs::set_permissions(&dir, fs::Permissions::from_mode(0o700))?;
            chown(&dir, Some(self.user.uid.as_raw()), Some(self.user.gid.as_raw()))?;
        }
        if self.data().join("PG_VERSION").exists() {
            return Ok(());
        }
        // Made aside and renamed, so that an interrupted initdb is never taken for a database.
        let partial = self.home.join("data.partial");
        if partial.exists() {
            fs::remove_dir_all(&partial)?;
        }
        self.run(
            "initdb",
            &[
                "-D",
                path(&partial)?,
                "-U",
                "postgres",
                "--auth-local=peer",
                "--auth-host=reject",
                "--encoding=UTF8",
                "--locale=C.UTF-8",
                "--data-checksums",
            ],
        )?;
        let mut conf = fs::read_to_string(partial.join("postgresql.conf"))?;
        conf.push_str("\ninclude = 'clawhq.conf'\n");
        fs::write(partial.join("postgresql.conf"), conf)?;
        fs::rename(&partial, self.data())?;
        Ok(())
    }

    /// Written at every start, so that a newer build's settings reach an older database.
    fn configure(&self) -> Result<()> {
        let sockets = self.sockets().display().to_string().replace('\'', "''");
        let conf = format!(
            "# Written by clawhq at every start.\n\
             listen_addresses = ''\n\
             unix_socket_directories = '{sockets}'\n\
             unix_socket_permissions = 0700\n\
             fsync = on\n\
             full_page_writes = on\n\
             synchronous_commit = on\n\
             max_connections = 120\n\
             shared_buffers = '128MB'\n\
             max_wal_size = '1GB'\n\
             checkpoint_timeout = '15min'\n\
             jit = off\n\
             timezone = 'UTC'\n\
             log_timezone = 'UTC'\n\
             log_min_duration_statement = '500ms'\n"
        );
        let owned = |name: &str, text: &str| -> Result<()> {
            let file = self.data().join(name);
            fs::write(&file, text)?;
            fs::set_permissions(&file, fs::Permissions::from_mode(0o600))?;
            Ok(chown(&file, Some(self.user.uid.as_raw()), Some(self.user.gid.as_raw()))?)
        };
        owned("clawhq.conf", &conf)?;
        owned("pg_hba.conf", "# Written by clawhq.\nlocal all all peer map=clawhq\n")?;
        let name = &self.user.name;
        owned(
            "pg_ident.conf",
            &format!("# Written by clawhq.\nclawhq root clawhq\nclawhq {name} clawhq\nclawhq {name} postgres\n"),
        )
    }

    fn bootstrap(&self) -> Result<()> {
        // CREATEROLE and CREATEDB, for the tenants' role of the migrations and for tests; not SUPERUSER, not BYPASSRLS.
        let sql = "SELECT 'CREATE ROLE clawhq LOGIN CREATEDB CREATEROLE' \
                   WHERE NOT EXISTS (SELECT 1 FROM pg_roles WHERE rolname = 'clawhq') \\gexec\n\
                   SELECT 'CREATE DATABASE clawhq OWNER clawhq' \
                   WHERE NOT EXISTS (SELECT 1 FROM pg_database WHERE datname = 'clawhq') \\gexec\n";
        let file = self.home.join("bootstrap.sql");
        fs::write(&file, sql)?;
        chown(&file, Some(self.user.uid.as_raw()), Some(self.user.gid.as_raw()))?;
        let sockets = self.sockets();
        self.run(
            "psql",
            &[
                "-X",
                "-q",
                "-v",
                "ON_ERROR_STOP=1",
                "-h",
                path(&sockets)?,
                "-U",
                "postgres",
                "-d",
                "postgres",
                "-f",
                path(&file)?,
            ],
        )
    }

    /// Runs one of PostgreSQL's programs as its user.
    fn run(&self, program: &str, args: &[&str]) -> Result<()> {
        // Through a file and not a pipe: the server that pg_ctl leaves behind would keep a pipe open for ever.
        let output = self.home.join(format!("{program}.out"));
        let file = fs::File::create(&output)?;
        let mut command = Command::new(self.bin.join(program));
        command
            .args(args)
            .current_dir("/")
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("LC_ALL", "C.UTF-8")
            .stdin(std::process::Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file);
        if nix::unistd::geteuid().is_root() {
            command.uid(self.user.uid.as_raw()).gid(self.user.gid.as_raw());
        }
        let status = command.status().with_context(|| format!("running {}", self.bin.join(program).display()))?;
        if !status.success() {
            let text = fs::read_to_string(&output).unwrap_or_default();
            let tail: Vec<&str> = text.lines().rev().take(6).collect();
            bail!("{program} failed ({status}):\n{}", tail.into_iter().rev().collect::<Vec<_>>().join("\n"));
        }
        Ok(())
    }
}

fn path(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8: choose another data directory", path.display()))
}

/// PostgreSQL refuses to run as root: its own user when the package made one, else nobody.
fn unprivileged_user() -> Result<nix::unistd::User> {
    use nix::unistd::{User, geteuid};
    if !geteuid().is_root() {
        return User::from_uid(geteuid())?.context("this user has no entry in /etc/passwd");
    }
    for name in ["postgres", "nobody"] {
        if let Some(user) = User::from_name(name)? {
            return Ok(user);
        }
    }
    bail!("neither the user postgres nor nobody exists: create one, so that PostgreSQL need not run as root")
}

/// `<data>/postgres`, or a place under /var/lib that it points to when the user may not enter the data directory (a checkout
/// under /root, say).
fn home(data: &Path, user: &nix::unistd::User) -> Result<PathBuf> {
    let home = data.join("postgres");
    if let Ok(target) = fs::read_link(&home) {
        fs::create_dir_all(&target)?;
        return Ok(target);
    }
    if home.exists() || data.ancestors().all(|dir| may_enter(dir, user)) {
        return Ok(home);
    }
    let digest: String =
        Sha256::digest(path(data)?.as_bytes()).iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    let elsewhere = PathBuf::from("/var/lib/clawhq").join(digest);
    fs::create_dir_all(&elsewhere)?;
    std::os::unix::fs::symlink(&elsewhere, &home).with_context(|| format!("creating {}", home.display()))?;
    Ok(elsewhere)
}

fn may_enter(dir: &Path, user: &nix::unistd::User) -> bool {
    use std::os::unix::fs::MetadataExt;
    let Ok(meta) = fs::metadata(dir) else { return false };
    let bit = if meta.uid() == user.uid.as_raw() {
        0o100
    } else if meta.gid() == user.gid.as_raw() {
        0o010
    } else {
        0o001
    };
    meta.mode() & bit != 0
}

/// The newest installed programs, or those of the version the data was made by.
fn programs(made_by: Option<&str>) -> Result<PathBuf> {
    let mut found: Vec<(u32, PathBuf)> = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path().join("bin"))))
        .filter(|(_, bin)| bin.join("postgres").is_file())
        .collect();
    found.sort();
    match made_by {
        Some(version) => {
            let major: u32 = version.split('.').next().unwrap_or_default().parse().unwrap_or_default();
            found.into_iter().find(|(have, _)| *have == major).map(|(_, bin)| bin).with_context(|| {
                format!("the data was made by PostgreSQL {version}, whose programs are gone: install postgresql-{major}")
            })
        }
        None => found.pop().map(|(_, bin)| bin).context(
            "no PostgreSQL under /usr/lib/postgresql: install the package postgresql, or set DATABASE_URL to a server of yours",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_survives_odd_paths() {
        let user = unprivileged_user().unwrap();
        let server = Postgres {
            bin: "/usr".into(),
            home: "/tmp/a b&c".into(),
            user,
            record: Record::new(Path::new("/nowhere"), "postgres"),
        };
        assert_eq!(server.url(), "postgres://clawhq@localhost/clawhq?host=%2Ftmp%2Fa%20b%26c%2Fsock");
    }

    #[test]
    fn a_server_is_created_started_kept_and_stopped() {
        let dir = tempfile::Builder::new().prefix("chq").tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let server = Postgres::locate(dir.path()).unwrap();
        assert!(server.start().unwrap(), "the first start starts it");
        assert!(!server.start().unwrap(), "the second finds it running");
        let sockets = server.sockets();
        let settings = server.home.join("settings");
        server
            .run(
                "psql",
                &[
                    "-XAt",
                    "-h",
                    path(&sockets).unwrap(),
                    "-U",
                    "clawhq",
                    "-d",
                    "clawhq",
                    "-o",
                    path(&settings).unwrap(),
                    "-c",
                    "SELECT current_setting('fsync'), current_setting('listen_addresses'), rolsuper, rolbypassrls \
                     FROM pg_roles WHERE rolname = current_user",
                ],
            )
            .unwrap();
        assert_eq!(fs::read_to_string(settings).unwrap().trim(), "on||f|f");
        server.stop().unwrap();
        assert_eq!(server.record.alive(), None);
        assert!(server.start().unwrap(), "and it starts again from what it kept");
        server.stop().unwrap();
    }
}
