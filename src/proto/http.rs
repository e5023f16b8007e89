//! HTTP/1.1 requests and response heads (RFC 9112): an incremental reader over one buffer.

use crate::bytes::{
    before, decimal, find, hexadecimal, remove, same_word, split, trim, valid_up_to,
};
use crate::digest;
use crate::message;
use crate::message::{Message, ToLossy};
use core::fmt::Write;
use core::ops::Range;

/// Longest request head, in bytes; and longest chunk overhead of a body.
pub const HEAD: usize = 16 << 10;
/// Longest request body, in bytes.
pub const BODY: usize = 128 << 10;
/// What a request's buffer must hold: a whole request and the start of the next.
pub const BUFFER: usize = HEAD + BODY + (4 << 10);
/// Most empty lines before a request line.
const BLANK_LINES: usize = 4;
/// What may be in no token.
const DELIMITERS: &[u8] = b"\"(),/:;<=>?@[\\]{}";
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

/// What each of them is called.
const REASONS: &str = "200 OK
400 Bad Request
404 Not Found
405 Method Not Allowed
408 Request Timeout
409 Conflict
413 Content Too Large
417 Expectation Failed
426 Upgrade Required
431 Request Header Fields Too Large
500 Internal Server Error
501 Not Implemented
503 Service Unavailable
505 HTTP Version Not Supported";

impl Status {
    /// The status with its name.
    fn line(self) -> &'static [u8] {
        let mut lines = split(REASONS.as_bytes(), b'\n');
        let code = |line: &[u8]| line.get(..3).and_then(decimal);
        lines
            .find(|line| code(line) == Some(self as u32))
            .unwrap_or(&[])
    }
}

/// Defines [`RequestError`] and its sentences, in one order.
macro_rules! refusals {
    ($($name:ident: $status:ident, $why:literal;)*) => {
        /// A request that gets an error, with a status, and a sentence as its body.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[allow(missing_docs)]
        pub enum RequestError {
            $($name),*
        }

        const SENTENCES: &str = concat!($($why, "\n"),*);

        impl RequestError {
            /// The answer's status.
            pub fn status(self) -> Status {
                match self {
                    $(Self::$name => Status::$status),*
                }
            }
        }
    };
}

refusals! {
    LineEnd: BadRequest, "a line does not end with CRLF";
    LongHead: HeaderFieldsTooLarge, "the header is over 16 KiB or 64 lines";
    RequestLine: BadRequest, "the request line is malformed";
    Version: VersionNotSupported, "the version is not HTTP/1.0 or 1.1";
    RequestTarget: BadRequest, "the request target is malformed";
    Header: BadRequest, "the header is malformed";
    Host: BadRequest, "not one Host header";
    Length: BadRequest, "Content-Length is not one number";
    TwoFramings: BadRequest, "both Content-Length and Transfer-Encoding";
    OldEncoding: BadRequest, "HTTP/1.0 has no Transfer-Encoding";
    UnknownEncoding: NotImplemented, "the only transfer encoding is chunked";
    Encodings: BadRequest, "not one transfer encoding";
    LargeBody: ContentTooLarge, "the body is over 128 KiB";
    Expectation: ExpectationFailed, "only 100-continue can be expected";
    ChunkSize: BadRequest, "a chunk size is malformed";
    ChunkEnd: BadRequest, "a chunk does not end with CRLF";
    Trailer: BadRequest, "a trailer is malformed";
}

impl RequestError {
    /// The sentence.
    pub fn why(self) -> &'static [u8] {
        let mut sentences = split(SENTENCES.as_bytes(), b'\n');
        sentences.nth(self as usize).unwrap_or(&[])
    }
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

/// The paths of the API, and the methods they take.
const ROUTES: &str = "\
/v1/status GET, HEAD
/v1/exit_code GET, HEAD
/v1/signals POST
/v1/exec POST
/v1/ws/exec GET";

/// The calls of [`ROUTES`].
const CALLS: [Call; 5] = [
    Call::Status,
    Call::ExitCode,
    Call::Signals,
    Call::Exec,
    Call::Session,
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
    WrongMethod(&'static [u8]),
    /// [`Call::Session`] without a handshake, or of another WebSocket version.
    NoUpgrade,
    /// No such path.
    Unknown,
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The rest of the request has not come.
    More,
    /// The same, and the client wants to hear [`CONTINUE`] before it sends it.
    Continue,
    /// A whole request. The next one starts at the end of its body, with a new reader.
    Ready,
    /// An answer is due, and the connection cannot be understood any further.
    Refused(RequestError),
}

/// The interim response to `Expect: 100-continue`.
pub const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// Reads one request; lives from one request to the next.
#[derive(Debug)]
pub struct Reader {
    /// Bytes of the head already looked at; its length, once it has come.
    scanned: usize,
    /// End of the body; of a chunked one, of what is decoded, and undecoded bytes follow directly.
    end: usize,
    /// Bytes of the chunk that have not come.
    left: usize,
    /// Bytes of chunk lines and trailers so far.
    overhead: usize,
    part: Part,
    /// The client wants to hear [`CONTINUE`].
    expects: bool,
    /// How the request wants its answer.
    pub style: Style,
    /// What it asks for.
    pub target: Target,
}

/// What comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Head,
    /// The rest of a body whose end is known.
    Body,
    // Of a chunked body (RFC 9112 section 7.1), which is decoded where it lies.
    Size,
    Data,
    DataEnd,
    Trailer,
    /// The next request.
    End,
}

impl Default for Reader {
    fn default() -> Self {
        Self {
            scanned: 0,
            end: 0,
            left: 0,
            overhead: 0,
            part: Part::Head,
            expects: false,
            style: Style::CLOSE,
            target: Target::Unknown,
        }
    }
}

impl Reader {
    /// Whether part of a request has come.
    pub fn started(&self) -> bool {
        self.scanned > 0
    }

    /// Whether the head has come.
    pub fn in_body(&self) -> bool {
        self.part != Part::Head
    }

    /// Where the body lies in the buffer. Its end is the request's.
    pub fn body(&self) -> Range<usize> {
        self.scanned..self.end
    }

    /// Looks at the first `filled` bytes of `buffer`, in which the request starts at 0.
    ///
    /// A chunked body is decoded in place, which moves what follows it: `filled` shrinks.
    pub fn advance(&mut self, buffer: &mut [u8], filled: &mut usize) -> Progress {
        if let Err(refusal) = self.step(buffer, filled) {
            return Progress::Refused(refusal);
        }
        match self.part {
            Part::End => Progress::Ready,
            Part::Head => Progress::More,
            _ if core::mem::take(&mut self.expects) && *filled == self.scanned => {
                Progress::Continue
            }
            _ => Progress::More,
        }
    }

    fn step(&mut self, buffer: &mut [u8], filled: &mut usize) -> Result<(), RequestError> {
        if self.part == Part::Head {
            self.find_end(buffer.get(..*filled).unwrap_or(&[]))?;
            if self.part == Part::Head {
                return Ok(());
            }
            self.head(buffer.get(..self.scanned).unwrap_or(&[]))?;
        }
        if self.part != Part::Body {
            return self.decode(buffer, filled);
        }
        if *filled >= self.end {
            self.part = Part::End;
        }
        Ok(())
    }

    /// Looks for the head's end. Lines end with CRLF; a lone LF is where smuggling starts.
    fn find_end(&mut self, bytes: &[u8]) -> Result<(), RequestError> {
        while let Some((seen, [byte, ..])) = bytes.split_at_checked(self.scanned) {
            self.scanned += 1;
            if self.scanned > HEAD {
                return Err(RequestError::LongHead);
            }
            if *byte != b'\n' {
                continue;
            }
            let Some(lines) = seen.strip_suffix(b"\r") else {
                return Err(RequestError::LineEnd);
            };
            // Empty lines before the request line are no head (RFC 9112 section 2.2).
            let blank = lines.is_empty() || lines.ends_with(b"\n");
            let leading = seen.len() < 2 * BLANK_LINES && trim(lines).is_empty();
            if blank && !leading {
                self.part = Part::Body;
                break;
            }
        }
        Ok(())
    }

    fn head(&mut self, mut bytes: &[u8]) -> Result<(), RequestError> {
        while let [b'\r', b'\n', rest @ ..] = bytes {
            bytes = rest;
        }
        let line = before(bytes, b'\n');
        let lines = bytes.get(line.len() + 1..).unwrap_or(&[]);
        let mut words = split(line, b' ');
        let (Some(method), Some(target), Some(version), None) =
            (words.next(), words.next(), words.next(), words.next())
        else {
            return Err(RequestError::RequestLine);
        };
        if !is_token(method) {
            return Err(RequestError::RequestLine);
        }
        // The line's CR stands behind it.
        let old = version == b"HTTP/1.0\r";
        if !old && version != b"HTTP/1.1\r" {
            return Err(RequestError::Version);
        }
        let path = path(target)?;
        let mut fields = Fields::default();
        fields.read(lines)?;
        if !old && fields.hosts != 1 {
            return Err(RequestError::Host);
        }
        self.frame(&fields, old)?;
        self.target = route(method, path, old, &fields);
        if fields.unknown_expectation && !old {
            return Err(RequestError::Expectation);
        }
        self.expects = fields.expects && !old;
        // A client that asks first is told at once; it will not send the body then.
        let declined = self.expects && !matches!(self.target, Target::Call(_));
        if declined {
            self.end = self.scanned;
            self.part = Part::End;
        }
        self.style = Style {
            keep_alive: !fields.close && (fields.keep_alive || !old) && !declined,
            old,
            head_only: method == b"HEAD",
        };
        Ok(())
    }

    /// How the body is framed.
    fn frame(&mut self, fields: &Fields, old: bool) -> Result<(), RequestError> {
        self.end = self.scanned;
        self.part = Part::Size;
        match (fields.encodings, fields.length) {
            (0, length) => {
                let length = length.unwrap_or(0) as usize;
                if length > BODY {
                    return Err(RequestError::LargeBody);
                }
                self.end += length;
                self.part = Part::Body;
                Ok(())
            }
            // Both, or an encoding a 1.0 client cannot know: somebody on the way may see another end.
            (_, Some(_)) => Err(RequestError::TwoFramings),
            _ if old => Err(RequestError::OldEncoding),
            (1, _) if fields.unknown_encoding => Err(RequestError::UnknownEncoding),
            (1, _) => Ok(()),
            _ => Err(RequestError::Encodings),
        }
    }

    /// Decodes what has come: what is no data is taken out of the buffer.
    fn decode(&mut self, buffer: &mut [u8], filled: &mut usize) -> Result<(), RequestError> {
        while self.part != Part::End {
            let rest = buffer.get(self.end..*filled).unwrap_or(&[]);
            let mut used = 0;
            if self.part == Part::Data {
                let count = self.left.min(rest.len());
                self.end += count;
                self.left -= count;
                if self.left > 0 {
                    break;
                }
                self.part = Part::DataEnd;
            } else if self.part == Part::DataEnd {
                match rest {
                    [b'\r', b'\n', ..] => used = 2,
                    [] | [b'\r'] => break,
                    _ => return Err(RequestError::ChunkEnd),
                }
                self.part = Part::Size;
            } else {
                let end = find(rest, b'\n');
                used = end.map_or(rest.len(), |end| end + 1);
                if self.overhead + used > HEAD {
                    return Err(RequestError::LongHead);
                }
                if end.is_none() {
                    break;
                }
                self.overhead += used;
                self.line(rest.get(..used).unwrap_or(&[]))?;
            }
            remove(buffer, filled, self.end..self.end + used);
        }
        Ok(())
    }

    /// A line between the data: a chunk's size, or a trailer.
    fn line(&mut self, line: &[u8]) -> Result<(), RequestError> {
        let line = match line {
            [line @ .., b'\r', b'\n'] if find(line, b'\r').is_none() => line,
            _ => return Err(RequestError::LineEnd),
        };
        if self.part == Part::Size {
            return self.chunk(line);
        }
        if line.is_empty() {
            self.part = Part::End;
        } else if find(line, b':').is_none() || line.starts_with(b" ") || find(line, 0).is_some() {
            return Err(RequestError::Trailer);
        }
        Ok(())
    }

    /// chunk-size [ chunk-ext ]
    fn chunk(&mut self, line: &[u8]) -> Result<(), RequestError> {
        let mut rest = line;
        self.left = 0;
        while let [digit, others @ ..] = rest
            && let Some(digit) = hexadecimal(*digit)
        {
            // More than a body may have is all the same.
            self.left = (self.left * 16 + usize::from(digit)).min(2 * BODY);
            rest = others;
        }
        let extends = rest.is_empty() || trim(rest).starts_with(b";");
        if rest.len() == line.len() || !extends {
            return Err(RequestError::ChunkSize);
        }
        if self.end - self.scanned + self.left > BODY {
            return Err(RequestError::LargeBody);
        }
        self.part = match self.left {
            0 => Part::Trailer,
            _ => Part::Data,
        };
        Ok(())
    }
}

/// The path of a request target, in origin form or absolute form (RFC 9112 section 3.2).
fn path(target: &[u8]) -> Result<&[u8], RequestError> {
    const SCHEME: &[u8] = b"http://";
    let visible = |byte: &u8| *byte > b' ' && *byte != 0x7f;
    let path = match target.split_at_checked(SCHEME.len()) {
        _ if !target.iter().all(visible) || valid_up_to(target) != target.len() => &[],
        Some((scheme, rest)) if same_word(scheme, SCHEME) => {
            let start = find(rest, b'/');
            start.and_then(|start| rest.get(start..)).unwrap_or(b"/")
        }
        _ => target,
    };
    match path {
        [b'/', ..] | b"*" => Ok(before(path, b'?')),
        _ => Err(RequestError::RequestTarget),
    }
}

fn route(method: &[u8], path: &[u8], old: bool, fields: &Fields) -> Target {
    let mut routes = split(ROUTES.as_bytes(), b'\n').zip(&CALLS);
    let Some((route, call)) = routes.find(|(route, _)| before(route, b' ') == path) else {
        return Target::Unknown;
    };
    let methods = route.get(path.len() + 1..).unwrap_or(&[]);
    if !members(methods).any(|allowed| allowed == method) {
        return Target::WrongMethod(methods);
    }
    if *call != Call::Session {
        return Target::Call(*call);
    }
    let handshake = !old && fields.upgrade && fields.upgrade_websocket && fields.version_13;
    match fields.accept {
        Some(accept) if handshake => Target::Upgrade(accept),
        _ => Target::NoUpgrade,
    }
}

/// A header line (RFC 9112 section 5): the name is a token up to its colon, the value has no control
/// characters but tabs. No white space around the name: that is where smuggling starts.
#[derive(Debug)]
pub struct HeaderLine<'a> {
    /// The name.
    pub name: &'a [u8],
    /// The value, without white space around it.
    pub value: &'a [u8],
    /// The lines behind it.
    rest: &'a [u8],
}

impl<'a> HeaderLine<'a> {
    /// To be [advanced](Self::advance) to the first line.
    pub fn before(lines: &'a [u8]) -> Self {
        Self {
            name: &[],
            value: &[],
            rest: lines,
        }
    }

    /// On to the next line; false when that is the empty one at the end, `None` when it is no
    /// header line.
    pub fn advance(&mut self) -> Option<bool> {
        let end = find(self.rest, b'\n')?;
        let line = self.rest.get(..end)?.strip_suffix(b"\r")?;
        self.rest = self.rest.get(end + 1..)?;
        if line.is_empty() {
            return Some(false);
        }
        self.name = before(line, b':');
        let value = line.get(self.name.len() + 1..)?;
        let plain = |byte: &u8| !byte.is_ascii_control() || *byte == b'\t';
        if !is_token(self.name) || !value.iter().all(plain) {
            return None;
        }
        self.value = trim(value);
        Some(true)
    }
}

/// Whether it is a token (RFC 9110 section 5.6.2).
fn is_token(word: &[u8]) -> bool {
    let right = |byte: &u8| byte.is_ascii_graphic() && find(DELIMITERS, *byte).is_none();
    !word.is_empty() && word.iter().all(right)
}

/// What the header lines say.
#[derive(Default)]
struct Fields {
    hosts: u32,
    length: Option<u32>,
    encodings: u32,
    unknown_encoding: bool,
    close: bool,
    keep_alive: bool,
    expects: bool,
    unknown_expectation: bool,
    upgrade: bool,
    upgrade_websocket: bool,
    version_13: bool,
    accept: Option<Accept>,
}

impl Fields {
    fn read(&mut self, bytes: &[u8]) -> Result<(), RequestError> {
        let mut line = HeaderLine::before(bytes);
        for _ in 0..=HEADERS {
            match line.advance() {
                Some(true) => self.line(line.name, line.value)?,
                Some(false) => return Ok(()),
                None => return Err(RequestError::Header),
            }
        }
        Err(RequestError::LongHead)
    }

    fn line(&mut self, name: &[u8], value: &[u8]) -> Result<(), RequestError> {
        let is = |other: &str| same_word(name, other.as_bytes());
        if is("host") {
            self.hosts += 1;
        } else if is("content-length") {
            // A list of equal lengths is one length (RFC 9110 section 8.6).
            for member in members(value) {
                let length = length(member)?;
                if self.length.is_some_and(|earlier| earlier != length) {
                    return Err(RequestError::Length);
                }
                self.length = Some(length);
            }
        } else if is("transfer-encoding") {
            if value.is_empty() {
                return Err(RequestError::Encodings);
            }
            for member in members(value) {
                self.encodings += 1;
                self.unknown_encoding |= !same_word(member, b"chunked");
            }
        } else if is("connection") {
            self.close |= lists(value, "close");
            self.keep_alive |= lists(value, "keep-alive");
            self.upgrade |= lists(value, "upgrade");
        } else if is("expect") {
            let known = same_word(value, b"100-continue");
            self.expects |= known;
            self.unknown_expectation |= !known;
        } else if is("upgrade") {
            self.upgrade_websocket |= lists(value, "websocket");
        } else if is("sec-websocket-version") {
            self.version_13 = value == b"13";
        } else if is("sec-websocket-key") {
            self.accept = accept(value);
        }
        Ok(())
    }
}

fn members(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    split(value, b',').map(trim)
}

fn lists(value: &[u8], word: &str) -> bool {
    members(value).any(|member| same_word(member, word.as_bytes()))
}

/// 1*DIGIT; what is larger than any body is [`u32::MAX`].
fn length(digits: &[u8]) -> Result<u32, RequestError> {
    match decimal(digits) {
        Some(length) => Ok(length),
        None if !digits.is_empty() && digits.iter().all(u8::is_ascii_digit) => Ok(u32::MAX),
        None => Err(RequestError::Length),
    }
}

/// The answer to a handshake's key, which is base64 of 16 bytes (RFC 6455 section 4.2.2).
fn accept(key: &[u8]) -> Option<Accept> {
    let digits = key.strip_suffix(b"==")?;
    if digits.len() != 22
        || !digits
            .iter()
            .all(|digit| find(digest::BASE64, *digit).is_some())
    {
        return None;
    }
    let mut message = [0; 60];
    let text = key.iter().chain(b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
    for (slot, byte) in message.iter_mut().zip(text) {
        *slot = *byte;
    }
    Some(digest::base64(&digest::sha1(&message)))
}

/// The head of a response with a JSON body of `length` bytes. `allow`: the methods there are, for
/// [`Status::MethodNotAllowed`].
pub fn response(status: Status, style: Style, length: usize, allow: &[u8]) -> Message {
    let mut head = message!(
        "HTTP/1.1 {}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n",
        status.line().lossy()
    );
    // A head is far shorter than a message.
    let mut line = |line: &str| {
        let _fits = head.write_str(line);
    };
    if !allow.is_empty() {
        line("Allow: ");
        line(core::str::from_utf8(allow).unwrap_or(""));
        line("\r\n");
    }
    if status == Status::UpgradeRequired {
        line("Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n");
    }
    if !style.keep_alive {
        line("Connection: close\r\n");
    } else if style.old {
        line("Connection: keep-alive\r\n");
    }
    line("\r\n");
    head
}

/// The head that accepts a WebSocket handshake.
pub fn switching(accept: &Accept) -> Message {
    message!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
        Sec-WebSocket-Accept: {}\r\n\r\n",
        accept[..].lossy()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    type Answer = Result<(Target, Style, Vec<u8>), RequestError>;

    /// Feeds `bytes` in pieces of `step`; all answers, with their bodies, up to the first refusal.
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
                    Progress::Ready => {
                        let body = reader.body();
                        answers.push(Ok((
                            reader.target,
                            reader.style,
                            buffer[body.clone()].to_vec(),
                        )));
                        buffer.copy_within(body.end..filled, 0);
                        filled -= body.end;
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

    fn one(text: &str) -> Result<(Target, Style, Vec<u8>), RequestError> {
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
        one(text).map_or_else(|refusal| refusal.status() as u16, |_| 200)
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
        assert_eq!(feed(over.as_bytes(), 4096), [Err(RequestError::LargeBody)]);
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
            Progress::Ready
        ));
    }

    #[test]
    fn one_who_asks_for_what_there_is_not_hears_so_at_once_and_the_connection_closes() {
        for (line, target) in [
            ("GET /v1/exec", Target::WrongMethod(b"POST")),
            ("POST /none", Target::Unknown),
        ] {
            let head = format!(
                "{line} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n"
            );
            let (seen, style, body) = one(&head).unwrap();
            assert_eq!((seen, style.keep_alive, body.len()), (target, false, 0));
        }
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
        assert_eq!(target("POST /v1/status"), Target::WrongMethod(b"GET, HEAD"));
        assert_eq!(target("GET /v1/exec"), Target::WrongMethod(b"POST"));
        assert_eq!(target("HEAD /v1/ws/exec"), Target::WrongMethod(b"GET"));
        assert_eq!(target("get /v1/status"), Target::WrongMethod(b"GET, HEAD"));
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
            ("GET /v1/status HTTP/1.1\rXHost:x\r\n\r\n".into(), 505),
            (
                "POST /v1/exec HTTP/1.0\rX\r\nContent-Length: 9\r\n\r\n".into(),
                505,
            ),
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
        assert_eq!(feed(long.as_bytes(), 4096), [Err(RequestError::LongHead)]);
    }

    #[test]
    fn each_refusal_has_its_sentence() {
        for (refusal, why) in [
            (RequestError::LineEnd, "a line does not end with CRLF"),
            (RequestError::LargeBody, "the body is over 128 KiB"),
            (RequestError::Trailer, "a trailer is malformed"),
        ] {
            assert_eq!(refusal.why(), why.as_bytes());
        }
    }

    #[test]
    fn a_header_line_is_a_token_a_colon_and_no_control_characters() {
        for byte in 0..=255u8 {
            let of_token = byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
            let lines = [b"X", &[byte][..], b": 1\r\n\r\n"].concat();
            let mut line = HeaderLine::before(&lines);
            let right = of_token || byte == b':';
            assert_eq!(line.advance(), right.then_some(true), "{byte:x} in a name");
            let lines = [b"X: ", &[byte][..], b"1\r\n\r\n"].concat();
            let mut line = HeaderLine::before(&lines);
            let right = byte == b'\t' || (byte >= b' ' && byte != 0x7f);
            assert_eq!(line.advance(), right.then_some(true), "{byte:x} in a value");
        }
        let mut line = HeaderLine::before(b"A:\r\nB: \t c d \r\n\r\nrest");
        assert_eq!(line.advance(), Some(true));
        assert_eq!((line.name, line.value), (&b"A"[..], &b""[..]));
        assert_eq!(line.advance(), Some(true));
        assert_eq!((line.name, line.value), (&b"B"[..], &b"c d"[..]));
        assert_eq!(line.advance(), Some(false));
        for bad in [
            "A: b\n\r\n",
            " A: b\r\n",
            "A : b\r\n",
            "A\r\n",
            ": b\r\n",
            "A: b",
        ] {
            assert_eq!(
                HeaderLine::before(bad.as_bytes()).advance(),
                None,
                "{bad:?}"
            );
        }
    }

    #[test]
    fn long_heads_are_refused_before_they_end() {
        let long = format!("GET /v1/status HTTP/1.1\r\nA: {}", "x".repeat(HEAD));
        assert_eq!(feed(long.as_bytes(), 100), [Err(RequestError::LongHead)]);
        let many = format!(
            "GET /v1/status HTTP/1.1\r\nHost: x\r\n{}\r\n",
            "A: b\r\n".repeat(HEADERS)
        );
        assert_eq!(feed(many.as_bytes(), 100), [Err(RequestError::LongHead)]);
        let blank = "\r\n".repeat(HEAD);
        assert_eq!(
            feed(blank.as_bytes(), 100),
            [Err(RequestError::RequestLine)]
        );
    }

    #[test]
    fn response_heads_say_how_the_connection_goes_on() {
        let head = |style| {
            let line = response(Status::MethodNotAllowed, style, 5, b"GET");
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
