//! Connection core for network services that hold very many connections.
//!
//! A process runs a few *shards*: threads with an own epoll instance, table of sockets, timer wheel and read buffer,
//! that share nothing. Each shard has its own listener on the same port (SO_REUSEPORT), so the kernel spreads clients.
//! A service implements [`Service`]; its callbacks get an [`Io`] to act on sockets with.
//!
//! What is promised:
//! * **No buffer while idle.** Bytes are read into the shard's scratch buffer and lent to [`Service::data`]. A socket
//!   costs about 70 bytes, 40 more while a timer is armed for it.
//! * **Write first.** [`Io::write`] tries the socket at once and queues only what the kernel refused; on
//!   [`Written::Queued`] call [`Io::pause`] on the source and [`Io::resume`] from [`Service::drained`].
//! * **Edge-triggered, fair.** One `epoll_ctl` in a socket's life; a busy socket yields after eight reads.
//! * **Stale names do nothing.** Tokens and timers carry a generation. Failure is never reported from inside a call:
//!   [`Service::closed`] comes from the loop, once, and not for what the service closed itself.
//! * **Half-close** is kept: [`Service::eof`] and [`Io::shutdown_write`] are separate, and a connection is finished when
//!   both have happened and everything queued is sent.
//! * **Splice.** [`Io::pair`] two sockets and [`Io::splice`] moves bulk bytes in the kernel; pipes are pooled by shard and
//!   held only while bytes are in flight.
//!
//! An echo server, whole (`examples/echo.rs` has it with arguments):
//!
//! ```
//! use clawhq_wire::*;
//! use std::{io::{Read, Write}, net::{SocketAddr, TcpListener, TcpStream}};
//!
//! struct Echo(Option<TcpListener>);
//!
//! impl Service for Echo {
//!     type Command = ();
//!     fn start(&mut self, io: &mut Io) {
//!         io.listen(self.0.take().unwrap(), 0).unwrap();
//!     }
//!     fn admit(&mut self, _: &mut Io, _: Conn, _: SocketAddr) -> Option<u64> {
//!         Some(7) // the connection's tag: usually an index into a table of the service's own
//!     }
//!     fn data(&mut self, io: &mut Io, conn: Conn, bytes: &mut [u8]) {
//!         if let Written::Queued(_) = io.write(conn.token, bytes) {
//!             io.pause(conn.token);
//!         }
//!     }
//!     fn drained(&mut self, io: &mut Io, conn: Conn) {
//!         io.resume(conn.token);
//!     }
//!     fn eof(&mut self, io: &mut Io, conn: Conn) {
//!         io.shutdown_write(conn.token);
//!     }
//!     fn closed(&mut self, _: &mut Io, _: Conn, _: Closed) {}
//!     fn command(&mut self, _: &mut Io, _: ()) {}
//! }
//!
//! let mut listeners = socket::listen_group("127.0.0.1:0".parse().unwrap(), 2).unwrap();
//! let addr = listeners[0].local_addr().unwrap();
//! let shards = spawn(2, Limits::default(), |_| Echo(listeners.pop())).unwrap();
//!
//! let mut client = TcpStream::connect(addr).unwrap();
//! client.write_all(b"hello").unwrap();
//! client.shutdown(std::net::Shutdown::Write).unwrap();
//! let mut back = String::new();
//! client.read_to_string(&mut back).unwrap();
//! assert_eq!(back, "hello");
//!
//! shards.drain(std::time::Duration::from_secs(1));
//! shards.join().unwrap();
//! ```

pub mod admission;
pub mod budget;
pub mod intern;
mod io;
pub mod process;
mod runtime;
pub mod shared;
pub mod socket;
pub mod timer;
pub mod ws;

pub use io::{Closed, Conn, Counters, Io, Limits, Service, TICK, Token, Written};
pub use runtime::{Handle, NotSent, Place, Remote, spawn};
