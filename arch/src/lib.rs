//! Architectures: memory layout, CPU model and firmware tables as pure plans, with a thin KVM half
