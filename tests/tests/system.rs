//! A whole ClawHQ through its public API: what a person does first, what goes wrong, and who may reach whom.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use clawhq_tests::{Api, Census, Options, Platform, eventually, run};
use futures::{SinkExt as _, StreamExt as _};
use reqwest::Method;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

const SOON: Duration = Duration::from_secs(30);

/// Few warm slots, so that two cores are not busy with what no test looks at.
const SMALL_POOL: &str = "update tiers set warm_target = case name when 'free' then 2 else 0 end";

async fn platform() -> Platform {
    let options = Options { tune: SMALL_POOL.to_owned(), ..Options::default() };
    Platform::start(options).await.unwrap_or_else(|error| panic!("{error:#}"))
}

fn random() -> String {
    format!("{:032x}", rand::random::<u128>())
}

/// Every file below `dir` that has the bytes of `text` in it, and how many were looked at.
fn files_with(dir: &Path, text: &str) -> (Vec<String>, usize) {
    let (mut found, mut seen, mut pending) = (Vec::new(), 0, vec![dir.to_owned()]);
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let Ok(kind) = entry.file_type() else { continue };
            if kind.is_dir() {
                pending.push(entry.path());
            } else if kind.is_file()
                && let Ok(bytes) = fs::read(entry.path())
            {
                seen += 1;
                if bytes.windows(text.len()).any(|window| window == text.as_bytes()) {
                    found.push(entry.path().display().to_string());
                }
            }
        }
    }
    (found, seen)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workload_from_sign_up_until_nothing_is_left() {
    let platform = platform().await;
    platform.pool("hello", "free", 1, SOON).await;
    let api = platform.tenant("ada", "free").await.unwrap();

    // A secret goes in, and never comes back out of the API.
    let secret = random();
    let set = api.call(Method::PUT, "/secrets/TOKEN", Some(json!({"value": secret})), &[]).await.ok();
    assert_eq!((set["name"].as_str(), set["version"].as_i64()), (Some("TOKEN"), Some(1)));

    // Warm, and answering when the API says so.
    let config = json!({"env": {"GREETING": "one"}, "secrets": [
        {"name": "TOKEN", "env": "TOKEN"}, {"name": "TOKEN", "file": "/run/secrets/token"}]});
    let deployed = api.deploy(json!({"name": "first", "template": "hello", "warm": "require", "config": config})).await;
    assert_eq!(deployed["placement"]["kind"], "warm", "{deployed}");
    assert_eq!(deployed["workload"]["state"], "running", "{deployed}");
    assert!(!deployed["placement"]["steps"].as_array().unwrap().is_empty(), "{deployed}");
    let url = deployed["access"]["url"].as_str().unwrap().to_owned();
    let id = deployed["workload"]["id"].as_str().unwrap().to_owned();
    assert_eq!(api.edge(&url, "/healthz").await, (200, "{\"ok\":true}".to_owned()));
    let (status, names) = api.edge(&url, "/env").await;
    assert_eq!(status, 200);
    assert!(names.contains("GREETING") && names.contains("TOKEN"), "{names}");

    // WebSocket through the edge.
    let mut socket = api.edge_websocket(&url, "/ws").await.unwrap();
    let greeting = socket.next().await.unwrap().unwrap().into_text().unwrap();
    assert!(greeting.starts_with("Hello from"), "{greeting}");
    socket.send(Message::text("there and back")).await.unwrap();
    assert_eq!(socket.next().await.unwrap().unwrap().into_text().unwrap().as_str(), "there and back");
    socket.close(None).await.unwrap();

    // Commands and their ends; the secret is where it was asked for.
    let exec = api.exec("first", &["/hello", "exit", "7"]).await;
    assert_eq!(exec["exit_code"], 7, "{exec}");
    for argv in [["/hello", "env", "TOKEN"], ["/hello", "cat", "/run/secrets/token"]] {
        let exec = api.exec("first", &argv).await;
        assert_eq!(exec["stdout"].as_str().unwrap().trim_end(), secret, "{argv:?}");
    }
    let ask = json!({"argv": ["/hello", "cat"], "stdin": "piped in"});
    assert_eq!(api.post("/workloads/first/exec", Some(ask)).await.ok()["stdout"], "piped in");

    // Logs as a list, and as a stream that goes on and says why it ends.
    let logs = eventually("the first line", SOON, async || {
        let logs = api.get("/workloads/first/logs?tail=100").await.ok();
        if logs["items"].to_string().contains("is listening") { Ok(logs) } else { Err(logs.to_string()) }
    })
    .await;
    assert_eq!(logs["items"][0]["stream"], "stdout");
    assert!(logs["end"]["reason"].is_string(), "{logs}");
    let mut stream = api.stream("/workloads/first/logs/stream?follow=true&tail=0").await.unwrap();
    eventually("a line that is written now", SOON, async || {
        api.edge(&url, "/echo-not-there").await;
        let next = tokio::time::timeout(Duration::from_millis(500), stream.next()).await.map_err(|_| "silence")?;
        let (kind, line) = next.map_err(|error| format!("{error:#}"))?.ok_or("ended")?;
        let there = kind == "log" && line["line"].as_str().unwrap_or_default().contains("/echo-not-there");
        if there { Ok(()) } else { Err(format!("{kind} {line}")) }
    })
    .await;

    nothing_tells(&platform, &api, "first", &secret).await;

    // A new release: what would change, then the change.
    let ask = json!({"config": {"env": {"GREETING": "two"}, "secrets": [{"name": "TOKEN", "env": "TOKEN"}]}});
    let dry = api.call(Method::PATCH, "/workloads/first?dry_run=true", Some(ask.clone()), &[]).await.ok();
    let change = dry["diff"].as_array().unwrap().iter().find(|change| change["field"] == "env.GREETING").cloned();
    assert_eq!(change, Some(json!({"field": "env.GREETING", "before": "one", "after": "two"})), "{dry}");
    assert!(!dry.to_string().contains(&secret));
    assert_eq!(api.get("/workloads/first").await.ok()["release"]["number"], 1, "a dry run changed something");
    let stale = api.call(Method::PATCH, "/workloads/first", Some(ask.clone()), &[("if-match", "\"0\"")]).await;
    assert_eq!(stale.problem(412), "precondition_failed");
    api.call(Method::PATCH, "/workloads/first", Some(ask), &[("prefer", "wait=30")]).await.ok();
    eventually("the second release runs", SOON, async || {
        let now = api.get("/workloads/first").await.ok();
        let runs = now["state"] == "running"
            && now["release"]["number"] == 2
            && now["instance"]["release_id"] == now["release"]["id"];
        if runs { Ok(()) } else { Err(now.to_string()) }
    })
    .await;
    assert_eq!(api.exec("first", &["/hello", "env", "GREETING"]).await["stdout"].as_str().unwrap().trim_end(), "two");
    let ended = tokio::time::timeout(SOON, async {
        loop {
            match stream.next().await.unwrap() {
                Some((kind, data)) if kind == "end" => return data,
                Some(_) => {}
                None => panic!("the stream ended without saying why"),
            }
        }
    });
    assert!(ended.await.unwrap()["reason"].is_string());

    // The same container goes on after a restart, with its own claim.
    let before = api.get("/workloads/first").await.ok();
    api.post("/workloads/first/restart", None).await.ok();
    let after = eventually("it was restarted", SOON, async || {
        let now = api.get("/workloads/first").await.ok();
        let anew = now["instance"]["started_at"] != before["instance"]["started_at"] && now["state"] == "running";
        if anew { Ok(now) } else { Err(now.to_string()) }
    })
    .await;
    assert_eq!(after["instance"]["id"], before["instance"]["id"]);
    assert_eq!(api.exec("first", &["/hello", "env", "TOKEN"]).await["stdout"].as_str().unwrap().trim_end(), secret);

    // Stopped: nothing runs, and the address says so. Started: another container.
    api.post("/workloads/first/stop", None).await.ok();
    api.wait("first", "stopped", SOON).await;
    let (status, page) = api.edge(&url, "/healthz").await;
    assert_eq!(status, 503, "{page}");
    assert!(page.to_lowercase().contains("stopped"), "{page}");
    assert_eq!(api.post("/workloads/first/exec", Some(json!({"argv": ["/hello"]}))).await.problem(409), "not_running");
    api.post("/workloads/first/start", None).await.ok();
    let again = api.wait("first", "running", SOON).await;
    assert_ne!(again["instance"]["id"], before["instance"]["id"]);
    assert_eq!(api.edge(&url, "/healthz").await.0, 200);

    // What happened is told, in order.
    let events = api.get("/workloads/first/events?limit=200").await.ok();
    let seqs: Vec<i64> = events["items"].as_array().unwrap().iter().filter_map(|event| event["seq"].as_i64()).collect();
    assert!(seqs.len() >= 4 && (seqs.is_sorted() || seqs.iter().rev().is_sorted()), "{events}");

    api.delete_workload(&id, SOON).await;
    assert_eq!(api.get("/workloads/first").await.problem(404), "not_found");
    assert_ne!(api.edge(&url, "/healthz").await.0, 200);
    let census = Census::settled(&platform, SOON).await;
    let owned = platform.number("select count(*) from slots where org_id is not null and removed_at is null").await;
    assert_eq!(owned.unwrap(), 0, "{census:?}");
    platform.stop().unwrap();
}

/// The value of a secret is in no place that outlives the process or that others may read.
async fn nothing_tells(platform: &Platform, api: &Api, workload: &str, secret: &str) {
    let ids = platform.docker(&["ps", "-aq"]).unwrap();
    let ids: Vec<&str> = ids.split_whitespace().collect();
    let inspected = platform.docker(&[&["inspect"], ids.as_slice()].concat()).unwrap();
    assert!(inspected.contains("clawhq.slot") && !inspected.contains(secret), "docker inspect tells");
    let dump = platform.dump().unwrap();
    assert!(dump.contains("TOKEN") && !dump.contains(secret), "the database tells");
    // All of it: data directory, logs, Docker's files, PostgreSQL's files with their log of changes.
    let root = platform.data.parent().unwrap();
    let (found, seen) = files_with(root, secret);
    assert!(seen > 500, "only {seen} files were looked at");
    assert_eq!(found, Vec::<String>::new());
    for path in ["", "/releases", "/instances", "/events", "/logs"] {
        let answer = api.get(&format!("/workloads/{workload}{path}")).await.ok();
        assert!(!answer.to_string().contains(secret), "{path} tells");
    }
    for path in ["/secrets", "/secrets/TOKEN/versions", "/events"] {
        assert!(!api.get(path).await.ok().to_string().contains(secret), "{path} tells");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_done_is_refused_and_leaves_nothing() {
    let platform = platform().await;
    let api = platform.tenant("eve", "free").await.unwrap();
    let long = "a".repeat(1_000_000);
    let table: &[(&str, Value, u16, &str, &str)] = &[
        ("unknown template", json!({"template": "hullo"}), 422, "template_unknown", "/template"),
        ("a name of 1 MB", json!({"name": long, "template": "hello"}), 422, "name_invalid", "/name"),
        ("an invalid name", json!({"name": "No Spaces", "template": "hello"}), 422, "name_invalid", "/name"),
        ("an invalid image", json!({"image": "not an//image"}), 422, "image_invalid", "/image"),
        ("a wrong type", json!({"name": 5, "template": "hello"}), 422, "invalid_body", "/name"),
        (
            "a wrong type inside",
            json!({"template": "hello", "config": {"env": ["A=B"]}}),
            422,
            "invalid_body",
            "/config/env",
        ),
        ("an unknown field", json!({"template": "hello", "nmae": "x"}), 422, "invalid_body", "/nmae"),
        ("neither template nor image", json!({"name": "x"}), 422, "invalid_body", ""),
        ("an unknown tier", json!({"template": "hello", "tier": "huge"}), 422, "tier_unknown", "/tier"),
        ("a tier above", json!({"template": "hello", "tier": "pro"}), 422, "tier_not_included", "/tier"),
        (
            "an unknown secret",
            json!({"template": "hello", "config": {"secrets": [{"name": "NOPE", "env": "NOPE"}]}}),
            422,
            "secret_unknown",
            "/config/secrets/0",
        ),
        (
            "a relative path",
            json!({"template": "hello", "config": {"files": [{"path": "etc/x", "content": ""}]}}),
            422,
            "config_invalid",
            "/config/files/0",
        ),
    ];
    let mut wrong = Vec::new();
    for (what, body, status, code, pointer) in table {
        let answer = api.post("/workloads", Some(body.clone())).await;
        let told = (answer.status, answer.body["code"].as_str().unwrap_or_default());
        let pointed = pointer.is_empty() || answer.pointers().iter().any(|at| at.starts_with(pointer));
        if told != (*status, *code) || !pointed || answer.header("content-type") != "application/problem+json" {
            let body = answer.body.to_string();
            wrong.push(format!(
                "{what}: {} instead of {status} {code} {pointer}: {}",
                answer.status,
                &body[..body.len().min(600)]
            ));
        }
    }
    let secret = api.call(Method::PUT, "/secrets/BIG", Some(json!({"value": long})), &[]).await;
    let secret_told = (secret.status, secret.body["code"].as_str().unwrap_or_default());
    if secret_told != (422, "secret_invalid") || !secret.pointers().contains(&"/value") {
        wrong.push(format!("a secret of 1 MB: {} {}", secret.status, secret.body));
    }
    assert_eq!(wrong, Vec::<String>::new());
    let huge = api.post("/workloads", Some(json!({"name": "a".repeat(2 << 20), "template": "hello"}))).await;
    assert_eq!(huge.problem(413), "body_too_large");
    let stranger = Api { key: "chq_0000000000000000000000000000000000000000".to_owned(), ..api.clone() };
    assert_eq!(stranger.get("/workloads").await.problem(401), "unauthenticated");
    for table in ["workloads", "releases", "instances", "secrets"] {
        assert_eq!(platform.number(&format!("select count(*) from {table}")).await.unwrap(), 0, "{table}");
    }
    assert_eq!(platform.number("select count(*) from slots where org_id is not null").await.unwrap(), 0);

    // What only the node can know is told as a reason, with what the process said last.
    platform.shell_image("tests/no-command:1", &[]).unwrap();
    platform.shell_image("tests/exits:1", &[r#"CMD ["/bin/sh", "-c", "echo goodbye; exit 3"]"#]).unwrap();
    for (name, image) in
        [("mute", "tests/no-command:1"), ("brief", "tests/exits:1"), ("absent", "localhost:1/tests/none:1")]
    {
        let answer = api.post("/workloads", Some(json!({"name": name, "image": image}))).await;
        assert!(matches!(answer.status, 201 | 202), "{name}: {} {}", answer.status, answer.body);
    }
    let mute = api.wait("mute", "failed", Duration::from_secs(60)).await;
    assert!(mute["reason"]["code"].is_string() && mute["reason"]["message"].is_string(), "{mute}");
    let brief = eventually("why it ended", Duration::from_secs(90), async || {
        let now = api.get("/workloads/brief").await.ok();
        let told = now["reason"]["log_tail"].to_string().contains("goodbye");
        if told && now["state"] != "running" { Ok(now) } else { Err(now.to_string()) }
    })
    .await;
    assert!(brief["reason"]["code"].is_string(), "{brief}");
    let absent = api.wait("absent", "failed", Duration::from_secs(60)).await;
    assert!(absent["reason"]["code"].is_string(), "{absent}");
    for name in ["mute", "brief", "absent"] {
        let id = api.get(&format!("/workloads/{name}")).await.ok()["id"].as_str().unwrap().to_owned();
        api.delete_workload(&id, SOON).await;
    }
    Census::settled(&platform, SOON).await;

    // Repeats: one effect, whatever came between.
    let ask = json!({"name": "once", "template": "hello"});
    let key = random();
    let headers = [("idempotency-key", key.as_str()), ("prefer", "wait=30")];
    let calls = (0..8).map(|_| api.call(Method::POST, "/workloads", Some(ask.clone()), &headers));
    let answers = futures::future::join_all(calls).await;
    let mut ids = BTreeSet::new();
    for answer in &answers {
        match answer.status {
            201 | 202 => drop(ids.insert(answer.body["workload"]["id"].to_string())),
            _ => assert_eq!(answer.problem(409), "idempotency_in_progress"),
        }
    }
    let again = api.call(Method::POST, "/workloads", Some(ask), &headers).await;
    ids.insert(again.clone().ok()["workload"]["id"].to_string());
    assert_eq!(ids.len(), 1, "{ids:?}");
    assert_eq!(again.header("idempotency-replayed"), "true");
    let other =
        api.call(Method::POST, "/workloads", Some(json!({"name": "twice", "template": "hello"})), &headers).await;
    assert_eq!(other.problem(422), "idempotency_key_reused");
    assert_eq!(platform.number("select count(*) from workloads where name = 'once'").await.unwrap(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn tenants_reach_neither_each_other_nor_the_host() {
    let platform = platform().await;
    platform.shell_image("tests/shell:1", &[]).unwrap();
    let (ada, bob) = (platform.tenant("ada", "free").await.unwrap(), platform.tenant("bob", "free").await.unwrap());
    let mine = ada.deploy(json!({"name": "mine", "template": "hello"})).await;
    bob.deploy(json!({"name": "yours", "template": "hello"})).await;

    // Through the API: another org's things do not exist.
    let foreign = Api { base: bob.base.clone(), ..ada.clone() };
    let id = mine["workload"]["id"].as_str().unwrap();
    for path in ["/workloads", "/workloads/yours", "/secrets", "/events"] {
        assert_eq!(foreign.get(path).await.problem(404), "not_found", "{path}");
    }
    assert_eq!(bob.get(&format!("/workloads/{id}")).await.problem(404), "not_found");
    assert_eq!(bob.delete(&format!("/workloads/{id}")).await.problem(404), "not_found");

    // Through the network. A server that the host itself reaches on each of its addresses is there to be found.
    let server = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
    let port = server.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for connection in server.incoming() {
            drop(connection)
        }
    });
    let address_of = |slot_owner: &Api| {
        let slot = format!(
            "select container from slots where org_id = (select id from orgs where slug = '{}')",
            slot_owner.org
        );
        let platform = &platform;
        async move {
            let container = platform.column(&slot).await.unwrap().pop().unwrap();
            let pid = platform.docker(&["inspect", "-f", "{{.State.Pid}}", &container]).unwrap();
            let shown =
                run(&["nsenter", "-t", pid.trim(), "-n", "ip", "-4", "-o", "addr", "show", "scope", "global"], &[])
                    .unwrap();
            let (_, rest) = shown.split_once("inet ").unwrap();
            rest.split(['/', ' ']).next().unwrap().to_owned()
        }
    };
    let (own, other) = (address_of(&ada).await, address_of(&bob).await);
    assert_ne!(own, other);
    let hosts = run(&["ip", "-4", "-o", "addr", "show", "scope", "global"], &[]).unwrap();
    let hosts: Vec<&str> =
        hosts.lines().filter_map(|line| line.split_once("inet ")?.1.split(['/', ' ']).next()).collect();
    assert!(!hosts.is_empty());
    for host in &hosts {
        assert!(std::net::TcpStream::connect((*host, port)).is_ok(), "the host does not reach itself on {host}");
    }
    let connect = async |address: &str| {
        ada.exec("mine", &["/hello", "connect", address, "700"]).await["exit_code"].as_i64().unwrap()
    };
    assert_eq!(connect("127.0.0.1:8080").await, 0, "the probe itself does not work");
    assert_eq!(connect(&format!("{own}:8080")).await, 0, "a container does not reach itself");
    let mut reached = Vec::new();
    let targets = hosts.iter().map(|host| format!("{host}:{port}"));
    let fixed = ["169.254.169.254:80".to_owned(), format!("{other}:8080"), "10.96.0.1:22".to_owned()];
    for target in fixed.into_iter().chain(targets) {
        if connect(&target).await == 0 {
            reached.push(target);
        }
    }
    assert_eq!(reached, Vec::<String>::new());

    // The sandbox as Docker knows it.
    let ids = platform.docker(&["ps", "-q"]).unwrap();
    let ids: Vec<&str> = ids.split_whitespace().collect();
    let all: Value = serde_json::from_str(&platform.docker(&[&["inspect"], ids.as_slice()].concat()).unwrap()).unwrap();
    for container in all.as_array().unwrap() {
        let host = &container["HostConfig"];
        assert_eq!(host["Privileged"], false);
        assert_eq!(host["ReadonlyRootfs"], true);
        assert_eq!(host["NetworkMode"], "none");
        assert!(host["CapAdd"].is_null(), "{}", host["CapAdd"]);
        assert_eq!(host["CapDrop"][0].as_str().unwrap().to_uppercase(), "ALL");
        assert!(host["SecurityOpt"].to_string().contains("no-new-privileges"), "{}", host["SecurityOpt"]);
        assert!(!host["SecurityOpt"].to_string().contains("unconfined"), "{}", host["SecurityOpt"]);
        assert!(host["PidsLimit"].as_i64().unwrap() > 0 && host["Memory"].as_i64().unwrap() > 0);
        assert!(!container["Mounts"].to_string().contains("docker.sock"));
        assert_ne!(container["Config"]["User"], "");
    }

    // A terminal, where the image has a shell; a clear end where it has none.
    let config = json!({"argv": ["/hello"], "ports": [{"name": "http", "port": 8080, "protocol": "http"}]});
    let ask = json!({"name": "shell", "image": "tests/shell:1", "config": config, "warm": "never"});
    let shell = ada.deploy(ask).await;
    assert_eq!(shell["placement"]["kind"], "cold", "{shell}");
    let (output, end) = ada.terminal("shell", "echo answer=$((40+2)); exit 5\n").await.unwrap();
    assert!(output.contains("answer=42"), "{output} {end}");
    assert_eq!((end["type"].as_str(), end["code"].as_i64()), (Some("exit"), Some(5)), "{end}");
    let (output, end) = ada.terminal("mine", "/hello --version; exit 6\n").await.unwrap();
    assert!(output.contains("hello 0."), "{output} {end}");
    assert_eq!(end["code"].as_i64(), Some(6), "{end}");
    platform.bare_image("tests/bare:1").unwrap();
    ada.deploy(json!({"name": "bare", "image": "tests/bare:1", "config": config, "warm": "never"})).await;
    let (output, end) = ada.terminal("bare", "\n").await.unwrap();
    assert_eq!((end["type"].as_str(), end["code"].as_i64()), (Some("exit"), Some(127)), "{end}");
    assert!(output.contains("/bin/sh"), "what is missing is not named: {output}");
}
