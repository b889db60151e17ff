//! Others read what we write, and we what they write: erofs-rs, mkfs.erofs, the kernel.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::string_slice,
    reason = "tests may"
)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use common::{Bench, Head, Tar, Tree, erofs, fsck, text, tree};
use proptest::prelude::*;
use testudo_image::Digest;
use testudo_image::erofs::read::{FileType, Reader};

/// As erofs-rs sees it: path, mode, owner, links, size, time, digest of content.
fn as_others_see(path: &Path) -> BTreeMap<String, String> {
    let bytes = fs::read(path).unwrap();
    let image = erofs_rs::EroFS::new(erofs_rs::backend::SliceImage::new(&bytes)).unwrap();
    let mut lines = BTreeMap::new();
    for entry in image.walk_dir("/").unwrap() {
        let entry = entry.unwrap();
        let inode = entry.inode;
        let content = if inode.is_file() {
            let mut data = Vec::new();
            image
                .open_inode_file(inode)
                .unwrap()
                .read_to_end(&mut data)
                .unwrap();
            Digest::of(&data).short().to_owned()
        } else if inode.is_symlink() {
            text(image.read_link_inode(inode).unwrap().as_bytes())
        } else {
            format!("{:?}", inode.device())
        };
        let path = text(entry.dir_entry.path().as_bytes());
        let name = path.trim_start_matches('/').to_owned();
        let size = if inode.is_dir() { 0 } else { inode.data_size() };
        lines.insert(
            name,
            format!(
                "{:o} {}:{} x{} {size} {:?} {content}",
                inode.permissions().mode() & 0o7777,
                inode.uid(),
                inode.gid(),
                inode.nlink(),
                inode.modified_unix()
            ),
        );
    }
    lines.remove("");
    lines
}

fn as_we_see(path: &Path) -> BTreeMap<String, String> {
    let image = Reader::open(path).unwrap();
    let mut files = Vec::new();
    image
        .walk(&mut |path, inode| {
            files.push((text(path), inode.clone()));
            true
        })
        .unwrap();
    let mut lines = BTreeMap::new();
    for (path, inode) in files.into_iter().filter(|(path, _)| !path.is_empty()) {
        let kind = inode.file_type().unwrap();
        let content = match kind {
            FileType::File => Digest::of(&image.read_whole(&inode, 1 << 30).unwrap())
                .short()
                .to_owned(),
            FileType::Symlink => text(&image.read_link(&inode).unwrap()),
            FileType::Char | FileType::Block => format!("{:?}", Some(inode.device())),
            _ => "None".to_owned(),
        };
        let size = if kind == FileType::Directory {
            0
        } else {
            inode.size
        };
        lines.insert(
            path,
            format!(
                "{:o} {}:{} x{} {size} {:?} {content}",
                inode.mode & 0o7777,
                inode.uid,
                inode.gid,
                inode.nlink,
                inode.mtime
            ),
        );
    }
    lines
}

fn sample() -> Vec<u8> {
    let mut tar = Tar::new().dir("d");
    for i in 0..300_usize {
        tar = tar.file(&format!("d/file-{i}"), &i.to_le_bytes().repeat(i * 5));
    }
    tar.symlink("link", "d/file-1")
        .symlink("long-link", &"y/".repeat(2000))
        .hard_link("hard", "d/file-7")
        .head(
            b"null",
            &Head {
                kind: b'3',
                device: (1, 3),
                ..Head::default()
            },
        )
        .head(
            b"pipe",
            &Head {
                kind: b'6',
                ..Head::default()
            },
        )
        .file(
            "big",
            &(0..3_000_000_u32)
                .flat_map(u32::to_le_bytes)
                .collect::<Vec<u8>>(),
        )
        .file(
            "holes",
            &[vec![1; 10], vec![0; 5 << 20], vec![2; 10]].concat(),
        )
        .bytes()
}

#[test]
fn erofs_rs_reads_the_same() {
    let bench = Bench::new();
    let image = bench.pull(&[sample()]).unwrap();
    fsck(erofs(&image));
    assert_eq!(as_others_see(erofs(&image)), as_we_see(erofs(&image)));
}

/// What DAX serves; an inline tail would be read through the page cache.
#[test]
fn no_file_has_an_inline_tail() {
    let bench = Bench::new();
    let pulled = bench.pull(&[sample()]).unwrap();
    let bytes = fs::read(erofs(&pulled)).unwrap();
    let image = erofs_rs::EroFS::new(erofs_rs::backend::SliceImage::new(&bytes)).unwrap();
    let mut layouts = Vec::new();
    for entry in image.walk_dir("/").unwrap() {
        let inode = entry.unwrap().inode;
        if inode.is_file() {
            layouts.push(inode.layout());
        }
    }
    let count = |l| layouts.iter().filter(|is| **is == Some(l)).count();
    let plain = count(erofs_rs::types::Layout::FlatPlain);
    let chunks = count(erofs_rs::types::Layout::ChunkBased);
    assert_eq!((chunks, plain + chunks), (1, layouts.len()));
}

#[test]
fn what_mkfs_erofs_writes_is_read() {
    let bench = Bench::new();
    let dir = bench.dir.path().join("tree");
    fs::create_dir_all(dir.join("sub/deeper")).unwrap();
    for i in 0..500 {
        fs::write(dir.join(format!("sub/file-{i}")), vec![1; i * 31]).unwrap();
    }
    std::os::unix::fs::symlink("sub/file-1", dir.join("link")).unwrap();
    let path = bench.dir.path().join("made.erofs");
    for flags in [
        &["-Eforce-inode-compact"][..],
        &["-Eforce-inode-extended"],
        &["--chunksize=4096"],
    ] {
        let made = Command::new("mkfs.erofs")
            .args(flags)
            .arg(&path)
            .arg(&dir)
            .output();
        let Ok(made) = made else {
            eprintln!("SKIP mkfs.erofs: it is not installed (Debian's erofs-utils)");
            return;
        };
        assert!(
            made.status.success(),
            "{}",
            String::from_utf8_lossy(&made.stderr)
        );
        let ours = as_we_see(&path);
        assert_eq!(ours.len(), 503);
        assert_eq!(as_others_see(&path), ours, "{flags:?}");
    }
}

/// GNU tar as root, and the kernel's view of our image, agree on everything there is to see.
#[test]
fn the_kernel_shows_what_tar_extracts() {
    let bench = Bench::new();
    let tar_path = bench.dir.path().join("sample.tar");
    fs::write(&tar_path, sample()).unwrap();
    let image = bench.pull(&[sample()]).unwrap();
    let mount = bench.dir.path().join("mount");
    let unpacked = bench.dir.path().join("unpacked");
    fs::create_dir(&mount).unwrap();
    fs::create_dir(&unpacked).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "erofs", "-o", "ro,loop"])
        .arg(erofs(&image))
        .arg(&mount)
        .output();
    match mounted {
        Ok(done) if done.status.success() => {}
        Ok(done) => {
            eprintln!(
                "SKIP mount: {}",
                String::from_utf8_lossy(&done.stderr).trim()
            );
            return;
        }
        Err(error) => {
            eprintln!("SKIP mount: {error}");
            return;
        }
    }
    let extracted = Command::new("tar")
        .args(["-xp", "--numeric-owner", "--same-owner", "-f"])
        .arg(&tar_path)
        .arg("-C")
        .arg(&unpacked)
        .output()
        .unwrap();
    let listing = |dir: &Path| {
        let script = "find . -mindepth 1 -printf '%p %y %m %U:%G %n %T@ %l ' \\( -type f -exec sha256sum {} \\; -o -printf '\\n' \\) | sort";
        let done = Command::new("sh")
            .arg("-c")
            .arg(script)
            .current_dir(dir)
            .output()
            .unwrap();
        String::from_utf8_lossy(&done.stdout).into_owned()
    };
    let (ours, theirs) = (listing(&mount), listing(&unpacked));
    let unmounted = Command::new("umount").arg(&mount).status().unwrap();
    assert!(extracted.status.success() && unmounted.success());
    assert!(ours.lines().count() > 300);
    assert_eq!(ours, theirs);
}

#[derive(Debug, Clone)]
enum Step {
    File(usize, u32, Vec<u8>),
    Dir(usize, u32),
    Symlink(usize, usize),
    HardLink(usize, usize),
    Whiteout(usize),
    Opaque(usize),
}

const PATHS: &[&str] = &[
    "a", "a/b", "a/b/c", "a/d", "e", "e/f", "e/f/g", "h", "e/f/i", "a/b/j",
];

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let path = 0..PATHS.len();
    let data = prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..50),
        (1_usize..20_000, any::<u8>()).prop_map(|(n, b)| vec![b; n])
    ];
    let step = prop_oneof![
        4 => (path.clone(), 0_u32..0o10000, data).prop_map(|(p, m, d)| Step::File(p, m, d)),
        2 => (path.clone(), 0_u32..0o10000).prop_map(|(p, m)| Step::Dir(p, m)),
        1 => (path.clone(), path.clone()).prop_map(|(p, q)| Step::Symlink(p, q)),
        1 => (path.clone(), path.clone()).prop_map(|(p, q)| Step::HardLink(p, q)),
        1 => path.clone().prop_map(Step::Whiteout),
        1 => path.prop_map(Step::Opaque),
    ];
    proptest::collection::vec(step, 0..12)
}

/// A file of a model: what a layer's entry says, and which file it is, for hard links.
#[derive(Debug, Clone, PartialEq)]
enum Model {
    File(u32, Vec<u8>, usize),
    Dir(u32),
    Symlink(String),
}

/// Names without symlinks on the way, and no entry below a file: the model has paths only. Gives the
/// tar and what should be there.
fn play(layers: &[Vec<Step>]) -> (Vec<Vec<u8>>, BTreeMap<String, Model>) {
    let mut model: BTreeMap<String, Model> = BTreeMap::new();
    let mut tars = Vec::new();
    let mut next = 0;
    for steps in layers {
        let mut tar = Tar::new();
        // Whiteouts first: the model need not know what came from which layer.
        let (hiding, making): (Vec<&Step>, Vec<&Step>) = steps
            .iter()
            .partition(|s| matches!(s, Step::Whiteout(_) | Step::Opaque(_)));
        for step in hiding.into_iter().chain(making) {
            let index = match step {
                Step::File(p, ..)
                | Step::Dir(p, _)
                | Step::Symlink(p, _)
                | Step::HardLink(p, _)
                | Step::Whiteout(p)
                | Step::Opaque(p) => *p,
            };
            let path = PATHS[index];
            let parents: Vec<&str> = path.match_indices('/').map(|(at, _)| &path[..at]).collect();
            if parents
                .iter()
                .any(|p| model.get(*p).is_some_and(|m| !matches!(m, Model::Dir(_))))
            {
                continue;
            }
            let below = format!("{path}/");
            match step {
                Step::Whiteout(_) => {
                    let (dir, name) = path.rsplit_once('/').unwrap_or((".", path));
                    tar = tar.file(&format!("{dir}/.wh.{name}"), b"");
                    model.retain(|p, _| p != path && !p.starts_with(&below));
                    continue;
                }
                Step::Opaque(_) => {
                    if model.get(path).is_none_or(|m| matches!(m, Model::Dir(_))) {
                        tar = tar.file(&format!("{path}/.wh..wh..opq"), b"");
                        model.retain(|p, _| !p.starts_with(&below));
                    }
                    continue;
                }
                Step::HardLink(_, target)
                    if !matches!(model.get(PATHS[*target]), Some(Model::File(..))) =>
                {
                    continue;
                }
                // That would take the target away.
                Step::HardLink(_, target) if PATHS[*target].starts_with(&below) => continue,
                _ => {}
            }
            for parent in parents {
                model.entry(parent.to_owned()).or_insert(Model::Dir(0o755));
            }
            let made = match step {
                Step::File(_, mode, data) => {
                    let head = Head {
                        mode: *mode,
                        size: data.len() as u64,
                        ..Head::default()
                    };
                    tar = tar.head(path.as_bytes(), &head).data(data);
                    next += 1;
                    Model::File(*mode, data.clone(), next)
                }
                Step::Dir(_, mode) => {
                    tar = tar.head(
                        path.as_bytes(),
                        &Head {
                            kind: b'5',
                            mode: *mode,
                            ..Head::default()
                        },
                    );
                    Model::Dir(*mode)
                }
                Step::Symlink(_, to) => {
                    tar = tar.symlink(path, PATHS[*to]);
                    Model::Symlink(PATHS[*to].to_owned())
                }
                Step::HardLink(_, target) => {
                    tar = tar.hard_link(path, PATHS[*target]);
                    model[PATHS[*target]].clone()
                }
                Step::Whiteout(_) | Step::Opaque(_) => continue,
            };
            let merged = matches!(
                (&made, model.get(path)),
                (Model::Dir(_), Some(Model::Dir(_)))
            );
            if !merged {
                model.retain(|p, _| !p.starts_with(&below));
            }
            model.insert(path.to_owned(), made);
        }
        tars.push(tar.bytes());
    }
    (tars, model)
}

fn lines(model: &BTreeMap<String, Model>) -> BTreeMap<String, String> {
    let line = |m: &Model| match m {
        Model::Dir(mode) => format!("Directory {mode:o} x0 "),
        Model::Symlink(to) => format!("Symlink 777 x1 {to}"),
        Model::File(mode, data, id) => {
            let links = model
                .values()
                .filter(|o| matches!(o, Model::File(_, _, i) if i == id))
                .count();
            format!(
                "File {mode:o} x{links} {} {}",
                data.len(),
                Digest::of(data).short()
            )
        }
    };
    model
        .iter()
        .map(|(path, m)| (path.clone(), line(m)))
        .collect()
}

/// The same of the image: without owners, times and xattrs.
fn short(tree: &Tree) -> BTreeMap<String, String> {
    let mut lines: BTreeMap<String, String> = tree
        .iter()
        .map(|(path, line)| {
            let words: Vec<&str> = line.splitn(7, ' ').collect();
            (
                path.clone(),
                format!("{} {} {} {}", words[0], words[1], words[3], words[6]),
            )
        })
        .collect();
    lines.remove("");
    lines
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn random_layers_add_up(layers in proptest::collection::vec(steps(), 1..5)) {
        let (tars, model) = play(&layers);
        let bench = Bench::new();
        let image = bench.pull(&tars).unwrap();
        let path = erofs(&image);
        prop_assert_eq!(short(&tree(path)), lines(&model));
        prop_assert_eq!(as_others_see(path), as_we_see(path));
        fsck(path);
        // The same again, in another store: the same bytes.
        let again = Bench::new();
        let twice = again.pull(&tars).unwrap();
        prop_assert_eq!(fs::read(path).unwrap(), fs::read(erofs(&twice)).unwrap());
    }
}
