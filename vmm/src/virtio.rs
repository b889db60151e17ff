//! Virtio functions of the board: models on their transport, and their counters.

use std::sync::Arc;

use testudo_pci::PciFunction;
use testudo_protocol::Counters;
use virtio_devices::{VirtioModel, VirtioPci, VirtioPciError, Wiring};

/// Counters of the board's virtio devices.
#[derive(Default)]
pub(crate) struct DeviceCounters(Vec<(String, Arc<virtio_devices::DeviceCounters>)>);

impl DeviceCounters {
    /// All of them, by device and by queue.
    pub(crate) fn read(&self) -> Counters {
        let of_device = |(id, counters): &(String, Arc<virtio_devices::DeviceCounters>)| {
            (id.clone(), counters.read().into_iter().collect())
        };
        self.0.iter().map(of_device).collect()
    }

    /// `model` on virtio-pci; its counters are found under `id`.
    pub(crate) fn function(
        &mut self,
        id: &str,
        model: Box<dyn VirtioModel>,
        wiring: Wiring<'_>,
    ) -> Result<Box<dyn PciFunction>, VirtioPciError> {
        let function = VirtioPci::new(model, wiring)?;
        self.0.push((id.to_owned(), function.counters()));
        Ok(Box::new(function))
    }
}
