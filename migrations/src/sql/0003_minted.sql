-- Credentials that the platform minted for a workload, sealed with its org's key: its slots come and go, people keep the token.
alter table workloads add column minted bytea check (length(minted) <= 65536);
