//! A writer of initramfs archives: the "newc" cpio format of the kernel's
//! `Documentation/driver-api/early-userspace/buffer-format.rst`.

use std::io::{self, Write};

const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFCHR: u32 = 0o020_000;
/// End of the archive.
const TRAILER: &str = "TRAILER!!!";

/// Writes entries one after another; the kernel wants a folder before what is in it.
pub struct Cpio<W> {
    to: W,
    inode: u32,
}

impl<W: Write> Cpio<W> {
    /// An archive written to `to` as it grows.
    pub fn new(to: W) -> Cpio<W> {
        Cpio { to, inode: 0 }
    }

    /// A folder, mode 0755.
    pub fn dir(&mut self, path: &str) -> io::Result<()> {
        self.entry(path, S_IFDIR | 0o755, (0, 0), &[])
    }

    /// A regular file with these permission bits.
    pub fn file(&mut self, path: &str, mode: u32, data: &[u8]) -> io::Result<()> {
        self.entry(path, S_IFREG | mode, (0, 0), data)
    }

    /// A character device, mode 0600.
    pub fn char_device(&mut self, path: &str, major: u32, minor: u32) -> io::Result<()> {
        self.entry(path, S_IFCHR | 0o600, (major, minor), &[])
    }

    /// Ends the archive; without it the kernel calls it cut off.
    pub fn finish(mut self) -> io::Result<W> {
        self.entry(TRAILER, 0, (0, 0), &[])?;
        Ok(self.to)
    }

    fn entry(&mut self, path: &str, mode: u32, dev: (u32, u32), data: &[u8]) -> io::Result<()> {
        let name = path.trim_start_matches('/');
        let too_long = || io::Error::new(io::ErrorKind::InvalidInput, format!("{path} is too big"));
        let size = u32::try_from(data.len()).map_err(|_| too_long())?;
        let name_size = u32::try_from(name.len() + 1).map_err(|_| too_long())?;
        self.inode += 1;
        let (rdev_major, rdev_minor) = dev;
        // ino mode uid gid nlink mtime filesize major minor rmajor rminor namesize check
        let fields = [
            self.inode, mode, 0, 0, 1, 0, size, 0, 0, rdev_major, rdev_minor, name_size, 0,
        ];
        let mut head = String::from("070701");
        for field in fields {
            head.push_str(&format!("{field:08x}"));
        }
        self.to.write_all(head.as_bytes())?;
        self.to.write_all(name.as_bytes())?;
        self.to.write_all(&[0])?;
        self.pad(head.len() + name.len() + 1)?;
        self.to.write_all(data)?;
        self.pad(data.len())
    }

    /// Header with name, and data, each end on a multiple of four.
    fn pad(&mut self, written: usize) -> io::Result<()> {
        let missing = written.next_multiple_of(4) - written;
        self.to.write_all(&[0; 3][..missing])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A reader written from the format's description, for the round trip.
    fn read(mut archive: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        loop {
            let field = |n: usize| {
                let text = std::str::from_utf8(&archive[6 + n * 8..14 + n * 8]).unwrap();
                u32::from_str_radix(text, 16).unwrap()
            };
            assert_eq!(&archive[..6], b"070701");
            let (mode, size, name_size) = (field(1), field(6) as usize, field(11) as usize);
            let name = std::str::from_utf8(&archive[110..110 + name_size - 1])
                .unwrap()
                .to_owned();
            assert_eq!(archive[110 + name_size - 1], 0);
            let data = (110 + name_size).next_multiple_of(4);
            if name == TRAILER {
                assert_eq!(archive.len(), data);
                return entries;
            }
            entries.push((name, mode, archive[data..data + size].to_vec()));
            archive = &archive[(data + size).next_multiple_of(4)..];
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            files in prop::collection::vec(("[a-z]{1,9}(/[a-z]{1,9}){0,2}", prop::collection::vec(any::<u8>(), 0..99)), 0..9)
        ) {
            let mut cpio = Cpio::new(Vec::new());
            for (path, data) in &files {
                cpio.file(path, 0o644, data).unwrap();
            }
            let archive = cpio.finish().unwrap();
            let wanted: Vec<_> = files.into_iter().map(|(p, d)| (p, S_IFREG | 0o644, d)).collect();
            prop_assert_eq!(read(&archive), wanted);
        }
    }

    #[test]
    fn folders_and_devices_have_their_types() {
        let mut cpio = Cpio::new(Vec::new());
        cpio.dir("/dev").unwrap();
        cpio.char_device("/dev/console", 5, 1).unwrap();
        let entries = read(&cpio.finish().unwrap());
        assert_eq!(entries[0], ("dev".to_owned(), 0o040_755, Vec::new()));
        assert_eq!(
            entries[1],
            ("dev/console".to_owned(), 0o020_600, Vec::new())
        );
    }
}
