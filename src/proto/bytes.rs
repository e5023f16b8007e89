//! Texts taken apart at single bytes.
//!
//! Not generic, so that each of these is in the program once; core's searchers for characters and
//! closures are compiled anew at every call.

/// Where the first `byte` is.
pub fn find(bytes: &[u8], byte: u8) -> Option<usize> {
    bytes.iter().position(|other| *other == byte)
}

/// What is before the first `byte`, and what is behind it.
pub fn split_once(bytes: &[u8], byte: u8) -> Option<(&[u8], &[u8])> {
    let at = find(bytes, byte)?;
    Some((bytes.get(..at)?, bytes.get(at + 1..)?))
}

/// What is before the first `byte`; all where there is none.
pub fn before(bytes: &[u8], byte: u8) -> &[u8] {
    split_once(bytes, byte).map_or(bytes, |(before, _)| before)
}

/// [`split_once`] of a text, at a character of ASCII.
pub fn split_text_once(text: &str, ascii: u8) -> Option<(&str, &str)> {
    let at = find(text.as_bytes(), ascii)?;
    Some((text.get(..at)?, text.get(at + 1..)?))
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
    fn pieces_are_those_of_core_from_either_end() {
        for text in ["", ",", "a", "a,", ",a", "a,,b"] {
            let expected: Vec<_> = text.split(',').map(str::as_bytes).collect();
            let pieces = split(text.as_bytes(), b',');
            assert_eq!(pieces.clone().collect::<Vec<_>>(), expected, "{text:?}");
            let backwards: Vec<_> = expected.into_iter().rev().collect();
            assert_eq!(pieces.rev().collect::<Vec<_>>(), backwards, "{text:?}");
        }
    }

    #[test]
    fn a_text_is_cut_at_the_first_separator_or_not_at_all() {
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
