//! What happens after the deploy: reports, fencing, updates, volumes, nodes.

use anyhow::Result;
use clawhq_domain::lifecycle::{self, Act, Shown};
use clawhq_domain::release::from_template;
use clawhq_domain::slot::{Failure, FailureKind, SlotReport, SlotState, Step};
use clawhq_domain::template::StateVolume;
use clawhq_domain::workload::{ClaimPolicy, Desired};
use clawhq_store::{
    Change, Heartbeat, NewNode, NewRelease, NodeFacts, NodeState, ReportOutcome, SlotEvent, StoreError, TokenHash,
    VolumeUse, WorkloadFilter, WorkloadRef,
};
use clawhq_testkit::{Deploy, TestDb, TestNode, TestOrg, hello, mint};

fn changed(outcome: ReportOutcome) -> bool {
    match outcome {
        ReportOutcome::Applied(observed) => observed.changed(),
        ReportOutcome::Stale => false,
    }
}

#[tokio::test]
async fn a_report_moves_instance_version_events_and_wake_ups_together() -> Result<()> {
    let db = TestDb::new().await?;
    let tier = db.tier("free").await?;
    let org = db.org("ann", "free").await?;
    let node = db.node("n1", 10_000).await?;
    db.ready_slots(&node, &hello(), &tier, 1).await?;
    let made = db.deploy(&org, &Deploy::new("agent", &tier)).await?;
    let (slot, _) = made.placed.slot.expect("warm");
    let report = SlotReport {
        slot,
        generation: 2,
        instance: Some(made.instance),
        state: SlotState::Running,
        run: 1,
        container: Some("c".to_owned()),
        image_digest: Some("sha256:1".to_owned()),
        failure: None,
        steps: vec![Step { name: "start".to_owned(), micros: 1200 }],
        at: 0,
    };
    let event = SlotEvent {
        id: mint(),
        kind: "instance.running".to_owned(),
        message: "It runs.".to_owned(),
        data: clawhq_store::Json::Null,
    };
    let slots = db.system().slots();
    let before = db.store.tenant(&org.scope).workloads().get(&WorkloadRef::Id(made.workload)).await?;
    // From an older stream, of an older generation, for another instance: nothing.
    assert_eq!(slots.observe(node.id, node.epoch - 1, &report, Some(&event)).await?, ReportOutcome::Stale);
    let older = SlotReport { generation: 1, ..report.clone() };
    assert_eq!(slots.observe(node.id, node.epoch, &older, Some(&event)).await?, ReportOutcome::Stale);
    let foreign = SlotReport { instance: Some(mint()), ..report.clone() };
    assert_eq!(slots.observe(node.id, node.epoch, &foreign, Some(&event)).await?, ReportOutcome::Stale);
    let other = db.node("n2", 10_000).await?;
    assert_eq!(slots.observe(other.id, other.epoch, &report, Some(&event)).await?, ReportOutcome::Stale);

    let ReportOutcome::Applied(observed) = slots.observe(node.id, node.epoch, &report, Some(&event)).await? else {
        panic!("a current report was stale");
    };
    assert_eq!(observed.owner, Some((org.scope.org(), made.workload, made.instance)));
    assert_eq!((observed.before, observed.after, observed.removed), (SlotState::Waiting, SlotState::Running, false));
    let after = db.store.tenant(&org.scope).workloads().get(&WorkloadRef::Id(made.workload)).await?;
    assert_eq!(after.workload.version, before.workload.version + 1);
    assert_eq!(after.instances[0].steps, report.steps);
    assert!(after.instances[0].ready_at.is_some());
    assert_eq!(lifecycle::shown(&after.view(), false).0, Shown::Running);
    assert_eq!(db.store.tenant(&org.scope).events().after(None, 0, 10).await?.len(), 1);
    assert!(!observed.woke, "what runs as it is wanted, alone, leaves nothing to be done");
    assert_eq!(db.system().outbox().waiting().await?, 0);

    // Said again, it changes nothing: no second event.
    assert!(!changed(slots.observe(node.id, node.epoch, &report, Some(&event)).await?));
    assert_eq!(db.store.tenant(&org.scope).events().after(None, 0, 10).await?.len(), 1);
    assert_eq!(db.system().outbox().waiting().await?, 0);

    // Anything else is looked at: that it does not run, that it runs though it is not wanted any more, that another of the
    // same workload is there.
    let woke = async |state| -> Result<bool> {
        let report = SlotReport { state, ..report.clone() };
        match slots.observe(node.id, node.epoch, &report, None).await? {
            ReportOutcome::Applied(observed) => Ok(observed.woke),
            ReportOutcome::Stale => anyhow::bail!("stale"),
        }
    };
    // The edge's short way is open where the domain says that it runs, and nowhere else.
    db.execute("update nodes set facts = '{\"ingress\": \"unix:/x\"}'").await?;
    let straight = async || -> Result<bool> {
        let (slug, rows) = (db.store.tenant(&org.scope).org().get().await?.slug.to_string(), db.system().workloads());
        let (detail, ingress) = rows.by_host(&slug, "agent").await?.expect("its host name is known");
        assert_eq!(ingress.get(&node.id).map(String::as_str), Some("unix:/x"));
        let runs = lifecycle::shown(&detail.view(), false).0 == Shown::Running;
        let route = rows.straight(&slug, "agent").await?;
        assert_eq!(route.is_some(), runs, "{detail:?}");
        Ok(route.is_some_and(|route| (route.instance, route.slot, route.node) == (made.instance, slot, node.id)))
    };
    assert!(straight().await?);
    assert!(woke(SlotState::Restarting).await?);
    assert!(!straight().await?);
    assert!(!woke(SlotState::Running).await?);
    assert!(woke(SlotState::Restarting).await?);
    db.execute("update workloads set desired = 'stopped'").await?;
    assert!(woke(SlotState::Running).await?);
    assert!(!straight().await?);
    db.execute("update workloads set desired = 'running'").await?;
    assert!(woke(SlotState::Restarting).await?);
    db.execute(
        "insert into instances (org_id, id, workload_id, release_id, placement, tier, memory_mib, observed, queued_at)
        select org_id, gen_random_uuid(), workload_id, release_id, 'queued', tier, memory_mib, 'absent', now() from instances",
    )
    .await?;
    assert!(woke(SlotState::Running).await?);
    Ok(())
}

/// Somebody, a node with a ready slot, and a deploy with state that the slot fits.
async fn stateful(db: &TestDb) -> Result<(TestOrg, TestNode, Deploy)> {
    let tier = db.tier("free").await?;
    let (org, node) = (db.org("ann", "free").await?, db.node("n1", 10_000).await?);
    let mut deploy = Deploy::new("agent", &tier);
    deploy.template.state = Some(StateVolume { path: "/data".to_owned(), size_mib: 64 });
    db.ready_slots(&node, &deploy.template, &tier, 1).await?;
    Ok((org, node, deploy))
}

/// The claim says by itself what the node is to be told: the same as is read afterwards.
#[tokio::test]
async fn a_claim_tells_what_would_be_read() -> Result<()> {
    let db = TestDb::new().await?;
    let (org, _, deploy) = stateful(&db).await?;
    db.execute("update slots set image_digest = 'sha256:1', minted = 'x', restart = 3").await?;
    let made = db.deploy(&org, &deploy).await?;
    let told = made.placed.told.expect("a warm slot without secrets");
    let read = db.system().slots().desired(&[told.slot]).await?.pop().expect("it is there");
    assert_eq!(
        (told.slot, told.node, told.generation, told.present),
        (read.slot, read.node, read.generation, read.present)
    );
    assert!(told.spec == read.spec);
    assert_eq!((&told.image_digest, &told.minted, told.volume), (&read.image_digest, &read.minted, read.volume));
    assert!(told.image_digest.is_some() && told.minted.is_some() && told.volume.is_some());
    let (told, read) = (told.claim.expect("claimed"), read.claim.expect("claimed"));
    assert_eq!((told.org, told.workload, told.instance), (read.org, read.workload, read.instance));
    assert_eq!((told.release_id, told.restart), (read.release_id, read.restart));
    assert_eq!((told.workload_name, told.release), (read.workload_name, read.release));
    Ok(())
}

#[tokio::test]
async fn delete_converges_and_gives_everything_back() -> Result<()> {
    let db = TestDb::new().await?;
    let (org, node, deploy) = stateful(&db).await?;
    let made = db.deploy(&org, &deploy).await?;
    let (slot, _) = made.placed.slot.expect("warm");
    let tenant = db.store.tenant(&org.scope);
    let detail = tenant.workloads().get(&WorkloadRef::Id(made.workload)).await?;
    let (volume, _) = detail.volume.expect("the slot's volume became the workload's");

    let none = Change::default();
    tenant.workloads().set_desired(made.workload, Desired::Deleted, None, &none).await?;
    let mut rounds = 0;
    loop {
        let detail = tenant.workloads().get(&WorkloadRef::Id(made.workload)).await?;
        if detail.workload.deleted_at.is_some() {
            break;
        }
        rounds += 1;
        assert!(rounds < 10, "{detail:?}");
        for act in lifecycle::converge(&detail.view(), 0).acts {
            match act {
                Act::Leave { instance, .. } => {
                    assert_eq!(tenant.workloads().leave(instance, &none).await?, Some((slot, node.id)));
                }
                Act::Finish => assert!(tenant.workloads().finish(made.workload, &none).await?),
                other => panic!("{other:?}"),
            }
        }
        db.report(&node, slot, 3, SlotState::Stopping).await?;
        db.report(&node, slot, 3, SlotState::Absent).await?;
    }
    assert_eq!(db.number("select reserved_mib::bigint + slots_used from nodes").await?, 0);
    let set = db.system().slots().of_node(node.id).await?;
    assert!(set.slots.is_empty());
    assert_eq!(set.removed_volumes, [volume]);
    assert!(db.system().volumes().removed(node.id, volume).await?);
    assert!(db.system().slots().of_node(node.id).await?.removed_volumes.is_empty());
    assert!(tenant.workloads().list(&WorkloadFilter { limit: 10, ..WorkloadFilter::default() }).await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn a_single_writer_never_has_two_containers() -> Result<()> {
    let db = TestDb::new().await?;
    let tier = db.tier("free").await?;
    let org = db.org("ann", "free").await?;
    let (one, two) = (db.node("n1", 10_000).await?, db.node("n2", 10_000).await?);
    let mut deploy = Deploy::new("agent", &tier);
    deploy.template.state = Some(StateVolume { path: "/data".to_owned(), size_mib: 64 });
    deploy.claim = ClaimPolicy::Never;
    let made = db.deploy(&org, &deploy).await?;
    let (slot, home) = made.placed.slot.expect("cold");
    let node = if home == one.id { &one } else { &two };
    let tenant = db.store.tenant(&org.scope);
    let none = Change::default();
    let detail = tenant.workloads().get(&WorkloadRef::Id(made.workload)).await?;
    let (volume, at) = detail.volume.expect("a volume");
    assert_eq!(at, home);

    // Another instance while the first is there is refused, whoever asks.
    let mut second = deploy.instance()?;
    second.volume = VolumeUse::Existing(volume, home);
    let (generation, release) = (detail.workload.generation, detail.workload.release);
    let refused = tenant.workloads().launch(made.workload, generation, release, &second, &none).await;
    assert!(matches!(refused, Err(StoreError::InUse(_))), "{refused:?}");
    tenant.workloads().leave(made.instance, &none).await?;
    let refused = tenant.workloads().launch(made.workload, generation, release, &second, &none).await;
    assert!(matches!(refused, Err(StoreError::InUse(_))), "its container was still there: {refused:?}");

    db.report(node, slot, 2, SlotState::Absent).await?;
    let placed = tenant.workloads().launch(made.workload, generation, release, &second, &none).await?;
    assert_eq!(placed.placed.slot, Some((second.slot, home)), "it went where its volume is not");
    let desired = db.system().slots().desired(&[second.slot]).await?.remove(0);
    assert_eq!(desired.volume.map(|(volume, _)| volume), Some(volume));
    // A launch decided on an older generation is refused.
    let stale = tenant.workloads().launch(made.workload, generation + 1, release, &deploy.instance()?, &none).await;
    assert!(matches!(stale, Err(StoreError::Conflict { .. })), "{stale:?}");
    Ok(())
}

#[tokio::test]
async fn a_new_release_is_numbered_diffed_and_guarded_by_its_version() -> Result<()> {
    let db = TestDb::new().await?;
    let tier = db.tier("free").await?;
    let org = db.org("ann", "free").await?;
    db.node("n1", 10_000).await?;
    let deploy = Deploy::new("agent", &tier);
    let made = db.deploy(&org, &deploy).await?;
    let tenant = db.store.tenant(&org.scope);
    let none = Change::default();
    let mut config = deploy.config.clone();
    config.env.insert(clawhq_domain::names::EnvName::parse("LEVEL")?, "debug".to_owned());
    let release = from_template(&deploy.template, config).map_err(|why| anyhow::anyhow!("{why:?}"))?;
    let new = || NewRelease { id: mint(), release: release.clone() };
    let version = tenant.workloads().get(&WorkloadRef::Id(made.workload)).await?.workload.version;
    let (workload, second) =
        tenant.workloads().revise(made.workload, &new(), "free", Some(version), Some(org.user), &none).await?;
    assert_eq!((second.number, workload.release, workload.generation), (2, second.id, 2));
    assert_eq!(second.diff.iter().map(|change| change.field.as_str()).collect::<Vec<_>>(), ["env.LEVEL"]);
    let late = tenant.workloads().revise(made.workload, &new(), "free", Some(version), None, &none).await;
    assert!(matches!(late, Err(StoreError::Conflict { current }) if current == workload.version), "{late:?}");
    // Of many at once each gets a number of its own.
    let many = (0..8).map(|_| async {
        let new = new();
        tenant.workloads().revise(made.workload, &new, "free", None, None, &none).await
    });
    let mut numbers = futures::future::join_all(many)
        .await
        .into_iter()
        .map(|outcome| outcome.map(|(_, release)| release.number))
        .collect::<Result<Vec<_>, _>>()?;
    numbers.sort_unstable();
    assert_eq!(numbers, (3..11).collect::<Vec<_>>());
    let releases = tenant.workloads().releases(made.workload, Some(3), 10).await?;
    assert_eq!(releases.iter().map(|release| release.number).collect::<Vec<_>>(), [2, 1]);
    assert_eq!(releases[0].release, release);
    Ok(())
}

#[tokio::test]
async fn a_failure_is_final_and_keeps_its_reason() -> Result<()> {
    let db = TestDb::new().await?;
    let tier = db.tier("free").await?;
    let org = db.org("ann", "free").await?;
    let node = db.node("n1", 10_000).await?;
    let made = db.deploy(&org, &Deploy::new("agent", &tier)).await?;
    let (slot, _) = made.placed.slot.expect("cold");
    let failure = Failure {
        kind: FailureKind::Command,
        message: "no such file".to_owned(),
        exit: Some(clawhq_domain::slot::Exit::Code(127)),
        log_tail: vec!["oh".to_owned()],
    };
    let report = SlotReport {
        slot,
        generation: 1,
        instance: Some(made.instance),
        state: SlotState::Failed,
        run: 1,
        container: None,
        image_digest: None,
        failure: Some(failure.clone()),
        steps: Vec::new(),
        at: 0,
    };
    db.system().slots().observe(node.id, node.epoch, &report, None).await?;
    let tenant = db.store.tenant(&org.scope);
    let late = Failure { kind: FailureKind::Probe, ..failure.clone() };
    assert!(!tenant.workloads().fail(made.instance, &late, &Change::default()).await?);
    tenant.workloads().leave(made.instance, &Change::default()).await?;
    db.report(&node, slot, 2, SlotState::Absent).await?;
    let detail = tenant.workloads().get(&WorkloadRef::Id(made.workload)).await?;
    assert_eq!(detail.instances[0].failure, Some(failure));
    assert!(detail.instances[0].ended_at.is_some());
    assert_eq!(lifecycle::shown(&detail.view(), false).0, Shown::Failed);
    // Not a transient failure: nothing more is tried by itself.
    assert_eq!(lifecycle::converge(&detail.view(), i64::MAX / 4).acts, []);
    Ok(())
}

#[tokio::test]
async fn a_restart_reaches_the_running_container_alone() -> Result<()> {
    let db = TestDb::new().await?;
    let tier = db.tier("free").await?;
    let org = db.org("ann", "free").await?;
    let node = db.node("n1", 10_000).await?;
    let made = db.deploy(&org, &Deploy::new("agent", &tier)).await?;
    let (slot, _) = made.placed.slot.expect("cold");
    let tenant = db.store.tenant(&org.scope);
    assert_eq!(tenant.workloads().restart(made.workload, &Change::default()).await?, Some((slot, node.id)));
    let desired = db.system().slots().desired(&[slot]).await?.remove(0);
    assert_eq!((desired.generation, desired.claim.expect("claimed").restart), (2, 1));
    tenant.workloads().leave(made.instance, &Change::default()).await?;
    assert_eq!(tenant.workloads().restart(made.workload, &Change::default()).await?, None);
    Ok(())
}

#[tokio::test]
async fn a_join_token_works_once_and_the_newest_stream_wins() -> Result<()> {
    let db = TestDb::new().await?;
    let nodes = db.system().nodes();
    let token = TokenHash::of("join");
    let id = mint();
    nodes.create(&NewNode { id, name: "n".to_owned(), join_token: token, join_lifetime_ms: 60_000 }).await?;
    let facts =
        NodeFacts { capacity_mib: 1000, slots_max: 10, disk_free_mib: 1, ready: true, facts: clawhq_store::Json::Null };
    assert!(nodes.open_stream(id, &facts, 1000).await.is_err(), "a node without a certificate speaks");
    let (one, two) =
        tokio::join!(nodes.enrol(&token, &[1; 32], 60_000, &facts), nodes.enrol(&token, &[2; 32], 60_000, &facts));
    let won = [one?, two?];
    assert_eq!(won.iter().flatten().count(), 1, "a token was used twice");
    assert_eq!(nodes.enrol(&token, &[3; 32], 60_000, &facts).await?, None);
    let certificate = if won[0].is_some() { [1; 32] } else { [2; 32] };
    assert_eq!(nodes.by_certificate(&certificate).await?.map(|node| node.id), Some(id));
    assert!(nodes.by_certificate(&[3; 32]).await?.is_none());

    let first = nodes.open_stream(id, &facts, 60_000).await?;
    let second = nodes.open_stream(id, &facts, 60_000).await?;
    assert!(second > first);
    let beat = Heartbeat { disk_free_mib: 5, ready: true, lease_ms: 60_000 };
    assert!(!nodes.heartbeat(id, first, beat).await?);
    assert!(nodes.heartbeat(id, second, beat).await?);

    // Both certificates hold until the new one is used, then the old one is refused.
    nodes.renew_certificate(id, &[9; 32], 60_000).await?;
    assert!(nodes.by_certificate(&certificate).await?.is_some());
    assert!(nodes.by_certificate(&[9; 32]).await?.is_some());
    assert!(nodes.by_certificate(&certificate).await?.is_none());
    nodes.set_state(id, NodeState::Disabled).await?;
    assert!(nodes.by_certificate(&[9; 32]).await?.is_none());
    assert!(!nodes.heartbeat(id, second, beat).await?);
    Ok(())
}

#[tokio::test]
async fn what_was_on_a_dead_node_is_given_up_and_replaced() -> Result<()> {
    let db = TestDb::new().await?;
    let tier = db.tier("free").await?;
    let org = db.org("ann", "free").await?;
    let node = db.node("n1", 10_000).await?;
    let made = db.deploy(&org, &Deploy::new("agent", &tier)).await?;
    let failure = Failure {
        kind: FailureKind::Runtime,
        message: "The node is gone.".to_owned(),
        exit: None,
        log_tail: Vec::new(),
    };
    assert!(db.system().slots().abandon(node.id, &failure).await?.is_empty(), "a live node was given up");
    db.system().nodes().set_state(node.id, NodeState::Disabled).await?;
    let lost = db.system().slots().abandon(node.id, &failure).await?;
    assert_eq!(lost, [(org.scope.org(), made.workload)]);
    assert_eq!(db.system().nodes().reservation_drift().await?, []);
    let detail = db.store.tenant(&org.scope).workloads().get(&WorkloadRef::Id(made.workload)).await?;
    let acts = lifecycle::converge(&detail.view(), i64::MAX / 4).acts;
    assert_eq!(acts, [Act::Create]);
    let unsettled = db.system().workloads().unsettled(None, 10).await?;
    assert_eq!(unsettled.iter().map(|one| one.workload).collect::<Vec<_>>(), [made.workload]);
    Ok(())
}

#[tokio::test]
async fn events_are_read_in_order_and_without_gaps_while_many_write() -> Result<()> {
    let db = std::sync::Arc::new(TestDb::with_connections(20).await?);
    let org = db.org("ann", "free").await?;
    let (store, scope) = (db.store.clone(), org.scope);
    let writers: Vec<_> = (0..10)
        .map(|_| {
            let store = store.clone();
            tokio::spawn(async move {
                for _ in 0..20 {
                    let event = clawhq_store::NewEvent {
                        id: mint(),
                        workload: None,
                        instance: None,
                        kind: "x".to_owned(),
                        message: "x".to_owned(),
                        data: clawhq_store::Json::Null,
                    };
                    let change = Change { events: vec![event], ..Change::default() };
                    store.tenant(&scope).events().append(&change).await?;
                }
                anyhow::Ok(())
            })
        })
        .collect();
    // A reader that follows "after" sees 1, 2, 3 … whatever the order of the writers' commits.
    let mut last = 0;
    while last < 200 {
        for event in store.tenant(&scope).events().after(None, last, 7).await? {
            assert_eq!(event.seq, last + 1, "an event was skipped");
            last = event.seq;
        }
    }
    for writer in writers {
        writer.await??;
    }
    assert_eq!(store.tenant(&scope).events().newest().await?, 200);
    Ok(())
}

/// A dozen failures of newer releases must not hide the container that still serves the older one.
#[tokio::test]
async fn what_still_runs_is_seen_however_many_came_after_it() -> Result<()> {
    let db = TestDb::new().await?;
    let tier = db.tier("free").await?;
    let org = db.org("ann", "free").await?;
    let node = db.node("n1", 10_000).await?;
    let deploy = Deploy::new("agent", &tier);
    let made = db.deploy(&org, &deploy).await?;
    let (oldest, _) = made.placed.slot.expect("cold");
    db.report(&node, oldest, 1, SlotState::Running).await?;
    let tenant = db.store.tenant(&org.scope);
    let none = Change::default();
    let release = from_template(&deploy.template, deploy.config.clone()).map_err(|why| anyhow::anyhow!("{why:?}"))?;
    let new = NewRelease { id: mint(), release };
    let (workload, _) = tenant.workloads().revise(made.workload, &new, "free", None, None, &none).await?;
    let failure =
        Failure { kind: FailureKind::Runtime, message: "it broke".to_owned(), exit: None, log_tail: Vec::new() };
    for _ in 0..15 {
        let instance = deploy.instance()?;
        let placed = tenant.workloads().launch(made.workload, workload.generation, new.id, &instance, &none).await?;
        let (slot, _) = placed.placed.slot.expect("cold");
        assert!(tenant.workloads().fail(instance.id, &failure, &none).await?);
        tenant.workloads().leave(instance.id, &none).await?;
        db.report(&node, slot, 2, SlotState::Absent).await?;
    }
    let detail = tenant.workloads().get(&WorkloadRef::Id(made.workload)).await?;
    assert!(detail.instances.iter().any(|one| one.id == made.instance), "the one that serves is out of sight");
    assert_eq!(lifecycle::shown(&detail.view(), false).0, Shown::Running);

    tenant.workloads().set_desired(made.workload, Desired::Deleted, None, &none).await?;
    let detail = tenant.workloads().get(&WorkloadRef::Id(made.workload)).await?;
    let acts = lifecycle::converge(&detail.view(), i64::MAX / 4).acts;
    assert_eq!(acts, [Act::Leave { instance: made.instance, why: "deleted" }]);
    Ok(())
}

/// Delete meets a placement that is about to commit: the container it just got must go as well.
#[tokio::test]
async fn an_instance_that_leaves_while_it_is_placed_takes_its_container_along() -> Result<()> {
    let db = TestDb::new().await?;
    let tier = db.tier("free").await?;
    let org = db.org("ann", "free").await?;
    // No node yet: it waits in the queue.
    let made = db.deploy(&org, &Deploy::new("agent", &tier)).await?;
    assert_eq!(made.placed.slot, None);
    let node = db.node("n1", 10_000).await?;
    let slot = db.ready_slots(&node, &hello(), &tier, 1).await?[0];
    let uuid = |id: u128| format!("'{id:032x}'::uuid");
    let (org_id, instance, slot_id) =
        (uuid(org.scope.org().as_u128()), uuid(made.instance.as_u128()), uuid(slot.as_u128()));

    // What placing does, held open.
    let mut placing = db.raw().await?;
    let placed = format!(
        "begin;
        select id from instances where id = {instance} for update;
        update slots set org_id = {org_id}, instance_id = {instance}, generation = generation + 1, claimed_at = now()
            where id = {slot_id};
        update instances set slot_id = {slot_id}, node_id = {node}, placement = 'warm', placed_at = now(),
            observed = 'waiting' where id = {instance}",
        node = uuid(node.id.as_u128()),
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(placed)).execute(&mut placing).await?;
    let leaving = tokio::spawn({
        let (store, scope, instance) = (db.store.clone(), org.scope, made.instance);
        async move { store.tenant(&scope).workloads().leave(instance, &Change::default()).await }
    });
    let waits = "select count(*) from pg_stat_activity
        where datname = current_database() and wait_event_type = 'Lock' and query like 'with%'";
    while db.number(waits).await? == 0 {
        assert!(!leaving.is_finished(), "it did not wait for the placement");
        tokio::task::yield_now().await;
    }
    sqlx::raw_sql("commit").execute(&mut placing).await?;
    assert_eq!(leaving.await??, Some((slot, node.id)), "nobody tells the node");
    let desired = db.system().slots().desired(&[slot]).await?.remove(0);
    assert!(!desired.present, "its container stays for ever");
    let none = Change::default();
    assert_eq!(db.store.tenant(&org.scope).workloads().leave(made.instance, &none).await?, None, "said once");
    db.report(&node, slot, desired.generation, SlotState::Absent).await?;
    let detail = db.store.tenant(&org.scope).workloads().get(&WorkloadRef::Id(made.workload)).await?;
    assert!(detail.instances[0].ended_at.is_some());
    Ok(())
}

/// One row that this version cannot read must not keep a whole node from what is wanted of it.
#[tokio::test]
async fn a_slot_that_cannot_be_read_is_mentioned_and_the_others_are_told() -> Result<()> {
    let db = TestDb::new().await?;
    let tier = db.tier("free").await?;
    let node = db.node("n1", 10_000).await?;
    let slots = db.ready_slots(&node, &hello(), &tier, 3).await?;
    db.system().slots().retire(&[slots[2]]).await?;
    let broken = format!(
        "alter table slots disable trigger slots_spec_fixed;
         update slots set spec = '{{\"of\": \"a later version\"}}' where id in ('{:032x}', '{:032x}')",
        slots[0].as_u128(),
        slots[2].as_u128()
    );
    db.execute(&broken).await?;
    let set = db.system().slots().of_node(node.id).await?;
    assert_eq!(set.slots.iter().map(|slot| slot.slot).collect::<Vec<_>>(), [slots[1]]);
    let bare = |slot, generation, present| clawhq_store::UnreadableSlot { slot, generation, present };
    assert_eq!(set.unreadable, [bare(slots[0], 1, true), bare(slots[2], 2, false)]);
    Ok(())
}

/// While a node is silent nothing can be reported in time, so nothing is late when it is heard again.
#[tokio::test]
async fn no_deadline_counts_the_silence_of_a_node() -> Result<()> {
    let db = TestDb::new().await?;
    let tier = db.tier("free").await?;
    let org = db.org("ann", "free").await?;
    let node = db.node("n1", 10_000).await?;
    let made = db.deploy(&org, &Deploy::new("agent", &tier)).await?;
    let (slot, _) = made.placed.slot.expect("cold");
    db.report(&node, slot, 1, SlotState::Starting).await?;
    let acts = async || {
        let detail = db.store.tenant(&org.scope).workloads().get(&WorkloadRef::Id(made.workload)).await?;
        let now = db.number("select (extract(epoch from now()) * 1000)::bigint").await?;
        anyhow::Ok(lifecycle::converge(&detail.view(), now).acts)
    };
    db.execute(
        "update instances set observed_at = now() - interval '1 hour';
         update nodes set lease_until = now() - interval '50 minutes', heard_since = now() - interval '2 hours'",
    )
    .await?;
    assert_eq!(acts().await?, []);
    let facts = NodeFacts {
        capacity_mib: 10_000,
        slots_max: 9,
        disk_free_mib: 1,
        ready: true,
        facts: clawhq_store::Json::Null,
    };
    let epoch = db.system().nodes().open_stream(node.id, &facts, 3_600_000).await?;
    assert_eq!(acts().await?, [], "it was late before it could say a word");
    // From then on its time runs, and a stream that is only dialled anew does not stop it.
    db.execute("update nodes set heard_since = now() - interval '20 minutes'").await?;
    db.system().nodes().open_stream(node.id, &facts, 3_600_000).await?;
    assert!(matches!(acts().await?[..], [Act::Fail { instance, .. }] if instance == made.instance));
    let beat = Heartbeat { disk_free_mib: 5, ready: true, lease_ms: 60_000 };
    assert!(db.system().nodes().heartbeat(node.id, epoch + 1, beat).await?);
    assert!(matches!(acts().await?[..], [Act::Fail { .. }]));
    Ok(())
}

/// A reference may mean another image tomorrow; a release does not.
#[tokio::test]
async fn what_an_image_was_resolved_to_stays_with_its_release() -> Result<()> {
    let db = TestDb::new().await?;
    let tier = db.tier("free").await?;
    let org = db.org("ann", "free").await?;
    let node = db.node("n1", 10_000).await?;
    let image = clawhq_domain::names::ImageRef::parse("example.org/app:1")?;
    let bare =
        clawhq_domain::release::from_image(image, Default::default()).map_err(|why| anyhow::anyhow!("{why:?}"))?;
    let digest_after = async |name: &str, bare: Option<clawhq_domain::release::Release>| {
        let mut new = Deploy::new(name, &tier).build()?;
        new.instance.claim = ClaimPolicy::Never;
        if let Some(release) = bare {
            (new.instance.spec.release, new.instance.spec.template) = (release.clone(), None);
            new.release.release = release;
        }
        let rows = db.store.tenant(&org.scope);
        let made = rows.workloads().create(&new, &Change::default()).await?;
        let (slot, _) = made.placed.slot.expect("cold");
        for digest in ["sha256:first", "sha256:second"] {
            let report = SlotReport {
                slot,
                generation: 1,
                instance: Some(made.instance),
                state: SlotState::Running,
                run: 1,
                container: None,
                image_digest: Some(digest.to_owned()),
                failure: None,
                steps: Vec::new(),
                at: 0,
            };
            assert!(db.system().slots().observe(node.id, node.epoch, &report, None).await? != ReportOutcome::Stale);
        }
        let detail = rows.workloads().get(&WorkloadRef::Id(made.workload)).await?;
        anyhow::Ok(detail.release.release.image_digest)
    };
    assert_eq!(digest_after("image", Some(bare)).await?.as_deref(), Some("sha256:first"));
    // A template's image is the platform's: its slots are made from what it is today.
    assert_eq!(digest_after("template", None).await?, None);
    Ok(())
}

/// Locks are taken in one order by all: a circle would be found out by the database only after a second.
#[tokio::test]
async fn nobody_waits_for_another_in_a_circle() -> Result<()> {
    let db = TestDb::new().await?;
    let mut tier = db.tier("free").await?;
    tier.max_per_node = 1000;
    let org = db.org("ann", "free").await?;
    let node = db.node("n1", 100_000).await?;
    let tenant = db.store.tenant(&org.scope);
    let none = Change::default();
    for round in 0..30 {
        let made = db.deploy(&org, &Deploy::new(&format!("agent{round}"), &tier)).await?;
        let (workloads, others) = (tenant.workloads(), tenant.workloads());
        let (restarted, left) =
            tokio::join!(workloads.restart(made.workload, &none), others.leave(made.instance, &none));
        restarted?;
        assert!(left?.is_some());
    }
    // A launch and a deploy of one org, both on the one node.
    let deploy = Deploy::new("again", &tier);
    let made = db.deploy(&org, &deploy).await?;
    let detail = tenant.workloads().get(&WorkloadRef::Id(made.workload)).await?;
    let mut last = (made.instance, made.placed.slot.expect("cold").0);
    for round in 0..30 {
        tenant.workloads().leave(last.0, &none).await?;
        db.report(&node, last.1, 2, SlotState::Absent).await?;
        let instance = deploy.instance()?;
        let (launched, other) = (tenant.workloads(), Deploy::new(&format!("other{round}"), &tier));
        let event = clawhq_store::NewEvent {
            id: mint(),
            workload: Some(made.workload),
            instance: None,
            kind: "x".to_owned(),
            message: "x".to_owned(),
            data: clawhq_store::Json::Null,
        };
        let change = Change { events: vec![event], ..Change::default() };
        let (generation, release) = (detail.workload.generation, detail.workload.release);
        let (launched, deployed) = tokio::join!(
            launched.launch(made.workload, generation, release, &instance, &change),
            db.deploy(&org, &other)
        );
        last = (instance.id, launched?.placed.slot.expect("cold").0);
        deployed?;
    }
    // A backend may keep its count of them for seconds, but not beyond its end.
    db.store.close().await;
    // The server waits for each; one that has gone by itself meanwhile is no longer there to be ended.
    let end = "select count(pg_terminate_backend(pid, 30000)) from pg_stat_activity
        where datname = current_database() and application_name = 'clawhq'";
    db.number(end).await?;
    let backends = "select count(*) from pg_stat_activity
        where datname = current_database() and application_name = 'clawhq'";
    assert_eq!(db.number(backends).await?, 0);
    let deadlocks = "select deadlocks from pg_stat_database where datname = current_database()";
    assert_eq!(db.number(deadlocks).await?, 0);
    Ok(())
}
