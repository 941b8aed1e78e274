-- The product's plan as rows. Burst, cores, processes and volumes are ours: a burst of four times the guarantee for
-- the small tiers, because most agents idle; enterprise runs on dedicated nodes (max_per_node 0), without a pool.
insert into tiers (name, position, memory_mib, memory_burst_mib, cpu_shares, cpu_millis, pids, max_per_node,
                   warm_target, rate_per_min, max_workloads, volume_mib)
values
    ('free',       1,  256,  512,  256, 1000,  128, 50, 20,   60,   3,  1024),
    ('pro',        2,  512, 1024,  512, 2000,  256, 30, 10,  300,  10,  5120),
    ('business',   3, 1024, 2048, 1024, 4000,  512, 15,  5, 1000,  50, 20480),
    ('enterprise', 4, 2048, 4096, 2048, 8000, 1024,  0,  0, 5000, 500, 102400)
on conflict (name) do nothing;
