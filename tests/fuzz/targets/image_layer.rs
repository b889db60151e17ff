//! Any bytes as two layers: refused, or an image that our reader reads to its end.
//!
//! The first byte says where the first layer ends, in 256ths.
#![no_main]

use std::fs::File;
use std::io::Read;

use libfuzzer_sys::fuzz_target;
use testudo_image::Digest;
use testudo_image::erofs::read::{FileType, Reader};
use testudo_image::layers::{Layer, Limits, unpack};

const LIMITS: Limits = Limits {
    unpacked: 4 << 20,
    entries: 2000,
    metadata: 4 << 20,
};

fuzz_target!(|data: &[u8]| {
    let Some((&at, rest)) = data.split_first() else {
        return;
    };
    let (lower, upper) = rest.split_at(rest.len() * usize::from(at) / 256);
    let layers = [lower, upper].map(|bytes| {
        let bytes = bytes.to_vec();
        Ok(Layer {
            name: "fuzzed".into(),
            // Right if it is not compressed: then all the way is gone.
            diff_id: Digest::of(&bytes),
            input: Box::new(std::io::Cursor::new(bytes)) as Box<dyn Read + Send>,
        })
    });
    let file: File = tempfile::tempfile_in("/dev/shm").expect("a file in memory");
    let Ok(written) = unpack(layers, &file, [7; 16], LIMITS, &mut |_, _| {}) else {
        return;
    };
    assert_eq!(file.metadata().expect("its size").len(), written.size);
    let image = Reader::new(&file).expect("our own superblock");
    let mut files = Vec::new();
    image
        .walk(&mut |_, inode| {
            files.push(inode.clone());
            true
        })
        .expect("our own directories");
    let mut piece = vec![0; 64 << 10];
    for inode in files {
        image.xattrs(&inode).expect("our own attributes");
        match inode.file_type().expect("our own modes") {
            FileType::File => {
                let end = inode.size.saturating_sub(piece.len() as u64);
                for at in [0, end] {
                    image.read_file(&inode, at, &mut piece).expect("our own data");
                }
            }
            FileType::Symlink => drop(image.read_link(&inode).expect("our own symlinks")),
            _ => {}
        }
    }
});
