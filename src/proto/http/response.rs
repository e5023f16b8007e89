//! Response heads (RFC 9112 section 4).

use super::status::Status;
use crate::message;
use crate::message::{Message, ToLossy};
use core::fmt::{self, Display, Write};

/// The interim response to `Expect: 100-continue`.
pub const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// Ends a chunked body.
pub const LAST_CHUNK: &[u8] = b"0\r\n\r\n";

/// What both answers to a WebSocket handshake say.
const UPGRADE: &str = "Upgrade: websocket\r\nConnection: Upgrade\r\n";

/// `Sec-WebSocket-Accept` for a handshake's key (RFC 6455 section 4.2.2).
pub type Accept = [u8; 28];

/// What a response has to know of its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The connection stays open behind the response.
    pub keep_alive: bool,
    /// The client speaks HTTP/1.0: it knows no chunks, and has to be told that the connection stays
    /// open.
    pub http10: bool,
    /// HEAD: the head is the same as for GET, and no body follows it.
    pub head_only: bool,
}

impl Reply {
    /// For answers to what was not understood: the connection is closed.
    pub const CLOSE: Self = Self {
        keep_alive: false,
        http10: false,
        head_only: false,
    };

    /// The same, but the connection is closed behind the response.
    pub fn close(self) -> Self {
        Self {
            keep_alive: false,
            ..self
        }
    }

    /// The framing of content whose length is not known: chunks, or the connection's end for a client
    /// that knows none. Then the connection does not stay open.
    pub fn stream(&mut self) -> Content {
        if self.http10 {
            self.keep_alive = false;
            Content::UntilClose
        } else {
            Content::Chunked
        }
    }
}

/// What follows a response's head, or would follow it if the request were no HEAD.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nothing, as behind 101, 204, and 200 for CONNECT.
    None,
    /// So many bytes.
    Length(u64),
    /// Chunks.
    Chunked,
    /// Bytes up to the connection's end.
    UntilClose,
}

/// A response's head, built line by line. A message has room for twice the lines that there are.
#[derive(Clone, Debug)]
pub struct ResponseHead {
    text: Message,
}

impl ResponseHead {
    /// A response with JSON content.
    pub fn new(status: Status, reply: Reply, content: Content) -> Self {
        Self::with_type(status, reply, content, "application/json")
    }

    /// A response with content of a media type.
    pub fn with_type(status: Status, reply: Reply, content: Content, media_type: &str) -> Self {
        let mut head = Self {
            text: Message::new(),
        };
        head.write(format_args!(
            "HTTP/1.1 {} {}\r\n",
            u32::from(status.code()),
            status.reason()
        ));
        if content != Content::None {
            head.header("Content-Type", &media_type);
        }
        match content {
            Content::Length(length) => head.header("Content-Length", &length),
            Content::Chunked => head.add("Transfer-Encoding: chunked\r\n"),
            Content::None | Content::UntilClose => {}
        }
        if status == Status::UpgradeRequired {
            head.add(UPGRADE);
            head.add("Sec-WebSocket-Version: 13\r\n");
        }
        if !reply.keep_alive || content == Content::UntilClose {
            head.add("Connection: close\r\n");
        } else if reply.http10 {
            head.add("Connection: keep-alive\r\n");
        }
        head
    }

    /// The response that accepts a WebSocket handshake (RFC 6455 section 4.2.2).
    pub fn switching_protocols(accept: &Accept) -> Self {
        let open = Reply {
            keep_alive: true,
            ..Reply::CLOSE
        };
        let mut head = Self::new(Status::SwitchingProtocols, open, Content::None);
        head.add(UPGRADE);
        head.header("Sec-WebSocket-Accept", &accept.lossy());
        head
    }

    /// Adds a header line. The value must have no line breaks.
    pub fn header(&mut self, name: &str, value: &dyn Display) {
        self.write(format_args!("{name}: {value}\r\n"));
    }

    /// Ends the head: its text.
    pub fn finish(mut self) -> Message {
        self.add("\r\n");
        if self.text.as_bytes().ends_with(b"\r\n\r\n") {
            return self.text;
        }
        // A header line too much, which is a fault of this program. Half a head must not be sent.
        message!(
            "HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        )
    }

    /// Adds lines as they are.
    fn add(&mut self, lines: &str) {
        self.write(format_args!("{lines}"));
    }

    /// Adds text; one that is cut is useless, as [`finish`](Self::finish) finds out.
    fn write(&mut self, text: fmt::Arguments<'_>) {
        let _cut = self.text.write_fmt(text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::MESSAGE;

    const OPEN: Reply = Reply {
        keep_alive: true,
        http10: false,
        head_only: false,
    };

    fn text(head: ResponseHead) -> String {
        head.finish().as_str().to_owned()
    }

    #[test]
    fn response_heads_say_how_the_connection_goes_on() {
        let head = |reply| {
            let mut head = ResponseHead::new(Status::MethodNotAllowed, reply, Content::Length(5));
            head.header("Allow", &"GET");
            text(head)
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
    fn content_of_unknown_length_is_chunked_or_ends_with_the_connection() {
        let head = |mut reply: Reply| {
            let content = reply.stream();
            let head = ResponseHead::with_type(Status::Ok, reply, content, "text/plain");
            (text(head), reply.keep_alive)
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
    fn a_response_without_content_says_nothing_of_it() {
        let head = ResponseHead::new(Status::NoContent, OPEN, Content::None);
        assert_eq!(text(head), "HTTP/1.1 204 No Content\r\n\r\n");
        let accept = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";
        assert_eq!(
            text(ResponseHead::switching_protocols(accept)),
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
            Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
        );
    }

    #[test]
    fn a_request_that_has_to_upgrade_is_told_to_what() {
        let head = ResponseHead::new(Status::UpgradeRequired, OPEN, Content::Length(2));
        assert!(text(head).contains(
            "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        ));
    }

    #[test]
    fn a_head_that_does_not_fit_becomes_an_error_and_is_never_cut() {
        let head = |length: usize| {
            let mut head = ResponseHead::new(Status::Ok, OPEN, Content::Length(5));
            head.header("X", &"x".repeat(length));
            head.header("Y", &"y");
            text(head)
        };
        // Room for the mark of a cut is kept.
        let longest = MESSAGE - "…".len();
        let room = longest - head(0).len();
        assert_eq!(head(room).len(), longest);
        for more in 1..=MESSAGE {
            let head = head(room + more);
            assert!(
                head.starts_with("HTTP/1.1 500 ") && head.ends_with("close\r\n\r\n"),
                "{head}"
            );
        }
    }
}
