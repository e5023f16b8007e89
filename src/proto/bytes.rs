//! Copying and splitting of byte strings.
//!
//! Not generic, so that each function is in the program once; core's searchers for characters and closures
//! are compiled again for every call.

use core::fmt::{self, Write};

/// Copies as many bytes as fit. Returns their number.
pub fn copy(from: &[u8], to: &mut [u8]) -> usize {
    let count = from.len().min(to.len());
    if let (Some(from), Some(to)) = (from.get(..count), to.get_mut(..count)) {
        to.copy_from_slice(from);
    }
    count
}

/// Writes formatted text to a buffer; a piece that does not fit is an error.
#[derive(Debug)]
pub struct SliceWriter<'a> {
    room: &'a mut [u8],
    length: usize,
}

impl<'a> SliceWriter<'a> {
    /// A writer that has not written anything.
    pub fn new(room: &'a mut [u8]) -> Self {
        Self { room, length: 0 }
    }

    /// The text written so far.
    pub fn as_bytes(&self) -> &[u8] {
        self.room.get(..self.length).unwrap_or(&[])
    }

    /// The text written, as part of the buffer.
    pub fn into_bytes(self) -> &'a [u8] {
        self.room.get(..self.length).unwrap_or(&[])
    }
}

impl Write for SliceWriter<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let end = self.length + text.len();
        let room = self.room.get_mut(self.length..end).ok_or(fmt::Error)?;
        room.copy_from_slice(text.as_bytes());
        self.length = end;
        Ok(())
    }
}

/// Whether a byte is one of `A-Z a-z 0-9 . _ -`, the characters of plain names.
pub fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"._-".contains(&byte)
}

/// The position of the first `byte`.
pub fn find(bytes: &[u8], byte: u8) -> Option<usize> {
    bytes.iter().position(|other| *other == byte)
}

/// The parts before and after the first `byte`.
pub fn split_once(bytes: &[u8], byte: u8) -> Option<(&[u8], &[u8])> {
    let at = find(bytes, byte)?;
    Some((bytes.get(..at)?, bytes.get(at + 1..)?))
}

/// The part before the first `byte`; everything if there is none.
pub fn before(bytes: &[u8], byte: u8) -> &[u8] {
    split_once(bytes, byte).map_or(bytes, |(before, _)| before)
}

/// [`split_once`] for a string, at an ASCII character.
pub fn split_text_once(text: &str, ascii: u8) -> Option<(&str, &str)> {
    let at = find(text.as_bytes(), ascii)?;
    Some((text.get(..at)?, text.get(at + 1..)?))
}

/// The words of a text, separated by white space.
pub fn words(text: &[u8]) -> Words<'_> {
    Words(text)
}

/// See [`words`].
#[derive(Clone, Debug)]
pub struct Words<'a>(&'a [u8]);

impl<'a> Iterator for Words<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let rest = self.0.trim_ascii_start();
        let end = rest.iter().position(u8::is_ascii_whitespace);
        let (word, rest) = rest.split_at_checked(end.unwrap_or(rest.len()))?;
        self.0 = rest;
        (!word.is_empty()).then_some(word)
    }
}

/// The pieces of `bytes` between the separators, one more than there are separators.
pub fn split(bytes: &[u8], separator: u8) -> Split<'_> {
    Split {
        rest: Some(bytes),
        separator,
    }
}

/// See [`split`].
#[derive(Clone, Debug)]
pub struct Split<'a> {
    rest: Option<&'a [u8]>,
    separator: u8,
}

impl<'a> Iterator for Split<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let rest = self.rest?;
        let Some((piece, behind)) = split_once(rest, self.separator) else {
            return self.rest.take();
        };
        self.rest = Some(behind);
        Some(piece)
    }
}

impl DoubleEndedIterator for Split<'_> {
    fn next_back(&mut self) -> Option<Self::Item> {
        let rest = self.rest?;
        let is_separator = |byte: &u8| *byte == self.separator;
        let Some(at) = rest.iter().rposition(is_separator) else {
            return self.rest.take();
        };
        self.rest = rest.get(..at);
        rest.get(at + 1..)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copy_stops_at_the_shorter_slice() {
        for (from, copied) in [("", "...."), ("ab", "ab.."), ("abcdef", "abcd")] {
            let mut to = *b"....";
            assert_eq!(copy(from.as_bytes(), &mut to), from.len().min(4));
            assert_eq!(to, copied.as_bytes());
        }
    }

    #[test]
    fn a_piece_of_text_that_does_not_fit_is_not_written() {
        let mut room = *b"......";
        let mut text = SliceWriter::new(&mut room);
        assert!(write!(text, "{}", 123).is_ok());
        assert!(text.write_str("4567").is_err());
        assert!(text.write_str("456").is_ok());
        assert_eq!(text.as_bytes(), b"123456");
    }

    #[test]
    fn split_agrees_with_core_from_both_ends() {
        for text in ["", ",", "a", "a,", ",a", "a,,b"] {
            let expected: Vec<_> = text.split(',').map(str::as_bytes).collect();
            let pieces = split(text.as_bytes(), b',');
            assert_eq!(pieces.clone().collect::<Vec<_>>(), expected, "{text:?}");
            let backwards: Vec<_> = expected.into_iter().rev().collect();
            assert_eq!(pieces.rev().collect::<Vec<_>>(), backwards, "{text:?}");
        }
    }

    #[test]
    fn a_text_is_split_at_the_first_separator_if_any() {
        for text in ["", "=", "a", "a=", "=b", "a=b=c", "ä=ö"] {
            let expected = text.split_once('=');
            assert_eq!(split_text_once(text, b'='), expected);
            let as_bytes = expected.map(|(a, b)| (a.as_bytes(), b.as_bytes()));
            assert_eq!(split_once(text.as_bytes(), b'='), as_bytes);
            let start = text.split('=').next().unwrap();
            assert_eq!(before(text.as_bytes(), b'='), start.as_bytes());
        }
    }
}
