use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::time::{Duration, SystemTime};

use super::*;
use crate::fs::wire::{AttrOut, Dirent, SetattrIn, fattr};

fn entries(answer: &[u8], plus: bool) -> Vec<(String, u64, u64)> {
    let mut rest = answer;
    let mut all = Vec::new();
    while !rest.is_empty() {
        let mut nodeid = 0;
        if plus {
            let (entry, after) = EntryOut::read_from_prefix(rest).unwrap();
            (nodeid, rest) = (entry.nodeid, after);
        }
        let (entry, after) = Dirent::read_from_prefix(rest).unwrap();
        let len = entry.namelen as usize;
        let name = String::from_utf8(after[..len].to_vec()).unwrap();
        all.push((name, entry.off, nodeid));
        rest = &after[len.next_multiple_of(8)..];
    }
    all
}

fn setattr(client: &mut Client, node: u64, set: SetattrIn) -> Result<wire::Attr, Errno> {
    let answer: AttrOut = client.get(opcode::SETATTR, node, &[bytes(&set)])?;
    Ok(answer.attr)
}

#[test]
fn nothing_is_served_before_init() {
    let mut client = Client::new(options());
    client.node_is_there();
    client.ask(opcode::DESTROY, 0, &[]).unwrap();
    assert_eq!(client.lookup(1, "x").unwrap_err(), Errno::IO);
    client.init(!0).unwrap();
    client.node_is_there();
}

impl Client {
    fn node_is_there(&mut self) {
        let attr: AttrOut = self.get(opcode::GETATTR, 1, &[&[0; 16]]).unwrap();
        assert_eq!(attr.attr.mode & 0o170_000, 0o040_000);
    }
}

#[test]
fn init_agrees_on_what_both_can() {
    let mut client = Client::new(options());
    let all = client.init(!0).unwrap();
    let agreed = u64::from(all.flags) | u64::from(all.flags2) << 32;
    for has in [
        init::MAX_PAGES,
        init::PARALLEL_DIROPS,
        init::DO_READDIRPLUS,
        init::HANDLE_KILLPRIV_V2,
        init::BIG_WRITES,
        init::SUBMOUNTS,
    ] {
        assert_ne!(agreed & has, 0, "{has:#x}");
    }
    for not in [init::WRITEBACK_CACHE, init::POSIX_ACL, init::MAP_ALIGNMENT] {
        assert_eq!(agreed & not, 0, "{not:#x}");
    }
    assert_eq!((all.max_pages, all.max_write), (256, 1 << 20));
    let some = client.init(init::MAX_PAGES).unwrap();
    assert_eq!((u64::from(some.flags), some.flags2), (init::MAX_PAGES, 0));
    for (version, expected) in [
        ([8, 0], Ok(7)),
        ([6, 40], Err(Errno::PROTO)),
        ([7, 30], Err(Errno::PROTO)),
    ] {
        let [major, minor] = version;
        let args = [major, minor, 0_u32, 0];
        let answer = client.get::<u32>(opcode::INIT, 0, &[bytes(&args)]);
        assert_eq!(answer, expected);
    }
    for (change, feature) in [
        (
            FsOptions {
                writeback: true,
                ..options()
            },
            init::WRITEBACK_CACHE,
        ),
        (
            FsOptions {
                acl: true,
                ..options()
            },
            init::POSIX_ACL | init::DONT_MASK,
        ),
        (
            FsOptions {
                caching: Caching::Always,
                ..options()
            },
            init::CACHE_SYMLINKS,
        ),
    ] {
        let mut client = Client::new(change);
        let flags = client.init(!0).unwrap().flags;
        assert_eq!(u64::from(flags) & feature, feature);
    }
}

#[test]
fn lookups_are_taken_back() {
    let mut client = Client::new(options());
    for n in 0..50 {
        fs::write(client.share().join(format!("f{n}")), "").unwrap();
    }
    let first: Vec<u64> = (0..50).map(|n| client.node(&format!("f{n}"))).collect();
    let again: Vec<u64> = (0..50).map(|n| client.node(&format!("f{n}"))).collect();
    assert_eq!(first, again);
    assert_eq!(client.nodes(), 50);
    for node in &first[..25] {
        assert!(
            client
                .ask(opcode::FORGET, *node, &[&2_u64.to_le_bytes()])
                .unwrap()
                .is_empty()
        );
    }
    assert_eq!(client.nodes(), 25);
    client
        .ask(opcode::FORGET, first[30], &[&1_u64.to_le_bytes()])
        .unwrap();
    assert_eq!(client.nodes(), 25);
    let mut batch = vec![27_u64];
    for node in &first[25..] {
        batch.extend([*node, 2]);
    }
    // One that is forgotten already, and the root, which is never.
    batch.extend([first[0], 7, 1, u64::MAX]);
    client
        .ask(opcode::BATCH_FORGET, 0, &[bytes(batch.as_slice())])
        .unwrap();
    assert_eq!(client.nodes(), 0);
    assert_eq!(
        client.ask(opcode::GETATTR, first[3], &[&[0; 16]]),
        Err(Errno::STALE)
    );
    client.node_is_there();
    // The place is another's now; the old number is still nobody's.
    let new = client.node("f3");
    assert!(!first.contains(&new));
}

#[test]
fn what_is_not_there_is_remembered_where_names_are() {
    for (caching, valid) in [
        (Caching::None, None),
        (Caching::Auto, Some(1)),
        (Caching::Always, Some(86_400)),
    ] {
        let mut client = Client::new(FsOptions {
            caching,
            ..options()
        });
        let answer = client.get::<EntryOut>(opcode::LOOKUP, 1, &[&c_str("nothing")]);
        match valid {
            None => assert_eq!(answer.unwrap_err(), Errno::NOENT),
            Some(seconds) => {
                let answer = answer.unwrap();
                assert_eq!((answer.nodeid, answer.entry_valid), (0, seconds));
            }
        }
    }
}

#[test]
fn files_are_made_written_and_read() {
    let mut client = Client::new(options());
    let (node, fh) = client.create("file", libc::O_RDWR | libc::O_EXCL).unwrap();
    let data: Vec<u8> = (0..300_000_u32).map(|n| (n % 251) as u8).collect();
    assert_eq!(client.write(fh, 10, &data).unwrap() as usize, data.len());
    assert_eq!(client.read(fh, 10, 500_000).unwrap(), data);
    assert_eq!(client.read(fh, 9, 2).unwrap(), [0, data[0]]);
    assert!(client.read(fh, 1 << 40, 10).unwrap().is_empty());
    assert_eq!(client.read(fh, u64::MAX, 10), Err(Errno::INVAL));
    let on_host = fs::read(client.share().join("file")).unwrap();
    assert_eq!(on_host[10..], data);
    assert_eq!(
        client
            .create("file", libc::O_RDWR | libc::O_EXCL)
            .unwrap_err(),
        Errno::EXIST
    );
    let (same, other) = client.create("file", libc::O_RDONLY).unwrap();
    assert_eq!(same, node);
    assert_eq!(client.write(other, 0, b"x"), Err(Errno::BADF));
    assert_eq!(client.handles(), 2);
    // What is unlinked stays readable, and its node known.
    client.ask(opcode::UNLINK, 1, &[&c_str("file")]).unwrap();
    assert_eq!(client.read(fh, 10, 100).unwrap(), data[..100]);
    let attr: AttrOut = client.get(opcode::GETATTR, node, &[&[0; 16]]).unwrap();
    assert_eq!(attr.attr.nlink, 0);
    for fh in [fh, other] {
        client
            .ask(opcode::RELEASE, node, &[&fh.to_le_bytes(), &[0; 16]])
            .unwrap();
    }
    assert_eq!(client.handles(), 0);
    assert_eq!(client.read(fh, 0, 1), Err(Errno::BADF));
}

#[test]
fn directories_are_told_in_pieces() {
    let mut client = Client::new(options());
    let names: Vec<String> = (0..500)
        .map(|n| format!("{n}-{}", "x".repeat(n % 60)))
        .collect();
    for name in &names {
        fs::write(client.share().join(name), "").unwrap();
    }
    for plus in [false, true] {
        let op = if plus {
            opcode::READDIRPLUS
        } else {
            opcode::READDIR
        };
        let open: OpenOut = client.get(opcode::OPENDIR, 1, &[&[0; 8]]).unwrap();
        let mut told = Vec::new();
        let mut offset = 0;
        loop {
            let args = read_args(open.fh, offset, 1500);
            let answer = client.ask(op, 1, &[bytes(&args)]).unwrap();
            assert!(answer.len() <= 1500);
            let some = entries(&answer, plus);
            let Some((_, last, _)) = some.last() else {
                break;
            };
            offset = *last;
            told.extend(some);
        }
        let mut found: Vec<&str> = told.iter().map(|(n, ..)| n.as_str()).collect();
        found.sort_unstable();
        let mut expected: Vec<&str> = names
            .iter()
            .map(String::as_str)
            .chain([".", ".."])
            .collect();
        expected.sort_unstable();
        assert_eq!(found, expected);
        // From the middle again, and from the beginning.
        for from in [told[200].1, 0] {
            let args = read_args(open.fh, from, 4000);
            let answer = client.ask(op, 1, &[bytes(&args)]).unwrap();
            let next = told.iter().position(|t| t.1 == from).map_or(0, |at| at + 1);
            assert_eq!(entries(&answer, plus)[0].0, told[next].0);
        }
        let args = read_args(open.fh, 0, 20);
        assert_eq!(client.ask(op, 1, &[bytes(&args)]), Err(Errno::INVAL));
        client
            .ask(opcode::RELEASEDIR, 1, &[&open.fh.to_le_bytes(), &[0; 16]])
            .unwrap();
        let known = told.iter().filter(|t| t.2 != 0).count();
        assert_eq!(known, if plus { 500 } else { 0 });
    }
    assert_eq!(client.nodes(), 500);
    assert_eq!(client.handles(), 0);
}

#[test]
fn names_are_made_moved_and_removed() {
    let mut client = Client::new(options());
    let share = client.share();
    let dir: EntryOut = client
        .get(opcode::MKDIR, 1, &[bytes(&[0o750_u32, 0]), &c_str("d")])
        .unwrap();
    assert_eq!(dir.attr.mode, 0o040_750);
    client.create("f", libc::O_WRONLY).unwrap();
    let file = client.node("f");
    let linked: EntryOut = client
        .get(
            opcode::LINK,
            dir.nodeid,
            &[&file.to_le_bytes(), &c_str("g")],
        )
        .unwrap();
    assert_eq!((linked.nodeid, linked.attr.nlink), (file, 2));
    let target = "/etc/passwd";
    let link: EntryOut = client
        .get(opcode::SYMLINK, 1, &[&c_str("l"), &c_str(target)])
        .unwrap();
    assert_eq!(
        client.ask(opcode::READLINK, link.nodeid, &[]).unwrap(),
        target.as_bytes()
    );
    // A link to the link itself, not to where it leads.
    let hard: EntryOut = client
        .get(opcode::LINK, 1, &[&link.nodeid.to_le_bytes(), &c_str("l2")])
        .unwrap();
    assert_eq!(hard.nodeid, link.nodeid);
    client
        .ask(
            opcode::RENAME,
            1,
            &[&dir.nodeid.to_le_bytes(), &c_str("f"), &c_str("h")],
        )
        .unwrap();
    assert!(share.join("d/h").is_file());
    let flags = |flags: u32| [bytes(&1_u64).to_vec(), bytes(&[flags, 0]).to_vec()].concat();
    let args = [&*flags(1), &c_str("l"), &c_str("l2")];
    assert_eq!(client.ask(opcode::RENAME2, 1, &args), Err(Errno::EXIST));
    let args = [&*flags(8), &c_str("l"), &c_str("l3")];
    assert_eq!(client.ask(opcode::RENAME2, 1, &args), Err(Errno::INVAL));
    assert_eq!(
        client.ask(opcode::RMDIR, 1, &[&c_str("d")]),
        Err(Errno::NOTEMPTY)
    );
    assert_eq!(
        client.ask(opcode::UNLINK, 1, &[&c_str("d")]),
        Err(Errno::ISDIR)
    );
    client
        .ask(opcode::UNLINK, dir.nodeid, &[&c_str("g")])
        .unwrap();
    client
        .ask(opcode::UNLINK, dir.nodeid, &[&c_str("h")])
        .unwrap();
    client.ask(opcode::RMDIR, 1, &[&c_str("d")]).unwrap();
    assert!(!share.join("d").exists());
}

#[test]
fn special_files_are_names_and_devices_are_refused() {
    let mut client = Client::new(options());
    let mut mknod = |name: &str, mode: u32, rdev: u32| {
        client.get::<EntryOut>(
            opcode::MKNOD,
            1,
            &[bytes(&[mode, rdev, 0, 0]), &c_str(name)],
        )
    };
    assert!(mknod("fifo", 0o010_600, 0).is_ok());
    assert!(mknod("socket", 0o140_600, 0).is_ok());
    assert!(mknod("file", 0o100_600, 0).is_ok());
    for (mode, rdev) in [
        (0o020_666, 0x103),
        (0o060_666, 0x800),
        (0o060_666, 0),
        (0o040_755, 0),
        (0o120_777, 0),
    ] {
        assert_eq!(mknod("device", mode, rdev).unwrap_err(), Errno::PERM);
    }
    let root = rustix::process::geteuid().is_root();
    match mknod("whiteout", 0o020_000, 0) {
        Ok(entry) => assert_eq!(entry.attr.rdev, 0),
        Err(e) => assert!(!root || e == Errno::PERM, "{e}"),
    }
    assert!(
        client
            .share()
            .join("fifo")
            .metadata()
            .unwrap()
            .file_type()
            .is_fifo()
    );
}

#[test]
fn attributes_are_set() {
    let mut client = Client::new(options());
    let (node, fh) = client.create("f", libc::O_RDWR).unwrap();
    client.write(fh, 0, &[1; 1000]).unwrap();
    let set = SetattrIn {
        valid: fattr::SIZE,
        size: 10,
        ..SetattrIn::default()
    };
    assert_eq!(setattr(&mut client, node, set).unwrap().size, 10);
    let set = SetattrIn {
        valid: fattr::SIZE | fattr::FH,
        fh,
        size: 5000,
        ..SetattrIn::default()
    };
    assert_eq!(setattr(&mut client, node, set).unwrap().size, 5000);
    let set = SetattrIn {
        valid: fattr::MODE,
        mode: 0o106_711,
        ..SetattrIn::default()
    };
    assert_eq!(
        setattr(&mut client, node, set).unwrap().mode & 0o7777,
        0o6711
    );
    let set = SetattrIn {
        valid: fattr::ATIME | fattr::MTIME,
        atime: 1_000_000_000,
        atimensec: 5,
        mtime: -7,
        mtimensec: 999_999_999,
        ..SetattrIn::default()
    };
    let attr = setattr(&mut client, node, set).unwrap();
    assert_eq!((attr.atime, attr.mtime), (1_000_000_000, -7));
    let set = SetattrIn {
        valid: fattr::MTIME | fattr::MTIME_NOW,
        ..SetattrIn::default()
    };
    let attr = setattr(&mut client, node, set).unwrap();
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(attr.mtime.cast_unsigned());
    assert!(now.elapsed().unwrap() < Duration::from_secs(100));
    assert_eq!(attr.atime, 1_000_000_000);
    // A link has times of its own.
    let outside = client.outside().join("target");
    fs::write(&outside, "").unwrap();
    let before = fs::metadata(&outside).unwrap().mtime();
    symlink(&outside, client.share().join("l")).unwrap();
    let link = client.node("l");
    let set = SetattrIn {
        valid: fattr::MTIME,
        mtime: 12345,
        ..SetattrIn::default()
    };
    assert_eq!(setattr(&mut client, link, set).unwrap().mtime, 12345);
    assert_eq!(fs::metadata(&outside).unwrap().mtime(), before);
}

#[test]
fn privileges_of_a_file_go_when_somebody_else_writes() {
    let mut client = Client::new(options());
    let (_, fh) = client.create("f", libc::O_RDWR).unwrap();
    let path = client.share().join("f");
    for (before, after) in [(0o6755, 0o755), (0o4755, 0o755), (0o2745, 0o2745)] {
        fs::set_permissions(&path, fs::Permissions::from_mode(before)).unwrap();
        client
            .write_flagged(fh, 0, b"x", wire::WRITE_KILL_SUIDGID)
            .unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, after);
    }
}

#[test]
fn new_files_belong_to_who_made_them() {
    if !rustix::process::geteuid().is_root() {
        // Then all of them are this user's, which the other tests see.
        return;
    }
    let mut client = Client::new(options());
    // A directory its user reaches by a group the host knows nothing of.
    fs::set_permissions(client.share(), fs::Permissions::from_mode(0o700)).unwrap();
    (client.uid, client.gid) = (1234, 5678);
    client.create("f", libc::O_RDWR).unwrap();
    client
        .ask(opcode::MKDIR, 1, &[bytes(&[0o755_u32, 0]), &c_str("d")])
        .unwrap();
    client
        .ask(opcode::SYMLINK, 1, &[&c_str("l"), &c_str("x")])
        .unwrap();
    for name in ["f", "d", "l"] {
        let made = fs::symlink_metadata(client.share().join(name)).unwrap();
        assert_eq!((made.uid(), made.gid()), (1234, 5678), "{name}");
    }
    (client.uid, client.gid) = (0, 0);
    client.create("g", libc::O_RDWR).unwrap();
    assert_eq!(fs::metadata(client.share().join("g")).unwrap().uid(), 0);
    (client.uid, client.gid) = (u32::MAX, 0);
    assert_eq!(client.create("h", libc::O_RDWR).unwrap_err(), Errno::PERM);
}

#[test]
fn a_read_only_export_is_not_changed() {
    let mut client = Client::new(FsOptions {
        readonly: true,
        ..options()
    });
    fs::write(client.share().join("f"), "content").unwrap();
    let file = client.node("f");
    for flags in [
        libc::O_WRONLY,
        libc::O_RDWR,
        libc::O_TRUNC,
        libc::O_RDWR | libc::O_APPEND,
    ] {
        assert_eq!(client.open(file, flags), Err(Errno::ROFS));
    }
    let fh = client.open(file, libc::O_RDONLY).unwrap();
    assert_eq!(client.read(fh, 0, 100).unwrap(), b"content");
    let long = [0; 200];
    for op in [
        opcode::WRITE,
        opcode::CREATE,
        opcode::SETATTR,
        opcode::MKNOD,
        opcode::MKDIR,
        opcode::SYMLINK,
        opcode::LINK,
        opcode::UNLINK,
        opcode::RMDIR,
        opcode::RENAME,
        opcode::RENAME2,
        opcode::SETXATTR,
        opcode::REMOVEXATTR,
        opcode::FALLOCATE,
        opcode::COPY_FILE_RANGE,
        opcode::TMPFILE,
    ] {
        assert_eq!(client.ask(op, 1, &[&long]), Err(Errno::ROFS), "opcode {op}");
    }
}

#[test]
fn tables_are_bounded() {
    let mut client = Client::new(FsOptions {
        descriptors: 20,
        ..options()
    });
    let mut made = 0;
    let error = loop {
        match client.create(&format!("f{made}"), libc::O_RDWR) {
            Ok(_) => made += 1,
            Err(e) => break e,
        }
    };
    assert_eq!((made, error), (10, Errno::NFILE));
    assert_eq!((client.nodes(), client.handles()), (10, 10));
    client.init(!0).unwrap();
    assert_eq!(
        (client.nodes(), client.handles()),
        (0, 0),
        "a new session begins with nothing"
    );
}

#[test]
fn the_window_shows_files() {
    const GRANULE: u64 = 2 << 20;
    let window = Arc::new(HostWindow::reserve(4 * GRANULE).unwrap());
    let mut client = Client::with_window(options(), Some(Arc::clone(&window)));
    let init = client.init(!0).unwrap();
    assert_eq!(init.map_alignment, 21);
    let flags = u64::from(init.flags);
    let both = init::MAP_ALIGNMENT | init::HANDLE_KILLPRIV_V2;
    assert_eq!(
        flags & both,
        init::MAP_ALIGNMENT,
        "privileges go with a write"
    );
    fs::write(client.share().join("f"), [7; 5000]).unwrap();
    fs::create_dir(client.share().join("d")).unwrap();
    let (file, dir) = (client.node("f"), client.node("d"));
    let map = |client: &mut Client, node, foffset: u64, len: u64, flags: u64, moffset: u64| {
        let args = [u64::MAX, foffset, len, flags, moffset];
        client.ask(opcode::SETUPMAPPING, node, &[bytes(&args)])
    };
    let mapped = |client: &Client| client.gauge(&client.server.gauges.mapped);
    for (flags, moffset) in [(2, 0), (3, GRANULE), (3, 0)] {
        map(&mut client, file, 0, GRANULE, flags, moffset).unwrap();
    }
    assert_eq!(mapped(&client), 2);
    for (node, foffset, len, flags, moffset) in [
        (dir, 0, GRANULE, 2, 0),
        (file, 0, GRANULE, 0, 0),
        (file, 4096, GRANULE, 2, 0),
        (file, 0, 4096, 2, 0),
        (file, 0, GRANULE, 2, 4 * GRANULE),
        (file, 0, 5 * GRANULE, 2, 0),
        (file, 0, u64::MAX, 2, GRANULE),
        (file, 1 << 63, GRANULE, 2, 0),
    ] {
        let refused = map(&mut client, node, foffset, len, flags, moffset);
        assert_eq!(
            refused,
            Err(Errno::INVAL),
            "{foffset:#x} {len:#x} {flags} {moffset:#x}"
        );
    }
    let remove = [bytes(&1_u32), bytes(&[GRANULE, GRANULE])].concat();
    client.ask(opcode::REMOVEMAPPING, file, &[&remove]).unwrap();
    assert_eq!(mapped(&client), 1);
    client.ask(opcode::DESTROY, 0, &[]).unwrap();
    assert_eq!(mapped(&client), 0);

    let mut client = Client::with_window(
        FsOptions {
            readonly: true,
            ..options()
        },
        Some(window),
    );
    fs::write(client.share().join("f"), [7; 5000]).unwrap();
    let file = client.node("f");
    assert_eq!(map(&mut client, file, 0, GRANULE, 3, 0), Err(Errno::ROFS));
    map(&mut client, file, 0, GRANULE, 2, 0).unwrap();
}
