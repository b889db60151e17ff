//! `VALUE,key=value,flag` arguments of the command line.

use thiserror::Error;

/// An argument of the form `VALUE,key=value,flag`.
#[derive(Debug)]
pub(crate) struct Options<'a> {
    argument: &'a str,
    pub(crate) value: &'a str,
    rest: Vec<(&'a str, Option<&'a str>)>,
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
        let mut parts = argument.split(',');
        let value = parts.next().unwrap_or_default();
        let rest = parts
            .map(|part| match part.split_once('=') {
                Some((key, value)) => (key, Some(value)),
                None => (part, None),
            })
            .collect();
        Self {
            argument,
            value,
            rest,
        }
    }

    /// The first part will not do.
    pub(crate) fn bad_first(&self, why: &str) -> OptionsError {
        OptionsError::First {
            value: self.value.to_owned(),
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
        let first = match first.split_once('=') {
            Some((key, value)) => (key, Some(value)),
            None => (first, None),
        };
        options.rest.insert(0, first);
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
            let known_here = f(key, *value).map_err(|why| OptionsError::Value {
                key: (*key).to_owned(),
                value: value.unwrap_or_default().to_owned(),
                argument: self.argument.to_owned(),
                why,
            })?;
            if !known_here {
                return Err(OptionsError::Unknown {
                    key: (*key).to_owned(),
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
