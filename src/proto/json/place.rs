//! The places that values of a document are decoded into.

use crate::arena::Strings;
use core::ffi::CStr;
use core::ops::RangeInclusive;

/// An object of a document, decoded in place.
pub trait Object<'a> {
    /// The place for the value of the member of that name. Called for each member that is not `null`.
    fn member(&mut self, name: &str) -> Place<'_, 'a>;
}

/// Where a value is stored (a place as in serde's `deserialize_in_place`), and so its type. Strings are stored
/// in an arena.
pub enum Place<'p, 'a> {
    /// No such member: ignored.
    Unknown,
    /// The member is not allowed; the reason.
    Refused(&'static str),
    /// A NUL-terminated string.
    CStr(&'p mut &'a CStr),
    /// A string.
    Str(&'p mut &'a str),
    /// A string with its own syntax, parsed by [`Parse`].
    Parsed(&'p mut dyn Parse),
    /// The same, or a whole number.
    ParsedOrNumber(&'p mut dyn Parse),
    /// `true` or `false`.
    Flag(&'p mut bool),
    /// A whole number in that range.
    Number(&'p mut dyn Integer, RangeInclusive<u64>),
    /// A list of at most that many strings.
    Strings(&'p mut Strings<'a>, usize),
    /// An object of at most that many members, all strings: a list of `NAME=value`.
    StringMap(&'p mut Strings<'a>, usize),
    /// An object.
    Object(&'p mut dyn Object<'a>),
    /// A list of objects.
    Objects(&'p mut dyn Objects<'a>),
    /// The end of the string being built: an entry of a list of strings. Never a member's place.
    Entry,
}

/// A type that is parsed from a string.
pub trait Parse {
    /// Parses the text. The error says what is wrong, such as "not an address".
    fn parse(&mut self, text: &str) -> Result<(), &'static str>;
}

/// A place for a whole number.
pub trait Integer {
    /// Stores the number; `None` if it is not in the type's range.
    fn set(&mut self, number: u64) -> Option<()>;
}

macro_rules! integers {
    ($($integer:ty)*) => {$(
        impl Integer for $integer {
            fn set(&mut self, number: u64) -> Option<()> {
                *self = number.try_into().ok()?;
                Some(())
            }
        }

        impl Integer for Option<$integer> {
            fn set(&mut self, number: u64) -> Option<()> {
                *self = Some(number.try_into().ok()?);
                Some(())
            }
        }
    )*};
}

integers! { u8 u16 u32 u64 }

/// A list of objects.
pub trait Objects<'a> {
    /// Empties it.
    fn clear(&mut self);
    /// Maximum number of objects in it.
    fn limit(&self) -> usize;
    /// Adds an empty object; `None` if the list is full.
    fn add(&mut self) -> Option<&mut dyn Object<'a>>;
}

impl<'a, T: Object<'a> + Default, const N: usize> Objects<'a> for heapless::Vec<T, N> {
    fn clear(&mut self) {
        heapless::Vec::clear(self);
    }

    fn limit(&self) -> usize {
        N
    }

    fn add(&mut self) -> Option<&mut dyn Object<'a>> {
        self.push(T::default()).ok()?;
        Some(self.last_mut()?)
    }
}
