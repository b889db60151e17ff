//! What a request gives, read with care: structures, and names of one component.

use std::ffi::CStr;

use rustix::io::Errno;
use zerocopy::{FromBytes, Immutable, KnownLayout};

/// The longest name of a directory entry (`NAME_MAX`).
const NAME_MAX: usize = 255;

/// What follows a request's header, taken from its front.
#[derive(Debug, Clone, Copy)]
pub(super) struct Args<'a>(&'a [u8]);

/// The name of a directory entry: one component that is neither `.` nor `..`. With it and a
/// directory's descriptor the kernel cannot be led anywhere but into that directory
/// (CVE-2020-35517; crosvm b/508645172).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Name<'a>(&'a CStr);

impl<'a> Args<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// The next structure.
    pub(super) fn take<T: FromBytes + KnownLayout + Immutable>(&mut self) -> Result<T, Errno> {
        let (value, rest) = T::read_from_prefix(self.0).map_err(|_| Errno::INVAL)?;
        self.0 = rest;
        Ok(value)
    }

    /// The next string, which has to end.
    pub(super) fn string(&mut self) -> Result<&'a CStr, Errno> {
        let string = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno::INVAL)?;
        let len = string.to_bytes_with_nul().len();
        self.0 = self.0.get(len..).unwrap_or_default();
        Ok(string)
    }

    /// The next string as the name of a directory entry.
    pub(super) fn name(&mut self) -> Result<Name<'a>, Errno> {
        Name::new(self.string()?)
    }

    /// The next bytes.
    pub(super) fn bytes(&mut self, len: usize) -> Result<&'a [u8], Errno> {
        let (bytes, rest) = self.0.split_at_checked(len).ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(bytes)
    }
}

impl<'a> Name<'a> {
    pub(super) fn new(name: &'a CStr) -> Result<Self, Errno> {
        let bytes = name.to_bytes();
        if bytes.len() > NAME_MAX {
            return Err(Errno::NAMETOOLONG);
        }
        match bytes {
            b"" | b"." | b".." => Err(Errno::INVAL),
            bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
            _ => Ok(Self(name)),
        }
    }

    pub(super) fn as_c_str(self) -> &'a CStr {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// crosvm b/508645172, CVE-2020-35517: what would lead out of a directory is no name.
    #[test]
    fn a_path_is_not_a_name() {
        for bad in [
            &b"\0"[..],
            b".\0",
            b"..\0",
            b"/\0",
            b"/etc\0",
            b"a/b\0",
            b"../x\0",
            b"a/\0",
            b"./\0",
        ] {
            assert_eq!(Args::new(bad).name(), Err(Errno::INVAL), "{bad:?}");
        }
        assert_eq!(Args::new(b"no end").name(), Err(Errno::INVAL));
        assert_eq!(Args::new(b"").name(), Err(Errno::INVAL));
        for good in [&b"a\0"[..], b"...\0", b"..a\0", b".a\0", b"a.\0", b"\xff\0"] {
            assert!(Args::new(good).name().is_ok(), "{good:?}");
        }
        let mut long = vec![b'a'; 256];
        long.push(0);
        assert_eq!(Args::new(&long).name(), Err(Errno::NAMETOOLONG));
        assert!(Args::new(&long[1..]).name().is_ok());
    }

    proptest! {
        #[test]
        fn a_name_has_one_component(bytes: Vec<u8>) {
            let mut args = Args::new(&bytes);
            while let Ok(name) = args.name() {
                let name = name.as_c_str().to_bytes();
                prop_assert!(!name.is_empty() && name.len() <= 255);
                prop_assert!(!name.contains(&b'/') && name != b"." && name != b"..");
            }
        }
    }
}
