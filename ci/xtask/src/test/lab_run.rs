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
    let (mut out, mut err) = (Echo(Vec::new()), io::stderr());
    let streams = Streams {
        out: &mut out,
        err: &mut err,
        stdin: None,
    };
    let outcome = testudo_lab::run(labs, spec, lab::environment(spec), streams)?;
    Ok(Ran {
        status: outcome.status,
        said: String::from_utf8_lossy(&out.0).into_owned(),
    })
}

/// Shows what is written and keeps it.
struct Echo(Vec<u8>);

impl Write for Echo {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.extend_from_slice(data);
        io::stdout().write_all(data)?;
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stdout().flush()
    }
}
