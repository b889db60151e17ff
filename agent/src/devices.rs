//! Devices by their addresses: what the guest calls them, and waiting for those that are not there yet.
//!
//! The loop hears the kernel's announcements and rings; jobs look into sysfs, and again at each ring.

use std::fs;
use std::path::Path;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use testudo_agent_protocol::device_address::At;
use testudo_agent_protocol::{DeviceAddress, code};

use crate::failure::Failure;
use crate::network::Network;

/// virtio 1.2 §5: file system device.
const VIRTIO_FS: &str = "0x001a";

/// The bell.
#[derive(Default)]
pub(crate) struct Devices {
    rings: Mutex<u64>,
    bell: Condvar,
}

impl Devices {
    /// Something has come or gone.
    pub(crate) fn ring(&self) {
        let mut rings = self.rings.lock().unwrap_or_else(PoisonError::into_inner);
        *rings = rings.wrapping_add(1);
        self.bell.notify_all();
    }

    /// What the guest calls the device of that address, as soon as there is one.
    pub(crate) fn wait(
        &self,
        address: &DeviceAddress,
        patience: Duration,
    ) -> Result<String, Failure> {
        let at = address
            .at
            .as_ref()
            .ok_or_else(|| Failure::invalid("a device without an address"))?;
        check(at)?;
        let begun = Instant::now();
        let mut rings = self.rings.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            // Looked up with the bell held: what comes later rings later.
            if let Some(name) = find(at, Path::new("/sys")) {
                return Ok(name);
            }
            let Some(left) = patience
                .checked_sub(begun.elapsed())
                .filter(|d| !d.is_zero())
            else {
                return Err(Failure::of(
                    code::DEADLINE,
                    format!("no device {} appeared within {patience:?}", words(at)),
                ));
            };
            (rings, _) = self
                .bell
                .wait_timeout(rings, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

fn words(at: &At) -> String {
    match at {
        At::Pci(address) => format!("at PCI address {address}"),
        At::DiskSerial(serial) => format!("with serial number {serial}"),
        At::FsTag(tag) => format!("with tag {tag}"),
        At::Mac(mac) => format!("with MAC address {mac}"),
        At::Pmem(address) => format!("at guest-physical address {address:#x}"),
    }
}

/// An address becomes part of a path in sysfs.
fn check(at: &At) -> Result<(), Failure> {
    let good = match at {
        At::Pci(address) => {
            !address.is_empty()
                && address
                    .chars()
                    .all(|c| c.is_ascii_hexdigit() || matches!(c, ':' | '.'))
                && !address.contains("..")
        }
        At::DiskSerial(text) | At::FsTag(text) | At::Mac(text) => !text.is_empty(),
        At::Pmem(_) => true,
    };
    if good {
        return Ok(());
    }
    Err(Failure::invalid(format!(
        "there can be no device {}",
        words(at)
    )))
}

fn find(at: &At, sysfs: &Path) -> Option<String> {
    match at {
        At::Pci(address) => {
            let device = sysfs.join("bus/pci/devices").join(address);
            let below = entries(&device).into_iter().map(|name| device.join(name));
            std::iter::once(device.clone())
                .chain(below)
                .find_map(|folder| {
                    let first = |kind: &str| entries(&folder.join(kind)).into_iter().next();
                    let block = first("block").map(|name| format!("/dev/{name}"));
                    block.or_else(|| first("net"))
                })
        }
        At::DiskSerial(serial) => {
            let class = sysfs.join("class/block");
            let named = |name: &String| {
                let text = fs::read_to_string(class.join(name).join("serial"));
                text.is_ok_and(|text| text.trim_end() == serial)
            };
            entries(&class)
                .into_iter()
                .find(named)
                .map(|name| format!("/dev/{name}"))
        }
        At::FsTag(tag) => {
            let class = sysfs.join("fs/virtiofs");
            let tags = entries(&class);
            let known = tags.iter().any(|name| {
                let text = fs::read_to_string(class.join(name).join("tag"));
                text.is_ok_and(|text| text.trim_end() == tag)
            });
            // Before Linux 6.9 sysfs does not tell tags: any such device may be it.
            let untold = tags.is_empty() && {
                let bus = sysfs.join("bus/virtio/devices");
                entries(&bus).iter().any(|name| {
                    let text = fs::read_to_string(bus.join(name).join("device"));
                    text.is_ok_and(|text| text.trim_end() == VIRTIO_FS)
                })
            };
            (known || untold).then(|| tag.clone())
        }
        // Not in sysfs, which shows the network namespace of whoever mounted it.
        At::Mac(mac) => Network::open().ok()?.name_of(mac),
        At::Pmem(address) => {
            let bus = sysfs.join("bus/nd/devices");
            entries(&bus).into_iter().find_map(|name| {
                let text = fs::read_to_string(bus.join(&name).join("resource")).ok()?;
                let have = text.trim_end().strip_prefix("0x")?;
                (u64::from_str_radix(have, 16).ok()? == *address).then_some(())?;
                let disk = entries(&bus.join(&name).join("block")).into_iter().next()?;
                Some(format!("/dev/{disk}"))
            })
        }
    }
}

/// Sorted, so that the same guest gives the same answer.
fn entries(folder: &Path) -> Vec<String> {
    let read = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = read
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn file(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn devices_are_found_by_every_address() {
        let sys = tempfile::tempdir().unwrap();
        let sys = sys.path();
        file(
            sys,
            "bus/pci/devices/0000:00:05.0/virtio2/block/vda/size",
            "8\n",
        );
        file(
            sys,
            "bus/pci/devices/0000:00:06.0/virtio3/net/eth1/mtu",
            "1500\n",
        );
        file(sys, "class/block/vdb/serial", "root-1\n");
        file(sys, "bus/virtio/devices/virtio4/device", "0x001a\n");
        file(sys, "bus/nd/devices/namespace0.0/resource", "0x140000000\n");
        file(sys, "bus/nd/devices/namespace0.0/block/pmem0/size", "8\n");
        for (at, name) in [
            (At::Pci("0000:00:05.0".into()), Some("/dev/vda")),
            (At::Pci("0000:00:06.0".into()), Some("eth1")),
            (At::Pci("0000:00:07.0".into()), None),
            (At::DiskSerial("root-1".into()), Some("/dev/vdb")),
            (At::DiskSerial("root".into()), None),
            (At::FsTag("share".into()), Some("share")),
            (At::Pmem(0x1_4000_0000), Some("/dev/pmem0")),
        ] {
            assert_eq!(find(&at, sys).as_deref(), name, "{at:?}");
        }
    }

    #[test]
    fn waiting_has_an_end_and_a_ring_is_heard() {
        let devices = Arc::new(Devices::default());
        let address = DeviceAddress {
            at: Some(At::DiskSerial("no such disk".into())),
        };
        let ringing = Arc::clone(&devices);
        let bell = std::thread::spawn(move || ringing.ring());
        let failure = devices
            .wait(&address, Duration::from_millis(50))
            .unwrap_err();
        assert_eq!(failure.code, code::DEADLINE);
        bell.join().unwrap();
        let escape = DeviceAddress {
            at: Some(At::Pci("../../../etc".into())),
        };
        let failure = devices.wait(&escape, Duration::from_secs(9)).unwrap_err();
        assert_eq!(failure.code, code::INVALID);
    }
}
