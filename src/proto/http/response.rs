//! Response heads (RFC 9112 section 4).

use super::status::Status;
use crate::bytes::{SliceWriter, copy};
use crate::digest;
use core::fmt::{self, Display, Write};

/// The media type of JSON (RFC 8259 section 11).
pub const JSON: &str = "application/json";

/// The interim response to `Expect: 100-continue`.
pub const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// Ends a chunked body.
pub const LAST_CHUNK: &[u8] = b"0\r\n\r\n";

/// The response to a connection over the limit.
pub const NO_ROOM: &[u8] =
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n\
    Content-Length: 32\r\nConnection: close\r\n\r\n{\"error\":\"too many connections\"}";

/// Buffer size for a head: twice what the longest one needs.
pub const HEAD_ROOM: usize = 512;

/// Appended to a handshake's key before it is hashed (RFC 6455 section 1.3).
const GUID: &[u8; 36] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// How a response must be framed for its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The connection stays open after the response.
    pub keep_alive: bool,
    /// The client speaks HTTP/1.0: it does not support chunks, and needs `Connection: keep-alive`.
    pub http10: bool,
    /// HEAD: the head is the same as for GET, without a body.
    pub head_only: bool,
}

impl Reply {
    /// For responses to malformed requests: the connection is closed.
    pub const CLOSE: Self = Self {
        keep_alive: false,
        http10: false,
        head_only: false,
    };

    /// For responses after which the connection is no longer HTTP.
    pub const OPEN: Self = Self {
        keep_alive: true,
        ..Self::CLOSE
    };

    /// The same, but the connection is closed after the response.
    pub fn close(self) -> Self {
        Self {
            keep_alive: false,
            ..self
        }
    }

    /// The framing of content of unknown length: chunks, or for HTTP/1.0 the end of the connection, which then
    /// does not stay open.
    pub fn stream(&mut self) -> Content {
        if self.http10 {
            self.keep_alive = false;
            Content::UntilClose
        } else {
            Content::Chunked
        }
    }
}

/// What follows a response's head, or would follow it if the request were not HEAD.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nothing, as after 101, and 200 for CONNECT.
    None,
    /// That many bytes.
    Length(u64),
    /// Chunks.
    Chunked,
    /// Bytes up to the end of the connection.
    UntilClose,
}

/// The value of `Sec-WebSocket-Accept` for a handshake with this key of 24 bytes (RFC 6455 section 4.2.2).
pub fn websocket_accept(key: &[u8]) -> [u8; 28] {
    let mut text = [0; 24 + GUID.len()];
    let length = copy(key, &mut text);
    copy(GUID, text.get_mut(length..).unwrap_or(&mut []));
    digest::base64(&digest::sha1(&text))
}

/// A response's head, built line by line in a buffer of, for instance, [`HEAD_ROOM`] bytes.
#[derive(Debug)]
pub struct ResponseHead<'r> {
    text: SliceWriter<'r>,
    fits: bool,
}

impl<'r> ResponseHead<'r> {
    /// An empty one.
    pub fn new(room: &'r mut [u8]) -> Self {
        Self {
            text: SliceWriter::new(room),
            fits: true,
        }
    }

    /// Writes the status line and the standard headers, for content of a media type.
    pub fn begin(&mut self, status: Status, reply: Reply, content: Content, media_type: &str) {
        self.write(format_args!("HTTP/1.1 {status}\r\n"));
        if content != Content::None {
            self.header("Content-Type", &media_type);
        }
        match content {
            Content::Length(length) => self.header("Content-Length", &length),
            Content::Chunked => self.add("Transfer-Encoding: chunked\r\n"),
            Content::None | Content::UntilClose => {}
        }
        if matches!(status, Status::UpgradeRequired | Status::SwitchingProtocols) {
            self.add("Upgrade: websocket\r\nConnection: Upgrade\r\n");
        }
        if status == Status::UpgradeRequired {
            self.add("Sec-WebSocket-Version: 13\r\n");
        }
        if !reply.keep_alive || content == Content::UntilClose {
            self.add("Connection: close\r\n");
        } else if reply.http10 {
            self.add("Connection: keep-alive\r\n");
        }
    }

    /// Adds a header line. The value must have no line breaks.
    pub fn header(&mut self, name: &str, value: &dyn Display) {
        self.write(format_args!("{name}: {value}\r\n"));
    }

    /// Ends the head and returns its bytes. `None` if it does not fit, which is a bug: half a head must not be
    /// sent.
    pub fn finish(mut self) -> Option<&'r [u8]> {
        self.add("\r\n");
        self.fits.then(|| self.text.into_bytes())
    }

    /// Appends lines as they are.
    fn add(&mut self, lines: &str) {
        self.fits &= self.text.write_str(lines).is_ok();
    }

    fn write(&mut self, text: fmt::Arguments<'_>) {
        self.fits &= self.text.write_fmt(text).is_ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::ToLossy;

    const OPEN: Reply = Reply::OPEN;

    fn built(build: impl Fn(&mut ResponseHead)) -> Option<String> {
        let mut room = [b'.'; HEAD_ROOM];
        let mut head = ResponseHead::new(&mut room);
        build(&mut head);
        Some(str::from_utf8(head.finish()?).unwrap().to_owned())
    }

    fn head(build: impl Fn(&mut ResponseHead)) -> String {
        built(build).expect("a head that fits")
    }

    #[test]
    fn response_heads_say_whether_the_connection_stays_open() {
        let head = |reply| {
            head(|head| {
                head.begin(Status::MethodNotAllowed, reply, Content::Length(5), JSON);
                head.header("Allow", &"GET");
            })
        };
        let start = "HTTP/1.1 405 Method Not Allowed\r\nContent-Type: application/json\r\nContent-Length: 5\r\n";
        assert_eq!(head(OPEN), *format!("{start}Allow: GET\r\n\r\n"));
        assert_eq!(
            head(OPEN.close()),
            *format!("{start}Connection: close\r\nAllow: GET\r\n\r\n")
        );
        let http10 = Reply {
            http10: true,
            ..OPEN
        };
        assert_eq!(
            head(http10),
            *format!("{start}Connection: keep-alive\r\nAllow: GET\r\n\r\n")
        );
    }

    #[test]
    fn the_response_to_a_connection_over_the_limit_is_well_formed() {
        let body = r#"{"error":"too many connections"}"#;
        let content = Content::Length(body.len() as u64);
        let head = head(|head| head.begin(Status::ServiceUnavailable, Reply::CLOSE, content, JSON));
        assert_eq!((head + body).as_bytes(), NO_ROOM);
    }

    #[test]
    fn content_of_unknown_length_is_chunked_or_ends_with_the_connection() {
        let head = |mut reply: Reply| {
            let content = reply.stream();
            let text = head(|head| head.begin(Status::Ok, reply, content, "text/plain"));
            (text, reply.keep_alive)
        };
        let start = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n";
        let chunked = format!("{start}Transfer-Encoding: chunked\r\n\r\n");
        assert_eq!(head(OPEN), (chunked, true));
        let closing = format!("{start}Connection: close\r\n\r\n");
        let http10 = Reply {
            http10: true,
            ..OPEN
        };
        assert_eq!(head(http10), (closing, false));
    }

    #[test]
    fn a_response_without_content_has_no_content_headers() {
        let text = head(|head| head.begin(Status::Ok, OPEN, Content::None, JSON));
        assert_eq!(text, "HTTP/1.1 200 OK\r\n\r\n");
        // The example of RFC 6455 section 1.3.
        let key = b"dGhlIHNhbXBsZSBub25jZQ==";
        assert_eq!(
            head(|head| {
                head.begin(Status::SwitchingProtocols, OPEN, Content::None, JSON);
                head.header("Sec-WebSocket-Accept", &websocket_accept(key).lossy());
            }),
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
            Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
        );
    }

    #[test]
    fn a_426_response_names_the_protocol() {
        let text = head(|head| head.begin(Status::UpgradeRequired, OPEN, Content::Length(2), JSON));
        assert!(text.contains(
            "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        ));
    }

    #[test]
    fn a_head_that_does_not_fit_is_not_truncated() {
        let head = |length: usize| {
            built(|head| {
                head.begin(Status::Ok, OPEN, Content::Length(5), JSON);
                head.header("X", &"x".repeat(length));
                head.header("Y", &"y");
            })
        };
        let room = HEAD_ROOM - head(0).unwrap().len();
        assert_eq!(head(room).unwrap().len(), HEAD_ROOM);
        for more in 1..=HEAD_ROOM {
            assert_eq!(head(room + more), None);
        }
    }
}
