//! Open tunnels: bytes both ways, credit, the bill, and every way to end.

use super::*;

impl Hub {
    /// Bytes from a customer.
    pub(super) fn up(&mut self, io: &mut Io, slot: u32, bytes: &[u8]) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        let mut bytes = bytes;
        if let Some(body) = &mut c.body {
            match body.take(bytes) {
                Ok(n) => bytes = &bytes[..n],
                Err(_) => return self.end(io, slot, Some(Outcome::Malformed)),
            }
        }
        if !c.buffer.is_empty() || c.throttled || c.waiting {
            c.buffer.extend_from_slice(bytes);
            return io.pause(c.token);
        }
        let sent = self.send_up(io, slot, bytes);
        if sent < bytes.len()
            && let Some(c) = self.customers.get_mut(slot)
        {
            c.buffer.extend_from_slice(&bytes[sent..]);
            io.pause(c.token);
        }
    }

    /// Sends as much as credit, rate and the peer's connection allow; returns how much.
    pub(super) fn send_up(&mut self, io: &mut Io, slot: u32, bytes: &[u8]) -> usize {
        let mut at = 0;
        while at < bytes.len() {
            let Some(c) = self.customers.get_mut(slot) else { return bytes.len() };
            if c.throttled || c.waiting {
                break;
            }
            let Some(peer) = self.peers.get_mut(c.peer) else { break };
            let most = if c.compact { link::FRAME_MOST } else { link::LEGACY_FRAME_MOST };
            let n = (bytes.len() - at).min(most).min(usize::try_from(c.credit).unwrap_or(usize::MAX));
            if n == 0 {
                break;
            }
            if io.queued(peer.token) > DATA_BACKLOG {
                c.waiting = true;
                peer.waiting.push(slot);
                break;
            }
            // What the quota leaves; the tunnel ends at its last byte.
            let n = c.account.as_ref().map_or(n, |a| a.claim(Way::Up, n as u64) as usize);
            if n == 0 {
                self.end(io, slot, Some(Outcome::Limited));
                return bytes.len();
            }
            let part = &bytes[at..at + n];
            let stream = Self::stream_of(slot, c.serial);
            let mut head = [0; ws::MAX_HEADER + link::LEGACY_HEADER];
            let mut frame = [0; ws::MAX_HEADER];
            let inner = if c.compact { link::HEADER } else { link::LEGACY_HEADER };
            let outer = ws::encode_header(&mut frame, true, Opcode::Binary, inner + n, None);
            head[..outer].copy_from_slice(&frame[..outer]);
            if c.compact {
                head[outer..outer + inner].copy_from_slice(&link::header(kind::DATA, stream));
            } else {
                head[outer..outer + 36].copy_from_slice(&link::legacy_id(stream, c.salt));
            }
            match io.write_parts(peer.token, &head[..outer + inner], part) {
                Written::Sent => {}
                Written::Queued(_) => {
                    c.waiting = true;
                    peer.waiting.push(slot);
                }
                refused @ (Written::Full | Written::Gone) => {
                    if let Some(account) = &c.account {
                        account.unclaim(Way::Up, n as u64);
                    }
                    if refused == Written::Full {
                        c.waiting = true;
                        peer.waiting.push(slot);
                    }
                    break;
                }
            }
            at += n;
            c.credit -= n as u64;
            c.up += n as u64;
            self.shared.metrics.bytes_up.fetch_add(n as u64, Relaxed);
            if let Some(account) = &c.account {
                account.count(Way::Up, n as u64);
                if let Some(wait) = account.throttle(n as u64) {
                    c.throttled = true;
                    io.arm(wait, timed(CUSTOMER, slot, c.serial));
                }
            }
        }
        at
    }

    /// Goes on with what waits in a customer's buffer, then with reading.
    pub(super) fn push_up(&mut self, io: &mut Io, slot: u32) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        if c.stage != Stage::Tunnel {
            return;
        }
        if !c.buffer.is_empty() {
            let buffer = std::mem::take(&mut c.buffer);
            let sent = self.send_up(io, slot, &buffer);
            let Some(c) = self.customers.get_mut(slot) else { return };
            if sent < buffer.len() {
                c.buffer = buffer;
                c.buffer.drain(..sent);
                return io.pause(c.token);
            }
        }
        let Some(c) = self.customers.get_mut(slot) else { return };
        if c.throttled || c.waiting {
            return io.pause(c.token);
        }
        if c.eof {
            return self.send_eof(io, slot);
        }
        io.resume(c.token);
    }

    /// Passes a customer's half-close on, once all before it is sent.
    pub(super) fn send_eof(&mut self, io: &mut Io, slot: u32) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        if c.eof_sent || !c.buffer.is_empty() {
            return;
        }
        if !c.compact {
            // A legacy EOF would end the answer too. Whether the customer has only finished asking, or is gone, shows by
            // whether an answer still moves.
            return io.set_idle(c.token, Some(LEGACY_HALF_CLOSED));
        }
        c.eof_sent = true;
        let frame = link::header(kind::EOF, Self::stream_of(slot, c.serial));
        if let Some(token) = self.peers.get(c.peer).map(|p| p.token) {
            self.send_frame(io, token, &frame);
        }
    }

    /// Bytes from a peer for one of its streams.
    pub(super) fn down(&mut self, io: &mut Io, peer: u32, stream: u32, bytes: &[u8]) -> Result<(), &'static str> {
        let Some(slot) = self.customer_of(peer, stream) else { return Ok(()) };
        let Some(c) = self.customers.get_mut(slot) else { return Ok(()) };
        if c.stage != Stage::Tunnel || bytes.is_empty() || c.peer_eof {
            return Ok(());
        }
        let n = bytes.len();
        if c.compact {
            let Some(window) = c.window.checked_sub(n as u64) else { return Err("more data than was granted") };
            c.window = window;
        }
        // What the quota leaves is passed on; the tunnel ends at its last byte.
        let granted = c.account.as_ref().map_or(n, |a| a.claim(Way::Down, n as u64) as usize);
        if granted < n {
            self.down_within(io, slot, peer, &bytes[..granted]);
            self.end(io, slot, Some(Outcome::Limited));
            return Ok(());
        }
        self.down_within(io, slot, peer, bytes);
        Ok(())
    }

    /// Passes on bytes that were claimed.
    fn down_within(&mut self, io: &mut Io, slot: u32, peer: u32, bytes: &[u8]) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        let n = bytes.len();
        if n == 0 {
            return;
        }
        match io.write(c.token, bytes) {
            Written::Sent => {
                self.moved_down(io, slot, n);
                self.grant(io, slot, false);
            }
            Written::Queued(queued) => {
                let moved = c.unsent + n - queued;
                c.unsent = queued;
                if !c.compact && queued > LEGACY_BACKLOG && !c.blocks_peer {
                    c.blocks_peer = true;
                    if let Some(peer) = self.peers.get_mut(peer) {
                        peer.blocked += 1;
                        io.pause(peer.token);
                    }
                }
                self.moved_down(io, slot, moved);
            }
            Written::Full | Written::Gone => {
                if let Some(account) = &c.account {
                    account.unclaim(Way::Down, n as u64);
                }
                self.tunnel_broke(io, slot);
            }
        }
    }

    /// Counts bytes that the kernel took for the customer.
    pub(super) fn moved_down(&mut self, io: &mut Io, slot: u32, n: usize) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        if n == 0 {
            return;
        }
        c.down += n as u64;
        c.owed = c.owed.saturating_add(n as u32);
        self.shared.metrics.bytes_down.fetch_add(n as u64, Relaxed);
        if let Some(account) = &c.account {
            account.count(Way::Down, n as u64);
            if let Some(wait) = account.throttle(n as u64)
                && !c.throttled
            {
                c.throttled = true;
                io.arm(wait, timed(CUSTOMER, slot, c.serial));
                io.pause(c.relay);
                if !c.compact
                    && !c.blocks_peer
                    && let Some(peer) = self.peers.get_mut(c.peer)
                {
                    c.blocks_peer = true;
                    peer.blocked += 1;
                    io.pause(peer.token);
                }
            }
        }
    }

    /// Grants the peer what its customer has read, when it is worth a frame.
    pub(super) fn grant(&mut self, io: &mut Io, slot: u32, all: bool) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        if !c.compact || c.throttled || c.owed == 0 || (!all && c.owed < link::WINDOW / 4) || c.peer_eof {
            return;
        }
        let frame = link::credit(Self::stream_of(slot, c.serial), c.owed);
        c.window += u64::from(c.owed);
        c.owed = 0;
        if let Some(token) = self.peers.get(c.peer).map(|p| p.token) {
            self.send_frame(io, token, &frame);
        }
    }

    pub(super) fn unblock_peer(&mut self, io: &mut Io, slot: u32) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        if std::mem::take(&mut c.blocks_peer)
            && let Some(peer) = self.peers.get_mut(c.peer)
        {
            peer.blocked -= 1;
            if peer.blocked == 0 {
                io.resume(peer.token);
            }
        }
    }

    /// All that was queued for a customer is sent.
    pub(super) fn customer_drained(&mut self, io: &mut Io, slot: u32) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        let unsent = std::mem::take(&mut c.unsent);
        if c.stage == Stage::RelayTunnel && !c.throttled {
            io.resume(c.relay);
        }
        self.moved_down(io, slot, unsent);
        let Some(c) = self.customers.get(slot) else { return };
        if !c.throttled {
            self.unblock_peer(io, slot);
        }
        self.grant(io, slot, true);
    }

    pub(super) fn peer_eof(&mut self, io: &mut Io, slot: u32) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        if c.stage == Stage::Tunnel && !c.peer_eof {
            c.peer_eof = true;
            if c.body.is_some() {
                // One plain request to a connection: with the answer sent it is over.
                return self.end(io, slot, None);
            }
            io.shutdown_write(c.token);
        }
    }

    /// The peer, or this hub's tie to it, is gone: the customer gets what was received and a clean end.
    pub(super) fn tunnel_broke(&mut self, io: &mut Io, slot: u32) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        match c.stage {
            Stage::Opening => {
                if let Some(id) = c.peer_id {
                    self.shared.registry.opened(id, false);
                }
                self.try_another(io, slot, Opened::Failed);
            }
            Stage::Tunnel | Stage::Udp => self.end(io, slot, Some(Outcome::Failed)),
            _ => {}
        }
    }

    pub(super) fn tunnel_broke_by_peer(&mut self, io: &mut Io, slot: u32) {
        if let Some(c) = self.customers.get_mut(slot) {
            // It knows: no reset goes back.
            c.eof_sent = true;
            c.peer_eof = true;
        }
        self.tunnel_broke(io, slot);
    }

    /// Answers with an error and closes.
    pub(super) fn refuse(&mut self, io: &mut Io, slot: u32, refusal: Refusal) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        tracing::debug!(target: "access", from = %c.from, account = c.account.as_ref().map(|a| a.name.as_str()),
            dest = c.dest.as_ref().map(ToString::to_string), reason = refusal.reason, "refused");
        let answer = match c.protocol {
            Protocol::Socks => socks::reply(refusal.socks, SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0))),
            Protocol::Http => {
                let retry = matches!(refusal.status, 429 | 503).then_some(1);
                http::error(refusal.status, &refusal.reason, retry)
            }
            Protocol::Relay => vec![match refusal.socks {
                Reply::ConnectionRefused => Opened::Refused,
                Reply::HostUnreachable => Opened::Unreachable,
                Reply::TtlExpired => Opened::Timeout,
                Reply::NotAllowed => Opened::Denied,
                Reply::NetworkUnreachable => Opened::Full,
                _ => Opened::Failed,
            } as u8],
            Protocol::Unknown => Vec::new(),
        };
        io.write(c.token, &answer);
        self.shared.metrics.count(protocol_index(c), refusal.outcome);
        self.end(io, slot, None);
    }

    /// Ends a customer in order: what is queued is sent, its peer is told, the rest of what it sends is discarded.
    pub(super) fn end(&mut self, io: &mut Io, slot: u32, failed: Option<Outcome>) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        if c.stage == Stage::Ending {
            return;
        }
        if let Some(outcome) = failed {
            self.shared.metrics.count(protocol_index(c), outcome);
        }
        self.part(io, slot);
        let Some(c) = self.customers.get_mut(slot) else { return };
        c.stage = Stage::Ending;
        c.buffer = Vec::new();
        c.admitted = None;
        io.cancel(c.deadline);
        c.deadline = io.arm(LINGER, timed(CUSTOMER, slot, c.serial));
        io.set_idle(c.token, None);
        io.resume(c.token);
        io.shutdown_write(c.token);
    }

    /// Tells the peer (or the other hub) that the tunnel is over, writes the access log, lets the peer go.
    pub(super) fn part(&mut self, io: &mut Io, slot: u32) {
        self.unblock_peer(io, slot);
        let Some(c) = self.customers.get_mut(slot) else { return };
        let relay = std::mem::replace(&mut c.relay, Token::NONE);
        io.close(relay);
        if let Some(association) = c.association.take() {
            io.close(association.socket);
        }
        if c.peer_id.is_none() && c.up + c.down == 0 {
            return;
        }
        let Some(c) = self.customers.get(slot) else { return };
        let stream = Self::stream_of(slot, c.serial);
        if let Some(token) = self.peers.get(c.peer).map(|p| p.token) {
            if c.compact && !(c.eof_sent && c.peer_eof) {
                let mut frame = link::header(kind::RESET, stream).to_vec();
                frame.push(0);
                self.send_frame(io, token, &frame);
            } else if !c.compact && !c.eof_sent {
                let mut frame = link::legacy_id(stream, c.salt).to_vec();
                frame.push(1);
                self.send_frame(io, token, &frame);
            }
        }
        let Some(c) = self.customers.get(slot) else { return };
        tracing::info!(
            target: "access",
            account = c.account.as_ref().map(|a| a.name.as_str()),
            from = %c.from,
            protocol = ?c.protocol,
            dest = c.dest.as_ref().map(ToString::to_string),
            peer = c.peer_id.and_then(|id| self.shared.registry.device(id)),
            up = c.up,
            down = c.down,
            ms = c.began.elapsed().as_millis() as u64,
            "tunnel"
        );
        let peer = c.peer;
        self.leave_peer(slot);
        if self.shared.is_draining() && self.peers.get(peer).is_some_and(|p| p.tunnels.is_empty()) {
            self.close_peer(io, peer, ws::close::GOING_AWAY, "hub is draining");
        }
    }

    /// Forgets a customer whose connection is gone.
    pub(super) fn customer_gone(&mut self, io: &mut Io, slot: u32, finished: bool) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        io.cancel(c.deadline);
        // In an orderly end everything queued was sent; in any other nobody knows how much, and it is not billed.
        let unsent = std::mem::take(&mut c.unsent) as u64;
        match (&c.account, finished) {
            (Some(account), true) => account.count(Way::Down, unsent),
            (Some(account), false) => account.unclaim(Way::Down, unsent),
            (None, _) => {}
        }
        if finished {
            c.down += unsent;
            self.shared.metrics.bytes_down.fetch_add(unsent, Relaxed);
        }
        self.part(io, slot);
        if self.customers.remove(slot).is_some() {
            self.shared.metrics.customers_connected.fetch_sub(1, Relaxed);
        }
    }

    /// Closes a customer that speaks nonsense, or cannot be served at all.
    pub(super) fn drop_customer(&mut self, io: &mut Io, slot: u32, outcome: Outcome) {
        let Some(c) = self.customers.get(slot) else { return };
        self.shared.metrics.count(protocol_index(c), outcome);
        io.close(c.token);
        self.customer_gone(io, slot, false);
    }

    pub(super) fn customer_timer(&mut self, io: &mut Io, slot: u32) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        match c.stage {
            Stage::Ending => {
                io.abort(c.token);
                self.customer_gone(io, slot, false);
            }
            Stage::Opening => {
                if let Some(id) = c.peer_id {
                    self.shared.registry.opened(id, false);
                }
                let stream = Self::stream_of(slot, c.serial);
                if c.compact
                    && let Some(token) = self.peers.get(c.peer).map(|p| p.token)
                {
                    let mut frame = link::header(kind::RESET, stream).to_vec();
                    frame.push(0);
                    self.send_frame(io, token, &frame);
                }
                // Late words about this stream must not be taken for the next attempt's.
                let serial = self.customers.renew(slot);
                if let Some(c) = self.customers.get_mut(slot) {
                    c.serial = serial;
                }
                self.try_another(io, slot, Opened::Timeout);
            }
            Stage::Resolving => self.refuse(io, slot, Refusal::opened(Opened::NotResolved)),
            Stage::RelayOpening => self.refuse(io, slot, Refusal::opened(Opened::Timeout)),
            Stage::Tunnel | Stage::Udp | Stage::RelayTunnel => {
                c.throttled = false;
                if c.stage == Stage::RelayTunnel {
                    if c.unsent == 0 {
                        io.resume(c.relay);
                    }
                    if io.queued(c.relay) == 0 {
                        io.resume(c.token);
                    }
                    return;
                }
                if c.unsent == 0 {
                    self.unblock_peer(io, slot);
                }
                self.grant(io, slot, true);
                self.push_up(io, slot);
            }
            // Too slow to say what it wants.
            _ => self.drop_customer(io, slot, Outcome::Malformed),
        }
    }
}
