//! The entropy device.

use std::fs::File;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use virtio_devices::{Entropy, RateLimit, Rng, VirtioModel};

use super::{BadDevice, DeviceError, DeviceSpec, HostContext, OpenDevice, Place};
use crate::options::{Options, OptionsError, parse};
use crate::spec::{ByteSize, Source};

/// The entropy device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RngConfig {
    /// Whether the guest has one.
    pub enabled: bool,
    /// Where entropy comes from; default: the host kernel's getrandom(2).
    pub source: Option<Source>,
    /// At most this many bytes a second; default: no limit.
    pub bytes_per_second: Option<ByteSize>,
}

impl Default for RngConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            source: None,
            bytes_per_second: None,
        }
    }
}

impl RngConfig {
    /// Reads `on`, `off` or `on,source=FILE,rate=BYTES_PER_SECOND`.
    pub(crate) fn from_flag(argument: &str) -> Result<Self, OptionsError> {
        let options = Options::new(argument);
        let enabled = match &*options.value {
            "on" => true,
            "off" => false,
            _ => return Err(options.bad_first("write on or off")),
        };
        let mut rng = Self {
            enabled,
            ..Self::default()
        };
        options.each("source and rate", |key, value| {
            match key {
                "source" => rng.source = Some(parse(value)?),
                "rate" => rng.bytes_per_second = Some(parse(value)?),
                _ => return Ok(false),
            }
            Ok(true)
        })?;
        Ok(rng)
    }

    pub(super) fn check(&self) -> Result<Option<RngSpec>, BadDevice> {
        let bad = |why: &str| Err(BadDevice::new(ID, why));
        if !self.enabled {
            return match (&self.source, self.bytes_per_second) {
                (None, None) => Ok(None),
                (Some(_), _) => bad("source has no effect while the device is off; remove it"),
                (None, Some(_)) => {
                    bad("bytes_per_second has no effect while the device is off; remove it")
                }
            };
        }
        if self.bytes_per_second == Some(ByteSize(0)) {
            return bad(
                "0 bytes a second would never give the guest anything; leave the rate out, or turn the device off",
            );
        }
        Ok(Some(RngSpec {
            source: self.source.clone(),
            bytes_per_second: self.bytes_per_second.map(|r| r.0),
        }))
    }
}

const ID: &str = "rng";

#[derive(Debug, Clone)]
pub(super) struct RngSpec {
    source: Option<Source>,
    bytes_per_second: Option<u64>,
}

impl DeviceSpec for RngSpec {
    fn kind(&self) -> &'static str {
        "virtio-rng"
    }
    fn id(&self) -> &str {
        ID
    }
    fn sources(&self) -> Vec<&Source> {
        self.source.iter().collect()
    }
    fn open(&self, _host: &HostContext) -> Result<Box<dyn OpenDevice>, DeviceError> {
        let source = self.source.as_ref().map(|s| s.open("rng source"));
        let source = source.transpose().map_err(|e| DeviceError::new(self, e))?;
        Ok(Box::new(OpenRng {
            spec: self.clone(),
            source,
        }))
    }
}

struct OpenRng {
    spec: RngSpec,
    source: Option<File>,
}

impl OpenDevice for OpenRng {
    fn model(&self, place: &Place<'_>) -> Result<Box<dyn VirtioModel>, DeviceError> {
        let error = |e| DeviceError::new(&self.spec, e);
        let entropy = match &self.source {
            None => Entropy::Host,
            Some(file) => Entropy::File(file.try_clone().map_err(error)?),
        };
        // A second's worth at once: a guest that seeds itself at boot does not wait for the rate.
        let rate = self.spec.bytes_per_second;
        let limit = rate.and_then(|rate| RateLimit::new(rate, rate));
        let rng = Rng::new(entropy, limit, place.io.clone()).map_err(error)?;
        Ok(Box::new(rng))
    }
}
