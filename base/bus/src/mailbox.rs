//! How a guest exit reaches the owner of the machine: by letter, never by call.

/// Something the guest did that concerns the machine as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum GuestEvent {
    /// The guest asked for a reset (i8042, ACPI reset register, triple fault).
    Reset,
    /// The guest powered itself off (ACPI S5).
    PowerOff,
    /// The guest's kernel panicked and said so (pvpanic).
    Panicked,
    /// The guest's kernel panicked and is writing a crash dump (pvpanic).
    CrashLoaded,
    /// The guest enabled its watchdog and has not reloaded it in time: it is hung.
    Watchdog,
    /// The guest wrote this value to the debug port (0x80).
    DebugPort(u8),
    /// The guest ejects the device in this hotplug slot (ACPI `_EJ0`).
    Eject {
        /// The slot.
        slot: u16,
    },
}

/// Posts events to the control thread. Never blocks and never fails: an event that finds the
/// control thread gone is dropped with it.
pub trait Mailbox: Send + Sync {
    /// Delivers `event`, in order per caller.
    fn post(&self, event: GuestEvent);
}
