//! The keys there are.

use std::path::PathBuf;

use super::value::{Setting, Wrong};
use crate::values::{Cpus, Detach, NetWord, Size};

/// What is known of a key.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    /// As in the file: `guest.memory`.
    pub name: &'static str,
    /// What it is for.
    pub doc: &'static str,
    /// What may be written.
    pub kind: &'static str,
    /// What holds if nothing is.
    pub default: &'static str,
}

macro_rules! config {
    ($($(#[doc = $doc:literal])+ $field:ident $name:literal ($default:literal): $type:ty = $value:expr;)+) => {
        /// The configuration as a command sees it.
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub struct Config {
            $($(#[doc = $doc])+ pub $field: $type,)+
        }

        impl Default for Config {
            fn default() -> Self {
                Self { $($field: $value,)+ }
            }
        }

        /// All keys, by name.
        pub const KEYS: &[Key] = &[$(Key {
            name: $name,
            doc: concat!($($doc, "\n"),+),
            kind: <$type as Setting>::KIND,
            default: $default,
        },)+];

        impl Config {
            /// Sets a key from what a TOML file has. Whether there is such a key.
            pub(super) fn set_value(&mut self, key: &str, value: &toml::Value) -> Result<bool, Wrong> {
                match key {
                    $($name => self.$field = Setting::from_toml(value)?,)+
                    _ => return Ok(false),
                }
                Ok(true)
            }

            /// Sets a key from a word.
            pub(super) fn set_text(&mut self, key: &str, text: &str) -> Result<bool, Wrong> {
                match key {
                    $($name => self.$field = Setting::from_text(text)?,)+
                    _ => return Ok(false),
                }
                Ok(true)
            }

            /// What a key is set to, if anything.
            pub fn show(&self, key: &str) -> Option<String> {
                match key {
                    $($name => Setting::show(&self.$field),)+
                    _ => None,
                }
            }
        }
    };
}

config! {
    /// The VMM's program.
    vmm_program "vmm.program" ("testudo-vmm beside this program, in ../libexec/testudo or in the PATH"): Option<PathBuf> = None;
    /// More arguments for the VMM, before those of --vmm-arg.
    vmm_args "vmm.args" ("none"): Vec<String> = Vec::new();
    /// The guest's kernel: a bzImage or an ELF vmlinux.
    guest_kernel "guest.kernel" ("testudo/vmlinux beside this program or in ../share"): Option<PathBuf> = None;
    /// The guest's initramfs, which has the agent.
    guest_initramfs "guest.initramfs" ("testudo/agent.cpio beside this program or in ../share"): Option<PathBuf> = None;
    /// More words for the guest kernel's command line.
    guest_cmdline "guest.cmdline" ("none"): String = String::new();
    /// CPUs of a pod that does not say.
    guest_cpus "guest.cpus" ("1"): Option<Cpus> = None;
    /// RAM of the guest if the pod does not say. It is taken from the host only as it is used.
    guest_memory "guest.memory" ("512M"): Size = Size(512 << 20);
    /// RAM that a guest gets beside the --memory of its container.
    guest_overhead "guest.overhead" ("64M"): Size = Size(64 << 20);
    /// Seconds in which the guest has to come up.
    guest_start_timeout "guest.start-timeout" ("60"): u64 = 60;
    /// The network of a pod that does not say: none, user or tap=NAME.
    network_default "network.default" ("user where passt is installed, else none"): Option<NetWord> = None;
    /// The program of the user-mode network stack.
    network_passt "network.passt" ("passt in the PATH"): Option<PathBuf> = None;
    /// Name servers of pods with a network.
    network_dns "network.dns" ("those of the host"): Vec<String> = Vec::new();
    /// Where pods' records, logs and volumes are kept.
    state_directory "state.directory" ("/var/lib/testudo for root, else ~/.local/state/testudo"): Option<PathBuf> = None;
    /// Where sockets of running pods are.
    state_runtime "state.runtime" ("/run/testudo for root, else $XDG_RUNTIME_DIR/testudo"): Option<PathBuf> = None;
    /// Where images are unpacked.
    image_store "image.store" ("/var/lib/testudo/images for root, else ~/.local/share/testudo/images"): Option<PathBuf> = None;
    /// Registries that are spoken to without TLS, as `localhost:5000`.
    image_plain_http "image.plain-http" ("none"): Vec<String> = Vec::new();
    /// How much of a container's output is kept; twice this at most is on the disk.
    log_size "log.size" ("16M"): Size = Size(16 << 20);
    /// Keys that leave a container to itself, as `ctrl-p,ctrl-q`; empty: none.
    terminal_detach_keys "terminal.detach-keys" ("ctrl-p,ctrl-q"): Detach = Detach::default();
    /// Seconds between asking a container to end and ending it.
    stop_timeout "stop.timeout" ("10"): u64 = 10;
}
