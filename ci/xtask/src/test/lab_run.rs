//! One batch in one lab, and in further ones when a lab fails.

use std::io::{self, Write};

use testudo_lab::{Kit, LabError, LabSpec, Streams};

use crate::lab;

/// A command that came to its end.
pub struct Ran {
    pub status: i32,
    /// Its stdout.
    pub said: String,
}

/// Runs it, showing what it says. When the lab itself fails, and only then, again in a fresh one,
/// in up to `labs_at_most` of them.
pub fn run_in_lab(
    labs: &Kit,
    spec: &LabSpec,
    batch: &str,
    labs_at_most: u32,
) -> Result<Ran, LabError> {
    for _ in 1..labs_at_most {
        match once(labs, spec) {
            Err(error) if error.is_of_the_lab() => {
                println!(
                    "-- batch {batch}: the lab itself failed; once more in a fresh one: {error}"
                );
            }
            other => return other,
        }
    }
    once(labs, spec)
}

fn once(labs: &Kit, spec: &LabSpec) -> Result<Ran, LabError> {
    let (mut out, mut err) = (Echo::default(), io::stderr());
    let streams = Streams {
        out: &mut out,
        err: &mut err,
        stdin: None,
    };
    let outcome = testudo_lab::run(labs, spec, lab::environment(spec), streams)?;
    Ok(Ran {
        status: outcome.status,
        said: String::from_utf8_lossy(&out.said).into_owned(),
    })
}

/// Shows what is written, a whole line at a time for labs beside this one, and keeps it.
#[derive(Default)]
struct Echo {
    said: Vec<u8>,
    shown: usize,
}

impl Echo {
    fn show(&mut self, end: usize) -> io::Result<()> {
        let lines = self.said.get(self.shown..end).unwrap_or_default();
        let shown = io::stdout().write_all(lines);
        self.shown = end;
        shown
    }
}

impl Write for Echo {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.said.extend_from_slice(data);
        if let Some(last) = self.said.iter().rposition(|b| *b == b'\n') {
            self.show(last.saturating_add(1).max(self.shown))?;
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stdout().flush()
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        // What came without a line's end.
        let _ = self.show(self.said.len());
    }
}
