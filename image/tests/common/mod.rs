//! Layers and images made by hand, and what comes out of them as a list of lines.
#![allow(unreachable_pub, reason = "a module of several tests")]
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "tests may"
)]
#![allow(dead_code, reason = "each test uses some of it")]

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use testudo_image::erofs::read::{FileType, Reader};
use testudo_image::{Digest, Image, Options, PullError, Rootfs, Silent, Source, Store};

/// An archive in the making. Names longer than a header holds become GNU long names.
#[derive(Default, Clone)]
pub struct Tar {
    bytes: Vec<u8>,
}

/// What a header says; the rest is zero.
#[derive(Clone)]
pub struct Head {
    pub kind: u8,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: u64,
    pub size: u64,
    pub link: Vec<u8>,
    pub device: (u32, u32),
}

impl Default for Head {
    fn default() -> Self {
        Self {
            kind: b'0',
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: 1_700_000_000,
            size: 0,
            link: Vec::new(),
            device: (0, 0),
        }
    }
}

impl Tar {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn head(mut self, name: &[u8], head: &Head) -> Self {
        if name.len() > 100 {
            self = self.extended(b'L', &[name, b"\0"].concat());
        }
        if head.link.len() > 100 {
            self = self.extended(b'K', &[&head.link[..], b"\0"].concat());
        }
        let mut block = [0_u8; 512];
        let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &name[..name.len().min(100)]);
        put(100, format!("{:07o}\0", head.mode).as_bytes());
        put(108, &number(head.uid.into(), 8));
        put(116, &number(head.gid.into(), 8));
        put(124, &number(head.size, 12));
        put(136, &number(head.mtime, 12));
        put(156, &[head.kind]);
        put(157, &head.link[..head.link.len().min(100)]);
        put(257, b"ustar\x0000");
        put(329, format!("{:07o}\0", head.device.0).as_bytes());
        put(337, format!("{:07o}\0", head.device.1).as_bytes());
        put(148, b"        ");
        let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.bytes.extend_from_slice(&block);
        self
    }

    pub fn data(mut self, data: &[u8]) -> Self {
        self.bytes.extend_from_slice(data);
        let padded = self.bytes.len().next_multiple_of(512);
        self.bytes.resize(padded, 0);
        self
    }

    pub fn extended(self, kind: u8, data: &[u8]) -> Self {
        let head = Head {
            kind,
            size: data.len() as u64,
            ..Head::default()
        };
        self.head(b"././@LongLink", &head).data(data)
    }

    pub fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut data = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let mut len = rest + 1;
            while len != rest + len.to_string().len() {
                len = rest + len.to_string().len();
            }
            data.extend_from_slice(format!("{len} {key}=").as_bytes());
            data.extend_from_slice(value);
            data.push(b'\n');
        }
        self.extended(b'x', &data)
    }

    pub fn file(self, name: &str, data: &[u8]) -> Self {
        let head = Head {
            size: data.len() as u64,
            ..Head::default()
        };
        self.head(name.as_bytes(), &head).data(data)
    }

    pub fn dir(self, name: &str) -> Self {
        self.head(
            name.as_bytes(),
            &Head {
                kind: b'5',
                mode: 0o755,
                ..Head::default()
            },
        )
    }

    pub fn symlink(self, name: &str, to: &str) -> Self {
        self.head(
            name.as_bytes(),
            &Head {
                kind: b'2',
                mode: 0o777,
                link: to.into(),
                ..Head::default()
            },
        )
    }

    pub fn hard_link(self, name: &str, to: &str) -> Self {
        self.head(
            name.as_bytes(),
            &Head {
                kind: b'1',
                link: to.into(),
                ..Head::default()
            },
        )
    }

    pub fn bytes(mut self) -> Vec<u8> {
        self.bytes.resize(self.bytes.len() + 1024, 0);
        self.bytes
    }

    pub fn unended(self) -> Vec<u8> {
        self.bytes
    }
}

fn number(value: u64, width: usize) -> Vec<u8> {
    let octal = format!("{value:0>w$o}\0", w = width - 1);
    if octal.len() == width {
        return octal.into_bytes();
    }
    let mut bytes = vec![0; width];
    bytes[width - 8..].copy_from_slice(&value.to_be_bytes());
    bytes[0] |= 0x80;
    bytes
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// An OCI layout with one image, of these layers as they are stored, and the tar in each.
pub struct Layout {
    pub dir: PathBuf,
    pub manifest: Digest,
    pub layers: Vec<Digest>,
}

pub fn layout(dir: &Path, layers: &[(Vec<u8>, Digest)], config: &str) -> Layout {
    let blobs = dir.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let put = |bytes: &[u8]| {
        let digest = Digest::of(bytes);
        fs::write(blobs.join(digest.hex()), bytes).unwrap();
        digest
    };
    let diff_ids: Vec<String> = layers.iter().map(|(_, id)| format!("\"{id}\"")).collect();
    let config = format!(
        r#"{{"architecture":"{}","os":"linux","config":{config},"rootfs":{{"type":"layers","diff_ids":[{}]}}}}"#,
        testudo_image::Platform::host().architecture,
        diff_ids.join(",")
    );
    let config_digest = put(config.as_bytes());
    let mut described = Vec::new();
    let mut digests = Vec::new();
    for (bytes, _) in layers {
        let digest = put(bytes);
        described.push(format!(
            r#"{{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"{digest}","size":{}}}"#,
            bytes.len()
        ));
        digests.push(digest);
    }
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{config_digest}","size":{}}},"layers":[{}]}}"#,
        config.len(),
        described.join(",")
    );
    let digest = put(manifest.as_bytes());
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"{digest}","size":{},"annotations":{{"org.opencontainers.image.ref.name":"latest"}}}}]}}"#,
        manifest.len()
    );
    fs::write(dir.join("index.json"), index).unwrap();
    fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    Layout {
        dir: dir.into(),
        manifest: digest,
        layers: digests,
    }
}

/// A store, and images made for it.
pub struct Bench {
    pub dir: tempfile::TempDir,
    pub store: Store,
    pub options: Options,
}

impl Bench {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        Self {
            dir,
            store,
            options: Options::default(),
        }
    }

    /// These tars as layers, gzipped.
    pub fn layout(&self, name: &str, layers: &[Vec<u8>]) -> Layout {
        let packed: Vec<(Vec<u8>, Digest)> = layers
            .iter()
            .map(|tar| (gzip(tar), Digest::of(tar)))
            .collect();
        layout(&self.dir.path().join(name), &packed, "{}")
    }

    pub fn pull(&self, layers: &[Vec<u8>]) -> Result<Image, PullError> {
        let layout = self.layout("layout", layers);
        let source = Source::Layout {
            path: layout.dir,
            tag: None,
        };
        self.store.pull(&source, &self.options, &mut Silent)
    }

    /// The same, checked by fsck.erofs.
    pub fn tree(&self, layers: &[Vec<u8>]) -> Tree {
        let image = self.pull(layers).unwrap_or_else(|e| panic!("{}", said(&e)));
        fsck(erofs(&image));
        tree(erofs(&image))
    }
}

pub fn erofs(image: &Image) -> &Path {
    match &image.rootfs {
        Rootfs::Erofs(path) => path,
        Rootfs::Directory(path) => panic!("{} is a directory", path.display()),
    }
}

/// A file as one line: kind, mode, owner, links, time, xattrs, content.
pub type Tree = BTreeMap<String, String>;

/// By our reader.
pub fn tree(path: &Path) -> Tree {
    let image = Reader::open(path).unwrap();
    let mut tree = Tree::new();
    let mut files = Vec::new();
    image
        .walk(&mut |path, inode| {
            files.push((path.to_vec(), inode.clone()));
            true
        })
        .unwrap();
    for (path, inode) in files {
        let kind = inode.file_type().unwrap();
        let what = match kind {
            FileType::File => {
                let mut hasher =
                    testudo_image::digest::Hasher::new(testudo_image::digest::Algorithm::Sha256);
                let mut buffer = vec![0; 1 << 20];
                let mut at = 0;
                while at < inode.size {
                    let n = image.read_file(&inode, at, &mut buffer).unwrap();
                    hasher.update(&buffer[..n]);
                    at += n as u64;
                }
                format!("{} {}", inode.size, hasher.finish().short())
            }
            FileType::Symlink => text(&image.read_link(&inode).unwrap()),
            FileType::Char | FileType::Block => format!("{:?}", inode.device()),
            _ => String::new(),
        };
        let xattrs: Vec<String> = image
            .xattrs(&inode)
            .unwrap()
            .iter()
            .map(|(name, value)| format!("{}={}", text(name), text(value)))
            .collect();
        let links = if kind == FileType::Directory {
            0
        } else {
            inode.nlink
        };
        let line = format!(
            "{kind:?} {:o} {}:{} x{links} {}.{} [{}] {what}",
            inode.mode & 0o7777,
            inode.uid,
            inode.gid,
            inode.mtime.0,
            inode.mtime.1,
            xattrs.join(" ")
        );
        tree.insert(text(&path), line);
    }
    tree
}

pub fn text(bytes: &[u8]) -> String {
    bytes.escape_ascii().to_string()
}

/// The names in a tree without the root's.
pub fn names(tree: &Tree) -> Vec<&str> {
    tree.keys()
        .map(String::as_str)
        .filter(|n| !n.is_empty())
        .collect()
}

/// Debian's checker has to like it. Without erofs-utils that is not checked, and said.
pub fn fsck(path: &Path) {
    match Command::new("fsck.erofs").arg(path).output() {
        Ok(done) => assert!(
            done.status.success(),
            "fsck.erofs: {}{}",
            String::from_utf8_lossy(&done.stdout),
            String::from_utf8_lossy(&done.stderr)
        ),
        Err(error) => eprintln!("SKIP fsck.erofs: {error} (it is in Debian's erofs-utils)"),
    }
}

/// A message and its causes, as people see them.
pub fn said(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut at = error.source();
    while let Some(cause) = at {
        text += &format!(": {cause}");
        at = cause.source();
    }
    text
}
