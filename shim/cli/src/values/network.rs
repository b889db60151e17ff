//! `--net` and `-p`.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Which network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NetWord {
    /// Only a loopback.
    None,
    /// Through a user-mode stack that needs no rights.
    User,
    /// On a tap device that exists.
    Tap(String),
}

impl FromStr for NetWord {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text
            .split_once('=')
            .map_or((text, None), |(k, v)| (k, Some(v)))
        {
            ("none", None) => Ok(Self::None),
            ("user", None) => Ok(Self::User),
            ("tap", Some(name))
                if (1..16).contains(&name.len()) && !name.contains(['/', ',', ' ']) =>
            {
                Ok(Self::Tap(name.to_owned()))
            }
            _ => Err(format!(
                "`{text}` is no network; write none, user or tap=NAME"
            )),
        }
    }
}

/// What is published.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// Connections.
    Tcp,
    /// Datagrams.
    Udp,
}

/// `[[IP:]HOST:]GUEST[/udp]`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Publish {
    /// Only at this address of the host.
    pub address: Option<IpAddr>,
    /// Port of the host.
    pub host: u16,
    /// Port of the container.
    pub guest: u16,
    /// Kind.
    pub transport: Transport,
}

impl FromStr for Publish {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = |why: &str| {
            format!(
                "`{text}`: {why}; write HOST:GUEST, IP:HOST:GUEST, each with /udp for datagrams"
            )
        };
        let (ports, transport) = match text.rsplit_once('/') {
            Some((ports, "tcp")) => (ports, Transport::Tcp),
            Some((ports, "udp")) => (ports, Transport::Udp),
            Some(_) => return Err(bad("only tcp and udp can be published")),
            None => (text, Transport::Tcp),
        };
        let port = |word: &str| {
            let number = word.parse().ok().filter(|n: &u16| *n != 0);
            number.ok_or_else(|| bad(&format!("{word:?} is no port from 1 to 65535")))
        };
        let (front, guest) = match ports.rsplit_once(':') {
            Some((front, guest)) => (Some(front), port(guest)?),
            None => (None, port(ports)?),
        };
        let (address, host) = match front.map(|front| (front.rsplit_once(':'), front)) {
            None => (None, guest),
            Some((None, host)) => (None, port(host)?),
            Some((Some((address, host)), _)) => {
                let address = address
                    .strip_prefix('[')
                    .and_then(|a| a.strip_suffix(']'))
                    .unwrap_or(address);
                let address = address
                    .parse()
                    .map_err(|_| bad(&format!("{address:?} is no IP address")))?;
                (
                    Some(address),
                    if host.is_empty() { guest } else { port(host)? },
                )
            }
        };
        Ok(Self {
            address,
            host,
            guest,
            transport,
        })
    }
}

impl fmt::Display for Publish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            Some(IpAddr::V6(address)) => write!(f, "[{address}]:")?,
            Some(IpAddr::V4(address)) => write!(f, "{address}:")?,
            None => {}
        }
        let kind = match self.transport {
            Transport::Tcp => "tcp",
            Transport::Udp => "udp",
        };
        write!(f, "{}->{}/{kind}", self.host, self.guest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_as_docker_writes_them() {
        for (text, shown) in [
            ("8080:80", "8080->80/tcp"),
            ("80", "80->80/tcp"),
            ("127.0.0.1:53:53/udp", "127.0.0.1:53->53/udp"),
            ("[::1]:1:2", "[::1]:1->2/tcp"),
            ("127.0.0.1::80", "127.0.0.1:80->80/tcp"),
        ] {
            assert_eq!(text.parse::<Publish>().unwrap().to_string(), shown);
        }
        for bad in [
            "",
            "0:80",
            "80:0",
            "x:80",
            "80/sctp",
            "1.2.3:1:2",
            "70000:1",
        ] {
            assert!(bad.parse::<Publish>().is_err(), "{bad}");
        }
    }

    #[test]
    fn networks_by_name() {
        assert_eq!("tap=t0".parse(), Ok(NetWord::Tap("t0".into())));
        assert!("tap".parse::<NetWord>().is_err() && "host".parse::<NetWord>().is_err());
    }
}
