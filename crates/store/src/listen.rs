//! LISTEN and NOTIFY: wake-ups between processes. A notice carries no truth; a lost one costs latency.

use futures::Stream;
use sea_orm::ConnectionTrait as _;
use sqlx::postgres::PgListener;

use crate::Store;
use crate::error::{OrStore, Result};
use crate::tx::sql;

/// The channels in use.
pub mod channel {
    /// A node's slot changed. Payload: `<node id> <slot id>`.
    pub const NODE: &str = "clawhq_node";
    /// An instance's shown state may have changed. Payload: `<org id> <workload id> <instance id>`.
    pub const INSTANCE: &str = "clawhq_instance";
    /// An org has new events. Payload: the org's id.
    pub const EVENTS: &str = "clawhq_events";
    /// There are outbox rows or due jobs. Payload: the queue.
    pub const JOBS: &str = "clawhq_jobs";
    /// The pool is below its target or a queued instance may fit. No payload.
    pub const POOL: &str = "clawhq_pool";
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    Said {
        channel: String,
        payload: String,
    },
    /// The connection broke and is back: anything may have been missed, look at everything.
    Missed,
}

impl Store {
    /// What is said on these channels from now on. The stream never ends by itself: it reconnects, waiting up to 5 s
    /// between tries, and says [`Notice::Missed`] when it is back.
    pub async fn listen(&self, channels: &[&str]) -> Result<impl Stream<Item = Notice> + Send + use<>> {
        let channels: Vec<String> = channels.iter().map(|channel| (*channel).to_owned()).collect();
        let listener = connect(self, &channels).await.or_store()?;
        let store = self.clone();
        Ok(futures::stream::unfold((Some(listener), store, channels), |(mut listener, store, channels)| async move {
            let mut wait = std::time::Duration::from_millis(50);
            loop {
                if let Some(live) = &mut listener {
                    match live.try_recv().await {
                        Ok(Some(said)) => {
                            let notice =
                                Notice::Said { channel: said.channel().to_owned(), payload: said.payload().to_owned() };
                            return Some((notice, (listener, store, channels)));
                        }
                        Ok(None) | Err(_) => listener = None,
                    }
                }
                match connect(&store, &channels).await {
                    Ok(live) => return Some((Notice::Missed, (Some(live), store, channels))),
                    Err(error) => {
                        if store.pool.is_closed() {
                            return None;
                        }
                        tracing::debug!(%error, "cannot listen yet");
                        tokio::time::sleep(wait).await;
                        wait = (wait * 2).min(std::time::Duration::from_secs(5));
                    }
                }
            }
        }))
    }

    /// Wakes listeners of every process. Not part of any transaction on purpose: a NOTIFY in one makes commits queue up
    /// behind a lock of the whole cluster.
    pub async fn notify(&self, said: &[(&'static str, String)]) -> Result<()> {
        let said = said.iter().map(|(channel, payload)| serde_json::json!([channel, payload])).collect();
        let notify =
            sql("select pg_notify(said->>0, said->>1) from jsonb_array_elements($1) said", [crate::row::json(said)]);
        let relaxed = sea_orm::SqlxPostgresConnector::from_sqlx_postgres_pool(self.relaxed.clone());
        relaxed.query_all_raw(notify).await.or_store().map(drop)
    }
}

async fn connect(store: &Store, channels: &[String]) -> std::result::Result<PgListener, sea_orm::DbErr> {
    let broken = |error: sqlx::Error| sea_orm::DbErr::Conn(sea_orm::RuntimeErr::SqlxError(error.into()));
    // A connection of its own: the pool's are for transactions.
    let options = sqlx::postgres::PgPoolOptions::new()
        .max_connections(1)
        .max_lifetime(None)
        .idle_timeout(None)
        .acquire_timeout(std::time::Duration::from_secs(5));
    let pool = options.connect_lazy_with((*store.pool.connect_options()).clone());
    let mut listener = PgListener::connect_with(&pool).await.map_err(broken)?;
    // Reconnecting by itself would hide the gap.
    listener.eager_reconnect(false);
    listener.listen_all(channels.iter().map(String::as_str)).await.map_err(broken)?;
    Ok(listener)
}
