//! Environments in the format of execve(2).

use crate::arena::Strings;
use crate::bytes::find;
use crate::config;
use core::fmt::{self, Display};
use core::ops::Range;

/// Maximum size of an environment in bytes: that of a document and of an exec request together.
pub const ENV_BYTES: usize = config::MAX_DOCUMENT_SIZE + (192 << 10);
/// Maximum number of entries: `Env`, `ExtraEnv`, an exec request's, and our own.
pub const ENV_ENTRIES: usize = 3 * config::MAX_ENV_ENTRIES + 8;

/// The search path when the environment has no PATH.
pub const DEFAULT_PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// There are too many strings, or too many bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooLarge;

impl Display for TooLarge {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("the environment is too large")
    }
}

/// An environment: one entry per name, the last one set.
pub struct Environment<const BYTES: usize = ENV_BYTES, const ENTRIES: usize = ENV_ENTRIES> {
    /// Concatenated `NAME=value\0`.
    bytes: heapless::Vec<u8, BYTES>,
    entries: heapless::Vec<Entry, ENTRIES>,
}

/// The position of a string, and its name's hash for quick comparison.
#[derive(Clone, Copy)]
struct Entry {
    start: u32,
    hash: u32,
}

impl<const BYTES: usize, const ENTRIES: usize> Default for Environment<BYTES, ENTRIES> {
    fn default() -> Self {
        Self::new()
    }
}

impl<const BYTES: usize, const ENTRIES: usize> Environment<BYTES, ENTRIES> {
    /// An empty environment.
    pub const fn new() -> Self {
        Self {
            bytes: heapless::Vec::new(),
            entries: heapless::Vec::new(),
        }
    }

    /// Empties it.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.entries.clear();
    }

    /// Replaces it with a copy of another.
    pub fn copy(&mut self, other: &Self) {
        self.clear();
        // Both have the same capacity.
        let _fits = self.bytes.extend_from_slice(&other.bytes);
        let _fits = self.entries.extend_from_slice(&other.entries);
    }

    /// Stores other strings next to the entries, after those stored before. Returns their position. They fit, as
    /// a document or request that has them has less of an environment.
    pub fn store(&mut self, strings: &[u8]) -> Result<Range<usize>, TooLarge> {
        let start = self.bytes.len();
        self.bytes
            .extend_from_slice(strings)
            .map_err(|_| TooLarge)?;
        Ok(start..self.bytes.len())
    }

    /// Strings that were stored.
    pub fn stored(&self, place: Range<usize>) -> &[u8] {
        self.bytes.get(place).unwrap_or_default()
    }

    /// Sets each `NAME=value`; strings without a name or without `=` are dropped.
    pub fn set_all(&mut self, entries: Strings) -> Result<(), TooLarge> {
        for entry in entries {
            self.set(entry.to_bytes(), b"")?;
        }
        Ok(())
    }

    /// Sets `NAME=` to a value if the name is not set.
    pub fn set_default(&mut self, name: &[u8], value: &[u8]) -> Result<(), TooLarge> {
        match self.get(name) {
            Some(_) => Ok(()),
            None => self.set(name, value),
        }
    }

    /// Sets `NAME=value`, given in two pieces.
    pub fn set(&mut self, start: &[u8], end: &[u8]) -> Result<(), TooLarge> {
        let at = self.bytes.len();
        for part in &[start, end, b"\0"] {
            self.bytes.extend_from_slice(part).map_err(|_| TooLarge)?;
        }
        let entry = self.bytes.get(at..).unwrap_or(&[]);
        let sign = find(entry, b'=').unwrap_or(0);
        if sign == 0 {
            self.bytes.truncate(at);
            return Ok(());
        }
        let name = entry.get(..=sign).unwrap_or(entry);
        let fresh = Entry {
            start: at as u32,
            hash: fnv1a(name),
        };
        for old in &mut self.entries {
            let other = self.bytes.get(old.start as usize..).unwrap_or(&[]);
            if old.hash == fresh.hash && other.starts_with(name) {
                *old = fresh;
                return Ok(());
            }
        }
        self.entries.push(fresh).map_err(|_| TooLarge)
    }

    /// The value of `NAME=`.
    pub fn get(&self, name: &[u8]) -> Option<&[u8]> {
        self.iter().find_map(|entry| {
            let value = entry.strip_prefix(name)?;
            value.strip_suffix(b"\0")
        })
    }

    /// The entries, each with its NUL, in the order in which their names were first set.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        self.entries.iter().map(|entry| self.string(*entry))
    }

    fn string(&self, entry: Entry) -> &[u8] {
        let start = entry.start as usize;
        let rest = self.bytes.get(start..).unwrap_or(&[]);
        let end = find(rest, 0).unwrap_or(0);
        rest.get(..=end).unwrap_or(b"\0")
    }
}

/// FNV-1a, 32 bits (draft-eastlake-fnv).
fn fnv1a(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| {
        (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    type Small = Environment<256, 8>;

    fn environment(entries: &[&str]) -> Small {
        let mut environment = Small::new();
        for entry in entries {
            environment.set(entry.as_bytes(), b"").unwrap();
        }
        environment
    }

    fn listed(environment: &Small) -> Vec<String> {
        let text =
            |entry: &[u8]| String::from_utf8(entry.strip_suffix(b"\0").unwrap().to_vec()).unwrap();
        environment.iter().map(text).collect()
    }

    #[test]
    fn the_last_value_of_a_name_wins_at_its_first_position() {
        let environment = environment(&["A=1", "B=2", "A=3", "AB=4", "B="]);
        assert_eq!(listed(&environment), ["A=3", "B=", "AB=4"]);
    }

    #[test]
    fn entries_without_a_name_or_an_equals_sign_are_dropped() {
        assert_eq!(listed(&environment(&["A", "=x", "", "B=a=b"])), ["B=a=b"]);
    }

    #[test]
    fn a_default_is_set_only_where_the_name_is_not() {
        let mut environment = environment(&["HOME=/x"]);
        environment.set_default(b"HOME=", b"/").unwrap();
        environment.set_default(b"PATH=", b"/bin").unwrap();
        assert_eq!(listed(&environment), ["HOME=/x", "PATH=/bin"]);
        assert_eq!(environment.get(b"PATH="), Some(&b"/bin"[..]));
        assert_eq!(environment.get(b"PAT="), None);
    }

    #[test]
    fn what_does_not_fit_is_an_error_and_not_a_truncation() {
        let mut environment = environment(&["A=", "B=", "C=", "D=", "E=", "F=", "G=", "H="]);
        assert!(environment.set(b"A=again", b"").is_ok());
        assert_eq!(environment.set(b"I=", b""), Err(TooLarge));
        assert!(Small::new().set(b"A=", &[b'x'; 256]).is_err());
    }
}
