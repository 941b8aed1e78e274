//! Outbox and jobs: nothing lost, nothing finished twice, poison ends.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use clawhq_store::{Change, Failed, NewJob, Notice, Wakeup, WorkloadWakeup, channel};
use clawhq_testkit::{TestDb, mint};
use futures::StreamExt as _;
use futures::future::join_all;

fn job(key: &str, max_attempts: u32) -> NewJob {
    NewJob {
        id: mint(),
        queue: "q".to_owned(),
        key: key.to_owned(),
        payload: clawhq_store::Json::Null,
        delay_ms: 0,
        max_attempts,
    }
}

#[tokio::test]
async fn a_wake_up_is_committed_with_its_change_and_becomes_one_job() -> Result<()> {
    let db = TestDb::new().await?;
    let org = db.org("ann", "free").await?;
    let (workload, jobs, outbox) = (mint(), db.system().jobs(), db.system().outbox());
    let wakeup = Wakeup::workload(org.scope.org(), workload);
    let change = Change { wakeups: vec![wakeup.clone(), wakeup.clone()], ..Change::default() };
    db.store.tenant(&org.scope).events().append(&change).await?;
    assert_eq!(outbox.waiting().await?, 2);
    // Two relays at once take different rows; two wake-ups of one key are one waiting job.
    let (one, two) = tokio::join!(outbox.relay(100), outbox.relay(100));
    assert_eq!(one? + two?, 2);
    assert_eq!(outbox.waiting().await?, 0);
    let leased = jobs.claim(Wakeup::WORKLOAD, 10, 60_000).await?;
    assert_eq!(leased.len(), 1);
    assert_eq!(WorkloadWakeup::parse(&leased[0].payload), Some(WorkloadWakeup { org: org.scope.org(), workload }));

    // While that one runs, a new wake-up is a new job: the change behind it may have come too late for the first.
    outbox.append(&[wakeup]).await?;
    outbox.relay(100).await?;
    assert_eq!(jobs.claim(Wakeup::WORKLOAD, 10, 60_000).await?.len(), 1);

    // A relay that died after inserting and before noting so, repeated, changes nothing.
    db.execute("update outbox set relayed_at = null").await?;
    outbox.relay(100).await?;
    assert_eq!(db.number("select count(*) from jobs").await?, 3, "the coalesced one becomes a job of its own at last");
    db.execute("update outbox set relayed_at = null").await?;
    outbox.relay(100).await?;
    assert_eq!(db.number("select count(*) from jobs").await?, 3);
    Ok(())
}

#[tokio::test]
async fn many_workers_share_a_queue_without_sharing_a_job() -> Result<()> {
    let db = Arc::new(TestDb::with_connections(20).await?);
    for number in 0..100 {
        assert!(db.system().jobs().enqueue(&job(&format!("k{number}"), 3)).await?);
    }
    let worker = || {
        let db = db.clone();
        async move {
            let mut taken = Vec::new();
            loop {
                let leased = db.system().jobs().claim("q", 7, 60_000).await?;
                if leased.is_empty() {
                    return anyhow::Ok(taken);
                }
                for job in leased {
                    assert!(db.system().jobs().finish(&job).await?);
                    taken.push(job.id);
                }
            }
        }
    };
    let taken = join_all((0..10).map(|_| worker())).await.into_iter().collect::<Result<Vec<_>>>()?.concat();
    assert_eq!(taken.len(), 100);
    assert_eq!(taken.into_iter().collect::<BTreeSet<_>>().len(), 100);
    Ok(())
}

#[tokio::test]
async fn a_lost_lease_loses_every_right() -> Result<()> {
    let db = TestDb::new().await?;
    let jobs = db.system().jobs();
    jobs.enqueue(&job("a", 3)).await?;
    let first = jobs.claim("q", 1, 60_000).await?.remove(0);
    assert!(jobs.renew(&first, 60_000).await?);
    // Its worker dies: the lease runs out, the sweep gives the job back, another takes it.
    db.execute("update jobs set lease_until = now() - interval '1 second'").await?;
    assert_eq!(jobs.sweep(3_600_000).await?.returned, 1);
    db.execute("update jobs set run_at = now()").await?;
    let second = jobs.claim("q", 1, 60_000).await?.remove(0);
    assert_eq!((second.id, second.attempt), (first.id, 2));
    assert!(!jobs.renew(&first, 60_000).await?);
    assert!(!jobs.finish(&first).await?);
    assert_eq!(jobs.fail(&first, "late", 0, false).await?, Failed::Lost);
    assert!(!jobs.release(&first).await?);
    assert!(jobs.finish(&second).await?);
    assert!(!jobs.finish(&second).await?, "a job was finished twice");
    Ok(())
}

#[tokio::test]
async fn a_look_that_is_due_soon_is_not_swallowed_by_one_that_waits() -> Result<()> {
    let db = TestDb::new().await?;
    let jobs = db.system().jobs();
    let later = |key: &str| NewJob { delay_ms: 600_000, ..job(key, 3) };
    assert!(jobs.enqueue(&later("a")).await?);
    assert!(!jobs.enqueue(&job("a", 3)).await?, "one job for each thing to look at");
    assert_eq!(jobs.claim("q", 10, 60_000).await?.len(), 1, "it waits for ten minutes although it is due");
    assert!(jobs.enqueue(&job("b", 3)).await?);
    assert!(!jobs.enqueue(&later("b")).await?);
    assert_eq!(jobs.claim("q", 10, 60_000).await?.len(), 1, "a later look put off the one that is due");
    Ok(())
}

#[tokio::test]
async fn poison_dies_after_its_attempts_whether_it_fails_or_kills() -> Result<()> {
    let db = TestDb::new().await?;
    let jobs = db.system().jobs();
    jobs.enqueue(&job("fails", 2)).await?;
    let leased = jobs.claim("q", 1, 60_000).await?.remove(0);
    assert_eq!(jobs.fail(&leased, &"x".repeat(5000), 3_600_000, false).await?, Failed::Again);
    assert!(jobs.claim("q", 1, 60_000).await?.is_empty(), "the back-off is not durable");
    assert!(jobs.next_due_ms("q").await?.is_some_and(|due| due > 3_500_000));
    db.execute("update jobs set run_at = now()").await?;
    let leased = jobs.claim("q", 1, 60_000).await?.remove(0);
    assert_eq!(jobs.fail(&leased, "again", 0, false).await?, Failed::Dead);

    jobs.enqueue(&job("kills", 1)).await?;
    jobs.claim("q", 1, 60_000).await?;
    db.execute("update jobs set lease_until = now() - interval '1 second' where state = 'running'").await?;
    assert_eq!(jobs.sweep(3_600_000).await?.died, 1);

    jobs.enqueue(&job("refused", 9)).await?;
    let leased = jobs.claim("q", 1, 60_000).await?.remove(0);
    assert_eq!(jobs.fail(&leased, "never", 0, true).await?, Failed::Dead);
    assert!(jobs.claim("q", 1, 60_000).await?.is_empty());
    let stats = jobs.stats().await?;
    assert_eq!((stats[0].pending, stats[0].running, stats[0].dead), (0, 0, 3));

    db.execute("update jobs set finished_at = now() - interval '2 hours'").await?;
    assert_eq!(jobs.sweep(3_600_000).await?.deleted, 3);
    Ok(())
}

#[tokio::test]
async fn waiting_jobs_of_one_key_are_one_and_a_release_costs_no_attempt() -> Result<()> {
    let db = TestDb::new().await?;
    let jobs = db.system().jobs();
    assert!(jobs.enqueue(&job("a", 1)).await?);
    assert!(!jobs.enqueue(&job("a", 1)).await?);
    let leased = jobs.claim("q", 1, 60_000).await?.remove(0);
    assert!(jobs.enqueue(&job("a", 1)).await?, "a running job must not swallow a wake-up");
    assert!(jobs.release(&leased).await?);
    let back = jobs.claim("q", 5, 60_000).await?;
    assert_eq!(back.len(), 2);
    let again = back.iter().find(|job| job.id == leased.id).expect("the released one");
    assert!(again.attempt <= again.max_attempts);
    Ok(())
}

#[tokio::test]
async fn listeners_hear_and_learn_when_they_may_have_missed_something() -> Result<()> {
    let db = TestDb::new().await?;
    let mut notices = Box::pin(db.store.listen(&[channel::NODE, channel::JOBS]).await?);
    db.store.notify(&[(channel::NODE, "node slot".to_owned())]).await?;
    let heard = tokio::time::timeout(Duration::from_secs(10), notices.next()).await?;
    assert_eq!(heard, Some(Notice::Said { channel: "clawhq_node".to_owned(), payload: "node slot".to_owned() }));
    // The connection is cut from outside, as by a restart of the database.
    db.number(
        "select count(pg_terminate_backend(pid)) from pg_stat_activity
         where datname = current_database() and query ilike 'listen%'",
    )
    .await?;
    let missed = tokio::time::timeout(Duration::from_secs(10), notices.next()).await?;
    assert_eq!(missed, Some(Notice::Missed));
    db.store.notify(&[(channel::JOBS, "again".to_owned())]).await?;
    let heard = tokio::time::timeout(Duration::from_secs(10), notices.next()).await?;
    assert!(matches!(heard, Some(Notice::Said { payload, .. }) if payload == "again"));
    Ok(())
}

#[tokio::test]
async fn a_restart_of_the_database_costs_no_read_and_no_begin() -> Result<()> {
    let db = TestDb::new().await?;
    let org = db.org("ann", "free").await?;
    // Several connections in the pool, then every one of them is killed.
    let reads = (0..8).map(|_| db.store.templates());
    join_all(reads).await.into_iter().collect::<Result<Vec<_>, _>>()?;
    for _ in 0..3 {
        db.number(
            "select count(pg_terminate_backend(pid)) from pg_stat_activity
             where datname = current_database() and pid <> pg_backend_pid()",
        )
        .await?;
        db.store.templates().await?;
        db.store.tenant(&org.scope).events().append(&Change::default()).await?;
        db.store.tenant(&org.scope).org().get().await?;
    }
    Ok(())
}

#[tokio::test]
async fn what_is_old_goes_in_portions_that_end() -> Result<()> {
    let db = TestDb::new().await?;
    let org = db.org("ann", "free").await?;
    let fill = format!(
        "insert into idempotency (org_id, route, key, request_hash, created_at)
         select '{org:032x}'::uuid, 'POST /x', n::text, sha256('x'), now() - interval '25 hours'
         from generate_series(1, 6000) n;
         insert into idempotency (org_id, route, key, request_hash) values ('{org:032x}', 'POST /x', 'young', sha256('x'));
         insert into sessions (id, user_id, token_hash, expires_at)
         select gen_random_uuid(), '{user:032x}', sha256(n::text::bytea), now() - interval '1 hour'
         from generate_series(1, 6000) n",
        org = org.scope.org().as_u128(),
        user = org.user.as_u128(),
    );
    db.execute(&fill).await?;
    let jobs = db.system().jobs();
    assert_eq!((jobs.sweep(1000).await?.deleted, jobs.sweep(1000).await?.deleted), (5000, 1000));
    assert_eq!(db.number("select count(*) from idempotency").await?, 1);
    let accounts = db.store.accounts();
    assert_eq!((accounts.sweep_sessions().await?, accounts.sweep_sessions().await?), (5000, 1000));
    Ok(())
}
