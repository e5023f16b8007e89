//! JSON (RFC 8259), read where it lies: no copies, no recursion, no heap.
//!
//! A document is checked against a [`Shape`] and decoded in place, which never makes it longer. The
//! values that the shape names are found again through their [`Spans`]:
//!
//! * every string is UTF-8 with a NUL behind it, as the kernel wants it; a NUL inside is refused,
//!   as no C string can hold it;
//! * a list of strings is those strings one after the other, an object of strings is `KEY=value`
//!   strings ([`Strings`]);
//! * a list of objects is one string a member, a letter for its field and its value, and an empty
//!   string behind each object ([`Objects`]).
//!
//! Members that are `null` are absent. Unknown members are checked and dropped. Of a member given
//! twice the last one counts, as in Go's encoding/json. A surrogate without its other half becomes
//! U+FFFD.
//!
//! Not serde-json-core: it knows no surrogate pairs, recurses on values it ignores and lets
//! malformed ones through, so that this pass has to be made in any case. What would be left for it
//! is to find members again, at 9 KiB of code.

use crate::address;
use crate::bytes::{before, character, decimal, find, hexadecimal, split, valid_up_to};
use crate::message::{Message, ToLossy};
use core::ffi::CStr;
use core::fmt::{self, Display, Write};
use core::net::IpAddr;

/// Deepest nesting accepted, unknown members included.
pub const DEPTH: usize = 64;

/// What a value must be, and the slot of the [`Spans`] that tells where it is.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// The largest number, or most entries.
    max: u32,
    kind: Kind,
    slot: u8,
    /// How many fields behind this one are inside of it.
    inside: u8,
}

/// The members of an object by name, all optional. What is inside of a member follows it.
pub type Fields = &'static [Field];

/// A member: its name, filled up with zeros, and what it must be.
#[derive(Debug)]
pub struct Field([u8; 12], Shape);

impl Field {
    fn name(&self) -> &[u8] {
        before(&self.0, 0)
    }
}

/// A member of that name, which has 12 characters at most.
pub const fn field(name: &str, shape: Shape) -> Field {
    let mut filled = [0; 12];
    let (start, _zeros) = filled.split_at_mut(name.len());
    start.copy_from_slice(name.as_bytes());
    Field(filled, shape)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A member that nobody knows.
    Any,
    Text,
    Flag,
    Number,
    Strings,
    StringMap,
    Objects,
    Record,
}

impl Kind {
    /// The byte that stands for all with which such a value starts.
    fn start(self) -> u8 {
        match self {
            Kind::Any | Kind::Text => b'"',
            Kind::Flag => b't',
            Kind::Number => b'0',
            Kind::Strings | Kind::Objects => b'[',
            Kind::StringMap | Kind::Record => b'{',
        }
    }

    /// What such a value is called; in the order of the kinds.
    fn name(self) -> &'static [u8] {
        const NAMES: &str = "\
a string
a string
true or false
a whole number
a list of strings
an object of strings
a list
an object";
        let mut names = split(NAMES.as_bytes(), b'\n');
        names.nth(self as usize).unwrap_or(&[])
    }
}

/// Of a value that has no slot.
const NOWHERE: u8 = u8::MAX;

impl Shape {
    const fn new(kind: Kind, slot: u8, max: u32, inside: u8) -> Self {
        Self {
            max,
            kind,
            slot,
            inside,
        }
    }

    /// A string.
    pub const fn text(slot: u8) -> Self {
        Self::new(Kind::Text, slot, 0, 0)
    }

    /// `true` or `false`.
    pub const fn flag(slot: u8) -> Self {
        Self::new(Kind::Flag, slot, 0, 0)
    }

    /// An integer from 0 to `max`.
    pub const fn number(slot: u8, max: u32) -> Self {
        Self::new(Kind::Number, slot, max, 0)
    }

    /// A list of at most `max` strings.
    pub const fn texts(slot: u8, max: usize) -> Self {
        Self::new(Kind::Strings, slot, max as u32, 0)
    }

    /// An object of at most `max` members, names and values strings.
    pub const fn pairs(slot: u8, max: usize) -> Self {
        Self::new(Kind::StringMap, slot, max as u32, 0)
    }

    /// A list of at most `max` objects: the first of the fields inside is their shape. The slots of
    /// their members, strings and numbers, are capital letters.
    pub const fn records(slot: u8, max: usize, inside: u8) -> Self {
        Self::new(Kind::Objects, slot, max as u32, inside)
    }

    /// An object: the fields inside are its members.
    pub const fn record(inside: u8) -> Self {
        Self::new(Kind::Record, NOWHERE, u32::MAX, inside)
    }

    /// An entry of [`Kind::Strings`] or [`Kind::StringMap`].
    const ENTRY: Self = Self::text(NOWHERE);

    /// A member nobody knows, and all inside of it.
    const ANY: Self = Self::new(Kind::Any, NOWHERE, u32::MAX, 0);
}

/// Where the values of a decoded document lie: start and end, by slot.
#[derive(Clone, Copy, Debug, Default)]
pub struct Spans([(u32, u32); SLOTS]);

/// Most slots of a shape.
const SLOTS: usize = 20;

/// A decoded document.
#[derive(Clone, Copy, Debug)]
pub struct Document<'a> {
    bytes: &'a [u8],
    spans: &'a Spans,
}

impl<'a> Document<'a> {
    /// A document that [`read`] decoded, with the spans it gave.
    pub fn new(bytes: &'a [u8], spans: &'a Spans) -> Self {
        Self { bytes, spans }
    }

    /// A list of strings, or an object of strings.
    pub fn texts(&self, slot: u8) -> Strings<'a> {
        let span = self.spans.0.get(usize::from(slot));
        let (start, end) = span.copied().unwrap_or_default();
        Strings(self.bytes.get(start as usize..end as usize).unwrap_or(&[]))
    }

    /// A string; empty when it is absent.
    pub fn text(&self, slot: u8) -> Text<'a> {
        self.texts(slot).next().unwrap_or_default()
    }

    /// A list of objects.
    pub fn records(&self, slot: u8) -> Objects<'a> {
        Objects(self.texts(slot))
    }

    /// A number; 0 when it is absent.
    pub fn number(&self, slot: u8) -> u32 {
        self.text(slot).number()
    }

    /// A flag; false when it is absent.
    pub fn flag(&self, slot: u8) -> bool {
        self.text(slot).bytes() == b"true"
    }
}

/// A string of a decoded document: its bytes, and a NUL, except that one that is absent has none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Text<'a>(&'a [u8]);

impl<'a> Text<'a> {
    /// The characters as UTF-8.
    pub fn bytes(self) -> &'a [u8] {
        self.0.split_last().map_or(&[], |(_, bytes)| bytes)
    }

    /// The same with the NUL behind them, which one that is absent does not have.
    pub fn bytes_with_nul(self) -> &'a [u8] {
        self.0
    }

    /// A string of the program's own.
    pub const fn of(text: &'a CStr) -> Self {
        Self(text.to_bytes_with_nul())
    }

    /// Whether it is `""`.
    pub fn is_empty(self) -> bool {
        self.0.len() < 2
    }

    /// Reads it as an IP address.
    pub fn ip(self) -> Option<IpAddr> {
        address::parse(self.bytes())
    }

    /// Digits that the document's check let through.
    fn number(self) -> u32 {
        decimal(self.bytes()).unwrap_or(0)
    }
}

impl Display for Text<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.bytes().lossy().fmt(formatter)
    }
}

/// A list of strings of a decoded document.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Strings<'a>(&'a [u8]);

impl<'a> Strings<'a> {
    /// A list of one string.
    pub fn one(text: Text<'a>) -> Self {
        Self(text.0)
    }

    /// The items in their order.
    pub fn iter(self) -> impl Iterator<Item = Text<'a>> + Clone {
        Items(self)
    }

    /// Whether there is no item.
    pub fn is_empty(self) -> bool {
        self.0.is_empty()
    }

    fn next(&mut self) -> Option<Text<'a>> {
        let (text, rest) = self.0.split_at_checked(find(self.0, 0)? + 1)?;
        self.0 = rest;
        Some(Text(text))
    }
}

#[derive(Clone)]
struct Items<'a>(Strings<'a>);

impl<'a> Iterator for Items<'a> {
    type Item = Text<'a>;

    fn next(&mut self) -> Option<Text<'a>> {
        self.0.next()
    }
}

/// A list of objects of a decoded document.
#[derive(Clone, Copy, Debug, Default)]
pub struct Objects<'a>(Strings<'a>);

impl<'a> Objects<'a> {
    /// The objects in their order.
    pub fn iter(mut self) -> impl Iterator<Item = Record<'a>> {
        core::iter::from_fn(move || self.next())
    }

    /// Whether there is no object.
    pub fn is_empty(self) -> bool {
        self.0.is_empty()
    }

    fn next(&mut self) -> Option<Record<'a>> {
        let record = Record(self.0);
        while !self.0.next()?.is_empty() {}
        Some(record)
    }
}

/// An object in such a list: its members, an empty string, and what follows in the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record<'a>(Strings<'a>);

impl<'a> Record<'a> {
    /// A string; empty when it is absent.
    pub fn text(self, slot: u8) -> Text<'a> {
        let mut members = self.0;
        let mut found = Text::default();
        while let Some(Text([letter, value @ ..])) = members.next()
            && *letter != 0
        {
            if *letter == slot {
                found = Text(value);
            }
        }
        found
    }

    /// A number; 0 when it is absent.
    pub fn number(self, slot: u8) -> u32 {
        self.text(slot).number()
    }
}

/// What has a short escape, and the letters of those; `/` needs none.
const ESCAPED: &[u8; 8] = b"\"\\\n\r\t\x08\x0c/";
const LETTERS: &[u8; 8] = b"\"\\nrtbf/";

const DIGITS: &[u8; 16] = b"0123456789abcdef";

/// Gives `bytes` to `put` as they stand in a JSON string, until it takes no more; how many of them
/// were given.
///
/// A piece is one character at most. Bytes that are no UTF-8 become U+FFFD. A character that is cut
/// off at the end stays, unless these are the `last` bytes.
pub fn escape(bytes: &[u8], last: bool, put: &mut dyn FnMut(&[u8]) -> bool) -> usize {
    let mut at = 0;
    while let Some(rest @ [first, ..]) = bytes.get(at..) {
        let (short, control);
        let mut used = 1;
        let letter = find(ESCAPED, *first).and_then(|at| LETTERS.get(at));
        let piece: &[u8] = match (letter, first) {
            (Some(letter), _) if *letter != b'/' => {
                short = [b'\\', *letter];
                &short
            }
            (_, 0..0x20) => {
                let low = DIGITS.get(usize::from(first & 15));
                control = [
                    b'\\',
                    b'u',
                    b'0',
                    b'0',
                    b'0' + (first >> 4),
                    *low.unwrap_or(&0),
                ];
                &control
            }
            _ => match character(rest) {
                Ok(length) => {
                    used = length;
                    rest.get(..length).unwrap_or(&[])
                }
                Err(0) if !last => break,
                Err(length) => {
                    used = if length == 0 { rest.len() } else { length };
                    "\u{fffd}".as_bytes()
                }
            },
        };
        if !put(piece) {
            break;
        }
        at += used;
    }
    at
}

/// Most bytes of [`Quoted`]: with what stands around it it fits into a [`Message`].
const QUOTED: usize = 896;

/// Text as a JSON string with its quotes, for display; what is over 896 bytes is cut.
pub struct Quoted<'a>(pub &'a [u8]);

impl Display for Quoted<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_char('"')?;
        let mut room = QUOTED;
        let mut written = Ok(());
        let used = escape(self.0, true, &mut |piece| {
            let fits = piece.len() <= room;
            if fits && written.is_ok() {
                room -= piece.len();
                written = formatter.write_str(core::str::from_utf8(piece).unwrap_or(""));
            }
            fits
        });
        written?;
        if used < self.0.len() {
            formatter.write_char('…')?;
        }
        formatter.write_char('"')
    }
}

/// A number, or `null`, for display.
pub struct OrNull(pub Option<i32>);

impl Display for OrNull {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(number) => number.fmt(formatter),
            None => formatter.write_str("null"),
        }
    }
}

/// Checks `document` against the members of the object it must be, and decodes it where it lies.
///
/// The error says which value is wrong (`IPConfigs[0].Mask`), and what is wrong with it.
pub fn read(document: &mut [u8], fields: Fields, spans: &mut Spans) -> Result<(), Message> {
    *spans = Spans::default();
    let mut pass = Pass {
        read: 0,
        write: 0,
        shape: Shape::record(fields.len() as u8),
        first: 0,
        fields,
        bytes: document,
        // Around the document: null is no member of it.
        frame: Frame {
            shape: Shape::ANY,
            known: None,
            start: 0,
            mark: 0,
            count: 0,
            first: 0,
            end: 0,
        },
        spans,
        outer: heapless::Vec::new(),
    };
    match pass.document() {
        Ok(()) => Ok(()),
        Err(fault) => Err(pass.refusal(fault)),
    }
}

/// Why a document is refused. Details are where the pass stands.
#[derive(Clone, Copy)]
enum Fault {
    /// Not JSON.
    Malformed,
    /// Not UTF-8.
    NotUtf8,
    /// Deeper than [`DEPTH`].
    TooDeep,
    /// A string that no C string can hold.
    Nul,
    /// Another type than the one wanted.
    Type,
    /// A number over the largest, or below 0.
    OutOfRange,
    /// More entries than there may be.
    TooMany,
    /// A name in an object of strings that is empty or holds `=`.
    Name,
}

/// The faults in their order; `%` is the number at hand.
const SENTENCES: &str = "\
not JSON at byte %
not UTF-8 at byte %
nested deeper than % levels
has a NUL character
must be\x20
must be from 0 to %
more than % entries
a name is empty or has '=' in it";

/// A container being read.
#[derive(Clone, Copy)]
struct Frame {
    shape: Shape,
    /// The field being read, where it is one of a record.
    known: Option<u8>,
    /// Where the output stood before the container.
    start: u32,
    /// Where it stood before the member being read.
    mark: u32,
    /// Values begun.
    count: u32,
    /// Which field is the first inside of it.
    first: u8,
    /// The bracket that closes it.
    end: u8,
}

/// The large members last: so the others are reached with short instructions.
#[repr(C)]
struct Pass<'d> {
    read: usize,
    /// Never past `read`: every piece is written no longer than it was read.
    write: usize,
    /// What the value being read must be.
    shape: Shape,
    /// Which field is the first inside of it.
    first: u8,
    fields: Fields,
    bytes: &'d mut [u8],
    /// The innermost container.
    frame: Frame,
    spans: &'d mut Spans,
    /// Those around it.
    outer: heapless::Vec<Frame, DEPTH>,
}

impl<'d> Pass<'d> {
    fn document(&mut self) -> Result<(), Fault> {
        self.read = valid_up_to(self.bytes);
        if self.read != self.bytes.len() {
            return Err(Fault::NotUtf8);
        }
        self.read = 0;
        self.value()?;
        while !self.outer.is_empty() {
            if self.more()? {
                self.value()?;
            }
        }
        self.peek();
        match self.bytes.get(self.read) {
            None => Ok(()),
            Some(_) => Err(Fault::Malformed),
        }
    }

    /// A value, up to the first member of a container.
    fn value(&mut self) -> Result<(), Fault> {
        let Shape { kind, slot, .. } = self.shape;
        let first = self.peek();
        let start = match first {
            b'f' => b't',
            b'-' | b'0'..=b'9' => b'0',
            b'{' | b'[' | b'"' | b't' | b'n' => first,
            _ => return Err(Fault::Malformed),
        };
        if start == b'n' {
            self.word(b"null")?;
            // Absent: the member goes. An item of a list, or the document, cannot.
            if self.frame.end == b'}' {
                self.write = self.frame.mark as usize;
            } else if kind != Kind::Any {
                return Err(Fault::Type);
            }
            return Ok(());
        }
        if kind != Kind::Any && start != kind.start() {
            return Err(Fault::Type);
        }
        let written = self.write;
        match start {
            b'{' => return self.enter(b'}'),
            b'[' => return self.enter(b']'),
            b'"' => self.string(kind != Kind::Any)?,
            b'0' => self.number()?,
            _ if first == b't' => self.word(b"true")?,
            _ => self.word(b"false")?,
        }
        self.put(0);
        self.note(slot, written);
        Ok(())
    }

    /// What was written since `start` is the value of a slot.
    fn note(&mut self, slot: u8, start: usize) {
        if let Some(span) = self.spans.0.get_mut(usize::from(slot)) {
            *span = (start as u32, self.write as u32);
        }
    }

    /// Opens a container.
    fn enter(&mut self, end: u8) -> Result<(), Fault> {
        self.read += 1;
        self.outer.push(self.frame).map_err(|_| Fault::TooDeep)?;
        let start = self.write as u32;
        self.frame = Frame {
            shape: self.shape,
            known: None,
            start,
            mark: start,
            count: 0,
            first: self.first,
            end,
        };
        Ok(())
    }

    /// Up to the value of the container's next member or item; false when that was its end.
    fn more(&mut self) -> Result<bool, Fault> {
        let next = self.peek();
        let frame = &mut self.frame;
        let shape = frame.shape;
        if shape.kind == Kind::Record && frame.known.take().is_none() {
            self.write = frame.mark as usize;
        }
        if next == frame.end {
            self.leave();
            return Ok(false);
        }
        if frame.count > 0 {
            if next != b',' {
                return Err(Fault::Malformed);
            }
            self.read += 1;
        }
        frame.count += 1;
        frame.mark = self.write as u32;
        self.shape = shape;
        if frame.count > shape.max {
            return Err(Fault::TooMany);
        }
        if frame.end == b'}' {
            self.name()?;
        }
        match shape.kind {
            Kind::Record => {}
            Kind::Objects => self.know(self.frame.first),
            Kind::Any => self.shape = Shape::ANY,
            _ => self.shape = Shape::ENTRY,
        }
        Ok(true)
    }

    /// The value that comes is a field's.
    fn know(&mut self, at: u8) {
        if let Some(Field(_, shape)) = self.fields.get(usize::from(at)) {
            self.shape = *shape;
            self.first = at + 1;
        }
    }

    /// The field of that name in the record being read.
    fn member(&self, name: &[u8]) -> Option<u8> {
        let mut at = self.frame.first;
        let end = at + self.shape.inside;
        while at < end {
            let field = self.fields.get(usize::from(at))?;
            if field.name() == name {
                return Some(at);
            }
            at += 1 + field.1.inside;
        }
        None
    }

    /// The name of a member; of a record's, what its value must be.
    fn name(&mut self) -> Result<(), Fault> {
        let start = self.write;
        let shape = self.shape;
        if self.peek() != b'"' {
            return Err(Fault::Malformed);
        }
        self.string(shape.kind == Kind::StringMap)?;
        if self.peek() != b':' {
            return Err(Fault::Malformed);
        }
        self.read += 1;
        let name = self.bytes.get(start..self.write).unwrap_or(&[]);
        if shape.kind == Kind::Record {
            let known = self.member(name);
            self.write = start;
            self.shape = Shape::ANY;
            if let Some(at) = known {
                self.know(at);
                self.frame.known = known;
                if self.shape.slot.is_ascii_uppercase() {
                    self.put(self.shape.slot);
                }
            }
        } else if shape.kind == Kind::StringMap {
            if name.is_empty() || find(name, b'=').is_some() {
                return Err(Fault::Name);
            }
            self.put(b'=');
        }
        Ok(())
    }

    /// Closes the innermost container.
    fn leave(&mut self) {
        self.read += 1;
        let Frame { shape, start, .. } = self.frame;
        if let Some(outer) = self.outer.last() {
            self.frame = *outer;
        }
        self.outer.pop();
        if self.frame.shape.kind == Kind::Objects {
            self.put(0);
        }
        self.note(shape.slot, start as usize);
    }

    /// A string, decoded. `keep`: it will be used, so it must not have a NUL.
    fn string(&mut self, keep: bool) -> Result<(), Fault> {
        self.read += 1;
        loop {
            let byte = match self.take() {
                b'"' => return Ok(()),
                b'\\' => {
                    let letter = self.take();
                    if letter == b'u' {
                        self.code_unit(keep)?;
                        continue;
                    }
                    let at = find(LETTERS, letter).ok_or(Fault::Malformed)?;
                    ESCAPED.get(at).copied().unwrap_or(letter)
                }
                0..0x20 => return Err(Fault::Malformed),
                byte => byte,
            };
            self.put(byte);
        }
    }

    /// A `\u` escape, with the second half of a surrogate pair if it is there.
    fn code_unit(&mut self, keep: bool) -> Result<(), Fault> {
        let mut code = self.hex4()?;
        if code >> 10 == 0xd800 >> 10 {
            let behind = self.read;
            let low = match (self.take(), self.take()) {
                (b'\\', b'u') => self.hex4()?,
                _ => 0,
            };
            if low >> 10 == 0xdc00 >> 10 {
                code = 0x10000 + ((code & 0x3ff) << 10) + (low & 0x3ff);
            } else {
                self.read = behind;
            }
        }
        if code >> 11 == 0xd800 >> 11 {
            code = 0xfffd;
        }
        if code == 0 && keep {
            return Err(Fault::Nul);
        }
        // RFC 3629 section 3: how many bytes follow the first, and what they start with.
        let more = match code {
            0..0x80 => {
                self.put(code as u8);
                return Ok(());
            }
            0x80..0x800 => 1,
            0x800..0x10000 => 2,
            _ => 3,
        };
        self.put((0x1f80u32 >> more) as u8 | (code >> (6 * more)) as u8);
        for at in (0..more).rev() {
            self.put(0x80 | (code >> (6 * at)) as u8 & 0x3f);
        }
        Ok(())
    }

    /// The four hexadecimal digits that come next.
    fn hex4(&mut self) -> Result<u32, Fault> {
        let mut code = 0;
        for _ in 0..4 {
            let digit = hexadecimal(self.take()).ok_or(Fault::Malformed)?;
            code = code << 4 | u32::from(digit);
        }
        Ok(code)
    }

    fn word(&mut self, word: &[u8]) -> Result<(), Fault> {
        for &wanted in word {
            if self.take() != wanted {
                return Err(Fault::Malformed);
            }
            self.put(wanted);
        }
        Ok(())
    }

    /// A number by the grammar of RFC 8259 section 6; one that is wanted is an integer.
    fn number(&mut self) -> Result<(), Fault> {
        let start = self.read;
        self.accept(b'-');
        if !self.accept(b'0') {
            self.digits()?;
        }
        let whole = self.read;
        if self.accept(b'.') {
            self.digits()?;
        }
        if self.accept(b'e') || self.accept(b'E') {
            let _signed = self.accept(b'+') || self.accept(b'-');
            self.digits()?;
        }
        if self.shape.kind == Kind::Number {
            if whole != self.read {
                return Err(Fault::Type);
            }
            // A sign is no digit.
            let value = decimal(self.bytes.get(start..whole).unwrap_or(&[]));
            if value.is_none_or(|value| value > self.shape.max) {
                return Err(Fault::OutOfRange);
            }
        }
        for at in start..self.read {
            let byte = self.bytes.get(at).copied().unwrap_or(b'0');
            self.put(byte);
        }
        Ok(())
    }

    /// One digit at least.
    fn digits(&mut self) -> Result<(), Fault> {
        if !self.take().is_ascii_digit() {
            return Err(Fault::Malformed);
        }
        while self.here().is_ascii_digit() {
            self.read += 1;
        }
        Ok(())
    }

    fn accept(&mut self, byte: u8) -> bool {
        let there = self.here() == byte;
        self.read += usize::from(there);
        there
    }

    /// The next byte that is not white space, which stays to be read; 0 at the end.
    fn peek(&mut self) -> u8 {
        while let b' ' | b'\t' | b'\n' | b'\r' = self.here() {
            self.read += 1;
        }
        self.here()
    }

    /// The next byte; 0, which stands nowhere in JSON, at the end.
    fn take(&mut self) -> u8 {
        let byte = self.here();
        self.read += usize::from(byte != 0);
        byte
    }

    fn here(&self) -> u8 {
        self.bytes.get(self.read).copied().unwrap_or(0)
    }

    fn put(&mut self, byte: u8) {
        debug_assert!(self.write < self.read);
        if let Some(slot) = self.bytes.get_mut(self.write) {
            *slot = byte;
            self.write += 1;
        }
    }

    /// The path of the value being read, as far as its members are known ones, and what is wrong.
    fn refusal(&self, fault: Fault) -> Message {
        let mut line = Message::new();
        for depth in 0..=self.outer.len() {
            let frame = self.outer.get(depth).unwrap_or(&self.frame);
            let field = frame.known.and_then(|at| self.fields.get(usize::from(at)));
            if let Some(field) = field {
                if !line.as_bytes().is_empty() {
                    let _ = line.write_str(".");
                }
                let _ = write!(line, "{}", field.name().lossy());
            } else if matches!(frame.shape.kind, Kind::Strings | Kind::Objects) {
                let entry = frame.count.saturating_sub(1);
                let _ = write!(line, "[{entry}]");
            }
        }
        if !line.as_bytes().is_empty() {
            let _ = line.write_str(": ");
        }
        let number = match fault {
            Fault::Malformed | Fault::NotUtf8 => self.read,
            Fault::TooDeep => DEPTH,
            _ => self.shape.max as usize,
        };
        let mut sentences = split(SENTENCES.as_bytes(), b'\n');
        let sentence = sentences.nth(fault as usize).unwrap_or(&[]);
        let mut halves = split(sentence, b'%');
        let _ = write!(line, "{}", halves.next().unwrap_or(&[]).lossy());
        if let Some(rest) = halves.next() {
            let _ = write!(line, "{number}{}", rest.lossy());
        }
        if let Fault::Type = fault {
            let _ = write!(line, "{}", self.shape.kind.name().lossy());
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    static FIELDS: Fields = &[
        field("Text", Shape::text(0)),
        field("Flag", Shape::flag(1)),
        field("Number", Shape::number(2, 65_535)),
        field("Strings", Shape::texts(3, 3)),
        field("StringMap", Shape::pairs(4, 2)),
        field("List", Shape::records(5, 2, 3)),
        field("[]", Shape::record(2)),
        field("Name", Shape::text(b'N')),
        field("Size", Shape::number(b'S', 128)),
        field("Record", Shape::record(1)),
        field("Deep", Shape::texts(6, 2)),
    ];

    fn with<R>(document: &[u8], look: impl FnOnce(Document) -> R) -> Result<R, String> {
        let mut bytes = document.to_vec();
        let mut spans = Spans::default();
        match read(&mut bytes, FIELDS, &mut spans) {
            Ok(()) => Ok(look(Document::new(&bytes, &spans))),
            Err(why) => Err(String::from_utf8(why.as_bytes().to_vec()).unwrap()),
        }
    }

    fn string(text: Text) -> String {
        String::from_utf8(text.bytes().to_vec()).unwrap()
    }

    fn strings(texts: Strings) -> Vec<String> {
        texts.iter().map(string).collect()
    }

    fn refused(document: &str) -> String {
        with(document.as_bytes(), |_| ()).unwrap_err()
    }

    #[test]
    fn known_members_are_found_and_unknown_ones_ignored() {
        let document = r#" { "Unknown" : [1, {"a":null}, "x", null], "Text" : "hi", "Flag": true,
            "Other": 1.5e-3, "Number": 0, "Strings": [ "a" , "b c", "" ], "StringMap": {"K": "v", "L":""},
            "List": [ {"Name":"n","Size":128,"More":{}} , {} ], "Record":{"Deep":["d"]}} "#;
        with(document.as_bytes(), |document| {
            assert_eq!(string(document.text(0)), "hi");
            assert_eq!(document.text(0).bytes_with_nul(), b"hi\0");
            assert!(document.flag(1));
            assert_eq!(document.number(2), 0);
            assert_eq!(strings(document.texts(3)), ["a", "b c", ""]);
            assert_eq!(strings(document.texts(4)), ["K=v", "L="]);
            assert_eq!(strings(document.texts(6)), ["d"]);
        })
        .unwrap();
    }

    #[test]
    fn what_is_inside_of_a_member_is_nothing_outside_of_it() {
        let document =
            r#"{"[]":5,"Name":6,"Size":"x","Deep":{},"Record":{"Name":7,"Text":8},"Text":"t"}"#;
        let text = with(document.as_bytes(), |document| string(document.text(0)));
        assert_eq!(text.unwrap(), "t");
    }

    #[test]
    fn absent_members_and_null_ones_are_empty() {
        for document in [
            "{}",
            r#"{"Text":null,"Flag":null,"Number":null,"Strings":null,"StringMap":null,"List":null,"Record":null}"#,
        ] {
            with(document.as_bytes(), |document| {
                assert!(
                    document.text(0).is_empty() && !document.flag(1) && document.number(2) == 0
                );
                assert!(
                    document.texts(3).is_empty()
                        && document.texts(4).is_empty()
                        && document.records(5).is_empty()
                );
            })
            .unwrap();
        }
        let pairs = with(br#"{"StringMap":{"A":null,"B":"b"}}"#, |document| {
            strings(document.texts(4))
        });
        assert_eq!(pairs.unwrap(), ["B=b"]);
    }

    #[test]
    fn of_a_member_given_twice_the_last_one_counts() {
        let document = br#"{"Text":"a","Strings":["x","y"],"Text":"b","Strings":["z"],"List":[{"Size":1,"Size":2}]}"#;
        with(document, |document| {
            assert_eq!(string(document.text(0)), "b");
            assert_eq!(strings(document.texts(3)), ["z"]);
            assert_eq!(document.records(5).iter().next().unwrap().number(b'S'), 2);
        })
        .unwrap();
    }

    #[test]
    fn listed_objects_are_read_field_by_field() {
        let document = r#"{"List":[{"Size":7,"X":[{"Name":"no"}],"Name":"a\"b","Y":null},{"Name":null,"Size":1}]}"#;
        let read = |record: Record| (string(record.text(b'N')), record.number(b'S'));
        let records = with(document.as_bytes(), |document| {
            document.records(5).iter().map(read).collect::<Vec<_>>()
        });
        assert_eq!(
            records.unwrap(),
            [("a\"b".to_owned(), 7), (String::new(), 1)]
        );
        let count = |list: &str| {
            with(format!(r#"{{"List":{list}}}"#).as_bytes(), |document| {
                document.records(5).iter().count()
            })
        };
        assert_eq!(
            (count("[]"), count("[{}]"), count("[{},{}]")),
            (Ok(0), Ok(1), Ok(2))
        );
    }

    #[test]
    fn escapes_are_decoded_with_surrogate_pairs() {
        let document =
            r#"{"Text":"\u00e9\ud83d\udc26 \ud800 \ud800\u0041 \/\n\t\"\\\u0022\u005c\u0001"}"#;
        let text = with(document.as_bytes(), |document| string(document.text(0))).unwrap();
        assert_eq!(text, "é🐦 \u{fffd} \u{fffd}A /\n\t\"\\\"\\\u{1}");
    }

    fn escaped(bytes: &[u8], step: usize) -> String {
        let mut text = Vec::new();
        let mut at = 0;
        for end in (0..bytes.len()).step_by(step).skip(1).chain([bytes.len()]) {
            at += escape(&bytes[at..end], end == bytes.len(), &mut |piece| {
                text.extend(piece);
                true
            });
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
            let document = format!(r#"{{"Text":"{whole}"}}"#);
            let back = with(document.as_bytes(), |document| string(document.text(0))).unwrap();
            assert_eq!(back, String::from_utf8_lossy(bytes));
            for step in 1..6 {
                assert_eq!(escaped(bytes, step), whole);
            }
        }
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
            (r#"{"Strings":"a"}"#, "a list of strings", "Strings"),
            (r#"{"Strings":["a",2]}"#, "a string", "Strings[1]"),
            (r#"{"Strings":[null]}"#, "a string", "Strings[0]"),
            (r#"{"StringMap":[]}"#, "an object of strings", "StringMap"),
            (r#"{"StringMap":{"a":1}}"#, "a string", "StringMap"),
            (r#"{"List":{}}"#, "a list", "List"),
            (r#"{"List":[{},3]}"#, "an object", "List[1]"),
            (
                r#"{"List":[{"Name":"x"},{"Size":"y"}]}"#,
                "a whole number",
                "List[1].Size",
            ),
            (
                r#"{"Record":{"Deep":["a",{}]}}"#,
                "a string",
                "Record.Deep[1]",
            ),
        ] {
            let path = if path.is_empty() {
                String::new()
            } else {
                format!("{path}: ")
            };
            assert_eq!(
                refused(document),
                format!("{path}must be {wanted}"),
                "{document}"
            );
        }
    }

    #[test]
    fn limits_are_errors_that_name_the_limit() {
        for (document, why) in [
            (
                r#"{"Strings":["","","",""]}"#,
                "Strings[3]: more than 3 entries",
            ),
            (
                r#"{"StringMap":{"a":"","b":"","c":""}}"#,
                "StringMap: more than 2 entries",
            ),
            (r#"{"List":[{},{},{}]}"#, "List[2]: more than 2 entries"),
            (r#"{"Number":65536}"#, "Number: must be from 0 to 65535"),
            (r#"{"Number":-1}"#, "Number: must be from 0 to 65535"),
            (
                r#"{"Number":99999999999999999999}"#,
                "Number: must be from 0 to 65535",
            ),
        ] {
            assert_eq!(refused(document), why);
        }
    }

    #[test]
    fn nesting_is_bounded_without_recursion() {
        const TOO_DEEP: &str = "nested deeper than 64 levels";
        let nested =
            |depth: usize| format!(r#"{{"x":{}{}}}"#, "[".repeat(depth), "]".repeat(depth));
        assert!(with(nested(DEPTH - 1).as_bytes(), |_| ()).is_ok());
        assert_eq!(refused(&nested(DEPTH)), TOO_DEEP);
        assert_eq!(refused(&"[".repeat(1 << 20)), "must be an object");
        assert_eq!(
            refused(&format!(r#"{{"x":{}"#, "[".repeat(1 << 20))),
            TOO_DEEP
        );
    }

    #[test]
    fn what_is_not_json_is_refused_wherever_it_stands() {
        for document in [
            "",
            " ",
            "{",
            "{}x",
            "{}{}",
            "{,}",
            r#"{"a"}"#,
            r#"{"a":}"#,
            r#"{"a":1,}"#,
            r#"{a:1}"#,
            r#"{"a":[1,]}"#,
            r#"{"a":[1 2]}"#,
            r#"{"a":[1}}"#,
            r#"{"a":{]}"#,
            r#"{"a":01}"#,
            r#"{"a":1.}"#,
            r#"{"a":.5}"#,
            r#"{"a":1e}"#,
            r#"{"a":-}"#,
            r#"{"a":+1}"#,
            r#"{"a":nul}"#,
            r#"{"a":truE}"#,
            r#"{"a":NaN}"#,
            r#"{"a":"x}"#,
            r#"{"a":"\x"}"#,
            r#"{"a":"\u12g4"}"#,
            r#"{"a":"\u12"#,
            "{\"a\":\"\n\"}",
            r#"{'a':1}"#,
            "{\"a\":1}\0",
            "{\"a\":\u{a0}1}",
        ] {
            assert!(
                refused(document).contains("not JSON at byte "),
                "{document:?}"
            );
        }
        assert_eq!(
            with(b"{\"a\":\"\xff\"}", |_| ()).unwrap_err(),
            "not UTF-8 at byte 6"
        );
    }

    #[test]
    fn a_nul_is_refused_where_it_would_be_used_and_ignored_where_not() {
        assert_eq!(
            refused(r#"{"Text":"a\u0000b"}"#),
            "Text: has a NUL character"
        );
        assert_eq!(
            refused(r#"{"Strings":["a","\u0000"]}"#),
            "Strings[1]: has a NUL character"
        );
        assert!(with(br#"{"Other":"\u0000","\u0000":1}"#, |_| ()).is_ok());
    }

    #[test]
    fn names_in_an_object_of_strings_can_be_set_in_an_environment() {
        const NAME: &str = "StringMap: a name is empty or has '=' in it";
        assert_eq!(refused(r#"{"StringMap":{"":"x"}}"#), NAME);
        assert_eq!(refused(r#"{"StringMap":{"a=b":"x"}}"#), NAME);
    }

    #[test]
    fn every_prefix_of_a_document_is_refused_and_none_panics() {
        let document =
            r#"{"Text":"\ud83d\udc26","Strings":["a"],"List":[{"Size":1}],"x":[{"y":-1.5e+3}]}"#;
        assert!(with(document.as_bytes(), |_| ()).is_ok());
        for end in 0..document.len() {
            assert!(
                with(&document.as_bytes()[..end], |_| ()).is_err(),
                "{}",
                &document[..end]
            );
        }
    }
}
