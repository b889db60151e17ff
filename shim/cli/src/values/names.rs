//! Names, environment, users, security options, detach keys.

use std::path::PathBuf;
use std::str::FromStr;

/// Of a pod: what file names, host names and the agent's ids all allow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodName(pub String);

pub(super) fn is_name(text: &str) -> bool {
    let mut bytes = text.bytes();
    let first = bytes.next().is_some_and(|b| b.is_ascii_alphanumeric());
    first
        && text.len() <= 64
        && bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

impl FromStr for PodName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        is_name(text).then(|| Self(text.to_owned())).ok_or_else(|| {
            format!("{text:?} is no name: 1 to 64 of A-Z a-z 0-9 _ . - that begin with a letter or digit")
        })
    }
}

/// `NAME=VALUE`, or `NAME` for the value it has where the command is given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EnvWord {
    /// With this value.
    Set(String, String),
    /// With the caller's, if there is one.
    Inherit(String),
}

impl FromStr for EnvWord {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = text
            .split_once('=')
            .map_or((text, None), |(n, v)| (n, Some(v)));
        if name.is_empty()
            || name.contains(|c: char| c.is_whitespace() || c == '\0')
            || text.contains('\0')
        {
            return Err(format!(
                "`{text}`: a variable needs a name without spaces; write NAME=VALUE or NAME"
            ));
        }
        Ok(match value {
            Some(value) => Self::Set(name.to_owned(), value.to_owned()),
            None => Self::Inherit(name.to_owned()),
        })
    }
}

impl EnvWord {
    /// The lines of an `--env-file`: comments begin with `#`, empty lines mean nothing.
    pub fn read_file(text: &str) -> Result<Vec<Self>, String> {
        text.lines()
            .zip(1_usize..)
            .filter(|(line, _)| !line.trim().is_empty() && !line.trim_start().starts_with('#'))
            .map(|(line, number)| {
                let word = line.trim_start().trim_end_matches('\r').parse();
                word.map_err(|why: String| format!("line {number}: {why}"))
            })
            .collect()
    }
}

/// `KEY=VALUE`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyValue(pub String, pub String);

impl FromStr for KeyValue {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((key, value)) if !key.is_empty() => Ok(Self(key.to_owned(), value.to_owned())),
            _ => Err(format!("`{text}`: write KEY=VALUE")),
        }
    }
}

/// `USER[:GROUP]`, each a name or a number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserWord {
    /// Name or uid.
    pub user: String,
    /// Name or gid.
    pub group: Option<String>,
}

impl FromStr for UserWord {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let good = |t: &str| {
            !t.is_empty() && !t.contains(|c: char| c.is_whitespace() || c == ':' || c.is_control())
        };
        let (user, group) = text
            .split_once(':')
            .map_or((text, None), |(u, g)| (u, Some(g)));
        if !good(user) || !group.is_none_or(good) {
            return Err(format!(
                "`{text}`: write USER or USER:GROUP, each a name or a number"
            ));
        }
        Ok(Self {
            user: user.to_owned(),
            group: group.map(str::to_owned),
        })
    }
}

/// `--security-opt`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SecurityOption {
    /// No system call filter.
    Unconfined,
    /// A profile as Docker writes them.
    Profile(PathBuf),
    /// setuid programs and file capabilities give nothing.
    NoNewPrivileges(bool),
    /// A profile that the guest's kernel has.
    AppArmor(String),
}

impl FromStr for SecurityOption {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (key, value) = text
            .split_once(['=', ':'])
            .map_or((text, None), |(k, v)| (k, Some(v)));
        match (key, value) {
            ("no-new-privileges", None | Some("true")) => Ok(Self::NoNewPrivileges(true)),
            ("no-new-privileges", Some("false")) => Ok(Self::NoNewPrivileges(false)),
            ("seccomp", Some("unconfined")) => Ok(Self::Unconfined),
            ("seccomp", Some(path)) if !path.is_empty() => Ok(Self::Profile(path.into())),
            ("apparmor", Some(profile)) if !profile.is_empty() => {
                Ok(Self::AppArmor(profile.to_owned()))
            }
            _ => Err(format!(
                "`{text}`: write seccomp=unconfined, seccomp=FILE, no-new-privileges or apparmor=PROFILE"
            )),
        }
    }
}

/// Keys that leave a container to itself, as `ctrl-p,ctrl-q`; none if empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Detach(pub Vec<u8>);

impl Default for Detach {
    fn default() -> Self {
        Self(vec![0x10, 0x11])
    }
}

impl FromStr for Detach {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let key = |word: &str| match (word.strip_prefix("ctrl-"), word.as_bytes()) {
            (Some(word), _) => match word.as_bytes() {
                [letter @ b'a'..=b'z'] => Some(letter & 0x1f),
                [sign @ b'@'..=b'_'] => Some(sign & 0x1f),
                _ => None,
            },
            (None, [byte]) => Some(*byte),
            _ => None,
        };
        if text.is_empty() {
            return Ok(Self(Vec::new()));
        }
        let keys: Option<Vec<u8>> = text.split(',').map(key).collect();
        keys.map(Self).ok_or_else(|| {
            format!("`{text}`: write keys separated by commas, each a character or ctrl-a … ctrl-z")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn environment_files_have_comments() {
        let words = EnvWord::read_file("# hi\n\nA=b c=d\n  B\n").unwrap();
        assert_eq!(
            words,
            [
                EnvWord::Set("A".into(), "b c=d".into()),
                EnvWord::Inherit("B".into())
            ]
        );
        assert!(
            EnvWord::read_file("A=1\n=2\n")
                .unwrap_err()
                .contains("line 2")
        );
    }

    #[test]
    fn users_security_and_keys() {
        let user: UserWord = "www-data:33".parse().unwrap();
        assert_eq!(user.group.as_deref(), Some("33"));
        assert!("a:b:c".parse::<UserWord>().is_err() && "".parse::<UserWord>().is_err());
        assert_eq!(
            "no-new-privileges".parse(),
            Ok(SecurityOption::NoNewPrivileges(true))
        );
        assert!("seccomp".parse::<SecurityOption>().is_err());
        assert_eq!("ctrl-p,ctrl-q".parse(), Ok(Detach::default()));
        assert!("ctrl-pp".parse::<Detach>().is_err());
        assert!("../x".parse::<PodName>().is_err() && ".x".parse::<PodName>().is_err());
    }
}
