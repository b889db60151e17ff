//! `VALUE,key=value,flag` arguments of the command line. A comma within a value is written twice, as for QEMU.

use std::borrow::Cow;

use thiserror::Error;

/// An argument of the form `VALUE,key=value,flag`.
#[derive(Debug)]
pub(crate) struct Options<'a> {
    argument: &'a str,
    pub(crate) value: Cow<'a, str>,
    rest: Vec<(Cow<'a, str>, Option<Cow<'a, str>>)>,
}

/// The parts between single commas; of two commas one is left.
fn parts(argument: &str) -> Vec<Cow<'_, str>> {
    let mut all = Vec::new();
    let mut rest = argument;
    let mut from = 0_usize;
    while let Some(comma) = rest.get(from..).and_then(|text| text.find(',')) {
        let at = from.saturating_add(comma);
        let (before, behind) = rest.split_at(at);
        let behind = behind.strip_prefix(',').unwrap_or_default();
        if behind.starts_with(',') {
            from = at.saturating_add(2);
            continue;
        }
        all.push(before);
        rest = behind;
        from = 0;
    }
    all.push(rest);
    let single = |part: &'_ str| -> Cow<'_, str> { part.replace(",,", ",").into() };
    all.into_iter()
        .map(|part| {
            if part.contains(',') {
                single(part)
            } else {
                part.into()
            }
        })
        .collect()
}

fn key_and_value(part: Cow<'_, str>) -> (Cow<'_, str>, Option<Cow<'_, str>>) {
    match part {
        Cow::Borrowed(text) => match text.split_once('=') {
            Some((key, value)) => (key.into(), Some(value.into())),
            None => (text.into(), None),
        },
        Cow::Owned(text) => match text.split_once('=') {
            Some((key, value)) => (key.to_owned().into(), Some(value.to_owned().into())),
            None => (text.into(), None),
        },
    }
}

/// An argument cannot be read.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum OptionsError {
    /// A key nobody knows.
    #[error("`{key}` in `{argument}` is not known here; known are {known}")]
    Unknown {
        /// The key.
        key: String,
        /// The whole argument.
        argument: String,
        /// What would do.
        known: &'static str,
    },
    /// A value that does not fit its key.
    #[error("`{key}={value}` in `{argument}`: {why}")]
    Value {
        /// The key.
        key: String,
        /// Its value.
        value: String,
        /// The whole argument.
        argument: String,
        /// What is wrong with it.
        why: String,
    },
    /// Something that cannot be left out.
    #[error("`{argument}`: {why}")]
    Missing {
        /// The whole argument.
        argument: String,
        /// What to add.
        why: String,
    },
    /// The first part does not fit.
    #[error("`{value}` in `{argument}`: {why}")]
    First {
        /// The first part.
        value: String,
        /// The whole argument.
        argument: String,
        /// What is wrong with it.
        why: String,
    },
}

impl<'a> Options<'a> {
    pub(crate) fn new(argument: &'a str) -> Self {
        let mut parts = parts(argument).into_iter();
        let value = parts.next().unwrap_or_default();
        let rest = parts.map(key_and_value).collect();
        Self {
            argument,
            value,
            rest,
        }
    }

    /// The first part will not do.
    pub(crate) fn bad_first(&self, why: &str) -> OptionsError {
        OptionsError::First {
            value: self.value.clone().into_owned(),
            argument: self.argument.to_owned(),
            why: why.to_owned(),
        }
    }

    /// A key is not there that must be.
    pub(crate) fn missing(&self, why: &str) -> OptionsError {
        OptionsError::Missing {
            argument: self.argument.to_owned(),
            why: why.to_owned(),
        }
    }

    /// An argument that is all keys, without a first part of its own.
    pub(crate) fn keys(argument: &'a str) -> Self {
        let mut options = Self::new(argument);
        let first = std::mem::take(&mut options.value);
        options.rest.insert(0, key_and_value(first));
        options
    }

    /// The first part, read by `FromStr`.
    pub(crate) fn first<T: std::str::FromStr>(&self) -> Result<T, OptionsError>
    where
        T::Err: std::fmt::Display,
    {
        self.value
            .parse()
            .map_err(|e: T::Err| self.bad_first(&e.to_string()))
    }

    /// Calls `f` for each key; `f` answers whether it knew the key.
    pub(crate) fn each(
        &self,
        known: &'static str,
        mut f: impl FnMut(&str, Option<&str>) -> Result<bool, String>,
    ) -> Result<(), OptionsError> {
        for (key, value) in &self.rest {
            let known_here = f(key, value.as_deref()).map_err(|why| OptionsError::Value {
                key: key.clone().into_owned(),
                value: value.clone().unwrap_or_default().into_owned(),
                argument: self.argument.to_owned(),
                why,
            })?;
            if !known_here {
                return Err(OptionsError::Unknown {
                    key: key.clone().into_owned(),
                    argument: self.argument.to_owned(),
                    known,
                });
            }
        }
        Ok(())
    }
}

/// Reads the value of a key; a key without one is an error.
pub(crate) fn parse<T: std::str::FromStr>(value: Option<&str>) -> Result<T, String>
where
    T::Err: std::fmt::Display,
{
    value
        .ok_or_else(|| "a value is missing".to_owned())?
        .parse()
        .map_err(|e: T::Err| e.to_string())
}

/// Reads a switch: alone or `on` is true, `off` is false.
pub(crate) fn switch(value: Option<&str>) -> Result<bool, String> {
    match value {
        None | Some("on") => Ok(true),
        Some("off") => Ok(false),
        Some(_) => Err("write on or off".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(argument: &str) -> Vec<(String, Option<String>)> {
        let mut all = Vec::new();
        Options::keys(argument)
            .each("", |key, value| {
                all.push((key.to_owned(), value.map(str::to_owned)));
                Ok(true)
            })
            .unwrap();
        all
    }

    #[test]
    fn a_comma_written_twice_belongs_to_the_value() {
        let pair = |key: &str, value: &str| (key.to_owned(), Some(value.to_owned()));
        let ro = ("ro".to_owned(), None);
        assert_eq!(read("path=a,ro"), [pair("path", "a"), ro.clone()]);
        assert_eq!(read("path=a,,b,ro"), [pair("path", "a,b"), ro.clone()]);
        assert_eq!(read("path=,,,ro"), [pair("path", ","), ro.clone()]);
        assert_eq!(read("ro,path=a,,,,=b,,"), [ro, pair("path", "a,,=b,")]);
        assert_eq!(Options::new("a,,b,c=d").value, "a,b");
    }
}
