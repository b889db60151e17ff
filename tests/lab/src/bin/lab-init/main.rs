//! PID 1 of the lab: makes an emulated host out of an initramfs, runs the ordered command there, and
//! says how it ended. Whatever goes wrong before the command starts is told on the control port, or
//! on the console if there is none yet; the other side then ends the emulator, or sees it end.
#![allow(
    clippy::indexing_slicing,
    reason = "test equipment: it sees no guest-controlled data"
)]

mod command;
mod host;
mod ports;
mod pulse;
mod root;
mod stage;

use std::io::Write;

use anyhow::{Context, Result};
use testudo_lab::wire::{self, Orders, Word};

fn main() {
    if let Err(error) = boot() {
        eprintln!("lab-init: {error:#}");
        // Nobody will hear of it but from the console, so there is nothing to wait for.
        let _ = rustix::system::reboot(rustix::system::RebootCommand::PowerOff);
    }
    // PID 1 must not return: the kernel would panic and hide what was said.
    loop {
        std::thread::park();
    }
}

fn boot() -> Result<()> {
    root::kernel_filesystems()?;
    let orders = std::fs::read(wire::ORDERS).context("cannot read the orders")?;
    let orders: Orders = serde_json::from_slice(&orders).context("the orders make no sense")?;
    let mut ctl = ports::open(wire::CTL)?;
    let done = prepare(&orders).and_then(|streams| command::run(&orders, streams, &mut ctl));
    let word = done.unwrap_or_else(|error| Word::Fatal(format!("{error:#}")));
    rustix::fs::sync();
    ctl.write_all(format!("{word}\n").as_bytes())
        .context("cannot say how it ended")
}

fn prepare(orders: &Orders) -> Result<command::Streams> {
    let streams = command::Streams::open(orders.stdin)?;
    host::load(&orders.early_modules)?;
    root::build(orders)?;
    let late: Vec<_> = orders
        .late_modules
        .iter()
        .map(|m| host::open(m))
        .collect::<Result<_>>()?;
    root::enter()?;
    host::configure(&orders.modules_dir)?;
    host::insert(late)?;
    for path in &orders.stage {
        stage::copy_up(path)?;
    }
    Ok(streams)
}
