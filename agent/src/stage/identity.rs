//! User, groups and capabilities.

use rustix::fs::Mode;
use rustix::process::{Gid, Uid};
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set,
    configure_capability_in_ambient_set, remove_capability_from_bounding_set, set_capabilities,
    set_keep_capabilities, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};
use testudo_agent_protocol::{CAPABILITIES, Capabilities, Process};

use crate::failure::{During, Failure};

/// All five sets, as bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sets {
    bounding: CapabilitySet,
    effective: CapabilitySet,
    inheritable: CapabilitySet,
    permitted: CapabilitySet,
    ambient: CapabilitySet,
}

impl Sets {
    /// Reads names; unknown ones are errors. A process without capabilities gets none.
    pub(super) fn read(given: Option<&Capabilities>) -> Result<Self, Failure> {
        let none = Capabilities::default();
        let given = given.unwrap_or(&none);
        Ok(Self {
            bounding: set_of(&given.bounding)?,
            effective: set_of(&given.effective)?,
            inheritable: set_of(&given.inheritable)?,
            permitted: set_of(&given.permitted)?,
            ambient: set_of(&given.ambient)?,
        })
    }
}

fn set_of(names: &[String]) -> Result<CapabilitySet, Failure> {
    names.iter().try_fold(CapabilitySet::empty(), |set, name| {
        let number = name
            .strip_prefix("CAP_")
            .and_then(|name| CAPABILITIES.iter().position(|known| *known == name))
            .ok_or_else(|| Failure::invalid(format!("there is no capability {name}")))?;
        Ok(set | CapabilitySet::from_bits_retain(1 << number))
    })
}

fn each(set: CapabilitySet) -> impl Iterator<Item = CapabilitySet> {
    (0..64_u32)
        .map(|number| CapabilitySet::from_bits_retain(1 << number))
        .filter(move |one| set.contains(*one))
}

/// Takes on user, groups and capabilities, in the one order that works: the bounding set while there is
/// still the right to, ids while capabilities are kept over them, then the sets themselves.
pub(super) fn take_on(process: &Process, sets: &Sets) -> Result<(), Failure> {
    let user = process.user.clone().unwrap_or_default();
    for number in 0..64_u32 {
        let one = CapabilitySet::from_bits_retain(1 << number);
        if !sets.bounding.contains(one) {
            match remove_capability_from_bounding_set(one) {
                // More than this kernel has.
                Ok(()) | Err(rustix::io::Errno::INVAL) => {}
                Err(e) => return Err(e).during(|| format!("drop capability {number}")),
            }
        }
    }
    // Until the execution, which clears it.
    set_keep_capabilities(true).during(|| "keep capabilities over a change of user".into())?;
    let groups: Vec<Gid> = user
        .additional_gids
        .iter()
        .map(|gid| Gid::from_raw(*gid))
        .collect();
    match set_thread_groups(&groups) {
        // A user namespace may deny it, and then there are none to be rid of.
        Err(rustix::io::Errno::PERM) if groups.is_empty() => {}
        set => set.during(|| format!("take on groups {:?}", user.additional_gids))?,
    }
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    set_thread_res_gid(gid, gid, gid).during(|| format!("become group {}", user.gid))?;
    set_thread_res_uid(uid, uid, uid).during(|| format!("become user {}", user.uid))?;
    let all = CapabilitySets {
        effective: sets.effective,
        permitted: sets.permitted,
        inheritable: sets.inheritable,
    };
    set_capabilities(None, all).during(|| "take on capabilities".into())?;
    clear_ambient_capability_set().during(|| "clear the ambient capabilities".into())?;
    for one in each(sets.ambient) {
        configure_capability_in_ambient_set(one, true)
            .during(|| format!("raise ambient capability {:#x}", one.bits()))?;
    }
    let umask = user.umask.unwrap_or(0o022);
    rustix::process::umask(Mode::from_raw_mode(umask & 0o777));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_have_the_kernels_numbers() {
        let bits = |name: &str| set_of(&[name.to_owned()]).unwrap();
        assert_eq!(bits("CAP_CHOWN"), CapabilitySet::CHOWN);
        assert_eq!(bits("CAP_SYS_ADMIN"), CapabilitySet::SYS_ADMIN);
        assert_eq!(bits("CAP_SETFCAP"), CapabilitySet::SETFCAP);
        assert_eq!(
            bits("CAP_CHECKPOINT_RESTORE"),
            CapabilitySet::CHECKPOINT_RESTORE
        );
        for wrong in ["CAP_", "CHOWN", "cap_chown", "CAP_NOTHING", ""] {
            assert!(set_of(&[wrong.to_owned()]).is_err(), "{wrong}");
        }
    }
}
