//! The i8042 keyboard controller, for the one thing guests still use it for: reset.
//!
//! There is no keyboard. The controller answers the commands by which an operating system probes
//! it (Linux `drivers/input/serio/i8042.c`) so that no probe runs into its timeout: every command
//! that has an answer gets it at once, and the input buffer is never full. A machine that
//! describes itself by ACPI should also clear the 8042 flag in the FADT's `IAPC_BOOT_ARCH`; then a
//! modern guest does not probe at all and only pulses the reset line.
//!
//! The two ports are not adjacent (0x61 belongs to another device), so the controller is two
//! targets over one state.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use testudo_bus::{Access, GuestEvent, Mailbox, Target, fill_absent};

const STATUS_OUTPUT_FULL: u8 = 1 << 0;
const STATUS_SYSTEM_FLAG: u8 = 1 << 2;
const STATUS_COMMAND: u8 = 1 << 3;
const STATUS_UNLOCKED: u8 = 1 << 4;

const READ_CONTROL: u8 = 0x20;
const WRITE_CONTROL: u8 = 0x60;
const TEST_AUX: u8 = 0xa9;
const SELF_TEST: u8 = 0xaa;
const TEST_KEYBOARD: u8 = 0xab;
const READ_OUTPUT_PORT: u8 = 0xd0;
const WRITE_OUTPUT_PORT: u8 = 0xd1;
const LOOP_AUX: u8 = 0xd3;
const PULSE_RESET: u8 = 0xfe;

const SELF_TEST_PASSED: u8 = 0x55;
/// Answer of a port test: the clock line is stuck, nothing is connected.
const NOT_CONNECTED: u8 = 0x01;
const CONTROL_SYSTEM_FLAG: u8 = 1 << 2;
const OUTPUT_PORT_RESET: u8 = 1 << 0;
const OUTPUT_PORT_DEFAULT: u8 = 0b11;

/// The controller; hand its two faces to the port bus.
pub struct I8042 {
    state: Arc<Mutex<State>>,
}

struct State {
    mailbox: Arc<dyn Mailbox>,
    control: u8,
    answer: Option<u8>,
    last_answer: u8,
    expects: Option<Expects>,
    status_command: u8,
}

#[derive(Clone, Copy)]
enum Expects {
    Control,
    OutputPort,
    LoopAux,
}

impl I8042 {
    /// The data port.
    pub const DATA_PORT: u64 = 0x60;
    /// The command and status port.
    pub const COMMAND_PORT: u64 = 0x64;
    /// Bytes of each port's range.
    pub const LEN: u64 = 1;

    /// A controller with nothing plugged in.
    pub fn new(mailbox: Arc<dyn Mailbox>) -> Self {
        Self {
            state: Arc::new(Mutex::new(State {
                mailbox,
                control: CONTROL_SYSTEM_FLAG,
                answer: None,
                last_answer: 0,
                expects: None,
                status_command: 0,
            })),
        }
    }

    /// What answers at [`I8042::DATA_PORT`].
    pub fn data_port(&self) -> Arc<dyn Target> {
        Arc::new(DataPort(Arc::clone(&self.state)))
    }

    /// What answers at [`I8042::COMMAND_PORT`].
    pub fn command_port(&self) -> Arc<dyn Target> {
        Arc::new(CommandPort(Arc::clone(&self.state)))
    }
}

struct DataPort(Arc<Mutex<State>>);
struct CommandPort(Arc<Mutex<State>>);

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    fn status(&self) -> u8 {
        let full = if self.answer.is_some() {
            STATUS_OUTPUT_FULL
        } else {
            0
        };
        full | STATUS_SYSTEM_FLAG | STATUS_UNLOCKED | self.status_command
    }

    fn command(&mut self, command: u8) {
        self.status_command = STATUS_COMMAND;
        self.expects = None;
        match command {
            READ_CONTROL => self.answer = Some(self.control),
            WRITE_CONTROL => self.expects = Some(Expects::Control),
            SELF_TEST => self.answer = Some(SELF_TEST_PASSED),
            TEST_AUX | TEST_KEYBOARD => self.answer = Some(NOT_CONNECTED),
            READ_OUTPUT_PORT => self.answer = Some(OUTPUT_PORT_DEFAULT),
            WRITE_OUTPUT_PORT => self.expects = Some(Expects::OutputPort),
            LOOP_AUX => self.expects = Some(Expects::LoopAux),
            PULSE_RESET => self.mailbox.post(GuestEvent::Reset),
            _ => {}
        }
    }

    fn data(&mut self, value: u8) {
        self.status_command = 0;
        match self.expects.take() {
            Some(Expects::Control) => self.control = value,
            Some(Expects::OutputPort) if value & OUTPUT_PORT_RESET == 0 => {
                self.mailbox.post(GuestEvent::Reset);
            }
            // The loop answers with something else than was sent: there is no aux port.
            Some(Expects::LoopAux) => self.answer = Some(!value),
            Some(Expects::OutputPort) | None => {}
        }
    }
}

impl Target for DataPort {
    fn read(&self, _at: Access, data: &mut [u8]) {
        let mut state = lock(&self.0);
        if let Some(answer) = state.answer.take() {
            state.last_answer = answer;
        }
        fill_absent(data);
        if let Some(first) = data.first_mut() {
            *first = state.last_answer;
        }
    }

    fn write(&self, _at: Access, data: &[u8]) {
        if let Some(value) = data.first() {
            lock(&self.0).data(*value);
        }
    }
}

impl Target for CommandPort {
    fn read(&self, _at: Access, data: &mut [u8]) {
        fill_absent(data);
        if let Some(first) = data.first_mut() {
            *first = lock(&self.0).status();
        }
    }

    fn write(&self, _at: Access, data: &[u8]) {
        if let Some(value) = data.first() {
            lock(&self.0).command(*value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Letters;

    struct Bench {
        data: Arc<dyn Target>,
        command: Arc<dyn Target>,
        letters: Arc<Letters>,
    }

    impl Bench {
        fn new() -> Self {
            let letters = Letters::new();
            let controller = I8042::new(letters.clone());
            Self {
                data: controller.data_port(),
                command: controller.command_port(),
                letters,
            }
        }

        fn status(&self) -> u8 {
            let mut byte = [0];
            self.command.read(Access { offset: 0 }, &mut byte);
            byte[0]
        }

        fn ask(&self, command: u8) -> Option<u8> {
            self.command.write(Access { offset: 0 }, &[command]);
            self.answer()
        }

        fn send(&self, value: u8) {
            self.data.write(Access { offset: 0 }, &[value]);
        }

        fn answer(&self) -> Option<u8> {
            let full = self.status() & STATUS_OUTPUT_FULL != 0;
            let mut byte = [0];
            self.data.read(Access { offset: 0 }, &mut byte);
            full.then_some(byte[0])
        }
    }

    #[test]
    fn reset_by_pulse_and_by_output_port() {
        let bench = Bench::new();
        bench.ask(PULSE_RESET);
        bench.ask(WRITE_OUTPUT_PORT);
        bench.send(0x02);
        assert_eq!(bench.letters.take(), [GuestEvent::Reset, GuestEvent::Reset]);
        bench.ask(WRITE_OUTPUT_PORT);
        bench.send(0x03);
        bench.send(0x00);
        assert!(bench.letters.take().is_empty());
    }

    #[test]
    fn idle_status_invites_no_waiting() {
        let bench = Bench::new();
        assert_eq!(bench.status() & 0b11, 0, "neither buffer is full");
    }

    #[test]
    fn probe_commands_are_answered_at_once() {
        let bench = Bench::new();
        assert_eq!(bench.ask(SELF_TEST), Some(SELF_TEST_PASSED));
        assert_eq!(bench.ask(TEST_KEYBOARD), Some(NOT_CONNECTED));
        assert_eq!(bench.ask(TEST_AUX), Some(NOT_CONNECTED));
        bench.ask(WRITE_CONTROL);
        bench.send(0x65);
        assert_eq!(bench.ask(READ_CONTROL), Some(0x65));
        bench.ask(LOOP_AUX);
        bench.send(0x5a);
        assert!(bench.answer().is_some_and(|a| a != 0x5a));
        assert_eq!(bench.answer(), None);
    }
}
