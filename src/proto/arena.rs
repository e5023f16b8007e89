//! Storage for the strings of a document, in memory of the caller.

use core::ffi::CStr;
use core::mem;

/// A bump allocator for strings: none is freed before the whole memory is.
///
/// A string or a list of strings is built at the start of the free memory, and then taken.
#[derive(Debug)]
pub struct Arena<'a> {
    free: &'a mut [u8],
    /// Length of the string being built, at the start of `free`.
    filled: usize,
}

/// The arena is full.
#[derive(Debug)]
pub struct Full;

impl<'a> Arena<'a> {
    /// An arena in `memory`. For a document, as many bytes as the document has are enough.
    pub fn new(memory: &'a mut [u8]) -> Self {
        Self {
            free: memory,
            filled: 0,
        }
    }

    /// Appends to the string being built.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), Full> {
        let free = self.free.get_mut(self.filled..).unwrap_or_default();
        let room = free.get_mut(..bytes.len()).ok_or(Full)?;
        room.copy_from_slice(bytes);
        self.filled += bytes.len();
        Ok(())
    }

    /// The string being built.
    pub fn filled(&self) -> &[u8] {
        self.free.get(..self.filled).unwrap_or_default()
    }

    /// Truncates the string being built to `length` bytes.
    pub fn truncate(&mut self, length: usize) {
        self.filled = self.filled.min(length);
    }

    /// Takes the finished string.
    pub fn take(&mut self) -> &'a [u8] {
        let memory = mem::take(&mut self.free);
        let (taken, free) = memory.split_at_mut_checked(self.filled).unwrap_or_default();
        self.free = free;
        self.filled = 0;
        taken
    }
}

/// A list of C strings, one after the other as in `/proc/PID/environ` (proc_pid_environ(5)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Strings<'a>(&'a [u8]);

impl<'a> Strings<'a> {
    /// A list of NUL-terminated strings.
    pub const fn new(strings: &'a [u8]) -> Self {
        Self(strings)
    }

    /// A list of one string.
    pub const fn one(string: &'a CStr) -> Self {
        Self(string.to_bytes_with_nul())
    }

    /// The strings, each with its NUL.
    pub const fn as_bytes(self) -> &'a [u8] {
        self.0
    }

    /// Whether there is no string, not even an empty one.
    pub const fn is_empty(self) -> bool {
        self.0.is_empty()
    }

    /// The first string.
    pub fn first(self) -> Option<&'a CStr> {
        CStr::from_bytes_until_nul(self.0).ok()
    }

    /// The strings, in order.
    pub const fn iter(self) -> Iter<'a> {
        Iter(self)
    }
}

impl<'a> IntoIterator for Strings<'a> {
    type Item = &'a CStr;
    type IntoIter = Iter<'a>;

    fn into_iter(self) -> Iter<'a> {
        self.iter()
    }
}

/// Iterates over the strings of a list.
#[derive(Clone, Debug)]
pub struct Iter<'a>(Strings<'a>);

impl<'a> Iterator for Iter<'a> {
    type Item = &'a CStr;

    fn next(&mut self) -> Option<&'a CStr> {
        let first = self.0.first()?;
        let rest = self.0.0.get(first.count_bytes() + 1..);
        self.0 = Strings(rest.unwrap_or_default());
        Some(first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taken_strings_stay_and_truncated_bytes_are_reused() {
        let mut memory = [0; 8];
        let mut arena = Arena::new(&mut memory);
        arena.push(b"ab").unwrap();
        arena.push(b"\0").unwrap();
        let first = arena.take();
        arena.push(b"xyz").unwrap();
        arena.truncate(1);
        arena.push(b"123").unwrap();
        assert_eq!(arena.filled(), b"x123");
        let second = arena.take();
        assert_eq!((first, second), (&b"ab\0"[..], &b"x123"[..]));
        assert_eq!(arena.take(), b"");
    }

    #[test]
    fn a_string_that_does_not_fit_is_not_stored_in_part() {
        let mut memory = [0; 3];
        let mut arena = Arena::new(&mut memory);
        arena.push(b"ab").unwrap();
        assert!(arena.push(b"cd").is_err());
        arena.push(b"c").unwrap();
        assert!(arena.push(b"d").is_err());
        assert_eq!(arena.take(), b"abc");
    }

    #[test]
    fn strings_are_iterated_in_order() {
        let strings = Strings::new(b"a\0\0bc\0");
        assert_eq!(strings.first(), Some(c"a"));
        assert_eq!(strings.iter().collect::<Vec<_>>(), [c"a", c"", c"bc"]);
        assert_eq!(Strings::one(c"").iter().count(), 1);
        assert!(Strings::default().is_empty() && Strings::default().first().is_none());
    }
}
