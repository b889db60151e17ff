//! `testudo attach`.

use std::process::ExitCode;

use super::{Context, complain};
use crate::args::AttachArgs;
use crate::launch::connect;
use crate::link::Ask;
use crate::session::{Ended, Session, outputs};
use crate::state::find;

pub(super) fn attach(context: &Context, args: &AttachArgs) -> anyhow::Result<ExitCode> {
    let entry = find(&context.directories, &args.pod)?;
    let link = connect(&entry, &context.directories)?;
    let stdin = entry.pod.process.stdin && !args.no_stdin;
    let keys = args
        .detach_keys
        .clone()
        .unwrap_or_else(|| context.config.terminal_detach_keys.clone());
    let terminal = entry.pod.process.terminal;
    // Without its terminal in raw mode this command's signals are its own.
    let session = Session {
        stdin,
        terminal,
        signals: terminal && stdin,
        keys: keys.0,
    };
    let signals = session.take_signals()?;
    link.ask(
        &Ask::Attach {
            owner: false,
            stdin,
        },
        &outputs(),
    )?;
    Ok(match session.run(&link, signals)? {
        Ended::Detached => ExitCode::SUCCESS,
        Ended::Exited { code, why } => {
            if let Some(why) = why {
                complain(&format!("{}: {why}", entry.pod.name));
            }
            ExitCode::from(code)
        }
        Ended::Failed { why, code } => {
            complain(&why);
            ExitCode::from(code)
        }
        Ended::Lost => {
            let _ = crate::state::list(&context.directories);
            complain(&format!("{}: its supervisor was killed", entry.pod.name));
            ExitCode::from(125)
        }
    })
}
