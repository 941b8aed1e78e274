//! One-shot commands: what a test wants a process in a container to do.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

const USAGE: &str = "usage: hello [COMMAND]
  (none)               serve HTTP and WebSocket on $PORT (8080)
  crash-after MS       serve, then abort
  exit CODE            end with the code
  oom MIB              touch so much memory, then stay
  spam BYTES           print so many bytes in lines, then end
  get URL [MS]         print the status and body of http://ADDRESS[:PORT]/PATH; 1 if it is 400 or more
  connect ADDRESS:PORT [MS]   0 connected, 1 refused, 2 timed out, 3 anything else
  cat [PATH]           print a file, or what comes on standard input
  write PATH BYTES     fill a file
  threads N            start so many threads; says how many there were
  env NAME             print a variable; 1 if it is not set
  sleep [MS]           sleep, or stay";

pub fn usage() -> ExitCode {
    eprintln!("{USAGE}");
    ExitCode::from(64)
}

pub fn run(command: &[&str]) -> ExitCode {
    let done = match command {
        ["exit", code] => match code.parse::<u8>() {
            Ok(code) => return ExitCode::from(code),
            Err(_) => return usage(),
        },
        ["oom", mib] => number(mib).map(oom),
        ["spam", bytes] => number(bytes).and_then(spam),
        ["get", url] => get(url, 2_000),
        ["get", url, ms] => number(ms).and_then(|ms| get(url, ms)),
        ["connect", address] => connect(address, 2_000),
        ["connect", address, ms] => number(ms).and_then(|ms| connect(address, ms)),
        ["cat"] => copy(&mut io::stdin().lock()),
        ["cat", path] => fs::File::open(path).and_then(|mut file| copy(&mut file)),
        ["write", path, bytes] => number(bytes).and_then(|bytes| write(path, bytes)),
        ["threads", count] => number(count).and_then(threads),
        ["env", name] => match std::env::var(name) {
            Ok(value) => print(format_args!("{value}\n")),
            Err(_) => Ok(ExitCode::FAILURE),
        },
        ["sleep"] => stay(),
        ["sleep", ms] => number(ms).map(|ms| {
            thread::sleep(Duration::from_millis(ms));
            ExitCode::SUCCESS
        }),
        ["help" | "--help" | "-h"] => print(format_args!("{USAGE}\n")),
        ["--version"] => print(format_args!("hello {}\n", env!("CARGO_PKG_VERSION"))),
        _ => return usage(),
    };
    done.unwrap_or_else(|error| {
        eprintln!("hello {}: {error}", command.join(" "));
        ExitCode::FAILURE
    })
}

fn number(text: &str) -> io::Result<u64> {
    text.parse().map_err(|_| io::Error::other(format!("{text} is not a number")))
}

fn print(text: std::fmt::Arguments<'_>) -> io::Result<ExitCode> {
    io::stdout().lock().write_fmt(text)?;
    Ok(ExitCode::SUCCESS)
}

fn copy(from: &mut dyn Read) -> io::Result<ExitCode> {
    io::copy(from, &mut io::stdout().lock())?;
    Ok(ExitCode::SUCCESS)
}

fn stay() -> ! {
    loop {
        thread::park();
    }
}

fn oom(mib: u64) -> ExitCode {
    let mut held: Vec<Vec<u8>> = Vec::new();
    for _ in 0..mib {
        // Not zeros: those would be pages nobody has touched.
        held.push(vec![0x5a; 1 << 20]);
    }
    println!("hello: holding {mib} MiB");
    std::hint::black_box(&held);
    stay()
}

fn spam(bytes: u64) -> io::Result<ExitCode> {
    const LINE: usize = 100;
    let mut out = io::BufWriter::new(io::stdout().lock());
    let mut left = bytes;
    let mut count = 0u64;
    while left > 0 {
        let mut line = format!("{count:012} ").into_bytes();
        line.resize(LINE - 1, b'.');
        line.push(b'\n');
        let part = usize::try_from(left).unwrap_or(LINE).min(LINE);
        out.write_all(&line[LINE - part..])?;
        left -= part as u64;
        count += 1;
    }
    out.flush()?;
    Ok(ExitCode::SUCCESS)
}

/// Numbers only: the image has no resolver.
fn address(text: &str) -> io::Result<SocketAddr> {
    let text = text.replace("localhost", "127.0.0.1");
    text.parse().map_err(|_| io::Error::other(format!("{text} is not ADDRESS:PORT")))
}

fn connect(text: &str, ms: u64) -> io::Result<ExitCode> {
    let timeout = Duration::from_millis(ms.max(1));
    let (code, what) = match TcpStream::connect_timeout(&address(text)?, timeout) {
        Ok(_) => (0, "connected".to_owned()),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => (1, "refused".to_owned()),
        Err(error) if error.kind() == io::ErrorKind::TimedOut => (2, "timed out".to_owned()),
        Err(error) => (3, error.to_string()),
    };
    print(format_args!("{what}\n"))?;
    Ok(ExitCode::from(code))
}

fn get(url: &str, ms: u64) -> io::Result<ExitCode> {
    let rest = url.strip_prefix("http://").ok_or_else(|| io::Error::other("only http:// addresses"))?;
    let (host, path) = rest.find('/').map_or((rest, "/"), |slash| rest.split_at(slash));
    let with_port = address(host).or_else(|_| address(&format!("{host}:80")))?;
    let timeout = Duration::from_millis(ms.max(1));
    let mut stream = TcpStream::connect_timeout(&with_port, timeout)?;
    stream.set_read_timeout(Some(timeout))?;
    write!(stream, "GET {path} HTTP/1.0\r\nhost: {host}\r\nconnection: close\r\n\r\n")?;
    let mut bytes = Vec::new();
    stream.take(4 << 20).read_to_end(&mut bytes)?;
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut head = httparse::Response::new(&mut headers);
    let malformed = || io::Error::other("the answer is not HTTP");
    let httparse::Status::Complete(end) = head.parse(&bytes).map_err(|_| malformed())? else {
        return Err(malformed());
    };
    let status = head.code.ok_or_else(malformed)?;
    print(format_args!("{status}\n{}", String::from_utf8_lossy(&bytes[end..])))?;
    Ok(if status < 400 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn write(path: &str, bytes: u64) -> io::Result<ExitCode> {
    let mut file = fs::File::create(path)?;
    let written = io::copy(&mut io::repeat(b'x').take(bytes), &mut file)?;
    file.sync_all()?;
    print(format_args!("{written}\n"))
}

fn threads(count: u64) -> io::Result<ExitCode> {
    for started in 0..count {
        if let Err(error) = thread::Builder::new().stack_size(64 << 10).spawn(|| stay()) {
            println!("{started}");
            return Err(error);
        }
    }
    print(format_args!("{count}\n"))
}
