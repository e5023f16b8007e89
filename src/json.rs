//! JSON (RFC 8259), first pass: checks a document and condenses it where it lies.
//!
//! serde-json-core maps JSON onto structures, and has faults this pass keeps it from: it knows no
//! surrogate pairs, recurses on values it ignores, and lets malformed ones through. So the
//! document is first checked against a [`Shape`], without recursion, and rewritten in place
//! (never longer) to what serde-json-core reads well and without copying:
//!
//! * no white space, no unknown members, no members that are `null`;
//! * strings as UTF-8 in which only `\"` and `\\` are still escaped ([`Text`]);
//! * a list of strings as one string of NUL-terminated items, an object of strings as one string
//!   of `KEY=value` items ([`Texts`]): NUL itself is refused, as no C string can hold it;
//! * a list of objects as one string, too ([`Records`]): each member as a letter for its field and
//!   its value, NUL-terminated, and a NUL behind each object.

use crate::text::{Line, Show};
use core::net::IpAddr;
use serde::Deserialize;

/// Deepest nesting accepted, unknown members included.
pub const DEPTH: usize = 64;

/// What a value must be.
#[derive(Debug)]
pub enum Shape {
    /// A string.
    Text,
    /// `true` or `false`.
    Flag,
    /// An integer from 0 to the number given.
    Number(u32),
    /// A list of at most so many strings.
    Texts(usize),
    /// An object of at most so many members, names and values strings.
    Pairs(usize),
    /// A list of at most so many objects with these members, strings and numbers.
    Records(usize, &'static [(&'static str, Shape)]),
    /// An object with these members, all optional; others are ignored.
    Record(&'static [(&'static str, Shape)]),
}

/// Why a document was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Not JSON.
    Malformed,
    /// Not UTF-8.
    NotUtf8,
    /// Deeper than [`DEPTH`].
    TooDeep,
    /// A string that no C string can hold.
    Nul,
    /// Another type than the one wanted; the text names the wanted one.
    Wants(&'static str),
    /// An integer outside 0 to the number given.
    OutOfRange(u32),
    /// More entries than the number given.
    TooMany(usize),
    /// A name in an object of strings that is empty or holds `=`.
    Name,
    /// A member given twice.
    Twice,
}

/// A fault, and where in the document it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// What is wrong.
    pub fault: Fault,
    /// The value's path (`IPConfigs[0].Mask`); empty for the document itself.
    pub path: heapless::String<96>,
    /// Offset of the byte at which it was noticed.
    pub at: usize,
}

impl Show for Error {
    fn show(&self, line: &mut Line) {
        if !self.path.is_empty() {
            line.add(self.path.as_str()).add(": ");
        }
        match self.fault {
            Fault::Malformed => line.add("not JSON at byte ").add(self.at),
            Fault::NotUtf8 => line.add("not UTF-8 at byte ").add(self.at),
            Fault::TooDeep => line.add("nested deeper than ").add(DEPTH).add(" levels"),
            Fault::Nul => line.add("has a NUL character"),
            Fault::Wants(what) => line.add("must be ").add(what),
            Fault::OutOfRange(max) => line.add("must be from 0 to ").add(max),
            Fault::TooMany(max) => line.add("more than ").add(max).add(" entries"),
            Fault::Name => line.add("a name is empty or has '=' in it"),
            Fault::Twice => line.add("a member is given twice"),
        };
    }
}

/// A string of a condensed document.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(transparent)]
pub struct Text<'a>(#[serde(borrow)] &'a str);

impl<'a> Text<'a> {
    /// The characters as UTF-8.
    pub fn bytes(self) -> impl Iterator<Item = u8> + 'a {
        unescape(self.0.as_bytes())
    }

    /// Whether it is `""`.
    pub fn is_empty(self) -> bool {
        self.0.is_empty()
    }

    /// Copies it, or `None` when it is longer than `N` bytes.
    pub fn copy<const N: usize>(self) -> Option<heapless::Vec<u8, N>> {
        let mut copy = heapless::Vec::new();
        self.bytes().try_for_each(|byte| copy.push(byte)).ok()?;
        Some(copy)
    }

    /// Copies it for the kernel, or `None` when it is `N` bytes or longer, or has a NUL.
    pub fn c_string<const N: usize>(self) -> Option<heapless::CString<N>> {
        let mut copy = self.copy::<N>()?;
        copy.push(0).ok()?;
        heapless::CString::from_bytes_with_nul(&copy).ok()
    }

    /// Reads it as an IP address.
    pub fn ip(self) -> Option<IpAddr> {
        let bytes = self.copy::<48>()?;
        core::str::from_utf8(&bytes).ok()?.parse().ok()
    }
}

impl Show for Text<'_> {
    fn show(&self, line: &mut Line) {
        self.bytes().for_each(|byte| line.put(byte));
    }
}

/// A list of strings of a condensed document.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(transparent)]
pub struct Texts<'a>(#[serde(borrow)] &'a str);

impl<'a> Texts<'a> {
    /// The items in their order.
    pub fn iter(self) -> impl Iterator<Item = Text<'a>> {
        self.0.split_terminator('\0').map(Text)
    }

    /// Whether there is no item.
    pub fn is_empty(self) -> bool {
        self.0.is_empty()
    }
}

/// A list of objects of a condensed document.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(transparent)]
pub struct Records<'a>(#[serde(borrow)] &'a str);

impl<'a> Records<'a> {
    /// The objects in their order.
    pub fn iter(self) -> impl Iterator<Item = Record<'a>> {
        let mut rest = self.0.as_bytes();
        core::iter::from_fn(move || {
            let record = rest;
            let mut length = 0;
            for member in rest.split_inclusive(|byte| *byte == 0) {
                length += member.len();
                if member == b"\0" {
                    rest = record.get(length..)?;
                    return Some(Record(core::str::from_utf8(record.get(..length)?).ok()?));
                }
            }
            None
        })
    }

    /// Whether there is no object.
    pub fn is_empty(self) -> bool {
        self.0.is_empty()
    }
}

/// An object in such a list.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a>(&'a str);

impl<'a> Record<'a> {
    /// The value of the field at this place of the shape; empty when it is absent.
    pub fn field(self, index: u8) -> Text<'a> {
        let letter = char::from(FIRST_FIELD.wrapping_add(index));
        let mut members = self.0.split_terminator('\0');
        members.find_map(|member| member.strip_prefix(letter)).map_or(Text(""), Text)
    }

    /// The same for a number; 0 when it is absent.
    pub fn number(self, index: u8) -> u32 {
        self.field(index).0.parse().unwrap_or(0)
    }
}

/// The letter of a shape's first field.
const FIRST_FIELD: u8 = b'A';

/// Undoes the two escapes a condensed document has.
fn unescape(bytes: &[u8]) -> impl Iterator<Item = u8> + '_ {
    let mut rest = bytes.iter();
    core::iter::from_fn(move || match rest.next() {
        Some(b'\\') => rest.next().copied(),
        other => other.copied(),
    })
}

/// A byte as it stands in a JSON string, and how many bytes of the answer count (1, 2 or 6).
pub fn escape(byte: u8) -> ([u8; 6], usize) {
    let short = |letter| ([b'\\', letter, 0, 0, 0, 0], 2);
    match byte {
        b'"' | b'\\' => short(byte),
        b'\n' => short(b'n'),
        b'\r' => short(b'r'),
        b'\t' => short(b't'),
        0..0x20 => {
            let low = byte & 15;
            let digit = if low < 10 { b'0' + low } else { b'a' - 10 + low };
            ([b'\\', b'u', b'0', b'0', b'0' + (byte >> 4), digit], 6)
        }
        _ => ([byte, 0, 0, 0, 0, 0], 1),
    }
}

/// The first character of `bytes` as it stands in a JSON string.
///
/// The answer: the escaped form and its length, and how many bytes of the input it stands for.
/// Bytes that are no UTF-8 become U+FFFD. `None` at the end of the input, and, unless it is the
/// `last` piece, before a character that is cut off there.
pub fn escape_next(bytes: &[u8], last: bool) -> Option<([u8; 6], usize, usize)> {
    let first = *bytes.first()?;
    if first < 0x80 {
        let (escaped, length) = escape(first);
        return Some((escaped, length, 1));
    }
    let window = bytes.get(..4).unwrap_or(bytes);
    let (valid, skip) = match core::str::from_utf8(window) {
        Ok(text) => (Some(text), 0),
        Err(error) => match (error.valid_up_to(), error.error_len()) {
            (0, Some(length)) => (None, length),
            (0, None) if last => (None, window.len()),
            (0, None) => return None,
            (valid, _) => (window.get(..valid).and_then(|text| core::str::from_utf8(text).ok()), 0),
        },
    };
    let mut escaped = [0; 6];
    let character = valid.and_then(|text| text.chars().next());
    let length = character.unwrap_or(char::REPLACEMENT_CHARACTER).encode_utf8(&mut escaped).len();
    Some((escaped, length, if character.is_some() { length } else { skip }))
}

/// Checks `document` against `shape` and condenses it; the answer is the front part of it.
pub fn condense<'d>(document: &'d mut [u8], shape: &'static Shape) -> Result<&'d [u8], Error> {
    if let Err(error) = core::str::from_utf8(document) {
        return Err(Error {
            fault: Fault::NotUtf8,
            path: heapless::String::new(),
            at: error.valid_up_to(),
        });
    }
    let mut pass = Pass {
        bytes: document,
        read: 0,
        write: 0,
        open: heapless::Vec::new(),
    };
    match pass.document(shape) {
        Ok(()) => {
            let end = pass.write;
            Ok(document.get(..end).unwrap_or(&[]))
        }
        Err(fault) => Err(Error {
            fault,
            path: pass.path(),
            at: pass.read,
        }),
    }
}

/// Reads a condensed document.
///
/// What its shape let through fits the structure, but for one thing: a member given twice.
pub fn parse<'d, T: Deserialize<'d>>(condensed: &'d [u8]) -> Result<T, Error> {
    serde_json_core::from_slice(condensed)
        .map(|(value, _)| value)
        .map_err(|_| Error {
            fault: Fault::Twice,
            path: heapless::String::new(),
            at: 0,
        })
}

/// A container being read.
struct Frame {
    kind: Kind,
    /// Values read so far.
    count: usize,
    /// Members or items written so far.
    written: usize,
    /// The member being read, where it is a known one.
    name: &'static str,
    /// Where the output stood before the member being read.
    mark: usize,
}

#[derive(Clone, Copy)]
enum Kind {
    Record(Fields),
    Records(usize, Fields),
    /// An object in a list of them.
    Listed(Fields),
    Texts(usize),
    Pairs(usize),
    UnknownObject,
    UnknownList,
}

type Fields = &'static [(&'static str, Shape)];

impl Kind {
    fn is_object(self) -> bool {
        matches!(self, Kind::Record(_) | Kind::Listed(_) | Kind::Pairs(_) | Kind::UnknownObject)
    }
}

/// What comes next.
enum Next {
    /// A value: one of a shape, an item of a string list, or an unknown one.
    Value(Want),
    /// A value has ended: a comma or the container's end.
    After,
}

#[derive(Clone, Copy)]
enum Want {
    Shape(&'static Shape),
    /// A string of a list of strings, or of a listed object.
    Item,
    /// A number of a listed object.
    Number(u32),
    /// A listed object.
    Listed(Fields),
    Unknown,
}

struct Pass<'d> {
    bytes: &'d mut [u8],
    read: usize,
    /// Never past `read`: every piece is written no longer than it was read.
    write: usize,
    open: heapless::Vec<Frame, DEPTH>,
}

impl Pass<'_> {
    fn document(&mut self, shape: &'static Shape) -> Result<(), Fault> {
        let mut next = Next::Value(Want::Shape(shape));
        loop {
            next = match next {
                Next::Value(want) => self.value(want)?,
                Next::After if self.open.is_empty() => break,
                Next::After => self.after()?,
            };
        }
        match self.peek() {
            None => Ok(()),
            Some(_) => Err(Fault::Malformed),
        }
    }

    fn value(&mut self, want: Want) -> Result<Next, Fault> {
        let first = self.peek().ok_or(Fault::Malformed)?;
        match (first, want) {
            (b'{', Want::Shape(Shape::Record(fields))) => self.enter(Kind::Record(fields), b"{"),
            (b'{', Want::Listed(fields)) => self.enter(Kind::Listed(fields), b""),
            (b'{', Want::Shape(Shape::Pairs(max))) => self.enter(Kind::Pairs(*max), b"\""),
            (b'{', Want::Unknown) => self.enter(Kind::UnknownObject, b"{"),
            (b'[', Want::Shape(Shape::Records(max, fields))) => self.enter(Kind::Records(*max, fields), b"\""),
            (b'[', Want::Shape(Shape::Texts(max))) => self.enter(Kind::Texts(*max), b"\""),
            (b'[', Want::Unknown) => self.enter(Kind::UnknownList, b"["),
            (b'"', Want::Item) => {
                self.string(b"", b"\0", true)?;
                Ok(Next::After)
            }
            (b'"', Want::Shape(Shape::Text)) => {
                self.string(b"\"", b"\"", true)?;
                Ok(Next::After)
            }
            (b'"', Want::Unknown) => {
                self.string(b"\"", b"\"", false)?;
                Ok(Next::After)
            }
            (b'n', Want::Unknown) => self.word(b"null"),
            (b'n', _) => {
                self.word(b"null")?;
                // Absent: the member goes. An item of a list, or the document, cannot.
                let absent = match self.open.last_mut() {
                    Some(frame) if frame.kind.is_object() => {
                        self.write = frame.mark;
                        frame.written = frame.written.saturating_sub(1);
                        true
                    }
                    _ => false,
                };
                if absent { Ok(Next::After) } else { Err(self.mismatch(want)) }
            }
            (b't', Want::Shape(Shape::Flag) | Want::Unknown) => self.word(b"true"),
            (b'f', Want::Shape(Shape::Flag) | Want::Unknown) => self.word(b"false"),
            (b'-' | b'0'..=b'9', Want::Shape(Shape::Number(max))) => self.number(Some(*max)),
            (b'-' | b'0'..=b'9', Want::Number(max)) => {
                self.number(Some(max))?;
                self.put(0);
                Ok(Next::After)
            }
            (b'-' | b'0'..=b'9', Want::Unknown) => self.number(None),
            (b'{' | b'[' | b'"' | b't' | b'f' | b'-' | b'0'..=b'9', _) => Err(self.mismatch(want)),
            _ => Err(Fault::Malformed),
        }
    }

    fn mismatch(&self, want: Want) -> Fault {
        Fault::Wants(match want {
            Want::Item | Want::Shape(Shape::Text) | Want::Unknown => "a string",
            Want::Shape(Shape::Flag) => "true or false",
            Want::Number(_) | Want::Shape(Shape::Number(_)) => "a whole number",
            Want::Shape(Shape::Texts(_)) => "a list of strings",
            Want::Shape(Shape::Pairs(_)) => "an object of strings",
            Want::Shape(Shape::Records(..)) => "a list",
            Want::Listed(_) | Want::Shape(Shape::Record(_)) => "an object",
        })
    }

    /// Opens a container; reads its first member or its end.
    fn enter(&mut self, kind: Kind, open: &[u8]) -> Result<Next, Fault> {
        self.read += 1;
        open.iter().for_each(|&byte| self.put(byte));
        let frame = Frame {
            kind,
            count: 0,
            written: 0,
            name: "",
            mark: self.write,
        };
        self.open.push(frame).map_err(|_| Fault::TooDeep)?;
        let end = if kind.is_object() { b'}' } else { b']' };
        if self.peek() == Some(end) {
            return self.leave();
        }
        self.member(kind)
    }

    /// After a value inside a container.
    fn after(&mut self) -> Result<Next, Fault> {
        let Some(frame) = self.open.last_mut() else {
            return Err(Fault::Malformed);
        };
        let kind = frame.kind;
        frame.count += 1;
        if matches!(kind, Kind::Record(_) | Kind::Listed(_)) {
            if frame.name.is_empty() {
                self.write = frame.mark;
                frame.written = frame.written.saturating_sub(1);
            }
            frame.name = "";
        }
        match (self.peek(), kind.is_object()) {
            (Some(b','), _) => {
                self.read += 1;
                self.member(kind)
            }
            (Some(b'}'), true) | (Some(b']'), false) => self.leave(),
            _ => Err(Fault::Malformed),
        }
    }

    /// Up to the value of the container's next member or item.
    fn member(&mut self, kind: Kind) -> Result<Next, Fault> {
        let mark = self.write;
        let Some(frame) = self.open.last_mut() else {
            return Err(Fault::Malformed);
        };
        frame.mark = mark;
        let comma = frame.written > 0;
        frame.written += 1;
        match kind {
            Kind::Records(max, _) | Kind::Texts(max) | Kind::Pairs(max) if frame.count >= max => {
                return Err(Fault::TooMany(max));
            }
            Kind::Records(..) | Kind::Listed(_) | Kind::Texts(_) | Kind::Pairs(_) => {}
            _ if comma => self.put(b','),
            _ => {}
        }
        match kind {
            Kind::Records(_, fields) => Ok(Next::Value(Want::Listed(fields))),
            Kind::UnknownList => Ok(Next::Value(Want::Unknown)),
            Kind::Texts(_) => Ok(Next::Value(Want::Item)),
            Kind::Pairs(_) => {
                let name = self.name(b"", b"=", true)?;
                if name.is_empty() || name.contains(&b'=') {
                    return Err(Fault::Name);
                }
                Ok(Next::Value(Want::Item))
            }
            Kind::UnknownObject => {
                self.name(b"\"", b"\":", false)?;
                Ok(Next::Value(Want::Unknown))
            }
            Kind::Record(fields) => {
                let name = self.name(b"\"", b"\":", false)?;
                let known = fields.iter().find(|(field, _)| field.as_bytes() == name);
                if let (Some((field, _)), Some(frame)) = (known, self.open.last_mut()) {
                    frame.name = field;
                }
                Ok(Next::Value(known.map_or(Want::Unknown, |(_, shape)| Want::Shape(shape))))
            }
            Kind::Listed(fields) => {
                let name = self.name(b"", b"", false)?;
                let known = fields.iter().zip(FIRST_FIELD..).find(|((field, _), _)| field.as_bytes() == name);
                self.write = mark;
                let (Some(((field, shape), letter)), Some(frame)) = (known, self.open.last_mut()) else {
                    return Ok(Next::Value(Want::Unknown));
                };
                frame.name = field;
                self.put(letter);
                Ok(Next::Value(match shape {
                    Shape::Number(max) => Want::Number(*max),
                    _ => Want::Item,
                }))
            }
        }
    }

    /// Closes the innermost container.
    fn leave(&mut self) -> Result<Next, Fault> {
        self.read += 1;
        let Some(frame) = self.open.pop() else {
            return Err(Fault::Malformed);
        };
        self.put(match frame.kind {
            Kind::Record(_) | Kind::UnknownObject => b'}',
            Kind::UnknownList => b']',
            Kind::Listed(_) => 0,
            Kind::Records(..) | Kind::Texts(_) | Kind::Pairs(_) => b'"',
        });
        Ok(Next::After)
    }

    /// A member's name and its colon; the answer is the name as written.
    fn name(&mut self, before: &[u8], after: &[u8], keep: bool) -> Result<&[u8], Fault> {
        if self.peek() != Some(b'"') {
            return Err(Fault::Malformed);
        }
        let start = self.write + before.len();
        self.string(before, b"", keep)?;
        let end = self.write;
        if self.peek() != Some(b':') {
            return Err(Fault::Malformed);
        }
        self.read += 1;
        after.iter().for_each(|&byte| self.put(byte));
        Ok(self.bytes.get(start..end).unwrap_or(&[]))
    }

    /// A string, decoded. `keep`: it will be used, so it must not have a NUL.
    fn string(&mut self, before: &[u8], after: &[u8], keep: bool) -> Result<(), Fault> {
        self.read += 1;
        before.iter().for_each(|&byte| self.put(byte));
        loop {
            match self.take()? {
                b'"' => break,
                b'\\' => match self.take()? {
                    b'b' => self.put(0x08),
                    b'f' => self.put(0x0c),
                    b'n' => self.put(b'\n'),
                    b'r' => self.put(b'\r'),
                    b't' => self.put(b'\t'),
                    b'/' => self.put(b'/'),
                    escaped @ (b'"' | b'\\') => self.put_escaped(escaped),
                    b'u' => {
                        let unit = self.hex4()?;
                        self.code_unit(unit, keep)?;
                    }
                    _ => return Err(Fault::Malformed),
                },
                0..0x20 => return Err(Fault::Malformed),
                byte => self.put(byte),
            }
        }
        after.iter().for_each(|&byte| self.put(byte));
        Ok(())
    }

    /// A `\u` escape, with the second half of a surrogate pair if it is there.
    fn code_unit(&mut self, unit: u32, keep: bool) -> Result<(), Fault> {
        let mut code = unit;
        if (0xd800..0xdc00).contains(&unit) {
            let ahead = self.bytes.get(self.read..self.read + 6).unwrap_or(&[]);
            if let [b'\\', b'u', digits @ ..] = ahead
                && let Some(low @ 0xdc00..0xe000) = hex(digits)
            {
                code = 0x10000 + ((unit - 0xd800) << 10) + (low - 0xdc00);
                self.read += 6;
            }
        }
        match char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER) {
            '\0' if keep => Err(Fault::Nul),
            // Kept apart from the terminator of list items; the member is dropped anyway.
            '\0' => {
                self.put(b' ');
                Ok(())
            }
            special @ ('"' | '\\') => {
                self.put_escaped(special as u8);
                Ok(())
            }
            character => {
                let mut utf8 = [0; 4];
                character.encode_utf8(&mut utf8).bytes().for_each(|byte| self.put(byte));
                Ok(())
            }
        }
    }

    fn hex4(&mut self) -> Result<u32, Fault> {
        let value = self.bytes.get(self.read..self.read + 4).and_then(hex);
        self.read += 4;
        value.ok_or(Fault::Malformed)
    }

    fn word(&mut self, word: &[u8]) -> Result<Next, Fault> {
        for &wanted in word {
            if self.take()? != wanted {
                return Err(Fault::Malformed);
            }
            self.put(wanted);
        }
        Ok(Next::After)
    }

    /// A number by the grammar of RFC 8259 section 6; with `max`, an integer up to it.
    fn number(&mut self, max: Option<u32>) -> Result<Next, Fault> {
        let start = self.read;
        let negative = self.accept(b'-');
        match self.take()? {
            b'0' => {}
            b'1'..=b'9' => self.digits(),
            _ => return Err(Fault::Malformed),
        }
        let whole = self.read;
        if self.accept(b'.') {
            self.some_digits()?;
        }
        if self.accept(b'e') || self.accept(b'E') {
            let _signed = self.accept(b'+') || self.accept(b'-');
            self.some_digits()?;
        }
        if let Some(max) = max {
            if whole != self.read {
                return Err(Fault::Wants("a whole number"));
            }
            let value = self.bytes.get(start..whole).unwrap_or(&[]).iter().try_fold(0u32, |sum, digit| {
                sum.checked_mul(10)?.checked_add(u32::from(digit.wrapping_sub(b'0')))
            });
            if negative || value.is_none_or(|value| value > max) {
                return Err(Fault::OutOfRange(max));
            }
        }
        for at in start..self.read {
            let byte = self.bytes.get(at).copied().unwrap_or(b'0');
            self.put(byte);
        }
        Ok(Next::After)
    }

    fn some_digits(&mut self) -> Result<(), Fault> {
        if !self.take()?.is_ascii_digit() {
            return Err(Fault::Malformed);
        }
        self.digits();
        Ok(())
    }

    fn digits(&mut self) {
        while self.bytes.get(self.read).is_some_and(u8::is_ascii_digit) {
            self.read += 1;
        }
    }

    fn accept(&mut self, byte: u8) -> bool {
        let there = self.bytes.get(self.read) == Some(&byte);
        self.read += usize::from(there);
        there
    }

    /// The next byte that is not white space, which stays to be read.
    fn peek(&mut self) -> Option<u8> {
        while matches!(self.bytes.get(self.read), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.read += 1;
        }
        self.bytes.get(self.read).copied()
    }

    fn take(&mut self) -> Result<u8, Fault> {
        let byte = self.bytes.get(self.read).copied().ok_or(Fault::Malformed)?;
        self.read += 1;
        Ok(byte)
    }

    fn put(&mut self, byte: u8) {
        debug_assert!(self.write < self.read);
        if let Some(slot) = self.bytes.get_mut(self.write) {
            *slot = byte;
            self.write += 1;
        }
    }

    fn put_escaped(&mut self, byte: u8) {
        self.put(b'\\');
        self.put(byte);
    }

    /// The path of the value being read, as far as its members are known ones.
    fn path(&self) -> heapless::String<96> {
        let mut line = Line::new();
        for frame in &self.open {
            match frame.kind {
                Kind::Record(_) | Kind::Listed(_) if !frame.name.is_empty() => {
                    if !line.as_bytes().is_empty() {
                        line.put(b'.');
                    }
                    line.add(frame.name);
                }
                Kind::Records(..) | Kind::Texts(_) => {
                    line.add("[").add(frame.count).add("]");
                }
                _ => {}
            }
        }
        core::str::from_utf8(line.as_bytes())
            .ok()
            .and_then(|path| heapless::String::try_from(path).ok())
            .unwrap_or_default()
    }
}

/// Four hexadecimal digits.
fn hex(digits: &[u8]) -> Option<u32> {
    digits.iter().try_fold(0, |sum, &digit| {
        Some(sum << 4 | char::from(digit).to_digit(16)?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    static SHAPE: Shape = Shape::Record(&[
        ("Text", Shape::Text),
        ("Flag", Shape::Flag),
        ("Number", Shape::Number(65_535)),
        ("Texts", Shape::Texts(3)),
        ("Pairs", Shape::Pairs(2)),
        ("List", Shape::Records(2, &[("Name", Shape::Text), ("Size", Shape::Number(128))])),
        ("Record", Shape::Record(&[("Deep", Shape::Texts(2))])),
    ]);

    fn condensed(document: &str) -> Result<String, Error> {
        let mut bytes = document.as_bytes().to_vec();
        condense(&mut bytes, &SHAPE).map(|short| String::from_utf8(short.to_vec()).unwrap())
    }

    fn refused(document: &str) -> (Fault, String) {
        let error = condensed(document).unwrap_err();
        (error.fault, error.path.to_string())
    }

    #[test]
    fn a_document_is_condensed_to_what_is_known() {
        let document = r#" { "Unknown" : [1, {"a":null}, "x"], "Text" : "hi", "Flag": true,
            "Other": 1.5e-3, "Number": 0, "Texts": [ "a" , "b c" ], "Pairs": {"K": "v", "L":""},
            "List": [ {"Name":"n","Size":128,"More":{}} , {} ], "Record":{"Deep":[]}} "#;
        let expected = "{\"Text\":\"hi\",\"Flag\":true,\"Number\":0,\"Texts\":\"a\0b c\0\",\
            \"Pairs\":\"K=v\0L=\0\",\"List\":\"An\0B128\0\0\0\",\"Record\":{\"Deep\":\"\"}}";
        assert_eq!(condensed(document).unwrap(), expected);
    }

    #[test]
    fn listed_objects_are_read_field_by_field() {
        let document = r#"{"List":[{"Size":7,"X":[{"Name":"no"}],"Name":"a\"b","Y":null},{"Name":null,"Size":1}]}"#;
        let text = condensed(document).unwrap();
        let inner = text.strip_prefix("{\"List\":\"").unwrap().strip_suffix("\"}").unwrap();
        let read = |record: Record| (String::from_utf8(record.field(0).bytes().collect()).unwrap(), record.number(1));
        let records: Vec<_> = Records(inner).iter().map(read).collect();
        assert_eq!(records, [("a\"b".to_owned(), 7), (String::new(), 1)]);
        assert_eq!(Records("").iter().count(), 0);
        assert_eq!(Records("\0\0").iter().count(), 2);
    }

    #[test]
    fn null_members_are_absent() {
        assert_eq!(
            condensed(r#"{"Text":null,"Flag":true,"Record":null,"Pairs":{"A":null,"B":"b"}}"#).unwrap(),
            "{\"Flag\":true,\"Pairs\":\"B=b\0\"}"
        );
    }

    #[test]
    fn escapes_are_decoded_with_surrogate_pairs() {
        let text = condensed(r#"{"Text":"\u00e9\ud83d\udc26 \ud800 \/\n\t\"\\\u0022\u005c\u0001"}"#).unwrap();
        assert_eq!(text, "{\"Text\":\"é🐦 \u{fffd} /\n\t\\\"\\\\\\\"\\\\\u{1}\"}");
        let inner = text.strip_prefix("{\"Text\":\"").unwrap().strip_suffix("\"}").unwrap();
        let bytes: Vec<u8> = Text(inner).bytes().collect();
        assert_eq!(String::from_utf8(bytes).unwrap(), "é🐦 \u{fffd} /\n\t\"\\\"\\\u{1}");
    }

    fn escaped(bytes: &[u8], step: usize) -> String {
        let mut text = Vec::new();
        let mut at = 0;
        for end in (0..bytes.len()).step_by(step).skip(1).chain([bytes.len()]) {
            while let Some((piece, length, used)) = escape_next(&bytes[at..end], end == bytes.len()) {
                text.extend(&piece[..length]);
                at += used;
            }
        }
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn output_is_escaped_as_a_lossy_conversion_has_it_wherever_it_is_cut() {
        for bytes in [
            &b"plain \"quoted\" back\\slash\n\r\t\x01\x1f\x7f"[..],
            "é 鳩 🐦 mixed".as_bytes(),
            b"\xff\xfe a \xc3( \xe2\x82( \xf0\x9f\x90 \xed\xa0\x80 end \xf0\x9f",
            b"\xe2\x82",
            b"",
        ] {
            let whole = escaped(bytes, 1000);
            let json = format!("\"{whole}\"");
            let mut wrapped = format!(r#"{{"Text":{json}}}"#).into_bytes();
            let condensed = condense(&mut wrapped, &SHAPE).unwrap();
            let inner = &condensed[b"{\"Text\":\"".len()..condensed.len() - 2];
            assert_eq!(unescape(inner).collect::<Vec<_>>(), String::from_utf8_lossy(bytes).as_bytes());
            for step in 1..6 {
                assert_eq!(escaped(bytes, step), whole);
            }
        }
    }

    #[test]
    fn a_high_surrogate_before_another_escape_keeps_that_escape() {
        assert_eq!(condensed(r#"{"Text":"\ud83d\u0041"}"#).unwrap(), "{\"Text\":\"\u{fffd}A\"}");
    }

    #[test]
    fn a_wrong_type_names_the_field_and_the_type_wanted() {
        for (document, wanted, path) in [
            ("[]", "an object", ""),
            ("null", "an object", ""),
            (r#"{"Text":1}"#, "a string", "Text"),
            (r#"{"Flag":"true"}"#, "true or false", "Flag"),
            (r#"{"Number":"1"}"#, "a whole number", "Number"),
            (r#"{"Number":1.0}"#, "a whole number", "Number"),
            (r#"{"Texts":"a"}"#, "a list of strings", "Texts"),
            (r#"{"Texts":["a",2]}"#, "a string", "Texts[1]"),
            (r#"{"Texts":[null]}"#, "a string", "Texts[0]"),
            (r#"{"Pairs":[]}"#, "an object of strings", "Pairs"),
            (r#"{"Pairs":{"a":1}}"#, "a string", "Pairs"),
            (r#"{"List":{}}"#, "a list", "List"),
            (r#"{"List":[{},3]}"#, "an object", "List[1]"),
            (r#"{"List":[{"Name":"x"},{"Size":"y"}]}"#, "a whole number", "List[1].Size"),
            (r#"{"Record":{"Deep":["a",{}]}}"#, "a string", "Record.Deep[1]"),
        ] {
            assert_eq!(refused(document), (Fault::Wants(wanted), path.to_owned()), "{document}");
        }
    }

    #[test]
    fn limits_are_errors_that_name_the_limit() {
        assert_eq!(refused(r#"{"Texts":["","","",""]}"#).0, Fault::TooMany(3));
        assert_eq!(refused(r#"{"Pairs":{"a":"","b":"","c":""}}"#).0, Fault::TooMany(2));
        assert_eq!(refused(r#"{"List":[{},{},{}]}"#).0, Fault::TooMany(2));
        assert_eq!(refused(r#"{"Number":65536}"#).0, Fault::OutOfRange(65_535));
        assert_eq!(refused(r#"{"Number":-1}"#).0, Fault::OutOfRange(65_535));
        assert_eq!(refused(r#"{"Number":99999999999999999999}"#).0, Fault::OutOfRange(65_535));
    }

    #[test]
    fn nesting_is_bounded_without_recursion() {
        let nested = |depth: usize| format!(r#"{{"x":{}{}}}"#, "[".repeat(depth), "]".repeat(depth));
        assert_eq!(condensed(&nested(DEPTH - 1)).unwrap(), "{}");
        assert_eq!(refused(&nested(DEPTH)).0, Fault::TooDeep);
        assert_eq!(refused(&"[".repeat(1 << 20)).0, Fault::Wants("an object"));
        assert_eq!(refused(&format!(r#"{{"x":{}"#, "[".repeat(1 << 20))).0, Fault::TooDeep);
    }

    #[test]
    fn what_is_not_json_is_refused_wherever_it_stands() {
        for document in [
            "", " ", "{", "{}x", "{}{}", "{,}", r#"{"a"}"#, r#"{"a":}"#, r#"{"a":1,}"#, r#"{a:1}"#,
            r#"{"a":[1,]}"#, r#"{"a":[1 2]}"#, r#"{"a":[1}}"#, r#"{"a":{]}"#, r#"{"a":01}"#, r#"{"a":1.}"#,
            r#"{"a":.5}"#, r#"{"a":1e}"#, r#"{"a":-}"#, r#"{"a":+1}"#, r#"{"a":nul}"#, r#"{"a":truE}"#,
            r#"{"a":NaN}"#, r#"{"a":"x}"#, r#"{"a":"\x"}"#, r#"{"a":"\u12g4"}"#, r#"{"a":"\u12"#,
            "{\"a\":\"\n\"}", r#"{'a':1}"#, "{\"a\":1}\0", "{\"a\":\u{a0}1}",
        ] {
            assert_eq!(refused(document).0, Fault::Malformed, "{document:?}");
        }
        let mut bytes = b"{\"a\":\"\xff\"}".to_vec();
        assert_eq!(condense(&mut bytes, &SHAPE).unwrap_err().fault, Fault::NotUtf8);
    }

    #[test]
    fn a_nul_is_refused_where_it_would_be_used_and_ignored_where_not() {
        assert_eq!(refused(r#"{"Text":"a\u0000b"}"#), (Fault::Nul, "Text".to_owned()));
        assert_eq!(refused(r#"{"Texts":["a","\u0000"]}"#), (Fault::Nul, "Texts[1]".to_owned()));
        assert_eq!(condensed(r#"{"Other":"\u0000","\u0000":1}"#).unwrap(), "{}");
    }

    #[test]
    fn names_in_an_object_of_strings_can_be_set_in_an_environment() {
        assert_eq!(refused(r#"{"Pairs":{"":"x"}}"#).0, Fault::Name);
        assert_eq!(refused(r#"{"Pairs":{"a=b":"x"}}"#).0, Fault::Name);
    }

    #[test]
    fn every_prefix_of_a_document_is_refused_and_none_panics() {
        let document = r#"{"Text":"\ud83d\udc26","Texts":["a"],"List":[{"Size":1}],"x":[{"y":-1.5e+3}]}"#;
        assert!(condensed(document).is_ok());
        for end in 0..document.len() {
            assert!(condensed(&document[..end]).is_err(), "{}", &document[..end]);
        }
    }
}
