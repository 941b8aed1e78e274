-- When the process that runs was started: anew with each restart, unlike placed_at and ready_at.
alter table instances add column started_at timestamptz;
update instances set started_at = placed_at where run > 0;
