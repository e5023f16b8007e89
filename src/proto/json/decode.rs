//! Decodes a document into its places, with serde's visitors.

use super::decoder::{Decoder, Step, ValueFault};
use super::normalize::normalize;
use super::place::{Object, Place};
use crate::arena::{Arena, Strings};
use crate::message::Message;
use core::fmt;
use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};

/// Decodes a document, which must be an object.
pub fn decode<'a>(
    document: &mut [u8],
    arena: &mut Arena<'a>,
    object: &mut dyn Object<'a>,
) -> Result<(), Message> {
    normalize(document)?;
    // An earlier document that was refused may have left something.
    arena.truncate(0);
    let mut decoder = Decoder {
        document,
        arena,
        path: heapless::Vec::new(),
        fault: ValueFault::Type(""),
    };
    let value = Value {
        decoder: &mut decoder,
        place: Place::Object(object),
    };
    // Without a buffer for escapes: strings are passed on with their escapes.
    let mut deserializer = serde_json_core::de::Deserializer::new(document, None);
    value
        .deserialize(&mut deserializer)
        .map_err(|error| decoder.message(error))
}

/// Decodes a value into its place.
struct Value<'v, 'd, 'a> {
    decoder: &'v mut Decoder<'d, 'a>,
    place: Place<'v, 'a>,
}

impl<'d> DeserializeSeed<'d> for Value<'_, 'd, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'d>>(self, value: D) -> Result<(), D::Error> {
        let fault = &mut self.decoder.fault;
        match &self.place {
            Place::Unknown => value.deserialize_ignored_any(self),
            Place::Refused(why) => Err(self.decoder.fail(ValueFault::Refused(why))),
            Place::CStr(_) | Place::Str(_) | Place::Parsed(_) | Place::Entry => {
                *fault = ValueFault::Type("a string");
                value.deserialize_str(self)
            }
            Place::ParsedOrNumber(_) => {
                *fault = ValueFault::Type("a string or a whole number from 0 on");
                match self.decoder.first_byte() {
                    Some(b'-' | b'0'..=b'9') => value.deserialize_u64(self),
                    _ => value.deserialize_str(self),
                }
            }
            Place::Flag(_) => {
                *fault = ValueFault::Type("true or false");
                value.deserialize_bool(self)
            }
            Place::Number(_, range) => {
                *fault = ValueFault::Number(range.clone());
                value.deserialize_u64(self)
            }
            Place::Strings(..) => {
                *fault = ValueFault::Type("a list of strings");
                value.deserialize_seq(self)
            }
            Place::Objects(_) => {
                *fault = ValueFault::Type("a list");
                value.deserialize_seq(self)
            }
            Place::StringMap(..) => {
                *fault = ValueFault::Type("an object of strings");
                value.deserialize_map(self)
            }
            Place::Object(_) => {
                *fault = ValueFault::Type("an object");
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

    /// Called for ignored values.
    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    /// A string with its escapes, as there is no buffer to decode them in.
    fn visit_borrowed_str<E: serde::de::Error>(self, escaped: &'d str) -> Result<(), E> {
        let done = self.decoder.string(escaped, self.place);
        done.map_err(|fault| self.decoder.fail(fault))
    }

    fn visit_bool<E>(self, flag: bool) -> Result<(), E> {
        if let Place::Flag(place) = self.place {
            *place = flag;
        }
        Ok(())
    }

    fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<(), E> {
        let done = self.decoder.number(number, self.place);
        done.map_err(|fault| self.decoder.fail(fault))
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
            // The last member's name is kept until here: only now is its value known to be complete.
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

/// Decodes an entry of a list.
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
        let place = place.map_err(|limit| decoder.fail(ValueFault::TooMany(limit)))?;
        let depth = decoder.path.len();
        // Deeper values are ignored ones.
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

/// Decodes the value of a member.
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
            Place::StringMap(_, limit) if self.number >= *limit => Err(ValueFault::TooMany(*limit)),
            Place::StringMap(..) => decoder.name(name).map(|()| Place::Entry),
            _ => Ok(Place::Unknown),
        };
        let place = place.map_err(|fault| {
            decoder.path.pop();
            decoder.fail(fault)
        })?;
        Value { decoder, place }.deserialize(value)
    }
}

#[cfg(test)]
mod tests {
    use super::super::place::Parse;
    use super::*;
    use core::ffi::CStr;

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
        // The length of the document is enough for all of its strings.
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
    fn the_last_of_duplicate_members_counts() {
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
    fn a_full_arena_is_an_error() {
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
    fn an_arena_can_be_reused_after_a_refused_document() {
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
