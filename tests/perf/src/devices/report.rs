//! The table, for people (Markdown) and for scripts (JSON).

use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;
use testudo_perf::machine::Machine;

use crate::bars::{Comparison, comparisons};
use crate::kit::Kit;
use crate::session::{Ran, Row};

/// Everything measured.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    machine: Machine,
    ran: Vec<Ran>,
}

#[derive(Serialize)]
struct Whole<'a> {
    #[serde(flatten)]
    report: &'a Report,
    comparisons: Vec<Comparison>,
}

impl Report {
    pub(crate) fn new(kit: &Kit) -> Report {
        Report {
            machine: Machine::read(kit.qemu.as_deref()),
            ran: Vec::new(),
        }
    }

    pub(crate) fn add(&mut self, ran: Ran) {
        self.ran.push(ran);
    }

    pub(crate) fn write(&self, out: &Path) -> Result<()> {
        let whole = Whole {
            report: self,
            comparisons: comparisons(&self.ran),
        };
        let json = serde_json::to_string_pretty(&whole).context("a report is JSON")?;
        for (name, text) in [("devices.json", json), ("devices.md", self.markdown())] {
            let path = out.join(name);
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }

    pub(crate) fn markdown(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = self.table(&mut text);
        let _ = self.failures(&mut text);
        text
    }

    fn table(&self, text: &mut String) -> std::fmt::Result {
        writeln!(text, "\nHost: {}.\n", self.machine)?;
        writeln!(
            text,
            "| step | ours | beside | unit | ours | theirs | ratio | bar | | ours per CPU s | theirs per CPU s | ratio |\n\
             |---|---|---|---|--:|--:|--:|--:|---|--:|--:|--:|"
        )?;
        for c in comparisons(&self.ran) {
            let verdict = match c.kept {
                Some(true) => "kept",
                Some(false) => "**missed**",
                None => "not measured",
            };
            let theirs = c.theirs.as_ref();
            writeln!(
                text,
                "| {} | {} | {} | {} | {} | {} | {} | {} | {verdict} | {} | {} | {} |",
                c.step,
                c.ours.case.name(),
                theirs.map_or("", |t| t.case.name()),
                c.unit,
                amount(Some(c.ours.rate)),
                amount(theirs.map(|t| t.rate)),
                ratio(c.ratio),
                if c.bar > 100.0 {
                    format!("≤ {}", amount(Some(c.bar)))
                } else {
                    format!("≥ {:.1}", c.bar)
                },
                amount(c.ours.per_cpu_second),
                amount(theirs.and_then(|t| t.per_cpu_second)),
                ratio(c.cpu_ratio),
            )?;
        }
        Ok(())
    }

    fn failures(&self, text: &mut String) -> std::fmt::Result {
        for ran in &self.ran {
            if let Some(failure) = &ran.failure {
                writeln!(text, "\n{}: {failure}", ran.case.name())?;
            }
        }
        Ok(())
    }
}

/// Three digits or more.
fn amount(value: Option<f64>) -> String {
    match value {
        None => String::new(),
        Some(v) if v < 10.0 => format!("{v:.2}"),
        Some(v) if v < 100.0 => format!("{v:.1}"),
        Some(v) => format!("{v:.0}"),
    }
}

fn ratio(value: Option<f64>) -> String {
    value.map_or_else(String::new, |v| format!("{v:.2}"))
}

/// One row as it comes in.
pub(crate) fn line(row: &Row) -> String {
    format!(
        "{}, {}: {} ({} per CPU second); {:.2} s, of it VMM {:.3} s, guest {:.2} s",
        row.case.name(),
        row.step,
        amount(Some(row.rate)),
        amount(row.per_cpu_second),
        row.elapsed_s,
        row.vmm_cpu_s,
        row.guest_cpu_s
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_have_three_digits() {
        let all = [1.234, 12.34, 123.4, 12345.6].map(|v| amount(Some(v)));
        assert_eq!(all, ["1.23", "12.3", "123", "12346"]);
        assert_eq!(amount(None), "");
    }
}
