//! `testudo ps`, `inspect`, `stats`.

use std::collections::BTreeMap;
use std::process::ExitCode;

use serde::Serialize;
use serde_json::{Value, json};
use testudo_agent_protocol::StatsContainerRequest;

use super::{Context, print, say};
use crate::args::{Format, PodsArgs, PsArgs, StatsArgs};
use crate::clock;
use crate::container::CONTAINER;
use crate::guest::Guest;
use crate::state::{Entry, Phase, find, list};
use crate::values::Size;

pub(super) fn ps(context: &Context, args: &PsArgs) -> anyhow::Result<ExitCode> {
    let mut entries = list(&context.directories)?;
    entries.retain(|entry| args.all || entry.state.phase != Phase::Exited);
    if args.quiet {
        for entry in &entries {
            say(&entry.pod.id)?;
        }
    } else if args.format == Format::Json {
        let rows: Vec<Value> = entries.iter().map(row).collect();
        say(&serde_json::to_string_pretty(&rows)?)?;
    } else {
        let heads = [
            "ID", "NAME", "IMAGE", "COMMAND", "CREATED", "STATUS", "PORTS",
        ]
        .map(str::to_owned);
        let rows: Vec<[String; 7]> = entries.iter().map(columns).collect();
        print(table(&heads, &rows).as_bytes())?;
    }
    Ok(ExitCode::SUCCESS)
}

fn row(entry: &Entry) -> Value {
    let (pod, state) = (&entry.pod, &entry.state);
    json!({
        "id": pod.id,
        "name": pod.name,
        "image": pod.image,
        "command": pod.process.args,
        "created": clock::rfc3339(pod.created_ms),
        "phase": state.phase,
        "status": state.words(),
        "exit_code": state.end.as_ref().map(|end| end.code),
        "ports": pod.net.publish.iter().map(ToString::to_string).collect::<Vec<_>>(),
    })
}

fn columns(entry: &Entry) -> [String; 7] {
    let (pod, state) = (&entry.pod, &entry.state);
    let now = clock::now_ms();
    let since = |ms: u64| clock::age(now.saturating_sub(ms));
    let status = match (state.phase, state.started_ms, &state.end) {
        (Phase::Running, Some(started), _) => format!("running for {}", since(started)),
        (Phase::Exited, _, Some(end)) => format!("{} {} ago", state.words(), since(end.at_ms)),
        _ => state.words(),
    };
    let ports: Vec<String> = pod.net.publish.iter().map(ToString::to_string).collect();
    [
        pod.id.clone(),
        pod.name.clone(),
        short(&pod.image),
        short(&pod.process.args.join(" ")),
        format!("{} ago", since(pod.created_ms)),
        status,
        ports.join(", "),
    ]
}

/// What fits in a column; nothing that a terminal would obey.
fn short(text: &str) -> String {
    let plain: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    if plain.chars().count() <= 32 {
        return plain;
    }
    plain.chars().take(31).chain(['…']).collect()
}

pub(super) fn table<const N: usize>(heads: &[String; N], rows: &[[String; N]]) -> String {
    let all = || std::iter::once(heads).chain(rows);
    let mut widths = [0_usize; N];
    for row in all() {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |row: &[String; N]| {
        let cells = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    all().map(line).collect()
}

pub(super) fn inspect(context: &Context, args: &PodsArgs) -> anyhow::Result<ExitCode> {
    #[derive(Serialize)]
    struct All<'a> {
        pod: &'a crate::pod::Pod,
        state: &'a crate::state::State,
        status: String,
        folder: &'a std::path::Path,
        sockets: std::path::PathBuf,
    }
    let entries = args
        .pods
        .iter()
        .map(|word| find(&context.directories, word));
    let entries = entries.collect::<Result<Vec<_>, _>>()?;
    let all: Vec<All<'_>> = entries
        .iter()
        .map(|entry| All {
            pod: &entry.pod,
            state: &entry.state,
            status: entry.state.words(),
            folder: &entry.folder,
            sockets: context.directories.sockets(&entry.pod.id),
        })
        .collect();
    say(&serde_json::to_string_pretty(&all)?)?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn stats(context: &Context, args: &StatsArgs) -> anyhow::Result<ExitCode> {
    let mut entries = if args.pods.is_empty() {
        list(&context.directories)?
    } else {
        args.pods
            .iter()
            .map(|word| find(&context.directories, word))
            .collect::<Result<_, _>>()?
    };
    entries.retain(|entry| entry.state.phase == Phase::Running || !args.pods.is_empty());
    let mut all = Vec::new();
    for entry in &entries {
        let guest = Guest::of(&context.directories.sockets(&entry.pod.id));
        let stats = guest.call(&StatsContainerRequest {
            id: CONTAINER.into(),
        })?;
        let interfaces: BTreeMap<_, _> = stats
            .interfaces
            .into_iter()
            .map(|i| (i.name, i.counters))
            .collect();
        all.push((entry, stats.cgroup, interfaces, host_memory(entry)));
    }
    if args.format == Format::Json {
        let rows: Vec<Value> = all
            .iter()
            .map(|(entry, cgroup, interfaces, host)| {
                json!({"id": entry.pod.id, "name": entry.pod.name, "cgroup": cgroup, "interfaces": interfaces,
                    "host_rss_bytes": host})
            })
            .collect();
        say(&serde_json::to_string_pretty(&rows)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let heads = [
        "ID",
        "NAME",
        "CPU SECONDS",
        "MEMORY",
        "PROCESSES",
        "HOST MEMORY",
    ]
    .map(str::to_owned);
    let rows: Vec<[String; 6]> = all
        .iter()
        .map(|(entry, cgroup, _, host)| {
            let number = |key: &str| cgroup.get(key).copied().unwrap_or_default();
            let cpu = number("cpu.stat.usage_usec");
            [
                entry.pod.id.clone(),
                entry.pod.name.clone(),
                format!("{}.{:02}", cpu / 1_000_000, cpu / 10_000 % 100),
                mebibytes(number("memory.current")),
                number("pids.current").to_string(),
                mebibytes(*host),
            ]
        })
        .collect();
    print(table(&heads, &rows).as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn mebibytes(bytes: u64) -> String {
    let tenths = bytes.saturating_mul(10) >> 20;
    format!("{}.{} MiB", tenths / 10, tenths % 10)
}

/// Of the VMM and the supervisor, guest RAM included.
fn host_memory(entry: &Entry) -> u64 {
    let of = |pid: u32| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let words = line.map(|line| line.trim().trim_end_matches(" kB").to_owned() + "k");
        words
            .and_then(|words| words.parse().ok())
            .map_or(0, |size: Size| size.0)
    };
    of(entry.state.supervisor).saturating_add(entry.state.vmm.map_or(0, of))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_what_is_in_them() {
        let row = |a: &str, b: &str| [a.to_owned(), b.to_owned()];
        assert_eq!(
            table(&row("A", "B"), &[row("long", "x")]),
            "A     B\nlong  x\n"
        );
        assert_eq!(short("a\x1b[2J"), "a [2J");
        assert_eq!(short(&"x".repeat(40)).chars().count(), 32);
        assert_eq!(mebibytes(3 << 19), "1.5 MiB");
    }
}
