//! `testudo logs`, `console`, `events`.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use super::{Context, say};
use crate::args::{ConsoleArgs, EventsArgs, Format, LogsArgs};
use crate::clock::rfc3339;
use crate::output::{OutputReader, Piece, Stream};
use crate::state::{Event, EventLog, Phase, State, find};

/// Between two looks at a file that grows.
const PAUSE: Duration = Duration::from_millis(50);

pub(super) fn logs(context: &Context, args: &LogsArgs) -> anyhow::Result<ExitCode> {
    let entry = find(&context.directories, &args.pod)?;
    let mut pieces = Vec::new();
    let mut reader = None;
    for name in ["log.1", "log"] {
        let Ok(mut file) = OutputReader::open(&entry.folder.join(name)) else {
            continue;
        };
        while let Some(piece) = file.next_piece()? {
            pieces.push(piece);
        }
        reader = Some(file);
    }
    let mut printer = Printer {
        timestamps: args.timestamps,
        fresh: [true, true],
    };
    for piece in last_lines(pieces, args.tail) {
        if !printer.print(&piece)? {
            return Ok(ExitCode::SUCCESS);
        }
    }
    while let (true, Some(file)) = (args.follow, &mut reader) {
        match file.next_piece()? {
            Some(piece) if !printer.print(&piece)? => break,
            Some(_) => {}
            None if ended(&entry.folder) => break,
            None => std::thread::sleep(PAUSE),
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn ended(folder: &Path) -> bool {
    State::read(folder).map_or(true, |state| state.phase == Phase::Exited)
}

/// The pieces that have the last lines.
fn last_lines(pieces: Vec<Piece>, lines: Option<usize>) -> Vec<Piece> {
    let Some(mut left) = lines else { return pieces };
    let mut kept = VecDeque::new();
    let mut last = true;
    for mut piece in pieces.into_iter().rev() {
        let mut end = piece.bytes.len();
        if last && piece.bytes.last() == Some(&b'\n') {
            end = end.saturating_sub(1);
        }
        last = false;
        let mut cut = None;
        for (at, _) in piece
            .bytes
            .iter()
            .enumerate()
            .take(end)
            .rev()
            .filter(|(_, byte)| **byte == b'\n')
        {
            left = left.saturating_sub(1);
            if left == 0 {
                cut = Some(at.saturating_add(1));
                break;
            }
        }
        if lines == Some(0) {
            break;
        }
        if let Some(cut) = cut {
            piece.bytes.drain(..cut);
            kept.push_front(piece);
            break;
        }
        kept.push_front(piece);
    }
    kept.into()
}

struct Printer {
    timestamps: bool,
    /// Each stream's next byte begins a line.
    fresh: [bool; 2],
}

impl Printer {
    /// Whether there is still somebody to print for.
    fn print(&mut self, piece: &Piece) -> io::Result<bool> {
        let index = usize::from(piece.stream == Stream::Err);
        let bytes = if self.timestamps {
            let mut fresh = self.fresh.get(index).copied().unwrap_or(true);
            let mut out = Vec::new();
            for line in piece.bytes.split_inclusive(|byte| *byte == b'\n') {
                if fresh {
                    out.extend_from_slice(format!("{} ", rfc3339(piece.at_ms)).as_bytes());
                }
                out.extend_from_slice(line);
                fresh = line.ends_with(b"\n");
            }
            if let Some(slot) = self.fresh.get_mut(index) {
                *slot = fresh;
            }
            out
        } else {
            piece.bytes.clone()
        };
        let written = match piece.stream {
            Stream::Out => io::stdout()
                .lock()
                .write_all(&bytes)
                .and_then(|()| io::stdout().flush()),
            Stream::Err => io::stderr().lock().write_all(&bytes),
        };
        match written {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(false),
            Err(e) => Err(e),
        }
    }
}

pub(super) fn console(context: &Context, args: &ConsoleArgs) -> anyhow::Result<ExitCode> {
    let entry = find(&context.directories, &args.pod)?;
    let path = entry.folder.join("console.log");
    let mut file =
        File::open(&path).map_err(|e| anyhow::anyhow!("cannot read {}: {e}", path.display()))?;
    loop {
        let mut bytes = Vec::new();
        Read::by_ref(&mut file)
            .take(1 << 20)
            .read_to_end(&mut bytes)?;
        if !bytes.is_empty() {
            super::print(&bytes)?;
        } else if args.follow && !ended(&entry.folder) {
            std::thread::sleep(PAUSE);
        } else {
            return Ok(ExitCode::SUCCESS);
        }
    }
}

pub(super) fn events(context: &Context, args: &EventsArgs) -> anyhow::Result<ExitCode> {
    let log = EventLog::of(context.directories.state());
    let mut at = 0;
    loop {
        if let Ok(mut file) = File::open(log.path()) {
            let length = file.metadata()?.len();
            // Begun anew.
            at = if length < at { 0 } else { at };
            file.seek(SeekFrom::Start(at))?;
            let mut reader = BufReader::new(file);
            let mut line = String::new();
            while reader.read_line(&mut line)? > 0 && line.ends_with('\n') {
                at = at.saturating_add(u64::try_from(line.len()).unwrap_or_default());
                show_event(line.trim_end(), args.format)?;
                line.clear();
            }
        }
        if !args.follow {
            return Ok(ExitCode::SUCCESS);
        }
        std::thread::sleep(PAUSE);
    }
}

fn show_event(line: &str, format: Format) -> io::Result<()> {
    if format == Format::Json {
        return say(line);
    }
    let Ok(event) = serde_json::from_str::<Event>(line) else {
        return Ok(());
    };
    let detail = event
        .detail
        .map_or_else(String::new, |detail| format!(" ({detail})"));
    say(&format!(
        "{} {:<7} {} {}{detail}",
        rfc3339(event.at_ms),
        event.what,
        event.id,
        event.name
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(text: &str) -> Piece {
        Piece {
            at_ms: 0,
            stream: Stream::Out,
            bytes: text.as_bytes().to_vec(),
        }
    }

    #[test]
    fn the_last_lines_may_begin_within_a_piece() {
        let pieces = || vec![piece("a\nb"), piece("c\nd\n")];
        let text = |lines| {
            let kept = last_lines(pieces(), lines);
            kept.iter()
                .map(|p| String::from_utf8_lossy(&p.bytes).into_owned())
                .collect::<String>()
        };
        assert_eq!(text(None), "a\nbc\nd\n");
        assert_eq!(text(Some(1)), "d\n");
        assert_eq!(text(Some(2)), "bc\nd\n");
        assert_eq!(text(Some(9)), "a\nbc\nd\n");
        assert_eq!(text(Some(0)), "");
    }
}
