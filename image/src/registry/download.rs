//! Blobs into files: continued where they were cut, a few at once, and what they should be.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use futures_util::StreamExt as _;
use futures_util::stream::{self, TryStreamExt as _};
use oci_client::client::BlobResponse;

use super::error::{explain, innermost};
use super::{RegistryError, RegistryOptions, Repository, native};
use crate::digest::{Digest, Hasher};
use crate::manifest::Descriptor;

/// What happens to a download.
pub(crate) enum Step<'s> {
    /// Bytes there are now.
    Progress(&'s Digest, u64),
    /// It was cut: so many attempts were made, and why.
    Again(&'s Digest, u32, String),
}

type Tell<'t> = &'t mut dyn FnMut(Step<'_>);

impl Repository {
    /// Downloads blobs into empty files.
    pub(crate) fn download(
        &self,
        wanted: &[(Descriptor, &File)],
        tell: Tell<'_>,
    ) -> Result<(), RegistryError> {
        let tell = RefCell::new(tell);
        let all = stream::iter(wanted)
            .map(|(descriptor, file)| self.one(descriptor, file, &tell))
            .buffer_unordered(self.options.parallel.max(1))
            .try_collect::<Vec<()>>();
        self.runtime.block_on(all).map(|_| ())
    }

    /// A small blob.
    pub(crate) fn fetch(
        &self,
        descriptor: &Descriptor,
        scratch: &File,
    ) -> Result<Vec<u8>, RegistryError> {
        self.download(&[(descriptor.clone(), scratch)], &mut |_| {})?;
        let mut bytes = vec![0; usize::try_from(descriptor.size).unwrap_or(0)];
        FileExt::read_exact_at(scratch, &mut bytes, 0).map_err(RegistryError::Write)?;
        Ok(bytes)
    }

    async fn one(
        &self,
        of: &Descriptor,
        file: &File,
        tell: &RefCell<Tell<'_>>,
    ) -> Result<(), RegistryError> {
        let mut got = Got {
            file,
            of,
            hasher: Hasher::new(of.digest.algorithm()),
            done: 0,
        };
        let got = RefCell::new(&mut got);
        let mut retry = |attempt, why: &RegistryError| {
            (tell.borrow_mut())(Step::Again(&of.digest, attempt, why.to_string()));
        };
        patiently(&self.options, &mut retry, async || {
            self.attempt(&got, tell).await
        })
        .await
    }

    #[expect(
        clippy::await_holding_refcell_ref,
        reason = "attempts follow each other: nobody else borrows it"
    )]
    async fn attempt(
        &self,
        got: &RefCell<&mut Got<'_>>,
        tell: &RefCell<Tell<'_>>,
    ) -> Result<(), RegistryError> {
        let mut got = got.borrow_mut();
        let of = got.of;
        let registry = self.reference.registry();
        let what = of.digest.to_string();
        let at = native(&self.reference);
        let response = self
            .client
            .pull_blob_stream_partial(&at, what.as_str(), got.done, None)
            .await;
        let mut body = match response.map_err(|e| explain(registry, &what, &e))? {
            BlobResponse::Partial(body) => body,
            BlobResponse::Full(body) => {
                got.restart().map_err(RegistryError::Write)?;
                body
            }
        };
        while let Some(piece) = body.next().await {
            match piece {
                Ok(bytes) if got.done + bytes.len() as u64 > of.size => {
                    return Err(RegistryError::Size {
                        registry: registry.to_owned(),
                        digest: of.digest.clone(),
                        size: of.size,
                    });
                }
                Ok(bytes) => got.take(&bytes).map_err(RegistryError::Write)?,
                // All came; that the digest is wrong, is said below.
                Err(_) if got.done == of.size => break,
                Err(error) => return Err(cut(registry, &what, innermost(&error))),
            }
            (tell.borrow_mut())(Step::Progress(&of.digest, got.done));
        }
        if got.done < of.size {
            let why = format!("{} of {} bytes came", got.done, of.size);
            return Err(cut(registry, &what, why));
        }
        let found = got.hasher.clone().finish();
        match found == of.digest {
            true => Ok(()),
            false => Err(RegistryError::Digest {
                registry: registry.to_owned(),
                wanted: what,
                found: found.to_string(),
            }),
        }
    }
}

fn cut(registry: &str, what: &str, why: String) -> RegistryError {
    RegistryError::Cut {
        registry: registry.to_owned(),
        what: what.to_owned(),
        attempts: 1,
        why,
    }
}

/// As much of a blob as there is.
struct Got<'f> {
    file: &'f File,
    of: &'f Descriptor,
    hasher: Hasher,
    done: u64,
}

impl Got<'_> {
    fn restart(&mut self) -> io::Result<()> {
        self.hasher = Hasher::new(self.of.digest.algorithm());
        self.done = 0;
        self.file.set_len(0)
    }

    fn take(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, self.done)?;
        self.hasher.update(bytes);
        self.done += bytes.len() as u64;
        Ok(())
    }
}

/// Tries again what may go better, with growing pauses.
pub(super) async fn patiently<T>(
    options: &RegistryOptions,
    retry: &mut dyn FnMut(u32, &RegistryError),
    attempt: impl AsyncFn() -> Result<T, RegistryError>,
) -> Result<T, RegistryError> {
    let mut pause = options.pause;
    let mut made = 1;
    loop {
        match attempt().await {
            Err(error) if error.is_passing() && made < options.attempts => {
                retry(made, &error);
                tokio::time::sleep(pause).await;
                pause = pause.saturating_mul(2);
                made += 1;
            }
            Err(RegistryError::Cut {
                registry,
                what,
                why,
                ..
            }) => {
                return Err(RegistryError::Cut {
                    registry,
                    what,
                    why,
                    attempts: made,
                });
            }
            other => return other,
        }
    }
}
