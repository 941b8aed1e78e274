//! On which node a new container goes, and why not when on none.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::ids::NodeId;
use crate::workload::NodeHealth;

/// A node as the placement sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeView {
    pub id: NodeId,
    pub health: NodeHealth,
    /// Takes no new containers.
    pub cordoned: bool,
    /// Its firewall is loaded and verified and its container runtime answers.
    pub ready: bool,
    pub capacity_mib: u32,
    pub reserved_mib: u32,
    /// Containers on it, of all tiers.
    pub slots: u32,
    pub slots_max: u32,
    /// Containers of the tier asked for.
    pub of_tier: u32,
    pub disk_free_mib: u64,
}

/// What must fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    pub memory_mib: u32,
    /// Most of this tier on one node; 0 for tiers that only run on dedicated nodes.
    pub tier_max_per_node: u32,
    /// The state volume lives there: no other node will do.
    pub pinned: Option<NodeId>,
}

/// Free disk a node must keep; below it image layers and logs start to fail in ways that hurt everybody.
pub const DISK_FLOOR_MIB: u64 = 2 * 1024;

/// Containers on one node at most: beyond it Docker's own work and the kernel's network tables begin to show.
pub const SLOTS_MAX: u32 = 250;

/// What may be reserved of a node's memory, in MiB: a tenth of it, and 1 GiB at least, is the host's own.
pub fn capacity_mib(memory_mib: u64) -> u32 {
    let kept = (memory_mib / 10).max(1024);
    u32::try_from(memory_mib.saturating_sub(kept)).unwrap_or(u32::MAX)
}

/// Why a node was passed over. The order is the order of checking.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Obstacle {
    Elsewhere,
    Silent,
    Cordoned,
    NotReady,
    DiskLow,
    SlotsFull,
    TierFull,
    NoMemory,
}

impl Obstacle {
    fn words(self) -> &'static str {
        match self {
            Self::Elsewhere => "without its volume",
            Self::Silent => "silent",
            Self::Cordoned => "cordoned",
            Self::NotReady => "not ready",
            Self::DiskLow => "low on disk",
            Self::SlotsFull => "at the most containers",
            Self::TierFull => "at the tier's most containers",
            Self::NoMemory => "out of memory",
        }
    }
}

/// No node will do, with how many were passed over for what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NoPlace {
    pub nodes: usize,
    pub obstacles: BTreeMap<Obstacle, usize>,
}

impl NoPlace {
    /// Such as `3 nodes: 2 out of memory, 1 cordoned`.
    pub fn message(&self) -> String {
        let mut text = format!("{} node{}", self.nodes, if self.nodes == 1 { "" } else { "s" });
        for (position, (obstacle, count)) in self.obstacles.iter().enumerate() {
            let _ = write!(text, "{} {count} {}", if position == 0 { ":" } else { "," }, obstacle.words());
        }
        text
    }
}

/// Smaller is better; the order of the fields is the policy, and the node's id makes it a function.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Score {
    /// Pack: the fullest node that still has room, so that others can be emptied.
    free_after_mib: u32,
    slots: u32,
    node: NodeId,
}

fn obstacle(request: &Request, node: &NodeView) -> Option<Obstacle> {
    let room = node.capacity_mib.saturating_sub(node.reserved_mib);
    let checks = [
        (request.pinned.is_some_and(|pinned| pinned != node.id), Obstacle::Elsewhere),
        (node.health == NodeHealth::Silent, Obstacle::Silent),
        (node.cordoned, Obstacle::Cordoned),
        (!node.ready, Obstacle::NotReady),
        (node.disk_free_mib < DISK_FLOOR_MIB, Obstacle::DiskLow),
        (node.slots >= node.slots_max, Obstacle::SlotsFull),
        (node.of_tier >= request.tier_max_per_node, Obstacle::TierFull),
        (room < request.memory_mib, Obstacle::NoMemory),
    ];
    checks.into_iter().find(|(stands, _)| *stands).map(|(_, obstacle)| obstacle)
}

/// Whether nothing stands against a container of `request` on this node.
pub fn fits(request: &Request, node: &NodeView) -> bool {
    obstacle(request, node).is_none()
}

/// The node a container of `request` goes to. The caller reserves it by a conditional write and plans again if it lost.
pub fn choose(request: &Request, nodes: &[NodeView]) -> Result<NodeId, NoPlace> {
    let mut obstacles = BTreeMap::new();
    let mut best: Option<Score> = None;
    for node in nodes {
        match obstacle(request, node) {
            Some(obstacle) => *obstacles.entry(obstacle).or_insert(0) += 1,
            None => {
                let score = Score {
                    free_after_mib: node.capacity_mib - node.reserved_mib - request.memory_mib,
                    slots: node.slots,
                    node: node.id,
                };
                best = Some(match best {
                    Some(known) => known.min(score),
                    None => score,
                });
            }
        }
    }
    best.map(|score| score.node).ok_or(NoPlace { nodes: nodes.len(), obstacles })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn node(id: u128) -> NodeView {
        NodeView {
            id: NodeId::from_u128(id),
            health: NodeHealth::Live,
            cordoned: false,
            ready: true,
            capacity_mib: 8192,
            reserved_mib: 0,
            slots: 0,
            slots_max: 200,
            of_tier: 0,
            disk_free_mib: 50_000,
        }
    }

    const SMALL: Request = Request { memory_mib: 256, tier_max_per_node: 50, pinned: None };

    #[test]
    fn it_packs_the_fullest_node_with_room() {
        let nodes = [node(1), NodeView { reserved_mib: 7000, ..node(2) }, NodeView { reserved_mib: 8000, ..node(3) }];
        assert_eq!(choose(&SMALL, &nodes), Ok(NodeId::from_u128(2)));
    }

    #[test]
    fn a_refusal_counts_its_reasons() {
        let nodes = [
            NodeView { cordoned: true, ..node(1) },
            NodeView { reserved_mib: 8000, ..node(2) },
            NodeView { reserved_mib: 8100, ..node(3) },
        ];
        assert_eq!(choose(&SMALL, &nodes).unwrap_err().message(), "3 nodes: 1 cordoned, 2 out of memory");
        assert_eq!(choose(&SMALL, &[]).unwrap_err().message(), "0 nodes");
    }

    #[test]
    fn the_host_keeps_its_share() {
        assert_eq!([512, 2048, 24 * 1024].map(capacity_mib), [0, 1024, 22119]);
    }

    #[test]
    fn a_volume_pins_its_node() {
        let pinned = Request { pinned: Some(NodeId::from_u128(2)), ..SMALL };
        assert_eq!(choose(&pinned, &[node(1), node(2)]), Ok(NodeId::from_u128(2)));
        let silent = NodeView { health: NodeHealth::Silent, ..node(2) };
        assert!(choose(&pinned, &[node(1), silent]).is_err());
    }

    proptest! {
        #[test]
        fn what_is_chosen_has_room(
            shapes in prop::collection::vec((0u32..9000, 0u32..210, 0u32..60, any::<bool>(), any::<bool>()), 0..12),
            memory_mib in 1u32..4096,
        ) {
            let nodes: Vec<_> = shapes.iter().enumerate().map(|(at, (reserved, slots, of_tier, cordoned, ready))| NodeView {
                reserved_mib: (*reserved).min(8192), slots: *slots, of_tier: *of_tier, cordoned: *cordoned, ready: *ready,
                ..node(at as u128)
            }).collect();
            let request = Request { memory_mib, ..SMALL };
            match choose(&request, &nodes) {
                Ok(id) => {
                    let chosen = nodes.iter().find(|node| node.id == id).unwrap();
                    prop_assert!(chosen.capacity_mib - chosen.reserved_mib >= memory_mib);
                    prop_assert!(!chosen.cordoned && chosen.ready && chosen.slots < chosen.slots_max);
                    let mut turned = nodes.clone();
                    turned.reverse();
                    prop_assert_eq!(choose(&request, &turned), Ok(id));
                }
                Err(none) => prop_assert_eq!(none.obstacles.values().sum::<usize>(), nodes.len()),
            }
        }
    }
}
