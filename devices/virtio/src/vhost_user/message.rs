//! The vhost-user messages a front-end sends and the replies it reads (QEMU, docs/interop/vhost-user).
//!
//! A message is a header (request, flags, size: 12 bytes), a payload and, with some requests,
//! descriptors. Both ends are on one machine: values are in its byte order. Nothing here does I/O.

/// Bits of the header's flags.
mod flags {
    /// The protocol's version.
    pub(super) const VERSION: u32 = 1;
    pub(super) const VERSION_MASK: u32 = 3;
    pub(super) const REPLY: u32 = 1 << 2;
    pub(super) const NEED_REPLY: u32 = 1 << 3;
}

/// `VHOST_USER_F_PROTOCOL_FEATURES`, a feature bit of the device's that a driver never sees.
pub(super) const PROTOCOL_FEATURES: u64 = 1 << 30;

/// Protocol features.
pub(super) mod protocol {
    pub(crate) const MQ: u64 = 1 << 0;
    pub(crate) const REPLY_ACK: u64 = 1 << 3;
    pub(crate) const BACKEND_REQ: u64 = 1 << 5;
    pub(crate) const CONFIG: u64 = 1 << 9;
    pub(crate) const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
}

/// Bytes of a header.
pub(super) const HEADER: usize = 12;
/// Descriptors that ride with one message at most.
pub(super) const MAX_FDS: usize = 8;
/// Bytes of configuration space that one message carries at most.
pub(super) const MAX_CONFIG: usize = 256;

/// What a front-end asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    GetFeatures = 1,
    SetFeatures = 2,
    SetOwner = 3,
    SetMemTable = 5,
    SetVringNum = 8,
    SetVringAddr = 9,
    SetVringBase = 10,
    GetVringBase = 11,
    SetVringKick = 12,
    SetVringCall = 13,
    GetProtocolFeatures = 15,
    SetProtocolFeatures = 16,
    GetQueueNum = 17,
    SetVringEnable = 18,
    SetBackendReqFd = 21,
    GetConfig = 24,
    SetConfig = 25,
    GetMaxMemSlots = 36,
    AddMemReg = 37,
    RemMemReg = 38,
}

/// What a back-end may ask for: that its configuration space be read again.
pub(super) const BACKEND_CONFIG_CHANGE: u32 = 2;

/// A reply, or a back-end's request, is not what the protocol says.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Malformed {
    /// Not this version, or not a reply.
    #[error("flags {0:#x}")]
    Flags(u32),
    /// Another request than the one that was made.
    #[error("request {0}")]
    Request(u32),
    /// Another length.
    #[error("{0} bytes of payload")]
    Size(u32),
    /// Another value than can be.
    #[error("value {0:#x}")]
    Value(u64),
}

/// A payload under construction.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Payload(Vec<u8>);

impl Payload {
    pub(super) fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_ne_bytes());
        self
    }

    pub(super) fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_ne_bytes());
        self
    }

    pub(super) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    /// A queue and a number.
    pub(super) fn vring(index: u16, number: u32) -> Self {
        Self::default().u32(index.into()).u32(number)
    }

    /// A part of the configuration space.
    pub(super) fn config(offset: u32, bytes: &[u8]) -> Self {
        let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        Self::default().u32(offset).u32(len).u32(0).bytes(bytes)
    }

    /// The whole message.
    pub(super) fn message(&self, request: Request, need_reply: bool) -> Vec<u8> {
        let need_reply = if need_reply { flags::NEED_REPLY } else { 0 };
        let len = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        let header = Self::default()
            .u32(request as u32)
            .u32(flags::VERSION | need_reply)
            .u32(len);
        header.bytes(&self.0).0
    }
}

/// The header of a message that came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    request: u32,
    flags: u32,
    /// Bytes of payload that follow.
    size: u32,
}

impl Header {
    pub(super) fn read(bytes: &[u8; HEADER]) -> Self {
        let [request, flags, size] = words(bytes);
        Self {
            request,
            flags,
            size,
        }
    }

    /// Checks that it begins the reply to `request`, with `size` bytes of payload.
    pub(super) fn replies_to(&self, request: Request, size: usize) -> Result<(), Malformed> {
        let version = self.flags & flags::VERSION_MASK == flags::VERSION;
        if !version || self.flags & flags::REPLY == 0 {
            return Err(Malformed::Flags(self.flags));
        }
        if self.request != request as u32 {
            return Err(Malformed::Request(self.request));
        }
        if usize::try_from(self.size) != Ok(size) {
            return Err(Malformed::Size(self.size));
        }
        Ok(())
    }

    /// Checks that it is a whole request of the back-end's: that the configuration space be read
    /// again is the only one taken here. Returns whether it wants an acknowledgement.
    pub(super) fn backend_request(&self) -> Result<bool, Malformed> {
        let version = self.flags & flags::VERSION_MASK == flags::VERSION;
        if !version || self.flags & flags::REPLY != 0 {
            return Err(Malformed::Flags(self.flags));
        }
        if self.request != BACKEND_CONFIG_CHANGE {
            return Err(Malformed::Request(self.request));
        }
        if self.size != 0 {
            return Err(Malformed::Size(self.size));
        }
        Ok(self.flags & flags::NEED_REPLY != 0)
    }
}

/// The acknowledgement of a back-end's request that its configuration space be read again.
pub(super) fn backend_acknowledgement() -> Vec<u8> {
    let header = Payload::default()
        .u32(BACKEND_CONFIG_CHANGE)
        .u32(flags::VERSION | flags::REPLY)
        .u32(8);
    header.u64(0).0
}

fn words(bytes: &[u8; HEADER]) -> [u32; 3] {
    let [a, b, c, d, e, f, g, h, i, j, k, l] = *bytes;
    [[a, b, c, d], [e, f, g, h], [i, j, k, l]].map(u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_have_the_protocols_form() {
        let message = Payload::vring(3, 256).message(Request::SetVringNum, true);
        let expected: Vec<u8> = [8_u32, 9, 8, 3, 256]
            .iter()
            .flat_map(|w| w.to_ne_bytes())
            .collect();
        assert_eq!(message, expected);
        let message = Payload::default().message(Request::SetOwner, false);
        assert_eq!(message.len(), HEADER);
    }

    #[test]
    fn only_the_reply_that_was_asked_for_is_taken() {
        let header = |request, flags, size| Header {
            request,
            flags,
            size,
        };
        let asked = Request::GetFeatures;
        assert_eq!(header(1, 5, 8).replies_to(asked, 8), Ok(()));
        for (wrong, why) in [
            (header(1, 1, 8), Malformed::Flags(1)),
            (header(1, 6, 8), Malformed::Flags(6)),
            (header(1, 4, 8), Malformed::Flags(4)),
            (header(15, 5, 8), Malformed::Request(15)),
            (header(1, 5, 0), Malformed::Size(0)),
            (header(1, 5, u32::MAX), Malformed::Size(u32::MAX)),
        ] {
            assert_eq!(wrong.replies_to(asked, 8), Err(why));
        }
        assert_eq!(header(2, 1, 0).backend_request(), Ok(false));
        assert_eq!(header(2, 9, 0).backend_request(), Ok(true));
        assert!(header(2, 5, 0).backend_request().is_err());
        assert!(header(2, 1, 4).backend_request().is_err());
        assert!(header(6, 1, 0).backend_request().is_err());
    }
}
