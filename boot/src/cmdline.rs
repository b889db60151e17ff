//! The kernel command line.
//!
//! Policy: printable ASCII and spaces. A NUL would end the line early, a newline or another
//! control character is a mistake in somebody's quoting, and a byte beyond ASCII means something
//! else to each reader. Line ends around the text are dropped, as `cat cmdline` adds one.

use std::fmt;

use linux_loader::cmdline as loader;
use thiserror::Error;

/// Longest line this crate carries, terminator included. What a kernel takes is in its image and
/// is checked at load; no Linux takes more than this.
const CAPACITY: usize = 4096;

/// Divides arguments of the kernel from those of init.
const SEPARATOR: &str = "--";

/// A command line is not acceptable.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum CmdlineError {
    /// A character that is not printable ASCII.
    #[error(
        "the kernel command line has {found:?} at byte {offset}; only printable ASCII and spaces are allowed"
    )]
    Character {
        /// The character.
        found: char,
        /// Its offset in bytes.
        offset: usize,
    },
    /// Longer than any kernel takes.
    #[error("the kernel command line has {size} bytes and the limit is {limit}; shorten it")]
    TooLong {
        /// Bytes of the line, without the terminator.
        size: usize,
        /// Most bytes allowed.
        limit: usize,
    },
    /// A double quote without its partner: what is added later would end up inside.
    #[error("the kernel command line has a double quote without its partner: {text}")]
    Quote {
        /// The text.
        text: Box<str>,
    },
    /// Arguments for init, but none for the kernel before the `--`.
    #[error("the kernel command line begins with `--`; put a kernel parameter before it")]
    NoKernelArguments,
    /// A `--` in what is to be added to the kernel's arguments.
    #[error("`--` cannot be added to a kernel command line; give it with the line itself")]
    Separator,
}

/// A checked command line: kernel arguments and, after ` -- `, arguments for init.
#[derive(Clone)]
pub struct Cmdline {
    line: loader::Cmdline,
    /// `line` as text, kept in step with it.
    text: Box<str>,
}

impl Cmdline {
    /// Checks `text`.
    pub fn new(text: &str) -> Result<Self, CmdlineError> {
        let text = check(text)?;
        let too_long = |_| CmdlineError::TooLong {
            size: text.len(),
            limit: CAPACITY.saturating_sub(1),
        };
        let mut line = loader::Cmdline::new(CAPACITY).map_err(too_long)?;
        let (kernel, init) = split(text);
        if !kernel.is_empty() {
            line.insert_str(kernel).map_err(too_long)?;
        }
        if !init.is_empty() {
            line.insert_init_args(init).map_err(too_long)?;
        }
        Self::wrap(line)
    }

    /// Adds `parameters` after the kernel arguments that are there, before those for init. The
    /// kernel lets the last of equal parameters win.
    pub fn append(&mut self, parameters: &str) -> Result<(), CmdlineError> {
        let parameters = check(parameters)?;
        if words(parameters).any(|(_, word)| word == SEPARATOR) {
            return Err(CmdlineError::Separator);
        }
        if parameters.is_empty() {
            return Ok(());
        }
        let mut line = self.line.clone();
        line.insert_str(parameters)
            .map_err(|_| CmdlineError::TooLong {
                size: self
                    .text
                    .len()
                    .saturating_add(1)
                    .saturating_add(parameters.len()),
                limit: CAPACITY.saturating_sub(1),
            })?;
        *self = Self::wrap(line)?;
        Ok(())
    }

    /// Adds `parameter` (`key` or `key=value`) unless the line sets the same key already: a default
    /// that yields to the user.
    pub fn append_default(&mut self, parameter: &str) -> Result<(), CmdlineError> {
        let key = parameter.split('=').next().unwrap_or(parameter);
        if self.has(key) {
            return Ok(());
        }
        self.append(parameter)
    }

    /// Whether a kernel argument with this key is there. The kernel takes `-` and `_` for equal.
    pub fn has(&self, key: &str) -> bool {
        let same = |a: char, b: char| a == b || (matches!(a, '-' | '_') && matches!(b, '-' | '_'));
        words(split(&self.text).0).any(|(_, word)| {
            let word = word.split('=').next().unwrap_or(word).trim_matches('"');
            word.len() == key.len() && word.chars().zip(key.chars()).all(|(a, b)| same(a, b))
        })
    }

    /// The line, without terminator.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The line as the kernel reads it, terminator included.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.text.len().saturating_add(1));
        bytes.extend_from_slice(self.text.as_bytes());
        bytes.push(0);
        bytes
    }

    fn wrap(line: loader::Cmdline) -> Result<Self, CmdlineError> {
        let text = line
            .as_cstring()
            .ok()
            .and_then(|text| text.into_string().ok())
            .ok_or(CmdlineError::NoKernelArguments)?;
        Ok(Self {
            line,
            text: text.into(),
        })
    }
}

impl fmt::Debug for Cmdline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.text, f)
    }
}

impl fmt::Display for Cmdline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// The text without white space around it.
fn check(text: &str) -> Result<&str, CmdlineError> {
    let text = text.trim_matches(|c: char| c.is_ascii_whitespace());
    if let Some((offset, found)) = text.char_indices().find(|(_, c)| !matches!(c, ' '..='~')) {
        return Err(CmdlineError::Character { found, offset });
    }
    let quotes = text.bytes().filter(|b| *b == b'"').count();
    if !quotes.is_multiple_of(2) {
        return Err(CmdlineError::Quote { text: text.into() });
    }
    Ok(text)
}

/// Arguments of the kernel and those of init.
fn split(text: &str) -> (&str, &str) {
    let separator = words(text).find(|(_, word)| *word == SEPARATOR);
    let parts = separator.and_then(|(at, word)| {
        let init = text.get(at.checked_add(word.len())?..)?;
        Some((text.get(..at)?, init))
    });
    let (kernel, init) = parts.unwrap_or((text, ""));
    (kernel.trim(), init.trim())
}

/// Splits as the kernel does, at spaces outside double quotes; each word with its offset.
fn words(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut quoted = false;
    let mut offset = 0usize;
    text.split(move |c: char| {
        quoted ^= c == '"';
        c == ' ' && !quoted
    })
    .map(move |word| {
        let at = offset;
        offset = offset.saturating_add(word.len()).saturating_add(1);
        (at, word)
    })
    .filter(|(_, word)| !word.is_empty())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn defaults_yield_and_go_before_init_arguments() {
        let mut line = Cmdline::new("console=hvc0 dyndbg=\"a panic=9 b\" -- reboot=t\n").unwrap();
        line.append_default("console=ttyS0").unwrap();
        line.append_default("reboot=t").unwrap();
        line.append_default("panic=-1").unwrap();
        line.append_default("tsc_early-khz").unwrap();
        line.append_default("tsc-early_khz=5").unwrap();
        assert_eq!(
            line.as_str(),
            "console=hvc0 dyndbg=\"a panic=9 b\" reboot=t panic=-1 tsc_early-khz -- reboot=t"
        );
        assert_eq!(Cmdline::new("").unwrap().to_bytes(), [0]);
    }

    #[test]
    fn the_separator_stays_where_the_user_put_it() {
        let mut line = Cmdline::new("quiet  --").unwrap();
        line.append("panic=1").unwrap();
        assert_eq!(line.as_str(), "quiet panic=1");
        let mut line = Cmdline::new("quiet --  a -- b").unwrap();
        line.append("panic=1").unwrap();
        assert_eq!(line.as_str(), "quiet panic=1 -- a -- b");
        assert_eq!(line.append("x -- y").unwrap_err(), CmdlineError::Separator);
        assert_eq!(
            Cmdline::new("-- sh").unwrap_err(),
            CmdlineError::NoKernelArguments
        );
        assert!(matches!(
            Cmdline::new("a=\"b c"),
            Err(CmdlineError::Quote { .. })
        ));
    }

    #[test]
    fn what_is_refused_is_named() {
        let error = Cmdline::new("quiet\0init=/evil").unwrap_err();
        assert_eq!(
            error,
            CmdlineError::Character {
                found: '\0',
                offset: 5
            }
        );
        assert!(Cmdline::new("a\nb").is_err());
        assert!(Cmdline::new("caf\u{e9}").is_err());
        assert!(Cmdline::new(&"x".repeat(4095)).is_ok());
        assert_eq!(
            Cmdline::new(&"x".repeat(4096)).unwrap_err(),
            CmdlineError::TooLong {
                size: 4096,
                limit: 4095
            }
        );
        let mut full = Cmdline::new(&"x".repeat(4090)).unwrap();
        assert_eq!(
            full.append("12345").unwrap_err(),
            CmdlineError::TooLong {
                size: 4096,
                limit: 4095
            }
        );
        assert_eq!(full.as_str().len(), 4090);
    }

    proptest! {
        #[test]
        fn a_line_is_printable_and_short(text in ".{0,200}", more in "[ -~]{0,200}") {
            if let Ok(mut line) = Cmdline::new(&text) {
                let before = line.clone();
                if line.append(&more).is_err() {
                    prop_assert_eq!(line.as_str(), before.as_str());
                }
                prop_assert!(line.as_str().bytes().all(|b| (b' '..=b'~').contains(&b)));
                let bytes = line.to_bytes();
                prop_assert_eq!(bytes.iter().position(|&b| b == 0), Some(bytes.len() - 1));
            }
        }
    }
}
