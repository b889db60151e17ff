//! What has run so far, on disk: a batch that loses its lab goes on in a fresh one where it stopped.
//!
//! One JSON object a line: `{"begun":NAME}` before a test, `{"done":…}` after it. A test that was begun
//! and not done had its lab die under it; it gets a second chance, and after that counts as failed.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::batch::Test;
use crate::junit::Case;
use crate::outcome::{Outcome, Verdict};

/// Labs that a test may lose before it is held to be the reason.
const CHANCES: u32 = 2;

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Line {
    Begun(String),
    Done(Done),
}

#[derive(Serialize, Deserialize)]
struct Done {
    name: String,
    seconds: f64,
    failed: Option<String>,
    skipped: Option<String>,
    output: String,
}

/// The journal of one batch.
pub(crate) struct Journal {
    file: File,
    begun: BTreeMap<String, u32>,
    done: BTreeMap<String, Done>,
}

/// Where a test stands.
pub(crate) enum Standing {
    /// It has to run.
    ToRun,
    /// It has run, in an earlier lab.
    Done(Box<Case>),
    /// It took every lab with it.
    Fatal,
}

impl Journal {
    /// Reads what is there, and goes on after it.
    pub(crate) fn open(path: &Path) -> io::Result<Journal> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(e),
        };
        let mut journal = Journal {
            file: OpenOptions::new().create(true).append(true).open(path)?,
            begun: BTreeMap::new(),
            done: BTreeMap::new(),
        };
        // The last line may have been cut off together with the lab.
        for line in text.lines().filter_map(|l| serde_json::from_str(l).ok()) {
            match line {
                Line::Begun(name) => *journal.begun.entry(name).or_default() += 1,
                Line::Done(done) => drop(journal.done.insert(done.name.clone(), done)),
            }
        }
        if !text.is_empty() && !text.ends_with('\n') {
            journal.file.write_all(b"\n")?;
        }
        Ok(journal)
    }

    /// Is there anything to do for this test?
    pub(crate) fn standing(&self, test: &Test) -> Standing {
        if let Some(done) = self.done.get(test.name) {
            return Standing::Done(Box::new(Case {
                name: test.name,
                took: Duration::from_secs_f64(done.seconds),
                verdict: done.verdict(),
                output: done.output.clone(),
            }));
        }
        if self
            .begun
            .get(test.name)
            .is_some_and(|times| *times >= CHANCES)
        {
            return Standing::Fatal;
        }
        Standing::ToRun
    }

    /// Before a test runs.
    pub(crate) fn begin(&mut self, name: &str) -> io::Result<()> {
        self.write(&Line::Begun(name.to_owned()))
    }

    /// After it has run.
    pub(crate) fn done(&mut self, case: &Case) -> io::Result<()> {
        let (failed, skipped) = match &case.verdict {
            Ok(()) => (None, None),
            Err(Outcome::Failed(why)) => (Some(why.clone()), None),
            Err(Outcome::Skipped(why)) => (None, Some(why.clone())),
        };
        self.write(&Line::Done(Done {
            name: case.name.to_owned(),
            seconds: case.took.as_secs_f64(),
            failed,
            skipped,
            output: case.output.clone(),
        }))
    }

    /// On the other side of the lab's file system, at once.
    fn write(&mut self, line: &Line) -> io::Result<()> {
        let mut bytes = serde_json::to_vec(line)?;
        bytes.push(b'\n');
        self.file.write_all(&bytes)?;
        self.file.sync_data()
    }
}

impl Done {
    fn verdict(&self) -> Verdict {
        match (&self.failed, &self.skipped) {
            (Some(why), _) => Err(Outcome::Failed(why.clone())),
            (_, Some(why)) => Err(Outcome::Skipped(why.clone())),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn test(name: &'static str) -> Test {
        Test::new(name, |_| Ok(()))
    }

    #[test]
    fn a_second_lab_goes_on_where_the_first_stopped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let mut first = Journal::open(&path).unwrap();
        for (name, verdict) in [("a", Ok(())), ("b", Err(Outcome::Failed("why".into())))] {
            first.begin(name).unwrap();
            let took = Duration::from_millis(1500);
            first
                .done(&Case {
                    name,
                    took,
                    verdict,
                    output: "said".into(),
                })
                .unwrap();
        }
        first.begin("c").unwrap();
        drop(first);
        // The lab dies in the middle of a line.
        let mut cut = OpenOptions::new().append(true).open(&path).unwrap();
        cut.write_all(b"{\"done\":{\"na").unwrap();

        let mut second = Journal::open(&path).unwrap();
        assert!(
            matches!(second.standing(&test("a")), Standing::Done(case) if case.verdict.is_ok())
        );
        assert!(matches!(second.standing(&test("b")), Standing::Done(case)
            if matches!(&case.verdict, Err(Outcome::Failed(why)) if why == "why") && case.output == "said"));
        assert!(matches!(second.standing(&test("c")), Standing::ToRun));
        assert!(matches!(second.standing(&test("d")), Standing::ToRun));
        second.begin("c").unwrap();
        drop(second);
        let third = Journal::open(&path).unwrap();
        assert!(matches!(third.standing(&test("c")), Standing::Fatal));
    }
}
