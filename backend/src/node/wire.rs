//! What `app` says a node should have, as messages.

use clawhq_app::nodes::{Claim, DesiredSet, NodeFacts, Process, SlotDesired};
use clawhq_proto::{v1, warm_mode_name, whole_set};

/// The frames of the whole set, in their order.
pub fn full(set: DesiredSet) -> Vec<v1::down::Frame> {
    let DesiredSet { slots, unreadable, removed_volumes } = set;
    let bare = unreadable.into_iter().map(|one| v1::SlotDesired {
        slot_id: one.slot.to_string(),
        generation: one.generation,
        present: one.present,
        spec: None,
        claim: None,
    });
    let all = bare.chain(slots.into_iter().map(slot)).collect();
    let (frames, too_large) = whole_set(all, removed_volumes.into_iter().map(|id| id.to_string()).collect());
    for slot in too_large {
        tracing::error!(slot.id = slot, "a slot is left as it is: it is larger than a frame");
    }
    frames
}

pub fn slot(desired: SlotDesired) -> v1::SlotDesired {
    let SlotDesired {
        slot,
        generation,
        present,
        image,
        image_digest,
        memory_mib,
        memory_burst_mib,
        cpu_shares,
        cpu_millis,
        pids,
        uid,
        gid,
        tmpfs,
        volume,
        hostname,
        warm_mode,
        template,
        tier,
        pool_process,
        claim,
    } = desired;
    v1::SlotDesired {
        slot_id: slot.to_string(),
        generation,
        present,
        spec: Some(v1::SlotSpec {
            image,
            image_digest: image_digest.unwrap_or_default(),
            memory_mib,
            memory_burst_mib,
            cpu_shares,
            cpu_millis,
            pids,
            uid,
            gid,
            tmpfs: tmpfs.into_iter().map(Into::into).collect(),
            volume: volume.map(|volume| v1::Volume {
                volume_id: volume.volume.to_string(),
                path: volume.path,
                size_mib: volume.size_mib,
            }),
            hostname,
            warm_mode: warm_mode_name(warm_mode).to_owned(),
            pool_process: pool_process.map(process),
            template: template.unwrap_or_default(),
            tier,
        }),
        claim: claim.map(self::claim),
    }
}

fn claim(claim: Claim) -> v1::Claim {
    let Claim { instance, org, workload, workload_name, process, restart, single_writer, ports } = claim;
    v1::Claim {
        instance_id: instance.to_string(),
        org_id: org.to_string(),
        workload_id: workload.to_string(),
        workload_name,
        process: process.map(self::process),
        restart,
        single_writer,
        ports: ports.into_iter().map(u32::from).collect(),
        ..v1::Claim::default()
    }
}

fn process(process: Process) -> v1::Process {
    let Process { argv, env, working_dir, files, probe, warm_up, start_deadline_ms, stop_deadline_ms } = process;
    v1::Process {
        argv,
        env: env.into_iter().map(|(name, value)| (name, value.as_str().to_owned())).collect(),
        working_dir: working_dir.unwrap_or_default(),
        files: files
            .into_iter()
            .map(|file| v1::File {
                path: file.path,
                mode: file.mode,
                content: file.content.to_vec(),
                secret: file.secret,
                only_if_absent: file.only_if_absent,
            })
            .collect(),
        probe: Some(probe.into()),
        warm_up: warm_up
            .into_iter()
            .map(|request| v1::WarmUp {
                port: request.port.into(),
                path: request.path,
                bearer_env: request.bearer.map(|name| name.to_string()).unwrap_or_default(),
                body: request.body.unwrap_or_default(),
            })
            .collect(),
        start_deadline_ms,
        stop_deadline_ms,
    }
}

pub fn facts(facts: v1::NodeFacts) -> NodeFacts {
    let v1::NodeFacts {
        hostname,
        cpu_millis,
        memory_mib,
        disk_free_mib,
        agent_version,
        runtime_version,
        ingress,
        firewall_ready,
    } = facts;
    // Text of a node ends in rows and logs: bounded here.
    let short = |text: String| text.chars().filter(|c| !c.is_control()).take(255).collect();
    NodeFacts {
        hostname: short(hostname),
        cpu_millis,
        memory_mib,
        disk_free_mib,
        agent_version: short(agent_version),
        runtime_version: short(runtime_version),
        ingress: short(ingress),
        firewall_ready,
    }
}
