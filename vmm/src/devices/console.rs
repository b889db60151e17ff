//! The virtio console, and ports with names.

use std::io;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use virtio_devices::{Attachment, Console as Model, IoHandle, PortHandle, PortSink, VirtioModel};

use super::{
    Adjust, AdjustError, BadDevice, CONSOLE, DeviceError, DeviceSpec, HostContext, OpenDevice,
    Place,
};
use crate::console::Console;
use crate::letters::{Letter, Letters};
use crate::options::{Options, OptionsError, parse};
use crate::spec::{Config, ConsoleConfig, Source};

const PORTS: &str = "ports";
/// The most bytes of a port's name.
const MAX_NAME: usize = 64;
/// How long a reader may take nothing before the last output is given up.
const PATIENCE: Duration = Duration::from_secs(10);

/// A port of the guest's, `/dev/virtio-ports/NAME`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PortConfig {
    /// Its name, 1 to 64 letters, digits, dots, dashes and underscores.
    pub name: String,
    /// Where it goes.
    pub to: ConsoleConfig,
}

impl PortConfig {
    /// Reads `name=NAME,to=WHERE`.
    pub(crate) fn from_flag(argument: &str) -> Result<Self, OptionsError> {
        let options = Options::keys(argument);
        let (mut name, mut to) = (None, None);
        options.each("name and to", |key, value| {
            match key {
                "name" => name = Some(parse(value)?),
                "to" => to = Some(parse(value)?),
                _ => return Ok(false),
            }
            Ok(true)
        })?;
        match (name, to) {
            (Some(name), Some(to)) => Ok(Self { name, to }),
            _ => Err(options.bad_first("write name=NAME,to=WHERE")),
        }
    }
}

/// The devices that `config` asks for: a console, a device with all ports, or both.
pub(super) fn check(
    config: &Config,
) -> Result<(Option<ConsoleSpec>, Option<PortsSpec>), BadDevice> {
    let serial = Some(&config.console);
    let others = config.virtio_console.iter();
    let ports = config.ports.iter().map(|port| &port.to);
    let all = serial.into_iter().chain(others).chain(ports);
    if all.filter(|to| **to == ConsoleConfig::Stdio).count() > 1 {
        let why = "stdio can be one console's only; the serial port has it unless --console says something else";
        return Err(BadDevice::new(CONSOLE, why));
    }
    let console = config.virtio_console.as_ref().map(|to| ConsoleSpec {
        to: to.clone(),
        source: source(to),
    });
    if config.ports.is_empty() {
        return Ok((console, None));
    }
    let count = config.ports.len();
    if count > Model::MAX_PORTS {
        let most = Model::MAX_PORTS;
        return Err(BadDevice::new(
            PORTS,
            format!("{count} ports; there can be {most}"),
        ));
    }
    let mut names = std::collections::BTreeSet::new();
    for PortConfig { name, .. } in &config.ports {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(plain) {
            let why = format!(
                "`{name}` cannot be a port's name: it has 1 to {MAX_NAME} letters, digits, dots, dashes and underscores"
            );
            return Err(BadDevice::new(PORTS, why));
        }
        if !names.insert(name) {
            return Err(BadDevice::new(
                PORTS,
                format!("two ports are called {name}"),
            ));
        }
    }
    let sources = config.ports.iter().filter_map(|port| source(&port.to));
    let ports = PortsSpec {
        sources: sources.collect(),
        ports: config.ports.clone(),
    };
    Ok((console, Some(ports)))
}

fn source(to: &ConsoleConfig) -> Option<Source> {
    let fd: RawFd = match to {
        ConsoleConfig::Fd(fd) => *fd,
        _ => return None,
    };
    Some(Source::Fd(fd))
}

/// The host's end of one port, through all boots of the guest.
struct HostEnd {
    console: Arc<Mutex<Console>>,
    events: Mutex<Option<Attachment<Arc<Mutex<Console>>>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl HostEnd {
    fn open(
        to: &ConsoleConfig,
        letters: &Letters,
    ) -> Result<Self, crate::console::ConsoleOpenError> {
        let letters = letters.clone();
        let end = Box::new(move || letters.send(Letter::EndRequested));
        let console = Console::open(to, end)?;
        Ok(Self {
            console: Arc::new(Mutex::new(console)),
            events: Mutex::default(),
        })
    }

    /// Takes leave of the guest there was; where the next one's output goes.
    fn sink(&self) -> io::Result<PortSink> {
        *lock(&self.events) = None;
        let console = lock(&self.console);
        console.drain(PATIENCE);
        console.sink()
    }

    fn connect(&self, port: PortHandle, io: &IoHandle) -> io::Result<()> {
        lock(&self.console).connect(port);
        let attached = io.attach(Arc::clone(&self.console));
        *lock(&self.events) = Some(attached.map_err(io::Error::other)?);
        Ok(())
    }

    fn end(&self) {
        // By then the thread has seen what the guest had kicked for.
        *lock(&self.events) = None;
        let mut console = lock(&self.console);
        console.drain(PATIENCE);
        console.put_back();
    }
}

#[derive(Debug, Clone)]
pub(super) struct ConsoleSpec {
    to: ConsoleConfig,
    source: Option<Source>,
}

impl DeviceSpec for ConsoleSpec {
    fn kind(&self) -> &'static str {
        "virtio-console"
    }
    fn id(&self) -> &str {
        CONSOLE
    }
    fn sources(&self) -> Vec<&Source> {
        self.source.iter().collect()
    }
    fn open(&self, host: &HostContext) -> Result<Box<dyn OpenDevice>, DeviceError> {
        let end = HostEnd::open(&self.to, &host.letters);
        Ok(Box::new(OpenConsole {
            spec: self.clone(),
            end: end.map_err(|e| DeviceError::new(self, e))?,
            port: Mutex::default(),
            size: Mutex::default(),
        }))
    }
}

struct OpenConsole {
    spec: ConsoleSpec,
    end: HostEnd,
    port: Mutex<Option<PortHandle>>,
    /// Columns and rows that a client of the control socket has set.
    size: Mutex<Option<(u16, u16)>>,
}

impl OpenConsole {
    fn size(&self) -> (u16, u16) {
        let set = *lock(&self.size);
        set.or_else(|| lock(&self.end.console).window())
            .unwrap_or_default()
    }

    fn resize(&self) {
        let (columns, rows) = self.size();
        if let Some(port) = &*lock(&self.port) {
            port.resize(columns, rows);
        }
    }
}

impl OpenDevice for OpenConsole {
    fn model(&self, place: &Place<'_>) -> Result<Box<dyn VirtioModel>, DeviceError> {
        let error = |e: io::Error| DeviceError::new(&self.spec, e);
        let sink = self.end.sink().map_err(error)?;
        let size = self.size();
        let (model, port) = Model::single(sink, size, place.io.clone()).map_err(error)?;
        self.end.connect(port.clone(), &place.io).map_err(error)?;
        *lock(&self.port) = Some(port);
        Ok(Box::new(model))
    }

    fn adjust(&self, what: &Adjust) -> Result<(), AdjustError> {
        let Adjust::ConsoleSize(columns, rows) = what else {
            return Err(AdjustError::Unsupported(what.verb()));
        };
        *lock(&self.size) = Some((*columns, *rows));
        self.resize();
        Ok(())
    }

    fn window_changed(&self) {
        self.resize();
    }

    fn end(&self) {
        self.end.end();
    }
}

#[derive(Debug, Clone)]
pub(super) struct PortsSpec {
    ports: Vec<PortConfig>,
    sources: Vec<Source>,
}

impl DeviceSpec for PortsSpec {
    fn kind(&self) -> &'static str {
        "virtio-ports"
    }
    fn id(&self) -> &str {
        PORTS
    }
    fn sources(&self) -> Vec<&Source> {
        self.sources.iter().collect()
    }
    fn open(&self, host: &HostContext) -> Result<Box<dyn OpenDevice>, DeviceError> {
        let ends = self
            .ports
            .iter()
            .map(|port| HostEnd::open(&port.to, &host.letters));
        let ends: Result<_, _> = ends.collect();
        Ok(Box::new(OpenPorts {
            spec: self.clone(),
            ends: ends.map_err(|e| DeviceError::new(self, e))?,
        }))
    }
}

struct OpenPorts {
    spec: PortsSpec,
    ends: Vec<HostEnd>,
}

impl OpenDevice for OpenPorts {
    fn model(&self, place: &Place<'_>) -> Result<Box<dyn VirtioModel>, DeviceError> {
        let error = |e: io::Error| DeviceError::new(&self.spec, e);
        let names = self.spec.ports.iter().map(|port| port.name.clone());
        let sinks = self.ends.iter().map(HostEnd::sink);
        let ports: io::Result<Vec<_>> = names
            .zip(sinks)
            .map(|(name, sink)| Ok((name, sink?)))
            .collect();
        let made = Model::ports(ports.map_err(error)?, place.io.clone());
        let (model, handles) = made.map_err(error)?;
        for (end, handle) in self.ends.iter().zip(handles) {
            end.connect(handle, &place.io).map_err(error)?;
        }
        Ok(Box::new(model))
    }

    fn end(&self) {
        self.ends.iter().for_each(HostEnd::end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_json(json: &str) -> Result<(), String> {
        let config = Config::from_json(json).map_err(|e| e.to_string())?;
        check(&config).map(drop).map_err(|e| e.to_string())
    }

    #[test]
    fn words_are_checked() {
        let port = PortConfig::from_flag("name=a.b,to=unix:/run/p").unwrap();
        assert_eq!(port.to, ConsoleConfig::Unix("/run/p".into()));
        for bad in ["name=a", "to=off", "name=a,to=tty", "name=a,to=off,x"] {
            assert!(PortConfig::from_flag(bad).is_err(), "{bad}");
        }
        check_json(r#"{"console":"off","virtio_console":"stdio"}"#).unwrap();
        let twice = check_json(r#"{"virtio_console":"stdio"}"#).unwrap_err();
        assert!(twice.contains("one console's only"), "{twice}");
        for (ports, says) in [
            (r#"[{"name":"","to":"off"}]"#, "cannot be a port's name"),
            (r#"[{"name":"a b","to":"off"}]"#, "cannot be a port's name"),
            (
                r#"[{"name":"a","to":"off"},{"name":"a","to":"off"}]"#,
                "two ports are called a",
            ),
        ] {
            let error = check_json(&format!(r#"{{"ports":{ports}}}"#)).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
    }
}
