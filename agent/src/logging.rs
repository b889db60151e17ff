//! Where the agent's words go: as PID 1 into the kernel's log, which the console shows and dmesg keeps;
//! as a service to standard error.

use std::fs::File;
use std::io::Write;

use log::{Level, LevelFilter, Log, Metadata, Record};

struct Sink {
    kernel: Option<File>,
}

impl Log for Sink {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        // One write is one record of the kernel's.
        let line = match self.kernel {
            Some(_) => format!(
                "<{}>testudo-agent: {}\n",
                priority(record.level()),
                record.args()
            ),
            None => format!("testudo-agent: {}: {}\n", record.level(), record.args()),
        };
        // If even that fails there is nobody to tell.
        let _ = match &self.kernel {
            Some(kernel) => (&*kernel).write_all(line.as_bytes()),
            None => std::io::stderr().write_all(line.as_bytes()),
        };
    }

    fn flush(&self) {}
}

/// syslog(2), with the facility of daemons.
fn priority(level: Level) -> u8 {
    let severity = match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    };
    (3 << 3) | severity
}

/// Called once, first.
pub(crate) fn begin(init: bool, level: LevelFilter) {
    let kernel = init
        .then(|| File::options().write(true).open("/dev/kmsg").ok())
        .flatten();
    if log::set_boxed_logger(Box::new(Sink { kernel })).is_ok() {
        log::set_max_level(level);
    }
}
