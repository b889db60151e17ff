//! Virtio models and the virtio-pci transport
