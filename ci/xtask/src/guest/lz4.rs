//! LZ4's legacy frame, in which Linux packs its image: the magic number, then blocks, each preceded
//! by its packed length, each of at most 8 MiB unpacked (lz4_Frame_format.md, "Legacy frame";
//! lz4_Block_format.md).

use anyhow::{Context, Result, ensure};

pub(super) const MAGIC: u32 = 0x184c_2102;
const BLOCK_LIMIT: usize = 8 << 20;
const SHORTEST_MATCH: usize = 4;

/// Unpacks a frame.
pub(super) fn unpack(mut frame: &[u8]) -> Result<Vec<u8>> {
    ensure!(word(&mut frame) == Some(MAGIC), "no LZ4 legacy frame");
    let mut out = Vec::new();
    while !frame.is_empty() {
        let length = word(&mut frame).and_then(|n| usize::try_from(n).ok());
        let length = length.context("a block without its length")?;
        let (packed, rest) = frame
            .split_at_checked(length)
            .context("the last block is cut off")?;
        block(packed, &mut out)?;
        frame = rest;
    }
    Ok(out)
}

fn word(bytes: &mut &[u8]) -> Option<u32> {
    let (first, rest) = bytes.split_first_chunk::<4>()?;
    *bytes = rest;
    Some(u32::from_le_bytes(*first))
}

/// Sequences of literals and a match; the last one has literals only.
fn block(mut packed: &[u8], out: &mut Vec<u8>) -> Result<()> {
    let start = out.len();
    while let Some((token, rest)) = packed.split_first() {
        packed = rest;
        let literals = length(usize::from(token >> 4), &mut packed)?;
        let (copied, rest) = packed
            .split_at_checked(literals)
            .context("literals are cut off")?;
        out.extend_from_slice(copied);
        packed = rest;
        let Some((offset, rest)) = packed.split_first_chunk::<2>() else {
            ensure!(packed.is_empty(), "a match without its offset");
            break;
        };
        packed = rest;
        let offset = usize::from(u16::from_le_bytes(*offset));
        let matched = length(usize::from(token & 0xf), &mut packed)? + SHORTEST_MATCH;
        ensure!(
            offset != 0 && offset <= out.len() - start,
            "a match reaches before its block"
        );
        ensure!(
            out.len() - start + matched <= BLOCK_LIMIT,
            "a block is larger than 8 MiB"
        );
        // A match may overlap what it writes, by which it repeats itself.
        let from = out.len() - offset;
        for at in from..from + matched {
            out.push(out[at]);
        }
    }
    ensure!(
        out.len() - start <= BLOCK_LIMIT,
        "a block is larger than 8 MiB"
    );
    Ok(())
}

/// A length of four bits that 15 continues by bytes, up to the first that is not 255.
fn length(nibble: usize, packed: &mut &[u8]) -> Result<usize> {
    let mut length = nibble;
    if nibble == 15 {
        loop {
            let (byte, rest) = packed.split_first().context("a length is cut off")?;
            *packed = rest;
            length += usize::from(*byte);
            if *byte != 255 {
                break;
            }
        }
    }
    Ok(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(blocks: &[&[u8]]) -> Vec<u8> {
        let mut bytes = MAGIC.to_le_bytes().to_vec();
        for block in blocks {
            bytes.extend(u32::try_from(block.len()).unwrap().to_le_bytes());
            bytes.extend(*block);
        }
        bytes
    }

    #[test]
    fn literals_matches_and_long_lengths() {
        // "abc", then 4 + 15 + 3 bytes from three back, then the literal "z".
        let block = [0x3f, b'a', b'b', b'c', 3, 0, 3, 0x10, b'z'];
        let text = unpack(&frame(&[&block])).unwrap();
        assert_eq!(text, b"abcabcabcabcabcabcabcabcaz");
        // Blocks do not see each other, their outputs are joined.
        let joined = unpack(&frame(&[&[0x10, b'x'], &[0x10, b'y']])).unwrap();
        assert_eq!(joined, b"xy");
    }

    #[test]
    fn damage_is_an_error() {
        for block in [
            &[0x01, 5, 0][..],    // a match before the block
            &[0x01, 0, 0][..],    // offset 0
            &[0xf0, 255][..],     // a length that does not end
            &[0x40, b'x'][..],    // too few literals
            &[0x10, b'x', 1][..], // half an offset
        ] {
            assert!(unpack(&frame(&[block])).is_err(), "{block:?}");
        }
        assert!(unpack(&[1, 2, 3, 4, 0, 0, 0, 0]).is_err());
        let mut cut = frame(&[&[0x10, b'x']]);
        cut[4] = 200;
        assert!(unpack(&cut).is_err());
    }
}
