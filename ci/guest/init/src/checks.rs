//! Verbs that exercise the machine and tell the outcome as facts.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use rustix::rand::{GetRandomFlags, getrandom};
use rustix::thread::{CpuSet, sched_getcpu, sched_setaffinity};

use crate::console::Console;
use crate::facts;

const PAGE: usize = 4096;
const MIB: u64 = 1 << 20;

/// MTRRs by SDM 3A 12.11, and PAT.
const FIXED: [u32; 11] = [
    0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f,
];
const MTRR_CAP: u32 = 0xfe;
const MTRR_DEF_TYPE: u32 = 0x2ff;
const VARIABLE: std::ops::Range<u32> = 0x200..0x214;
const PAT: u32 = 0x277;

/// `FACT msr.CPU.0xINDEX=0xVALUE` for what is there and not zero, the default type in any case.
pub(crate) fn msrs(console: &mut Console) -> io::Result<()> {
    for cpu in facts::online() {
        let msr = File::open(format!("/dev/cpu/{cpu}/msr"))?;
        let indices = [MTRR_CAP, MTRR_DEF_TYPE, PAT].into_iter();
        for index in indices.chain(VARIABLE).chain(FIXED) {
            let mut value = [0; 8];
            if msr.read_exact_at(&mut value, u64::from(index)).is_err() {
                continue;
            }
            let value = u64::from_le_bytes(value);
            if value != 0 || index == MTRR_DEF_TYPE {
                console.fact(
                    format_args!("msr.{cpu}.{index:#x}"),
                    format_args!("{value:#x}"),
                );
            }
        }
    }
    Ok(())
}

/// Runs on each online CPU in turn.
pub(crate) fn per_cpu(console: &mut Console) -> io::Result<()> {
    let mut ran = 0_usize;
    for cpu in facts::online() {
        let mut set = CpuSet::new();
        set.set(cpu);
        sched_setaffinity(None, &set)?;
        if sched_getcpu() == cpu {
            ran = ran.saturating_add(1);
        }
    }
    console.fact("percpu.ran", ran);
    Ok(())
}

/// Writes a page's number into each page, then reads all of them back.
pub(crate) fn touch(console: &mut Console, mib: u64) -> io::Result<()> {
    let size = usize::try_from(mib.saturating_mul(MIB)).map_err(io::Error::other)?;
    let mut memory = vec![0_u8; size];
    for (n, page) in memory.chunks_mut(PAGE).enumerate() {
        if let Some(start) = page.first_chunk_mut::<8>() {
            *start = n.to_le_bytes();
        }
    }
    let wrong = memory
        .chunks(PAGE)
        .enumerate()
        .filter(|(n, page)| page.first_chunk::<8>() != Some(&n.to_le_bytes()))
        .count();
    console.fact("touch.mib", mib);
    console.fact("touch.wrong_pages", wrong);
    Ok(())
}

/// Reads from the hardware generator that the kernel has chosen.
pub(crate) fn rng(console: &mut Console, count: usize) -> io::Result<()> {
    for file in ["rng_current", "rng_available"] {
        if let Some(value) = facts::read(format!("/sys/class/misc/hw_random/{file}")) {
            console.fact(file, value);
        }
    }
    let mut bytes = vec![0; count];
    File::open("/dev/hwrng")?.read_exact(&mut bytes)?;
    let mut seen = [false; 256];
    for byte in &bytes {
        if let Some(slot) = seen.get_mut(usize::from(*byte)) {
            *slot = true;
        }
    }
    console.fact("rng.bytes", bytes.len());
    console.fact("rng.distinct", seen.iter().filter(|s| **s).count());
    console.fact("rng.hash", format_args!("{:016x}", fnv1a(&bytes)));
    Ok(())
}

/// FNV-1a of 64 bits.
pub(crate) fn fnv1a(bytes: &[u8]) -> u64 {
    fnv1a_more(0xcbf2_9ce4_8422_2325, bytes)
}

/// The hash of what `hash` is the hash of, and of `bytes` after it.
pub(crate) fn fnv1a_more(hash: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(hash, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// Is the kernel's pool seeded, and how full is it?
pub(crate) fn entropy(console: &mut Console) {
    let mut bytes = [0_u8; 16];
    let ready = getrandom(&mut bytes[..], GetRandomFlags::NONBLOCK).is_ok();
    console.fact("random.ready", ready);
    for file in ["entropy_avail", "poolsize"] {
        if let Some(value) = facts::read(format!("/proc/sys/kernel/random/{file}")) {
            console.fact(format_args!("random.{file}"), value);
        }
    }
}

/// Lines of a flood have this size on the wire, where the terminal adds a carriage return.
const FLOOD_LINE: usize = 64;
const ALPHABET: &[u8; 64] = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-";

/// `FLOOD NNNNNNNN …`, numbered from 0: a lost, doubled or changed byte shows in its line.
pub(crate) fn flood(console: &mut Console, kib: u64) -> io::Result<()> {
    let lines = kib.saturating_mul(16);
    let mut batch = Vec::with_capacity(PAGE);
    for n in 0..lines {
        batch.extend(flood_line(n));
        if batch.len() >= PAGE {
            console.raw(&batch)?;
            batch.clear();
        }
    }
    console.raw(&batch)?;
    console.drain();
    console.fact("flood.lines", lines);
    Ok(())
}

fn flood_line(n: u64) -> Vec<u8> {
    let mut line = format!("FLOOD {n:08x} ").into_bytes();
    let letters = ALPHABET
        .iter()
        .cycle()
        .skip(usize::try_from(n % 64).unwrap_or(0));
    let room = (FLOOD_LINE - 2).saturating_sub(line.len());
    line.extend(letters.take(room));
    line.push(b'\n');
    line
}

/// Crashes the kernel by sysrq. Returns only when that is not possible.
pub(crate) fn panic_kernel() -> io::Result<()> {
    fs::write("/proc/sys/kernel/sysrq", "1")?;
    fs::write("/proc/sysrq-trigger", "c")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flood_lines_have_one_size_and_differ() {
        let first = String::from_utf8(flood_line(0)).unwrap();
        assert_eq!(
            first,
            "FLOOD 00000000 abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTU\n"
        );
        for n in [1, 63, 64, 0xffff_ffff] {
            // 63 bytes here, 64 once the terminal has added its carriage return
            assert_eq!(flood_line(n).len(), FLOOD_LINE - 1);
            assert_ne!(flood_line(n), flood_line(n + 1));
        }
    }

    #[test]
    fn the_hash_is_fnv_1a() {
        assert_eq!(fnv1a(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a(b"a"), 0xaf63_dc4c_8601_ec8c);
    }
}
