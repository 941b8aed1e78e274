//! The real binary as an ordinary process and as PID 1 of a pid namespace, against a real unix socket.

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use clawhq_init::{
    Claim, Exec, Exit, File, Hello, MAX_TO_AGENT, MAX_TO_INIT, Started, State, Step, ToAgent, ToInit, VERSION,
    read_frame,
};

const INIT: &str = env!("CARGO_BIN_EXE_init");
const DEADLINE: Duration = Duration::from_secs(20);

/// Looks again until it holds.
fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < DEADLINE, "never came true: {what}");
        std::thread::yield_now();
    }
}

struct Bench {
    dir: tempfile::TempDir,
    listener: UnixListener,
    init: Child,
}

impl Bench {
    fn new() -> Self {
        Self::with(&[], &[])
    }

    fn with(before: &[&str], env: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("agent.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let mut words: Vec<&OsStr> = before.iter().map(OsStr::new).collect();
        words.extend([INIT.as_ref(), "--socket".as_ref(), socket.as_os_str()]);
        let init = Command::new(words[0])
            .args(&words[1..])
            .envs(env.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Bench { dir, listener, init }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn socket(&self) -> PathBuf {
        self.path("agent.sock")
    }

    /// The next connection, and the Hello it begins with.
    fn accept(&self) -> (Agent, Hello) {
        let (stream, _) = self.listener.accept().unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut agent = Agent(stream);
        match agent.read() {
            Some(ToAgent::Hello(hello)) => (agent, hello),
            other => panic!("expected a Hello, got {other:?}"),
        }
    }

    fn wait(mut self) -> (ExitStatus, String, String) {
        let status = self.init.wait().unwrap();
        let read = |from: Option<&mut dyn std::io::Read>| {
            let mut text = String::new();
            from.unwrap().read_to_string(&mut text).unwrap();
            text
        };
        let out = read(self.init.stdout.as_mut().map(|o| o as _));
        let err = read(self.init.stderr.as_mut().map(|e| e as _));
        (status, out, err)
    }

    fn signal(&self, name: &str) {
        signal(self.init.id() as i32, name);
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        // Its death takes the tenant of a pid namespace along; the others end by themselves or by the test.
        let _ = self.init.kill();
        let _ = self.init.wait();
    }
}

fn signal(pid: i32, name: &str) {
    let status = Command::new("kill").args(["-s", name, &pid.to_string()]).status();
    assert!(status.unwrap().success());
}

struct Agent(UnixStream);

impl Agent {
    fn send(&mut self, frame: &ToInit) {
        self.0.write_all(&frame.encode().unwrap()).unwrap();
    }

    fn read(&mut self) -> Option<ToAgent> {
        let frame = read_frame(&mut self.0, MAX_TO_AGENT).unwrap()?;
        Some(ToAgent::decode(&frame).unwrap())
    }

    fn ask(&mut self, frame: &ToInit) -> ToAgent {
        self.send(frame);
        self.read().expect("an answer")
    }

    fn start(&mut self, claim: Claim) -> Started {
        match self.ask(&ToInit::Claim(claim)) {
            ToAgent::Started(started) => started,
            other => panic!("expected Started, got {other:?}"),
        }
    }

    fn exit(&mut self) -> (u32, Exit) {
        match self.read() {
            Some(ToAgent::Exited { run, exit, .. }) => (run, exit),
            other => panic!("expected Exited, got {other:?}"),
        }
    }

    /// The connection ended, however.
    fn is_closed(&mut self) -> bool {
        !matches!(read_frame(&mut self.0, MAX_TO_AGENT), Ok(Some(_)))
    }
}

fn me() -> (u32, u32) {
    let own = fs::metadata("/proc/self").unwrap();
    (own.uid(), own.gid())
}

fn claim(argv: &[&str]) -> Claim {
    let (uid, gid) = me();
    Claim {
        claim_id: "wl_1".into(),
        generation: 1,
        run: 1,
        argv: argv.iter().map(|arg| (*arg).to_owned()).collect(),
        env: Vec::new(),
        inherit_env: false,
        cwd: None,
        uid,
        gid,
        files: Vec::new(),
        stop_signal: 0,
    }
}

fn shell(script: &str) -> Claim {
    claim(&["/bin/sh", "-c", script])
}

#[test]
fn a_claim_starts_the_process_with_its_arguments_environment_directory_and_files() {
    let bench = Bench::with(&[], &[("FROM_IMAGE", "kept"), ("CHANGED", "old")]);
    let (mut agent, hello) = bench.accept();
    assert_eq!((hello.version, hello.state), (VERSION, State::Waiting));

    let config = bench.path("a/b/config.json");
    let mut claim = shell(
        r#"echo "$1 $FROM_IMAGE $CHANGED $TOKEN $(pwd)"; cat "$CONFIG"; grep -c . /proc/self/fd -r 2>/dev/null; exit 7"#,
    );
    claim.argv.extend(["sh".into(), "two words".into()]);
    claim.inherit_env = true;
    claim.env = vec![
        ("CHANGED".into(), "new".into()),
        ("TOKEN".into(), "a=b".into()),
        ("CONFIG".into(), config.to_str().unwrap().into()),
    ];
    claim.cwd = Some("/usr".into());
    claim.files = vec![File {
        path: config.to_str().unwrap().into(),
        mode: 0o640,
        bytes: b"{\"ok\":true}\n".to_vec(),
        secret: false,
        only_if_absent: false,
    }];
    let started = agent.start(claim);
    assert_eq!((started.claim_id.as_str(), started.run), ("wl_1", 1));
    let timings = started.timings;
    assert!(timings.received_ns <= timings.prepared_ns);
    assert!(timings.prepared_ns < timings.started_ns);
    assert_eq!(agent.exit(), (1, Exit::Code(7)));
    assert_eq!(fs::metadata(&config).unwrap().mode() & 0o7777, 0o640);
    assert_eq!(fs::read_dir(config.parent().unwrap()).unwrap().count(), 1);

    agent.send(&ToInit::Shutdown);
    let (status, out, _) = bench.wait();
    assert_eq!(status.code(), Some(7), "ends with the tenant's code");
    assert!(out.starts_with("two words kept new a=b /usr\n{\"ok\":true}\n"), "{out}");
}

#[test]
fn without_inherit_the_environment_is_the_claims_alone() {
    let bench = Bench::with(&[], &[("FROM_IMAGE", "kept")]);
    let (mut agent, _) = bench.accept();
    let mut claim = claim(&["env"]);
    claim.env = vec![("ONLY".into(), "this".into())];
    agent.start(claim);
    assert_eq!(agent.exit(), (1, Exit::Code(0)));
    agent.send(&ToInit::Shutdown);
    assert_eq!(bench.wait().1, "ONLY=this\n");
}

#[test]
fn the_process_has_its_own_session_default_signals_and_no_descriptor_of_ours() {
    let bench = Bench::new();
    let (mut agent, _) = bench.accept();
    let started = agent.start(claim(&["/bin/sleep", "1000"]));
    let stat = fs::read_to_string(format!("/proc/{}/stat", started.pid)).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let (group, session) = (fields[2], fields[3]);
    assert_eq!(group, started.pid.to_string());
    assert_eq!(session, started.pid.to_string());
    let status = fs::read_to_string(format!("/proc/{}/status", started.pid)).unwrap();
    for mask in ["SigBlk", "SigIgn"] {
        assert!(status.contains(&format!("{mask}:\t0000000000000000")), "{mask} in {status}");
    }
    let mut open: Vec<_> = fs::read_dir(format!("/proc/{}/fd", started.pid))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    open.sort();
    assert_eq!(open, ["0", "1", "2"]);
    agent.send(&ToInit::Shutdown);
    assert_eq!(bench.wait().0.code(), Some(128 + 9));
}

#[test]
fn init_cannot_be_read_by_the_tenant() {
    let bench = Bench::new();
    let (mut agent, _) = bench.accept();
    assert_eq!(agent.ask(&ToInit::Ping), ToAgent::Pong);
    // Not dumpable: its /proc entries belong to root whoever runs it, and are closed to its own uid.
    let memory = format!("/proc/{}/environ", bench.init.id());
    if me().0 == 0 {
        let denied =
            Command::new("setpriv").args(["--reuid=65534", "--clear-groups", "cat", &memory]).output().unwrap();
        assert!(!denied.status.success());
    } else {
        assert!(fs::read(memory).is_err());
    }
}

#[test]
fn secrets_are_only_written_to_memory() {
    let bench = Bench::new();
    let (mut agent, _) = bench.accept();
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let secret = |dir: &Path| File {
        path: dir.join("secrets/key").to_str().unwrap().into(),
        mode: 0o644,
        bytes: b"s3cr3t".to_vec(),
        secret: true,
        only_if_absent: false,
    };
    let disk = tempfile::tempdir_in("/var/tmp").unwrap();
    let mut on_disk = shell("exit 0");
    on_disk.files = vec![secret(disk.path())];
    let path = on_disk.files[0].path.clone();
    assert_eq!(
        agent.ask(&ToInit::Claim(on_disk)),
        ToAgent::StartFailed {
            claim_id: "wl_1".into(),
            run: 1,
            errno: libc::EINVAL,
            step: Step::File,
            what: path.clone(),
        }
    );
    assert!(!Path::new(&path).exists());

    let mut in_memory = shell("exit 0");
    in_memory.generation = 2;
    in_memory.files = vec![secret(memory.path())];
    let path = in_memory.files[0].path.clone();
    assert!(matches!(agent.ask(&ToInit::Claim(in_memory)), ToAgent::StartFailed { run: 1, .. }));
    assert!(matches!(agent.ask(&ToInit::Run { claim_id: "wl_1".into(), run: 2 }), ToAgent::Started(_)));
    let written = fs::metadata(&path).unwrap();
    assert_eq!(written.permissions().mode() & 0o7777, 0o400);
    let dir = fs::metadata(Path::new(&path).parent().unwrap()).unwrap();
    assert_eq!(dir.permissions().mode() & 0o7777, 0o700);
    assert_eq!(fs::read(&path).unwrap(), b"s3cr3t");
}

#[test]
fn root_gives_files_and_process_to_the_tenants_uid() {
    if me().0 != 0 {
        eprintln!("not root: nothing to drop");
        return;
    }
    let bench = Bench::new();
    let (mut agent, _) = bench.accept();
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    fs::set_permissions(memory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let mut claim = shell("id -u; id -g; id -G; exec cat \"$KEY\"");
    (claim.uid, claim.gid) = (10001, 10002);
    let key = memory.path().join("s/key");
    claim.env = vec![("KEY".into(), key.to_str().unwrap().into()), ("PATH".into(), "/usr/bin:/bin".into())];
    claim.files = vec![File {
        path: key.to_str().unwrap().into(),
        mode: 0,
        bytes: b"s3cr3t".to_vec(),
        secret: true,
        only_if_absent: false,
    }];
    agent.start(claim);
    assert_eq!(agent.exit(), (1, Exit::Code(0)));
    let owner = fs::metadata(&key).unwrap();
    assert_eq!((owner.uid(), owner.gid()), (10001, 10002));
    agent.send(&ToInit::Shutdown);
    assert_eq!(bench.wait().1, "10001\n10002\n10002\ns3cr3t");
}

#[test]
fn what_cannot_start_says_why_and_may_be_tried_again() {
    for (argv, cwd, errno, step, what, code) in [
        (&["/no/such"][..], None, libc::ENOENT, Step::Exec, "/no/such", 127),
        (&["no-such-program"], None, libc::ENOENT, Step::Exec, "no-such-program", 127),
        (&["/etc/passwd"], None, libc::EACCES, Step::Exec, "/etc/passwd", 126),
        (&["/bin/true"], Some("/no/dir"), libc::ENOENT, Step::Cwd, "/no/dir", 127),
    ] {
        let bench = Bench::new();
        let (mut agent, _) = bench.accept();
        let mut bad = claim(argv);
        bad.cwd = cwd.map(str::to_owned);
        let failed = ToAgent::StartFailed { claim_id: "wl_1".into(), run: 1, errno, step, what: what.into() };
        assert_eq!(agent.ask(&ToInit::Claim(bad)), failed);
        drop(agent);
        let (mut agent, hello) = bench.accept();
        assert!(matches!(hello.state, State::Failed { run: 1, .. }), "{hello:?}");
        agent.send(&ToInit::Shutdown);
        let (status, _, err) = bench.wait();
        assert_eq!(status.code(), Some(code));
        assert!(err.contains(what), "{err}");
    }
}

#[test]
fn an_argument_longer_than_linux_takes_fails_the_start_and_nothing_else() {
    let bench = Bench::new();
    let (mut agent, _) = bench.accept();
    let long = "x".repeat(3 << 20);
    assert!(matches!(
        agent.ask(&ToInit::Claim(claim(&["/bin/true", &long]))),
        ToAgent::StartFailed { errno: libc::E2BIG, step: Step::Exec, .. }
    ));
    assert_eq!(agent.ask(&ToInit::Ping), ToAgent::Pong);
}

#[test]
fn one_slot_serves_one_tenant_once() {
    let bench = Bench::new();
    let (mut agent, _) = bench.accept();
    let first = agent.start(claim(&["/bin/sleep", "1000"]));

    let mut other = shell("exit 0");
    other.claim_id = "wl_2".into();
    let refused =
        |errno| ToAgent::StartFailed { claim_id: "wl_2".into(), run: 1, errno, step: Step::Claim, what: String::new() };
    assert_eq!(agent.ask(&ToInit::Claim(other.clone())), refused(libc::EBUSY));
    assert_eq!(agent.ask(&ToInit::Run { claim_id: "wl_2".into(), run: 1 }), refused(libc::EINVAL));
    assert!(matches!(
        agent.ask(&ToInit::Files { request: 5, claim_id: "wl_2".into(), uid: me().0, gid: me().1, files: Vec::new() }),
        ToAgent::FilesWritten { request: 5, errno: libc::EBUSY, .. }
    ));

    // Its own claim again is answered with what is, and starts nothing.
    assert_eq!(agent.start(claim(&["/bin/sleep", "1000"])), first);
    agent.send(&ToInit::Kill);
    assert_eq!(agent.exit(), (1, Exit::Signal(9)));
    assert!(matches!(agent.ask(&ToInit::Claim(claim(&["/bin/sleep", "1000"]))), ToAgent::Exited { run: 1, .. }));
    assert_eq!(agent.ask(&ToInit::Claim(other)), refused(libc::EBUSY));
}

#[test]
fn a_higher_generation_is_for_the_next_run_and_a_lower_one_is_refused() {
    let bench = Bench::new();
    let (mut agent, _) = bench.accept();
    let mut first = shell("exit 1");
    first.generation = 5;
    first.run = 3;
    assert_eq!(agent.start(first).run, 3);
    assert_eq!(agent.exit(), (3, Exit::Code(1)));

    let mut older = shell("exit 4");
    older.generation = 4;
    assert!(matches!(
        agent.ask(&ToInit::Claim(older)),
        ToAgent::StartFailed { errno: libc::ESTALE, step: Step::Claim, .. }
    ));
    let mut newer = shell("exit 6");
    newer.generation = 6;
    assert!(matches!(agent.ask(&ToInit::Claim(newer)), ToAgent::Exited { run: 3, exit: Exit::Code(1), .. }));
    let run = |run| ToInit::Run { claim_id: "wl_1".into(), run };
    assert!(matches!(agent.ask(&run(2)), ToAgent::StartFailed { errno: libc::ESTALE, .. }));
    assert!(matches!(agent.ask(&run(3)), ToAgent::Exited { run: 3, .. }));
    assert!(matches!(agent.ask(&run(4)), ToAgent::Started(_)));
    assert_eq!(agent.exit(), (4, Exit::Code(6)));
}

#[test]
fn what_was_forgotten_must_be_claimed_again_before_a_run() {
    let bench = Bench::new();
    let (mut agent, _) = bench.accept();
    agent.start(shell("exit 0"));
    assert_eq!(agent.exit(), (1, Exit::Code(0)));
    agent.send(&ToInit::Forget);
    let run = ToInit::Run { claim_id: "wl_1".into(), run: 2 };
    assert!(matches!(agent.ask(&run), ToAgent::StartFailed { errno: libc::ENOKEY, step: Step::Claim, run: 2, .. }));
    assert!(matches!(agent.ask(&ToInit::Claim(shell("exit 0"))), ToAgent::Exited { run: 1, .. }));
    assert!(matches!(agent.ask(&run), ToAgent::Started(_)));
}

/// Whether the bytes are anywhere in the writable memory of a process.
fn memory_holds(pid: u32, needle: &[u8]) -> bool {
    use std::os::unix::fs::FileExt;
    let memory = fs::File::open(format!("/proc/{pid}/mem")).unwrap();
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    maps.lines().any(|line| {
        let mut words = line.split_whitespace();
        let (range, rights) = (words.next().unwrap(), words.next().unwrap());
        let (from, to) = range.split_once('-').unwrap();
        let from = u64::from_str_radix(from, 16).unwrap();
        let to = u64::from_str_radix(to, 16).unwrap();
        let mut bytes = vec![0; (to - from) as usize];
        rights.starts_with("rw")
            && memory.read_exact_at(&mut bytes, from).is_ok()
            && bytes.windows(needle.len()).any(|window| window == needle)
    })
}

#[test]
fn forget_leaves_no_secret_in_memory() {
    if me().0 != 0 {
        eprintln!("not root: cannot read its memory, which is the point");
        return;
    }
    let bench = Bench::new();
    let (mut agent, _) = bench.accept();
    // Built at run time, and the two halves never lie together but in the claim.
    let needle = format!("{}-{}", "correct-horse", std::process::id());
    let mut claim = claim(&["/bin/sleep", "1000"]);
    claim.env = vec![("TOKEN".into(), needle.clone())];
    agent.start(claim);
    assert!(memory_holds(bench.init.id(), needle.as_bytes()), "held for the next run");
    agent.send(&ToInit::Forget);
    assert_eq!(agent.ask(&ToInit::Ping), ToAgent::Pong);
    assert!(!memory_holds(bench.init.id(), needle.as_bytes()));
    agent.send(&ToInit::Shutdown);
    bench.wait();
}

#[test]
fn the_process_outlives_every_connection() {
    let bench = Bench::new();
    let (mut agent, first) = bench.accept();
    let started = agent.start(claim(&["/bin/sleep", "1000"]));
    for _ in 0..5 {
        drop(agent);
        let hello;
        (agent, hello) = bench.accept();
        assert_eq!(hello.boot, first.boot);
        assert_eq!(hello.state, State::Running { claim_id: "wl_1".into(), run: 1, pid: started.pid });
    }
    agent.send(&ToInit::Signal { signo: libc::SIGKILL as u8 });
    agent.exit();
}

#[test]
fn it_waits_for_a_node_agent_that_is_away_and_reports_what_happened_meanwhile() {
    let mut bench = Bench::new();
    let (mut agent, _) = bench.accept();
    let gate = bench.path("gate");
    let wait = format!("while [ ! -e {} ]; do :; done; exit 9", gate.display());
    let started = agent.start(shell(&wait));
    // The node agent is gone, socket and all.
    fs::remove_file(bench.socket()).unwrap();
    bench.listener = UnixListener::bind(bench.path("elsewhere")).unwrap();
    drop(agent);
    fs::write(&gate, "").unwrap();
    let gone = PathBuf::from(format!("/proc/{}", started.pid));
    until("the tenant's process ends", || !gone.exists());

    bench.listener = UnixListener::bind(bench.socket()).unwrap();
    let (_agent, hello) = bench.accept();
    assert!(matches!(hello.state, State::Exited { run: 1, exit: Exit::Code(9), .. }), "{hello:?}");
}

#[test]
fn signals_reach_the_whole_process_group() {
    let bench = Bench::new();
    let (mut agent, _) = bench.accept();
    let (ready, got) = (bench.path("ready"), bench.path("got"));
    agent.start(shell(&format!(
        "trap 'echo usr1 >> {got}' USR1; trap 'exit 5' HUP; \
         sh -c \"trap 'echo child >> {got}; exit' USR1; touch {ready}; while :; do sleep 0.01; done\" & \
         while [ ! -e {ready} ]; do sleep 0.01; done; touch {ready}2; while :; do sleep 0.01; done",
        got = got.display(),
        ready = ready.display(),
    )));
    until("both have their traps", || bench.path("ready2").exists());
    agent.send(&ToInit::Signal { signo: libc::SIGUSR1 as u8 });
    until("both got it", || {
        let text = fs::read_to_string(&got).unwrap_or_default();
        text.contains("usr1") && text.contains("child")
    });
    // And what init itself is sent.
    bench.signal("HUP");
    assert_eq!(agent.exit(), (1, Exit::Code(5)));
}

#[test]
fn sigterm_ends_it_with_the_tenants_code_by_the_claims_stop_signal() {
    let bench = Bench::new();
    let (mut agent, _) = bench.accept();
    let ready = bench.path("ready");
    let mut claim =
        shell(&format!("trap 'exit 42' INT; trap '' TERM; touch {}; while :; do sleep 0.01; done", ready.display()));
    claim.stop_signal = libc::SIGINT as u8;
    agent.start(claim);
    until("the traps are set", || ready.exists());
    bench.signal("TERM");
    assert_eq!(agent.exit(), (1, Exit::Code(42)), "the last words are sent");
    assert!(agent.is_closed());
    assert_eq!(bench.wait().0.code(), Some(42));
}

#[test]
fn sigterm_ends_a_waiting_slot_and_nothing_else_does() {
    let bench = Bench::new();
    let (mut agent, _) = bench.accept();
    for name in ["INT", "HUP", "USR1", "USR2", "QUIT"] {
        bench.signal(name);
    }
    assert_eq!(agent.ask(&ToInit::Ping), ToAgent::Pong);
    bench.signal("TERM");
    assert_eq!(bench.wait().0.code(), Some(0));
}

#[test]
fn a_signal_death_is_reported_as_one() {
    let bench = Bench::new();
    let (mut agent, _) = bench.accept();
    agent.start(shell("kill -SEGV $$"));
    assert_eq!(agent.exit(), (1, Exit::Signal(libc::SIGSEGV as u8)));
    bench.signal("TERM");
    let status = bench.wait().0;
    assert_eq!((status.code(), status.signal()), (Some(128 + 11), None));
}

#[test]
fn files_are_replaced_while_the_process_runs() {
    let bench = Bench::new();
    let (mut agent, _) = bench.accept();
    let config = bench.path("config");
    // A link in its place must be replaced, not followed.
    let victim = bench.path("victim");
    fs::write(&victim, "untouched").unwrap();
    std::os::unix::fs::symlink(&victim, &config).unwrap();
    agent.start(claim(&["/bin/sleep", "1000"]));
    let mut write = |bytes: &[u8], path: &Path| {
        agent.ask(&ToInit::Files {
            request: 8,
            claim_id: "wl_1".into(),
            uid: me().0,
            gid: me().1,
            files: vec![File {
                path: path.to_str().unwrap().into(),
                mode: 0o600,
                bytes: bytes.to_vec(),
                secret: false,
                only_if_absent: false,
            }],
        })
    };
    let written = |errno, what: &str| ToAgent::FilesWritten { request: 8, errno, what: what.into() };
    assert_eq!(write(b"new", &config), written(0, ""));
    assert_eq!(fs::read(&config).unwrap(), b"new");
    assert_eq!(fs::read(&victim).unwrap(), b"untouched");
    let under_a_file = victim.join("x");
    assert_eq!(write(b"", &under_a_file), written(libc::ENOTDIR, under_a_file.to_str().unwrap()));
    agent.send(&ToInit::Shutdown);
    agent.exit();
}

#[test]
fn a_seed_is_written_once() {
    let bench = Bench::new();
    let (mut agent, _) = bench.accept();
    let path = bench.path("seed");
    let mut claim = shell(&format!("cat {0}; echo changed > {0}", path.display()));
    claim.files = vec![File {
        path: path.to_str().unwrap().into(),
        mode: 0o600,
        bytes: b"seed\n".to_vec(),
        secret: false,
        only_if_absent: true,
    }];
    agent.start(claim);
    agent.exit();
    agent.send(&ToInit::Run { claim_id: "wl_1".into(), run: 2 });
    assert!(matches!(agent.read(), Some(ToAgent::Started(_))));
    agent.exit();
    agent.send(&ToInit::Shutdown);
    assert_eq!(bench.wait().1, "seed\nchanged\n");
}

#[test]
fn bad_frames_end_the_connection_and_not_the_process() {
    let too_long = ((MAX_TO_INIT + 1) as u32).to_le_bytes().to_vec();
    let empty = vec![0, 0, 0, 0];
    let claim_without_anything = vec![1, 0, 0, 0, 1];
    let record_past_the_end = vec![6, 0, 0, 0, 4, 12, 9, 0, 0, 0];
    let signal_out_of_range = vec![7, 0, 0, 0, 4, 12, 1, 0, 0, 0, 65];
    let bench = Bench::new();
    let (mut agent, _) = bench.accept();
    let started = agent.start(claim(&["/bin/sleep", "1000"]));
    for bad in [too_long, empty, claim_without_anything, record_past_the_end, signal_out_of_range] {
        agent.0.write_all(&bad).unwrap();
        assert!(agent.is_closed(), "{bad:?}");
        let hello;
        (agent, hello) = bench.accept();
        assert!(matches!(hello.state, State::Running { pid, .. } if pid == started.pid), "{hello:?}");
    }
    // From a newer node agent: skipped.
    agent.0.write_all(&[1, 0, 0, 0, 0x7f]).unwrap();
    assert_eq!(agent.ask(&ToInit::Ping), ToAgent::Pong);
    agent.send(&ToInit::Shutdown);
    agent.exit();
}

#[test]
fn a_claim_may_be_as_long_as_the_limit_and_come_in_pieces() {
    let bench = Bench::new();
    let (mut agent, _) = bench.accept();
    let path = bench.path("big");
    let mut big = shell("exit 0");
    big.files = vec![File {
        path: path.to_str().unwrap().into(),
        mode: 0o600,
        bytes: Vec::new(),
        secret: false,
        only_if_absent: false,
    }];
    let rest = ToInit::Claim(big.clone()).encode().unwrap().len() - 4;
    big.files[0].bytes = vec![b'x'; MAX_TO_INIT - rest];
    let frame = ToInit::Claim(big.clone()).encode().unwrap();
    assert_eq!(frame.len(), MAX_TO_INIT + 4);
    for piece in frame.chunks(100_001) {
        agent.0.write_all(piece).unwrap();
    }
    assert!(matches!(agent.read(), Some(ToAgent::Started(_))));
    assert_eq!(fs::metadata(&path).unwrap().len(), (MAX_TO_INIT - rest) as u64);
    big.files[0].bytes.push(b'x');
    assert!(ToInit::Claim(big.clone()).encode().is_err());
}

#[test]
fn orphans_are_reaped() {
    let bench = Bench::new();
    let (mut agent, _) = bench.accept();
    let pid_file = bench.path("orphan");
    agent.start(shell(&format!("(sh -c 'echo $$ > {0}.tmp; mv {0}.tmp {0}' &) ; exec sleep 1000", pid_file.display())));
    until("the orphan has said its pid", || pid_file.exists());
    let orphan = fs::read_to_string(&pid_file).unwrap();
    let orphan = PathBuf::from(format!("/proc/{}", orphan.trim()));
    until("nothing is left of it, not even a zombie", || !orphan.exists());
    agent.send(&ToInit::Shutdown);
    agent.exit();
}

#[test]
fn as_pid_1_it_reaps_and_a_run_takes_all_its_processes_along() {
    if me().0 != 0 {
        eprintln!("not root: no pid namespace");
        return;
    }
    let bench = Bench::with(&["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"], &[]);
    let (mut agent, hello) = bench.accept();
    assert_eq!(hello.state, State::Waiting);
    let alive = bench.path("alive");
    // A daemon in a session of its own, which the first run leaves behind.
    let started = agent.start(shell(&format!(
        "test $(cat /proc/1/comm) = init || exit 3; \
         setsid sh -c 'touch {alive}; exec sleep 1000' & \
         while [ ! -e {alive} ]; do sleep 0.01; done; exit 4",
        alive = alive.display()
    )));
    assert!(started.pid > 1 && started.pid < 100, "{started:?}");
    assert_eq!(agent.exit(), (1, Exit::Code(4)));
    // The second run looks at the whole namespace until nothing but init and itself is in it: with anything
    // left alive or a zombie, it would never end.
    let mut second = shell("while :; do set -- /proc/[0-9]*; [ \"$*\" = \"/proc/1 /proc/$$\" ] && exit 0; done");
    second.generation = 2;
    assert!(matches!(agent.ask(&ToInit::Claim(second)), ToAgent::Exited { run: 1, .. }));
    assert!(matches!(agent.ask(&ToInit::Run { claim_id: "wl_1".into(), run: 2 }), ToAgent::Started(_)));
    assert_eq!(agent.exit(), (2, Exit::Code(0)));
    agent.send(&ToInit::Shutdown);
    assert_eq!(bench.wait().0.code(), Some(0));
}

/// What `docker exec` would run, against a node agent that answers with `answer`.
fn run_ticket(answer: impl FnOnce(&mut Agent)) -> Output {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("agent.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let child = Command::new(INIT)
        .args(["--socket".as_ref(), socket.as_os_str()])
        .args(["run", "t1cket"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut agent = Agent(listener.accept().unwrap().0);
    assert_eq!(agent.read(), Some(ToAgent::ExecHello { ticket: "t1cket".into() }));
    answer(&mut agent);
    drop(agent);
    child.wait_with_output().unwrap()
}

#[test]
fn a_ticket_becomes_its_program_on_the_callers_terminal() {
    let output = run_ticket(|agent| {
        agent.send(&ToInit::ExecSpec(Exec {
            argv: vec!["sh".into(), "-c".into(), "echo $TOKEN in $(pwd); exit 6".into()],
            env: vec![("TOKEN".into(), "xyz".into())],
            inherit_env: true,
            cwd: Some("/usr".into()),
        }));
    });
    assert_eq!(output.status.code(), Some(6));
    assert_eq!(output.stdout, b"xyz in /usr\n");
}

#[test]
fn a_ticket_that_cannot_run_says_why() {
    let exec = |program: &str| {
        let argv = vec![program.to_owned()];
        run_ticket(|agent| agent.send(&ToInit::ExecSpec(Exec { argv, env: Vec::new(), inherit_env: false, cwd: None })))
    };
    let refuse = |agent: &mut Agent| {
        agent.send(&ToInit::ExecRefused { reason: "the ticket was used".into() });
    };
    for (output, code, text) in [
        (exec("/no/such"), 127, "/no/such: No such file"),
        (exec("/etc/passwd"), 126, "Permission denied"),
        (run_ticket(refuse), 126, "the ticket was used"),
        (run_ticket(drop_connection), 126, "the node agent hung up"),
    ] {
        let err = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{err}");
        assert!(err.contains(text), "{err}");
    }
}

fn drop_connection(_: &mut Agent) {}
