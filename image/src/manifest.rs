//! Manifests and indexes of OCI and Docker (image specification, `manifest.md` and `image-index.md`):
//! small, untrusted JSON.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::platform::Platform;

/// Bytes of a manifest, an index or a configuration (what registries allow).
pub const DOCUMENT_MAX: u64 = 4 << 20;
/// Layers of an image: more than any builder makes.
const LAYERS_MAX: usize = 1024;

/// A pointer to content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What it is.
    #[serde(default)]
    pub media_type: String,
    /// Which.
    pub digest: Digest,
    /// Bytes.
    pub size: u64,
    /// Of an image in an index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// Names, for instance.
    #[serde(
        default,
        skip_serializing_if = "BTreeMap::is_empty",
        deserialize_with = "null_is_empty"
    )]
    pub annotations: BTreeMap<String, String>,
}

/// One image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// 2.
    pub schema_version: u32,
    /// Optional in OCI.
    #[serde(default)]
    pub media_type: String,
    /// Its configuration.
    pub config: Descriptor,
    /// Lowest first.
    pub layers: Vec<Descriptor>,
}

/// Several images.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Index {
    /// Each for a platform, mostly.
    pub manifests: Vec<Descriptor>,
}

/// Either.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Document {
    /// One image.
    Manifest(Manifest),
    /// Several.
    Index(Index),
}

/// What is no manifest.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Not JSON, or without what must be there.
    #[error("it does not parse")]
    Json(#[from] serde_json::Error),
    /// Docker's schema 1, of before 2016, or something yet to come.
    #[error(
        "it has the schema version {0}, and only 2 is known (push the image again with a newer tool)"
    )]
    Version(u64),
    /// Both a manifest and an index (CVE-2021-41190).
    #[error("it claims to be an image and a list of images at once")]
    Ambiguous,
    /// Helm charts, signatures, …
    #[error("it is not a container image (its configuration is `{0}`)")]
    NoImage(String),
    /// More than there can be.
    #[error("it has {0} layers; up to {LAYERS_MAX} are supported")]
    Layers(usize),
    /// Nothing for this machine.
    #[error("there is no image for {wanted}; there are {found}")]
    Platform {
        /// The platform asked for.
        wanted: Platform,
        /// Those there are.
        found: String,
    },
}

impl Document {
    /// Tells which it is by what it has.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        let value: serde_json::Value = serde_json::from_slice(bytes)?;
        let version = value
            .get("schemaVersion")
            .and_then(serde_json::Value::as_u64);
        if version != Some(2) {
            return Err(ManifestError::Version(version.unwrap_or(0)));
        }
        let image = value.get("config").is_some() || value.get("layers").is_some();
        if value.get("manifests").is_some() {
            if image {
                return Err(ManifestError::Ambiguous);
            }
            return Ok(Self::Index(serde_json::from_value(value)?));
        }
        let manifest: Manifest = serde_json::from_value(value)?;
        if manifest.layers.len() > LAYERS_MAX {
            return Err(ManifestError::Layers(manifest.layers.len()));
        }
        let kind = manifest.config.media_type.as_str();
        match kind {
            ""
            | "application/vnd.oci.image.config.v1+json"
            | "application/vnd.docker.container.image.v1+json" => Ok(Self::Manifest(manifest)),
            other => Err(ManifestError::NoImage(other.chars().take(100).collect())),
        }
    }
}

impl Index {
    /// The image for a platform. One that names no platform is taken if there is nothing else to choose.
    pub fn select(&self, wanted: &Platform) -> Result<&Descriptor, ManifestError> {
        let fits = |d: &&Descriptor| d.platform.as_ref().is_some_and(|p| wanted.runs(p));
        if let Some(found) = self.manifests.iter().find(fits) {
            return Ok(found);
        }
        if let [only] = self.manifests.as_slice()
            && only.platform.is_none()
        {
            return Ok(only);
        }
        let named = self.manifests.iter().filter_map(|d| d.platform.as_ref());
        let named: Vec<String> = named
            .filter(|p| p.os != "unknown")
            .take(20)
            .map(Platform::to_string)
            .collect();
        let found = match named.is_empty() {
            true => format!("{} without a platform", self.manifests.len()),
            false => named.join(", "),
        };
        Err(ManifestError::Platform {
            wanted: wanted.clone(),
            found,
        })
    }
}

/// JSON writers in Go say null for an empty map.
pub(crate) fn null_is_empty<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor(platform: &str) -> String {
        let digest = Digest::of(platform.as_bytes());
        let platform = match platform.split_once('/') {
            Some((os, architecture)) => {
                format!(r#","platform":{{"os":"{os}","architecture":"{architecture}"}}"#)
            }
            None => String::new(),
        };
        format!(r#"{{"mediaType":"m","digest":"{digest}","size":1,"annotations":null{platform}}}"#)
    }

    fn index(platforms: &[&str]) -> Index {
        let all: Vec<String> = platforms.iter().map(|p| descriptor(p)).collect();
        let text = format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, all.join(","));
        match Document::parse(text.as_bytes()).unwrap() {
            Document::Index(index) => index,
            Document::Manifest(_) => panic!("an index"),
        }
    }

    #[test]
    fn the_platform_decides() {
        let wanted: Platform = "linux/amd64".parse().unwrap();
        let index_of_two = index(&["linux/arm64", "linux/amd64", "unknown/unknown"]);
        assert_eq!(
            index_of_two.select(&wanted).unwrap().digest,
            Digest::of(b"linux/amd64")
        );
        assert!(index(&["only"]).select(&wanted).is_ok());
        let others = index(&["linux/arm64", "unknown/unknown"]);
        let none = others.select(&wanted);
        assert_eq!(
            none.unwrap_err().to_string(),
            "there is no image for linux/amd64; there are linux/arm64"
        );
        assert!(index(&["a", "b"]).select(&wanted).is_err());
    }

    #[test]
    fn what_is_no_image_is_told() {
        let d = descriptor("x");
        for (text, said) in [
            ("[]".to_owned(), "schema version 0"),
            (r#"{"schemaVersion":1}"#.to_owned(), "schema version 1"),
            (
                format!(r#"{{"schemaVersion":2,"manifests":[],"layers":[{d}]}}"#),
                "at once",
            ),
            (
                format!(r#"{{"schemaVersion":2,"config":{d},"layers":[]}}"#),
                "not a container image",
            ),
            (r#"{"schemaVersion":2,"layers":[]}"#.to_owned(), "config"),
            ("{".to_owned(), "parse"),
        ] {
            let error = Document::parse(text.as_bytes()).unwrap_err();
            let error = format!("{error} ({error:?})");
            assert!(error.contains(said), "{text}: {error}");
        }
    }
}
