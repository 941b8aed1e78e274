//! The ends of a bulk measurement: `bulk source ADDR` sends as much as is read, `bulk pull ADDR BYTES [PROXY USER KEY]`
//! reads that much, through a SOCKS5 proxy if one is given.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};

fn main() -> std::io::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let text: Vec<&str> = args.iter().map(String::as_str).collect();
    let addr = |s: &str| s.parse::<SocketAddr>().map_err(std::io::Error::other);
    match text[..] {
        ["source", at] => {
            let listener = TcpListener::bind(addr(at)?)?;
            println!("{}", listener.local_addr()?);
            let block = vec![0x5a; 1 << 18];
            for stream in listener.incoming() {
                let (mut stream, block) = (stream?, block.clone());
                std::thread::spawn(move || while stream.write_all(&block).is_ok() {});
            }
        }
        ["pull", to, bytes, ref proxy @ ..] => {
            let to = addr(to)?;
            let mut stream = match proxy {
                [] => TcpStream::connect(to)?,
                [proxy, user, key] => {
                    let mut stream = TcpStream::connect(addr(proxy)?)?;
                    let mut hello = vec![5, 1, 2, 1, user.len() as u8];
                    hello.extend(user.bytes());
                    hello.push(key.len() as u8);
                    hello.extend(key.bytes());
                    stream.write_all(&hello)?;
                    stream.read_exact(&mut [0; 4])?;
                    let mut request = vec![5, 1, 0];
                    proxy_hub::socks::put_address(&mut request, to);
                    stream.write_all(&request)?;
                    let mut reply = [0; 10];
                    stream.read_exact(&mut reply)?;
                    if reply[1] != 0 {
                        return Err(std::io::Error::other(format!("reply {}", reply[1])));
                    }
                    stream
                }
                _ => return Err(std::io::Error::other("PROXY USER KEY go together")),
            };
            let mut left: u64 = bytes.parse().map_err(std::io::Error::other)?;
            let mut block = vec![0; 1 << 18];
            while left > 0 {
                let n = stream.read(&mut block)? as u64;
                if n == 0 {
                    return Err(std::io::Error::other(format!("{left} bytes are missing")));
                }
                left -= n.min(left);
            }
        }
        _ => return Err(std::io::Error::other("source ADDR, or pull ADDR BYTES [PROXY USER KEY]")),
    }
    Ok(())
}
