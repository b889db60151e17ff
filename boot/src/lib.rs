//! Kernel images, initramfs and firmware tables into guest RAM
