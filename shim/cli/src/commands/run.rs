//! `testudo run`.

use std::process::ExitCode;

use anyhow::{Context as _, ensure};

use testudo_image::PullPolicy;

use super::{Context, complain, say};
use crate::args::{Pull, RunArgs};
use crate::launch::{Launched, launch};
use crate::link::{Ask, Tell};
use crate::session::{Ended, Session, outputs};

/// As Docker has it: the container was not to blame.
const OURS: u8 = 125;

pub(super) fn run(context: &Context, args: &RunArgs) -> anyhow::Result<ExitCode> {
    match try_run(context, args) {
        Ok(code) => Ok(ExitCode::from(code)),
        Err(e) => {
            complain(&format!("{e:#}"));
            Ok(ExitCode::from(OURS))
        }
    }
}

fn try_run(context: &Context, args: &RunArgs) -> anyhow::Result<u8> {
    ensure!(
        !args.tty || !args.interactive || args.detach || crate::terminal::is_input(),
        "-t with -i needs a terminal for input; leave -t out where input comes from a file or a pipe"
    );
    let policy = match args.pull {
        Pull::Missing => PullPolicy::Missing,
        Pull::Always => PullPolicy::Always,
        Pull::Never => PullPolicy::Never,
    };
    let image = crate::image::open(&args.image, &context.config, policy)?;
    let pod = crate::plan::plan(args, &image, &context.config, &context.directories)?;
    let keys = args
        .detach_keys
        .clone()
        .unwrap_or_else(|| context.config.terminal_detach_keys.clone());
    let session = Session {
        stdin: args.interactive,
        terminal: args.tty,
        signals: !args.detach,
        keys: keys.0,
    };
    let signals = session.take_signals().context("cannot take signals")?;
    let mut launched = launch(&pod, &context.directories)?;
    if args.detach {
        return detached(&mut launched, &pod.id);
    }
    let attach = Ask::Attach {
        owner: true,
        stdin: args.interactive,
    };
    launched
        .link
        .ask(&attach, &outputs())
        .context("cannot reach the supervisor")?;
    let ended = session
        .run(&launched.link, signals)
        .context("cannot stay attached")?;
    let code = match ended {
        Ended::Detached => return Ok(0),
        Ended::Exited { code, why } => {
            if let Some(why) = why {
                complain(&format!("{}: {why}", pod.name));
            }
            code
        }
        Ended::Failed { why, code } => {
            complain(&why);
            code
        }
        Ended::Lost => {
            complain(&format!("{}: its supervisor was killed", pod.name));
            OURS
        }
    };
    launched.reap()?;
    if code == OURS {
        // If the supervisor could not tidy up, this does.
        let _ = crate::state::list(&context.directories);
    }
    Ok(code)
}

/// Until it runs, or does not.
fn detached(launched: &mut Launched, id: &str) -> anyhow::Result<u8> {
    loop {
        match launched.link.told().context("cannot hear the supervisor")? {
            Some(Tell::Started) => {
                launched.link.ask(&Ask::Detach, &[])?;
                say(id)?;
                return Ok(0);
            }
            Some(Tell::Failed { why, code }) => {
                complain(&why);
                return Ok(code);
            }
            Some(Tell::Exited { .. }) => {
                say(id)?;
                return Ok(0);
            }
            Some(Tell::Taken | Tell::Done | Tell::Refused { .. }) => {}
            None => anyhow::bail!(
                "the supervisor ended without a word; `testudo ps -a` says what became of it"
            ),
        }
    }
}
