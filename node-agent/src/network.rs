//! The containers' way out: a veth pair each, and one static nftables table with a set of who may use it.
//!
//! The host's end of a cable has no address, only a route to the container and its fixed neighbour, and the container has
//! the host's end as the fixed neighbour behind its default route: nothing is asked for by ARP, nothing of the host can be
//! reached at the cable, and programs that watch the host's addresses (a browser breaks its connections off when one comes)
//! are not told of every container.
//!
//! An address is of use only while its interface and it are together in the set `live`: added at the claim, taken out
//! at the stop, and on a fresh slot not there. The table is loaded whole and atomically before the first container is
//! attached, and compared with what was loaded whenever the kernel tells of a change to a table, and every ten seconds.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::BytesMut;
use clawhq_domain::ids::SlotId;
use futures::TryStreamExt;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, sendto, setsockopt, socket,
    sockopt::ReceiveTimeout,
};
use nix::sys::time::{TimeVal, TimeValLike};
use parking_lot::Mutex;
use rtnetlink::packet_route::link::{InfoData, InfoVeth};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteScope};
use rtnetlink::sys::protocols::NETLINK_NETFILTER;
use rtnetlink::sys::{AsyncSocket, AsyncSocketExt, TokioSocket};
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};
use sha2::{Digest, Sha256};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::config;
use crate::netns::{Netns, Workers};

/// 10.96.0.0/11 in pieces of four addresses: one piece a slot, its third address the container's, its second the next hop's,
/// which nobody has.
const FIRST: u32 = u32::from_be_bytes([10, 96, 0, 0]);
const PIECES: u32 = 1 << 19;
/// Of the two ends of every cable: there is nobody else on it. Locally administered.
const HOST_END: [u8; 6] = [0x02, 0xc1, 0xa3, 0, 0, 1];
const CONTAINER_END: [u8; 6] = [0x02, 0xc1, 0xa3, 0, 0, 2];
const NFT_DEADLINE: Duration = Duration::from_secs(10);
/// Changes that follow each other closely are looked at once.
const SETTLE: Duration = Duration::from_millis(5);

/// Never reached from a container, besides the configured resolvers.
const FORBIDDEN: &[&str] = &[
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "224.0.0.0/3",
];
/// Mail, Windows shares, remote desktops: what a taken-over agent would be abused for.
const FORBIDDEN_TCP: &str = "25, 445, 465, 587, 2525, 3389";

/// Which piece of the address space a slot has. Interface names follow from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Piece(pub u32);

impl Piece {
    pub fn next_hop(self) -> Ipv4Addr {
        Ipv4Addr::from(FIRST + self.0 * 4 + 1)
    }

    pub fn container(self) -> Ipv4Addr {
        Ipv4Addr::from(FIRST + self.0 * 4 + 2)
    }
}

pub struct Network {
    config: config::Network,
    /// Of every interface of ours: no other agent's begins with it.
    prefix: String,
    table: String,
    workers: Workers,
    netlink: Handle,
    nft: Option<Mutex<OwnedFd>>,
    taken: Mutex<BTreeSet<Piece>>,
    live: Mutex<BTreeSet<Piece>>,
    loaded: Mutex<Option<[u8; 32]>>,
    ready: AtomicBool,
}

impl Network {
    /// Nothing is loaded yet; `taken` are the pieces of the ledger.
    pub fn new(
        config: config::Network,
        workers: Workers,
        taken: BTreeSet<Piece>,
        live: BTreeSet<Piece>,
    ) -> anyhow::Result<Self> {
        anyhow::ensure!(
            config.key.len() <= 4 && config.key.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')),
            "network.key must be up to 4 lower-case hexadecimal digits"
        );
        let (connection, netlink, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        let (prefix, table) = match config.key.as_str() {
            "" => ("chq".to_owned(), "clawhq".to_owned()),
            key => (format!("cq{key}"), format!("clawhq_{key}")),
        };
        Ok(Self {
            nft: config.egress.then(nft_socket).transpose()?.map(Mutex::new),
            config,
            prefix,
            table,
            workers,
            netlink,
            taken: Mutex::new(taken),
            live: Mutex::new(live),
            loaded: Mutex::new(None),
            ready: AtomicBool::new(false),
        })
    }

    /// The table is loaded and was as loaded when last looked at; or there is no way out at all.
    pub fn is_ready(&self) -> bool {
        !self.config.egress || self.ready.load(Ordering::Relaxed)
    }

    fn interface(&self, piece: Piece) -> String {
        format!("{}{:08x}", self.prefix, piece.0)
    }

    fn piece_of(&self, interface: &str) -> Option<Piece> {
        let digits = interface.strip_prefix(&self.prefix).filter(|digits| digits.len() == 8)?;
        u32::from_str_radix(digits, 16).ok().filter(|index| *index < PIECES).map(Piece)
    }

    // -------------------------------------------------------------------------------------------- the table

    /// Loads the table whole, replacing one of the same name, in one transaction.
    pub async fn load(&self) -> anyhow::Result<()> {
        if !self.config.egress {
            return Ok(());
        }
        let text = self.ruleset();
        nft(&["-f", "-"], Some(&text)).await?;
        // Without it nothing leaves; containers are the only ones whose packets we let through our table, so the table
        // is there first.
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
        let digest = self.digest().await?;
        // Without it nothing leaves; and nothing may before the table is there.
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
        *self.loaded.lock() = Some(digest);
        self.ready.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Compares the table and the set with what they should be, and mends them. `Ok(false)`: they had to be.
    pub async fn verify(&self) -> anyhow::Result<bool> {
        if !self.config.egress {
            return Ok(true);
        }
        let expected = *self.loaded.lock();
        let same = match self.digest().await {
            Ok(digest) => Some(digest) == expected && self.live_elements().await? == self.live.lock().len(),
            Err(_) => false,
        };
        if same {
            self.ready.store(true, Ordering::Relaxed);
            return Ok(true);
        }
        self.ready.store(false, Ordering::Relaxed);
        self.load().await?;
        Ok(false)
    }

    /// Tells of changes to the kernel's tables from now on; `None` where there is no way out to guard.
    pub fn changes(&self) -> io::Result<Option<Changes>> {
        self.config.egress.then(Changes::subscribe).transpose()
    }

    async fn digest(&self) -> anyhow::Result<[u8; 32]> {
        // Terse: without the elements, which change by design.
        let listed = nft(&["-j", "-t", "list", "table", "inet", &self.table], None).await?;
        Ok(Sha256::digest(listed.as_bytes()).into())
    }

    async fn live_elements(&self) -> anyhow::Result<usize> {
        let listed = nft(&["-j", "list", "set", "inet", &self.table, "live"], None).await?;
        let listed: serde_json::Value = serde_json::from_str(&listed)?;
        let sets = listed["nftables"].as_array().into_iter().flatten();
        Ok(sets.filter_map(|entry| entry["set"]["elem"].as_array()).map(Vec::len).sum())
    }

    fn ruleset(&self) -> String {
        let Self { table, prefix, .. } = self;
        let live: Vec<String> = self
            .live
            .lock()
            .iter()
            .map(|piece| format!("\"{}\" . {}", self.interface(*piece), piece.container()))
            .collect();
        let elements = if live.is_empty() { String::new() } else { format!("elements = {{ {} }}", live.join(", ")) };
        let dns: Vec<String> = self.config.dns.iter().filter(|one| one.is_ipv4()).map(IpAddr::to_string).collect();
        let resolvers = if dns.is_empty() {
            String::new()
        } else {
            format!("ip daddr {{ {} }} meta l4proto {{ tcp, udp }} th dport 53 accept", dns.join(", "))
        };
        let forbidden = FORBIDDEN.join(", ");
        let (rate, most) = (self.config.new_connections_per_second, self.config.connections_max);
        let burst = rate.saturating_mul(2).max(1);
        let (rate, most) = (rate.max(1), most.max(1));
        format!(
            r#"table inet {table}
delete table inet {table}
table inet {table} {{
  set live {{ type ifname . ipv4_addr; {elements} }}
  set pace {{ type ipv4_addr; size 65536; flags dynamic; timeout 1m; }}
  set flows {{ type ipv4_addr; size 65536; flags dynamic; }}

  chain forward {{
    type filter hook forward priority filter - 10; policy accept;
    iifname "{prefix}*" jump from_slot
    oifname "{prefix}*" ct state established,related accept
    oifname "{prefix}*" drop
  }}
  chain from_slot {{
    meta nfproto ipv6 drop
    iifname . ip saddr != @live drop
    ct state established,related accept
    ct state invalid drop
    ct state new update @pace {{ ip saddr limit rate over {rate}/second burst {burst} packets }} drop
    ct state new add @flows {{ ip saddr ct count over {most} }} drop
    {resolvers}
    ip daddr {{ {forbidden} }} drop
    tcp dport {{ {FORBIDDEN_TCP} }} drop
    oifname "{prefix}*" drop
    accept
  }}
  chain input {{
    type filter hook input priority filter - 10; policy accept;
    iifname "{prefix}*" drop
  }}
  chain output {{
    type filter hook output priority filter - 10; policy accept;
    oifname "{prefix}*" ct state established,related accept
    oifname "{prefix}*" drop
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat - 10; policy accept;
    ip saddr 10.96.0.0/11 oifname != "{prefix}*" masquerade
  }}
}}
"#
        )
    }

    /// Lets a container out. Blocks for a fraction of a millisecond.
    pub fn open(&self, piece: Piece) -> io::Result<()> {
        self.live.lock().insert(piece);
        self.element(NEWSETELEM, piece)
    }

    pub fn close(&self, piece: Piece) -> io::Result<()> {
        if !self.live.lock().remove(&piece) {
            return Ok(());
        }
        match self.element(DELSETELEM, piece) {
            Err(error) if error.raw_os_error() == Some(nix::libc::ENOENT) => Ok(()),
            other => other,
        }
    }

    fn element(&self, kind: u16, piece: Piece) -> io::Result<()> {
        let Some(socket) = &self.nft else { return Ok(()) };
        let message = element_message(kind, &self.table, &self.interface(piece), piece.container());
        transact(&socket.lock(), &message)
    }

    // -------------------------------------------------------------------------------------------- the cables

    /// A piece nobody on this machine uses, kept until [`Self::release`].
    pub async fn reserve(&self, slot: SlotId) -> anyhow::Result<Piece> {
        let mut used = BTreeSet::new();
        // Other agents' containers, and the host's own addresses, which have a route each.
        let mut routes = self.netlink.route().get(RouteMessageBuilder::<Ipv4Addr>::new().build()).execute();
        while let Some(route) = routes.try_next().await? {
            if route.header.destination_prefix_length < 30 {
                continue;
            }
            for attribute in route.attributes {
                if let RouteAttribute::Destination(RouteAddress::Inet(one)) = attribute {
                    used.insert(u32::from(one).wrapping_sub(FIRST) / 4);
                }
            }
        }
        let start = Sha256::digest(slot.to_string());
        let start = u32::from_be_bytes([start[0], start[1], start[2], start[3]]);
        let mut taken = self.taken.lock();
        // The first piece would hold the network's own address.
        let free = (0..PIECES)
            .map(|step| Piece(start.wrapping_add(step) % PIECES))
            .find(|piece| piece.0 != 0 && !used.contains(&piece.0) && !taken.contains(piece))
            .ok_or_else(|| anyhow::anyhow!("no address is left"))?;
        taken.insert(free);
        Ok(free)
    }

    pub fn release(&self, piece: Piece) {
        self.taken.lock().remove(&piece);
    }

    /// Whether the cable lies there, the last of it as well: its route.
    pub fn is_laid(&self, piece: Piece) -> bool {
        let name = self.interface(piece);
        let routes = || std::fs::read_to_string("/proc/net/route").unwrap_or_default();
        !self.config.egress || routes().lines().any(|route| route.split('\t').next() == Some(&name))
    }

    /// Lays the cable into a container. One that lies there already stays.
    pub async fn attach(&self, piece: Piece, netns: &Netns) -> anyhow::Result<()> {
        self.taken.lock().insert(piece);
        let runtime = tokio::runtime::Handle::current();
        let egress = self.config.egress;
        let inside = self
            .workers
            .run(netns, move || {
                // Nobody inside has a use for IPv6 while nothing outside filters it for them.
                for which in ["all", "default"] {
                    let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{which}/disable_ipv6"), "1");
                }
                if !egress {
                    return Ok(None);
                }
                let _entered = runtime.enter();
                rtnetlink::new_connection().map(Some)
            })
            .await?;
        let Some((connection, inside, _)) = inside else { return Ok(()) };
        let driver = tokio::spawn(connection);
        let result = self.cable(piece, netns, &inside).await;
        drop(inside);
        // The connection's socket holds the namespace.
        driver.abort();
        result
    }

    async fn cable(&self, piece: Piece, netns: &Netns, inside: &Handle) -> anyhow::Result<()> {
        let outer = self.interface(piece);
        let eth0 = async || self.workers.run(netns, || Ok(index("eth0"))).await;
        let found = eth0().await?;
        let laid = found.is_some() && self.is_laid(piece);
        if !laid {
            if let Some(left) = index(&outer) {
                cut(&self.netlink, left).await?;
            }
            // The end of another cable, as when the ledger was lost.
            if let Some(left) = found {
                cut(inside, left).await?;
            }
            let end = LinkMessageBuilder::<LinkUnspec>::new().name("eth0".to_owned()).setns_by_fd(netns.as_raw_fd());
            let end = InfoData::Veth(InfoVeth::Peer(end.build()));
            let pair = LinkVeth::new(&outer, "eth0").set_info_data(end).build();
            self.netlink.link().add(pair).execute().await?;
        }
        let host = index(&outer).ok_or_else(|| anyhow::anyhow!("{outer} vanished"))?;
        let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{outer}/disable_ipv6"), "1");
        let _ = std::fs::write(format!("/proc/sys/net/ipv4/conf/{outer}/rp_filter"), "1");
        end_of(&self.netlink, host, HOST_END).await?;
        let container = IpAddr::V4(piece.container());
        neighbour(&self.netlink, host, container, CONTAINER_END).await?;

        let eth0 = eth0().await?.ok_or_else(|| anyhow::anyhow!("eth0 is not inside"))?;
        inside.address().add(eth0, container, 30).replace().execute().await?;
        end_of(inside, eth0, CONTAINER_END).await?;
        neighbour(inside, eth0, IpAddr::V4(piece.next_hop()), HOST_END).await?;
        let route = RouteMessageBuilder::<Ipv4Addr>::new().gateway(piece.next_hop()).output_interface(eth0).build();
        inside.route().add(route).replace().execute().await?;

        // Last: a cable with a route is a whole one. Beside a new cable there can only be somebody else's route, who took
        // the piece at the same moment.
        let route = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(piece.container(), 32)
            .output_interface(host)
            .scope(RouteScope::Link)
            .build();
        let route = self.netlink.route().add(route);
        if laid { route.replace() } else { route }.execute().await?;
        Ok(())
    }

    /// Takes the cable away; the container's end goes with ours.
    pub async fn detach(&self, piece: Piece) -> anyhow::Result<()> {
        match index(&self.interface(piece)) {
            Some(index) => Ok(cut(&self.netlink, index).await?),
            None => Ok(()),
        }
    }

    /// Removes our interfaces that belong to no slot; returns how many.
    pub async fn sweep(&self) -> anyhow::Result<usize> {
        let stray: Vec<Piece> = nix::net::if_::if_nameindex()?
            .into_iter()
            .filter_map(|one| self.piece_of(one.name().to_str().ok()?))
            .filter(|piece| !self.taken.lock().contains(piece))
            .collect();
        for piece in &stray {
            self.detach(*piece).await?;
        }
        Ok(stray.len())
    }
}

/// Removes an interface, and with it the other end.
async fn cut(netlink: &Handle, interface: u32) -> Result<(), rtnetlink::Error> {
    match netlink.link().del(interface).execute().await {
        // The container's namespace went at the same moment.
        Err(rtnetlink::Error::NetlinkError(error)) if error.raw_code() == -nix::libc::ENODEV => Ok(()),
        other => other,
    }
}

/// Brings one end of a cable up.
async fn end_of(netlink: &Handle, interface: u32, hardware: [u8; 6]) -> Result<(), rtnetlink::Error> {
    let up = LinkUnspec::new_with_index(interface).address(hardware.to_vec()).up().build();
    netlink.link().set(up).execute().await
}

/// Says once who is at the other end.
async fn neighbour(
    netlink: &Handle,
    interface: u32,
    address: IpAddr,
    hardware: [u8; 6],
) -> Result<(), rtnetlink::Error> {
    netlink.neighbours().add(interface, address).link_local_address(&hardware).replace().execute().await
}

/// Of an interface in the calling thread's namespace.
fn index(interface: &str) -> Option<u32> {
    nix::net::if_::if_nametoindex(interface).ok()
}

async fn nft(arguments: &[&str], input: Option<&str>) -> anyhow::Result<String> {
    let mut child = Command::new("nft")
        .args(arguments)
        .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| anyhow::anyhow!("nft (package nftables) cannot be started: {error}"))?;
    if let (Some(text), Some(mut stdin)) = (input, child.stdin.take()) {
        stdin.write_all(text.as_bytes()).await?;
    }
    let output = tokio::time::timeout(NFT_DEADLINE, child.wait_with_output()).await??;
    anyhow::ensure!(
        output.status.success(),
        "nft {}: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8(output.stdout)?)
}

// ------------------------------------------------------------------------------------------------ nf_tables messages
//
// One element is added at every claim, where starting `nft` would cost more than all else: so it is said to the kernel
// directly. A batch of one message; linux/netfilter/nf_tables.h has the numbers.

const NEWSETELEM: u16 = 12;
const DELSETELEM: u16 = 14;
const NEWGEN: u16 = 15;
const NFNLGRP_NFTABLES: u32 = 7;
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_CREATE: u16 = 0x400;
const NLMSG_ERROR: u16 = 2;
const NFPROTO_INET: u8 = 1;
const NLA_F_NESTED: u16 = 0x8000;
const IFNAMSIZ: usize = 16;

fn nft_socket() -> io::Result<OwnedFd> {
    let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkNetFilter)?;
    bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    setsockopt(&fd, ReceiveTimeout, &TimeVal::milliseconds(500))?;
    Ok(fd)
}

/// What the kernel tells of changes to its tables, whoever makes them.
pub struct Changes(TokioSocket);

impl Changes {
    fn subscribe() -> io::Result<Self> {
        let mut socket = TokioSocket::new(NETLINK_NETFILTER)?;
        socket.socket_mut().bind(&rtnetlink::sys::SocketAddr::new(0, 1 << (NFNLGRP_NFTABLES - 1)))?;
        Ok(Self(socket))
    }

    /// Waits for a change to more than a set's elements, which we change ourselves with every claim. Safe to cancel.
    pub async fn next(&mut self) -> io::Result<()> {
        loop {
            let mut messages = BytesMut::with_capacity(16 << 10);
            let received = self.0.recv(&mut messages).await;
            if told(received.map(drop), &messages)? {
                tokio::time::sleep(SETTLE).await;
                let _ = self.drain();
                return Ok(());
            }
        }
    }

    /// Reads all that waits; whether it is more than elements.
    fn drain(&self) -> io::Result<bool> {
        let mut structural = false;
        loop {
            let mut messages = BytesMut::with_capacity(16 << 10);
            match self.0.socket_ref().recv(&mut messages, nix::libc::MSG_DONTWAIT) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(structural),
                received => structural |= told(received.map(drop), &messages)?,
            }
        }
    }
}

/// Whether what was received is worth a look.
fn told(received: io::Result<()>, messages: &[u8]) -> io::Result<bool> {
    match received {
        Ok(()) => Ok(is_structural(messages)),
        // More changes than the socket holds: something of note may be among those that were dropped.
        Err(error) if error.raw_os_error() == Some(nix::libc::ENOBUFS) => Ok(true),
        Err(error) => Err(error),
    }
}

/// Whether netlink messages tell of tables, chains, rules or sets.
fn is_structural(mut messages: &[u8]) -> bool {
    while let Some(header) = messages.first_chunk::<16>() {
        let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let kind = u16::from_ne_bytes([header[4], header[5]]);
        let ours = kind >> 8 == NFNL_SUBSYS_NFTABLES;
        if ours && !matches!(kind & 0xff, NEWSETELEM | DELSETELEM | NEWGEN) {
            return true;
        }
        messages = messages.get(length.max(16).next_multiple_of(4)..).unwrap_or_default();
    }
    false
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(4 + value.len().next_multiple_of(4));
    bytes.extend_from_slice(&u16::try_from(4 + value.len()).unwrap_or(u16::MAX).to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn message(kind: u16, flags: u16, sequence: u32, family: u8, resource: u16, attributes: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(20 + attributes.len());
    bytes.extend_from_slice(&u32::try_from(20 + attributes.len()).unwrap_or(u32::MAX).to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(&(NLM_F_REQUEST | flags).to_ne_bytes());
    bytes.extend_from_slice(&sequence.to_ne_bytes());
    bytes.extend_from_slice(&0_u32.to_ne_bytes());
    bytes.extend_from_slice(&[family, 0]);
    bytes.extend_from_slice(&resource.to_be_bytes());
    bytes.extend_from_slice(attributes);
    bytes
}

fn element_message(kind: u16, table: &str, interface: &str, address: Ipv4Addr) -> Vec<u8> {
    let mut key = interface.as_bytes().to_vec();
    key.resize(IFNAMSIZ, 0);
    key.extend_from_slice(&address.octets());
    let text = |kind, text: &str| attribute(kind, &[text.as_bytes(), &[0]].concat());
    let key = attribute(NLA_F_NESTED | 1, &attribute(1, &key));
    let elements = attribute(NLA_F_NESTED | 3, &attribute(NLA_F_NESTED | 1, &key));
    let attributes = [text(1, table), text(2, "live"), elements].concat();
    let flags = NLM_F_ACK | if kind == NEWSETELEM { NLM_F_CREATE } else { 0 };
    [
        message(NFNL_MSG_BATCH_BEGIN, 0, 0, 0, NFNL_SUBSYS_NFTABLES, &[]),
        message(NFNL_SUBSYS_NFTABLES << 8 | kind, flags, 1, NFPROTO_INET, 0, &attributes),
        message(NFNL_MSG_BATCH_END, 0, 2, 0, NFNL_SUBSYS_NFTABLES, &[]),
    ]
    .concat()
}

fn transact(socket: &OwnedFd, batch: &[u8]) -> io::Result<()> {
    // An answer that came too late for its question must not answer the next one.
    let mut buffer = [0; 8192];
    while recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT).is_ok() {}
    sendto(socket.as_raw_fd(), batch, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    loop {
        let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let mut rest = &buffer[..length];
        while let Some(header) = rest.first_chunk::<16>() {
            let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
            let kind = u16::from_ne_bytes([header[4], header[5]]);
            let Some(body) = rest.get(16..length) else { break };
            if let (NLMSG_ERROR, Some(code)) = (kind, body.first_chunk::<4>()) {
                return match i32::from_ne_bytes(*code) {
                    0 => Ok(()),
                    code => Err(io::Error::from_raw_os_error(-code)),
                };
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_do_not_overlap_and_names_read_back() {
        assert_eq!(Piece(1).next_hop(), Ipv4Addr::new(10, 96, 0, 5));
        assert_eq!(Piece(1).container(), Ipv4Addr::new(10, 96, 0, 6));
        assert_eq!(Piece(PIECES - 1).container(), Ipv4Addr::new(10, 127, 255, 254));
    }

    #[test]
    fn messages_are_aligned_and_say_their_length() {
        let batch = element_message(NEWSETELEM, "clawhq_ab", "cqab00000001", Piece(1).container());
        assert_eq!(batch.len() % 4, 0);
        let (mut rest, mut kinds) = (&batch[..], Vec::new());
        while !rest.is_empty() {
            let length = u32::from_ne_bytes(rest[..4].try_into().unwrap()) as usize;
            kinds.push(u16::from_ne_bytes(rest[4..6].try_into().unwrap()));
            rest = &rest[length..];
        }
        assert_eq!(kinds, [0x10, 10 << 8 | 12, 0x11]);
    }
}

#[cfg(test)]
mod in_a_namespace {
    //! Against the kernel, in a namespace of the test's own: loads the table, adds and removes an element.

    use super::*;

    /// A namespace that lives as long as its holder sleeps.
    fn fresh() -> (std::process::Child, Netns) {
        let mut holder = std::process::Command::new("unshare")
            .args(["--net", "sh", "-c", "echo ready; read end"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = [0; 6];
        io::Read::read_exact(holder.stdout.as_mut().unwrap(), &mut ready).unwrap();
        let netns = Netns::of_pid(holder.id()).unwrap();
        (holder, netns)
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_table_loads_is_verified_and_mended() {
        let workers = Workers::start().unwrap();
        let (mut holder, netns) = fresh();
        // The whole test on a thread of its own that stays in there; child processes inherit it.
        let thread = std::thread::spawn(move || {
            nix::sched::setns(
                std::fs::File::open(format!("/proc/self/fd/{}", netns.as_raw_fd())).unwrap(),
                nix::sched::CloneFlags::CLONE_NEWNET,
            )
            .unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let live = BTreeSet::from([Piece(5)]);
                let network = Network::new(config::Network::default(), workers, live.clone(), live).unwrap();
                assert!(!network.is_ready());
                network.load().await.unwrap();
                assert_eq!(network.live_elements().await.unwrap(), 1);
                let mut changes = network.changes().unwrap().unwrap();
                network.open(Piece(6)).unwrap();
                network.open(Piece(6)).unwrap();
                assert!(network.verify().await.unwrap());
                let begin = std::time::Instant::now();
                assert!(!changes.drain().unwrap(), "a claim's element is no reason to look");
                for index in 100..300 {
                    network.open(Piece(index)).unwrap();
                }
                println!("an element takes {:?}", begin.elapsed() / 200);
                assert_eq!(network.live_elements().await.unwrap(), 202);
                network.close(Piece(6)).unwrap();
                network.close(Piece(6)).unwrap();
                assert!(network.verify().await.unwrap());
                // Somebody else's flush, rule or element is seen and undone.
                for meddling in [
                    &["flush", "ruleset"][..],
                    &["insert", "rule", "inet", "clawhq", "from_slot", "accept"],
                    &["add", "element", "inet", "clawhq", "live", "{ \"x\" . 1.2.3.4 }"],
                ] {
                    let _ = changes.drain();
                    nft(meddling, None).await.unwrap();
                    if meddling[1] != "element" {
                        tokio::time::timeout(NFT_DEADLINE, changes.next())
                            .await
                            .expect("the kernel tells of it")
                            .unwrap();
                    }
                    assert!(!network.verify().await.unwrap(), "{meddling:?}");
                    assert!(network.verify().await.unwrap() && network.is_ready());
                    assert_eq!(network.live_elements().await.unwrap(), 201);
                }
            });
        });
        thread.join().unwrap();
        drop(holder.stdin.take());
        holder.wait().unwrap();
    }
}
