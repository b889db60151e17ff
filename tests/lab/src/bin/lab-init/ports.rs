//! virtio-serial ports, found by their names.

use std::fs::{self, File};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// The host announces ports one after another; this long after boot they are all there.
const LIMIT: Duration = Duration::from_secs(20);

/// Opens the port of this name, waiting for the host to announce it.
pub(crate) fn open(name: &str) -> Result<File> {
    let begun = Instant::now();
    while begun.elapsed() < LIMIT {
        if let Some(device) = find(name) {
            let path = format!("/dev/{device}");
            return File::options()
                .read(true)
                .write(true)
                .open(&path)
                .with_context(|| format!("cannot open {path} (port {name})"));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    bail!("the host has no port {name}")
}

fn find(name: &str) -> Option<String> {
    fs::read_dir("/sys/class/virtio-ports")
        .ok()?
        .flatten()
        .find_map(|port| {
            let named = fs::read_to_string(port.path().join("name")).ok()?;
            (named.trim_end() == name).then(|| port.file_name().to_string_lossy().into_owned())
        })
}
