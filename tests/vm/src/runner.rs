//! Running a batch: each test on a thread of its own, under a time limit, one after the other.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use crate::batch::Test;
use crate::context::{Ctx, Images};
use crate::journal::{Journal, Standing};
use crate::junit::{self, Case};
use crate::outcome::{Outcome, Verdict};

/// Lines of each captured stream in the report of a failure.
const TAIL: usize = 40;
/// What a test gets to notice that its children are gone.
const GRACE: Duration = Duration::from_secs(10);

/// How a batch is run.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options<'a> {
    /// Only tests whose names contain this.
    pub filter: &'a str,
    /// Where the JUnit report goes.
    pub junit: Option<&'a Path>,
    /// What has run already and is not to be run again; this run is added to it.
    pub journal: Option<&'a Path>,
}

/// Runs the tests, reports, and says whether nothing failed.
pub fn run(
    batch: &str,
    tests: &[Test],
    images: &Images,
    options: Options<'_>,
) -> anyhow::Result<bool> {
    let mut journal = options.journal.map(Journal::open).transpose()?;
    let mut cases = Vec::new();
    for test in tests.iter().filter(|t| t.name.contains(options.filter)) {
        let case = match &mut journal {
            None => run_one(test, images),
            Some(journal) => match journal.standing(test) {
                // Reported when it ran.
                Standing::Done(case) => {
                    cases.push(*case);
                    continue;
                }
                Standing::Fatal => fatal(test),
                Standing::ToRun => {
                    journal.begin(test.name)?;
                    run_one(test, images)
                }
            },
        };
        report(&case);
        if let Some(journal) = &mut journal {
            journal.done(&case)?;
        }
        cases.push(case);
    }
    let count = |wanted: fn(&Verdict) -> bool| cases.iter().filter(|c| wanted(&c.verdict)).count();
    let failed = count(|v| matches!(v, Err(Outcome::Failed(_))));
    // Before the closing line, after which nobody waits for more.
    if let Some(path) = options.junit {
        std::fs::write(path, junit::xml(batch, &cases))
            .map_err(|e| anyhow::anyhow!("cannot write {}: {e}", path.display()))?;
    }
    println!(
        "{} passed, {failed} failed, {} skipped",
        count(Result::is_ok),
        count(|v| matches!(v, Err(Outcome::Skipped(_))))
    );
    Ok(failed == 0)
}

/// A test in which the lab died each time.
fn fatal(test: &Test) -> Case {
    let why = "the lab died while it ran, and again in a fresh one";
    Case {
        name: test.name,
        took: Duration::ZERO,
        verdict: Err(Outcome::Failed(why.to_owned())),
        output: String::new(),
    }
}

fn report(case: &Case) {
    let (name, seconds) = (case.name, case.took.as_secs_f64());
    match &case.verdict {
        Ok(()) => println!("PASS {name} ({seconds:.1} s)"),
        Err(Outcome::Skipped(why)) => println!("SKIP {name}: {why}"),
        Err(Outcome::Failed(why)) => {
            println!("FAIL {name}: {why} ({seconds:.1} s)");
            for line in case.output.lines() {
                println!("  | {line}");
            }
        }
    }
}

fn run_one(test: &Test, images: &Images) -> Case {
    let started = Instant::now();
    let (verdict, output) = match Ctx::new(images.clone()) {
        Ok(ctx) => {
            let ctx = Arc::new(ctx);
            let verdict = limited(test, &ctx);
            let output = match &verdict {
                Err(Outcome::Failed(_)) => ctx.tails(TAIL),
                _ => String::new(),
            };
            ctx.kill_children();
            (verdict, output)
        }
        Err(e) => (
            Err(Outcome::Failed(format!("no folder for the test: {e}"))),
            String::new(),
        ),
    };
    Case {
        name: test.name,
        took: started.elapsed(),
        verdict,
        output,
    }
}

/// The test's verdict, or that its time was over. Then its children are killed, which ends every wait
/// for them; a thread that goes on even so is left behind, and dies with the process.
fn limited(test: &Test, ctx: &Arc<Ctx>) -> Verdict {
    let (tell, told) = mpsc::channel();
    let (body, theirs) = (test.run, Arc::clone(ctx));
    std::thread::spawn(move || {
        let verdict = catch_unwind(AssertUnwindSafe(|| body(&theirs)));
        // Before telling: the folder goes with the last reference.
        drop(theirs);
        let _ = tell.send(verdict.unwrap_or_else(|panic| Err(Outcome::Failed(words(&*panic)))));
    });
    match told.recv_timeout(test.limit) {
        Ok(verdict) => verdict,
        Err(RecvTimeoutError::Disconnected) => {
            Err(Outcome::Failed("the test's thread was lost".into()))
        }
        Err(RecvTimeoutError::Timeout) => {
            let killed = ctx.kill_children();
            let _ = told.recv_timeout(GRACE);
            Err(Outcome::Failed(format!(
                "it took longer than {} s; {killed} child processes were killed",
                test.limit.as_secs_f64()
            )))
        }
    }
}

fn words(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic
        .downcast_ref::<&str>()
        .map(|s| (*s).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned());
    format!("it panicked: {}", text.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ensure;

    fn images() -> Images {
        Images {
            vmm: "/bin/sh".into(),
            ..Images::default()
        }
    }

    fn verdict(run: fn(&Ctx) -> Verdict, millis: u64) -> (Verdict, String) {
        let limit = Duration::from_millis(millis);
        let case = run_one(
            &Test {
                name: "t",
                run,
                limit,
            },
            &images(),
        );
        (case.verdict, case.output)
    }

    #[test]
    fn every_outcome_is_told_apart() {
        assert!(matches!(verdict(|_| Ok(()), 5000).0, Ok(())));
        let (skipped, _) = verdict(|_| Err(Outcome::Skipped("why".into())), 5000);
        assert!(matches!(skipped, Err(Outcome::Skipped(_))));
        let (panicked, _) = verdict(|_| panic!("oh {}", "no"), 5000);
        assert!(matches!(panicked, Err(Outcome::Failed(why)) if why == "it panicked: oh no"));
        let (erred, _) = verdict(
            |_| {
                std::fs::read("/nonexistent")
                    .map(drop)
                    .map_err(Outcome::from)
            },
            5000,
        );
        assert!(matches!(erred, Err(Outcome::Failed(why)) if why.contains("No such file")));
    }

    #[test]
    fn a_failure_shows_what_was_said() {
        let (failed, output) = verdict(
            |ctx| {
                let done = ctx
                    .vmm()
                    .args(["-c", "echo from inside; echo and this >&2"])
                    .run()?;
                ensure!(done.stdout.is_empty(), "it speaks");
                Ok(())
            },
            5000,
        );
        assert!(matches!(failed, Err(Outcome::Failed(why)) if why == "it speaks"));
        assert_eq!(output, "--- console\nfrom inside\n--- stderr\nand this\n");
    }

    #[test]
    fn a_test_that_hangs_is_ended_by_its_children() {
        let started = Instant::now();
        let (verdict, _) = verdict(
            |ctx| {
                let child = ctx.vmm().args(["-c", "exec sleep 1000"]).spawn()?;
                child.finish(Duration::from_secs(900)).map(drop)
            },
            300,
        );
        assert!(
            matches!(verdict, Err(Outcome::Failed(why)) if why.contains("1 child processes were killed"))
        );
        assert!(started.elapsed() < Duration::from_secs(8));
    }

    #[test]
    fn the_self_test_passes_and_is_reported() {
        let dir = tempfile::tempdir().unwrap();
        let report = dir.path().join("junit.xml");
        let tests = crate::batch::tests_of(crate::batch::SELF_TEST).unwrap();
        let options = Options {
            junit: Some(&report),
            ..Options::default()
        };
        assert!(run("self-test", &tests, &images(), options).unwrap());
        let xml = std::fs::read_to_string(&report).unwrap();
        assert!(xml.contains("failures=\"0\""), "{xml}");
        let failing = [Test {
            name: "f",
            run: |_| Err(Outcome::Failed("x".into())),
            limit: Duration::from_secs(1),
        }];
        assert!(!run("self-test", &failing, &images(), Options::default()).unwrap());
        let options = Options {
            filter: "another",
            ..Options::default()
        };
        assert!(run("self-test", &failing, &images(), options).unwrap());
    }

    #[test]
    fn what_is_in_the_journal_is_counted_and_not_run_again() {
        let dir = tempfile::tempdir().unwrap();
        let journal = dir.path().join("journal");
        let options = Options {
            journal: Some(&journal),
            ..Options::default()
        };
        let test = |run| {
            [Test {
                name: "once",
                run,
                limit: Duration::from_secs(5),
            }]
        };
        assert!(run("b", &test(|_| Ok(())), &images(), options).unwrap());
        let changed = test(|_| Err(Outcome::Failed("ran again".into())));
        assert!(run("b", &changed, &images(), options).unwrap());
        let text = std::fs::read_to_string(&journal).unwrap();
        assert_eq!(text.lines().count(), 2, "{text}");
    }
}
