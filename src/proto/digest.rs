//! SHA-1 (FIPS 180-4) for the WebSocket handshake, and base64 (RFC 4648) for the handshake and for entropy.

use crate::bytes::copy;

/// The alphabet (RFC 4648 section 4).
pub const BASE64: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// Size of a block in bytes.
const BLOCK: usize = 64;
/// Size of the message's length, at the end of the last block, in bytes.
const LENGTH: usize = 8;

/// The initial hash value (section 5.3.1).
const INITIAL: [u32; 5] = [
    0x6745_2301,
    0xefcd_ab89,
    0x98ba_dcfe,
    0x1032_5476,
    0xc3d2_e1f0,
];

/// The SHA-1 digest of a message.
pub fn sha1(message: &[u8]) -> [u8; 20] {
    let mut state = INITIAL;
    let (blocks, rest) = message.as_chunks();
    for block in blocks {
        compress(&mut state, block);
    }
    // The rest of the message, a bit, zeros, and the length: one or two blocks (section 5.1.1).
    let mut padded = [0; 2 * BLOCK];
    copy(rest, &mut padded);
    if let Some(slot) = padded.get_mut(rest.len()) {
        *slot = 0x80;
    }
    let last = if rest.len() + 1 + LENGTH <= BLOCK {
        1
    } else {
        2
    };
    let bits = (message.len() as u64).wrapping_mul(8).to_be_bytes();
    let length = padded.get_mut(last * BLOCK - LENGTH..);
    copy(&bits, length.unwrap_or(&mut []));
    for block in padded.as_chunks().0.iter().take(last) {
        compress(&mut state, block);
    }
    let mut digest = [0; 20];
    for (slot, word) in digest.as_chunks_mut().0.iter_mut().zip(&state) {
        *slot = word.to_be_bytes();
    }
    digest
}

/// Adds a block to the hash value (section 6.1.2).
fn compress(state: &mut [u32; 5], block: &[u8; BLOCK]) {
    // The message schedule, of which sixteen words are needed at a time.
    let mut schedule = [0; 16];
    for (slot, word) in schedule.iter_mut().zip(block.as_chunks().0) {
        *slot = u32::from_be_bytes(*word);
    }
    let [mut a, mut b, mut c, mut d, mut e] = *state;
    for round in 0..80 {
        let (mix, constant) = match round {
            0..20 => (b & c | !b & d, 0x5a82_7999),
            20..40 => (b ^ c ^ d, 0x6ed9_eba1),
            40..60 => (b & c | b & d | c & d, 0x8f1b_bcdc),
            _ => (b ^ c ^ d, 0xca62_c1d6u32),
        };
        let next = a
            .rotate_left(5)
            .wrapping_add(mix)
            .wrapping_add(e)
            .wrapping_add(constant)
            .wrapping_add(schedule[0]);
        (e, d, c, b, a) = (d, c, b.rotate_left(30), a, next);
        let word = (schedule[13] ^ schedule[8] ^ schedule[2] ^ schedule[0]).rotate_left(1);
        schedule.copy_within(1.., 0);
        schedule[15] = word;
    }
    for (sum, value) in state.iter_mut().zip(&[a, b, c, d, e]) {
        *sum = sum.wrapping_add(*value);
    }
}

/// Encodes a digest as base64: 27 characters and one of padding.
pub fn base64(digest: &[u8; 20]) -> [u8; 28] {
    let mut text = [b'='; 28];
    let byte = |at: usize| digest.get(at).copied().unwrap_or(0);
    for (at, character) in text.iter_mut().take(27).enumerate() {
        let bit = 6 * at;
        let bytes = u16::from_be_bytes([byte(bit / 8), byte(bit / 8 + 1)]);
        let index = usize::from(bytes >> (10 - bit % 8) & 63);
        *character = BASE64.get(index).copied().unwrap_or(b'=');
    }
    text
}

/// Decodes padded base64 (section 4), at most three bytes at a time. Returns whether it is valid.
pub fn decode_base64(text: &str, each: &mut dyn FnMut(&[u8])) -> bool {
    let (groups, rest) = text.as_bytes().as_chunks::<4>();
    let last = groups.len().saturating_sub(1);
    for (at, group) in groups.iter().enumerate() {
        let padding = group.iter().rev().take_while(|byte| **byte == b'=').count();
        if padding > 2 || padding > 0 && at != last {
            return false;
        }
        let mut bits = 0;
        for character in group.iter().take(4 - padding) {
            let Some(value) = BASE64.iter().position(|known| known == character) else {
                return false;
            };
            bits = bits << 6 | value as u32;
        }
        let [_, bytes @ ..] = (bits << (6 * padding)).to_be_bytes();
        each(bytes.get(..3 - padding).unwrap_or(&[]));
    }
    rest.is_empty()
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
    fn sha1_and_base64_match_the_standards_examples() {
        assert_eq!(hex(b"abc"), "a9993e364706816aba3e25717850c26c9cd0d89d");
        assert_eq!(hex(b""), "da39a3ee5e6b4b0d3255bfef95601890afd80709");
        let two_blocks = b"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq";
        assert_eq!(hex(two_blocks), "84983e441c3bd26ebaae4aa1f95129e5e54670f1");
        let million = vec![b'a'; 1_000_000];
        assert_eq!(hex(&million), "34aa973cd4c4daa4f61eeb2bdbad27316534016f");
        assert_eq!(base64(&[0; 20]), *b"AAAAAAAAAAAAAAAAAAAAAAAAAAA=");
        assert_eq!(base64(&[255; 20]), *b"//////////////////////////8=");
        assert_eq!(base64(&sha1(b"abc")), *b"qZk+NkcGgWq6PiVxeFDCbJzQ2J0=");
    }

    #[test]
    fn base64_is_decoded_and_invalid_text_refused() {
        let decode = |text: &str| {
            let mut bytes = vec![];
            decode_base64(text, &mut |piece| bytes.extend_from_slice(piece)).then_some(bytes)
        };
        // RFC 4648 section 10.
        for (text, bytes) in [
            ("", ""),
            ("Zg==", "f"),
            ("Zm8=", "fo"),
            ("Zm9v", "foo"),
            ("Zm9vYg==", "foob"),
            ("Zm9vYmE=", "fooba"),
            ("Zm9vYmFy", "foobar"),
        ] {
            assert_eq!(decode(text).as_deref(), Some(bytes.as_bytes()), "{text}");
        }
        let digest = sha1(b"abc");
        let text = base64(&digest);
        assert_eq!(decode(str::from_utf8(&text).unwrap()).unwrap(), digest);
        for wrong in [
            "Zg", "Zg=", "Z===", "====", "Zg==Zg==", "Zm 9", "Zm9v\n", "Zm-_", "Zm9vé",
        ] {
            assert_eq!(decode(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn the_padding_is_right_around_the_end_of_a_block() {
        for (length, expected) in [
            (55, "c1c8bbdc22796e28c0e15163d20899b65621d65a"),
            (56, "c2db330f6083854c99d4b5bfb6e8f29f201be699"),
            (63, "03f09f5b158a7a8cdad920bddc29b81c18a551f5"),
            (64, "0098ba824b5c16427bd7a1122a5a442a25ec644d"),
            (119, "ee971065aaa017e0632a8ca6c77bb3bf8b1dfc56"),
            (120, "f34c1488385346a55709ba056ddd08280dd4c6d6"),
        ] {
            assert_eq!(hex(&vec![b'a'; length]), expected, "{length}");
        }
    }
}
