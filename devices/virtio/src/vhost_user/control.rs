//! The control queue of a network device with several pairs of queues (virtio 1.2 §5.1.6.5): the
//! driver says how many pairs it uses. A back-end does not know this queue.

use std::ops::ControlFlow;

use testudo_memory::RamView;
use virtio_bindings::virtio_net::{VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET};

use crate::queue::{Chain, QueueFault, VirtQueue};

const OK: u8 = 0;
const ERROR: u8 = 1;

/// Answers the commands that wait; `set_pairs` says whether a number of pairs will do.
pub(super) fn serve(
    queue: &mut VirtQueue,
    ram: &RamView,
    mut set_pairs: impl FnMut(u16) -> bool,
) -> Result<(), QueueFault> {
    queue.drain(ram, |queue, chain| {
        let done = pairs(ram, &chain).is_some_and(&mut set_pairs);
        if !done {
            queue.count_error();
        }
        let answer = if done { OK } else { ERROR };
        let written = chain.write(ram, 0, &[answer]).unwrap_or(0);
        queue.push(ram, chain, u32::try_from(written).unwrap_or(0))?;
        Ok(ControlFlow::Continue(()))
    })?;
    queue.notify(ram)
}

/// The number of pairs a command sets, if it is such a command.
fn pairs(ram: &RamView, chain: &Chain) -> Option<u16> {
    let mut command = [0; 4];
    let read = chain.read(ram, 0, &mut command).ok()?;
    let [class, verb, low, high] = command;
    let set = u32::from(class) == VIRTIO_NET_CTRL_MQ
        && u32::from(verb) == VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET;
    (read == 4 && set).then_some(u16::from_le_bytes([low, high]))
}
