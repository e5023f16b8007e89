//! Environments in the form execve(2) wants them.

use crate::config;

/// Room for the bytes of an environment: a whole document's and a whole exec request's.
pub const ENV_BYTES: usize = config::DOCUMENT + (192 << 10);
/// Entries of an environment: `Env`, `ExtraEnv`, an exec request's, and our own.
pub const ENV_ENTRIES: usize = 3 * config::ENV + 8;

/// A name is searched in these directories when the environment has no PATH.
pub const PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// There are more strings, or more bytes, than there is room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// An environment: one entry a name, the last one set.
pub struct Environment<const BYTES: usize = ENV_BYTES, const ENTRIES: usize = ENV_ENTRIES> {
    /// `NAME=value\0` after `NAME=value\0`.
    bytes: heapless::Vec<u8, BYTES>,
    entries: heapless::Vec<Entry, ENTRIES>,
}

/// Where a string lies, and its name's hash so that most comparisons are of one number.
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

    /// Sets `NAME=value`; a string without a name or without `=` is dropped.
    pub fn set(&mut self, entry: &[u8]) -> Result<(), Full> {
        self.set_parts([entry, b"", b""])
    }

    fn set_parts(&mut self, parts: [&[u8]; 3]) -> Result<(), Full> {
        let start = self.bytes.len();
        for part in parts.into_iter().chain([&b"\0"[..]]) {
            self.bytes.extend_from_slice(part).map_err(|_| Full)?;
        }
        let name = name(self.bytes.get(start..).unwrap_or(&[]));
        if name.is_empty() {
            self.bytes.truncate(start);
            return Ok(());
        }
        let hash = fnv1a(name);
        let fresh = Entry {
            start: start as u32,
            hash,
        };
        let known = |entry: &Entry| {
            entry.hash == hash
                && self
                    .bytes
                    .get(entry.start as usize..)
                    .is_some_and(|old| self::name(old) == name)
        };
        let position = self.entries.iter().position(known);
        match position.and_then(|at| self.entries.get_mut(at)) {
            Some(old) => {
                *old = fresh;
                Ok(())
            }
            None => self.entries.push(fresh).map_err(|_| Full),
        }
    }

    /// Sets `NAME=value` unless the name is set.
    pub fn set_default(&mut self, name: &[u8], value: &[u8]) -> Result<(), Full> {
        if self.get(name).is_some() {
            return Ok(());
        }
        self.set_parts([name, b"=", value])
    }

    /// The value of a name.
    pub fn get(&self, name: &[u8]) -> Option<&[u8]> {
        self.iter().find_map(|entry| {
            let value = entry.strip_prefix(name)?.strip_prefix(b"=")?;
            value.strip_suffix(b"\0")
        })
    }

    /// The entries, each with its NUL, in the order in which their names were first set.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        self.entries.iter().map(|entry| {
            let rest = self.bytes.get(entry.start as usize..).unwrap_or(b"\0");
            first_string(rest)
        })
    }
}

/// The first NUL-terminated string, its NUL included.
fn first_string(bytes: &[u8]) -> &[u8] {
    bytes
        .split_inclusive(|byte| *byte == 0)
        .next()
        .unwrap_or(b"\0")
}

/// The name of `NAME=value\0`; empty when there is no `=`.
fn name(entry: &[u8]) -> &[u8] {
    let end = entry.iter().position(|byte| matches!(byte, b'=' | 0));
    match end.and_then(|end| entry.split_at_checked(end)) {
        Some((name, [b'=', ..])) => name,
        _ => &[],
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
            environment.set(entry.as_bytes()).unwrap();
        }
        environment
    }

    fn listed(environment: &Small) -> Vec<String> {
        let text =
            |entry: &[u8]| String::from_utf8(entry.strip_suffix(b"\0").unwrap().to_vec()).unwrap();
        environment.iter().map(text).collect()
    }

    #[test]
    fn the_last_entry_of_a_name_wins_and_keeps_the_first_place() {
        let environment = environment(&["A=1", "B=2", "A=3", "AB=4", "B="]);
        assert_eq!(listed(&environment), ["A=3", "B=", "AB=4"]);
    }

    #[test]
    fn entries_without_a_name_or_a_sign_are_dropped() {
        assert_eq!(listed(&environment(&["A", "=x", "", "B=a=b"])), ["B=a=b"]);
    }

    #[test]
    fn a_default_is_set_only_where_the_name_is_not() {
        let mut environment = environment(&["HOME=/x"]);
        environment.set_default(b"HOME", b"/").unwrap();
        environment.set_default(b"PATH", b"/bin").unwrap();
        assert_eq!(listed(&environment), ["HOME=/x", "PATH=/bin"]);
        assert_eq!(environment.get(b"PATH"), Some(&b"/bin"[..]));
        assert_eq!(environment.get(b"PAT"), None);
    }

    #[test]
    fn what_does_not_fit_is_an_error_and_not_a_truncation() {
        let mut environment = environment(&["A=", "B=", "C=", "D=", "E=", "F=", "G=", "H="]);
        assert_eq!(environment.set(b"A=again"), Ok(()));
        assert_eq!(environment.set(b"I="), Err(Full));
        let long = "x".repeat(256);
        assert_eq!(Small::new().set(format!("A={long}").as_bytes()), Err(Full));
    }
}
