//! What an image wants to be run as (image specification, `config.md`).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::manifest::null_is_empty;
use crate::platform::Platform;

/// The configuration of an image, as far as it says how to run it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct ImageConfig {
    /// Environment, in order.
    pub env: Vec<(String, String)>,
    /// First words of the command; cannot be overridden by arguments.
    pub entrypoint: Vec<String>,
    /// Arguments, or the command if there is no entrypoint.
    pub cmd: Vec<String>,
    /// `user`, `uid`, `user:group`, …; empty means root.
    pub user: String,
    /// Where the command starts; empty means `/`.
    pub working_dir: String,
    /// Paths that want to be volumes.
    pub volumes: Vec<String>,
    /// Ports it listens on.
    pub exposed_ports: Vec<Port>,
    /// What ends it: `SIGQUIT`, `15`.
    pub stop_signal: Option<String>,
    /// Whatever else people say.
    pub labels: BTreeMap<String, String>,
    /// When it was made, in RFC 3339.
    pub created: Option<String>,
    /// What it runs on.
    pub platform: Option<Platform>,
}

/// A port and its protocol.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// 1 to 65535.
    pub number: u16,
    /// `tcp`, `udp` or `sctp`.
    pub protocol: String,
}

/// What is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not JSON, or of other types.
    #[error("it does not parse")]
    Json(#[from] serde_json::Error),
    /// As many diff ids as layers are needed: they prove what the layers are.
    #[error("it names {diff_ids} layers, the manifest has {layers}")]
    Layers {
        /// In the configuration.
        diff_ids: usize,
        /// In the manifest.
        layers: usize,
    },
}

/// The configuration and the digests of its layers, unpacked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parsed {
    /// How to run it.
    pub config: ImageConfig,
    /// Lowest first.
    pub diff_ids: Vec<Digest>,
}

#[derive(Deserialize)]
struct Raw {
    #[serde(default, deserialize_with = "null_is_empty")]
    config: RawConfig,
    #[serde(default)]
    rootfs: RawRootfs,
    #[serde(default)]
    created: Option<String>,
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    variant: Option<String>,
}

#[derive(Deserialize, Default)]
struct RawRootfs {
    #[serde(default, deserialize_with = "null_is_empty")]
    diff_ids: Vec<Digest>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase", default)]
struct RawConfig {
    #[serde(deserialize_with = "null_is_empty")]
    env: Vec<String>,
    #[serde(deserialize_with = "null_is_empty")]
    entrypoint: Vec<String>,
    #[serde(deserialize_with = "null_is_empty")]
    cmd: Vec<String>,
    #[serde(deserialize_with = "null_is_empty")]
    user: String,
    #[serde(deserialize_with = "null_is_empty")]
    working_dir: String,
    #[serde(deserialize_with = "null_is_empty")]
    volumes: BTreeMap<String, serde::de::IgnoredAny>,
    #[serde(deserialize_with = "null_is_empty")]
    exposed_ports: BTreeMap<String, serde::de::IgnoredAny>,
    #[serde(deserialize_with = "null_is_empty")]
    stop_signal: String,
    #[serde(deserialize_with = "null_is_empty")]
    labels: BTreeMap<String, String>,
}

impl ImageConfig {
    /// From the JSON an image has.
    pub fn parse(bytes: &[u8]) -> Result<Parsed, ConfigError> {
        let raw: Raw = serde_json::from_slice(bytes)?;
        let config = raw.config;
        let env = config.env.iter().filter_map(|pair| pair.split_once('='));
        Ok(Parsed {
            config: Self {
                env: env.map(|(k, v)| (k.to_owned(), v.to_owned())).collect(),
                entrypoint: config.entrypoint,
                cmd: config.cmd,
                user: config.user,
                working_dir: config.working_dir,
                volumes: config.volumes.into_keys().collect(),
                exposed_ports: config
                    .exposed_ports
                    .keys()
                    .filter_map(|p| port(p))
                    .collect(),
                stop_signal: (!config.stop_signal.is_empty()).then_some(config.stop_signal),
                labels: config.labels,
                created: raw.created,
                platform: (!raw.os.is_empty()).then_some(Platform {
                    os: raw.os,
                    architecture: raw.architecture,
                    variant: raw.variant.filter(|v| !v.is_empty()),
                }),
            },
            diff_ids: raw.rootfs.diff_ids,
        })
    }
}

/// `8080/tcp`, or `8080`. Ranges and nonsense are left out: they are hints.
fn port(text: &str) -> Option<Port> {
    let (number, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    Some(Port {
        number: number.parse().ok().filter(|n| *n != 0)?,
        protocol: ["tcp", "udp", "sctp"]
            .into_iter()
            .find(|p| *p == protocol)?
            .to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_docker_writes() {
        let json = br#"{"architecture":"amd64","os":"linux","variant":"","created":"2026-01-02T03:04:05Z",
            "config":{"User":"app:web","ExposedPorts":{"80/tcp":{},"53/udp":{},"x":{}},"Env":["PATH=/bin","A=b=c","bad"],
              "Entrypoint":["/init"],"Cmd":null,"Volumes":{"/data":{}},"WorkingDir":"/srv","StopSignal":"SIGQUIT",
              "Labels":null,"OnBuild":null,"ArgsEscaped":true},
            "rootfs":{"type":"layers","diff_ids":["sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"]},
            "history":[{"created_by":"x"}]}"#;
        let Parsed { config, diff_ids } = ImageConfig::parse(json).unwrap();
        let pair = |k: &str, v: &str| (k.to_owned(), v.to_owned());
        assert_eq!(config.env, [pair("PATH", "/bin"), pair("A", "b=c")]);
        assert_eq!(
            (config.user.as_str(), config.working_dir.as_str()),
            ("app:web", "/srv")
        );
        assert_eq!(
            (config.entrypoint.as_slice(), config.cmd.len()),
            (&["/init".to_owned()][..], 0)
        );
        assert_eq!(config.volumes, ["/data"]);
        let ports: Vec<_> = config
            .exposed_ports
            .iter()
            .map(|p| (p.number, p.protocol.as_str()))
            .collect();
        assert_eq!(ports, [(53, "udp"), (80, "tcp")]);
        assert_eq!(config.stop_signal.as_deref(), Some("SIGQUIT"));
        assert_eq!(config.platform.unwrap().to_string(), "linux/amd64");
        assert_eq!(diff_ids, [Digest::of(b"")]);
    }

    #[test]
    fn little_is_enough_and_nonsense_is_not() {
        assert_eq!(
            ImageConfig::parse(br#"{"config":null}"#).unwrap().config,
            ImageConfig::default()
        );
        for bad in [
            "",
            r#"{"config":{"Env":"x"}}"#,
            r#"{"rootfs":{"diff_ids":["sha256:.."]}}"#,
        ] {
            assert!(ImageConfig::parse(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
