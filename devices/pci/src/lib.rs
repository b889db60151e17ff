//! PCI: configuration space, ECAM, BAR windows, MSI-X, the host bridge
