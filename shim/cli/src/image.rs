//! What a person may name as an image, and what comes of it: a root and how it wants to be run.

use std::io::{self, Read, Write};
use std::path::Path;

use anyhow::Context;
use testudo_image::{
    Event, Image as Stored, ImageConfig, Options, Progress, PullPolicy, Rootfs, Silent, Source,
    Store,
};

use crate::config::Config;
use crate::container::UserLists;
use crate::pod::Root;

/// An image that can be run.
#[derive(Debug, Clone)]
pub struct Image {
    /// The root.
    pub root: Root,
    /// How.
    pub config: ImageConfig,
    /// Its lists of users.
    pub users: UserLists,
}

/// EROFS has its superblock 1024 bytes in.
const EROFS_AT: usize = 1024;
const EROFS_MAGIC: [u8; 4] = 0xe0f5_e1e2_u32.to_le_bytes();
/// Lists of users have this many bytes at most.
const LIST_MOST: u64 = 4 << 20;

/// The store that the configuration names.
pub fn store(config: &Config) -> anyhow::Result<Store> {
    let path = match &config.image_store {
        Some(path) => path.clone(),
        None => Store::default_path()?,
    };
    Ok(Store::open(&path)?)
}

/// Makes an image usable: an EROFS file is as it is, everything else goes through the store.
pub fn open(name: &str, config: &Config, policy: PullPolicy) -> anyhow::Result<Image> {
    let path = Path::new(name);
    if path.is_file() && is_erofs(path).with_context(|| format!("cannot read {name}"))? {
        let root = Root::Erofs(
            path.canonicalize()
                .with_context(|| format!("cannot read {name}"))?,
        );
        return Ok(Image {
            users: users(&root)?,
            root,
            config: ImageConfig::default(),
        });
    }
    let stored = pull(name, config, policy)?;
    let root = match stored.rootfs {
        Rootfs::Erofs(path) => Root::Erofs(path),
        Rootfs::Directory(path) => Root::Directory(path),
    };
    Ok(Image {
        users: users(&root)?,
        root,
        config: stored.config,
    })
}

/// Fetches and unpacks what is not there yet.
pub fn pull(name: &str, config: &Config, policy: PullPolicy) -> anyhow::Result<Stored> {
    let source = Source::parse(name)?;
    let mut options = Options {
        policy,
        ..Options::default()
    };
    options
        .registry
        .plain_http
        .extend(config.image_plain_http.iter().cloned());
    let mut bar = Bar::default();
    let progress: &mut dyn Progress = if rustix::termios::isatty(rustix::stdio::stderr()) {
        &mut bar
    } else {
        &mut Silent
    };
    Ok(store(config)?.pull(&source, &options, progress)?)
}

fn is_erofs(path: &Path) -> io::Result<bool> {
    let mut head = Vec::new();
    std::fs::File::open(path)?
        .take(4096)
        .read_to_end(&mut head)?;
    Ok(head
        .get(EROFS_AT..)
        .is_some_and(|rest| rest.starts_with(&EROFS_MAGIC)))
}

/// The lists of users of a root.
pub fn users(root: &Root) -> anyhow::Result<UserLists> {
    let rootfs = match root {
        Root::Erofs(path) => Rootfs::Erofs(path.clone()),
        Root::Directory(path) => Rootfs::Directory(path.clone()),
    };
    let text = |file: &str| -> anyhow::Result<String> {
        let bytes = rootfs.read(file, LIST_MOST)?.unwrap_or_default();
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    Ok(UserLists {
        passwd: text("etc/passwd")?,
        group: text("etc/group")?,
    })
}

/// Progress on one line of a terminal, which is gone at the end.
#[derive(Default)]
struct Bar {
    /// Bytes of each layer that is being downloaded: done, in all.
    layers: Vec<(String, u64, u64)>,
    shown: String,
}

impl Progress for Bar {
    fn event(&mut self, event: Event) {
        let text = match event {
            Event::Waiting => "another command is pulling this image".to_owned(),
            Event::Resolved { layers, .. } => format!("{layers} layers"),
            Event::Downloading {
                digest,
                done,
                total,
            } => self.downloading(digest.to_string(), done, total),
            Event::Retrying { attempts, why, .. } => {
                format!("once more, after {attempts} attempts: {why}")
            }
            Event::Unpacking {
                layer,
                layers,
                bytes,
            } => {
                format!(
                    "unpacking layer {} of {layers}, {} MiB",
                    layer.saturating_add(1),
                    bytes >> 20
                )
            }
            _ => return,
        };
        if text != self.shown {
            let _ = write!(io::stderr(), "\r\x1b[K{text}");
            self.shown = text;
        }
    }
}

impl Bar {
    fn downloading(&mut self, digest: String, done: u64, total: u64) -> String {
        match self.layers.iter_mut().find(|(other, ..)| *other == digest) {
            Some(layer) => (layer.1, layer.2) = (done, total),
            None => self.layers.push((digest, done, total)),
        }
        let sum = |which: fn(&(String, u64, u64)) -> u64| {
            self.layers.iter().map(which).fold(0, u64::saturating_add)
        };
        let (done, total) = (sum(|l| l.1), sum(|l| l.2));
        let percent = done.saturating_mul(100).checked_div(total).unwrap_or(100);
        format!(
            "downloading {} of {} MiB, {percent} %",
            done >> 20,
            total >> 20
        )
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if !self.shown.is_empty() {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_and_erofs_files_are_images() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir_all(at("root/etc")).unwrap();
        std::fs::write(at("root/etc/passwd"), "me:x:5:5::/:/bin/sh\n").unwrap();
        let config = Config {
            image_store: Some(at("store")),
            ..Config::default()
        };
        let image = open(at("root").to_str().unwrap(), &config, PullPolicy::Never).unwrap();
        assert!(image.users.passwd.starts_with("me:") && image.users.group.is_empty());
        assert_eq!(image.root, Root::Directory(at("root")));
        let mut erofs = vec![0; 2048];
        erofs[1024..1028].copy_from_slice(&EROFS_MAGIC);
        std::fs::write(at("x.erofs"), erofs).unwrap();
        assert!(is_erofs(&at("x.erofs")).unwrap());
        assert!(open("/no/such/thing", &config, PullPolicy::Never).is_err());
    }

    #[test]
    fn progress_is_of_all_layers() {
        let mut bar = Bar::default();
        bar.downloading("a".into(), 1 << 20, 2 << 20);
        assert_eq!(
            bar.downloading("b".into(), 1 << 20, 2 << 20),
            "downloading 2 of 4 MiB, 50 %"
        );
    }
}
