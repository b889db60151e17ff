//! The configuration space of a disk (virtio 1.2 §5.2.4) and the features that go with it.

use virtio_bindings::virtio_blk as bits;

use super::request::{MAX_DISCARD, MAX_ZEROES, SECTOR};

/// Descriptors in each queue.
pub(super) const QUEUE_SIZE: u16 = 256;
/// Data buffers in a request: what a queue holds beside header and status.
const SEG_MAX: u32 = 254;
/// Bytes in a data buffer.
const SIZE_MAX: u32 = 1 << 20;

/// Bytes up to and including `write_zeroes_may_unmap` and its padding.
pub(super) const LEN: u32 = 60;
/// The one field a driver may write.
pub(super) const WRITEBACK: u64 = 32;

pub(super) mod feature {
    use super::bits;

    pub(in super::super) const FLUSH: u64 = 1 << bits::VIRTIO_BLK_F_FLUSH;
    pub(in super::super) const CONFIG_WCE: u64 = 1 << bits::VIRTIO_BLK_F_CONFIG_WCE;
    pub(super) const ALWAYS: u64 = 1 << bits::VIRTIO_BLK_F_SIZE_MAX
        | 1 << bits::VIRTIO_BLK_F_SEG_MAX
        | 1 << bits::VIRTIO_BLK_F_BLK_SIZE
        | 1 << bits::VIRTIO_BLK_F_TOPOLOGY;
    pub(super) const READ_ONLY: u64 = 1 << bits::VIRTIO_BLK_F_RO;
    pub(super) const MULTI_QUEUE: u64 = 1 << bits::VIRTIO_BLK_F_MQ;
    pub(super) const SPARSE: u64 =
        1 << bits::VIRTIO_BLK_F_DISCARD | 1 << bits::VIRTIO_BLK_F_WRITE_ZEROES;
}

/// What a driver is told.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    /// Bytes.
    pub(super) size: u64,
    /// Bytes in a logical block.
    pub(super) logical: u32,
    /// Bytes in a physical block, a power of two times a logical one.
    pub(super) physical: u32,
    pub(super) queues: u16,
    pub(super) readonly: bool,
    pub(super) sparse: bool,
}

impl Layout {
    pub(super) fn features(&self) -> u64 {
        let mut features = feature::ALWAYS;
        if self.readonly {
            features |= feature::READ_ONLY;
        } else {
            features |= feature::FLUSH | feature::CONFIG_WCE;
        }
        if self.sparse {
            features |= feature::SPARSE;
        }
        if self.queues > 1 {
            features |= feature::MULTI_QUEUE;
        }
        features
    }

    /// The space as it reads now.
    pub(super) fn bytes(&self, writeback: bool) -> [u8; LEN as usize] {
        let per_block = self.physical.checked_div(self.logical).unwrap_or(1);
        let exponent = per_block.checked_ilog2().unwrap_or(0);
        let exponent = u8::try_from(exponent).unwrap_or(0);
        let io_size = u16::try_from(per_block).unwrap_or(1);
        let granule = u64::from(self.physical).checked_div(SECTOR).unwrap_or(1);
        let granule = u32::try_from(granule).unwrap_or(1);
        let segments = u32::from(self.sparse);
        let when_sparse = |value: u32| value.saturating_mul(segments);
        let mut space = Space::default();
        space.u64(self.size.checked_div(SECTOR).unwrap_or(0));
        space.u32(SIZE_MAX);
        space.u32(SEG_MAX);
        space.u32(0); // geometry: not offered
        space.u32(self.logical);
        space.u8(exponent);
        space.u8(0); // alignment offset
        space.u16(io_size);
        space.u32(0); // optimal I/O size: none in particular
        space.u8(u8::from(writeback));
        space.u8(0);
        space.u16(self.queues);
        space.u32(when_sparse(MAX_DISCARD));
        space.u32(segments);
        space.u32(when_sparse(granule));
        space.u32(when_sparse(MAX_ZEROES));
        space.u32(segments);
        space.u8(u8::from(self.sparse));
        space.bytes
    }
}

struct Space {
    bytes: [u8; LEN as usize],
    at: usize,
}

impl Default for Space {
    fn default() -> Self {
        Self {
            bytes: [0; LEN as usize],
            at: 0,
        }
    }
}

impl Space {
    fn put(&mut self, data: &[u8]) {
        let end = self.at.saturating_add(data.len());
        if let Some(room) = self.bytes.get_mut(self.at..end) {
            room.copy_from_slice(data);
        }
        self.at = end;
    }
    fn u8(&mut self, value: u8) {
        self.put(&[value]);
    }
    fn u16(&mut self, value: u16) {
        self.put(&value.to_le_bytes());
    }
    fn u32(&mut self, value: u32) {
        self.put(&value.to_le_bytes());
    }
    fn u64(&mut self, value: u64) {
        self.put(&value.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_the_specification_has_them() {
        let layout = Layout {
            size: 0x1234 * 512,
            logical: 512,
            physical: 4096,
            queues: 4,
            readonly: false,
            sparse: true,
        };
        let bytes = layout.bytes(true);
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!(u32_at(0), 0x1234);
        assert_eq!((u32_at(8), u32_at(12)), (SIZE_MAX, SEG_MAX));
        assert_eq!(u32_at(20), 512);
        assert_eq!(bytes[24..28], [3, 0, 8, 0]);
        assert_eq!(bytes[32..36], [1, 0, 4, 0]);
        assert_eq!((u32_at(36), u32_at(40), u32_at(44)), (MAX_DISCARD, 1, 8));
        assert_eq!((u32_at(48), u32_at(52), bytes[56]), (MAX_ZEROES, 1, 1));
        let dense = Layout {
            sparse: false,
            ..layout
        };
        assert!(dense.bytes(false)[32..].iter().filter(|b| **b != 0).count() == 1);
    }
}
