-- A workload's containers, however long its history is: every look at it asks for those that have not ended.
create index instances_live on instances (org_id, workload_id) where ended_at is null;
