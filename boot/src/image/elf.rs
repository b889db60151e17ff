//! ELF `vmlinux` for x86_64: loadable segments, the 64-bit entry and, if there is a note that names
//! it, the PVH entry. ELF-64 Object File Format 1.5; Xen `public/elfnote.h`.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout};

use crate::image::{KernelError, damaged, reaches};
use crate::source::Source;

const CLASS_64: u8 = 2;
const DATA_LITTLE: u8 = 1;
const TYPE_EXEC: u16 = 2;
const TYPE_DYN: u16 = 3;
const MACHINE_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// Program headers read at most; Linux has five.
const PHNUM_MAX: u16 = 64;
/// Bytes of notes read at most; Linux has half a KiB.
const NOTES_MAX: u64 = 64 << 10;
/// `XEN_ELFNOTE_PHYS32_ENTRY`, in the name space `Xen`.
const PHYS32_ENTRY: u32 = 18;

#[derive(FromBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Header {
    magic: [u8; 4],
    class: u8,
    data: u8,
    ident_rest: [u8; 10],
    kind: U16,
    machine: U16,
    version: U32,
    entry: U64,
    phoff: U64,
    shoff: U64,
    flags: U32,
    ehsize: U16,
    phentsize: U16,
    phnum: U16,
    shentsize: U16,
    shnum: U16,
    shstrndx: U16,
}

#[derive(FromBytes, KnownLayout, Immutable)]
#[repr(C)]
struct ProgramHeader {
    kind: U32,
    flags: U32,
    offset: U64,
    vaddr: U64,
    paddr: U64,
    filesz: U64,
    memsz: U64,
    align: U64,
}

#[derive(FromBytes, KnownLayout, Immutable)]
#[repr(C)]
struct NoteHeader {
    name_size: U32,
    desc_size: U32,
    kind: U32,
}

/// One loadable segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    /// First byte in the file.
    pub(crate) offset: u64,
    /// Bytes in the file; they are all there.
    pub(crate) file_size: u64,
    /// Guest-physical address.
    pub(crate) gpa: u64,
    /// Bytes in memory, no less than in the file, and not past the end of the address space.
    pub(crate) size: u64,
}

impl Segment {
    fn end(&self) -> u64 {
        self.gpa.saturating_add(self.size)
    }
}

/// The facts in the headers of a `vmlinux`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Elf {
    /// By address, not empty, none overlapping another.
    pub(crate) segments: Vec<Segment>,
    /// 64-bit entry, in a segment.
    pub(crate) entry: u64,
    /// PVH entry, in a segment.
    pub(crate) pvh_entry: Option<u32>,
}

pub(super) fn has_magic(head: &[u8]) -> bool {
    head.len() >= size_of::<Header>() && head.starts_with(b"\x7fELF")
}

impl Elf {
    pub(super) fn parse(source: &Source, head: &[u8]) -> Result<Self, KernelError> {
        let unknown = |looks| KernelError::Unknown {
            name: source.name().into(),
            looks,
        };
        let (header, _) = Header::read_from_prefix(head)
            .map_err(|_| damaged(source, "its ELF header is cut off"))?;
        if header.class != CLASS_64 {
            return Err(KernelError::Not64 {
                name: source.name().into(),
            });
        }
        if header.data != DATA_LITTLE || header.machine != MACHINE_X86_64 {
            return Err(unknown(machine(header.machine.get(), header.data)));
        }
        if header.kind != TYPE_EXEC && header.kind != TYPE_DYN {
            return Err(unknown(
                "an ELF object or core file; give the linked vmlinux",
            ));
        }
        let headers = program_headers(source, &header)?;
        let segments = segments(source, &headers)?;
        let inside = |gpa: u64| segments.iter().any(|s| s.gpa <= gpa && gpa < s.end());
        let entry = header.entry.get();
        if !inside(entry) {
            return Err(damaged(
                source,
                "its entry point lies in no segment; is it an ordinary program?",
            ));
        }
        let mut pvh_entry = None;
        for note in headers.iter().filter(|h| h.kind == PT_NOTE) {
            pvh_entry = pvh_entry.or(phys32_entry(source, note)?);
        }
        if pvh_entry.is_some_and(|gpa| !inside(gpa.into())) {
            return Err(damaged(source, "its PVH entry point lies in no segment"));
        }
        Ok(Self {
            segments,
            entry,
            pvh_entry,
        })
    }

    /// Whether it has a PVH entry.
    pub fn has_pvh_entry(&self) -> bool {
        self.pvh_entry.is_some()
    }

    /// From the first byte of the lowest segment to the end of the highest. Everything in between
    /// is the kernel's, gaps included: Linux reserves `_text.._end` as one.
    pub(crate) fn extent(&self) -> (u64, u64) {
        let start = self.segments.first().map_or(0, |s| s.gpa);
        let end = self.segments.last().map_or(0, Segment::end);
        (start, end.saturating_sub(start))
    }
}

fn machine(machine: u16, data: u8) -> &'static str {
    match machine {
        3 => "an ELF file for 32-bit x86",
        22 => "an ELF file for s390x",
        40 => "an ELF file for 32-bit Arm",
        183 => "an ELF file for aarch64",
        243 => "an ELF file for riscv",
        _ if data != DATA_LITTLE => "a big-endian ELF file",
        _ => "an ELF file for another machine",
    }
}

fn program_headers(source: &Source, header: &Header) -> Result<Vec<ProgramHeader>, KernelError> {
    let count = header.phnum.get();
    if usize::from(header.phentsize.get()) != size_of::<ProgramHeader>() {
        return Err(damaged(
            source,
            "its program headers have another size than ELF-64's 56 bytes",
        ));
    }
    if count == 0 || count > PHNUM_MAX {
        return Err(damaged(
            source,
            "it has no program headers, or more than 64",
        ));
    }
    let start = header.phoff.get();
    let size = usize::from(count).saturating_mul(size_of::<ProgramHeader>());
    let end = start.saturating_add(u64::try_from(size).unwrap_or(u64::MAX));
    reaches(source, "the program header table", end)?;
    let mut bytes = vec![0; size];
    source.read_at(start, &mut bytes)?;
    let headers = bytes.chunks_exact(size_of::<ProgramHeader>());
    Ok(headers
        .filter_map(|h| ProgramHeader::read_from_bytes(h).ok())
        .collect())
}

fn segments(source: &Source, headers: &[ProgramHeader]) -> Result<Vec<Segment>, KernelError> {
    let mut segments = Vec::new();
    for header in headers.iter().filter(|h| h.kind == PT_LOAD && h.memsz != 0) {
        let segment = Segment {
            offset: header.offset.get(),
            file_size: header.filesz.get(),
            gpa: header.paddr.get(),
            size: header.memsz.get(),
        };
        if segment.file_size > segment.size {
            return Err(damaged(
                source,
                "a segment has more bytes in the file than in memory",
            ));
        }
        if segment.gpa.checked_add(segment.size).is_none() {
            return Err(damaged(
                source,
                "a segment passes the end of the address space",
            ));
        }
        reaches(
            source,
            "a segment",
            segment.offset.saturating_add(segment.file_size),
        )?;
        segments.push(segment);
    }
    segments.sort_by_key(|s| s.gpa);
    if segments.is_empty() {
        return Err(damaged(source, "it has no loadable segment"));
    }
    let overlap = segments
        .iter()
        .zip(segments.iter().skip(1))
        .any(|(low, high)| low.end() > high.gpa);
    if overlap {
        return Err(damaged(source, "two of its segments overlap"));
    }
    Ok(segments)
}

/// The entry in a note segment, if it has one.
fn phys32_entry(source: &Source, header: &ProgramHeader) -> Result<Option<u32>, KernelError> {
    let (start, size) = (header.offset.get(), header.filesz.get());
    reaches(source, "a note segment", start.saturating_add(size))?;
    if size > NOTES_MAX {
        return Err(damaged(source, "it has more than 64 KiB of notes"));
    }
    let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
    source.read_at(start, &mut bytes)?;
    let align = if header.align == 8 { 8 } else { 4 };
    Ok(find_phys32_entry(&bytes, align))
}

fn find_phys32_entry(mut rest: &[u8], align: usize) -> Option<u32> {
    // Each turn consumes at least a note header, so the turns are bounded by the bytes.
    while let Ok((note, after)) = NoteHeader::read_from_prefix(rest) {
        let name_size = usize::try_from(note.name_size.get()).ok()?;
        let desc_size = usize::try_from(note.desc_size.get()).ok()?;
        let desc_start = name_size.checked_next_multiple_of(align)?;
        let name = after.get(..name_size)?;
        let desc = after.get(desc_start..)?.get(..desc_size)?;
        if name == b"Xen\0" && note.kind == PHYS32_ENTRY {
            return match *desc {
                [a, b, c, d] | [a, b, c, d, 0, 0, 0, 0] => Some(u32::from_le_bytes([a, b, c, d])),
                _ => None,
            };
        }
        let next = desc_start.checked_add(desc_size.checked_next_multiple_of(align)?)?;
        rest = after.get(next..)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Image, ImageKind};
    use crate::x86_64::samples::{ElfSample, elf};

    fn identify(bytes: Vec<u8>) -> Result<Image, KernelError> {
        Image::identify(Source::from_bytes("vmlinux", bytes).unwrap())
    }

    fn message(bytes: Vec<u8>) -> String {
        identify(bytes).unwrap_err().to_string()
    }

    fn parsed(bytes: Vec<u8>) -> Elf {
        match identify(bytes).unwrap().kind() {
            ImageKind::Elf(elf) => elf.clone(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn segments_and_entries_are_taken() {
        let elf = parsed(elf(&ElfSample::default()));
        assert_eq!(elf.pvh_entry, Some(0x100_0040));
        assert_eq!(elf.entry, 0x100_0000);
        assert_eq!(elf.extent(), (0x100_0000, 0x30_0000));
        assert_eq!(elf.segments.len(), 2);
    }

    #[test]
    fn no_note_is_no_pvh() {
        assert!(
            !parsed(elf(&ElfSample {
                pvh: None,
                ..Default::default()
            }))
            .has_pvh_entry()
        );
    }

    #[test]
    fn bad_headers_are_named() {
        let sample = || elf(&ElfSample::default());
        let with = |offset: usize, bytes: &[u8]| {
            let mut image = sample();
            image[offset..offset + bytes.len()].copy_from_slice(bytes);
            image
        };
        assert!(message(with(4, &[1])).contains("32-bit"));
        assert!(message(with(18, &[183, 0])).ends_with("looks like an ELF file for aarch64"));
        assert!(message(with(5, &[2])).contains("big-endian"));
        assert!(message(with(16, &[1])).contains("object or core"));
        assert!(message(with(24, &[0xff; 8])).contains("entry point lies in no segment"));
        assert!(message(with(32, &[0xff; 8])).contains("truncated: the program header table"));
        assert!(message(with(54, &[55])).contains("56 bytes"));
        assert!(message(with(56, &[0xff, 0xff])).contains("more than 64"));
        // The first segment: filesz beyond memsz, beyond the file, memsz beyond everything.
        let first = 64;
        assert!(
            message(with(first + 32, &(1u64 << 40).to_le_bytes()))
                .contains("more bytes in the file")
        );
        assert!(
            message(with(first + 8, &(1u64 << 62).to_le_bytes())).contains("truncated: a segment")
        );
        assert!(message(with(first + 40, &[0xff; 8])).contains("end of the address space"));
        assert!(message(with(first + 40, &(64u64 << 20).to_le_bytes())).contains("overlap"));
        let outside = ElfSample {
            pvh: Some(0x7fff_ffff),
            ..Default::default()
        };
        assert!(message(elf(&outside)).contains("PVH entry"));
    }

    #[test]
    fn hostile_notes_end() {
        assert_eq!(find_phys32_entry(&[0; 4096], 4), None);
        assert_eq!(find_phys32_entry(&[0xff; 4096], 8), None);
    }
}
