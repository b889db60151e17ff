//! Addresses as people write them and as the kernel takes them.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::failure::Failure;

const INET: u8 = 2;
const INET6: u8 = 10;

/// An address and how many of its bits name the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Prefix {
    pub(crate) address: IpAddr,
    pub(crate) length: u8,
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

impl Prefix {
    /// `10.0.0.2/24`, `fd00::2/64`
    pub(crate) fn read(text: &str) -> Result<Self, Failure> {
        let bad = || {
            Failure::invalid(format!(
                "{text:?} is no address with its prefix: 10.0.0.2/24"
            ))
        };
        let (address, length) = text.split_once('/').ok_or_else(bad)?;
        let address: IpAddr = address.parse().map_err(|_| bad())?;
        let length: u8 = length.parse().map_err(|_| bad())?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        if length > most {
            return Err(bad());
        }
        Ok(Self { address, length })
    }

    pub(super) fn everything(family: u8) -> Self {
        let address = if family == INET6 {
            Ipv6Addr::UNSPECIFIED.into()
        } else {
            Ipv4Addr::UNSPECIFIED.into()
        };
        Self { address, length: 0 }
    }

    pub(super) fn family(&self) -> u8 {
        family(self.address)
    }
}

pub(super) fn family(address: IpAddr) -> u8 {
    if address.is_ipv4() { INET } else { INET6 }
}

pub(super) fn read(text: &str) -> Result<IpAddr, Failure> {
    text.parse()
        .map_err(|_| Failure::invalid(format!("{text:?} is no address")))
}

pub(super) fn to_bytes(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

pub(super) fn from_bytes(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(four) = <[u8; 4]>::try_from(bytes) {
        return Some(four.into());
    }
    <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from)
}

/// `52:54:00:12:34:56`
pub(super) fn mac(text: &str) -> Result<[u8; 6], Failure> {
    let bad = || Failure::invalid(format!("{text:?} is no MAC address: 52:54:00:12:34:56"));
    let bytes = text
        .split(':')
        .map(|part| match part.len() {
            2 if part.bytes().all(|b| b.is_ascii_hexdigit()) => {
                u8::from_str_radix(part, 16).map_err(|_| bad())
            }
            _ => Err(bad()),
        })
        .collect::<Result<Vec<u8>, _>>()?;
    bytes.try_into().map_err(|_| bad())
}

pub(super) fn words_of_mac(bytes: &[u8]) -> String {
    let parts: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    parts.join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_and_print() {
        for text in ["10.0.0.2/24", "fd00::2/64", "0.0.0.0/0", "::/0"] {
            assert_eq!(Prefix::read(text).unwrap().to_string(), text);
        }
        for bad in [
            "10.0.0.2",
            "10.0.0.2/33",
            "fd00::/129",
            "x/1",
            "10.0.0.2/-1",
            "",
        ] {
            assert!(Prefix::read(bad).is_err(), "{bad}");
        }
        let text = "52:54:00:ab:cd:ef";
        assert_eq!(words_of_mac(&mac(text).unwrap()), text);
        for bad in [
            "52:54:00:ab:cd",
            "52:54:00:ab:cd:ef:00",
            "5254:00:ab:cd:ef",
            "zz:54:00:ab:cd:ef",
            "+1:54:00:ab:cd:ef",
        ] {
            assert!(mac(bad).is_err(), "{bad}");
        }
    }
}
