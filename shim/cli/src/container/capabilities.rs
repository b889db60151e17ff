//! What the first process may do beyond an ordinary one.

use std::collections::BTreeSet;

use testudo_agent_protocol::CAPABILITIES;
use thiserror::Error;

use crate::pod::SeccompPlan;

/// What a container has that does not ask.
const DEFAULT: [&str; 14] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FSETID",
    "FOWNER",
    "MKNOD",
    "NET_RAW",
    "SETGID",
    "SETUID",
    "SETFCAP",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "SYS_CHROOT",
    "KILL",
    "AUDIT_WRITE",
];

/// There is no such capability.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{0:?} is no capability; write one of capabilities(7) with or without CAP_, or ALL")]
pub struct UnknownCapability(String);

fn named(word: &str) -> Result<&'static str, UnknownCapability> {
    let upper = word.to_ascii_uppercase();
    let name = upper.strip_prefix("CAP_").unwrap_or(&upper);
    CAPABILITIES
        .iter()
        .find(|known| **known == name)
        .copied()
        .ok_or_else(|| UnknownCapability(word.to_owned()))
}

/// The names, with CAP_, of what is left after `--cap-add` and `--cap-drop`.
pub fn capabilities(add: &[String], drop: &[String]) -> Result<Vec<String>, UnknownCapability> {
    let all = |words: &[String]| words.iter().any(|word| word.eq_ignore_ascii_case("ALL"));
    let each = |words: &[String]| {
        let words = words
            .iter()
            .filter(|word| !word.eq_ignore_ascii_case("ALL"));
        words
            .map(|word| named(word))
            .collect::<Result<BTreeSet<_>, _>>()
    };
    let (added, dropped) = (each(add)?, each(drop)?);
    let base: BTreeSet<&str> = match (all(add), all(drop)) {
        (true, _) => CAPABILITIES.into(),
        (false, true) => BTreeSet::new(),
        (false, false) => DEFAULT.into(),
    };
    let kept = |name: &&&str| {
        let asked = base.contains(**name) && !dropped.contains(**name);
        asked || (added.contains(**name) && !dropped.contains(**name))
    };
    Ok(CAPABILITIES
        .iter()
        .filter(kept)
        .map(|name| format!("CAP_{name}"))
        .collect())
}

impl SeccompPlan {
    /// Whether a capability opens system calls of this plan.
    pub(super) fn follows_capabilities(&self) -> bool {
        !matches!(self, Self::Unconfined)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(add: &[&str], drop: &[&str]) -> Vec<String> {
        let words = |list: &[&str]| list.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
        capabilities(&words(add), &words(drop)).unwrap()
    }

    #[test]
    fn as_docker_counts() {
        assert_eq!(of(&[], &[]).len(), 14);
        assert_eq!(of(&["ALL"], &[]).len(), 41);
        assert_eq!(of(&["net_admin"], &["ALL"]), ["CAP_NET_ADMIN"]);
        assert!(!of(&["ALL"], &["CAP_SYS_ADMIN"]).contains(&"CAP_SYS_ADMIN".to_owned()));
        assert!(!of(&[], &["kill"]).contains(&"CAP_KILL".to_owned()));
        assert_eq!(
            capabilities(&["FLY".into()], &[]),
            Err(UnknownCapability("FLY".into()))
        );
    }
}
