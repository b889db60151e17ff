//! What layers add up to.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests may")]

mod common;

use common::{Bench, Head, Tar, names};

#[test]
fn everything_a_file_can_be() {
    let bench = Bench::new();
    let cap = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let tar = Tar::new()
        .head(
            b"./",
            &Head {
                kind: b'5',
                mode: 0o750,
                uid: 7,
                ..Head::default()
            },
        )
        .dir("bin/")
        .pax(&[
            ("SCHILY.xattr.security.capability", cap),
            ("SCHILY.xattr.user.a", b"1\n2"),
            ("mtime", b"1234567890.25"),
        ])
        .head(
            b"bin/ping",
            &Head {
                mode: 0o4755,
                uid: 70_000,
                gid: 4_000_000_000,
                size: 5,
                ..Head::default()
            },
        )
        .data(b"#!/x\n")
        .hard_link("bin/ping6", "/bin/ping")
        .symlink("lib", "usr/lib")
        .symlink("long", &"x/".repeat(1000))
        .head(
            b"dev/null",
            &Head {
                kind: b'3',
                mode: 0o666,
                device: (1, 3),
                ..Head::default()
            },
        )
        .head(
            b"dev/sda",
            &Head {
                kind: b'4',
                mode: 0o660,
                device: (259, 300_000),
                ..Head::default()
            },
        )
        .head(
            b"dev/pipe",
            &Head {
                kind: b'6',
                mode: 0o600,
                ..Head::default()
            },
        )
        .file("empty", b"")
        .head(
            b"tmp",
            &Head {
                kind: b'5',
                mode: 0o1777,
                ..Head::default()
            },
        );
    let tree = bench.tree(&[tar.bytes()]);
    let line = |name: &str| tree[name].as_str();
    assert_eq!(line(""), "Directory 750 7:0 x0 1700000000.0 [] ");
    assert_eq!(line("bin/ping"), line("bin/ping6"));
    let ping = line("bin/ping");
    assert!(
        ping.starts_with(
            "File 4755 70000:4000000000 x2 1234567890.250000000 [security.capability="
        ),
        "{ping}"
    );
    assert!(ping.contains(r"user.a=1\n2] 5 "), "{ping}");
    assert_eq!(line("lib"), "Symlink 777 0:0 x1 1700000000.0 [] usr/lib");
    assert!(line("long").ends_with("x/x/"));
    assert_eq!(line("dev"), "Directory 755 0:0 x0 1700000000.0 [] ");
    assert!(line("dev/null").starts_with("Char 666") && line("dev/null").ends_with("(1, 3)"));
    assert!(line("dev/sda").ends_with("(259, 300000)"));
    assert!(line("dev/pipe").starts_with("Fifo 600"));
    assert!(line("empty").contains("] 0 "));
    assert!(line("tmp").starts_with("Directory 1777"));
}

#[test]
fn whiteouts_hide_what_is_below_only() {
    let bench = Bench::new();
    let lower = Tar::new()
        .file("a/1", b"1")
        .file("a/2", b"2")
        .file("b/x/deep", b"3")
        .file("b/y", b"4")
        .file("c/old", b"5")
        .file("d/old", b"6")
        .file("e", b"7");
    let upper = Tar::new()
        // In any order: a whiteout before or after what its layer has.
        .file("a/.wh.1", b"")
        .file("b/new", b"8")
        .file("b/.wh..wh..opq", b"")
        .file("c/new", b"9")
        .file(".wh.c", b"")
        .file(".wh.d", b"")
        .file("d/new", b"10")
        .file(".wh.nothing", b"")
        .file("nowhere/.wh.x", b"")
        .file(".wh..wh.plnk", b"")
        .file(".wh.e", b"")
        .dir("e");
    let tree = bench.tree(&[lower.bytes(), upper.bytes()]);
    assert_eq!(
        names(&tree),
        ["a", "a/2", "b", "b/new", "c", "c/new", "d", "d/new", "e"]
    );
    assert!(tree["e"].starts_with("Directory"));
}

#[test]
fn upper_layers_replace_and_merge() {
    let bench = Bench::new();
    let lower = Tar::new()
        .head(
            b"etc",
            &Head {
                kind: b'5',
                mode: 0o755,
                ..Head::default()
            },
        )
        .file("etc/passwd", b"old")
        .hard_link("etc/copy", "etc/passwd")
        .symlink("lib", "usr/lib")
        .file("usr/lib/a", b"a")
        .file("dir/inside", b"x")
        .file("file", b"x");
    let upper = Tar::new()
        .head(
            b"etc",
            &Head {
                kind: b'5',
                mode: 0o700,
                uid: 5,
                ..Head::default()
            },
        )
        .file("etc/passwd", b"new")
        // Through the symlink, as on a real system.
        .file("lib/b", b"b")
        .file("dir", b"now a file")
        .head(
            b"file",
            &Head {
                kind: b'5',
                mode: 0o755,
                ..Head::default()
            },
        )
        .file("file/inside", b"y");
    let third = Tar::new().hard_link("usr/lib/c", "lib/b");
    let tree = bench.tree(&[lower.bytes(), upper.bytes(), third.bytes()]);
    assert_eq!(
        names(&tree),
        [
            "dir",
            "etc",
            "etc/copy",
            "etc/passwd",
            "file",
            "file/inside",
            "lib",
            "usr",
            "usr/lib",
            "usr/lib/a",
            "usr/lib/b",
            "usr/lib/c"
        ]
    );
    assert!(tree["etc"].starts_with("Directory 700 5:0"));
    assert_ne!(
        tree["etc/copy"], tree["etc/passwd"],
        "a hard link keeps the old content"
    );
    assert!(tree["etc/copy"].contains(" x1 "));
    assert_eq!(tree["usr/lib/b"], tree["usr/lib/c"]);
    assert!(tree["lib"].starts_with("Symlink") && tree["dir"].starts_with("File"));
}

#[test]
fn names_of_all_lengths_and_kinds() {
    let bench = Bench::new();
    let part = "n".repeat(255);
    let long = [part.as_str(); 15].join("/") + "/" + &"m".repeat(255);
    assert_eq!(long.len(), 4095);
    let pax_name = "p".repeat(200);
    let raw = b"\xff\xfe*\n'\" \x01";
    let tar = Tar::new()
        .file(&long, b"deep")
        .pax(&[("path", pax_name.as_bytes())])
        .file("short", b"pax")
        .head(raw, &Head::default())
        .file("!before-dot", b"")
        .file("-dash", b"");
    let tree = bench.tree(&[tar.bytes()]);
    for name in [
        long.as_str(),
        &pax_name,
        &common::text(raw),
        "!before-dot",
        "-dash",
    ] {
        assert!(tree.contains_key(name), "{name}");
    }
    assert!(!tree.contains_key("short"));
}

#[test]
fn many_names_in_one_directory() {
    let bench = Bench::new();
    let mut tar = Tar::new();
    for i in 0..30_000 {
        tar = tar.head(
            format!("dir/a-name-of-some-length-{i:08}").as_bytes(),
            &Head::default(),
        );
    }
    let tree = bench.tree(&[tar.bytes()]);
    assert_eq!(tree.len(), 30_002);
}

#[test]
fn forty_layers() {
    let bench = Bench::new();
    let layers: Vec<Vec<u8>> = (0..40)
        .map(|i| {
            let mut tar = Tar::new()
                .file("count", i.to_string().as_bytes())
                .file(&format!("layer/{i:02}"), &[i; 5000]);
            if i > 0 {
                tar = tar.file(&format!("layer/.wh.{:02}", i - 1), b"");
            }
            tar.bytes()
        })
        .collect();
    let tree = bench.tree(&layers);
    assert_eq!(names(&tree), ["count", "layer", "layer/39"]);
    assert!(tree["count"].contains("] 2 "));
}

#[test]
fn space_of_what_was_replaced_is_used_again() {
    let bench = Bench::new();
    let big = |byte: u8| vec![byte; 3 << 20];
    let layers: Vec<Vec<u8>> = (1..20)
        .map(|i| Tar::new().file("big", &big(i)).bytes())
        .collect();
    let image = bench.pull(&layers).unwrap();
    assert!(image.size < 8 << 20, "{}", image.size);
    let tree = common::tree(common::erofs(&image));
    let last = testudo_image::Digest::of(&big(19));
    assert!(tree["big"].ends_with(last.short()), "{}", tree["big"]);
    let same: Vec<Vec<u8>> = (1..20)
        .map(|i| Tar::new().file(&format!("big{i}"), &big(7)).bytes())
        .collect();
    let image = bench.pull(&same).unwrap();
    assert!(image.size < 8 << 20, "{}", image.size);
    assert_eq!(common::tree(common::erofs(&image)).len(), 20);
}

#[test]
fn files_with_holes_take_the_place_of_files_without() {
    let bench = Bench::new();
    let full = vec![0xff_u8; 7 << 20];
    let mut holed = vec![0_u8; 7 << 20];
    for at in [0, 1_500_000, 1_600_000, 4 << 20, (7 << 20) - 1] {
        holed[at] = 1;
    }
    let layers = [
        Tar::new().file("a", &full).file("b", b"behind").bytes(),
        Tar::new().file(".wh.a", b"").file("c", &holed).bytes(),
    ];
    let image = bench.pull(&layers).unwrap();
    common::fsck(common::erofs(&image));
    let tree = common::tree(common::erofs(&image));
    let wanted = testudo_image::Digest::of(&holed);
    assert!(tree["c"].ends_with(wanted.short()), "{}", tree["c"]);
    assert!(tree["b"].contains("] 6 "));
}
