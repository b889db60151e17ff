//! CRC-32C as the kernel computes it: seeded with ones, not inverted at the end.

const TABLE: [u32; 256] = table();

const fn table() -> [u32; 256] {
    let mut table = [0; 256];
    let mut i = 0;
    while i < 256 {
        let mut value = i;
        let mut bit = 0;
        while bit < 8 {
            value = if value & 1 == 1 {
                (value >> 1) ^ 0x82f6_3b78
            } else {
                value >> 1
            };
            bit += 1;
        }
        #[expect(clippy::indexing_slicing, reason = "evaluated when compiled")]
        {
            table[i as usize] = value;
        }
        i += 1;
    }
    table
}

/// Continues from `seed`.
pub(super) fn crc32c(seed: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(seed, |crc, byte| {
        let index = (crc ^ u32::from(*byte)) & 0xff;
        let entry = usize::try_from(index).ok().and_then(|i| TABLE.get(i));
        (crc >> 8) ^ entry.copied().unwrap_or(0)
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_check_value_of_crc32c() {
        assert_eq!(!super::crc32c(!0, b"123456789"), 0xe306_9283);
    }
}
