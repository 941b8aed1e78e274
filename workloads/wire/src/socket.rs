//! Sockets made the way the loops want them: non-blocking, close-on-exec, one per shard on the same port.

use rustix::io::Errno;
use rustix::net::{self, AddressFamily, SocketAddrAny, SocketFlags, SocketType, sockopt};
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};

const FLAGS: SocketFlags = SocketFlags::NONBLOCK.union(SocketFlags::CLOEXEC);

fn family(addr: SocketAddr) -> AddressFamily {
    if addr.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 }
}

/// On loopback nothing queues and nothing is lost. All that a congestion control which paces (bbr, often the machine's default)
/// does there is to arm a timer for every few segments: half of what bulk costs. `reno` is part of every kernel and free
/// for everyone to use. Asked for before the handshake, for pacing once begun does not end.
fn unpaced(socket: &OwnedFd, addr: SocketAddr) {
    if addr.ip().to_canonical().is_loopback() {
        let _ = sockopt::set_tcp_congestion(socket, "reno");
    }
}

/// The kernel's accept queue limit, which is the backlog that listeners ask for.
pub fn somaxconn() -> i32 {
    std::fs::read_to_string("/proc/sys/net/core/somaxconn")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(4096)
}

/// One listener of a group on `addr` that shares the port by SO_REUSEPORT. TCP_NODELAY is set on it and so inherited by
/// every accepted socket, which saves a system call each. An IPv6 listener takes IPv6 alone.
pub fn listen(addr: SocketAddr, backlog: i32) -> io::Result<TcpListener> {
    let socket = net::socket_with(family(addr), SocketType::STREAM, FLAGS, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    sockopt::set_socket_reuseport(&socket, true)?;
    sockopt::set_tcp_nodelay(&socket, true)?;
    unpaced(&socket, addr);
    if addr.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    net::bind(&socket, &addr)?;
    net::listen(&socket, backlog)?;
    Ok(socket.into())
}

/// `shards` listeners on the same address; port 0 picks one free port for all of them.
pub fn listen_group(addr: SocketAddr, shards: usize) -> io::Result<Vec<TcpListener>> {
    let backlog = somaxconn();
    let first = listen(addr, backlog)?;
    let addr = first.local_addr()?;
    let mut group = vec![first];
    for _ in 1..shards {
        group.push(listen(addr, backlog)?);
    }
    Ok(group)
}

/// One UDP socket of a group on `addr` (SO_REUSEPORT, non-blocking).
pub fn udp(addr: SocketAddr) -> io::Result<UdpSocket> {
    let socket = net::socket_with(family(addr), SocketType::DGRAM, FLAGS, None)?;
    sockopt::set_socket_reuseport(&socket, true)?;
    if addr.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    net::bind(&socket, &addr)?;
    Ok(socket.into())
}

/// `shards` UDP sockets on the same address; the kernel keeps a client on one of them.
pub fn udp_group(addr: SocketAddr, shards: usize) -> io::Result<Vec<UdpSocket>> {
    let first = udp(addr)?;
    let addr = first.local_addr()?;
    let mut group = vec![first];
    for _ in 1..shards {
        group.push(udp(addr)?);
    }
    Ok(group)
}

/// A UDP socket connected to `to`, sent from `source` if given.
pub fn udp_connected(to: SocketAddr, source: Option<IpAddr>) -> io::Result<UdpSocket> {
    let socket = net::socket_with(family(to), SocketType::DGRAM, FLAGS, None)?;
    if let Some(source) = source {
        net::bind(&socket, &SocketAddr::new(source, 0))?;
    }
    net::connect(&socket, &to)?;
    Ok(socket.into())
}

/// Starts a TCP connect; `true` when it is complete already (usual on loopback).
///
/// With `source`, IP_BIND_ADDRESS_NO_PORT leaves the port to connect(2), so that the 28,000 ports of the ephemeral range
/// are a limit for each destination and not for all of them together. TCP_NODELAY is not set: `Io` does so before the second
/// write, and most connections of many services end before it.
pub(crate) fn connect(to: SocketAddr, source: Option<IpAddr>) -> io::Result<(OwnedFd, bool)> {
    let socket = net::socket_with(family(to), SocketType::STREAM, FLAGS, None)?;
    unpaced(&socket, to);
    if let Some(source) = source {
        nix::sys::socket::setsockopt(&socket.as_fd(), nix::sys::socket::sockopt::IpBindAddressNoPort, &true)?;
        net::bind(&socket, &SocketAddr::new(source, 0))?;
    }
    match net::connect(&socket, &to) {
        Ok(()) => Ok((socket, true)),
        Err(Errno::INPROGRESS) => Ok((socket, false)),
        Err(error) => Err(error.into()),
    }
}

/// `addr` as an internet address; the unspecified address for any other family (never seen on sockets made here).
pub(crate) fn internet(addr: Option<SocketAddrAny>) -> SocketAddr {
    addr.and_then(|addr| SocketAddr::try_from(addr).ok()).unwrap_or_else(|| SocketAddr::from(([0, 0, 0, 0], 0)))
}
