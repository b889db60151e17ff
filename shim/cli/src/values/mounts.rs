//! `-v` and `--tmpfs`.

use std::path::PathBuf;
use std::str::FromStr;

use super::Size;

/// `SRC:DST[:ro]`: a folder or file of the host, or a named volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// What.
    pub source: VolumeSource,
    /// Where in the container; absolute, without `.` and `..`.
    pub destination: String,
    /// Nobody in the guest may change it.
    pub readonly: bool,
}

/// Where a volume's contents are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VolumeSource {
    /// On the host; may be relative to where the command was given.
    Path(PathBuf),
    /// In the state directory, made when first named.
    Named(String),
}

/// A path of a container: absolute and plain.
pub(super) fn inside(path: &str) -> Result<String, String> {
    let plain = path.split('/').all(|part| part != "." && part != "..");
    if !path.starts_with('/') || !plain || path.contains('\0') {
        return Err(format!(
            "{path:?} is no absolute path in the container without . and .."
        ));
    }
    if path.trim_end_matches('/').is_empty() {
        return Err("the container's root cannot be mounted over".to_owned());
    }
    Ok(path.trim_end_matches('/').to_owned())
}

impl FromStr for Volume {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = |why: &str| {
            format!("`{text}`: {why}; write SOURCE:DESTINATION or SOURCE:DESTINATION:ro")
        };
        let mut parts = text.split(':');
        let (Some(source), Some(destination)) = (parts.next(), parts.next()) else {
            return Err(bad("a colon is missing"));
        };
        let mut readonly = false;
        for option in parts.flat_map(|options| options.split(',')) {
            match option {
                "ro" => readonly = true,
                "rw" => readonly = false,
                // Labels and propagation concern a host's mounts; there are none.
                other => return Err(bad(&format!("the option {other:?} has no effect here"))),
            }
        }
        let destination = inside(destination).map_err(|why| bad(&why))?;
        let source = if source.starts_with('/') || source.starts_with('.') {
            VolumeSource::Path(source.into())
        } else if super::names::is_name(source) {
            VolumeSource::Named(source.to_owned())
        } else {
            return Err(bad(
                "the source is neither a path (which begins with / or .) nor a volume's name",
            ));
        };
        Ok(Self {
            source,
            destination,
            readonly,
        })
    }
}

/// `DST[:size=SIZE,mode=MODE,ro,exec,…]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tmpfs {
    /// Where.
    pub destination: String,
    /// As mount(8) writes them.
    pub options: Vec<String>,
}

impl FromStr for Tmpfs {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (path, words) = text.split_once(':').unwrap_or((text, ""));
        let bad =
            |why: String| format!("`{text}`: {why}; write DESTINATION[:size=SIZE,mode=MODE,ro]");
        let destination = inside(path).map_err(bad)?;
        let mut options: Vec<String> = ["noexec", "nosuid", "nodev"].map(str::to_owned).to_vec();
        for word in words.split(',').filter(|word| !word.is_empty()) {
            let off = format!("no{word}");
            match word.split_once('=') {
                Some(("size", size)) => {
                    let size: Size = size.parse().map_err(bad)?;
                    options.push(format!("size={}", size.0));
                }
                Some(("mode", mode)) if u32::from_str_radix(mode, 8).is_ok_and(|m| m <= 0o7777) => {
                    options.push(word.to_owned());
                }
                Some(("uid" | "gid" | "nr_inodes", n)) if n.parse::<u32>().is_ok() => {
                    options.push(word.to_owned());
                }
                None if matches!(word, "exec" | "suid" | "dev") => options.retain(|o| *o != off),
                None if matches!(
                    word,
                    "ro" | "rw" | "noexec" | "nosuid" | "nodev" | "noatime"
                ) =>
                {
                    if options.iter().all(|o| o != word) {
                        options.push(word.to_owned());
                    }
                }
                _ => return Err(bad(format!("there is no option {word:?} of a tmpfs"))),
            }
        }
        Ok(Self {
            destination,
            options,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_are_paths_or_names() {
        let volume: Volume = "/srv/a:/data:ro".parse().unwrap();
        assert_eq!(volume.source, VolumeSource::Path("/srv/a".into()));
        assert!(volume.readonly);
        assert_eq!("./a:/b/".parse::<Volume>().unwrap().destination, "/b");
        assert_eq!(
            "cache:/b".parse::<Volume>().unwrap().source,
            VolumeSource::Named("cache".into())
        );
        for bad in [
            "",
            "/a",
            "/a:b",
            "/a:/b/../c",
            "/a:/",
            "a b:/c",
            "/a:/b:z",
            ":/b",
        ] {
            assert!(bad.parse::<Volume>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_tmpfs_is_safe_unless_it_says_otherwise() {
        let tmpfs: Tmpfs = "/tmp:size=1m,exec".parse().unwrap();
        assert_eq!(tmpfs.options, ["nosuid", "nodev", "size=1048576"]);
        assert!("/tmp:size=x".parse::<Tmpfs>().is_err());
        assert!("/tmp:uid=0,shared".parse::<Tmpfs>().is_err());
    }
}
