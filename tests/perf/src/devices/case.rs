//! What is compared: which VMM, with which device, in which of its ways.

use std::path::Path;

use clap::ValueEnum;
use serde::Serialize;

use crate::host::{Host, TAP};
use crate::kit::{Kit, stage};

/// Guest RAM.
pub(crate) const RAM_MIB: u64 = 512;
const CMDLINE: &str = "console=ttyS0 panic=-1 mitigations=off quiet testudo.do=script";

/// Devices that are measured together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Group {
    Blk,
    Net,
    Vsock,
    Fs,
    /// All devices at once, idle: memory of the VMM.
    Pss,
}

impl Group {
    pub(crate) const ALL: [Group; 5] =
        [Group::Blk, Group::Net, Group::Vsock, Group::Fs, Group::Pss];
}

/// One VMM and the way in which it offers the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) enum Case {
    Blk,
    QemuBlkUring,
    QemuBlkThreads,
    Net,
    QemuNet,
    NetVhost,
    QemuNetVhost,
    Vsock,
    QemuVsock,
    Fs,
    QemuFs,
    All,
    QemuAll,
}

/// The cases of a group: ours before what it is compared with.
pub(crate) fn cases(group: Group) -> &'static [Case] {
    match group {
        Group::Blk => &[Case::Blk, Case::QemuBlkUring, Case::QemuBlkThreads],
        Group::Net => &[Case::Net, Case::QemuNet, Case::NetVhost, Case::QemuNetVhost],
        Group::Vsock => &[Case::Vsock, Case::QemuVsock],
        Group::Fs => &[Case::Fs, Case::QemuFs],
        Group::Pss => &[Case::All, Case::QemuAll],
    }
}

impl Case {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Case::Blk => "testudo-vmm",
            Case::QemuBlkUring => "QEMU aio=io_uring",
            Case::QemuBlkThreads => "QEMU aio=threads",
            Case::Net => "testudo-vmm tap",
            Case::QemuNet => "QEMU tap",
            Case::NetVhost => "testudo-vmm vhost-net",
            Case::QemuNetVhost => "QEMU vhost-net",
            Case::Vsock => "testudo-vmm hybrid",
            Case::QemuVsock => "QEMU vhost-vsock",
            Case::Fs => "testudo-vmm in-process",
            Case::QemuFs => "QEMU with virtiofsd",
            Case::All => "testudo-vmm, all devices",
            Case::QemuAll => "QEMU, all devices",
        }
    }

    pub(crate) fn group(self) -> Group {
        match self {
            Case::Blk | Case::QemuBlkUring | Case::QemuBlkThreads => Group::Blk,
            Case::Net | Case::QemuNet | Case::NetVhost | Case::QemuNetVhost => Group::Net,
            Case::Vsock | Case::QemuVsock => Group::Vsock,
            Case::Fs | Case::QemuFs => Group::Fs,
            Case::All | Case::QemuAll => Group::Pss,
        }
    }

    /// What of ours it is compared with; nothing for our own.
    pub(crate) fn compared_with(self) -> Option<Case> {
        match self {
            Case::QemuBlkUring | Case::QemuBlkThreads => Some(Case::Blk),
            Case::QemuNet => Some(Case::Net),
            Case::QemuNetVhost => Some(Case::NetVhost),
            Case::QemuVsock => Some(Case::Vsock),
            Case::QemuFs => Some(Case::Fs),
            Case::QemuAll => Some(Case::All),
            Case::Blk | Case::Net | Case::NetVhost | Case::Vsock | Case::Fs | Case::All => None,
        }
    }

    /// The daemon that has to run before it.
    pub(crate) fn daemon(self, host: &Host) -> Option<Vec<String>> {
        let wanted = matches!(self, Case::QemuFs | Case::QemuAll);
        wanted.then(|| {
            vec![
                format!("--socket-path={}", daemon_socket()),
                "-o".to_owned(),
                format!("source={},cache=auto", host.share.display()),
            ]
        })
    }

    /// The VMM's arguments. Its console is stdin and stdout.
    pub(crate) fn arguments(self, kit: &Kit, host: &Host, initramfs: &Path) -> Vec<String> {
        let kernel = kit.kernel.display().to_string();
        let initramfs = initramfs.display().to_string();
        let mut words = Words(Vec::new());
        if self.compared_with().is_none() {
            words.all(&["run", "--kernel", &kernel, "--initrd", &initramfs]);
            words.all(&["--cmdline", CMDLINE, "--cpus", "1", "--console", "stdio"]);
            let room = if self == Case::All { ",max=1G" } else { "" };
            words.pair("--memory", format!("{RAM_MIB}M{room}"));
            words.pair("--disk", format!("path={},ro", kit.userland.display()));
            self.ours(host, &mut words);
        } else {
            let size = format!("{RAM_MIB}M");
            words.all(&["-M", "q35,accel=kvm,smbus=off,sata=off,usb=off,graphics=off,hpet=off,vmport=off,memory-backend=ram"]);
            // Shared, as virtiofsd wants it; the other cases do not suffer from it.
            words.pair(
                "-object",
                format!("memory-backend-memfd,id=ram,size={size},share=on"),
            );
            words.all(&["-cpu", "host", "-m", &size, "-smp", "1", "-nodefaults"]);
            words.all(&["-no-user-config", "-display", "none", "-no-reboot"]);
            words.all(&[
                "-kernel", &kernel, "-initrd", &initramfs, "-append", CMDLINE,
            ]);
            // vapic: see the boot measurements.
            words.all(&["-serial", "stdio", "-global", "apic-common.vapic=off"]);
            words.pair(
                "-drive",
                format!(
                    "if=none,id=userland,format=raw,readonly=on,file={}",
                    kit.userland.display()
                ),
            );
            words.pair("-device", "virtio-blk-pci,drive=userland".to_owned());
            self.qemus(host, &mut words);
        }
        words.0
    }

    fn ours(self, host: &Host, words: &mut Words) {
        let all = self == Case::All;
        if all || self == Case::Blk {
            words.pair("--disk", format!("path={}", host.disk.display()));
        }
        if all || matches!(self, Case::Net | Case::NetVhost) {
            let vhost = if self == Case::NetVhost { ",vhost" } else { "" };
            words.pair("--net", format!("tap={TAP}{vhost}"));
        }
        if all || self == Case::Vsock {
            words.pair("--vsock", format!("cid=3,socket={}", host.vsock.display()));
        }
        if all || self == Case::Fs {
            words.pair(
                "--fs",
                format!("tag=share,path={},cache=auto", host.share.display()),
            );
        }
        if !all {
            // QEMU has none in these cases, and what a guest reports is faulted in again.
            words.all(&["--balloon", "off"]);
        }
        if all {
            words.all(&["--balloon", "on", "--watchdog", "on", "--rng", "on"]);
            words.pair(
                "--virtio-console",
                format!("file:{}", stage("hvc").display()),
            );
        }
    }

    fn qemus(self, host: &Host, words: &mut Words) {
        let all = self == Case::QemuAll;
        let aio = match self {
            Case::QemuBlkThreads => Some("threads"),
            Case::QemuBlkUring | Case::QemuAll => Some("io_uring"),
            _ => None,
        };
        if let Some(aio) = aio {
            words.pair("-object", "iothread,id=worker".to_owned());
            words.pair(
                "-drive",
                format!(
                    "if=none,id=data,format=raw,aio={aio},file={}",
                    host.disk.display()
                ),
            );
            words.pair(
                "-device",
                "virtio-blk-pci,drive=data,iothread=worker".to_owned(),
            );
        }
        if all || matches!(self, Case::QemuNet | Case::QemuNetVhost) {
            let vhost = if self == Case::QemuNetVhost {
                "on"
            } else {
                "off"
            };
            words.pair(
                "-netdev",
                format!("tap,id=net,ifname={TAP},script=no,downscript=no,vhost={vhost}"),
            );
            words.pair("-device", "virtio-net-pci,netdev=net,romfile=".to_owned());
        }
        if all || self == Case::QemuVsock {
            words.pair("-device", "vhost-vsock-pci,guest-cid=3".to_owned());
        }
        if all || self == Case::QemuFs {
            words.pair("-chardev", format!("socket,id=fs,path={}", daemon_socket()));
            words.pair(
                "-device",
                "vhost-user-fs-pci,chardev=fs,tag=share".to_owned(),
            );
        }
        if all {
            words.pair("-device", "virtio-balloon-pci".to_owned());
            words.pair("-device", "virtio-rng-pci".to_owned());
        }
    }
}

pub(crate) fn daemon_socket() -> String {
    stage("virtiofsd").display().to_string()
}

struct Words(Vec<String>);

impl Words {
    fn all(&mut self, words: &[&str]) {
        self.0.extend(words.iter().map(|w| (*w).to_owned()));
    }

    fn pair(&mut self, name: &str, value: String) {
        self.0.extend([name.to_owned(), value]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_peer_follows_what_it_is_compared_with() {
        for group in Group::ALL {
            let all = cases(group);
            assert!(all.iter().all(|c| c.group() == group));
            for (n, case) in all.iter().enumerate() {
                let ours = case.compared_with();
                assert!(ours.is_none_or(|ours| all[..n].contains(&ours)), "{case:?}");
                assert_eq!(ours.is_none(), case.name().starts_with("testudo-vmm"));
            }
        }
    }
}
