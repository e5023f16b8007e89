//! SHA-1 and base64 for the WebSocket handshake, and for nothing else.
//!
//! The crates for them are fast and general at 6 KiB; this is one block of each a connection.

/// The alphabet (RFC 4648 section 4).
pub const BASE64: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// SHA-1 (RFC 3174) of a message of at most 119 bytes: two blocks with their padding.
pub fn sha1(message: &[u8]) -> [u32; 5] {
    let padded = |at: usize| match message.get(at) {
        Some(byte) => *byte,
        None if at == message.len() => 0x80,
        None => 0,
    };
    let words = if message.len() < 56 { 16 } else { 32 };
    let mut digest = [
        0x6745_2301u32,
        0xefcd_ab89,
        0x98ba_dcfe,
        0x1032_5476,
        0xc3d2_e1f0,
    ];
    let mut schedule = [0u32; 80];
    for start in (0..words).step_by(16) {
        for round in 0..80 {
            let back = |by: usize| schedule.get(round - by).unwrap_or(&0);
            let word = match round {
                15 if start + 16 == words => message.len() as u32 * 8,
                0..16 => (0..4).fold(0, |word, at| {
                    word << 8 | u32::from(padded(4 * (start + round) + at))
                }),
                _ => (back(3) ^ back(8) ^ back(14) ^ back(16)).rotate_left(1),
            };
            if let Some(slot) = schedule.get_mut(round) {
                *slot = word;
            }
        }
        compress(&mut digest, &schedule);
    }
    digest
}

fn compress(digest: &mut [u32; 5], schedule: &[u32; 80]) {
    let [mut a, mut b, mut c, mut d, mut e] = *digest;
    for (round, word) in schedule.iter().enumerate() {
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
            .wrapping_add(*word);
        (e, d, c, b, a) = (d, c, b.rotate_left(30), a, next);
    }
    for (sum, value) in digest.iter_mut().zip(&[a, b, c, d, e]) {
        *sum = sum.wrapping_add(*value);
    }
}

/// A digest as base64, with its padding: 6 bits a character, and zeros behind the last ones.
pub fn base64(digest: &[u32; 5]) -> [u8; 28] {
    let word = |at: usize| u64::from(digest.get(at).copied().unwrap_or(0));
    let mut text = [b'='; 28];
    for (at, slot) in text.iter_mut().enumerate().take(27) {
        let bit = 6 * at;
        let bits = word(bit / 32) << 32 | word(bit / 32 + 1);
        let index = bits >> (58 - bit % 32) & 63;
        *slot = BASE64.get(index as usize).copied().unwrap_or(b'=');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(message: &[u8]) -> String {
        sha1(message)
            .iter()
            .map(|word| format!("{word:08x}"))
            .collect()
    }

    #[test]
    fn the_standards_examples_come_out() {
        assert_eq!(hex(b"abc"), "a9993e364706816aba3e25717850c26c9cd0d89d");
        assert_eq!(hex(b""), "da39a3ee5e6b4b0d3255bfef95601890afd80709");
        let two_blocks = b"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq";
        assert_eq!(hex(two_blocks), "84983e441c3bd26ebaae4aa1f95129e5e54670f1");
        assert_eq!(base64(&[0; 5]), *b"AAAAAAAAAAAAAAAAAAAAAAAAAAA=");
        assert_eq!(base64(&sha1(b"abc")), *b"qZk+NkcGgWq6PiVxeFDCbJzQ2J0=");
    }
}
