//! Kernel images, initramfs, command line and firmware tables into guest RAM.
//!
//! Everything here happens once per start of a guest, on the control thread, before a vCPU runs,
//! and in this order:
//!
//! ```text
//!  Source ──Image::identify──▶ Image          what the file is; nothing is placed yet
//!  RamView + usable ranges ──▶ Layout         hands out Reservations, which never overlap
//!  GuestBlobs ──write_blobs──▶ guest RAM      tables whose addresses are fixed come first
//!  BootRequest ──x86_64::load──▶ Loaded       kernel, initrd, command line, boot parameters
//! ```
//!
//! Image files, command lines and tables are hostile: every field of a header is bounded before it
//! is used, and a byte of guest RAM is written only through the [`Reservation`] that covers it.
//! How bytes travel from a file into guest RAM is the business of `copy` alone.
//!
//! Nothing here depends on the host's architecture or on KVM.

mod blob;
mod cmdline;
mod copy;
mod image;
mod layout;
mod mapping;
mod source;
pub mod x86_64;

pub use blob::{BlobError, write_blobs};
pub use cmdline::{Cmdline, CmdlineError};
pub use copy::{Copied, CopyError};
pub use image::{Bzimage, Elf, Image, ImageKind, KernelError};
pub use layout::{Layout, PlaceError, Reservation};
pub use source::{Source, SourceError};
