//! A WebSocket echo server on the connection core: what the Autobahn cases are run against.
//!
//! `cargo run --release --example ws_echo -- 127.0.0.1:9001`

use clawhq_wire::ws::{self, Event, Kind, Opcode, Parser, Role, handshake};
use clawhq_wire::{Closed, Conn, Io, Limits, Service, Token, Written, socket, spawn};
use std::collections::HashMap;
use std::net::{SocketAddr, TcpListener};

const LIMITS: ws::Limits = ws::Limits { frame: 64 << 20, message: 64 << 20 };

struct Client {
    parser: Parser,
    open: bool,
    /// The request, then the message so far.
    gathered: Vec<u8>,
}

struct Echo {
    listener: Option<TcpListener>,
    clients: HashMap<u64, Client>,
    next: u64,
}

impl Echo {
    fn frames(io: &mut Io, token: Token, client: &mut Client, bytes: &mut [u8]) -> Result<bool, ws::Violation> {
        let (mut at, total) = (0, bytes.len());
        let mut out = Vec::new();
        while at < total {
            let (used, event) = match client.parser.advance(&mut bytes[at..], &LIMITS) {
                Ok(step) => step,
                Err(violation) => {
                    // What came before the violation is answered all the same.
                    io.write(token, &out);
                    return Err(violation);
                }
            };
            at += used;
            match event {
                Some(Event::Data { kind, chunk, first, last }) => {
                    if first {
                        client.gathered.clear();
                    }
                    client.gathered.extend_from_slice(chunk);
                    if last {
                        let opcode = if kind == Kind::Text { Opcode::Text } else { Opcode::Binary };
                        ws::encode_frame(&mut out, opcode, &client.gathered, None);
                        client.gathered = Vec::new();
                    }
                }
                Some(Event::Ping(payload)) => ws::encode_frame(&mut out, Opcode::Pong, payload, None),
                Some(Event::Pong(_)) | None => {}
                Some(Event::Close { code, .. }) => {
                    ws::encode_close(&mut out, code, "", None);
                    io.write(token, &out);
                    return Ok(false);
                }
            }
        }
        if !out.is_empty() && matches!(io.write(token, &out), Written::Queued(_)) {
            io.pause(token);
        }
        Ok(true)
    }
}

impl Service for Echo {
    type Command = ();

    fn start(&mut self, io: &mut Io) {
        if let Some(listener) = self.listener.take() {
            io.listen(listener, 0).expect("listens");
        }
    }

    fn admit(&mut self, _: &mut Io, _: Conn, _: SocketAddr) -> Option<u64> {
        self.next += 1;
        let client = Client { parser: Parser::new(Role::Server), open: false, gathered: Vec::new() };
        self.clients.insert(self.next, client);
        Some(self.next)
    }

    fn data(&mut self, io: &mut Io, conn: Conn, bytes: &mut [u8]) {
        let Some(client) = self.clients.get_mut(&conn.tag) else { return };
        let mut rest;
        let mut bytes = bytes;
        if !client.open {
            client.gathered.extend_from_slice(bytes);
            let head = std::mem::take(&mut client.gathered);
            match handshake::Request::parse(&head) {
                Ok(None) => {
                    client.gathered = head;
                    return;
                }
                Ok(Some(request)) => match request.upgrade_key() {
                    Ok(key) => {
                        io.write(conn.token, handshake::response(key, None).as_bytes());
                        client.open = true;
                        rest = head[request.len..].to_vec();
                        bytes = &mut rest;
                    }
                    Err(refusal) => {
                        io.write(conn.token, refusal.response().as_bytes());
                        return io.close(conn.token);
                    }
                },
                Err(_) => return io.abort(conn.token),
            }
        }
        match Self::frames(io, conn.token, client, bytes) {
            Ok(true) => {}
            Ok(false) => {
                self.clients.remove(&conn.tag);
                io.close(conn.token);
            }
            Err(violation) => {
                let mut out = Vec::new();
                ws::encode_close(&mut out, Some(violation.close_code()), &violation.to_string(), None);
                io.write(conn.token, &out);
                self.clients.remove(&conn.tag);
                io.close(conn.token);
            }
        }
    }

    fn drained(&mut self, io: &mut Io, conn: Conn) {
        io.resume(conn.token);
    }

    fn eof(&mut self, io: &mut Io, conn: Conn) {
        self.clients.remove(&conn.tag);
        io.close(conn.token);
    }

    fn closed(&mut self, _: &mut Io, conn: Conn, _: Closed) {
        self.clients.remove(&conn.tag);
    }

    fn command(&mut self, _: &mut Io, (): ()) {}
}

fn main() {
    let addr = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:9001".into());
    let mut listeners = socket::listen_group(addr.parse().expect("an address"), 1).expect("listens");
    println!("{}", listeners[0].local_addr().expect("bound"));
    // Case 9 sends messages of 16 MiB and reads none until it has sent them all.
    let limits = Limits { queue: 128 << 20, ..Limits::default() };
    let shards =
        spawn(1, limits, |_| Echo { listener: listeners.pop(), clients: HashMap::new(), next: 0 }).expect("starts");
    shards.join().expect("ends");
}
