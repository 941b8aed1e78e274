//! Customers coming in: who is it, what is wanted, and which peer will carry it.

use super::*;

impl Hub {
    pub(super) fn customer_data(&mut self, io: &mut Io, slot: u32, bytes: &[u8]) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        match c.stage {
            Stage::Tunnel => self.up(io, slot, bytes),
            Stage::RelayTunnel => self.relay_up(io, slot, bytes),
            Stage::Udp if c.protocol == Protocol::Relay => self.records(io, slot, bytes),
            Stage::Udp | Stage::Ending => {}
            Stage::Resolving | Stage::Opening | Stage::RelayOpening => {
                c.buffer.extend_from_slice(bytes);
                if c.buffer.len() >= EARLY_MOST {
                    io.pause(c.token);
                }
            }
            _ => {
                c.buffer.extend_from_slice(bytes);
                self.handshake(io, slot);
            }
        }
    }

    /// Goes as far in the handshake as the bytes allow.
    pub(super) fn handshake(&mut self, io: &mut Io, slot: u32) {
        loop {
            let Some(c) = self.customers.get_mut(slot) else { return };
            match c.stage {
                Stage::Front => match front::proxy_header(&c.buffer) {
                    front::Header::Found(n, ip) => {
                        c.buffer.drain(..n);
                        c.from = ip.unwrap_or(c.from);
                        c.stage = Stage::Sniff;
                    }
                    front::Header::None => c.stage = Stage::Sniff,
                    front::Header::More => return,
                    front::Header::Bad => return self.drop_customer(io, slot, Outcome::Malformed),
                },
                Stage::Sniff => {
                    let Some(first) = c.buffer.first() else { return };
                    c.began = Instant::now();
                    if *first == socks::VERSION {
                        c.protocol = Protocol::Socks;
                        if !self.socks_greeting(io, slot) {
                            return;
                        }
                    } else if first.is_ascii_uppercase() {
                        c.protocol = Protocol::Http;
                        c.stage = Stage::HttpHead;
                    } else {
                        return self.drop_customer(io, slot, Outcome::Malformed);
                    }
                }
                Stage::SocksLogin => match socks::login(&c.buffer) {
                    socks::Parsed::More => return,
                    socks::Parsed::Bad(_) => return self.drop_customer(io, slot, Outcome::Malformed),
                    socks::Parsed::Done(login, n) => {
                        c.buffer.drain(..n);
                        match self.shared.accounts.login(&login.user, &login.password, c.from) {
                            Ok((account, target)) => {
                                c.account = Some(account);
                                c.target = target;
                                c.stage = Stage::SocksRequest;
                                io.write(c.token, &[1, 0]);
                            }
                            Err(denial) => {
                                tracing::debug!(target: "access", from = %c.from, %denial, "log-in refused");
                                // RFC 1929 has no text; the status tells kinds of failure apart for who looks.
                                io.write(c.token, &[1, 1]);
                                self.shared.metrics.count(0, Outcome::Auth);
                                return self.end(io, slot, None);
                            }
                        }
                    }
                },
                Stage::SocksRequest => match socks::request(&c.buffer) {
                    socks::Parsed::More => return,
                    socks::Parsed::Bad(why) => {
                        return self.refuse(
                            io,
                            slot,
                            Refusal::new(Reply::GeneralFailure, 400, Outcome::Malformed, why),
                        );
                    }
                    socks::Parsed::Done(Err(reply), _) => {
                        return self.refuse(io, slot, Refusal::new(reply, 400, Outcome::Malformed, "unusable address"));
                    }
                    socks::Parsed::Done(Ok(request), n) => {
                        c.buffer.drain(..n);
                        match request.command {
                            socks::Command::Connect => {
                                c.dest = Some(request.dest);
                                return self.request(io, slot);
                            }
                            socks::Command::UdpAssociate => {
                                c.udp = true;
                                return self.request(io, slot);
                            }
                            _ => {
                                let why = "only CONNECT and UDP ASSOCIATE are served";
                                return self.refuse(
                                    io,
                                    slot,
                                    Refusal::new(Reply::CommandNotSupported, 501, Outcome::Malformed, why),
                                );
                            }
                        }
                    }
                },
                Stage::HttpHead => match http::request(&c.buffer) {
                    Ok(None) => return,
                    Err(refusal) => {
                        return self.refuse(
                            io,
                            slot,
                            Refusal::new(Reply::GeneralFailure, refusal.status, Outcome::Malformed, refusal.reason),
                        );
                    }
                    Ok(Some(request)) => {
                        c.buffer.drain(..request.len);
                        let login = match &request.login {
                            Some((user, password)) => self.shared.accounts.login(user, password, c.from),
                            None => match self.shared.accounts.login_by_address(c.from) {
                                Some(account) => Ok((account, Target::default())),
                                None => Err(Denial::NoCredentials),
                            },
                        };
                        match login {
                            Ok((account, target)) => {
                                c.account = Some(account);
                                c.target = target;
                            }
                            Err(denial) => return self.refuse(io, slot, Refusal::denial(&denial)),
                        }
                        match request.ask {
                            http::Ask::Connect(dest) => c.dest = Some(dest),
                            http::Ask::Forward { dest, head, body } => {
                                c.dest = Some(dest);
                                c.head = head;
                                c.body = Some(body);
                            }
                        }
                        return self.request(io, slot);
                    }
                },
                Stage::RelayHead => {
                    let Some(config) = &self.shared.config.directory else {
                        return self.drop_customer(io, slot, Outcome::Malformed);
                    };
                    match relay::parse(&c.buffer, &config.secret, unix_now()) {
                        relay::Parsed::More => return,
                        relay::Parsed::Bad => return self.drop_customer(io, slot, Outcome::Malformed),
                        relay::Parsed::Done(order, n) => {
                            c.buffer.drain(..n);
                            let mut target = Target::default();
                            let dest = Dest::parse(&order.dest);
                            if crate::target::parse_params(&order.target, &mut target).is_err()
                                || dest.is_some() == order.udp
                            {
                                return self.drop_customer(io, slot, Outcome::Malformed);
                            }
                            c.target = target;
                            c.dest = dest;
                            c.udp = order.udp;
                            // Sessions are the customer's, not this hub's: kept under its name.
                            c.head = order.account.into_bytes();
                            return self.request(io, slot);
                        }
                    }
                }
                _ => return,
            }
        }
    }

    /// `false` if there is nothing more to do now.
    pub(super) fn socks_greeting(&mut self, io: &mut Io, slot: u32) -> bool {
        let Some(c) = self.customers.get_mut(slot) else { return false };
        match socks::greeting(&c.buffer) {
            socks::Parsed::More => false,
            socks::Parsed::Bad(_) => {
                self.drop_customer(io, slot, Outcome::Malformed);
                false
            }
            socks::Parsed::Done(greeting, n) => {
                c.buffer.drain(..n);
                if greeting.password {
                    io.write(c.token, &[socks::VERSION, socks::METHOD_PASSWORD]);
                    c.stage = Stage::SocksLogin;
                    return true;
                }
                match self.shared.accounts.login_by_address(c.from).filter(|_| greeting.none) {
                    Some(account) => {
                        c.account = Some(account);
                        io.write(c.token, &[socks::VERSION, socks::METHOD_NONE]);
                        c.stage = Stage::SocksRequest;
                        true
                    }
                    None => {
                        io.write(c.token, &[socks::VERSION, socks::METHOD_REFUSED]);
                        self.shared.metrics.count(0, Outcome::Auth);
                        self.end(io, slot, None);
                        false
                    }
                }
            }
        }
    }

    /// A whole request is there: admit, check, resolve, choose.
    pub(super) fn request(&mut self, io: &mut Io, slot: u32) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        io.cancel(c.deadline);
        c.began = Instant::now();
        c.stage = Stage::Resolving;
        if let Some(account) = &c.account {
            match account.admit() {
                Ok(admitted) => c.admitted = Some(admitted),
                Err(denial) => return self.refuse(io, slot, Refusal::denial(&denial)),
            }
        }
        let policy = self.shared.policy.read().clone();
        if let Some(dest) = &c.dest {
            if let Err(denied) = policy.check(dest) {
                return self.refuse(
                    io,
                    slot,
                    Refusal::new(Reply::NotAllowed, 403, Outcome::Denied, denied.to_string()),
                );
            }
            match &dest.host {
                Host::Ip(ip) => c.addr = Some(*ip),
                Host::Name(name) => {
                    let lookup =
                        Lookup { shard: self.shard.into(), slot, serial: c.serial, name: name.clone(), datagram: None };
                    c.deadline = io.arm(
                        Duration::from_secs(self.shared.config.customers.open_seconds),
                        timed(CUSTOMER, slot, c.serial),
                    );
                    if self.shared.lookups.try_send(lookup).is_err() {
                        let why = "too many names are being resolved";
                        return self.refuse(io, slot, Refusal::new(Reply::GeneralFailure, 503, Outcome::Failed, why));
                    }
                    return;
                }
            }
        }
        self.choose(io, slot);
    }

    pub(super) fn resolved(&mut self, io: &mut Io, slot: u32, addrs: &[IpAddr]) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        if c.stage != Stage::Resolving {
            return;
        }
        io.cancel(c.deadline);
        let policy = self.shared.policy.read().clone();
        // One private address among the answers is enough: a name that points inside at times points inside.
        if let Some(denied) = addrs.iter().find_map(|ip| policy.check_ip(*ip).err()) {
            return self.refuse(io, slot, Refusal::new(Reply::NotAllowed, 403, Outcome::Denied, denied.to_string()));
        }
        match addrs.first() {
            Some(ip) => c.addr = Some(unmapped(*ip)),
            None => return self.refuse(io, slot, Refusal::opened(Opened::NotResolved)),
        }
        self.choose(io, slot);
    }

    /// Chooses a peer and goes to it, on whatever shard or hub it is.
    pub(super) fn choose(&mut self, io: &mut Io, slot: u32) {
        let random = self.rng.random::<u64>();
        let Some(c) = self.customers.get_mut(slot) else { return };
        let shared = self.shared.clone();
        let owner = match (&c.account, c.protocol) {
            (Some(account), _) => account.name.as_str(),
            (None, _) => std::str::from_utf8(&c.head).unwrap_or(""),
        };
        let needs = Needs { udp: c.udp, exclude: &c.tried };
        let elsewhere = c.protocol != Protocol::Relay
            && c.hubs.len() < usize::from(shared.config.customers.attempts)
            && shared.config.directory.is_some();
        let mut choice = None;
        let mut other = None;
        if !c.hubs.is_empty() && c.target.sticky().is_some() && c.target.failover == Failover::None {
            // The session's hub could not serve it, and nobody else is wanted.
        } else if let Some(session) = c.target.sticky() {
            let replace = c.target.failover != Failover::None;
            let life = c.target.lifetime.unwrap_or(DEFAULT_LIFETIME).as_secs() as u32;
            if elsewhere {
                other = relay::keeper(&shared, &c.target, owner, session, &c.hubs);
            }
            if other.is_none() {
                let sticky = Sticky { owner, session, replace, now: shared.now(), life };
                choice = shared.registry.choose_sticky(&sticky, &c.target, &needs, random);
            }
        } else if c.tried.is_empty() || c.target.failover != Failover::None {
            choice = shared.registry.choose(&c.target, &needs, random);
        }
        // A session that must not move is not looked for elsewhere either.
        let elsewhere = elsewhere && (c.target.sticky().is_none() || c.target.failover != Failover::None);
        if choice.is_none() && other.is_none() && elsewhere {
            other = shared.other_hub(&c.target, &c.hubs);
        }
        if choice.is_none() && other.is_none() && c.target.failover == Failover::Country && c.target.country.is_some() {
            let wider = Target { country: c.target.country, ..Target::default() };
            choice = shared.registry.choose(&wider, &needs, random);
            if choice.is_none() && elsewhere {
                other = shared.other_hub(&wider, &c.hubs);
            }
        }
        if let Some(hub) = other {
            return self.relay_to(io, slot, &hub);
        }
        let Some(choice) = choice else {
            let tried = !c.tried.is_empty();
            let refusal = match (tried, &c.target.country) {
                (true, _) => {
                    Refusal::new(Reply::GeneralFailure, 502, Outcome::Failed, "no exit could open the connection")
                }
                (_, Some(country)) => {
                    let what = format!("no exit available for {country} with what was asked");
                    Refusal::new(Reply::NetworkUnreachable, 503, Outcome::NoPeer, what)
                }
                (_, None) => Refusal::new(Reply::NetworkUnreachable, 503, Outcome::NoPeer, "no exit available"),
            };
            return self.refuse(io, slot, refusal);
        };
        if choice.home.shard == self.shard {
            return self.open(io, slot, choice);
        }
        let Some(fd) = io.detach(c.token) else {
            // Its client is going, or reads nothing: nobody to serve.
            return self.drop_customer(io, slot, Outcome::Failed);
        };
        if let Some(mut customer) = self.customers.remove(slot) {
            customer.token = Token::NONE;
            self.shared.metrics.handoffs.fetch_add(1, Relaxed);
            let remote = self.shared.remotes.get().and_then(|r| r.get(choice.home.shard as usize));
            if let Some(remote) = remote {
                // A full mailbox drops the command and with it the socket: the client sees a reset.
                if remote.send(Command::Adopt { customer, fd, choice }).is_err() {
                    self.shared.metrics.customers_connected.fetch_sub(1, Relaxed);
                }
            }
        }
    }

    /// Asks the chosen peer to open the tunnel.
    pub(super) fn open(&mut self, io: &mut Io, slot: u32, choice: Choice) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        c.tried.push(choice.peer);
        let peer = self
            .peers
            .get_mut(choice.home.slot)
            .filter(|p| p.serial == choice.home.serial && p.id == Some(choice.peer));
        let claimed = peer.is_some() && self.shared.registry.tunnel_begins(choice.peer);
        let Some(peer) = peer.filter(|_| claimed) else {
            return self.try_another(io, slot, Opened::Full);
        };
        peer.tunnels.push(slot);
        c.peer = choice.home.slot;
        c.peer_id = Some(choice.peer);
        c.compact = peer.compact;
        c.stage = Stage::Opening;
        c.eof_sent = false;
        c.peer_eof = false;
        c.window = u64::from(link::WINDOW);
        c.owed = 0;
        c.salt = self.rng.random();
        c.deadline =
            io.arm(Duration::from_secs(self.shared.config.customers.open_seconds), timed(CUSTOMER, slot, c.serial));
        self.shared.metrics.tunnels.fetch_add(1, Relaxed);
        let stream = Self::stream_of(slot, c.serial);
        let token = peer.token;
        let sent = if peer.compact {
            let carries = if c.udp { Carries::Udp } else { Carries::Tcp };
            let frame = link::open(stream, carries, link::WINDOW, c.dest.as_ref());
            self.send_frame(io, token, &frame)
        } else {
            let Some(dest) = &c.dest else { return self.try_another(io, slot, Opened::Failed) };
            let host = match c.addr {
                Some(addr) if self.shared.config.peers.legacy_resolved => addr.to_string(),
                _ => dest.host.to_string(),
            };
            let text = link::legacy_open(&link::legacy_id(stream, c.salt), &host, dest.port);
            self.send_text(io, token, &text)
        };
        if matches!(sent, Written::Full | Written::Gone) {
            self.try_another(io, slot, Opened::Full);
        }
    }

    /// The peer could not; perhaps another can.
    pub(super) fn try_another(&mut self, io: &mut Io, slot: u32, how: Opened) {
        self.leave_peer(slot);
        let attempts = self.shared.config.customers.attempts;
        let Some(c) = self.customers.get_mut(slot) else { return };
        io.cancel(c.deadline);
        if c.target.failover == Failover::None || c.tried.len() >= attempts.into() {
            return self.refuse(io, slot, Refusal::opened(how));
        }
        self.shared.metrics.failovers.fetch_add(1, Relaxed);
        c.stage = Stage::Resolving;
        self.choose(io, slot);
    }

    /// Undoes the tie between a customer and its peer.
    pub(super) fn leave_peer(&mut self, slot: u32) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        let Some(id) = c.peer_id.take() else { return };
        let peer_slot = std::mem::replace(&mut c.peer, NOBODY);
        let moved = c.up + c.down;
        self.shared.registry.tunnel_ends(id, moved);
        self.shared.metrics.tunnels.fetch_sub(1, Relaxed);
        if moved > 0
            && let Some(device) = self.shared.registry.device(id)
        {
            *self.shared.peer_bytes.lock().entry(device).or_default() += moved;
        }
        if let Some(peer) = self.peers.get_mut(peer_slot) {
            if let Some(at) = peer.tunnels.iter().position(|t| *t == slot) {
                peer.tunnels.swap_remove(at);
            }
            if peer.tunnels.is_empty() {
                peer.tunnels = Vec::new();
            }
        }
    }

    pub(super) fn tunnel_opened(&mut self, io: &mut Io, slot: u32, how: Opened, credit: u64) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        if c.stage != Stage::Opening {
            return;
        }
        let Some(id) = c.peer_id else { return };
        self.shared.registry.opened(id, how == Opened::Ok || how.is_final());
        if how != Opened::Ok {
            // Nothing was opened, so nothing has to be closed.
            c.eof_sent = true;
            c.peer_eof = true;
            if how.is_final() {
                return self.refuse(io, slot, Refusal::opened(how));
            }
            return self.try_another(io, slot, how);
        }
        io.cancel(c.deadline);
        c.credit = credit;
        self.shared.metrics.request.observe(c.began.elapsed());
        self.shared.metrics.count(protocol_index(c), Outcome::Ok);
        if c.udp {
            return self.associate(io, slot);
        }
        c.stage = Stage::Tunnel;
        io.set_idle(c.token, Some(Duration::from_secs(self.shared.config.customers.idle_seconds)));
        self.greet(io, slot);
        self.push_up(io, slot);
    }

    /// Tells the customer that its tunnel is open.
    pub(super) fn greet(&mut self, io: &mut Io, slot: u32) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        match c.protocol {
            Protocol::Socks => {
                let reply = socks::reply(Reply::Succeeded, SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)));
                io.write(c.token, &reply);
            }
            Protocol::Http if c.body.is_none() => drop(io.write(c.token, http::ESTABLISHED)),
            Protocol::Http => {
                // The rewritten head goes first, then as much of what came early as is body.
                let early = std::mem::take(&mut c.buffer);
                let body = c.body.as_mut().map_or(Ok(0), |b| b.take(&early));
                c.buffer = std::mem::take(&mut c.head);
                match body {
                    Ok(n) => c.buffer.extend_from_slice(&early[..n]),
                    Err(_) => self.end(io, slot, Some(Outcome::Malformed)),
                }
            }
            Protocol::Relay => {
                c.head = Vec::new();
                io.write(c.token, &[Opened::Ok as u8]);
            }
            Protocol::Unknown => {}
        }
    }
}
