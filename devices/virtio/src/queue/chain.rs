//! One descriptor chain, copied out of guest memory and checked.

use testudo_memory::RamView;
use thiserror::Error;
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError, Permissions, VolatileSlice};

/// The most buffers a chain may have. The queue size is the limit by the letter (virtio 1.2
/// §2.7.5.3.1), but drivers put longer indirect tables on short queues; this is `IOV_MAX`, past
/// which no backend could take them in one call.
const MAX_BUFFERS: usize = 1024;

/// Why a chain was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum MalformedChain {
    /// It loops, leaves its table, nests indirect tables or is longer than 4 GiB.
    #[error("it has no end")]
    Endless,
    /// A readable buffer follows a writable one (virtio 1.2 §2.7.4.2).
    #[error("a readable buffer follows a writable one")]
    Order,
    /// More buffers than the device takes.
    #[error("more than {MAX_BUFFERS} buffers")]
    TooLong,
    /// A buffer is not in guest RAM.
    #[error("the buffer of {len} bytes at {address:#x} is not in guest RAM")]
    Buffer {
        /// Guest-physical address.
        address: u64,
        /// Length in bytes.
        len: u32,
    },
}

/// A buffer could not be reached though it was when the chain was taken: guest RAM shrank.
#[derive(Debug, Error)]
#[error("a buffer of the chain is no longer in guest RAM")]
pub struct ChainError(#[from] GuestMemoryError);

/// One buffer, never empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffer {
    /// Guest-physical address.
    pub address: GuestAddress,
    /// Length in bytes.
    pub len: u32,
}

/// A chain in flight. It must go back by [`VirtQueue::push`](super::VirtQueue::push), once
/// (CVE-2021-3748, CVE-2022-26353):
///
/// ```compile_fail,E0382
/// # use testudo_memory::RamView;
/// # use virtio_devices::{Chain, QueueFault, VirtQueue};
/// fn twice(queue: &mut VirtQueue, ram: &RamView, chain: Chain) -> Result<(), QueueFault> {
///     queue.push(ram, chain, 0)?;
///     queue.push(ram, chain, 0)
/// }
/// ```
#[derive(Debug)]
#[must_use = "a chain that is not pushed is lost to the driver"]
pub struct Chain {
    head: u16,
    /// Readable ones first.
    buffers: Vec<Buffer>,
    readable: usize,
    readable_len: u32,
    writable_len: u32,
}

impl Chain {
    pub(super) fn walk(
        descriptors: DescriptorChain<&RamView>,
        ram: &RamView,
    ) -> Result<Self, MalformedChain> {
        let mut chain = Self {
            head: descriptors.head_index(),
            buffers: Vec::new(),
            readable: 0,
            readable_len: 0,
            writable_len: 0,
        };
        // The iterator ends without a word when it meets something it does not like; a chain
        // that really ended has a last descriptor without NEXT.
        let mut ended = false;
        let mut writing = false;
        for (count, descriptor) in descriptors.enumerate() {
            if count >= MAX_BUFFERS {
                return Err(MalformedChain::TooLong);
            }
            ended = !descriptor.has_next();
            let writable = descriptor.is_write_only();
            if writing && !writable {
                return Err(MalformedChain::Order);
            }
            writing = writable;
            chain.append(descriptor.addr(), descriptor.len(), writable, ram)?;
        }
        if ended {
            Ok(chain)
        } else {
            Err(MalformedChain::Endless)
        }
    }

    fn append(
        &mut self,
        address: GuestAddress,
        len: u32,
        writable: bool,
        ram: &RamView,
    ) -> Result<(), MalformedChain> {
        if len == 0 {
            return Ok(());
        }
        let outside = MalformedChain::Buffer {
            address: address.0,
            len,
        };
        let access = if writable {
            Permissions::Write
        } else {
            Permissions::Read
        };
        let reachable = usize::try_from(len).is_ok_and(|n| ram.check_range(address, n, access));
        if !reachable {
            return Err(outside);
        }
        let total = if writable {
            &mut self.writable_len
        } else {
            self.readable = self.readable.saturating_add(1);
            &mut self.readable_len
        };
        *total = total.checked_add(len).ok_or(MalformedChain::Endless)?;
        self.buffers.push(Buffer { address, len });
        Ok(())
    }

    /// A chain that came from no queue.
    #[cfg(test)]
    pub(crate) fn of_buffers(readable: &[Buffer], writable: &[Buffer]) -> Self {
        let sum = |buffers: &[Buffer]| buffers.iter().map(|b| b.len).sum();
        Self {
            head: 0,
            buffers: [readable, writable].concat(),
            readable: readable.len(),
            readable_len: sum(readable),
            writable_len: sum(writable),
        }
    }

    pub(super) fn into_head(self) -> u16 {
        self.head
    }

    /// What the driver gives, in order.
    pub fn readable(&self) -> &[Buffer] {
        self.buffers.get(..self.readable).unwrap_or_default()
    }

    /// What the device may fill, in order.
    pub fn writable(&self) -> &[Buffer] {
        self.buffers.get(self.readable..).unwrap_or_default()
    }

    /// Bytes the driver gives.
    pub fn readable_len(&self) -> u32 {
        self.readable_len
    }

    /// Bytes the device may fill.
    pub fn writable_len(&self) -> u32 {
        self.writable_len
    }

    /// Copies from `offset` of the readable bytes; returns how many there were, at most
    /// `data.len()`.
    pub fn read(&self, ram: &RamView, offset: u32, data: &mut [u8]) -> Result<usize, ChainError> {
        let mut rest = data;
        let mut copied = 0_usize;
        for piece in pieces(self.readable(), offset, rest.len()) {
            let Some((now, later)) = rest.split_at_mut_checked(piece.bytes) else {
                break;
            };
            ram.read_slice(now, piece.address)?;
            copied = copied.saturating_add(piece.bytes);
            rest = later;
        }
        Ok(copied)
    }

    /// Copies to `offset` of the writable bytes; returns how many fitted, at most `data.len()`.
    pub fn write(&self, ram: &RamView, offset: u32, data: &[u8]) -> Result<usize, ChainError> {
        let mut rest = data;
        let mut copied = 0_usize;
        for piece in pieces(self.writable(), offset, rest.len()) {
            let Some((now, later)) = rest.split_at_checked(piece.bytes) else {
                break;
            };
            ram.write_slice(now, piece.address)?;
            copied = copied.saturating_add(piece.bytes);
            rest = later;
        }
        Ok(copied)
    }

    /// The readable buffers as memory of this process, for vectored I/O.
    pub fn readable_slices<'a>(
        &self,
        ram: &'a RamView,
    ) -> Result<Vec<VolatileSlice<'a>>, ChainError> {
        slices(self.readable(), ram, Permissions::Read)
    }

    /// The writable buffers as memory of this process, for vectored I/O.
    pub fn writable_slices<'a>(
        &self,
        ram: &'a RamView,
    ) -> Result<Vec<VolatileSlice<'a>>, ChainError> {
        slices(self.writable(), ram, Permissions::Write)
    }
}

struct Piece {
    address: GuestAddress,
    bytes: usize,
}

/// The parts of `buffers` that `want` bytes from `offset` lie in.
fn pieces(buffers: &[Buffer], offset: u32, want: usize) -> impl Iterator<Item = Piece> + '_ {
    let (mut skip, mut want) = (offset, want);
    buffers.iter().filter_map(move |buffer| {
        let start = skip.min(buffer.len);
        skip = skip.saturating_sub(start);
        let left = usize::try_from(buffer.len.saturating_sub(start)).unwrap_or(0);
        let bytes = left.min(want);
        want = want.saturating_sub(bytes);
        let address = GuestAddress(buffer.address.0.checked_add(u64::from(start))?);
        (bytes != 0).then_some(Piece { address, bytes })
    })
}

fn slices<'a>(
    buffers: &[Buffer],
    ram: &'a RamView,
    access: Permissions,
) -> Result<Vec<VolatileSlice<'a>>, ChainError> {
    let mut all = Vec::with_capacity(buffers.len());
    for buffer in buffers {
        let len = usize::try_from(buffer.len).unwrap_or(usize::MAX);
        for slice in ram.get_slices(buffer.address, len, access)? {
            all.push(slice?);
        }
    }
    Ok(all)
}
