//! The state of the decoder: the path of the current value, and its fault.

use super::place::{Object, Parse, Place};
use crate::arena::{Arena, Full};
use crate::message;
use crate::message::{Message, ToLossy};
use core::ffi::CStr;
use core::fmt::{self, Write};
use core::ops::RangeInclusive;
use serde_json_core::de::Error;
use serde_json_core::str::{EscapedStr, EscapedStringFragment};

/// The state of the decoder.
pub struct Decoder<'d, 'a> {
    pub document: &'d [u8],
    pub arena: &'d mut Arena<'a>,
    /// The path to the current value.
    pub path: heapless::Vec<Step<'d>, STEPS>,
    /// The fault of the current value, if decoding it fails.
    pub fault: ValueFault,
}

/// Maximum length of a path: `config.IPConfigs[0].Mask`, and some to spare.
pub const STEPS: usize = 8;

/// A step of a path.
#[derive(Clone, Copy)]
pub enum Step<'d> {
    /// A member's name, with its escapes.
    Member(&'d str),
    /// An entry's index.
    Entry(usize),
}

/// The fault of a value.
pub enum ValueFault {
    /// It has the wrong type; the right one.
    Type(&'static str),
    /// It is not a whole number in that range.
    Number(RangeInclusive<u64>),
    /// The object has refused it, for that reason.
    Refused(&'static str),
    /// The parser has refused it, for that reason; the arena holds the text.
    Unparsed(&'static str),
    TooMany(usize),
    Name,
    Nul,
    Full,
}

impl From<Full> for ValueFault {
    fn from(_: Full) -> Self {
        Self::Full
    }
}

impl<'a> Decoder<'_, 'a> {
    /// Records the fault. Returns the error that makes serde stop.
    pub fn fail<E: serde::de::Error>(&mut self, fault: ValueFault) -> E {
        self.fault = fault;
        E::custom("")
    }

    /// The error message: the path of the current value, and its fault.
    pub fn message(&self, error: Error) -> Message {
        let mut message = Message::new();
        // Writing to a message never fails.
        let _ = self.describe(&mut message, error);
        message
    }

    fn describe(&self, message: &mut Message, error: Error) -> fmt::Result {
        for (depth, step) in self.path.iter().enumerate() {
            match step {
                Step::Member(name) if depth == 0 => write!(message, "{}", shown(name))?,
                Step::Member(name) => write!(message, ".{}", shown(name))?,
                Step::Entry(number) => write!(message, "[{number}]")?,
            }
        }
        if !self.path.is_empty() {
            message.write_str(": ")?;
        }
        match &self.fault {
            ValueFault::Type(wanted) => write!(message, "must be {wanted}"),
            ValueFault::Number(range) => match error {
                Error::InvalidNumber | Error::CustomError => {
                    write!(message, "must be from {} to {}", range.start(), range.end())
                }
                // Also for what follows the whole part of 1.5 or 1e5.
                _ => message.write_str("must be a whole number"),
            },
            ValueFault::Refused(why) => message.write_str(why),
            ValueFault::Unparsed(why) => {
                write!(message, "{why}: {}", self.arena.filled().lossy())
            }
            ValueFault::TooMany(limit) => write!(message, "more than {limit} entries"),
            ValueFault::Name => message.write_str("a name is empty or has '=' in it"),
            ValueFault::Nul => message.write_str("has a NUL character"),
            ValueFault::Full => message.write_str("too long"),
        }
    }

    /// Decodes the escapes of a string of the document, and appends it to the string being built.
    fn append(&mut self, escaped: &str) -> Result<(), ValueFault> {
        if !has_escapes(escaped) {
            return Ok(self.arena.push(escaped.as_bytes())?);
        }
        for fragment in EscapedStr(escaped).fragments() {
            match fragment {
                Ok(EscapedStringFragment::NotEscaped(text)) => self.arena.push(text.as_bytes())?,
                Ok(EscapedStringFragment::Escaped('\0')) => return Err(ValueFault::Nul),
                Ok(EscapedStringFragment::Escaped(character)) => {
                    let mut bytes = [0; 4];
                    self.arena
                        .push(character.encode_utf8(&mut bytes).as_bytes())?;
                }
                // Impossible in normalized text.
                Err(_) => return Err(ValueFault::Type("a string")),
            }
        }
        Ok(())
    }

    /// The first byte of the current member's value, which serde-json-core does not expose: found by the address
    /// of the member's name in the document.
    pub fn first_byte(&self) -> Option<u8> {
        let Some(Step::Member(name)) = self.path.last() else {
            return None;
        };
        let start = name
            .as_ptr()
            .addr()
            .checked_sub(self.document.as_ptr().addr())?;
        let mut behind = self.document.get(start + name.len() + 1..)?.iter().copied();
        behind.find(|byte| !matches!(byte, b' ' | b'\t' | b'\n' | b'\r' | b':'))
    }

    /// The string being built.
    fn filled(&self) -> &str {
        core::str::from_utf8(self.arena.filled()).unwrap_or_default()
    }

    /// Decodes a string of the document into its place.
    pub fn string(&mut self, escaped: &str, place: Place<'_, 'a>) -> Result<(), ValueFault> {
        if let Place::Unknown = place {
            return Ok(());
        }
        self.append(escaped)?;
        match place {
            Place::CStr(place) => {
                self.arena.push(b"\0")?;
                *place = CStr::from_bytes_until_nul(self.arena.take()).unwrap_or_default();
            }
            Place::Str(place) => {
                *place = core::str::from_utf8(self.arena.take()).unwrap_or_default();
            }
            Place::Parsed(place) | Place::ParsedOrNumber(place) => self.parse(place)?,
            _entry => self.arena.push(b"\0")?,
        }
        Ok(())
    }

    pub fn number(&mut self, number: u64, place: Place<'_, 'a>) -> Result<(), ValueFault> {
        match place {
            Place::Number(place, range) => match range.contains(&number) {
                true => place.set(number).ok_or(ValueFault::Number(range)),
                false => Err(ValueFault::Number(range)),
            },
            Place::ParsedOrNumber(place) => {
                self.arena.push(message!("{number}").as_bytes())?;
                self.parse(place)
            }
            _ => Ok(()),
        }
    }

    fn parse(&mut self, place: &mut dyn Parse) -> Result<(), ValueFault> {
        place.parse(self.filled()).map_err(ValueFault::Unparsed)?;
        self.arena.truncate(0);
        Ok(())
    }

    /// The place of a member of an object.
    pub fn member<'p>(&mut self, name: &str, object: &'p mut dyn Object<'a>) -> Place<'p, 'a> {
        if !has_escapes(name) {
            return object.member(name);
        }
        // Names with a NUL, and names that are too long, are unknown.
        if self.append(name).is_err() {
            self.arena.truncate(0);
        }
        let place = object.member(self.filled());
        self.arena.truncate(0);
        place
    }

    /// Starts an entry of a map of strings with the member's name.
    pub fn name(&mut self, name: &str) -> Result<(), ValueFault> {
        let start = self.arena.filled().len();
        self.append(name)?;
        let name = self.arena.filled().get(start..).unwrap_or_default();
        if name.is_empty() || name.contains(&b'=') {
            return Err(ValueFault::Name);
        }
        Ok(self.arena.push(b"=")?)
    }
}

fn has_escapes(string: &str) -> bool {
    string.as_bytes().contains(&b'\\')
}

fn shown(name: &str) -> impl fmt::Display {
    name.as_bytes().lossy()
}
