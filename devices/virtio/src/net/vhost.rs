//! vhost-net (linux/vhost.h): the calls by which the kernel is given rings, memory and a tap.
//!
//! Called on the threads of a device's workers and, for the memory table, on the thread that changes
//! guest RAM.
#![expect(unsafe_code, reason = "ioctls of /dev/vhost-net")]

use std::error::Error as StdError;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use testudo_memory::{RamListener, RamRange, RamView};
use thiserror::Error;
use vm_memory::{GuestAddress, GuestMemory, Permissions};
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref};

use super::offload::bit;
use crate::model::{ActiveQueue, features};
use crate::queue::QueueFault;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

mod number {
    use std::os::raw::c_uint;

    use super::{VringAddress, VringFile, VringState};

    const VHOST: c_uint = 0xaf;

    vmm_sys_util::ioctl_ior_nr!(get_features, VHOST, 0x00, u64);
    vmm_sys_util::ioctl_iow_nr!(set_features, VHOST, 0x00, u64);
    vmm_sys_util::ioctl_io_nr!(set_owner, VHOST, 0x01);
    vmm_sys_util::ioctl_iow_nr!(set_mem_table, VHOST, 0x03, u64);
    vmm_sys_util::ioctl_iow_nr!(set_vring_num, VHOST, 0x10, VringState);
    vmm_sys_util::ioctl_iow_nr!(set_vring_addr, VHOST, 0x11, VringAddress);
    vmm_sys_util::ioctl_iow_nr!(set_vring_base, VHOST, 0x12, VringState);
    vmm_sys_util::ioctl_iowr_nr!(get_vring_base, VHOST, 0x12, VringState);
    vmm_sys_util::ioctl_iow_nr!(set_vring_kick, VHOST, 0x20, VringFile);
    vmm_sys_util::ioctl_iow_nr!(set_vring_call, VHOST, 0x21, VringFile);
    vmm_sys_util::ioctl_iow_nr!(set_vring_err, VHOST, 0x22, VringFile);
    vmm_sys_util::ioctl_iow_nr!(net_set_backend, VHOST, 0x30, VringFile);
}

/// `struct vhost_vring_state`.
#[repr(C)]
struct VringState {
    index: u32,
    value: u32,
}

/// `struct vhost_vring_file`; -1 is no file.
#[repr(C)]
struct VringFile {
    index: u32,
    fd: RawFd,
}

/// `struct vhost_vring_addr`.
#[repr(C)]
struct VringAddress {
    index: u32,
    flags: u32,
    descriptors: u64,
    used: u64,
    available: u64,
    log: u64,
}

/// What of the rings and of the header vhost must know of.
const RING_FEATURES: u64 = features::COMMON | bit(VIRTIO_NET_F_MRG_RXBUF);

/// The kernel's data path cannot be used.
#[derive(Debug, Error)]
pub enum VhostError {
    /// A call failed.
    #[error("vhost-net: {call}")]
    Call {
        /// Which.
        call: &'static str,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// The kernel's vhost-net is too old.
    #[error("vhost-net of this kernel lacks virtio 1 (it offers {features:#x})")]
    Features {
        /// What it offers.
        features: u64,
    },
    /// The tap refused.
    #[error("the tap cannot be set up")]
    Wire(#[source] io::Error),
    /// A ring lies across two ranges of guest RAM.
    #[error("the rings of queue {index} are not contiguous in this process")]
    Scattered {
        /// The queue.
        index: u16,
    },
    /// What vhost left behind is no ring.
    #[error(transparent)]
    Queue(#[from] QueueFault),
}

/// One `/dev/vhost-net`: the data path of one queue pair.
#[derive(Debug, Clone)]
pub struct VhostNet {
    fd: Arc<OwnedFd>,
    features: u64,
}

fn call(call: &'static str, answer: libc::c_int) -> Result<(), VhostError> {
    if answer < 0 {
        let source = io::Error::last_os_error();
        return Err(VhostError::Call { call, source });
    }
    Ok(())
}

impl VhostNet {
    /// Takes `fd`, an open `/dev/vhost-net` that nobody has used, for this process's memory.
    pub fn new(fd: OwnedFd) -> Result<Self, VhostError> {
        // SAFETY: VHOST_SET_OWNER takes no argument.
        call("VHOST_SET_OWNER", unsafe {
            ioctl(&fd, number::set_owner())
        })?;
        let mut features = 0_u64;
        // SAFETY: VHOST_GET_FEATURES fills a u64.
        call("VHOST_GET_FEATURES", unsafe {
            ioctl_with_mut_ref(&fd, number::get_features(), &mut features)
        })?;
        if features & features::VERSION_1 == 0 {
            return Err(VhostError::Features { features });
        }
        Ok(Self {
            fd: Arc::new(fd),
            features,
        })
    }

    /// Features of rings and headers that must not be offered because vhost lacks them.
    pub(super) fn missing(&self) -> u64 {
        RING_FEATURES & !self.features
    }

    pub(super) fn set_features(&self, negotiated: u64) -> Result<(), VhostError> {
        let features = negotiated & RING_FEATURES & self.features;
        // SAFETY: VHOST_SET_FEATURES reads a u64.
        call("VHOST_SET_FEATURES", unsafe {
            ioctl_with_ref(&*self.fd, number::set_features(), &features)
        })
    }

    /// Gives ring `index` (0 receives, 1 transmits) to the kernel.
    pub(super) fn set_ring(
        &self,
        index: u32,
        queue: &ActiveQueue,
        ram: &RamView,
        error: RawFd,
    ) -> Result<(), VhostError> {
        let state = |value: u16| VringState {
            index,
            value: value.into(),
        };
        let (next, _) = queue.queue.positions();
        let (size, base) = (state(queue.queue.size()), state(next));
        // SAFETY: VHOST_SET_VRING_NUM reads a `struct vhost_vring_state`.
        call("VHOST_SET_VRING_NUM", unsafe {
            ioctl_with_ref(&*self.fd, number::set_vring_num(), &size)
        })?;
        // SAFETY: VHOST_SET_VRING_BASE reads a `struct vhost_vring_state`.
        call("VHOST_SET_VRING_BASE", unsafe {
            ioctl_with_ref(&*self.fd, number::set_vring_base(), &base)
        })?;
        let areas = queue.queue.areas();
        let scattered = VhostError::Scattered { index: queue.index };
        let address = |(at, len)| host_address(ram, at, len);
        let (Some(descriptors), Some(available), Some(used)) = (
            address(areas.descriptors),
            address(areas.driver),
            address(areas.device),
        ) else {
            return Err(scattered);
        };
        let address = VringAddress {
            index,
            flags: 0,
            descriptors,
            used,
            available,
            log: 0,
        };
        // SAFETY: VHOST_SET_VRING_ADDR reads a `struct vhost_vring_addr`. The addresses are guest
        // RAM, mapped for the life of the process, and of the lengths that the ring's size implies;
        // the kernel checks each access to them.
        call("VHOST_SET_VRING_ADDR", unsafe {
            ioctl_with_ref(&*self.fd, number::set_vring_addr(), &address)
        })?;
        let interrupt = queue.interrupt.event().map_or(-1, AsRawFd::as_raw_fd);
        let kick = queue.kick.as_raw_fd();
        self.set_events(index, [kick, interrupt, error])
    }

    /// Kick, interrupt and error of ring `index`; -1 is none.
    fn set_events(
        &self,
        index: u32,
        [kick, interrupt, error]: [RawFd; 3],
    ) -> Result<(), VhostError> {
        let set = |name, number, fd| {
            // SAFETY: these calls read a `struct vhost_vring_file`; the kernel takes its own
            // reference to the eventfd.
            call(name, unsafe {
                ioctl_with_ref(&*self.fd, number, &VringFile { index, fd })
            })
        };
        set("VHOST_SET_VRING_ERR", number::set_vring_err(), error)?;
        set("VHOST_SET_VRING_CALL", number::set_vring_call(), interrupt)?;
        set("VHOST_SET_VRING_KICK", number::set_vring_kick(), kick)
    }

    /// Lets ring `index` reach the tap `wire`, or none: then what was under way has ended when this
    /// returns.
    pub(super) fn set_backend(&self, index: u32, wire: RawFd) -> Result<(), VhostError> {
        let file = VringFile { index, fd: wire };
        // SAFETY: VHOST_NET_SET_BACKEND reads a `struct vhost_vring_file`.
        call("VHOST_NET_SET_BACKEND", unsafe {
            ioctl_with_ref(&*self.fd, number::net_set_backend(), &file)
        })
    }

    /// Takes ring `index` back from the kernel; returns where in the available ring it stopped. It
    /// has no backend any more.
    pub(super) fn take_ring(&self, index: u32) -> Result<u16, VhostError> {
        let mut state = VringState { index, value: 0 };
        // SAFETY: VHOST_GET_VRING_BASE reads and fills a `struct vhost_vring_state`.
        call("VHOST_GET_VRING_BASE", unsafe {
            ioctl_with_mut_ref(&*self.fd, number::get_vring_base(), &mut state)
        })?;
        self.set_events(index, [-1, -1, -1])?;
        let [low, high, ..] = state.value.to_le_bytes();
        Ok(u16::from_le_bytes([low, high]))
    }

    fn set_memory(&self, ranges: &[RamRange]) -> Result<(), VhostError> {
        let table = memory_table(ranges);
        // SAFETY: VHOST_SET_MEM_TABLE reads a `struct vhost_memory`, which `table` is laid out as,
        // with as many regions behind it as it says. They are guest RAM, mapped for the life of the
        // process, which Rust code keeps no references into.
        call("VHOST_SET_MEM_TABLE", unsafe {
            ioctl_with_ptr(&*self.fd, number::set_mem_table(), table.as_ptr())
        })
    }
}

fn host_address(ram: &RamView, at: GuestAddress, len: usize) -> Option<u64> {
    let mut slices = ram.get_slices(at, len, Permissions::Write).ok()?;
    let slice = slices.next()?.ok()?;
    let whole = slice.len() == len;
    let address = slice.ptr_guard_mut().as_ptr().expose_provenance();
    u64::try_from(address).ok().filter(|_| whole)
}

/// `struct vhost_memory`: the number of regions, then four words for each.
fn memory_table(ranges: &[RamRange]) -> Vec<u64> {
    let count = u32::try_from(ranges.len()).unwrap_or(u32::MAX);
    let [c0, c1, c2, c3] = count.to_ne_bytes();
    let mut table = vec![u64::from_ne_bytes([c0, c1, c2, c3, 0, 0, 0, 0])];
    for range in ranges {
        let host = u64::try_from(range.host).unwrap_or_default();
        table.extend([range.gpa, range.size, host, 0]);
    }
    table
}

/// Tells the kernel's data paths of one device where guest RAM is.
pub struct VhostMemory {
    paths: Vec<VhostNet>,
    ranges: Vec<RamRange>,
}

type Refusal = Box<dyn StdError + Send + Sync>;

impl VhostMemory {
    /// For `paths`, which know of no memory yet.
    pub fn new(paths: Vec<VhostNet>) -> Self {
        Self {
            paths,
            ranges: Vec::new(),
        }
    }

    /// Sets `next` everywhere or nowhere.
    fn change(&mut self, next: Vec<RamRange>) -> Result<(), Refusal> {
        for (done, path) in self.paths.iter().enumerate() {
            if let Err(e) = path.set_memory(&next) {
                for back in self.paths.iter().take(done) {
                    back.set_memory(&self.ranges)?;
                }
                return Err(e.into());
            }
        }
        self.ranges = next;
        Ok(())
    }
}

impl RamListener for VhostMemory {
    fn name(&self) -> &'static str {
        "vhost-net"
    }

    fn added(&mut self, range: &RamRange) -> Result<(), Refusal> {
        let mut next = self.ranges.clone();
        next.push(range.clone());
        self.change(next)
    }

    fn removed(&mut self, range: &RamRange) -> Result<(), Refusal> {
        let mut next = self.ranges.clone();
        next.retain(|r| r.gpa != range.gpa);
        self.change(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// linux/vhost_types.h: nregions, padding, then address, size, user address and flags of each.
    #[test]
    fn the_memory_table_is_laid_out_as_the_kernel_reads_it() {
        let range = |gpa, size, host| RamRange {
            gpa,
            size,
            host,
            file: None,
        };
        assert_eq!(memory_table(&[]), [0]);
        let table = memory_table(&[range(0, 0x8000, 0x7f00), range(1 << 32, 0x1000, 0x9000)]);
        let [n, rest @ ..] = &*table else { panic!() };
        assert_eq!(n.to_ne_bytes()[..4], 2_u32.to_ne_bytes());
        assert_eq!(rest, [0, 0x8000, 0x7f00, 0, 1 << 32, 0x1000, 0x9000, 0]);
    }

    /// The numbers as linux/vhost.h has them on x86_64 and aarch64.
    #[test]
    fn call_numbers() {
        assert_eq!(number::set_owner(), 0xaf01);
        assert_eq!(number::set_mem_table(), 0x4008_af03);
        assert_eq!(number::set_vring_addr(), 0x4028_af11);
        assert_eq!(number::get_vring_base(), 0xc008_af12);
        assert_eq!(number::net_set_backend(), 0x4008_af30);
    }
}
