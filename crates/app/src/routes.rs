//! From a host name to the container that answers it, for the edge.

use std::time::Duration;

use clawhq_domain::Reason;
use clawhq_domain::ids::{InstanceId, NodeId, SlotId, WorkloadId};
use clawhq_domain::lifecycle::{self, Shown};
use clawhq_domain::release::Release;
use clawhq_domain::slot::SlotState;
use clawhq_domain::template::Protocol;
use clawhq_store::StraightRoute;

use crate::workloads::serving;
use crate::{App, Result};

/// Where a workload's bytes go.
#[derive(Clone, Debug)]
pub struct Target {
    pub node: NodeId,
    pub slot: SlotId,
    pub instance: InstanceId,
    /// The node agent's ingress: `unix:/path` or `tcp:host:port`.
    pub ingress: String,
    pub port: u16,
}

#[derive(Clone, Debug)]
pub struct Route {
    pub name: String,
    pub workload: Option<WorkloadId>,
    pub state: Shown,
    pub reason: Option<Reason>,
    /// `None`: nothing answers now, and `state` says why.
    pub target: Option<Target>,
}

impl Route {
    /// A stand-in for one that could not be looked up.
    pub fn unknown(name: &str) -> Self {
        Self { name: name.to_owned(), workload: None, state: Shown::Unreachable, reason: None, target: None }
    }
}

fn http_port(release: &Release) -> Option<u16> {
    release.ports.iter().find(|port| port.protocol == Protocol::Http).map(|port| port.port)
}

impl App {
    /// `label` is `<workload>-<org's slug>`; slugs have no hyphen. `None`: nobody has this name.
    pub async fn route(&self, label: &str) -> Result<Option<Route>> {
        let Some((name, slug)) = label.rsplit_once('-') else { return Ok(None) };
        let workloads = self.store().system(&self.system()).workloads();
        if let Some(straight) = workloads.straight(slug, name).await?
            && let Some(port) = http_port(&straight.release)
        {
            let StraightRoute { workload, instance, slot, node, ingress, release: _ } = straight;
            let target = Some(Target { node, slot, instance, ingress, port });
            let (name, state) = (name.to_owned(), Shown::Running);
            return Ok(Some(Route { name, workload: Some(workload), state, reason: None, target }));
        }
        let Some((detail, mut ingress)) = workloads.by_host(slug, name).await? else { return Ok(None) };
        let (state, reason) = lifecycle::shown(&detail.view(), false);
        let port = http_port(&detail.release.release);
        let answering = serving(&detail)
            .filter(|one| one.observed == SlotState::Running && one.ended_at.is_none() && !one.leaving)
            .and_then(|one| Some((one.id, one.slot?, one.node?)));
        let target = match (answering, port) {
            (Some((instance, slot, node)), Some(port)) => {
                ingress.remove(&node).map(|ingress| Target { node, slot, instance, ingress, port })
            }
            _ => None,
        };
        let name = detail.workload.name.to_string();
        Ok(Some(Route { name, workload: Some(detail.workload.id), state, reason, target }))
    }

    /// The same, waiting while it is on its way up.
    pub async fn wait_route(&self, label: &str, timeout: Duration) -> Result<Option<Route>> {
        let deadline = tokio::time::Instant::now() + timeout;
        let mut changes = None;
        loop {
            let Some(route) = self.route(label).await? else { return Ok(None) };
            let coming = matches!(route.state, Shown::Starting | Shown::Updating | Shown::Restarting);
            let Some(workload) = route.workload.filter(|_| coming && route.target.is_none()) else {
                return Ok(Some(route));
            };
            if tokio::time::Instant::now() >= deadline {
                return Ok(Some(route));
            }
            let Some(changes) = &mut changes else {
                // From here on no change is missed; look once more, for one may have come before.
                changes = Some(self.waiters().workload(workload));
                continue;
            };
            let look = (tokio::time::Instant::now() + Duration::from_secs(1)).min(deadline);
            tokio::select! {
                _ = changes.changed() => {}
                () = tokio::time::sleep_until(look) => {}
            }
        }
    }
}
