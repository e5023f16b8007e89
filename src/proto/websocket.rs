//! WebSocket frames (RFC 6455 section 5): an incremental decoder over one buffer, and frame headers
//! to send.

use core::ops::Range;
use core::str;

/// Maximum length of a received message, in bytes.
pub const MAX_MESSAGE: usize = 128 << 10;
/// Size of a decoder's buffer: a reassembled message, a whole frame, a control frame.
pub const BUFFER: usize = MAX_MESSAGE + 2 * (MAX_CLIENT_HEADER + MAX_CONTROL);
/// Maximum payload of a control frame (section 5.5).
pub const MAX_CONTROL: usize = 125;
/// Maximum length of a close frame's reason, in bytes, after its code.
pub const MAX_REASON: usize = MAX_CONTROL - 2;
/// Longest frame header from a client: 2 bytes, 8 of length, 4 of masking key.
const MAX_CLIENT_HEADER: usize = 14;
/// Longest frame header from a server: no masking key.
pub const MAX_HEADER: usize = 10;

// The first two bytes of a frame (section 5.2).
const FIN: u8 = 0x80;
const RESERVED: u8 = 0x70;
const OPCODE: u8 = 0x0f;
const MASKED: u8 = 0x80;
const LENGTH: u8 = 0x7f;
/// Length field: the length follows in 2 bytes.
const LENGTH_16: u8 = 126;
/// Length field: the length follows in 8 bytes.
const LENGTH_64: u8 = 127;

/// The type of a frame (section 5.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Opcode {
    Continuation = 0,
    Text = 1,
    Binary = 2,
    Close = 8,
    Ping = 9,
    Pong = 10,
}

impl Opcode {
    fn parse(first: u8) -> Option<Self> {
        Some(match first & OPCODE {
            0 => Self::Continuation,
            1 => Self::Text,
            2 => Self::Binary,
            8 => Self::Close,
            9 => Self::Ping,
            10 => Self::Pong,
            _ => return None,
        })
    }

    fn is_control(self) -> bool {
        matches!(self, Self::Close | Self::Ping | Self::Pong)
    }
}

/// Why a connection is closed (section 7.4.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseCode {
    /// The session has ended.
    Normal = 1000,
    /// The VM shuts down.
    GoingAway = 1001,
    /// The client broke the protocol.
    ProtocolError = 1002,
    /// A text that is not UTF-8.
    InvalidPayload = 1007,
    /// A message that has no meaning here; the reason says why.
    PolicyViolation = 1008,
    /// A message over [`MAX_MESSAGE`] bytes.
    MessageTooBig = 1009,
    /// The command cannot be started.
    InternalError = 1011,
}

/// A protocol error: the connection must be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameError {
    /// A reserved bit is set, without a negotiated extension.
    ReservedBit,
    /// The opcode is reserved.
    Opcode,
    /// A client's frame without a mask.
    Unmasked,
    /// A fragmented control frame, or one over [`MAX_CONTROL`] bytes.
    Control,
    /// A continuation frame without a message.
    Continuation,
    /// A new message before the last one is complete.
    Unfinished,
    /// A length that is not encoded in the fewest bytes, or over 2^63 - 1.
    Length,
    /// A close frame of one byte, or with a code that must not be sent.
    CloseCode,
    /// A text or a reason that is not UTF-8.
    Utf8,
    /// A message over [`MAX_MESSAGE`] bytes.
    TooBig,
}

impl FrameError {
    /// The code to close with.
    pub fn close_code(self) -> CloseCode {
        match self {
            Self::Utf8 => CloseCode::InvalidPayload,
            Self::TooBig => CloseCode::MessageTooBig,
            _ => CloseCode::ProtocolError,
        }
    }

    /// The reason to close with.
    pub fn message(self) -> &'static str {
        match self {
            Self::ReservedBit => "a reserved bit is set",
            Self::Opcode => "the opcode is reserved",
            Self::Unmasked => "a frame is not masked",
            Self::Control => "a control frame is fragmented or over 125 bytes",
            Self::Continuation => "there is no message to continue",
            Self::Unfinished => "the last message is not finished",
            Self::Length => "a length is not encoded in the fewest bytes",
            Self::CloseCode => "the close code is invalid",
            Self::Utf8 => "a text is not UTF-8",
            Self::TooBig => "the message is over 128 KiB",
        }
    }
}

/// What the decoder found. A range is the position of the payload in the buffer, valid until the next call of
/// the decoder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The next frame is incomplete.
    Incomplete,
    /// A complete text message, valid UTF-8.
    Text(Range<usize>),
    /// A complete binary message.
    Binary(Range<usize>),
    /// A ping, whose payload is to be sent back.
    Ping(Range<usize>),
    /// The reply to a ping.
    Pong,
    /// A close frame, with its code, if it has one, which is to be echoed.
    Close(Option<u16>),
    /// A protocol error: the connection must be closed.
    Error(FrameError),
}

/// Decodes a client's frames.
///
/// Time is linear in the bytes received: a message in one frame stays where it is, fragments are joined at the
/// front of the buffer, and an incomplete frame is moved to the front once, when there is nothing else to
/// decode.
#[derive(Clone, Debug, Default)]
pub struct Decoder {
    /// Length of the unfinished message at the front of the buffer.
    joined: usize,
    /// The type of that message.
    unfinished: Option<Opcode>,
    /// Position of the next frame.
    next: usize,
}

/// A frame's header.
struct Header {
    fin: bool,
    opcode: Opcode,
    mask: [u8; 4],
    /// The header's length.
    size: usize,
    /// The payload's length.
    length: usize,
}

impl Decoder {
    /// Decodes the next event from the first `filled` bytes of `buffer`. Unmasks payloads in place, and moves an
    /// incomplete frame to the front, which reduces `filled` and makes room for more.
    pub fn next(&mut self, buffer: &mut [u8], filled: &mut usize) -> Event {
        self.decode(buffer, filled).unwrap_or_else(Event::Error)
    }

    fn decode(&mut self, buffer: &mut [u8], filled: &mut usize) -> Result<Event, FrameError> {
        loop {
            let received = buffer.get_mut(self.next..*filled).unwrap_or(&mut []);
            let Some(header) = self.header(received)? else {
                break;
            };
            let frame = header.size + header.length;
            let Some(payload) = received.get_mut(header.size..frame) else {
                break;
            };
            for (byte, mask) in payload.iter_mut().zip(header.mask.iter().cycle()) {
                *byte ^= mask;
            }
            let payload = self.next + header.size..self.next + frame;
            self.next += frame;
            let bytes = buffer.get(payload.clone()).unwrap_or(&[]);
            match (header.opcode, self.unfinished) {
                (Opcode::Close, _) => return close_event(bytes),
                (Opcode::Ping, _) => return Ok(Event::Ping(payload)),
                (Opcode::Pong, _) => return Ok(Event::Pong),
                (opcode, None) if header.fin => return message_event(opcode, bytes, payload),
                _ => {}
            }
            // Fragments move over the headers between them, so this never overwrites unread bytes.
            let end = self.joined + payload.len();
            buffer.copy_within(payload, self.joined);
            let opcode = *self.unfinished.get_or_insert(header.opcode);
            self.joined = end;
            if header.fin {
                self.joined = 0;
                self.unfinished = None;
                return message_event(opcode, buffer.get(..end).unwrap_or(&[]), 0..end);
            }
        }
        if self.next > self.joined && self.next <= *filled {
            buffer.copy_within(self.next..*filled, self.joined);
            *filled -= self.next - self.joined;
            self.next = self.joined;
        }
        Ok(Event::Incomplete)
    }

    /// Parses the header at the start of `bytes`; `None` if it is incomplete.
    fn header(&self, bytes: &[u8]) -> Result<Option<Header>, FrameError> {
        let [first, second, rest @ ..] = bytes else {
            return Ok(None);
        };
        let (fin, short) = (first & FIN != 0, second & LENGTH);
        let opcode = Opcode::parse(*first).ok_or(FrameError::Opcode)?;
        if first & RESERVED != 0 {
            return Err(FrameError::ReservedBit);
        }
        if second & MASKED == 0 {
            return Err(FrameError::Unmasked);
        }
        match opcode {
            Opcode::Continuation if self.unfinished.is_none() => {
                return Err(FrameError::Continuation);
            }
            Opcode::Text | Opcode::Binary if self.unfinished.is_some() => {
                return Err(FrameError::Unfinished);
            }
            _ if opcode.is_control() && (!fin || usize::from(short) > MAX_CONTROL) => {
                return Err(FrameError::Control);
            }
            _ => {}
        }
        let (length, size, least) = match (short, rest) {
            (LENGTH_16, [a, b, ..]) => (u64::from(u16::from_be_bytes([*a, *b])), 4, 126),
            (LENGTH_64, rest) => match rest.first_chunk() {
                Some(length) => (u64::from_be_bytes(*length), 10, 1 << 16),
                None => return Ok(None),
            },
            (LENGTH_16, _) => return Ok(None),
            (short, _) => (u64::from(short), 2, 0),
        };
        if length < least || length >> 63 != 0 {
            return Err(FrameError::Length);
        }
        let joined = if opcode.is_control() { 0 } else { self.joined };
        let length = usize::try_from(length)
            .ok()
            .filter(|length| *length <= MAX_MESSAGE - joined)
            .ok_or(FrameError::TooBig)?;
        let mask = bytes.get(size..).and_then(<[u8]>::first_chunk);
        Ok(mask.map(|mask| Header {
            fin,
            opcode,
            mask: *mask,
            size: size + mask.len(),
            length,
        }))
    }
}

fn message_event(opcode: Opcode, message: &[u8], range: Range<usize>) -> Result<Event, FrameError> {
    match opcode {
        Opcode::Text if str::from_utf8(message).is_err() => Err(FrameError::Utf8),
        Opcode::Text => Ok(Event::Text(range)),
        _ => Ok(Event::Binary(range)),
    }
}

/// A close frame is empty, or a code and a reason (section 5.5.1).
fn close_event(payload: &[u8]) -> Result<Event, FrameError> {
    let (high, low, reason) = match payload {
        [] => return Ok(Event::Close(None)),
        [high, low, reason @ ..] => (*high, *low, reason),
        [_] => return Err(FrameError::CloseCode),
    };
    let code = u16::from_be_bytes([high, low]);
    // Codes that are allowed in a frame (section 7.4).
    if !matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999) {
        return Err(FrameError::CloseCode);
    }
    match str::from_utf8(reason) {
        Ok(_) => Ok(Event::Close(Some(code))),
        Err(_) => Err(FrameError::Utf8),
    }
}

/// The header of an unfragmented frame to send; the payload follows it, unmasked.
#[derive(Clone, Debug)]
pub struct FrameHeader {
    bytes: heapless::Vec<u8, MAX_HEADER>,
}

impl FrameHeader {
    /// For a payload of `length` bytes.
    pub fn new(opcode: Opcode, length: usize) -> Self {
        let first = FIN | opcode as u8;
        let bytes = (length as u64).to_be_bytes();
        let [.., high, low] = bytes;
        let mut header = heapless::Vec::new();
        // The longest is MAX_HEADER bytes.
        let _fits = match length {
            0..126 => header.extend_from_slice(&[first, low]),
            126..0x1_0000 => header.extend_from_slice(&[first, LENGTH_16, high, low]),
            _ => header
                .extend_from_slice(&[first, LENGTH_64])
                .and_then(|()| header.extend_from_slice(&bytes)),
        };
        Self { bytes: header }
    }

    /// The bytes to send.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// A close frame to send (section 5.5.1).
#[derive(Clone, Debug)]
pub struct CloseFrame {
    bytes: heapless::Vec<u8, { 2 + MAX_CONTROL }>,
}

impl CloseFrame {
    /// With a code and a reason. A reason over [`MAX_REASON`] bytes is truncated and ends with `…`.
    pub fn new(code: CloseCode, reason: &str) -> Self {
        const ELLIPSIS: &str = "…";
        let (shown, mark) = if reason.len() > MAX_REASON {
            let end = reason.floor_char_boundary(MAX_REASON - ELLIPSIS.len());
            (reason.get(..end).unwrap_or(""), ELLIPSIS)
        } else {
            (reason, "")
        };
        let mut frame = Self::echo(Some(code as u16));
        frame.append(shown.as_bytes());
        frame.append(mark.as_bytes());
        frame
    }

    /// The reply to a client's close frame: echoes its code, if it has one.
    pub fn echo(code: Option<u16>) -> Self {
        let mut frame = Self {
            bytes: heapless::Vec::new(),
        };
        let _fits = frame
            .bytes
            .extend_from_slice(&[FIN | Opcode::Close as u8, 0]);
        if let Some(code) = code {
            frame.append(&code.to_be_bytes());
        }
        frame
    }

    /// Appends to the payload, which is at most MAX_CONTROL bytes: its length is the second byte.
    fn append(&mut self, part: &[u8]) {
        if self.bytes.extend_from_slice(part).is_ok()
            && let Some(length) = self.bytes.get_mut(1)
        {
            *length += part.len() as u8;
        }
    }

    /// The bytes to send.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }
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
        Error(FrameError),
    }

    fn feed(bytes: &[u8], step: usize) -> Vec<Seen> {
        let mut buffer = vec![0; BUFFER];
        let mut filled = 0;
        let mut decoder = Decoder::default();
        let mut seen = Vec::new();
        let mut rest = bytes;
        loop {
            let event = decoder.next(&mut buffer, &mut filled);
            let payload = |range: Range<usize>| buffer[range].to_vec();
            match event {
                Event::Incomplete if rest.is_empty() => return seen,
                Event::Incomplete => {
                    let count = step.min(rest.len()).min(BUFFER - filled);
                    assert!(count > 0, "the buffer is too small for a legal message");
                    buffer[filled..filled + count].copy_from_slice(&rest[..count]);
                    filled += count;
                    rest = &rest[count..];
                }
                Event::Text(range) => {
                    seen.push(Seen::Text(String::from_utf8(payload(range)).unwrap()));
                }
                Event::Binary(range) => seen.push(Seen::Binary(payload(range))),
                Event::Ping(range) => seen.push(Seen::Ping(payload(range))),
                Event::Pong => seen.push(Seen::Pong),
                Event::Close(code) => seen.push(Seen::Close(code)),
                Event::Error(error) => {
                    seen.push(Seen::Error(error));
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
    fn messages_up_to_the_limit_fit_however_they_are_split() {
        let payload: Vec<u8> = (0..MAX_MESSAGE).map(|at| at as u8).collect();
        assert_eq!(
            feed(&frame(0x82, &payload), 4096),
            [Seen::Binary(payload.clone())]
        );
        let (first, second) = payload.split_at(MAX_MESSAGE - 7);
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
        assert_eq!(feed(&over, 4096), [Seen::Error(FrameError::TooBig)]);
        let announced = [0x82, 0xff, 0, 0, 0, 0, 0, 2, 0, 1];
        assert_eq!(all(&announced), [Seen::Error(FrameError::TooBig)]);
    }

    #[test]
    fn protocol_errors_fail_the_connection() {
        use FrameError::*;
        for (bytes, error) in [
            (frame(0xc1, b"x"), ReservedBit),
            (frame(0xa1, b"x"), ReservedBit),
            (frame(0x91, b"x"), ReservedBit),
            (frame(0x83, b""), Opcode),
            (frame(0x8b, b""), Opcode),
            (frame(0x80, b"no start"), Continuation),
            (frame(0x00, b""), Continuation),
            ([frame(0x01, b"a"), frame(0x81, b"b")].concat(), Unfinished),
            (frame(0x09, b""), Control),
            (frame(0x08, b""), Control),
            (frame(0x89, &[0; 126]), Control),
            (frame(0x88, &[3]), CloseCode),
            (frame(0x88, &999u16.to_be_bytes()), CloseCode),
            (frame(0x88, &1005u16.to_be_bytes()), CloseCode),
            (frame(0x88, &1006u16.to_be_bytes()), CloseCode),
            (frame(0x88, &2999u16.to_be_bytes()), CloseCode),
            (frame(0x88, &5000u16.to_be_bytes()), CloseCode),
            (vec![0x81, 0x01, b'x'], Unmasked),
            (vec![0x82, 0xfe, 0, 125, 0, 0, 0, 0], Length),
            (
                vec![0x82, 0xff, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0],
                Length,
            ),
            (
                vec![0x82, 0xff, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
                Length,
            ),
        ] {
            assert_eq!(all(&bytes).last(), Some(&Seen::Error(error)), "{bytes:x?}");
            assert_eq!(error.close_code(), super::CloseCode::ProtocolError);
        }
        assert_eq!(Utf8.close_code() as u16, 1007);
        assert_eq!(TooBig.close_code() as u16, 1009);
    }

    #[test]
    fn many_small_frames_do_not_move_what_follows_them() {
        let mut buffer = frame(0x01, b"");
        while buffer.len() + 16 < BUFFER {
            buffer.extend(frame(0x00, b""));
        }
        let ping = buffer.len() + 6;
        buffer.extend(frame(0x89, b"ping"));
        let (all, mut filled) = (buffer.len(), buffer.len());
        let mut decoder = Decoder::default();
        let event = decoder.next(&mut buffer, &mut filled);
        assert_eq!((event, filled), (Event::Ping(ping..all), all));
        assert_eq!(decoder.next(&mut buffer, &mut filled), Event::Incomplete);
        assert_eq!((filled, decoder.next), (0, 0));
    }

    #[test]
    fn a_payload_stays_where_it_is_until_the_next_call() {
        let mut bytes = [
            frame(0x82, b"one"),
            frame(0x89, b"two"),
            frame(0x82, b"three"),
        ]
        .concat();
        let mut filled = bytes.len() - 1;
        let mut decoder = Decoder::default();
        assert_eq!(decoder.next(&mut bytes, &mut filled), Event::Binary(6..9));
        assert_eq!(decoder.next(&mut bytes, &mut filled), Event::Ping(15..18));
        assert_eq!((&bytes[15..18], filled), (&b"two"[..], 28));
        assert_eq!(decoder.next(&mut bytes, &mut filled), Event::Incomplete);
        assert_eq!(filled, 10);
        bytes[filled] = b'e' ^ 0x37;
        filled += 1;
        assert_eq!(decoder.next(&mut bytes, &mut filled), Event::Binary(6..11));
        assert_eq!(&bytes[6..11], b"three");
    }

    #[test]
    fn texts_and_reasons_must_be_utf8() {
        assert_eq!(all(&frame(0x81, b"\xff")), [Seen::Error(FrameError::Utf8)]);
        assert_eq!(
            all(&frame(0x81, b"\xed\xa0\x80")),
            [Seen::Error(FrameError::Utf8)]
        );
        let split = [frame(0x01, b"\xf0\x9f"), frame(0x80, b"\x90")].concat();
        assert_eq!(all(&split), [Seen::Error(FrameError::Utf8)]);
        assert_eq!(
            all(&frame(0x88, b"\x03\xe8\xff")),
            [Seen::Error(FrameError::Utf8)]
        );
    }

    #[test]
    fn a_close_frame_has_its_code() {
        assert_eq!(all(&frame(0x88, b"")), [Seen::Close(None)]);
        assert_eq!(all(&frame(0x88, b"\x03\xe8bye")), [Seen::Close(Some(1000))]);
        assert_eq!(
            all(&frame(0x88, &4999u16.to_be_bytes())),
            [Seen::Close(Some(4999))]
        );
    }

    #[test]
    fn headers_are_as_short_as_the_length_allows() {
        let header = |opcode, length| FrameHeader::new(opcode, length).bytes.to_vec();
        assert_eq!(header(Opcode::Text, 5), [0x81, 5]);
        assert_eq!(header(Opcode::Binary, 125), [0x82, 125]);
        assert_eq!(header(Opcode::Binary, 126), [0x82, 126, 0, 126]);
        assert_eq!(header(Opcode::Binary, 65_535), [0x82, 126, 255, 255]);
        assert_eq!(
            header(Opcode::Binary, 65_536),
            [0x82, 127, 0, 0, 0, 0, 0, 1, 0, 0]
        );
        assert_eq!(header(Opcode::Pong, 0), [0x8a, 0]);
    }

    #[test]
    fn a_close_frame_has_a_code_and_a_reason_that_fits() {
        assert_eq!(CloseFrame::echo(None).as_bytes(), [0x88, 0]);
        assert_eq!(
            CloseFrame::echo(Some(4000)).as_bytes(),
            [0x88, 2, 0x0f, 0xa0]
        );
        let frame = CloseFrame::new(CloseCode::Normal, "");
        assert_eq!(frame.as_bytes(), [0x88, 2, 3, 0xe8]);
        let frame = CloseFrame::new(CloseCode::PolicyViolation, "cols: no");
        assert_eq!(frame.as_bytes(), b"\x88\x0a\x03\xf0cols: no");
        let longest = "x".repeat(MAX_REASON);
        let frame = CloseFrame::new(CloseCode::PolicyViolation, &longest);
        assert_eq!(&frame.as_bytes()[..4], [0x88, 125, 3, 0xf0]);
        assert_eq!(&frame.as_bytes()[4..], longest.as_bytes());
        for character in ["x", "é", "€", "🐦"] {
            let reason = format!("a{}", character.repeat(MAX_REASON));
            let frame = CloseFrame::new(CloseCode::PolicyViolation, &reason);
            let [_, length, _, _, shown @ ..] = frame.as_bytes() else {
                panic!("no close frame");
            };
            let shown = str::from_utf8(shown).unwrap();
            assert!(shown.ends_with('…') && usize::from(*length) == shown.len() + 2);
            assert!(shown.len() > MAX_REASON - 4 && shown.len() <= MAX_REASON);
        }
    }
}
