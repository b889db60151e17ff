//! Which of the work on a packet is left to whom: feature bits and the tap's own flags.
//!
//! `HOST_*` is what the guest may leave to the host, `GUEST_*` what the host may leave to the guest
//! (virtio 1.2 §5.1.3). A tap takes whatever the guest leaves undone, by the header of each frame; it
//! has to be told what the guest takes.

use virtio_bindings::virtio_net as bits;

/// A feature bit by its number.
pub(super) const fn bit(number: u32) -> u64 {
    1 << number
}

/// `TUNSETOFFLOAD` flags (linux/if_tun.h).
pub(super) mod flag {
    pub(crate) const CSUM: u32 = 0x01;
    pub(crate) const TSO4: u32 = 0x02;
    pub(crate) const TSO6: u32 = 0x04;
    pub(crate) const TSO_ECN: u32 = 0x08;
    pub(crate) const UFO: u32 = 0x10;
    pub(crate) const USO4: u32 = 0x20;
    pub(crate) const USO6: u32 = 0x40;
    /// What every tap takes.
    pub(crate) const PLAIN: u32 = CSUM | TSO4 | TSO6 | TSO_ECN;
    pub(crate) const USO: u32 = USO4 | USO6;
}

/// The feature that lets a flag be set.
const GUEST: [(u32, u32); 7] = [
    (bits::VIRTIO_NET_F_GUEST_CSUM, flag::CSUM),
    (bits::VIRTIO_NET_F_GUEST_TSO4, flag::TSO4),
    (bits::VIRTIO_NET_F_GUEST_TSO6, flag::TSO6),
    (bits::VIRTIO_NET_F_GUEST_ECN, flag::TSO_ECN),
    (bits::VIRTIO_NET_F_GUEST_UFO, flag::UFO),
    (bits::VIRTIO_NET_F_GUEST_USO4, flag::USO4),
    (bits::VIRTIO_NET_F_GUEST_USO6, flag::USO6),
];

/// Features that let the host send more than the MTU at once.
const GUEST_LARGE: u64 = bit(bits::VIRTIO_NET_F_GUEST_TSO4)
    | bit(bits::VIRTIO_NET_F_GUEST_TSO6)
    | bit(bits::VIRTIO_NET_F_GUEST_UFO)
    | bit(bits::VIRTIO_NET_F_GUEST_USO4)
    | bit(bits::VIRTIO_NET_F_GUEST_USO6);

/// What a tap that takes `flags` can be offered as.
pub(super) fn offered(flags: u32) -> u64 {
    if flags & flag::CSUM == 0 {
        return 0;
    }
    let mut features = bit(bits::VIRTIO_NET_F_CSUM) | bit(bits::VIRTIO_NET_F_CTRL_GUEST_OFFLOADS);
    for (guest, needs) in GUEST {
        if flags & needs != 0 {
            features |= bit(guest);
        }
    }
    let host = [
        (bits::VIRTIO_NET_F_HOST_TSO4, flag::TSO4),
        (bits::VIRTIO_NET_F_HOST_TSO6, flag::TSO6),
        (bits::VIRTIO_NET_F_HOST_ECN, flag::TSO_ECN),
        (bits::VIRTIO_NET_F_HOST_UFO, flag::UFO),
        (bits::VIRTIO_NET_F_HOST_USO, flag::USO),
    ];
    for (host, needs) in host {
        if flags & needs == needs {
            features |= bit(host);
        }
    }
    features
}

/// The flags for a guest that accepted `features`, or asks for them by CTRL_GUEST_OFFLOADS. Nothing
/// can be left undone that is built on a checksum which may not.
pub(super) fn flags(features: u64) -> u32 {
    if features & bit(bits::VIRTIO_NET_F_GUEST_CSUM) == 0 {
        return 0;
    }
    let mut flags = 0;
    for (feature, flag) in GUEST {
        if features & bit(feature) != 0 {
            flags |= flag;
        }
    }
    if flags & (flag::TSO4 | flag::TSO6) == 0 {
        flags &= !flag::TSO_ECN;
    }
    // The kernel knows them as a pair.
    if flags & flag::USO != flag::USO {
        flags &= !flag::USO;
    }
    flags
}

/// The `GUEST_*` bits of `features`: what CTRL_GUEST_OFFLOADS may ask for.
pub(super) fn guest_bits(features: u64) -> u64 {
    let all = GUEST
        .iter()
        .fold(0, |all, (feature, _)| all | bit(*feature));
    features & all
}

/// Whether frames larger than the MTU come.
pub(super) fn large(features: u64) -> bool {
    features & GUEST_LARGE != 0
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_tap_without_checksums_offers_nothing() {
        assert_eq!(offered(0), 0);
        assert_eq!(offered(flag::TSO4), 0);
        let plain = offered(flag::PLAIN);
        assert_ne!(plain & bit(bits::VIRTIO_NET_F_HOST_TSO6), 0);
        assert_eq!(plain & bit(bits::VIRTIO_NET_F_HOST_USO), 0);
        assert_eq!(plain & bit(bits::VIRTIO_NET_F_GUEST_UFO), 0);
        let all = offered(flag::PLAIN | flag::UFO | flag::USO);
        assert_ne!(all & bit(bits::VIRTIO_NET_F_HOST_USO), 0);
        assert!(large(all));
        assert!(!large(bit(bits::VIRTIO_NET_F_GUEST_CSUM)));
    }

    proptest! {
        /// Whatever a guest accepts of what was offered, or asks for out of the blue, is something
        /// that TUNSETOFFLOAD takes.
        #[test]
        fn the_kernel_takes_the_flags(features in any::<u64>()) {
            let got = flags(features);
            prop_assert_eq!(got & !(flag::PLAIN | flag::UFO | flag::USO), 0);
            prop_assert!(got == 0 || got & flag::CSUM != 0);
            prop_assert!(got & flag::USO == 0 || got & flag::USO == flag::USO);
            prop_assert!(got & flag::TSO_ECN == 0 || got & (flag::TSO4 | flag::TSO6) != 0);
            prop_assert_eq!(flags(guest_bits(features)), got);
            prop_assert_eq!(flags(offered(got)), got);
        }
    }
}
