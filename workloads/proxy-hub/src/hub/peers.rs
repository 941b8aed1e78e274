//! Peers: the upgrade to WebSocket, frames, registration, heartbeat.

use super::*;

impl Hub {
    pub(super) fn peer_data(&mut self, io: &mut Io, slot: u32, bytes: &mut [u8]) {
        let Some(peer) = self.peers.get_mut(slot) else { return };
        peer.heard = io.now();
        peer.pinged = false;
        if peer.stage == PeerStage::Http {
            return self.peer_upgrade(io, slot, bytes);
        }
        self.peer_frames(io, slot, bytes);
    }

    pub(super) fn peer_upgrade(&mut self, io: &mut Io, slot: u32, bytes: &[u8]) {
        let Some(peer) = self.peers.get_mut(slot) else { return };
        let token = peer.token;
        let partial = peer.partial.get_or_insert_default();
        partial.bytes.extend_from_slice(bytes);
        if front::is_trusted(&self.shared.peer_proxies, peer.addr) {
            match front::proxy_header(&partial.bytes) {
                front::Header::Found(n, ip) => {
                    partial.bytes.drain(..n);
                    peer.addr = ip.unwrap_or(peer.addr);
                }
                front::Header::More => return,
                front::Header::Bad => return self.peer_gone(io, slot, "bad PROXY header"),
                front::Header::None => {}
            }
        }
        let buffer = std::mem::take(&mut partial.bytes);
        let answer = match handshake::Request::parse(&buffer) {
            Ok(None) => {
                partial.bytes = buffer;
                return;
            }
            Err(_) => Err("HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\n\r\n".to_owned()),
            Ok(Some(request)) => {
                let path = request.path.split('?').next().unwrap_or("");
                match (request.method, path) {
                    ("GET" | "HEAD", "/health") => {
                        Err("HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok".to_owned())
                    }
                    (_, "/ws") => match request.upgrade_key() {
                        Ok(key) => {
                            if front::is_trusted(&self.shared.peer_proxies, peer.addr)
                                && let Some(header) = request.header("x-forwarded-for")
                                && let Some(ip) = front::forwarded_for(header, &self.shared.peer_proxies)
                            {
                                peer.addr = ip;
                            }
                            let compact = request.has_token("sec-websocket-protocol", link::COMPACT);
                            peer.compact = compact;
                            Ok((handshake::response(key, compact.then_some(link::COMPACT)), request.len))
                        }
                        Err(refusal) => Err(refusal.response().to_owned()),
                    },
                    _ => Err("HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".to_owned()),
                }
            }
        };
        match answer {
            Ok((response, len)) => {
                peer.stage = PeerStage::Hello;
                io.write(token, response.as_bytes());
                if buffer.len() > len {
                    let mut rest = buffer[len..].to_vec();
                    self.peer_frames(io, slot, &mut rest);
                }
            }
            Err(response) => {
                io.write(token, response.as_bytes());
                self.peer_gone(io, slot, "no upgrade");
            }
        }
    }

    pub(super) fn peer_frames(&mut self, io: &mut Io, slot: u32, bytes: &mut [u8]) {
        let Some(peer) = self.peers.get_mut(slot) else { return };
        let (token, serial) = (peer.token, peer.serial);
        // Events borrow the parser; the rest of the shard must stay free to act on them.
        let mut parser = std::mem::replace(&mut peer.parser, Parser::new(Role::Server));
        let mut at = 0;
        let total = bytes.len();
        let verdict = loop {
            let (used, event) = match parser.advance(&mut bytes[at..], &FRAME_LIMITS) {
                Ok(step) => step,
                Err(violation) => break Err((violation.close_code(), violation.to_string())),
            };
            at += used;
            match event {
                Some(Event::Data { kind, chunk, first, last }) => {
                    if let Err(why) = self.peer_message(io, slot, kind, chunk, first, last) {
                        break Err((ws::close::POLICY, why.to_owned()));
                    }
                    if self.peers.get(slot).is_none_or(|p| p.serial != serial) {
                        return;
                    }
                }
                Some(Event::Ping(payload)) => {
                    self.out.clear();
                    ws::encode_frame(&mut self.out, Opcode::Pong, payload, None);
                    if io.write(token, &self.out) == Written::Full {
                        break Err((ws::close::POLICY, "pongs are not read".to_owned()));
                    }
                }
                Some(Event::Pong(_)) => {}
                Some(Event::Close { code, .. }) => {
                    self.out.clear();
                    ws::encode_close(&mut self.out, code, "", None);
                    io.write(token, &self.out);
                    return self.peer_gone(io, slot, "closed by the peer");
                }
                None => {}
            }
            if at >= total {
                break Ok(());
            }
        };
        match verdict {
            Ok(()) => {
                if let Some(peer) = self.peers.get_mut(slot) {
                    peer.parser = parser;
                }
            }
            Err((code, why)) => {
                self.shared.metrics.protocol_errors.fetch_add(1, Relaxed);
                self.close_peer(io, slot, code, &why);
            }
        }
    }

    /// Says goodbye and lets go.
    pub(super) fn close_peer(&mut self, io: &mut Io, slot: u32, code: u16, why: &str) {
        if let Some(peer) = self.peers.get(slot) {
            self.out.clear();
            ws::encode_close(&mut self.out, Some(code), why, None);
            io.write(peer.token, &self.out);
        }
        self.peer_gone(io, slot, why);
    }

    /// Ends a peer: its tunnels end cleanly for their customers.
    pub(super) fn peer_gone(&mut self, io: &mut Io, slot: u32, why: &str) {
        let Some(peer) = self.peers.remove(slot) else { return };
        self.shared.metrics.peers_connected.fetch_sub(1, Relaxed);
        io.close(peer.token);
        if let Some(id) = peer.id {
            tracing::debug!(target: "peer", shard = self.shard, peer = ?id, why, "peer gone");
            self.shared.registry.remove(id);
        }
        for customer in peer.tunnels {
            self.tunnel_broke(io, customer);
        }
    }

    /// One piece of a message. An error is the peer's fault and ends it.
    pub(super) fn peer_message(
        &mut self,
        io: &mut Io,
        slot: u32,
        ws_kind: Kind,
        chunk: &mut [u8],
        first: bool,
        last: bool,
    ) -> Result<(), &'static str> {
        let Some(peer) = self.peers.get_mut(slot) else { return Ok(()) };
        match (peer.compact, ws_kind) {
            (true, Kind::Text) => Err("the compact protocol is binary"),
            (true, Kind::Binary) => self.compact_piece(io, slot, chunk, first, last),
            (false, Kind::Binary) => self.legacy_piece(io, slot, chunk, first, last),
            (false, Kind::Text) => {
                if first && last {
                    return self.legacy_text(io, slot, chunk);
                }
                let partial = peer.partial.get_or_insert_default();
                partial.bytes.extend_from_slice(chunk);
                if !last {
                    return Ok(());
                }
                let text = std::mem::take(&mut partial.bytes);
                self.legacy_text(io, slot, &text)
            }
        }
    }

    pub(super) fn must_wait(&mut self) -> Option<Duration> {
        let random = self.rng.random::<f64>();
        if self.shared.is_draining() {
            return Some(Duration::from_secs_f64(2.0 + 30.0 * random));
        }
        self.shared.admit_registration(random).err()
    }

    #[allow(clippy::too_many_arguments)]
    pub(super) fn register(
        &mut self,
        io: &mut Io,
        slot: u32,
        device: &str,
        version: &str,
        hint: &str,
        cap: u16,
        consent: bool,
        udp: bool,
    ) -> Country {
        let Some(peer) = self.peers.get_mut(slot) else { return Country::UNKNOWN };
        let began = peer.partial.take().and_then(|p| p.began);
        let mut place = self.shared.geo.read().look_up(peer.addr);
        if place.country == Country::UNKNOWN && self.shared.config.geo.trust_hint {
            place.country = Country::parse(hint).unwrap_or(Country::UNKNOWN);
        }
        let new = NewPeer {
            device,
            version,
            addr: peer.addr,
            country: place.country,
            state: &place.state,
            city: &place.city,
            asn: place.asn,
            home: Home { shard: self.shard, slot, serial: peer.serial },
            cap,
            compact: peer.compact,
            udp: udp && peer.compact,
            consent,
            now: self.shared.now(),
        };
        let (id, replaced) = self.shared.registry.insert(&new);
        peer.id = Some(id);
        peer.stage = PeerStage::Ready;
        // The first heartbeat falls anywhere in the interval, or a storm of registrations would beat together for ever.
        let beat = self.shared.config.heartbeat();
        let first = beat.mul_f64(self.rng.random::<f64>());
        io.arm(first, timed(PEER, slot, peer.serial));
        self.shared.metrics.registrations.fetch_add(1, Relaxed);
        if let Some(began) = began {
            self.shared.metrics.registration.observe(began.elapsed());
        }
        if let Some(old) = replaced {
            let command = Command::ClosePeer { slot: old.slot, serial: old.serial, reason: "registered anew" };
            match self.shared.remotes.get().and_then(|r| r.get(old.shard as usize)) {
                Some(_) if old.shard == self.shard => self.command(io, command),
                Some(remote) => drop(remote.send(command)),
                None => {}
            }
        }
        place.country
    }

    pub(super) fn refuse_peer(&mut self, io: &mut Io, slot: u32, why: &str) {
        self.shared.metrics.peers_refused.fetch_add(1, Relaxed);
        self.close_peer(io, slot, ws::close::POLICY, why);
    }

    pub(super) fn send_frame(&mut self, io: &mut Io, token: Token, frame: &[u8]) -> Written {
        let mut header = [0; ws::MAX_HEADER];
        let n = ws::encode_header(&mut header, true, Opcode::Binary, frame.len(), None);
        io.write_parts(token, &header[..n], frame)
    }

    pub(super) fn send_text(&mut self, io: &mut Io, token: Token, text: &str) -> Written {
        let mut header = [0; ws::MAX_HEADER];
        let n = ws::encode_header(&mut header, true, Opcode::Text, text.len(), None);
        io.write_parts(token, &header[..n], text.as_bytes())
    }

    pub(super) fn heartbeat(&mut self, io: &mut Io, slot: u32) {
        let Some(peer) = self.peers.get_mut(slot) else { return };
        let beat = self.shared.config.heartbeat();
        let silent = clawhq_wire::TICK * (io.now() - peer.heard) as u32;
        if peer.blocked > 0 {
            // It is we who do not listen.
            peer.heard = io.now();
            io.arm(beat, timed(PEER, slot, peer.serial));
            return;
        }
        if silent >= beat * 2 {
            self.shared.metrics.peers_dead.fetch_add(1, Relaxed);
            let token = peer.token;
            self.peer_gone(io, slot, "silent");
            // There is nobody to send the rest to.
            return io.abort(token);
        }
        let next = if silent >= beat {
            if !std::mem::replace(&mut peer.pinged, true) {
                io.write(peer.token, &[0x80 | Opcode::Ping as u8, 0]);
            }
            beat * 2 - silent
        } else {
            beat - silent
        };
        io.arm(next.max(clawhq_wire::TICK), timed(PEER, slot, peer.serial));
    }
}
