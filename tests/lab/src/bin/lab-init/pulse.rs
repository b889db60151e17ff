//! Signs of life to the host, and nudges from it, each on a thread of its own.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::thread;

use anyhow::{Context, Result};
use testudo_lab::wire::{HEARTBEAT, Word};

/// So that a lab that hangs is told from a command that takes its time. A line is one write, and a
/// write to a port is whole: lines do not mix.
pub(crate) fn beat(mut ctl: File) {
    thread::spawn(move || {
        while ctl
            .write_all(format!("{}\n", Word::Alive).as_bytes())
            .is_ok()
        {
            thread::sleep(HEARTBEAT);
        }
    });
}

/// A byte from the host has interrupted one CPU, and is passed on to the others: a read of another
/// CPU's CPUID is made there, for which it is interrupted. What for: see `nudge` in the library.
pub(crate) fn take_nudges(mut ctl: File, cpus: u32) -> Result<()> {
    let others = if cpus > 1 { 0..cpus } else { 0..0 };
    let others: Vec<File> = others
        .map(|n| {
            let path = format!("/dev/cpu/{n}/cpuid");
            File::open(&path).with_context(|| format!("cannot open {path}"))
        })
        .collect::<Result<_>>()?;
    thread::spawn(move || {
        let mut bytes = [0; 64];
        while let Ok(1..) = ctl.read(&mut bytes) {
            for cpu in &others {
                // The answer is of no interest.
                let _ = cpu.read_at(&mut bytes[..16], 0);
            }
        }
    });
    Ok(())
}
