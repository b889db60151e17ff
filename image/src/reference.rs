//! Names of images in registries, as Docker's users write them.

use std::fmt;
use std::str::FromStr;

use crate::digest::Digest;

/// The registry that is meant when none is named.
pub const DEFAULT_REGISTRY: &str = "docker.io";
/// The tag that is meant when neither tag nor digest is named.
pub const DEFAULT_TAG: &str = "latest";
/// Of registry and repository together (distribution specification).
const NAME_MAX: usize = 255;
const TAG_MAX: usize = 128;

/// A normalised reference: `nginx` is `docker.io/library/nginx:latest`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// Why a word is no reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{word}` is not an image reference: {why} (examples: nginx, ghcr.io/owner/app:1.2, localhost:5000/app@sha256:…)"
)]
pub struct ReferenceError {
    word: String,
    why: &'static str,
}

impl Reference {
    /// Host and perhaps port: `docker.io`, `localhost:5000`.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// Path within the registry: `library/nginx`.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag, if one was given or is meant.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, if one was given: then it alone decides.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// The same repository by digest only.
    pub fn with_digest(&self, digest: Digest) -> Self {
        Self {
            registry: self.registry.clone(),
            repository: self.repository.clone(),
            tag: None,
            digest: Some(digest),
        }
    }

    /// Is the registry on this machine's loopback? Then it may be spoken to without TLS, as Docker does.
    pub fn is_loopback(&self) -> bool {
        let host = match self.registry.rsplit_once(':') {
            Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => host,
            _ => &self.registry,
        };
        let host = host.trim_start_matches('[').trim_end_matches(']');
        host == "localhost"
            || host
                .parse::<std::net::IpAddr>()
                .is_ok_and(|ip| ip.is_loopback())
    }

    /// As short as it can be said: `nginx:latest`.
    pub fn familiar(&self) -> String {
        let full = self.to_string();
        let short = full.strip_prefix("docker.io/").unwrap_or(&full);
        let short = short.strip_prefix("library/").unwrap_or(short);
        short.to_owned()
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(word: &str) -> Result<Self, ReferenceError> {
        let wrong = |why| ReferenceError {
            word: word.chars().take(300).collect(),
            why,
        };
        let (rest, digest) = match word.split_once('@') {
            Some((rest, digest)) => {
                let digest = digest
                    .parse()
                    .map_err(|_| wrong("what follows the @ is not a digest"))?;
                (rest, Some(digest))
            }
            None => (word, None),
        };
        // A colon after the last slash begins a tag; one before belongs to the registry's port.
        let (name, tag) = match rest.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag.to_owned())),
            _ => (rest, None),
        };
        if let Some(tag) = &tag {
            check_tag(tag).map_err(wrong)?;
        }
        let (registry, repository) = split_name(name);
        check_registry(&registry).map_err(wrong)?;
        check_repository(&repository).map_err(wrong)?;
        if registry.len() + 1 + repository.len() > NAME_MAX {
            return Err(wrong("the name is longer than 255 bytes"));
        }
        let tag = match (tag, &digest) {
            (None, None) => Some(DEFAULT_TAG.to_owned()),
            (tag, _) => tag,
        };
        Ok(Self {
            registry,
            repository,
            tag,
            digest,
        })
    }
}

/// The first part is a registry if it could not be a user's name: it has a dot or a port, or is
/// `localhost`, or has capitals (which repositories may not have).
fn split_name(name: &str) -> (String, String) {
    let (registry, repository) = match name.split_once('/') {
        Some((first, rest))
            if first.contains(['.', ':'])
                || first == "localhost"
                || first.bytes().any(|b| b.is_ascii_uppercase()) =>
        {
            (first, rest)
        }
        _ => (DEFAULT_REGISTRY, name),
    };
    let registry = match registry {
        "index.docker.io" | "registry-1.docker.io" => DEFAULT_REGISTRY,
        other => other,
    };
    let official = registry == DEFAULT_REGISTRY && !repository.contains('/');
    let repository = if official {
        format!("library/{repository}")
    } else {
        repository.to_owned()
    };
    (registry.to_owned(), repository)
}

fn check_tag(tag: &str) -> Result<(), &'static str> {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let good = tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|b| word(b) || b == b'.' || b == b'-');
    match good && tag.len() <= TAG_MAX {
        true => Ok(()),
        false => Err(
            "a tag has up to 128 letters, digits, `_`, `.` and `-`, and begins with none of the last two",
        ),
    }
}

fn check_registry(registry: &str) -> Result<(), &'static str> {
    let wrong = Err("the registry is not a host name with an optional port");
    let (host, port) = match registry.strip_prefix('[') {
        Some(v6) => match v6.split_once(']') {
            Some((ip, rest)) if ip.parse::<std::net::Ipv6Addr>().is_ok() => (
                "v6",
                rest.strip_prefix(':').or(rest.is_empty().then_some("0")),
            ),
            _ => return wrong,
        },
        None => match registry.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (registry, Some("0")),
        },
    };
    let label = |l: &str| {
        !l.is_empty()
            && !l.starts_with('-')
            && !l.ends_with('-')
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    match port.is_some_and(|p| p.parse::<u16>().is_ok()) && host.split('.').all(label) {
        true => Ok(()),
        false => wrong,
    }
}

fn check_repository(repository: &str) -> Result<(), &'static str> {
    for part in repository.split('/') {
        let edge = |b: Option<u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        let inner =
            |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'_' | b'-');
        let separators = part.contains("..")
            || part.contains("___")
            || part.contains("._")
            || part.contains("_.");
        if part.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err("a repository's name is in lower case");
        }
        if !edge(part.bytes().next())
            || !edge(part.bytes().last())
            || !part.bytes().all(inner)
            || separators
        {
            return Err(
                "each part of the name has lower-case letters and digits, between them single `.`, `_`, `__` or dashes",
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn what_is_left_out_is_filled_in() {
        for (word, full) in [
            ("nginx", "docker.io/library/nginx:latest"),
            ("nginx:1.27", "docker.io/library/nginx:1.27"),
            ("me/app", "docker.io/me/app:latest"),
            ("docker.io/nginx", "docker.io/library/nginx:latest"),
            ("index.docker.io/me/app:x", "docker.io/me/app:x"),
            ("ghcr.io/a/b/c", "ghcr.io/a/b/c:latest"),
            ("localhost/app", "localhost/app:latest"),
            ("localhost:5000/a/b:tag", "localhost:5000/a/b:tag"),
            ("127.0.0.1:5000/a", "127.0.0.1:5000/a:latest"),
            ("[::1]:5000/a", "[::1]:5000/a:latest"),
            ("Host/a", "Host/a:latest"),
            ("a__b/c-d.e:V_1.0", "docker.io/a__b/c-d.e:V_1.0"),
        ] {
            let parsed: Reference = word.parse().unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(parsed.to_string(), full, "{word}");
            assert_eq!(parsed.to_string().parse(), Ok(parsed));
        }
    }

    #[test]
    fn digests_stand_beside_tags() {
        let word = format!("localhost:5000/a/b:tag@sha256:{HEX}");
        let parsed: Reference = word.parse().unwrap();
        assert_eq!(parsed.to_string(), word);
        assert_eq!(
            (parsed.tag(), parsed.digest().map(Digest::hex)),
            (Some("tag"), Some(HEX))
        );
        let untagged: Reference = format!("a@sha256:{HEX}").parse().unwrap();
        assert_eq!(untagged.tag(), None);
    }

    #[test]
    fn nonsense_is_refused() {
        let long = "a/".repeat(128) + "a";
        for word in [
            "",
            ":",
            "@",
            "a:",
            "a@",
            "A",
            "a/B",
            "a//b",
            "/a",
            "a/",
            "a b",
            "a:-x",
            "a:b:c",
            "..",
            "../a",
            "a/../b",
            "a@sha256:00",
            "ho_st.x/a",
            "a.b:99999/c",
            "[::x]/a",
            "a..b",
            "-a",
            "a-",
            "ä",
            "a:ä",
            "a\0",
            "http://a.b/c",
            &long,
        ] {
            assert!(word.parse::<Reference>().is_err(), "{word}");
        }
    }

    #[test]
    fn only_loopback_is_loopback() {
        for (word, is) in [
            ("localhost/a", true),
            ("localhost:5000/a", true),
            ("127.1.2.3:5000/a", true),
            ("[::1]/a", true),
            ("localhost.example.com/a", false),
            ("192.168.0.1/a", false),
            ("nginx", false),
        ] {
            assert_eq!(
                word.parse::<Reference>().unwrap().is_loopback(),
                is,
                "{word}"
            );
        }
    }
}
