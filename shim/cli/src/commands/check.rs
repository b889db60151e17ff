//! `testudo check`: can this machine run pods, and if not, what is to be done.
//!
//! Every finding is looked at, none guessed: files are opened, and a guest is run.

mod findings;
mod trial;

use std::process::ExitCode;

use super::say;
use crate::args::CheckArgs;
use crate::config::{Config, Sources, load};
pub(crate) use findings::{Finding, Verdict};

pub(super) fn check(args: &CheckArgs) -> anyhow::Result<ExitCode> {
    let mut all = Vec::new();
    let config = match load(&Sources::of_process()) {
        Ok((config, layers)) => {
            let said = format!("{} keys are set", layers.len());
            all.push(Finding::good("configuration", &said));
            config
        }
        Err(e) => {
            let remedy = "correct it; `testudo config explain` lists all keys";
            all.push(Finding::bad("configuration", &e.to_string(), remedy));
            Config::default()
        }
    };
    all.extend(findings::parts(&config));
    all.extend(findings::kvm());
    all.extend(findings::rest(&config));
    let ready = all.iter().all(|finding| finding.verdict != Verdict::Bad);
    if !args.no_guest {
        all.push(match ready {
            true => trial::guest(&config),
            false => Finding::bad(
                "guest",
                "not tried, for something it needs is missing",
                "see above",
            ),
        });
    }
    let good = all.iter().all(|finding| finding.verdict != Verdict::Bad);
    if args.json {
        say(&serde_json::to_string_pretty(
            &serde_json::json!({"able": good, "findings": all}),
        )?)?;
    } else {
        for finding in &all {
            say(&finding.line())?;
        }
        say(if good {
            "This machine can run pods."
        } else {
            "This machine cannot run pods yet."
        })?;
    }
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
