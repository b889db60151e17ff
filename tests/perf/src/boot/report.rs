//! The table, for people (Markdown) and for scripts (JSON).

use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;
use testudo_perf::machine::Machine;

use crate::bars::{self, QUOTED, ms};
use crate::kit::Kit;
use crate::measure::Row;

/// Everything measured.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    machine: Machine,
    rows: Vec<Row>,
}

impl Report {
    pub(crate) fn new(kit: &Kit, rows: Vec<Row>) -> Self {
        Self {
            machine: Machine::read(kit.qemu.as_deref()),
            rows,
        }
    }

    pub(crate) fn write(&self, out: &Path) -> Result<()> {
        let json = serde_json::to_string_pretty(self).context("a report is JSON")?;
        for (name, text) in [("boot.json", json), ("boot.md", self.markdown())] {
            let path = out.join(name);
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }

    pub(crate) fn markdown(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = self.table(&mut text);
        let _ = self.bars(&mut text);
        text
    }

    fn table(&self, text: &mut String) -> std::fmt::Result {
        writeln!(text, "\nHost: {}.\n", self.machine)?;
        writeln!(
            text,
            "| VMM | kernel | exec→first KVM_RUN | →kernel | →init | →exit | exec→exit | ratio | PSS KiB | binary KiB |\n\
             |---|---|--:|--:|--:|--:|--:|--:|--:|--:|"
        )?;
        for row in &self.rows {
            let Some(t) = row.times else {
                let why = row
                    .failure
                    .as_deref()
                    .unwrap_or("not measured")
                    .replace('|', "/");
                writeln!(
                    text,
                    "| {} | {} | {why} | | | | | | | |",
                    row.vmm, row.kernel
                )?;
                continue;
            };
            writeln!(
                text,
                "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
                row.vmm,
                row.kernel,
                ms(t.first_run),
                ms(t.kernel.saturating_sub(t.first_run)),
                ms(t.init.saturating_sub(t.kernel)),
                ms(t.exit.saturating_sub(t.init)),
                ms(t.exit),
                self.ratio(row).unwrap_or_default(),
                row.pss_kib.map_or_else(String::new, |kib| kib.to_string()),
                row.binary_bytes
                    .map_or_else(String::new, |b| (b / 1024).to_string()),
            )?;
        }
        let measured = |vmm: &str| {
            let mut names = self
                .rows
                .iter()
                .filter(|r| r.times.is_some())
                .map(|r| r.vmm);
            names.any(|name| vmm.starts_with(name))
        };
        for q in QUOTED.iter().filter(|q| !measured(q.vmm)) {
            writeln!(
                text,
                "| {} (quoted) | {} | {} | | | | {} | | | |",
                q.vmm, q.kernel, q.first_run, q.whole
            )?;
        }
        writeln!(
            text,
            "\nMilliseconds. `ratio`: exec→exit over testudo-vmm's with the same kernel. Quoted rows were not measured \
             here: Debian has no package of them; they are from a lab of the same kind."
        )
    }

    fn bars(&self, text: &mut String) -> std::fmt::Result {
        writeln!(text, "\n| bar | limit | measured | |\n|---|--:|--:|---|")?;
        for bar in bars::all(&self.rows) {
            let (measured, verdict) = match bar.measured {
                Some((measured, true)) => (measured, "kept"),
                Some((measured, false)) => (measured, "**missed**"),
                None => (String::new(), "not measured"),
            };
            writeln!(
                text,
                "| {} | {} | {measured} | {verdict} |",
                bar.what, bar.limit
            )?;
        }
        Ok(())
    }

    fn ratio(&self, row: &Row) -> Option<String> {
        let ours = self
            .rows
            .iter()
            .find(|r| r.vmm == "testudo-vmm" && r.kernel == row.kernel)?;
        let (theirs, ours) = (row.times?.exit, ours.times?.exit);
        let hundredths = theirs.checked_mul(100)?.checked_div(ours)?;
        Some(format!("{}.{:02}", hundredths / 100, hundredths % 100))
    }
}

/// One row as it comes in.
pub(crate) fn line(row: &Row) -> String {
    match (row.times, &row.failure) {
        (Some(t), failure) => format!(
            "{}, {}: first KVM_RUN {} kernel {} init {} exit {} ms, spread {}‰, PSS {} KiB{}",
            row.vmm,
            row.kernel,
            ms(t.first_run),
            ms(t.kernel),
            ms(t.init),
            ms(t.exit),
            row.spread_permille.unwrap_or(0),
            row.pss_kib
                .map_or_else(|| "?".to_owned(), |kib| kib.to_string()),
            failure
                .as_ref()
                .map_or_else(String::new, |f| format!(" ({f})")),
        ),
        (None, Some(failure)) => format!("{}, {}: FAILED: {failure}", row.vmm, row.kernel),
        (None, None) => format!("{}, {}: nothing measured", row.vmm, row.kernel),
    }
}
