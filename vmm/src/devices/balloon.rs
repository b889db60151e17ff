//! The balloon.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use virtio_devices::{Balloon, BalloonLink, BalloonOptions, VirtioModel};

use super::{
    Adjust, AdjustError, BALLOON, BadDevice, DeviceError, DeviceSpec, HostContext, OpenDevice,
    Place,
};
use crate::options::{Options, OptionsError, parse, switch};
use crate::spec::{ByteSize, MemoryConfig};

/// What the protocol counts in.
const PAGE: u64 = 4096;
/// What a guest reports: Linux's pageblocks have 2 MiB.
const REPORTED: u64 = 2 << 20;

/// The balloon: memory that the guest does without goes back to the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BalloonConfig {
    /// Whether the guest has one.
    pub enabled: bool,
    /// What it takes from the guest at start; default: nothing.
    pub size: Option<ByteSize>,
    /// The guest takes memory back from it when it has no other.
    pub deflate_on_oom: bool,
    /// The guest tells of its memory every so many seconds; default: it does not.
    pub stats_seconds: Option<u32>,
    /// The guest reports what is free, which goes back to the host at once. Default: yes, unless
    /// memory is prefaulted or in hugepages, which is to have it at hand.
    pub reporting: Option<bool>,
}

impl Default for BalloonConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            size: None,
            deflate_on_oom: true,
            stats_seconds: None,
            reporting: None,
        }
    }
}

impl BalloonConfig {
    /// Reads `on`, `off`, or `[on,]size=BYTES,deflate-on-oom=on|off,stats=SECONDS,reporting=on|off`.
    pub(crate) fn from_flag(argument: &str) -> Result<Self, OptionsError> {
        let plain = Options::new(argument);
        let (enabled, options) = match &*plain.value.clone() {
            "on" => (true, plain),
            "off" => (false, plain),
            keys if keys.contains('=') => (true, Options::keys(argument)),
            _ => return Err(plain.bad_first("write on, off or size=BYTES")),
        };
        let mut balloon = Self {
            enabled,
            ..Self::default()
        };
        options.each("size, deflate-on-oom, stats and reporting", |key, value| {
            match key {
                "size" => balloon.size = Some(parse(value)?),
                "deflate-on-oom" => balloon.deflate_on_oom = switch(value)?,
                "stats" => balloon.stats_seconds = Some(parse(value)?),
                "reporting" => balloon.reporting = Some(switch(value)?),
                _ => return Ok(false),
            }
            Ok(true)
        })?;
        Ok(balloon)
    }

    pub(super) fn check(&self, memory: &MemoryConfig) -> Result<Option<BalloonSpec>, BadDevice> {
        let bad = |why: String| Err(BadDevice::new(BALLOON, why));
        if !self.enabled {
            let off = Self {
                enabled: false,
                ..Self::default()
            };
            return match *self == off {
                true => Ok(None),
                false => bad("its settings have no effect while it is off; remove them".into()),
            };
        }
        let page = memory.hugepages.map_or(PAGE, |page| page.0);
        let at_hand = memory.hugepages.is_some() || memory.prefault.is_some();
        let reporting = self.reporting.unwrap_or(!at_hand);
        if reporting && page > REPORTED {
            return bad(format!(
                "guests report less than a hugepage of {}, so nothing would go back; leave reporting out",
                ByteSize(page)
            ));
        }
        if self.stats_seconds == Some(0) {
            return bad("statistics every 0 seconds; write 1 or more, or leave them out".into());
        }
        let most = memory.max.map_or(memory.size.0, |max| max.0);
        let spec = BalloonSpec {
            size: self.size.map_or(0, |s| s.0),
            most,
            options: BalloonOptions {
                deflate_on_oom: self.deflate_on_oom,
                stats: self.stats_seconds.map(|s| Duration::from_secs(s.into())),
                reporting,
                page,
            },
        };
        match spec.refuse(spec.size) {
            Some(why) => bad(format!("size={why}")),
            None => Ok(Some(spec)),
        }
    }
}

#[derive(Debug, Clone)]
pub(super) struct BalloonSpec {
    size: u64,
    /// All the memory there may be.
    most: u64,
    options: BalloonOptions,
}

impl BalloonSpec {
    /// Why the balloon cannot take `bytes`.
    fn refuse(&self, bytes: u64) -> Option<String> {
        if bytes >= self.most {
            return Some(format!(
                "{}: the guest has no more than {}; leave it some",
                ByteSize(bytes),
                ByteSize(self.most)
            ));
        }
        (!bytes.is_multiple_of(PAGE)).then(|| {
            format!(
                "{}: a balloon is filled in steps of {}",
                ByteSize(bytes),
                ByteSize(PAGE)
            )
        })
    }
}

impl DeviceSpec for BalloonSpec {
    fn kind(&self) -> &'static str {
        "virtio-balloon"
    }

    fn id(&self) -> &str {
        BALLOON
    }

    fn open(&self, _host: &HostContext) -> Result<Box<dyn OpenDevice>, DeviceError> {
        Ok(Box::new(OpenBalloon {
            spec: self.clone(),
            state: Mutex::new(State {
                size: self.size,
                link: None,
            }),
        }))
    }
}

struct OpenBalloon {
    spec: BalloonSpec,
    /// Only the control thread comes by.
    state: Mutex<State>,
}

struct State {
    /// What was asked for last; a guest that boots again is asked for the same.
    size: u64,
    /// To the present board's model.
    link: Option<BalloonLink>,
}

impl OpenDevice for OpenBalloon {
    fn model(&self, place: &Place<'_>) -> Result<Box<dyn VirtioModel>, DeviceError> {
        let error = |e: std::io::Error| DeviceError::new(&self.spec, e);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let link = BalloonLink::new(state.size).map_err(error)?;
        state.link = Some(link.clone());
        let balloon = Balloon::new(self.spec.options, link, place.io.clone()).map_err(error)?;
        Ok(Box::new(balloon))
    }

    fn adjust(&self, what: &Adjust) -> Result<(), AdjustError> {
        let Adjust::Balloon(bytes) = what else {
            return Err(AdjustError::Unsupported(what.verb()));
        };
        if let Some(why) = self.spec.refuse(*bytes) {
            return Err(AdjustError::Value(why));
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.size = *bytes;
        if let Some(link) = &state.link {
            link.request(*bytes);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(flag: &str, memory: &MemoryConfig) -> Result<Option<BalloonSpec>, String> {
        let config = BalloonConfig::from_flag(flag).map_err(|e| e.to_string())?;
        config.check(memory).map_err(|e| e.to_string())
    }

    #[test]
    fn flags_read() {
        let config = BalloonConfig::from_flag("size=64M,deflate-on-oom=off,stats=5").unwrap();
        let on = BalloonConfig::from_flag("on,size=64M,deflate-on-oom=off,stats=5").unwrap();
        assert_eq!(config, on);
        assert_eq!(config.size, Some(ByteSize(64 << 20)));
        assert!(!config.deflate_on_oom);
        assert_eq!(config.stats_seconds, Some(5));
        assert!(!BalloonConfig::from_flag("off").unwrap().enabled);
        assert_eq!(
            BalloonConfig::from_flag("on").unwrap(),
            BalloonConfig::default()
        );
    }

    #[test]
    fn what_has_no_effect_or_cannot_be_is_refused() {
        let memory = MemoryConfig::default();
        for (flag, says) in [
            ("maybe", "write on, off or size=BYTES"),
            ("off,size=1M", "no effect while it is off"),
            ("size=256M", "no more than 256M; leave it some"),
            ("size=4097", "in steps of 4K"),
            ("stats=0", "every 0 seconds"),
            ("hinting=on", "`hinting` in `hinting=on` is not known"),
        ] {
            let error = check(flag, &memory).unwrap_err();
            assert!(error.contains(says), "{flag}: {error}");
        }
        let huge = MemoryConfig {
            size: ByteSize(2 << 30),
            hugepages: Some(ByteSize(1 << 30)),
            ..MemoryConfig::default()
        };
        let error = check("reporting=on", &huge).unwrap_err();
        assert!(error.contains("hugepage of 1G"), "{error}");
    }

    #[test]
    fn reports_are_on_where_memory_is_not_to_be_at_hand() {
        let reports =
            |flag, memory: &MemoryConfig| check(flag, memory).unwrap().unwrap().options.reporting;
        let plain = MemoryConfig::default();
        assert!(reports("on", &plain));
        assert!(!reports("reporting=off", &plain));
        let prefaulted = MemoryConfig {
            prefault: Some(0),
            ..MemoryConfig::default()
        };
        assert!(!reports("on", &prefaulted));
        assert!(reports("reporting=on", &prefaulted));
    }
}
