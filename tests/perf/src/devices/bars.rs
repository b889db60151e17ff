//! Ours beside what it is compared with, and what that has to reach.

use serde::Serialize;

use crate::case::Case;
use crate::session::{Ran, Row};
use crate::steps::{self, IDLE, Step, Unit};

/// All devices configured, guest RAM left out.
const PSS_KIB: f64 = 5.0 * 1024.0;

/// One step under one pair of VMMs.
#[derive(Debug, Serialize)]
pub(crate) struct Comparison {
    pub(crate) step: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) ours: Row,
    pub(crate) theirs: Option<Row>,
    /// Ours by theirs; of memory theirs by ours. More is better.
    pub(crate) ratio: Option<f64>,
    /// The same of what is done in a second of the VMM's CPU time.
    pub(crate) cpu_ratio: Option<f64>,
    /// What the ratio has to reach, or for memory what ours may be.
    pub(crate) bar: f64,
    pub(crate) kept: Option<bool>,
}

/// Every step that both of a pair have taken.
pub(crate) fn comparisons(ran: &[Ran]) -> Vec<Comparison> {
    let rows = || ran.iter().flat_map(|r| &r.rows);
    let row = |case: Case, step: &str| rows().find(|r| r.case == case && r.step == step);
    let mut all = Vec::new();
    for theirs in ran.iter().map(|r| r.case) {
        let Some(ours) = theirs.compared_with() else {
            continue;
        };
        for step in steps::steps(theirs.group()) {
            if let Some(mine) = row(ours, step.name) {
                all.push(compare(step, mine, row(theirs, step.name)));
            }
        }
    }
    all
}

fn compare(step: &Step, ours: &Row, theirs: Option<&Row>) -> Comparison {
    let memory = step.unit == Unit::Kibibytes;
    let by = |mine: f64, other: f64| if memory { other / mine } else { mine / other };
    let ratio = theirs.map(|t| by(ours.rate, t.rate));
    let cpu_ratio = theirs.and_then(|t| Some(by(ours.per_cpu_second?, t.per_cpu_second?)));
    let bar = if step.name == IDLE { PSS_KIB } else { step.bar };
    let kept = if memory {
        Some(ours.rate <= bar)
    } else {
        ratio.map(|r| r >= bar)
    };
    Comparison {
        step: step.name,
        unit: step.unit.name(),
        ours: ours.clone(),
        theirs: theirs.cloned(),
        ratio,
        cpu_ratio,
        bar,
        kept,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::Group;

    fn row(case: Case, step: &'static str, rate: f64) -> Row {
        Row {
            case,
            step,
            rate,
            per_cpu_second: Some(rate * 2.0),
            elapsed_s: 1.0,
            vmm_cpu_s: 0.5,
            guest_cpu_s: 0.5,
        }
    }

    fn ran(case: Case, step: &'static str, rate: f64) -> Ran {
        Ran {
            case,
            rows: vec![row(case, step, rate)],
            hangs: 0,
            failure: None,
        }
    }

    #[test]
    fn a_bar_is_kept_from_its_value_on() {
        let step = steps::steps(Group::Blk)[2].name;
        for (rate, kept) in [(1200.0, true), (1190.0, false)] {
            let all = comparisons(&[
                ran(Case::Blk, step, rate),
                ran(Case::QemuBlkUring, step, 1000.0),
            ]);
            assert_eq!(all.len(), 1);
            assert_eq!(all[0].kept, Some(kept), "{all:?}");
        }
    }

    #[test]
    fn memory_is_better_when_it_is_less() {
        let all = comparisons(&[
            ran(Case::All, IDLE, 4000.0),
            ran(Case::QemuAll, IDLE, 40000.0),
        ]);
        assert_eq!((all[0].ratio, all[0].kept), (Some(10.0), Some(true)));
        let all = comparisons(&[
            ran(Case::All, IDLE, 6000.0),
            ran(Case::QemuAll, IDLE, 40000.0),
        ]);
        assert_eq!(all[0].kept, Some(false));
    }
}
