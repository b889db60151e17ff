//! `testudo stop`, `kill`, `rm`, `wait`, `pause`, `resume`.

use std::process::ExitCode;

use anyhow::{bail, ensure};

use super::{Context, each, say};
use crate::args::{KillArgs, PodsArgs, RmArgs, StopArgs};
use crate::launch::connect;
use crate::link::{Ask, Link, Tell};
use crate::state::{Entry, EventLog, Held, Phase, find, list};

pub(super) fn stop(context: &Context, args: &StopArgs) -> anyhow::Result<ExitCode> {
    let timeout_s = args.time.unwrap_or(context.config.stop_timeout);
    Ok(each(&args.pods.pods, |word| {
        let entry = find(&context.directories, word)?;
        if entry.state.phase != Phase::Exited {
            end(context, &entry, timeout_s)?;
        }
        Ok(say(word)?)
    }))
}

/// Asks it to end and waits until it has.
fn end(context: &Context, entry: &Entry, timeout_s: u64) -> anyhow::Result<()> {
    let link = match connect(entry, &context.directories) {
        Ok(link) => link,
        // Gone meanwhile.
        Err(_) if ended(context, entry) => return Ok(()),
        Err(e) => return Err(e),
    };
    link.ask(&Ask::Stop { timeout_s }, &[])?;
    await_end(context, &link, entry).map(drop)
}

fn ended(context: &Context, entry: &Entry) -> bool {
    find(&context.directories, &entry.pod.id)
        .map_or(true, |entry| entry.state.phase == Phase::Exited)
}

/// The exit code.
fn await_end(context: &Context, link: &Link, entry: &Entry) -> anyhow::Result<u8> {
    loop {
        match link.told()? {
            Some(Tell::Exited { code, .. } | Tell::Failed { code, .. }) => {
                // Its supervisor goes a moment later; then nothing of it is left.
                while link.told().is_ok_and(|told| told.is_some()) {}
                return Ok(code);
            }
            Some(Tell::Refused { why }) => bail!("{}: {why}", entry.pod.name),
            Some(Tell::Started | Tell::Taken | Tell::Done) => {}
            None => {
                // Repaired on the way.
                return match find(&context.directories, &entry.pod.id) {
                    Ok(entry) => Ok(entry.state.end.map_or(125, |end| end.code)),
                    Err(_) => Ok(125),
                };
            }
        }
    }
}

pub(super) fn kill(context: &Context, args: &KillArgs) -> anyhow::Result<ExitCode> {
    Ok(each(&args.pods.pods, |word| {
        let entry = find(&context.directories, word)?;
        ask(
            context,
            &entry,
            &Ask::Signal {
                signal: args.signal,
            },
        )?;
        Ok(say(word)?)
    }))
}

pub(super) fn pause(context: &Context, args: &PodsArgs, pause: bool) -> anyhow::Result<ExitCode> {
    Ok(each(&args.pods, |word| {
        let entry = find(&context.directories, word)?;
        ask(
            context,
            &entry,
            if pause { &Ask::Pause } else { &Ask::Resume },
        )?;
        Ok(say(word)?)
    }))
}

fn ask(context: &Context, entry: &Entry, ask: &Ask) -> anyhow::Result<()> {
    let link = connect(entry, &context.directories)?;
    link.ask(ask, &[])?;
    loop {
        match link.told()? {
            Some(Tell::Done) => return Ok(()),
            Some(Tell::Refused { why }) => bail!("{}: {why}", entry.pod.name),
            Some(Tell::Started | Tell::Taken) => {}
            // It ended of it.
            Some(Tell::Exited { .. } | Tell::Failed { .. }) => return Ok(()),
            None => bail!("{}: its supervisor was killed", entry.pod.name),
        }
    }
}

pub(super) fn rm(context: &Context, args: &RmArgs) -> anyhow::Result<ExitCode> {
    let pods: Vec<String> = if args.all {
        let ended = list(&context.directories)?
            .into_iter()
            .filter(|entry| entry.state.phase == Phase::Exited);
        ended.map(|entry| entry.pod.id).collect()
    } else {
        args.pods.clone()
    };
    Ok(each(&pods, |word| {
        let entry = find(&context.directories, word)?;
        if entry.state.phase != Phase::Exited {
            ensure!(
                args.force,
                "{} is {}; stop it first, or use --force",
                entry.pod.name,
                entry.state.words()
            );
            end(context, &entry, 0)?;
        }
        remove(context, &entry)?;
        Ok(say(word)?)
    }))
}

fn remove(context: &Context, entry: &Entry) -> anyhow::Result<()> {
    // The supervisor has told of its end and may not be gone yet.
    for _ in 0..2000 {
        if !entry.folder.exists() {
            return Ok(());
        }
        if let Some(_held) = Held::try_take(&entry.folder.join("lock"))? {
            std::fs::remove_dir_all(&entry.folder)?;
            let _ = std::fs::remove_dir_all(context.directories.sockets(&entry.pod.id));
            EventLog::of(context.directories.state()).add(
                "remove",
                &entry.pod.id,
                &entry.pod.name,
                None,
            );
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    bail!(
        "{} has ended and its supervisor has not; process {}",
        entry.pod.name,
        entry.state.supervisor
    )
}

pub(super) fn wait(context: &Context, args: &PodsArgs) -> anyhow::Result<ExitCode> {
    Ok(each(&args.pods, |word| {
        let entry = find(&context.directories, word)?;
        let code = match &entry.state.end {
            Some(end) => end.code,
            None => {
                let link = connect(&entry, &context.directories)?;
                link.ask(&Ask::Wait, &[])?;
                await_end(context, &link, &entry)?
            }
        };
        Ok(say(&code.to_string())?)
    }))
}
