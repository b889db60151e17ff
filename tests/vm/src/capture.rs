//! What a child process writes, kept as it comes, for tests that wait for a word of it.

use std::io::Read;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// One stream. A thread of its own fills it until the writer is gone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Capture {
    shared: Arc<(Mutex<State>, Condvar)>,
}

#[derive(Debug, Default)]
struct State {
    bytes: Vec<u8>,
    ended: bool,
}

impl Capture {
    /// Reads `from` to its end, beginning after `delay`.
    pub(crate) fn start(from: impl Read + Send + 'static, delay: Duration) -> Capture {
        let capture = Capture::default();
        let filling = capture.clone();
        std::thread::spawn(move || {
            std::thread::sleep(delay);
            filling.fill(from);
        });
        capture
    }

    /// A stream that is not captured: nothing, and its end.
    pub(crate) fn empty() -> Capture {
        let capture = Capture::default();
        capture.lock().ended = true;
        capture
    }

    fn fill(&self, mut from: impl Read) {
        let mut chunk = [0; 4096];
        loop {
            // A pty answers EIO, and not the end of file, once its other side is closed.
            let length = from.read(&mut chunk).unwrap_or(0);
            let mut state = self.lock();
            state.bytes.extend(&chunk[..length]);
            state.ended = length == 0;
            self.shared.1.notify_all();
            if length == 0 {
                return;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes so far.
    pub(crate) fn len(&self) -> usize {
        self.lock().bytes.len()
    }

    /// All so far, without carriage returns; what is not UTF-8 is replaced.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.lock().bytes).replace('\r', "")
    }

    /// The last lines.
    pub(crate) fn tail(&self, lines: usize) -> String {
        let text = self.text();
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// Waits until `text` has come `times` times. False when the stream ended or time is over.
    pub(crate) fn wait_for(&self, text: &str, times: usize, limit: Duration) -> bool {
        self.wait(limit, |state| count(&state.bytes, text.as_bytes()) >= times)
    }

    /// Waits for the end of the stream.
    pub(crate) fn wait_end(&self, limit: Duration) -> bool {
        self.wait(limit, |state| state.ended)
    }

    fn wait(&self, limit: Duration, done: impl Fn(&State) -> bool) -> bool {
        let deadline = Instant::now() + limit;
        let mut state = self.lock();
        loop {
            if done(&state) {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || state.ended {
                return false;
            }
            let waited = self.shared.1.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

fn count(bytes: &[u8], text: &[u8]) -> usize {
    bytes.windows(text.len()).filter(|w| *w == text).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn waiting_ends_by_the_word_by_the_end_and_by_time() {
        let (reader, mut writer) = std::io::pipe().unwrap();
        let capture = Capture::start(reader, Duration::ZERO);
        writer.write_all(b"one two\r\ntwo").unwrap();
        assert!(capture.wait_for("two", 2, Duration::from_secs(5)));
        assert!(!capture.wait_for("three", 1, Duration::from_millis(20)));
        assert!(!capture.wait_end(Duration::from_millis(20)));
        drop(writer);
        assert!(capture.wait_end(Duration::from_secs(5)));
        assert!(!capture.wait_for("three", 1, Duration::from_secs(60)));
        assert_eq!(capture.text(), "one two\ntwo");
        assert_eq!(capture.tail(1), "two");
    }
}
