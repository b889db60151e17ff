//! What a registry, or the way to it, can do to a pull.

use std::error::Error as StdError;
use std::io;
use std::path::PathBuf;

use oci_client::errors::{OciDistributionError, OciErrorCode};

use super::auth::AuthError;
use crate::digest::Digest;
use crate::manifest::ManifestError;

/// Why an image did not come from a registry.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// No such tag, digest or repository.
    #[error("{registry} has no `{what}`: is the name right, and the tag there?")]
    NotFound {
        /// Which registry.
        registry: String,
        /// What it was asked for.
        what: String,
    },
    /// Wrong or missing credentials, or a repository one may not read.
    #[error(
        "{registry} does not let us read `{what}`: log in (docker login {registry}), or check the name ({why})"
    )]
    Denied {
        /// Which registry.
        registry: String,
        /// What it was asked for.
        what: String,
        /// What it said.
        why: String,
    },
    /// The file with credentials, or a helper.
    #[error(transparent)]
    Auth(#[from] AuthError),
    /// Nobody there.
    #[error("{registry} cannot be reached: {why}")]
    Unreachable {
        /// Which registry.
        registry: String,
        /// Of the system.
        why: String,
    },
    /// Somebody else, or an authority we do not know.
    #[error(
        "{registry} has a certificate that is not trusted ({why}); for an authority of your own, give its certificate"
    )]
    Certificate {
        /// Which registry.
        registry: String,
        /// Of TLS.
        why: String,
    },
    /// The connection ended or stood still, more often than we try.
    #[error(
        "the connection to {registry} was cut while `{what}` was read, {attempts} times: {why}"
    )]
    Cut {
        /// Which registry.
        registry: String,
        /// What was read.
        what: String,
        /// How often.
        attempts: u32,
        /// The last time.
        why: String,
    },
    /// It says something is wrong with it, or with us.
    #[error("{registry} answered {code} to `{what}`: {why}")]
    Answer {
        /// Which registry.
        registry: String,
        /// What it was asked for.
        what: String,
        /// HTTP status.
        code: u16,
        /// What it said.
        why: String,
    },
    /// Not what it should be.
    #[error(
        "{registry} sent `{wanted}`, but what came has the digest {found}: damaged, or tampered with"
    )]
    Digest {
        /// Which registry.
        registry: String,
        /// What was asked for.
        wanted: String,
        /// What came.
        found: String,
    },
    /// Longer or shorter than the manifest says.
    #[error("{registry} sent more than the {size} bytes that {digest} has")]
    Size {
        /// Which registry.
        registry: String,
        /// Of what.
        digest: Digest,
        /// In the manifest.
        size: u64,
    },
    /// A manifest that is none.
    #[error("the manifest {digest}")]
    Manifest {
        /// Which.
        digest: Digest,
        /// Why.
        source: Box<ManifestError>,
    },
    /// A file with certificates.
    #[error("the certificate {path} cannot be used: {why}")]
    Ca {
        /// Which.
        path: PathBuf,
        /// Why not.
        why: String,
    },
    /// Our own side.
    #[error("the client cannot be started: {0}")]
    Client(String),
    /// Our own disk.
    #[error("what was downloaded cannot be written")]
    Write(#[source] io::Error),
}

impl RegistryError {
    /// May it go better the next time?
    pub(super) fn is_passing(&self) -> bool {
        match self {
            Self::Cut { .. } | Self::Unreachable { .. } => true,
            Self::Answer { code, .. } => *code == 429 || *code >= 500,
            _ => false,
        }
    }
}

/// In our words.
pub(super) fn explain(registry: &str, what: &str, error: &OciDistributionError) -> RegistryError {
    let (registry, what) = (registry.to_owned(), what.to_owned());
    let why = innermost(error);
    match error {
        OciDistributionError::RegistryError { envelope, .. } => {
            let code = envelope.errors.first().map(|e| &e.code);
            let said = envelope.errors.first().map_or(why, |e| e.message.clone());
            match code {
                Some(
                    OciErrorCode::ManifestUnknown
                    | OciErrorCode::NameUnknown
                    | OciErrorCode::NotFound
                    | OciErrorCode::BlobUnknown
                    | OciErrorCode::ManifestBlobUnknown,
                ) => RegistryError::NotFound { registry, what },
                Some(OciErrorCode::Unauthorized | OciErrorCode::Denied) => RegistryError::Denied {
                    registry,
                    what,
                    why: said,
                },
                Some(OciErrorCode::Toomanyrequests) => RegistryError::Answer {
                    registry,
                    what,
                    code: 429,
                    why: said,
                },
                _ => RegistryError::Answer {
                    registry,
                    what,
                    code: 400,
                    why: said,
                },
            }
        }
        OciDistributionError::ImageManifestNotFoundError(_) => {
            RegistryError::NotFound { registry, what }
        }
        OciDistributionError::UnauthorizedError { .. } => {
            let why = "it wants credentials, or others".into();
            RegistryError::Denied {
                registry,
                what,
                why,
            }
        }
        OciDistributionError::AuthenticationFailure(why) => RegistryError::Denied {
            registry,
            what,
            why: why.chars().take(300).collect(),
        },
        OciDistributionError::ServerError { code: 404, .. } => {
            RegistryError::NotFound { registry, what }
        }
        OciDistributionError::ServerError {
            code: 401 | 403,
            message,
            ..
        } => RegistryError::Denied {
            registry,
            what,
            why: message.chars().take(300).collect(),
        },
        OciDistributionError::ServerError { code, message, .. } => RegistryError::Answer {
            registry,
            what,
            code: *code,
            why: message.chars().take(300).collect(),
        },
        OciDistributionError::DigestError(_) => RegistryError::Digest {
            registry,
            wanted: what,
            found: why,
        },
        OciDistributionError::RequestError(_) if why.contains("certificate") => {
            RegistryError::Certificate { registry, why }
        }
        OciDistributionError::RequestError(e) if e.is_connect() => {
            RegistryError::Unreachable { registry, why }
        }
        OciDistributionError::RequestError(_) | OciDistributionError::IoError(_) => {
            RegistryError::Cut {
                registry,
                what,
                attempts: 1,
                why,
            }
        }
        _ => RegistryError::Answer {
            registry,
            what,
            code: 0,
            why,
        },
    }
}

/// What is at the bottom: layers of libraries say "error sending request" and the like.
pub(super) fn innermost(error: &(dyn StdError + 'static)) -> String {
    let mut at = error;
    while let Some(source) = at.source() {
        at = source;
    }
    at.to_string()
}
