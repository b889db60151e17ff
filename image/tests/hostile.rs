//! Layers by somebody who wishes us ill: an error that says what is wrong, or a tree that is inside;
//! never a panic, never a file outside, never a store that is left different.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::string_slice,
    reason = "tests may"
)]

mod common;

use std::fs;

use common::{Bench, Head, Tar, gzip, names, text};
use testudo_image::{Digest, Limits, PullError, Silent, Source};

/// What a pull of this one layer fails with; the store has to be empty afterwards.
fn refused(bench: &Bench, tar: &[u8]) -> String {
    let error = bench.pull(&[tar.to_vec()]).unwrap_err();
    assert_whole(bench);
    common::said(&error)
}

fn assert_whole(bench: &Bench) {
    assert_eq!(bench.store.list().unwrap().len(), 0);
    for folder in ["tmp", "rootfs", "images", "names"] {
        let left: Vec<_> = fs::read_dir(bench.store.path().join(folder))
            .unwrap()
            .collect();
        assert!(left.is_empty(), "{folder}: {left:?}");
    }
}

#[test]
fn paths_that_lead_out_are_refused_or_stay_inside() {
    let bench = Bench::new();
    for name in ["../x", "a/../../x", "a/..", ".."] {
        let said = refused(&bench, &Tar::new().file(name, b"x").bytes());
        assert!(said.contains("`..`"), "{name}: {said}");
    }
    let said = refused(&bench, &Tar::new().file("a/.wh...", b"").bytes());
    assert!(said.contains("no file can have"), "{said}");
    let said = refused(&bench, &Tar::new().file("a/.wh..", b"").bytes());
    assert!(said.contains("no file can have"), "{said}");

    let absolute = Tar::new()
        .file("/etc/absolute", b"1")
        .symlink("out", "/")
        .file("out/through-root", b"2")
        .symlink("up", "../../../..")
        .file("up/through-dots", b"3")
        .symlink("etc/self", ".")
        .file("etc/self/self/deep", b"4");
    let tree = bench.tree(&[absolute.bytes()]);
    assert_eq!(
        names(&tree),
        [
            "etc",
            "etc/absolute",
            "etc/deep",
            "etc/self",
            "out",
            "through-dots",
            "through-root",
            "up"
        ]
    );
    assert!(!bench.dir.path().join("through-root").exists());
}

#[test]
fn links_to_nothing_and_to_themselves() {
    let bench = Bench::new();
    for (tar, what) in [
        (Tar::new().hard_link("a", "/etc/passwd"), "is not there"),
        (Tar::new().hard_link("a", "a"), "is not there"),
        (Tar::new().hard_link("a", "../../etc/passwd"), "`..`"),
        (Tar::new().dir("d").hard_link("a", "d"), "directory"),
        (Tar::new().hard_link("a", "."), "directory"),
        (Tar::new().hard_link("", "a"), "is not there"),
        (
            Tar::new()
                .symlink("a", "b")
                .symlink("b", "a")
                .file("a/x", b""),
            "symlinks",
        ),
        (
            Tar::new().file("a", b"").file("a/b", b""),
            "not a directory",
        ),
        (Tar::new().file(".", b""), "root directory"),
        (Tar::new().symlink("./", "/"), "root directory"),
    ] {
        let said = refused(&bench, &tar.bytes());
        assert!(said.contains(what), "{said}, and not {what}");
    }
}

#[test]
fn the_last_of_several_entries_counts() {
    let bench = Bench::new();
    let tar = Tar::new()
        .file("a", b"1")
        .file("./a", b"22")
        .hard_link("b", "a")
        .hard_link("b", "a")
        .hard_link("b", "b")
        .file("a", b"333")
        .dir("c")
        .file("c/x", b"")
        .symlink("c", "nowhere");
    let tree = bench.tree(&[tar.bytes()]);
    assert_eq!(names(&tree), ["a", "b", "c"]);
    assert!(tree["a"].contains("] 3 ") && tree["b"].contains("] 2 ") && tree["b"].contains(" x1 "));
}

#[test]
fn sizes_that_are_not_there() {
    let bench = Bench::new();
    for size in [1, 1 << 20, 1 << 40, 1 << 62, u64::MAX >> 1] {
        let tar = Tar::new()
            .head(
                b"big",
                &Head {
                    size,
                    ..Head::default()
                },
            )
            .unended();
        let said = refused(&bench, &tar);
        assert!(
            said.contains("big") || said.contains("byte"),
            "{size}: {said}"
        );
    }
    let negative = Tar::new().pax(&[("size", b"-1")]).file("x", b"");
    assert!(refused(&bench, &negative.bytes()).contains("`size`"));
    let long = vec![b'a'; 5 << 20];
    assert!(
        refused(
            &bench,
            &Tar::new().extended(b'L', &long).file("x", b"").bytes()
        )
        .contains("longer")
    );
    assert!(
        refused(&bench, &Tar::new().file(&"n".repeat(256), b"").bytes())
            .contains("no file can have")
    );
    let deep = "d/".repeat(3000);
    assert!(refused(&bench, &Tar::new().file(&(deep.clone() + "x"), b"").bytes()).contains("deep"));
    let huge = vec![1_u8; 70_000];
    let xattr = Tar::new()
        .pax(&[("SCHILY.xattr.user.a", &huge)])
        .file("x", b"");
    assert!(refused(&bench, &xattr.bytes()).contains("attributes"));
}

#[test]
fn sparse_files_with_impossible_maps() {
    let bench = Bench::new();
    for map in [
        "0,5,3,5",
        "5,5,0,5",
        "0,99999999999999999999",
        "0",
        "18446744073709551615,10",
        "0,10,100,1",
        "a,b",
    ] {
        let tar = Tar::new()
            .pax(&[
                ("GNU.sparse.size", b"50"),
                ("GNU.sparse.map", map.as_bytes()),
                ("GNU.sparse.name", b"s"),
            ])
            .file("x", &[1; 10]);
        let said = refused(&bench, &tar.bytes());
        assert!(said.contains("sense"), "{map}: {said}");
    }
    // A hole of eight exabytes is one header; it must cost no more.
    let endless = Tar::new()
        .pax(&[
            ("GNU.sparse.size", b"9223372036854775807"),
            ("GNU.sparse.map", b"0,10"),
            ("GNU.sparse.name", b"s"),
        ])
        .file("x", &[1; 10]);
    match bench.pull(&[endless.bytes()]) {
        Ok(image) => common::fsck(common::erofs(&image)),
        Err(error) => assert!(common::said(&error).contains("larger"), "{error}"),
    }
}

#[test]
fn holes_are_kept() {
    let bench = Bench::new();
    let mut numbers = format!("2\n{}\n10\n{}\n5\n", 3 << 20, (5_u64 << 30) - 5).into_bytes();
    numbers.resize(512, 0);
    let size = 5_u64 << 30;
    let real = size.to_string();
    let data = [&numbers[..], b"0123456789abcde"].concat();
    let sparse = Tar::new()
        .pax(&[
            ("GNU.sparse.major", b"1"),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", b"sparse"),
            ("GNU.sparse.realsize", real.as_bytes()),
        ])
        .file("GNUSparseFile.0/sparse", &data)
        .file("zeros", &vec![0; 9 << 20]);
    let image = bench
        .pull(&[sparse.bytes()])
        .unwrap_or_else(|e| panic!("{e}"));
    common::fsck(common::erofs(&image));
    assert!(image.size < 4 << 20, "{}", image.size);
    let reader = testudo_image::erofs::read::Reader::open(common::erofs(&image)).unwrap();
    let inode = reader.lookup(b"sparse").unwrap().unwrap();
    assert_eq!(inode.size, size);
    let mut piece = [9; 12];
    reader.read_file(&inode, (3 << 20) - 1, &mut piece).unwrap();
    assert_eq!(&piece, b"\x000123456789\0");
    let n = reader.read_file(&inode, size - 6, &mut piece).unwrap();
    assert_eq!(&piece[..n], b"\0abcde");
}

#[test]
fn bombs_end_at_the_limit() {
    let mut bench = Bench::new();
    bench.options.limits = Limits {
        unpacked: 8 << 20,
        entries: 100,
        metadata: 20_000,
    };
    let bomb = Tar::new().file("zeros", &vec![0; 32 << 20]).bytes();
    assert!(gzip(&bomb).len() < 1 << 20);
    let said = refused(&bench, &bomb);
    assert!(said.contains("8388608 bytes"), "{said}");
    // After the archive's end counts as well.
    let trailing = [Tar::new().bytes(), vec![0; 32 << 20]].concat();
    assert!(refused(&bench, &trailing).contains("8388608 bytes"));
    let many = (0..200)
        .fold(Tar::new(), |tar, i| tar.file(&i.to_string(), b""))
        .bytes();
    assert!(refused(&bench, &many).contains("20000 bytes of names"));
    bench.options.limits.metadata = 1 << 20;
    assert!(refused(&bench, &many).contains("100 entries"));
}

#[test]
fn what_is_no_archive_or_a_damaged_one() {
    let bench = Bench::new();
    assert!(refused(&bench, &[7; 5000]).contains("not a tar archive"));
    let good = Tar::new().file("a", &[1; 3000]).bytes();
    for cut in [100, 600, 2000] {
        assert!(refused(&bench, &good[..cut]).contains("read"), "{cut}");
    }
    let mut unknown = Tar::new()
        .head(
            b"x",
            &Head {
                kind: b'M',
                ..Head::default()
            },
        )
        .bytes();
    assert!(refused(&bench, &unknown).contains("unknown kind `M`"));
    unknown[0] = b'y';
    assert!(refused(&bench, &unknown).contains("checksum"));
}

#[test]
fn layers_are_what_the_configuration_says() {
    let bench = Bench::new();
    let (tar, other) = (
        Tar::new().file("a", b"1").bytes(),
        Tar::new().file("a", b"2").bytes(),
    );
    let dir = bench.dir.path().join("wrong");
    let layout = common::layout(&dir, &[(gzip(&tar), Digest::of(&other))], "{}");
    let source = Source::Layout {
        path: layout.dir,
        tag: None,
    };
    let error = bench
        .store
        .pull(&source, &bench.options, &mut Silent)
        .unwrap_err();
    assert!(
        matches!(error, PullError::Unpack { .. }) && common::said(&error).contains("should to"),
        "{error}"
    );
    assert_whole(&bench);

    // A manifest that was changed.
    let good = bench.layout("changed", &[tar]);
    let blob = good.dir.join("blobs/sha256").join(good.manifest.hex());
    let mut bytes = fs::read(&blob).unwrap();
    bytes.push(b' ');
    fs::write(&blob, bytes).unwrap();
    let source = Source::Layout {
        path: good.dir.clone(),
        tag: None,
    };
    let error = bench
        .store
        .pull(&source, &bench.options, &mut Silent)
        .unwrap_err();
    let error = common::said(&error);
    assert!(error.contains("damaged"), "{error}");
    assert_whole(&bench);
}

#[test]
fn names_are_bytes() {
    let bench = Bench::new();
    let name = b"\xff\x01\n";
    let tree = bench.tree(&[Tar::new().head(name, &Head::default()).bytes()]);
    assert_eq!(names(&tree), [text(name)]);
    let bench = Bench::new();
    let nul = Tar::new().pax(&[("path", b"a\0b")]).file("x", b"");
    assert!(refused(&bench, &nul.bytes()).contains("no file can have"));
}
