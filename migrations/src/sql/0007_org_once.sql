-- The org is read once for each statement: a policy's expression is a filter, and a filter's stable functions are called anew
-- for every row that it looks at.
do $$
declare tenant_table text;
begin
    foreach tenant_table in array array[
        'org_counters', 'org_keys', 'memberships', 'api_keys', 'secrets', 'secret_versions', 'workloads', 'releases',
        'release_secrets', 'instances', 'volumes', 'events', 'audit', 'idempotency'
    ]
    loop
        execute format('alter policy tenant on %I using (org_id = (select app_org())) with check (org_id = (select app_org()))',
            tenant_table);
    end loop;
end $$;

alter policy tenant on orgs using (id = (select app_org())) with check (id = (select app_org()));
alter policy tenant on users using (id in (select user_id from memberships where org_id = (select app_org())));
alter policy tenant on slots
    using (org_id = (select app_org())
           or (org_id is null and (select current_setting('app.claiming', true)) = 'on'))
    with check (org_id = (select app_org()));
alter policy adopt on volumes
    using (org_id is null and (select current_setting('app.claiming', true)) = 'on')
    with check (org_id = (select app_org()));
