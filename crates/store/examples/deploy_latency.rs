//! How long the deploy transaction and a report take. Run it against a server with fsync on:
//!
//! ```sh
//! CLAWHQ_TEST_PG='postgres://postgres@localhost/postgres?host=/run/postgresql' cargo run -p clawhq-store --example deploy_latency
//! ```

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use clawhq_domain::slot::SlotState;
use clawhq_store::{Actor, Change, IdempotencyKey, NewAudit, NewEvent, Placement, Wakeup, WorkloadRef};
use clawhq_testkit::{Deploy, TestDb, TestOrg, hello, mint};

fn change(org: &TestOrg, number: usize) -> Change {
    Change {
        idempotency: Some(IdempotencyKey {
            route: "POST /orgs/{org}/workloads".to_owned(),
            key: format!("key-{number}"),
            request_hash: [1; 32],
        }),
        events: vec![NewEvent {
            id: mint(),
            workload: None,
            instance: None,
            kind: "workload.created".to_owned(),
            message: "It was created.".to_owned(),
            data: clawhq_store::Json::Null,
        }],
        audit: Some(NewAudit {
            actor: Actor::User(org.user),
            action: "workload.create",
            object: "wl".to_owned(),
            ip: None,
            request: Some(mint()),
            detail: clawhq_store::Json::Null,
        }),
        wakeups: vec![Wakeup::workload(org.scope.org(), mint())],
    }
}

fn show(what: &str, times: &mut [Duration]) {
    times.sort();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize].as_secs_f64() * 1000.0;
    println!(
        "{what:<34} n {:>4}  p50 {:>7.2} ms  p90 {:>7.2} ms  p99 {:>7.2} ms",
        times.len(),
        at(0.5),
        at(0.9),
        at(0.99)
    );
}

#[tokio::main]
async fn main() -> Result<()> {
    let db = Arc::new(TestDb::with_connections(20).await?);
    println!("fsync {}", db.number("select (current_setting('fsync') = 'on')::int::bigint").await?);
    let mut tier = db.tier("free").await?;
    tier.max_per_node = 10_000;
    db.system().put_tier(&tier).await?;
    let org = Arc::new(db.org("acme", "free").await?);
    let node = db.node("n1", 10_000_000).await?;
    db.ready_slots(&node, &hello(), &tier, 1200).await?;
    for round in ["first (cold connections)", "warm deploy, one at a time"] {
        let (mut deploys, mut reads, mut reports, mut desired) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for number in 0..300 {
            let mut deploy = Deploy::new(&format!("w-{}-{number}", round.len()), &tier);
            deploy.change = change(&org, round.len() * 1000 + number);
            let new = deploy.build()?;
            let begun = Instant::now();
            let made = db.store.tenant(&org.scope).workloads().create(&new, &deploy.change).await?;
            deploys.push(begun.elapsed());
            assert!(matches!(made.placed.placement, Placement::Warm { .. }));
            let (slot, _) = made.placed.slot.expect("placed");
            let begun = Instant::now();
            db.system().slots().desired(&[slot]).await?;
            desired.push(begun.elapsed());
            let begun = Instant::now();
            db.report(&node, slot, 2, SlotState::Running).await?;
            reports.push(begun.elapsed());
            let begun = Instant::now();
            db.store.tenant(&org.scope).workloads().get(&WorkloadRef::Id(made.workload)).await?;
            reads.push(begun.elapsed());
        }
        println!("{round}");
        show("  deploy transaction", &mut deploys);
        show("  slot desired", &mut desired);
        show("  report", &mut reports);
        show("  read of a workload", &mut reads);
    }
    let begun = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..100 {
        let (db, org, tier) = (db.clone(), org.clone(), tier.clone());
        tasks.spawn(async move {
            let mut deploy = Deploy::new(&format!("c-{number}"), &tier);
            deploy.change = change(&org, 900_000 + number);
            let begun = Instant::now();
            db.deploy(&org, &deploy).await.map(|_| begun.elapsed())
        });
    }
    let mut times = tasks.join_all().await.into_iter().collect::<Result<Vec<_>>>()?;
    show("100 at once, one org", &mut times);
    println!("in all {:?}", begun.elapsed());
    Ok(())
}
