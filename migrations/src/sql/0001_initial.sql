-- The schema of the first ClawHQ. Two rules hold for every table of a tenant: its key is (org_id, id), so that a
-- reference across orgs cannot be written, and row-level security is forced, so that a statement which forgets
-- its `where` sees one org's rows or none.

-- Roles are the cluster's, not the database's: another database may have made them already, even just now.
do $$
declare wanted text;
begin
    foreach wanted in array array['clawhq_tenant', 'clawhq_system'] loop
        begin
            execute format('create role %I nologin', wanted);
        exception when duplicate_object or unique_violation then null;
        end;
        if not pg_has_role(current_user, wanted, 'member') then
            execute format('grant %I to current_user', wanted);
        end if;
    end loop;
end $$;

-- The org of this transaction; null when none was set, and then every policy is false.
create function app_org() returns uuid language sql stable parallel safe
    as $$ select nullif(current_setting('app.org', true), '')::uuid $$;

-- The catalogue: data of the platform, readable by all.

create table tiers (
    name text primary key check (length(name) between 1 and 40),
    position int not null constraint tiers_position_key unique,
    memory_mib int not null check (memory_mib > 0),
    memory_burst_mib int not null check (memory_burst_mib >= memory_mib),
    cpu_shares int not null check (cpu_shares > 0),
    cpu_millis int not null check (cpu_millis > 0),
    pids int not null check (pids > 0),
    max_per_node int not null check (max_per_node >= 0),
    warm_target int not null check (warm_target >= 0),
    rate_per_min int not null check (rate_per_min > 0),
    max_workloads int not null check (max_workloads >= 0),
    volume_mib int not null check (volume_mib >= 0),
    updated_at timestamptz not null default now()
);

create table templates (
    name text primary key check (length(name) between 1 and 40),
    position int not null,
    enabled boolean not null default true,
    spec jsonb not null,
    updated_at timestamptz not null default now()
);

-- People and orgs.

create table users (
    id uuid primary key,
    email text not null check (length(email) <= 254),
    password_hash text not null,
    created_at timestamptz not null default now()
);
create unique index users_email_key on users (lower(email));

create table orgs (
    id uuid primary key,
    slug text not null constraint orgs_slug_key unique check (length(slug) between 1 and 20),
    name text not null check (length(name) between 1 and 100),
    tier text not null references tiers (name),
    version bigint not null default 1,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now()
);

-- Numbers that move with nearly every change, apart from orgs so that its row stays still. The row's lock, held from
-- the change to its commit, makes event_seq commit in order (a reader "after seq" misses nothing) and workloads exact.
create table org_counters (
    org_id uuid primary key references orgs (id) on delete cascade,
    event_seq bigint not null default 0,
    workloads int not null default 0 check (workloads >= 0)
) with (fillfactor = 50);

-- An org's data keys, wrapped. Apart, so that deleting an org's rows here makes its secrets unreadable everywhere.
create table org_keys (
    org_id uuid not null references orgs (id) on delete cascade,
    dek_id int not null check (dek_id > 0),
    kek_version int not null check (kek_version > 0),
    sealed bytea not null,
    created_at timestamptz not null default now(),
    primary key (org_id, dek_id)
);

create table memberships (
    org_id uuid not null references orgs (id) on delete cascade,
    user_id uuid not null constraint memberships_user_id_fkey references users (id) on delete cascade,
    role text not null check (role in ('owner', 'member')),
    created_at timestamptz not null default now(),
    primary key (org_id, user_id)
);
create index memberships_by_user on memberships (user_id);

create table sessions (
    id uuid primary key,
    user_id uuid not null references users (id) on delete cascade,
    token_hash bytea not null constraint sessions_token_key unique check (length(token_hash) = 32),
    ip text,
    user_agent text check (length(user_agent) <= 512),
    created_at timestamptz not null default now(),
    last_seen_at timestamptz not null default now(),
    expires_at timestamptz not null
);
create index sessions_by_user on sessions (user_id);
create index sessions_by_expiry on sessions (expires_at);

create table api_keys (
    org_id uuid not null references orgs (id) on delete cascade,
    id uuid not null,
    name text not null check (length(name) between 1 and 100),
    role text not null check (role in ('owner', 'member')),
    hash bytea not null constraint api_keys_hash_key unique check (length(hash) = 32),
    prefix text not null check (length(prefix) <= 16),
    created_by uuid,
    created_at timestamptz not null default now(),
    expires_at timestamptz,
    last_used_at timestamptz,
    revoked_at timestamptz,
    primary key (org_id, id)
);
create unique index api_keys_name_live on api_keys (org_id, name) where revoked_at is null;

-- Secrets: sealed bytes alone.

create table secrets (
    org_id uuid not null references orgs (id) on delete cascade,
    id uuid not null,
    name text not null check (length(name) between 1 and 128),
    latest_version int not null check (latest_version > 0),
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    primary key (org_id, id),
    constraint secrets_name_key unique (org_id, name)
);

create table secret_versions (
    org_id uuid not null,
    secret_id uuid not null,
    version int not null check (version > 0),
    sealed bytea not null check (length(sealed) <= 131072),
    created_by uuid,
    created_at timestamptz not null default now(),
    primary key (org_id, secret_id, version),
    foreign key (org_id, secret_id) references secrets (org_id, id) on delete cascade
);

-- What tenants deploy. The names of tier and template are not foreign keys: a lock on one shared row of the
-- catalogue in every deploy would make deploys of strangers wait for each other, and a release says all it needs.

create table workloads (
    org_id uuid not null references orgs (id),
    id uuid not null,
    name text not null check (length(name) between 1 and 40),
    template text,
    image text not null check (length(image) <= 255),
    tier text not null,
    desired text not null check (desired in ('running', 'stopped', 'deleted')),
    -- Moves with every change to what should run; fences reports and launches.
    generation bigint not null default 1,
    -- Moves with every change of the row; the ETag.
    version bigint not null default 1,
    release_id uuid not null,
    claim_policy text not null check (claim_policy in ('prefer', 'require', 'never')),
    created_by uuid,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    deleted_at timestamptz,
    primary key (org_id, id)
);
create unique index workloads_name_live on workloads (org_id, name) where deleted_at is null;
create index workloads_by_org on workloads (org_id, id desc) where deleted_at is null;

create table releases (
    org_id uuid not null,
    id uuid not null,
    workload_id uuid not null,
    number int not null check (number > 0),
    spec jsonb not null,
    diff jsonb not null,
    created_by uuid,
    created_at timestamptz not null default now(),
    primary key (org_id, id),
    constraint releases_number_key unique (org_id, workload_id, number),
    foreign key (org_id, workload_id) references workloads (org_id, id) on delete cascade
);
alter table workloads add constraint workloads_release_fkey
    foreign key (org_id, release_id) references releases (org_id, id) deferrable initially deferred;

-- Which version of which secret a release reads; what is listed here cannot be deleted.
create table release_secrets (
    org_id uuid not null,
    release_id uuid not null,
    secret_id uuid not null,
    version int not null,
    primary key (org_id, release_id, secret_id, version),
    foreign key (org_id, release_id) references releases (org_id, id) on delete cascade,
    constraint release_secrets_version_fkey
        foreign key (org_id, secret_id, version) references secret_versions (org_id, secret_id, version)
);
create index release_secrets_by_secret on release_secrets (org_id, secret_id, version);

create table instances (
    org_id uuid not null,
    id uuid not null,
    workload_id uuid not null,
    release_id uuid not null,
    -- The slot's row may be swept long before this one: history keeps the names.
    slot_id uuid,
    node_id uuid,
    placement text not null check (placement in ('warm', 'cold', 'queued')),
    tier text not null,
    memory_mib int not null check (memory_mib > 0),
    observed text not null,
    observed_at timestamptz not null default now(),
    run int not null default 0,
    failure jsonb,
    steps jsonb not null default '[]',
    created_at timestamptz not null default now(),
    -- Its place in the queue; kept when it leaves the queue.
    queued_at timestamptz,
    placed_at timestamptz,
    ready_at timestamptz,
    leaving_at timestamptz,
    ended_at timestamptz,
    primary key (org_id, id),
    foreign key (org_id, workload_id) references workloads (org_id, id) on delete cascade,
    foreign key (org_id, release_id) references releases (org_id, id),
    check ((slot_id is null) = (node_id is null)),
    check ((placement = 'queued') = (slot_id is null))
);
create index instances_by_workload on instances (org_id, workload_id, id desc);
create index instances_by_status on instances (observed, observed_at) where ended_at is null;
create index instances_queue on instances (queued_at, id) where placement = 'queued' and ended_at is null;

-- Hosts and containers.

create table nodes (
    id uuid primary key,
    name text not null constraint nodes_name_key unique check (length(name) between 1 and 63),
    state text not null default 'joining' check (state in ('joining', 'active', 'cordoned', 'disabled')),
    join_token_hash bytea constraint nodes_join_token_key unique,
    join_expires_at timestamptz,
    -- SHA-256 of the certificate it speaks with, and of the one it is being renewed to.
    fingerprint bytea constraint nodes_fingerprint_key unique,
    next_fingerprint bytea,
    certificate_expires_at timestamptz,
    capacity_mib int not null default 0 check (capacity_mib >= 0),
    reserved_mib int not null default 0 constraint nodes_reserved_mib_positive check (reserved_mib >= 0),
    slots_max int not null default 0 check (slots_max >= 0),
    slots_used int not null default 0 constraint nodes_slots_used_positive check (slots_used >= 0),
    -- Firewall loaded and verified, runtime answers: as last reported.
    ready boolean not null default false,
    disk_free_mib bigint not null default 0,
    facts jsonb not null default '{}',
    stream_epoch bigint not null default 0,
    last_seen_at timestamptz,
    lease_until timestamptz,
    created_at timestamptz not null default now(),
    constraint nodes_within_memory check (reserved_mib <= capacity_mib),
    constraint nodes_within_slots check (slots_used <= slots_max)
) with (fillfactor = 70);

create table slots (
    id uuid primary key,
    node_id uuid not null references nodes (id),
    -- Null for a container made for one instance of a bare image.
    template text,
    tier text not null,
    -- SHA-256 of all that is fixed when the container is made: equal recipes are interchangeable.
    recipe bytea not null check (length(recipe) = 32),
    image text not null,
    image_digest text,
    warm_mode text not null check (warm_mode in ('exec', 'app', 'frozen', 'none')),
    -- The release it was made from: the template's own, or the instance's.
    spec jsonb not null,
    -- Credentials minted for it, sealed.
    minted bytea,
    memory_mib int not null check (memory_mib > 0),
    desired text not null default 'present' check (desired in ('present', 'absent')),
    generation bigint not null default 1,
    observed text not null default 'creating',
    observed_generation bigint not null default 0,
    observed_at timestamptz not null default now(),
    run int not null default 0,
    container text,
    failure jsonb,
    -- Grows when a person asks for a restart of the process.
    restart int not null default 0,
    org_id uuid,
    instance_id uuid constraint slots_instance_key unique,
    created_at timestamptz not null default now(),
    ready_at timestamptz,
    claimed_at timestamptz,
    leaving_at timestamptz,
    -- The node said it is gone; its reservation was given back in the same transaction.
    removed_at timestamptz,
    check ((org_id is null) = (instance_id is null)),
    check (removed_at is null or desired = 'absent'),
    foreign key (org_id, instance_id) references instances (org_id, id)
) with (fillfactor = 70);
-- The claim: oldest first among equals.
create index slots_claim on slots (recipe, tier, ready_at, id)
    where org_id is null and desired = 'present' and observed in ('waiting', 'frozen') and removed_at is null;
create index slots_by_node on slots (node_id) where removed_at is null;
create index slots_pool on slots (template, tier) where org_id is null and removed_at is null;
create index slots_by_org on slots (org_id) where org_id is not null;
create index slots_removed on slots (removed_at) where removed_at is not null;

create function refuse() returns trigger language plpgsql
    as $$ begin raise exception '%', tg_argv[0] using errcode = 'check_violation', constraint = tg_name; end $$;
-- Both cost nothing until they fire: the conditions are evaluated without calling the function.
create trigger slots_owner_once before update on slots for each row
    when (old.org_id is not null
          and (new.org_id, new.instance_id) is distinct from (old.org_id, old.instance_id))
    execute function refuse('a slot belongs to one org and one instance, once');
create trigger slots_removed_once before update on slots for each row
    when (old.removed_at is not null and new.removed_at is distinct from old.removed_at)
    execute function refuse('a removed slot stays removed');
create trigger slots_spec_fixed before update on slots for each row
    when ((new.node_id, new.tier, new.recipe, new.memory_mib, new.spec)
          is distinct from (old.node_id, old.tier, old.recipe, old.memory_mib, old.spec))
    execute function refuse('what a slot was made from does not change');

create table volumes (
    id uuid primary key,
    node_id uuid not null references nodes (id),
    org_id uuid references orgs (id),
    workload_id uuid,
    -- Who uses it now; a volume has one user at a time.
    slot_id uuid constraint volumes_slot_key unique,
    size_mib int not null check (size_mib > 0),
    uid int not null check (uid > 0),
    gid int not null check (gid > 0),
    desired text not null default 'present' check (desired in ('present', 'absent')),
    created_at timestamptz not null default now(),
    removed_at timestamptz,
    check ((org_id is null) = (workload_id is null)),
    foreign key (org_id, workload_id) references workloads (org_id, id)
);
create index volumes_by_workload on volumes (org_id, workload_id) where org_id is not null;
create index volumes_by_node on volumes (node_id) where removed_at is null;
create trigger volumes_owner_once before update on volumes for each row
    when (old.org_id is not null
          and (new.org_id, new.workload_id) is distinct from (old.org_id, old.workload_id))
    execute function refuse('a volume belongs to one workload, once');

-- What happened. No foreign keys: history outlives what it tells of.

create table events (
    org_id uuid not null,
    seq bigint not null,
    id uuid not null,
    workload_id uuid,
    instance_id uuid,
    kind text not null check (length(kind) <= 80),
    message text not null check (length(message) <= 1000),
    data jsonb not null default '{}',
    at timestamptz not null default now(),
    primary key (org_id, seq)
);
create index events_by_workload on events (org_id, workload_id, seq) where workload_id is not null;
create index events_by_age on events using brin (at);

create table audit (
    org_id uuid not null,
    id bigint generated always as identity,
    at timestamptz not null default now(),
    actor_kind text not null check (actor_kind in ('user', 'api_key', 'system')),
    actor_id uuid,
    actor_part text,
    action text not null check (length(action) <= 80),
    object text not null check (length(object) <= 200),
    ip text,
    request_id uuid,
    detail jsonb not null default '{}',
    primary key (org_id, id)
);
create trigger audit_append_only before update or delete on audit for each row
    execute function refuse('the audit log is append-only');

create table idempotency (
    org_id uuid not null,
    route text not null check (length(route) <= 200),
    key text not null check (length(key) between 1 and 255),
    request_hash bytea not null check (length(request_hash) = 32),
    -- The id of what the request made.
    effect uuid,
    status int,
    headers jsonb,
    body bytea,
    created_at timestamptz not null default now(),
    answered_at timestamptz,
    primary key (org_id, route, key)
);
create index idempotency_by_age on idempotency using brin (created_at);

-- Wake-ups.

create table outbox (
    id bigint generated always as identity primary key,
    topic text not null check (length(topic) <= 80),
    key text not null check (length(key) <= 200),
    payload jsonb not null,
    created_at timestamptz not null default now(),
    relayed_at timestamptz
);
create index outbox_unrelayed on outbox (id) where relayed_at is null;
create index outbox_relayed on outbox (relayed_at) where relayed_at is not null;

create table jobs (
    id uuid primary key,
    queue text not null check (length(queue) <= 80),
    key text not null check (length(key) <= 200),
    payload jsonb not null,
    state text not null default 'pending' check (state in ('pending', 'running', 'done', 'dead')),
    run_at timestamptz not null default now(),
    attempts int not null default 0,
    max_attempts int not null check (max_attempts > 0),
    lease_until timestamptz,
    lease_token uuid,
    last_error text check (length(last_error) <= 2000),
    created_at timestamptz not null default now(),
    finished_at timestamptz,
    check ((state = 'running') = (lease_token is not null)),
    check ((state = 'running') = (lease_until is not null))
) with (fillfactor = 70);
create index jobs_due on jobs (queue, run_at, id) where state = 'pending';
create index jobs_leased on jobs (lease_until) where state = 'running';
create index jobs_finished on jobs (finished_at) where state in ('done', 'dead');
-- One waiting job for each thing to look at.
create unique index jobs_waiting_key on jobs (queue, key) where state = 'pending' and attempts = 0;

-- How many containers of a tier a node holds, whoever they belong to: a number is all that a tenant's transaction learns.
create function clawhq_slots_of_tier(node uuid, wanted text) returns int language sql stable security definer
    set search_path = public, pg_temp
    as $$ select count(*)::int from slots where node_id = node and tier = wanted and removed_at is null $$;
-- How many instances wait before this one, itself included.
create function clawhq_queue_position(since timestamptz, instance uuid) returns int language sql stable security definer
    set search_path = public, pg_temp
    as $$ select count(*)::int from instances
          where placement = 'queued' and ended_at is null and (queued_at, id) <= (since, instance) $$;
revoke all on function clawhq_slots_of_tier, clawhq_queue_position from public;

-- Row-level security.

do $$
declare
    tenant_table text;
begin
    foreach tenant_table in array array[
        'org_counters', 'org_keys', 'memberships', 'api_keys', 'secrets', 'secret_versions', 'workloads', 'releases',
        'release_secrets', 'instances', 'volumes', 'events', 'audit', 'idempotency'
    ] loop
        execute format('create policy tenant on %I to clawhq_tenant using (org_id = app_org()) with check (org_id = app_org())', tenant_table);
    end loop;
    foreach tenant_table in array array[
        'orgs', 'org_counters', 'org_keys', 'users', 'memberships', 'sessions', 'api_keys', 'secrets', 'secret_versions',
        'workloads', 'releases', 'release_secrets', 'instances', 'slots', 'volumes', 'events', 'audit', 'idempotency'
    ] loop
        execute format('alter table %I enable row level security', tenant_table);
        execute format('alter table %I force row level security', tenant_table);
        execute format('create policy system on %I to clawhq_system using (true) with check (true)', tenant_table);
    end loop;
end $$;

create policy tenant on orgs to clawhq_tenant using (id = app_org()) with check (id = app_org());
-- The people of one's own org; who they are elsewhere is theirs.
create policy tenant on users for select to clawhq_tenant
    using (id in (select user_id from memberships where org_id = app_org()));
-- One's own slots always; the pool's only in a transaction that places an instance, and only to make one's own of them.
create policy tenant on slots to clawhq_tenant
    using (org_id = app_org()
           or (org_id is null and current_setting('app.claiming', true) = 'on'))
    with check (org_id = app_org());
-- A volume made with a pool slot becomes the tenant's with it.
create policy adopt on volumes to clawhq_tenant
    using (org_id is null and current_setting('app.claiming', true) = 'on')
    with check (org_id = app_org());

grant usage on schema public to clawhq_tenant, clawhq_system;
grant all on all tables in schema public to clawhq_system;
grant all on all sequences in schema public to clawhq_system;

grant execute on function clawhq_slots_of_tier, clawhq_queue_position to clawhq_tenant, clawhq_system;
grant select on tiers, templates to clawhq_tenant;
grant select on orgs to clawhq_tenant;
grant update (name, version, updated_at) on orgs to clawhq_tenant;
grant select (id, email, created_at) on users to clawhq_tenant;
grant select, update on org_counters to clawhq_tenant;
grant select, insert on org_keys to clawhq_tenant;
grant select, insert, update, delete on memberships, secrets, secret_versions, release_secrets to clawhq_tenant;
grant select, insert, update on api_keys, workloads, releases, instances, volumes, slots, idempotency to clawhq_tenant;
grant select, insert on events, audit to clawhq_tenant;
grant insert on outbox to clawhq_tenant;
-- To place an instance, and nothing that tells one host from another's secrets.
grant select (id, state, capacity_mib, reserved_mib, slots_max, slots_used, ready, disk_free_mib, last_seen_at, lease_until)
    on nodes to clawhq_tenant;
grant update (reserved_mib, slots_used) on nodes to clawhq_tenant;
