//! Validates text for serde-json-core, which accepts more than JSON, recurses on values that it ignores, and
//! does not support surrogate pairs: the result is well-formed, of limited depth, and free of surrogates.

use crate::message;
use crate::message::Message;

/// Maximum nesting depth, including unknown members, and so of recursion in serde-json-core.
pub const DEPTH: u32 = u64::BITS;

/// Checks that `document` is JSON (RFC 8259) in UTF-8, nested at most [`DEPTH`] levels, and decodes surrogate
/// pairs among its `\u` escapes in place; half a pair becomes U+FFFD.
///
/// Pads the shortened text with blanks at its end, so that it can be normalized again.
pub fn normalize(document: &mut [u8]) -> Result<(), Message> {
    if let Err(error) = core::str::from_utf8(document) {
        return Err(message!("not UTF-8 at byte {}", error.valid_up_to()));
    }
    let mut pass = Pass {
        text: document,
        read: 0,
        write: 0,
        depth: 0,
        objects: 0,
    };
    match pass.document() {
        Ok(()) => Ok(()),
        Err(Fault::Malformed) => Err(message!("not JSON at byte {}", pass.read)),
        Err(Fault::TooDeep) => Err(message!("nested deeper than {DEPTH} levels")),
    }
}

enum Fault {
    /// At [`Pass::read`].
    Malformed,
    TooDeep,
}

struct Pass<'d> {
    text: &'d mut [u8],
    read: usize,
    /// Never past `read`.
    write: usize,
    /// Number of open containers.
    depth: u32,
    /// One bit per container: whether it is an object. The innermost is the lowest.
    objects: u64,
}

impl Pass<'_> {
    fn document(&mut self) -> Result<(), Fault> {
        loop {
            if self.value()? {
                continue;
            }
            loop {
                self.skip_blanks();
                if self.depth == 0 {
                    return self.end();
                }
                let in_object = self.objects & 1 == 1;
                match self.here() {
                    b',' => {
                        self.keep(1);
                        if in_object {
                            self.name()?;
                        }
                        break;
                    }
                    b'}' if in_object => self.close(),
                    b']' if !in_object => self.close(),
                    _ => return Err(Fault::Malformed),
                }
            }
        }
    }

    /// A value. For a container that is not empty, parses up to its first value and returns true.
    fn value(&mut self) -> Result<bool, Fault> {
        self.skip_blanks();
        match self.here() {
            b'"' => self.string()?,
            b'-' | b'0'..=b'9' => self.number()?,
            b't' => self.word(b"true")?,
            b'f' => self.word(b"false")?,
            b'n' => self.word(b"null")?,
            bracket @ (b'{' | b'[') => {
                let is_object = bracket == b'{';
                self.open(is_object)?;
                self.skip_blanks();
                match (self.here(), is_object) {
                    (b'}', true) | (b']', false) => self.close(),
                    (_, true) => {
                        self.name()?;
                        return Ok(true);
                    }
                    (_, false) => return Ok(true),
                }
            }
            _ => return Err(Fault::Malformed),
        }
        Ok(false)
    }

    fn open(&mut self, is_object: bool) -> Result<(), Fault> {
        if self.depth == DEPTH {
            return Err(Fault::TooDeep);
        }
        self.depth += 1;
        self.objects = self.objects << 1 | u64::from(is_object);
        self.keep(1);
        Ok(())
    }

    fn close(&mut self) {
        self.depth -= 1;
        self.objects >>= 1;
        self.keep(1);
    }

    /// The name of a member, and the colon after it.
    fn name(&mut self) -> Result<(), Fault> {
        self.skip_blanks();
        self.string()?;
        self.skip_blanks();
        self.expect(b':')
    }

    fn string(&mut self) -> Result<(), Fault> {
        self.expect(b'"')?;
        loop {
            let rest = self.text.get(self.read..).unwrap_or_default();
            let is_special = |byte: &u8| matches!(byte, b'"' | b'\\' | 0..0x20);
            let plain = rest.iter().position(is_special);
            self.keep(plain.unwrap_or(rest.len()));
            match self.here() {
                b'\\' => self.escape()?,
                _ => return self.expect(b'"'),
            }
        }
    }

    fn escape(&mut self) -> Result<(), Fault> {
        let mut length = 2;
        match self.text.get(self.read + 1) {
            Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => {}
            Some(b'u') => match self.code_unit(self.read) {
                Ok(0xd800..0xe000) => {
                    self.surrogate();
                    return Ok(());
                }
                Ok(_) => length = ESCAPE,
                Err(at) => {
                    self.read = at;
                    return Err(Fault::Malformed);
                }
            },
            _ => {
                self.read += 1;
                return Err(Fault::Malformed);
            }
        }
        self.keep(length);
        Ok(())
    }

    /// Replaces a surrogate, with its other half if that follows, by a character (RFC 8259 section 7).
    fn surrogate(&mut self) {
        let halves = [self.read, self.read + ESCAPE].map(|at| self.code_unit(at).unwrap_or(0));
        let (character, read) = match char::decode_utf16(halves).next() {
            Some(Ok(character)) => (character, 2 * ESCAPE),
            _ => (char::REPLACEMENT_CHARACTER, ESCAPE),
        };
        for byte in character.encode_utf8(&mut [0; 4]).bytes() {
            self.put(byte);
        }
        self.read += read;
    }

    /// The code unit of the `\uXXXX` at `at`. The error is the position of the fault.
    fn code_unit(&self, at: usize) -> Result<u16, usize> {
        let byte = |at| self.text.get(at).copied().unwrap_or(0);
        if (byte(at), byte(at + 1)) != (b'\\', b'u') {
            return Err(at);
        }
        let mut unit = 0;
        for at in at + 2..at + ESCAPE {
            let digit = char::from(byte(at)).to_digit(16).ok_or(at)?;
            unit = unit << 4 | digit as u16;
        }
        Ok(unit)
    }

    /// RFC 8259 section 6.
    fn number(&mut self) -> Result<(), Fault> {
        self.accept(b'-');
        if !self.accept(b'0') {
            self.digits()?;
        }
        if self.accept(b'.') {
            self.digits()?;
        }
        if self.accept(b'e') || self.accept(b'E') {
            let _signed = self.accept(b'+') || self.accept(b'-');
            self.digits()?;
        }
        Ok(())
    }

    /// At least one digit.
    fn digits(&mut self) -> Result<(), Fault> {
        if !self.here().is_ascii_digit() {
            return Err(Fault::Malformed);
        }
        while self.here().is_ascii_digit() {
            self.keep(1);
        }
        Ok(())
    }

    fn word(&mut self, word: &[u8]) -> Result<(), Fault> {
        word.iter().try_for_each(|byte| self.expect(*byte))
    }

    fn expect(&mut self, byte: u8) -> Result<(), Fault> {
        if self.accept(byte) {
            Ok(())
        } else {
            Err(Fault::Malformed)
        }
    }

    fn accept(&mut self, byte: u8) -> bool {
        let there = self.here() == byte;
        if there {
            self.keep(1);
        }
        there
    }

    fn skip_blanks(&mut self) {
        while let b' ' | b'\t' | b'\n' | b'\r' = self.here() {
            self.keep(1);
        }
    }

    /// The end of the text. Pads it with blanks.
    fn end(&mut self) -> Result<(), Fault> {
        if self.read < self.text.len() {
            return Err(Fault::Malformed);
        }
        let rest = self.text.get_mut(self.write..);
        rest.unwrap_or_default().fill(b' ');
        Ok(())
    }

    /// The current byte; 0, which JSON does not allow, at the end.
    fn here(&self) -> u8 {
        self.text.get(self.read).copied().unwrap_or(0)
    }

    /// Passes over bytes that stay as they are. They are moved if something before them was shortened.
    fn keep(&mut self, length: usize) {
        if self.write == self.read {
            self.write += length;
            self.read += length;
            return;
        }
        for _ in 0..length {
            self.put(self.here());
            self.read += 1;
        }
    }

    fn put(&mut self, byte: u8) {
        if let Some(place) = self.text.get_mut(self.write) {
            *place = byte;
            self.write += 1;
        }
    }
}

/// Length of `\uXXXX`.
const ESCAPE: usize = 6;

#[cfg(test)]
mod tests {
    use super::*;

    fn normalized(document: &[u8]) -> Result<String, String> {
        let mut bytes = document.to_vec();
        match normalize(&mut bytes) {
            Ok(()) => {
                let text = String::from_utf8(bytes.clone()).unwrap();
                normalize(&mut bytes).unwrap();
                assert_eq!(bytes, text.as_bytes(), "the second time changes nothing");
                Ok(text.trim_end_matches(' ').to_owned())
            }
            Err(why) => Err(why.as_str().to_owned()),
        }
    }

    #[test]
    fn valid_json_is_not_changed() {
        for document in [
            "null",
            " [1, -0.5e+10 ,true,false, null,\"\"]\n",
            r#"{"a":{},"b":[],"c":[{"d":[[]]}],"":"\"\\\/\b\f\n\r\t\u0000\u00e9"}"#,
            "\t{ \"é🐦\" : 1E5 }",
            "-0",
            r#""\\""#,
        ] {
            let normalized = normalized(document.as_bytes());
            assert_eq!(normalized.as_deref(), Ok(document));
        }
    }

    #[test]
    fn surrogate_pairs_are_decoded_and_lone_ones_replaced() {
        for (escaped, wanted) in [
            (r"\ud83d\udc26", "🐦"),
            (r"a\uD83D\uDC26b\n", r"a🐦b\n"),
            (r"\ud800", "\u{fffd}"),
            (r"\udc26\ud83d", "\u{fffd}\u{fffd}"),
            (r"\ud83d\ud83d\udc26", "\u{fffd}🐦"),
            (r"\ud83d\u0041", "\u{fffd}\\u0041"),
            (r"\ud83dx", "\u{fffd}x"),
            (r"\udbff\udfff", "\u{10ffff}"),
            (r"\\ud83d\\udc26", r"\\ud83d\\udc26"),
        ] {
            let document = format!(r#"{{"x":"{escaped}"}}"#);
            let wanted = format!(r#"{{"x":"{wanted}"}}"#);
            assert_eq!(normalized(document.as_bytes()), Ok(wanted));
        }
    }

    #[test]
    fn invalid_json_is_refused_with_its_position() {
        for (document, at) in [
            ("", 0),
            (" ", 1),
            ("{", 1),
            ("{}x", 2),
            ("{}{}", 2),
            ("{,}", 1),
            (r#"{"a"}"#, 4),
            (r#"{"a":}"#, 5),
            (r#"{"a":1,}"#, 7),
            (r#"{a:1}"#, 1),
            (r#"{"a":[1,]}"#, 8),
            (r#"{"a":[,1]}"#, 6),
            (r#"{"a":[1 2]}"#, 8),
            (r#"{"a":[1}}"#, 7),
            (r#"{"a":{]}"#, 6),
            (r#"{"a":1]"#, 6),
            (r#"{"a":01}"#, 6),
            (r#"{"a":1.}"#, 7),
            (r#"{"a":.5}"#, 5),
            (r#"{"a":1e}"#, 7),
            (r#"{"a":1e+}"#, 8),
            (r#"{"a":-}"#, 6),
            (r#"{"a":+1}"#, 5),
            (r#"{"a":nul}"#, 8),
            (r#"{"a":truE}"#, 8),
            (r#"{"a":NaN}"#, 5),
            (r#"{"a":"x}"#, 8),
            (r#"{"a":"\x"}"#, 7),
            (r#"{"a":"\"#, 7),
            (r#"{"a":"\u12g4"}"#, 10),
            (r#"{"a":"\u+123"}"#, 8),
            (r#"{"a":"\u12"#, 10),
            (r#"{"a":"\ud83d\u12g4"}"#, 16),
            ("{\"a\":\"\n\"}", 6),
            (r#"{'a':1}"#, 1),
            ("{\"a\":1}\0", 7),
            ("{\"a\":\u{a0}1}", 5),
            ("// mine\n{}", 0),
            ("\u{feff}{}", 0),
        ] {
            let wanted = format!("not JSON at byte {at}");
            assert_eq!(normalized(document.as_bytes()), Err(wanted), "{document:?}");
        }
    }

    #[test]
    fn invalid_utf8_is_refused_with_its_position() {
        for (document, at) in [
            (&b"{\"a\":\"\xff\"}"[..], 6),
            (b"\xc0\x80", 0),
            (b"\"\xed\xa0\x80\"", 1),
            (b"\"\xf0\x9f", 1),
        ] {
            assert_eq!(normalized(document), Err(format!("not UTF-8 at byte {at}")));
        }
    }

    #[test]
    fn nesting_is_bounded_without_recursion() {
        const TOO_DEEP: &str = "nested deeper than 64 levels";
        for (open, inside, close) in [
            ("[", "", "]"),
            (r#"{"x":"#, "1", "}"),
            ("[0,[[]],", "0", "]"),
        ] {
            let nested = |depth| [open.repeat(depth), close.repeat(depth)].join(inside);
            let deepest = 64 - open.matches("[[]]").count() * 2;
            assert!(normalized(nested(deepest).as_bytes()).is_ok());
            assert_eq!(normalized(nested(65).as_bytes()), Err(TOO_DEEP.to_owned()));
        }
        assert_eq!(
            normalized("[".repeat(1 << 20).as_bytes()),
            Err(TOO_DEEP.to_owned())
        );
    }

    #[test]
    fn every_prefix_of_a_document_is_refused() {
        let document =
            r#"{"Text":"\ud83d\udc26","Strings":["a"],"List":[{"Size":1}],"x":[{"y":-1.5e+3}]}"#;
        assert!(normalized(document.as_bytes()).is_ok());
        for end in 0..document.len() {
            assert!(normalized(&document.as_bytes()[..end]).is_err());
        }
    }
}
