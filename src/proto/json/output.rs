//! Writes JSON strings.

use crate::bytes::copy;
use core::fmt::{self, Display, Write};

/// Passes `bytes` to `put`, escaped for a JSON string, until it returns false. Returns how many bytes were
/// passed.
///
/// Each piece is one character or its escape. Invalid UTF-8 becomes U+FFFD, as in a lossy conversion. An
/// incomplete character at the end is left for the next call, unless these are the `last` bytes.
pub fn escape(bytes: &[u8], last: bool, put: &mut dyn FnMut(&str) -> bool) -> usize {
    let mut used = 0;
    for chunk in bytes.utf8_chunks() {
        for character in chunk.valid().chars() {
            if !put_character(character, put) {
                return used;
            }
            used += character.len_utf8();
        }
        let invalid = chunk.invalid();
        let at_end = used + invalid.len() == bytes.len();
        let wait = at_end
            && !last
            && core::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none());
        if invalid.is_empty() || wait || !put_character(char::REPLACEMENT_CHARACTER, put) {
            return used;
        }
        used += invalid.len();
    }
    used
}

/// [`escape`] into `room`. Returns how many bytes were read and written.
pub fn escape_into(bytes: &[u8], room: &mut [u8]) -> (usize, usize) {
    let mut written = 0;
    let taken = escape(bytes, true, &mut |piece| {
        let free = room.get_mut(written..).unwrap_or(&mut []);
        let fits = piece.len() <= free.len();
        if fits {
            written += copy(piece.as_bytes(), free);
        }
        fits
    });
    (taken, written)
}

/// RFC 8259 section 7.
fn put_character(character: char, put: &mut dyn FnMut(&str) -> bool) -> bool {
    match character {
        '"' => put("\\\""),
        '\\' => put("\\\\"),
        '\n' => put("\\n"),
        '\r' => put("\\r"),
        '\t' => put("\\t"),
        '\0'..' ' => {
            // Without formatting: a command's output can be a MiB of them.
            let code = character as u8;
            let high = b'0' + (code >> 4);
            let low = match code & 15 {
                low @ ..10 => b'0' + low,
                low => b'a' - 10 + low,
            };
            let escape = [b'\\', b'u', b'0', b'0', high, low];
            put(core::str::from_utf8(&escape).unwrap_or_default())
        }
        _ => put(character.encode_utf8(&mut [0; 4])),
    }
}

/// Maximum length of [`Quoted`], so that it fits in a [`Message`](crate::message::Message) with other text.
const QUOTED: usize = 896;

/// Displays a text as a quoted JSON string, truncated to 896 bytes.
pub struct Quoted<'a>(pub &'a dyn Display);

impl Display for Quoted<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("\"")?;
        let mut inside = Inside {
            room: QUOTED,
            is_cut: false,
            formatter,
        };
        write!(inside, "{}", self.0)?;
        let end = if inside.is_cut { "…\"" } else { "\"" };
        formatter.write_str(end)
    }
}

/// The text between the quotes.
struct Inside<'f, 'b> {
    /// Number of bytes that can still be written.
    room: usize,
    is_cut: bool,
    formatter: &'f mut fmt::Formatter<'b>,
}

impl Write for Inside<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut written = Ok(());
        escape(text.as_bytes(), true, &mut |piece| {
            self.is_cut |= piece.len() > self.room;
            if !self.is_cut {
                self.room -= piece.len();
                written = self.formatter.write_str(piece);
            }
            !self.is_cut && written.is_ok()
        });
        written
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message;

    fn escaped(bytes: &[u8], step: usize) -> String {
        let mut text = String::new();
        let mut at = 0;
        for end in (0..bytes.len()).step_by(step).skip(1).chain([bytes.len()]) {
            at += escape(&bytes[at..end], end == bytes.len(), &mut |piece| {
                text.push_str(piece);
                true
            });
        }
        assert_eq!(at, bytes.len());
        text
    }

    #[test]
    fn escaping_agrees_with_lossy_conversion_however_it_is_split() {
        for (bytes, wanted) in [
            (
                &b"plain \"quoted\" back\\slash\n\r\t\x08\x0c\x01\x1f\x7f/"[..],
                r#"plain \"quoted\" back\\slash\n\r\t\u0008\u000c\u0001\u001f"#.to_owned() + "\x7f/",
            ),
            ("é 鳩 🐦 mixed".as_bytes(), "é 鳩 🐦 mixed".to_owned()),
            (
                b"\xff\xfe a \xc3( \xe2\x82( \xf0\x9f\x90 \xed\xa0\x80 end \xf0\x9f",
                "\u{fffd}\u{fffd} a \u{fffd}( \u{fffd}( \u{fffd} \u{fffd}\u{fffd}\u{fffd} end \u{fffd}"
                    .to_owned(),
            ),
            (b"\xe2\x82", "\u{fffd}".to_owned()),
            (b"", String::new()),
        ] {
            for step in [1000, 1, 2, 3, 4, 5] {
                assert_eq!(escaped(bytes, step), wanted);
            }
        }
    }

    #[test]
    fn escaping_continues_after_a_full_buffer() {
        let bytes = "a\"é\u{1}🐦\u{fffd}z".repeat(9).into_bytes();
        let whole = escaped(&bytes, 1000);
        let (mut text, mut at) = (String::new(), 0);
        while at < bytes.len() {
            let mut room = 7;
            at += escape(&bytes[at..], true, &mut |piece| {
                let fits = piece.len() <= room;
                if fits {
                    room -= piece.len();
                    text.push_str(piece);
                }
                fits
            });
        }
        assert_eq!(text, whole);
    }

    #[test]
    fn a_quoted_text_is_a_json_string_and_truncated_if_long() {
        let quoted = |text: &str| message!("{}", Quoted(&text)).as_str().to_owned();
        assert_eq!(quoted("say \"hi\"\n"), r#""say \"hi\"\n""#);
        let exact = "\"".repeat(448);
        assert_eq!(quoted(&exact), format!("\"{}\"", "\\\"".repeat(448)));
        assert_eq!(
            quoted(&format!("{exact}x")),
            format!("\"{}…\"", "\\\"".repeat(448))
        );
    }
}
