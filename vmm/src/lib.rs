//! testudo-vmm: a container-optimised virtual machine monitor
