//! What a boot may cost, and what peers were seen to cost.

use crate::measure::Row;

/// A figure of a VMM that is not measured here because Debian does not package it. From a lab of
/// the same kind (QEMU TCG, `-icount shift=0`, 256 MiB, one vCPU), the same stock kernel 6.1, a
/// 2 MB initramfs and the same command line.
pub(crate) struct Quoted {
    pub(crate) vmm: &'static str,
    pub(crate) kernel: &'static str,
    pub(crate) first_run: &'static str,
    pub(crate) whole: &'static str,
}

pub(crate) const QUOTED: &[Quoted] = &[
    Quoted {
        vmm: "Firecracker 1.16-dev",
        kernel: "stock vmlinux",
        first_run: "215–230",
        whole: "1640",
    },
    Quoted {
        vmm: "Cloud Hypervisor 53-dev",
        kernel: "stock vmlinux",
        first_run: "206–214",
        whole: "1630",
    },
    Quoted {
        vmm: "Cloud Hypervisor 53-dev",
        kernel: "stock bzImage",
        first_run: "95–98",
        whole: "1780",
    },
];

/// Half of the least that the quoted peers need from exec to their first KVM_RUN.
const HALF_OF_FIRECRACKER_NS: u64 = 107_500_000;
const HALF_OF_CLOUD_HYPERVISOR_NS: u64 = 103_000_000;
const HALF_OF_CLOUD_HYPERVISOR_BZIMAGE_NS: u64 = 47_500_000;
const WHOLE_NS: u64 = 1_450_000_000;
const OWN_INIT_NS: u64 = 250_000_000;
const PSS_KIB: u64 = 3 * 1024;

/// A limit and whether it is kept; `None` where nothing was measured.
pub(crate) struct Bar {
    pub(crate) what: String,
    pub(crate) limit: String,
    pub(crate) measured: Option<(String, bool)>,
}

pub(crate) fn all(rows: &[Row]) -> Vec<Bar> {
    let row = |kernel: &str| {
        rows.iter()
            .find(|r| r.vmm == "testudo-vmm" && r.kernel == kernel)
    };
    let time = |kernel: &'static str, what: &str, limit: u64, pick: fn(&Row) -> Option<u64>| Bar {
        what: format!("{what}, {kernel}"),
        limit: format!("≤ {} ms", ms(limit)),
        measured: row(kernel)
            .and_then(pick)
            .map(|ns| (format!("{} ms", ms(ns)), ns <= limit)),
    };
    let whole = |r: &Row| Some(r.times?.exit);
    let first_run = |r: &Row| Some(r.times?.first_run);
    let init = |r: &Row| Some(r.times?.init);
    let own_init = |kernel| time(kernel, "exec→init", OWN_INIT_NS, init);
    vec![
        time(
            "stock vmlinux",
            "exec→first KVM_RUN: half of Firecracker's",
            HALF_OF_FIRECRACKER_NS,
            first_run,
        ),
        time(
            "stock vmlinux",
            "exec→first KVM_RUN: half of Cloud Hypervisor's",
            HALF_OF_CLOUD_HYPERVISOR_NS,
            first_run,
        ),
        time(
            "stock bzImage",
            "exec→first KVM_RUN: half of Cloud Hypervisor's",
            HALF_OF_CLOUD_HYPERVISOR_BZIMAGE_NS,
            first_run,
        ),
        time("stock vmlinux", "exec→exit", WHOLE_NS, whole),
        own_init("own vmlinux"),
        Bar {
            what: "PSS without guest RAM".to_owned(),
            limit: format!("≤ {PSS_KIB} KiB"),
            measured: rows
                .iter()
                .filter(|r| r.vmm == "testudo-vmm")
                .filter_map(|r| r.pss_kib)
                .max()
                .map(|kib| (format!("{kib} KiB"), kib <= PSS_KIB)),
        },
    ]
}

/// Nanoseconds as milliseconds with one decimal.
pub(crate) fn ms(ns: u64) -> String {
    let tenths = ns.saturating_add(50_000) / 100_000;
    format!("{}.{}", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn milliseconds_are_rounded() {
        assert_eq!(ms(1_449_949_999), "1449.9");
        assert_eq!(ms(1_449_950_000), "1450.0");
        assert_eq!(ms(0), "0.0");
    }
}
