//! sea-orm's picture of the tables that are read and written row by row. Private to the store: no other crate can write
//! a query. What a deploy and a report do is SQL of their own, beside their repositories.

macro_rules! entity {
    ($(#[$doc:meta])* $module:ident, $table:literal, { $($(#[$attribute:meta])* $field:ident: $kind:ty),+ $(,)? }) => {
        pub(crate) mod $module {
            $(#[$doc])*
            #[derive(Clone, Debug, PartialEq, sea_orm::DeriveEntityModel)]
            #[sea_orm(table_name = $table)]
            pub struct Model {
                $($(#[$attribute])* pub $field: $kind),+
            }

            #[derive(Copy, Clone, Debug, sea_orm::EnumIter, sea_orm::DeriveRelation)]
            pub enum Relation {}

            impl sea_orm::ActiveModelBehavior for ActiveModel {}

            #[allow(unused_imports)]
            use sea_orm::entity::prelude::*;
        }
    };
}

entity!(tier, "tiers", {
    #[sea_orm(primary_key, auto_increment = false)]
    name: String,
    position: i32,
    memory_mib: i32,
    memory_burst_mib: i32,
    cpu_shares: i32,
    cpu_millis: i32,
    pids: i32,
    max_per_node: i32,
    warm_target: i32,
    rate_per_min: i32,
    max_workloads: i32,
    volume_mib: i32,
});

entity!(template, "templates", {
    #[sea_orm(primary_key, auto_increment = false)]
    name: String,
    position: i32,
    enabled: bool,
    spec: Json,
});

entity!(session, "sessions", {
    #[sea_orm(primary_key, auto_increment = false)]
    id: Uuid,
    user_id: Uuid,
    token_hash: Vec<u8>,
    ip: Option<String>,
    user_agent: Option<String>,
    created_at: ChronoDateTimeUtc,
    last_seen_at: ChronoDateTimeUtc,
    expires_at: ChronoDateTimeUtc,
});

entity!(org, "orgs", {
    #[sea_orm(primary_key, auto_increment = false)]
    id: Uuid,
    slug: String,
    name: String,
    tier: String,
    version: i64,
    created_at: ChronoDateTimeUtc,
});

entity!(api_key, "api_keys", {
    #[sea_orm(primary_key, auto_increment = false)]
    org_id: Uuid,
    #[sea_orm(primary_key, auto_increment = false)]
    id: Uuid,
    name: String,
    role: String,
    hash: Vec<u8>,
    prefix: String,
    created_by: Option<Uuid>,
    created_at: ChronoDateTimeUtc,
    expires_at: Option<ChronoDateTimeUtc>,
    last_used_at: Option<ChronoDateTimeUtc>,
    revoked_at: Option<ChronoDateTimeUtc>,
});

entity!(secret, "secrets", {
    #[sea_orm(primary_key, auto_increment = false)]
    org_id: Uuid,
    #[sea_orm(primary_key, auto_increment = false)]
    id: Uuid,
    name: String,
    latest_version: i32,
    created_at: ChronoDateTimeUtc,
    updated_at: ChronoDateTimeUtc,
});

entity!(secret_version, "secret_versions", {
    #[sea_orm(primary_key, auto_increment = false)]
    org_id: Uuid,
    #[sea_orm(primary_key, auto_increment = false)]
    secret_id: Uuid,
    #[sea_orm(primary_key, auto_increment = false)]
    version: i32,
    sealed: Vec<u8>,
    created_by: Option<Uuid>,
    created_at: ChronoDateTimeUtc,
});

entity!(event, "events", {
    #[sea_orm(primary_key, auto_increment = false)]
    org_id: Uuid,
    #[sea_orm(primary_key, auto_increment = false)]
    seq: i64,
    id: Uuid,
    workload_id: Option<Uuid>,
    instance_id: Option<Uuid>,
    kind: String,
    message: String,
    data: Json,
    at: ChronoDateTimeUtc,
});

entity!(audit, "audit", {
    #[sea_orm(primary_key, auto_increment = false)]
    org_id: Uuid,
    #[sea_orm(primary_key)]
    id: i64,
    at: ChronoDateTimeUtc,
    actor_kind: String,
    actor_id: Option<Uuid>,
    actor_part: Option<String>,
    action: String,
    object: String,
    ip: Option<String>,
    request_id: Option<Uuid>,
    detail: Json,
});
