//! The watchdog: what is done about a guest that is hung.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::BadDevice;
use crate::options::{Options, OptionsError, parse};

const ID: &str = "watchdog";

/// A watchdog that the guest may use: an Intel 6300ESB's, of which Linux knows as `i6300esb`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct WatchdogConfig {
    /// Whether the guest has one.
    pub enabled: bool,
    /// What happens when the guest has enabled it and does not reload it in time; default: reset.
    pub action: Option<OnWatchdog>,
}

/// What happens when the watchdog finds the guest hung.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OnWatchdog {
    /// As if the guest had reset itself: see `on_reset`.
    #[default]
    Reset,
    /// The VM ends with exit status 5.
    Exit,
    /// The VM is paused, for somebody to look at it.
    Pause,
    /// Nothing but the event `watchdog` on the control socket.
    Notify,
}

impl std::str::FromStr for OnWatchdog {
    type Err = &'static str;
    fn from_str(word: &str) -> Result<Self, Self::Err> {
        match word {
            "reset" => Ok(Self::Reset),
            "exit" => Ok(Self::Exit),
            "pause" => Ok(Self::Pause),
            "notify" => Ok(Self::Notify),
            _ => Err("write reset, exit, pause or notify"),
        }
    }
}

impl WatchdogConfig {
    /// Reads `on`, `off` or `on,action=reset|exit|pause|notify`.
    pub(crate) fn from_flag(argument: &str) -> Result<Self, OptionsError> {
        let options = Options::new(argument);
        let enabled = match &*options.value {
            "on" => true,
            "off" => false,
            _ => return Err(options.bad_first("write on or off")),
        };
        let mut action = None;
        options.each("action", |key, value| {
            let known = key == "action";
            if known {
                action = Some(parse(value)?);
            }
            Ok(known)
        })?;
        Ok(Self { enabled, action })
    }

    /// What is to be done, if the guest has a watchdog.
    pub(crate) fn check(&self) -> Result<Option<OnWatchdog>, BadDevice> {
        match (self.enabled, self.action) {
            (true, action) => Ok(Some(action.unwrap_or_default())),
            (false, None) => Ok(None),
            (false, Some(_)) => Err(BadDevice::new(
                ID,
                "action has no effect while the device is off; remove it",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_read_and_checked() {
        let check = |flag| WatchdogConfig::from_flag(flag).unwrap().check();
        assert_eq!(check("on").unwrap(), Some(OnWatchdog::Reset));
        assert_eq!(check("on,action=pause").unwrap(), Some(OnWatchdog::Pause));
        assert_eq!(check("off").unwrap(), None);
        assert!(check("off,action=exit").is_err());
        for (flag, says) in [
            ("yes", "write on or off"),
            ("on,action=panic", "write reset, exit, pause or notify"),
            ("on,timeout=3", "`timeout`"),
        ] {
            let error = WatchdogConfig::from_flag(flag).unwrap_err().to_string();
            assert!(error.contains(says), "{flag}: {error}");
        }
    }
}
