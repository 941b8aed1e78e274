//! What an operator asks: tables from the database, and the few acts that have no place in the public API.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use clap::Subcommand;
use clawhq_app::App;

#[derive(Subcommand)]
pub enum Admin {
    /// Hosts: health, room, when last heard of.
    Nodes,
    /// Containers that are not gone, by node.
    Slots,
    /// How full each warm pool is.
    Pool,
    /// Make a node and print its one-time join token.
    JoinToken {
        /// The node's name.
        name: String,
    },
    /// Put an org on another tier.
    SetTier {
        /// The org's slug.
        org: String,
        /// The tier's name.
        tier: String,
    },
}

/// Runs one.
///
/// # Errors
/// When the database does not answer, or the named thing does not exist.
pub async fn run(app: &App, command: Admin) -> Result<()> {
    match command {
        Admin::Nodes => {
            let mut rows =
                vec![row(["NAME", "STATE", "HEALTH", "READY", "RESERVED", "CAPACITY", "SLOTS", "LAST SEEN", "ID"])];
            let now = clawhq_runtime::clock::Clock::system().unix_millis();
            for node in app.nodes().await? {
                let seen =
                    node.last_seen_at.map_or("never".to_owned(), |at| format!("{:.1} s ago", (now - at) as f64 / 1e3));
                rows.push(row([
                    node.name.as_str(),
                    node.state.name(),
                    &format!("{:?}", node.health).to_lowercase(),
                    if node.ready { "yes" } else { "no" },
                    &format!("{} MiB", node.reserved_mib),
                    &format!("{} MiB", node.capacity_mib),
                    &format!("{}/{}", node.slots_used, node.slots_max),
                    &seen,
                    &node.id.to_string(),
                ]));
            }
            print(&rows);
        }
        Admin::Slots => {
            let names: BTreeMap<_, _> = app.nodes().await?.into_iter().map(|node| (node.id, node.name)).collect();
            let mut rows = vec![row(["ID", "NODE", "TEMPLATE", "TIER", "STATE", "MEMORY", "OWNER"])];
            for slot in app.slots().await? {
                rows.push(row([
                    slot.id.to_string().as_str(),
                    names.get(&slot.node).map_or("?", String::as_str),
                    slot.template.as_deref().unwrap_or("-"),
                    &slot.tier,
                    slot.state.name(),
                    &format!("{} MiB", slot.memory_mib),
                    &slot.owner.map_or("-".to_owned(), |(org, instance)| format!("{org} {instance}")),
                ]));
            }
            print(&rows);
        }
        Admin::Pool => {
            let mut rows = vec![row(["TEMPLATE", "TIER", "READY", "COMING", "TARGET"])];
            for pool in app.pool_depths().await? {
                rows.push(row([
                    pool.template.as_str(),
                    &pool.tier,
                    &pool.ready.to_string(),
                    &pool.coming.to_string(),
                    &pool.target.to_string(),
                ]));
            }
            print(&rows);
        }
        Admin::JoinToken { name } => {
            let (node, token) = app.join_token(&name).await.context("making the node")?;
            // The token alone on standard output, so that it can go straight into a file.
            eprintln!("node {name} ({node}); the token works once and only for a while:");
            println!("{token}");
        }
        Admin::SetTier { org, tier } => {
            app.set_org_tier(&org, &tier).await?;
            println!("{org} is on tier {tier}");
        }
    }
    Ok(())
}

fn row<'a>(cells: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    cells.into_iter().map(str::to_owned).collect()
}

fn print(rows: &[Vec<String>]) {
    for line in table(rows) {
        println!("{line}");
    }
}

/// Columns as wide as their widest cell, nothing behind the last.
fn table(rows: &[Vec<String>]) -> Vec<String> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    rows.iter()
        .map(|row| {
            let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}", width = *width));
            cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = vec![row(["NAME", "N"]), row(["ä", "10"]), row(["longer", ""])];
        assert_eq!(table(&rows), ["NAME    N", "ä       10", "longer"]);
        assert!(table(&[]).is_empty());
    }
}
