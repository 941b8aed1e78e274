//! The schema's history on an empty database.

use anyhow::Result;
use clawhq_testkit::TestDb;

#[tokio::test]
async fn migrations_run_from_empty_twice_and_by_several_at_once() -> Result<()> {
    let db = TestDb::empty().await?;
    let steps = db.store.pending_migrations().await?.len() as i64;
    assert!(steps >= 3);
    let (one, two, three) = tokio::join!(db.store.migrate(), db.store.migrate(), db.store.migrate());
    one.and(two).and(three)?;
    db.store.migrate().await?;
    assert!(db.store.pending_migrations().await?.is_empty());
    assert_eq!(db.number("select count(*) from seaql_migrations").await?, steps);
    assert_eq!(db.store.tiers().await?.0.len(), 4);
    db.org("ann", "free").await?;
    Ok(())
}

#[tokio::test]
async fn changed_tiers_survive_the_next_migration() -> Result<()> {
    let db = TestDb::new().await?;
    let mut free = db.tier("free").await?;
    free.max_workloads = 7;
    db.system().put_tier(&free).await?;
    db.store.migrate().await?;
    assert_eq!(db.tier("free").await?.max_workloads, 7);
    Ok(())
}
