//! Rows as people see them.

use clawhq_domain::ids::OrgId;
use clawhq_domain::lifecycle::{self, Phase};
use clawhq_domain::slot::SlotState;
use clawhq_domain::template::Protocol;
use clawhq_domain::workload::{NodeHealth, PlacementKind};
use clawhq_store as store;

use crate::App;
use crate::model::{Instance, Queue, ReleaseInfo, Workload};

/// The guess at how long a place in the queue takes: containers end or room is made about this often.
const PLACE_MS: i64 = 15_000;

pub(super) fn release(row: store::ReleaseRow) -> ReleaseInfo {
    ReleaseInfo {
        id: row.id,
        number: row.number,
        created_at: row.created_at,
        created_by: row.created_by,
        release: row.release,
        changes: row.diff,
    }
}

fn phase(row: &store::Instance) -> Phase {
    let failed = row.failure.is_some() && matches!(row.observed, SlotState::Failed | SlotState::Exited);
    match () {
        () if failed => Phase::Failed,
        () if row.ended_at.is_some() => Phase::Gone,
        () if row.leaving => Phase::Stopping,
        () if row.placement == PlacementKind::Queued => Phase::Queued,
        () if row.node_health == NodeHealth::Silent => Phase::Unreachable,
        () => lifecycle::step(Phase::Placed, lifecycle::Event::Reported(row.observed)).unwrap_or(Phase::Placed),
    }
}

pub(super) fn instance(row: store::Instance) -> Instance {
    Instance {
        id: row.id,
        workload: row.workload,
        release: row.release,
        release_number: row.release_number,
        placement: row.placement,
        phase: phase(&row),
        node: row.node,
        slot: row.slot,
        created_at: row.created_at,
        started_at: row.started_at,
        ready_at: row.ready_at,
        ended_at: row.ended_at,
        restarts: row.run.saturating_sub(1),
        steps: row.steps,
        failure: row.failure,
    }
}

/// The one that answers people: a running one of the newest release, else any running one, else the newest.
pub(crate) fn serving(detail: &store::WorkloadDetail) -> Option<&store::Instance> {
    let running = |one: &&store::Instance| one.observed == SlotState::Running && one.ended_at.is_none() && !one.leaving;
    detail
        .instances
        .iter()
        .find(|one| running(one) && one.release == detail.workload.release)
        .or_else(|| detail.instances.iter().find(running))
        .or_else(|| detail.instances.first())
}

impl App {
    pub(crate) fn present(&self, org: OrgId, slug: &str, detail: store::WorkloadDetail) -> Workload {
        let view = detail.view();
        let (shown, reason) = lifecycle::shown(&view, detail.workload.deleted_at.is_some());
        let log_tail = detail
            .instances
            .first()
            .and_then(|newest| newest.failure.as_ref())
            .map(|failure| failure.log_tail.clone())
            .unwrap_or_default();
        let has_http = detail.release.release.ports.iter().any(|port| port.protocol == Protocol::Http);
        let config = self.config();
        let url = has_http
            .then(|| format!("{}://{}-{slug}.{}", config.edge_scheme, detail.workload.name, config.edge_domain));
        let current = serving(&detail).cloned().map(instance);
        let row = detail.workload;
        Workload {
            id: row.id,
            org,
            name: row.name.to_string(),
            template: row.template.map(|name| name.to_string()),
            image: row.image.to_string(),
            image_digest: detail.release.release.image_digest.clone(),
            tier: row.tier,
            desired: row.desired,
            shown,
            reason,
            log_tail,
            claim: row.claim,
            release: release(detail.release),
            instance: current,
            queue: detail.queue.map(|place| Queue {
                position: place.position,
                estimate_ms: Some(i64::from(place.position) * PLACE_MS),
                since: place.since,
            }),
            url,
            version: row.version,
            created_at: row.created_at,
            updated_at: row.updated_at,
        }
    }
}
