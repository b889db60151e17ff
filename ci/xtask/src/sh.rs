//! Running other programs, with errors that say which command failed, how, and what it said.

use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail};

/// Lines of stderr that an error quotes.
const TAIL: usize = 20;

/// The command as one would type it.
pub fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let quoted: Vec<String> = words
        .map(|w| {
            let w = w.to_string_lossy();
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
            if !w.is_empty() && w.chars().all(plain) {
                w.into_owned()
            } else {
                format!("'{w}'")
            }
        })
        .collect();
    quoted.join(" ")
}

/// Runs the command with its output passed through to the terminal.
pub fn live(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("cannot start `{}`", line(command)))?;
    if !status.success() {
        bail!("`{}` failed: {status}", line(command));
    }
    Ok(())
}

/// Runs the command silently; what it printed is seen only in the error of a failure.
pub fn quiet(command: &mut Command) -> Result<()> {
    captured(command).map(drop)
}

/// What the command prints on stdout, without the last newline.
pub fn read(command: &mut Command) -> Result<String> {
    let output = captured(command)?;
    let text = String::from_utf8(output.stdout)
        .with_context(|| format!("`{}` printed something that is not UTF-8", line(command)))?;
    Ok(text.trim_end_matches('\n').to_owned())
}

/// Does `program --version` (or whatever `probe` says) run and succeed?
pub fn works(program: &str, probe: &[&str]) -> bool {
    let mut command = Command::new(program);
    command
        .args(probe)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.status().is_ok_and(|s| s.success())
}

fn captured(command: &mut Command) -> Result<Output> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start `{}`", line(command)))?;
    if !output.status.success() {
        let said = if output.stderr.is_empty() {
            &output.stdout
        } else {
            &output.stderr
        };
        bail!(
            "`{}` failed: {}\n{}",
            line(command),
            output.status,
            tail(said)
        );
    }
    Ok(output)
}

fn tail(said: &[u8]) -> String {
    let text = String::from_utf8_lossy(said);
    let lines: Vec<&str> = text.lines().collect();
    let skipped = lines.len().saturating_sub(TAIL);
    lines
        .iter()
        .skip(skipped)
        .map(|l| format!("  {l}"))
        .collect::<Vec<_>>()
        .join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_quotes_the_command_its_status_and_its_words() {
        let error = quiet(Command::new("sh").args(["-c", "echo gone >&2; exit 3"])).unwrap_err();
        let text = format!("{error:#}");
        assert!(text.contains("sh -c 'echo gone >&2; exit 3'"), "{text}");
        assert!(
            text.contains("exit status: 3") && text.contains("  gone"),
            "{text}"
        );
    }

    #[test]
    fn only_the_tail_is_quoted() {
        let said: String = (0..100).map(|n| format!("line {n}\n")).collect();
        let tail = tail(said.as_bytes());
        assert_eq!(tail.lines().count(), TAIL);
        assert!(tail.ends_with("line 99"));
    }
}
