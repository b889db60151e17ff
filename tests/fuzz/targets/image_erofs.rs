//! Any bytes as an EROFS image: whatever they say, reading ends, and with an error or within them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use testudo_image::erofs::read::Reader;

const FILES: usize = 500;

fuzz_target!(|data: &[u8]| {
    let Ok(image) = Reader::new(data) else {
        return;
    };
    let _ = image.lookup(b"/etc/passwd");
    let mut inodes = Vec::new();
    let _ = image.walk(&mut |_, inode| {
        inodes.push(inode.clone());
        inodes.len() < FILES
    });
    let mut piece = [0; 5000];
    for inode in inodes {
        let _ = image.xattrs(&inode);
        let _ = image.read_link(&inode);
        let _ = image.read_file(&inode, 0, &mut piece);
        let _ = image.read_file(&inode, inode.size.saturating_sub(100), &mut piece);
    }
});
