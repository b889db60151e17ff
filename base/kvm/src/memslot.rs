//! Memslots: which host memory answers at which guest-physical addresses.
#![expect(unsafe_code, reason = "KVM_SET_USER_MEMORY_REGION")]

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use testudo_memory::{GuestWindows, HostWindow, RamListener, RamRange, WindowGuard};
use thiserror::Error;
use vm_allocator::IdAllocator;

use crate::Vm;

/// A memslot could not be set.
#[derive(Debug, Error)]
pub enum MemslotError {
    /// KVM has no slot left.
    #[error("no KVM memslot left for guest memory at {gpa:#x}: the host offers {limit}")]
    Exhausted {
        /// First guest-physical address.
        gpa: u64,
        /// How many slots the host has.
        limit: usize,
    },
    /// KVM refused.
    #[error("KVM refused memslot {slot} at {gpa:#x} (+{size:#x})")]
    Host {
        /// Slot number.
        slot: u32,
        /// First guest-physical address.
        gpa: u64,
        /// Bytes.
        size: u64,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
}

/// The VM's memslots: a pool of slot numbers and the account of guest RAM in it.
///
/// Clones share the pool, so that guest RAM, BARs of passed-through devices and shared-memory
/// windows draw from one supply.
#[derive(Clone)]
pub struct Memslots {
    vm: Arc<VmFd>,
    pool: Arc<Mutex<IdAllocator>>,
    limit: usize,
}

impl Memslots {
    /// The pool of `vm`, of as many slots as the host offers.
    pub fn new(vm: &Vm) -> Result<Self, MemslotError> {
        // A host that does not say has 32, the historic figure (api.rst, 4.35).
        let limit = usize::try_from(vm.fd().check_extension_int(kvm_ioctls::Cap::NrMemslots))
            .ok()
            .filter(|n| *n > 0)
            .unwrap_or(32);
        let last = u32::try_from(limit.saturating_sub(1)).unwrap_or(u32::MAX);
        let pool =
            IdAllocator::new(0, last).map_err(|_| MemslotError::Exhausted { gpa: 0, limit })?;
        Ok(Self {
            vm: Arc::clone(vm.fd()),
            pool: Arc::new(Mutex::new(pool)),
            limit,
        })
    }

    /// Maps `size` bytes at `host` to guest-physical `gpa` until the guard is dropped. With
    /// `readonly` a guest write exits instead of reaching the memory.
    ///
    /// # Safety
    /// The host memory must stay mapped for as long as the guard lives, and the guest may write to
    /// it at any time: no Rust reference may point into it.
    pub unsafe fn map(
        &self,
        gpa: u64,
        size: u64,
        host: usize,
        readonly: bool,
    ) -> Result<Memslot, MemslotError> {
        let slot = self
            .pool()
            .allocate_id()
            .map_err(|_| MemslotError::Exhausted {
                gpa,
                limit: self.limit,
            })?;
        // Dropping `memslot` on the error path gives the number back.
        let memslot = Memslot {
            owner: self.clone(),
            slot,
            gpa,
        };
        let flags = if readonly { KVM_MEM_READONLY } else { 0 };
        // SAFETY: the caller vouches for the host memory.
        unsafe { memslot.set(size, host, flags) }?;
        Ok(memslot)
    }

    fn pool(&self) -> std::sync::MutexGuard<'_, IdAllocator> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The listener by which guest RAM gets its memslots.
    pub fn listener(&self) -> Box<dyn RamListener> {
        Box::new(RamSlots {
            slots: self.clone(),
            held: BTreeMap::new(),
        })
    }
}

struct Shown {
    /// Dropped before the window it shows.
    #[expect(dead_code, reason = "a guard")]
    slot: Memslot,
    #[expect(dead_code, reason = "the window must outlive the guard")]
    window: Arc<HostWindow>,
}

impl WindowGuard for Shown {}

impl GuestWindows for Memslots {
    fn show(
        &self,
        gpa: u64,
        window: &Arc<HostWindow>,
        readonly: bool,
    ) -> io::Result<Box<dyn WindowGuard>> {
        // SAFETY: a window stays mapped until it is dropped, which the guard prevents; nothing in
        // this process refers into it.
        let slot = unsafe { self.map(gpa, window.len(), window.address(), readonly) };
        Ok(Box::new(Shown {
            slot: slot.map_err(io::Error::other)?,
            window: Arc::clone(window),
        }))
    }
}

/// The guard of one memslot: dropping it takes the memory away from the guest.
pub struct Memslot {
    owner: Memslots,
    slot: u32,
    gpa: u64,
}

impl Memslot {
    /// # Safety
    /// As [`Memslots::map`]; a size of zero deletes the slot and refers to no memory.
    unsafe fn set(&self, size: u64, host: usize, flags: u32) -> Result<(), MemslotError> {
        let region = kvm_userspace_memory_region {
            slot: self.slot,
            flags,
            guest_phys_addr: self.gpa,
            memory_size: size,
            userspace_addr: host as u64,
        };
        // SAFETY: passed on to the caller.
        unsafe { self.owner.vm.set_user_memory_region(region) }.map_err(|e| MemslotError::Host {
            slot: self.slot,
            gpa: self.gpa,
            size,
            source: e.into(),
        })
    }
}

impl Drop for Memslot {
    fn drop(&mut self) {
        // SAFETY: a region of size zero deletes the slot. Deleting one that was never set answers
        // EINVAL, which is what the error path of `map` expects.
        if let Err(error) = unsafe { self.set(0, 0, 0) } {
            log::debug!("{error}");
        }
        let _ = self.owner.pool().free_id(self.slot);
    }
}

struct RamSlots {
    slots: Memslots,
    held: BTreeMap<u64, Memslot>,
}

impl RamListener for RamSlots {
    fn name(&self) -> &'static str {
        "KVM"
    }

    fn added(&mut self, range: &RamRange) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        // SAFETY: the address space of guest RAM stays mapped for the life of the process, and
        // nothing but volatile accesses through vm-memory touches it.
        let slot = unsafe { self.slots.map(range.gpa, range.size, range.host, false) }?;
        self.held.insert(range.gpa, slot);
        Ok(())
    }

    fn removed(
        &mut self,
        range: &RamRange,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        self.held.remove(&range.gpa);
        Ok(())
    }
}
