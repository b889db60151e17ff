//! Packets (virtio 1.2 §5.10.6): a header of 44 bytes, little-endian, and data after it.

/// The host's address.
pub(super) const HOST_CID: u64 = 2;
/// Stream sockets, the one kind there is here.
pub(super) const TYPE_STREAM: u16 = 1;

/// SHUTDOWN: the sender takes no more.
pub(super) const NO_RECEIVE: u32 = 1 << 0;
/// SHUTDOWN: the sender sends no more.
pub(super) const NO_SEND: u32 = 1 << 1;
/// SHUTDOWN: both.
pub(super) const NEITHER: u32 = NO_RECEIVE | NO_SEND;

/// What a packet is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Op {
    Request,
    Response,
    Reset,
    Shutdown,
    Data,
    CreditUpdate,
    CreditRequest,
}

impl Op {
    fn from_wire(op: u16) -> Option<Self> {
        Some(match op {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }

    fn to_wire(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Reset => 3,
            Self::Shutdown => 4,
            Self::Data => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
        }
    }
}

/// A packet's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    /// Bytes of data that follow.
    pub(super) len: u32,
    /// The kind of socket.
    pub(super) kind: u16,
    /// `None` for a number that stands for nothing.
    pub(super) op: Option<Op>,
    pub(super) flags: u32,
    /// What the sender's buffer for this stream holds.
    pub(super) buf_alloc: u32,
    /// Bytes that have left that buffer since the stream began, modulo 2³².
    pub(super) fwd_cnt: u32,
}

fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    match rest.split_first_chunk() {
        Some((field, after)) => {
            *rest = after;
            *field
        }
        None => [0; N],
    }
}

impl Header {
    /// Bytes on the wire.
    pub(super) const LEN: usize = 44;

    pub(super) fn from_bytes(bytes: &[u8; Self::LEN]) -> Self {
        let mut rest = bytes.as_slice();
        Self {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: Op::from_wire(u16::from_le_bytes(take(&mut rest))),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    pub(super) fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        let op = self.op.map_or(0, Op::to_wire);
        let fields = self
            .src_cid
            .to_le_bytes()
            .into_iter()
            .chain(self.dst_cid.to_le_bytes())
            .chain(self.src_port.to_le_bytes())
            .chain(self.dst_port.to_le_bytes())
            .chain(self.len.to_le_bytes())
            .chain(self.kind.to_le_bytes())
            .chain(op.to_le_bytes())
            .chain(self.flags.to_le_bytes())
            .chain(self.buf_alloc.to_le_bytes())
            .chain(self.fwd_cnt.to_le_bytes());
        for (byte, field) in bytes.iter_mut().zip(fields) {
            *byte = field;
        }
        bytes
    }

    /// The answer to a packet that belongs to no stream.
    pub(super) fn reset_of(self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            len: 0,
            kind: self.kind,
            op: Some(Op::Reset),
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn fields_are_where_the_specification_has_them() {
        let header = Header {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: 2,
            src_port: 0x1112_1314,
            dst_port: 0x2122_2324,
            len: 0x3132_3334,
            kind: TYPE_STREAM,
            op: Some(Op::Shutdown),
            flags: NEITHER,
            buf_alloc: 0x4142_4344,
            fwd_cnt: 0x5152_5354,
        };
        let bytes = header.to_bytes();
        assert_eq!(bytes[..8], 0x0102_0304_0506_0708_u64.to_le_bytes());
        assert_eq!(bytes[16..20], 0x1112_1314_u32.to_le_bytes());
        assert_eq!(bytes[24..28], 0x3132_3334_u32.to_le_bytes());
        assert_eq!(bytes[28..32], [1, 0, 4, 0]);
        assert_eq!(bytes[40..], 0x5152_5354_u32.to_le_bytes());
        assert_eq!(Header::from_bytes(&bytes), header);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_header(bytes in prop::array::uniform32(any::<u8>()), op in 0_u16..12) {
            let mut wire = [0; Header::LEN];
            wire[..32].copy_from_slice(&bytes);
            wire[30..32].copy_from_slice(&op.to_le_bytes());
            let header = Header::from_bytes(&wire);
            prop_assert_eq!(header.op.is_some(), (1..=7).contains(&op));
            prop_assert_eq!(header.reset_of().reset_of().dst_cid, header.dst_cid);
        }
    }
}
