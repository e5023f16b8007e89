//! HTTP/1.1 for the API (RFC 9110, RFC 9112): request heads, bodies, response heads.
//!
//! A connection reads a request in two steps, [`HeadParser`] and then [`BodyDecoder`], over a buffer
//! of its own, and answers with a [`ResponseHead`]. Which paths there are is not decided here.

mod body;
mod head;
mod response;
mod target;

pub use body::{BodyDecoder, Decoded, MAX_CHUNK_LINE, MAX_TRAILER};
pub use head::{Accept, Framing, Head, HeadParser, MAX_HEAD, MAX_HEADERS, Method};
pub use response::{CONTINUE, ChunkHeader, Content, LAST_CHUNK, Reply, ResponseHead};
pub use target::{DecodeError, Target, decode_path, decode_query};

/// Status codes the API answers with (RFC 9110 section 15).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Status {
    SwitchingProtocols = 101,
    Ok = 200,
    Created = 201,
    NoContent = 204,
    PartialContent = 206,
    BadRequest = 400,
    Forbidden = 403,
    NotFound = 404,
    MethodNotAllowed = 405,
    RequestTimeout = 408,
    Conflict = 409,
    LengthRequired = 411,
    ContentTooLarge = 413,
    ExpectationFailed = 417,
    UpgradeRequired = 426,
    RequestHeaderFieldsTooLarge = 431,
    InternalServerError = 500,
    NotImplemented = 501,
    BadGateway = 502,
    ServiceUnavailable = 503,
    GatewayTimeout = 504,
    HttpVersionNotSupported = 505,
    InsufficientStorage = 507,
}

impl Status {
    /// The status code.
    pub fn code(self) -> u16 {
        self as u16
    }

    /// The reason phrase.
    pub fn reason(self) -> &'static str {
        match self {
            Self::SwitchingProtocols => "Switching Protocols",
            Self::Ok => "OK",
            Self::Created => "Created",
            Self::NoContent => "No Content",
            Self::PartialContent => "Partial Content",
            Self::BadRequest => "Bad Request",
            Self::Forbidden => "Forbidden",
            Self::NotFound => "Not Found",
            Self::MethodNotAllowed => "Method Not Allowed",
            Self::RequestTimeout => "Request Timeout",
            Self::Conflict => "Conflict",
            Self::LengthRequired => "Length Required",
            Self::ContentTooLarge => "Content Too Large",
            Self::ExpectationFailed => "Expectation Failed",
            Self::UpgradeRequired => "Upgrade Required",
            Self::RequestHeaderFieldsTooLarge => "Request Header Fields Too Large",
            Self::InternalServerError => "Internal Server Error",
            Self::NotImplemented => "Not Implemented",
            Self::BadGateway => "Bad Gateway",
            Self::ServiceUnavailable => "Service Unavailable",
            Self::GatewayTimeout => "Gateway Timeout",
            Self::HttpVersionNotSupported => "HTTP Version Not Supported",
            Self::InsufficientStorage => "Insufficient Storage",
        }
    }
}

/// A request that cannot be understood. It is answered with [`status`](Self::status) and
/// [`message`](Self::message); then the connection is closed, as nobody knows where the next request
/// would start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestError {
    /// A line ends with LF alone, or has a CR within it.
    LineEnd,
    /// A head over [`MAX_HEAD`] bytes or [`MAX_HEADERS`] header lines.
    LongHead,
    /// The request line is not `method SP request-target SP HTTP-version`.
    RequestLine,
    /// A version other than HTTP/1.0 and HTTP/1.1.
    Version,
    /// The request target has none of the forms of RFC 9112 section 3.2.
    RequestTarget,
    /// A header line that is malformed or folded.
    Header,
    /// No Host header, more than one, or an impossible one (RFC 9112 section 3.2).
    Host,
    /// Content-Length is no number, or several that differ.
    ContentLength,
    /// Content-Length and Transfer-Encoding together.
    TwoFramings,
    /// Transfer-Encoding from an HTTP/1.0 client.
    Http10Encoding,
    /// A transfer encoding other than `chunked`.
    UnknownEncoding,
    /// More than one transfer encoding, or an empty list of them.
    EncodingList,
    /// CONNECT with a body, which has no meaning (RFC 9110 section 9.3.6).
    ConnectBody,
    /// A body longer than is accepted.
    LargeBody,
    /// An expectation other than `100-continue`.
    Expectation,
    /// A chunk size that is malformed, or an extension behind it.
    ChunkSize,
    /// Chunk data that is longer than its size says.
    ChunkEnd,
    /// A chunk's size with its extensions over [`MAX_CHUNK_LINE`] bytes.
    LongChunkLine,
    /// A trailer line that is malformed.
    Trailer,
    /// Trailers over [`MAX_TRAILER`] bytes.
    LongTrailer,
}

impl RequestError {
    /// The status of the response.
    pub fn status(self) -> Status {
        match self {
            Self::LineEnd
            | Self::RequestLine
            | Self::RequestTarget
            | Self::Header
            | Self::Host
            | Self::ContentLength
            | Self::TwoFramings
            | Self::Http10Encoding
            | Self::EncodingList
            | Self::ConnectBody
            | Self::ChunkSize
            | Self::ChunkEnd
            | Self::Trailer => Status::BadRequest,
            Self::LargeBody => Status::ContentTooLarge,
            Self::Expectation => Status::ExpectationFailed,
            Self::LongHead | Self::LongChunkLine | Self::LongTrailer => {
                Status::RequestHeaderFieldsTooLarge
            }
            Self::UnknownEncoding => Status::NotImplemented,
            Self::Version => Status::HttpVersionNotSupported,
        }
    }

    /// What is wrong, for the response's body.
    pub fn message(self) -> &'static str {
        match self {
            Self::LineEnd => "a line does not end with CRLF",
            Self::LongHead => "the head is over 16 KiB or 64 header lines",
            Self::RequestLine => "the request line is malformed",
            Self::Version => "the version is not HTTP/1.0 or HTTP/1.1",
            Self::RequestTarget => "the request target is malformed",
            Self::Header => "a header line is malformed",
            Self::Host => "there must be one valid Host header",
            Self::ContentLength => "Content-Length is not one number",
            Self::TwoFramings => "both Content-Length and Transfer-Encoding",
            Self::Http10Encoding => "HTTP/1.0 has no Transfer-Encoding",
            Self::UnknownEncoding => "the only transfer encoding is chunked",
            Self::EncodingList => "there must be one transfer encoding",
            Self::ConnectBody => "CONNECT has no body",
            Self::LargeBody => "the body is too large",
            Self::Expectation => "the only expectation is 100-continue",
            Self::ChunkSize => "a chunk size is malformed",
            Self::ChunkEnd => "a chunk does not end with CRLF",
            Self::LongChunkLine => "a chunk size line is over 4 KiB",
            Self::Trailer => "a trailer line is malformed",
            Self::LongTrailer => "the trailers are over 16 KiB",
        }
    }
}

/// Whether it can stand in a token (RFC 9110 section 5.6.2).
fn is_token_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// Whether it can stand in a header value (RFC 9110 section 5.5): no control character but tab.
fn is_value_byte(byte: u8) -> bool {
    byte == b'\t' || !byte.is_ascii_control()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_have_their_code_and_reason() {
        assert_eq!(Status::Ok.code(), 200);
        assert_eq!(Status::Ok.reason(), "OK");
        assert_eq!(Status::InsufficientStorage.code(), 507);
        assert_eq!(Status::MethodNotAllowed.reason(), "Method Not Allowed");
    }

    #[test]
    fn each_request_error_has_its_status_and_message() {
        for (error, status, message) in [
            (RequestError::LineEnd, 400, "a line does not end with CRLF"),
            (RequestError::LargeBody, 413, "the body is too large"),
            (
                RequestError::LongTrailer,
                431,
                "the trailers are over 16 KiB",
            ),
        ] {
            assert_eq!((error.status().code(), error.message()), (status, message));
        }
    }

    #[test]
    fn the_limits_named_in_messages_are_those_that_hold() {
        assert_eq!((MAX_HEAD, MAX_HEADERS), (16 << 10, 64));
        assert_eq!((MAX_CHUNK_LINE, MAX_TRAILER), (4 << 10, 16 << 10));
    }

    const LIMIT: usize = 128 << 10;
    const BUFFER: usize = MAX_HEAD + LIMIT + (4 << 10);

    /// Reads requests as a connection does: over one buffer, in pieces of at most `step` bytes. Their
    /// paths and bodies, and the error after them.
    fn read(mut bytes: &[u8], step: usize) -> (Vec<(String, Vec<u8>)>, Option<RequestError>) {
        let mut requests = Vec::new();
        let mut buffer = vec![0; BUFFER];
        let mut filled = 0;
        let mut parser = HeadParser::default();
        // The path, where the body starts, where what is decoded of it ends.
        let mut body: Option<(String, usize, usize, BodyDecoder)> = None;
        loop {
            if let Some((path, start, end, decoder)) = &mut body {
                let decoded = match decoder.decode(&mut buffer[*end..filled]) {
                    Ok(decoded) => decoded,
                    Err(error) => return (requests, Some(error)),
                };
                let next = *end + decoded.consumed;
                *end += decoded.content;
                if decoder.is_complete() {
                    requests.push((core::mem::take(path), buffer[*start..*end].to_vec()));
                    buffer.copy_within(next..filled, 0);
                    filled -= next;
                    body = None;
                    continue;
                }
                filled = *end;
            } else {
                let decoder = |head: Head<'_>| {
                    let Target::Resource { path, .. } = head.target else {
                        panic!("no path");
                    };
                    let decoder = BodyDecoder::new(head.framing, LIMIT as u64)?;
                    Ok(Some((path.to_owned(), head.length, head.length, decoder)))
                };
                body = match parser.parse(&buffer[..filled]) {
                    Ok(head) => match head.map_or(Ok(None), decoder) {
                        Ok(body) => body,
                        Err(error) => return (requests, Some(error)),
                    },
                    Err(error) => return (requests, Some(error)),
                };
                if body.is_some() {
                    continue;
                }
            }
            let count = step.min(bytes.len()).min(BUFFER - filled);
            if bytes.is_empty() {
                return (requests, None);
            }
            assert!(count > 0, "the buffer is too small for a legal request");
            buffer[filled..filled + count].copy_from_slice(&bytes[..count]);
            filled += count;
            bytes = &bytes[count..];
        }
    }

    #[test]
    fn pipelined_requests_come_one_after_the_other() {
        let text = "GET /a HTTP/1.1\r\nHost: x\r\n\r\n\
            POST /b HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}\
            POST /c HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n\
            3\r\nabc\r\n0A;a=b\r\n0123456789\r\n0\r\nTrailer: y\r\n\r\n\
            GET /d HTTP/1.1\r\nHost: x\r\n\r\nGET /e HTTP/3\r\n\r\n";
        for step in [1, 3, 1000] {
            let (requests, error) = read(text.as_bytes(), step);
            let seen: Vec<_> = requests
                .iter()
                .map(|(path, body)| (path.as_str(), &body[..]))
                .collect();
            assert_eq!(
                seen,
                [
                    ("/a", &b""[..]),
                    ("/b", b"{}"),
                    ("/c", b"abc0123456789"),
                    ("/d", b"")
                ]
            );
            assert_eq!(error, Some(RequestError::Version));
        }
    }

    #[test]
    fn the_longest_head_body_and_trailers_fit_in_the_buffer_together() {
        let start = "POST /v1/exec HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nA: ";
        let head = format!("{start}{}\r\n\r\n", "a".repeat(MAX_HEAD - start.len() - 4));
        let body: Vec<u8> = (0..LIMIT).map(|at| at as u8).collect();
        let mut text = head.into_bytes();
        for chunk in body.chunks(10) {
            text.extend(format!("{:x};{}\r\n", chunk.len(), "e".repeat(50)).bytes());
            text.extend(chunk);
            text.extend(b"\r\n");
        }
        let trailers = format!("T: {}\r\n", "t".repeat(9 << 10));
        text.extend(format!("0;{}\r\n{trailers}\r\n", "e".repeat(MAX_CHUNK_LINE - 2)).bytes());
        for step in [777, 16 << 10, usize::MAX] {
            let (requests, error) = read(&text, step);
            assert_eq!((requests.len(), error), (1, None));
            assert!(requests[0].1 == body);
        }
    }
}
