//! UDP associations.

use super::*;

impl Hub {
    /// Makes the socket of an association and tells the customer where it is. For another hub's customer there is none:
    /// its datagrams come over the relay's connection.
    pub(super) fn associate(&mut self, io: &mut Io, slot: u32) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        if c.eof {
            // It left while its exit was found; the association would outlive it.
            return self.end(io, slot, None);
        }
        let idle = Some(Duration::from_secs(self.shared.config.customers.idle_seconds));
        if c.protocol == Protocol::Relay {
            c.stage = Stage::Udp;
            io.set_idle(c.token, idle);
            io.write(c.token, &[Opened::Ok as u8]);
            return;
        }
        let local = io.local_addr(c.token).map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |a| unmapped(a.ip()));
        let made = UdpSocket::bind(SocketAddr::new(local, 0))
            .and_then(|socket| Ok((socket.local_addr()?, io.udp(socket, tag(UDP, slot))?)));
        match made {
            Ok((addr, socket)) => {
                c.stage = Stage::Udp;
                io.set_idle(c.token, idle);
                c.association = Some(Box::new(Association { socket, client: None }));
                io.write(c.token, &socks::reply(Reply::Succeeded, addr));
            }
            Err(error) => {
                tracing::warn!(%error, "no socket for a UDP association");
                self.refuse(io, slot, Refusal::new(Reply::GeneralFailure, 503, Outcome::Failed, "no socket"));
            }
        }
    }

    /// A datagram from a customer.
    pub(super) fn datagram_up(&mut self, io: &mut Io, slot: u32, from: SocketAddr, bytes: &[u8]) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        let socket_from = io.peer_addr(c.token).map(|a| unmapped(a.ip()));
        let Some(association) = &mut c.association else { return };
        // Datagrams of others are not the customer's, whatever is in them.
        if socket_from != Some(unmapped(from.ip())) || association.client.is_some_and(|client| client != from) {
            return;
        }
        association.client = Some(from);
        // Two reserved bytes and the fragment's number: fragments are dropped, as RFC 1928 allows.
        if let Some(body) = bytes.strip_prefix(&[0, 0, 0]) {
            self.datagram_out(io, slot, body);
        }
    }

    /// A datagram on its way out: its destination, in the form that SOCKS has, and its payload.
    pub(super) fn datagram_out(&mut self, io: &mut Io, slot: u32, body: &[u8]) {
        let policy = self.shared.policy.read().clone();
        let Some(c) = self.customers.get_mut(slot) else { return };
        io.touch(c.token);
        let socks::Parsed::Done(Ok(dest), at) = socks::address(body) else { return };
        if policy.check(&dest).is_err() {
            return;
        }
        match dest.host {
            Host::Ip(ip) => self.send_datagram(io, slot, SocketAddr::new(ip, dest.port), &body[at..]),
            Host::Name(name) => {
                let datagram = Some((dest.port, body[at..].to_vec()));
                let lookup = Lookup { shard: self.shard.into(), slot, serial: c.serial, name, datagram };
                let _ = self.shared.lookups.try_send(lookup);
            }
        }
    }

    /// Sends a datagram whose destination is resolved and allowed, to the peer or to the hub that has it.
    pub(super) fn send_datagram(&mut self, io: &mut Io, slot: u32, to: SocketAddr, payload: &[u8]) {
        let Some(c) = self.customers.get_mut(slot).filter(|c| c.stage == Stage::Udp && !c.throttled) else { return };
        let (relay, stream) = (c.relay, Self::stream_of(slot, c.serial));
        let peer = self.peers.get(c.peer).map(|p| p.token);
        if peer.is_some_and(|token| io.queued(token) > DATAGRAM_BACKLOG) {
            return;
        }
        if !claim_whole(c, Way::Up, payload.len()) {
            return self.end(io, slot, Some(Outcome::Limited));
        }
        let mut address = Vec::with_capacity(19);
        socks::put_address(&mut address, to);
        let sent = match peer {
            Some(token) => {
                let frame = [&link::header(kind::DATAGRAM, stream), &address[..], payload].concat();
                !matches!(self.send_frame(io, token, &frame), Written::Full | Written::Gone)
            }
            None => self.record(io, relay, &[&address, payload]),
        };
        let Some(c) = self.customers.get_mut(slot) else { return };
        let n = payload.len() as u64;
        match &c.account {
            Some(account) if !sent => account.unclaim(Way::Up, n),
            Some(account) => {
                account.count(Way::Up, n);
                if let Some(wait) = account.throttle(n) {
                    c.throttled = true;
                    io.arm(wait, timed(CUSTOMER, slot, c.serial));
                }
            }
            None => {}
        }
        if sent {
            c.up += n;
            self.shared.metrics.bytes_up.fetch_add(n, Relaxed);
        }
    }

    /// A datagram from a peer or another hub: the address it came from is in front of it, in the form that SOCKS wants.
    pub(super) fn datagram_down(&mut self, io: &mut Io, slot: u32, body: &[u8]) {
        let Some(c) = self.customers.get_mut(slot).filter(|c| c.stage == Stage::Udp) else { return };
        let socks::Parsed::Done(Ok(_), at) = socks::address(body) else { return };
        let payload = body.len() - at;
        io.touch(c.token);
        let token = c.token;
        let client = c.association.as_ref().map(|a| (a.socket, a.client));
        let sent = match client {
            Some((_, None)) => return,
            Some((socket, Some(client))) => {
                if !claim_whole(c, Way::Down, payload) {
                    return self.end(io, slot, Some(Outcome::Limited));
                }
                io.send(socket, Some(client), &[&[0, 0, 0], body].concat())
            }
            None => self.record(io, token, &[body]),
        };
        if sent {
            return self.moved_down(io, slot, payload);
        }
        if let Some(account) = self.customers.get(slot).and_then(|c| c.account.as_ref()) {
            account.unclaim(Way::Down, payload as u64);
        }
    }
}

/// Claims a datagram: all of it or nothing.
fn claim_whole(c: &Customer, way: Way, bytes: usize) -> bool {
    let Some(account) = &c.account else { return true };
    let granted = account.claim(way, bytes as u64);
    let whole = granted == bytes as u64;
    if !whole {
        account.unclaim(way, granted);
    }
    whole
}
