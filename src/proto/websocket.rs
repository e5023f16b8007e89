//! WebSocket frames (RFC 6455 section 5): an incremental decoder over one buffer, and headers out.

use crate::bytes::{remove, valid_up_to};
use core::ops::Range;

/// Longest message accepted, in bytes.
pub const MESSAGE: usize = 128 << 10;
/// What a decoder's buffer must hold: a message put together so far, a whole frame, a control frame.
pub const BUFFER: usize = MESSAGE + 2 * (HEADER + CONTROL);
/// Longest payload of a control frame (section 5.5).
pub const CONTROL: usize = 125;
/// Longest frame header of a client: 2 bytes, 8 of length, 4 of mask.
const HEADER: usize = 14;

// Opcodes (section 5.2).
const CONTINUATION: u8 = 0;
/// A text message.
pub const TEXT: u8 = 1;
/// A binary message.
pub const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PING: u8 = 9;
/// An answer to a ping.
pub const PONG: u8 = 10;

/// Why a connection is closed (section 7.4.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum CloseCode {
    /// The session has ended.
    Normal = 1000,
    /// The VM goes down.
    GoingAway = 1001,
    /// The client broke the protocol.
    Protocol = 1002,
    /// A text that is not UTF-8.
    NotUtf8 = 1007,
    /// A message this program cannot take.
    Policy = 1008,
    /// A message over [`MESSAGE`] bytes.
    TooBig = 1009,
    /// The command cannot be started.
    Internal = 1011,
}

/// What the decoder found. Its bytes are the decoder's [`payload`](Decoder::payload).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The rest of a frame has not come.
    More,
    /// A whole text message, valid UTF-8.
    Text,
    /// A whole binary message.
    Binary,
    /// A ping whose payload is to be sent back.
    Ping,
    /// An answer to a ping.
    Pong,
    /// The client closes, with the code to answer with, if it gave one.
    Close(Option<u16>),
    /// The connection has to be closed with this code.
    Fail(CloseCode),
}

/// Decodes a client's frames.
#[derive(Debug, Default)]
pub struct Decoder {
    /// Bytes at the front of the buffer that belong to a message not yet whole.
    assembled: usize,
    /// Where in the buffer the bytes of the last event lie, until the next call.
    pub payload: Range<usize>,
    /// Opcode of that message; [`CONTINUATION`] when there is none.
    opcode: u8,
}

impl Decoder {
    /// Looks at the first `filled` bytes of `buffer`; what is decoded is moved to its front.
    pub fn next(&mut self, buffer: &mut [u8], filled: &mut usize) -> Event {
        remove(buffer, filled, core::mem::take(&mut self.payload));
        loop {
            let start = self.assembled;
            let bytes = buffer.get_mut(start..*filled).unwrap_or(&mut []);
            let [first, second, rest @ ..] = bytes else {
                return Event::More;
            };
            let (fin, opcode, short) = (*first & 0x80 != 0, *first & 0x0f, *second & 0x7f);
            let known = match opcode {
                CONTINUATION => self.opcode != CONTINUATION,
                TEXT | BINARY => self.opcode == CONTINUATION,
                CLOSE | PING | PONG => fin && usize::from(short) <= CONTROL,
                _ => false,
            };
            if !known || *first & 0x70 != 0 || *second & 0x80 == 0 {
                return Event::Fail(CloseCode::Protocol);
            }
            let (wide, least) = match short {
                126 => (2, 126),
                127 => (8, 1 << 16),
                _ => (0, 0),
            };
            let Some((field, rest)) = rest.split_at_mut_checked(wide) else {
                return Event::More;
            };
            let length = match field {
                [] => u64::from(short),
                _ => field
                    .iter()
                    .fold(0, |sum, byte| sum << 8 | u64::from(*byte)),
            };
            // Not in the fewest bytes, or negative (section 5.2).
            if length < least || length >> 63 != 0 {
                return Event::Fail(CloseCode::Protocol);
            }
            let before = if opcode < CLOSE { start } else { 0 };
            if length > MESSAGE.saturating_sub(before) as u64 {
                return Event::Fail(CloseCode::TooBig);
            }
            let length = length as usize;
            let Some((mask, rest)) = rest.split_first_chunk_mut() else {
                return Event::More;
            };
            let Some(payload) = rest.get_mut(..length) else {
                return Event::More;
            };
            let mut mask = u32::from_le_bytes(*mask);
            for byte in payload {
                *byte ^= mask as u8;
                mask = mask.rotate_right(8);
            }
            remove(buffer, filled, start..start + 2 + wide + 4);
            if opcode >= CLOSE {
                self.payload = start..start + length;
                return control(opcode, buffer.get(self.payload.clone()).unwrap_or(&[]));
            }
            self.assembled += length;
            if self.opcode == CONTINUATION {
                self.opcode = opcode;
            }
            if fin {
                return self.message(buffer);
            }
        }
    }

    /// A message is whole.
    fn message(&mut self, buffer: &[u8]) -> Event {
        self.payload = 0..core::mem::take(&mut self.assembled);
        if core::mem::take(&mut self.opcode) == BINARY {
            return Event::Binary;
        }
        let text = buffer.get(self.payload.clone()).unwrap_or(&[]);
        if valid_up_to(text) == text.len() {
            Event::Text
        } else {
            Event::Fail(CloseCode::NotUtf8)
        }
    }
}

fn control(opcode: u8, payload: &[u8]) -> Event {
    match (opcode, payload) {
        (PING, _) => Event::Ping,
        (PONG, _) => Event::Pong,
        (_, []) => Event::Close(None),
        (_, [high, low, reason @ ..]) => {
            let code = u16::from_be_bytes([*high, *low]);
            // Codes that may stand in a frame (section 7.4).
            if !matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999) {
                Event::Fail(CloseCode::Protocol)
            } else if valid_up_to(reason) != reason.len() {
                Event::Fail(CloseCode::NotUtf8)
            } else {
                Event::Close(Some(code))
            }
        }
        (_, [_]) => Event::Fail(CloseCode::Protocol),
    }
}

/// Longest header of a frame this program sends.
pub const HEADER_OUT: usize = 10;

/// The start of a frame to send, or all of it.
#[derive(Debug)]
pub struct Header {
    bytes: [u8; HEADER_OUT],
    start: usize,
}

impl core::ops::Deref for Header {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.bytes.get(self.start..).unwrap_or(&[])
    }
}

/// The header of an unfragmented frame.
pub fn header(opcode: u8, length: usize) -> Header {
    let [.., a, b, c, d] = (length as u64).to_be_bytes();
    let (start, short) = match length {
        0..126 => (8, d),
        126..0x10000 => (6, 126),
        _ => (0, 127),
    };
    let mut bytes = [0, 0, 0, 0, 0, 0, a, b, c, d];
    if let Some([first, second, ..]) = bytes.get_mut(start..) {
        *first = 0x80 | opcode;
        *second = short;
    }
    Header { bytes, start }
}

/// A close frame, without a code where the other side gave none.
pub fn close_frame(code: Option<u16>) -> Header {
    let [high, low] = code.unwrap_or(0).to_be_bytes();
    let (start, length) = if code.is_some() { (6, 2) } else { (8, 0) };
    let mut bytes = [0, 0, 0, 0, 0, 0, 0, 0, high, low];
    if let Some([first, second, ..]) = bytes.get_mut(start..) {
        *first = 0x80 | CLOSE;
        *second = length;
    }
    Header { bytes, start }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
        let mask = [0x37, 0xfa, 0x21, 0x3d];
        let mut bytes = vec![first];
        match payload.len() {
            short @ 0..126 => bytes.push(0x80 | short as u8),
            medium @ 126..0x10000 => {
                bytes.push(0xfe);
                bytes.extend((medium as u16).to_be_bytes());
            }
            long => {
                bytes.push(0xff);
                bytes.extend((long as u64).to_be_bytes());
            }
        }
        bytes.extend(mask);
        bytes.extend(
            payload
                .iter()
                .zip(mask.iter().cycle())
                .map(|(byte, mask)| byte ^ mask),
        );
        bytes
    }

    #[derive(Debug, PartialEq)]
    enum Seen {
        Text(String),
        Binary(Vec<u8>),
        Ping(Vec<u8>),
        Pong,
        Close(Option<u16>),
        Fail(CloseCode),
    }

    fn feed(bytes: &[u8], step: usize) -> Vec<Seen> {
        let mut buffer = vec![0; BUFFER];
        let mut filled = 0;
        let mut decoder = Decoder::default();
        let mut seen = Vec::new();
        let mut rest = bytes;
        loop {
            match decoder.next(&mut buffer, &mut filled) {
                Event::More if rest.is_empty() => return seen,
                Event::More => {
                    let count = step.min(rest.len()).min(BUFFER - filled);
                    assert!(count > 0, "the buffer is too small for a legal message");
                    buffer[filled..filled + count].copy_from_slice(&rest[..count]);
                    filled += count;
                    rest = &rest[count..];
                }
                Event::Text => {
                    let payload = buffer[decoder.payload.clone()].to_vec();
                    seen.push(Seen::Text(String::from_utf8(payload).unwrap()));
                }
                Event::Binary => seen.push(Seen::Binary(buffer[decoder.payload.clone()].to_vec())),
                Event::Ping => seen.push(Seen::Ping(buffer[decoder.payload.clone()].to_vec())),
                Event::Pong => seen.push(Seen::Pong),
                Event::Close(code) => seen.push(Seen::Close(code)),
                Event::Fail(code) => {
                    seen.push(Seen::Fail(code));
                    return seen;
                }
            }
        }
    }

    fn all(bytes: &[u8]) -> Vec<Seen> {
        let whole = feed(bytes, usize::MAX);
        for step in [1, 3, 11] {
            assert_eq!(feed(bytes, step), whole);
        }
        whole
    }

    #[test]
    fn the_rfcs_examples_decode() {
        let hello = [
            0x81, 0x85, 0x37, 0xfa, 0x21, 0x3d, 0x7f, 0x9f, 0x4d, 0x51, 0x58,
        ];
        assert_eq!(all(&hello), [Seen::Text("Hello".into())]);
    }

    #[test]
    fn fragments_make_one_message_with_control_frames_between() {
        let bytes = [
            frame(0x01, "h\u{e9}".as_bytes().get(..2).unwrap()),
            frame(0x89, b"ping"),
            frame(0x00, &[0xa9]),
            frame(0x8a, b""),
            frame(0x80, b"!"),
            frame(0x82, &[0, 255]),
            frame(0x02, b""),
            frame(0x80, b""),
        ]
        .concat();
        assert_eq!(
            all(&bytes),
            [
                Seen::Ping(b"ping".to_vec()),
                Seen::Pong,
                Seen::Text("hé!".into()),
                Seen::Binary(vec![0, 255]),
                Seen::Binary(vec![]),
            ]
        );
    }

    #[test]
    fn messages_up_to_the_limit_fit_however_they_are_cut() {
        let payload: Vec<u8> = (0..MESSAGE).map(|at| at as u8).collect();
        assert_eq!(
            feed(&frame(0x82, &payload), 4096),
            [Seen::Binary(payload.clone())]
        );
        let (first, second) = payload.split_at(MESSAGE - 7);
        let bytes = [
            frame(0x02, first),
            frame(0x89, &[1; 125]),
            frame(0x80, second),
        ]
        .concat();
        assert_eq!(
            feed(&bytes, 4096),
            [Seen::Ping(vec![1; 125]), Seen::Binary(payload.clone())]
        );
        let over = [frame(0x02, &payload), frame(0x80, b"x")].concat();
        assert_eq!(feed(&over, 4096), [Seen::Fail(CloseCode::TooBig)]);
        let announced = [0x82, 0xff, 0, 0, 0, 0, 0, 2, 0, 1];
        assert_eq!(all(&announced), [Seen::Fail(CloseCode::TooBig)]);
    }

    #[test]
    fn what_breaks_the_protocol_fails_the_connection() {
        for bytes in [
            frame(0xc1, b"x"),
            frame(0xa1, b"x"),
            frame(0x91, b"x"),
            frame(0x83, b""),
            frame(0x8b, b""),
            frame(0x80, b"no start"),
            frame(0x00, b""),
            [frame(0x01, b"a"), frame(0x81, b"b")].concat(),
            frame(0x09, b""),
            frame(0x08, b""),
            frame(0x89, &[0; 126]),
            frame(0x88, &[3]),
            frame(0x88, &999u16.to_be_bytes()),
            frame(0x88, &1005u16.to_be_bytes()),
            frame(0x88, &1006u16.to_be_bytes()),
            frame(0x88, &2999u16.to_be_bytes()),
            frame(0x88, &5000u16.to_be_bytes()),
            vec![0x81, 0x01, b'x'],
            vec![0x82, 0xfe, 0, 125, 0, 0, 0, 0],
            vec![0x82, 0xff, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0],
            vec![0x82, 0xff, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ] {
            assert_eq!(
                all(&bytes).last(),
                Some(&Seen::Fail(CloseCode::Protocol)),
                "{bytes:x?}"
            );
        }
    }

    #[test]
    fn texts_and_reasons_must_be_utf8() {
        assert_eq!(all(&frame(0x81, b"\xff")), [Seen::Fail(CloseCode::NotUtf8)]);
        assert_eq!(
            all(&frame(0x81, b"\xed\xa0\x80")),
            [Seen::Fail(CloseCode::NotUtf8)]
        );
        let split = [frame(0x01, b"\xf0\x9f"), frame(0x80, b"\x90")].concat();
        assert_eq!(all(&split), [Seen::Fail(CloseCode::NotUtf8)]);
        assert_eq!(
            all(&frame(0x88, b"\x03\xe8\xff")),
            [Seen::Fail(CloseCode::NotUtf8)]
        );
    }

    #[test]
    fn a_close_gives_its_code() {
        assert_eq!(all(&frame(0x88, b"")), [Seen::Close(None)]);
        assert_eq!(all(&frame(0x88, b"\x03\xe8bye")), [Seen::Close(Some(1000))]);
        assert_eq!(
            all(&frame(0x88, &4999u16.to_be_bytes())),
            [Seen::Close(Some(4999))]
        );
    }

    #[test]
    fn headers_are_as_short_as_the_length_allows() {
        assert_eq!(header(TEXT, 5)[..], [0x81, 5]);
        assert_eq!(header(BINARY, 125)[..], [0x82, 125]);
        assert_eq!(header(BINARY, 126)[..], [0x82, 126, 0, 126]);
        assert_eq!(header(BINARY, 65_535)[..], [0x82, 126, 255, 255]);
        assert_eq!(
            header(BINARY, 65_536)[..],
            [0x82, 127, 0, 0, 0, 0, 0, 1, 0, 0]
        );
        assert_eq!(header(PONG, 0)[..], [0x8a, 0]);
        assert_eq!(close_frame(None)[..], [0x88, 0]);
        assert_eq!(close_frame(Some(1000))[..], [0x88, 2, 3, 0xe8]);
    }
}
