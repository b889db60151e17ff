//! Container images: named, fetched, verified, and kept as one read-only EROFS file each, which a VM gets
//! as a disk or as pmem. Needs neither root nor a daemon.
//!
//! ```no_run
//! use testudo_image::{Options, Silent, Source, Store};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let store = Store::open(&Store::default_path()?)?;
//! let image = store.pull(&Source::parse("nginx")?, &Options::default(), &mut Silent)?;
//! let user = image.lookup_user(&image.config.user)?;
//! # let _ = user;
//! # Ok(())
//! # }
//! ```
//!
//! | module | owns |
//! |---|---|
//! | [`reference`], [`source`] | what a person may write for an image |
//! | [`registry`] | HTTP: manifests, blobs, credentials, retries |
//! | [`manifest`], [`config`], [`platform`], [`digest`] | the documents an image consists of |
//! | [`tar`], [`layers`] | archives, and what they add up to |
//! | [`erofs`] | the file an image becomes: written, and read without mounting |
//! | [`store`] | files below one directory, shared by processes |
//! | [`rootfs`], [`users`] | what is looked up in an image |

pub mod config;
pub mod digest;
pub mod erofs;
pub mod layers;
pub mod manifest;
pub mod platform;
pub mod reference;
pub mod registry;
pub mod rootfs;
pub mod source;
pub mod store;
pub mod tar;
pub mod users;

pub use config::ImageConfig;
pub use digest::Digest;
pub use layers::Limits;
pub use platform::Platform;
pub use reference::Reference;
pub use registry::RegistryOptions;
pub use rootfs::Rootfs;
pub use source::Source;
pub use store::{
    Event, Freed, Image, Options, Progress, Pruning, PullError, PullPolicy, Silent, Store,
    StoreError,
};
pub use users::{User, UserError};
