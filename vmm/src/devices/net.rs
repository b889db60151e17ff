//! Network devices.
//!
//! ```text
//!   NetConfig ──check──▶ NetSpec ──open──▶ OpenNet { port, threads, vhost } ──model──▶ Net
//! ```

mod host;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use testudo_memory::RamListener;
use testudo_protocol::{Direction, LimitsSpec, RateSpec};
use virtio_devices::{
    IoThread, Limits, Net, NetPort, PortSettings, RateLimit, VhostMemory, VhostNet, VirtioModel,
    Way,
};

use super::{
    Adjust, AdjustError, BadDevice, DeviceError, DeviceSpec, HostContext, OpenDevice, Place,
};
use crate::options::{Options, OptionsError, parse, switch};
use crate::seccomp::ThreadKind;
use crate::spec::{ByteSize, Source};

/// Queue pairs a device may have: two queues each and a control queue fit its notification registers.
const MAX_PAIRS: u16 = 16;
/// MTUs that an Ethernet interface can have (virtio 1.2 §5.1.4.1).
const MTUS: std::ops::RangeInclusive<u16> = 68..=65535;
/// The kernel's limit of an interface's name, without its end.
const MAX_NAME: usize = 15;

/// A network device. One of `tap`, `fds` and `stream` says where its packets go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct NetConfig {
    /// Its name; default: net0, net1, … by its place in the list.
    pub id: Option<String>,
    /// The host's tap device. One that is not there is made, if the VMM may, and is gone with it.
    pub tap: Option<String>,
    /// Queues of a tap (or macvtap) as inherited descriptors, one `fd:N` for each queue pair.
    pub fds: Vec<Source>,
    /// The unix socket of a process that takes its packets as a stream, such as passt, or a connected
    /// one as an inherited descriptor, `fd:N`.
    pub stream: Option<Source>,
    /// Its address, such as `02:00:00:00:00:01`; default: one at random, the same for the VM's life.
    pub mac: Option<MacAddress>,
    /// Queue pairs, 1 to 16, of a `tap`; one for each vCPU is what a guest can use.
    pub queues: Option<u16>,
    /// Let the host's kernel move the packets (vhost-net).
    pub vhost: bool,
    /// `/dev/vhost-net` as inherited descriptors, one `fd:N` for each queue pair; implies `vhost`.
    pub vhost_fds: Vec<Source>,
    /// The largest packet in bytes that the guest should send; default: a named tap's own MTU.
    pub mtu: Option<u16>,
    /// Leave checksums and segmentation to whoever needs them.
    pub offloads: bool,
    /// Bytes a second to the guest.
    pub rx_bw: Option<ByteSize>,
    /// Bytes a second from the guest.
    pub tx_bw: Option<ByteSize>,
    /// Packets a second to the guest.
    pub rx_iops: Option<u64>,
    /// Packets a second from the guest.
    pub tx_iops: Option<u64>,
}

impl Default for NetConfig {
    fn default() -> Self {
        Self {
            id: None,
            tap: None,
            fds: Vec::new(),
            stream: None,
            mac: None,
            queues: None,
            vhost: false,
            vhost_fds: Vec::new(),
            mtu: None,
            offloads: true,
            rx_bw: None,
            tx_bw: None,
            rx_iops: None,
            tx_iops: None,
        }
    }
}

/// The address of a network device: one station's, not a group's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct MacAddress([u8; 6]);

impl std::str::FromStr for MacAddress {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not a MAC address: write it like 02:00:00:00:00:01");
        let mut bytes = [0; 6];
        let mut words = text.split(':');
        for byte in &mut bytes {
            let word = words.next().filter(|w| w.len() == 2).ok_or_else(wrong)?;
            let digits = word.bytes().all(|b| b.is_ascii_hexdigit());
            *byte = u8::from_str_radix(word, 16)
                .ok()
                .filter(|_| digits)
                .ok_or_else(wrong)?;
        }
        if words.next().is_some() {
            return Err(wrong());
        }
        let [first, ..] = bytes;
        if first & 1 != 0 {
            return Err(format!(
                "{text} is the address of a group; the first byte of a device's own is even"
            ));
        }
        if bytes == [0; 6] {
            return Err(format!("{text} is nobody's address"));
        }
        Ok(Self(bytes))
    }
}

impl MacAddress {
    /// As it is sent.
    pub(super) fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl TryFrom<String> for MacAddress {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> Self {
        mac.0.map(|byte| format!("{byte:02x}")).join(":")
    }
}

/// `fd` numbers as a flag has them: `3`, or `3:4` for several queues.
fn descriptors(value: Option<&str>) -> Result<Vec<Source>, String> {
    let text = value.ok_or_else(|| "a value is missing".to_owned())?;
    text.split(':')
        .map(|number| parse(Some(&format!("fd:{number}"))))
        .collect()
}

impl NetConfig {
    /// Reads `tap=NAME,mac=…`, `fd=N,…` or `stream=SOCKET,…`.
    pub(crate) fn from_flag(argument: &str) -> Result<Self, OptionsError> {
        let known = "tap, fd, fds, stream, id, mac, queues, vhost, vhostfd, vhostfds, mtu, offloads, rx-bw, \
                     tx-bw, rx-iops and tx-iops";
        let mut net = Self::default();
        Options::keys(argument).each(known, |key, value| {
            match key {
                "tap" => net.tap = Some(parse(value)?),
                "fd" | "fds" => net.fds.extend(descriptors(value)?),
                "stream" => net.stream = Some(parse(value)?),
                "id" => net.id = Some(parse(value)?),
                "mac" => net.mac = Some(parse(value)?),
                "queues" => net.queues = Some(parse(value)?),
                "vhost" => net.vhost = switch(value)?,
                "vhostfd" | "vhostfds" => net.vhost_fds.extend(descriptors(value)?),
                "mtu" => net.mtu = Some(parse(value)?),
                "offloads" => net.offloads = switch(value)?,
                "rx-bw" => net.rx_bw = Some(parse(value)?),
                "tx-bw" => net.tx_bw = Some(parse(value)?),
                "rx-iops" => net.rx_iops = Some(parse(value)?),
                "tx-iops" => net.tx_iops = Some(parse(value)?),
                _ => return Ok(false),
            }
            Ok(true)
        })?;
        Ok(net)
    }

    /// Checks the device at place `number` of the list.
    pub(super) fn check(&self, number: usize) -> Result<NetSpec, BadDevice> {
        let id = self.id.clone().unwrap_or_else(|| format!("net{number}"));
        let spec = self.spec(id.clone());
        spec.map_err(|why| BadDevice::new(&id, why))
    }

    fn wire(&self) -> Result<WireSpec, String> {
        match (&self.tap, self.fds.as_slice(), &self.stream) {
            (None, [], None) => Err(
                "say what it is connected to: a tap by tap=NAME or fd=N, passt by stream=SOCKET"
                    .into(),
            ),
            (Some(name), [], None) => {
                let plain = |b: u8| b.is_ascii_graphic() && b != b'/' && b != b'%';
                if name.is_empty() || name.len() > MAX_NAME || !name.bytes().all(plain) {
                    return Err(format!(
                        "`{name}` is not the name of an interface: it has 1 to {MAX_NAME} letters, digits and signs"
                    ));
                }
                Ok(WireSpec::Tap {
                    name: name.clone(),
                    pairs: self.queues.unwrap_or(1),
                })
            }
            (None, [], Some(_)) if self.vhost || !self.vhost_fds.is_empty() => {
                Err("vhost moves packets of a tap; a stream has none of it".into())
            }
            (None, [], Some(socket)) => Ok(WireSpec::Stream(socket.clone())),
            (None, fds, None) => Ok(WireSpec::Fds(fds.to_vec())),
            (_, _, None) => {
                Err("a device has one tap: name it by tap= or hand it over by fd=".into())
            }
            _ => Err("a device is connected to a tap or to a stream, not to both".into()),
        }
    }

    fn spec(&self, id: String) -> Result<NetSpec, String> {
        let vhost = self.vhost || !self.vhost_fds.is_empty();
        let wire = self.wire()?;
        let pairs = wire.pairs();
        if !(1..=MAX_PAIRS).contains(&pairs) {
            return Err(format!("a network device has 1 to {MAX_PAIRS} queue pairs"));
        }
        if self.queues.is_some_and(|queues| queues != pairs) {
            return Err(match wire {
                WireSpec::Stream(_) => "a stream has one queue pair; leave queues out".into(),
                _ => format!("queues must be the number of descriptors, {pairs}, or be left out"),
            });
        }
        for source in self.fds.iter().chain(&self.vhost_fds) {
            if source.path().is_some() {
                return Err(format!("{source} is not a descriptor: write fd:N"));
            }
        }
        if !self.vhost_fds.is_empty() && self.vhost_fds.len() != usize::from(pairs) {
            return Err(format!(
                "{} vhost descriptors for {pairs} queue pairs; hand over one for each",
                self.vhost_fds.len()
            ));
        }
        if let Some(mtu) = self.mtu.filter(|mtu| !MTUS.contains(mtu)) {
            return Err(format!(
                "an MTU of {mtu}: write {} to {}",
                MTUS.start(),
                MTUS.end()
            ));
        }
        let one_way = |bytes: Option<ByteSize>, frames: Option<u64>| {
            let rate = |per_second| RateSpec {
                per_second,
                burst: None,
            };
            limits(&LimitsSpec {
                direction: None,
                bytes: bytes.map(|bytes| rate(bytes.0)),
                ops: frames.map(rate),
            })
        };
        let rx = one_way(self.rx_bw, self.rx_iops)?;
        let tx = one_way(self.tx_bw, self.tx_iops)?;
        if vhost && (rx, tx) != <(Limits, Limits)>::default() {
            return Err(NO_LIMITS.into());
        }
        Ok(NetSpec {
            id,
            wire,
            vhost,
            vhost_fds: self.vhost_fds.clone(),
            mac: self.mac,
            mtu: self.mtu,
            offloads: self.offloads,
            rx,
            tx,
        })
    }
}

const NO_LIMITS: &str =
    "rate limits need the VMM to move the packets; leave vhost out, or limit the tap (tc)";

fn limits(spec: &LimitsSpec) -> Result<Limits, &'static str> {
    let limit = |rate: Option<RateSpec>| match rate {
        None => Ok(None),
        Some(rate) => RateLimit::new(rate.per_second, rate.burst.unwrap_or(rate.per_second))
            .map(Some)
            .ok_or("a limit of 0 would stop the device; leave it out for no limit"),
    };
    Ok(Limits {
        bytes: limit(spec.bytes)?,
        ops: limit(spec.ops)?,
    })
}

/// Where the packets go.
#[derive(Debug, Clone)]
enum WireSpec {
    Tap { name: String, pairs: u16 },
    Fds(Vec<Source>),
    Stream(Source),
}

impl WireSpec {
    fn pairs(&self) -> u16 {
        match self {
            Self::Tap { pairs, .. } => *pairs,
            Self::Fds(fds) => u16::try_from(fds.len()).unwrap_or(u16::MAX),
            Self::Stream(_) => 1,
        }
    }
}

#[derive(Debug, Clone)]
pub(super) struct NetSpec {
    id: String,
    wire: WireSpec,
    vhost: bool,
    vhost_fds: Vec<Source>,
    mac: Option<MacAddress>,
    mtu: Option<u16>,
    offloads: bool,
    rx: Limits,
    tx: Limits,
}

impl NetSpec {
    pub(super) fn mac(&self) -> Option<MacAddress> {
        self.mac
    }

    /// As `top` shows it: 15 bytes.
    fn thread_name(&self, pair: u16) -> String {
        let room = if pair == 0 { 11 } else { 8 };
        let id: String = self.id.chars().take(room).collect();
        match pair {
            0 => format!("net-{id}"),
            _ => format!("net-{id}-{pair}"),
        }
    }
}

impl DeviceSpec for NetSpec {
    fn kind(&self) -> &'static str {
        "virtio-net"
    }
    fn id(&self) -> &str {
        &self.id
    }
    fn sources(&self) -> Vec<&Source> {
        let wires = match &self.wire {
            WireSpec::Tap { .. } => [].iter(),
            WireSpec::Fds(fds) => fds.iter(),
            WireSpec::Stream(socket) => std::slice::from_ref(socket).iter(),
        };
        wires.chain(&self.vhost_fds).collect()
    }
    fn open(&self, host: &HostContext) -> Result<Box<dyn OpenDevice>, DeviceError> {
        let error = |e| DeviceError::new(self, e);
        let opened = host::open(self).map_err(|e| DeviceError::new(self, e))?;
        let vhost = opened.vhost.clone();
        let port = NetPort::new(PortSettings {
            id: self.id.clone(),
            wires: opened.wires,
            vhost: opened.vhost,
            mac: opened.mac,
            mtu: opened.mtu,
            offloads: self.offloads,
            rx: self.rx,
            tx: self.tx,
        })
        .map_err(error)?;
        let threads = (0..self.wire.pairs())
            .map(|pair| host.thread(&self.thread_name(pair), ThreadKind::NET))
            .collect::<Result<_, _>>()
            .map_err(|e| DeviceError::new(self, e))?;
        Ok(Box::new(OpenNet {
            port,
            threads,
            vhost,
        }))
    }
}

struct OpenNet {
    port: NetPort,
    threads: Vec<IoThread>,
    /// The kernel's data paths, if the device has them.
    vhost: Vec<VhostNet>,
}

impl OpenDevice for OpenNet {
    fn model(&self, _place: &Place<'_>) -> Result<Box<dyn VirtioModel>, DeviceError> {
        let threads = self.threads.iter().map(IoThread::handle).collect();
        Ok(Box::new(Net::new(&self.port, threads)))
    }

    fn ram_listener(&self) -> Option<Box<dyn RamListener>> {
        (!self.vhost.is_empty())
            .then(|| -> Box<dyn RamListener> { Box::new(VhostMemory::new(self.vhost.clone())) })
    }

    fn adjust(&self, what: &Adjust) -> Result<(), AdjustError> {
        match what {
            Adjust::Link(up) if self.port.set_link(*up) => Ok(()),
            Adjust::Link(_) => Err(AdjustError::Value(
                "the other end of its stream has gone; it takes a new VM to connect again".into(),
            )),
            Adjust::Limits(_) if !self.vhost.is_empty() => {
                Err(AdjustError::Value(NO_LIMITS.to_owned()))
            }
            Adjust::Limits(spec) => {
                let limits = limits(spec).map_err(|why| AdjustError::Value(why.to_owned()))?;
                let ways: &[Way] = match spec.direction {
                    None => &[Way::Rx, Way::Tx],
                    Some(Direction::Rx) => &[Way::Rx],
                    Some(Direction::Tx) => &[Way::Tx],
                };
                for way in ways {
                    self.port.set_limits(*way, limits);
                }
                Ok(())
            }
            _ => Err(AdjustError::Unsupported(what.verb())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(flag: &str) -> Result<NetSpec, String> {
        let net = NetConfig::from_flag(flag).map_err(|e| e.to_string())?;
        net.check(0).map_err(|e| e.to_string())
    }

    #[test]
    fn flags_say_what_a_device_is() {
        let spec = check("tap=tap0").unwrap();
        assert_eq!((spec.id(), spec.wire.pairs()), ("net0", 1));
        assert!(spec.offloads && !spec.vhost && spec.sources().is_empty());
        let spec = check("fds=7:8,id=up,vhostfds=9:10,mtu=9000,offloads=off").unwrap();
        assert_eq!((spec.id(), spec.wire.pairs()), ("up", 2));
        assert!(!spec.offloads && spec.vhost);
        assert_eq!(spec.sources().len(), 4);
        let spec = check("fd=7,fd=8,mac=02:00:5e:00:53:Af,queues=2").unwrap();
        let mac = String::from(spec.mac().unwrap());
        assert_eq!(mac, "02:00:5e:00:53:af");
        let spec = check("stream=/run/passt.sock,mtu=65520,rx-bw=1M").unwrap();
        assert_eq!((spec.wire.pairs(), spec.sources().len()), (1, 1));
        assert!(matches!(spec.wire, WireSpec::Stream(Source::Path(_))));
        let spec = check("stream=fd:9,queues=1").unwrap();
        assert!(matches!(spec.wire, WireSpec::Stream(Source::Fd(9))));
        let spec = check("tap=t,rx-bw=1M,tx-iops=100,id=a-very-long-identifier").unwrap();
        assert_eq!(spec.rx.bytes, RateLimit::new(1 << 20, 1 << 20));
        assert_eq!(spec.tx.ops, RateLimit::new(100, 100));
        for pair in [0, 1, 15] {
            assert!(spec.thread_name(pair).len() <= 15);
        }
    }

    #[test]
    fn wrong_words_are_one_clear_line() {
        for (flag, says) in [
            ("", "`` in `` is not known here"),
            ("queues=2", "say what it is connected to"),
            ("stream=/s,tap=t", "a tap or to a stream, not to both"),
            ("stream=/s,fd=7", "a tap or to a stream, not to both"),
            ("stream=fd:1", "number greater than 2"),
            ("stream=/s,queues=2", "one queue pair"),
            ("stream=/s,vhost", "vhost moves packets of a tap"),
            ("tap=t,fd=7", "a device has one tap"),
            ("tap=", "is not the name of an interface"),
            ("tap=a/b", "is not the name of an interface"),
            ("tap=sixteen-letters-", "1 to 15 letters"),
            ("tap=tap%d", "is not the name"),
            ("tap=t,queues=0", "1 to 16 queue pairs"),
            ("tap=t,queues=17", "1 to 16 queue pairs"),
            (
                "fds=7:8,queues=3",
                "queues must be the number of descriptors, 2",
            ),
            ("fd=x", "`fd:x` is not a descriptor"),
            ("fd=1", "number greater than 2"),
            ("fd", "a value is missing"),
            ("tap=t,mac=02:00:00:00:00", "is not a MAC address"),
            ("tap=t,mac=02:00:00:00:00:0g", "is not a MAC address"),
            ("tap=t,mac=02:00:00:00:00:+1", "is not a MAC address"),
            ("tap=t,mac=02:00:00:00:00:01:02", "is not a MAC address"),
            ("tap=t,mac=01:00:00:00:00:01", "the address of a group"),
            ("tap=t,mac=00:00:00:00:00:00", "nobody's address"),
            ("tap=t,mtu=67", "an MTU of 67: write 68 to 65535"),
            ("tap=t,mtu=65536", "number too large"),
            ("tap=t,vhost,rx-bw=1M", "rate limits need the VMM"),
            (
                "tap=t,queues=2,vhostfd=7",
                "1 vhost descriptors for 2 queue pairs",
            ),
            ("tap=t,rx-bw=0", "a limit of 0 would stop the device"),
            ("tap=t,vhost=maybe", "write on or off"),
            ("tap=t,colour=red", "is not known here"),
        ] {
            let error = check(flag).unwrap_err();
            assert!(error.contains(says), "{flag}: {error}");
            assert!(!error.contains('\n'));
        }
    }
}
