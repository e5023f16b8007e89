//! Decodes bodies of known length and chunked ones (RFC 9112 section 7.1) in place.

use super::error::{RequestError, is_token_byte, is_value_byte};
use super::head::Framing;

/// Maximum length of a chunk's size line with extensions, in bytes.
pub const MAX_CHUNK_LINE: usize = 4 << 10;
/// Maximum length of the trailer section in bytes, the same as for a head.
pub const MAX_TRAILER: usize = 16 << 10;

/// The result of decoding a piece of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decoded {
    /// Number of bytes of content, at the front of the buffer.
    pub content: usize,
    /// Number of bytes of the buffer that were decoded: all, unless the body is complete and the next request
    /// starts after them.
    pub consumed: usize,
}

/// Decodes a body that arrives in pieces of any size.
///
/// Keeps all state itself: chunk sizes, extensions and trailers are dropped as they arrive and take no buffer
/// space. Time is linear in the bytes decoded, and each byte of content is moved at most once.
#[derive(Clone, Copy, Debug)]
pub struct BodyDecoder {
    state: State,
    /// How much more content is allowed.
    limit: u64,
}

/// What is expected next.
#[derive(Clone, Copy, Debug)]
enum State {
    /// Content of a body of known length, with the number of bytes left.
    Content(u64),
    /// chunk-size, after `digits` digits.
    ChunkSize { size: u64, digits: usize },
    /// After a chunk's size: white space or extensions, or the CR that ends the line.
    Extension {
        size: u64,
        line: usize,
        started: bool,
    },
    /// The LF after it.
    ChunkSizeEnd { size: u64 },
    /// chunk-data, with the number of bytes left.
    ChunkData(u64),
    /// The CR after it.
    ChunkDataCr,
    /// The LF after that.
    ChunkDataLf,
    /// A trailer, or the empty line that ends the body; `length`: of the trailer section so far.
    Trailer { length: usize, part: Trailer },
    /// The body is complete.
    Complete,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trailer {
    Start,
    Name,
    Value,
    LineEnd,
    LastLineEnd,
}

impl BodyDecoder {
    /// A decoder for at most `limit` bytes of content. Refuses a body that is known to be longer.
    pub fn new(framing: Framing, limit: u64) -> Result<Self, RequestError> {
        let state = match framing {
            Framing::None | Framing::Length(0) => State::Complete,
            Framing::Length(length) if length > limit => return Err(RequestError::LargeBody),
            Framing::Length(length) => State::Content(length),
            Framing::Chunked => State::ChunkSize { size: 0, digits: 0 },
        };
        Ok(Self { state, limit })
    }

    /// Whether the body is complete.
    pub fn is_complete(&self) -> bool {
        matches!(self.state, State::Complete)
    }

    /// How many bytes of content are still expected, if that is known.
    pub fn remaining(&self) -> Option<u64> {
        match self.state {
            State::Complete => Some(0),
            State::Content(remaining) => Some(remaining),
            _ => None,
        }
    }

    /// Decodes the next bytes of the body in place: its content moves to the front of `buffer`.
    pub fn decode(&mut self, buffer: &mut [u8]) -> Result<Decoded, RequestError> {
        let mut content = 0;
        let mut consumed = 0;
        while let Some(byte) = buffer.get(consumed).copied() {
            match &mut self.state {
                State::Complete => break,
                State::Content(remaining) | State::ChunkData(remaining) => {
                    let available = buffer.len() - consumed;
                    let count = usize::try_from(*remaining)
                        .map_or(available, |remaining| remaining.min(available));
                    *remaining -= count as u64;
                    if consumed > content {
                        buffer.copy_within(consumed..consumed + count, content);
                    }
                    content += count;
                    consumed += count;
                    self.state = match self.state {
                        State::Content(0) => State::Complete,
                        State::ChunkData(0) => State::ChunkDataCr,
                        unfinished => unfinished,
                    };
                }
                _ => {
                    consumed += 1;
                    self.state = self.step(byte)?;
                }
            }
        }
        Ok(Decoded { content, consumed })
    }

    /// Handles a byte that is not content.
    fn step(&mut self, byte: u8) -> Result<State, RequestError> {
        Ok(match self.state {
            State::ChunkSize { size, digits } => match char::from(byte).to_digit(16) {
                Some(_) if digits >= MAX_CHUNK_LINE => return Err(RequestError::LongChunkLine),
                Some(digit) => {
                    let size = size.checked_mul(16).ok_or(RequestError::LargeBody)?;
                    let size = size | u64::from(digit);
                    if size > self.limit {
                        return Err(RequestError::LargeBody);
                    }
                    State::ChunkSize {
                        size,
                        digits: digits + 1,
                    }
                }
                None if digits == 0 => return Err(RequestError::ChunkSize),
                None => self.extension(size, digits, false, byte)?,
            },
            State::Extension {
                size,
                line,
                started,
            } => self.extension(size, line, started, byte)?,
            State::ChunkSizeEnd { size } => match (byte, size) {
                (b'\n', 0) => State::Trailer {
                    length: 0,
                    part: Trailer::Start,
                },
                (b'\n', _) => {
                    self.limit -= size;
                    State::ChunkData(size)
                }
                _ => return Err(RequestError::LineEnd),
            },
            State::ChunkDataCr if byte == b'\r' => State::ChunkDataLf,
            State::ChunkDataLf if byte == b'\n' => State::ChunkSize { size: 0, digits: 0 },
            State::ChunkDataCr | State::ChunkDataLf => return Err(RequestError::ChunkEnd),
            State::Trailer { length, .. } if length >= MAX_TRAILER => {
                return Err(RequestError::LongTrailer);
            }
            State::Trailer {
                part: Trailer::LastLineEnd,
                ..
            } if byte == b'\n' => State::Complete,
            State::Trailer { length, part } => State::Trailer {
                length: length + 1,
                part: trailer(part, byte)?,
            },
            // Not used for single bytes.
            state @ (State::Content(_) | State::ChunkData(_) | State::Complete) => state,
        })
    }

    /// *( BWS ";" chunk-ext ) after a chunk's size; `started`: after the first `;`.
    fn extension(
        &self,
        size: u64,
        line: usize,
        started: bool,
        byte: u8,
    ) -> Result<State, RequestError> {
        let (line, started) = match byte {
            // White space without an extension after it is not allowed.
            b'\r' if started || matches!(self.state, State::ChunkSize { .. }) => {
                return Ok(State::ChunkSizeEnd { size });
            }
            b'\n' => return Err(RequestError::LineEnd),
            b';' => (line + 1, true),
            b' ' | b'\t' => (line + 1, started),
            _ if started && is_value_byte(byte) => (line + 1, true),
            _ => return Err(RequestError::ChunkSize),
        };
        if line > MAX_CHUNK_LINE {
            return Err(RequestError::LongChunkLine);
        }
        Ok(State::Extension {
            size,
            line,
            started,
        })
    }
}

/// *( field-line CRLF ) CRLF
fn trailer(part: Trailer, byte: u8) -> Result<Trailer, RequestError> {
    match (part, byte) {
        (Trailer::Start, b'\r') => Ok(Trailer::LastLineEnd),
        (Trailer::Value, b'\r') => Ok(Trailer::LineEnd),
        (Trailer::LineEnd, b'\n') => Ok(Trailer::Start),
        (Trailer::LineEnd | Trailer::LastLineEnd, _) | (_, b'\n') => Err(RequestError::LineEnd),
        (Trailer::Name, b':') => Ok(Trailer::Value),
        (Trailer::Start | Trailer::Name, _) if is_token_byte(byte) => Ok(Trailer::Name),
        (Trailer::Value, _) if is_value_byte(byte) => Ok(Trailer::Value),
        _ => Err(RequestError::Trailer),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: u64 = 128 << 10;

    /// Decodes a body that arrives in pieces of `step` bytes. Returns its content and the bytes after it;
    /// `None` if it is incomplete.
    fn feed(
        framing: Framing,
        bytes: &[u8],
        step: usize,
    ) -> Result<Option<(Vec<u8>, usize)>, RequestError> {
        let mut decoder = BodyDecoder::new(framing, LIMIT)?;
        let mut content = Vec::new();
        let mut received = 0;
        for piece in bytes.chunks(step) {
            let mut piece = piece.to_vec();
            let decoded = decoder.decode(&mut piece)?;
            content.extend(&piece[..decoded.content]);
            received += decoded.consumed;
            if decoder.is_complete() {
                break;
            }
            assert_eq!(decoded.consumed, piece.len());
        }
        Ok(decoder
            .is_complete()
            .then(|| (content, bytes.len() - received)))
    }

    fn chunked(text: &[u8]) -> Result<Option<(Vec<u8>, usize)>, RequestError> {
        let whole = feed(Framing::Chunked, text, usize::MAX);
        for step in [1, 2, 5] {
            assert_eq!(
                feed(Framing::Chunked, text, step),
                whole,
                "in pieces of {step}"
            );
        }
        whole
    }

    #[test]
    fn a_body_of_known_length_ends_at_its_length() {
        for step in [1, 3, 100] {
            let decoded = feed(Framing::Length(5), b"abcdeGET", step)
                .unwrap()
                .unwrap();
            assert_eq!(decoded.0, b"abcde");
        }
        assert_eq!(feed(Framing::Length(5), b"abcd", 2), Ok(None));
        let mut none = BodyDecoder::new(Framing::None, 0).unwrap();
        assert!(none.is_complete());
        let nothing = Decoded {
            content: 0,
            consumed: 0,
        };
        assert_eq!(none.decode(&mut [1, 2]), Ok(nothing));
        assert!(
            BodyDecoder::new(Framing::Length(0), 0)
                .unwrap()
                .is_complete()
        );
        assert_eq!(
            BodyDecoder::new(Framing::Length(7), 9).unwrap().remaining(),
            Some(7)
        );
    }

    #[test]
    fn a_chunked_body_is_decoded_and_later_bytes_are_kept() {
        let text = b"3\r\nabc\r\n0A;a=b\r\n0123456789\r\n1 ;x\r\nz\r\n000\r\nTrailer: y\r\n\r\nGET";
        assert_eq!(chunked(text), Ok(Some((b"abc0123456789z".to_vec(), 3))));
    }

    #[test]
    fn bodies_up_to_the_limit_are_accepted_in_both_framings() {
        let body = "x".repeat(LIMIT as usize);
        let plain = feed(Framing::Length(LIMIT), body.as_bytes(), 4096)
            .unwrap()
            .unwrap();
        assert_eq!(plain.0, body.as_bytes());
        assert!(BodyDecoder::new(Framing::Length(LIMIT + 1), LIMIT).is_err());
        let text = format!("{LIMIT:x}\r\n{body}\r\n0\r\n\r\n");
        let whole = feed(Framing::Chunked, text.as_bytes(), 4096)
            .unwrap()
            .unwrap();
        assert_eq!(whole.0.len(), body.len());
        let over = text.replace("\r\n0\r\n", "\r\n1\r\nx\r\n0\r\n");
        assert_eq!(
            feed(Framing::Chunked, over.as_bytes(), 4096),
            Err(RequestError::LargeBody)
        );
    }

    #[test]
    fn small_chunks_with_long_extensions_and_trailers_are_accepted() {
        let content: Vec<u8> = (0..100_000).map(|at| at as u8).collect();
        let mut text = Vec::new();
        for chunk in content.chunks(10) {
            text.extend(format!("{:x};ext=\"{}\"\r\n", chunk.len(), "e".repeat(20)).bytes());
            text.extend(chunk);
            text.extend(b"\r\n");
        }
        text.extend(b"0\r\n");
        text.extend(format!("T: {}\r\n\r\n", "t".repeat(9 << 10)).bytes());
        for step in [1, 1000, usize::MAX] {
            let decoded = feed(Framing::Chunked, &text, step).unwrap().unwrap();
            assert!(decoded.0 == content && decoded.1 == 0);
        }
    }

    #[test]
    fn a_body_length_can_have_64_bits() {
        let mut decoder = BodyDecoder::new(Framing::Length(u64::MAX), u64::MAX).unwrap();
        let decoded = Decoded {
            content: 4,
            consumed: 4,
        };
        assert_eq!(decoder.decode(&mut [0; 4]), Ok(decoded));
        assert_eq!(decoder.remaining(), Some(u64::MAX - 4));
        let mut decoder = BodyDecoder::new(Framing::Chunked, u64::MAX).unwrap();
        let mut text = *b"ffffffffffffffff\r\nab";
        assert_eq!(decoder.decode(&mut text).unwrap().content, 2);
        assert_eq!(decoder.remaining(), None);
    }

    #[test]
    fn bad_chunks_are_refused() {
        for (text, expected) in [
            ("\r\n", RequestError::ChunkSize),
            ("g\r\n", RequestError::ChunkSize),
            (";\r\n", RequestError::ChunkSize),
            ("-1\r\n", RequestError::ChunkSize),
            ("0x1\r\nx", RequestError::ChunkSize),
            (" 1\r\nx\r\n", RequestError::ChunkSize),
            ("1 \r\nx\r\n", RequestError::ChunkSize),
            ("1 x\r\nx\r\n", RequestError::ChunkSize),
            ("1;\0\r\nx\r\n", RequestError::ChunkSize),
            ("1\nx\r\n", RequestError::LineEnd),
            ("1;a\nx\r\n", RequestError::LineEnd),
            ("1\rx", RequestError::LineEnd),
            ("1;a\rb\r\nx", RequestError::LineEnd),
            ("1\r\nxy\r\n", RequestError::ChunkEnd),
            ("1\r\nx\n0\r\n\r\n", RequestError::ChunkEnd),
            ("1\r\nx\rx", RequestError::ChunkEnd),
            ("ffffffffffffffffffffffff\r\n", RequestError::LargeBody),
            ("20001\r\n", RequestError::LargeBody),
            ("0\r\nno colon\r\n\r\n", RequestError::Trailer),
            ("0\r\nnone\r\n\r\n", RequestError::Trailer),
            ("0\r\n: y\r\n\r\n", RequestError::Trailer),
            ("0\r\n x: y\r\n\r\n", RequestError::Trailer),
            ("0\r\nx: \0\r\n\r\n", RequestError::Trailer),
            ("0\r\nx: y\rz\r\n\r\n", RequestError::LineEnd),
            ("0\r\nx: y\n\r\n", RequestError::LineEnd),
            ("0\r\n\n", RequestError::LineEnd),
            ("0\r\n\rx", RequestError::LineEnd),
        ] {
            assert_eq!(chunked(text.as_bytes()), Err(expected), "{text:?}");
        }
        for text in ["0\r\n\r\n", "00;x\r\n\r\n", "0 ; a\r\nx:\r\n\r\n"] {
            assert_eq!(chunked(text.as_bytes()), Ok(Some((vec![], 0))), "{text:?}");
        }
    }

    #[test]
    fn endless_lines_between_the_content_are_refused() {
        for (text, expected) in [
            (
                format!("1;{}", "e".repeat(MAX_CHUNK_LINE)),
                RequestError::LongChunkLine,
            ),
            (
                format!("1{}", " ".repeat(MAX_CHUNK_LINE)),
                RequestError::LongChunkLine,
            ),
            ("0".repeat(MAX_CHUNK_LINE + 1), RequestError::LongChunkLine),
            (
                format!("0\r\nT: {}", "t".repeat(MAX_TRAILER)),
                RequestError::LongTrailer,
            ),
            (
                format!("0\r\n{}", "T: t\r\n".repeat(MAX_TRAILER / 6 + 1)),
                RequestError::LongTrailer,
            ),
        ] {
            assert_eq!(feed(Framing::Chunked, text.as_bytes(), 100), Err(expected));
        }
    }
}
