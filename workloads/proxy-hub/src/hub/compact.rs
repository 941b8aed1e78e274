//! The compact protocol of peers.

use super::*;

impl Hub {
    pub(super) fn compact_piece(
        &mut self,
        io: &mut Io,
        slot: u32,
        chunk: &[u8],
        first: bool,
        last: bool,
    ) -> Result<(), &'static str> {
        let Some(peer) = self.peers.get_mut(slot) else { return Ok(()) };
        if first {
            peer.current = 0;
        }
        // The data of a stream is passed on as it comes, never gathered.
        if peer.current == kind::DATA {
            let stream = peer.stream;
            return self.down(io, slot, stream, chunk);
        }
        let gathered = peer.partial.as_ref().is_some_and(|p| !p.bytes.is_empty());
        if !gathered && chunk.len() >= link::HEADER {
            let stream = u32::from_be_bytes([chunk[1], chunk[2], chunk[3], chunk[4]]);
            if chunk[0] == kind::DATA {
                peer.current = kind::DATA;
                peer.stream = stream;
                return self.down(io, slot, stream, &chunk[link::HEADER..]);
            }
            if last {
                return self.compact_frame(io, slot, chunk[0], stream, &chunk[link::HEADER..]);
            }
        }
        let partial = peer.partial.get_or_insert_default();
        partial.bytes.extend_from_slice(chunk);
        let ready = last || (partial.bytes.len() >= link::HEADER && partial.bytes[0] == kind::DATA);
        if !ready {
            return Ok(());
        }
        let bytes = std::mem::take(&mut partial.bytes);
        if peer.stage == PeerStage::Ready {
            peer.partial = None;
        }
        if bytes.len() < link::HEADER {
            return Err("a frame shorter than its header");
        }
        let stream = u32::from_be_bytes([bytes[1], bytes[2], bytes[3], bytes[4]]);
        if bytes[0] == kind::DATA {
            peer.current = kind::DATA;
            peer.stream = stream;
            return self.down(io, slot, stream, &bytes[link::HEADER..]);
        }
        self.compact_frame(io, slot, bytes[0], stream, &bytes[link::HEADER..])
    }

    pub(super) fn compact_frame(
        &mut self,
        io: &mut Io,
        slot: u32,
        kind: u8,
        stream: u32,
        body: &[u8],
    ) -> Result<(), &'static str> {
        let Some(peer) = self.peers.get(slot) else { return Ok(()) };
        if kind == kind::HELLO {
            if peer.stage != PeerStage::Hello {
                return Err("a second hello");
            }
            let hello: link::Hello = serde_json::from_slice(body).map_err(|_| "malformed hello")?;
            self.compact_hello(io, slot, &hello);
            return Ok(());
        }
        if peer.stage != PeerStage::Ready {
            return Err("not introduced");
        }
        if kind == kind::DRAIN {
            if let Some(id) = peer.id {
                self.shared.registry.drain(id);
            }
            return Ok(());
        }
        // A stream that ended here may still be spoken of: not an error.
        let Some(customer) = self.customer_of(slot, stream) else { return Ok(()) };
        match kind {
            kind::OPENED => {
                let (how, credit) = link::parse_opened(body).ok_or("malformed opened")?;
                self.tunnel_opened(io, customer, how, u64::from(credit));
            }
            kind::EOF => self.peer_eof(io, customer),
            kind::RESET => self.tunnel_broke_by_peer(io, customer),
            kind::CREDIT => {
                let more =
                    body.get(..4).and_then(|b| b.try_into().ok()).map(u32::from_be_bytes).ok_or("malformed credit")?;
                if let Some(c) = self.customers.get_mut(customer) {
                    c.credit = (c.credit + u64::from(more)).min(1 << 32);
                }
                self.push_up(io, customer);
            }
            kind::DATAGRAM => self.datagram_down(io, customer, body),
            _ => return Err("unknown frame type"),
        }
        Ok(())
    }

    pub(super) fn customer_of(&self, peer: u32, stream: u32) -> Option<u32> {
        let slot = stream & 0xff_ffff;
        let customer = self.customers.get(slot)?;
        (customer.peer == peer && customer.serial & 0xff == stream >> 24).then_some(slot)
    }

    pub(super) fn stream_of(slot: u32, serial: u32) -> u32 {
        slot & 0xff_ffff | serial << 24
    }

    /// Checks what a peer says of itself; registers it or sends it away.
    pub(super) fn compact_hello(&mut self, io: &mut Io, slot: u32, hello: &link::Hello) {
        let Some(peer) = self.peers.get(slot) else { return };
        let token = peer.token;
        if hello.device.is_empty() || hello.device.len() > 128 || hello.version.len() > 32 {
            return self.refuse_peer(io, slot, "device must be 1 to 128 bytes, version at most 32");
        }
        if !self.shared.token_opens(&hello.token) {
            return self.refuse_peer(io, slot, "unknown token");
        }
        if crate::config::version(&hello.version).is_none_or(|v| v < self.shared.min_version) {
            return self.refuse_peer(io, slot, "version too old");
        }
        if let Some(wait) = self.must_wait() {
            let cooldown = link::Cooldown { retry_after_ms: wait.as_millis() as u64, reason: "busy".into() };
            self.send_frame(io, token, &link::json(kind::COOLDOWN, &cooldown));
            self.shared.metrics.cooldowns.fetch_add(1, Relaxed);
            return self.close_peer(io, slot, ws::close::TRY_AGAIN, "come back later");
        }
        let cap = hello.max_tunnels.unwrap_or(u16::MAX).clamp(1, self.shared.config.peers.max_tunnels);
        let hint = hello.country.as_deref().unwrap_or("");
        let country = self.register(io, slot, &hello.device, &hello.version, hint, cap, hello.consent, hello.udp);
        let Some(peer) = self.peers.get(slot) else { return };
        let welcome = link::Welcome {
            hub: self.shared.config.hub.name.clone(),
            heartbeat_seconds: self.shared.config.peers.heartbeat_seconds,
            max_tunnels: cap,
            window: link::WINDOW,
            address: peer.addr.to_string(),
            country: country.to_string(),
        };
        self.send_frame(io, token, &link::json(kind::WELCOME, &welcome));
    }
}
