//! What is compared: a VMM, a kernel in one of its forms, and the command line that boots it.
//!
//! All guests have one vCPU, 256 MiB, a serial port as console and nothing they do not need. QEMU
//! is given what its documentation of `microvm` recommends for a short boot, but for the clock:
//! without it Linux spends 4 s on finding that there is none. `q35` has no default devices.

use std::path::{Path, PathBuf};

use crate::kit::{Kernel, Kit};

/// Guest RAM.
pub(crate) const RAM_MIB: u64 = 256;
/// Init marks its start on port 0x80 by itself, then does what comes after `--`.
const CMDLINE: &str = "console=ttyS0 panic=-1 mitigations=off quiet";

/// Which VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Vmm {
    Testudo,
    /// With the guest's RAM in 2-MiB pages that the host has set aside.
    TestudoHugetlb,
    QemuMicrovm,
    QemuQ35,
    Firecracker,
    CloudHypervisor,
}

impl Vmm {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Testudo => "testudo-vmm",
            Self::TestudoHugetlb => "testudo-vmm, hugetlb",
            Self::QemuMicrovm => "QEMU microvm",
            Self::QemuQ35 => "QEMU q35",
            Self::Firecracker => "Firecracker",
            Self::CloudHypervisor => "Cloud Hypervisor",
        }
    }
}

/// One thing to measure.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    pub(crate) vmm: Vmm,
    program: PathBuf,
    pub(crate) kernel_name: &'static str,
    kernel: PathBuf,
    initramfs: PathBuf,
}

/// What the guest does after its mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Then {
    PowerOff,
    /// Idle, so that the VMM's memory can be looked at.
    Sleep,
}

impl Case {
    pub(crate) fn name(&self) -> String {
        format!("{}, {}", self.vmm.name(), self.kernel_name)
    }

    /// The VMM's binary.
    pub(crate) fn program(&self) -> &Path {
        &self.program
    }

    /// Its arguments; the guest's console goes to the file `console`, or to stdout, which
    /// [`Self::console_on_stdout`] says.
    pub(crate) fn arguments(&self, then: Then, console: &Path) -> anyhow::Result<Vec<String>> {
        let (options, then) = match (then, self.vmm) {
            (Then::Sleep, _) => ("", "sleep-forever"),
            // It has no power button to press: a guest ends by a reset.
            (Then::PowerOff, Vmm::Firecracker) => (" reboot=k", "reboot=kbd"),
            (Then::PowerOff, _) => ("", "poweroff"),
        };
        let cmdline = format!("{CMDLINE}{options} -- {then}");
        let kernel = self.kernel.display().to_string();
        let initramfs = self.initramfs.display().to_string();
        let config = console.with_extension("json");
        let console = format!("file:{}", console.display());
        let cloud_hypervisor_size = format!("size={RAM_MIB}M");
        let cloud_hypervisor_serial = console.replacen(':', "=", 1);
        let mut words: Vec<&str> = Vec::new();
        let size = match self.vmm {
            Vmm::TestudoHugetlb => format!("{RAM_MIB}M,hugepages=2M"),
            _ => format!("{RAM_MIB}M"),
        };
        match self.vmm {
            Vmm::Testudo | Vmm::TestudoHugetlb => {
                words.extend([
                    "run",
                    "--kernel",
                    &kernel,
                    "--initrd",
                    &initramfs,
                    "--cmdline",
                    &cmdline,
                ]);
                words.extend(["--cpus", "1", "--memory", &size, "--console", &console]);
            }
            Vmm::QemuMicrovm | Vmm::QemuQ35 => {
                let machine = match self.vmm {
                    Vmm::QemuMicrovm => {
                        "microvm,accel=kvm,x-option-roms=off,pit=off,pic=off,rtc=on,isa-serial=on,auto-kernel-cmdline=off"
                    }
                    _ => {
                        "q35,accel=kvm,smbus=off,sata=off,usb=off,graphics=off,hpet=off,vmport=off"
                    }
                };
                words.extend(["-M", machine, "-cpu", "host", "-m", &size, "-smp", "1"]);
                words.extend([
                    "-nodefaults",
                    "-no-user-config",
                    "-display",
                    "none",
                    "-no-reboot",
                ]);
                words.extend([
                    "-kernel", &kernel, "-initrd", &initramfs, "-append", &cmdline,
                ]);
                words.extend(["-serial", &console]);
                // Patching the guest's TPR accesses, for the sake of old Windows, makes QEMU write
                // the guest's segments back, with the busy bit in the task register that KVM adds
                // on AMD; an emulated host then refuses the guest's user space its I/O ports.
                if self.vmm == Vmm::QemuQ35 {
                    words.extend(["-global", "apic-common.vapic=off"]);
                }
            }
            Vmm::CloudHypervisor => {
                words.extend(["--kernel", &kernel, "--initramfs", &initramfs]);
                words.extend(["--cmdline", &cmdline, "--cpus", "boot=1", "--memory"]);
                words.extend([
                    cloud_hypervisor_size.as_str(),
                    "--serial",
                    &cloud_hypervisor_serial,
                ]);
                words.extend(["--console", "off", "--rng", "src=/dev/urandom"]);
            }
            Vmm::Firecracker => {
                let machine = serde_json::json!({
                    "boot-source": {
                        "kernel_image_path": kernel,
                        "initrd_path": initramfs,
                        "boot_args": cmdline,
                    },
                    "drives": [],
                    "machine-config": { "vcpu_count": 1, "mem_size_mib": RAM_MIB },
                });
                std::fs::write(&config, machine.to_string())?;
                let config = config.display().to_string();
                return Ok(["--no-api", "--config-file", &config]
                    .map(str::to_owned)
                    .into());
            }
        }
        Ok(words.into_iter().map(str::to_owned).collect())
    }

    /// The VMM has no other place for the guest's console than its standard output.
    pub(crate) fn console_on_stdout(&self) -> bool {
        self.vmm == Vmm::Firecracker
    }
}

/// Every case there is something to measure for.
pub(crate) fn all(kit: &Kit) -> Vec<Case> {
    let mut kernels: Vec<(&'static str, &'static str, &Kernel)> =
        vec![("stock vmlinux", "stock bzImage", &kit.stock)];
    if let Some(own) = &kit.own {
        kernels.push(("own vmlinux", "own bzImage", own));
    }
    let programs = [
        (Vmm::Testudo, &kit.vmm),
        (Vmm::TestudoHugetlb, &kit.vmm),
        (Vmm::QemuMicrovm, &kit.qemu),
        (Vmm::QemuQ35, &kit.qemu),
        (Vmm::Firecracker, &kit.firecracker),
        (Vmm::CloudHypervisor, &kit.cloud_hypervisor),
    ];
    let mut cases = Vec::new();
    for (vmlinux_name, bzimage_name, kernel) in kernels {
        for (name, file) in [
            (vmlinux_name, &kernel.vmlinux),
            (bzimage_name, &kernel.bzimage),
        ] {
            for (vmm, program) in &programs {
                let Some(program) = program else { continue };
                cases.push(Case {
                    vmm: *vmm,
                    program: program.clone(),
                    kernel_name: name,
                    kernel: file.clone(),
                    initramfs: kit.initramfs.clone(),
                });
            }
        }
    }
    cases
}
