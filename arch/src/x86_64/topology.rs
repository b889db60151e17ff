//! Sockets, dies, cores and threads, and the APIC ids that encode them.
//!
//! An APIC id is a number of bit fields, thread lowest, each as wide as the power of two that
//! holds its count (SDM 3A §9.9.1). Counts that are no powers of two leave gaps, so ids may pass
//! 254 although the CPUs are fewer. Such CPUs are described and can run, but Linux leaves those
//! above 255 offline on a machine without interrupt remapping: prefer powers of two.

use serde::Serialize;
use thiserror::Error;

/// Most CPUs of a guest.
pub const VCPUS_MAX: u16 = 254;

/// Why there is no topology.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum TopologyError {
    /// None or too many.
    #[error(
        "{sockets} sockets × {dies} dies × {cores} cores × {threads} threads: \
         give between 1 and {VCPUS_MAX} CPUs in all"
    )]
    Count {
        /// Sockets asked for.
        sockets: u16,
        /// Dies per socket.
        dies: u16,
        /// Cores per die.
        cores: u16,
        /// Threads per core.
        threads: u16,
    },
}

/// A CPU topology of 1 to 254 CPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Topology {
    sockets: u16,
    dies: u16,
    cores: u16,
    threads: u16,
}

impl Topology {
    /// A topology of `sockets` × `dies` per socket × `cores` per die × `threads` per core.
    pub fn new(sockets: u16, dies: u16, cores: u16, threads: u16) -> Result<Self, TopologyError> {
        let count = [sockets, dies, cores, threads]
            .into_iter()
            .try_fold(1u16, u16::checked_mul);
        match count {
            Some(1..=VCPUS_MAX) => Ok(Self {
                sockets,
                dies,
                cores,
                threads,
            }),
            _ => Err(TopologyError::Count {
                sockets,
                dies,
                cores,
                threads,
            }),
        }
    }

    /// One socket of `vcpus` single-threaded cores.
    pub fn flat(vcpus: u16) -> Result<Self, TopologyError> {
        Self::new(1, 1, vcpus, 1)
    }

    /// CPUs in all.
    pub fn vcpus(&self) -> u16 {
        self.sockets * self.vcpus_per_socket()
    }

    /// Sockets.
    pub fn sockets(&self) -> u16 {
        self.sockets
    }

    /// Dies per socket.
    pub fn dies(&self) -> u16 {
        self.dies
    }

    /// Cores per die.
    pub fn cores(&self) -> u16 {
        self.cores
    }

    /// Threads per core.
    pub fn threads(&self) -> u16 {
        self.threads
    }

    /// CPUs per socket.
    pub fn vcpus_per_socket(&self) -> u16 {
        self.dies * self.vcpus_per_die()
    }

    /// CPUs per die.
    pub fn vcpus_per_die(&self) -> u16 {
        self.cores * self.threads
    }

    /// Width of the thread field, which is how far an APIC id is shifted to give a core.
    pub fn thread_bits(&self) -> u32 {
        width(self.threads)
    }

    /// How far an APIC id is shifted to give a die.
    pub fn die_shift(&self) -> u32 {
        self.thread_bits() + width(self.cores)
    }

    /// How far an APIC id is shifted to give a socket.
    pub fn socket_shift(&self) -> u32 {
        self.die_shift() + width(self.dies)
    }

    /// The x2APIC id of CPU `index`, which is also the id to create its KVM vCPU with; `None`
    /// when there is no such CPU.
    pub fn apic_id(&self, index: u16) -> Option<u32> {
        if index >= self.vcpus() {
            return None;
        }
        let thread = u32::from(index % self.threads);
        let core = u32::from(index / self.threads % self.cores);
        let die = u32::from(index / self.vcpus_per_die() % self.dies);
        let socket = u32::from(index / self.vcpus_per_socket());
        Some(
            thread
                | core << self.thread_bits()
                | die << self.die_shift()
                | socket << self.socket_shift(),
        )
    }

    /// All APIC ids, by CPU index.
    pub fn apic_ids(&self) -> impl Iterator<Item = u32> + '_ {
        (0..self.vcpus()).filter_map(|index| self.apic_id(index))
    }

    /// The greatest APIC id.
    pub fn max_apic_id(&self) -> u32 {
        self.apic_ids().max().unwrap_or(0)
    }
}

/// Bits that hold `count` values.
fn width(count: u16) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_flat_topology_counts_up() {
        let topology = Topology::flat(254).unwrap();
        assert_eq!(
            topology.apic_ids().collect::<Vec<_>>(),
            (0..254).collect::<Vec<_>>()
        );
        assert_eq!(topology.apic_id(254), None);
    }

    #[test]
    fn three_cores_leave_a_gap() {
        let topology = Topology::new(2, 1, 3, 2).unwrap();
        let ids = [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13];
        assert_eq!(topology.apic_ids().collect::<Vec<_>>(), ids);
        assert!(Topology::new(3, 1, 65, 1).unwrap().max_apic_id() > 254);
    }

    #[test]
    fn no_cpu_and_too_many_are_refused() {
        assert!(Topology::flat(0).is_err());
        assert!(Topology::flat(255).is_err());
        assert!(Topology::new(u16::MAX, 2, 1, 1).is_err());
    }

    proptest! {
        #[test]
        fn ids_are_unique_and_decode(s in 1u16..9, d in 1u16..5, c in 1u16..65, t in 1u16..5) {
            let Ok(topology) = Topology::new(s, d, c, t) else { return Ok(()) };
            let ids: BTreeSet<u32> = topology.apic_ids().collect();
            prop_assert_eq!(ids.len(), usize::from(topology.vcpus()));
            let sockets: BTreeSet<u32> = ids.iter().map(|id| id >> topology.socket_shift()).collect();
            prop_assert_eq!(sockets.len(), usize::from(s));
            let cores: BTreeSet<u32> = ids.iter().map(|id| id >> topology.thread_bits()).collect();
            prop_assert_eq!(cores.len(), usize::from(s * d * c));
        }
    }
}
