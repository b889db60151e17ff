//! Virtio ports by their names, and the console's size.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::termios::tcgetwinsize;

use crate::console::Console;
use crate::facts;
use crate::pattern::Pattern;

const CHUNK: usize = 32 * 1024;
/// For the kernel to have found the port.
const PATIENCE: Duration = Duration::from_secs(5);

/// The port of this name; without udev nobody has made `/dev/virtio-ports`.
fn open(name: &str) -> io::Result<File> {
    let begun = Instant::now();
    loop {
        for entry in fs::read_dir("/sys/class/virtio-ports")?.flatten() {
            let found = facts::read(entry.path().join("name")).unwrap_or_default();
            if found.trim() == name {
                let device = format!("/dev/{}", entry.file_name().to_string_lossy());
                return OpenOptions::new().read(true).write(true).open(device);
            }
        }
        if begun.elapsed() > PATIENCE {
            return Err(io::Error::other(format!("no port is called {name}")));
        }
        sleep(Duration::from_millis(10));
    }
}

/// Sends lines back until `quit`, whoever comes and goes at the other end.
pub(crate) fn echo(console: &mut Console, name: &str) -> io::Result<()> {
    let mut port = open(name)?;
    console.line(format_args!("PORT {name} ready"));
    let mut lines = BufReader::new(port.try_clone()?);
    loop {
        let mut line = Vec::new();
        if lines.read_until(b'\n', &mut line)? == 0 {
            // Nobody is there.
            sleep(Duration::from_millis(20));
            continue;
        }
        if line == b"quit\n" {
            return Ok(());
        }
        port.write_all(&line)?;
    }
}

/// Sends so many bytes of a pattern.
pub(crate) fn flood(name: &str, bytes: u64) -> io::Result<()> {
    let mut port = open(name)?;
    let mut pattern = Pattern::new(1);
    while pattern.position() < bytes {
        let left = bytes.saturating_sub(pattern.position());
        let len = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        port.write_all(&pattern.next(len))?;
    }
    Ok(())
}

/// Reads so many bytes and tells whether they were the pattern's.
pub(crate) fn sink(console: &mut Console, name: &str, bytes: u64) -> io::Result<()> {
    let mut port = open(name)?;
    console.line(format_args!("PORT {name} ready"));
    let mut pattern = Pattern::new(2);
    let mut whole = true;
    let mut chunk = vec![0; CHUNK];
    while pattern.position() < bytes {
        let got = port.read(&mut chunk)?;
        if got == 0 {
            sleep(Duration::from_millis(20));
        }
        whole &= pattern.next(got) == chunk.get(..got).unwrap_or_default();
    }
    console.fact(format_args!("port.{name}.whole"), whole);
    Ok(())
}

/// `FACT console.size=COLUMNSxROWS`.
pub(crate) fn size(console: &mut Console) -> io::Result<()> {
    let size = tcgetwinsize(File::open("/dev/console")?)?;
    console.fact(
        "console.size",
        format_args!("{}x{}", size.ws_col, size.ws_row),
    );
    Ok(())
}
