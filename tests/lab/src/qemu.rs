//! The emulator's command line. Pure: the files it names are passed in.

use std::path::PathBuf;

use crate::spec::{Arch, Kit, LabSpec};
use crate::wire::{CTL, ERR, IN, OUT, TAG_OUT, TAG_ROOT};

/// File descriptors that the emulator inherits.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fds {
    pub(crate) initramfs: i32,
    pub(crate) ctl: i32,
    pub(crate) out: i32,
    pub(crate) err: i32,
    pub(crate) stdin: i32,
}

/// The lab kernel's command line. A driver that probes for absent hardware waits in vain, in
/// emulation ten times as long; KASLR would make icount runs differ.
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 nokaslr mitigations=off audit=0 apparmor=0 \
    random.trust_cpu=on tsc=reliable no_timer_check i8042.noprobe=1 cryptomgr.notests \
    rcupdate.rcu_expedited=1";

/// Everything TCG can emulate but XSAVE: it does not intercept XSETBV for nested guests, whose
/// kernels then find sizes that do not fit what they enabled ("XSAVE consistency problem").
const LAB_CPU: &str = "max,xsave=off";

pub(crate) const fn program(arch: Arch) -> &'static str {
    match arch {
        Arch::X86_64 => "qemu-system-x86_64",
    }
}

/// What the lab's kernel said.
pub(crate) fn console_log(spec: &LabSpec) -> PathBuf {
    spec.out.join("console.log")
}

/// Arguments for [`program`].
pub(crate) fn arguments(kit: &Kit, spec: &LabSpec, fds: Fds) -> Vec<String> {
    let mut args = Args(Vec::new());
    args.flag("-no-user-config")
        .flag("-nodefaults")
        .flag("-no-reboot")
        .pair("-display", "none");
    match spec.arch {
        Arch::X86_64 => {
            let irqchip = if spec.iommu {
                ",kernel-irqchip=split"
            } else {
                ""
            };
            args.pair("-machine", format!("q35,vmport=off{irqchip}"))
                .pair("-cpu", LAB_CPU);
        }
    }
    if spec.icount {
        args.pair("-accel", "tcg,thread=single")
            .pair("-icount", "shift=0,sleep=off");
        // The emulated CPU's random numbers repeat too.
        args.pair("-rtc", "clock=vm").pair("-seed", 1);
    } else {
        args.pair("-accel", "tcg,thread=multi");
    }
    args.pair("-smp", spec.cpus)
        .pair("-m", format!("{}M", spec.memory_mib));
    if spec.iommu {
        args.pair("-device", "intel-iommu,intremap=on,caching-mode=on");
    }

    args.pair("-kernel", kit.kernel.display());
    args.pair("-initrd", format!("/proc/self/fd/{}", fds.initramfs));
    args.pair("-append", cmdline(spec));
    args.pair(
        "-chardev",
        format!("file,id=console,path={}", console_log(spec).display()),
    );
    args.pair("-serial", "chardev:console");

    // Without an ioeventfd a port is served by the CPU's own thread: at once, in virtual time.
    let eventfd = if spec.icount { ",ioeventfd=off" } else { "" };
    args.pair(
        "-device",
        format!("virtio-serial-pci,id=ports,max_ports=8{eventfd}"),
    );
    for (name, fd) in [
        (CTL, fds.ctl),
        (OUT, fds.out),
        (ERR, fds.err),
        (IN, fds.stdin),
    ] {
        args.pair("-chardev", format!("socket,id={name},fd={fd}"));
        args.pair(
            "-device",
            format!("virtserialport,bus=ports.0,chardev={name},name={name}"),
        );
    }
    args.pair(
        "-virtfs",
        format!(
            "local,path=/,security_model=none,readonly=on,multidevs=remap,mount_tag={TAG_ROOT}"
        ),
    );
    let out = spec.out.display();
    args.pair(
        "-virtfs",
        format!("local,path={out},security_model=none,multidevs=remap,mount_tag={TAG_OUT}"),
    );
    for (n, device) in spec.devices.iter().enumerate() {
        // A port each: a group of its own behind the IOMMU, and hot-pluggable.
        args.pair(
            "-device",
            format!("pcie-root-port,id=lab{n},chassis={}", n + 1),
        );
        args.pair("-device", format!("{device},bus=lab{n}"));
    }
    args.0.extend(spec.qemu_args.iter().cloned());
    args.0
}

fn cmdline(spec: &LabSpec) -> String {
    let mut line = CMDLINE.to_owned();
    if spec.iommu {
        line.push_str(" intel_iommu=on");
    }
    if spec.icount {
        // Address-space layout decides page-table and cache work: the same each time.
        line.push_str(" norandmaps");
    }
    if spec.hugepages > 0 {
        line.push_str(&format!(" hugepages={}", spec.hugepages));
    }
    for word in &spec.kernel_args {
        line.push(' ');
        line.push_str(word);
    }
    line
}

struct Args(Vec<String>);

impl Args {
    fn flag(&mut self, name: &str) -> &mut Args {
        self.0.push(name.to_owned());
        self
    }

    fn pair(&mut self, name: &str, value: impl std::fmt::Display) -> &mut Args {
        self.0.push(name.to_owned());
        self.0.push(format!("{value}"));
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(change: impl FnOnce(&mut LabSpec)) -> String {
        let kit = Kit {
            kernel: "/k/vmlinux".into(),
            release: "6.12".into(),
            modules: "/k/modules".into(),
            init: Vec::new(),
        };
        let mut spec = LabSpec::new("/w".into(), "/w/out".into(), vec!["true".to_owned()]);
        change(&mut spec);
        let fds = Fds {
            initramfs: 10,
            ctl: 12,
            out: 13,
            err: 14,
            stdin: 15,
        };
        arguments(&kit, &spec, fds).join(" ")
    }

    #[test]
    fn a_plain_lab_has_one_cpu_and_threads() {
        let line = line(|_| ());
        assert!(
            line.contains("-accel tcg,thread=multi -smp 1 -m 2048M"),
            "{line}"
        );
        assert!(line.contains("-initrd /proc/self/fd/10"));
        assert!(line.contains("socket,id=out,fd=13"));
        assert!(!line.contains("icount") && !line.contains("iommu"));
    }

    #[test]
    fn virtual_time_needs_one_thread_and_its_own_clock() {
        let line = line(|s| s.icount = true);
        assert!(
            line.contains(
                "-accel tcg,thread=single -icount shift=0,sleep=off -rtc clock=vm -seed 1 "
            )
        );
    }

    #[test]
    fn an_iommu_brings_its_interrupt_chip_and_kernel_flag() {
        let line = line(|s| s.iommu = true);
        assert!(line.contains("q35,vmport=off,kernel-irqchip=split"));
        assert!(line.contains("-device intel-iommu,intremap=on,caching-mode=on"));
        assert!(line.contains("intel_iommu=on"));
    }

    #[test]
    fn each_device_sits_behind_its_own_port() {
        let line = line(|s| s.devices = vec!["edu".to_owned(), "nvme,serial=x".to_owned()]);
        assert!(line.contains("pcie-root-port,id=lab0,chassis=1 -device edu,bus=lab0"));
        assert!(line.contains("pcie-root-port,id=lab1,chassis=2 -device nvme,serial=x,bus=lab1"));
    }

    #[test]
    fn huge_pages_are_set_aside_at_boot() {
        assert!(line(|s| s.hugepages = 64).contains(" hugepages=64"));
        assert!(line(|s| s.kernel_args = vec!["a=1".into(), "b".into()]).contains(" a=1 b"));
    }
}
