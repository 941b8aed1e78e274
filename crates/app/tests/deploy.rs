//! Use cases on a real database, with a node that is played by the test: it reads what it should have and reports.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clawhq_app::ca::Ca;
use clawhq_app::caller::{Credential, OrgContext, Origin};
use clawhq_app::hub::NodeHint;
use clawhq_app::model::Deployed;
use clawhq_app::nodes::{Link, NodeFacts, SlotDesired};
use clawhq_app::pool::PoolReport;
use clawhq_app::workloads::{ConfigInput, CreateWorkload, SecretInput, Source, UpdateWorkload};
use clawhq_app::{App, AppConfig, Error};
use clawhq_domain::ids::{NodeId, SlotId};
use clawhq_domain::lifecycle::Shown;
use clawhq_domain::names::{Email, EnvName, SecretName, TemplateName, WorkloadName};
use clawhq_domain::release::SecretTarget;
use clawhq_domain::slot::{Failure, FailureKind, SlotReport, SlotState, Step};
use clawhq_domain::workload::{ClaimPolicy, PlacementKind};
use clawhq_runtime::clock::Clock;
use clawhq_sealing::{KeyRing, Plaintext};
use clawhq_store::IdempotencyKey;
use clawhq_testkit::{TestDb, hello};
use tokio_util::sync::CancellationToken;

const WAIT: Option<Duration> = Some(Duration::from_secs(20));

struct World {
    db: TestDb,
    _folder: tempfile::TempDir,
    app: App,
    org: OrgContext,
    /// The person's who owns it.
    credential: Credential,
    stop: CancellationToken,
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn origin() -> Origin {
    Origin { request: clawhq_runtime::ids::mint(), ip: None }
}

impl World {
    async fn new() -> Result<Self> {
        let db = TestDb::with_connections(20).await?;
        let folder = tempfile::tempdir()?;
        let ring = KeyRing::open(&folder.path().join("keys"))?;
        let ca = Ca::open(&folder.path().join("ca"))?;
        let config = AppConfig { default_tier: "business".to_owned(), ..AppConfig::default() };
        let app = App::new(config, db.store.clone(), ring, ca, Clock::system());
        app.publish_templates(vec![hello()]).await?;
        let signed_in = app
            .sign_up(
                clawhq_app::accounts::SignUp {
                    email: Email::parse("a@example.org")?,
                    password: "correct horse battery".to_owned().into(),
                    org_name: Some("Acme".to_owned()),
                    user_agent: None,
                },
                origin(),
            )
            .await?;
        let credential = Credential::Session(signed_in.token);
        let org = app.enter(&credential, "acme", origin()).await?;
        Ok(Self { db, _folder: folder, app, org, credential, stop: CancellationToken::new() })
    }

    fn ask(&self, name: &str, claim: ClaimPolicy) -> Result<CreateWorkload> {
        Ok(CreateWorkload {
            name: Some(WorkloadName::parse(name)?),
            source: Source::Template(TemplateName::parse("hello")?),
            tier: Some("free".to_owned()),
            config: ConfigInput::default(),
            claim,
        })
    }

    async fn create(&self, name: &str, claim: ClaimPolicy) -> Result<Deployed> {
        Ok(self.app.create_workload(&self.org, self.ask(name, claim)?, None, WAIT).await?)
    }

    /// Runs the workers' half until a state is seen: jobs are taken and run as the workers would.
    fn work(&self) {
        let (app, stop) = (self.app.clone(), self.stop.clone());
        tokio::spawn(async move {
            while !stop.is_cancelled() {
                let _ = app.relay_outbox().await;
                for job in app.claim_jobs(8, Duration::from_secs(10)).await.unwrap_or_default() {
                    match app.run_job(&job).await {
                        Ok(()) => app.finish_job(&job).await.unwrap(),
                        Err(error) => app.fail_job(&job, &error.to_string()).await.unwrap(),
                    }
                }
                let _ = tokio::time::timeout(Duration::from_millis(20), app.jobs_hint().notified()).await;
            }
        });
    }
}

/// A node agent that does at once whatever it is told.
struct Node {
    app: App,
    id: NodeId,
    link: Link,
    slots: BTreeMap<SlotId, (i64, u32)>,
    /// What a claimed slot comes to.
    fails: Option<FailureKind>,
    seen: Vec<SlotDesired>,
}

impl Node {
    async fn join(app: &App) -> Result<Self> {
        let (id, token) = app.join_token("one").await?;
        let key = rcgen::KeyPair::generate()?;
        let csr = rcgen::CertificateParams::new(vec![])?.serialize_request(&key)?.pem()?;
        let facts = NodeFacts {
            hostname: "one".to_owned(),
            cpu_millis: 2000,
            memory_mib: 16 * 1024,
            disk_free_mib: 50_000,
            agent_version: "test".to_owned(),
            runtime_version: "test".to_owned(),
            ingress: "unix:/nowhere".to_owned(),
            firewall_ready: true,
        };
        let enrolled = app.enroll(&token, &csr, &facts).await?;
        ensure!(enrolled.node == id);
        ensure!(matches!(app.enroll(&token, &csr, &facts).await, Err(Error::Refused(_))), "a token joins once");
        let link = app.open_link(id, &facts).await?;
        Ok(Self { app: app.clone(), id, link, slots: BTreeMap::new(), fails: None, seen: Vec::new() })
    }

    async fn report(&mut self, slot: &SlotDesired, state: SlotState) -> Result<()> {
        let failure = (state == SlotState::Failed).then(|| Failure {
            kind: self.fails.unwrap_or(FailureKind::Internal),
            message: "it broke".to_owned(),
            exit: None,
            log_tail: vec!["last words".to_owned()],
        });
        let report = SlotReport {
            slot: slot.slot,
            generation: slot.generation,
            instance: slot.claim.as_ref().map(|claim| claim.instance),
            state,
            run: slot.claim.as_ref().map_or(0, |claim| claim.restart + 1),
            container: Some("c".to_owned()),
            image_digest: None,
            failure,
            steps: vec![Step { name: "claim".to_owned(), micros: 300 }],
            at: 0,
        };
        Ok(self.app.observe(self.id, self.link.epoch, report).await?)
    }

    async fn reconcile(&mut self) -> Result<()> {
        for slot in self.app.desired_set(self.id).await?.slots {
            let restart = slot.claim.as_ref().map_or(0, |claim| claim.restart);
            if self.slots.get(&slot.slot).is_some_and(|known| *known == (slot.generation, restart)) {
                continue;
            }
            self.slots.insert(slot.slot, (slot.generation, restart));
            let state = match (&slot.claim, slot.present) {
                (_, false) => SlotState::Absent,
                (None, true) => SlotState::Waiting,
                (Some(_), true) if self.fails.is_some() => SlotState::Failed,
                (Some(_), true) => SlotState::Running,
            };
            self.report(&slot, state).await?;
            self.seen.push(slot);
        }
        Ok(())
    }

    /// Plays the node until the work is done. Both go on at all times: what the work holds in the database, a report may
    /// have to wait for.
    async fn beside<T>(&mut self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let mut work = std::pin::pin!(work);
        let mut done = None;
        loop {
            {
                let mut turn = std::pin::pin!(self.reconcile());
                loop {
                    tokio::select! {
                        turned = &mut turn => break turned?,
                        worked = &mut work, if done.is_none() => done = Some(worked),
                    }
                }
            }
            if let Some(worked) = done {
                self.reconcile().await?;
                return worked;
            }
            tokio::select! {
                worked = &mut work => done = Some(worked),
                hint = self.link.inbox.next() => {
                    ensure!(hint.is_some(), "the stream was taken over");
                    if let Some(NodeHint::Claimed(told)) = hint {
                        let set = self.app.desired_set(self.id).await?;
                        let read = set.slots.iter().find(|slot| slot.slot == told.slot).context("what was told is in the set")?;
                        ensure!(read.generation >= told.generation && told.present, "told what is not so");
                    }
                }
            }
        }
    }
}

#[tokio::test]
async fn a_warm_slot_becomes_the_tenants_and_the_pool_is_refilled() -> Result<()> {
    let world = World::new().await?;
    let mut node = Node::join(&world.app).await?;
    ensure!(world.app.pool_pass().await?.ordered > 0);
    node.reconcile().await?;
    let depth = world.app.pool_depths().await?;
    let free = depth.iter().find(|pool| pool.tier == "free").context("a pool for free")?;
    ensure!(free.ready >= 1, "{free:?}");

    let made = node.beside(world.create("bot", ClaimPolicy::Require)).await?;
    ensure!(made.placement == Some(PlacementKind::Warm));
    ensure!(made.workload.shown == Shown::Running, "{:?}", made.workload.shown);
    ensure!(made.workload.url.as_deref() == Some("http://bot-acme.localhost:4181"));
    let names: Vec<_> = made.steps.iter().map(|step| step.name.as_str()).collect();
    ensure!(names == ["admit", "commit", "claim"], "{names:?}");
    let claimed = node.seen.iter().find(|slot| slot.claim.is_some()).context("a claim was sent")?;
    let claim = claimed.claim.as_ref().context("a claim")?;
    let process = claim.process.as_ref().context("exec slots are told what to run")?;
    ensure!(process.env["CLAWHQ_WORKLOAD"].as_str() == "bot" && process.env["PORT"].as_str() == "8080");
    ensure!(claim.ports == [8080]);

    // A name is taken while it lives.
    let again = world.app.create_workload(&world.org, world.ask("bot", ClaimPolicy::Prefer)?, None, None).await;
    ensure!(matches!(again, Err(Error::Taken("workload name"))));
    Ok(())
}

/// A tier that no node has room for must not stop the refill of those that fit.
#[tokio::test]
async fn a_pool_without_room_does_not_starve_the_others() -> Result<()> {
    let world = World::new().await?;
    let mut business = world.db.tier("business").await?;
    // As when a node has as many of the tier as it may.
    business.max_per_node = 0;
    world.app.put_tier(&business).await?;
    let mut node = Node::join(&world.app).await?;
    for _ in 0..20 {
        world.app.pool_pass().await?;
        node.reconcile().await?;
    }
    let depth = world.app.pool_depths().await?;
    let ready = |tier: &str| depth.iter().find(|pool| pool.tier == tier).map(|pool| (pool.ready, pool.target));
    ensure!(ready("business").is_some_and(|(ready, target)| ready == 0 && target > 0), "{depth:?}");
    for (tier, least) in [("free", 8), ("pro", 4)] {
        ensure!(ready(tier).is_some_and(|(ready, _)| ready >= least), "{depth:?}");
    }
    Ok(())
}

#[tokio::test]
async fn without_a_warm_slot_it_is_cold_and_without_room_it_is_queued() -> Result<()> {
    let world = World::new().await?;
    world.work();
    let refused = world.app.create_workload(&world.org, world.ask("a", ClaimPolicy::Require)?, None, None).await;
    ensure!(matches!(refused, Err(Error::Refused(reason)) if reason.code == "no_warm_slot"));
    let queued = world.app.create_workload(&world.org, world.ask("a", ClaimPolicy::Prefer)?, None, None).await?;
    ensure!(queued.placement == Some(PlacementKind::Queued) && queued.workload.shown == Shown::Queued);
    ensure!(queued.workload.queue.map(|place| place.position) == Some(1));

    let mut node = Node::join(&world.app).await?;
    let running = node
        .beside(async {
            world.app.place_queued().await?;
            Ok(world.app.wait_workload(&world.org, "a", Shown::Running, Duration::from_secs(20)).await?)
        })
        .await?;
    ensure!(running.shown == Shown::Running, "{:?}", running.shown);
    let cold = node.beside(world.create("b", ClaimPolicy::Never)).await?;
    ensure!(cold.placement == Some(PlacementKind::Cold) && cold.workload.shown == Shown::Running);
    Ok(())
}

#[tokio::test]
async fn a_workload_stops_starts_updates_and_goes_without_a_trace() -> Result<()> {
    let world = World::new().await?;
    world.work();
    let mut node = Node::join(&world.app).await?;
    let made = node.beside(world.create("bot", ClaimPolicy::Never)).await?;
    let (app, org) = (&world.app, &world.org);

    let stopped = node.beside(async { Ok(app.stop_workload(org, "bot", None, None, WAIT).await?) }).await?;
    ensure!(stopped.workload.shown == Shown::Stopped);
    let started = node.beside(async { Ok(app.start_workload(org, "bot", None, None, WAIT).await?) }).await?;
    ensure!(started.workload.shown == Shown::Running);
    ensure!(started.workload.instance.as_ref().map(|one| one.id) != made.workload.instance.as_ref().map(|one| one.id));

    app.put_secret(org, &SecretName::parse("KEY")?, Plaintext::new("s3cret"), None).await?;
    let config = ConfigInput {
        env: BTreeMap::from([(EnvName::parse("LEVEL")?, "debug".to_owned())]),
        secrets: vec![SecretInput {
            secret: SecretName::parse("KEY")?,
            target: SecretTarget::Env(EnvName::parse("API_KEY")?),
        }],
        ..ConfigInput::default()
    };
    let ask = UpdateWorkload { config, image: None, tier: None };
    let fields: Vec<_> = app.diff_workload(org, "bot", ask.clone()).await?.into_iter().map(|one| one.field).collect();
    ensure!(fields == ["env.LEVEL", "secrets.KEY.env API_KEY"], "{fields:?}");
    let updated = node.beside(async { Ok(app.update_workload(org, "bot", ask, None, None, WAIT).await?) }).await?;
    ensure!(updated.workload.shown == Shown::Running && updated.workload.release.number == 2);
    let last = node.seen.iter().rev().find_map(|slot| slot.claim.as_ref()).context("a claim")?;
    let process = last.process.as_ref().context("a process")?;
    ensure!(process.env["API_KEY"].as_str() == "s3cret" && process.env["LEVEL"].as_str() == "debug");
    let in_use = app.delete_secret(org, &SecretName::parse("KEY")?).await;
    ensure!(matches!(in_use, Err(Error::Refused(reason)) if reason.code == "in_use"));

    let restarted = node.beside(async { Ok(app.restart_workload(org, "bot", None, WAIT).await?) }).await?;
    ensure!(
        restarted.workload.instance.as_ref().map(|one| one.restarts) == Some(1),
        "{:?}",
        restarted.workload.instance
    );

    let deleted = node.beside(async { Ok(app.delete_workload(org, "bot", None, WAIT).await?) }).await?;
    ensure!(deleted.workload.shown == Shown::Deleted, "{:?}", deleted.workload.shown);
    ensure!(app.desired_set(node.id).await?.slots.is_empty(), "nothing is left on the node");
    ensure!(matches!(app.workload(org, "bot").await, Err(Error::NotFound("workload"))));
    ensure!(app.nodes().await?[0].reserved_mib == 0, "its room was given back");
    let kinds: Vec<_> = app
        .events(org, None, clawhq_app::model::PageRequest { limit: 50, cursor: None })
        .await?
        .items
        .into_iter()
        .map(|event| event.kind)
        .collect();
    ensure!(
        kinds.contains(&"workload.deleted".to_owned()) && kinds.contains(&"instance.running".to_owned()),
        "{kinds:?}"
    );
    Ok(())
}

#[tokio::test]
async fn a_failure_is_shown_with_its_last_words_and_mended_by_an_update() -> Result<()> {
    let world = World::new().await?;
    world.work();
    let mut node = Node::join(&world.app).await?;
    node.fails = Some(FailureKind::Command);
    let failed = node.beside(world.create("bot", ClaimPolicy::Never)).await?;
    ensure!(failed.workload.shown == Shown::Failed, "{:?}", failed.workload.shown);
    ensure!(failed.workload.reason.as_ref().map(|reason| reason.code) == Some("command_failed"));
    ensure!(failed.workload.log_tail == ["last words"]);
    node.fails = None;
    let (app, org) = (&world.app, &world.org);
    let ask = UpdateWorkload { config: ConfigInput::default(), image: None, tier: None };
    let mended = node.beside(async { Ok(app.update_workload(org, "bot", ask, None, None, WAIT).await?) }).await?;
    ensure!(mended.workload.shown == Shown::Running, "{:?} {:?}", mended.workload.shown, mended.workload.reason);
    Ok(())
}

#[tokio::test]
async fn orgs_do_not_see_each_other() -> Result<()> {
    let world = World::new().await?;
    let mut node = Node::join(&world.app).await?;
    let made = node.beside(world.create("bot", ClaimPolicy::Never)).await?;
    let other = world
        .app
        .sign_up(
            clawhq_app::accounts::SignUp {
                email: Email::parse("b@example.org")?,
                password: "another long password".to_owned().into(),
                org_name: Some("Acme".to_owned()),
                user_agent: None,
            },
            origin(),
        )
        .await?;
    ensure!(other.orgs[0].slug != "acme", "slugs are unique");
    let credential = Credential::Session(other.token);
    ensure!(matches!(world.app.enter(&credential, "acme", origin()).await, Err(Error::NotFound("org"))));
    ensure!(matches!(world.app.enter(&credential, "nobody", origin()).await, Err(Error::NotFound("org"))));
    let context = world.app.enter(&credential, &other.orgs[0].slug, origin()).await?;
    let foreign = world.app.workload(&context, &made.workload.id.to_string()).await;
    ensure!(matches!(foreign, Err(Error::NotFound("workload"))));
    Ok(())
}

#[tokio::test]
async fn more_secrets_than_a_process_can_be_given_are_refused_at_once() -> Result<()> {
    let world = World::new().await?;
    let mut ask = world.ask("bot", ClaimPolicy::Never)?;
    for number in 0..25 {
        let (secret, env) = (SecretName::parse(&format!("KEY_{number}"))?, EnvName::parse(&format!("KEY_{number}"))?);
        world.app.put_secret(&world.org, &secret, Plaintext::new("x".repeat(64 * 1024)), None).await?;
        ask.config.secrets.push(SecretInput { secret, target: SecretTarget::Env(env) });
    }
    let refused = world.app.create_workload(&world.org, ask.clone(), None, None).await;
    ensure!(matches!(refused, Err(Error::Invalid { pointer, .. }) if pointer == "/config/secrets"));
    ask.config.secrets.truncate(20);
    world.app.create_workload(&world.org, ask, None, None).await?;
    Ok(())
}

/// Beside a newer release, whose templates this one cannot read, that one's pool is not taken down.
#[tokio::test]
async fn slots_of_a_template_that_cannot_be_read_are_left_alone() -> Result<()> {
    let world = World::new().await?;
    let mut node = Node::join(&world.app).await?;
    ensure!(world.app.pool_pass().await?.ordered > 0);
    node.reconcile().await?;
    world.db.execute("update templates set spec = jsonb_set(spec, '{surprise}', '1')").await?;
    // Has the catalogue read anew.
    world.app.put_tier(&world.db.tier("free").await?).await?;
    ensure!(world.app.templates().await?.is_empty());
    ensure!(world.app.pool_pass().await? == PoolReport::default());
    Ok(())
}

/// As when the process that claimed ended before it told anybody.
#[tokio::test]
async fn a_claim_whose_notice_was_lost_is_told_again() -> Result<()> {
    let world = World::new().await?;
    let mut node = Node::join(&world.app).await?;
    ensure!(world.app.pool_pass().await?.ordered > 0);
    node.reconcile().await?;
    let ask = world.ask("bot", ClaimPolicy::Require)?;
    let key = IdempotencyKey { route: "create".to_owned(), key: "once".to_owned(), request_hash: [7; 32] };
    let made = world.app.create_workload(&world.org, ask.clone(), Some(key.clone()), None).await?;
    let mut told = || std::iter::from_fn(|| node.link.inbox.hints.try_recv().ok()).collect::<Vec<_>>();
    ensure!(matches!(told()[..], [.., NodeHint::Claimed(_)]), "it is told once it is claimed");
    world.app.converge(world.org.org, made.workload.id).await?;
    ensure!(matches!(told()[..], [NodeHint::SlotChanged(_)]), "a sweep tells it again");
    // The caller heard nothing and asks again with its key.
    let again = world.app.create_workload(&world.org, ask, Some(key), None).await?;
    ensure!(again.replayed && again.workload.id == made.workload.id);
    ensure!(matches!(told()[..], [NodeHint::SlotChanged(_)]), "and so does a repeat");
    Ok(())
}

#[tokio::test]
async fn a_person_owns_a_bounded_number_of_orgs() -> Result<()> {
    let world = World::new().await?;
    let credential = world.credential.clone();
    for number in 2..clawhq_app::orgs::ORGS_OWNED_MAX {
        world.app.create_org(&credential, &format!("Org {number}"), None).await?;
    }
    // All at once for the last place.
    let names = ["one", "two", "three", "four"];
    let asked = names.iter().map(|name| world.app.create_org(&credential, name, Some(name)));
    let (made, refused): (Vec<_>, Vec<_>) = futures::future::join_all(asked).await.into_iter().partition(Result::is_ok);
    ensure!((made.len(), refused.len()) == (1, 3), "{made:?} {refused:?}");
    let quota = |answer| matches!(answer, Err(Error::Refused(reason)) if reason.code == "quota_exceeded");
    ensure!(refused.into_iter().all(quota));
    Ok(())
}

/// The deploy's answer died with its process before the credentials were kept: they are still there to be had.
#[tokio::test]
async fn credentials_survive_a_crash_right_after_the_deploy() -> Result<()> {
    let world = World::new().await?;
    world.work();
    let (app, org) = (&world.app, &world.org);
    let minted = clawhq_domain::template::MintedToken { env: EnvName::parse("TOKEN")?, bytes: 24 };
    app.publish_templates(vec![clawhq_domain::template::Template { minted: vec![minted], ..hello() }]).await?;
    let mut node = Node::join(app).await?;
    let made = node.beside(world.create("bot", ClaimPolicy::Never)).await?;
    let told = made.access_token.context("a token")?;
    world.db.execute("update workloads set minted = null").await?;
    ensure!(app.access_token(org, "bot").await?.as_deref() == Some(told.as_str()), "nobody knows the token any more");

    // The next container gets the same, also when nobody asked in between.
    world.db.execute("update workloads set minted = null").await?;
    node.beside(async { Ok(app.stop_workload(org, "bot", None, None, WAIT).await?) }).await?;
    node.beside(async { Ok(app.start_workload(org, "bot", None, None, WAIT).await?) }).await?;
    let last = node.seen.iter().rev().find_map(|slot| slot.claim.as_ref()).context("a claim")?;
    let env = &last.process.as_ref().context("a process")?.env;
    ensure!(env["TOKEN"].as_str() == told, "a new container, another token");
    Ok(())
}

/// One in the queue whose rows make no sense must not keep those behind it from their room.
#[tokio::test]
async fn one_that_cannot_be_placed_does_not_hold_up_the_queue() -> Result<()> {
    let world = World::new().await?;
    let (app, org) = (&world.app, &world.org);
    for name in ["a", "b"] {
        let queued = app.create_workload(org, world.ask(name, ClaimPolicy::Prefer)?, None, None).await?;
        ensure!(queued.workload.shown == Shown::Queued);
    }
    world.db.execute("update workloads set tier = 'gone' where name = 'a'").await?;
    let mut node = Node::join(app).await?;
    app.place_queued().await?;
    node.reconcile().await?;
    ensure!(app.workload(org, "b").await?.shown == Shown::Running, "it waits behind one that cannot be placed");
    ensure!(app.workload(org, "a").await?.shown == Shown::Queued);
    Ok(())
}

/// What cannot be opened for one tenant is that tenant's trouble.
#[tokio::test]
async fn a_secret_that_does_not_open_stops_its_own_workload_alone() -> Result<()> {
    let world = World::new().await?;
    let (app, org) = (&world.app, &world.org);
    let node = Node::join(app).await?;
    app.put_secret(org, &SecretName::parse("KEY")?, Plaintext::new("s3cret"), None).await?;
    let secret =
        SecretInput { secret: SecretName::parse("KEY")?, target: SecretTarget::Env(EnvName::parse("API_KEY")?) };
    let mut ask = world.ask("a", ClaimPolicy::Never)?;
    ask.config.secrets.push(secret);
    let broken = app.create_workload(org, ask, None, None).await?.workload;
    app.create_workload(org, world.ask("b", ClaimPolicy::Never)?, None, None).await?;
    ensure!(app.desired_set(node.id).await?.slots.len() == 2);
    world
        .db
        .execute("update secret_versions set sealed = overlay(sealed placing '\\x0000000000000000'::bytea from 30)")
        .await?;
    let set = app.desired_set(node.id).await?;
    ensure!(set.slots.len() == 1, "the node hears of nothing any more");
    let slot = broken.instance.and_then(|one| one.slot).context("a slot")?;
    ensure!(set.unreadable.iter().map(|one| one.slot).eq([slot]) && set.unreadable[0].present);
    Ok(())
}

/// An agent that was killed between giving up and saying why must not make a workload start over for ever.
#[tokio::test]
async fn a_failure_without_a_reason_is_one_all_the_same() -> Result<()> {
    let world = World::new().await?;
    let (app, org) = (&world.app, &world.org);
    let mut node = Node::join(app).await?;
    app.create_workload(org, world.ask("bot", ClaimPolicy::Never)?, None, None).await?;
    let slot = app.desired_set(node.id).await?.slots.remove(0);
    let report = SlotReport {
        slot: slot.slot,
        generation: slot.generation,
        instance: slot.claim.as_ref().map(|claim| claim.instance),
        state: SlotState::Failed,
        run: 1,
        container: None,
        image_digest: None,
        failure: None,
        steps: Vec::new(),
        at: 0,
    };
    app.observe(node.id, node.link.epoch, report).await?;
    let workload = app.workload(org, "bot").await?;
    ensure!(workload.instance.as_ref().is_some_and(|one| one.failure.is_some()), "no reason at all");
    // Its container goes, and a new one comes after a pause, not at once.
    app.converge(org.org, workload.id).await?;
    node.reconcile().await?;
    ensure!(app.converge(org.org, workload.id).await?.is_some(), "nothing looks at it again");
    ensure!(app.desired_set(node.id).await?.slots.is_empty(), "it was replaced without a pause");
    Ok(())
}
