//! Firecracker's metadata service: its requests, and its answers.
//!
//! The service (docs/mmds in Firecracker) answers with an empty reason phrase, always gives a
//! Content-Length, never sends chunks and never closes first: a reader stops at the length.

use crate::bytes::{before, decimal, same_word, split, trim};
use crate::http::HeaderLine;
use core::fmt::{self, Display};
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

/// A request: at most this long.
pub type Request = heapless::Vec<u8, 512>;

/// A request for the whole document, with the token of a V2 session.
pub fn document_request(token: Option<&[u8]>, request: &mut Request) {
    request.clear();
    let (name, token, end) = match token {
        Some(token) => (TOKEN_HEADER, token, &b"\r\n"[..]),
        None => (&b""[..], &b""[..], &b""[..]),
    };
    for part in &[DOCUMENT_REQUEST, name, token, end, b"\r\n"] {
        let fits = request.extend_from_slice(part);
        debug_assert!(fits.is_ok());
    }
}

/// The token of a response's body; `None` when it cannot stand in a header.
pub fn token(body: &[u8]) -> Option<&[u8]> {
    let body = trim(body);
    let fits = (1..=TOKEN).contains(&body.len()) && body.iter().all(u8::is_ascii_graphic);
    fits.then_some(body)
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

impl Display for Fault {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Malformed => "an answer that is not HTTP",
            Self::LongHead => "an answer's header is too long",
            Self::NoLength => "an answer without a length",
        })
    }
}

/// The head of a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// The status code.
    pub status: u16,
    /// Length of the head in bytes.
    pub length: u16,
    /// Length of the body in bytes.
    pub body: u32,
}

/// Reads a response's head; `Ok(None)` when it has not come whole.
pub fn head(bytes: &[u8]) -> Result<Option<Head>, Fault> {
    const VERSION: &[u8] = b"HTTP/1.";
    let version = bytes.get(..VERSION.len()).unwrap_or(bytes);
    if !VERSION.starts_with(version) {
        return Err(Fault::Malformed);
    }
    let head = bytes.get(..HEAD).unwrap_or(bytes);
    let Some(end) = head.windows(4).position(|end| end == b"\r\n\r\n") else {
        return match head.len() {
            HEAD => Err(Fault::LongHead),
            _ => Ok(None),
        };
    };
    let first = before(bytes, b'\n');
    // HTTP/1.1 200 [reason]
    let mut words = split(first, b' ');
    let _version = words.next();
    let status = trim(words.next().unwrap_or(&[]));
    let status = decimal(status).filter(|_| status.len() == 3);
    let status = status.ok_or(Fault::Malformed)? as u16;
    let mut body = None;
    let mut line = HeaderLine::before(bytes.get(first.len() + 1..).unwrap_or(&[]));
    while line.advance().ok_or(Fault::Malformed)? {
        if same_word(line.name, b"content-length") {
            let value = decimal(line.value);
            if value.is_none() || body.is_some() && body != value {
                return Err(Fault::NoLength);
            }
            body = value;
        }
    }
    Ok(Some(Head {
        status,
        length: end as u16 + 4,
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
        assert_eq!(&MEASURED[usize::from(head.length)..], b"{}");
    }

    #[test]
    fn an_answer_may_come_a_byte_at_a_time() {
        let whole = usize::from(head(MEASURED).unwrap().unwrap().length);
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

    fn requested(token: Option<&[u8]>) -> Request {
        let mut request = Request::new();
        document_request(token, &mut request);
        request
    }

    #[test]
    fn a_token_goes_into_the_request_and_a_strange_one_does_not() {
        let token = token(b"q83vEjRWeJCrze8SNFZ4kKvN7xI0VniQq83vEjRWeJCrze8S\n").unwrap();
        let request = requested(Some(token));
        assert!(request.ends_with(
            b"\r\nX-metadata-token: q83vEjRWeJCrze8SNFZ4kKvN7xI0VniQq83vEjRWeJCrze8S\r\n\r\n"
        ));
        assert!(!requested(None).windows(5).any(|part| part == b"token"));
        for strange in [&b""[..], b"a\r\nX: y", b"a b", &[b'a'; TOKEN + 1]] {
            assert_eq!(super::token(strange), None);
        }
        let longest = &[b'a'; TOKEN];
        assert_eq!(super::token(longest), Some(&longest[..]));
        assert!(requested(Some(longest)).ends_with(b"\r\n\r\n"));
    }
}
