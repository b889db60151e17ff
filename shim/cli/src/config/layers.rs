//! Reading: files in their order, then the environment.

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;
use toml::Value;

use super::keys::{Config, KEYS};
use super::value::Wrong;

/// The configuration cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// A file.
    #[error("cannot read {}", path.display())]
    Read {
        /// It.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is no TOML.
    #[error("{} is no TOML: {why}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and why.
        why: String,
    },
    /// Nobody reads this.
    #[error(
        "{origin}: there is no key {key}{}; `testudo config explain` lists all",
        suggestion(nearest)
    )]
    Unknown {
        /// Where it is.
        origin: Origin,
        /// It.
        key: String,
        /// What was probably meant.
        nearest: Option<&'static str>,
    },
    /// A value of the wrong kind.
    #[error("{origin}: {key}: {why}")]
    Value {
        /// Where it is.
        origin: Origin,
        /// The key.
        key: String,
        /// Why.
        why: String,
    },
}

fn suggestion(nearest: &Option<&'static str>) -> String {
    nearest.map_or_else(String::new, |key| format!(", did you mean {key}?"))
}

/// Where a value comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A file.
    File(PathBuf),
    /// A variable.
    Variable(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Variable(name) => write!(f, "${name}"),
        }
    }
}

/// A key that was set, and where; later ones win.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// The key.
    pub key: String,
    /// Where.
    pub origin: Origin,
}

/// Where to read from.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// Folders that have a `config.toml` and a `config.d`, the weakest first.
    pub folders: Vec<PathBuf>,
    /// The environment.
    pub variables: Vec<(OsString, OsString)>,
}

impl Sources {
    /// Those of this process.
    pub fn of_process() -> Self {
        let variable = |name: &str| {
            std::env::var_os(name)
                .map(PathBuf::from)
                .filter(|p| p.is_absolute())
        };
        let own = variable("XDG_CONFIG_HOME").or_else(|| Some(variable("HOME")?.join(".config")));
        let folders = [Some(PathBuf::from("/etc")), own].into_iter().flatten();
        Self {
            folders: folders.map(|base| base.join("testudo")).collect(),
            variables: std::env::vars_os().collect(),
        }
    }
}

/// The variable of a key.
pub fn variable(key: &str) -> String {
    format!(
        "TESTUDO_{}",
        key.to_ascii_uppercase().replace(['.', '-'], "_")
    )
}

/// Variables with our prefix that others read: the chores of a checkout, and labs.
const OTHERS: &[&str] = &["TESTUDO_CACHE", "TESTUDO_LAB"];

/// Reads it all.
pub fn load(sources: &Sources) -> Result<(Config, Vec<Layer>), ConfigError> {
    let mut config = Config::default();
    let mut layers = Vec::new();
    for folder in &sources.folders {
        read_file(&folder.join("config.toml"), &mut config, &mut layers)?;
        let mut drop_ins: Vec<PathBuf> = std::fs::read_dir(folder.join("config.d"))
            .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
            .unwrap_or_default();
        drop_ins.retain(|path| path.extension().is_some_and(|e| e == "toml"));
        drop_ins.sort();
        for path in drop_ins {
            read_file(&path, &mut config, &mut layers)?;
        }
    }
    for (name, text) in &sources.variables {
        let Some(name) = name.to_str().filter(|name| name.starts_with("TESTUDO_")) else {
            continue;
        };
        if OTHERS.iter().any(|other| name.starts_with(other)) {
            continue;
        }
        let origin = Origin::Variable(name.to_owned());
        let key = KEYS.iter().find(|key| variable(key.name) == *name);
        let Some(key) = key else {
            let key = name
                .trim_start_matches("TESTUDO_")
                .to_ascii_lowercase()
                .replacen('_', ".", 1);
            return Err(ConfigError::Unknown {
                origin,
                nearest: nearest(&key),
                key,
            });
        };
        let text = text.to_string_lossy();
        let wrong = |Wrong(why)| ConfigError::Value {
            origin: origin.clone(),
            key: key.name.to_owned(),
            why,
        };
        config.set_text(key.name, &text).map_err(wrong)?;
        layers.push(Layer {
            key: key.name.to_owned(),
            origin,
        });
    }
    Ok((config, layers))
}

fn read_file(path: &Path, config: &mut Config, layers: &mut Vec<Layer>) -> Result<(), ConfigError> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => {
            return Err(ConfigError::Read {
                path: path.to_owned(),
                source,
            });
        }
    };
    apply(&text, path, config, layers)
}

/// What one text says, over the defaults.
pub fn parse(text: &str) -> Result<Config, ConfigError> {
    let mut config = Config::default();
    apply(text, Path::new("text"), &mut config, &mut Vec::new())?;
    Ok(config)
}

/// One file's text.
fn apply(
    text: &str,
    path: &Path,
    config: &mut Config,
    layers: &mut Vec<Layer>,
) -> Result<(), ConfigError> {
    let table: toml::Table = text
        .parse()
        .map_err(|e: toml::de::Error| ConfigError::Syntax {
            path: path.to_owned(),
            why: e.to_string().trim().replace('\n', " "),
        })?;
    let origin = Origin::File(path.to_owned());
    let unknown = |key: String| ConfigError::Unknown {
        origin: origin.clone(),
        nearest: nearest(&key),
        key,
    };
    for (section, value) in &table {
        let Value::Table(entries) = value else {
            return Err(unknown(section.clone()));
        };
        for (name, value) in entries {
            let key = format!("{section}.{name}");
            let wrong = |Wrong(why)| ConfigError::Value {
                origin: origin.clone(),
                key: key.clone(),
                why,
            };
            if !config.set_value(&key, value).map_err(wrong)? {
                return Err(unknown(key));
            }
            layers.push(Layer {
                key,
                origin: origin.clone(),
            });
        }
    }
    Ok(())
}

/// The key that is written most like this, if any is at all.
pub fn nearest(word: &str) -> Option<&'static str> {
    let (distance, key) = KEYS
        .iter()
        .map(|key| (distance(word, key.name), key.name))
        .min()?;
    let tail = KEYS
        .iter()
        .find(|key| key.name.ends_with(&format!(".{word}")));
    tail.map(|key| key.name)
        .or_else(|| (distance <= word.len() / 3).then_some(key))
}

/// Levenshtein's.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = i;
        let mut left = i.saturating_add(1);
        if let Some(first) = row.first_mut() {
            *first = left;
        }
        for (y, cell) in b.iter().zip(row.iter_mut().skip(1)) {
            let changed = diagonal.saturating_add(usize::from(x != *y));
            diagonal = *cell;
            *cell = changed
                .min(left.saturating_add(1))
                .min(diagonal.saturating_add(1));
            left = *cell;
        }
    }
    row.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::values::{NetWord, Size};

    fn read(text: &str) -> Result<Config, String> {
        let mut config = Config::default();
        apply(text, Path::new("c.toml"), &mut config, &mut Vec::new())
            .map_err(|e| e.to_string())?;
        Ok(config)
    }

    #[test]
    fn values_have_their_kinds() {
        let config =
            read("[guest]\nmemory = \"1G\"\ncpus = 1.5\n[network]\ndefault = \"none\"\n").unwrap();
        assert_eq!(config.guest_memory, Size(1 << 30));
        assert_eq!(config.network_default, Some(NetWord::None));
        assert_eq!(config.show("guest.cpus").as_deref(), Some("1.5"));
    }

    #[test]
    fn what_nobody_reads_is_an_error_with_a_suggestion() {
        let error = read("[guest]\nmemmory = \"1G\"\n").unwrap_err();
        assert!(
            error.contains("guest.memmory, did you mean guest.memory?"),
            "{error}"
        );
        assert!(
            read("memory = 1\n")
                .unwrap_err()
                .contains("did you mean guest.memory?")
        );
        assert!(
            read("[guest.memory]\nsize = 1\n")
                .unwrap_err()
                .contains("guest.memory: a table")
        );
        assert!(
            read("[state]\nruntime = \"here\"\n")
                .unwrap_err()
                .contains("no absolute path")
        );
        assert!(read("[x").unwrap_err().contains("is no TOML"));
    }

    #[test]
    fn the_environment_wins_over_drop_ins_and_those_over_files() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("config.d")).unwrap();
        std::fs::write(
            dir.path().join("config.toml"),
            "[guest]\nmemory = \"1G\"\nstart-timeout = 1\n",
        )
        .unwrap();
        std::fs::write(
            dir.path().join("config.d/10.toml"),
            "[guest]\nstart-timeout = 2\n[stop]\ntimeout = 1\n",
        )
        .unwrap();
        let variables = [
            ("TESTUDO_STOP_TIMEOUT", "3"),
            ("TESTUDO_CACHE", "/x"),
            ("HOME", "/"),
        ];
        let mut sources = Sources {
            folders: vec![dir.path().to_owned()],
            variables: variables.map(|(k, v)| (k.into(), v.into())).to_vec(),
        };
        let (config, layers) = load(&sources).unwrap();
        assert_eq!(
            (
                config.guest_memory,
                config.guest_start_timeout,
                config.stop_timeout
            ),
            (Size(1 << 30), 2, 3)
        );
        let of_timeout: Vec<_> = layers.iter().filter(|l| l.key == "stop.timeout").collect();
        assert_eq!(of_timeout.len(), 2);
        sources.variables = vec![("TESTUDO_GUEST_MEMORI".into(), "1".into())];
        let error = load(&sources).unwrap_err().to_string();
        assert!(
            error.contains("$TESTUDO_GUEST_MEMORI") && error.contains("guest.memory?"),
            "{error}"
        );
    }

    #[test]
    fn every_key_has_its_own_variable_and_words() {
        let mut seen = std::collections::BTreeSet::new();
        for key in KEYS {
            assert!(seen.insert(variable(key.name)), "{}", key.name);
            assert!(
                key.doc.trim().ends_with('.') && !key.kind.is_empty(),
                "{}",
                key.name
            );
        }
    }
}
