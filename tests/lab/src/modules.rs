//! Kernel modules: which files a set of modules needs, in an order in which they load
//! (`modules.dep`, see depmod(8)).

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

/// Why a set of modules cannot be put in order.
#[derive(Debug, thiserror::Error)]
pub enum ModulesError {
    /// The index cannot be read.
    #[error("cannot read {path}: run depmod for this kernel")]
    Index {
        /// The index.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// No such module, and the kernel has it not built in either.
    #[error("this kernel has no module {0}")]
    Missing(String),
}

/// Files to load, relative to `dir` (`lib/modules/<release>`), so that these modules and all they
/// depend on are loaded, each file once and after what it needs. A module that is built in needs none.
pub fn load_order(dir: &Path, wanted: &[&str]) -> Result<Vec<PathBuf>, ModulesError> {
    let read = |name: &str| {
        let path = dir.join(name);
        std::fs::read_to_string(&path).map_err(|source| ModulesError::Index { path, source })
    };
    order(&read("modules.dep")?, &read("modules.builtin")?, wanted)
}

fn order(dep: &str, builtin: &str, wanted: &[&str]) -> Result<Vec<PathBuf>, ModulesError> {
    let builtin: HashSet<String> = builtin.lines().map(name_of).collect();
    // A line lists the module and all it needs, direct or not; the last is to be loaded first.
    let needs: HashMap<String, (&str, &str)> = dep
        .lines()
        .filter_map(|l| l.split_once(':'))
        .map(|(f, n)| (name_of(f), (f, n)))
        .collect();
    let mut order: Vec<&str> = Vec::new();
    for name in wanted {
        match needs.get(&name_of(name)) {
            Some((file, before)) => {
                for file in before.split_whitespace().rev().chain([*file]) {
                    if !order.contains(&file) {
                        order.push(file);
                    }
                }
            }
            None if builtin.contains(&name_of(name)) => {}
            None => return Err(ModulesError::Missing((*name).to_owned())),
        }
    }
    Ok(order.into_iter().map(PathBuf::from).collect())
}

/// A module's name in one spelling: the file's stem, with `-` as `_`.
fn name_of(file: &str) -> String {
    let base = file.rsplit('/').next().unwrap_or(file);
    base.split(".ko").next().unwrap_or(base).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "kernel/virt/lib/irqbypass.ko:\n\
        kernel/arch/x86/kvm/kvm.ko.xz: kernel/virt/lib/irqbypass.ko\n\
        kernel/arch/x86/kvm/kvm-amd.ko.xz: kernel/arch/x86/kvm/kvm.ko.xz kernel/virt/lib/irqbypass.ko\n\
        kernel/drivers/net/tun.ko:\n";
    const BUILTIN: &str = "kernel/drivers/virtio/virtio_pci.ko\n";

    fn names(wanted: &[&str]) -> Vec<String> {
        let files = order(DEP, BUILTIN, wanted).unwrap();
        files.iter().map(|f| name_of(f.to_str().unwrap())).collect()
    }

    #[test]
    fn what_is_needed_comes_first_and_once() {
        assert_eq!(
            names(&["kvm_amd", "kvm", "tun"]),
            ["irqbypass", "kvm", "kvm_amd", "tun"]
        );
    }

    #[test]
    fn either_spelling_will_do_and_built_in_needs_no_file() {
        assert_eq!(names(&["kvm-amd"]), names(&["kvm_amd"]));
        assert!(names(&["virtio-pci"]).is_empty());
    }

    #[test]
    fn a_module_that_is_nowhere_is_named() {
        let error = order(DEP, BUILTIN, &["tun", "zram"]).unwrap_err();
        assert_eq!(error.to_string(), "this kernel has no module zram");
    }
}
