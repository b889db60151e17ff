//! The store: names, removal, several processes at once, processes that are killed.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::string_slice,
    clippy::panic,
    reason = "tests may"
)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{Bench, Tar, erofs, gzip, names, tree};
use testudo_image::{Event, Options, Pruning, Rootfs, Silent, Source, Store, StoreError};

const CHILD: &str = "TESTUDO_TEST_CHILD";

fn count(store: &Store, folder: &str) -> usize {
    fs::read_dir(store.path().join(folder)).unwrap().count()
}

fn one(name: &str) -> Vec<Vec<u8>> {
    vec![Tar::new().file(name, name.as_bytes()).bytes()]
}

#[test]
fn names_come_and_go_and_images_with_the_last() {
    let bench = Bench::new();
    let layouts = [bench.layout("a", &one("a")), bench.layout("b", &one("b"))];
    let pull = |path: &Path, tag: Option<&str>| {
        let source = Source::Layout {
            path: path.into(),
            tag: tag.map(str::to_owned),
        };
        bench
            .store
            .pull(&source, &bench.options, &mut Silent)
            .unwrap()
    };
    let a = pull(&layouts[0].dir, None);
    let tagged = pull(&layouts[0].dir, Some("latest"));
    let b = pull(&layouts[1].dir, None);
    assert_eq!(
        (a.digest.as_ref(), tagged.rootfs.clone()),
        (Some(&layouts[0].manifest), a.rootfs.clone())
    );
    assert_eq!(
        (
            tagged.names.len(),
            bench.store.list().unwrap().len(),
            count(&bench.store, "rootfs")
        ),
        (2, 2, 2)
    );
    let hex = layouts[0].manifest.hex();
    for word in [
        tagged.names[0].as_str(),
        &layouts[0].manifest.to_string(),
        hex,
        &hex[..12],
    ] {
        assert_eq!(bench.store.get(word).unwrap().digest, a.digest, "{word}");
    }
    assert!(matches!(
        bench.store.get("nothing"),
        Err(StoreError::NoImage(_))
    ));
    assert!(matches!(
        bench.store.get("abc"),
        Err(StoreError::NoImage(_))
    ));

    let freed = bench.store.remove(&tagged.names[0]).unwrap();
    assert_eq!((freed.names.len(), freed.images.len()), (1, 0));
    let freed = bench.store.remove(&tagged.names[1]).unwrap();
    assert_eq!(
        (freed.names.len(), freed.images.len(), freed.bytes > 0),
        (1, 1, true)
    );
    assert!(!a.rootfs.path().exists() && b.rootfs.path().exists());
    assert_eq!(
        (
            count(&bench.store, "rootfs"),
            count(&bench.store, "images"),
            count(&bench.store, "blobs/sha256")
        ),
        (1, 1, 2)
    );

    let keep = [layouts[1].manifest.clone()];
    let all = Pruning {
        all: true,
        layers: true,
    };
    assert!(bench.store.prune(all, &keep).unwrap().images.is_empty());
    assert!(
        bench
            .store
            .prune(Pruning::default(), &[])
            .unwrap()
            .images
            .is_empty()
    );
    assert_eq!(bench.store.prune(all, &[]).unwrap().images, keep);
    assert_eq!(
        count(&bench.store, "blobs/sha256")
            + count(&bench.store, "rootfs")
            + count(&bench.store, "names"),
        0
    );
}

#[test]
fn images_with_the_same_layers_share_their_file() {
    let bench = Bench::new();
    let tar = Tar::new().file("x", b"1").bytes();
    let packed = [(gzip(&tar), testudo_image::Digest::of(&tar))];
    let dirs: Vec<PathBuf> = ["a", "b"]
        .iter()
        .map(|n| bench.dir.path().join(n))
        .collect();
    common::layout(&dirs[0], &packed, r#"{"Cmd":["a"]}"#);
    common::layout(&dirs[1], &packed, r#"{"Cmd":["b"]}"#);
    let images: Vec<_> = dirs
        .iter()
        .map(|dir| {
            let source = Source::parse(&dir.display().to_string()).unwrap();
            bench
                .store
                .pull(&source, &bench.options, &mut Silent)
                .unwrap()
        })
        .collect();
    assert_eq!(images[0].rootfs, images[1].rootfs);
    assert_eq!(
        (
            images[0].config.cmd[0].as_str(),
            images[1].config.cmd[0].as_str()
        ),
        ("a", "b")
    );
    bench
        .store
        .remove(&images[0].digest.as_ref().unwrap().to_string())
        .unwrap();
    assert!(images[1].rootfs.path().exists());
}

#[test]
fn archives_and_directories() {
    let bench = Bench::new();
    let layout = bench.layout("layout", &one("in-archive"));
    let run = |program: &str, args: &[&str], dir: &Path| {
        let done = Command::new(program)
            .args(args)
            .current_dir(dir)
            .output()
            .unwrap();
        assert!(
            done.status.success(),
            "{}",
            String::from_utf8_lossy(&done.stderr)
        );
    };
    let dir = bench.dir.path();
    run("tar", &["-cf", "../oci.tar", "."], &layout.dir);
    run("tar", &["-czf", "../oci.tar.gz", "."], &layout.dir);

    // As `docker save` writes them; the second layer is a link to the first.
    let saved = dir.join("saved");
    let tar = one("in-archive").remove(0);
    let id = testudo_image::Digest::of(&tar);
    let config = format!(
        r#"{{"config":{{"User":"5"}},"rootfs":{{"type":"layers","diff_ids":["{id}","{id}"]}}}}"#
    );
    fs::create_dir_all(saved.join("one")).unwrap();
    fs::create_dir_all(saved.join("two")).unwrap();
    fs::write(saved.join("one/layer.tar"), &tar).unwrap();
    std::os::unix::fs::symlink("../one/layer.tar", saved.join("two/layer.tar")).unwrap();
    fs::write(saved.join("config.json"), config).unwrap();
    let list = r#"[{"Config":"config.json","RepoTags":["app:v1"],"Layers":["one/layer.tar","two/layer.tar"]}]"#;
    fs::write(saved.join("manifest.json"), list).unwrap();
    run(
        "tar",
        &[
            "-cf",
            "../docker.tar",
            "manifest.json",
            "config.json",
            "one",
            "two",
        ],
        &saved,
    );

    for word in [
        "oci.tar",
        "oci.tar.gz",
        "oci.tar:latest",
        "docker.tar",
        "docker.tar:app:v1",
        "docker.tar:docker.io/library/app:v1",
    ] {
        let source = Source::parse(&dir.join(word).display().to_string()).unwrap();
        let image = bench
            .store
            .pull(&source, &bench.options, &mut Silent)
            .unwrap_or_else(|e| panic!("{word}: {}", common::said(&e)));
        assert_eq!(names(&tree(erofs(&image))), ["in-archive"], "{word}");
        let user = if word.starts_with("docker") { "5" } else { "" };
        assert_eq!(image.config.user, user, "{word}");
    }
    for (word, why) in [
        ("oci.tar:v9", "none is named `v9`"),
        ("docker.tar:b", "0 fit"),
        ("layout/index.json", "archive"),
    ] {
        let source = Source::parse(&dir.join(word).display().to_string()).unwrap();
        let error = bench
            .store
            .pull(&source, &bench.options, &mut Silent)
            .unwrap_err();
        assert!(
            common::said(&error).contains(why),
            "{word}: {}",
            common::said(&error)
        );
    }
    assert_eq!(count(&bench.store, "tmp"), 0);

    let root = dir.join("root");
    fs::create_dir_all(root.join("etc")).unwrap();
    fs::write(root.join("real"), "app:x:7:8::/:\n").unwrap();
    // Inside, it is the root's own.
    std::os::unix::fs::symlink("/real", root.join("etc/passwd")).unwrap();
    let source = Source::parse(&root.display().to_string()).unwrap();
    let image = bench
        .store
        .pull(&source, &bench.options, &mut Silent)
        .unwrap();
    assert_eq!(
        image.rootfs,
        Rootfs::Directory(root.canonicalize().unwrap())
    );
    assert_eq!(image.lookup_user("app").unwrap().uid, 7);
}

#[test]
fn two_pulls_at_once_unpack_once() {
    let bench = Bench::new();
    let data: Vec<u8> = (0..4_000_000_u32).flat_map(u32::to_le_bytes).collect();
    let layout = bench.layout("layout", &[Tar::new().file("big", &data).bytes()]);
    let source = Source::Layout {
        path: layout.dir,
        tag: None,
    };
    let root = bench.store.path().to_owned();
    let pulls: Vec<_> = (0..4)
        .map(|_| {
            let (root, source) = (root.clone(), source.clone());
            std::thread::spawn(move || {
                let mut unpacked = false;
                let store = Store::open(&root).unwrap();
                let image = store.pull(&source, &Options::default(), &mut |event| {
                    unpacked |= matches!(event, Event::Unpacking { .. });
                });
                (image.unwrap().rootfs, unpacked)
            })
        })
        .collect();
    let done: Vec<_> = pulls.into_iter().map(|t| t.join().unwrap()).collect();
    assert_eq!(done.iter().filter(|(_, unpacked)| *unpacked).count(), 1);
    assert!(done.iter().all(|(rootfs, _)| *rootfs == done[0].0));
    assert_eq!(
        (count(&bench.store, "tmp"), count(&bench.store, "rootfs")),
        (0, 1)
    );
}

/// Not a test by itself: what the next one kills.
#[test]
fn child_that_pulls() {
    let Ok(words) = std::env::var(CHILD) else {
        return;
    };
    let (root, layout) = words.split_once('|').unwrap();
    let store = Store::open(Path::new(root)).unwrap();
    store
        .pull(
            &Source::parse(layout).unwrap(),
            &Options::default(),
            &mut Silent,
        )
        .unwrap();
}

#[test]
fn whatever_is_killed_leaves_the_store_whole() {
    let bench = Bench::new();
    let data: Vec<u8> = (0..6_000_000_u32).flat_map(u32::to_le_bytes).collect();
    let tar = (0..2000).fold(Tar::new().file("big", &data), |tar, i| {
        tar.file(&format!("d/{i}"), &[7; 3000])
    });
    let layout = bench.layout("layout", &[tar.bytes()]);
    let mut reached = [0; 2];
    for round in 0..12 {
        let root = bench.dir.path().join(format!("store-{round}"));
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_that_pulls"])
            .env(
                CHILD,
                format!("{}|{}", root.display(), layout.dir.display()),
            )
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(5 + round * 40));
        child.kill().unwrap();
        child.wait().unwrap();

        let store = Store::open(&root).unwrap();
        assert_eq!(count(&store, "tmp"), 0);
        let before = store.list().unwrap();
        assert!(before.len() <= 1);
        reached[before.len()] += 1;
        let source = Source::Layout {
            path: layout.dir.clone(),
            tag: None,
        };
        let image = store.pull(&source, &bench.options, &mut Silent).unwrap();
        if round % 4 == 0 || !before.is_empty() {
            common::fsck(erofs(&image));
        }
        assert_eq!(
            (
                count(&store, "rootfs"),
                count(&store, "images"),
                store.list().unwrap().len()
            ),
            (1, 1, 1)
        );
        fs::remove_dir_all(&root).unwrap();
    }
    eprintln!(
        "killed before the image was there: {}, after: {}",
        reached[0], reached[1]
    );
    assert!(reached[0] > 0);
}

#[test]
fn an_image_for_another_machine_is_told() {
    let bench = Bench::new();
    let layout = bench.layout("layout", &one("x"));
    let mut options = bench.options.clone();
    options.platform = "linux/riscv64".parse().unwrap();
    let source = Source::Layout {
        path: layout.dir,
        tag: None,
    };
    let error = bench
        .store
        .pull(&source, &options, &mut Silent)
        .unwrap_err();
    assert!(
        common::said(&error).contains("not for linux/riscv64"),
        "{error}"
    );
    assert!(bench.store.list().unwrap().is_empty());
}
