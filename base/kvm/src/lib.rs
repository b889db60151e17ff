//! KVM: the VM, its memslots, interrupt routes and vCPUs
