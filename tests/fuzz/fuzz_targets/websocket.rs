//! WebSocket frames: however the bytes are split, the same messages are found, and they are those
//! that a simple decoder for RFC 6455 section 5 finds.
#![no_main]

use std::cell::RefCell;
use std::ops::Range;

use libfuzzer_sys::fuzz_target;
use proto::websocket::{BUFFER, CloseCode, Decoder, Event, MAX_MESSAGE, MAX_REASON};

#[derive(Debug, PartialEq)]
enum Seen {
    Text(Vec<u8>),
    Binary(Vec<u8>),
    Ping(Vec<u8>),
    Pong,
    Close(Option<u16>),
    Error(CloseCode),
}

thread_local! {
    static MEMORY: RefCell<Vec<u8>> = RefCell::new(vec![0; BUFFER]);
}

fn decoded(bytes: &[u8], step: usize) -> Vec<Seen> {
    MEMORY.with_borrow_mut(|buffer| {
        let (mut filled, mut decoder, mut seen) = (0, Decoder::default(), vec![]);
        for piece in bytes.chunks(step) {
            buffer[filled..filled + piece.len()].copy_from_slice(piece);
            filled += piece.len();
            loop {
                let before = filled;
                let event = decoder.next(buffer, &mut filled);
                assert!(filled <= before);
                let payload = |range: Range<usize>| {
                    assert!(range.end <= filled);
                    buffer[range].to_vec()
                };
                seen.push(match event {
                    Event::Incomplete => break,
                    Event::Text(range) => {
                        let text = payload(range);
                        assert!(std::str::from_utf8(&text).is_ok());
                        Seen::Text(text)
                    }
                    Event::Binary(range) => Seen::Binary(payload(range)),
                    Event::Ping(range) => Seen::Ping(payload(range)),
                    Event::Pong => Seen::Pong,
                    Event::Close(code) => Seen::Close(code),
                    Event::Error(error) => {
                        assert!(error.message().len() <= MAX_REASON);
                        seen.push(Seen::Error(error.close_code()));
                        return seen;
                    }
                });
                // Bytes after a close frame are ignored.
                if let Some(Seen::Close(_)) = seen.last() {
                    return seen;
                }
            }
        }
        seen
    })
}

/// The simple decoder: for all bytes at once, copying everything.
fn expected(mut bytes: &[u8]) -> Vec<Seen> {
    let mut seen = vec![];
    let mut message: Option<(u8, Vec<u8>)> = None;
    loop {
        match frame(&mut bytes, &mut message) {
            Ok(None) => return seen,
            Ok(Some(None)) => {}
            Ok(Some(Some(event))) => {
                seen.push(event);
                if let Some(Seen::Close(_)) = seen.last() {
                    return seen;
                }
            }
            Err(code) => {
                seen.push(Seen::Error(code));
                return seen;
            }
        }
    }
}

/// One frame: `None` if it is incomplete, and `Some(None)` if it does not complete a message.
fn frame(
    bytes: &mut &[u8],
    message: &mut Option<(u8, Vec<u8>)>,
) -> Result<Option<Option<Seen>>, CloseCode> {
    let [first, second, ..] = **bytes else {
        return Ok(None);
    };
    let (fin, opcode, short) = (first & 0x80 != 0, first & 15, second & 0x7f);
    let right = match opcode {
        0 => message.is_some(),
        1 | 2 => message.is_none(),
        8..=10 => fin && short < 126,
        _ => false,
    };
    if first & 0x70 != 0 || second & 0x80 == 0 || !right {
        return Err(CloseCode::ProtocolError);
    }
    let (length, head) = match short {
        126 => match bytes.get(2..4) {
            Some(length) => (u64::from(u16::from_be_bytes([length[0], length[1]])), 4),
            None => return Ok(None),
        },
        127 => match bytes.get(2..10) {
            Some(length) => (u64::from_be_bytes(length.try_into().unwrap()), 10),
            None => return Ok(None),
        },
        short => (u64::from(short), 2),
    };
    if (short == 126 && length < 126) || (short == 127 && !(0x1_0000..1 << 63).contains(&length)) {
        return Err(CloseCode::ProtocolError);
    }
    let so_far = match message {
        Some((_, so_far)) if opcode < 8 => so_far.len(),
        _ => 0,
    };
    if length + so_far as u64 > MAX_MESSAGE as u64 {
        return Err(CloseCode::MessageTooBig);
    }
    let Some(masked) = bytes.get(head..head + 4 + length as usize) else {
        return Ok(None);
    };
    *bytes = &bytes[head + 4 + length as usize..];
    let (mask, payload) = masked.split_at(4);
    let payload: Vec<u8> = payload
        .iter()
        .enumerate()
        .map(|(at, byte)| byte ^ mask[at % 4])
        .collect();
    let event = match opcode {
        9 => Seen::Ping(payload),
        10 => Seen::Pong,
        8 => match payload.as_slice() {
            [] => Seen::Close(None),
            [_] => return Err(CloseCode::ProtocolError),
            [high, low, reason @ ..] => {
                let code = u16::from_be_bytes([*high, *low]);
                if !matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999) {
                    return Err(CloseCode::ProtocolError);
                }
                std::str::from_utf8(reason).map_err(|_| CloseCode::InvalidPayload)?;
                Seen::Close(Some(code))
            }
        },
        _ => {
            let (kind, whole) = message.get_or_insert((opcode, vec![]));
            whole.extend(payload);
            if !fin {
                return Ok(Some(None));
            }
            let (kind, whole) = (*kind, std::mem::take(whole));
            *message = None;
            if kind == 2 {
                Seen::Binary(whole)
            } else if std::str::from_utf8(&whole).is_ok() {
                Seen::Text(whole)
            } else {
                return Err(CloseCode::InvalidPayload);
            }
        }
    };
    Ok(Some(Some(event)))
}

// The first byte is the size of the pieces.
fuzz_target!(|data: &[u8]| {
    if let [step, bytes @ ..] = data {
        let expected = expected(bytes);
        assert_eq!(decoded(bytes, usize::MAX), expected);
        assert_eq!(decoded(bytes, 1), expected);
        assert_eq!(decoded(bytes, usize::from(*step).max(1)), expected);
    }
});
