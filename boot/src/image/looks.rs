//! A guess at what a file is that is no kernel, for the error message.

/// (offset, magic, what it is).
const KNOWN: &[(usize, &[u8], &str)] = &[
    (0, b"\x1f\x8b", "a gzip file; decompress it with `gunzip`"),
    (0, b"\xfd7zXZ\0", "an xz file; decompress it with `unxz`"),
    (
        0,
        b"\x28\xb5\x2f\xfd",
        "a zstd file; decompress it with `unzstd`",
    ),
    (0, b"BZh", "a bzip2 file; decompress it with `bunzip2`"),
    (
        0,
        b"\x04\x22\x4d\x18",
        "an lz4 file; decompress it with `unlz4`",
    ),
    (
        0,
        b"\x02\x21\x4c\x18",
        "an lz4 file; decompress it with `unlz4`",
    ),
    (0x38, b"ARM\x64", "a kernel for aarch64"),
    (0x38, b"RSC\x05", "a kernel for riscv64"),
    (0, b"070701", "an initramfs (cpio); give it as the initrd"),
    (0, b"070702", "an initramfs (cpio); give it as the initrd"),
    (0, b"\x7fELF", "an ELF file cut off in its header"),
    (
        0,
        b"MZ",
        "an EFI program without a Linux setup header; give the bzImage or vmlinux it was made from",
    ),
    (
        0,
        b"!<arch>\n",
        "a Debian package or library archive; extract it",
    ),
    (0, b"\xed\xab\xee\xdb", "an RPM package; extract it"),
    (0, b"hsqs", "a squashfs image"),
    (0, b"QFI\xfb", "a qcow2 disk image"),
    (257, b"ustar", "a tar archive; extract it"),
    (510, b"\x55\xaa", "a disk image or boot sector"),
    (0, b"#!", "a script"),
];

pub(super) fn like(head: &[u8]) -> &'static str {
    let found = KNOWN.iter().find(|(offset, magic, _)| {
        head.get(*offset..)
            .is_some_and(|rest| rest.starts_with(magic))
    });
    match found {
        Some((_, _, name)) => name,
        None if head.iter().all(|b| *b == 0) => "nothing but zeroes",
        None if head
            .iter()
            .all(|b| matches!(b, b'\t' | b'\n' | b'\r' | b' '..=b'~')) =>
        {
            "text"
        }
        None => "data of no format known here; bzImage and ELF vmlinux are",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn common_mistakes_are_recognised() {
        assert!(like(b"\x1f\x8b\x08\0").contains("gzip"));
        assert!(like(&[b"MZ".as_slice(), &[0; 600]].concat()).contains("EFI"));
        assert!(like(&[[0; 0x38].as_slice(), b"ARM\x64"].concat()).contains("aarch64"));
        assert_eq!(like(b"hello\n"), "text");
        assert_eq!(like(&[0; 64]), "nothing but zeroes");
        assert!(like(&[0xff; 64]).contains("no format known"));
    }
}
