//! What all texts are read with: not generic, so each of these is in the program once.

use core::ops::Range;

/// The pieces of `bytes` between the separators `at`, one more than there are separators.
pub fn split(bytes: &[u8], at: u8) -> Split<'_> {
    Split {
        rest: Some(bytes),
        at,
    }
}

/// What is before the first `at`; all where there is none.
#[inline(never)]
pub fn before(bytes: &[u8], at: u8) -> &[u8] {
    find(bytes, at)
        .and_then(|end| bytes.get(..end))
        .unwrap_or(bytes)
}

/// See [`split`].
#[derive(Clone, Debug)]
pub struct Split<'a> {
    rest: Option<&'a [u8]>,
    at: u8,
}

impl<'a> Split<'a> {
    /// All that is behind the pieces given.
    #[inline(never)]
    pub fn rest(&self) -> &'a [u8] {
        self.rest.unwrap_or(&[])
    }
}

impl<'a> Iterator for Split<'a> {
    type Item = &'a [u8];

    #[inline(never)]
    fn next(&mut self) -> Option<&'a [u8]> {
        let rest = self.rest?;
        let Some(end) = find(rest, self.at) else {
            return self.rest.take();
        };
        self.rest = rest.get(end + 1..);
        rest.get(..end)
    }
}

/// Where the first `byte` is.
#[inline(never)]
pub fn find(bytes: &[u8], byte: u8) -> Option<usize> {
    bytes.iter().position(|other| *other == byte)
}

/// Without white space at both ends.
#[inline(never)]
pub fn trim(bytes: &[u8]) -> &[u8] {
    bytes.trim_ascii()
}

/// Whether two words differ in the case of letters at most.
#[inline(never)]
pub fn same_word(word: &[u8], other: &[u8]) -> bool {
    let lower = |byte: &u8| byte.to_ascii_lowercase();
    word.len() == other.len() && word.iter().map(lower).eq(other.iter().map(lower))
}

/// A decimal number up to 2^32 - 1, of digits alone; no digits are no number.
#[inline(never)]
pub fn decimal(digits: &[u8]) -> Option<u32> {
    let (_first, _) = digits.split_first()?;
    digits.iter().try_fold(0u32, |sum, digit| {
        let digit = digit.wrapping_sub(b'0');
        (digit < 10).then_some(())?;
        sum.checked_mul(10)?.checked_add(u32::from(digit))
    })
}

/// A digit up to 15.
pub fn hexadecimal(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        b'A'..=b'F' => Some(digit - b'A' + 10),
        _ => None,
    }
}

/// Length of the character (RFC 3629) that comes first; of the bytes that are none is the error,
/// 0 where the rest of a character is missing.
#[inline(never)]
pub fn character(bytes: &[u8]) -> Result<usize, usize> {
    let (length, second) = match *bytes.first().ok_or(0usize)? {
        0..0x80 => return Ok(1),
        0xc2..0xe0 => (2, 0x80..0xc0),
        0xe0 => (3, 0xa0..0xc0),
        0xed => (3, 0x80..0xa0),
        0xe1..0xf0 => (3, 0x80..0xc0),
        0xf0 => (4, 0x90..0xc0),
        0xf4 => (4, 0x80..0x90),
        0xf1..0xf4 => (4, 0x80..0xc0),
        _ => return Err(1),
    };
    let mut range = second;
    for at in 1..length {
        match bytes.get(at) {
            None => return Err(0),
            Some(byte) if !range.contains(byte) => return Err(at),
            Some(_) => range = 0x80..0xc0,
        }
    }
    Ok(length)
}

/// How many bytes are UTF-8, from the first on.
pub fn valid_up_to(bytes: &[u8]) -> usize {
    let mut at = 0;
    while let Ok(length) = character(bytes.get(at..).unwrap_or(&[])) {
        at += length;
    }
    at
}

/// Takes `range` out of the first `filled` bytes of `buffer`: what is behind it moves.
#[inline(never)]
pub fn remove(buffer: &mut [u8], filled: &mut usize, range: Range<usize>) {
    if range.start < range.end && range.end <= *filled && *filled <= buffer.len() {
        buffer.copy_within(range.end..*filled, range.start);
        *filled -= range.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_those_of_core() {
        for text in ["", ",", "a", "a,", ",a", "a,,b"] {
            let pieces: Vec<_> = split(text.as_bytes(), b',').collect();
            let expected: Vec<_> = text.split(',').map(str::as_bytes).collect();
            assert_eq!(pieces, expected, "{text:?}");
        }
    }

    #[test]
    fn words_are_the_same_in_either_case() {
        assert!(same_word(b"Keep-Alive", b"keep-alive"));
        assert!(!same_word(b"Keep-Alive", b"keep-aliv"));
        assert!(!same_word(b"@", b"`"));
    }

    #[test]
    fn characters_are_those_of_core() {
        // All second bytes behind all first ones, and a fourth that is wrong.
        for first in 0..=255u8 {
            for second in 0..=255u8 {
                for tail in [&[][..], &[0x80], &[0x80, 0x80], &[0x80, 0x80, b'x'], b"x"] {
                    let bytes = [&[first, second], tail].concat();
                    let chunk = bytes.utf8_chunks().next().unwrap();
                    let expected = match (chunk.valid().chars().next(), chunk.invalid().len()) {
                        (Some(character), _) => Ok(character.len_utf8()),
                        (None, length) => match std::str::from_utf8(&bytes) {
                            Err(error) if error.error_len().is_none() => Err(0),
                            _ => Err(length),
                        },
                    };
                    assert_eq!(character(&bytes), expected, "{bytes:x?}");
                }
            }
        }
        assert_eq!(valid_up_to("aä€𝄞\u{7f}".as_bytes()), 11);
        assert_eq!(valid_up_to(b"a\xe2\x82"), 1);
    }
}
