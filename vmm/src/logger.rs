//! Log lines on stderr, in local order and without a dependency on the time zone.

use std::io::Write;
use std::sync::OnceLock;
use std::time::Instant;

use log::{LevelFilter, Log, Metadata, Record};

struct Stderr;

static STARTED: OnceLock<Instant> = OnceLock::new();

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let at = STARTED.get().map_or(0.0, |s| s.elapsed().as_secs_f64());
        // One write a line, so that lines of several threads do not mix.
        let line = format!(
            "[{at:>11.6}] {} {}: {}\r\n",
            record.level(),
            record.target(),
            record.args()
        );
        let _ = std::io::stderr().write_all(line.as_bytes());
    }

    fn flush(&self) {}
}

/// Sends everything up to `level` to stderr from now on.
pub(crate) fn install(level: LevelFilter) {
    let _ = STARTED.set(Instant::now());
    if log::set_logger(&Stderr).is_ok() {
        log::set_max_level(level);
    }
}
