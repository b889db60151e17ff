//! What the first vCPU looks like when it enters a kernel, as plain data.
//!
//! Two entries: Linux's 64-bit one (Documentation/arch/x86/boot.rst, "64-bit boot protocol") and
//! PVH's 32-bit one (Xen, docs/misc/pvh.pandoc). The other vCPUs wait for INIT and SIPI in the
//! state KVM resets them to.

use super::layout::{BOOT_STACK_TOP, GDT, PAGE_TABLES};
use super::{gdt, paging};
use crate::GuestBlob;

pub use super::gdt::Segment;

/// CR0.PE and ET: protected mode.
const CR0_PROTECTED: u64 = 1 | 1 << 4;
/// CR0.PG.
const CR0_PAGING: u64 = 1 << 31;
/// CR4.PAE.
const CR4_PAE: u64 = 1 << 5;
/// EFER.LME and LMA: long mode, active.
const EFER_LONG: u64 = 1 << 8 | 1 << 10;
/// RFLAGS: the bit that is always set; interrupts are off.
const RFLAGS: u64 = 1 << 1;

/// Registers at the kernel's first instruction. General registers not named are 0, the IDT is
/// empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VcpuState {
    /// Instruction pointer.
    pub rip: u64,
    /// Stack pointer.
    pub rsp: u64,
    /// Linux: address of `boot_params`.
    pub rsi: u64,
    /// PVH: address of `hvm_start_info`.
    pub rbx: u64,
    /// Flags.
    pub rflags: u64,
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
    /// Address of the GDT.
    pub gdt_base: u64,
    /// Limit of the GDT: its length − 1.
    pub gdt_limit: u16,
    /// CS.
    pub code: Segment,
    /// DS, ES, FS, GS and SS.
    pub data: Segment,
    /// TR.
    pub tss: Segment,
}

/// The first vCPU's registers and the structures in guest RAM they point to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootState {
    /// Registers.
    pub vcpu: VcpuState,
    /// GDT and page tables, at their fixed addresses.
    pub blobs: Vec<GuestBlob>,
}

impl BootState {
    /// State at Linux's 64-bit entry `entry`, with the zero page at `boot_params`. Addresses map
    /// to themselves: the first 512 GiB where the vCPU has 1 GiB pages (`gib_pages`, see
    /// [`super::cpuid::has_gib_pages`]), else the first 4 GiB.
    pub fn linux_64(entry: u64, boot_params: u64, gib_pages: bool) -> Self {
        let leaf = if gib_pages {
            paging::Leaf::OneGib
        } else {
            paging::Leaf::TwoMib
        };
        let code = Segment::code_64();
        let mut state = Self::new(code);
        state.vcpu = VcpuState {
            rip: entry,
            rsp: BOOT_STACK_TOP,
            rsi: boot_params,
            cr0: CR0_PROTECTED | CR0_PAGING,
            cr3: PAGE_TABLES.base(),
            cr4: CR4_PAE,
            efer: EFER_LONG,
            ..state.vcpu
        };
        state.blobs.push(GuestBlob {
            name: "boot page tables",
            gpa: PAGE_TABLES.base(),
            bytes: paging::identity(leaf),
        });
        state
    }

    /// State at a PVH entry `entry`, with `hvm_start_info` at `start_info`: 32-bit, flat, no
    /// paging.
    pub fn pvh(entry: u32, start_info: u32) -> Self {
        let mut state = Self::new(Segment::code_32());
        state.vcpu.rip = u64::from(entry);
        state.vcpu.rbx = u64::from(start_info);
        state
    }

    fn new(code: Segment) -> Self {
        let table = gdt::table(code);
        Self {
            vcpu: VcpuState {
                rip: 0,
                rsp: 0,
                rsi: 0,
                rbx: 0,
                rflags: RFLAGS,
                cr0: CR0_PROTECTED,
                cr3: 0,
                cr4: 0,
                efer: 0,
                gdt_base: GDT,
                gdt_limit: u16::try_from(table.len().saturating_sub(1)).unwrap_or(u16::MAX),
                code,
                data: Segment::data(),
                tss: Segment::tss(),
            },
            blobs: vec![GuestBlob {
                name: "boot GDT",
                gpa: GDT,
                bytes: table,
            }],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linux_enters_in_long_mode_with_paging() {
        let state = BootState::linux_64(0x10_0200, 0x7000, true);
        let vcpu = state.vcpu;
        assert_eq!((vcpu.rip, vcpu.rsi, vcpu.rflags), (0x10_0200, 0x7000, 2));
        assert_eq!(vcpu.cr0 & 0x8000_0001, 0x8000_0001);
        assert_eq!((vcpu.cr3, vcpu.cr4, vcpu.efer), (0x9000, 0x20, 0x500));
        assert!(vcpu.code.long && !vcpu.code.default_32);
        assert_eq!((vcpu.code.selector, vcpu.data.selector), (0x10, 0x18));
        let places: Vec<_> = state
            .blobs
            .iter()
            .map(|blob| (blob.gpa, blob.bytes.len()))
            .collect();
        assert_eq!(places, [(0x500, 40), (0x9000, 0x2000)]);
    }

    #[test]
    fn pvh_enters_flat_without_paging() {
        let state = BootState::pvh(0x100_0000, 0x6000);
        let vcpu = state.vcpu;
        assert_eq!((vcpu.rip, vcpu.rbx), (0x100_0000, 0x6000));
        assert_eq!((vcpu.cr0, vcpu.cr4, vcpu.efer), (0x11, 0, 0));
        assert!(!vcpu.code.long && vcpu.code.default_32);
        assert_eq!(vcpu.data.limit, u32::MAX);
        assert_eq!(state.blobs.len(), 1);
    }
}
