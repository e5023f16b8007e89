//! Request heads, parsed by httparse. What httparse accepts but RFC 9112 does not is refused here.

use super::error::RequestError;
use super::response::Reply;
use super::target::Target;
use crate::bytes::{find, split};
use crate::{decimal, digest};
use core::mem::MaybeUninit;

/// Maximum length of a head in bytes, including empty lines before it.
pub const MAX_HEAD: usize = 16 << 10;
/// Maximum number of header lines.
pub const MAX_HEADERS: usize = 64;
/// Maximum number of empty lines before a request line: RFC 9112 section 2.2 requires at least one.
const MAX_BLANK_LINES: u8 = 4;

/// The methods of the API's calls (RFC 9110 section 9). They are case-sensitive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Method {
    Get,
    Head,
    Post,
    Put,
    Delete,
    Connect,
    /// Any other token.
    Other,
}

impl Method {
    const NAMES: &[(Self, &str)] = &[
        (Self::Get, "GET"),
        (Self::Head, "HEAD"),
        (Self::Post, "POST"),
        (Self::Put, "PUT"),
        (Self::Delete, "DELETE"),
        (Self::Connect, "CONNECT"),
    ];

    /// Its name, as in a request.
    pub fn name(self) -> &'static str {
        let known = Self::NAMES.iter().find(|(method, _)| *method == self);
        known.map_or("", |(_, name)| name)
    }

    fn parse(token: &str) -> Self {
        let known = Self::NAMES.iter().find(|(_, name)| *name == token);
        known.map_or(Self::Other, |(method, _)| *method)
    }
}

/// Where a body ends (RFC 9112 section 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// There is no body.
    None,
    /// After that many bytes.
    Length(u64),
    /// After the chunk of size 0.
    Chunked,
}

/// A request's head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head<'a> {
    /// Its length in bytes; the body starts after it.
    pub length: usize,
    /// The method.
    pub method: Method,
    /// The request target.
    pub target: Target<'a>,
    /// How its body is framed.
    pub framing: Framing,
    /// The client waits for [`CONTINUE`](super::CONTINUE) before it sends the body. After an error response
    /// instead, it is unknown whether the body will be sent, so the connection must be
    /// [closed](Reply::close).
    pub expects_continue: bool,
    /// How the response must be framed.
    pub reply: Reply,
    /// The key of a complete WebSocket handshake of version 13.
    pub websocket: Option<&'a [u8]>,
}

/// Finds and parses a request's head in a buffer that is being filled.
///
/// Each byte is read once to find the end of the head, and once to parse it, even if the bytes arrive slowly.
#[derive(Clone, Copy, Debug, Default)]
pub struct HeadParser {
    /// Number of bytes searched so far.
    scanned: usize,
    /// Start of the current line.
    line: usize,
    blank_lines: u8,
}

impl HeadParser {
    /// Whether a request has begun: more than empty lines have arrived.
    pub fn started(&self) -> bool {
        self.scanned > 2 * usize::from(self.blank_lines)
    }

    /// Parses the bytes received so far, which start with the request; `None` if its head is incomplete.
    /// Afterwards the parser is ready for the next request.
    pub fn parse<'b>(&mut self, bytes: &'b [u8]) -> Result<Option<Head<'b>>, RequestError> {
        let Some(length) = self.find_end(bytes)? else {
            return Ok(None);
        };
        *self = Self::default();
        parse(bytes.get(..length).unwrap_or(&[]))
    }

    /// The head's length, once it is complete. Refuses lines that end with LF alone, which httparse accepts, as
    /// they allow request smuggling.
    fn find_end(&mut self, bytes: &[u8]) -> Result<Option<usize>, RequestError> {
        let limited = bytes.get(..MAX_HEAD).unwrap_or(bytes);
        while let Some(fresh) = limited.get(self.scanned..)
            && let Some(at) = find(fresh, b'\n')
        {
            let end = self.scanned + at;
            let line = limited.get(self.line..end).unwrap_or(&[]);
            let Some(line) = line.strip_suffix(b"\r") else {
                return Err(RequestError::LineEnd);
            };
            self.scanned = end + 1;
            if line.is_empty() {
                if self.line > 2 * usize::from(self.blank_lines) {
                    return Ok(Some(self.scanned));
                }
                self.blank_lines += 1;
                if self.blank_lines > MAX_BLANK_LINES {
                    return Err(RequestError::RequestLine);
                }
            }
            self.line = self.scanned;
        }
        self.scanned = limited.len();
        match limited.len() {
            MAX_HEAD => Err(RequestError::LongHead),
            _ => Ok(None),
        }
    }
}

/// Parses a complete head.
fn parse(bytes: &[u8]) -> Result<Option<Head<'_>>, RequestError> {
    let mut headers = [const { MaybeUninit::uninit() }; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut []);
    let parsed = request
        .parse_with_uninit_headers(bytes, &mut headers)
        .map_err(request_error)?;
    // Both find the same end, as every LF has a CR; if not, other parsers may not agree either.
    if parsed != httparse::Status::Complete(bytes.len()) {
        return Err(RequestError::Header);
    }
    let (Some(method), Some(target), Some(version)) =
        (request.method, request.path, request.version)
    else {
        return Err(RequestError::RequestLine);
    };
    let http10 = version == 0;
    let method = Method::parse(method);
    let target = match method {
        Method::Connect => Target::parse_authority(target)?,
        _ => Target::parse(target)?,
    };
    let mut fields = Fields::default();
    for header in &*request.headers {
        fields.read(header.name, header.value)?;
    }
    if fields.hosts > 1 || (fields.hosts == 0 && !http10) {
        return Err(RequestError::Host);
    }
    let framing = fields.framing(http10)?;
    if method == Method::Connect && framing != Framing::None {
        return Err(RequestError::ConnectBody);
    }
    if fields.unknown_expectation && !http10 {
        return Err(RequestError::Expectation);
    }
    let handshake = method == Method::Get && !http10 && framing == Framing::None;
    Ok(Some(Head {
        length: bytes.len(),
        method,
        target,
        framing,
        expects_continue: fields.expects_continue && !http10,
        reply: Reply {
            keep_alive: !fields.close && (fields.keep_alive || !http10),
            http10,
            head_only: method == Method::Head,
        },
        websocket: fields.websocket().filter(|_| handshake),
    }))
}

fn request_error(error: httparse::Error) -> RequestError {
    match error {
        httparse::Error::Token | httparse::Error::Status => RequestError::RequestLine,
        httparse::Error::Version => RequestError::Version,
        httparse::Error::NewLine => RequestError::LineEnd,
        httparse::Error::HeaderName | httparse::Error::HeaderValue => RequestError::Header,
        httparse::Error::TooManyHeaders => RequestError::LongHead,
    }
}

/// The header fields that matter here.
#[derive(Default)]
struct Fields<'a> {
    hosts: usize,
    length: Option<u64>,
    encodings: usize,
    unknown_encoding: bool,
    close: bool,
    keep_alive: bool,
    expects_continue: bool,
    unknown_expectation: bool,
    connection_upgrade: bool,
    upgrade_websocket: bool,
    websocket_version: Option<&'a [u8]>,
    websocket_keys: usize,
    websocket_key: &'a [u8],
}

impl<'a> Fields<'a> {
    fn read(&mut self, name: &str, value: &'a [u8]) -> Result<(), RequestError> {
        let is = |other: &str| name.eq_ignore_ascii_case(other);
        if is("host") {
            self.hosts += 1;
            // uri-host [ ":" port ] (RFC 3986 section 3.2.2)
            let valid =
                |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~%!$&'()*+,;=:[]".contains(byte);
            if !value.iter().all(valid) {
                return Err(RequestError::Host);
            }
        } else if is("content-length") {
            // A list of equal lengths counts as one (RFC 9110 section 8.6).
            for member in members(value) {
                let length = content_length(member)?;
                if self.length.is_some_and(|earlier| earlier != length) {
                    return Err(RequestError::ContentLength);
                }
                self.length = Some(length);
            }
        } else if is("transfer-encoding") {
            if value.is_empty() {
                return Err(RequestError::EncodingList);
            }
            for member in members(value) {
                self.encodings += 1;
                self.unknown_encoding |= !member.eq_ignore_ascii_case(b"chunked");
            }
        } else if is("connection") {
            for member in members(value) {
                let is = |other: &[u8]| member.eq_ignore_ascii_case(other);
                self.close |= is(b"close");
                self.keep_alive |= is(b"keep-alive");
                self.connection_upgrade |= is(b"upgrade");
            }
        } else if is("expect") {
            let known = value.eq_ignore_ascii_case(b"100-continue");
            self.expects_continue |= known;
            self.unknown_expectation |= !known;
        } else if is("upgrade") {
            for member in members(value) {
                self.upgrade_websocket |= member.eq_ignore_ascii_case(b"websocket");
            }
        } else if is("sec-websocket-version") {
            self.websocket_version = Some(value);
        } else if is("sec-websocket-key") {
            self.websocket_keys += 1;
            self.websocket_key = value;
        }
        Ok(())
    }

    /// The framing of the body. Refuses a request whose framing is ambiguous (RFC 9112 section 6.3).
    fn framing(&self, http10: bool) -> Result<Framing, RequestError> {
        match (self.encodings, self.length) {
            (0, None) => Ok(Framing::None),
            (0, Some(length)) => Ok(Framing::Length(length)),
            (_, Some(_)) => Err(RequestError::TwoFramings),
            _ if http10 => Err(RequestError::Http10Encoding),
            (1, None) if self.unknown_encoding => Err(RequestError::UnknownEncoding),
            (1, None) => Ok(Framing::Chunked),
            _ => Err(RequestError::EncodingList),
        }
    }

    /// The key of a complete handshake (RFC 6455 section 4.2.1).
    fn websocket(&self) -> Option<&'a [u8]> {
        let complete = self.connection_upgrade
            && self.upgrade_websocket
            && self.websocket_version == Some(b"13")
            && self.websocket_keys == 1
            && is_key(self.websocket_key);
        complete.then_some(self.websocket_key)
    }
}

fn members(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    split(value, b',').map(<[u8]>::trim_ascii)
}

/// 1*DIGIT. Values over 2^64 - 1 are clamped, as they are over the limit of any body.
fn content_length(digits: &[u8]) -> Result<u64, RequestError> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return Err(RequestError::ContentLength);
    }
    Ok(decimal::parse(digits).unwrap_or(u64::MAX))
}

/// Whether it is the base64 of 16 bytes.
fn is_key(key: &[u8]) -> bool {
    let is_digit = |digit| digest::BASE64.contains(digit);
    key.strip_suffix(b"==")
        .is_some_and(|digits| digits.len() == 22 && digits.iter().all(is_digit))
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    /// Parses a head that arrives in pieces of `step` bytes.
    fn feed(bytes: &[u8], step: usize) -> Result<Option<Head<'_>>, RequestError> {
        let mut parser = HeadParser::default();
        let mut received = 0;
        while received < bytes.len() {
            received = bytes.len().min(received + step);
            if let Some(head) = parser.parse(&bytes[..received])? {
                return Ok(Some(head));
            }
        }
        Ok(None)
    }

    fn one(text: &str) -> Result<Head<'_>, RequestError> {
        let whole = feed(text.as_bytes(), usize::MAX / 2);
        for step in [1, 2, 7] {
            assert_eq!(
                feed(text.as_bytes(), step),
                whole,
                "{text:?} in pieces of {step}"
            );
        }
        Ok(whole?.expect("an incomplete head"))
    }

    fn status(text: &str) -> u16 {
        let status = one(text).map_or_else(|error| error.status(), |_| Status::Ok);
        status.to_string()[..3].parse().unwrap()
    }

    const STATUS: &str = "GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n";

    #[test]
    fn a_simple_head_is_parsed_however_it_is_split() {
        let head = one(STATUS).unwrap();
        let target = Target::Resource {
            path: "/v1/status",
            query: "",
        };
        assert_eq!(
            (head.length, head.method, head.target, head.framing),
            (STATUS.len(), Method::Get, target, Framing::None)
        );
        assert!(head.reply.keep_alive && !head.reply.http10 && !head.reply.head_only);
        assert!(!head.expects_continue && head.websocket.is_none());
    }

    #[test]
    fn bytes_after_a_head_are_left_alone() {
        let text = format!("{STATUS}{STATUS}\n\0");
        let mut parser = HeadParser::default();
        for start in [0, STATUS.len()] {
            let head = parser.parse(&text.as_bytes()[start..]).unwrap().unwrap();
            assert_eq!(head.length, STATUS.len());
        }
    }

    #[test]
    fn methods_are_case_sensitive_tokens() {
        for (name, method) in [
            ("GET", Method::Get),
            ("HEAD", Method::Head),
            ("POST", Method::Post),
            ("PUT", Method::Put),
            ("DELETE", Method::Delete),
            ("OPTIONS", Method::Other),
            ("get", Method::Other),
            ("GETS", Method::Other),
            ("G", Method::Other),
            ("A!#$%&'*+-.^_`|~9", Method::Other),
        ] {
            let text = format!("{name} / HTTP/1.1\r\nHost: x\r\n\r\n");
            assert_eq!(one(&text).unwrap().method, method, "{name}");
        }
        assert!(
            one("HEAD / HTTP/1.1\r\nHost: x\r\n\r\n")
                .unwrap()
                .reply
                .head_only
        );
    }

    #[test]
    fn connect_has_an_authority_and_no_body() {
        let connect = |target: &str, lines: &str| {
            let text = format!("CONNECT {target} HTTP/1.1\r\nHost: x\r\n{lines}\r\n");
            one(&text).map(|head| match head.target {
                Target::Authority { host, port } => (host.to_owned(), port),
                Target::Resource { .. } => unreachable!(),
            })
        };
        assert_eq!(connect("db:5432", ""), Ok(("db".into(), 5432)));
        assert_eq!(connect("/v1/status", ""), Err(RequestError::RequestTarget));
        assert_eq!(
            connect("http://db:1/", ""),
            Err(RequestError::RequestTarget)
        );
        for lines in ["Content-Length: 0\r\n", "Transfer-Encoding: chunked\r\n"] {
            assert_eq!(connect("db:1", lines), Err(RequestError::ConnectBody));
        }
        assert_eq!(status("GET db:5432 HTTP/1.1\r\nHost: x\r\n\r\n"), 400);
    }

    #[test]
    fn keep_alive_follows_the_version_and_the_connection_header() {
        let keeps = |text: &str| one(text).unwrap().reply.keep_alive;
        assert!(!keeps(
            "GET / HTTP/1.1\r\nHost: x\r\nConnection: foo, Close\r\n\r\n"
        ));
        assert!(!keeps("GET / HTTP/1.0\r\n\r\n"));
        assert!(keeps("GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n"));
        assert!(!keeps(
            "GET / HTTP/1.0\r\nConnection: Keep-Alive, close\r\n\r\n"
        ));
    }

    #[test]
    fn only_an_http_1_1_client_can_expect_100_continue() {
        let post =
            "POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-Continue\r\nContent-Length: 2\r\n\r\n";
        assert!(one(post).unwrap().expects_continue);
        let old = post.replace("HTTP/1.1", "HTTP/1.0");
        assert!(!one(&old).unwrap().expects_continue);
    }

    #[test]
    fn a_complete_handshake_has_its_key() {
        let text = "GET /v1/ws/exec HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n\
            Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n";
        assert_eq!(
            one(text).unwrap().websocket,
            Some(&b"dGhlIHNhbXBsZSBub25jZQ=="[..])
        );
        for (part, other) in [
            ("Version: 13", "Version: 8"),
            ("dGhlIHNhbXBsZSBub25jZQ==", "dGhlIHNhbXBsZSBub25jZQ"),
            ("dGhlIHNhbXBsZSBub25jZQ==", "dGhlIHNhbXBsZSBub25j*Q=="),
            ("dGhlIHNhbXBsZSBub25jZQ==", "c2hvcnQ="),
            ("Upgrade: websocket", "Upgrade: h2c"),
            ("keep-alive, Upgrade", "keep-alive"),
            ("GET", "POST"),
            ("HTTP/1.1", "HTTP/1.0"),
            ("Host: x", "Host: x\r\nContent-Length: 1"),
            (
                "Host: x",
                "Host: x\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
            ),
        ] {
            assert_eq!(
                one(&text.replace(part, other)).unwrap().websocket,
                None,
                "{other}"
            );
        }
    }

    #[test]
    fn ambiguous_requests_are_refused() {
        let post = |lines: &str| format!("POST /v1/exec HTTP/1.1\r\nHost: x\r\n{lines}\r\n\r\n");
        for (text, expected) in [
            (post("Content-Length: 1\r\nTransfer-Encoding: chunked"), 400),
            (post("Content-Length: 1\r\nContent-Length: 2"), 400),
            (post("Content-Length: 1, 2"), 400),
            (post("Content-Length: +1"), 400),
            (post("Content-Length: -1"), 400),
            (post("Content-Length: 1 1"), 400),
            (post("Content-Length:"), 400),
            (post("Content-Length: 0x1"), 400),
            (post("Content-Length: 0\r\nContent-Length: 0"), 200),
            (post("Content-Length: 0, 0"), 200),
            (post("Transfer-Encoding: gzip"), 501),
            (post("Transfer-Encoding: gzip, chunked"), 400),
            (post("Transfer-Encoding: chunked, chunked"), 400),
            (
                post("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked"),
                400,
            ),
            (post("Transfer-Encoding:"), 400),
            (post("Transfer-Encoding : chunked"), 400),
            (post("A: b\r\n c"), 400),
            (post("A: b\r\n\tc"), 400),
            (post(" A: b"), 400),
            (post("A b"), 400),
            (post(": b"), 400),
            (post("A: b\rc"), 400),
            (post("A: b\0"), 400),
            (post("Expect: something"), 417),
            (post("Host: y"), 400),
            ("GET / HTTP/1.1\r\nHost: a b\r\n\r\n".into(), 400),
            ("GET / HTTP/1.1\r\nHost: a/b\r\n\r\n".into(), 400),
            ("GET / HTTP/1.1\r\nHost: [::1]:10000\r\n\r\n".into(), 200),
            ("GET / HTTP/1.1\r\nHost:\r\n\r\n".into(), 200),
            ("GET / HTTP/1.0\r\nHost: x\r\nHost: x\r\n\r\n".into(), 400),
            ("GET /v1/status HTTP/1.1\r\n\r\n".into(), 400),
            ("GET /v1/status HTTP/1.1\nHost: x\n\n".into(), 400),
            ("GET /v1/status HTTP/1.1\r\nHost: x\n\r\n".into(), 400),
            ("GET /v1/status HTTP/1.1\r\nHost: x\r\n\n".into(), 400),
            ("GET /v1/status HTTP/2.0\r\nHost: x\r\n\r\n".into(), 505),
            ("PRI * HTTP/2.0\r\n\r\n".into(), 505),
            ("GET  /v1/status HTTP/1.1\r\nHost: x\r\n\r\n".into(), 400),
            ("GET /v1/status  HTTP/1.1\r\nHost: x\r\n\r\n".into(), 505),
            ("GET /v1/status HTTP/1.1 \r\nHost: x\r\n\r\n".into(), 400),
            (" GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n".into(), 400),
            ("GET /v1/status\r\n\r\n".into(), 400),
            ("GET /v1/status HTTP/1.1\rXHost:x\r\n\r\n".into(), 400),
            (
                "POST /v1/exec HTTP/1.0\rX\r\nContent-Length: 9\r\n\r\n".into(),
                400,
            ),
            ("GET v1/status HTTP/1.1\r\nHost: x\r\n\r\n".into(), 400),
            ("CONNECT a HTTP/1.1\r\nHost: x\r\n\r\n".into(), 400),
            (
                "\r\n\r\nGET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n".into(),
                200,
            ),
            (
                "\r\n\n\r\nGET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n".into(),
                400,
            ),
            ("\0\r\n\r\n".into(), 400),
            (
                "POST /v1/exec HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n".into(),
                400,
            ),
        ] {
            assert_eq!(status(&text), expected, "{text:?}");
        }
    }

    #[test]
    fn a_body_ends_where_its_framing_says() {
        let framing = |lines: &str| {
            let text = format!("POST / HTTP/1.1\r\nHost: x\r\n{lines}\r\n");
            one(&text).unwrap().framing
        };
        assert_eq!(framing(""), Framing::None);
        assert_eq!(
            framing("Content-Length: 0131072\r\n"),
            Framing::Length(131_072)
        );
        assert_eq!(framing("content-length: 5, 5\r\n"), Framing::Length(5));
        assert_eq!(
            framing("Content-Length: 18446744073709551615\r\n"),
            Framing::Length(u64::MAX)
        );
        let endless = "Content-Length: 99999999999999999999999999\r\n";
        assert_eq!(framing(endless), Framing::Length(u64::MAX));
        assert_eq!(framing("Transfer-Encoding: Chunked\r\n"), Framing::Chunked);
    }

    #[test]
    fn a_header_line_is_a_token_a_colon_and_no_control_characters() {
        let taken = |line: &[u8]| {
            let text = [b"GET / HTTP/1.1\r\nHost: x\r\n", line, b"\r\n\r\n"].concat();
            feed(&text, text.len()).is_ok()
        };
        for byte in 0..=255u8 {
            let of_token = super::super::error::is_token_byte(byte) || byte == b':';
            assert_eq!(
                taken(&[b"X", &[byte][..], b": 1"].concat()),
                of_token,
                "{byte:x}"
            );
            let of_value = super::super::error::is_value_byte(byte);
            assert_eq!(
                taken(&[b"X: ", &[byte][..], b"1"].concat()),
                of_value,
                "{byte:x}"
            );
        }
        assert!(taken(b"A:") && taken(b"A: \t b c \t"));
    }

    #[test]
    fn long_heads_are_refused_before_they_end() {
        let long = format!("GET /v1/status HTTP/1.1\r\nA: {}", "x".repeat(MAX_HEAD));
        assert_eq!(feed(long.as_bytes(), 100), Err(RequestError::LongHead));
        assert_eq!(feed(&long.as_bytes()[..MAX_HEAD - 1], 100), Ok(None));
        let start = "GET / HTTP/1.1\r\nHost: x\r\nA: ";
        let longest = format!("{start}{}\r\n\r\n", "x".repeat(MAX_HEAD - start.len() - 4));
        assert_eq!(one(&longest).unwrap().length, MAX_HEAD);
        let many = |count: usize| {
            format!(
                "GET / HTTP/1.1\r\nHost: x\r\n{}\r\n",
                "A: b\r\n".repeat(count)
            )
        };
        assert_eq!(status(&many(MAX_HEADERS)), 431);
        assert_eq!(status(&many(MAX_HEADERS - 1)), 200);
    }

    #[test]
    fn a_few_empty_lines_before_a_request_are_skipped() {
        let blank = |count: usize| format!("{}{STATUS}", "\r\n".repeat(count));
        let head = blank(4);
        assert_eq!(one(&head).unwrap().length, head.len());
        assert_eq!(one(&blank(5)), Err(RequestError::RequestLine));
        let mut parser = HeadParser::default();
        for (received, started) in [("\r\n", false), ("\r\n\r\n", false), ("\r\n\r\nG", true)] {
            assert_eq!(parser.parse(received.as_bytes()), Ok(None));
            assert_eq!(parser.started(), started);
        }
    }
}
