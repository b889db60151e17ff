//! Memory that is plugged and unplugged while the guest runs: virtio-mem.
//!
//! Where guest RAM itself changes is the control thread: the device asks it by letter, and it calls
//! [`OpenDevice::attend`].

mod chunks;

use std::sync::{Mutex, MutexGuard, PoisonError};

use testudo_memory::{Backing, GuestRam, RamError};
use virtio_devices::{Mem, MemChange, MemLevels, MemLink, MemRegion, VirtioModel};

use super::{
    Adjust, AdjustError, BadDevice, DeviceError, DeviceSpec, HostContext, MEMORY, OpenDevice,
    Place, Space,
};
use crate::letters::Letter;
use crate::spec::{ByteSize, MemoryConfig};
use chunks::Chunks;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// Blocks are what a huge page holds.
const BLOCK: u64 = 2 * MIB;
/// Memory blocks of Linux: the granule in which it adds memory, and so the alignment of the region.
const LINUX_BLOCK: u64 = 128 * MIB;
/// The same for a guest with that much memory at boot (`MEM_SIZE_FOR_LARGE_BLOCK`).
const LARGE_LINUX_BLOCK: u64 = 2 * GIB;
const LARGE_GUEST: u64 = 64 * GIB;
/// Most memory there may be in all.
const MAX: u64 = 1 << 40;

/// What of the memory's configuration is about its growth.
pub(super) fn check(config: &MemoryConfig) -> Result<Option<MemSpec>, BadDevice> {
    let Some(ByteSize(max)) = config.max else {
        return Ok(None);
    };
    let boot = config.size.0;
    let bad = |why: String| Err(BadDevice::new(MEMORY, why));
    let block = config.hugepages.map_or(BLOCK, |page| page.0.max(BLOCK));
    if max <= boot {
        return bad(format!(
            "max={} is no more than the {} there are at boot; raise it or leave it out",
            ByteSize(max),
            ByteSize(boot)
        ));
    }
    if max > MAX {
        return bad(format!(
            "max={}: a VM has at most {}",
            ByteSize(max),
            ByteSize(MAX)
        ));
    }
    if !block.is_power_of_two() || !max.saturating_sub(boot).is_multiple_of(block) {
        return bad(format!(
            "max={}: beyond the {} at boot, memory comes in steps of {}",
            ByteSize(max),
            ByteSize(boot),
            ByteSize(block)
        ));
    }
    Ok(Some(MemSpec { boot, max, block }))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MemSpec {
    boot: u64,
    max: u64,
    block: u64,
}

impl MemSpec {
    /// Bytes that can be plugged.
    fn room(&self) -> u64 {
        self.max.saturating_sub(self.boot)
    }

    fn linux_block(&self) -> u64 {
        if self.boot >= LARGE_GUEST {
            LARGE_LINUX_BLOCK
        } else {
            LINUX_BLOCK
        }
    }

    /// What of the region `total` bytes of memory take.
    fn of_total(&self, total: u64) -> Result<u64, AdjustError> {
        let Self { boot, max, block } = *self;
        let more = total
            .checked_sub(boot)
            .filter(|more| *more <= self.room() && more.is_multiple_of(block));
        more.ok_or_else(|| {
            AdjustError::Value(format!(
                "{}: this VM's memory may be {} to {}, in steps of {}",
                ByteSize(total),
                ByteSize(boot),
                ByteSize(max),
                ByteSize(block)
            ))
        })
    }
}

impl DeviceSpec for MemSpec {
    fn kind(&self) -> &'static str {
        "virtio-mem"
    }

    fn id(&self) -> &str {
        MEMORY
    }

    fn space(&self) -> Result<Space, DeviceError> {
        Ok(Space {
            guest_memory: self.room(),
            alignment: self.linux_block().max(self.block),
            ..Space::default()
        })
    }

    fn open(&self, _host: &HostContext) -> Result<Box<dyn OpenDevice>, DeviceError> {
        Ok(Box::new(OpenMem {
            spec: *self,
            state: Mutex::new(State {
                requested: 0,
                link: None,
                chunks: None,
            }),
        }))
    }
}

struct OpenMem {
    spec: MemSpec,
    /// Only the control thread comes by.
    state: Mutex<State>,
}

struct State {
    /// Bytes of the region that the guest is to have; they are kept when it boots again.
    requested: u64,
    /// To the present board's model.
    link: Option<MemLink>,
    chunks: Option<Chunks>,
}

impl OpenMem {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl OpenDevice for OpenMem {
    fn model(&self, place: &Place<'_>) -> Result<Box<dyn VirtioModel>, DeviceError> {
        let error = |e: std::io::Error| DeviceError::new(&self.spec, e);
        let at = place
            .memory
            .ok_or_else(|| error(std::io::Error::other("the plan has no place for it")))?;
        let region = MemRegion {
            start: at.base(),
            size: at.size(),
            block: self.spec.block,
            slack: self.spec.linux_block().saturating_mul(2),
        };
        let letters = place.letters.clone();
        let call = Box::new(move || letters.send(Letter::DeviceAsks));
        let mut state = self.state();
        let link = MemLink::new(region, state.requested, call).map_err(error)?;
        state.link = Some(link.clone());
        state.chunks = Some(Chunks::new(at));
        Ok(Box::new(Mem::new(link, place.io.clone())))
    }

    fn adjust(&self, what: &Adjust) -> Result<(), AdjustError> {
        let Adjust::Memory(total) = what else {
            return Err(AdjustError::Unsupported(what.verb()));
        };
        let more = self.spec.of_total(*total)?;
        let mut state = self.state();
        state.requested = more;
        if let Some(link) = &state.link {
            link.request(more);
        }
        Ok(())
    }

    fn attend(&self, ram: &mut GuestRam, backing: &Backing) {
        let mut state = self.state();
        let State {
            link: Some(link),
            chunks: Some(chunks),
            ..
        } = &mut *state
        else {
            return;
        };
        link.attend(|change| {
            let made = make(change, chunks, ram, backing);
            if let Err(error) = &made {
                log::warn!("the guest's memory does not change as it asks: {error}");
            }
            made.is_ok()
        });
    }

    fn forget_guest(&self, ram: &mut GuestRam) {
        let mut state = self.state();
        if let Some(chunks) = &mut state.chunks
            && let Err(error) = chunks.clear(ram)
        {
            log::error!("{error}");
        }
        state.link = None;
    }

    fn memory(&self) -> Option<Growth> {
        let state = self.state();
        let levels = state.link.as_ref().map(MemLink::levels);
        Some(Growth {
            max: self.spec.room(),
            requested: state.requested,
            plugged: levels.map_or(0, |l: MemLevels| l.plugged),
        })
    }
}

/// Memory beside that of the boot, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Growth {
    pub(crate) max: u64,
    pub(crate) requested: u64,
    pub(crate) plugged: u64,
}

fn make(
    change: MemChange,
    chunks: &mut Chunks,
    ram: &mut GuestRam,
    backing: &Backing,
) -> Result<(), RamError> {
    match change {
        MemChange::Plug { gpa, size } => chunks.plug(ram, gpa, size, backing),
        MemChange::Unplug { gpa, size } => {
            chunks.unplug(ram, gpa, size);
            Ok(())
        }
        MemChange::UnplugAll => chunks.clear(ram),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(size: u64, max: u64, hugepages: Option<u64>) -> MemoryConfig {
        MemoryConfig {
            size: ByteSize(size),
            max: Some(ByteSize(max)),
            hugepages: hugepages.map(ByteSize),
            ..MemoryConfig::default()
        }
    }

    #[test]
    fn sizes_are_checked() {
        assert_eq!(check(&MemoryConfig::default()), Ok(None));
        let spec = check(&config(128 * MIB, 2 * GIB, None)).unwrap().unwrap();
        assert_eq!(spec.room(), 2 * GIB - 128 * MIB);
        let space = spec.space().unwrap();
        assert_eq!(space.alignment, LINUX_BLOCK);
        for (size, max, huge, says) in [
            (GIB, GIB, None, "no more than the 1G there are at boot"),
            (GIB, 0, None, "no more than the 1G"),
            (GIB, GIB + MIB, None, "in steps of 2M"),
            (GIB, 3 * GIB + 2 * MIB, Some(GIB), "in steps of 1G"),
            (GIB, MAX + GIB, None, "a VM has at most 1T"),
        ] {
            let error = check(&config(size, max, huge)).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
            assert!(error.starts_with("memory: "), "{error}");
        }
        let spec = check(&config(GIB, 3 * GIB, Some(GIB))).unwrap().unwrap();
        assert_eq!(spec.block, GIB);
        assert_eq!(spec.space().unwrap().alignment, GIB);
    }

    #[test]
    fn requests_are_totals_in_steps() {
        let spec = check(&config(128 * MIB, 2 * GIB, None)).unwrap().unwrap();
        assert_eq!(spec.of_total(128 * MIB).unwrap(), 0);
        assert_eq!(spec.of_total(2 * GIB).unwrap(), spec.room());
        for total in [0, 126 * MIB, 129 * MIB, 2 * GIB + BLOCK, u64::MAX] {
            let error = spec.of_total(total).unwrap_err().to_string();
            assert!(
                error.ends_with("this VM's memory may be 128M to 2G, in steps of 2M"),
                "{error}"
            );
        }
    }
}
