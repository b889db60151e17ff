//! Waiting for the ACPI power button. A press is told twice by the kernel: as a key of an input
//! device (where evdev is there) and as an event of the netlink family `acpi_event`. This listens
//! to both and says by which it heard.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::AsFd;

use rustix::event::{PollFd, PollFlags, poll};

use crate::acpi_event::AcpiEvents;
use crate::console::Console;

/// `EV_KEY` and `KEY_POWER` (linux/input-event-codes.h).
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;
/// `struct input_event` of a 64-bit kernel: two words of time, type, code, value.
const INPUT_EVENT: usize = 24;

/// Which way the press came.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Heard {
    /// The input device's key.
    Input,
    /// The netlink event.
    Netlink,
}

/// Returns when the button is pressed. Prints `BUTTON ready` once it listens.
pub(crate) fn wait(console: &mut Console) -> io::Result<Heard> {
    let mut inputs = power_buttons();
    let mut netlink = AcpiEvents::open();
    if inputs.is_empty() {
        netlink.as_ref().map_err(|e| {
            io::Error::new(
                e.kind(),
                format!("no input device of a power button, and netlink: {e}"),
            )
        })?;
    }
    console.line("BUTTON ready");
    loop {
        let mut watched: Vec<PollFd<'_>> = inputs
            .iter()
            .map(|file| PollFd::from_borrowed_fd(file.as_fd(), PollFlags::IN))
            .collect();
        if let Ok(events) = &netlink {
            watched.push(PollFd::from_borrowed_fd(events.as_fd(), PollFlags::IN));
        }
        poll(&mut watched, None)?;
        let ready: Vec<bool> = watched
            .iter()
            .map(|fd| fd.revents().contains(PollFlags::IN))
            .collect();
        for (file, _) in inputs.iter_mut().zip(&ready).filter(|(_, ready)| **ready) {
            let mut events = [0; INPUT_EVENT * 16];
            let length = file.read(&mut events)?;
            if pressed(events.get(..length).unwrap_or_default()) {
                return Ok(Heard::Input);
            }
        }
        if let Ok(events) = &mut netlink
            && ready.get(inputs.len()) == Some(&true)
            && events
                .receive()?
                .is_some_and(|class| class.starts_with("button/power"))
        {
            return Ok(Heard::Netlink);
        }
    }
}

/// Is there a press of the power key among these `struct input_event`s?
fn pressed(events: &[u8]) -> bool {
    events.chunks_exact(INPUT_EVENT).any(|event| {
        let (Some(&[t0, t1, c0, c1, v0, v1, v2, v3]), 24) = (event.last_chunk::<8>(), event.len())
        else {
            return false;
        };
        u16::from_ne_bytes([t0, t1]) == EV_KEY
            && u16::from_ne_bytes([c0, c1]) == KEY_POWER
            && i32::from_ne_bytes([v0, v1, v2, v3]) == 1
    })
}

fn power_buttons() -> Vec<File> {
    let Ok(inputs) = fs::read_dir("/sys/class/input") else {
        return Vec::new();
    };
    inputs
        .flatten()
        .filter(|e| e.file_name().to_string_lossy().starts_with("event"))
        .filter(|e| {
            let name = fs::read_to_string(e.path().join("device/name"));
            name.is_ok_and(|n| n.trim() == "Power Button")
        })
        .filter_map(|e| File::open(std::path::Path::new("/dev/input").join(e.file_name())).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(kind: u16, code: u16, value: i32) -> Vec<u8> {
        let mut event = vec![7; 16];
        event.extend(kind.to_ne_bytes());
        event.extend(code.to_ne_bytes());
        event.extend(value.to_ne_bytes());
        event
    }

    #[test]
    fn only_the_press_of_the_power_key_counts() {
        let sync = event(0, 0, 0);
        assert!(pressed(
            &[sync.clone(), event(EV_KEY, KEY_POWER, 1)].concat()
        ));
        assert!(!pressed(&[sync, event(EV_KEY, KEY_POWER, 0)].concat()));
        assert!(!pressed(&event(EV_KEY, 30, 1)));
        assert!(!pressed(&[1, 2, 3]));
    }
}
