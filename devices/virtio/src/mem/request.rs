//! Requests and what is said to them (virtio 1.2 §5.15.6), judged by the block map alone. Pure.

use super::blocks::{BlockRange, Blocks, Mix};
use super::link::{MemChange, MemLevels, MemRegion};

/// Bytes of a request.
pub(super) const REQUEST: usize = 24;
/// Bytes of a response.
pub(super) const RESPONSE: usize = 10;

/// The first word of a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Said {
    Ack = 0,
    /// Not now: it would be more than the host wants.
    Nack = 1,
    /// The host could not; try again.
    Busy = 2,
    /// The request makes no sense.
    Error = 3,
}

/// A response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Response {
    pub(super) said: Said,
    /// For a question about states.
    mix: Option<Mix>,
}

impl From<Said> for Response {
    fn from(said: Said) -> Self {
        Self { said, mix: None }
    }
}

impl Response {
    pub(super) fn bytes(self) -> [u8; RESPONSE] {
        let [a, b] = (self.said as u16).to_le_bytes();
        let state = match self.mix {
            None | Some(Mix::Plugged) => 0,
            Some(Mix::Unplugged) => 1,
            Some(Mix::Mixed) => 2,
        };
        [a, b, 0, 0, 0, 0, 0, 0, state, 0]
    }
}

/// What a request comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is answered.
    Say(Response),
    /// It is answered when the change was made, or could not be.
    Make(Change),
}

/// A change of the block map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    Plug(BlockRange),
    Unplug(BlockRange),
    UnplugAll,
}

impl From<Said> for Verdict {
    fn from(said: Said) -> Self {
        Self::Say(said.into())
    }
}

/// Judges a request; `None` is one that is too short.
pub(super) fn judge(
    request: Option<[u8; REQUEST]>,
    blocks: &Blocks,
    region: &MemRegion,
    levels: &MemLevels,
) -> Verdict {
    let Some(
        [
            k0,
            k1,
            _,
            _,
            _,
            _,
            _,
            _,
            a0,
            a1,
            a2,
            a3,
            a4,
            a5,
            a6,
            a7,
            n0,
            n1,
            ..,
        ],
    ) = request
    else {
        return Said::Error.into();
    };
    let address = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]);
    let count = u16::from_le_bytes([n0, n1]);
    let range = address
        .checked_sub(region.start)
        .and_then(|offset| blocks.range(offset, count, levels.usable));
    match (u16::from_le_bytes([k0, k1]), range) {
        (0, Some(range)) => plug(range, blocks, levels),
        (1, Some(range)) => match blocks.mix(range) {
            Mix::Plugged => Verdict::Make(Change::Unplug(range)),
            Mix::Unplugged | Mix::Mixed => Said::Error.into(),
        },
        (2, _) => Verdict::Make(Change::UnplugAll),
        (3, Some(range)) => Verdict::Say(Response {
            said: Said::Ack,
            mix: Some(blocks.mix(range)),
        }),
        _ => Said::Error.into(),
    }
}

fn plug(range: BlockRange, blocks: &Blocks, levels: &MemLevels) -> Verdict {
    if blocks.mix(range) != Mix::Unplugged {
        return Said::Error.into();
    }
    let after = blocks.plugged_bytes().saturating_add(blocks.bytes(range));
    if after > levels.requested {
        return Said::Nack.into();
    }
    Verdict::Make(Change::Plug(range))
}

impl Change {
    /// The change in the terms of whoever owns guest RAM.
    pub(super) fn of_memory(self, blocks: &Blocks, region: &MemRegion) -> MemChange {
        let place = |range: BlockRange| {
            let offset = blocks.offset(range);
            (region.start.saturating_add(offset), blocks.bytes(range))
        };
        match self {
            Self::Plug(range) => {
                let (gpa, size) = place(range);
                MemChange::Plug { gpa, size }
            }
            Self::Unplug(range) => {
                let (gpa, size) = place(range);
                MemChange::Unplug { gpa, size }
            }
            Self::UnplugAll => MemChange::UnplugAll,
        }
    }

    /// The change was made, or could not be.
    pub(super) fn settle(self, blocks: &mut Blocks, made: bool) -> Said {
        if !made {
            return Said::Busy;
        }
        match self {
            Self::Plug(range) => blocks.set(range, true),
            Self::Unplug(range) => blocks.set(range, false),
            Self::UnplugAll => blocks.clear(),
        }
        Said::Ack
    }
}
