//! Customers whose peer is with another hub.

use super::*;

impl Hub {
    pub(super) fn relay_to(&mut self, io: &mut Io, slot: u32, hub: &crate::shared::OtherHub) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        c.hubs.push(hub.name.clone());
        let wait = Duration::from_secs(self.shared.config.customers.open_seconds);
        match io.connect(hub.relay, None, Duration::from_secs(5).min(wait), tag(RELAY, slot)) {
            Ok(token) => {
                c.relay = token;
                c.stage = Stage::RelayOpening;
                // The other hub has its own attempts to make before it answers.
                c.deadline = io.arm(wait * 2, timed(CUSTOMER, slot, c.serial));
                self.shared.metrics.relayed.fetch_add(1, Relaxed);
                let Some(config) = &self.shared.config.directory else { return };
                let order = relay::Order {
                    account: c.account.as_ref().map(|a| a.name.clone()).unwrap_or_default(),
                    dest: c.dest.as_ref().map(ToString::to_string).unwrap_or_default(),
                    udp: c.udp,
                    target: relay::params(&c.target),
                    time: unix_now(),
                };
                io.write(token, &relay::encode(&order, &config.secret));
            }
            Err(_) => self.choose(io, slot),
        }
    }

    pub(super) fn relay_data(&mut self, io: &mut Io, slot: u32, bytes: &[u8]) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        let mut bytes = bytes;
        if c.stage == Stage::RelayOpening {
            let [code, rest @ ..] = bytes else { return };
            bytes = rest;
            let how = Opened::parse(*code);
            io.cancel(c.deadline);
            if how == Opened::Full {
                // What it had when it last said so is gone: another hub, or a peer of this one.
                io.close(std::mem::replace(&mut c.relay, Token::NONE));
                c.stage = Stage::Resolving;
                return self.choose(io, slot);
            }
            if how != Opened::Ok {
                return self.refuse(io, slot, Refusal::opened(how));
            }
            self.shared.metrics.request.observe(c.began.elapsed());
            self.shared.metrics.count(protocol_index(c), Outcome::Ok);
            if c.udp {
                c.buffer.clear();
                self.associate(io, slot);
            } else {
                self.relay_opened(io, slot);
            }
        }
        let Some(c) = self.customers.get_mut(slot) else { return };
        match c.stage {
            Stage::Udp => return self.records(io, slot, bytes),
            Stage::RelayTunnel if !bytes.is_empty() => {}
            _ => return,
        }
        let n = c.account.as_ref().map_or(bytes.len(), |a| a.claim(Way::Down, bytes.len() as u64) as usize);
        match io.write(c.token, &bytes[..n]) {
            Written::Sent => self.moved_down(io, slot, n),
            Written::Queued(queued) => {
                let moved = c.unsent + n - queued;
                c.unsent = queued;
                io.pause(c.relay);
                self.moved_down(io, slot, moved);
            }
            Written::Full | Written::Gone => {
                if let Some(account) = &c.account {
                    account.unclaim(Way::Down, n as u64);
                }
                return self.end(io, slot, Some(Outcome::Failed));
            }
        }
        if n < bytes.len() {
            self.end(io, slot, Some(Outcome::Limited));
        }
    }

    fn relay_opened(&mut self, io: &mut Io, slot: u32) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        c.stage = Stage::RelayTunnel;
        io.pair(c.token, c.relay);
        io.set_idle(c.token, Some(Duration::from_secs(self.shared.config.customers.idle_seconds)));
        self.greet(io, slot);
        let Some(c) = self.customers.get_mut(slot) else { return };
        let early = std::mem::take(&mut c.buffer);
        io.resume(c.token);
        // What is in the buffer now was taken by the body already.
        let body = c.body.take();
        self.relay_up(io, slot, &early);
        if let Some(c) = self.customers.get_mut(slot) {
            c.body = body;
            if c.eof {
                io.shutdown_write(c.relay);
            }
        }
    }

    pub(super) fn relay_up(&mut self, io: &mut Io, slot: u32, bytes: &[u8]) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        let mut bytes = bytes;
        if let Some(body) = &mut c.body {
            match body.take(bytes) {
                Ok(n) => bytes = &bytes[..n],
                Err(_) => return self.end(io, slot, Some(Outcome::Malformed)),
            }
        }
        if bytes.is_empty() {
            return;
        }
        let n = c.account.as_ref().map_or(bytes.len(), |a| a.claim(Way::Up, bytes.len() as u64) as usize);
        match io.write(c.relay, &bytes[..n]) {
            Written::Sent => {}
            Written::Queued(_) => io.pause(c.token),
            Written::Full | Written::Gone => {
                if let Some(account) = &c.account {
                    account.unclaim(Way::Up, n as u64);
                }
                return self.end(io, slot, Some(Outcome::Failed));
            }
        }
        c.up += n as u64;
        self.shared.metrics.bytes_up.fetch_add(n as u64, Relaxed);
        if let Some(account) = &c.account {
            account.count(Way::Up, n as u64);
            if let Some(wait) = account.throttle(n as u64) {
                c.throttled = true;
                io.pause(c.token);
                io.arm(wait, timed(CUSTOMER, slot, c.serial));
            }
        }
        if n < bytes.len() {
            self.end(io, slot, Some(Outcome::Limited));
        }
    }

    /// Datagrams between hubs: each `length u16, SOCKS address, payload` on the relay's connection.
    pub(super) fn records(&mut self, io: &mut Io, slot: u32, bytes: &[u8]) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        c.buffer.extend_from_slice(bytes);
        let buffer = std::mem::take(&mut c.buffer);
        let ours = c.protocol == Protocol::Relay;
        let mut rest = &buffer[..];
        while let Some((head, tail)) = rest.split_at_checked(2)
            && let Some((body, tail)) = tail.split_at_checked(usize::from(u16::from_be_bytes([head[0], head[1]])))
        {
            rest = tail;
            if ours {
                self.datagram_out(io, slot, body);
            } else {
                self.datagram_down(io, slot, body);
            }
        }
        if let Some(c) = self.customers.get_mut(slot).filter(|c| c.stage == Stage::Udp) {
            c.buffer = rest.to_vec();
        }
    }

    /// Sends one datagram over a relay's connection. `false` if it was dropped, as UDP may.
    pub(super) fn record(&mut self, io: &mut Io, to: Token, body: &[&[u8]]) -> bool {
        let len: usize = body.iter().map(|b| b.len()).sum();
        let Ok(short) = u16::try_from(len) else { return false };
        if io.queued(to) > DATAGRAM_BACKLOG {
            return false;
        }
        let mut out = short.to_be_bytes().to_vec();
        body.iter().for_each(|b| out.extend_from_slice(b));
        !matches!(io.write(to, &out), Written::Full | Written::Gone)
    }
}
