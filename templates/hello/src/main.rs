//! A tiny real agent: HTTP and WebSocket on $PORT, ready about a millisecond after it was started, and commands
//! that misbehave in known ways. With no shell in its image, it is also what tests execute inside a container.

mod commands;
mod http;
mod page;
mod server;

use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    let start = Instant::now();
    let args: Vec<String> = std::env::args_os().map(|arg| arg.to_string_lossy().into_owned()).collect();
    let rest: Vec<&str> = args.iter().skip(1).map(String::as_str).collect();
    match rest.as_slice() {
        [] | ["serve"] => server::serve(start),
        ["crash-after", ms] => match ms.parse() {
            Ok(ms) => {
                server::abort_after(ms);
                server::serve(start)
            }
            Err(_) => commands::usage(),
        },
        command => commands::run(command),
    }
}
