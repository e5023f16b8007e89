//! WebSocket frames (RFC 6455 section 5): an incremental decoder over one buffer, and headers out.

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
const TEXT: u8 = 1;
const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;

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

/// What the decoder found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The rest of a frame has not come.
    More,
    /// A whole text message, valid UTF-8, at this place of the buffer until the next call.
    Text(Range<usize>),
    /// A whole binary message, at this place of the buffer until the next call.
    Binary(Range<usize>),
    /// A ping whose payload is to be sent back.
    Ping(heapless::Vec<u8, CONTROL>),
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
    /// Opcode of that message.
    opcode: Option<u8>,
    /// Bytes at the front of the buffer that the last call gave out.
    given: usize,
}

struct Frame {
    fin: bool,
    opcode: u8,
    mask: [u8; 4],
    payload: Range<usize>,
}

impl Decoder {
    /// Looks at the first `filled` bytes of `buffer`; what is decoded is moved to its front.
    pub fn next(&mut self, buffer: &mut [u8], filled: &mut usize) -> Event {
        if self.given > 0 {
            remove(buffer, filled, 0..self.given);
            self.given = 0;
        }
        match self.step(buffer, filled) {
            Ok(event) => event,
            Err(code) => Event::Fail(code),
        }
    }

    fn step(&mut self, buffer: &mut [u8], filled: &mut usize) -> Result<Event, CloseCode> {
        loop {
            let Some(frame) = self.frame(buffer.get(..*filled).unwrap_or(&[]))? else {
                return Ok(Event::More);
            };
            let payload = buffer.get_mut(frame.payload.clone()).unwrap_or(&mut []);
            for (byte, mask) in payload.iter_mut().zip(frame.mask.iter().cycle()) {
                *byte ^= mask;
            }
            if frame.opcode >= CLOSE {
                let event = control(frame.opcode, payload);
                remove(buffer, filled, self.assembled..frame.payload.end);
                return event;
            }
            let end = self.assembled + frame.payload.len();
            remove(buffer, filled, self.assembled..frame.payload.start);
            self.assembled = end;
            self.opcode = self.opcode.or(Some(frame.opcode));
            if !frame.fin {
                continue;
            }
            let text = self.opcode.take() == Some(TEXT);
            self.assembled = 0;
            self.given = end;
            if !text {
                return Ok(Event::Binary(0..end));
            }
            return match core::str::from_utf8(buffer.get(..end).unwrap_or(&[])) {
                Ok(_) => Ok(Event::Text(0..end)),
                Err(_) => Err(CloseCode::NotUtf8),
            };
        }
    }

    /// The frame behind the assembled bytes, when it has come whole.
    fn frame(&self, bytes: &[u8]) -> Result<Option<Frame>, CloseCode> {
        let mut rest = bytes.get(self.assembled..).unwrap_or(&[]).iter().copied();
        let (Some(first), Some(second)) = (rest.next(), rest.next()) else {
            return Ok(None);
        };
        let fin = first & 0x80 != 0;
        let opcode = first & 0x0f;
        let masked = second & 0x80 != 0;
        let known = match opcode {
            CONTINUATION => self.opcode.is_some(),
            TEXT | BINARY => self.opcode.is_none(),
            CLOSE | PING | PONG => fin && second & 0x7f <= CONTROL as u8,
            _ => false,
        };
        if first & 0x70 != 0 || !masked || !known {
            return Err(CloseCode::Protocol);
        }
        let (wide, least) = match second & 0x7f {
            126 => (2, 126),
            127 => (8, 1 << 16),
            _ => (0, 0),
        };
        let mut length = if wide == 0 {
            u64::from(second & 0x7f)
        } else {
            0
        };
        for _ in 0..wide {
            let Some(byte) = rest.next() else {
                return Ok(None);
            };
            length = length << 8 | u64::from(byte);
        }
        // Not in the fewest bytes, or negative (section 5.2).
        if length < least || length >> 63 != 0 {
            return Err(CloseCode::Protocol);
        }
        let room = MESSAGE.saturating_sub(if opcode < CLOSE { self.assembled } else { 0 });
        if length > room as u64 {
            return Err(CloseCode::TooBig);
        }
        let mut mask = [0; 4];
        for slot in &mut mask {
            match rest.next() {
                Some(byte) => *slot = byte,
                None => return Ok(None),
            }
        }
        let start = self.assembled + 2 + wide + mask.len();
        let end = start + length as usize;
        Ok((bytes.len() >= end).then_some(Frame {
            fin,
            opcode,
            mask,
            payload: start..end,
        }))
    }
}

/// Takes `range` out of the filled bytes.
fn remove(buffer: &mut [u8], filled: &mut usize, range: Range<usize>) {
    if range.start <= range.end && range.end <= *filled && *filled <= buffer.len() {
        buffer.copy_within(range.end..*filled, range.start);
        *filled -= range.len();
    }
}

fn control(opcode: u8, payload: &[u8]) -> Result<Event, CloseCode> {
    match (opcode, payload) {
        (PING, payload) => {
            let payload = heapless::Vec::from_slice(payload).map_err(|_| CloseCode::Protocol)?;
            Ok(Event::Ping(payload))
        }
        (PONG, _) => Ok(Event::Pong),
        (_, []) => Ok(Event::Close(None)),
        (_, [high, low, reason @ ..]) => {
            let code = u16::from_be_bytes([*high, *low]);
            // Codes that may stand in a frame (section 7.4).
            if !matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999) {
                return Err(CloseCode::Protocol);
            }
            match core::str::from_utf8(reason) {
                Ok(_) => Ok(Event::Close(Some(code))),
                Err(_) => Err(CloseCode::NotUtf8),
            }
        }
        (_, [_]) => Err(CloseCode::Protocol),
    }
}

/// Longest header of a frame this program sends.
pub const HEADER_OUT: usize = 10;

fn header(opcode: u8, length: usize) -> heapless::Vec<u8, HEADER_OUT> {
    let mut header = heapless::Vec::new();
    let mut put = |bytes: &[u8]| {
        let fits = header.extend_from_slice(bytes);
        debug_assert!(fits.is_ok());
    };
    put(&[0x80 | opcode]);
    match (length, u16::try_from(length)) {
        (0..126, _) => put(&[length as u8]),
        (_, Ok(length)) => {
            put(&[126]);
            put(&length.to_be_bytes());
        }
        (_, Err(_)) => {
            put(&[127]);
            put(&(length as u64).to_be_bytes());
        }
    }
    header
}

/// Header of an unfragmented text message.
pub fn text_header(length: usize) -> heapless::Vec<u8, HEADER_OUT> {
    header(TEXT, length)
}

/// Header of an unfragmented binary message.
pub fn binary_header(length: usize) -> heapless::Vec<u8, HEADER_OUT> {
    header(BINARY, length)
}

/// A pong frame's header.
pub fn pong_header(length: usize) -> heapless::Vec<u8, HEADER_OUT> {
    header(PONG, length)
}

/// A close frame, without a code where the other side gave none.
pub fn close_frame(code: Option<u16>) -> heapless::Vec<u8, 4> {
    let mut frame = heapless::Vec::new();
    let mut put = |bytes: &[u8]| {
        let fits = frame.extend_from_slice(bytes);
        debug_assert!(fits.is_ok());
    };
    match code {
        None => put(&[0x80 | CLOSE, 0]),
        Some(code) => {
            put(&[0x80 | CLOSE, 2]);
            put(&code.to_be_bytes());
        }
    }
    frame
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
                Event::Text(at) => {
                    seen.push(Seen::Text(String::from_utf8(buffer[at].to_vec()).unwrap()))
                }
                Event::Binary(at) => seen.push(Seen::Binary(buffer[at].to_vec())),
                Event::Ping(payload) => seen.push(Seen::Ping(payload.to_vec())),
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
        assert_eq!(text_header(5)[..], [0x81, 5]);
        assert_eq!(binary_header(125)[..], [0x82, 125]);
        assert_eq!(binary_header(126)[..], [0x82, 126, 0, 126]);
        assert_eq!(binary_header(65_535)[..], [0x82, 126, 255, 255]);
        assert_eq!(
            binary_header(65_536)[..],
            [0x82, 127, 0, 0, 0, 0, 0, 1, 0, 0]
        );
        assert_eq!(pong_header(0)[..], [0x8a, 0]);
        assert_eq!(close_frame(None)[..], [0x88, 0]);
        assert_eq!(close_frame(Some(1000))[..], [0x88, 2, 3, 0xe8]);
    }
}
