//! What the static PID 1 of a container (`init`) and the node agent say to each other.
//!
//! `init` dials the node agent's unix socket (bind-mounted read-only at [`SOCKET_PATH`]), says
//! [`ToAgent::Hello`], and re-dials for ever when the connection ends; the tenant's process keeps running
//! meanwhile. The node agent answers with [`ToInit`] frames. Everything a tenant's process needs travels in
//! one [`Claim`], so nothing of it is in the image or in Docker's records.
//!
//! The node agent must know the peer by the socket's credentials and their cgroup, never by what a frame
//! says: any process of the container can dial the socket. A `Hello` is believed only from a peer whose
//! innermost pid is 1; an `ExecHello` only for a ticket that was made for that very container.

mod protocol;

pub use protocol::{
    Claim, Exec, Exit, File, Hello, MAX_ARGS, MAX_CLAIM_ID, MAX_FILES, MAX_TO_AGENT, MAX_TO_INIT, Oom, ProtocolError,
    Started, State, Step, Timings, ToAgent, ToInit, VERSION, frame_len, read_frame,
};

/// Where the binary is mounted in every container.
pub const INIT_PATH: &str = "/.clawhq/init";
/// Where the node agent's socket is mounted in every container.
pub const SOCKET_PATH: &str = "/.clawhq/agent.sock";
