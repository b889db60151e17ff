//! What guests do: the steps of each group, and the script that takes them.
//!
//! ```text
//! guest: READY step ─▶ host takes the time, sends a line ─▶ work ─▶ RESULT … ─▶ DONE step ─▶ a line
//! ```

use crate::case::Group;
use crate::host::{GUEST_ADDRESS, HOST_ADDRESS, PORT};
use crate::work::files::Work;

/// In what a step's rate is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Requests, round trips, files: a second.
    PerSecond,
    /// 10^6 bytes a second.
    Megabytes,
    /// KiB of memory; not a rate, and less is better.
    Kibibytes,
}

impl Unit {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Unit::PerSecond => "1/s",
            Unit::Megabytes => "MB/s",
            Unit::Kibibytes => "KiB",
        }
    }
}

/// Work of one kind that is measured by itself.
#[derive(Debug)]
pub(crate) struct Step {
    pub(crate) name: &'static str,
    pub(crate) unit: Unit,
    /// Not measured: whatever makes the work as hard as it shall be.
    before: &'static str,
    /// What has to be in the shared folder when a guest begins with this step.
    pub(crate) needs: Option<(Work, u64)>,
    /// In bash, closing with RESULT or with fio's terse line.
    work: &'static str,
    /// Ours by QEMU's has to reach this.
    pub(crate) bar: f64,
}

const fn step(name: &'static str, unit: Unit, work: &'static str) -> Step {
    Step {
        name,
        unit,
        before: ":",
        needs: None,
        work,
        bar: 1.0,
    }
}

/// What a disk's and a file system's small requests have to reach.
const QUICKER: f64 = 1.2;

impl Step {
    const fn after(mut self, before: &'static str) -> Step {
        self.before = before;
        self
    }

    const fn needs(mut self, work: Work, amount: u64) -> Step {
        self.needs = Some((work, amount));
        self
    }

    const fn bar(mut self, bar: f64) -> Step {
        self.bar = bar;
        self
    }
}

const COLD: &str = "sync; echo 3 > /proc/sys/vm/drop_caches";

const BLK: &[Step] = &[
    step("randread 4k QD1", Unit::PerSecond, "io randread 4k 1 16M"),
    step("randwrite 4k QD1", Unit::PerSecond, "io randwrite 4k 1 16M"),
    step("randread 4k QD32", Unit::PerSecond, "io randread 4k 32 64M").bar(QUICKER),
    step(
        "randwrite 4k QD32",
        Unit::PerSecond,
        "io randwrite 4k 32 64M",
    )
    .bar(QUICKER),
    step("read 128k QD8", Unit::Megabytes, "io read 128k 8 256M"),
    step("write 128k QD8", Unit::Megabytes, "io write 128k 8 256M"),
];
const NET: &[Step] = &[
    step("TCP send", Unit::Megabytes, "tcp send 268435456"),
    step("TCP receive", Unit::Megabytes, "tcp receive 268435456"),
    step(
        "TCP request/response",
        Unit::PerSecond,
        "tcp ping-pong 3000",
    ),
];
const VSOCK: &[Step] = &[
    step("vsock send", Unit::Megabytes, "vsock send 134217728"),
    step("vsock receive", Unit::Megabytes, "vsock receive 134217728"),
    step(
        "vsock request/response",
        Unit::PerSecond,
        "vsock ping-pong 3000",
    ),
];
const FS: &[Step] = &[
    step("create", Unit::PerSecond, "files create 1000").bar(QUICKER),
    step("stat, cold", Unit::PerSecond, "files stat 1000")
        .needs(Work::Create, 1000)
        .after(COLD)
        .bar(QUICKER),
    step("open and read 4k, cold", Unit::PerSecond, "files open 1000")
        .needs(Work::Create, 1000)
        .after(COLD)
        .bar(QUICKER),
    step("unlink", Unit::PerSecond, "files unlink 1000")
        .needs(Work::Create, 1000)
        .bar(QUICKER),
    step("write 1M", Unit::Megabytes, "files write 67108864"),
    step("read 1M, cold", Unit::Megabytes, "files read 67108864")
        .needs(Work::Write, 67_108_864)
        .after(COLD),
];
/// The host does this one's measuring.
pub(crate) const IDLE: &str = "PSS without guest RAM";
const PSS: &[Step] = &[step(IDLE, Unit::Kibibytes, ":")];

pub(crate) fn steps(group: Group) -> &'static [Step] {
    match group {
        Group::Blk => BLK,
        Group::Net => NET,
        Group::Vsock => VSOCK,
        Group::Fs => FS,
        Group::Pss => PSS,
    }
}

/// The script for the guest that takes these steps of the group.
pub(crate) fn script(group: Group, steps: &[&Step]) -> String {
    let mut text = String::from(PRELUDE);
    text.push_str(&match group {
        // Reads fio and what it needs from the userland's disk.
        Group::Blk => "io read 128k 1 1M > /dev/null\n".to_owned(),
        Group::Net => format!(
            "ip address add {GUEST_ADDRESS}/24 dev eth0\nip link set eth0 up\n\
             tcp() {{ \"$tool\" work tcp {HOST_ADDRESS}:{PORT} \"$@\"; }}\n\
             tcp ping-pong 10 > /dev/null\n"
        ),
        Group::Vsock => format!(
            "vsock() {{ \"$tool\" work vsock {PORT} \"$@\"; }}\nvsock ping-pong 10 > /dev/null\n"
        ),
        Group::Fs => "mkdir /mnt/share\nmount -t virtiofs share /mnt/share\n\
             files() { \"$tool\" work files /mnt/share \"$@\"; }\n\
             mkdir /mnt/share/warm; \"$tool\" work files /mnt/share/warm create 10 > /dev/null\n\
             rm -r /mnt/share/warm\n"
            .to_owned(),
        Group::Pss => "sleep 2\n".to_owned(),
    });
    for step in steps {
        text.push_str(&format!(
            "{}\nstep '{}' {}\n",
            step.before, step.name, step.work
        ));
    }
    text
}

/// `io KIND BLOCK DEPTH BYTES`: fio on the data disk, past the guest's page cache.
const PRELUDE: &str = r#"stty -echo
tool=/run/files/perf-devices
step() {
    local name=$1; shift
    echo "READY $name"; read -r _
    "$@"
    echo "DONE $name"; read -r _
}
io() {
    fio --name=io --filename=/dev/vdb --direct=1 --ioengine=libaio --thread --gtod_reduce=1 \
        --norandommap --randrepeat=1 --output-format=terse --terse-version=3 \
        --rw="$1" --bs="$2" --iodepth="$3" --io_size="$4" --size=256M
}
"#;

/// Work done, and nanoseconds that it took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Done {
    pub(crate) units: u64,
    pub(crate) ns: u64,
}

/// A line that tells what was done: our own, or fio's terse format 3 (fio(1)), in which reads are
/// fields 6 to 9 (KiB, KiB/s, requests a second, ms) and writes 47 to 50.
pub(crate) fn result(line: &str, unit: Unit) -> Option<Done> {
    if let Some(rest) = line.strip_prefix("RESULT ") {
        let (units, ns) = rest.split_once(' ')?;
        return Some(Done {
            units: units.parse().ok()?,
            ns: ns.parse().ok()?,
        });
    }
    let fields: Vec<&str> = line.strip_prefix("3;fio-")?.split(';').collect();
    // Without the first field, the format's number.
    let number = |n: usize| fields.get(n - 2)?.parse::<u64>().ok();
    let direction = [6, 47].into_iter().find(|n| number(*n) != Some(0))?;
    let kib = number(direction)?;
    Some(Done {
        units: match unit {
            Unit::Megabytes => kib * 1024,
            _ => kib / 4,
        },
        ns: number(direction + 3)? * 1_000_000,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fios_terse_line_is_read() {
        let mut fields: Vec<String> = (1..=130).map(|_| "0".to_owned()).collect();
        for (n, value) in [
            (1, "3"),
            (2, "fio-3.33"),
            (3, "io"),
            (47, "65536"),
            (50, "812"),
        ] {
            fields[n - 1] = value.to_owned();
        }
        let line = fields.join(";");
        let done = result(&line, Unit::PerSecond).unwrap();
        assert_eq!((done.units, done.ns), (16384, 812_000_000));
        assert_eq!(result(&line, Unit::Megabytes).unwrap().units, 64 << 20);
        assert_eq!(
            result("RESULT 10 99", Unit::Megabytes),
            Some(Done { units: 10, ns: 99 })
        );
        assert_eq!(result("READY x", Unit::PerSecond), None);
    }

    #[test]
    fn names_are_unique_and_fit_a_shell() {
        let all: Vec<&Step> = Group::ALL.iter().flat_map(|g| steps(*g)).collect();
        for (n, step) in all.iter().enumerate() {
            assert!(!step.name.contains('\''));
            assert!(
                !all[..n].iter().any(|s| s.name == step.name),
                "{}",
                step.name
            );
        }
        let two: Vec<&Step> = steps(Group::Blk).iter().take(2).collect();
        assert_eq!(script(Group::Blk, &two).matches("\nstep '").count(), 2);
    }
}
