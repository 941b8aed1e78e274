//! What holds for the workspace as a whole: who may import whom, and what may not be pulled in from outside.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;

fn metadata(args: &[&str]) -> Value {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--locked", "--offline"])
        .args(args)
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("cargo metadata prints JSON")
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value[key].as_array().map(Vec::as_slice).unwrap_or_default()
}

/// What each room may import of ours. A room that is not named here may not exist.
fn rooms() -> BTreeMap<&'static str, &'static [&'static str]> {
    BTreeMap::from([
        ("clawhq-domain", &[] as &[_]),
        ("clawhq-console", &[]),
        ("clawhq-listener", &[]),
        ("clawhq-runtime", &[]),
        ("clawhq-migrations", &[]),
        ("clawhq-init", &[]),
        ("clawhq-listener", &[]),
        ("clawhq-console", &[]),
        ("clawhq-hello", &[]),
        ("clawhq-proto", &["clawhq-domain"]),
        ("clawhq-api-types", &["clawhq-domain"]),
        ("clawhq-sealing", &["clawhq-domain"]),
        ("clawhq-store", &["clawhq-domain", "clawhq-migrations"]),
        ("clawhq-app", &["clawhq-domain", "clawhq-runtime", "clawhq-sealing", "clawhq-store"]),
        (
            "clawhq-backend",
            &[
                "clawhq-api-types",
                "clawhq-app",
                "clawhq-console",
                "clawhq-domain",
                "clawhq-listener",
                "clawhq-proto",
                "clawhq-runtime",
            ],
        ),
        ("clawhq-edge", &["clawhq-app", "clawhq-domain", "clawhq-listener", "clawhq-runtime"]),
        ("clawhq-workers", &["clawhq-app", "clawhq-domain", "clawhq-runtime"]),
        ("clawhq-pool-manager", &["clawhq-app", "clawhq-domain", "clawhq-runtime"]),
        // The init's library half is the frame protocol that both ends of its socket speak.
        ("clawhq-node-agent", &["clawhq-domain", "clawhq-init", "clawhq-proto", "clawhq-runtime"]),
        // The binary wires everything and is imported by nobody.
        (
            "clawhq",
            &[
                "clawhq-api-types",
                "clawhq-app",
                "clawhq-backend",
                "clawhq-domain",
                "clawhq-edge",
                "clawhq-migrations",
                "clawhq-node-agent",
                "clawhq-pool-manager",
                "clawhq-proto",
                "clawhq-runtime",
                "clawhq-sealing",
                "clawhq-store",
                "clawhq-workers",
            ],
        ),
    ])
}

/// Imported by tests and benchmarks alone, so free to import anything.
const FOR_TESTS: &[&str] = &["clawhq-testkit", "clawhq-tests", "clawhq-bench"];

/// Crates that are named in these rooms and nowhere else. A trailing `*` matches any ending.
const CONFINED: &[(&str, &[&str])] = &[
    ("sea-orm*", &["clawhq-store", "clawhq-migrations"]),
    ("bollard*", &["clawhq-node-agent"]),
    ("axum*", &["clawhq-backend", "clawhq-edge", "clawhq-listener"]),
    ("apalis*", &["clawhq-workers"]),
    ("rtnetlink", &["clawhq-node-agent"]),
    ("argon2", &["clawhq-app"]),
];

/// `domain` decides; it may not so much as see a clock, a random source, a runtime or a wire format.
const DOMAIN_MAY: &[&str] = &[];

fn matches(pattern: &str, name: &str) -> bool {
    pattern.strip_suffix('*').map_or(pattern == name, |stem| name.starts_with(stem))
}

/// Every rule that a workspace breaks, in words.
fn breaches(metadata: &Value) -> Vec<String> {
    let rooms = rooms();
    let packages = list(metadata, "packages");
    let ours: BTreeSet<&str> = packages.iter().map(|package| text(package, "name")).collect();
    let mut breaches = Vec::new();
    for package in packages {
        let name = text(package, "name");
        let workload = text(package, "manifest_path").contains("/workloads/");
        let tests = FOR_TESTS.contains(&name);
        for dependency in list(package, "dependencies") {
            let target = text(dependency, "name");
            let dev = text(dependency, "kind") == "dev";
            if ours.contains(target) {
                let allowed = if dev || tests {
                    true
                } else if workload {
                    target == "clawhq-wire"
                } else {
                    rooms.get(name).is_some_and(|may| may.contains(&target))
                };
                if !allowed {
                    breaches.push(format!("{name} may not import {target}"));
                }
                if workload && target != "clawhq-wire" {
                    breaches.push(format!("workload {name} must stand alone but imports {target}"));
                }
                continue;
            }
            if name == "clawhq-domain" && !dev && !DOMAIN_MAY.contains(&target) {
                breaches.push(format!("clawhq-domain may not import {target}: decisions are pure"));
            }
            for (pattern, homes) in CONFINED {
                let exempt = workload || dev || tests;
                if matches(pattern, target) && !homes.contains(&name) && !exempt {
                    breaches.push(format!("{target} belongs to {}, not to {name}", homes.join(" and ")));
                }
            }
        }
        if !workload && !tests && !rooms.contains_key(name) {
            breaches.push(format!("{name} is a room nobody planned: add it to this test and to ARCHITECTURE.md"));
        }
    }
    breaches.sort();
    breaches.dedup();
    breaches
}

#[test]
fn rooms_import_only_what_they_may() {
    let found = breaches(&metadata(&["--no-deps"]));
    assert!(found.is_empty(), "\n{}\n", found.join("\n"));
}

/// The rule is tested against a workspace that breaks each part of it.
#[test]
fn breaches_are_found() {
    let package = |name: &str, path: &str, dependencies: &[(&str, Option<&str>)]| {
        serde_json::json!({
            "name": name,
            "manifest_path": format!("/x/{path}/Cargo.toml"),
            "dependencies": dependencies
                .iter()
                .map(|(name, kind)| serde_json::json!({"name": name, "kind": kind}))
                .collect::<Vec<_>>(),
        })
    };
    let broken = serde_json::json!({"packages": [
        package("clawhq-domain", "crates/domain", &[("tokio", None), ("proptest", Some("dev"))]),
        package("clawhq-store", "crates/store", &[("sea-orm", None), ("clawhq-testkit", Some("dev"))]),
        package("clawhq-backend", "backend", &[("clawhq-store", None), ("sea-orm", None), ("bollard", None)]),
        package("clawhq-testkit", "crates/testkit", &[("clawhq-store", None)]),
        package("clawhq-app", "crates/app", &[("clawhq-testkit", None)]),
        package("some-workload", "workloads/some", &[("clawhq-domain", None), ("axum", None)]),
        package("clawhq-attic", "attic", &[]),
    ]});
    let found = breaches(&broken);
    let expected = [
        "bollard belongs to clawhq-node-agent, not to clawhq-backend",
        "clawhq-app may not import clawhq-testkit",
        "clawhq-attic is a room nobody planned: add it to this test and to ARCHITECTURE.md",
        "clawhq-backend may not import clawhq-store",
        "clawhq-domain may not import tokio: decisions are pure",
        "sea-orm belongs to clawhq-store and clawhq-migrations, not to clawhq-backend",
        "some-workload may not import clawhq-domain",
        "workload some-workload must stand alone but imports clawhq-domain",
    ];
    assert_eq!(found, expected);
}

/// Licences we may ship under. An expression is accepted when one of its alternatives is made of these alone.
const LICENCES: &[&str] = &[
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "CDLA-Permissive-2.0",
    "ISC",
    "MIT",
    "MIT-0",
    "MPL-2.0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

fn licence_is_fine(expression: &str) -> bool {
    // `A OR B AND C` with parentheses: evaluated over the allow list. `A/B` is the old spelling of OR.
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let mut words: Vec<&str> = spaced.split_whitespace().collect();
    words.reverse();
    fn any(words: &mut Vec<&str>) -> bool {
        let mut fine = all(words);
        while words.last() == Some(&"OR") {
            words.pop();
            fine |= all(words);
        }
        fine
    }
    fn all(words: &mut Vec<&str>) -> bool {
        let mut fine = one(words);
        while words.last() == Some(&"AND") {
            words.pop();
            fine &= one(words);
        }
        fine
    }
    fn one(words: &mut Vec<&str>) -> bool {
        let Some(word) = words.pop() else { return false };
        if word == "(" {
            let fine = any(words);
            return words.pop() == Some(")") && fine;
        }
        if words.last() == Some(&"WITH") {
            words.pop();
            let exception = words.pop().unwrap_or_default();
            let whole = format!("{word} WITH {exception}");
            return LICENCES.contains(&whole.as_str());
        }
        LICENCES.contains(&word)
    }
    any(&mut words) && words.is_empty()
}

#[test]
fn licence_expressions_are_read_rightly() {
    for fine in
        ["MIT", "MIT/Apache-2.0", "GPL-3.0 OR MIT", "(MIT OR GPL-2.0) AND ISC", "Apache-2.0 WITH LLVM-exception"]
    {
        assert!(licence_is_fine(fine), "{fine}");
    }
    for foul in ["", "GPL-3.0", "MIT AND GPL-3.0", "(MIT", "Apache-2.0 WITH Surprise", "MIT MIT", "AGPL-3.0 OR GPL-2.0"]
    {
        assert!(!licence_is_fine(foul), "{foul}");
    }
}

#[test]
fn everything_we_link_has_a_licence_we_may_ship() {
    let metadata = metadata(&["--filter-platform", "x86_64-unknown-linux-gnu"]);
    let reached = reached(&metadata);
    let foul: Vec<String> = list(&metadata, "packages")
        .iter()
        .filter(|package| reached.contains(text(package, "id")) && !package["source"].is_null())
        .filter(|package| !licence_is_fine(text(package, "license")))
        .map(|package| {
            format!("{} {}: {:?}", text(package, "name"), text(package, "version"), text(package, "license"))
        })
        .collect();
    assert!(foul.is_empty(), "\n{}\n", foul.join("\n"));
    assert!(reached.len() > 50, "the graph was read: {}", reached.len());
}

/// One TLS stack, in Rust; nothing that wants a C library of the machine, an assembler or a shell at build time.
#[test]
fn no_second_tls_stack_is_linked() {
    let metadata = metadata(&["--filter-platform", "x86_64-unknown-linux-gnu"]);
    let reached = reached(&metadata);
    for package in list(&metadata, "packages").iter().filter(|package| reached.contains(text(package, "id"))) {
        let name = text(package, "name");
        for banned in ["openssl-sys", "openssl", "native-tls", "aws-lc-rs", "aws-lc-sys", "aws-lc-fips-sys"] {
            assert_ne!(name, banned, "cargo tree -i {banned} shows who wants it");
        }
    }
}

/// Every package that a workspace member reaches, also for its tests.
fn reached(metadata: &Value) -> BTreeSet<&str> {
    let nodes: BTreeMap<&str, &Value> =
        list(&metadata["resolve"], "nodes").iter().map(|node| (text(node, "id"), node)).collect();
    let mut pending: Vec<&str> = list(metadata, "workspace_members").iter().filter_map(Value::as_str).collect();
    let mut reached = BTreeSet::new();
    while let Some(id) = pending.pop() {
        if reached.insert(id)
            && let Some(node) = nodes.get(id)
        {
            pending.extend(list(node, "deps").iter().map(|dependency| text(dependency, "pkg")));
        }
    }
    reached
}
