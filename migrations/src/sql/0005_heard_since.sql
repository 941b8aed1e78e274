-- Since when a node is heard without a break: no deadline of what is on it counts the silence before.
alter table nodes add column heard_since timestamptz;
grant select (heard_since) on nodes to clawhq_tenant;
