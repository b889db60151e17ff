//! A set of CPUID leaves one can look up, change and extend.

/// One CPUID leaf or subleaf; the fields of KVM's `kvm_cpuid_entry2`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CpuidEntry {
    /// EAX on input.
    pub function: u32,
    /// ECX on input; meaningful with [`FLAG_SIGNIFICANT_INDEX`].
    pub index: u32,
    /// KVM's flags.
    pub flags: u32,
    /// EAX on output.
    pub eax: u32,
    /// EBX on output.
    pub ebx: u32,
    /// ECX on output.
    pub ecx: u32,
    /// EDX on output.
    pub edx: u32,
}

/// The leaf has subleaves (`KVM_CPUID_FLAG_SIGNIFCANT_INDEX`).
pub const FLAG_SIGNIFICANT_INDEX: u32 = 1;

/// Leaves, at most one of each function and index.
#[derive(Debug)]
pub(super) struct CpuidTable(Vec<CpuidEntry>);

impl CpuidTable {
    pub(super) fn new(entries: &[CpuidEntry]) -> Self {
        let mut table = Self(Vec::with_capacity(entries.len() + 8));
        for entry in entries {
            table.put(*entry);
        }
        table
    }

    pub(super) fn get(&self, function: u32, index: u32) -> Option<&CpuidEntry> {
        self.0
            .iter()
            .find(|entry| entry.function == function && entry.index == index)
    }

    /// Changes subleaf 0 of `function` if it is there.
    pub(super) fn change(&mut self, function: u32, change: impl Fn(&mut CpuidEntry)) {
        if let Some(entry) = self
            .0
            .iter_mut()
            .find(|e| e.function == function && e.index == 0)
        {
            change(entry);
        }
    }

    /// Changes every subleaf of `function`.
    pub(super) fn change_all(&mut self, function: u32, change: impl Fn(&mut CpuidEntry)) {
        self.0
            .iter_mut()
            .filter(|entry| entry.function == function)
            .for_each(change);
    }

    /// Adds the leaf or puts it in the place of what was there.
    pub(super) fn put(&mut self, entry: CpuidEntry) {
        self.0
            .retain(|old| (old.function, old.index) != (entry.function, entry.index));
        self.0.push(entry);
    }

    /// Replaces all of `function` by `[eax, ebx, ecx, edx]` for each subleaf from 0.
    pub(super) fn replace(&mut self, function: u32, subleaves: &[[u32; 4]]) {
        self.remove(function);
        let flags = if subleaves.len() > 1 {
            FLAG_SIGNIFICANT_INDEX
        } else {
            0
        };
        for (index, [eax, ebx, ecx, edx]) in (0..).zip(subleaves.iter().copied()) {
            self.0.push(CpuidEntry {
                function,
                index,
                flags,
                eax,
                ebx,
                ecx,
                edx,
            });
        }
    }

    pub(super) fn remove(&mut self, function: u32) {
        self.0.retain(|entry| entry.function != function);
    }

    pub(super) fn into_entries(mut self) -> Vec<CpuidEntry> {
        self.0.sort_by_key(|entry| (entry.function, entry.index));
        self.0
    }
}

/// Puts `value` into bits `low..=high` of `register`; a value too large for them fills them.
pub(super) fn set_bits(register: &mut u32, low: u32, high: u32, value: u32) {
    let mask = u32::MAX >> (31 - (high - low));
    *register = *register & !(mask << low) | value.min(mask) << low;
}

/// Sets or clears bit `bit` of `register`.
pub(super) fn set_bit(register: &mut u32, bit: u32, on: bool) {
    set_bits(register, bit, bit, u32::from(on));
}

/// Clears bit `bit` of `register` unless the guest may have it.
pub(super) fn keep_bit(register: &mut u32, bit: u32, allowed: bool) {
    if !allowed {
        set_bit(register, bit, false);
    }
}
