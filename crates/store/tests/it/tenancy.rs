//! Three belts: what a foreign scope sees through the repositories, and what row-level security leaves of raw SQL.

use anyhow::Result;
use clawhq_domain::access::Role;
use clawhq_domain::names::{OrgSlug, SecretName};
use clawhq_domain::workload::Desired;
use clawhq_store::{
    Actor, Change, Credential, Entry, NewApiKey, NewAudit, NewEvent, OrgRef, StoreError, TokenHash, WorkloadFilter,
    WorkloadRef,
};
use clawhq_testkit::{Deploy, TestDb, TestOrg, hello, mint};
use sqlx::{AssertSqlSafe, Executor as _, Row as _};

async fn two_orgs(db: &TestDb) -> Result<(TestOrg, TestOrg, clawhq_store::Deployed)> {
    let tier = db.tier("free").await?;
    let (mine, theirs) = (db.org("mine", "free").await?, db.org("theirs", "free").await?);
    let node = db.node("n1", 10_000).await?;
    db.ready_slots(&node, &hello(), &tier, 3).await?;
    let mut deploy = Deploy::new("secret-agent", &tier);
    deploy.change.events.push(NewEvent {
        id: mint(),
        workload: None,
        instance: None,
        kind: "workload.created".to_owned(),
        message: "m".to_owned(),
        data: clawhq_store::Json::Null,
    });
    deploy.change.audit = Some(NewAudit {
        actor: Actor::User(theirs.user),
        action: "workload.create",
        object: "x".to_owned(),
        ip: None,
        request: None,
        detail: clawhq_store::Json::Null,
    });
    let made = db.deploy(&theirs, &deploy).await?;
    let tenant = db.store.tenant(&theirs.scope);
    let name = SecretName::parse("TOKEN")?;
    tenant.secrets().put(&name, mint(), None, |_, _| vec![1; 40], &Change::default()).await?;
    let key = NewApiKey {
        id: mint(),
        name: "ci".to_owned(),
        role: Role::Member,
        hash: TokenHash::of("chq_theirs"),
        prefix: "chq_th".to_owned(),
        created_by: Some(theirs.user),
        lifetime_ms: None,
    };
    tenant.api_keys().create(&key, &Change::default()).await?;
    Ok((mine, theirs, made))
}

fn is_not_found<T: std::fmt::Debug>(outcome: Result<T, StoreError>) {
    assert!(matches!(outcome, Err(StoreError::NotFound(_))), "{outcome:?}");
}

#[tokio::test]
async fn a_foreign_scope_finds_nothing_and_changes_nothing() -> Result<()> {
    let db = TestDb::new().await?;
    let (mine, theirs, made) = two_orgs(&db).await?;
    let foreign = db.store.tenant(&mine.scope);
    let none = Change::default();
    let name = SecretName::parse("TOKEN")?;

    is_not_found(foreign.workloads().get(&WorkloadRef::Id(made.workload)).await);
    assert!(foreign.workloads().list(&WorkloadFilter { limit: 50, ..WorkloadFilter::default() }).await?.is_empty());
    is_not_found(foreign.workloads().set_desired(made.workload, Desired::Deleted, None, &none).await);
    is_not_found(foreign.workloads().leave(made.instance, &none).await);
    is_not_found(foreign.workloads().restart(made.workload, &none).await);
    is_not_found(foreign.workloads().instance(made.instance).await);
    assert!(foreign.workloads().releases(made.workload, None, 10).await?.is_empty());
    assert!(foreign.workloads().instances(Some(made.workload), None, 10).await?.is_empty());
    assert!(!foreign.workloads().finish(made.workload, &none).await?);
    is_not_found(foreign.secrets().versions(&name).await);
    is_not_found(foreign.secrets().sealed(&name, 1).await);
    is_not_found(foreign.secrets().delete(&name, &none).await);
    assert!(foreign.secrets().list().await?.is_empty());
    assert!(foreign.api_keys().list().await?.is_empty());
    assert!(foreign.events().after(None, 0, 10).await?.is_empty());
    assert!(foreign.audit().list(None, 10).await?.is_empty());
    assert_eq!(foreign.org().members().await?.len(), 1);
    is_not_found(foreign.org().remove_member(theirs.user, &none).await);

    // And it is all still there.
    let own = db.store.tenant(&theirs.scope);
    assert_eq!(own.workloads().get(&WorkloadRef::Id(made.workload)).await?.workload.desired, Desired::Running);
    assert_eq!(own.secrets().list().await?.len(), 1);
    assert_eq!(own.api_keys().list().await?.len(), 1);
    assert_eq!(own.audit().list(None, 10).await?.len(), 1);
    Ok(())
}

#[tokio::test]
async fn a_credential_enters_its_own_org_alone() -> Result<()> {
    let db = TestDb::new().await?;
    let (mine, theirs, _) = two_orgs(&db).await?;
    let accounts = db.store.accounts();
    let session = Credential::Session(TokenHash::of(&mine.token));
    let key = Credential::ApiKey(TokenHash::of("chq_theirs"));
    let nobody = Credential::Session(TokenHash::of("guess"));
    let (own, foreign) = (OrgRef::Id(mine.scope.org()), OrgRef::Id(theirs.scope.org()));
    assert!(matches!(accounts.enter(&session, &own).await?, Entry::Entered(_)));
    assert!(matches!(accounts.enter(&session, &foreign).await?, Entry::NoSuchOrg));
    assert!(matches!(accounts.enter(&session, &OrgRef::Slug(OrgSlug::parse("nowhere")?)).await?, Entry::NoSuchOrg));
    assert!(matches!(accounts.enter(&key, &foreign).await?, Entry::Entered(entered) if entered.role == Role::Member));
    assert!(matches!(accounts.enter(&key, &own).await?, Entry::NoSuchOrg));
    assert!(matches!(accounts.enter(&nobody, &own).await?, Entry::Unauthenticated));
    // A session's token is no API key and the other way round.
    let swapped = Credential::ApiKey(TokenHash::of(&mine.token));
    assert!(matches!(accounts.enter(&swapped, &own).await?, Entry::Unauthenticated));
    Ok(())
}

/// Tables that have rows of both orgs or of the platform in this test, and how many of them the tenant may see.
const TABLES: [&str; 18] = [
    "orgs",
    "org_counters",
    "org_keys",
    "memberships",
    "api_keys",
    "secrets",
    "secret_versions",
    "workloads",
    "releases",
    "release_secrets",
    "instances",
    "slots",
    "volumes",
    "events",
    "audit",
    "idempotency",
    "users",
    "sessions",
];

#[tokio::test]
async fn raw_sql_as_the_tenant_role_sees_one_org_or_nothing() -> Result<()> {
    let db = TestDb::new().await?;
    let (mine, theirs, _) = two_orgs(&db).await?;
    let (mine, theirs) = (uuid(mine.scope.org().as_u128()), uuid(theirs.scope.org().as_u128()));

    let mut raw = db.raw().await?;
    for table in TABLES {
        let owner = if table == "orgs" { "id" } else { "org_id" };
        for (setting, what) in [(format!("set local app.org = '{mine}'"), "mine"), (String::new(), "none")] {
            raw.execute("begin").await?;
            raw.execute("set local role clawhq_tenant").await?;
            if !setting.is_empty() {
                raw.execute(AssertSqlSafe(setting)).await?;
            }
            let columns = match table {
                "users" => "id::text".to_owned(),
                // No privilege at all is the narrowest policy.
                "sessions" => "id::text".to_owned(),
                _ => format!("{owner}::text"),
            };
            let rows = raw.fetch_all(AssertSqlSafe(format!("select {columns} from {table}"))).await;
            match (table, rows) {
                ("sessions", Err(_)) => {}
                ("sessions", Ok(_)) => panic!("a tenant's transaction may read sessions"),
                ("users", Ok(rows)) => assert_eq!(rows.len(), usize::from(what == "mine"), "{what}"),
                (_, Ok(rows)) => {
                    for row in &rows {
                        assert_eq!(row.get::<String, _>(0), mine, "{table} shows a row of another with {what}");
                    }
                    assert!(what == "mine" || rows.is_empty(), "{table} shows rows without an org");
                }
                (_, Err(error)) => panic!("{table}: {error}"),
            }
            raw.execute("rollback").await?;
        }
    }

    // Writing for the other org, or moving one's own rows to it, is refused by the policies' checks.
    for attempt in [
        format!(
            "insert into secrets (org_id, id, name, latest_version) values ('{theirs}', gen_random_uuid(), 'X', 1)"
        ),
        format!("update memberships set org_id = '{theirs}'"),
        format!(
            "insert into events (org_id, seq, id, kind, message) values ('{theirs}', 99, gen_random_uuid(), 'x', 'x')"
        ),
        format!("insert into audit (org_id, actor_kind, action, object) values ('{theirs}', 'system', 'x', 'x')"),
        "delete from audit".to_owned(),
        "update audit set action = 'x'".to_owned(),
        "update orgs set tier = 'enterprise'".to_owned(),
        "select join_token_hash from nodes".to_owned(),
        "update nodes set state = 'disabled'".to_owned(),
        "select * from jobs".to_owned(),
        "select * from outbox".to_owned(),
        "update tiers set max_workloads = 1000000".to_owned(),
        "select password_hash from users".to_owned(),
    ] {
        raw.execute("begin").await?;
        raw.execute("set local role clawhq_tenant").await?;
        raw.execute(AssertSqlSafe(format!("set local app.org = '{mine}'"))).await?;
        let refused = raw.execute(AssertSqlSafe(attempt.clone())).await;
        assert!(refused.is_err(), "{attempt}");
        raw.execute("rollback").await?;
    }
    for attempt in [
        format!("update workloads set desired = 'deleted' where org_id = '{theirs}'"),
        "update workloads set desired = 'deleted'".to_owned(),
        "update slots set desired = 'absent'".to_owned(),
        "delete from secrets".to_owned(),
    ] {
        raw.execute("begin").await?;
        raw.execute("set local role clawhq_tenant").await?;
        raw.execute(AssertSqlSafe(format!("set local app.org = '{mine}'"))).await?;
        let touched = raw.execute(AssertSqlSafe(attempt.clone())).await?.rows_affected();
        assert_eq!(touched, 0, "{attempt}");
        raw.execute("rollback").await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_reference_across_orgs_cannot_be_written() -> Result<()> {
    let db = TestDb::new().await?;
    let (mine, _, made) = two_orgs(&db).await?;
    let mine = uuid(mine.scope.org().as_u128());
    let workload = uuid(made.workload.as_u128());
    let instance = uuid(made.instance.as_u128());
    for attempt in [
        format!(
            "insert into releases (org_id, id, workload_id, number, spec, diff)
            values ('{mine}', gen_random_uuid(), '{workload}', 9, '{{}}', '[]')"
        ),
        format!("update slots set org_id = '{mine}', instance_id = '{instance}' where instance_id is null"),
        format!(
            "insert into release_secrets select '{mine}', release_id, id, 1 from releases, secrets
            cross join (select release_id from workloads limit 1) w"
        ),
    ] {
        assert!(db.execute(&attempt).await.is_err(), "{attempt}");
    }
    Ok(())
}

#[tokio::test]
async fn every_table_with_an_org_has_forced_row_security() -> Result<()> {
    let db = TestDb::new().await?;
    let open = "select count(*) from pg_class c join pg_attribute a on a.attrelid = c.oid and a.attname = 'org_id'
        where c.relkind = 'r' and c.relnamespace = 'public'::regnamespace and not a.attisdropped
            and not (c.relrowsecurity and c.relforcerowsecurity)";
    assert_eq!(db.number(open).await?, 0);
    // Without the system's policy the schema's owner itself sees nothing: that is what forced means.
    let (_, _, _) = two_orgs(&db).await?;
    db.execute("drop policy system on workloads").await?;
    assert_eq!(db.number("select count(*) from workloads").await?, 0);
    Ok(())
}

fn uuid(bits: u128) -> String {
    let hex = format!("{bits:032x}");
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}
