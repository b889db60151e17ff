//! Devices whose queues another process serves, by vhost-user.

use std::os::fd::OwnedFd;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use testudo_memory::RamListener;
use virtio_devices::{Backend, IoThread, VhostUser, VhostUserKind, VhostUserOptions, VirtioModel};

use super::net::MacAddress;
use super::{BadDevice, DeviceError, DeviceSpec, HostContext, OpenDevice, Place};
use crate::options::{Options, OptionsError, parse, switch};
use crate::seccomp::ThreadKind;
use crate::spec::{MemoryConfig, Source};

/// Queues a device may have.
const MAX_QUEUES: u16 = 64;
/// Descriptors in a queue; back-ends take no more.
const MAX_QUEUE_SIZE: u16 = 1024;
/// Bytes in a file system's tag.
const MAX_TAG: usize = 36;

/// A device whose queues another process serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VhostUserConfig {
    /// What it is.
    pub kind: VhostUserKindConfig,
    /// The Unix socket at which the back-end listens, or `fd:N` for one that is connected.
    pub socket: Source,
    /// Its name; default: vhost-user0, vhost-user1, … by its place in the list.
    #[serde(default)]
    pub id: Option<String>,
    /// By which the guest mounts a file system: 1 to 36 bytes.
    #[serde(default)]
    pub tag: Option<String>,
    /// The guest's hardware address of a network device; default: one of its own, by the id.
    #[serde(default)]
    pub mac: Option<MacAddress>,
    /// Request queues, or pairs of queues of a network device, 1 to 64.
    #[serde(default = "one")]
    pub queues: u16,
    /// Descriptors in each queue: a power of two up to 1024; default: 256, of a file system 1024.
    #[serde(default)]
    pub queue_size: Option<u16>,
    /// Look for a back-end that has gone, and go on with it.
    #[serde(default)]
    pub reconnect: bool,
}

fn one() -> u16 {
    1
}

/// Kinds of devices that a back-end can serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum VhostUserKindConfig {
    /// A network device.
    Net,
    /// A file system.
    Fs,
    /// A disk.
    Blk,
}

impl FromStr for VhostUserKindConfig {
    type Err = &'static str;
    fn from_str(word: &str) -> Result<Self, Self::Err> {
        match word {
            "net" => Ok(Self::Net),
            "fs" => Ok(Self::Fs),
            "blk" => Ok(Self::Blk),
            _ => Err("write net, fs or blk"),
        }
    }
}

/// A locally administered address that is always the same for `id`.
fn address_of(id: &str) -> [u8; 6] {
    // FNV-1a.
    let hash = id.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    });
    let [a, b, c, d, e, ..] = hash.to_le_bytes();
    [0x52, a, b, c, d, e]
}

impl VhostUserConfig {
    /// Reads `net|fs|blk,socket=PATH,…`.
    pub(crate) fn from_flag(argument: &str) -> Result<Self, OptionsError> {
        let options = Options::new(argument);
        let mut device = Self {
            kind: options.first()?,
            socket: Source::Path(std::path::PathBuf::new()),
            id: None,
            tag: None,
            mac: None,
            queues: 1,
            queue_size: None,
            reconnect: false,
        };
        let mut socket: Option<Source> = None;
        let known = "socket, fd, id, tag, mac, queues, queue-size and reconnect";
        options.each(known, |key, value| {
            match key {
                "socket" | "fd" if socket.is_some() => {
                    return Err("one device has one back-end".to_owned());
                }
                "socket" => socket = Some(parse(value)?),
                "fd" => socket = Some(parse(value.map(|n| format!("fd:{n}")).as_deref())?),
                "id" => device.id = Some(parse(value)?),
                "tag" => device.tag = Some(parse(value)?),
                "mac" => device.mac = Some(parse(value)?),
                "queues" => device.queues = parse(value)?,
                "queue-size" => device.queue_size = Some(parse(value)?),
                "reconnect" => device.reconnect = switch(value)?,
                _ => return Ok(false),
            }
            Ok(true)
        })?;
        let missing = "name the back-end's socket: socket=PATH";
        device.socket = socket.ok_or_else(|| options.bad_first(missing))?;
        Ok(device)
    }

    /// Checks the device at place `number` of the list, in a machine with such `memory`.
    pub(super) fn check(
        &self,
        number: usize,
        memory: &MemoryConfig,
    ) -> Result<VhostUserSpec, BadDevice> {
        let id = self.id.clone();
        let id = id.unwrap_or_else(|| format!("vhost-user{number}"));
        let bad = |why: &str| Err(BadDevice::new(&id, why));
        if !memory.shared {
            return bad(
                "a back-end must see the guest's memory: add `shared` to the memory (--memory SIZE,shared)",
            );
        }
        if !(1..=MAX_QUEUES).contains(&self.queues) {
            return bad("queues are 1 to 64");
        }
        let usual = match self.kind {
            VhostUserKindConfig::Fs => 1024,
            VhostUserKindConfig::Net | VhostUserKindConfig::Blk => 256,
        };
        let queue_size = self.queue_size.unwrap_or(usual);
        if !queue_size.is_power_of_two() || !(2..=MAX_QUEUE_SIZE).contains(&queue_size) {
            return bad("a queue's size is a power of two from 2 to 1024");
        }
        if self.reconnect && matches!(self.socket, Source::Fd(_)) {
            return bad(
                "a descriptor cannot be connected again; name the socket's path, or leave reconnect out",
            );
        }
        if self.tag.is_some() && self.kind != VhostUserKindConfig::Fs {
            return bad("only a file system has a tag; remove it");
        }
        if self.mac.is_some() && self.kind != VhostUserKindConfig::Net {
            return bad("only a network device has a hardware address; remove mac");
        }
        let kind = match self.kind {
            VhostUserKindConfig::Net => VhostUserKind::Net {
                mac: self.mac.map_or_else(|| address_of(&id), MacAddress::bytes),
            },
            VhostUserKindConfig::Blk => VhostUserKind::Blk,
            VhostUserKindConfig::Fs => match &self.tag {
                Some(tag) if (1..=MAX_TAG).contains(&tag.len()) && !tag.contains('\0') => {
                    VhostUserKind::Fs { tag: tag.clone() }
                }
                Some(_) => return bad("a tag has 1 to 36 bytes"),
                None => return bad("name the tag by which the guest mounts it: tag=NAME"),
            },
        };
        Ok(VhostUserSpec {
            id,
            socket: self.socket.clone(),
            options: VhostUserOptions {
                kind,
                queues: self.queues,
                queue_size,
                reconnect: self.reconnect,
            },
        })
    }
}

#[derive(Debug, Clone)]
pub(super) struct VhostUserSpec {
    id: String,
    socket: Source,
    options: VhostUserOptions,
}

impl DeviceSpec for VhostUserSpec {
    fn kind(&self) -> &'static str {
        match self.options.kind {
            VhostUserKind::Net { .. } => "vhost-user-net",
            VhostUserKind::Fs { .. } => "vhost-user-fs",
            VhostUserKind::Blk => "vhost-user-blk",
        }
    }
    fn id(&self) -> &str {
        &self.id
    }
    fn sources(&self) -> Vec<&Source> {
        vec![&self.socket]
    }
    fn open(&self, host: &HostContext) -> Result<Box<dyn OpenDevice>, DeviceError> {
        let backend = match &self.socket {
            Source::Path(path) => Backend::Path(path.clone()),
            Source::Fd(_) => {
                let socket = self.socket.open("back-end");
                let socket = socket.map_err(|e| DeviceError::new(self, e))?;
                Backend::Socket(OwnedFd::from(socket))
            }
        };
        // As `top` shows it: 15 bytes.
        let name: String = format!("vhu-{}", self.id).chars().take(15).collect();
        let thread = host.thread(&name, ThreadKind::VHOST_USER);
        let thread = thread.map_err(|e| DeviceError::new(self, e))?;
        let device = VhostUser::open(backend, self.options.clone(), &thread.handle())
            .map_err(|e| DeviceError::new(self, e))?;
        Ok(Box::new(OpenVhostUser {
            device,
            _thread: thread,
        }))
    }
}

struct OpenVhostUser {
    device: VhostUser,
    _thread: IoThread,
}

impl OpenDevice for OpenVhostUser {
    fn model(&self, _place: &Place<'_>) -> Result<Box<dyn VirtioModel>, DeviceError> {
        Ok(self.device.model())
    }

    fn ram_listener(&self) -> Option<Box<dyn RamListener>> {
        Some(self.device.ram_listener())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(argument: &str) -> Result<VhostUserSpec, String> {
        let memory = MemoryConfig {
            shared: true,
            ..MemoryConfig::default()
        };
        let config = VhostUserConfig::from_flag(argument).map_err(|e| e.to_string())?;
        config.check(0, &memory).map_err(|e| e.to_string())
    }

    #[test]
    fn flags_become_devices() {
        let fs = check("fs,socket=/run/fs.sock,tag=src,queue-size=512").unwrap();
        assert_eq!((fs.kind(), fs.id()), ("vhost-user-fs", "vhost-user0"));
        assert_eq!(fs.options.queue_size, 512);
        let net = check("net,fd=9,id=n,mac=52:54:00:12:34:5a,queues=2").unwrap();
        let mac = [0x52, 0x54, 0, 0x12, 0x34, 0x5a];
        assert_eq!(net.options.kind, VhostUserKind::Net { mac });
        assert!(check("blk,socket=/s,reconnect").unwrap().options.reconnect);
        assert_ne!(address_of("a"), address_of("b"));
    }

    #[test]
    fn what_cannot_be_is_one_clear_line() {
        for (argument, says) in [
            ("gpu,socket=/s", "write net, fs or blk"),
            ("blk", "name the back-end's socket: socket=PATH"),
            ("blk,socket=/s,fd=4", "one device has one back-end"),
            ("fs,socket=/s", "name the tag by which the guest mounts it"),
            ("fs,socket=/s,tag=", "a tag has 1 to 36 bytes"),
            ("blk,socket=/s,tag=x", "only a file system has a tag"),
            (
                "blk,socket=/s,mac=52:54:00:12:34:56",
                "only a network device",
            ),
            (
                "net,socket=/s,mac=53:54:00:12:34:56",
                "the address of a group",
            ),
            ("net,socket=/s,mac=52:54:00:12:34", "is not a MAC address"),
            ("net,socket=/s,queues=0", "queues are 1 to 64"),
            (
                "net,socket=/s,queue-size=2048",
                "a power of two from 2 to 1024",
            ),
            (
                "blk,fd=9,reconnect",
                "a descriptor cannot be connected again",
            ),
            ("blk,socket=/s,speed=9", "is not known here"),
        ] {
            let error = check(argument).unwrap_err();
            assert!(error.contains(says), "{argument}: {error}");
        }
        let config = VhostUserConfig::from_flag("blk,socket=/s").unwrap();
        let error = config.check(0, &MemoryConfig::default()).unwrap_err();
        assert!(error.to_string().contains("add `shared` to the memory"));
    }
}
