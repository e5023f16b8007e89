//! SHA-1 and base64 for the WebSocket handshake, and for nothing else.
//!
//! The crates for them are fast and general at 6 KiB; this is one block of each a connection.

/// The alphabet (RFC 4648 section 4).
pub const BASE64: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// A digest as base64, with its padding.
pub fn base64(digest: &[u8; 20]) -> [u8; 28] {
    let mut text = [b'='; 28];
    for (group, out) in digest.chunks(3).zip(text.chunks_mut(4)) {
        let bits = group
            .iter()
            .fold(0u32, |bits, byte| bits << 8 | u32::from(*byte))
            << (8 * (3 - group.len()));
        for (at, slot) in out.iter_mut().enumerate().take(group.len() + 1) {
            let index = bits >> (18 - 6 * at) & 63;
            *slot = BASE64.get(index as usize).copied().unwrap_or(b'=');
        }
    }
    text
}

/// SHA-1 (RFC 3174) of a message of at most 119 bytes: two blocks with their padding.
pub fn sha1(message: &[u8]) -> [u8; 20] {
    let mut blocks = [0u8; 128];
    let padded = message.iter().chain(&[0x80]);
    blocks
        .iter_mut()
        .zip(padded)
        .for_each(|(slot, byte)| *slot = *byte);
    let blocks_used = if message.len() < 56 { 1 } else { 2 };
    let length = (message.len() as u64 * 8).to_be_bytes();
    let end = blocks.iter_mut().skip(64 * blocks_used - 8);
    end.zip(length).for_each(|(slot, byte)| *slot = byte);

    let mut state = [
        0x6745_2301u32,
        0xefcd_ab89,
        0x98ba_dcfe,
        0x1032_5476,
        0xc3d2_e1f0,
    ];
    for block in blocks.chunks_exact(64).take(blocks_used) {
        let mut window = [0u32; 16];
        for (word, bytes) in window.iter_mut().zip(block.chunks_exact(4)) {
            *word = bytes
                .iter()
                .fold(0, |word, byte| word << 8 | u32::from(*byte));
        }
        let [mut a, mut b, mut c, mut d, mut e] = state;
        for round in 0..80u32 {
            let [word, ..] = window;
            let (mix, constant) = match round / 20 {
                0 => (b & c | !b & d, 0x5a82_7999),
                1 => (b ^ c ^ d, 0x6ed9_eba1),
                2 => (b & c | b & d | c & d, 0x8f1b_bcdc),
                _ => (b ^ c ^ d, 0xca62_c1d6u32),
            };
            let next = a
                .rotate_left(5)
                .wrapping_add(mix)
                .wrapping_add(e)
                .wrapping_add(constant)
                .wrapping_add(word);
            (e, d, c, b, a) = (d, c, b.rotate_left(30), a, next);
            // The schedule, sixteen words ahead: w[16] = (w[13] ^ w[8] ^ w[2] ^ w[0]) <<< 1.
            let [w0, _, w2, _, _, _, _, _, w8, _, _, _, _, w13, ..] = window;
            window.rotate_left(1);
            if let Some(last) = window.last_mut() {
                *last = (w13 ^ w8 ^ w2 ^ w0).rotate_left(1);
            }
        }
        for (sum, value) in state.iter_mut().zip([a, b, c, d, e]) {
            *sum = sum.wrapping_add(value);
        }
    }
    let mut digest = [0; 20];
    for (out, word) in digest.chunks_exact_mut(4).zip(state) {
        out.iter_mut()
            .zip(word.to_be_bytes())
            .for_each(|(slot, byte)| *slot = byte);
    }
    digest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(message: &[u8]) -> String {
        sha1(message)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }

    #[test]
    fn the_standards_examples_come_out() {
        assert_eq!(hex(b"abc"), "a9993e364706816aba3e25717850c26c9cd0d89d");
        assert_eq!(hex(b""), "da39a3ee5e6b4b0d3255bfef95601890afd80709");
        let two_blocks = b"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq";
        assert_eq!(hex(two_blocks), "84983e441c3bd26ebaae4aa1f95129e5e54670f1");
        assert_eq!(base64(&[0; 20]), *b"AAAAAAAAAAAAAAAAAAAAAAAAAAA=");
        assert_eq!(base64(&sha1(b"abc")), *b"qZk+NkcGgWq6PiVxeFDCbJzQ2J0=");
    }
}
