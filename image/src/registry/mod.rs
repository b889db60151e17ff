//! Images in registries (distribution specification): found, downloaded, verified. Talks HTTP by way of
//! `oci-client`; its asynchronous world stays in here, callers are blocked meanwhile (and must not be in
//! such a world themselves).

mod auth;
mod download;
mod error;

use std::path::PathBuf;
use std::time::Duration;

use oci_client::client::{Certificate, CertificateEncoding, ClientConfig, ClientProtocol};
use oci_client::secrets::RegistryAuth;

pub use auth::{AuthError, Credentials};
pub(crate) use download::Step;
pub use error::RegistryError;
use error::explain;

use crate::digest::{Digest, Hasher};
use crate::manifest::{DOCUMENT_MAX, Document, Manifest, ManifestError};
use crate::platform::Platform;
use crate::reference::Reference;

/// How registries are spoken to.
#[derive(Debug, Clone)]
pub struct RegistryOptions {
    /// Registries that may be spoken to without TLS, besides those on loopback.
    pub plain_http: Vec<String>,
    /// Files (PEM) with certificates of authorities to trust besides the system's.
    pub authorities: Vec<PathBuf>,
    /// These, instead of those in Docker's configuration.
    pub credentials: Option<Credentials>,
    /// Where to look for credentials; [default](Self::default) is Docker's and Podman's places.
    pub auth_files: Vec<PathBuf>,
    /// How often a request that was cut off, or that the registry cannot answer now, is made.
    pub attempts: u32,
    /// How long to wait before the second attempt; then twice as long each time.
    pub pause: Duration,
    /// How long a connection may stand still.
    pub stall: Duration,
    /// Layers downloaded at once.
    pub parallel: usize,
}

impl Default for RegistryOptions {
    fn default() -> Self {
        Self {
            plain_http: Vec::new(),
            authorities: Vec::new(),
            credentials: None,
            auth_files: auth::files(),
            attempts: 5,
            pause: Duration::from_millis(500),
            stall: Duration::from_secs(30),
            parallel: 3,
        }
    }
}

const CONNECT: Duration = Duration::from_secs(15);
const ACCEPT: &[&str] = &[
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];
/// An index in an index, at most.
const NESTED_MAX: usize = 4;

/// An image that was found.
#[derive(Debug)]
pub(crate) struct Resolved {
    pub(crate) digest: Digest,
    /// The bytes the digest is of.
    pub(crate) raw: Vec<u8>,
    pub(crate) manifest: Manifest,
}

/// A repository of a registry.
pub(crate) struct Repository {
    runtime: tokio::runtime::Runtime,
    client: oci_client::Client,
    reference: Reference,
    auth: RegistryAuth,
    options: RegistryOptions,
}

impl Repository {
    /// Nothing is asked yet.
    pub(crate) fn new(
        reference: &Reference,
        options: &RegistryOptions,
    ) -> Result<Self, RegistryError> {
        let credentials = match &options.credentials {
            Some(given) => Some(given.clone()),
            None => auth::find(
                &options.auth_files,
                reference.registry(),
                reference.repository(),
            )?,
        };
        let auth = match credentials {
            Some(c) => RegistryAuth::Basic(c.username, c.password),
            None => RegistryAuth::Anonymous,
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| RegistryError::Client(e.to_string()))?;
        let plain = options.plain_http.iter().any(|r| r == reference.registry());
        let client = client(reference, options, plain)?;
        Ok(Self {
            runtime,
            client,
            reference: reference.clone(),
            auth,
            options: options.clone(),
        })
    }

    /// Finds the image for a platform. Manifests are what their digest says.
    pub(crate) fn resolve(&mut self, platform: &Platform) -> Result<Resolved, RegistryError> {
        let mut at = native(&self.reference);
        let mut wanted = self.reference.digest().cloned();
        let (mut raw, mut digest) = match self.manifest(&at, wanted.as_ref()) {
            // A registry on loopback may have no TLS, as with Docker; one with a certificate has.
            Err(RegistryError::Unreachable { .. } | RegistryError::Cut { .. })
                if self.reference.is_loopback() =>
            {
                self.client = client(&self.reference, &self.options, true)?;
                self.manifest(&at, wanted.as_ref())?
            }
            other => other?,
        };
        for _ in 0..NESTED_MAX {
            let wrong = |source: ManifestError| RegistryError::Manifest {
                digest: digest.clone(),
                source: source.into(),
            };
            match Document::parse(&raw).map_err(wrong)? {
                Document::Manifest(manifest) => {
                    return Ok(Resolved {
                        digest,
                        raw,
                        manifest,
                    });
                }
                Document::Index(index) => {
                    let chosen = index.select(platform).map_err(wrong)?.digest.clone();
                    at = native(&self.reference.with_digest(chosen.clone()));
                    wanted = Some(chosen);
                }
            }
            (raw, digest) = self.manifest(&at, wanted.as_ref())?;
        }
        Err(RegistryError::NotFound {
            registry: self.reference.registry().to_owned(),
            what: format!(
                "an image in the indexes of {}, which name each other",
                self.reference
            ),
        })
    }

    fn manifest(
        &self,
        at: &oci_client::Reference,
        wanted: Option<&Digest>,
    ) -> Result<(Vec<u8>, Digest), RegistryError> {
        let what = wanted.map_or_else(|| self.reference.familiar(), Digest::to_string);
        let registry = self.reference.registry();
        let ask = || self.client.pull_manifest_raw(at, &self.auth, ACCEPT);
        let got = self.runtime.block_on(download::patiently(
            &self.options,
            &mut |_, _| {},
            async || ask().await.map_err(|e| explain(registry, &what, &e)),
        ))?;
        let bytes = got.0.to_vec();
        let algorithm = wanted.map_or(crate::digest::Algorithm::Sha256, Digest::algorithm);
        let mut hasher = Hasher::new(algorithm);
        hasher.update(&bytes);
        let found = hasher.finish();
        let too_long = bytes.len() as u64 > DOCUMENT_MAX;
        if too_long || wanted.is_some_and(|wanted| *wanted != found) {
            return Err(RegistryError::Digest {
                registry: registry.to_owned(),
                wanted: what,
                found: found.to_string(),
            });
        }
        Ok((bytes, found))
    }
}

fn client(
    reference: &Reference,
    options: &RegistryOptions,
    plain: bool,
) -> Result<oci_client::Client, RegistryError> {
    // Who else in the process has chosen one, has chosen for us.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut authorities = Vec::new();
    for path in &options.authorities {
        let wrong = |why: String| RegistryError::Ca {
            path: path.clone(),
            why,
        };
        let pem = std::fs::read_to_string(path).map_err(|e| wrong(e.to_string()))?;
        let certificates = certificates(&pem);
        if certificates.is_empty() {
            return Err(wrong("it has no PEM block CERTIFICATE".into()));
        }
        authorities.extend(certificates);
    }
    let variable = |name: &str| {
        let either = [name.to_uppercase(), name.to_owned()];
        let local = reference.is_loopback();
        either
            .iter()
            .find_map(|n| std::env::var(n).ok())
            .filter(|v| !v.is_empty() && !local)
    };
    let config = ClientConfig {
        protocol: if plain {
            ClientProtocol::Http
        } else {
            ClientProtocol::Https
        },
        extra_root_certificates: authorities,
        platform_resolver: None,
        read_timeout: Some(options.stall),
        connect_timeout: Some(CONNECT),
        user_agent: concat!("testudo/", env!("CARGO_PKG_VERSION")),
        https_proxy: variable("https_proxy"),
        http_proxy: variable("http_proxy"),
        no_proxy: variable("no_proxy"),
        ..ClientConfig::default()
    };
    oci_client::Client::try_from(config).map_err(|e| RegistryError::Client(error::innermost(&e)))
}

/// One for each block: the library takes one at a time.
fn certificates(pem: &str) -> Vec<Certificate> {
    const END: &str = "-----END CERTIFICATE-----";
    let blocks = pem
        .split_inclusive(END)
        .filter(|block| block.contains("-----BEGIN CERTIFICATE-----"));
    blocks
        .filter(|block| block.ends_with(END))
        .map(|block| Certificate {
            encoding: CertificateEncoding::Pem,
            data: block.as_bytes().to_vec(),
        })
        .collect()
}

/// For the library. A digest alone decides, so that a tag which has moved does not matter.
fn native(reference: &Reference) -> oci_client::Reference {
    let (registry, repository) = (
        reference.registry().to_owned(),
        reference.repository().to_owned(),
    );
    match (reference.digest(), reference.tag()) {
        (Some(digest), _) => {
            oci_client::Reference::with_digest(registry, repository, digest.to_string())
        }
        (None, tag) => oci_client::Reference::with_tag(
            registry,
            repository,
            tag.unwrap_or(crate::reference::DEFAULT_TAG).to_owned(),
        ),
    }
}
