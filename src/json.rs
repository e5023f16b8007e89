//! JSON (RFC 8259), read where it lies: no copies, no recursion, no heap.
//!
//! A document is checked against a [`Shape`] and decoded in place, which never makes it longer. The
//! values that the shape names are found again through their [`Spans`]:
//!
//! * every string is UTF-8 with a NUL behind it, as the kernel wants it; a NUL inside is refused,
//!   as no C string can hold it;
//! * a list of strings is those strings one after the other, an object of strings is `KEY=value`
//!   strings ([`Texts`]);
//! * a list of objects is one string a member, a letter for its field and its value, and an empty
//!   string behind each object ([`Records`]).
//!
//! Members that are `null` are absent. Unknown members are checked and dropped. Of a member given
//! twice the last one counts, as in Go's encoding/json. A surrogate without its other half becomes
//! U+FFFD.
//!
//! Not serde-json-core: it knows no surrogate pairs, recurses on values it ignores and lets
//! malformed ones through, so that this pass has to be made in any case. What would be left for it
//! is to find members again, at 9 KiB of code.

use crate::address;
use crate::text::{Line, Show};
use core::ffi::CStr;
use core::net::IpAddr;

/// Deepest nesting accepted, unknown members included.
pub const DEPTH: usize = 64;

/// What a value must be, and the slot of the [`Spans`] that tells where it is.
#[derive(Debug)]
pub enum Shape {
    /// A string.
    Text(u8),
    /// `true` or `false`.
    Flag(u8),
    /// An integer from 0 to the number given.
    Number(u8, u32),
    /// A list of at most so many strings.
    Texts(u8, usize),
    /// An object of at most so many members, names and values strings.
    Pairs(u8, usize),
    /// A list of at most so many objects with these members, strings and numbers. Their slots count
    /// within the object.
    Records(u8, usize, Fields),
    /// An object with these members.
    Record(Fields),
}

/// The members of an object by name, all optional.
pub type Fields = &'static [(&'static str, Shape)];

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
}

/// A fault, and where in the document it is.
#[derive(Debug)]
pub struct Error {
    /// What is wrong.
    pub fault: Fault,
    /// The value's path (`IPConfigs[0].Mask`); empty for the document itself.
    pub path: Line,
    /// Offset of the byte at which it was noticed.
    pub at: usize,
}

impl Show for Error {
    fn show(&self, line: &mut Line) {
        if !self.path.as_bytes().is_empty() {
            line.add(&self.path).add(": ");
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
        };
    }
}

/// Where the values of a decoded document lie: start and end, by slot.
#[derive(Clone, Copy, Debug)]
pub struct Spans([(u32, u32); SLOTS]);

/// Most slots of a shape.
const SLOTS: usize = 20;

/// A decoded document.
#[derive(Clone, Copy, Debug)]
pub struct Document<'a> {
    bytes: &'a [u8],
    spans: Spans,
}

impl<'a> Document<'a> {
    /// A document that [`read`] decoded, with the spans it gave.
    pub fn new(bytes: &'a [u8], spans: Spans) -> Self {
        Self { bytes, spans }
    }

    fn span(&self, slot: u8) -> &'a [u8] {
        let (start, end) = self
            .spans
            .0
            .get(usize::from(slot))
            .copied()
            .unwrap_or_default();
        self.bytes.get(start as usize..end as usize).unwrap_or(&[])
    }

    /// A string; empty when it is absent.
    pub fn text(&self, slot: u8) -> Text<'a> {
        Text::first_of(self.span(slot))
    }

    /// A list of strings, or an object of strings.
    pub fn texts(&self, slot: u8) -> Texts<'a> {
        Texts(self.span(slot))
    }

    /// A list of objects.
    pub fn records(&self, slot: u8) -> Records<'a> {
        Records(self.span(slot))
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

/// A string of a decoded document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Text<'a>(&'a CStr);

impl<'a> Text<'a> {
    fn first_of(bytes: &'a [u8]) -> Self {
        Self(CStr::from_bytes_until_nul(bytes).unwrap_or_default())
    }

    /// The characters as UTF-8.
    pub fn bytes(self) -> &'a [u8] {
        self.0.to_bytes()
    }

    /// The same with the NUL behind them.
    pub fn c_str(self) -> &'a CStr {
        self.0
    }

    /// Whether it is `""`.
    pub fn is_empty(self) -> bool {
        self.0.is_empty()
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

/// A decimal number up to 2^32 - 1, of digits alone; no digits are no number.
pub fn decimal(digits: &[u8]) -> Option<u32> {
    let (_first, _) = digits.split_first()?;
    digits.iter().try_fold(0u32, |sum, digit| {
        let digit = digit.wrapping_sub(b'0');
        (digit < 10).then_some(())?;
        sum.checked_mul(10)?.checked_add(u32::from(digit))
    })
}

impl Show for Text<'_> {
    fn show(&self, line: &mut Line) {
        line.push(self.bytes());
    }
}

/// A list of strings of a decoded document.
#[derive(Clone, Copy, Debug, Default)]
pub struct Texts<'a>(&'a [u8]);

impl<'a> Texts<'a> {
    /// The items in their order.
    pub fn iter(self) -> impl Iterator<Item = Text<'a>> + Clone {
        self.0
            .split_inclusive(|byte| *byte == 0)
            .map(Text::first_of)
    }

    /// Whether there is no item.
    pub fn is_empty(self) -> bool {
        self.0.is_empty()
    }
}

/// A list of objects of a decoded document.
#[derive(Clone, Copy, Debug, Default)]
pub struct Records<'a>(&'a [u8]);

impl<'a> Records<'a> {
    /// The objects in their order.
    pub fn iter(self) -> impl Iterator<Item = Record<'a>> {
        let mut rest = self.0;
        core::iter::from_fn(move || {
            let members = rest
                .split_inclusive(|byte| *byte == 0)
                .take_while(|member| *member != b"\0");
            let length = members.map(<[u8]>::len).sum::<usize>();
            let (record, others) = rest.split_at_checked(length)?;
            rest = others.strip_prefix(b"\0")?;
            Some(Record(record))
        })
    }

    /// Whether there is no object.
    pub fn is_empty(self) -> bool {
        self.0.is_empty()
    }
}

/// An object in such a list.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a>(&'a [u8]);

impl<'a> Record<'a> {
    /// A string; empty when it is absent.
    pub fn text(self, slot: u8) -> Text<'a> {
        let letter = FIRST_FIELD.wrapping_add(slot);
        let mut members = self.0.split_inclusive(|byte| *byte == 0).rev();
        let value = members.find_map(|member| member.strip_prefix(&[letter]));
        Text::first_of(value.unwrap_or(b"\0"))
    }

    /// A number; 0 when it is absent.
    pub fn number(self, slot: u8) -> u32 {
        self.text(slot).number()
    }
}

/// The letter of an object's slot 0.
const FIRST_FIELD: u8 = b'A';

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
            let digit = if low < 10 {
                b'0' + low
            } else {
                b'a' - 10 + low
            };
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
            (valid, _) => (
                window
                    .get(..valid)
                    .and_then(|text| core::str::from_utf8(text).ok()),
                0,
            ),
        },
    };
    let mut escaped = [0; 6];
    let character = valid.and_then(|text| text.chars().next());
    let length = character
        .unwrap_or(char::REPLACEMENT_CHARACTER)
        .encode_utf8(&mut escaped)
        .len();
    Some((
        escaped,
        length,
        if character.is_some() { length } else { skip },
    ))
}

/// Checks `document` against the members of the object it must be, and decodes it where it lies.
pub fn read(document: &mut [u8], fields: Fields) -> Result<Spans, Error> {
    if let Err(error) = core::str::from_utf8(document) {
        return Err(Error {
            fault: Fault::NotUtf8,
            path: Line::new(),
            at: error.valid_up_to(),
        });
    }
    let mut pass = Pass {
        bytes: document,
        read: 0,
        write: 0,
        open: heapless::Vec::new(),
        spans: Spans([(0, 0); SLOTS]),
    };
    match pass.document(fields) {
        Ok(()) => Ok(pass.spans),
        Err(fault) => Err(Error {
            fault,
            path: pass.path(),
            at: pass.read,
        }),
    }
}

/// A container being read.
struct Frame {
    kind: Kind,
    /// Values read so far.
    count: usize,
    /// The member being read, where it is a known one.
    name: &'static str,
    /// Where the output stood before the container.
    start: usize,
    /// Where it stood before the member being read.
    mark: usize,
    /// Whose value the container is.
    slot: Option<u8>,
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

impl Kind {
    fn is_object(self) -> bool {
        matches!(
            self,
            Kind::Record(_) | Kind::Listed(_) | Kind::Pairs(_) | Kind::UnknownObject
        )
    }

    /// Most values it may have.
    fn limit(self) -> usize {
        match self {
            Kind::Records(max, _) | Kind::Texts(max) | Kind::Pairs(max) => max,
            _ => usize::MAX,
        }
    }
}

/// What comes next.
enum Next {
    /// A value.
    Value(Want),
    /// A value has ended: a comma or the container's end.
    After,
}

/// What the next value must be.
#[derive(Clone, Copy)]
enum Want {
    Shape(&'static Shape),
    /// The document itself, or a listed object.
    Object(Kind),
    /// A string behind which the output goes on.
    Item,
    /// A number of a listed object.
    Number(u32),
    Unknown,
}

struct Pass<'d> {
    bytes: &'d mut [u8],
    read: usize,
    /// Never past `read`: every piece is written no longer than it was read.
    write: usize,
    open: heapless::Vec<Frame, DEPTH>,
    spans: Spans,
}

impl Pass<'_> {
    fn document(&mut self, fields: Fields) -> Result<(), Fault> {
        let mut next = Next::Value(Want::Object(Kind::Record(fields)));
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
        let start = self.write;
        match (first, want) {
            (b'{', Want::Object(kind)) => return self.enter(kind, None),
            (b'{', Want::Shape(Shape::Record(fields))) => {
                return self.enter(Kind::Record(fields), None);
            }
            (b'{', Want::Shape(Shape::Pairs(slot, max))) => {
                return self.enter(Kind::Pairs(*max), Some(*slot));
            }
            (b'{', Want::Unknown) => return self.enter(Kind::UnknownObject, None),
            (b'[', Want::Shape(Shape::Records(slot, max, fields))) => {
                return self.enter(Kind::Records(*max, fields), Some(*slot));
            }
            (b'[', Want::Shape(Shape::Texts(slot, max))) => {
                return self.enter(Kind::Texts(*max), Some(*slot));
            }
            (b'[', Want::Unknown) => return self.enter(Kind::UnknownList, None),
            (b'"', Want::Item | Want::Shape(Shape::Text(_))) => self.string(true)?,
            (b'"', Want::Unknown) => self.string(false)?,
            (b'n', _) => {
                self.word(b"null")?;
                // Absent: the member goes. An item of a list, or the document, cannot.
                return match self.open.last() {
                    Some(frame) if frame.kind.is_object() => {
                        self.write = frame.mark;
                        Ok(Next::After)
                    }
                    _ if matches!(want, Want::Unknown) => Ok(Next::After),
                    _ => Err(mismatch(want)),
                };
            }
            (b't', Want::Shape(Shape::Flag(_)) | Want::Unknown) => self.word(b"true")?,
            (b'f', Want::Shape(Shape::Flag(_)) | Want::Unknown) => self.word(b"false")?,
            (b'-' | b'0'..=b'9', Want::Number(max) | Want::Shape(&Shape::Number(_, max))) => {
                self.number(Some(max))?;
            }
            (b'-' | b'0'..=b'9', Want::Unknown) => self.number(None)?,
            (b'{' | b'[' | b'"' | b't' | b'f' | b'-' | b'0'..=b'9', _) => {
                return Err(mismatch(want));
            }
            _ => return Err(Fault::Malformed),
        }
        self.put(0);
        if let Want::Shape(Shape::Text(slot) | Shape::Flag(slot) | Shape::Number(slot, _)) = want {
            self.note(*slot, start);
        }
        Ok(Next::After)
    }

    /// What was written since `start` is the value of a slot.
    fn note(&mut self, slot: u8, start: usize) {
        if let Some(span) = self.spans.0.get_mut(usize::from(slot)) {
            *span = (start as u32, self.write as u32);
        }
    }

    /// Opens a container; reads its first member or its end.
    fn enter(&mut self, kind: Kind, slot: Option<u8>) -> Result<Next, Fault> {
        self.read += 1;
        let frame = Frame {
            kind,
            count: 0,
            name: "",
            start: self.write,
            mark: self.write,
            slot,
        };
        self.open.push(frame).map_err(|_| Fault::TooDeep)?;
        let end = if kind.is_object() { b'}' } else { b']' };
        if self.peek() == Some(end) {
            return self.leave();
        }
        self.member()
    }

    /// After a value inside a container.
    fn after(&mut self) -> Result<Next, Fault> {
        let Some(frame) = self.open.last_mut() else {
            return Err(Fault::Malformed);
        };
        let kind = frame.kind;
        frame.count += 1;
        if matches!(kind, Kind::Record(_) | Kind::Listed(_)) && frame.name.is_empty() {
            self.write = frame.mark;
        }
        frame.name = "";
        match (self.peek(), kind.is_object()) {
            (Some(b','), _) => {
                self.read += 1;
                self.member()
            }
            (Some(b'}'), true) | (Some(b']'), false) => self.leave(),
            _ => Err(Fault::Malformed),
        }
    }

    /// Up to the value of the container's next member or item.
    fn member(&mut self) -> Result<Next, Fault> {
        let start = self.write;
        let Some(frame) = self.open.last_mut() else {
            return Err(Fault::Malformed);
        };
        let kind = frame.kind;
        if frame.count >= kind.limit() {
            return Err(Fault::TooMany(kind.limit()));
        }
        if kind.is_object() {
            frame.mark = start;
            if self.peek() != Some(b'"') {
                return Err(Fault::Malformed);
            }
            self.string(matches!(kind, Kind::Pairs(_)))?;
            if self.peek() != Some(b':') {
                return Err(Fault::Malformed);
            }
            self.read += 1;
        }
        let want = match kind {
            Kind::Records(_, fields) => Want::Object(Kind::Listed(fields)),
            Kind::Texts(_) => Want::Item,
            Kind::UnknownList | Kind::UnknownObject => Want::Unknown,
            Kind::Pairs(_) => {
                let name = self.bytes.get(start..self.write).unwrap_or(&[]);
                if name.is_empty() || name.contains(&b'=') {
                    return Err(Fault::Name);
                }
                self.put(b'=');
                Want::Item
            }
            Kind::Record(fields) | Kind::Listed(fields) => {
                self.known(fields, start, matches!(kind, Kind::Listed(_)))
            }
        };
        Ok(Next::Value(want))
    }

    /// What the member must be whose name was written at `start`; the name is dropped.
    fn known(&mut self, fields: Fields, start: usize, listed: bool) -> Want {
        let name = self.bytes.get(start..self.write).unwrap_or(&[]);
        let known = fields.iter().find(|(field, _)| field.as_bytes() == name);
        self.write = start;
        let (Some((field, shape)), Some(frame)) = (known, self.open.last_mut()) else {
            return Want::Unknown;
        };
        frame.name = field;
        match shape {
            Shape::Text(slot) if listed => {
                self.put(FIRST_FIELD.wrapping_add(*slot));
                Want::Item
            }
            Shape::Number(slot, max) if listed => {
                self.put(FIRST_FIELD.wrapping_add(*slot));
                Want::Number(*max)
            }
            shape => Want::Shape(shape),
        }
    }

    /// Closes the innermost container.
    fn leave(&mut self) -> Result<Next, Fault> {
        self.read += 1;
        let Some(frame) = self.open.pop() else {
            return Err(Fault::Malformed);
        };
        if let Kind::Listed(_) = frame.kind {
            self.put(0);
        }
        if let Some(slot) = frame.slot {
            self.note(slot, frame.start);
        }
        Ok(Next::After)
    }

    /// A string, decoded. `keep`: it will be used, so it must not have a NUL.
    fn string(&mut self, keep: bool) -> Result<(), Fault> {
        self.read += 1;
        loop {
            match self.take()? {
                b'"' => return Ok(()),
                b'\\' => match self.take()? {
                    b'b' => self.put(0x08),
                    b'f' => self.put(0x0c),
                    b'n' => self.put(b'\n'),
                    b'r' => self.put(b'\r'),
                    b't' => self.put(b'\t'),
                    plain @ (b'/' | b'"' | b'\\') => self.put(plain),
                    b'u' => self.code_unit(keep)?,
                    _ => return Err(Fault::Malformed),
                },
                0..0x20 => return Err(Fault::Malformed),
                byte => self.put(byte),
            }
        }
    }

    /// A `\u` escape, with the second half of a surrogate pair if it is there.
    fn code_unit(&mut self, keep: bool) -> Result<(), Fault> {
        let mut code = self.hex4().ok_or(Fault::Malformed)?;
        self.read += 4;
        if (0xd800..0xdc00).contains(&code)
            && self.bytes.get(self.read..self.read + 2) == Some(b"\\u")
        {
            self.read += 2;
            match self.hex4() {
                Some(low @ 0xdc00..0xe000) => {
                    code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
                    self.read += 4;
                }
                _ => self.read -= 2,
            }
        }
        if code == 0 && keep {
            return Err(Fault::Nul);
        }
        let mut utf8 = [0; 4];
        let character = char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER);
        character
            .encode_utf8(&mut utf8)
            .bytes()
            .for_each(|byte| self.put(byte));
        Ok(())
    }

    /// The four hexadecimal digits that come next.
    fn hex4(&self) -> Option<u32> {
        let digits = self.bytes.get(self.read..self.read + 4)?;
        digits.iter().try_fold(0, |sum, &digit| {
            Some(sum << 4 | char::from(digit).to_digit(16)?)
        })
    }

    fn word(&mut self, word: &[u8]) -> Result<(), Fault> {
        for &wanted in word {
            if self.take()? != wanted {
                return Err(Fault::Malformed);
            }
            self.put(wanted);
        }
        Ok(())
    }

    /// A number by the grammar of RFC 8259 section 6; with `max`, an integer up to it.
    fn number(&mut self, max: Option<u32>) -> Result<(), Fault> {
        let start = self.read;
        let _negative = self.accept(b'-');
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
            // A sign is no digit.
            let value = decimal(self.bytes.get(start..whole).unwrap_or(&[]));
            if value.is_none_or(|value| value > max) {
                return Err(Fault::OutOfRange(max));
            }
        }
        for at in start..self.read {
            let byte = self.bytes.get(at).copied().unwrap_or(b'0');
            self.put(byte);
        }
        Ok(())
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
        while matches!(
            self.bytes.get(self.read),
            Some(b' ' | b'\t' | b'\n' | b'\r')
        ) {
            self.read += 1;
        }
        self.bytes.get(self.read).copied()
    }

    fn take(&mut self) -> Result<u8, Fault> {
        let byte = self.bytes.get(self.read).copied().ok_or(Fault::Malformed)?;
        self.read += 1;
        Ok(byte)
    }

    #[inline(never)]
    fn put(&mut self, byte: u8) {
        debug_assert!(self.write < self.read);
        if let Some(slot) = self.bytes.get_mut(self.write) {
            *slot = byte;
            self.write += 1;
        }
    }

    /// The path of the value being read, as far as its members are known ones.
    fn path(&self) -> Line {
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
        line
    }
}

fn mismatch(want: Want) -> Fault {
    Fault::Wants(match want {
        Want::Item | Want::Unknown | Want::Shape(Shape::Text(_)) => "a string",
        Want::Shape(Shape::Flag(_)) => "true or false",
        Want::Number(_) | Want::Shape(Shape::Number(..)) => "a whole number",
        Want::Shape(Shape::Texts(..)) => "a list of strings",
        Want::Shape(Shape::Pairs(..)) => "an object of strings",
        Want::Shape(Shape::Records(..)) => "a list",
        Want::Object(_) | Want::Shape(Shape::Record(_)) => "an object",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    static FIELDS: Fields = &[
        ("Text", Shape::Text(0)),
        ("Flag", Shape::Flag(1)),
        ("Number", Shape::Number(2, 65_535)),
        ("Texts", Shape::Texts(3, 3)),
        ("Pairs", Shape::Pairs(4, 2)),
        (
            "List",
            Shape::Records(
                5,
                2,
                &[("Name", Shape::Text(0)), ("Size", Shape::Number(1, 128))],
            ),
        ),
        ("Record", Shape::Record(&[("Deep", Shape::Texts(6, 2))])),
    ];

    fn with<R>(document: &[u8], look: impl FnOnce(Document) -> R) -> Result<R, (Fault, String)> {
        let mut bytes = document.to_vec();
        match read(&mut bytes, FIELDS) {
            Ok(spans) => Ok(look(Document::new(&bytes, spans))),
            Err(error) => Err((
                error.fault,
                String::from_utf8(error.path.as_bytes().to_vec()).unwrap(),
            )),
        }
    }

    fn string(text: Text) -> String {
        String::from_utf8(text.bytes().to_vec()).unwrap()
    }

    fn strings(texts: Texts) -> Vec<String> {
        texts.iter().map(string).collect()
    }

    fn refused(document: &str) -> (Fault, String) {
        with(document.as_bytes(), |_| ()).unwrap_err()
    }

    #[test]
    fn known_members_are_found_and_unknown_ones_ignored() {
        let document = r#" { "Unknown" : [1, {"a":null}, "x", null], "Text" : "hi", "Flag": true,
            "Other": 1.5e-3, "Number": 0, "Texts": [ "a" , "b c", "" ], "Pairs": {"K": "v", "L":""},
            "List": [ {"Name":"n","Size":128,"More":{}} , {} ], "Record":{"Deep":["d"]}} "#;
        with(document.as_bytes(), |document| {
            assert_eq!(string(document.text(0)), "hi");
            assert_eq!(document.text(0).c_str(), c"hi");
            assert!(document.flag(1));
            assert_eq!(document.number(2), 0);
            assert_eq!(strings(document.texts(3)), ["a", "b c", ""]);
            assert_eq!(strings(document.texts(4)), ["K=v", "L="]);
            assert_eq!(strings(document.texts(6)), ["d"]);
        })
        .unwrap();
    }

    #[test]
    fn absent_members_and_null_ones_are_empty() {
        for document in [
            "{}",
            r#"{"Text":null,"Flag":null,"Number":null,"Texts":null,"Pairs":null,"List":null,"Record":null}"#,
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
        let pairs = with(br#"{"Pairs":{"A":null,"B":"b"}}"#, |document| {
            strings(document.texts(4))
        });
        assert_eq!(pairs.unwrap(), ["B=b"]);
    }

    #[test]
    fn of_a_member_given_twice_the_last_one_counts() {
        let document = br#"{"Text":"a","Texts":["x","y"],"Text":"b","Texts":["z"],"List":[{"Size":1,"Size":2}]}"#;
        with(document, |document| {
            assert_eq!(string(document.text(0)), "b");
            assert_eq!(strings(document.texts(3)), ["z"]);
            assert_eq!(document.records(5).iter().next().unwrap().number(1), 2);
        })
        .unwrap();
    }

    #[test]
    fn listed_objects_are_read_field_by_field() {
        let document = r#"{"List":[{"Size":7,"X":[{"Name":"no"}],"Name":"a\"b","Y":null},{"Name":null,"Size":1}]}"#;
        let read = |record: Record| (string(record.text(0)), record.number(1));
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
            while let Some((piece, length, used)) = escape_next(&bytes[at..end], end == bytes.len())
            {
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
            (r#"{"Texts":"a"}"#, "a list of strings", "Texts"),
            (r#"{"Texts":["a",2]}"#, "a string", "Texts[1]"),
            (r#"{"Texts":[null]}"#, "a string", "Texts[0]"),
            (r#"{"Pairs":[]}"#, "an object of strings", "Pairs"),
            (r#"{"Pairs":{"a":1}}"#, "a string", "Pairs"),
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
            assert_eq!(
                refused(document),
                (Fault::Wants(wanted), path.to_owned()),
                "{document}"
            );
        }
    }

    #[test]
    fn limits_are_errors_that_name_the_limit() {
        assert_eq!(refused(r#"{"Texts":["","","",""]}"#).0, Fault::TooMany(3));
        assert_eq!(
            refused(r#"{"Pairs":{"a":"","b":"","c":""}}"#).0,
            Fault::TooMany(2)
        );
        assert_eq!(refused(r#"{"List":[{},{},{}]}"#).0, Fault::TooMany(2));
        assert_eq!(refused(r#"{"Number":65536}"#).0, Fault::OutOfRange(65_535));
        assert_eq!(refused(r#"{"Number":-1}"#).0, Fault::OutOfRange(65_535));
        assert_eq!(
            refused(r#"{"Number":99999999999999999999}"#).0,
            Fault::OutOfRange(65_535)
        );
    }

    #[test]
    fn nesting_is_bounded_without_recursion() {
        let nested =
            |depth: usize| format!(r#"{{"x":{}{}}}"#, "[".repeat(depth), "]".repeat(depth));
        assert!(with(nested(DEPTH - 1).as_bytes(), |_| ()).is_ok());
        assert_eq!(refused(&nested(DEPTH)).0, Fault::TooDeep);
        assert_eq!(refused(&"[".repeat(1 << 20)).0, Fault::Wants("an object"));
        assert_eq!(
            refused(&format!(r#"{{"x":{}"#, "[".repeat(1 << 20))).0,
            Fault::TooDeep
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
            assert_eq!(refused(document).0, Fault::Malformed, "{document:?}");
        }
        assert_eq!(
            with(b"{\"a\":\"\xff\"}", |_| ()).unwrap_err().0,
            Fault::NotUtf8
        );
    }

    #[test]
    fn a_nul_is_refused_where_it_would_be_used_and_ignored_where_not() {
        assert_eq!(
            refused(r#"{"Text":"a\u0000b"}"#),
            (Fault::Nul, "Text".to_owned())
        );
        assert_eq!(
            refused(r#"{"Texts":["a","\u0000"]}"#),
            (Fault::Nul, "Texts[1]".to_owned())
        );
        assert!(with(br#"{"Other":"\u0000","\u0000":1}"#, |_| ()).is_ok());
    }

    #[test]
    fn names_in_an_object_of_strings_can_be_set_in_an_environment() {
        assert_eq!(refused(r#"{"Pairs":{"":"x"}}"#).0, Fault::Name);
        assert_eq!(refused(r#"{"Pairs":{"a=b":"x"}}"#).0, Fault::Name);
    }

    #[test]
    fn every_prefix_of_a_document_is_refused_and_none_panics() {
        let document =
            r#"{"Text":"\ud83d\udc26","Texts":["a"],"List":[{"Size":1}],"x":[{"y":-1.5e+3}]}"#;
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
