//! A node agent against real Docker, real namespaces and a control plane that speaks the real protocol.

mod support;

use std::collections::BTreeSet;
use std::time::Duration;

use clawhq_domain::slot::{Exit, FailureKind, SlotState};
use clawhq_proto::v1;
use clawhq_proto::v1::down;
use support::{Docker, World, claimed, id, process, slot, until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

const SECRET: &str = "hush-6f1c9e2a";

async fn get(world: &World, slot: &v1::SlotDesired, path: &str) -> String {
    let mut stream = UnixStream::connect(world.ingress()).await.unwrap();
    let request =
        format!("CLAWHQ/1 {} 8080\nGET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", slot.slot_id);
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_is_made_claimed_restarted_and_removed() {
    let world = World::new().await;
    let agent = world.agent().await;
    let warm = slot();
    world.plane.desire(warm.clone());
    let waiting = world.plane.state(&warm, SlotState::Waiting, 0).await;
    assert_eq!(waiting.instance, None);
    assert!(waiting.image_digest.unwrap().starts_with("sha256:"));
    assert!(get(&world, &warm, "/").await.starts_with("ERR not_running"), "an unclaimed slot is not reached");

    let mut run = process(&[]);
    run.env.insert("API_KEY".into(), SECRET.into());
    run.files.push(v1::File {
        path: "/run/secrets/key".into(),
        mode: 0o400,
        content: SECRET.as_bytes().to_vec(),
        secret: true,
        only_if_absent: false,
    });
    let mine = claimed(&warm, Some(run));
    world.plane.desire(mine.clone());
    let running = world.plane.state(&mine, SlotState::Running, 1).await;
    assert_eq!(running.instance.unwrap().to_string(), mine.claim.as_ref().unwrap().instance_id);
    let steps: Vec<_> = running.steps.iter().map(|step| step.name.as_str()).collect();
    assert_eq!(steps, ["claim", "started", "ready"], "a warm claim has no step of Docker's");
    println!("{:?}", running.steps);
    assert!(get(&world, &mine, "/healthz").await.contains("\"ok\":true"));

    // The process has its secrets; Docker, the ledger and the reports do not.
    assert_eq!(world.plane.exec(&mine, &["/hello", "env", "API_KEY"]).await, (0, format!("{SECRET}\n")));
    assert_eq!(world.plane.exec(&mine, &["/hello", "cat", "/run/secrets/key"]).await, (0, SECRET.to_owned()));
    let container = running.container.clone().unwrap();
    assert!(!world.docker.inspect(&container).to_string().contains(SECRET));
    let grep = support::run("grep", &["-rl", SECRET, world.config.data_dir.to_str().unwrap()]);
    assert!(grep.is_err(), "on disk: {grep:?}");

    // A person restarts it: the same container, another run.
    let pid = world.docker.pid(&container);
    let mut again = mine.clone();
    again.generation += 1;
    again.claim.as_mut().unwrap().restart = 1;
    world.plane.desire(again.clone());
    let restarted = world.plane.state(&again, SlotState::Running, 2).await;
    assert_eq!((restarted.container.as_ref(), world.docker.pid(&container)), (Some(&container), pid));
    assert!(restarted.failure.is_none());

    // What is older is not heard.
    world.plane.say(down::Frame::Upsert(v1::SlotDesired { present: false, ..warm.clone() }));
    world.plane.heartbeat().await;
    assert!(get(&world, &mine, "/healthz").await.contains("\"ok\":true"));
    assert!(!world.plane.states(&mine).contains(&SlotState::Stopping), "it was heard");

    world.clean_up(agent).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_run_says_why() {
    let world = World::new().await;
    let agent = world.agent().await;
    let cold = |argv: &[&str]| claimed(&slot(), Some(process(argv)));
    let mut no_image = cold(&[]);
    no_image.spec.as_mut().unwrap().image = "127.0.0.1:1/nobody/nothing:1".into();
    let mut wrong_digest = cold(&[]);
    wrong_digest.spec.as_mut().unwrap().image = "127.0.0.1:1/clawhq/hello:dev".into();
    wrong_digest.spec.as_mut().unwrap().image_digest = format!("sha256:{}", "0".repeat(64));
    let no_command = cold(&["/nothing/here"]);
    let exits = cold(&["/hello", "exit", "3"]);
    let eats = cold(&["/hello", "oom", "200"]);
    let mut mute = cold(&["/hello", "sleep"]);
    mute.claim.as_mut().unwrap().process.as_mut().unwrap().start_deadline_ms = 200;
    let mut bad_file = cold(&[]);
    bad_file.claim.as_mut().unwrap().process.as_mut().unwrap().files =
        vec![v1::File { path: "/hello/x".into(), ..v1::File::default() }];
    let cases = [
        (&no_image, FailureKind::ImageMissing),
        (&wrong_digest, FailureKind::ImageMissing),
        (&no_command, FailureKind::Command),
        (&exits, FailureKind::CrashLoop),
        (&eats, FailureKind::OutOfMemory),
        (&mute, FailureKind::Probe),
        (&bad_file, FailureKind::Volume),
    ];
    cases.iter().for_each(|(slot, _)| world.plane.desire((*slot).clone()));
    for (slot, kind) in cases {
        let failure = world.plane.state(slot, SlotState::Failed, 0).await.failure.unwrap();
        println!("{kind:?}: {} {:?}", failure.message, failure.log_tail);
        assert_eq!(failure.kind, kind, "{failure:?}");
    }
    let failure = |slot: &v1::SlotDesired| {
        let slot = slot.clone();
        let plane = world.plane.clone();
        async move { plane.state(&slot, SlotState::Failed, 0).await.failure.unwrap() }
    };
    let told = failure(&no_command).await;
    assert!(told.log_tail.iter().any(|line| line.contains("/nothing/here")), "{told:?}");
    assert_eq!(failure(&exits).await.exit, Some(Exit::Code(3)));
    assert_eq!(failure(&eats).await.exit, Some(Exit::OutOfMemory));
    // Before it was given up, it was tried again, and each time said why.
    let restarting = world.plane.state(&exits, SlotState::Restarting, 1).await;
    assert_eq!(restarting.failure.unwrap().exit, Some(Exit::Code(3)));
    world.clean_up(agent).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_reaches_the_internet_when_claimed_and_nothing_else_ever() {
    let world = World::new().await;
    // A stranger's network behind this host, with a server that answers whoever reaches it.
    let internet = Internet::new(&world);
    let host = tokio::net::TcpListener::bind("0.0.0.0:0").await.unwrap();
    let host_port = host.local_addr().unwrap().port();
    let agent = world.agent().await;
    let (one, other) = (claimed(&slot(), Some(process(&[]))), claimed(&slot(), Some(process(&[]))));
    let warm = slot();
    for slot in [&one, &other, &warm] {
        world.plane.desire(slot.clone());
    }
    world.plane.state(&one, SlotState::Running, 1).await;
    world.plane.state(&other, SlotState::Running, 1).await;
    world.plane.state(&warm, SlotState::Waiting, 0).await;

    let connect = async |address: String| world.plane.exec(&one, &["/hello", "connect", &address, "700"]).await.0;
    assert_eq!(connect(format!("{}:{}", internet.address, internet.port)).await, 0, "the internet");
    let (code, said) = world.plane.exec(&one, &["/hello", "cat", "/etc/resolv.conf"]).await;
    assert!(code == 0 && said.contains("nameserver 1.1.1.1"), "{said}");

    let addresses = |interface: &str| {
        let show = |what: &str| {
            let text = support::run("ip", &["-j", what, "show", "dev", interface]).unwrap();
            serde_json::from_str::<serde_json::Value>(&text).unwrap()
        };
        // A browser on the host breaks its connections off when the host gets an address.
        assert_eq!(show("address")[0]["addr_info"], serde_json::json!([]), "the host's end has none");
        let container: std::net::Ipv4Addr = show("route")[0]["dst"].as_str().unwrap().parse().unwrap();
        (std::net::Ipv4Addr::from(u32::from(container) - 1), container)
    };
    let mut forbidden = vec!["169.254.169.254:80".to_owned()];
    for interface in world.interfaces() {
        let (next_hop, container) = addresses(&interface);
        forbidden.push(format!("{next_hop}:{host_port}"));
        // Its own address is loopback to it; the others' servers must not be reached.
        forbidden.push(format!("{container}:8081"));
    }
    forbidden.push(format!("{}:{host_port}", internet.gateway));
    for address in forbidden {
        let code = connect(address.clone()).await;
        let own = address.ends_with(":8081") && code == 1;
        assert!(own || code == 2 || code == 3, "{address} answered with {code}");
    }
    let others: Vec<_> = world.interfaces().iter().map(|name| addresses(name).1).collect();
    let mut reached = 0;
    for address in others {
        reached += i32::from(connect(format!("{address}:8080")).await == 0);
    }
    assert_eq!(reached, 1, "only itself");
    // The host does not let its own processes in by address either: the ingress is the way.
    assert!(tokio::time::timeout(Duration::from_millis(300), host.accept()).await.is_err(), "the host was reached");

    // The warm one has a cable and no way out: asked from outside of it, in its namespace.
    let container = world.plane.state(&warm, SlotState::Waiting, 0).await.container.unwrap();
    let pid = world.docker.pid(&container).to_string();
    let out = format!("exec 3<>/dev/tcp/{}/{}", internet.address, internet.port);
    let tried = support::run("nsenter", &["-t", &pid, "-n", "timeout", "0.7", "bash", "-c", &out]);
    assert!(tried.is_err(), "an unclaimed slot reaches the internet");
    let mine = claimed(&warm, Some(process(&[])));
    world.plane.desire(mine.clone());
    world.plane.state(&mine, SlotState::Running, 1).await;
    let tried = support::run("nsenter", &["-t", &pid, "-n", "timeout", "2", "bash", "-c", &out]);
    assert!(tried.is_ok(), "{tried:?}");

    // Meddling with the table is seen, said and mended.
    let table = format!("clawhq_{}", world.config.network.key);
    support::run("nft", &["flush", "table", "inet", &table]).unwrap();
    until("the table is mended", async || {
        support::run("nft", &["list", "chain", "inet", &table, "from_slot"]).ok().filter(|text| text.contains("drop"))
    })
    .await;
    assert_eq!(connect(format!("{}:{}", internet.address, internet.port)).await, 0);
    assert_ne!(connect("169.254.169.254:80".to_owned()).await, 0);
    world.clean_up(agent).await;
}

/// A namespace behind a veth pair, with a public-looking address and a listener.
struct Internet {
    address: String,
    gateway: String,
    port: u16,
    link: String,
    holder: std::process::Child,
    server: std::process::Child,
}

impl Internet {
    fn new(world: &World) -> Self {
        let key = &world.config.network.key;
        let (x, y) = (u8::from_str_radix(&key[..2], 16).unwrap(), u8::from_str_radix(&key[2..], 16).unwrap() & 0xfc);
        // 203.0.113.0/24 is for documentation; each test takes four addresses of it.
        let _ = x;
        let (gateway, address) = (format!("203.0.113.{}", y | 1), format!("203.0.113.{}", y | 2));
        let link = format!("it{key}");
        let mut holder = std::process::Command::new("unshare")
            .args(["--net", "sh", "-c", "ip link set lo up; echo ready; read end"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = [0; 6];
        std::io::Read::read_exact(holder.stdout.as_mut().unwrap(), &mut ready).unwrap();
        let pid = holder.id().to_string();
        let ip = |arguments: &str| support::run("ip", &arguments.split(' ').collect::<Vec<_>>()).unwrap();
        ip(&format!("link add {link} type veth peer name eth0 netns {pid}"));
        ip(&format!("address add {gateway}/30 dev {link}"));
        ip(&format!("link set {link} up"));
        let inside = |arguments: &str| {
            let mut all = vec!["-t", &pid, "-n", "ip"];
            all.extend(arguments.split(' '));
            support::run("nsenter", &all).unwrap()
        };
        inside(&format!("address add {address}/30 dev eth0"));
        inside("link set eth0 up");
        let port = 8000;
        // No route back but to the gateway: what arrives was masqueraded.
        let server = std::process::Command::new("nsenter")
            .args(["-t", &pid, "-n", "python3", "-m", "http.server", "8000"])
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let begin = std::time::Instant::now();
        while std::net::TcpStream::connect((address.as_str(), port)).is_err() {
            assert!(begin.elapsed() < support::PATIENCE, "the internet does not answer");
            std::thread::sleep(Duration::from_millis(20));
        }
        Self { address, gateway, port, link, holder, server }
    }
}

impl Drop for Internet {
    fn drop(&mut self) {
        let _ = support::run("ip", &["link", "delete", &self.link]);
        for child in [&mut self.server, &mut self.holder] {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_outlives_its_containers_and_goes_on_order() {
    let world = World::new().await;
    let agent = world.agent().await;
    let volume: clawhq_domain::ids::VolumeId = id();
    let with_volume = || {
        let mut slot = claimed(&slot(), Some(process(&[])));
        slot.spec.as_mut().unwrap().volume =
            Some(v1::Volume { volume_id: volume.to_string(), path: "/data".into(), size_mib: 16 });
        slot
    };
    let (old, new) = (with_volume(), with_volume());
    world.plane.desire(old.clone());
    world.plane.state(&old, SlotState::Running, 1).await;
    assert_eq!(world.plane.exec(&old, &["/hello", "write", "/data/kept", "1000"]).await.0, 0);
    let (code, said) = world.plane.exec(&old, &["/hello", "write", "/data/big", "30000000"]).await;
    assert!(code != 0, "the volume has no end: {said}");
    let (code, _) = world.plane.exec(&old, &["/hello", "write", "/hello2", "1"]).await;
    assert!(code != 0, "the root is writable");

    // The next instance waits until the last one has let go.
    world.plane.desire(new.clone());
    world.plane.remove_volume(&id::<clawhq_domain::ids::VolumeId>().to_string()).await;
    world.plane.heartbeat().await;
    assert!(!world.plane.states(&new).contains(&SlotState::Running), "two containers use one volume");
    world.plane.desire(v1::SlotDesired { present: false, ..old.clone() });
    world.plane.state(&new, SlotState::Running, 1).await;
    let states = world.plane.states(&old);
    assert_eq!(states.last(), Some(&SlotState::Absent), "{states:?}");
    assert_eq!(world.plane.exec(&new, &["/hello", "cat", "/data/kept"]).await.1.len(), 1000);

    world.plane.desire(v1::SlotDesired { present: false, ..new.clone() });
    world.plane.state(&new, SlotState::Absent, 0).await;
    let image = world.config.data_dir.join(format!("volumes/{volume}.img"));
    assert!(image.exists(), "data goes on order only");
    world.plane.remove_volume(&volume.to_string()).await;
    assert!(!image.exists());
    world.clean_up(agent).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_app_is_thawed_for_its_tenant() {
    let world = World::new().await;
    let agent = world.agent().await;
    let mut warm = slot();
    let spec = warm.spec.as_mut().unwrap();
    spec.warm_mode = "frozen".into();
    let mut pool = process(&[]);
    pool.env.insert("TOKEN".into(), SECRET.into());
    spec.pool_process = Some(pool);
    // The first of a pool is next in line, and stays awake.
    let first = v1::SlotDesired { slot_id: slot().slot_id, ..warm.clone() };
    world.plane.desire(first.clone());
    world.plane.state(&first, SlotState::Waiting, 1).await;
    world.plane.desire(warm.clone());
    let frozen = world.plane.state(&warm, SlotState::Frozen, 1).await;
    let container = frozen.container.unwrap();
    assert!(get(&world, &warm, "/healthz").await.starts_with("ERR not_running"));

    // A restart of the agent finds it frozen, though nobody in it can speak.
    agent.stop().await;
    let known = world.plane.states(&warm).len();
    let agent = world.agent().await;
    world.plane.heartbeat().await;
    let since = world.plane.states(&warm).split_off(known);
    assert!(since.iter().all(|state| *state == SlotState::Frozen), "nothing has changed: {since:?}");

    let mine = claimed(&warm, None);
    world.plane.desire(mine.clone());
    let running = world.plane.state(&mine, SlotState::Running, 1).await;
    println!("{:?}", running.steps);
    assert_eq!((running.run, running.container), (1, Some(container)), "it was not started again");
    assert!(get(&world, &mine, "/healthz").await.contains("\"ok\":true"));
    assert_eq!(world.plane.exec(&mine, &["/hello", "env", "TOKEN"]).await.1.trim(), SECRET);

    // Claimed with a process of its own, a frozen one is replaced in place.
    let mut other = slot();
    other.spec = warm.spec.clone();
    world.plane.desire(other.clone());
    world.plane.state(&other, SlotState::Frozen, 1).await;
    let mut own = process(&[]);
    own.env.insert("TOKEN".into(), "mine".into());
    let other = claimed(&other, Some(own));
    world.plane.desire(other.clone());
    world.plane.state(&other, SlotState::Running, 2).await;
    assert_eq!(world.plane.exec(&other, &["/hello", "env", "TOKEN"]).await.1.trim(), "mine");

    // Once the first is somebody's, the next in line wakes up.
    let last = v1::SlotDesired { slot_id: slot().slot_id, ..warm.clone() };
    world.plane.desire(last.clone());
    world.plane.state(&last, SlotState::Frozen, 1).await;
    let first = claimed(&first, None);
    world.plane.desire(first.clone());
    world.plane.state(&first, SlotState::Running, 1).await;
    world.plane.state(&last, SlotState::Waiting, 1).await;
    world.clean_up(agent).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn logs_exec_and_terminals_end_with_a_reason() {
    use v1::channel_open::Kind;
    let world = World::new().await;
    let agent = world.agent().await;
    let mine = claimed(&slot(), Some(process(&[])));
    world.plane.desire(mine.clone());
    world.plane.state(&mine, SlotState::Running, 1).await;

    // Exec: exit code, standard input, a deadline that kills, and output within its credit.
    assert_eq!(world.plane.exec(&mine, &["/hello", "exit", "7"]).await.0, 7);
    assert_eq!(world.plane.exec(&mine, &["/nothing"]).await.0, 127);
    let cat = world.plane.open(
        &mine,
        Kind::Exec(v1::Exec { argv: vec!["/hello".into(), "cat".into()], timeout_ms: 0 }),
        65_536,
    );
    let feed = |bytes: &[u8], end_of_input| {
        let data = v1::ChannelData { id: cat, bytes: bytes.to_vec(), end_of_input, ..v1::ChannelData::default() };
        world.plane.say(down::Frame::ChannelData(data));
    };
    feed(b"one ", false);
    feed(b"two", true);
    let (said, closed) = world.plane.closed(cat).await;
    assert_eq!((&said.stdout[..], closed.exit_code), (&b"one two"[..], Some(0)));

    let stay = vec!["/hello".to_owned(), "sleep".to_owned()];
    let late = world.plane.open(&mine, Kind::Exec(v1::Exec { argv: stay, timeout_ms: 300 }), 65_536);
    assert_eq!(world.plane.closed(late).await.1.reason, "timeout");
    let container = world.plane.state(&mine, SlotState::Running, 1).await.container.unwrap();
    until("the late program is killed", async || {
        let processes = world.docker.cli(&["top", &container]).unwrap();
        (!processes.contains("sleep")).then_some(())
    })
    .await;

    let spam = vec!["/hello".to_owned(), "spam".to_owned(), "200000".to_owned()];
    let slow = world.plane.open(&mine, Kind::Exec(v1::Exec { argv: spam, timeout_ms: 0 }), 32_768);
    let seen = world.plane.channel(slow, "the first window", |one| one.stdout.len() >= 16_384).await;
    world.plane.heartbeat().await;
    assert!(world.plane.seen(slow).stdout.len() <= 32_768 + 16_384, "more than its credit: {}", seen.stdout.len());
    world.plane.say(down::Frame::ChannelCredit(v1::ChannelCredit { id: slow, bytes: 1 << 20 }));
    assert!(world.plane.closed(slow).await.0.stdout.len() >= 200_000);

    // A terminal is one: it echoes, and has a size.
    let terminal = v1::Terminal { argv: vec!["/hello".into(), "cat".into()], cols: 100, rows: 30 };
    let tty = world.plane.open(&mine, Kind::Terminal(terminal), 65_536);
    let keys = |bytes: &[u8]| {
        let data = v1::ChannelData { id: tty, bytes: bytes.to_vec(), ..v1::ChannelData::default() };
        world.plane.say(down::Frame::ChannelData(data));
    };
    keys(b"abc\r");
    world
        .plane
        .channel(tty, "the echo and the answer", |one| String::from_utf8_lossy(&one.stdout).matches("abc").count() == 2)
        .await;
    keys(&[4]);
    assert_eq!(world.plane.closed(tty).await.1.exit_code, Some(0));

    // Logs: what was, then what comes, and an end when the container ends.
    let logs = |follow, tail, since_ms| Kind::Logs(v1::Logs { follow, since_ms, tail, stdout: true, stderr: true });
    let follow = world.plane.open(&mine, logs(true, 0, 0), 1 << 20);
    let all = world.plane.channel(follow, "a line", |one| !one.lines.is_empty()).await;
    assert!(all.lines[0].0 > 1_600_000_000_000, "stamped: {:?}", all.lines);
    get(&world, &mine, "/somewhere-else").await;
    let list = world.plane.open(&mine, logs(false, 1, 0), 1 << 20);
    let (tail, closed) = world.plane.closed(list).await;
    assert_eq!((tail.lines.len(), closed.reason.as_str()), (1, "ended"));
    let future = world.plane.open(&mine, logs(false, 0, tail.lines[0].0 + 3_600_000), 1 << 20);
    assert_eq!(world.plane.closed(future).await.0.lines, []);

    // Another instance's channel to this slot is none.
    let mut stranger = mine.clone();
    stranger.claim = Some(support::claim(None));
    let refused = world.plane.open(&stranger, logs(false, 0, 0), 1 << 20);
    assert_eq!(world.plane.closed(refused).await.1.reason, "not_found");

    world.plane.desire(v1::SlotDesired { present: false, ..mine.clone() });
    assert_eq!(world.plane.closed(follow).await.1.reason, "ended");
    world.plane.state(&mine, SlotState::Absent, 0).await;
    world.clean_up(agent).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_ours_is_left_alone_and_orphans_go_after_contact() {
    let world = World::new().await;
    let agent = world.agent().await;
    let mine = claimed(&slot(), Some(process(&[])));
    world.plane.desire(mine.clone());
    world.plane.state(&mine, SlotState::Running, 1).await;
    let name = format!("stranger-{}", world.config.network.key);
    let stranger = world
        .docker
        .cli(&[
            "run",
            "-d",
            "--network",
            "none",
            "--name",
            &name,
            "--label",
            "clawhq.slot=x",
            "clawhq/hello:dev",
            "sleep",
        ])
        .unwrap();
    let stranger = stranger.trim();

    // The control plane does not know the slot any more: asked twice, then it goes; the stranger stays.
    world.plane.forget(&mine.slot_id);
    world.plane.send_full();
    world.plane.asked_full().await;
    world.plane.heartbeat().await;
    assert_eq!(world.docker.ours(&world.data_label()).await.len(), 1, "once may be a moment too old");
    world.plane.send_full();
    until("the orphan goes", async || world.docker.ours(&world.data_label()).await.is_empty().then_some(())).await;
    assert_eq!(world.docker.inspect(stranger)["State"]["Running"], true);
    world.docker.cli(&["rm", "-f", stranger]).unwrap();

    // A container of ours whose ledger entry is lost is adopted by its label, not doubled.
    let kept = claimed(&slot(), Some(process(&[])));
    world.plane.desire(kept.clone());
    let container = world.plane.state(&kept, SlotState::Running, 1).await.container.unwrap();
    agent.stop().await;
    let pid = world.docker.pid(&container);
    std::fs::remove_file(world.config.data_dir.join("node/ledger/slots").join(&kept.slot_id)).unwrap();
    let agent = world.agent().await;
    until("it is reached again", async || get(&world, &kept, "/healthz").await.contains("\"ok\":true").then_some(()))
        .await;
    assert_eq!(world.docker.ours(&world.data_label()).await, std::slice::from_ref(&container));
    assert_eq!(world.docker.pid(&container), pid);
    world.clean_up(agent).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_lease_stops_single_writers_until_it_is_back() {
    let world = World::new().await;
    let agent = world.agent().await;
    let mut single = claimed(&slot(), Some(process(&[])));
    single.claim.as_mut().unwrap().single_writer = true;
    let many = claimed(&slot(), Some(process(&[])));
    for slot in [&single, &many] {
        world.plane.desire(slot.clone());
    }
    world.plane.state(&single, SlotState::Running, 1).await;
    world.plane.state(&many, SlotState::Running, 1).await;
    world.plane.set_lease(500, true);
    world.plane.state(&single, SlotState::Stopping, 1).await;
    until("its process ends", async || get(&world, &single, "/").await.starts_with("ERR").then_some(())).await;
    assert!(get(&world, &many, "/healthz").await.contains("\"ok\":true"), "others go on");
    world.plane.set_lease(60_000, true);
    world.plane.state(&single, SlotState::Running, 2).await;
    world.clean_up(agent).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_are_renewed_and_reports_survive_a_break() {
    let world = World::with(Docker::shared_or_own().await, Duration::from_secs(20)).await;
    let agent = world.agent().await;
    let first = world.plane.certificate(0).await;
    world.plane.set_lease(60_000, false);
    let mine = claimed(&slot(), Some(process(&[])));
    world.plane.desire(mine.clone());
    world.plane.state(&mine, SlotState::Running, 1).await;
    let before: BTreeSet<u64> = world.plane.indexes().into_iter().collect();
    // Half of its life later it dials with another; what was not acknowledged comes again, as it was.
    let second = world.plane.certificate(1).await;
    assert_ne!(first, second);
    assert_eq!(world.plane.enrolled(), 1, "the token is for once");
    assert!(world.plane.opening(0).await.dial < world.plane.opening(1).await.dial);
    until("the reports come again", async || {
        let came = world.plane.indexes();
        before.iter().all(|index| came.iter().filter(|one| *one == index).count() > 1).then_some(())
    })
    .await;
    world.plane.set_lease(60_000, true);

    world.plane.hang_up();
    world.plane.opening(2).await;
    assert!(get(&world, &mine, "/healthz").await.contains("\"ok\":true"), "a break of the stream changes nothing");
    world.clean_up(agent).await;
}
