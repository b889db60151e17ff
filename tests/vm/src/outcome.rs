//! What comes of a test that does not simply pass.

/// Not passed.
#[derive(Debug)]
pub enum Outcome {
    /// It was tested, and it does not hold.
    Failed(String),
    /// It could not be tested here.
    Skipped(String),
}

/// The result of a test function.
pub type Verdict<T = ()> = Result<T, Outcome>;

impl<E: std::error::Error> From<E> for Outcome {
    fn from(error: E) -> Outcome {
        let mut text = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            text = format!("{text}: {cause}");
            source = cause.source();
        }
        Outcome::Failed(text)
    }
}

/// Fails the test unless the condition holds; the rest of the arguments say what was found.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($what:tt)+) => {
        if !$condition {
            return Err($crate::Outcome::Failed(format!($($what)+)));
        }
    };
}
