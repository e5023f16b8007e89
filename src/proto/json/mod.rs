//! JSON documents, read by serde-json-core into places that an [`Object`] names.
//!
//! [`normalize`] goes over the text first. Then values are decoded a member at a time: each member
//! of an object is asked for the [`Place`] where it belongs, so that nothing large passes over the
//! stack, all of serde is compiled once and not once an object, and an error names the value:
//! `IPConfigs[0].Mask: must be from 0 to 128`.
//!
//! * A member that is `null` is as good as absent; unknown members are ignored.
//! * Of a member given twice the last one counts, as in Go's encoding/json; so a list is replaced,
//!   and of an object given twice the members are merged.
//! * A string with a NUL in it is refused where it would be used: the kernel's strings end there.

mod normalize;
mod output;

pub use normalize::{DEPTH, normalize};
pub use output::{Quoted, escape};

use crate::arena::{Arena, Full, Strings};
use crate::message;
use crate::message::{Message, ToLossy};
use core::ffi::CStr;
use core::fmt::{self, Write};
use core::ops::RangeInclusive;
use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json_core::de::Error;
use serde_json_core::str::{EscapedStr, EscapedStringFragment};

/// An object of a document, decoded in place.
pub trait Object<'a> {
    /// Where the value of the member of that name belongs. It is asked for each member that is not
    /// `null`.
    fn member(&mut self, name: &str) -> Place<'_, 'a>;
}

/// Where a value belongs, and so what it must be. Strings come to lie in an arena.
pub enum Place<'p, 'a> {
    /// Nowhere: it is ignored.
    Unknown,
    /// Nowhere: there must be no member of that name. Why not.
    Refused(&'static str),
    /// A string as the kernel wants it.
    CStr(&'p mut &'a CStr),
    /// A string.
    Str(&'p mut &'a str),
    /// A string that says something.
    Parsed(&'p mut dyn Parse),
    /// A string that says something, or a whole number.
    ParsedOrNumber(&'p mut dyn Parse),
    /// `true` or `false`.
    Flag(&'p mut bool),
    /// A whole number in that range.
    Number(&'p mut dyn Integer, RangeInclusive<u64>),
    /// A list of at most so many strings.
    Strings(&'p mut Strings<'a>, usize),
    /// An object of at most so many members, all strings: a list of `NAME=value`.
    StringMap(&'p mut Strings<'a>, usize),
    /// An object.
    Object(&'p mut dyn Object<'a>),
    /// A list of objects.
    Objects(&'p mut dyn Objects<'a>),
    /// The end of what is being put together: an entry of a list of strings. No member's place.
    Entry,
}

/// What a string is parsed to.
pub trait Parse {
    /// Parses the text. The error says what it is not: "not an address".
    fn parse(&mut self, text: &str) -> Result<(), &'static str>;
}

/// A place for a whole number.
pub trait Integer {
    /// Takes the number, if it is in the type's range.
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
    /// Most objects in it.
    fn limit(&self) -> usize;
    /// Adds an empty object; `None` when there are as many as can be.
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

/// Decodes a document, which must be an object.
pub fn decode<'a>(
    document: &mut [u8],
    arena: &mut Arena<'a>,
    object: &mut dyn Object<'a>,
) -> Result<(), Message> {
    normalize(document)?;
    // What a document that was refused left behind.
    arena.truncate(0);
    let mut decoder = Decoder {
        document,
        arena,
        path: heapless::Vec::new(),
        wrong: Wrong::Type(""),
    };
    let value = Value {
        decoder: &mut decoder,
        place: Place::Object(object),
    };
    // Without a buffer to decode escapes in: strings come as they stand in the document.
    let mut deserializer = serde_json_core::de::Deserializer::new(document, None);
    value
        .deserialize(&mut deserializer)
        .map_err(|error| decoder.message(error))
}

/// What is known while a document is decoded.
struct Decoder<'d, 'a> {
    document: &'d [u8],
    arena: &'d mut Arena<'a>,
    path: heapless::Vec<Step<'d>, STEPS>,
    /// What is wrong, should the value at hand be so.
    wrong: Wrong,
}

/// Longest path: `config.IPConfigs[0].Mask`, and some to spare.
const STEPS: usize = 8;

/// A step on the way to a value.
#[derive(Clone, Copy)]
enum Step<'d> {
    /// A member's name as it stands in the document.
    Member(&'d str),
    /// An entry's number.
    Entry(usize),
}

/// What can be wrong with a value.
enum Wrong {
    /// It is not what it must be.
    Type(&'static str),
    /// It is no whole number, or not in that range.
    Number(RangeInclusive<u64>),
    /// A reason of the object's.
    Refused(&'static str),
    /// A reason of the parser's; the text is what fills the arena.
    Unparsed(&'static str),
    TooMany(usize),
    Name,
    Nul,
    Full,
}

impl From<Full> for Wrong {
    fn from(_: Full) -> Self {
        Self::Full
    }
}

impl<'a> Decoder<'_, 'a> {
    /// The error that makes serde stop; what is wrong is kept here.
    fn fail<E: serde::de::Error>(&mut self, wrong: Wrong) -> E {
        self.wrong = wrong;
        E::custom("")
    }

    /// The path of the value at hand, and what is wrong with it.
    fn message(&self, error: Error) -> Message {
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
        match &self.wrong {
            Wrong::Type(wanted) => write!(message, "must be {wanted}"),
            Wrong::Number(range) => match error {
                Error::InvalidNumber | Error::CustomError => {
                    write!(message, "must be from {} to {}", range.start(), range.end())
                }
                // Also what comes behind the whole part of 1.5 or 1e5.
                _ => message.write_str("must be a whole number"),
            },
            Wrong::Refused(why) => message.write_str(why),
            Wrong::Unparsed(why) => {
                write!(message, "{why}: {}", self.arena.filled().lossy())
            }
            Wrong::TooMany(limit) => write!(message, "more than {limit} entries"),
            Wrong::Name => message.write_str("a name is empty or has '=' in it"),
            Wrong::Nul => message.write_str("has a NUL character"),
            Wrong::Full => message.write_str("too long"),
        }
    }

    /// Appends a string of the document to what is being put together, its escapes decoded.
    fn append(&mut self, escaped: &str) -> Result<(), Wrong> {
        for fragment in EscapedStr(escaped).fragments() {
            match fragment {
                Ok(EscapedStringFragment::NotEscaped(text)) => self.arena.push(text.as_bytes())?,
                Ok(EscapedStringFragment::Escaped('\0')) => return Err(Wrong::Nul),
                Ok(EscapedStringFragment::Escaped(character)) => {
                    let mut bytes = [0; 4];
                    self.arena
                        .push(character.encode_utf8(&mut bytes).as_bytes())?;
                }
                // There is none in a text that was normalized.
                Err(_) => return Err(Wrong::Type("a string")),
            }
        }
        Ok(())
    }

    /// The first byte of the value of the member at hand, which serde-json-core does not show: the
    /// name lies in the document, so that its address says where the value begins.
    fn first_byte(&self) -> Option<u8> {
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

    /// The string that is being put together.
    fn filled(&self) -> &str {
        core::str::from_utf8(self.arena.filled()).unwrap_or_default()
    }

    /// Decodes a string of the document to its place.
    fn string(&mut self, escaped: &str, place: Place<'_, 'a>) -> Result<(), Wrong> {
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

    fn number(&mut self, number: u64, place: Place<'_, 'a>) -> Result<(), Wrong> {
        match place {
            Place::Number(place, range) => match range.contains(&number) {
                true => place.set(number).ok_or(Wrong::Number(range)),
                false => Err(Wrong::Number(range)),
            },
            Place::ParsedOrNumber(place) => {
                self.arena.push(message!("{number}").as_bytes())?;
                self.parse(place)
            }
            _ => Ok(()),
        }
    }

    fn parse(&mut self, place: &mut dyn Parse) -> Result<(), Wrong> {
        place.parse(self.filled()).map_err(Wrong::Unparsed)?;
        self.arena.truncate(0);
        Ok(())
    }

    /// The place of a member of an object.
    fn member<'p>(&mut self, name: &str, object: &'p mut dyn Object<'a>) -> Place<'p, 'a> {
        // A name with a NUL in it, or too long, is none that is known.
        if self.append(name).is_err() {
            self.arena.truncate(0);
        }
        let place = object.member(self.filled());
        self.arena.truncate(0);
        place
    }

    /// Puts the name of a member of a map of strings before its value.
    fn name(&mut self, name: &str) -> Result<(), Wrong> {
        let start = self.arena.filled().len();
        self.append(name)?;
        let name = self.arena.filled().get(start..).unwrap_or_default();
        if name.is_empty() || name.contains(&b'=') {
            return Err(Wrong::Name);
        }
        Ok(self.arena.push(b"=")?)
    }
}

fn shown(name: &str) -> impl fmt::Display {
    name.as_bytes().lossy()
}

/// A value on its way to its place.
struct Value<'v, 'd, 'a> {
    decoder: &'v mut Decoder<'d, 'a>,
    place: Place<'v, 'a>,
}

impl<'d> DeserializeSeed<'d> for Value<'_, 'd, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'d>>(self, value: D) -> Result<(), D::Error> {
        let wrong = &mut self.decoder.wrong;
        match &self.place {
            Place::Unknown => value.deserialize_ignored_any(self),
            Place::Refused(why) => Err(self.decoder.fail(Wrong::Refused(why))),
            Place::CStr(_) | Place::Str(_) | Place::Parsed(_) | Place::Entry => {
                *wrong = Wrong::Type("a string");
                value.deserialize_str(self)
            }
            Place::ParsedOrNumber(_) => {
                *wrong = Wrong::Type("a string or a whole number from 0 on");
                match self.decoder.first_byte() {
                    Some(b'-' | b'0'..=b'9') => value.deserialize_u64(self),
                    _ => value.deserialize_str(self),
                }
            }
            Place::Flag(_) => {
                *wrong = Wrong::Type("true or false");
                value.deserialize_bool(self)
            }
            Place::Number(_, range) => {
                *wrong = Wrong::Number(range.clone());
                value.deserialize_u64(self)
            }
            Place::Strings(..) => {
                *wrong = Wrong::Type("a list of strings");
                value.deserialize_seq(self)
            }
            Place::Objects(_) => {
                *wrong = Wrong::Type("a list");
                value.deserialize_seq(self)
            }
            Place::StringMap(..) => {
                *wrong = Wrong::Type("an object of strings");
                value.deserialize_map(self)
            }
            Place::Object(_) => {
                *wrong = Wrong::Type("an object");
                value.deserialize_map(self)
            }
        }
    }
}

impl<'d> Visitor<'d> for Value<'_, 'd, '_> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("what belongs to the place")
    }

    /// What ends a value that is ignored.
    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    /// A string as it stands in the document: there is no buffer to decode its escapes in.
    fn visit_borrowed_str<E: serde::de::Error>(self, escaped: &'d str) -> Result<(), E> {
        let done = self.decoder.string(escaped, self.place);
        done.map_err(|wrong| self.decoder.fail(wrong))
    }

    fn visit_bool<E>(self, flag: bool) -> Result<(), E> {
        if let Place::Flag(place) = self.place {
            *place = flag;
        }
        Ok(())
    }

    fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<(), E> {
        let done = self.decoder.number(number, self.place);
        done.map_err(|wrong| self.decoder.fail(wrong))
    }

    fn visit_seq<A: SeqAccess<'d>>(mut self, mut list: A) -> Result<(), A::Error> {
        if let Place::Objects(objects) = &mut self.place {
            objects.clear();
        }
        let mut number = 0;
        loop {
            let entry = Entry {
                decoder: self.decoder,
                list: &mut self.place,
                number,
            };
            if list.next_element_seed(entry)?.is_none() {
                break;
            }
            number += 1;
        }
        if let Place::Strings(place, _) = self.place {
            *place = Strings::new(self.decoder.arena.take());
        }
        Ok(())
    }

    fn visit_map<A: MapAccess<'d>>(mut self, mut map: A) -> Result<(), A::Error> {
        let depth = self.decoder.path.len();
        let mut number = 0;
        while let Some(name) = map.next_key()? {
            // The last member's name stays until here: only now it is known that its value ends.
            self.decoder.path.truncate(depth);
            let _fits = self.decoder.path.push(Step::Member(name));
            map.next_value_seed(Member {
                decoder: self.decoder,
                map: &mut self.place,
                name,
                number,
            })?;
            number += 1;
        }
        self.decoder.path.truncate(depth);
        if let Place::StringMap(place, _) = self.place {
            *place = Strings::new(self.decoder.arena.take());
        }
        Ok(())
    }
}

/// An entry of a list.
struct Entry<'v, 'p, 'd, 'a> {
    decoder: &'v mut Decoder<'d, 'a>,
    list: &'v mut Place<'p, 'a>,
    number: usize,
}

impl<'d> DeserializeSeed<'d> for Entry<'_, '_, 'd, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'d>>(self, value: D) -> Result<(), D::Error> {
        let Self {
            decoder,
            list,
            number,
        } = self;
        let place = match list {
            Place::Objects(objects) => {
                let limit = objects.limit();
                let object = objects.add().map(Place::Object);
                object.ok_or(limit)
            }
            Place::Strings(_, limit) if number >= *limit => Err(*limit),
            Place::Strings(..) => Ok(Place::Entry),
            _ => Ok(Place::Unknown),
        };
        let place = place.map_err(|limit| decoder.fail(Wrong::TooMany(limit)))?;
        let depth = decoder.path.len();
        // Deeper than that there is only what is ignored.
        let _fits = decoder.path.push(Step::Entry(number));
        Value {
            decoder: &mut *decoder,
            place,
        }
        .deserialize(value)?;
        decoder.path.truncate(depth);
        Ok(())
    }
}

/// The value of a member.
struct Member<'v, 'p, 'd, 'a> {
    decoder: &'v mut Decoder<'d, 'a>,
    map: &'v mut Place<'p, 'a>,
    name: &'d str,
    number: usize,
}

impl<'d> DeserializeSeed<'d> for Member<'_, '_, 'd, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'d>>(self, value: D) -> Result<(), D::Error> {
        value.deserialize_option(self)
    }
}

impl<'d> Visitor<'d> for Member<'_, '_, 'd, '_> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a value or null")
    }

    fn visit_none<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_some<D: Deserializer<'d>>(self, value: D) -> Result<(), D::Error> {
        let Self { decoder, name, .. } = self;
        let place = match self.map {
            Place::Object(object) => Ok(decoder.member(name, *object)),
            Place::StringMap(_, limit) if self.number >= *limit => Err(Wrong::TooMany(*limit)),
            Place::StringMap(..) => decoder.name(name).map(|()| Place::Entry),
            _ => Ok(Place::Unknown),
        };
        let place = place.map_err(|wrong| {
            decoder.path.pop();
            decoder.fail(wrong)
        })?;
        Value { decoder, place }.deserialize(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Everything<'a> {
        text: &'a str,
        path: &'a CStr,
        flag: bool,
        number: u16,
        maybe: Option<u64>,
        strings: Strings<'a>,
        map: Strings<'a>,
        list: heapless::Vec<Entry<'a>, 2>,
        deep: Deep<'a>,
        shouted: Shouted,
        either: Shouted,
    }

    #[derive(Clone, Debug, Default, PartialEq)]
    struct Entry<'a> {
        name: &'a str,
        size: u8,
        deep: Deep<'a>,
    }

    #[derive(Clone, Debug, Default, PartialEq)]
    struct Deep<'a> {
        strings: Strings<'a>,
    }

    #[derive(Default)]
    struct Shouted(String);

    impl Parse for Shouted {
        fn parse(&mut self, text: &str) -> Result<(), &'static str> {
            if text == "quiet" {
                return Err("not loud");
            }
            self.0 = text.to_uppercase();
            Ok(())
        }
    }

    impl<'a> Object<'a> for Everything<'a> {
        fn member(&mut self, name: &str) -> Place<'_, 'a> {
            match name {
                "Text" => Place::Str(&mut self.text),
                "Path" => Place::CStr(&mut self.path),
                "Flag" => Place::Flag(&mut self.flag),
                "Number" => Place::Number(&mut self.number, 0..=65_535),
                "Maybe" => Place::Number(&mut self.maybe, 3..=u64::MAX),
                "Strings" => Place::Strings(&mut self.strings, 3),
                "Map" => Place::StringMap(&mut self.map, 2),
                "List" => Place::Objects(&mut self.list),
                "Deep" => Place::Object(&mut self.deep),
                "Shouted" => Place::Parsed(&mut self.shouted),
                "Either" => Place::ParsedOrNumber(&mut self.either),
                "Never" => Place::Refused("must not be there"),
                _ => Place::Unknown,
            }
        }
    }

    impl<'a> Object<'a> for Entry<'a> {
        fn member(&mut self, name: &str) -> Place<'_, 'a> {
            match name {
                "Name" => Place::Str(&mut self.name),
                "Size" => Place::Number(&mut self.size, 0..=128),
                "Deep" => Place::Object(&mut self.deep),
                _ => Place::Unknown,
            }
        }
    }

    impl<'a> Object<'a> for Deep<'a> {
        fn member(&mut self, name: &str) -> Place<'_, 'a> {
            match name {
                "Strings" => Place::Strings(&mut self.strings, 2),
                _ => Place::Unknown,
            }
        }
    }

    fn with<R>(document: &str, look: impl FnOnce(&Everything) -> R) -> Result<R, String> {
        let mut bytes = document.as_bytes().to_vec();
        // As much as the document is long is enough for all of its strings.
        let mut memory = vec![0; bytes.len()];
        let mut everything = Everything::default();
        match decode(&mut bytes, &mut Arena::new(&mut memory), &mut everything) {
            Ok(()) => Ok(look(&everything)),
            Err(why) => Err(why.as_str().to_owned()),
        }
    }

    fn listed(strings: Strings) -> Vec<String> {
        let shown = strings.iter().map(|string| string.to_str().unwrap());
        shown.map(str::to_owned).collect()
    }

    fn refused(document: &str) -> String {
        with(document, |_| ()).unwrap_err()
    }

    #[test]
    fn known_members_are_found_and_unknown_ones_ignored() {
        let document = r#" { "Unknown" : [1, {"a":null}, "x\n", null, -1e5], "Text" : "hi", "Path":"/a",
            "Flag": true, "Other": 1.5e-3, "Number": 0, "Maybe" : 18446744073709551615,
            "Strings": [ "a" , "b c", "" ], "Map": {"K": "v", "L":""}, "": {"Text":1},
            "List": [ {"Name":"n","Size":128,"More":{},"Deep":{"Strings":["q"]}} , {} ],
            "Deep":{"Strings":["d"],"Text":2}, "Shouted":"a\u00e9", "Either" : 12 } "#;
        with(document, |everything| {
            assert_eq!((everything.text, everything.path), ("hi", c"/a"));
            assert!(everything.flag);
            assert_eq!((everything.number, everything.maybe), (0, Some(u64::MAX)));
            assert_eq!(listed(everything.strings), ["a", "b c", ""]);
            assert_eq!(listed(everything.map), ["K=v", "L="]);
            let [first, second] = &everything.list[..] else {
                panic!("not two entries");
            };
            assert_eq!((first.name, first.size), ("n", 128));
            assert_eq!(listed(first.deep.strings), ["q"]);
            assert_eq!(*second, Entry::default());
            assert_eq!(listed(everything.deep.strings), ["d"]);
            assert_eq!(everything.shouted.0, "AÉ");
            assert_eq!(everything.either.0, "12");
        })
        .unwrap();
    }

    #[test]
    fn absent_members_and_null_ones_are_empty() {
        for document in [
            "{}",
            r#"{"Text":null,"Path":null,"Flag":null,"Number":null,"Maybe":null,"Strings":null,"Map":null,
                "List":null,"Deep":null,"Shouted":null,"Either":null,"Never":null}"#,
        ] {
            with(document, |everything| {
                assert_eq!((everything.text, everything.path), ("", c""));
                assert!(!everything.flag);
                assert_eq!((everything.number, everything.maybe), (0, None));
                assert!(everything.strings.is_empty() && everything.map.is_empty());
                assert!(everything.list.is_empty() && everything.deep.strings.is_empty());
                assert!(everything.shouted.0.is_empty() && everything.either.0.is_empty());
            })
            .unwrap();
        }
        let map = with(r#"{"Map":{"A":null,"B":"b"}}"#, |everything| {
            listed(everything.map)
        });
        assert_eq!(map.unwrap(), ["B=b"]);
    }

    #[test]
    fn of_a_member_given_twice_the_last_one_counts() {
        let document = r#"{"Text":"a","Strings":["x","y"],"Text":"b","Strings":["z"],"Map":{"A":"1"},
            "Map":{"B":"2"},"List":[{"Name":"n"},{}],"List":[{"Size":1,"Size":2}],"Number":5,"Number":null}"#;
        with(document, |everything| {
            assert_eq!(everything.text, "b");
            assert_eq!(listed(everything.strings), ["z"]);
            assert_eq!(listed(everything.map), ["B=2"]);
            assert_eq!(everything.list.len(), 1);
            assert_eq!((everything.list[0].name, everything.list[0].size), ("", 2));
            assert_eq!(everything.number, 5);
        })
        .unwrap();
    }

    #[test]
    fn escapes_are_decoded_in_names_and_in_values() {
        let document = r#"{"\u0054ext":"\u00e9\ud83d\udc26 \ud800 \/\n\t\"\\\u0022\u005c\u0001",
            "Map":{"\u00e9\"":"\b"},"\u004eumber":7,"L\u0069st":[{"N\u0061me":"\f"}],"Either":"\u0061"}"#;
        with(document, |everything| {
            assert_eq!(everything.text, "é🐦 \u{fffd} /\n\t\"\\\"\\\u{1}");
            assert_eq!(listed(everything.map), ["é\"=\u{8}"]);
            assert_eq!((everything.number, everything.list[0].name), (7, "\u{c}"));
            assert_eq!(everything.either.0, "A");
        })
        .unwrap();
    }

    #[test]
    fn a_wrong_type_names_the_value_and_the_type_wanted() {
        for (document, why) in [
            ("[]", "must be an object"),
            ("null", "must be an object"),
            ("5", "must be an object"),
            (r#"{"Text":1}"#, "Text: must be a string"),
            (r#"{"Path":[]}"#, "Path: must be a string"),
            (r#"{"Flag":"true"}"#, "Flag: must be true or false"),
            (r#"{"Number":"1"}"#, "Number: must be a whole number"),
            (r#"{"Number":1.0}"#, "Number: must be a whole number"),
            (r#"{"Number":0e1,"x":1}"#, "Number: must be a whole number"),
            (r#"{"Number":true}"#, "Number: must be a whole number"),
            (r#"{"Strings":"a"}"#, "Strings: must be a list of strings"),
            (r#"{"Strings":["a",2]}"#, "Strings[1]: must be a string"),
            (r#"{"Strings":[null]}"#, "Strings[0]: must be a string"),
            (r#"{"Map":[]}"#, "Map: must be an object of strings"),
            (r#"{"Map":{"a":"","b":1}}"#, "Map.b: must be a string"),
            (r#"{"List":{}}"#, "List: must be a list"),
            (r#"{"List":[{},3]}"#, "List[1]: must be an object"),
            (r#"{"List":[null]}"#, "List[0]: must be an object"),
            (
                r#"{"List":[{"Name":"x"},{"Size":"y"}]}"#,
                "List[1].Size: must be a whole number",
            ),
            (
                r#"{"List":[{"Size":1.5}]}"#,
                "List[0].Size: must be a whole number",
            ),
            (
                r#"{"List":[{"Deep":{"Strings":["",[]]}}]}"#,
                "List[0].Deep.Strings[1]: must be a string",
            ),
            (
                r#"{"Deep":{"Strings":["a",{}]}}"#,
                "Deep.Strings[1]: must be a string",
            ),
            (r#"{"Shouted":1}"#, "Shouted: must be a string"),
            (r#"{"Shouted":"quiet"}"#, "Shouted: not loud: quiet"),
            (r#"{"Either":"qu\u0069et"}"#, "Either: not loud: quiet"),
            (
                r#"{"Either" :1.5}"#,
                "Either: must be a string or a whole number from 0 on",
            ),
            (r#"{"Never":1}"#, "Never: must not be there"),
        ] {
            assert_eq!(refused(document), why, "{document}");
        }
    }

    #[test]
    fn limits_are_errors_that_name_the_limit() {
        for (document, why) in [
            (
                r#"{"Strings":["","","",""]}"#,
                "Strings: more than 3 entries",
            ),
            (
                r#"{"Map":{"a":"","b":"","c":""}}"#,
                "Map: more than 2 entries",
            ),
            (r#"{"List":[{},{},{}]}"#, "List: more than 2 entries"),
            (
                r#"{"List":[{"Deep":{"Strings":["","",""]}}]}"#,
                "List[0].Deep.Strings: more than 2 entries",
            ),
            (r#"{"Number":65536}"#, "Number: must be from 0 to 65535"),
            (r#"{"Number":-1}"#, "Number: must be from 0 to 65535"),
            (
                r#"{"Number":99999999999999999999}"#,
                "Number: must be from 0 to 65535",
            ),
            (
                r#"{"Maybe":2}"#,
                "Maybe: must be from 3 to 18446744073709551615",
            ),
        ] {
            assert_eq!(refused(document), why);
        }
    }

    #[test]
    fn a_nul_is_refused_where_it_would_be_used_and_ignored_where_not() {
        for (document, path) in [
            (r#"{"Text":"a\u0000b"}"#, "Text"),
            (r#"{"Path":"\u0000"}"#, "Path"),
            (r#"{"Strings":["a","\u0000"]}"#, "Strings[1]"),
            (r#"{"Map":{"a":"\u0000"}}"#, "Map.a"),
            (r#"{"Shouted":"\u0000"}"#, "Shouted"),
        ] {
            assert_eq!(refused(document), format!("{path}: has a NUL character"));
        }
        assert_eq!(
            refused(r#"{"Map":{"\u0000":"a"}}"#),
            "Map: has a NUL character"
        );
        let document = r#"{"Other":"\u0000","\u0000":1,"Text\u0000":2,"\u0000Text":3}"#;
        assert!(with(document, |_| ()).is_ok());
    }

    #[test]
    fn names_in_a_map_of_strings_can_be_set_in_an_environment() {
        const WHY: &str = "Map: a name is empty or has '=' in it";
        assert_eq!(refused(r#"{"Map":{"":"x"}}"#), WHY);
        assert_eq!(refused(r#"{"Map":{"a=b":"x"}}"#), WHY);
        assert_eq!(refused(r#"{"Map":{"a\u003db":"x"}}"#), WHY);
    }

    #[test]
    fn an_ignored_value_may_be_as_deep_as_a_document_may_be() {
        let nested = |depth| {
            format!(
                r#"{{"x":{}{},"Text":"t"}}"#,
                r#"{"y":["#.repeat(depth),
                "]}".repeat(depth)
            )
        };
        assert_eq!(
            with(&nested(31), |everything| everything.text.to_owned()),
            Ok("t".to_owned())
        );
        assert_eq!(refused(&nested(32)), "nested deeper than 64 levels");
    }

    #[test]
    fn what_an_arena_has_no_room_for_is_an_error() {
        let document = br#"{"Other":"0123456789","0123456789":1,"Strings":["0123","45678"]}"#;
        let decode = |size: usize| {
            let mut memory = vec![0; size];
            let mut everything = Everything::default();
            let mut document = document.to_vec();
            let decoded = decode(&mut document, &mut Arena::new(&mut memory), &mut everything);
            decoded.map_err(|why| why.as_str().to_owned())
        };
        assert_eq!(decode(11), Ok(()));
        assert_eq!(decode(10), Err("Strings[1]: too long".to_owned()));
    }

    #[test]
    fn an_arena_is_none_the_worse_for_a_document_that_was_refused() {
        let mut memory = [0; 64];
        let mut arena = Arena::new(&mut memory);
        let mut refused = br#"{"Strings":["left","behind",1]}"#.to_vec();
        let mut everything = Everything::default();
        assert!(decode(&mut refused, &mut arena, &mut everything).is_err());
        let mut taken = br#"{"Text":"t"}"#.to_vec();
        decode(&mut taken, &mut arena, &mut everything).unwrap();
        assert_eq!(everything.text, "t");
    }
}
