//! `agent`: memory used, checked and given up as the lines of the console say, for tests that change
//! a guest's memory while it runs.
//!
//! ```text
//! hold MIB      takes so much more memory and writes to each page of it
//! verify        FACT mem.wrong_pages: pages that do not hold what was written
//! drop          gives all of it up
//! caches        drops the page cache and compacts what is left
//! total         FACT mem.total_kib, mem.available_kib; mem.high_pages: held ones above 4 GiB
//! direct DEV N  reads the first N MiB of a block device past the page cache, into memory of its own:
//!               FACT direct.hash, and direct.high_pages of it above 4 GiB
//! say TEXT      prints it
//! quit          ends the agent
//! ```
//! Each line is answered by `AGENT done N` or `AGENT failed N: why`, N counting from 1.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use crate::console::Console;
use crate::facts;

const PAGE: usize = 4096;
const FOUR_GIB_PAGE: u64 = 1 << 20;
/// Memory is taken in pieces of this size.
const PIECE: usize = 16 << 20;

/// Serves until `quit` or the end of input.
pub(crate) fn serve(console: &mut Console) -> io::Result<()> {
    let mut lines = BufReader::new(console.silent_input()?);
    let mut held = Held::default();
    console.line("AGENT ready");
    for number in 1_u64.. {
        let mut line = String::new();
        if lines.read_line(&mut line)? == 0 || line.trim() == "quit" {
            break;
        }
        match carry_out(console, &mut held, line.trim()) {
            Ok(()) => console.line(format_args!("AGENT done {number}")),
            Err(e) => console.line(format_args!("AGENT failed {number}: {e}")),
        }
    }
    Ok(())
}

fn carry_out(console: &mut Console, held: &mut Held, line: &str) -> io::Result<()> {
    let (verb, value) = line.split_once(' ').unwrap_or((line, ""));
    match verb {
        "hold" => held.more(value.parse().map_err(io::Error::other)?),
        "verify" => console.fact("mem.wrong_pages", held.wrong_pages()),
        "drop" => *held = Held::default(),
        "caches" => {
            fs::write("/proc/sys/vm/drop_caches", "3")?;
            // Not every kernel can.
            let _ = fs::write("/proc/sys/vm/compact_memory", "1");
        }
        "total" => {
            let meminfo = facts::read("/proc/meminfo").unwrap_or_default();
            for (key, field) in [
                ("mem.total_kib", "MemTotal:"),
                ("mem.free_kib", "MemFree:"),
                ("mem.available_kib", "MemAvailable:"),
            ] {
                let kib = facts::meminfo_kib(&meminfo, field).unwrap_or(0);
                console.fact(key, kib);
            }
            console.fact("mem.high_pages", held.high_pages()?);
        }
        "direct" => direct(console, value)?,
        "say" => console.line(value),
        _ => return Err(io::Error::other(format!("`{line}` is no order"))),
    }
    Ok(())
}

/// Memory with a number in each page.
#[derive(Default)]
struct Held(Vec<Vec<u8>>);

impl Held {
    fn more(&mut self, mib: usize) {
        let mut left = mib.saturating_mul(1 << 20);
        while left > 0 {
            let size = left.min(PIECE);
            // Fresh from the kernel, untouched.
            let mut piece = vec![0; size];
            let number = self.0.len();
            for (n, page) in piece.chunks_mut(PAGE).enumerate() {
                if let Some(start) = page.first_chunk_mut::<8>() {
                    *start = mark(number, n);
                }
            }
            self.0.push(piece);
            left = left.saturating_sub(size);
        }
    }

    fn wrong_pages(&self) -> usize {
        let wrong = |(number, piece): (usize, &Vec<u8>)| {
            piece
                .chunks(PAGE)
                .enumerate()
                .filter(|(n, page)| page.first_chunk::<8>() != Some(&mark(number, *n)))
                .count()
        };
        self.0.iter().enumerate().map(wrong).sum()
    }

    fn high_pages(&self) -> io::Result<usize> {
        self.0.iter().try_fold(0_usize, |sum, piece| {
            Ok(sum.saturating_add(high_pages(piece)?))
        })
    }
}

/// Pages whose physical address is above 4 GiB.
fn high_pages(memory: &[u8]) -> io::Result<usize> {
    let pagemap = File::open("/proc/self/pagemap")?;
    let first = memory.as_ptr().addr() / PAGE;
    let at = u64::try_from(first.saturating_mul(8)).map_err(io::Error::other)?;
    let mut entries = vec![0; (memory.len() / PAGE).saturating_mul(8)];
    pagemap.read_exact_at(&mut entries, at)?;
    // Documentation/admin-guide/mm/pagemap.rst: the frame in bits 0 to 54.
    let (entries, _) = entries.as_chunks::<8>();
    let frames = entries
        .iter()
        .map(|entry| u64::from_le_bytes(*entry) & ((1 << 55) - 1));
    Ok(frames.filter(|frame| *frame >= FOUR_GIB_PAGE).count())
}

/// Reads a device by DMA into memory that the page allocator gives to user space.
fn direct(console: &mut Console, value: &str) -> io::Result<()> {
    let (device, mib) = value.split_once(' ').unwrap_or((value, "1"));
    let bytes = mib.parse::<usize>().map_err(io::Error::other)? << 20;
    let flags = libc::O_DIRECT;
    let file = fs::OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(format!("/dev/{device}"))?;
    // Room to begin on a page, and each page written to: there before the device is asked.
    let mut memory = vec![0_u8; bytes.saturating_add(PAGE)];
    memory.chunks_mut(PAGE / 2).for_each(|part| part.fill(1));
    let start = memory.as_ptr().align_offset(PAGE);
    let room = memory.get_mut(start..start.saturating_add(bytes));
    let room = room.ok_or_else(|| io::Error::other("no page in the memory"))?;
    file.read_exact_at(room, 0)?;
    let hash = crate::checks::fnv1a(room);
    console.fact("direct.hash", format_args!("{hash:016x}"));
    console.fact("direct.high_pages", high_pages(room)?);
    Ok(())
}

fn mark(piece: usize, page: usize) -> [u8; 8] {
    (piece.wrapping_mul(1 << 32) ^ page ^ 0x5a5a_0000).to_le_bytes()
}
