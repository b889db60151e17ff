//! Ways out of an export that are none.

use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::sync::atomic::AtomicBool;

use super::*;

const OPENINGS: [i32; 4] = [
    libc::O_RDONLY,
    libc::O_WRONLY,
    libc::O_RDWR | libc::O_TRUNC,
    libc::O_PATH | libc::O_NOFOLLOW,
];

/// Every operation that takes a name refuses what is none.
#[test]
fn cve_2020_35517_and_crosvm_508645172_no_name_leads_up() {
    let mut client = Client::new(options());
    fs::write(client.outside().join("secret"), "").unwrap();
    client.create("f", libc::O_RDWR).unwrap();
    let file = client.node("f");
    let root = 1_u64.to_le_bytes();
    for bad in [
        "",
        ".",
        "..",
        "/",
        "../secret",
        "../share/f",
        "/etc/passwd",
        "./f",
        "f/",
    ] {
        let bad = c_str(bad);
        let good = c_str("good");
        let requests: [(u32, Vec<&[u8]>); 14] = [
            (opcode::LOOKUP, vec![&bad]),
            (opcode::CREATE, vec![&[0; 16], &bad]),
            (opcode::MKNOD, vec![&[0; 16], &bad]),
            (opcode::MKDIR, vec![&[0; 8], &bad]),
            (opcode::SYMLINK, vec![&bad, &good]),
            (opcode::LINK, vec![bytes(&file), &bad]),
            (opcode::UNLINK, vec![&bad]),
            (opcode::RMDIR, vec![&bad]),
            (opcode::RENAME, vec![&root, &bad, &good]),
            (opcode::RENAME, vec![&root, b"f\0", &bad]),
            (opcode::RENAME2, vec![&root, &[0; 8], &bad, &good]),
            (opcode::RENAME2, vec![&root, &[0; 8], b"f\0", &bad]),
            (
                opcode::RENAME2,
                vec![&root, &[2, 0, 0, 0, 0, 0, 0, 0], b"f\0", &bad],
            ),
            (
                opcode::RENAME2,
                vec![&root, &[1, 0, 0, 0, 0, 0, 0, 0], &bad, &good],
            ),
        ];
        for (op, args) in requests {
            assert_eq!(client.ask(op, 1, &args), Err(Errno::INVAL), "opcode {op}");
        }
    }
    assert!(client.outside().join("secret").exists());
    assert!(client.share().join("f").exists());
}

/// Links are the guest's to follow: here they are files that cannot be opened.
#[test]
fn links_are_not_followed() {
    let mut client = Client::new(options());
    let secret = client.outside().join("secret");
    fs::write(&secret, "secret").unwrap();
    symlink(&secret, client.share().join("file")).unwrap();
    symlink(client.outside(), client.share().join("dir")).unwrap();
    symlink("..", client.share().join("up")).unwrap();
    symlink("/proc/self/root", client.share().join("magic")).unwrap();
    for name in ["file", "dir", "up", "magic"] {
        let link = client.lookup(1, name).unwrap();
        assert_eq!(link.attr.mode & 0o170_000, 0o120_000, "{name}");
        for flags in OPENINGS {
            assert_eq!(client.open(link.nodeid, flags), Err(Errno::LOOP), "{name}");
        }
        assert_eq!(
            client.ask(opcode::OPENDIR, link.nodeid, &[&[0; 8]]),
            Err(Errno::NOTDIR)
        );
        // As a directory it has no entries.
        let below = client.lookup(link.nodeid, "secret").unwrap_err();
        assert!(matches!(below, Errno::NOTDIR | Errno::LOOP), "{below}");
        let made = client.ask(opcode::MKDIR, link.nodeid, &[&[0; 8], &c_str("new")]);
        assert_eq!(made, Err(Errno::NOTDIR));
        let made = client.create(name, libc::O_RDWR | libc::O_TRUNC);
        assert_eq!(made.unwrap_err(), Errno::LOOP);
    }
    assert_eq!(fs::read(secret).unwrap(), b"secret");
    assert!(!client.outside().join("new").exists());
}

/// CVE-2020-35517: the server opens neither devices nor what would keep it waiting.
#[test]
fn cve_2020_35517_special_files_are_not_opened() {
    let mut client = Client::new(options());
    let share = client.share();
    let fifo = share.join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RWXU,
        0,
    )
    .unwrap();
    let _socket = UnixListener::bind(share.join("socket")).unwrap();
    let mut names = vec!["fifo", "socket"];
    let null = rustix::fs::makedev(1, 3);
    let kind = rustix::fs::FileType::CharacterDevice;
    let device = share.join("null");
    if rustix::fs::mknodat(rustix::fs::CWD, &device, kind, rustix::fs::Mode::RWXU, null).is_ok() {
        names.push("null");
    }
    for name in names {
        let node = client.node(name);
        for flags in OPENINGS {
            assert_eq!(client.open(node, flags), Err(Errno::NXIO), "{name}");
            let made = client.create(name, flags);
            assert_eq!(made.unwrap_err(), Errno::NXIO, "{name}");
        }
        let args = [u64::MAX, 0, 2 << 20, 2, 0];
        assert_eq!(
            client.ask(opcode::SETUPMAPPING, node, &[bytes(&args)]),
            Err(Errno::NOSYS)
        );
    }
}

/// Somebody swaps a directory of the export for a link out of it, again and again, while the guest
/// works in it.
#[test]
fn a_swapped_link_is_not_followed() {
    let mut client = Client::new(options());
    let (share, outside) = (client.share(), client.outside());
    let target = outside.join("target");
    fs::create_dir(&target).unwrap();
    fs::write(target.join("f"), "outside").unwrap();
    fs::create_dir(share.join("a")).unwrap();
    fs::write(share.join("a/f"), "inside").unwrap();
    symlink(&target, share.join("b")).unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let swapper = {
        let (done, share) = (Arc::clone(&done), share.clone());
        std::thread::spawn(move || {
            let (a, b) = (share.join("a"), share.join("b"));
            while !done.load(Ordering::Relaxed) {
                let flags = rustix::fs::RenameFlags::EXCHANGE;
                let here = rustix::fs::CWD;
                rustix::fs::renameat_with(here, &a, here, &b, flags).unwrap();
            }
        })
    };
    let (mut dirs, mut links) = (0, 0);
    for round in 0..20_000 {
        let found = client.lookup(1, "a").unwrap();
        let is_link = found.attr.mode & 0o170_000 == 0o120_000;
        *(if is_link { &mut links } else { &mut dirs }) += 1;
        if let Ok(file) = client.lookup(found.nodeid, "f") {
            assert!(!is_link, "an entry below a link");
            let fh = client.open(file.nodeid, libc::O_RDONLY).unwrap();
            assert_eq!(client.read(fh, 0, 100).unwrap(), b"inside");
            client
                .ask(opcode::RELEASE, file.nodeid, &[&fh.to_le_bytes(), &[0; 16]])
                .unwrap();
        }
        let name = c_str(&format!("new{round}"));
        let made = client.get::<EntryOut>(opcode::MKDIR, found.nodeid, &[&[0; 8], &name]);
        assert_eq!(made.is_err(), is_link);
        if let Ok(made) = made {
            let one = 1_u64.to_le_bytes();
            client.ask(opcode::FORGET, made.nodeid, &[&one]).unwrap();
        }
    }
    done.store(true, Ordering::Relaxed);
    swapper.join().unwrap();
    assert!(dirs > 0 && links > 0, "{dirs} directories, {links} links");
    let names: Vec<_> = fs::read_dir(&target).unwrap().collect();
    assert_eq!(names.len(), 1, "the guest made something outside");
    assert_eq!(client.nodes(), 3, "two names and a file");
}

/// A directory in which the guest has a node is moved about, deeper and higher, and the guest
/// climbs from it: without `..` there is no way up.
#[test]
fn moved_directories_lead_nowhere_else() {
    let mut client = Client::new(options());
    let share = client.share();
    fs::write(client.outside().join("secret"), "").unwrap();
    fs::create_dir_all(share.join("a/b/c")).unwrap();
    let a = client.node("a");
    let b = client.lookup(a, "b").unwrap().nodeid;
    let c = client.lookup(b, "c").unwrap().nodeid;
    fs::rename(share.join("a/b/c"), share.join("c")).unwrap();
    for up in ["..", "../secret", "../../secret", "."] {
        assert_eq!(client.lookup(c, up).unwrap_err(), Errno::INVAL);
    }
    let root = 1_u64.to_le_bytes();
    client
        .ask(opcode::RENAME, a, &[&root, &c_str("b"), &c_str("b")])
        .unwrap();
    assert_eq!(client.lookup(a, "b").unwrap_err(), Errno::NOENT);
    assert_eq!(client.lookup(b, "c").unwrap_err(), Errno::NOENT);
    // Out of the export by its owner: what the guest had it keeps, and no more than that.
    fs::rename(share.join("c"), client.outside().join("c")).unwrap();
    assert_eq!(client.lookup(c, "..").unwrap_err(), Errno::INVAL);
    assert_eq!(client.lookup(1, "c").unwrap_err(), Errno::NOENT);
}
