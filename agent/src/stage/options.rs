//! Mount options as mount(8) and the OCI specification write them, read into what the kernel takes.

use testudo_agent_protocol::Mount;

use crate::sys::mount_attr::{
    ATIME, MountAttr, NOATIME, NODEV, NODIRATIME, NOEXEC, NOSUID, NOSYMFOLLOW, RDONLY, STRICTATIME,
};

/// `MS_*` of propagation, `include/uapi/linux/mount.h`.
const UNBINDABLE: u64 = 1 << 17;
const PRIVATE: u64 = 1 << 18;
const SLAVE: u64 = 1 << 19;
const SHARED: u64 = 1 << 20;

/// Options, read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) bind: bool,
    /// A bind mount takes along what is mounted below its source.
    pub(crate) recursive: bool,
    /// Of the mount.
    pub(crate) attr: MountAttr,
    /// Of the mount and all below it.
    pub(crate) attr_recursive: MountAttr,
    /// Propagation changes of mounts below, too.
    pub(crate) propagation_recursive: bool,
    /// Of the file system: `ro`, or what only it knows.
    pub(crate) readonly: bool,
    pub(crate) synchronous: bool,
    pub(crate) data: Vec<(String, Option<String>)>,
}

impl Options {
    /// Of a mount of a specification.
    pub(crate) fn of(mount: &Mount) -> Self {
        let mut options = Self::read(&mount.options);
        if mount.kind == "bind" {
            options.bind = true;
        }
        options
    }

    /// From words.
    pub(crate) fn read<S: AsRef<str>>(words: &[S]) -> Self {
        let mut options = Self::default();
        for word in words {
            options.take(word.as_ref());
        }
        options
    }

    fn take(&mut self, word: &str) {
        match word {
            "" | "defaults" | "norelatime" | "nostrictatime" | "async" | "nomand" | "mand" => {}
            "bind" => self.bind = true,
            "rbind" => {
                self.bind = true;
                self.recursive = true;
            }
            "ro" => self.readonly = true,
            "rw" => {
                self.readonly = false;
            }
            "sync" => self.synchronous = true,
            _ => {
                if let Some((propagation, recursive)) = propagation(word) {
                    self.attr.propagation = propagation;
                    self.propagation_recursive = recursive;
                } else if let Some((attr, recursive)) = attribute(word) {
                    let to = if recursive {
                        &mut self.attr_recursive
                    } else {
                        &mut self.attr
                    };
                    to.set = (to.set & !attr.clear) | attr.set;
                    to.clear = (to.clear & !attr.set) | attr.clear;
                } else {
                    let (key, value) = match word.split_once('=') {
                        Some((key, value)) => (key, Some(value.to_owned())),
                        None => (word, None),
                    };
                    self.data.push((key.to_owned(), value));
                }
            }
        }
    }
}

fn propagation(word: &str) -> Option<(u64, bool)> {
    Some(match word {
        "private" => (PRIVATE, false),
        "rprivate" => (PRIVATE, true),
        "shared" => (SHARED, false),
        "rshared" => (SHARED, true),
        "slave" => (SLAVE, false),
        "rslave" => (SLAVE, true),
        "unbindable" => (UNBINDABLE, false),
        "runbindable" => (UNBINDABLE, true),
        _ => return None,
    })
}

/// What the root's propagation shall be; the specification's default is a private root that hears of
/// mounts outside.
pub(crate) fn root_propagation(word: &str) -> Option<(u64, bool)> {
    if word.is_empty() {
        return Some((SLAVE, true));
    }
    propagation(word)
}

fn attribute(word: &str) -> Option<(MountAttr, bool)> {
    let set = |set| MountAttr {
        set,
        ..MountAttr::default()
    };
    let clear = |clear| MountAttr {
        clear,
        ..MountAttr::default()
    };
    // A time policy replaces another.
    let time = |set| MountAttr {
        set,
        clear: ATIME,
        propagation: 0,
    };
    let (word, recursive) = match word {
        "relatime" => ("relatime", false),
        _ => match word.strip_prefix('r') {
            Some(rest) if KNOWN.contains(&rest) || rest == "ro" || rest == "rw" => (rest, true),
            _ => (word, false),
        },
    };
    let attr = match word {
        "ro" if recursive => set(RDONLY),
        "rw" if recursive => clear(RDONLY),
        "nosuid" => set(NOSUID),
        "suid" => clear(NOSUID),
        "nodev" => set(NODEV),
        "dev" => clear(NODEV),
        "noexec" => set(NOEXEC),
        "exec" => clear(NOEXEC),
        "nodiratime" => set(NODIRATIME),
        "diratime" => clear(NODIRATIME),
        "nosymfollow" => set(NOSYMFOLLOW),
        "symfollow" => clear(NOSYMFOLLOW),
        "noatime" => time(NOATIME),
        "strictatime" => time(STRICTATIME),
        "relatime" | "atime" => time(0),
        _ => return None,
    };
    Some((attr, recursive))
}

const KNOWN: &[&str] = &[
    "nosuid",
    "suid",
    "nodev",
    "dev",
    "noexec",
    "exec",
    "nodiratime",
    "diratime",
    "nosymfollow",
    "symfollow",
    "noatime",
    "strictatime",
    "relatime",
    "atime",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_docker_writes_is_read() {
        let options = Options::read(&["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]);
        assert_eq!(options.attr.set, NOSUID | NOEXEC | NODEV);
        assert_eq!(
            options.data,
            [
                ("mode".into(), Some("1777".into())),
                ("size".into(), Some("65536k".into()))
            ]
        );
        let options = Options::read(&["rbind", "rprivate", "ro"]);
        assert!(options.bind && options.recursive && options.readonly);
        assert_eq!(options.attr.propagation, PRIVATE);
        assert!(options.propagation_recursive);
    }

    #[test]
    fn the_last_word_counts() {
        let options = Options::read(&["nosuid", "suid", "ro", "rw"]);
        assert_eq!((options.attr.set, options.attr.clear), (0, NOSUID));
        assert!(!options.readonly);
        let options = Options::read(&["noatime", "strictatime"]);
        assert_eq!(options.attr.set & ATIME, STRICTATIME);
    }

    #[test]
    fn recursive_attributes_are_those_of_the_specification() {
        let options = Options::read(&["rro", "rnosuid", "relatime"]);
        assert_eq!(options.attr_recursive.set, RDONLY | NOSUID);
        assert_eq!(options.attr.clear, ATIME);
        assert!(options.data.is_empty());
    }
}
