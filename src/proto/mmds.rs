//! Firecracker's metadata service (MMDS): requests and response heads.
//!
//! The service (docs/mmds in Firecracker) responds with an empty reason phrase and always a Content-Length,
//! never sends chunks and never closes first: a reader stops at the length.

use crate::decimal;
use core::fmt::{self, Display};
use core::net::Ipv4Addr;

/// The address of the service, on port 80.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// The guest's address while it uses the service.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 1);
/// Prefix length of [`GUEST`].
pub const PREFIX: u8 = 16;

/// Requests a session token (V2).
pub const TOKEN_REQUEST: &[u8] = b"PUT /latest/api/token HTTP/1.1\r\nHost: 169.254.169.254\r\n\
    X-metadata-token-ttl-seconds: 60\r\nContent-Length: 0\r\n\r\n";
/// Requests the whole document; a V2 session appends its token.
const DOCUMENT_REQUEST: &[u8] =
    b"GET / HTTP/1.1\r\nHost: 169.254.169.254\r\nAccept: application/json\r\n";
const TOKEN_HEADER: &[u8] = b"X-metadata-token: ";

/// Maximum length of a token in bytes; Firecracker's has 48.
pub const MAX_TOKEN: usize = 256;
/// Maximum length of a response head in bytes; Firecracker's has about 130.
pub const MAX_HEAD: usize = 4096;
/// Maximum number of header lines of a response; Firecracker's has four.
const MAX_HEADERS: usize = 32;

/// Maximum length of a request, with the longest token.
const MAX_REQUEST: usize = 512;

/// A request for the document.
pub type Request = heapless::Vec<u8, MAX_REQUEST>;

const _: () = assert!(
    DOCUMENT_REQUEST.len() + TOKEN_HEADER.len() + MAX_TOKEN + 4 <= MAX_REQUEST,
    "the longest request fits"
);

/// A request for the whole document, with the token of a V2 session; `None` for a token longer than
/// [`MAX_TOKEN`].
pub fn document_request(token: Option<&[u8]>) -> Option<Request> {
    let mut request = Request::from_slice(DOCUMENT_REQUEST).ok()?;
    if let Some(token) = token {
        for part in &[TOKEN_HEADER, token, b"\r\n"] {
            request.extend_from_slice(part).ok()?;
        }
    }
    request.extend_from_slice(b"\r\n").ok()?;
    Some(request)
}

/// The token in a response's body; `None` if it is not a valid header value.
pub fn token(body: &[u8]) -> Option<&[u8]> {
    let body = body.trim_ascii();
    let fits = (1..=MAX_TOKEN).contains(&body.len()) && body.iter().all(u8::is_ascii_graphic);
    fits.then_some(body)
}

/// Why a response is invalid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResponseError {
    /// Not HTTP/1.
    Malformed,
    /// A head over [`MAX_HEAD`] bytes or [`MAX_HEADERS`] header lines.
    LongHead,
    /// No Content-Length, or several that differ.
    ContentLength,
}

impl Display for ResponseError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Malformed => "the response is not HTTP/1",
            Self::LongHead => "the response's head is too long",
            Self::ContentLength => "the response has no valid Content-Length",
        })
    }
}

/// The head of a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// The status code.
    pub status: u16,
    /// Length of the head in bytes, at most [`MAX_HEAD`].
    pub length: usize,
    /// Length of the body in bytes.
    pub content_length: u32,
}

/// Parses a response's head from the bytes received so far; `Ok(None)` if it is incomplete.
pub fn parse_head(bytes: &[u8]) -> Result<Option<Head>, ResponseError> {
    let bytes = bytes.get(..MAX_HEAD).unwrap_or(bytes);
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    let length = match response.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) if bytes.len() < MAX_HEAD => return Ok(None),
        Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => {
            return Err(ResponseError::LongHead);
        }
        Err(_) => return Err(ResponseError::Malformed),
    };
    let mut content_length = None;
    for header in &*response.headers {
        if header.name.eq_ignore_ascii_case("content-length") {
            let value = decimal::parse(header.value);
            if value.is_none() || content_length.is_some() && content_length != value {
                return Err(ResponseError::ContentLength);
            }
            content_length = value;
        }
    }
    Ok(Some(Head {
        status: response.code.ok_or(ResponseError::Malformed)?,
        length,
        content_length: content_length.ok_or(ResponseError::ContentLength)?,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEASURED: &[u8] =
        b"HTTP/1.1 200 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\
        Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}";

    #[test]
    fn a_response_with_an_empty_reason_phrase_is_parsed() {
        // With and without the space before it.
        for start in ["HTTP/1.1 401 \r\n", "HTTP/1.1 401\r\n"] {
            let answer = format!("{start}Content-Length: 0\r\n\r\n");
            assert_eq!(parse_head(answer.as_bytes()).unwrap().unwrap().status, 401);
        }
        let head = parse_head(MEASURED).unwrap().unwrap();
        assert_eq!((head.status, head.content_length), (200, 2));
        assert_eq!(&MEASURED[head.length..], b"{}");
    }

    #[test]
    fn a_response_may_arrive_byte_by_byte() {
        let whole = parse_head(MEASURED).unwrap().unwrap().length;
        for end in 0..whole {
            assert_eq!(parse_head(&MEASURED[..end]), Ok(None), "{end}");
        }
    }

    #[test]
    fn a_response_of_unknown_length_is_refused() {
        assert_eq!(
            parse_head(b"HTTP/1.1 200 OK\r\n\r\n"),
            Err(ResponseError::ContentLength)
        );
        for bad in ["-1", "x", "99999999999999999999999", "1, 1", ""] {
            let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {bad}\r\n\r\n");
            assert_eq!(
                parse_head(answer.as_bytes()),
                Err(ResponseError::ContentLength),
                "{bad}"
            );
        }
        let two = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n";
        assert_eq!(parse_head(two), Err(ResponseError::ContentLength));
    }

    #[test]
    fn what_is_not_http_or_has_no_end_is_refused() {
        assert_eq!(
            parse_head(b"SSH-2.0-x\r\n\r\n"),
            Err(ResponseError::Malformed)
        );
        let many = [
            b"HTTP/1.1 200 OK\r\n",
            "A: b\r\n".repeat(33).as_bytes(),
            b"\r\n",
        ]
        .concat();
        assert_eq!(parse_head(&many), Err(ResponseError::LongHead));
        let endless = [b"HTTP/1.1 200 OK\r\nX: ", vec![b'x'; MAX_HEAD].as_slice()].concat();
        assert_eq!(parse_head(&endless), Err(ResponseError::LongHead));
        assert_eq!(
            parse_head(b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n"),
            Err(ResponseError::Malformed)
        );
        assert_eq!(
            parse_head(b"HTTP/1.1 2000 OK\r\n\r\n"),
            Err(ResponseError::Malformed)
        );
    }

    fn requested(token: Option<&[u8]>) -> Request {
        document_request(token).unwrap()
    }

    #[test]
    fn a_valid_token_is_sent_and_an_invalid_one_is_not() {
        let token = token(b"q83vEjRWeJCrze8SNFZ4kKvN7xI0VniQq83vEjRWeJCrze8S\n").unwrap();
        let request = requested(Some(token));
        assert!(request.ends_with(
            b"\r\nX-metadata-token: q83vEjRWeJCrze8SNFZ4kKvN7xI0VniQq83vEjRWeJCrze8S\r\n\r\n"
        ));
        assert!(!requested(None).windows(5).any(|part| part == b"token"));
        for strange in [&b""[..], b"a\r\nX: y", b"a b", &[b'a'; MAX_TOKEN + 1]] {
            assert_eq!(super::token(strange), None);
        }
        assert_eq!(document_request(Some(&[b'a'; MAX_REQUEST])), None);
        let longest = &[b'a'; MAX_TOKEN];
        assert_eq!(super::token(longest), Some(&longest[..]));
        assert!(requested(Some(longest)).ends_with(b"\r\n\r\n"));
    }
}
