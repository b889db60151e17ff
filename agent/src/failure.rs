//! Something that could not be done: the words for it and the kernel's answer.

use std::fmt;
use std::io;

use testudo_agent_protocol::code;

/// Why a request was not done.
#[derive(Debug)]
pub(crate) struct Failure {
    /// One of [`code`].
    pub(crate) code: i32,
    /// What was not done, or why; begins a sentence.
    pub(crate) what: String,
    /// The kernel's answer.
    pub(crate) source: Option<io::Error>,
}

impl Failure {
    /// The guest failed.
    pub(crate) fn new(what: impl Into<String>) -> Self {
        Self::of(code::INTERNAL, what)
    }

    /// The request's values cannot be.
    pub(crate) fn invalid(what: impl Into<String>) -> Self {
        Self::of(code::INVALID, what)
    }

    /// There is no such thing.
    pub(crate) fn not_found(what: impl Into<String>) -> Self {
        Self::of(code::NOT_FOUND, what)
    }

    /// Not in the present state.
    pub(crate) fn wrong_state(what: impl Into<String>) -> Self {
        Self::of(code::WRONG_STATE, what)
    }

    /// With a code.
    pub(crate) fn of(code: i32, what: impl Into<String>) -> Self {
        Self {
            code,
            what: what.into(),
            source: None,
        }
    }

    /// The number of the kernel's answer; 0 if it was not the kernel that refused.
    pub(crate) fn errno(&self) -> i32 {
        self.source
            .as_ref()
            .and_then(io::Error::raw_os_error)
            .unwrap_or_default()
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            Some(source) => write!(f, "cannot {}: {source}", self.what),
            None => f.write_str(&self.what),
        }
    }
}

impl std::error::Error for Failure {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|e| e as _)
    }
}

/// Says what was being done when the kernel refused.
pub(crate) trait During<T> {
    /// `what` completes "cannot …".
    fn during(self, what: impl FnOnce() -> String) -> Result<T, Failure>;
}

impl<T, E: Into<io::Error>> During<T> for Result<T, E> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T, Failure> {
        self.map_err(|source| Failure {
            code: code::INTERNAL,
            what: what(),
            source: Some(source.into()),
        })
    }
}
