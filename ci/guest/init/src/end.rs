//! The ways a guest ends. None of them returns when the machine obeys.

use std::fs;
use std::io;

use rustix::system::{RebootCommand, reboot};

use crate::console::Console;
use crate::orders::Reset;

/// Everything said has arrived before the machine goes.
fn settle(console: &mut Console) {
    rustix::fs::sync();
    console.drain();
}

pub(crate) fn power_off(console: &mut Console) -> io::Result<()> {
    settle(console);
    Ok(reboot(RebootCommand::PowerOff)?)
}

pub(crate) fn reset(console: &mut Console, how: Reset) -> io::Result<()> {
    let kind = match how {
        Reset::Default => None,
        Reset::Acpi => Some("acpi"),
        Reset::Keyboard => Some("kbd"),
        Reset::TripleFault => Some("triple"),
        Reset::Pci => Some("pci"),
    };
    if let Some(kind) = kind {
        fs::write("/sys/kernel/reboot/type", kind)?;
        // Without it the kernel may prefer what it knows about this machine.
        fs::write("/sys/kernel/reboot/force", "1")?;
    }
    settle(console);
    Ok(reboot(RebootCommand::Restart)?)
}

/// Idle for ever; interrupts and other tasks go on.
pub(crate) fn sleep_forever(console: &mut Console) -> ! {
    settle(console);
    loop {
        std::thread::park();
    }
}

/// One CPU busy for ever.
pub(crate) fn hang(console: &mut Console) -> ! {
    settle(console);
    loop {
        std::hint::spin_loop();
    }
}
