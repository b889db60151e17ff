//! The machine's power button: the host's wish that the guest ends by itself.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags};

/// `struct input_event` (`include/uapi/linux/input.h`): a time of 16 bytes, type, code, value.
const RECORD: usize = 24;
const HEAD: usize = 16;
/// `EV_KEY`, `KEY_POWER`, pressed.
const PRESSED: [u8; 8] = {
    let ([t0, t1], [c0, c1]) = (1_u16.to_ne_bytes(), 116_u16.to_ne_bytes());
    let [v0, v1, v2, v3] = 1_u32.to_ne_bytes();
    [t0, t1, c0, c1, v0, v1, v2, v3]
};

/// The button's device, if the machine has one.
pub(crate) fn open() -> Option<OwnedFd> {
    let class = Path::new("/sys/class/input");
    let entries = fs::read_dir(class).ok()?.flatten();
    let mut names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let event = names.find(|name| {
        name.starts_with("event")
            && fs::read_to_string(class.join(name).join("device/name"))
                .is_ok_and(|text| text.trim_end() == "Power Button")
    })?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let path = Path::new("/dev/input").join(event);
    rustix::fs::open(path, flags, Mode::empty()).ok()
}

/// Whether it has been pressed.
pub(crate) fn pressed(button: &OwnedFd) -> bool {
    let mut any = false;
    let mut records = [0; 16 * RECORD];
    while let Ok(length) = rustix::io::read(button, &mut records) {
        let (read, _) = records
            .get(..length)
            .unwrap_or_default()
            .as_chunks::<RECORD>();
        any |= read
            .iter()
            .any(|record| record.get(HEAD..) == Some(&PRESSED));
        if length < records.len() {
            break;
        }
    }
    any
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_press_is_told_from_a_release() {
        let mut file = tempfile::tempfile().unwrap();
        let mut event = |kind: u16, code: u16, value: u32| {
            file.write_all(&[0; HEAD]).unwrap();
            file.write_all(&kind.to_ne_bytes()).unwrap();
            file.write_all(&code.to_ne_bytes()).unwrap();
            file.write_all(&value.to_ne_bytes()).unwrap();
        };
        event(1, 116, 0);
        event(0, 0, 0);
        event(1, 116, 1);
        let file = OwnedFd::from(file);
        rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(0)).unwrap();
        assert!(pressed(&file));
        rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(48)).unwrap();
        assert!(pressed(&file));
        rustix::fs::ftruncate(&file, 48).unwrap();
        rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(0)).unwrap();
        assert!(!pressed(&file));
    }
}
