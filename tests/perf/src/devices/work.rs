//! One step's work, done in the guest: `perf-devices work …`. It closes with `RESULT units nanoseconds`.

pub(crate) mod files;
pub(crate) mod stream;
pub(crate) mod vsock;

use std::net::TcpStream;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Subcommand;

use stream::Transfer;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// A stream to or from ADDRESS:PORT.
    Tcp {
        address: String,
        transfer: Transfer,
        amount: u64,
    },
    /// A stream to or from the host's port.
    Vsock {
        port: u32,
        transfer: Transfer,
        amount: u64,
    },
    /// Files in a folder.
    Files {
        folder: PathBuf,
        work: files::Work,
        amount: u64,
    },
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let (units, begun) = match &args.what {
        What::Tcp {
            address,
            transfer,
            amount,
        } => {
            let mut stream = TcpStream::connect(address)
                .with_context(|| format!("cannot connect to {address}"))?;
            stream.set_nodelay(true)?;
            let begun = Instant::now();
            (stream::ask(&mut stream, *transfer, *amount)?, begun)
        }
        What::Vsock {
            port,
            transfer,
            amount,
        } => {
            let mut stream = vsock::connect(*port)
                .with_context(|| format!("cannot connect to the host's port {port}"))?;
            let begun = Instant::now();
            (stream::ask(&mut stream, *transfer, *amount)?, begun)
        }
        What::Files {
            folder,
            work,
            amount,
        } => {
            let begun = Instant::now();
            (files::run(folder, *work, *amount)?, begun)
        }
    };
    println!("RESULT {units} {}", begun.elapsed().as_nanos());
    Ok(())
}
