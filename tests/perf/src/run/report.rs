//! The table, for people (Markdown) and for scripts (JSON).

use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::Measured;

/// A row: what, how much, and what it may be.
struct Row {
    what: String,
    value: f64,
    unit: &'static str,
    bar: Option<f64>,
}

fn least(values: impl Iterator<Item = f64>) -> f64 {
    values.fold(f64::INFINITY, f64::min)
}

fn rows(measured: &Measured) -> Vec<Row> {
    let row = |what: &str, value: f64, unit, bar| Row {
        what: what.to_owned(),
        value,
        unit,
        bar,
    };
    let mut all = vec![row(
        "`testudo run … echo`: exec to first output",
        least(measured.echo.iter().map(|run| run.first_output)),
        "ms",
        Some(400.0),
    )];
    for (name, ms) in &measured.phases {
        all.push(row(&format!("a start, of it: {name}"), *ms, "ms", None));
    }
    let idle = &measured.idle;
    let host = idle.cli_kib + idle.supervisor_kib + idle.vmm_kib;
    all.extend([
        row(
            "`testudo run … echo`: exec to end",
            least(measured.echo.iter().map(|run| run.end)),
            "ms",
            None,
        ),
        row(
            "`testudo exec … true`",
            least(measured.exec.iter().copied()),
            "ms",
            None,
        ),
        row(
            "guest RAM touched, idle",
            idle.guest_ram_kib as f64,
            "KiB",
            Some(40.0 * 1024.0),
        ),
        row("PSS of the CLI, attached", idle.cli_kib as f64, "KiB", None),
        row(
            "PSS of the supervisor",
            idle.supervisor_kib as f64,
            "KiB",
            None,
        ),
        row(
            "PSS of the VMM without guest RAM",
            idle.vmm_kib as f64,
            "KiB",
            None,
        ),
        row("PSS of all three", host as f64, "KiB", Some(8.0 * 1024.0)),
    ]);
    all
}

fn markdown(measured: &Measured) -> Result<String> {
    let mut text = format!("\nHost: {}.\n\n", measured.machine);
    text.push_str("| what | | unit | bar | |\n|---|--:|---|--:|---|\n");
    for row in rows(measured) {
        let bar = row
            .bar
            .map_or_else(String::new, |bar| format!("≤ {bar:.0}"));
        let kept = match row.bar {
            None => "",
            Some(bar) if row.value <= bar => "kept",
            Some(_) => "**missed**",
        };
        let digits = usize::from(row.unit == "ms");
        writeln!(
            text,
            "| {} | {:.digits$} | {} | {bar} | {kept} |",
            row.what, row.value, row.unit
        )?;
    }
    Ok(text)
}

pub(crate) fn write(measured: &Measured, out: &Path) -> Result<()> {
    fs::create_dir_all(out).with_context(|| format!("cannot create {}", out.display()))?;
    let text = markdown(measured)?;
    let json = serde_json::to_string_pretty(measured)?;
    for (name, text) in [("run.json", &json), ("run.md", &text)] {
        let path = out.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    print!("{text}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Idle;
    use crate::testudo::Timed;
    use testudo_perf::machine::Machine;

    #[test]
    fn the_quickest_run_counts_and_bars_are_limits() {
        let run = |first_output: f64| Timed {
            first_output,
            end: first_output + 50.0,
        };
        let mut measured = Measured {
            machine: Machine::read(None),
            echo: vec![run(450.0), run(399.0)],
            phases: vec![("guest".to_owned(), 160.0)],
            exec: vec![30.0, 28.0],
            idle: Idle {
                cli_kib: 1000,
                supervisor_kib: 3000,
                vmm_kib: 4193,
                guest_ram_kib: 38000,
            },
        };
        let text = markdown(&measured).unwrap();
        assert!(text.contains("| 399.0 | ms | ≤ 400 | kept |"), "{text}");
        assert!(
            text.contains("| 8193 | KiB | ≤ 8192 | **missed** |"),
            "{text}"
        );
        measured.echo = vec![run(400.1)];
        assert!(
            markdown(&measured)
                .unwrap()
                .contains("| 400.1 | ms | ≤ 400 | **missed** |")
        );
    }
}
