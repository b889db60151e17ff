//! Virtio functions of the board: a model, its transport, its counters.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use testudo_bus::{Doorbells, Msi};
use testudo_memory::RamHandle;
use testudo_pci::PciFunction;
use testudo_protocol::Counters;
use thiserror::Error;
use virtio_devices::{Entropy, RateLimit, Rng, VirtioModel, VirtioPci, VirtioPciError};

use crate::board::Parts;

/// A virtio function could not be made.
#[derive(Debug, Error)]
pub enum VirtioError {
    /// The model.
    #[error("cannot set up virtio-{name}")]
    Model {
        /// The model.
        name: &'static str,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// The transport.
    #[error(transparent)]
    Transport(#[from] VirtioPciError),
}

/// What every function is attached to.
pub(crate) struct Attachments<'a> {
    pub(crate) ram: RamHandle,
    pub(crate) msi: &'a dyn Msi,
    pub(crate) doorbells: Arc<dyn Doorbells>,
}

/// Counters of the board's virtio devices.
#[derive(Default)]
pub(crate) struct DeviceCounters(Vec<Arc<virtio_devices::DeviceCounters>>);

impl DeviceCounters {
    /// All of them, by device and by queue.
    pub(crate) fn read(&self) -> Counters {
        let mut all = Counters::new();
        for (number, device) in self.0.iter().enumerate() {
            let mut counters = BTreeMap::new();
            for (queue, of_queue) in device.queues.iter().enumerate() {
                for (name, value) in of_queue.read() {
                    counters.insert(format!("queue{queue}.{name}"), value);
                }
            }
            all.insert(format!("{}{number}", device.name), counters);
        }
        all
    }
}

/// The entropy device.
pub(crate) fn rng(
    parts: &Parts<'_>,
    to: &Attachments<'_>,
    counters: &mut DeviceCounters,
) -> Result<Box<dyn PciFunction>, VirtioError> {
    let model = |source| VirtioError::Model {
        name: "rng",
        source,
    };
    let entropy = match parts.rng_source {
        None => Entropy::Host,
        Some(file) => Entropy::File(file.try_clone().map_err(model)?),
    };
    let rate = parts.spec.rng.as_ref().and_then(|r| r.bytes_per_second);
    // A second's worth at once: a guest that seeds itself at boot does not wait for the rate.
    let limit = rate.and_then(|rate| RateLimit::new(rate, rate));
    let rng = Rng::new(entropy, limit, parts.io.handle()).map_err(model)?;
    function(Box::new(rng), to, counters)
}

fn function(
    model: Box<dyn VirtioModel>,
    to: &Attachments<'_>,
    counters: &mut DeviceCounters,
) -> Result<Box<dyn PciFunction>, VirtioError> {
    let doorbells = Arc::clone(&to.doorbells);
    let function = VirtioPci::new(model, to.ram.clone(), to.msi, doorbells)?;
    counters.0.push(function.counters());
    Ok(Box::new(function))
}
