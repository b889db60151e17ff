//! The report for machines: one `testsuite` in JUnit's XML.

use std::fmt::Write;
use std::time::Duration;

use crate::outcome::{Outcome, Verdict};

/// One test that has run.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) took: Duration,
    pub(crate) verdict: Verdict,
    /// What was captured, for a failed test.
    pub(crate) output: String,
}

/// The suite's XML.
pub(crate) fn xml(batch: &str, cases: &[Case]) -> String {
    let failed = cases
        .iter()
        .filter(|c| matches!(c.verdict, Err(Outcome::Failed(_))));
    let skipped = cases
        .iter()
        .filter(|c| matches!(c.verdict, Err(Outcome::Skipped(_))));
    let took: Duration = cases.iter().map(|c| c.took).sum();
    let mut xml = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuite name=\"vm.{}\" tests=\"{}\" failures=\"{}\" skipped=\"{}\" time=\"{:.3}\">\n",
        escaped(batch),
        cases.len(),
        failed.count(),
        skipped.count(),
        took.as_secs_f64()
    );
    for case in cases {
        let (name, time) = (escaped(case.name), case.took.as_secs_f64());
        let _ = write!(
            xml,
            "  <testcase classname=\"vm.{}\" name=\"{name}\" time=\"{time:.3}\"",
            escaped(batch)
        );
        match &case.verdict {
            Ok(()) => xml.push_str("/>\n"),
            Err(Outcome::Failed(why)) => {
                let output = escaped(&case.output);
                let _ = writeln!(
                    xml,
                    ">\n    <failure message=\"{}\">{output}</failure>\n  </testcase>",
                    escaped(why)
                );
            }
            Err(Outcome::Skipped(why)) => {
                let _ = writeln!(
                    xml,
                    ">\n    <skipped message=\"{}\"/>\n  </testcase>",
                    escaped(why)
                );
            }
        }
    }
    xml.push_str("</testsuite>\n");
    xml
}

/// Text for an attribute or an element. XML has no way to write most control characters.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\n' => out.push_str("&#10;"),
            '\t' => out.push(c),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_suite_counts_and_escapes() {
        let case = |name, verdict| Case {
            name,
            took: Duration::from_millis(1500),
            verdict,
            output: "a < b\x1b[0m\n".into(),
        };
        let xml = xml(
            "boot",
            &[
                case("one", Ok(())),
                case("two", Err(Outcome::Failed("\"x\" & y".into()))),
                case("three", Err(Outcome::Skipped("no KVM".into()))),
            ],
        );
        assert!(
            xml.contains("tests=\"3\" failures=\"1\" skipped=\"1\" time=\"4.500\""),
            "{xml}"
        );
        assert!(
            xml.contains("message=\"&quot;x&quot; &amp; y\">a &lt; b\u{fffd}[0m&#10;</failure>")
        );
        assert!(xml.contains("<skipped message=\"no KVM\"/>"));
    }
}
