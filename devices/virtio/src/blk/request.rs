//! What a descriptor chain asks of a disk (virtio 1.2 §5.2.6), copied out of guest memory and
//! checked once, here: whatever passes lies within the disk and its buffers.
//!
//! A request is a header of 16 bytes, data, and one status byte at the very end; where descriptors
//! begin and end means nothing (§2.7.4). A chain without a last writable byte has no place for an
//! answer. SCSI commands, zones, secure erase and life time are answered "unsupported".

use testudo_memory::RamView;
use virtio_bindings::virtio_blk as bits;
use vm_memory::GuestAddress;

use crate::queue::Chain;

/// Bytes in a sector, the unit of all positions.
pub(super) const SECTOR: u64 = 512;
/// Bytes of the header.
pub(super) const HEADER: u32 = 16;
/// Bytes of one range to discard or to zero.
const RANGE: u32 = 16;

/// The most bytes one request may move: more than the configuration space lets a driver ask for.
pub(super) const MAX_DATA: u32 = 256 << 20;
/// Sectors of one discard: 2 GiB.
pub(super) const MAX_DISCARD: u32 = 4 << 20;
/// Sectors of one write of zeroes: 64 MiB, which a file system that cannot do it by itself is
/// given one by one.
pub(super) const MAX_ZEROES: u32 = 128 << 10;

/// The status byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    Ok,
    IoError,
    Unsupported,
}

impl Status {
    pub(super) fn byte(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::IoError => 1,
            Self::Unsupported => 2,
        }
    }
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    Read,
    Write,
    Flush,
    GetId,
    Discard,
    /// Zeroes, and the blocks behind them may be given up.
    Zero {
        unmap: bool,
    },
}

/// A request whose every field has been checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) operation: Operation,
    /// Where on the disk, in bytes.
    pub(super) offset: u64,
    /// How much of the disk, in bytes; for reads and writes also the bytes of data in the chain.
    pub(super) len: u64,
    /// Where the status byte goes.
    pub(super) status: GuestAddress,
}

/// Why a chain is no request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It has no status byte: it goes back as it is.
    Unanswerable,
    /// It is answered with an error.
    Answer {
        at: GuestAddress,
        status: Status,
        why: &'static str,
    },
}

/// What the disk is like, as far as requests go.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// Bytes.
    pub(super) size: u64,
    /// Reads and writes begin and end at multiples of this many bytes.
    pub(super) granule: u64,
    pub(super) readonly: bool,
    /// Whether discards and zeroes were offered.
    pub(super) sparse: bool,
}

impl Request {
    pub(super) fn parse(chain: &Chain, ram: &RamView, bounds: Bounds) -> Result<Self, Refusal> {
        let status = status_address(chain).ok_or(Refusal::Unanswerable)?;
        let refuse = |status_code, why| Refusal::Answer {
            at: status,
            status: status_code,
            why,
        };
        let bad = |why| refuse(Status::IoError, why);
        let unsupported = |why| refuse(Status::Unsupported, why);

        let mut header = [0; HEADER as usize];
        if !matches!(chain.read(ram, 0, &mut header), Ok(n) if n == header.len()) {
            return Err(bad("the header is short"));
        }
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let given = chain.readable_len().saturating_sub(HEADER);
        let wanted = chain.writable_len().saturating_sub(1);

        let (operation, offset, len) = match u32::from_le_bytes([t0, t1, t2, t3]) {
            bits::VIRTIO_BLK_T_IN => (Operation::Read, bytes(sector), Some(u64::from(wanted))),
            bits::VIRTIO_BLK_T_OUT => (Operation::Write, bytes(sector), Some(u64::from(given))),
            bits::VIRTIO_BLK_T_FLUSH => (Operation::Flush, Some(0), Some(0)),
            bits::VIRTIO_BLK_T_GET_ID => (Operation::GetId, Some(0), Some(0)),
            kind @ (bits::VIRTIO_BLK_T_DISCARD | bits::VIRTIO_BLK_T_WRITE_ZEROES)
                if bounds.sparse =>
            {
                if given != RANGE {
                    return Err(bad("not one range to discard or to zero"));
                }
                let mut range = [0; RANGE as usize];
                if chain.read(ram, HEADER, &mut range).is_err() {
                    return Err(bad("the range is out of reach"));
                }
                let (first, sectors, flags) = fields(range);
                let unmap = flags & bits::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
                let discard = kind == bits::VIRTIO_BLK_T_DISCARD;
                // §5.2.6.2: reserved flags, and unmap in a discard, are unsupported.
                if flags & !bits::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || (discard && unmap) {
                    return Err(unsupported("flags of a range"));
                }
                let (operation, most) = if discard {
                    (Operation::Discard, MAX_DISCARD)
                } else {
                    (Operation::Zero { unmap }, MAX_ZEROES)
                };
                if sectors > most {
                    return Err(bad("the range is too long"));
                }
                (operation, bytes(first), bytes(u64::from(sectors)))
            }
            _ => return Err(unsupported("its type")),
        };
        let (Some(offset), Some(len)) = (offset, len) else {
            return Err(bad("it is not on the disk"));
        };
        match operation {
            Operation::Read | Operation::Write => {
                if len > u64::from(MAX_DATA) {
                    return Err(bad("it is too long"));
                }
                if !len.is_multiple_of(bounds.granule) || !offset.is_multiple_of(bounds.granule) {
                    return Err(bad("it is not in whole blocks"));
                }
            }
            Operation::Flush | Operation::GetId | Operation::Discard | Operation::Zero { .. } => {}
        }
        if offset.checked_add(len).is_none_or(|end| end > bounds.size) {
            return Err(bad("it is not on the disk"));
        }
        let writes = !matches!(
            operation,
            Operation::Read | Operation::Flush | Operation::GetId
        );
        if bounds.readonly && writes {
            return Err(bad("the disk is read-only"));
        }
        Ok(Self {
            operation,
            offset,
            len,
            status,
        })
    }

    /// Bytes that count against a limit.
    pub(super) fn cost(&self) -> u64 {
        match self.operation {
            Operation::Read | Operation::Write => self.len,
            _ => 0,
        }
    }
}

/// The last writable byte.
fn status_address(chain: &Chain) -> Option<GuestAddress> {
    let last = chain.writable().last()?;
    let before = last.len.checked_sub(1)?;
    let at = last.address.0.checked_add(u64::from(before))?;
    Some(GuestAddress(at))
}

fn bytes(sectors: u64) -> Option<u64> {
    sectors.checked_mul(SECTOR)
}

fn fields(range: [u8; RANGE as usize]) -> (u64, u32, u32) {
    let [
        s0,
        s1,
        s2,
        s3,
        s4,
        s5,
        s6,
        s7,
        n0,
        n1,
        n2,
        n3,
        f0,
        f1,
        f2,
        f3,
    ] = range;
    (
        u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]),
        u32::from_le_bytes([n0, n1, n2, n3]),
        u32::from_le_bytes([f0, f1, f2, f3]),
    )
}
