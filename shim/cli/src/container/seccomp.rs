//! Which system calls a container may make.
//!
//! The default is what Docker's profile means: calls that reach beyond a container, or that the kernel has
//! for its administrator, are refused unless a capability says that the container is one; calls the
//! profile does not know are told not to exist, so that programs fall back.

use serde::Deserialize;
use testudo_agent_protocol::{Seccomp, SyscallArg, SyscallRule};
use thiserror::Error;

use super::syscalls;
use crate::pod::SeccompPlan;

const ALLOW: &str = "SCMP_ACT_ALLOW";
const ERRNO: &str = "SCMP_ACT_ERRNO";
const EPERM: u32 = 1;
const ENOSYS: u32 = 38;
/// AF_VSOCK reaches the host.
const AF_VSOCK: u64 = 40;
/// CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET}, clone(2).
const NEW_NAMESPACES: u64 = 0x7e02_0000;
/// personality(2): PER_LINUX, PER_LINUX32, their UNAME26 variants, and the question for the present one.
const PERSONALITIES: [u64; 5] = [0, 8, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// A profile cannot be used.
#[derive(Debug, Error)]
#[error("the seccomp profile is none as Docker writes them: {0}")]
pub struct ProfileError(String);

/// A profile's file.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct File {
    default_action: String,
    #[serde(default)]
    default_errno_ret: Option<u32>,
    #[serde(default)]
    syscalls: Vec<FileRule>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct FileRule {
    #[serde(default)]
    names: Vec<String>,
    #[serde(default)]
    name: Option<String>,
    action: String,
    #[serde(default)]
    errno_ret: Option<u32>,
    #[serde(default)]
    args: Option<Vec<FileArg>>,
    #[serde(default)]
    includes: Conditions,
    #[serde(default)]
    excludes: Conditions,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Conditions {
    #[serde(default)]
    caps: Vec<String>,
    #[serde(default)]
    arches: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct FileArg {
    index: u32,
    value: u64,
    #[serde(default)]
    value_two: u64,
    op: String,
}

/// The profile of a plan, for a process with these capabilities; none if all calls are allowed.
pub fn profile(
    plan: &SeccompPlan,
    capabilities: &[String],
) -> Result<Option<Seccomp>, ProfileError> {
    let has =
        |name: &str| plan.follows_capabilities() && capabilities.iter().any(|have| have == name);
    match plan {
        SeccompPlan::Unconfined => Ok(None),
        SeccompPlan::Default => Ok(Some(default(&has))),
        SeccompPlan::Profile(text) => read(text, &has).map(Some),
    }
}

fn rule(names: &[&str], action: &str, errno: Option<u32>, args: Vec<SyscallArg>) -> SyscallRule {
    SyscallRule {
        names: names.iter().map(|name| (*name).to_owned()).collect(),
        action: action.into(),
        errno,
        args,
    }
}

fn arg(value: u64, value_two: u64, op: &str) -> Vec<SyscallArg> {
    vec![SyscallArg {
        index: 0,
        value,
        value_two,
        op: op.into(),
    }]
}

fn default(has: &impl Fn(&str) -> bool) -> Seccomp {
    let mut rules = vec![rule(syscalls::ORDINARY, ALLOW, None, Vec::new())];
    rules.push(rule(
        &["socket"],
        ALLOW,
        None,
        arg(AF_VSOCK, 0, "SCMP_CMP_NE"),
    ));
    rules.extend(
        PERSONALITIES
            .map(|value| rule(&["personality"], ALLOW, None, arg(value, 0, "SCMP_CMP_EQ"))),
    );
    for (capability, names) in syscalls::BY_CAPABILITY {
        if has(capability) {
            rules.push(rule(names, ALLOW, None, Vec::new()));
        }
    }
    let administrator = has("CAP_SYS_ADMIN");
    if !administrator {
        rules.push(rule(
            &["clone"],
            ALLOW,
            None,
            arg(NEW_NAMESPACES, 0, "SCMP_CMP_MASKED_EQ"),
        ));
        // Its flags are in memory, where no filter sees them: the C library falls back to clone(2).
        rules.push(rule(&["clone3"], ERRNO, Some(ENOSYS), Vec::new()));
    }
    for (capability, names) in syscalls::BY_CAPABILITY {
        if !has(capability) {
            let refused: Vec<&str> = names
                .iter()
                .copied()
                .filter(|name| !is_allowed(name, has))
                .collect();
            rules.push(rule(&refused, ERRNO, Some(EPERM), Vec::new()));
        }
    }
    // With other arguments than those above.
    rules.push(rule(
        &["clone", "personality", "socket"],
        ERRNO,
        Some(EPERM),
        Vec::new(),
    ));
    rules.push(rule(syscalls::NEVER, ERRNO, Some(EPERM), Vec::new()));
    Seccomp {
        default_action: ERRNO.into(),
        default_errno: Some(ENOSYS),
        syscalls: rules,
        ..Seccomp::default()
    }
}

/// By another capability, or with arguments that are looked at above.
fn is_allowed(name: &str, has: &impl Fn(&str) -> bool) -> bool {
    let by_another = syscalls::BY_CAPABILITY
        .iter()
        .any(|(capability, names)| has(capability) && names.contains(&name));
    by_another || matches!(name, "clone" | "clone3")
}

fn read(text: &str, has: &impl Fn(&str) -> bool) -> Result<Seccomp, ProfileError> {
    let file: File = serde_json::from_str(text).map_err(|e| ProfileError(e.to_string()))?;
    let arches: &[&str] = match std::env::consts::ARCH {
        "x86_64" => &["amd64", "x32", "x86"],
        "aarch64" => &["arm64", "arm"],
        other => &[other],
    };
    let applies = |rule: &FileRule| {
        let here = |list: &[String]| list.iter().any(|arch| arches.contains(&arch.as_str()));
        let all = |caps: &[String]| caps.iter().all(|cap| has(cap));
        let any = |caps: &[String]| caps.iter().any(|cap| has(cap));
        all(&rule.includes.caps)
            && (rule.includes.arches.is_empty() || here(&rule.includes.arches))
            && !any(&rule.excludes.caps)
            && !here(&rule.excludes.arches)
    };
    let syscalls = file
        .syscalls
        .into_iter()
        .filter(applies)
        .map(|rule| SyscallRule {
            names: rule.name.into_iter().chain(rule.names).collect(),
            action: rule.action,
            errno: rule.errno_ret,
            args: rule
                .args
                .unwrap_or_default()
                .into_iter()
                .map(|arg| SyscallArg {
                    index: arg.index,
                    value: arg.value,
                    value_two: arg.value_two,
                    op: arg.op,
                })
                .collect(),
        });
    Ok(Seccomp {
        default_action: file.default_action,
        default_errno: file.default_errno_ret,
        syscalls: syscalls.collect(),
        ..Seccomp::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn action_of(profile: &Seccomp, name: &str) -> String {
        let rule = profile
            .syscalls
            .iter()
            .find(|rule| rule.names.iter().any(|n| n == name));
        rule.map_or_else(
            || profile.default_action.clone(),
            |rule| rule.action.clone(),
        )
    }

    #[test]
    fn the_default_follows_capabilities() {
        let plain = profile(&SeccompPlan::Default, &[]).unwrap().unwrap();
        assert_eq!(action_of(&plain, "openat"), ALLOW);
        assert_eq!(action_of(&plain, "mount"), ERRNO);
        assert_eq!(action_of(&plain, "clone3"), ERRNO);
        assert_eq!(action_of(&plain, "kexec_load"), ERRNO);
        let admin = profile(&SeccompPlan::Default, &["CAP_SYS_ADMIN".into()])
            .unwrap()
            .unwrap();
        assert_eq!(action_of(&admin, "mount"), ALLOW);
        assert_eq!(action_of(&admin, "clone3"), ALLOW);
        assert_eq!(action_of(&admin, "init_module"), ERRNO);
        assert!(profile(&SeccompPlan::Unconfined, &[]).unwrap().is_none());
    }

    #[test]
    fn no_call_is_in_two_lists() {
        for name in syscalls::NEVER {
            assert!(!syscalls::ORDINARY.contains(name), "{name}");
        }
        for (_, names) in syscalls::BY_CAPABILITY {
            for name in *names {
                assert!(
                    !syscalls::ORDINARY.contains(name) && !syscalls::NEVER.contains(name),
                    "{name}"
                );
            }
        }
    }

    #[test]
    fn files_are_read_as_docker_means_them() {
        let text = r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":1,"syscalls":[
            {"names":["read"],"action":"SCMP_ACT_ALLOW"},
            {"names":["bpf"],"action":"SCMP_ACT_ALLOW","includes":{"caps":["CAP_BPF"]}},
            {"names":["only_arm"],"action":"SCMP_ACT_ALLOW","includes":{"arches":["ppc64le"]}}]}"#;
        let plan = SeccompPlan::Profile(text.into());
        let read = profile(&plan, &[]).unwrap().unwrap();
        assert_eq!((read.syscalls.len(), read.default_errno), (1, Some(1)));
        assert_eq!(
            profile(&plan, &["CAP_BPF".into()])
                .unwrap()
                .unwrap()
                .syscalls
                .len(),
            2
        );
        assert!(profile(&SeccompPlan::Profile("{}".into()), &[]).is_err());
    }
}
