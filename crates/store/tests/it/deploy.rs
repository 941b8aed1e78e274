//! The deploy transaction: claims, reservations, quota, idempotency.

use std::collections::BTreeSet;
use std::sync::Arc;

use anyhow::Result;
use clawhq_domain::ids::SlotId;
use clawhq_domain::slot::SlotState;
use clawhq_domain::workload::ClaimPolicy;
use clawhq_store::{
    Change, Earlier, IdempotencyKey, Limit, NewEvent, Placement, StoreError, StoredResponse, Taken, Wakeup, WorkloadRef,
};
use clawhq_testkit::{Deploy, TestDb, hello, mint};
use futures::future::join_all;

fn key(text: &str, hash: u8) -> IdempotencyKey {
    IdempotencyKey { route: "POST /orgs/{org}/workloads".to_owned(), key: text.to_owned(), request_hash: [hash; 32] }
}

fn store_error<T>(outcome: Result<T>) -> StoreError {
    match outcome {
        Ok(_) => panic!("it succeeded"),
        Err(error) => error.downcast().expect("a store's error"),
    }
}

#[tokio::test]
async fn a_warm_deploy_claims_the_oldest_slot_and_tells_its_node_everything() -> Result<()> {
    let db = TestDb::new().await?;
    let tier = db.tier("free").await?;
    let org = db.org("acme", "free").await?;
    let node = db.node("n1", 10_000).await?;
    let slots = db.ready_slots(&node, &hello(), &tier, 3).await?;

    let mut deploy = Deploy::new("agent", &tier);
    deploy.change.events.push(NewEvent {
        id: mint(),
        workload: None,
        instance: None,
        kind: "workload.created".to_owned(),
        message: "agent was created.".to_owned(),
        data: clawhq_store::Json::Object(Default::default()),
    });
    let made = db.deploy(&org, &deploy).await?;
    assert_eq!(made.placed.placement, Placement::Warm { was: SlotState::Waiting });
    assert_eq!(made.placed.slot, Some((slots[0], node.id)));

    let desired = db.system().slots().desired(&[slots[0]]).await?.remove(0);
    let claim = desired.claim.expect("claimed");
    assert_eq!((desired.generation, desired.present), (2, true));
    assert_eq!((claim.org, claim.workload, claim.instance), (org.scope.org(), made.workload, made.instance));
    assert_eq!(claim.workload_name.as_str(), "agent");
    assert_eq!(db.system().slots().of_node(node.id).await?.slots.len(), 3);

    let detail = db.store.tenant(&org.scope).workloads().get(&WorkloadRef::Id(made.workload)).await?;
    assert_eq!(detail.instances.len(), 1);
    assert_eq!(detail.release.number, 1);
    let events = db.store.tenant(&org.scope).events().after(None, 0, 10).await?;
    assert_eq!(
        events.iter().map(|event| (event.seq, event.kind.as_str())).collect::<Vec<_>>(),
        [(1, "workload.created")]
    );
    Ok(())
}

#[tokio::test]
async fn fifty_claimers_never_share_a_slot() -> Result<()> {
    let db = Arc::new(TestDb::with_connections(50).await?);
    let tier = db.tier("free").await?;
    let node = db.node("n1", 100_000).await?;
    let slots = db.ready_slots(&node, &hello(), &tier, 30).await?;
    let mut orgs = Vec::new();
    for number in 0..5 {
        orgs.push(db.org(&format!("org{number}"), "free").await?);
    }
    // Several orgs, several claims in each, more claims than slots: the rest is placed cold.
    let claims = (0..50).map(|number| {
        let (db, org, deploy) = (&db, &orgs[number % 5], Deploy::new(&format!("w{number}"), &tier));
        async move { db.deploy(org, &deploy).await }
    });
    let made = join_all(claims).await.into_iter().collect::<Result<Vec<_>>>()?;
    let warm: Vec<SlotId> = made
        .iter()
        .filter(|made| matches!(made.placed.placement, Placement::Warm { .. }))
        .map(|made| made.placed.slot.expect("placed").0)
        .collect();
    let distinct: BTreeSet<SlotId> = warm.iter().copied().collect();
    assert_eq!(distinct.len(), warm.len(), "a slot was claimed twice");
    assert!(distinct.is_subset(&slots.iter().copied().collect()));
    let all: BTreeSet<SlotId> = made.iter().map(|made| made.placed.slot.expect("placed").0).collect();
    assert_eq!(all.len(), 50, "two instances share a container");
    assert_eq!(warm.len(), 30, "a ready slot was left while instances were placed cold");
    assert_eq!(db.number("select count(*) from slots where instance_id is not null").await?, 50);
    assert_eq!(db.system().nodes().reservation_drift().await?, []);
    Ok(())
}

#[tokio::test]
async fn a_slot_is_never_given_to_a_second_owner() -> Result<()> {
    let db = TestDb::new().await?;
    let tier = db.tier("free").await?;
    let (first, second) = (db.org("first", "free").await?, db.org("second", "free").await?);
    let node = db.node("n1", 10_000).await?;
    db.ready_slots(&node, &hello(), &tier, 1).await?;
    db.deploy(&first, &Deploy::new("a", &tier)).await?;
    let cold = db.deploy(&second, &Deploy::new("b", &tier)).await?;
    assert_eq!(cold.placed.placement, Placement::Cold);

    // Even the schema's owner, past every repository, cannot.
    for attempt in [
        "update slots set org_id = null, instance_id = null where org_id is not null",
        "update slots s set org_id = o.id from orgs o where s.org_id is not null and o.id <> s.org_id",
        "update slots set instance_id = (select instance_id from slots where claimed_at is not null order by id limit 1)",
    ] {
        let refused = db.execute(attempt).await.expect_err(attempt);
        assert!(format!("{refused:#}").contains("error returned from database"), "{refused:#}");
    }
    Ok(())
}

#[tokio::test]
async fn reservations_never_exceed_capacity_and_what_does_not_fit_queues() -> Result<()> {
    let db = Arc::new(TestDb::with_connections(40).await?);
    let tier = db.tier("free").await?;
    let org = db.org("acme", "free").await?;
    // Room for seven of 256 MiB.
    let node = db.node("n1", 7 * 256 + 100).await?;
    let deploys = (0..40).map(|number| {
        let (db, org, deploy) = (&db, &org, Deploy::new(&format!("w{number}"), &tier));
        async move { db.deploy(org, &deploy).await }
    });
    let made = join_all(deploys).await.into_iter().collect::<Result<Vec<_>>>()?;
    let cold = made.iter().filter(|made| made.placed.placement == Placement::Cold).count();
    assert_eq!(cold, 7);
    let mut positions: Vec<u32> = made
        .iter()
        .filter_map(|made| match &made.placed.placement {
            Placement::Queued { position, why } => {
                assert!(why.message().contains("out of memory"), "{}", why.message());
                Some(*position)
            }
            _ => None,
        })
        .collect();
    positions.sort_unstable();
    assert_eq!(positions.len(), 33);
    let reserved = db.system().nodes().get(node.id).await?.expect("the node");
    assert_eq!((reserved.reserved_mib, reserved.slots_used), (7 * 256, 7));
    let over = db.execute("update nodes set reserved_mib = capacity_mib + 1").await;
    assert!(over.is_err(), "the schema lets a node be reserved past its capacity");

    // Room comes: the queue is served in its order, and only as far as there is room.
    let gone = made.iter().find(|made| made.placed.placement == Placement::Cold).expect("one was placed");
    let workloads = db.store.tenant(&org.scope);
    let (slot, _) = workloads.workloads().leave(gone.instance, &Change::default()).await?.expect("it had a slot");
    db.report(&node, slot, 2, SlotState::Absent).await?;
    let queued = db.system().instances().queued(None, 100).await?;
    assert_eq!(queued.len(), 33);
    let (scope, tenth) = &queued[9];
    let behind = db.system().instances().queued(Some((scope.org(), tenth.id)), 5).await?;
    let ids = |some: &[(_, clawhq_store::Instance)]| some.iter().map(|(_, one)| one.id).collect::<Vec<_>>();
    assert_eq!(ids(&behind), ids(&queued[10..15]), "the next page begins behind the last one");
    let mut served = Vec::new();
    for (scope, instance) in &queued {
        let mut new = Deploy::new("x", &tier).instance()?;
        new.id = instance.id;
        let placed = db.store.tenant(scope).workloads().place_queued(instance, &new, &Change::default()).await?;
        if placed.slot.is_some() {
            served.push(instance.id);
        }
    }
    assert_eq!(served, [queued[0].1.id]);
    assert_eq!(db.system().nodes().reservation_drift().await?, []);
    Ok(())
}

#[tokio::test]
async fn claim_policies_are_kept() -> Result<()> {
    let db = TestDb::new().await?;
    let tier = db.tier("free").await?;
    let org = db.org("acme", "free").await?;
    let node = db.node("n1", 10_000).await?;
    let mut require = Deploy::new("strict", &tier);
    require.claim = ClaimPolicy::Require;
    let refused = store_error(db.deploy(&org, &require).await);
    assert!(matches!(refused, StoreError::LimitReached(Limit::NoWarmSlot)), "{refused:?}");
    assert_eq!(db.number("select count(*) from workloads").await?, 0, "something was left of a refused deploy");

    db.ready_slots(&node, &hello(), &tier, 1).await?;
    let mut never = Deploy::new("cold", &tier);
    never.claim = ClaimPolicy::Never;
    assert_eq!(db.deploy(&org, &never).await?.placed.placement, Placement::Cold);
    assert!(matches!(db.deploy(&org, &require).await?.placed.placement, Placement::Warm { .. }));
    Ok(())
}

#[tokio::test]
async fn a_full_org_is_refused_and_claims_no_slot() -> Result<()> {
    let db = TestDb::new().await?;
    let tier = db.tier("free").await?;
    let org = db.org("acme", "free").await?;
    let node = db.node("n1", 10_000).await?;
    db.ready_slots(&node, &hello(), &tier, 2).await?;
    let limited = |name: &str| Deploy { max_workloads: 1, ..Deploy::new(name, &tier) };
    assert!(matches!(db.deploy(&org, &limited("first")).await?.placed.placement, Placement::Warm { .. }));
    let refused = store_error(db.deploy(&org, &limited("second")).await);
    assert!(matches!(refused, StoreError::LimitReached(Limit::Workloads { allowed: 1 })), "{refused:?}");
    assert_eq!(db.number("select count(*) from slots where org_id is not null").await?, 1);
    Ok(())
}

#[tokio::test]
async fn slots_of_another_recipe_tier_or_silent_node_are_not_claimed() -> Result<()> {
    let db = TestDb::new().await?;
    let (free, pro) = (db.tier("free").await?, db.tier("pro").await?);
    let org = db.org("acme", "pro").await?;
    let node = db.node("n1", 10_000).await?;
    db.ready_slots(&node, &hello(), &pro, 1).await?;
    let mut renewed = hello();
    renewed.argv.push("--new".to_owned());
    db.ready_slots(&node, &renewed, &free, 1).await?;
    assert_eq!(db.deploy(&org, &Deploy::new("a", &free)).await?.placed.placement, Placement::Cold);

    db.ready_slots(&node, &hello(), &free, 1).await?;
    db.execute("update nodes set lease_until = now() - interval '1 second'").await?;
    let queued = db.deploy(&org, &Deploy::new("b", &free)).await?;
    assert!(matches!(queued.placed.placement, Placement::Queued { .. }), "{queued:?}");
    Ok(())
}

#[tokio::test]
async fn a_retired_slot_and_a_claimed_one_are_never_the_same() -> Result<()> {
    let db = Arc::new(TestDb::with_connections(40).await?);
    let tier = db.tier("free").await?;
    let org = db.org("acme", "free").await?;
    let node = db.node("n1", 100_000).await?;
    let slots = db.ready_slots(&node, &hello(), &tier, 20).await?;
    let deploys = join_all((0..20).map(|number| {
        let (db, org, deploy) = (&db, &org, Deploy::new(&format!("w{number}"), &tier));
        async move { db.deploy(org, &deploy).await }
    }));
    let retire = join_all(slots.iter().map(|slot| {
        let db = &db;
        async move { db.system().slots().retire(&[*slot]).await }
    }));
    let (made, retired) = tokio::join!(deploys, retire);
    made.into_iter().collect::<Result<Vec<_>>>()?;
    retired.into_iter().collect::<Result<Vec<_>, _>>()?;
    let both = "select count(*) from slots where desired = 'absent' and instance_id is not null";
    assert_eq!(db.number(both).await?, 0);
    Ok(())
}

#[tokio::test]
async fn the_tiers_limit_holds_against_a_crowd() -> Result<()> {
    let db = Arc::new(TestDb::with_connections(20).await?);
    let tier = db.tier("free").await?;
    let org = db.org("acme", "free").await?;
    db.node("n1", 100_000).await?;
    let deploys = (0..20).map(|number| {
        let mut deploy = Deploy::new(&format!("w{number}"), &tier);
        deploy.max_workloads = 3;
        let (db, org) = (&db, &org);
        async move { db.deploy(org, &deploy).await }
    });
    let (made, refused): (Vec<_>, Vec<_>) = join_all(deploys).await.into_iter().partition(Result::is_ok);
    assert_eq!(made.len(), 3);
    for refusal in refused {
        let refusal = store_error(refusal);
        assert!(matches!(refusal, StoreError::LimitReached(Limit::Workloads { allowed: 3 })), "{refusal:?}");
    }
    assert_eq!(db.store.tenant(&org.scope).org().usage().await?.workloads, 3);
    Ok(())
}

#[tokio::test]
async fn one_key_makes_one_workload_however_many_ask_at_once() -> Result<()> {
    let db = Arc::new(TestDb::with_connections(30).await?);
    let tier = db.tier("free").await?;
    let org = db.org("acme", "free").await?;
    let node = db.node("n1", 100_000).await?;
    db.ready_slots(&node, &hello(), &tier, 5).await?;
    let deploys = (0..30).map(|number| {
        let mut deploy = Deploy::new(&format!("w{number}"), &tier);
        deploy.change.idempotency = Some(key("same", 1));
        let (db, org) = (&db, &org);
        async move { db.deploy(org, &deploy).await }
    });
    let (made, replayed): (Vec<_>, Vec<_>) = join_all(deploys).await.into_iter().partition(Result::is_ok);
    assert_eq!(made.len(), 1);
    let made = made.into_iter().next().expect("one")?;
    for replay in replayed {
        match store_error(replay) {
            StoreError::Replay(earlier) => match *earlier {
                Earlier::Unanswered { effect, .. } => assert_eq!(effect, Some(made.workload.as_u128())),
                other => panic!("{other:?}"),
            },
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(db.number("select count(*) from workloads").await?, 1);
    assert_eq!(db.number("select count(*) from slots where instance_id is not null").await?, 1);
    Ok(())
}

#[tokio::test]
async fn an_answer_is_replayed_word_for_word_and_a_key_is_for_one_request() -> Result<()> {
    let db = TestDb::new().await?;
    let tier = db.tier("free").await?;
    let (org, other) = (db.org("acme", "free").await?, db.org("other", "free").await?);
    db.node("n1", 100_000).await?;
    let mut deploy = Deploy::new("a", &tier);
    deploy.change.idempotency = Some(key("k", 1));
    db.deploy(&org, &deploy).await?;
    let response = StoredResponse {
        status: 201,
        headers: vec![("location".to_owned(), "/x".to_owned())],
        body: br#"{"id":1}"#.to_vec(),
    };
    let idempotency = db.store.tenant(&org.scope);
    idempotency.idempotency().answer(&key("k", 1), &response).await?;
    // A second answer does not replace what was told to somebody.
    let late = StoredResponse { status: 500, headers: Vec::new(), body: Vec::new() };
    idempotency.idempotency().answer(&key("k", 1), &late).await?;

    let replay = store_error(db.deploy(&org, &deploy).await);
    assert!(
        matches!(&replay, StoreError::Replay(earlier) if **earlier == Earlier::Response(response.clone())),
        "{replay:?}"
    );
    deploy.change.idempotency = Some(key("k", 2));
    let mismatch = store_error(db.deploy(&org, &deploy).await);
    assert!(matches!(&mismatch, StoreError::Replay(earlier) if **earlier == Earlier::Mismatch), "{mismatch:?}");
    // Another org's key of the same name is another key.
    deploy.change.idempotency = Some(key("k", 1));
    db.deploy(&other, &deploy).await?;

    // A refused request leaves its key free.
    let mut refused = Deploy::new("a", &tier);
    refused.change.idempotency = Some(key("again", 3));
    let taken = store_error(db.deploy(&org, &refused).await);
    assert!(matches!(taken, StoreError::AlreadyExists(Taken::WorkloadName)), "{taken:?}");
    refused.name = "b".to_owned();
    db.deploy(&org, &refused).await?;
    Ok(())
}

#[tokio::test]
async fn a_name_is_free_again_once_its_workload_is_gone() -> Result<()> {
    let db = TestDb::new().await?;
    let tier = db.tier("free").await?;
    let org = db.org("acme", "free").await?;
    let made = db.deploy(&org, &Deploy::new("agent", &tier)).await?;
    let tenant = db.store.tenant(&org.scope);
    use clawhq_domain::workload::Desired;
    let change = Change { wakeups: vec![Wakeup::workload(org.scope.org(), made.workload)], ..Change::default() };
    tenant.workloads().set_desired(made.workload, Desired::Deleted, None, &change).await?;
    assert!(!tenant.workloads().finish(made.workload, &Change::default()).await?, "an instance was still queued");
    assert_eq!(tenant.workloads().leave(made.instance, &Change::default()).await?, None);
    assert!(tenant.workloads().finish(made.workload, &Change::default()).await?);
    assert!(!tenant.workloads().finish(made.workload, &Change::default()).await?, "it ended twice");
    assert_eq!(tenant.org().usage().await?.workloads, 0);
    db.deploy(&org, &Deploy::new("agent", &tier)).await?;
    Ok(())
}

#[tokio::test]
async fn the_claim_reads_its_partial_index() -> Result<()> {
    let db = TestDb::new().await?;
    let tier = db.tier("free").await?;
    let org = db.org("acme", "free").await?;
    let node = db.node("n1", 1_000_000).await?;
    db.ready_slots(&node, &hello(), &tier, 2).await?;
    // A table as it is after a while: thousands of used slots, few ready.
    db.execute(
        "insert into slots (id, node_id, template, tier, recipe, image, warm_mode, spec, memory_mib, desired, observed, removed_at)
         select gen_random_uuid(), (select id from nodes), 'hello', 'free', sha256('old'), 'x', 'exec', '{}', 256, 'absent', 'absent', now()
         from generate_series(1, 5000); analyze slots; analyze nodes",
    )
    .await?;
    let mut raw = db.raw().await?;
    let plan = format!(
        "begin; set local role clawhq_tenant; set local app.org = '{}'; set local app.claiming = 'on';
         explain select s.id from slots s join nodes n on n.id = s.node_id
            where s.recipe = sha256('x') and s.tier = 'free' and s.org_id is null and s.desired = 'present'
                and s.observed in ('waiting', 'frozen') and s.removed_at is null
                and n.state = 'active' and n.lease_until > now()
            order by s.ready_at, s.id limit 1 for update of s skip locked;",
        uuid_text(org.scope.org().as_u128())
    );
    let rows = sqlx::raw_sql(sqlx::AssertSqlSafe(plan)).fetch_all(&mut raw).await?;
    let plan: Vec<String> = rows.iter().map(|row| sqlx::Row::get(row, 0)).collect();
    let plan = plan.join("\n");
    assert!(plan.contains("slots_claim"), "{plan}");
    assert!(!plan.contains("Seq Scan on slots"), "{plan}");
    Ok(())
}

fn uuid_text(bits: u128) -> String {
    let hex = format!("{bits:032x}");
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}
