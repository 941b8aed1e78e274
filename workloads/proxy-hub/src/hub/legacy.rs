//! The protocol of peers that exist already.

use super::*;

impl Hub {
    pub(super) fn legacy_piece(
        &mut self,
        io: &mut Io,
        slot: u32,
        chunk: &[u8],
        first: bool,
        last: bool,
    ) -> Result<(), &'static str> {
        let Some(peer) = self.peers.get_mut(slot) else { return Ok(()) };
        if peer.stage != PeerStage::Ready {
            return Err("not registered");
        }
        if first {
            peer.current = 0;
        }
        let mut joined = Vec::new();
        let mut chunk = chunk;
        if peer.current != kind::DATA {
            if let Some(partial) = peer.partial.as_mut().filter(|p| !p.bytes.is_empty()) {
                joined = std::mem::take(&mut partial.bytes);
                joined.extend_from_slice(chunk);
                chunk = &joined;
            }
            if chunk.len() < link::LEGACY_HEADER {
                if last {
                    return Err("a frame shorter than its header");
                }
                peer.partial.get_or_insert_default().bytes = chunk.to_vec();
                return Ok(());
            }
            peer.current = kind::DATA;
            peer.stream = link::legacy_stream(chunk).unwrap_or(NOBODY);
            peer.pinged = false;
            let eof = chunk[36] & 1 != 0;
            chunk = &chunk[link::LEGACY_HEADER..];
            if eof {
                let stream = peer.stream;
                if let Some(customer) = self.customer_of(slot, stream) {
                    self.legacy_eof(io, customer);
                }
                return Ok(());
            }
        }
        let stream = peer.stream;
        let _ = &joined;
        self.down(io, slot, stream, chunk)
    }

    pub(super) fn legacy_text(&mut self, io: &mut Io, slot: u32, text: &[u8]) -> Result<(), &'static str> {
        let message: link::LegacyMessage = serde_json::from_slice(text).map_err(|_| "malformed JSON")?;
        let Some(peer) = self.peers.get_mut(slot) else { return Ok(()) };
        let token = peer.token;
        match (message.kind.as_str(), peer.stage) {
            ("hello", PeerStage::Hello) => {
                if !self.shared.token_opens(&message.token) {
                    self.refuse_peer(io, slot, "unknown token");
                    return Ok(());
                }
                if !message.sdk_version.is_empty()
                    && crate::config::version(&message.sdk_version).is_none_or(|v| v < self.shared.min_version)
                {
                    self.refuse_peer(io, slot, "version too old");
                    return Ok(());
                }
                if let Some(wait) = self.must_wait() {
                    let seconds = wait.as_secs() + 1;
                    self.send_text(io, token, &format!("{{\"type\":\"cooldown\",\"retry_after_sec\":{seconds}}}"));
                    self.shared.metrics.cooldowns.fetch_add(1, Relaxed);
                    self.close_peer(io, slot, ws::close::TRY_AGAIN, "come back later");
                    return Ok(());
                }
                let Some(peer) = self.peers.get_mut(slot) else { return Ok(()) };
                let partial = peer.partial.get_or_insert_default();
                partial.device = clip(&message.node_id, 128);
                partial.version = clip(&message.sdk_version, 32);
                peer.stage = PeerStage::Welcomed;
                self.send_text(io, token, "{\"type\":\"welcome\"}");
            }
            ("ip_info", _) => {
                if let Some(info) = message.ip_info {
                    peer.partial.get_or_insert_default().country = clip(&info.country_code, 2);
                }
                if peer.stage == PeerStage::Ready {
                    peer.partial = None;
                }
            }
            ("register", PeerStage::Hello) if !self.shared.tokens.is_empty() => return Err("hello first"),
            ("register", PeerStage::Hello | PeerStage::Welcomed) => {
                let data = message.data.unwrap_or_default();
                let welcomed = peer.stage == PeerStage::Welcomed;
                let partial = peer.partial.get_or_insert_default();
                let device =
                    if partial.device.is_empty() { clip(&data.device_id, 128) } else { partial.device.clone() };
                let version =
                    if partial.version.is_empty() { clip(&data.sdk_version, 32) } else { partial.version.clone() };
                let country = if partial.country.is_empty() { clip(&data.country, 2) } else { partial.country.clone() };
                if device.is_empty() {
                    self.refuse_peer(io, slot, "no device id");
                    return Ok(());
                }
                if crate::config::version(&version).is_none_or(|v| v < self.shared.min_version) {
                    self.refuse_peer(io, slot, "version too old");
                    return Ok(());
                }
                if !welcomed && let Some(wait) = self.must_wait() {
                    let seconds = wait.as_secs() + 1;
                    self.send_text(io, token, &format!("{{\"type\":\"cooldown\",\"retry_after_sec\":{seconds}}}"));
                    self.shared.metrics.cooldowns.fetch_add(1, Relaxed);
                    self.close_peer(io, slot, ws::close::TRY_AGAIN, "come back later");
                    return Ok(());
                }
                let consent = self.shared.config.peers.legacy_consent;
                let cap = self.shared.config.peers.max_tunnels.min(32);
                self.register(io, slot, &device, &version, &country, cap, consent, false);
                let answer = serde_json::json!({"type": "registration_success", "node_id": device}).to_string();
                self.send_text(io, token, &answer);
            }
            ("keepalive", _) => drop(self.send_text(io, token, "{\"type\":\"keepalive_ack\"}")),
            ("heartbeat", _) => drop(self.send_text(io, token, "{\"type\":\"heartbeat_ack\"}")),
            ("tunnel_response", PeerStage::Ready) => {
                let data = message.data.unwrap_or_default();
                let customer = link::legacy_stream(data.tunnel_id.as_bytes()).and_then(|s| self.customer_of(slot, s));
                if let Some(customer) = customer {
                    let how = if data.success { Opened::Ok } else { link::legacy_failure(&data.error) };
                    self.tunnel_opened(io, customer, how, u64::MAX / 2);
                }
            }
            ("tunnel_data", PeerStage::Ready) => {
                let data = message.data.unwrap_or_default();
                let Some(stream) = link::legacy_stream(data.tunnel_id.as_bytes()) else { return Ok(()) };
                let bytes = STANDARD.decode(&data.data).map_err(|_| "malformed base64")?;
                self.down(io, slot, stream, &bytes)?;
                if data.eof
                    && let Some(customer) = self.customer_of(slot, stream)
                {
                    self.legacy_eof(io, customer);
                }
            }
            ("disconnect", _) => self.peer_gone(io, slot, "said goodbye"),
            // Existing peers send more kinds (credits, proxies of their own); what is not known is not an error.
            _ => {}
        }
        Ok(())
    }

    /// A legacy EOF ends both directions.
    pub(super) fn legacy_eof(&mut self, io: &mut Io, customer: u32) {
        if let Some(c) = self.customers.get_mut(customer) {
            c.eof_sent = true;
        }
        self.end(io, customer, None);
    }
}

fn clip(text: &str, most: usize) -> String {
    text[..text.floor_char_boundary(most)].to_owned()
}
