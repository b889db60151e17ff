//! Finished tables (ACPI, MP, boot-time page tables) into guest RAM.

use testudo_arch::GuestBlob;
use testudo_memory::RamView;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::layout::{Layout, PlaceError, Reservation};

/// A table could not be written.
#[derive(Debug, Error)]
pub enum BlobError {
    /// Its place is taken or is no RAM.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// Guest RAM refused.
    #[error("cannot write {what} at {gpa:#x}")]
    Write {
        /// What was written.
        what: Box<str>,
        /// First guest-physical address.
        gpa: u64,
        /// Why.
        #[source]
        source: GuestMemoryError,
    },
}

/// Reserves the place of each blob and writes it there.
pub fn write_blobs<'a>(
    layout: &mut Layout,
    ram: &RamView,
    blobs: impl IntoIterator<Item = &'a GuestBlob>,
) -> Result<(), BlobError> {
    for blob in blobs {
        let size = u64::try_from(blob.bytes.len()).unwrap_or(u64::MAX);
        let place = layout.at(blob.name, blob.gpa, size)?;
        write(ram, &place, &blob.bytes)?;
    }
    Ok(())
}

/// Writes `bytes` at the beginning of `place`; they must fit.
pub(crate) fn write(ram: &RamView, place: &Reservation, bytes: &[u8]) -> Result<(), BlobError> {
    let failed = |source| BlobError::Write {
        what: place.what().into(),
        gpa: place.gpa(),
        source,
    };
    let size = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
    let gpa = place.part(0, size).ok_or_else(|| {
        failed(GuestMemoryError::PartialBuffer {
            expected: bytes.len(),
            completed: usize::try_from(place.size()).unwrap_or(usize::MAX),
        })
    })?;
    ram.write_slice(bytes, GuestAddress(gpa)).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blobs_are_written_where_they_belong_and_never_overlap() {
        let ram = RamView::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let mut layout = Layout::new(&ram, []);
        let blob = |name, gpa, bytes: &str| GuestBlob {
            name,
            gpa,
            bytes: bytes.into(),
        };
        let tables = [
            blob("rsdp", 0xe0000, "RSD PTR "),
            blob("xsdt", 0xe0040, "XSDT"),
        ];
        write_blobs(&mut layout, &ram, &tables).unwrap();
        let mut seen = [0; 4];
        ram.read_slice(&mut seen, GuestAddress(0xe0040)).unwrap();
        assert_eq!(&seen, b"XSDT");
        let error = write_blobs(&mut layout, &ram, [&blob("fadt", 0xe0042, "FACP")]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "fadt at 0xe0042 (+0x4) collides with xsdt at 0xe0040 (+0x4)"
        );
        let error = write_blobs(&mut layout, &ram, [&blob("ssdt", 0xffffe, "SSDT")]).unwrap_err();
        assert!(
            error.to_string().contains("does not lie in guest RAM"),
            "{error}"
        );
    }
}
