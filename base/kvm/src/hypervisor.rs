//! `/dev/kvm` and the VM made from it.
#![expect(
    unsafe_code,
    reason = "takes over a descriptor handed in by the caller"
)]

use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvm_ioctls::{Kvm, VmFd};
use thiserror::Error;

use crate::vcpu::Vcpu;

/// The only KVM API version there is (Linux Documentation/virt/kvm/api.rst, 4.1).
const API_VERSION: i32 = 12;

/// KVM cannot be used.
#[derive(Debug, Error)]
pub enum OpenError {
    /// There is no such device.
    #[error(
        "{} does not exist: load kvm_amd or kvm_intel, enable virtualisation in the firmware, \
         or (inside a VM) enable nested virtualisation", path.display()
    )]
    Missing {
        /// The device.
        path: PathBuf,
    },
    /// The device may not be opened by this user.
    #[error(
        "{} may not be opened by this user: add the user to the group that owns it (usually kvm)",
        path.display()
    )]
    Denied {
        /// The device.
        path: PathBuf,
    },
    /// Opening failed for another reason.
    #[error("cannot open {}", path.display())]
    Open {
        /// The device.
        path: PathBuf,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// What was opened is not KVM, or a KVM of another age.
    #[error("{what} is not a usable KVM device: API version {version}, expected {API_VERSION}")]
    Version {
        /// What was opened.
        what: String,
        /// The version it reports, −1 for a device that is not KVM.
        version: i32,
    },
}

/// A VM or a vCPU could not be created.
#[derive(Debug, Error)]
pub enum VmError {
    /// The VM.
    #[error("KVM cannot create a VM; is another hypervisor using the processor?")]
    Vm(#[source] io::Error),
    /// A vCPU.
    #[error("KVM cannot create vCPU {id}")]
    Vcpu {
        /// Its id (the APIC id on x86_64).
        id: u64,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// The second mapping of a vCPU's run page, by which other threads kick it.
    #[error("cannot map the run page of vCPU {id}")]
    RunPage {
        /// Its id.
        id: u64,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
}

/// An open KVM device.
pub struct Hypervisor {
    kvm: Kvm,
}

impl Hypervisor {
    /// Opens the KVM device at `path`, usually `/dev/kvm`.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|source| {
                let path = path.to_path_buf();
                match source.kind() {
                    io::ErrorKind::NotFound => OpenError::Missing { path },
                    io::ErrorKind::PermissionDenied => OpenError::Denied { path },
                    _ => OpenError::Open { path, source },
                }
            })?;
        Self::check(file.into(), path.display().to_string())
    }

    /// Uses a descriptor of a KVM device opened by somebody else.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, OpenError> {
        Self::check(fd, "the KVM descriptor".to_owned())
    }

    fn check(fd: OwnedFd, what: String) -> Result<Self, OpenError> {
        // SAFETY: the descriptor is open and ownership moves from `OwnedFd` to `Kvm`.
        let kvm = unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) };
        match kvm.get_api_version() {
            API_VERSION => Ok(Self { kvm }),
            version => Err(OpenError::Version { what, version }),
        }
    }

    /// The device, for capability queries.
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// A new, empty VM.
    pub fn create_vm(&self) -> Result<Vm, VmError> {
        loop {
            match self.kvm.create_vm() {
                Ok(fd) => return Ok(Vm { fd: Arc::new(fd) }),
                Err(e) if e.errno() == libc::EINTR => {}
                Err(e) => return Err(VmError::Vm(e.into())),
            }
        }
    }
}

/// One VM. Clones share it; the kernel frees it when the last clone, vCPU and guard are gone.
#[derive(Clone)]
pub struct Vm {
    fd: Arc<VmFd>,
}

impl Vm {
    /// The descriptor, for what `arch` sets up.
    pub fn fd(&self) -> &Arc<VmFd> {
        &self.fd
    }

    /// A new vCPU. On x86_64 `id` is its APIC id.
    pub fn create_vcpu(&self, id: u64) -> Result<Vcpu, VmError> {
        let fd = self.fd.create_vcpu(id).map_err(|e| VmError::Vcpu {
            id,
            source: e.into(),
        })?;
        Vcpu::new(fd, self.fd.run_size()).map_err(|source| VmError::RunPage { id, source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_names_the_remedy() {
        let error = Hypervisor::open(Path::new("/nonexistent/kvm"))
            .err()
            .unwrap();
        assert!(matches!(error, OpenError::Missing { .. }));
        assert!(
            error.to_string().contains("load kvm_amd or kvm_intel"),
            "{error}"
        );
    }

    #[test]
    fn another_device_is_not_kvm() {
        let error = Hypervisor::open(Path::new("/dev/null")).err().unwrap();
        assert_eq!(
            error.to_string(),
            "/dev/null is not a usable KVM device: API version -1, expected 12"
        );
    }
}
