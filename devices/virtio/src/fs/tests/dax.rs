//! The window while somebody else changes the files that are in it.

use std::os::unix::fs::FileExt;

use super::*;
use crate::fs::wire::{SetattrIn, fattr};

const GRANULE: u64 = 2 << 20;

/// What the window shows at `offset`; `None` where a guest would fail.
fn seen(window: &HostWindow, offset: u64) -> Option<u8> {
    let memory = fs::File::open("/proc/self/mem").unwrap();
    let at = u64::try_from(window.address()).unwrap() + offset;
    let mut byte = [0];
    memory.read_exact_at(&mut byte, at).ok().map(|()| byte[0])
}

fn resize(client: &mut Client, node: u64, size: u64) {
    let set = SetattrIn {
        valid: fattr::SIZE,
        size,
        ..SetattrIn::default()
    };
    client
        .ask(opcode::SETATTR, node, &[set.as_bytes()])
        .unwrap();
}

#[test]
fn a_file_that_others_shorten_has_zeroes_until_it_grows() {
    let window = Arc::new(HostWindow::reserve(4 * GRANULE).unwrap());
    let mut client = Client::with_window(options(), Some(Arc::clone(&window)));
    let path = client.share().join("f");
    fs::write(&path, vec![7; 5 << 20]).unwrap();
    fs::write(client.share().join("other"), [9; 100]).unwrap();
    let (file, other) = (client.node("f"), client.node("other"));
    for (node, foffset, len, moffset) in [(file, 0, 2 * GRANULE, GRANULE), (other, 0, GRANULE, 0)] {
        let args = [u64::MAX, foffset, len, 3, moffset];
        client
            .ask(opcode::SETUPMAPPING, node, &[args.as_bytes()])
            .unwrap();
    }
    let in_file = |offset| GRANULE + offset;
    assert_eq!(seen(&window, in_file(3 << 20)), Some(7));
    let host = fs::OpenOptions::new().write(true).open(&path).unwrap();
    host.set_len(5000).unwrap();
    assert_eq!(seen(&window, in_file(3 << 20)), None);
    let gone = (2 * GRANULE - 8192) / 4096;
    assert_eq!(client.server.mend(), gone);
    assert_eq!(client.server.mend(), gone, "once");
    for (offset, byte) in [(0, 7), (4999, 7), (5000, 0), (8192, 0), (3 << 20, 0)] {
        assert_eq!(seen(&window, in_file(offset)), Some(byte), "{offset}");
    }
    // What lies behind the end of a file that is as it was is not ours to hide: it may grow.
    assert_eq!(
        [seen(&window, 99), seen(&window, 100 << 10)],
        [Some(9), None]
    );
    host.set_len(4 << 20).unwrap();
    host.write_all_at(&[8], 3 << 20).unwrap();
    assert_eq!(seen(&window, in_file(3 << 20)), Some(0));
    resize(&mut client, file, 4 << 20);
    assert_eq!(seen(&window, in_file(3 << 20)), Some(8));
    host.set_len(0).unwrap();
    client.server.look();
    let gone = gone + 2 * GRANULE / 4096;
    assert_eq!(client.server.mend(), gone);
    assert_eq!(seen(&window, in_file(0)), Some(0));
    // Looked at, and not asked for.
    host.set_len(5000).unwrap();
    host.write_all_at(&[6], 70).unwrap();
    client.server.look();
    assert_eq!(seen(&window, in_file(70)), Some(6));
    // Mapped again, to write, while the guest does not know: zeroes as before; and what it maps anew
    // behind the end, too. The end of the other file is left alone.
    let map = |client: &mut Client, node: u64, foffset: u64, moffset: u64| {
        let args = [u64::MAX, foffset, GRANULE, 3, moffset];
        client
            .ask(opcode::SETUPMAPPING, node, &[args.as_bytes()])
            .unwrap();
    };
    host.set_len(0).unwrap();
    client.server.look();
    map(&mut client, file, 0, GRANULE);
    map(&mut client, file, GRANULE, 3 * GRANULE);
    map(&mut client, other, 0, 0);
    assert_eq!(seen(&window, in_file(70)), Some(0));
    assert_eq!(seen(&window, 3 * GRANULE + 70), Some(0));
    assert_eq!(seen(&window, 100 << 10), None);
    resize(&mut client, file, 2 * GRANULE);
    host.write_all_at(&[4], GRANULE + 70).unwrap();
    assert_eq!(seen(&window, 3 * GRANULE + 70), Some(4));
    client.ask(opcode::DESTROY, 0, &[]).unwrap();
    let all = client.server.mend();
    host.set_len(0).unwrap();
    assert_eq!(client.server.mend(), all);
}
