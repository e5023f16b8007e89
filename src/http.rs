//! HTTP/1.1 requests and response heads (RFC 9112): an incremental reader over one buffer.

use crate::digest;
use crate::text::Line;
use core::ops::Range;

/// Longest request head, in bytes; and longest chunk overhead of a body.
pub const HEAD: usize = 16 << 10;
/// Longest request body, in bytes.
pub const BODY: usize = 128 << 10;
/// What a request's buffer must hold: a whole request and the start of the next.
pub const BUFFER: usize = HEAD + BODY + (4 << 10);
/// Most empty lines before a request line.
const BLANK_LINES: usize = 4;
/// Most header lines of a request.
const HEADERS: usize = 64;

/// Status codes used (RFC 9110 section 15).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
#[allow(missing_docs)]
pub enum Status {
    Ok = 200,
    BadRequest = 400,
    NotFound = 404,
    MethodNotAllowed = 405,
    RequestTimeout = 408,
    Conflict = 409,
    ContentTooLarge = 413,
    ExpectationFailed = 417,
    UpgradeRequired = 426,
    HeaderFieldsTooLarge = 431,
    InternalServerError = 500,
    NotImplemented = 501,
    ServiceUnavailable = 503,
    VersionNotSupported = 505,
}

impl Status {
    fn reason(self) -> &'static str {
        match self {
            Self::Ok => "OK",
            Self::BadRequest => "Bad Request",
            Self::NotFound => "Not Found",
            Self::MethodNotAllowed => "Method Not Allowed",
            Self::RequestTimeout => "Request Timeout",
            Self::Conflict => "Conflict",
            Self::ContentTooLarge => "Content Too Large",
            Self::ExpectationFailed => "Expectation Failed",
            Self::UpgradeRequired => "Upgrade Required",
            Self::HeaderFieldsTooLarge => "Request Header Fields Too Large",
            Self::InternalServerError => "Internal Server Error",
            Self::NotImplemented => "Not Implemented",
            Self::ServiceUnavailable => "Service Unavailable",
            Self::VersionNotSupported => "HTTP Version Not Supported",
        }
    }
}

/// A request that gets an error: the status, and the sentence of the body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal(pub Status, pub &'static str);

const fn bad(why: &'static str) -> Refusal {
    Refusal(Status::BadRequest, why)
}

/// The API's calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Call {
    Status,
    ExitCode,
    Signals,
    Exec,
    Session,
}

/// A path of the API, and the methods it takes.
struct Route {
    path: &'static str,
    call: Call,
    methods: &'static str,
}

const ROUTES: [Route; 5] = [
    Route {
        path: "/v1/status",
        call: Call::Status,
        methods: "GET, HEAD",
    },
    Route {
        path: "/v1/exit_code",
        call: Call::ExitCode,
        methods: "GET, HEAD",
    },
    Route {
        path: "/v1/signals",
        call: Call::Signals,
        methods: "POST",
    },
    Route {
        path: "/v1/exec",
        call: Call::Exec,
        methods: "POST",
    },
    Route {
        path: "/v1/ws/exec",
        call: Call::Session,
        methods: "GET",
    },
];

/// `Sec-WebSocket-Accept` for a handshake (RFC 6455 section 4.2.2).
pub type Accept = [u8; 28];

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// A call with a method it takes.
    Call(Call),
    /// A WebSocket handshake for [`Call::Session`].
    Upgrade(Accept),
    /// A call with a method it does not take; the text lists those it takes.
    WrongMethod(&'static str),
    /// [`Call::Session`] without a handshake, or of another WebSocket version.
    NoUpgrade,
    /// No such path.
    Unknown,
}

/// A whole request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// What it asks for.
    pub target: Target,
    /// How it wants its answer.
    pub style: Style,
    /// Where the body lies in the buffer.
    pub body: Range<usize>,
    /// How many bytes of the buffer are the request's.
    pub length: usize,
}

/// How a response is framed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Style {
    /// The connection stays open.
    pub keep_alive: bool,
    /// The client speaks HTTP/1.0, where staying open must be said.
    pub old: bool,
    /// HEAD: the answer has no body.
    pub head_only: bool,
}

impl Style {
    /// For answers to what was not understood: the connection closes.
    pub const CLOSE: Self = Self {
        keep_alive: false,
        old: false,
        head_only: false,
    };
}

/// What the reader found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The rest of the request has not come.
    More,
    /// The same, and the client wants to hear [`CONTINUE`] before it sends it.
    Continue,
    /// A whole request. The next one starts at its `length`, with a new reader.
    Ready(Request),
    /// An answer is due, and the connection cannot be understood any further.
    Refused(Refusal),
}

/// The interim response to `Expect: 100-continue`.
pub const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// Reads one request; lives from one request to the next.
#[derive(Debug, Default)]
pub struct Reader {
    state: State,
    /// Bytes of the buffer already looked at.
    scanned: usize,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Head,
    Body(Head, Framing),
}

#[derive(Clone, Debug)]
struct Head {
    target: Target,
    style: Style,
    expects: bool,
    /// Its length in the buffer.
    length: usize,
}

#[derive(Clone, Debug)]
enum Framing {
    /// A body of so many bytes.
    Length(usize),
    /// A chunked body (RFC 9112 section 7.1), decoded where it lies.
    Chunked(Chunks),
}

#[derive(Clone, Debug)]
struct Chunks {
    /// End of the decoded body in the buffer; undecoded bytes follow directly.
    end: usize,
    part: Part,
    /// Bytes of chunk lines and trailers so far.
    overhead: usize,
}

#[derive(Clone, Copy, Debug)]
enum Part {
    Size,
    Data(usize),
    DataEnd,
    Trailer,
}

impl Reader {
    /// Whether part of a request has come.
    pub fn started(&self) -> bool {
        self.scanned > 0 || matches!(self.state, State::Body(..))
    }

    /// Whether the head has come.
    pub fn in_body(&self) -> bool {
        matches!(self.state, State::Body(..))
    }

    /// Looks at the first `filled` bytes of `buffer`, in which the request starts at 0.
    ///
    /// A chunked body is decoded in place, which moves what follows it: `filled` shrinks.
    pub fn advance(&mut self, buffer: &mut [u8], filled: &mut usize) -> Progress {
        match self.step(buffer, filled) {
            Ok(progress) => progress,
            Err(refusal) => Progress::Refused(refusal),
        }
    }

    fn step(&mut self, buffer: &mut [u8], filled: &mut usize) -> Result<Progress, Refusal> {
        let mut fresh = false;
        if let State::Head = self.state {
            let bytes = buffer.get(..*filled).unwrap_or(&[]);
            let Some(length) = self.head_end(bytes)? else {
                return Ok(Progress::More);
            };
            let (head, framing) = parse_head(bytes.get(..length).unwrap_or(&[]))?;
            self.state = State::Body(head, framing);
            fresh = true;
        }
        let State::Body(head, framing) = &mut self.state else {
            return Ok(Progress::More);
        };
        let end = match framing {
            Framing::Length(length) => {
                let end = head.length + *length;
                (*filled >= end).then_some(end)
            }
            Framing::Chunked(chunks) => chunks
                .decode(head.length, buffer, filled)?
                .then_some(chunks.end),
        };
        match end {
            Some(end) => Ok(Progress::Ready(Request {
                target: head.target,
                style: head.style,
                body: head.length..end,
                length: end,
            })),
            None if fresh && head.expects && *filled == head.length => Ok(Progress::Continue),
            None => Ok(Progress::More),
        }
    }

    /// Finds the head's end. Lines end with CRLF; a lone LF is where smuggling starts.
    fn head_end(&mut self, bytes: &[u8]) -> Result<Option<usize>, Refusal> {
        while let Some(&byte) = bytes.get(self.scanned) {
            let before =
                |count: usize| self.scanned.checked_sub(count).and_then(|at| bytes.get(at));
            if byte == b'\n' {
                if before(1) != Some(&b'\r') {
                    return Err(bad("a line does not end with CRLF"));
                }
                // Empty lines before the request line are no head (RFC 9112 section 2.2).
                let blank = before(2).is_none_or(|byte| *byte == b'\n');
                let leading = self.scanned < 2 * BLANK_LINES
                    && bytes
                        .iter()
                        .take(self.scanned)
                        .all(|byte| matches!(byte, b'\r' | b'\n'));
                if blank && !leading {
                    self.scanned += 1;
                    return if self.scanned <= HEAD {
                        Ok(Some(self.scanned))
                    } else {
                        Err(LONG_HEAD)
                    };
                }
            }
            self.scanned += 1;
            if self.scanned > HEAD {
                return Err(LONG_HEAD);
            }
        }
        Ok(None)
    }
}

const LONG_HEAD: Refusal = Refusal(
    Status::HeaderFieldsTooLarge,
    "the header is over 16 KiB or 64 lines",
);
const LARGE_BODY: Refusal = Refusal(Status::ContentTooLarge, "the body is over 128 KiB");

fn parse_head(bytes: &[u8]) -> Result<(Head, Framing), Refusal> {
    let mut lines = [httparse::EMPTY_HEADER; HEADERS];
    let mut request = httparse::Request::new(&mut lines);
    match request.parse(bytes) {
        Ok(httparse::Status::Complete(_)) => {}
        Err(httparse::Error::TooManyHeaders) => return Err(LONG_HEAD),
        Err(httparse::Error::Version) => {
            return Err(Refusal(
                Status::VersionNotSupported,
                "the version is not HTTP/1.0 or HTTP/1.1",
            ));
        }
        Err(_) | Ok(httparse::Status::Partial) => return Err(bad("the header is malformed")),
    }
    let (Some(method), Some(target), Some(version)) =
        (request.method, request.path, request.version)
    else {
        return Err(bad("the header is malformed"));
    };
    let old = version == 0;
    let fields = Fields::collect(request.headers)?;
    if !old && fields.hosts != 1 {
        return Err(bad("there must be one Host header"));
    }
    let framing = fields.framing(old)?;
    let target = route(method.as_bytes(), path(target.as_bytes())?, old, &fields);
    let expects = fields.expects && !old;
    if fields.unknown_expectation && !old {
        return Err(Refusal(
            Status::ExpectationFailed,
            "only 100-continue can be expected",
        ));
    }
    // A client that asks first is told at once; it will not send the body then.
    if expects && !matches!(target, Target::Call(_)) {
        return Err(match target {
            Target::WrongMethod(_) => Refusal(Status::MethodNotAllowed, "method not allowed"),
            _ => Refusal(Status::NotFound, "no such path"),
        });
    }
    let framing = match framing {
        Framing::Chunked(chunks) => Framing::Chunked(Chunks {
            end: bytes.len(),
            ..chunks
        }),
        length => length,
    };
    let head = Head {
        target,
        style: Style {
            keep_alive: if old {
                fields.keep_alive && !fields.close
            } else {
                !fields.close
            },
            old,
            head_only: method == "HEAD",
        },
        expects,
        length: bytes.len(),
    };
    Ok((head, framing))
}

/// The path of a request target, in origin form or absolute form (RFC 9112 section 3.2).
fn path(target: &[u8]) -> Result<&[u8], Refusal> {
    const SCHEME: &[u8] = b"http://";
    let path = match target.split_at_checked(SCHEME.len()) {
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case(SCHEME) => {
            let start = rest.iter().position(|byte| *byte == b'/');
            start.and_then(|start| rest.get(start..)).unwrap_or(b"/")
        }
        _ if target.starts_with(b"/") || target == b"*" => target,
        _ => return Err(bad("the request target is malformed")),
    };
    Ok(path.split(|byte| *byte == b'?').next().unwrap_or(path))
}

fn route(method: &[u8], path: &[u8], old: bool, fields: &Fields) -> Target {
    let Some(route) = ROUTES.iter().find(|route| route.path.as_bytes() == path) else {
        return Target::Unknown;
    };
    if !members(route.methods.as_bytes()).any(|allowed| allowed == method) {
        return Target::WrongMethod(route.methods);
    }
    if route.call != Call::Session {
        return Target::Call(route.call);
    }
    let handshake = !old && fields.upgrade && fields.upgrade_websocket && fields.version_13;
    match fields.accept {
        Some(accept) if handshake => Target::Upgrade(accept),
        _ => Target::NoUpgrade,
    }
}

/// What the header lines say.
#[derive(Default)]
struct Fields {
    hosts: usize,
    close: bool,
    keep_alive: bool,
    length: Option<usize>,
    encodings: usize,
    unknown_encoding: bool,
    expects: bool,
    unknown_expectation: bool,
    upgrade: bool,
    upgrade_websocket: bool,
    version_13: bool,
    accept: Option<Accept>,
}

impl Fields {
    fn collect(lines: &[httparse::Header]) -> Result<Self, Refusal> {
        let mut fields = Self::default();
        for line in lines {
            fields.line(line.name, line.value.trim_ascii())?;
        }
        Ok(fields)
    }

    fn line(&mut self, name: &str, value: &[u8]) -> Result<(), Refusal> {
        let is = |other: &str| name.eq_ignore_ascii_case(other);
        if is("host") {
            self.hosts += 1;
        } else if is("content-length") {
            // A list of equal lengths is one length (RFC 9110 section 8.6).
            for member in value.split(|byte| *byte == b',') {
                let length = length(member.trim_ascii())?;
                if self.length.is_some_and(|earlier| earlier != length) {
                    return Err(bad("two Content-Length headers differ"));
                }
                self.length = Some(length);
            }
        } else if is("transfer-encoding") {
            for member in members(value) {
                self.encodings += 1;
                self.unknown_encoding |= !member.eq_ignore_ascii_case(b"chunked");
            }
            if value.is_empty() {
                return Err(bad("Transfer-Encoding is empty"));
            }
        } else if is("connection") {
            for member in members(value) {
                self.close |= member.eq_ignore_ascii_case(b"close");
                self.keep_alive |= member.eq_ignore_ascii_case(b"keep-alive");
                self.upgrade |= member.eq_ignore_ascii_case(b"upgrade");
            }
        } else if is("expect") {
            let known = value.eq_ignore_ascii_case(b"100-continue");
            self.expects |= known;
            self.unknown_expectation |= !known;
        } else if is("upgrade") {
            self.upgrade_websocket |=
                members(value).any(|member| member.eq_ignore_ascii_case(b"websocket"));
        } else if is("sec-websocket-version") {
            self.version_13 = value == b"13";
        } else if is("sec-websocket-key") {
            self.accept = accept(value);
        }
        Ok(())
    }

    fn framing(&self, old: bool) -> Result<Framing, Refusal> {
        match (self.encodings, self.length) {
            (0, length) => match length.unwrap_or(0) {
                length if length > BODY => Err(LARGE_BODY),
                length => Ok(Framing::Length(length)),
            },
            // Both, or an encoding a 1.0 client cannot know: somebody on the way may see another end.
            (_, Some(_)) => Err(bad("both Content-Length and Transfer-Encoding are given")),
            (_, None) if old => Err(bad("HTTP/1.0 has no Transfer-Encoding")),
            (1, None) if !self.unknown_encoding => Ok(Framing::Chunked(Chunks {
                end: 0,
                part: Part::Size,
                overhead: 0,
            })),
            (1, None) => Err(Refusal(
                Status::NotImplemented,
                "the only transfer encoding is chunked",
            )),
            (_, None) => Err(bad("there must be one transfer encoding")),
        }
    }
}

fn members(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii)
}

/// 1*DIGIT; what is larger than any body is [`usize::MAX`].
fn length(digits: &[u8]) -> Result<usize, Refusal> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return Err(bad("Content-Length is not a number"));
    }
    Ok(digits.iter().fold(0usize, |sum, digit| {
        sum.saturating_mul(10)
            .saturating_add(usize::from(digit.wrapping_sub(b'0')))
    }))
}

/// The answer to a handshake's key, which is base64 of 16 bytes (RFC 6455 section 4.2.2).
fn accept(key: &[u8]) -> Option<Accept> {
    let digits = key
        .strip_suffix(b"==")
        .filter(|digits| digits.len() == 22)?;
    if !digits.iter().all(|digit| digest::BASE64.contains(digit)) {
        return None;
    }
    let mut message = heapless::Vec::<u8, 64>::new();
    message.extend_from_slice(key).ok()?;
    message
        .extend_from_slice(b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11")
        .ok()?;
    Some(digest::base64(&digest::sha1(&message)))
}

impl Chunks {
    /// Decodes what has come; true when the body, its trailers and its last line have.
    ///
    /// `start` is where the body starts in the buffer. Undecoded bytes are moved to `self.end`.
    fn decode(
        &mut self,
        start: usize,
        buffer: &mut [u8],
        filled: &mut usize,
    ) -> Result<bool, Refusal> {
        let mut read = self.end;
        let mut done = false;
        while !done {
            let rest = buffer.get(read..*filled).unwrap_or(&[]);
            match self.part {
                Part::Data(left) => {
                    let count = left.min(rest.len());
                    if count == 0 {
                        break;
                    }
                    buffer.copy_within(read..read + count, self.end);
                    read += count;
                    self.end += count;
                    self.part = if count == left {
                        Part::DataEnd
                    } else {
                        Part::Data(left - count)
                    };
                }
                Part::DataEnd => match rest {
                    [b'\r', b'\n', ..] => {
                        read += 2;
                        self.part = Part::Size;
                    }
                    [] | [b'\r'] => break,
                    _ => return Err(bad("a chunk does not end with CRLF")),
                },
                Part::Size | Part::Trailer => {
                    let Some(line) = line(rest)? else {
                        if self.overhead + rest.len() > HEAD {
                            return Err(LONG_HEAD);
                        }
                        break;
                    };
                    let used = line.len() + 2;
                    self.overhead += used;
                    if self.overhead > HEAD {
                        return Err(LONG_HEAD);
                    }
                    self.part = match (self.part, line) {
                        (Part::Trailer, []) => {
                            done = true;
                            Part::Trailer
                        }
                        (Part::Trailer, field)
                            if field.contains(&b':') && !field.starts_with(b" ") =>
                        {
                            Part::Trailer
                        }
                        (Part::Trailer, _) => return Err(bad("a trailer is malformed")),
                        (_, line) => match chunk_size(line)? {
                            0 => Part::Trailer,
                            size if size > BODY - (self.end - start).min(BODY) => {
                                return Err(LARGE_BODY);
                            }
                            size => Part::Data(size),
                        },
                    };
                    read += used;
                }
            }
        }
        if read > self.end {
            buffer.copy_within(read..*filled, self.end);
            *filled -= read - self.end;
        }
        Ok(done)
    }
}

/// The bytes up to CRLF; `None` when it has not come.
fn line(bytes: &[u8]) -> Result<Option<&[u8]>, Refusal> {
    let Some(end) = bytes.iter().position(|byte| *byte == b'\n') else {
        return Ok(None);
    };
    let line = bytes.get(..end).unwrap_or(&[]);
    match line.strip_suffix(b"\r") {
        Some(line) if !line.iter().any(|byte| matches!(byte, b'\r' | 0)) => Ok(Some(line)),
        _ => Err(bad("a line does not end with CRLF")),
    }
}

/// chunk-size [ chunk-ext ]
fn chunk_size(line: &[u8]) -> Result<usize, Refusal> {
    let end = line
        .iter()
        .position(|byte| !byte.is_ascii_hexdigit())
        .unwrap_or(line.len());
    let (digits, extension) = line.split_at_checked(end).unwrap_or((line, &[]));
    let extends = extension.trim_ascii_start().first() == Some(&b';');
    if digits.is_empty() || !(extension.is_empty() || extends) {
        return Err(bad("a chunk size is malformed"));
    }
    Ok(digits.iter().fold(0usize, |sum, digit| {
        let digit = char::from(*digit).to_digit(16).unwrap_or(0);
        sum.saturating_mul(16).saturating_add(digit as usize)
    }))
}

/// Writes the head of a response with a JSON body of `length` bytes.
pub fn response(line: &mut Line, status: Status, style: Style, length: usize, extra: &str) {
    line.add("HTTP/1.1 ")
        .add(u32::from(status as u16))
        .add(" ")
        .add(status.reason());
    line.add("\r\nContent-Type: application/json\r\nContent-Length: ")
        .add(length);
    line.add("\r\n").add(extra);
    if !style.keep_alive {
        line.add("Connection: close\r\n");
    } else if style.old {
        line.add("Connection: keep-alive\r\n");
    }
    line.add("\r\n");
}

/// Writes the head that accepts a WebSocket handshake.
pub fn switching(line: &mut Line, accept: &Accept) {
    line.add("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n");
    line.add("Sec-WebSocket-Accept: ")
        .add(&accept[..])
        .add("\r\n\r\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds `bytes` in pieces of `step`; all answers, with their bodies, up to the first refusal.
    type Answer = Result<(Target, Style, Vec<u8>), Refusal>;

    fn feed(bytes: &[u8], step: usize) -> Vec<Answer> {
        let mut buffer = vec![0; BUFFER];
        let mut filled = 0;
        let mut reader = Reader::default();
        let mut answers = Vec::new();
        for piece in bytes.chunks(step) {
            buffer[filled..filled + piece.len()].copy_from_slice(piece);
            filled += piece.len();
            loop {
                match reader.advance(&mut buffer, &mut filled) {
                    Progress::More | Progress::Continue => break,
                    Progress::Ready(request) => {
                        answers.push(Ok((
                            request.target,
                            request.style,
                            buffer[request.body].to_vec(),
                        )));
                        buffer.copy_within(request.length..filled, 0);
                        filled -= request.length;
                        reader = Reader::default();
                    }
                    Progress::Refused(refusal) => {
                        answers.push(Err(refusal));
                        return answers;
                    }
                }
            }
        }
        answers
    }

    fn one(text: &str) -> Result<(Target, Style, Vec<u8>), Refusal> {
        let whole = feed(text.as_bytes(), text.len());
        for step in [1, 2, 7] {
            assert_eq!(
                feed(text.as_bytes(), step),
                whole,
                "{text:?} in pieces of {step}"
            );
        }
        assert_eq!(whole.len(), 1, "{text:?}");
        whole.into_iter().next().unwrap()
    }

    fn status(text: &str) -> u16 {
        one(text).map_or_else(|refusal| refusal.0 as u16, |_| 200)
    }

    const STATUS: &str = "GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n";

    #[test]
    fn a_plain_request_is_read_at_any_split() {
        let (target, style, body) = one(STATUS).unwrap();
        assert_eq!(
            (target, body.as_slice()),
            (Target::Call(Call::Status), &b""[..])
        );
        assert!(style.keep_alive && !style.old && !style.head_only);
    }

    #[test]
    fn pipelined_requests_come_one_after_the_other() {
        let text = format!(
            "{STATUS}POST /v1/signals HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{{}}{STATUS}"
        );
        for step in [1, 3, 1000] {
            let answers = feed(text.as_bytes(), step);
            let targets: Vec<_> = answers
                .iter()
                .map(|answer| answer.as_ref().unwrap().0)
                .collect();
            let call = Target::Call;
            assert_eq!(
                targets,
                [call(Call::Status), call(Call::Signals), call(Call::Status)]
            );
            assert_eq!(answers[1].as_ref().unwrap().2, b"{}");
        }
    }

    #[test]
    fn a_chunked_body_is_put_together_and_what_follows_is_kept() {
        let text = format!(
            "POST /v1/exec HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: Chunked\r\n\r\n\
             3\r\nabc\r\n0A;a=b\r\n0123456789\r\n1 ;x\r\nz\r\n000\r\nTrailer: y\r\n\r\n{STATUS}"
        );
        for step in [1, 2, 5, 1000] {
            let answers = feed(text.as_bytes(), step);
            assert_eq!(answers.len(), 2);
            assert_eq!(answers[0].as_ref().unwrap().2, b"abc0123456789z");
            assert_eq!(answers[1].as_ref().unwrap().0, Target::Call(Call::Status));
        }
    }

    #[test]
    fn bodies_up_to_the_limit_fit_in_both_framings() {
        let body = "x".repeat(BODY);
        let plain =
            format!("POST /v1/exec HTTP/1.1\r\nHost: x\r\nContent-Length: {BODY}\r\n\r\n{body}");
        assert_eq!(
            feed(plain.as_bytes(), 4096)[0].as_ref().unwrap().2.len(),
            BODY
        );
        let chunked = format!(
            "POST /v1/exec HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n{BODY:x}\r\n{body}\r\n0\r\n\r\n"
        );
        assert_eq!(
            feed(chunked.as_bytes(), 4096)[0].as_ref().unwrap().2.len(),
            BODY
        );
        let over = chunked.replace("\r\n0\r\n", "\r\n1\r\nx\r\n0\r\n");
        assert_eq!(feed(over.as_bytes(), 4096), [Err(LARGE_BODY)]);
    }

    #[test]
    fn a_client_that_expects_100_continue_hears_it_once() {
        let head = b"POST /v1/exec HTTP/1.1\r\nHost: x\r\nExpect: 100-Continue\r\nContent-Length: 2\r\n\r\n";
        let mut buffer = vec![0; BUFFER];
        buffer[..head.len()].copy_from_slice(head);
        let mut filled = head.len();
        let mut reader = Reader::default();
        assert_eq!(reader.advance(&mut buffer, &mut filled), Progress::Continue);
        assert_eq!(reader.advance(&mut buffer, &mut filled), Progress::More);
        buffer[filled..filled + 2].copy_from_slice(b"{}");
        filled += 2;
        assert!(matches!(
            reader.advance(&mut buffer, &mut filled),
            Progress::Ready(_)
        ));
    }

    #[test]
    fn connections_stay_open_as_the_version_has_it() {
        let keeps = |text: &str| one(text).unwrap().1.keep_alive;
        assert!(!keeps(
            "GET /v1/status HTTP/1.1\r\nHost: x\r\nConnection: foo, Close\r\n\r\n"
        ));
        assert!(!keeps("GET /v1/status HTTP/1.0\r\n\r\n"));
        assert!(keeps(
            "GET /v1/status HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n"
        ));
    }

    #[test]
    fn a_handshake_is_answered_as_the_rfc_shows() {
        let text = "GET /v1/ws/exec HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n\
            Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n";
        let expected = Target::Upgrade(*b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        assert_eq!(one(text).unwrap().0, expected);
        for (part, other) in [
            ("Version: 13", "Version: 8"),
            ("dGhlIHNhbXBsZSBub25jZQ==", "dGhlIHNhbXBsZSBub25jZQ"),
            ("dGhlIHNhbXBsZSBub25jZQ==", "c2hvcnQ="),
            ("Upgrade: websocket", "Upgrade: h2c"),
            ("keep-alive, Upgrade", "keep-alive"),
        ] {
            assert_eq!(
                one(&text.replace(part, other)).unwrap().0,
                Target::NoUpgrade,
                "{other}"
            );
        }
    }

    #[test]
    fn paths_and_methods_are_told_apart() {
        let target = |line: &str| {
            one(&format!("{line} HTTP/1.1\r\nHost: x\r\n\r\n"))
                .unwrap()
                .0
        };
        assert_eq!(target("GET /v1/status?x=/y"), Target::Call(Call::Status));
        assert_eq!(
            target("GET http://vm:1/v1/status"),
            Target::Call(Call::Status)
        );
        assert_eq!(target("HEAD /v1/exit_code"), Target::Call(Call::ExitCode));
        assert_eq!(target("GET /v1/status/"), Target::Unknown);
        assert_eq!(target("OPTIONS *"), Target::Unknown);
        assert_eq!(target("GET http://vm"), Target::Unknown);
        assert_eq!(target("POST /v1/status"), Target::WrongMethod("GET, HEAD"));
        assert_eq!(target("GET /v1/exec"), Target::WrongMethod("POST"));
        assert_eq!(target("HEAD /v1/ws/exec"), Target::WrongMethod("GET"));
        assert_eq!(target("get /v1/status"), Target::WrongMethod("GET, HEAD"));
    }

    #[test]
    fn what_could_be_read_in_two_ways_is_refused() {
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
            (post("Content-Length: 131073"), 413),
            (post("Content-Length: 99999999999999999999999999"), 413),
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
            (post("A b"), 400),
            (post(": b"), 400),
            (post("A: b\rc"), 400),
            (post("A: b\0"), 400),
            (post("Expect: something"), 417),
            (post("Host: y"), 400),
            ("GET /v1/status HTTP/1.1\r\n\r\n".into(), 400),
            ("GET /v1/status HTTP/1.1\nHost: x\n\n".into(), 400),
            ("GET /v1/status HTTP/1.1\r\nHost: x\n\r\n".into(), 400),
            ("GET /v1/status HTTP/2.0\r\nHost: x\r\n\r\n".into(), 505),
            ("PRI * HTTP/2.0\r\n\r\n".into(), 505),
            ("GET  /v1/status HTTP/1.1\r\nHost: x\r\n\r\n".into(), 400),
            ("GET /v1/status\r\n\r\n".into(), 400),
            ("GET v1/status HTTP/1.1\r\nHost: x\r\n\r\n".into(), 400),
            ("CONNECT a:1 HTTP/1.1\r\nHost: x\r\n\r\n".into(), 400),
            (
                "\r\n\r\nGET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n".into(),
                200,
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
    fn bad_chunks_are_refused() {
        let head = "POST /v1/exec HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n";
        for (body, expected) in [
            ("\r\n", 400),
            ("g\r\n", 400),
            ("-1\r\n", 400),
            ("0x1\r\nx", 400),
            ("1 \r\nx\r\n", 400),
            ("1\nx\r\n", 400),
            ("1\r\nxy\r\n", 400),
            ("1\r\nx\n0\r\n\r\n", 400),
            ("ffffffffffffffffffffffff\r\n", 413),
            ("20001\r\n", 413),
            ("0\r\nno colon\r\n\r\n", 400),
            ("0\r\n x: y\r\n\r\n", 400),
            ("0\r\n\n", 400),
            ("0\r\n\r\n", 200),
        ] {
            assert_eq!(status(&format!("{head}{body}")), expected, "{body:?}");
        }
        let long = format!("{head}1;{}\r\nx\r\n0\r\n\r\n", "e".repeat(HEAD));
        assert_eq!(feed(long.as_bytes(), 4096), [Err(LONG_HEAD)]);
    }

    #[test]
    fn long_heads_are_refused_before_they_end() {
        let long = format!("GET /v1/status HTTP/1.1\r\nA: {}", "x".repeat(HEAD));
        assert_eq!(feed(long.as_bytes(), 100), [Err(LONG_HEAD)]);
        let many = format!(
            "GET /v1/status HTTP/1.1\r\nHost: x\r\n{}\r\n",
            "A: b\r\n".repeat(HEADERS)
        );
        assert_eq!(feed(many.as_bytes(), 100), [Err(LONG_HEAD)]);
        let blank = "\r\n".repeat(HEAD);
        assert_eq!(
            feed(blank.as_bytes(), 100),
            [Err(bad("the header is malformed"))]
        );
    }

    #[test]
    fn response_heads_say_how_the_connection_goes_on() {
        let head = |style| {
            let mut line = Line::new();
            response(
                &mut line,
                Status::MethodNotAllowed,
                style,
                5,
                "Allow: GET\r\n",
            );
            String::from_utf8(line.as_bytes().to_vec()).unwrap()
        };
        let start = "HTTP/1.1 405 Method Not Allowed\r\nContent-Type: application/json\r\nContent-Length: 5\r\nAllow: GET\r\n";
        let open = Style {
            keep_alive: true,
            ..Style::CLOSE
        };
        assert_eq!(head(open), format!("{start}\r\n"));
        assert_eq!(
            head(Style::CLOSE),
            format!("{start}Connection: close\r\n\r\n")
        );
        assert_eq!(
            head(Style { old: true, ..open }),
            format!("{start}Connection: keep-alive\r\n\r\n")
        );
    }
}
