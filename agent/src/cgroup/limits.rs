//! Limits of the OCI specification, which counts as cgroup v1 did, as files of version 2.

use testudo_agent_protocol::{BlockLimit, Resources};

use crate::failure::Failure;

/// Files and what to write to them, in that order.
pub(super) fn files(resources: &Resources) -> Result<Vec<(String, String)>, Failure> {
    let mut files = Vec::new();
    let mut put = |file: &str, value: String| files.push((file.to_owned(), value));
    if let Some(memory) = &resources.memory {
        if let Some(reservation) = memory.reservation {
            put("memory.low", bytes("a memory reservation", reservation)?);
        }
        if let Some(swap) = swap(memory.swap, memory.limit)? {
            put("memory.swap.max", swap);
        }
        if let Some(limit) = memory.limit {
            put("memory.max", bytes("a memory limit", limit)?);
        }
    }
    if let Some(cpu) = &resources.cpu {
        if let Some(idle) = cpu.idle {
            put("cpu.idle", idle.to_string());
        }
        if let Some(shares) = cpu.shares.filter(|shares| *shares != 0) {
            put("cpu.weight", weight(shares).to_string());
        }
        if cpu.quota.is_some() || cpu.period.is_some() {
            let quota = match cpu.quota {
                Some(quota) if quota > 0 => quota.to_string(),
                _ => "max".into(),
            };
            let period = cpu.period.filter(|period| *period != 0).unwrap_or(100_000);
            put("cpu.max", format!("{quota} {period}"));
        }
        if let Some(burst) = cpu.burst {
            put("cpu.max.burst", burst.to_string());
        }
        if !cpu.cpus.is_empty() {
            put("cpuset.cpus", cpu.cpus.clone());
        }
        if !cpu.mems.is_empty() {
            put("cpuset.mems", cpu.mems.clone());
        }
    }
    if let Some(pids) = resources.pids_max {
        let most = if pids > 0 {
            pids.to_string()
        } else {
            "max".into()
        };
        put("pids.max", most);
    }
    if let Some(io) = &resources.block_io {
        if let Some(weight) = io.weight.filter(|weight| *weight != 0) {
            put("io.bfq.weight", weight.to_string());
        }
        for limit in &io.limits {
            put("io.max", block(limit));
        }
    }
    for (size, most) in &resources.hugetlb {
        plain(size)?;
        put(&format!("hugetlb.{size}.max"), most.to_string());
    }
    for (file, value) in &resources.unified {
        plain(file)?;
        put(file, value.clone());
    }
    Ok(files)
}

/// A name that stays in its folder.
fn plain(name: &str) -> Result<(), Failure> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if !name.is_empty() && !name.starts_with('.') && name.chars().all(good) {
        return Ok(());
    }
    Err(Failure::invalid(format!("{name:?} is no file of a cgroup")))
}

fn bytes(what: &str, value: i64) -> Result<String, Failure> {
    match value {
        -1 => Ok("max".into()),
        0.. => Ok(value.to_string()),
        _ => Err(Failure::invalid(format!("{what} of {value} bytes"))),
    }
}

/// The specification counts memory and swap together.
fn swap(both: Option<i64>, memory: Option<i64>) -> Result<Option<String>, Failure> {
    match (both, memory) {
        (None | Some(0), _) => Ok(None),
        (Some(-1), _) => Ok(Some("max".into())),
        (Some(both), Some(memory)) if memory >= 0 && both >= memory => {
            Ok(Some(both.saturating_sub(memory).to_string()))
        }
        (Some(both), memory) => Err(Failure::invalid(format!(
            "memory and swap together are {both} bytes with a memory limit of {memory:?}"
        ))),
    }
}

/// From 2..=262144 to 1..=10000, as runc and the kernel's own documentation of the OCI suggest since 2025
/// (opencontainers/cgroups, ConvertCPUSharesToCgroupV2Value): 1024 becomes 100.
fn weight(shares: u64) -> u64 {
    if shares <= 2 {
        return 1;
    }
    if shares >= 262_144 {
        return 10_000;
    }
    // 10^((log2(s)^2 + 125 log2(s)) / 612 - 7/34), rounded up.
    #[expect(clippy::cast_precision_loss, reason = "shares are less than 2^18")]
    let log = (shares as f64).log2();
    let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
    let weight = 10_f64.powf(exponent).ceil();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "between 1 and 10000"
    )]
    let weight = weight as u64;
    weight.clamp(1, 10_000)
}

fn block(limit: &BlockLimit) -> String {
    let mut line = format!("{}:{}", limit.major, limit.minor);
    for (key, value) in [
        ("rbps", limit.read_bps),
        ("wbps", limit.write_bps),
        ("riops", limit.read_iops),
        ("wiops", limit.write_iops),
    ] {
        match value {
            Some(0) => line.push_str(&format!(" {key}=max")),
            Some(value) => line.push_str(&format!(" {key}={value}")),
            None => {}
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use testudo_agent_protocol::{Cpu, Memory};

    use super::*;

    #[test]
    fn shares_become_weights() {
        for (shares, expected) in [
            (2, 1),
            (1024, 100),
            (262_144, 10_000),
            (0, 1),
            (u64::MAX, 10_000),
        ] {
            assert_eq!(weight(shares), expected, "{shares}");
        }
        let weights: Vec<u64> = (1..18).map(|n| weight(1 << n)).collect();
        assert!(weights.is_sorted());
    }

    #[test]
    fn limits_become_files() {
        let resources = Resources {
            memory: Some(Memory {
                limit: Some(64 << 20),
                reservation: None,
                swap: Some(96 << 20),
            }),
            cpu: Some(Cpu {
                quota: Some(50_000),
                period: Some(100_000),
                ..Cpu::default()
            }),
            pids_max: Some(-1),
            ..Resources::default()
        };
        let files = files(&resources).unwrap();
        let find = |name: &str| {
            let found = files.iter().find(|(file, _)| file == name);
            found.map(|(_, value)| value.as_str())
        };
        assert_eq!(find("memory.max"), Some("67108864"));
        assert_eq!(find("memory.swap.max"), Some("33554432"));
        assert_eq!(find("cpu.max"), Some("50000 100000"));
        assert_eq!(find("pids.max"), Some("max"));
    }

    #[test]
    fn names_cannot_lead_out() {
        for name in ["../x", "", ".", "a/b", "..", "x\n"] {
            let resources = Resources {
                unified: [(name.to_owned(), "1".to_owned())].into(),
                ..Resources::default()
            };
            assert!(files(&resources).is_err(), "{name:?}");
        }
    }
}
