//! The lab's initramfs: lab-init, the modules that the root needs, and the orders.

use std::io;
use std::path::{Path, PathBuf};

use crate::cpio::Cpio;
use crate::modules::{ModulesError, load_order};
use crate::spec::{Kit, LabSpec};
use crate::wire::{ORDERS, Orders};

/// Before the root: what 9p and the overlay need.
const EARLY: &[&str] = &["9pnet_virtio", "9p", "overlay"];
/// After it: KVM. The rest loads by itself when its device node is opened.
const LATE: &[&str] = &["kvm-amd"];
/// Reading its devices interrupts each CPU.
const NUDGED: &str = "cpuid";
/// Folders that lab-init mounts on before it has a root.
const FOLDERS: &[&str] = &["dev", "proc", "sys", "modules", "host", "over", "root"];

/// Why the archive could not be made.
#[derive(Debug, thiserror::Error)]
pub enum InitramfsError {
    /// A file of the kit cannot be read.
    #[error("cannot read {path} for the lab's initramfs")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A module is missing.
    #[error(transparent)]
    Modules(#[from] ModulesError),
    /// The archive itself.
    #[error("cannot write the lab's initramfs")]
    Write(#[from] io::Error),
}

/// The archive, uncompressed: unpacking would cost more in emulation than its size does.
pub(crate) fn build(
    kit: &Kit,
    spec: &LabSpec,
    env: Vec<(String, String)>,
    stdin: bool,
) -> Result<Vec<u8>, InitramfsError> {
    let early = load_order(&kit.modules, EARLY)?;
    let mut late: Vec<&str> = LATE.to_vec();
    if spec.cpus > 1 {
        late.push(NUDGED);
    }
    late.extend(spec.modules.iter().map(String::as_str));
    let mut late = load_order(&kit.modules, &late)?;
    late.retain(|file| !early.contains(file));

    let mut cpio = Cpio::new(Vec::new());
    for folder in FOLDERS {
        cpio.dir(folder)?;
    }
    cpio.char_device("dev/console", 5, 1)?;
    cpio.file("init", 0o755, &kit.init)?;
    let mut pack = |files: &[PathBuf]| -> Result<Vec<String>, InitramfsError> {
        files
            .iter()
            .map(|file| {
                let base = file.file_name().unwrap_or_default().to_string_lossy();
                let path = format!("/modules/{base}");
                cpio.file(&path, 0o644, &read(&kit.modules.join(file))?)?;
                Ok(path)
            })
            .collect()
    };
    let orders = Orders {
        workspace: spec.workspace.clone(),
        out: spec.out.clone(),
        command: spec.command.clone(),
        env,
        early_modules: pack(&early)?,
        late_modules: pack(&late)?,
        modules_dir: kit.modules.clone(),
        release: kit.release.clone(),
        stage: spec.stage.clone(),
        heartbeat: !spec.icount,
        cpus: spec.cpus,
        stdin,
    };
    let orders = serde_json::to_vec(&orders).map_err(io::Error::from)?;
    cpio.file(ORDERS, 0o600, &orders)?;
    Ok(cpio.finish()?)
}

fn read(path: &Path) -> Result<Vec<u8>, InitramfsError> {
    std::fs::read(path).map_err(|source| InitramfsError::Read {
        path: path.to_owned(),
        source,
    })
}
