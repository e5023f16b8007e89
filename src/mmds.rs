//! Firecracker's metadata service: its requests, and its answers.
//!
//! The service (docs/mmds in Firecracker) answers with an empty reason phrase, always gives a
//! Content-Length, never sends chunks and never closes first: a reader stops at the length.

use crate::bytes::decimal;
use core::net::Ipv4Addr;

/// Where the service listens, on port 80.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// What the guest calls itself while it asks.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 1);
/// Prefix length of [`GUEST`].
pub const PREFIX: u8 = 16;

/// Asks for a session token (V2).
pub const TOKEN_REQUEST: &[u8] = b"PUT /latest/api/token HTTP/1.1\r\nHost: 169.254.169.254\r\n\
    X-metadata-token-ttl-seconds: 60\r\nContent-Length: 0\r\n\r\n";
/// Asks for the whole document, up to where a V2 session adds its token.
const DOCUMENT_REQUEST: &[u8] =
    b"GET / HTTP/1.1\r\nHost: 169.254.169.254\r\nAccept: application/json\r\n";
const TOKEN_HEADER: &[u8] = b"X-metadata-token: ";

/// Longest token taken; Firecracker's has 48 characters.
pub const TOKEN: usize = 256;
/// Longest response head.
pub const HEAD: usize = 4096;

/// A request for the whole document, with the token of a V2 session.
pub fn document_request(token: Option<&[u8]>) -> heapless::Vec<u8, 512> {
    let mut request = heapless::Vec::new();
    let mut put = |bytes: &[u8]| {
        let fits = request.extend_from_slice(bytes);
        debug_assert!(fits.is_ok());
    };
    put(DOCUMENT_REQUEST);
    if let Some(token) = token {
        put(TOKEN_HEADER);
        put(token.get(..TOKEN).unwrap_or(token));
        put(b"\r\n");
    }
    put(b"\r\n");
    request
}

/// The token of a response's body; `None` when it cannot stand in a header.
pub fn token(body: &[u8]) -> Option<heapless::Vec<u8, TOKEN>> {
    let body = body.trim_ascii();
    if body.is_empty() || !body.iter().all(u8::is_ascii_graphic) {
        return None;
    }
    heapless::Vec::from_slice(body).ok()
}

/// Why an answer is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Not HTTP/1.
    Malformed,
    /// A head over [`HEAD`] bytes.
    LongHead,
    /// No Content-Length, or two that differ.
    NoLength,
}

/// The head of a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// The status code.
    pub status: u16,
    /// Length of the head in bytes.
    pub length: usize,
    /// Length of the body in bytes.
    pub body: usize,
}

/// Reads a response's head; `Ok(None)` when it has not come whole.
pub fn head(bytes: &[u8]) -> Result<Option<Head>, Fault> {
    const VERSION: &[u8] = b"HTTP/1.";
    if bytes
        .iter()
        .zip(VERSION)
        .any(|(byte, wanted)| byte != wanted)
    {
        return Err(Fault::Malformed);
    }
    let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else {
        return if bytes.len() < HEAD {
            Ok(None)
        } else {
            Err(Fault::LongHead)
        };
    };
    let mut lines = bytes
        .get(..end)
        .unwrap_or(&[])
        .split(|byte| *byte == b'\n')
        .map(<[u8]>::trim_ascii);
    // HTTP/1.1 200 [reason]
    let mut words = lines.next().unwrap_or(&[]).split(|byte| *byte == b' ');
    let status = words
        .nth(1)
        .filter(|digits| digits.len() == 3)
        .and_then(decimal);
    let status = status.ok_or(Fault::Malformed)? as u16;
    let mut body = None;
    for line in lines {
        let mut halves = line.splitn(2, |byte| *byte == b':');
        let (Some(name), Some(value)) = (halves.next(), halves.next()) else {
            return Err(Fault::Malformed);
        };
        if name.eq_ignore_ascii_case(b"content-length") {
            let value = decimal(value.trim_ascii()).ok_or(Fault::NoLength)? as usize;
            if body.is_some_and(|earlier| earlier != value) {
                return Err(Fault::NoLength);
            }
            body = Some(value);
        }
    }
    Ok(Some(Head {
        status,
        length: end + 4,
        body: body.ok_or(Fault::NoLength)?,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEASURED: &[u8] =
        b"HTTP/1.1 200 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\
        Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}";

    #[test]
    fn an_answer_with_an_empty_reason_phrase_is_read() {
        let head = head(MEASURED).unwrap().unwrap();
        assert_eq!((head.status, head.body), (200, 2));
        assert_eq!(&MEASURED[head.length..], b"{}");
    }

    #[test]
    fn an_answer_may_come_a_byte_at_a_time() {
        let whole = head(MEASURED).unwrap().unwrap().length;
        for end in 0..whole {
            assert_eq!(head(&MEASURED[..end]), Ok(None), "{end}");
        }
    }

    #[test]
    fn an_answer_whose_end_is_not_known_is_refused() {
        assert_eq!(head(b"HTTP/1.1 200 OK\r\n\r\n"), Err(Fault::NoLength));
        for bad in ["-1", "x", "99999999999999999999999", "1, 1", ""] {
            let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {bad}\r\n\r\n");
            assert_eq!(head(answer.as_bytes()), Err(Fault::NoLength), "{bad}");
        }
        let two = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n";
        assert_eq!(head(two), Err(Fault::NoLength));
    }

    #[test]
    fn what_is_not_http_or_has_no_end_is_refused() {
        assert_eq!(head(b"SSH-2.0-x\r\n\r\n"), Err(Fault::Malformed));
        let endless = [b"HTTP/1.1 200 OK\r\nX: ", vec![b'x'; HEAD].as_slice()].concat();
        assert_eq!(head(&endless), Err(Fault::LongHead));
        assert_eq!(
            head(b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n"),
            Err(Fault::Malformed)
        );
        assert_eq!(head(b"HTTP/1.1 2000 OK\r\n\r\n"), Err(Fault::Malformed));
    }

    #[test]
    fn a_token_goes_into_the_request_and_a_strange_one_does_not() {
        let token = token(b"q83vEjRWeJCrze8SNFZ4kKvN7xI0VniQq83vEjRWeJCrze8S\n").unwrap();
        let request = document_request(Some(&token));
        assert!(request.ends_with(
            b"\r\nX-metadata-token: q83vEjRWeJCrze8SNFZ4kKvN7xI0VniQq83vEjRWeJCrze8S\r\n\r\n"
        ));
        assert!(
            !document_request(None)
                .windows(5)
                .any(|part| part == b"token")
        );
        for strange in [&b""[..], b"a\r\nX: y", b"a b", &[b'a'; TOKEN + 1]] {
            assert_eq!(super::token(strange), None);
        }
        let longest = super::token(&[b'a'; TOKEN]).unwrap();
        assert!(document_request(Some(&longest)).ends_with(b"\r\n\r\n"));
    }
}
