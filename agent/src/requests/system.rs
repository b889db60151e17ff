//! The guest's machine, and the agent itself.

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::inotify::{self, WatchFlags};
use rustix::time::{ClockId, Timespec, clock_settime};
use testudo_agent_protocol::{
    API, EventsRequest, HealthResponse, InterfaceStats, MetricsResponse, OnlineResourcesRequest,
    OnlineResourcesResponse, OomEvent, ReseedRandomRequest, ReseedRandomResponse, SetClockRequest,
    SetClockResponse, WaitDeviceRequest, WaitDeviceResponse, code, event::What,
};

use crate::agent::Agent;
use crate::cgroup::Group;
use crate::failure::{During, Failure};
use crate::rpc::ReplyTo;
use crate::storage;

/// How long a device may take if the host does not say.
const PATIENCE: Duration = Duration::from_secs(10);

fn patience(ms: u32) -> Duration {
    match ms {
        0 => PATIENCE,
        ms => Duration::from_millis(u64::from(ms)),
    }
}

pub(super) fn health(agent: &Agent) -> HealthResponse {
    let kernel = rustix::system::uname();
    HealthResponse {
        version: env!("CARGO_PKG_VERSION").into(),
        api: API,
        init: agent.init,
        kernel: kernel.release().to_string_lossy().into_owned(),
        drivers: storage::names(),
        started_ns: agent.started_ns,
        listening_ns: agent.listening_ns,
    }
}

pub(super) fn metrics(agent: &Agent) -> MetricsResponse {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kilobytes = |text: &str, key: &str| -> u64 {
        let line = text.lines().find_map(|line| line.strip_prefix(key));
        let number = line.and_then(|line| line.split_ascii_whitespace().next());
        number.and_then(|n| n.parse().ok()).unwrap_or_default()
    };
    let count = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
    let fds = fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    let values = [
        (
            "testudo_agent_rss_bytes",
            kilobytes(&status, "VmRSS:").saturating_mul(1024),
        ),
        ("testudo_agent_threads", kilobytes(&status, "Threads:")),
        ("testudo_agent_fds", count(fds)),
        ("testudo_agent_connections", count(agent.server.count())),
        ("testudo_agent_unsent_bytes", count(agent.server.unsent())),
        ("testudo_agent_relays", count(agent.relays.count())),
        ("testudo_agent_parked_streams", count(agent.streams.count())),
        ("testudo_agent_containers", count(agent.containers.len())),
        ("testudo_agent_processes", count(agent.processes.len())),
        (
            "testudo_guest_memory_total_bytes",
            kilobytes(&memory, "MemTotal:").saturating_mul(1024),
        ),
        (
            "testudo_guest_memory_available_bytes",
            kilobytes(&memory, "MemAvailable:").saturating_mul(1024),
        ),
    ];
    #[expect(
        clippy::cast_precision_loss,
        reason = "a metric is a float by its protocol"
    )]
    let values = values.map(|(name, value)| (name.to_owned(), value as f64));
    MetricsResponse {
        values: values.into(),
    }
}

pub(super) fn events(agent: &mut Agent, to: ReplyTo, request: &EventsRequest) {
    if let Some(events) = agent.events.after(request.after) {
        return agent.answer(to, Ok(events));
    }
    if let Some(displaced) = agent.events.wait(request.after, to) {
        let what = "too many wait for events; somebody newer has your place";
        agent.refuse(displaced, Failure::of(code::EXHAUSTED, what));
    }
}

/// There may be an event for somebody who waits.
pub(crate) fn answer_events(agent: &mut Agent) {
    for (to, events) in agent.events.due() {
        agent.answer(to, Ok(events));
    }
}

impl Agent {
    /// From now on its memory.events is watched.
    pub(crate) fn watch_memory(&self, group: &Group) {
        let path = group.path().join("memory.events");
        // A guest whose memory controller is off has no such file.
        if path.exists()
            && let Err(e) = inotify::add_watch(&self.watches, &path, WatchFlags::MODIFY)
        {
            log::warn!("{} will not be watched: {e}", path.display());
        }
    }
}

/// Some container's memory.events has changed; which is found by looking.
pub(crate) fn on_cgroup_files(agent: &mut Agent) {
    let mut records = [0; 4096];
    while rustix::io::read(&agent.watches, &mut records).is_ok_and(|length| length > 0) {}
    let mut news = Vec::new();
    for (id, container) in &mut agent.containers {
        let kills = container.group.as_ref().map_or(0, Group::oom_kills);
        if kills > container.oom_kills {
            container.oom_kills = kills;
            news.push(OomEvent {
                container: id.clone(),
                kills,
            });
        }
    }
    for oom in news {
        agent.events.add(What::Oom(oom));
    }
    answer_events(agent);
}

pub(super) fn wait_device(agent: &mut Agent, to: ReplyTo, request: WaitDeviceRequest) {
    let devices = Arc::clone(&agent.devices);
    agent.by_job::<WaitDeviceRequest, _>(
        to,
        "device",
        move || {
            let address = request.address.unwrap_or_default();
            devices.wait(&address, patience(request.deadline_ms))
        },
        |_, name| Ok(WaitDeviceResponse { name }),
    );
}

/// The kernel's own counters of each interface.
pub(crate) fn interfaces() -> Vec<InterfaceStats> {
    let class = fs::read_dir("/sys/class/net")
        .into_iter()
        .flatten()
        .flatten();
    class
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let files = fs::read_dir(entry.path().join("statistics"))
                .ok()?
                .flatten();
            let counters = files.filter_map(|file| {
                let text = fs::read_to_string(file.path()).ok()?;
                Some((
                    file.file_name().into_string().ok()?,
                    text.trim().parse().ok()?,
                ))
            });
            Some(InterfaceStats {
                name,
                counters: counters.collect(),
            })
        })
        .collect()
}

pub(super) fn online(agent: &mut Agent, to: ReplyTo, request: OnlineResourcesRequest) {
    agent.by_job::<OnlineResourcesRequest, _>(
        to,
        "online",
        move || bring_up(&request),
        |_, r| Ok(r),
    );
}

/// CPUs and memory blocks that are there and off; waits for as many CPUs as were asked for.
fn bring_up(request: &OnlineResourcesRequest) -> Result<OnlineResourcesResponse, Failure> {
    let begun = Instant::now();
    loop {
        bring_up_all("/sys/devices/system/cpu", "cpu", "online", "1");
        let cpus = count_online();
        if cpus >= request.cpus {
            if request.memory {
                bring_up_all("/sys/devices/system/memory", "memory", "state", "online");
            }
            let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
            let total = memory
                .lines()
                .find_map(|line| line.strip_prefix("MemTotal:"));
            let total = total.and_then(|line| line.split_ascii_whitespace().next()?.parse().ok());
            return Ok(OnlineResourcesResponse {
                cpus,
                memory_bytes: total.unwrap_or(0_u64).saturating_mul(1024),
            });
        }
        if begun.elapsed() > patience(request.deadline_ms) {
            let what = format!("{cpus} CPUs are online, not {}", request.cpus);
            return Err(Failure::of(code::DEADLINE, what));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn bring_up_all(folder: &str, prefix: &str, file: &str, value: &str) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix(prefix));
        if number.is_some_and(|n| !n.is_empty() && n.chars().all(|c| c.is_ascii_digit())) {
            let path = entry.path().join(file);
            let text = fs::read_to_string(&path).unwrap_or_default();
            // Memory says "offline", a CPU "0".
            if matches!(text.trim(), "0" | "offline")
                && let Err(e) = fs::write(&path, value)
            {
                log::warn!("cannot bring up {}: {e}", path.display());
            }
        }
    }
}

/// `0-3,5`: five.
fn count_online() -> u32 {
    let text = fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
    count_list(text.trim())
}

fn count_list(list: &str) -> u32 {
    list.split(',')
        .filter_map(|range| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
            last.checked_sub(first)?.checked_add(1)
        })
        .fold(0, u32::saturating_add)
}

pub(super) fn set_clock(request: &SetClockRequest) -> Result<SetClockResponse, Failure> {
    let time = Timespec {
        tv_sec: request.realtime_ns.div_euclid(1_000_000_000),
        tv_nsec: request.realtime_ns.rem_euclid(1_000_000_000),
    };
    clock_settime(ClockId::Realtime, time).during(|| "set the clock".into())?;
    Ok(SetClockResponse {})
}

pub(super) fn reseed(request: &ReseedRandomRequest) -> Result<ReseedRandomResponse, Failure> {
    if request.seed.is_empty() || request.seed.len() > 512 {
        let what = format!("a seed of {} bytes; 1 to 512 can be", request.seed.len());
        return Err(Failure::invalid(what));
    }
    crate::sys::random::reseed(&request.seed).during(|| "reseed the random generator".into())?;
    Ok(ReseedRandomResponse {})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cpus_are_counted() {
        for (list, count) in [("0", 1), ("0-3", 4), ("0-3,5", 5), ("", 0), ("3-1,x,7", 1)] {
            assert_eq!(count_list(list), count, "{list}");
        }
    }
}
