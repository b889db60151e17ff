//! Guest RAM: how it is backed, where it is, and who must see it change.
//!
//! [`GuestRam`] owns the ranges; devices and loaders see them through a [`RamView`], an immutable
//! snapshot that memory hotplug replaces and never edits. Everyone who keeps a second account of
//! guest RAM (KVM memslots, IOMMU mappings, vhost) is a [`RamListener`]: told in order of
//! registration when a range is added, in reverse when it goes.
//!
//! Threads: the control thread alone adds and removes; any thread may take a view.

mod backing;
mod discard;
mod ram;
mod window;

pub use backing::{Backing, HugePages, Prefault, Share};
pub use discard::{Discarded, discard};
pub use ram::{GuestRam, RamError, RamListener, RamRange};
pub use window::{GuestWindows, HostWindow, WindowGuard};

/// An immutable snapshot of guest RAM, as loaders and devices read and write it.
pub type RamView = vm_memory::GuestMemoryMmap<()>;

/// A handle from which a device takes a fresh [`RamView`] for each batch of work.
pub type RamHandle = vm_memory::GuestMemoryAtomic<RamView>;
