//! Streams between guest and host. The guest asks in 9 bytes, kind and amount, and the host obliges.

use std::io::{self, ErrorKind, Read, Write};

use clap::ValueEnum;

/// One read or write of a bulk transfer.
const CHUNK: usize = 128 << 10;

/// What is transferred.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Transfer {
    /// So many bytes from guest to host; a byte back says that they have come.
    Send,
    /// So many bytes from host to guest.
    Receive,
    /// So many times one byte there and one back.
    PingPong,
}

/// The guest's side. Returns bytes, or round trips.
pub(crate) fn ask(
    stream: &mut (impl Read + Write),
    what: Transfer,
    amount: u64,
) -> io::Result<u64> {
    let mut request = [0; 9];
    request[0] = match what {
        Transfer::Send => b's',
        Transfer::Receive => b'r',
        Transfer::PingPong => b'p',
    };
    request[1..].copy_from_slice(&amount.to_le_bytes());
    stream.write_all(&request)?;
    match what {
        Transfer::Send => {
            send(stream, amount)?;
            stream.read_exact(&mut [0])?;
        }
        Transfer::Receive => receive(stream, amount)?,
        Transfer::PingPong => {
            for _ in 0..amount {
                stream.write_all(b"!")?;
                stream.read_exact(&mut [0])?;
            }
        }
    }
    Ok(amount)
}

/// The host's side of one connection.
pub(crate) fn serve(stream: &mut (impl Read + Write)) -> io::Result<()> {
    let mut request = [0; 9];
    stream.read_exact(&mut request)?;
    let mut amount = [0; 8];
    amount.copy_from_slice(&request[1..]);
    let amount = u64::from_le_bytes(amount);
    match request[0] {
        b's' => {
            receive(stream, amount)?;
            stream.write_all(b".")
        }
        b'r' => send(stream, amount),
        _ => {
            for _ in 0..amount {
                stream.read_exact(&mut [0])?;
                stream.write_all(b"!")?;
            }
            Ok(())
        }
    }
}

fn send(stream: &mut impl Write, mut left: u64) -> io::Result<()> {
    let chunk = vec![0x5a; CHUNK];
    while left > 0 {
        let now = usize::try_from(left).map_or(CHUNK, |l| l.min(CHUNK));
        stream.write_all(&chunk[..now])?;
        left -= now as u64;
    }
    Ok(())
}

fn receive(stream: &mut impl Read, mut left: u64) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    while left > 0 {
        let now = usize::try_from(left).map_or(CHUNK, |l| l.min(CHUNK));
        match stream.read(&mut chunk[..now])? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            length => left -= length as u64,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn the_two_sides_agree() {
        for (what, amount) in [
            (Transfer::Send, 300_001),
            (Transfer::Receive, 300_001),
            (Transfer::PingPong, 30),
        ] {
            let (mut guest, mut host) = UnixStream::pair().unwrap();
            let serving = std::thread::spawn(move || serve(&mut host));
            assert_eq!(ask(&mut guest, what, amount).unwrap(), amount);
            serving.join().unwrap().unwrap();
        }
    }

    #[test]
    fn a_stream_that_breaks_off_is_no_result() {
        let (mut guest, host) = UnixStream::pair().unwrap();
        drop(host);
        assert!(ask(&mut guest, Transfer::Receive, 10).is_err());
    }
}
