//! System call filters of the OCI specification as the kernel takes them: classic BPF (seccomp(2)).
//!
//! ```text
//!  the architecture is not this one ─▶ ENOSYS if the specification lists others, else the process is killed
//!  a binary tree over the calls' numbers ─▶ for each call its rules, in order ─▶ the default
//! ```
//! Names this machine has no call for are skipped, as other runtimes do: profiles list those of all
//! machines and of newer kernels.

use std::collections::BTreeMap;

use syscalls::Sysno;
use testudo_agent_protocol::{Seccomp, SyscallArg};

use crate::failure::Failure;

/// `SECCOMP_RET_*`, include/uapi/linux/seccomp.h.
const KILL_PROCESS: u32 = 0x8000_0000;
const KILL_THREAD: u32 = 0;
const TRAP: u32 = 0x0003_0000;
const ERRNO: u32 = 0x0005_0000;
const TRACE: u32 = 0x7ff0_0000;
const LOG: u32 = 0x7ffc_0000;
const ALLOW: u32 = 0x7fff_0000;
const DATA: u32 = 0xffff;

/// include/uapi/linux/bpf_common.h: loads of 32 bits, jumps, returns.
const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP: u16 = 0x05;
const JUMP_EQ: u16 = 0x15;
const JUMP_GT: u16 = 0x25;
const JUMP_GE: u16 = 0x35;
const RETURN: u16 = 0x06;

/// `struct seccomp_data`: number, architecture, instruction pointer, arguments.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;
/// x86_64's other ABI uses the same architecture and this bit.
const X32: u32 = 0x4000_0000;
/// BPF_MAXINSNS
const MOST: usize = 4096;

/// `struct sock_filter`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Step {
    code: u16,
    yes: u8,
    no: u8,
    value: u32,
}

fn step(code: u16, value: u32) -> Step {
    Step {
        code,
        yes: 0,
        no: 0,
        value,
    }
}

fn branch(code: u16, value: u32, yes: u8, no: u8) -> Step {
    Step {
        code,
        yes,
        no,
        value,
    }
}

/// A filter, and the flags it is installed with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Filter {
    pub(crate) program: Vec<u8>,
    pub(crate) flags: u32,
}

/// `AUDIT_ARCH_*` of this machine.
fn architecture() -> Result<u32, Failure> {
    match std::env::consts::ARCH {
        "x86_64" => Ok(0xc000_003e),
        "aarch64" => Ok(0xc000_00b7),
        "s390x" => Ok(0x8000_0016),
        other => Err(Failure::invalid(format!(
            "no system call filters for {other}"
        ))),
    }
}

fn action(name: &str, errno: Option<u32>) -> Result<u32, Failure> {
    let data = errno.unwrap_or_else(|| u32::try_from(libc::EPERM).unwrap_or(1)) & DATA;
    Ok(match name {
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => KILL_THREAD,
        "SCMP_ACT_KILL_PROCESS" => KILL_PROCESS,
        "SCMP_ACT_TRAP" => TRAP,
        "SCMP_ACT_ERRNO" => ERRNO | data,
        "SCMP_ACT_TRACE" => TRACE | data,
        "SCMP_ACT_LOG" => LOG,
        "SCMP_ACT_ALLOW" => ALLOW,
        other => {
            return Err(Failure::invalid(format!(
                "seccomp has no action {other:?} here"
            )));
        }
    })
}

fn flag(name: &str) -> Result<u32, Failure> {
    Ok(match name {
        "SECCOMP_FILTER_FLAG_TSYNC" => 1,
        "SECCOMP_FILTER_FLAG_LOG" => 2,
        "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => 4,
        other => {
            return Err(Failure::invalid(format!(
                "seccomp has no flag {other:?} here"
            )));
        }
    })
}

/// Compiles.
pub(crate) fn compile(seccomp: &Seccomp) -> Result<Filter, Failure> {
    let default = action(&seccomp.default_action, seccomp.default_errno)?;
    let mut rules: BTreeMap<u32, Vec<(Vec<SyscallArg>, u32)>> = BTreeMap::new();
    for rule in &seccomp.syscalls {
        let action = action(&rule.action, rule.errno)?;
        for name in &rule.names {
            let Ok(call) = name.parse::<Sysno>() else {
                continue;
            };
            let number = u32::try_from(call.id()).unwrap_or(u32::MAX);
            rules
                .entry(number)
                .or_default()
                .push((rule.args.clone(), action));
        }
    }
    let rules: Vec<(u32, Vec<Step>)> = rules
        .into_iter()
        .map(|(number, rules)| Ok((number, body(&rules, default)?)))
        .collect::<Result<_, Failure>>()?;
    let others = match seccomp.architectures.len() {
        0 | 1 => KILL_PROCESS,
        _ => ERRNO | u32::try_from(libc::ENOSYS).unwrap_or(38),
    };
    let mut steps = vec![
        step(LOAD, ARCHITECTURE),
        branch(JUMP_EQ, architecture()?, 1, 0),
        step(RETURN, others),
        step(LOAD, NUMBER),
        branch(JUMP_GE, X32, 0, 1),
        step(RETURN, others),
    ];
    steps.extend(tree(&rules, default));
    if steps.len() > MOST {
        return Err(Failure::invalid(format!(
            "a system call filter of {} steps; the kernel takes {MOST}",
            steps.len()
        )));
    }
    let mut program = Vec::with_capacity(steps.len().saturating_mul(8));
    for step in &steps {
        program.extend_from_slice(&step.code.to_ne_bytes());
        program.extend_from_slice(&[step.yes, step.no]);
        program.extend_from_slice(&step.value.to_ne_bytes());
    }
    let mut flags = seccomp.flags.iter().map(|name| flag(name));
    let flags = flags.try_fold(0, |all, flag| Ok::<u32, Failure>(all | flag?))?;
    Ok(Filter { program, flags })
}

/// Finds a call's rules; every way through ends with a return.
fn tree(rules: &[(u32, Vec<Step>)], default: u32) -> Vec<Step> {
    match rules {
        [] => vec![step(RETURN, default)],
        [(number, body)] => {
            let mut steps = vec![branch(JUMP_EQ, *number, 1, 0), step(RETURN, default)];
            steps.extend(body);
            steps
        }
        _ => {
            let (low, high) = rules.split_at(rules.len() / 2);
            let first = high.first().map_or(u32::MAX, |(number, _)| *number);
            let low = tree(low, default);
            let skip = u32::try_from(low.len()).unwrap_or(u32::MAX);
            let mut steps = vec![branch(JUMP_GE, first, 0, 1), step(JUMP, skip)];
            steps.extend(low);
            steps.extend(tree(high, default));
            steps
        }
    }
}

/// The rules of one call: the first whose arguments are met.
fn body(rules: &[(Vec<SyscallArg>, u32)], default: u32) -> Result<Vec<Step>, Failure> {
    let mut steps = Vec::new();
    for (args, action) in rules {
        let mut checks = Vec::new();
        // Backwards, for each check must know how far it is to the next rule.
        let mut after = 1_u8;
        for arg in args.iter().rev() {
            let check = check(arg, after)?;
            after = u8::try_from(check.len())
                .ok()
                .and_then(|length| after.checked_add(length))
                .ok_or_else(|| Failure::invalid("too many arguments in a system call rule"))?;
            checks.splice(0..0, check);
        }
        steps.extend(checks);
        steps.push(step(RETURN, *action));
        if args.is_empty() {
            // Nothing comes after what is always met.
            return Ok(steps);
        }
    }
    steps.push(step(RETURN, default));
    Ok(steps)
}

/// Goes on behind itself if the argument is as it should be, and otherwise past `after` steps more.
fn check(arg: &SyscallArg, after: u8) -> Result<Vec<Step>, Failure> {
    if arg.index > 5 {
        return Err(Failure::invalid(format!(
            "a system call has no argument {}",
            arg.index
        )));
    }
    let (first, second) = if cfg!(target_endian = "little") {
        (0, 4)
    } else {
        (4, 0)
    };
    let at = ARGUMENTS.saturating_add(arg.index.saturating_mul(8));
    let load_low = step(LOAD, at.saturating_add(first));
    let load_high = step(LOAD, at.saturating_add(second));
    let (high, low) = halves(arg.value);
    let fail = |steps_left: u8| after.saturating_add(steps_left);
    Ok(match arg.op.as_str() {
        "SCMP_CMP_EQ" => vec![
            load_high,
            branch(JUMP_EQ, high, 0, fail(2)),
            load_low,
            branch(JUMP_EQ, low, 0, fail(0)),
        ],
        "SCMP_CMP_NE" => vec![
            load_high,
            branch(JUMP_EQ, high, 0, 2),
            load_low,
            branch(JUMP_EQ, low, fail(0), 0),
        ],
        "SCMP_CMP_GT" | "SCMP_CMP_GE" => {
            let code = if arg.op == "SCMP_CMP_GT" {
                JUMP_GT
            } else {
                JUMP_GE
            };
            vec![
                load_high,
                branch(JUMP_GT, high, 3, 0),
                branch(JUMP_EQ, high, 0, fail(2)),
                load_low,
                branch(code, low, 0, fail(0)),
            ]
        }
        "SCMP_CMP_LT" | "SCMP_CMP_LE" => {
            let code = if arg.op == "SCMP_CMP_LT" {
                JUMP_GE
            } else {
                JUMP_GT
            };
            vec![
                load_high,
                branch(JUMP_GT, high, fail(3), 0),
                branch(JUMP_EQ, high, 0, 2),
                load_low,
                branch(code, low, fail(0), 0),
            ]
        }
        "SCMP_CMP_MASKED_EQ" => {
            let (high_value, low_value) = halves(arg.value_two);
            vec![
                load_high,
                step(AND, high),
                branch(JUMP_EQ, high_value, 0, fail(3)),
                load_low,
                step(AND, low),
                branch(JUMP_EQ, low_value, 0, fail(0)),
            ]
        }
        other => {
            return Err(Failure::invalid(format!(
                "seccomp has no comparison {other:?}"
            )));
        }
    })
}

fn halves(value: u64) -> (u32, u32) {
    let part = |value: u64| u32::try_from(value & 0xffff_ffff).unwrap_or_default();
    (part(value >> 32), part(value))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use testudo_agent_protocol::SyscallRule;

    use super::*;

    /// What the kernel would answer.
    fn answer(filter: &Filter, architecture: u32, number: u32, args: [u64; 6]) -> u32 {
        let steps: Vec<Step> = filter
            .program
            .chunks(8)
            .map(|s| Step {
                code: u16::from_ne_bytes([s[0], s[1]]),
                yes: s[2],
                no: s[3],
                value: u32::from_ne_bytes([s[4], s[5], s[6], s[7]]),
            })
            .collect();
        let (mut at, mut a) = (0_usize, 0_u32);
        loop {
            let s = steps[at];
            at += 1;
            let mut go = |met: bool| at += usize::from(if met { s.yes } else { s.no });
            match s.code {
                LOAD => {
                    a = match s.value {
                        NUMBER => number,
                        ARCHITECTURE => architecture,
                        offset => {
                            let word = (offset - ARGUMENTS) as usize;
                            let arg = args[word / 8];
                            u32::try_from((arg >> (word % 8 * 8)) & 0xffff_ffff).unwrap()
                        }
                    }
                }
                AND => a &= s.value,
                JUMP => at += s.value as usize,
                JUMP_EQ => go(a == s.value),
                JUMP_GT => go(a > s.value),
                JUMP_GE => go(a >= s.value),
                RETURN => return s.value,
                other => panic!("{other:#x}"),
            }
        }
    }

    fn met(arg: &SyscallArg, args: [u64; 6]) -> bool {
        let have = args[arg.index as usize];
        match arg.op.as_str() {
            "SCMP_CMP_EQ" => have == arg.value,
            "SCMP_CMP_NE" => have != arg.value,
            "SCMP_CMP_GT" => have > arg.value,
            "SCMP_CMP_GE" => have >= arg.value,
            "SCMP_CMP_LT" => have < arg.value,
            "SCMP_CMP_LE" => have <= arg.value,
            _ => have & arg.value == arg.value_two,
        }
    }

    const OPS: [&str; 7] = [
        "SCMP_CMP_EQ",
        "SCMP_CMP_NE",
        "SCMP_CMP_GT",
        "SCMP_CMP_GE",
        "SCMP_CMP_LT",
        "SCMP_CMP_LE",
        "SCMP_CMP_MASKED_EQ",
    ];
    const CALLS: [&str; 5] = ["read", "write", "openat", "personality", "clone3"];

    /// Numbers that meet each other.
    fn number() -> impl Strategy<Value = u64> {
        prop_oneof![
            0_u64..4,
            (0_u64..3).prop_map(|n| n << 32),
            any::<u64>(),
            (0_u64..3).prop_map(|n| (n << 32) | 1)
        ]
    }

    fn rule() -> impl Strategy<Value = SyscallRule> {
        let arg = (0_u32..6, number(), number(), 0..OPS.len()).prop_map(
            |(index, value, value_two, op)| SyscallArg {
                index,
                value,
                value_two,
                op: OPS[op].into(),
            },
        );
        (
            proptest::collection::vec(0..CALLS.len(), 1..4),
            proptest::collection::vec(arg, 0..4),
            0_u32..200,
        )
            .prop_map(|(names, args, errno)| SyscallRule {
                names: names.into_iter().map(|n| CALLS[n].into()).collect(),
                action: "SCMP_ACT_ERRNO".into(),
                errno: Some(errno),
                args,
            })
    }

    proptest! {
        #[test]
        fn the_program_decides_as_the_rules_do(
            rules in proptest::collection::vec(rule(), 0..12),
            call in 0..CALLS.len(),
            args in proptest::array::uniform6(number()),
        ) {
            let seccomp = Seccomp {
                default_action: "SCMP_ACT_ALLOW".into(),
                syscalls: rules.clone(),
                ..Seccomp::default()
            };
            let filter = compile(&seccomp).unwrap();
            let expected = rules
                .iter()
                .find(|rule| {
                    rule.names.iter().any(|n| n == CALLS[call]) && rule.args.iter().all(|a| met(a, args))
                })
                .map_or(ALLOW, |rule| ERRNO | rule.errno.unwrap());
            let number = CALLS[call].parse::<Sysno>().unwrap().id().cast_unsigned();
            prop_assert_eq!(answer(&filter, architecture().unwrap(), number, args), expected);
        }
    }

    #[test]
    fn other_architectures_do_not_slip_through() {
        let mut seccomp = Seccomp {
            default_action: "SCMP_ACT_ALLOW".into(),
            ..Seccomp::default()
        };
        let filter = compile(&seccomp).unwrap();
        assert_eq!(answer(&filter, 0x4000_0003, 1, [0; 6]), KILL_PROCESS);
        assert_eq!(
            answer(&filter, architecture().unwrap(), X32 | 1, [0; 6]),
            KILL_PROCESS
        );
        seccomp.architectures = vec!["SCMP_ARCH_X86_64".into(), "SCMP_ARCH_X86".into()];
        let filter = compile(&seccomp).unwrap();
        assert_eq!(answer(&filter, 0x4000_0003, 1, [0; 6]), ERRNO | 38);
    }

    #[test]
    fn what_is_unknown_is_an_error_but_for_calls() {
        let mut seccomp = Seccomp {
            default_action: "SCMP_ACT_ERRNO".into(),
            syscalls: vec![SyscallRule {
                names: vec!["a_call_of_the_future".into()],
                action: "SCMP_ACT_ALLOW".into(),
                ..SyscallRule::default()
            }],
            ..Seccomp::default()
        };
        assert!(compile(&seccomp).is_ok());
        seccomp.flags = vec!["SECCOMP_FILTER_FLAG_NEW_LISTENER".into()];
        assert!(compile(&seccomp).is_err());
        seccomp.flags.clear();
        seccomp.default_action = "SCMP_ACT_NOTIFY".into();
        assert!(compile(&seccomp).is_err());
    }
}
