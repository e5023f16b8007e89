//! Resource limits by the names of prlimit(1).

use crate::bytes::split_text_once;
use crate::decimal;
use crate::json::{Object, Parse, Place};

/// Names of resources, by number (include/uapi/asm-generic/resource.h; the same on x86_64 and aarch64).
const NAMES: [&str; 16] = [
    "CPU",
    "FSIZE",
    "DATA",
    "STACK",
    "CORE",
    "RSS",
    "NPROC",
    "NOFILE",
    "MEMLOCK",
    "AS",
    "LOCKS",
    "SIGPENDING",
    "MSGQUEUE",
    "NICE",
    "RTPRIO",
    "RTTIME",
];

/// A resource whose use can be limited (getrlimit(2)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resource(usize);

impl Resource {
    /// Reads `NOFILE` or `RLIMIT_NOFILE`.
    pub fn parse(name: &str) -> Option<Self> {
        let name = name.strip_prefix("RLIMIT_").unwrap_or(name);
        NAMES.iter().position(|known| *known == name).map(Self)
    }

    /// Its number.
    pub fn number(self) -> usize {
        self.0
    }

    /// Its name: `NOFILE`.
    pub fn name(self) -> &'static str {
        NAMES.get(self.0).copied().unwrap_or_default()
    }
}

/// A soft and a hard limit; `None` is unlimited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Limit {
    /// The soft limit, which is enforced.
    pub soft: Option<u64>,
    /// The hard limit, up to which the soft limit can be raised.
    pub hard: Option<u64>,
}

impl Limit {
    /// Reads `65536`, `unlimited`, or both limits: `1024:unlimited`.
    pub fn parse(text: &str) -> Option<Self> {
        let (soft, hard) = split_text_once(text, b':').unwrap_or((text, text));
        let limit = Self {
            soft: limit(soft)?,
            hard: limit(hard)?,
        };
        let is_over = match (limit.soft, limit.hard) {
            (_, None) => false,
            (None, Some(_)) => true,
            (Some(soft), Some(hard)) => soft > hard,
        };
        (!is_over).then_some(limit)
    }
}

fn limit(text: &str) -> Option<Option<u64>> {
    if text == "unlimited" {
        return Some(None);
    }
    // The largest number means no limit to the kernel (RLIM_INFINITY).
    decimal::parse(text.as_bytes())
        .filter(|limit| *limit != u64::MAX)
        .map(Some)
}

impl Parse for Limit {
    fn parse(&mut self, text: &str) -> Result<(), &'static str> {
        *self = Self::parse(text).ok_or("not a limit")?;
        Ok(())
    }
}

/// Limits, by number of the resource: whether one is set, and its value.
///
/// Not an `Option`, whose `None` is not all zeros here: the static that contains this would be in .data, and
/// so in the file, instead of .bss.
#[derive(Clone, Debug, Default, Hash)]
pub struct Rlimits([(bool, Limit); NAMES.len()]);

impl Rlimits {
    /// No limits.
    pub const fn new() -> Self {
        let unlimited = Limit {
            soft: None,
            hard: None,
        };
        Self([(false, unlimited); NAMES.len()])
    }

    /// The limits that were given.
    pub fn iter(&self) -> impl Iterator<Item = (Resource, Limit)> {
        let limits = self.0.iter().enumerate();
        limits.filter_map(|(number, (is_given, limit))| {
            is_given.then_some((Resource(number), *limit))
        })
    }
}

/// An object: a member's name is a resource, its value a limit.
impl<'a> Object<'a> for Rlimits {
    fn member(&mut self, name: &str) -> Place<'_, 'a> {
        let limit = Resource::parse(name).and_then(|resource| self.0.get_mut(resource.number()));
        match limit {
            Some((is_given, limit)) => {
                *is_given = true;
                Place::ParsedOrNumber(limit)
            }
            None => Place::Refused("not a resource with a limit"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resources_have_prlimits_names_and_the_kernels_numbers() {
        for (name, number) in [
            ("CPU", 0),
            ("CORE", 4),
            ("NOFILE", 7),
            ("RLIMIT_NOFILE", 7),
            ("AS", 9),
            ("RTTIME", 15),
        ] {
            let resource = Resource::parse(name).unwrap();
            assert_eq!(resource.number(), number, "{name}");
        }
        for name in ["", "nofile", "RLIMIT_", "RLIMIT_RLIMIT_AS", "FILES", "7"] {
            assert_eq!(Resource::parse(name), None, "{name}");
        }
    }

    #[test]
    fn a_limit_is_one_number_or_two() {
        let both = |soft, hard| Some(Limit { soft, hard });
        for (text, wanted) in [
            ("65536", both(Some(65536), Some(65536))),
            ("0", both(Some(0), Some(0))),
            ("unlimited", both(None, None)),
            ("1024:4096", both(Some(1024), Some(4096))),
            ("1024:unlimited", both(Some(1024), None)),
            ("unlimited:unlimited", both(None, None)),
            ("4096:1024", None),
            ("unlimited:1", None),
            ("", None),
            (":", None),
            ("1:", None),
            ("1:2:3", None),
            ("-1", None),
            ("+1", None),
            ("1k", None),
            ("18446744073709551615", None),
            ("18446744073709551616", None),
        ] {
            assert_eq!(Limit::parse(text), wanted, "{text}");
        }
    }
}
