//! People, sessions, members, keys, secrets and the catalogue.

use anyhow::Result;
use clawhq_domain::access::Role;
use clawhq_domain::names::{Email, OrgSlug, SecretName};
use clawhq_domain::release::{SecretRef, SecretTarget};
use clawhq_store::{
    Change, Credential, Entry, NewAccount, NewApiKey, NewCatalogueEntry, NewOrg, NewSession, OrgKey, OrgRef,
    StoreError, Taken, TokenHash,
};
use clawhq_testkit::{Deploy, TestDb, hello, mint};

fn account(email: &str, slug: &str) -> Result<NewAccount> {
    Ok(NewAccount {
        user: mint(),
        email: Email::parse(email)?,
        password_hash: "hash".to_owned(),
        org: NewOrg {
            id: mint(),
            slug: OrgSlug::parse(slug)?,
            name: "O".to_owned(),
            tier: "free".to_owned(),
            key: OrgKey { dek_id: 1, kek_version: 1, sealed: vec![1] },
        },
        session: NewSession {
            id: mint(),
            token: TokenHash::of(email),
            lifetime_ms: 60_000,
            ip: "192.0.2.1".parse().ok(),
            user_agent: Some("é".repeat(600)),
        },
    })
}

#[tokio::test]
async fn an_address_and_a_slug_are_taken_once_whatever_their_case() -> Result<()> {
    let db = TestDb::new().await?;
    let accounts = db.store.accounts();
    accounts.sign_up(&account("Ann@example.org", "ann")?).await?;
    let email = accounts.sign_up(&account("ann@EXAMPLE.org", "other")?).await;
    assert!(matches!(email, Err(StoreError::AlreadyExists(Taken::Email))), "{email:?}");
    let slug = accounts.sign_up(&account("bob@example.org", "ann")?).await;
    assert!(matches!(slug, Err(StoreError::AlreadyExists(Taken::OrgSlug))), "{slug:?}");
    assert!(accounts.password(&Email::parse("bob@example.org")?).await?.is_none(), "half a sign-up was kept");
    let (user, hash) = accounts.password(&Email::parse("ANN@example.org")?).await?.expect("known");
    assert_eq!((user.email.as_str(), hash.as_str()), ("Ann@example.org", "hash"));
    Ok(())
}

#[tokio::test]
async fn a_session_ends_when_it_is_closed_or_over() -> Result<()> {
    let db = TestDb::new().await?;
    let (ann, bob) = (db.org("ann", "free").await?, db.org("bob", "free").await?);
    let accounts = db.store.accounts();
    let signed_in = accounts.session(&TokenHash::of(&ann.token)).await?.expect("live");
    assert_eq!(signed_in.user.id, ann.user);
    let foreign = db.store.user(&bob.user_scope).close_session(ann.user_scope.session()).await;
    assert!(matches!(foreign, Err(StoreError::NotFound(_))), "{foreign:?}");
    db.store.user(&ann.user_scope).close_session(ann.user_scope.session()).await?;
    assert!(accounts.session(&TokenHash::of(&ann.token)).await?.is_none());
    let entry = accounts.enter(&Credential::Session(TokenHash::of(&ann.token)), &OrgRef::Id(ann.scope.org())).await?;
    assert!(matches!(entry, Entry::Unauthenticated));

    db.execute("update sessions set expires_at = now() - interval '1 second'").await?;
    assert!(accounts.session(&TokenHash::of(&bob.token)).await?.is_none());
    assert_eq!(accounts.sweep_sessions().await?, 1);
    Ok(())
}

#[tokio::test]
async fn an_org_keeps_an_owner_even_when_two_remove_each_other_at_once() -> Result<()> {
    let db = TestDb::new().await?;
    let (ann, bob) = (db.org("ann", "free").await?, db.org("bob", "free").await?);
    let tenant = db.store.tenant(&ann.scope);
    let none = Change::default();
    let added = tenant.org().add_member(&bob.email, Role::Owner, &none).await?;
    assert_eq!((added.user, added.role), (bob.user, Role::Owner));
    let again = tenant.org().add_member(&bob.email, Role::Member, &none).await;
    assert!(matches!(again, Err(StoreError::AlreadyExists(Taken::Member))), "{again:?}");
    let nobody = tenant.org().add_member(&Email::parse("nobody@example.org")?, Role::Member, &none).await;
    assert!(matches!(nobody, Err(StoreError::NotFound("user"))), "{nobody:?}");

    let org = tenant.org();
    let (one, two) = tokio::join!(org.remove_member(ann.user, &none), org.remove_member(bob.user, &none));
    assert!(one.is_ok() != two.is_ok(), "{one:?} {two:?}");
    assert_eq!(org.members().await?.len(), 1);
    Ok(())
}

#[tokio::test]
async fn a_revoked_or_outlived_key_enters_nowhere() -> Result<()> {
    let db = TestDb::new().await?;
    let ann = db.org("ann", "free").await?;
    let tenant = db.store.tenant(&ann.scope);
    let key = |name: &str, lifetime_ms| NewApiKey {
        id: mint(),
        name: name.to_owned(),
        role: Role::Owner,
        hash: TokenHash::of(name),
        prefix: "chq_".to_owned(),
        created_by: Some(ann.user),
        lifetime_ms,
    };
    let enters = async |name: &str| -> Result<bool> {
        let credential = Credential::ApiKey(TokenHash::of(name));
        let entry = db.store.accounts().enter(&credential, &OrgRef::Id(ann.scope.org())).await?;
        Ok(matches!(entry, Entry::Entered(_)))
    };
    let made = tenant.api_keys().create(&key("ci", None), &Change::default()).await?;
    let same_name = NewApiKey { hash: TokenHash::of("other"), ..key("ci", None) };
    let twice = tenant.api_keys().create(&same_name, &Change::default()).await;
    assert!(matches!(twice, Err(StoreError::AlreadyExists(Taken::ApiKeyName))), "{twice:?}");
    tenant.api_keys().create(&key("over", Some(-1)), &Change::default()).await?;
    assert!(enters("ci").await?);
    assert!(!enters("over").await?);
    tenant.api_keys().revoke(made.id, &Change::default()).await?;
    assert!(!enters("ci").await?);
    // Its name is free again.
    let again = NewApiKey { hash: TokenHash::of("new"), ..key("ci", None) };
    tenant.api_keys().create(&again, &Change::default()).await?;
    Ok(())
}

#[tokio::test]
async fn a_secret_in_use_stays_and_its_version_reaches_the_node_alone() -> Result<()> {
    let db = TestDb::new().await?;
    let tier = db.tier("free").await?;
    let ann = db.org("ann", "free").await?;
    db.node("n1", 10_000).await?;
    let tenant = db.store.tenant(&ann.scope);
    let name = SecretName::parse("TOKEN")?;
    let none = Change::default();
    let id = mint();
    let put =
        |byte: u8| tenant.secrets().put(&name, id, Some(ann.user), move |_, version| vec![byte, version as u8], &none);
    assert_eq!(put(7).await?.latest_version, 1);
    assert_eq!(put(8).await?.latest_version, 2);
    assert_eq!(tenant.secrets().sealed(&name, 1).await?, (id, vec![7, 1]));

    let mut deploy = Deploy::new("agent", &tier);
    let target = SecretTarget::Env(clawhq_domain::names::EnvName::parse("TOKEN")?);
    deploy.config.secrets = vec![SecretRef { secret: name.clone(), version: 3, target: target.clone() }];
    let missing = tenant.workloads().create(&deploy.build()?, &none).await;
    assert!(matches!(missing, Err(StoreError::NotFound("secret"))), "{missing:?}");
    deploy.config.secrets[0].version = 2;
    let made = db.deploy(&ann, &deploy).await?;
    let (slot, _) = made.placed.slot.expect("cold");
    let claim = db.system().slots().desired(&[slot]).await?.remove(0).claim.expect("claimed");
    let secrets: Vec<_> =
        claim.secrets.iter().map(|one| (one.name.as_str(), one.version, one.sealed.clone())).collect();
    assert_eq!(secrets, [("TOKEN", 2, vec![8, 2])]);
    assert_eq!(claim.keys.len(), 1);

    let used = tenant.secrets().delete(&name, &none).await;
    assert!(matches!(&used, Err(StoreError::InUse(by)) if by == "workload agent"), "{used:?}");
    tenant.workloads().set_desired(made.workload, clawhq_domain::workload::Desired::Deleted, None, &none).await?;
    db.execute("update instances set ended_at = now(); update workloads set deleted_at = now()").await?;
    tenant.secrets().delete(&name, &none).await?;
    assert_eq!(db.number("select count(*) from secret_versions").await?, 0);
    Ok(())
}

#[tokio::test]
async fn the_catalogue_is_what_was_published_last() -> Result<()> {
    let db = TestDb::new().await?;
    let tiers = db.store.tiers().await?;
    let names: Vec<_> = tiers.0.iter().map(|tier| (tier.name.as_str(), tier.memory_mib, tier.warm_target)).collect();
    assert_eq!(names, [("free", 256, 20), ("pro", 512, 10), ("business", 1024, 5), ("enterprise", 2048, 0)]);

    let mut other = hello();
    other.name = clawhq_domain::names::TemplateName::parse("other")?;
    let entry = |template: &clawhq_domain::template::Template, position| NewCatalogueEntry {
        template: template.clone(),
        position,
    };
    db.system().publish_templates(&[entry(&hello(), 2), entry(&other, 1)]).await?;
    let order: Vec<_> =
        db.store.templates().await?.entries.into_iter().map(|entry| entry.template.name.to_string()).collect();
    assert_eq!(order, ["other", "hello"]);
    let mut renewed = hello();
    renewed.title = "Hello again".to_owned();
    db.system().publish_templates(&[entry(&renewed, 1)]).await?;
    let now = db.store.templates().await?;
    let shown: Vec<_> = now.entries.iter().map(|entry| (entry.template.title.as_str(), entry.enabled)).collect();
    assert_eq!(shown, [("Hello again", true), ("Hello", false)]);

    // A row that cannot be read, as of a newer release, is named where it is asked for and keeps no other from being deployed.
    db.execute("update templates set spec = jsonb_set(spec, '{surprise}', '1') where name = 'hello'").await?;
    let corrupt = db.store.template(&hello().name).await;
    assert!(matches!(corrupt, Err(StoreError::Corrupt { table: "templates", field: "spec", .. })), "{corrupt:?}");
    let left = db.store.templates().await?;
    let readable: Vec<_> = left.entries.iter().map(|entry| entry.template.name.as_str()).collect();
    assert_eq!((readable, left.unreadable), (vec!["other"], ["hello".to_owned()].into()));
    Ok(())
}

#[tokio::test]
async fn who_is_removed_takes_no_key_along() -> Result<()> {
    let db = TestDb::new().await?;
    let (ann, bob) = (db.org("ann", "free").await?, db.org("bob", "free").await?);
    let tenant = db.store.tenant(&ann.scope);
    let none = Change::default();
    tenant.org().add_member(&bob.email, Role::Owner, &none).await?;
    let key = |name: &str, created_by| NewApiKey {
        id: mint(),
        name: name.to_owned(),
        role: Role::Owner,
        hash: TokenHash::of(name),
        prefix: "chq_".to_owned(),
        created_by: Some(created_by),
        lifetime_ms: None,
    };
    for (name, by) in [("anns", ann.user), ("bobs", bob.user)] {
        tenant.api_keys().create(&key(name, by), &none).await?;
    }
    db.store.tenant(&bob.scope).api_keys().create(&key("at home", bob.user), &none).await?;
    tenant.org().remove_member(bob.user, &none).await?;
    for (name, org, opens) in [("anns", &ann, true), ("bobs", &ann, false), ("at home", &bob, true)] {
        let entry =
            db.store.accounts().enter(&Credential::ApiKey(TokenHash::of(name)), &OrgRef::Id(org.scope.org())).await?;
        assert_eq!(matches!(entry, Entry::Entered(_)), opens, "{name}: {entry:?}");
    }
    Ok(())
}
