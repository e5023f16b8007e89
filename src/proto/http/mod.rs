//! HTTP/1.1 for the API (RFC 9110, RFC 9112): request heads, bodies, response heads.
//!
//! A connection reads a request in two steps, [`HeadParser`] and then [`BodyDecoder`], in its own buffer, and
//! responds with a [`ResponseHead`]. Routing is not done here.

mod body;
mod error;
mod head;
mod response;
mod status;
mod target;

pub use body::{BodyDecoder, Decoded, MAX_CHUNK_LINE, MAX_TRAILER};
pub use error::RequestError;
pub use head::{Framing, Head, HeadParser, MAX_HEAD, MAX_HEADERS, Method};
pub use response::{
    CONTINUE, Content, HEAD_ROOM, JSON, LAST_CHUNK, NO_ROOM, Reply, ResponseHead, websocket_accept,
};
pub use status::Status;
pub use target::{DecodeError, Target, decode_query};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_request_error_has_its_status_and_message() {
        for (error, status, message) in [
            (
                RequestError::LineEnd,
                "400 Bad Request",
                "a line does not end with CRLF",
            ),
            (
                RequestError::LargeBody,
                "413 Content Too Large",
                "the body is too large",
            ),
            (
                RequestError::LongTrailer,
                "431 Request Header Fields Too Large",
                "the trailers are over 16 KiB",
            ),
        ] {
            assert_eq!(error.status().to_string(), status);
            assert_eq!(error.message(), message);
        }
    }

    #[test]
    fn messages_name_the_actual_limits() {
        assert_eq!((MAX_HEAD, MAX_HEADERS), (16 << 10, 64));
        assert_eq!((MAX_CHUNK_LINE, MAX_TRAILER), (4 << 10, 16 << 10));
    }

    const LIMIT: usize = 128 << 10;
    const BUFFER: usize = MAX_HEAD + LIMIT + (4 << 10);

    /// Reads requests as a connection does: in one buffer, in pieces of at most `step` bytes. Returns their
    /// paths and bodies, and the error after them.
    fn read(mut bytes: &[u8], step: usize) -> (Vec<(String, Vec<u8>)>, Option<RequestError>) {
        let mut requests = Vec::new();
        let mut buffer = vec![0; BUFFER];
        let mut filled = 0;
        let mut parser = HeadParser::default();
        // The path, the start of the body, and the end of its decoded part.
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
    fn pipelined_requests_are_read_in_order() {
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
