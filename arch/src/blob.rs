//! Bytes that must stand at a fixed place in guest RAM before the first vCPU runs.

use thiserror::Error;

use crate::Span;

/// Bytes for guest RAM: a table, a page table, a descriptor table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestBlob {
    /// What it is, for messages and plans.
    pub name: &'static str,
    /// Where its first byte goes.
    pub gpa: u64,
    /// The contents.
    pub bytes: Vec<u8>,
}

/// No room for one more blob.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{name} of {size} bytes does not fit: {left} bytes are left of {area}; plan fewer CPUs")]
pub struct BlobAreaError {
    /// The blob.
    pub name: &'static str,
    /// Its length.
    pub size: u64,
    /// What was left, alignment included.
    pub left: u64,
    /// Where blobs go.
    pub area: Span,
}

/// Places blobs one after the other in one span, so that none overlaps another.
#[derive(Debug)]
pub struct BlobArea {
    area: Span,
    next: u64,
    placed: Vec<GuestBlob>,
}

impl BlobArea {
    /// An empty area.
    pub fn new(area: Span) -> Self {
        Self {
            area,
            next: area.base(),
            placed: Vec::new(),
        }
    }

    /// Puts `bytes` at the next multiple of `align` and tells the address. An `align` of 0 counts
    /// as 1.
    pub fn place(
        &mut self,
        name: &'static str,
        align: u64,
        bytes: Vec<u8>,
    ) -> Result<u64, BlobAreaError> {
        let gpa = self.next.checked_next_multiple_of(align.max(1));
        let size = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        let fitted = gpa.and_then(|gpa| {
            let end = gpa.checked_add(size)?;
            (end <= self.area.end()).then_some((gpa, end))
        });
        let Some((gpa, end)) = fitted else {
            return Err(BlobAreaError {
                name,
                size,
                left: self.area.end().saturating_sub(gpa.unwrap_or(u64::MAX)),
                area: self.area,
            });
        };
        self.next = end;
        self.placed.push(GuestBlob { name, gpa, bytes });
        Ok(gpa)
    }

    /// Everything placed, in order.
    pub fn into_blobs(self) -> Vec<GuestBlob> {
        self.placed
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn blobs_never_overlap_and_stay_inside(
            base in 0u64..1 << 40,
            size in 1u64..1 << 16,
            wanted in prop::collection::vec((0usize..5000, 0u32..13), 0..20),
        ) {
            let span = Span::new(base, size).unwrap();
            let mut area = BlobArea::new(span);
            for (len, shift) in wanted {
                if let Ok(gpa) = area.place("blob", 1 << shift, vec![0; len]) {
                    prop_assert_eq!(gpa % (1 << shift), 0);
                }
            }
            let mut last = span.base();
            for blob in area.into_blobs() {
                prop_assert!(blob.gpa >= last);
                last = blob.gpa + blob.bytes.len() as u64;
                prop_assert!(last <= span.end());
            }
        }
    }
}
