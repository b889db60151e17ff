//! A guest that sends whatever it likes.

use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt, symlink};

use proptest::prelude::*;

use super::*;

const NAMES: [&str; 12] = [
    "a",
    "b",
    "dir",
    "out",
    "up",
    "fifo",
    "..",
    ".",
    "",
    "../canary",
    "/etc/passwd",
    "dir/x",
];

/// Contents, mode, size, times and links.
type About = (Vec<u8>, u32, u64, i64, i64, u64);

/// What is outside of the export.
fn outside(client: &Client) -> BTreeMap<PathBuf, About> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(client.outside()).unwrap() {
        let path = entry.unwrap().path();
        if path.ends_with("share") {
            continue;
        }
        let about = fs::symlink_metadata(&path).unwrap();
        let content = fs::read(&path).unwrap_or_default();
        let (mode, size, links) = (about.mode(), about.size(), about.nlink());
        let times = (about.mtime_nsec(), about.ctime_nsec());
        all.insert(path, (content, mode, size, times.0, times.1, links));
    }
    all
}

fn export() -> Client {
    let window = Arc::new(HostWindow::reserve(4 << 20).unwrap());
    let client = Client::with_window(
        FsOptions {
            descriptors: 60,
            ..options()
        },
        Some(window),
    );
    let share = client.share();
    fs::write(client.outside().join("canary"), "canary").unwrap();
    fs::create_dir(client.outside().join("cage")).unwrap();
    fs::create_dir(share.join("dir")).unwrap();
    fs::write(share.join("a"), "inside").unwrap();
    symlink(client.outside().join("canary"), share.join("out")).unwrap();
    symlink("..", share.join("up")).unwrap();
    client
}

#[derive(Debug, Clone)]
enum Argument {
    Bytes(Vec<u8>),
    Name(usize),
    Number(u64),
    /// Of a node or handle the guest was given.
    Given(usize),
    Zeroes(usize),
}

fn argument() -> impl Strategy<Value = Argument> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..24).prop_map(Argument::Bytes),
        (0..NAMES.len()).prop_map(Argument::Name),
        prop_oneof![0..8_u64, any::<u64>(), Just(2 << 20)].prop_map(Argument::Number),
        any::<usize>().prop_map(Argument::Given),
        (1..12_usize).prop_map(|n| Argument::Zeroes(n * 4)),
    ]
}

fn requests() -> impl Strategy<Value = Vec<(u32, usize, Vec<Argument>, u32)>> {
    let opcode = prop_oneof![8 => 1..53_u32, 1 => any::<u32>()];
    let room = prop_oneof![4 => Just(8192_u32), 1 => 0..200_u32];
    let request = (
        opcode,
        any::<usize>(),
        prop::collection::vec(argument(), 0..6),
        room,
    );
    prop::collection::vec(request, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    #[test]
    fn nothing_outside_is_touched(requests in requests()) {
        let mut client = export();
        let before = outside(&client);
        let mut given = vec![1_u64];
        for (op, node, args, room) in requests {
            let mut body = Vec::new();
            for arg in args {
                match arg {
                    Argument::Bytes(bytes) => body.extend(bytes),
                    Argument::Name(n) => body.extend(c_str(NAMES[n])),
                    Argument::Number(n) => body.extend(n.to_le_bytes()),
                    Argument::Given(n) => body.extend(given[n % given.len()].to_le_bytes()),
                    Argument::Zeroes(n) => body.resize(body.len() + n, 0),
                }
            }
            // A session goes on unless it is ended, so that there is something to break.
            if op == opcode::DESTROY || op == opcode::INIT {
                client.init(!0).unwrap();
                given.truncate(1);
                continue;
            }
            let header = InHeader {
                len: u32::try_from(40 + body.len()).unwrap(),
                opcode: op,
                nodeid: given[node % given.len()],
                ..InHeader::default()
            };
            let answer = client.raw(&[header.as_bytes(), &body].concat(), room);
            if let Some(header) = answer.first_chunk::<16>() {
                let header = OutHeader::read_from_bytes(header).unwrap();
                prop_assert_eq!(header.len as usize, answer.len());
                prop_assert!(header.error <= 0 && header.error > -4096);
                for at in [16, 144] {
                    if let Some(number) = answer.get(at..at + 8) {
                        given.push(u64::from_le_bytes(number.try_into().unwrap()));
                    }
                }
            }
            prop_assert!(client.nodes() <= 30 && client.handles() <= 30);
        }
        prop_assert_eq!(outside(&client), before);
    }

    #[test]
    fn any_bytes_are_survived(messages: Vec<(Vec<u8>, u16)>) {
        let mut client = export();
        let before = outside(&client);
        for (message, room) in messages {
            client.raw(&message, room.into());
        }
        prop_assert_eq!(outside(&client), before);
    }
}

/// A header that says more or less than there is.
#[test]
fn lengths_are_checked() {
    let mut client = export();
    let node = client.node("a");
    let fh = client.open(node, libc::O_RDWR).unwrap();
    let write = |size: u32, len: u32, data: usize| {
        let header = InHeader {
            len,
            opcode: opcode::WRITE,
            nodeid: node,
            ..InHeader::default()
        };
        let args = wire::WriteIn {
            fh,
            size,
            ..wire::WriteIn::default()
        };
        [header.as_bytes(), args.as_bytes(), &vec![b'x'; data]].concat()
    };
    for (size, len, data) in [
        (10, 90, 9),
        (11, 90, 10),
        (10, 89, 10),
        (u32::MAX, 90, 10),
        (10, u32::MAX, 10),
        (10, 39, 10),
        (10, 0, 10),
        (0, 79, 0),
    ] {
        let answer = client.raw(&write(size, len, data), 100);
        let header = OutHeader::read_from_prefix(&answer).unwrap().0;
        assert_eq!(header.error, -libc::EINVAL, "{size} {len} {data}");
    }
    assert_eq!(fs::read(client.share().join("a")).unwrap(), b"inside");
    let answer = client.raw(&write(6, 86, 6), 100);
    assert_eq!(answer.len(), 24);
    assert_eq!(fs::read(client.share().join("a")).unwrap(), b"xxxxxx");
    // No room for so much as a header: nothing is done.
    assert!(client.raw(&write(6, 86, 6), 15).is_empty());
}
