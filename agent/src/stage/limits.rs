//! Resource limits and the OOM score.

use rustix::process::{Resource, Rlimit, setrlimit};
use testudo_agent_protocol::Process;

use crate::failure::{During, Failure};

fn resource(name: &str) -> Option<Resource> {
    Some(match name.strip_prefix("RLIMIT_")? {
        "CPU" => Resource::Cpu,
        "FSIZE" => Resource::Fsize,
        "DATA" => Resource::Data,
        "STACK" => Resource::Stack,
        "CORE" => Resource::Core,
        "RSS" => Resource::Rss,
        "NPROC" => Resource::Nproc,
        "NOFILE" => Resource::Nofile,
        "MEMLOCK" => Resource::Memlock,
        "AS" => Resource::As,
        "LOCKS" => Resource::Locks,
        "SIGPENDING" => Resource::Sigpending,
        "MSGQUEUE" => Resource::Msgqueue,
        "NICE" => Resource::Nice,
        "RTPRIO" => Resource::Rtprio,
        "RTTIME" => Resource::Rttime,
        _ => return None,
    })
}

/// Sets the limits a process shall run under.
pub(super) fn set(process: &Process) -> Result<(), Failure> {
    for limit in &process.rlimits {
        let which = resource(&limit.kind)
            .ok_or_else(|| Failure::invalid(format!("there is no limit {}", limit.kind)))?;
        if limit.soft > limit.hard {
            return Err(Failure::invalid(format!(
                "limit {} is {} soft and {} hard; soft must not be more",
                limit.kind, limit.soft, limit.hard
            )));
        }
        // All ones is how the kernel says "none".
        let number = |n: u64| (n != u64::MAX).then_some(n);
        let value = Rlimit {
            current: number(limit.soft),
            maximum: number(limit.hard),
        };
        setrlimit(which, value).during(|| format!("set limit {}", limit.kind))?;
    }
    Ok(())
}
