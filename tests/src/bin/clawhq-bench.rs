//! Deploys and what belongs to them, measured beside `docker run` in the same run; a table, and `bench/results/deploy.json`.
//!
//! Each role runs in a process of its own, so that the node agent can be weighed and the pool manager stopped while
//! something else is measured. Tiers are rows: the tuning is in the result.

use std::collections::BTreeMap;
use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clawhq_tests::{Api, Layout, Options, Platform, Role, Spread, run, spread, usage};
use reqwest::Method;
use serde_json::{Value, json};

const TUNE: &str = "update tiers set warm_target = 0;
update tiers set memory_mib = 64, memory_burst_mib = 128, warm_target = 120, max_per_node = 1000, max_workloads = 10000,
                 rate_per_min = 1000000 where name = 'free';
update tiers set max_per_node = 1000, max_workloads = 10000, rate_per_min = 1000000 where name = 'business'";
const TUNED: &str = "tier free: memory_mib 64, memory_burst_mib 128, warm_target 120, max_per_node 1000, max_workloads 10000; \
                     tier business: warm_target 0, 2 for OpenClaw; app.pool_share_percent 80; API limits by address and org lifted; Docker daemon at nice 10, as ./dev up starts it";
const LONG: Duration = Duration::from_secs(180);
const IMAGE: &str = "clawhq/hello:dev";

/// A line of the result.
struct Row {
    what: String,
    unit: &'static str,
    ours: f64,
    /// Who else, and their figure.
    peer: Option<(&'static str, f64)>,
    /// In words, and whether it was met.
    goal: Option<(String, bool)>,
}

#[derive(Default)]
struct Report(Vec<Row>);

impl Report {
    fn add(&mut self, what: impl Into<String>, unit: &'static str, ours: f64, most: Option<f64>) {
        let goal = most.map(|most| (format!("<= {most}"), ours <= most));
        self.push(Row { what: what.into(), unit, ours, peer: None, goal });
    }

    fn push(&mut self, row: Row) {
        println!("{}", line(&row));
        self.0.push(row);
    }
}

fn line(row: &Row) -> String {
    let peer =
        row.peer.map_or(String::new(), |(name, theirs)| format!("{name} {theirs:.1}, ratio {:.3}", row.ours / theirs));
    let goal = match &row.goal {
        Some((goal, true)) => format!("goal {goal}: met"),
        Some((goal, false)) => format!("goal {goal}: MISSED"),
        None => String::new(),
    };
    format!("{:<66} {:>9.2} {:<8} {:<32} {}", row.what, row.ours, row.unit, peer, goal)
}

struct Bench {
    platform: Platform,
    api: Api,
    report: Report,
    made: u32,
}

/// What one deploy took, in milliseconds: until the API's answer, and until the workload's first byte.
struct Deploy {
    answer: f64,
    first_byte: f64,
    kind: String,
    /// What the API says each step took, milliseconds.
    steps: Vec<(String, f64)>,
    id: String,
    token: Option<String>,
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

async fn deploy(api: Api, body: Value, path: &'static str) -> Result<Deploy> {
    let begun = Instant::now();
    let answer = api.try_call(Method::POST, "/workloads", Some(body), &[("prefer", "wait=110")]).await?;
    let answered = ms(begun);
    ensure!(answer.status == 201, "{} {}", answer.status, answer.body);
    let url = answer.body["access"]["url"].as_str().context("no address")?;
    let (status, body) = api.try_edge(url, path).await?;
    let first_byte = ms(begun);
    ensure!(status == 200, "{url}{path} answered {status}: {}", &body[..body.len().min(300)]);
    let text = |value: &Value| value.as_str().map(str::to_owned);
    Ok(Deploy {
        answer: answered,
        first_byte,
        kind: text(&answer.body["placement"]["kind"]).unwrap_or_default(),
        steps: answer.body["placement"]["steps"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|step| Some((text(&step["name"])?, step["ms"].as_f64()?)))
            .collect(),
        id: text(&answer.body["workload"]["id"]).context("no id")?,
        token: text(&answer.body["access"]["token"]),
    })
}

impl Bench {
    fn hello(&mut self, warm: &str) -> Value {
        self.made += 1;
        json!({"name": format!("h{}", self.made), "template": "hello", "warm": warm})
    }

    /// One after the other, at least `every` apart.
    async fn one_by_one(&mut self, count: usize, every: Duration, warm: &str) -> Result<Vec<Deploy>> {
        let mut done = Vec::new();
        for _ in 0..count {
            let next = Instant::now() + every;
            let body = self.hello(warm);
            done.push(deploy(self.api.clone(), body, "/healthz").await?);
            tokio::time::sleep_until(next.into()).await;
        }
        Ok(done)
    }

    async fn delete_all(&self) -> Result<()> {
        for workload in self.api.workloads().await {
            let id = workload["id"].as_str().context("id")?;
            let answer = self.api.call(Method::DELETE, &format!("/workloads/{id}"), None, &[]).await;
            ensure!(answer.status < 300, "{} {}", answer.status, answer.body);
        }
        clawhq_tests::eventually("everything is deleted", LONG, async || {
            match self
                .platform
                .number("select count(*) from slots where org_id is not null and removed_at is null")
                .await
            {
                Ok(0) => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await;
        Ok(())
    }

    /// Has somebody refill the pool.
    fn refilled(&mut self) -> Result<()> {
        match self.platform.pid(Role::PoolManager) {
            Some(_) => Ok(()),
            None => self.platform.start_role(Role::PoolManager),
        }
    }

    /// Waits until a statement counts so many.
    async fn counted(&self, what: &str, sql: &str, wanted: i64) {
        clawhq_tests::eventually(what, LONG, async || match self.platform.number(sql).await {
            Ok(counted) if counted == wanted => Ok(()),
            other => Err(format!("{other:?}")),
        })
        .await;
    }

    /// Waits until the pool is full, and then has nobody refill it.
    async fn full_and_still(&mut self, ready: i64) -> Result<()> {
        self.filled("hello", "free", ready).await
    }

    async fn filled(&mut self, template: &str, tier: &str, ready: i64) -> Result<()> {
        self.refilled()?;
        self.platform.pool(template, tier, ready, LONG).await;
        self.platform.stop_role(Role::PoolManager)
    }

    /// How fast slots became ready lately, a second.
    async fn refill_rate(&self, since: &str) -> Result<f64> {
        let sql = format!(
            "select coalesce((1000 * (count(*) - 1) / nullif(extract(epoch from max(ready_at) - min(ready_at)), 0))::bigint, 0) \
             from slots where template = 'hello' and ready_at > '{since}'"
        );
        Ok(self.platform.number(&sql).await? as f64 / 1e3)
    }

    async fn now(&self) -> Result<String> {
        self.platform.column("select now()::text").await?.pop().context("no time")
    }

    /// `docker run` of the same image on a bridge of the same daemon, until its first byte.
    fn docker_run(&mut self, count: usize) -> Result<Vec<f64>> {
        let mut sample = Vec::new();
        for index in 0..count {
            let address = format!("10.231.77.{}", 10 + index);
            let begun = Instant::now();
            let id = self.platform.docker(&["run", "-d", "--network", "bench", "--ip", &address, IMAGE])?;
            let peer: SocketAddr = format!("{address}:8080").parse()?;
            first_byte(peer, Duration::from_secs(20))?;
            sample.push(ms(begun));
            self.platform.docker(&["rm", "-f", id.trim()])?;
        }
        Ok(sample)
    }
}

fn first_byte(peer: SocketAddr, within: Duration) -> Result<()> {
    use std::io::{Read as _, Write as _};
    let end = Instant::now() + within;
    loop {
        let asked = TcpStream::connect_timeout(&peer, Duration::from_millis(500)).and_then(|mut stream| {
            stream.set_read_timeout(Some(Duration::from_secs(1)))?;
            stream.write_all(b"GET /healthz HTTP/1.0\r\nhost: x\r\n\r\n")?;
            stream.read_exact(&mut [0])
        });
        match asked {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() > end => return Err(error).with_context(|| peer.to_string()),
            Err(_) => std::thread::sleep(Duration::from_micros(300)),
        }
    }
}

fn figures(deploys: &[Deploy]) -> (Spread, Spread, BTreeMap<&str, usize>) {
    let mut kinds = BTreeMap::new();
    for deploy in deploys {
        *kinds.entry(deploy.kind.as_str()).or_default() += 1;
    }
    let of = |pick: fn(&Deploy) -> f64| spread(&deploys.iter().map(pick).collect::<Vec<_>>());
    (of(|deploy| deploy.first_byte), of(|deploy| deploy.answer), kinds)
}

#[tokio::main]
async fn main() -> Result<()> {
    let options = Options {
        layout: Layout::Apart,
        env: vec![("CLAWHQ_APP__POOL_SHARE_PERCENT", "80".to_owned())],
        tune: TUNE.to_owned(),
        images: vec!["clawhq/openclaw:dev".to_owned()],
    };
    println!("Starting a ClawHQ of this benchmark's own.\n{TUNED}\n");
    let platform = Platform::start(options).await?;
    let machine = machine(&platform)?;
    println!("{machine}\n");
    let api = platform.tenant("bench", "free").await?;
    let mut bench = Bench { platform, api, report: Report::default(), made: 0 };
    let mut failures = Vec::new();
    // Names of parts, when not all are wanted; nothing is written then.
    let only: Vec<String> = std::env::args().skip(1).collect();
    // A run that was cut short leaves its bridge, which would take this one's packets.
    for line in run(&["ip", "-o", "-4", "addr", "show"], &[])?.lines().filter(|line| line.contains(" 10.231.77.1/")) {
        if let Some(bridge) = line.split_whitespace().nth(1).filter(|name| name.starts_with("br-")) {
            run(&["ip", "link", "del", bridge], &[])?;
        }
    }
    bench.platform.docker(&["network", "create", "--subnet", "10.231.77.0/24", "bench"])?;
    // Each part stands alone: one that fails is said, and the others still measured.
    macro_rules! part {
        ($name:ident) => {
            if (only.is_empty() || only.iter().any(|one| one == stringify!($name)))
                && let Err(error) = $name(&mut bench).await
            {
                println!("{}: FAILED: {error:#}", stringify!($name));
                failures.push(format!("{}: {error:#}", stringify!($name)));
            }
        };
    }
    part!(refill_alone);
    part!(warm_quiet);
    part!(warm_beside_refill);
    part!(hundred_at_once);
    part!(cold);
    part!(reads);
    part!(node_agent_idle);
    if bench.platform.has_image("clawhq/openclaw:dev") {
        part!(openclaw);
    } else {
        println!("OpenClaw is not measured: the image clawhq/openclaw:dev is not there.");
        failures.push("openclaw: the image clawhq/openclaw:dev was not there".to_owned());
    }
    bench.platform.docker(&["network", "rm", "bench"])?;
    if only.is_empty() {
        write(&machine, &bench.report.0, &failures)?;
    }
    println!("\n{machine}\n{TUNED}\n");
    for row in &bench.report.0 {
        println!("{}", line(row));
    }
    bench.platform.stop()?;
    ensure!(failures.is_empty(), "not measured: {}", failures.join("; "));
    Ok(())
}

async fn refill_alone(bench: &mut Bench) -> Result<()> {
    let since = bench.now().await?;
    bench.full_and_still(120).await?;
    let rate = bench.refill_rate(&since).await?;
    bench.report.push(Row {
        what: "refill, nothing beside it".to_owned(),
        unit: "slots/s",
        ours: rate,
        peer: None,
        goal: Some((">= 4".to_owned(), rate >= 4.0)),
    });
    Ok(())
}

async fn warm_quiet(bench: &mut Bench) -> Result<()> {
    let mut theirs = bench.docker_run(8)?;
    // The first of a connection, a plan and a cache is nobody's steady state.
    bench.one_by_one(3, Duration::ZERO, "require").await?;
    let done = bench.one_by_one(80, Duration::ZERO, "require").await?;
    theirs.extend(bench.docker_run(8)?);
    let (all, answer, _) = figures(&done);
    let theirs = spread(&theirs);
    for (what, ours, theirs, most) in [("p50", all.p50, theirs.p50, 8.0), ("p99", all.p99, theirs.p99, 25.0)] {
        bench.report.push(Row {
            what: format!("warm hello, request to first byte, {what} of {}", all.count),
            unit: "ms",
            ours,
            peer: Some(("docker run", theirs)),
            goal: Some((format!("<= {most}"), ours <= most)),
        });
    }
    let times = theirs.p50 / all.p50;
    let goal = Some((">= 25".to_owned(), times >= 25.0));
    bench.report.push(Row {
        what: "warm hello, times as fast as docker run".to_owned(),
        unit: "x",
        ours: times,
        peer: None,
        goal,
    });
    bench.report.add("warm hello, request to the API's answer, p50", "ms", answer.p50, None);
    bench.report.add("warm hello, request to the API's answer, p99", "ms", answer.p99, None);
    let mut steps = BTreeMap::<&str, Vec<f64>>::new();
    for (name, ms) in done.iter().flat_map(|deploy| &deploy.steps) {
        steps.entry(name).or_default().push(*ms);
    }
    for (name, sample) in steps {
        bench.report.add(format!("  of it the step {name}, p50"), "ms", spread(&sample).p50, None);
    }
    bench.delete_all().await
}

async fn warm_beside_refill(bench: &mut Bench) -> Result<()> {
    bench.full_and_still(120).await?;
    bench.one_by_one(40, Duration::ZERO, "require").await?;
    let since = bench.now().await?;
    bench.platform.start_role(Role::PoolManager)?;
    bench.platform.pool("hello", "free", 81, LONG).await;
    let done = bench.one_by_one(100, Duration::from_millis(200), "require").await?;
    let rate = bench.refill_rate(&since).await?;
    let (all, ..) = figures(&done);
    bench.report.add(format!("warm hello beside refill, first byte, p50 of {}", all.count), "ms", all.p50, None);
    bench.report.add(format!("warm hello beside refill, first byte, p99 of {}", all.count), "ms", all.p99, Some(50.0));
    let goal = Some((">= 4".to_owned(), rate >= 4.0));
    bench.report.push(Row { what: "refill beside claims".to_owned(), unit: "slots/s", ours: rate, peer: None, goal });
    bench.delete_all().await
}

async fn hundred_at_once(bench: &mut Bench) -> Result<()> {
    // Full, and the pool manager stays: it refills meanwhile as it sees fit.
    bench.refilled()?;
    bench.platform.pool("hello", "free", 120, LONG).await;
    let bodies: Vec<Value> = (0..100).map(|_| bench.hello("prefer")).collect();
    let calls = bodies.into_iter().map(|body| tokio::spawn(deploy(bench.api.clone(), body, "/healthz")));
    let results: Vec<_> = futures::future::join_all(calls).await.into_iter().map(|joined| joined?).collect();
    let failed: Vec<String> =
        results.iter().filter_map(|result| Some(format!("{:#}", result.as_ref().err()?))).collect();
    let done: Vec<Deploy> = results.into_iter().filter_map(Result::ok).collect();
    let (all, _, kinds) = figures(&done);
    bench.report.add(format!("100 at once ({kinds:?}), first byte, p50"), "ms", all.p50, None);
    bench.report.add("100 at once, first byte, p99", "ms", all.p99, Some(400.0));
    bench.report.add("100 at once, failed or refused", "deploys", failed.len() as f64, Some(0.0));
    if let Some(first) = failed.first() {
        println!("  the first of them: {first}");
    }
    bench.delete_all().await
}

async fn cold(bench: &mut Bench) -> Result<()> {
    bench.full_and_still(100).await?;
    bench.one_by_one(2, Duration::ZERO, "never").await?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..4 {
        theirs.extend(bench.docker_run(4)?);
        ours.extend(bench.one_by_one(4, Duration::ZERO, "never").await?);
    }
    let (all, ..) = figures(&ours);
    let theirs = spread(&theirs);
    let met = all.p50 <= 1.3 * theirs.p50;
    bench.report.push(Row {
        what: format!("cold hello, request to first byte, p50 of {}", all.count),
        unit: "ms",
        ours: all.p50,
        peer: Some(("docker run", theirs.p50)),
        goal: Some(("ratio <= 1.3".to_owned(), met)),
    });
    bench.delete_all().await
}

async fn reads(bench: &mut Bench) -> Result<()> {
    const PER_SECOND: u32 = 500;
    const SECONDS: u32 = 10;
    let some = bench.one_by_one(20, Duration::ZERO, "prefer").await?;
    let paths: Vec<String> = some
        .iter()
        .map(|deploy| format!("/workloads/{}", deploy.id))
        .chain(["/workloads?limit=20".to_owned(), "/events?limit=50".to_owned(), "/secrets".to_owned()])
        .collect();
    // Open loop: a request is timed from when it was due, whether or not an earlier one is still out.
    let begun = Instant::now() + Duration::from_millis(50);
    let mut calls = Vec::new();
    for index in 0..PER_SECOND * SECONDS {
        let due = begun + Duration::from_secs(1) * index / PER_SECOND;
        tokio::time::sleep_until(due.into()).await;
        let (api, path) = (bench.api.clone(), paths[index as usize % paths.len()].clone());
        calls.push(tokio::spawn(async move {
            let answer = api.try_call(Method::GET, &path, None, &[]).await?;
            ensure!(answer.status == 200, "{path}: {} {}", answer.status, answer.body);
            Ok(ms(due))
        }));
    }
    let mut sample = Vec::new();
    for call in calls {
        sample.push(call.await??);
    }
    let all = spread(&sample);
    bench.report.add(format!("API reads at {PER_SECOND} a second, p50 of {}", all.count), "ms", all.p50, None);
    bench.report.add(format!("API reads at {PER_SECOND} a second, p99 of {}", all.count), "ms", all.p99, Some(10.0));
    bench.delete_all().await
}

async fn node_agent_idle(bench: &mut Bench) -> Result<()> {
    // What the pool has too many of is claimed and given back.
    bench.platform.execute("update tiers set warm_target = 50 where name = 'free'").await?;
    let have =
        bench.platform.number("select count(*) from slots where removed_at is null and observed = 'waiting'").await?;
    // The pool manager may be taking the same ones away by itself.
    bench.one_by_one(usize::try_from(have - 50).unwrap_or(0), Duration::ZERO, "prefer").await?;
    bench.delete_all().await?;
    bench.refilled()?;
    let waiting =
        "select case when bool_and(observed = 'waiting') then count(*) else -1 end from slots where removed_at is null";
    bench.counted("50 containers, and nothing on its way in or out", waiting, 50).await;
    let pid = bench.platform.pid(Role::NodeAgent).context("no node agent")?;
    let before = usage(pid)?;
    const LOOK: Duration = Duration::from_secs(20);
    tokio::time::sleep(LOOK).await;
    let after = usage(pid)?;
    let cpu = 100.0 * (after.cpu_s - before.cpu_s) / LOOK.as_secs_f64();
    bench.report.add(
        "node agent (own process) with 50 containers, RSS",
        "MiB",
        after.rss_kib as f64 / 1024.0,
        Some(25.0),
    );
    bench.report.add("node agent (own process) with 50 containers, CPU", "%", cpu, Some(1.0));

    // An idle slot: the init and all that its cgroup is charged for, and Docker's shim beside it.
    let ids = bench.platform.docker(&["ps", "-q", "--no-trunc"])?;
    let (mut init, mut charged) = (Vec::new(), Vec::new());
    for id in ids.split_whitespace() {
        let pid: u32 = bench.platform.docker(&["inspect", "-f", "{{.State.Pid}}", id])?.trim().parse()?;
        init.push(usage(pid)?.pss_kib as f64 / 1024.0);
        if let Some(bytes) = charged_to(pid) {
            charged.push(bytes as f64 / 1048576.0);
        }
    }
    let root = bench.platform.data.parent().context("root")?.display().to_string();
    let shims: Vec<f64> = clawhq_tests::pids_mentioning(&format!("{root}/docker/exec"))
        .into_iter()
        .filter(|pid| {
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.starts_with("containerd-shim"))
        })
        .filter_map(|pid| Some(usage(pid).ok()?.pss_kib as f64 / 1024.0))
        .collect();
    bench.report.push(Row {
        what: "idle exec slot, charged to its cgroup, p50".to_owned(),
        unit: "MiB",
        ours: spread(&charged).p50,
        peer: Some(("shim PSS", spread(&shims).p50)),
        goal: Some(("<= 1.5".to_owned(), spread(&charged).p50 <= 1.5)),
    });
    bench.report.add("idle exec slot, the init's PSS, p50", "MiB", spread(&init).p50, None);
    Ok(())
}

/// Memory charged to a process's cgroup, bytes.
fn charged_to(pid: u32) -> Option<u64> {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    groups.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        let file = match controllers {
            "" => format!("/sys/fs/cgroup{path}/memory.current"),
            _ if controllers.split(',').any(|name| name == "memory") => {
                format!("/sys/fs/cgroup/memory{path}/memory.usage_in_bytes")
            }
            _ => return None,
        };
        fs::read_to_string(file).ok()?.trim().parse().ok()
    })
}

async fn openclaw(bench: &mut Bench) -> Result<()> {
    // The template keeps two at most.
    let sql = "update tiers set warm_target = 0 where name = 'free'; update tiers set warm_target = 2 where name = 'business'";
    bench.platform.execute(sql).await?;
    let api = bench.platform.tenant("claws", "business").await?;
    let (mut answered, mut first, mut refilling) = (Vec::new(), Vec::new(), Vec::new());
    let client = reqwest::Client::builder().no_proxy().build()?;
    let edge = bench.platform.edge;
    let one = async |warm: &str, name: String| -> Result<(f64, f64)> {
        let begun = Instant::now();
        let body = json!({"name": name, "template": "openclaw", "warm": warm});
        let done = deploy(api.clone(), body, "/healthz").await?;
        let token = done.token.as_deref().context("no token was shown")?;
        let url = format!("http://{edge}/tools/invoke");
        let host = format!("{name}-{}.localhost", api.org);
        let ask = json!({"tool": "sessions_list", "args": {}});
        let answer = client.post(url).header("host", host).bearer_auth(token).json(&ask).send().await?;
        let (status, text) = (answer.status(), answer.text().await?);
        ensure!(status.is_success(), "a call with the token answered {status}: {}", &text[..text.len().min(300)]);
        let took = ms(begun);
        api.delete_workload(&done.id, LONG).await;
        Ok((done.answer, took))
    };
    bench.filled("openclaw", "business", 2).await?;
    bench.platform.start_role(Role::PoolManager)?;
    let hello = "select count(*) from slots where removed_at is null and template = 'hello' and tier = 'free'";
    bench.counted("the slots of hello are gone", hello, 0).await;
    // As with hello: the pool is full and nothing is made beside.
    for round in 0..8 {
        bench.filled("openclaw", "business", 2).await?;
        for index in 0..2 {
            let (answer, took) = one("require", format!("w{round}{index}")).await?;
            answered.push(answer);
            first.push(took);
        }
    }
    // And while another OpenClaw starts, which takes both processors for ten seconds.
    bench.platform.start_role(Role::PoolManager)?;
    for index in 0..4 {
        bench.platform.pool("openclaw", "business", 1, LONG).await;
        refilling.push(one("require", format!("r{index}")).await?.1);
    }
    bench.platform.stop_role(Role::PoolManager)?;
    let mut cold = Vec::new();
    for index in 0..2 {
        cold.push(one("never", format!("c{index}")).await?.1);
    }
    let (all, cold) = (spread(&first), spread(&cold));
    for (name, ours, most) in [("p50", all.p50, 60.0), ("p99", all.p99, 300.0)] {
        bench.report.push(Row {
            what: format!("warm OpenClaw, request to authenticated answer, {name} of {}", all.count),
            unit: "ms",
            ours,
            peer: Some(("cold", cold.p50)),
            goal: Some((format!("<= {most}"), ours <= most)),
        });
    }
    bench.report.add("warm OpenClaw, request to the API's answer, p50", "ms", spread(&answered).p50, None);
    let beside = spread(&refilling);
    let what = format!("warm OpenClaw while another one starts, authenticated answer, p50 of {}", beside.count);
    bench.report.add(what, "ms", beside.p50, None);
    Ok(())
}

fn machine(platform: &Platform) -> Result<String> {
    let memory = fs::read_to_string("/proc/meminfo")?;
    let kib: u64 = memory.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).unwrap_or_default();
    let cpu = fs::read_to_string("/proc/cpuinfo")?;
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("unknown processor");
    Ok(format!(
        "{} cores ({}), {:.0} GiB, Linux {}, Docker {}, PostgreSQL {} with fsync, programs as ./dev up builds them",
        std::thread::available_parallelism()?,
        model.trim_start_matches(['\t', ' ', ':']),
        kib as f64 / 1048576.0,
        fs::read_to_string("/proc/sys/kernel/osrelease")?.trim(),
        platform.docker(&["version", "-f", "{{.Server.Version}}"])?.trim(),
        run(&["psql", "--version"], &[])?.split_whitespace().nth(2).unwrap_or_default(),
    ))
}

fn write(machine: &str, rows: &[Row], failures: &[String]) -> Result<()> {
    let root = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    let git = ["git", "-C", root.to_str().context("path")?];
    let commit = run(&[&git[..], &["rev-parse", "--short=12", "HEAD"]].concat(), &[]).unwrap_or_default();
    let dirty = run(&[&git[..], &["status", "--porcelain", "--untracked-files=no"]].concat(), &[]).unwrap_or_default();
    let commit = format!("{}{}", commit.trim(), if dirty.trim().is_empty() { "" } else { " with changes" });
    let round = |value: f64| (value * 1000.0).round() / 1000.0;
    let rows: Vec<Value> = rows
        .iter()
        .map(|row| {
            json!({
                "what": row.what, "unit": row.unit, "ours": round(row.ours),
                "peer": row.peer.map(|(name, _)| name), "theirs": row.peer.map(|(_, theirs)| round(theirs)),
                "ratio": row.peer.map(|(_, theirs)| round(row.ours / theirs)),
                "goal": row.goal.as_ref().map(|(goal, _)| goal), "met": row.goal.as_ref().map(|(_, met)| met),
            })
        })
        .collect();
    let report =
        json!({"machine": machine, "commit": commit, "settings": TUNED, "rows": rows, "not_measured": failures});
    let dir = root.join("bench/results");
    fs::create_dir_all(&dir)?;
    fs::write(dir.join("deploy.json"), serde_json::to_string_pretty(&report)? + "\n")?;
    Ok(())
}
