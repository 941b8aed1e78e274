//! A node agent by hand: waits for one `init`, claims it, prints what it says.
//!
//! ```text
//! claim SOCKET [-e NAME=VALUE]... [-f PATH=CONTENT]... [-s PATH=SECRET]... [-u UID:GID] [-d DIR] -- ARGV...
//! ```
//! Lines on standard input are frames: `run N`, `signal N`, `kill`, `ping`, `forget`, `shutdown`.

use std::io::{self, BufRead, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::time::Instant;

use clawhq_init::{Claim, File, MAX_TO_AGENT, ToAgent, ToInit, read_frame};

fn main() -> io::Result<()> {
    let wrong = |what: &str| io::Error::other(what.to_owned());
    let mut args = std::env::args().skip(1);
    let socket = args.next().ok_or_else(|| wrong("which socket?"))?;
    let mut claim = Claim::default();
    claim.claim_id = "by-hand".into();
    (claim.generation, claim.run, claim.inherit_env) = (1, 1, true);
    while let Some(flag) = args.next() {
        if flag == "--" {
            claim.argv = args.by_ref().collect();
            break;
        }
        let value = args.next().ok_or_else(|| wrong(&flag))?;
        let pair =
            |sign| value.split_once(sign).map(|(a, b)| (a.to_owned(), b.to_owned())).ok_or_else(|| wrong(&value));
        match flag.as_str() {
            "-e" => claim.env.push(pair('=')?),
            "-f" | "-s" => {
                let (path, content) = pair('=')?;
                claim.files.push(File {
                    path,
                    mode: 0o600,
                    bytes: content.into_bytes(),
                    secret: flag == "-s",
                    only_if_absent: false,
                });
            }
            "-u" => {
                let (uid, gid) = pair(':')?;
                claim.uid = uid.parse().map_err(io::Error::other)?;
                claim.gid = gid.parse().map_err(io::Error::other)?;
            }
            "-d" => claim.cwd = Some(value),
            _ => return Err(wrong(&flag)),
        }
    }
    let _ = std::fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket)?;
    std::fs::set_permissions(&socket, PermissionsExt::from_mode(0o666))?;
    let (mut stream, _) = listener.accept()?;
    let mut output = stream.try_clone()?;
    let start = Instant::now();
    std::thread::spawn(move || {
        while let Ok(Some(frame)) = read_frame(&mut stream, MAX_TO_AGENT) {
            let at = start.elapsed().as_secs_f64() * 1e3;
            match ToAgent::decode(&frame) {
                Ok(frame) => println!("{at:10.3} ms  {frame:?}"),
                Err(error) => println!("{at:10.3} ms  bad frame: {error}"),
            }
        }
        println!("the init hung up");
        std::process::exit(0);
    });
    println!("{:10.3} ms  sending {claim:?}", start.elapsed().as_secs_f64() * 1e3);
    output.write_all(&ToInit::Claim(claim).encode().map_err(io::Error::other)?)?;
    for line in io::stdin().lock().lines() {
        let line = line?;
        let (word, number) = line.split_once(' ').unwrap_or((&line, "0"));
        let number: u32 = number.parse().map_err(io::Error::other)?;
        let frame = match word {
            "run" => ToInit::Run { claim_id: "by-hand".into(), run: number },
            "signal" => ToInit::Signal { signo: u8::try_from(number).map_err(io::Error::other)? },
            "kill" => ToInit::Kill,
            "ping" => ToInit::Ping,
            "forget" => ToInit::Forget,
            "shutdown" => ToInit::Shutdown,
            _ => continue,
        };
        output.write_all(&frame.encode().map_err(io::Error::other)?)?;
    }
    loop {
        std::thread::park();
    }
}
