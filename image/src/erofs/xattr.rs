//! Extended attributes: which have a place in EROFS, and how they stand behind an inode.

use super::XATTR_HEADER_LEN;

/// Indexes of prefixes (`EROFS_XATTR_INDEX_*`). The two of access lists are whole names.
const PREFIXES: &[(u8, &[u8])] = &[(1, b"user."), (4, b"trusted."), (6, b"security.")];
const ACL: &[(u8, &[u8])] = &[
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
];
/// A value's length in Linux (XATTR_SIZE_MAX) is 64 KiB; here it has 16 bits.
const VALUE_MAX: usize = 65_535;
/// Of all attributes of one inode.
const TOTAL_MAX: usize = 256 << 10;

/// A name taken apart, or nothing for what has no place here.
pub(crate) fn split(name: &[u8]) -> Option<(u8, &[u8])> {
    if let Some((index, _)) = ACL.iter().find(|(_, whole)| *whole == name) {
        return Some((*index, b""));
    }
    PREFIXES
        .iter()
        .find_map(|(index, prefix)| Some((*index, name.strip_prefix(*prefix)?)))
        .filter(|(_, rest)| !rest.is_empty() && rest.len() <= 255)
}

/// The whole name again.
pub(super) fn join(index: u8, rest: &[u8]) -> Option<Vec<u8>> {
    if let Some((_, whole)) = ACL.iter().find(|(i, _)| *i == index) {
        return Some(whole.to_vec());
    }
    let (_, prefix) = PREFIXES.iter().find(|(i, _)| *i == index)?;
    Some([*prefix, rest].concat())
}

/// Would they all fit?
pub(crate) fn fit(xattrs: &[(Vec<u8>, Vec<u8>)]) -> bool {
    xattrs.iter().all(|(_, value)| value.len() <= VALUE_MAX) && area(xattrs) <= TOTAL_MAX
}

fn area(xattrs: &[(Vec<u8>, Vec<u8>)]) -> usize {
    let entries = xattrs.iter().filter_map(|(name, value)| {
        let (_, rest) = split(name)?;
        Some((4 + rest.len() + value.len()).next_multiple_of(4))
    });
    entries.sum()
}

/// Bytes behind the inode, and what its `i_xattr_icount` says of them.
pub(super) fn size(xattrs: &[(Vec<u8>, Vec<u8>)]) -> (u64, u16) {
    match area(xattrs) {
        0 => (0, 0),
        area => {
            let count = u16::try_from(area / 4 + 1).unwrap_or(u16::MAX);
            (XATTR_HEADER_LEN + area as u64, count)
        }
    }
}

/// As they stand behind the inode.
pub(super) fn encode(xattrs: &[(Vec<u8>, Vec<u8>)], out: &mut Vec<u8>) {
    if area(xattrs) == 0 {
        return;
    }
    let start = out.len();
    // No filter, no shared ones, reserved.
    out.extend_from_slice(&[0; 12]);
    for (name, value) in xattrs {
        let Some((index, rest)) = split(name) else {
            continue;
        };
        let name_len = u8::try_from(rest.len()).unwrap_or(u8::MAX);
        let value_len = u16::try_from(value.len()).unwrap_or(u16::MAX);
        out.extend_from_slice(&[name_len, index]);
        out.extend_from_slice(&value_len.to_le_bytes());
        out.extend_from_slice(rest);
        out.extend_from_slice(value);
        let padded = (out.len() - start).next_multiple_of(4);
        out.resize(start + padded, 0);
    }
}
