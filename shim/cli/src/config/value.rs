//! Kinds of values.

use std::path::PathBuf;
use std::str::FromStr;

use toml::Value;

use crate::values::{Cpus, Detach, NetWord, Size};

/// Why a value cannot be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wrong(pub String);

/// A kind of value.
pub trait Setting: Sized {
    /// In words.
    const KIND: &'static str;
    /// As a file has it.
    fn from_toml(value: &Value) -> Result<Self, Wrong>;
    /// As the environment has it.
    fn from_text(text: &str) -> Result<Self, Wrong>;
    /// As a person reads it; nothing if it is not set.
    fn show(&self) -> Option<String>;
}

fn string(value: &Value, kind: &str) -> Result<String, Wrong> {
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Integer(number) => Ok(number.to_string()),
        Value::Float(number) => Ok(number.to_string()),
        other => Err(Wrong(format!(
            "a {} where {kind} belongs",
            other.type_str()
        ))),
    }
}

macro_rules! from_word {
    ($type:ty, $kind:literal, $show:expr) => {
        impl Setting for $type {
            const KIND: &'static str = $kind;
            fn from_toml(value: &Value) -> Result<Self, Wrong> {
                Self::from_text(&string(value, Self::KIND)?)
            }
            fn from_text(text: &str) -> Result<Self, Wrong> {
                <$type>::from_str(text).map_err(|e| Wrong(e.to_string()))
            }
            fn show(&self) -> Option<String> {
                let show: fn(&$type) -> String = $show;
                Some(show(self))
            }
        }
    };
}

from_word!(Size, "a size, as 512M", ToString::to_string);
from_word!(Cpus, "a number of CPUs, as 1.5", ToString::to_string);
from_word!(u64, "a number", ToString::to_string);
from_word!(String, "text", Clone::clone);
from_word!(Detach, "keys, as ctrl-p,ctrl-q", |keys| {
    let name = |byte: &u8| match byte {
        0..=0x1f => format!("ctrl-{}", char::from(byte | 0x60)),
        _ => char::from(*byte).to_string(),
    };
    keys.0.iter().map(name).collect::<Vec<_>>().join(",")
});
from_word!(NetWord, "none, user or tap=NAME", |net| match net {
    NetWord::None => "none".into(),
    NetWord::User => "user".into(),
    NetWord::Tap(name) => format!("tap={name}"),
});

impl Setting for PathBuf {
    const KIND: &'static str = "an absolute path";
    fn from_toml(value: &Value) -> Result<Self, Wrong> {
        match value {
            Value::String(text) => Self::from_text(text),
            other => Err(Wrong(format!(
                "a {} where a path belongs",
                other.type_str()
            ))),
        }
    }
    fn from_text(text: &str) -> Result<Self, Wrong> {
        let path = Self::from(text);
        path.is_absolute()
            .then_some(path)
            .ok_or_else(|| Wrong(format!("{text:?} is no absolute path")))
    }
    fn show(&self) -> Option<String> {
        Some(self.display().to_string())
    }
}

impl<T: Setting> Setting for Option<T> {
    const KIND: &'static str = T::KIND;
    fn from_toml(value: &Value) -> Result<Self, Wrong> {
        T::from_toml(value).map(Some)
    }
    fn from_text(text: &str) -> Result<Self, Wrong> {
        T::from_text(text).map(Some)
    }
    fn show(&self) -> Option<String> {
        self.as_ref().and_then(Setting::show)
    }
}

impl Setting for Vec<String> {
    const KIND: &'static str = "a list of texts";
    fn from_toml(value: &Value) -> Result<Self, Wrong> {
        let wrong = || {
            Wrong(format!(
                "a {} where {} belongs",
                value.type_str(),
                Self::KIND
            ))
        };
        let words = value.as_array().ok_or_else(wrong)?.iter();
        words
            .map(|word| word.as_str().map(str::to_owned))
            .collect::<Option<_>>()
            .ok_or_else(wrong)
    }
    /// Separated by spaces.
    fn from_text(text: &str) -> Result<Self, Wrong> {
        Ok(text.split_ascii_whitespace().map(str::to_owned).collect())
    }
    fn show(&self) -> Option<String> {
        (!self.is_empty()).then(|| self.join(" "))
    }
}
