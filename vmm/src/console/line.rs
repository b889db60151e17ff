//! The guest's end of a console: a UART, or a virtio port.

use testudo_legacy::SerialHandle;
use virtio_devices::PortHandle;
use vmm_sys_util::eventfd::EventFd;

/// What the host's end asks of the guest's.
pub(crate) trait Line: Send {
    /// Gives the guest as much of `input` as there is room for; returns how many bytes.
    fn offer(&self, input: &[u8]) -> usize;
    /// Readable once there is room after a short [`Self::offer`].
    fn room(&self) -> &EventFd;
    /// The sink takes bytes again; `true` once nothing waits any more.
    fn output_ready(&self) -> bool;
    /// Bytes wait for the sink.
    fn output_waiting(&self) -> bool;
    /// Bytes lost so far.
    fn lost(&self) -> u64;
    /// Somebody is at the host's end, or nobody is.
    fn set_connected(&self, connected: bool);
}

impl Line for SerialHandle {
    fn offer(&self, input: &[u8]) -> usize {
        self.offer(input)
    }
    fn room(&self) -> &EventFd {
        self.room()
    }
    fn output_ready(&self) -> bool {
        self.output_ready()
    }
    fn output_waiting(&self) -> bool {
        self.output_waiting()
    }
    fn lost(&self) -> u64 {
        self.lost()
    }
    fn set_connected(&self, _connected: bool) {}
}

impl Line for PortHandle {
    fn offer(&self, input: &[u8]) -> usize {
        self.offer(input)
    }
    fn room(&self) -> &EventFd {
        self.room()
    }
    fn output_ready(&self) -> bool {
        self.output_ready()
    }
    fn output_waiting(&self) -> bool {
        self.output_waiting()
    }
    fn lost(&self) -> u64 {
        self.lost()
    }
    fn set_connected(&self, connected: bool) {
        self.set_connected(connected);
    }
}
