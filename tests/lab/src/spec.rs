//! What one asks of the lab, checked before anything is started.

use std::path::PathBuf;
use std::time::Duration;

/// An architecture that the lab can emulate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arch {
    /// AMD SVM with nested paging.
    X86_64,
}

impl std::str::FromStr for Arch {
    type Err = SpecError;

    fn from_str(name: &str) -> Result<Arch, SpecError> {
        match name {
            "x86_64" | "amd64" => Ok(Arch::X86_64),
            other => Err(SpecError::Arch(other.to_owned())),
        }
    }
}

/// A request that no lab can meet.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SpecError {
    /// Not emulated here.
    #[error("the lab cannot emulate {0} yet: x86_64 is the one architecture it has")]
    Arch(String),
    /// Virtual time follows one instruction stream.
    #[error("--icount counts the instructions of one CPU, and {0} were asked for: drop --cpus")]
    IcountCpus(u32),
    /// Out of range.
    #[error("a lab has 1 to 255 CPUs, not {0}")]
    Cpus(u32),
    /// Too little to boot in.
    #[error("a lab needs 512 MiB of memory at the least, not {0} MiB")]
    Memory(u64),
    /// Huge pages leave no room.
    #[error(
        "{pages} huge pages of 2 MiB leave less than 512 MiB of the lab's {memory_mib} MiB: raise --memory"
    )]
    Hugepages {
        /// Asked for.
        pages: u64,
        /// The lab's memory.
        memory_mib: u64,
    },
    /// Nothing to do.
    #[error("no command: say what to run after `--`")]
    NoCommand,
    /// A path that is relative or not UTF-8.
    #[error("{} is not an absolute UTF-8 path without commas, which the lab needs", .0.display())]
    Path(PathBuf),
}

/// What a lab is made of; built once, used by many.
#[derive(Debug, Clone)]
pub struct Kit {
    /// bzImage, or vmlinux with a PVH entry (starts sooner: nothing to decompress in emulation).
    pub kernel: PathBuf,
    /// `uname -r`.
    pub release: String,
    /// `lib/modules/<release>`, with depmod's index.
    pub modules: PathBuf,
    /// The static binary lab-init itself: it fits this library, and a file may be built anew meanwhile.
    pub init: Vec<u8>,
}

/// One lab and the command it is booted for.
#[derive(Debug, Clone)]
pub struct LabSpec {
    /// What to emulate.
    pub arch: Arch,
    /// CPUs; one is quickest on a small machine.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// An IOMMU with interrupt remapping, so that VFIO works.
    pub iommu: bool,
    /// QEMU `-device` values; each gets a PCIe root port of its own.
    pub devices: Vec<String>,
    /// Further QEMU arguments, as they are.
    pub qemu_args: Vec<String>,
    /// Further words of the lab's kernel command line.
    pub kernel_args: Vec<String>,
    /// Virtual time: one instruction is one nanosecond.
    pub icount: bool,
    /// Huge pages of 2 MiB to set aside at boot.
    pub hugepages: u64,
    /// Files and folders to copy into the lab's memory, at their paths, before the command starts:
    /// reading them then never waits for this machine. Virtual time needs it, for while the lab
    /// waits its clock leaps.
    pub stage: Vec<PathBuf>,
    /// Kernel modules to load beside the usual.
    pub modules: Vec<String>,
    /// From start to end of the command; then the lab is killed.
    pub timeout: Duration,
    /// The command's environment.
    pub env: Vec<(String, String)>,
    /// The command's working directory.
    pub workspace: PathBuf,
    /// Writable in the lab at the same path; the console's log is kept here.
    pub out: PathBuf,
    /// Program and arguments.
    pub command: Vec<String>,
}

impl LabSpec {
    /// One CPU, 2 GiB, ten minutes, nothing else.
    pub fn new(workspace: PathBuf, out: PathBuf, command: Vec<String>) -> LabSpec {
        LabSpec {
            arch: Arch::X86_64,
            cpus: 1,
            memory_mib: 2048,
            iommu: false,
            devices: Vec::new(),
            qemu_args: Vec::new(),
            kernel_args: Vec::new(),
            icount: false,
            hugepages: 0,
            stage: Vec::new(),
            modules: Vec::new(),
            timeout: Duration::from_secs(600),
            env: Vec::new(),
            workspace,
            out,
            command,
        }
    }

    /// Can there be such a lab?
    pub fn check(&self) -> Result<(), SpecError> {
        if self.command.is_empty() {
            return Err(SpecError::NoCommand);
        }
        if !(1..=255).contains(&self.cpus) {
            return Err(SpecError::Cpus(self.cpus));
        }
        if self.icount && self.cpus != 1 {
            return Err(SpecError::IcountCpus(self.cpus));
        }
        if self.memory_mib < 512 {
            return Err(SpecError::Memory(self.memory_mib));
        }
        let huge_mib = self.hugepages.saturating_mul(2);
        if huge_mib.saturating_add(512) > self.memory_mib {
            return Err(SpecError::Hugepages {
                pages: self.hugepages,
                memory_mib: self.memory_mib,
            });
        }
        for path in [&self.workspace, &self.out].into_iter().chain(&self.stage) {
            let fits = path.is_absolute() && path.to_str().is_some_and(|p| !p.contains(','));
            if !fits {
                return Err(SpecError::Path(path.clone()));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> LabSpec {
        LabSpec::new("/w".into(), "/w/out".into(), vec!["true".to_owned()])
    }

    #[test]
    fn only_what_is_emulated_parses() {
        assert_eq!("x86_64".parse(), Ok(Arch::X86_64));
        assert_eq!(
            "s390x".parse::<Arch>(),
            Err(SpecError::Arch("s390x".to_owned()))
        );
    }

    #[test]
    fn impossible_labs_are_refused() {
        assert_eq!(spec().check(), Ok(()));
        assert_eq!(
            LabSpec {
                icount: true,
                cpus: 2,
                ..spec()
            }
            .check(),
            Err(SpecError::IcountCpus(2))
        );
        assert_eq!(
            LabSpec {
                memory_mib: 100,
                ..spec()
            }
            .check(),
            Err(SpecError::Memory(100))
        );
        assert_eq!(
            LabSpec {
                hugepages: 1000,
                ..spec()
            }
            .check(),
            Err(SpecError::Hugepages {
                pages: 1000,
                memory_mib: 2048
            })
        );
        assert_eq!(
            LabSpec {
                command: vec![],
                ..spec()
            }
            .check(),
            Err(SpecError::NoCommand)
        );
        assert_eq!(
            LabSpec {
                out: "/a,b".into(),
                ..spec()
            }
            .check(),
            Err(SpecError::Path("/a,b".into()))
        );
    }
}
