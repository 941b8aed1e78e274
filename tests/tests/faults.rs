//! Parts are killed at random points of deploys and deletes. What was acknowledged holds, once, and nothing is left over.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use clawhq_tests::{Answer, Api, Census, Layout, Options, Platform, Role, run};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use reqwest::Method;
use serde_json::{Value, json};

/// Small slots and a small pool, so that warm, cold and refill all happen.
const TUNE: &str = "update tiers set warm_target = case name when 'free' then 4 else 0 end, memory_mib = 64,
    memory_burst_mib = 128, max_per_node = 1000, max_workloads = 10000, rate_per_min = 1000000 where name in ('free', 'pro', 'business')";
const CONTROL_PLANE: [Role; 4] = [Role::Api, Role::Worker, Role::PoolManager, Role::Edge];
/// Fewer tell nothing.
const KILLS_LEAST: usize = 5;
const CRASHES_LEAST: usize = 2;
/// Of one client's. While faults take long the clients go on, and what they keep must fit on a small machine.
const LIVING_MOST: usize = 20;
/// One request, tried again with the same key, must be answered within this, whatever is killed meanwhile.
const ACKNOWLEDGED_WITHIN: Duration = Duration::from_secs(180);

fn deploys() -> usize {
    if std::env::var_os("NIGHTLY").is_some_and(|value| value == "1") { 200 } else { 30 }
}

/// Printed, and given back as `CLAWHQ_TEST_SEED`, to see the same kills again.
fn seed() -> u64 {
    let seed = std::env::var("CLAWHQ_TEST_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(rand::random);
    println!("CLAWHQ_TEST_SEED={seed}");
    seed
}

/// What clients were told.
#[derive(Default)]
struct Told {
    /// Name to id, of every deploy that was acknowledged.
    deployed: BTreeMap<String, String>,
    /// Ids whose delete was acknowledged.
    deleted: Vec<String>,
    /// Requests that had to be repeated.
    repeats: usize,
}

/// Repeats a request until it is answered with a success (or, for a delete, with "there is no such thing").
async fn insist(api: &Api, method: Method, path: &str, body: Option<Value>, key: &str, told: &mut Told) -> Answer {
    let end = Instant::now() + ACKNOWLEDGED_WITHIN;
    let mut last = String::new();
    while Instant::now() < end {
        let headers = [("idempotency-key", key), ("prefer", "wait=5")];
        let call = api.try_call(method.clone(), path, body.clone(), &headers);
        match tokio::time::timeout(Duration::from_secs(20), call).await {
            Ok(Ok(answer)) if (200..300).contains(&answer.status) => return answer,
            Ok(Ok(answer)) if answer.status == 404 && method == Method::DELETE => return answer,
            Ok(Ok(answer)) => {
                let clean =
                    answer.header("content-type") == "application/problem+json" && answer.body["code"].is_string();
                let later = answer.status >= 500 || answer.body["code"] == "idempotency_in_progress";
                last = format!("{} {}", answer.status, answer.body);
                // Neither success nor "later": no repeat makes it better.
                assert!(clean && later, "{}: {last}", answer.what);
            }
            Ok(Err(error)) => last = format!("{error:#}"),
            Err(_) => last = "no answer within 20 s".to_owned(),
        }
        told.repeats += 1;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("{method} {path} was not answered within {ACKNOWLEDGED_WITHIN:?}: {last}");
}

/// How long the clients go on: for so many deploys, and for so many faults, or a quick machine would be through before
/// anything has happened to it.
struct Work {
    deploys: AtomicUsize,
    faults: AtomicUsize,
}

impl Work {
    fn of(least_faults: usize) -> Arc<Self> {
        Arc::new(Self { deploys: AtomicUsize::new(deploys()), faults: AtomicUsize::new(least_faults) })
    }

    /// Whether there is another deploy to be made.
    fn next(&self) -> bool {
        counted_down(&self.deploys) || self.faults.load(Ordering::SeqCst) > 0
    }
}

/// `false`: it was at zero.
fn counted_down(left: &AtomicUsize) -> bool {
    left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok()
}

/// One client: deploys, and deletes about half of it again and what is too much, while there is work.
async fn client(api: Api, number: usize, work: Arc<Work>, seed: u64) -> Told {
    let (mut random, mut told) = (StdRng::seed_from_u64(seed), Told::default());
    let mut living = Vec::new();
    for turn in 0u32.. {
        if !work.next() {
            break;
        }
        let name = format!("w{number}n{turn}");
        let body = json!({"name": name, "template": "hello", "config": {"env": {format!("MARK_{name}"): "1"}}});
        let key = format!("deploy-{name}");
        let answer = insist(&api, Method::POST, "/workloads", Some(body), &key, &mut told).await;
        let id = answer.body["workload"]["id"].as_str().unwrap_or_else(|| panic!("{}", answer.body)).to_owned();
        told.deployed.insert(name, id.clone());
        living.push(id);
        if random.random_bool(0.5) || living.len() > LIVING_MOST {
            let id = living.swap_remove(random.random_range(0..living.len()));
            insist(&api, Method::DELETE, &format!("/workloads/{id}"), None, &format!("delete-{id}"), &mut told).await;
            told.deleted.push(id);
        }
    }
    told
}

/// What must hold once everything is back.
async fn verify(platform: &mut Platform, api: &Api, told: &[Told]) {
    platform.ready(Duration::from_secs(60)).await.unwrap_or_else(|error| panic!("{error:#}"));
    let (mut living, mut all) = (BTreeMap::new(), 0);
    for told in told {
        all += told.deployed.len();
        living.extend(told.deployed.iter().filter(|(_, id)| !told.deleted.contains(id)));
    }
    // None lost: each runs, and is the one it was deployed as.
    for (name, id) in &living {
        let workload = api.wait(id, "running", Duration::from_secs(90)).await;
        let url = workload["url"].as_str().unwrap_or_else(|| panic!("{workload}"));
        let names = clawhq_tests::eventually(&format!("{name} answers"), Duration::from_secs(30), async || {
            match api.try_edge(url, "/env").await {
                Ok((200, names)) => Ok(names),
                other => Err(format!("{other:?}")),
            }
        })
        .await;
        let marks: Vec<&str> = names.split('"').filter(|name| name.starts_with("MARK_")).collect();
        assert_eq!(marks, [format!("MARK_{name}")], "somebody else's claim");
    }
    // None doubled, none undead.
    let rows = platform.number("select count(*) from workloads where name <> 'steady'").await.unwrap();
    assert_eq!(usize::try_from(rows).unwrap(), all, "a repeat made a second workload");
    // A delete is acknowledged before it is done; its workload is shown as going until then.
    let begun = Instant::now();
    clawhq_tests::eventually("the living are shown, and only they", Duration::from_secs(60), async || {
        let shown = api.workloads().await;
        let deleted = |workload: &Value| told.iter().any(|told| told.deleted.iter().any(|id| workload["id"] == **id));
        let (going, rest): (Vec<&Value>, Vec<&Value>) = shown.iter().partition(|workload| deleted(workload));
        assert_eq!(rest.len(), living.len() + 1, "living workloads went: {rest:?}");
        let states: Vec<&Value> = going.iter().map(|workload| &workload["state"]).collect();
        assert!(states.iter().all(|state| **state == "deleting"), "deleted workloads came back: {going:?}");
        if states.is_empty() { Ok(()) } else { Err(format!("{} are going still", states.len())) }
    })
    .await;
    println!("the deleted were gone after {:?} more", begun.elapsed());
    let claims = "select count(*) from (select org_id, workload_id from instances where ended_at is null \
                  group by 1, 2 having count(*) > 1) doubled";
    assert_eq!(platform.number(claims).await.unwrap(), 0, "a workload runs twice");
    // Nothing left over, on the machine or in the tables.
    let census = Census::settled(platform, Duration::from_secs(120)).await;
    let owned = platform.number("select count(*) from slots where org_id is not null and removed_at is null").await;
    assert_eq!(usize::try_from(owned.unwrap()).unwrap(), living.len() + 1, "{census:?}");
    let reserved = "select count(*) from nodes n where reserved_mib <> (select coalesce(sum(memory_mib), 0) from slots \
                    where node_id = n.id and removed_at is null)";
    assert_eq!(platform.number(reserved).await.unwrap(), 0, "a reservation was not given back");
    let repeats: usize = told.iter().map(|told| told.repeats).sum();
    println!("{all} deploys, {} of them living, {repeats} repeats", living.len());
}

/// Every process of the container that the org's only workload runs in, with its start.
async fn processes(platform: &Platform, api: &Api, workload: &str) -> Vec<String> {
    let sql = format!(
        "select container from slots s join instances i on i.id = s.instance_id join workloads w on w.id = i.workload_id \
         join orgs o on o.id = w.org_id where w.name = '{workload}' and o.slug = '{}' and s.removed_at is null",
        api.org
    );
    let container = platform.column(&sql).await.unwrap().pop().unwrap_or_else(|| panic!("{workload} has no container"));
    let pid = platform.docker(&["inspect", "-f", "{{.State.Pid}}", &container]).unwrap();
    let space = std::fs::read_link(format!("/proc/{}/ns/pid", pid.trim())).unwrap();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        if std::fs::read_link(entry.path().join("ns/pid")).is_ok_and(|other| other == space) {
            let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
            let (head, tail) = stat.rsplit_once(") ").unwrap_or_default();
            found.push(format!("{head}) started {}", tail.split(' ').nth(19).unwrap_or_default()));
        }
    }
    assert!(found.len() >= 2, "only {found:?} run in it");
    found.sort();
    found
}

async fn begin() -> (Platform, Api) {
    let options = Options { layout: Layout::Apart, tune: TUNE.to_owned(), ..Options::default() };
    let platform = Platform::start(options).await.unwrap_or_else(|error| panic!("{error:#}"));
    let api = platform.tenant("storm", "free").await.unwrap();
    platform.pool("hello", "free", 2, Duration::from_secs(30)).await;
    api.deploy(json!({"name": "steady", "template": "hello"})).await;
    (platform, api)
}

#[tokio::test(flavor = "multi_thread")]
async fn kills_lose_nothing_double_nothing_and_leave_nothing() {
    let seed = seed();
    let (mut platform, api) = begin().await;
    let steady = processes(&platform, &api, "steady").await;
    let work = Work::of(KILLS_LEAST);
    let clients: Vec<_> =
        (0..3).map(|number| tokio::spawn(client(api.clone(), number, work.clone(), seed + number as u64))).collect();
    let mut random = StdRng::seed_from_u64(seed);
    let mut kills = BTreeMap::<&str, usize>::new();
    while !clients.iter().all(|client| client.is_finished()) {
        // The random point.
        tokio::time::sleep(Duration::from_millis(random.random_range(50..1500))).await;
        let down = Duration::from_millis(random.random_range(0..400));
        let what = ["control plane", "node agent", "dockerd"][random.random_range(0..3)];
        *kills.entry(what).or_default() += 1;
        match what {
            "control plane" => CONTROL_PLANE.into_iter().for_each(|role| platform.kill_role(role)),
            "node agent" => platform.kill_role(Role::NodeAgent),
            _ => platform.kill_docker(),
        }
        tokio::time::sleep(down).await;
        match what {
            "control plane" => CONTROL_PLANE.into_iter().for_each(|role| platform.start_role(role).unwrap()),
            "node agent" => platform.start_role(Role::NodeAgent).unwrap(),
            _ => platform.start_docker().await.unwrap_or_else(|error| panic!("{error:#}")),
        }
        // Back before the next: what is killed over and over before it listens makes no progress, nor should it.
        platform.ready(Duration::from_secs(60)).await.unwrap_or_else(|error| panic!("{error:#}"));
        counted_down(&work.faults);
    }
    println!("killed: {kills:?}");
    assert!(kills.values().sum::<usize>() >= KILLS_LEAST, "too few kills to tell anything: {kills:?}");
    let mut told = Vec::new();
    for client in clients {
        told.push(client.await.unwrap());
    }
    verify(&mut platform, &api, &told).await;
    assert_eq!(processes(&platform, &api, "steady").await, steady, "a kill reached a container");
    platform.stop().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_of_postgresql_leaves_nothing_half_done() {
    let seed = seed();
    let (mut platform, api) = begin().await;
    let steady = processes(&platform, &api, "steady").await;
    let roles: Vec<_> = platform.layout.roles().iter().map(|role| (*role, platform.pid(*role))).collect();
    let work = Work::of(CRASHES_LEAST);
    let clients: Vec<_> =
        (0..3).map(|number| tokio::spawn(client(api.clone(), number, work.clone(), seed + number as u64))).collect();
    let mut random = StdRng::seed_from_u64(seed);
    let mut crashes = 0;
    while !clients.iter().all(|client| client.is_finished()) {
        tokio::time::sleep(Duration::from_millis(random.random_range(300..1500))).await;
        platform.crash_postgres();
        platform.start_postgres().await.unwrap_or_else(|error| panic!("{error:#}"));
        crashes += 1;
        platform.ready(Duration::from_secs(60)).await.unwrap_or_else(|error| panic!("{error:#}"));
        counted_down(&work.faults);
    }
    assert!(crashes >= CRASHES_LEAST, "too few crashes to tell anything");
    println!("{crashes} crashes");
    let mut told = Vec::new();
    for client in clients {
        told.push(client.await.unwrap());
    }
    verify(&mut platform, &api, &told).await;
    assert_eq!(processes(&platform, &api, "steady").await, steady, "a crash of the database reached a container");
    let now: Vec<_> = platform.layout.roles().iter().map(|role| (*role, platform.pid(*role))).collect();
    assert_eq!(now, roles);
    platform.stop().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_platform_takes_up_its_containers_again() {
    let (mut platform, api) = begin().await;
    let steady = processes(&platform, &api, "steady").await;
    for role in Layout::Apart.roles() {
        platform.stop_role(*role).unwrap_or_else(|error| panic!("{error:#}"));
    }
    // An unlabelled container of somebody else's, in the same daemon.
    let other = platform.docker(&["run", "-d", "--network", "none", "clawhq/hello:dev"]).unwrap();
    for role in Layout::Apart.roles() {
        platform.start_role(*role).unwrap();
    }
    platform.ready(Duration::from_secs(60)).await.unwrap();
    let shown = api.wait("steady", "running", Duration::from_secs(30)).await;
    // Rows and processes would look the same without a node agent. The way in and an exec need one that has taken it up.
    let url = shown["url"].as_str().unwrap_or_else(|| panic!("{shown}"));
    clawhq_tests::eventually("steady answers", Duration::from_secs(30), async || {
        match api.try_edge(url, "/env").await {
            Ok((200, _)) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    let version = api.exec("steady", &["/hello", "--version"]).await;
    assert_eq!(version["exit_code"], 0, "{version}");
    assert_eq!(processes(&platform, &api, "steady").await, steady);
    let running = platform.docker(&["inspect", "-f", "{{.State.Running}}", other.trim()]).unwrap();
    assert_eq!(running.trim(), "true", "a container that is not ours was touched");
    run(&["docker", "-H", &platform.docker_host(), "rm", "-f", other.trim()], &[]).unwrap();
    Census::settled(&platform, Duration::from_secs(60)).await;
    platform.stop().unwrap();
}
