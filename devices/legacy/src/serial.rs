//! A 16550 UART (`vm-superio`) whose output loses nothing and whose input is bounded.
//!
//! **Output.** A byte the guest writes to THR goes to the sink during that very access, so nothing
//! is ever held back that a later event would have to flush: a guest that writes one byte and
//! halts has been heard. Buffering would save a `write(2)` per byte, which is small beside the exit
//! that brought the byte. What happens when the reader is slow depends on the sink the VMM gave:
//!
//! * A *blocking* sink stops the vCPU in the access until the reader catches up. Simple and
//!   lossless; but such a vCPU cannot be paused meanwhile, and the handle waits with it. Right for
//!   a file, wrong for a pipe or a terminal.
//! * A *non-blocking* sink answers `WouldBlock`. The byte waits here, LSR says that the transmitter
//!   is busy, and a driver that looks at LSR stops sending, as on a wire with flow control. The
//!   VMM calls [`SerialHandle::output_ready`] when the sink takes bytes again. A driver that
//!   sends without looking may run [`BACKLOG`] bytes ahead; beyond that bytes are lost and counted.
//!
//! ```text
//!   ready ──sink: WouldBlock──▶ backed up (LSR: THRE=TEMT=0; bytes queue)
//!     ▲                            │ output_ready(), or any later access
//!     └──── queue empty ───────────┘ then one THR-empty interrupt
//! ```
//!
//! **Input.** [`SerialHandle::offer`] takes what the receive FIFO (64 bytes) has room for and
//! returns that count. If it took less than it was given, [`SerialHandle::room`] is signalled once
//! the guest has emptied the FIFO. Nothing grows with what the other side sends (CVE-2020-27174).
//!
//! Threads: the device on vCPU threads, the handle on the thread that owns the console; both lock
//! the UART for the length of one operation.

mod transmit;

use std::convert::Infallible;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use testudo_bus::{Access, Device, IrqLine, fill_absent};
use vm_superio::Trigger;
use vm_superio::serial::NoEvents;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub use transmit::BACKLOG;
use transmit::Transmit;

const THR: u8 = 0;
const IER: u8 = 1;
const LCR: u8 = 3;
const LCR_DLAB: u8 = 1 << 7;
const MCR: u8 = 4;
const MCR_LOOP: u8 = 1 << 4;
const LSR: u8 = 5;
const LSR_TRANSMITTER_IDLE: u8 = 0b0110_0000;
/// Size of the model's receive FIFO, in bytes.
const RX_FIFO: usize = 64;

type Uart = vm_superio::Serial<Line, NoEvents, Transmit>;

struct Line(Arc<dyn IrqLine>);

impl Trigger for Line {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.trigger();
        Ok(())
    }
}

struct Port {
    uart: Uart,
    /// Somebody was refused input and waits for `room`.
    room_wanted: bool,
}

struct Shared {
    port: Mutex<Port>,
    room: EventFd,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Port> {
        self.port.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The UART as the guest sees it: eight byte-wide registers.
pub struct Serial {
    shared: Arc<Shared>,
}

/// The console's end of the line; clones share it.
#[derive(Clone)]
pub struct SerialHandle {
    shared: Arc<Shared>,
}

impl Serial {
    /// Bytes of the port range.
    pub const LEN: u64 = 8;

    /// A UART that interrupts on `line` and sends to `sink`.
    pub fn new(
        line: Arc<dyn IrqLine>,
        sink: Box<dyn Write + Send>,
    ) -> io::Result<(Self, SerialHandle)> {
        let shared = Arc::new(Shared {
            port: Mutex::new(Port {
                uart: Uart::new(Line(line), Transmit::new(sink)),
                room_wanted: false,
            }),
            room: EventFd::new(EFD_NONBLOCK)?,
        });
        let handle = SerialHandle {
            shared: Arc::clone(&shared),
        };
        Ok((Self { shared }, handle))
    }
}

impl SerialHandle {
    /// Gives the guest as much of `input` as its FIFO has room for; returns how many bytes.
    pub fn offer(&self, input: &[u8]) -> usize {
        let mut port = self.shared.lock();
        let taken = port.uart.enqueue_raw_bytes(input).unwrap_or(0);
        port.room_wanted = taken < input.len();
        taken
    }

    /// Readable once the FIFO has emptied after a short [`offer`](Self::offer); non-blocking.
    pub fn room(&self) -> &EventFd {
        &self.shared.room
    }

    /// Tells the UART that a non-blocking sink takes bytes again. Returns `true` once nothing
    /// waits any more.
    pub fn output_ready(&self) -> bool {
        self.shared.lock().send_backlog()
    }

    /// `true` while bytes wait for a non-blocking sink.
    pub fn output_waiting(&self) -> bool {
        self.shared.lock().uart.writer().waiting()
    }

    /// Bytes lost so far: the sink failed, or the guest ignored a full backlog.
    pub fn lost(&self) -> u64 {
        self.shared.lock().uart.writer().lost()
    }
}

impl Port {
    fn send_backlog(&mut self) -> bool {
        if !self.uart.writer().waiting() {
            return true;
        }
        if !self.uart.writer_mut().send_backlog() {
            return false;
        }
        self.transmitter_idle();
        true
    }

    /// Raises the THR-empty interrupt the driver missed while the transmitter was busy. The model
    /// raises it when IER is written, and IER is there only while DLAB is clear.
    fn transmitter_idle(&mut self) {
        let line_control = self.uart.read(LCR);
        self.write(LCR, line_control & !LCR_DLAB);
        let enabled = self.uart.read(IER);
        self.write(IER, enabled);
        self.write(LCR, line_control);
    }

    fn read(&mut self, register: u8) -> u8 {
        let value = self.uart.read(register);
        if register == LSR && self.uart.writer().waiting() {
            value & !LSR_TRANSMITTER_IDLE
        } else {
            value
        }
    }

    fn write(&mut self, register: u8, value: u8) {
        // The line cannot fail and `Transmit` accounts for the sink's failures itself.
        if self.uart.write(register, value).is_err() {
            debug_assert_eq!(register, THR);
        }
    }

    fn room_appeared(&mut self) -> bool {
        let appeared = self.room_wanted && self.uart.fifo_capacity() >= RX_FIFO && !self.looped();
        if appeared {
            self.room_wanted = false;
        }
        appeared
    }

    fn looped(&mut self) -> bool {
        self.uart.read(MCR) & MCR_LOOP != 0
    }
}

impl Device for Serial {
    fn read(&mut self, at: Access, data: &mut [u8]) {
        let ([byte], Ok(register)) = (&mut *data, u8::try_from(at.offset)) else {
            fill_absent(data);
            return;
        };
        let mut port = self.shared.lock();
        port.send_backlog();
        *byte = port.read(register);
        if port.room_appeared() {
            signal(&self.shared.room);
        }
    }

    fn write(&mut self, at: Access, data: &[u8]) {
        let ([value], Ok(register)) = (data, u8::try_from(at.offset)) else {
            return;
        };
        let mut port = self.shared.lock();
        port.send_backlog();
        port.write(register, *value);
        if port.room_appeared() {
            signal(&self.shared.room);
        }
    }
}

fn signal(event: &EventFd) {
    // Fails only if the counter is full, and then the event is readable anyway.
    if let Err(e) = event.write(1) {
        log::debug!("serial: signal of input room: {e}");
    }
}

#[cfg(test)]
mod tests;
