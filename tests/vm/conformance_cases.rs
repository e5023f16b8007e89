//! How the API must handle malformed requests and frames, and unusual valid ones.
//! (RFC 9110, RFC 9112, RFC 6455; the limits are the API's own.)

use pigeon_lab::ws::{self, BINARY, CLOSE, CONTINUATION, LAST, PING, PONG, TEXT};

/// The bytes that a client sends on a new connection, and the expected responses.
pub struct Exchange {
    pub name: &'static str,
    pub bytes: Vec<u8>,
    /// The status codes of all responses, in order; [`ERROR`] is any error.
    pub statuses: Vec<u16>,
    /// Whether the connection stays open and a following request gets a response.
    pub open: bool,
}

/// Any status from 400 to 599.
pub const ERROR: u16 = 0;

/// The frames that a client sends to a session that runs `cat`, and the expected response.
pub struct Frames {
    pub name: &'static str,
    pub bytes: Vec<u8>,
    /// All binary messages, concatenated.
    pub echo: Vec<u8>,
    pub pongs: Vec<Vec<u8>>,
    /// The code in the close frame, if the connection is to be closed; `Some(None)`: without one.
    pub close: Option<Option<u16>>,
}

/// The largest request head and body.
const HEAD: usize = 16 << 10;
const BODY: usize = 128 << 10;
/// The largest message.
const MESSAGE: usize = 128 << 10;

const HOST: &str = "Host: x\r\n";
const SIGNAL: &str = r#"{"signal":28}"#;

/// `GET /v1/status` with these header lines, each with its CRLF.
fn get(lines: &str) -> String {
    format!("GET /v1/status HTTP/1.1\r\n{HOST}{lines}\r\n")
}

/// A request with this request line.
fn line(line: &str) -> String {
    format!("{line}\r\n{HOST}\r\n")
}

/// `POST /v1/signals` with these header lines and this text after the head.
fn post(lines: &str, body: &str) -> String {
    format!("POST /v1/signals HTTP/1.1\r\n{HOST}{lines}\r\n{body}")
}

/// `POST /v1/signals` with this encoded chunked body.
fn chunks(body: &str) -> String {
    post("Transfer-Encoding: chunked\r\n", body)
}

/// This body in chunks of `size` bytes, without the last chunk.
fn in_chunks(body: &str, size: usize) -> String {
    let chunks = body.as_bytes().chunks(size);
    chunks
        .map(|chunk| {
            format!(
                "{:x}\r\n{}\r\n",
                chunk.len(),
                String::from_utf8_lossy(chunk)
            )
        })
        .collect()
}

/// A JSON body of `size` bytes that requests a harmless signal.
fn padded(size: usize) -> String {
    let padding = " ".repeat(size - SIGNAL.len());
    format!("{SIGNAL}{padding}")
}

/// A header line that makes the head of [`get`] `size` bytes long.
fn head_of(size: usize) -> String {
    let rest = get("A: \r\n").len();
    get(&format!("A: {}\r\n", "x".repeat(size - rest)))
}

/// A handshake with one of its lines replaced.
fn handshake(method: &str, version: &str, change: (&str, &str)) -> String {
    let mut lines = String::new();
    for (name, value) in ws::handshake() {
        match change {
            (changed, "") if changed == name => {}
            (changed, other) if changed == name => lines += &format!("{name}: {other}\r\n"),
            _ => lines += &format!("{name}: {value}\r\n"),
        }
    }
    format!("{method} /v1/ws/exec HTTP/{version}\r\n{HOST}{lines}\r\n")
}

pub fn exchanges() -> Vec<Exchange> {
    const OPEN: bool = true;
    const CLOSES: bool = false;
    let status = get("");
    let length = SIGNAL.len();
    let signal = post(&format!("Content-Length: {length}\r\n"), SIGNAL);
    let mut cases = vec![];
    let mut case = |name, bytes: &str, statuses: &[u16], open| {
        cases.push(Exchange {
            name,
            bytes: bytes.into(),
            statuses: statuses.into(),
            open,
        });
    };

    // Request lines.
    case("plain", &status, &[200], OPEN);
    case("HEAD", &line("HEAD /v1/status HTTP/1.1"), &[200], OPEN);
    case(
        "a query",
        &line("GET /v1/status?a=/b HTTP/1.1"),
        &[200],
        OPEN,
    );
    case(
        "an empty query",
        &line("GET /v1/status? HTTP/1.1"),
        &[200],
        OPEN,
    );
    case(
        "absolute form",
        &line("GET http://vm:80/v1/status HTTP/1.1"),
        &[200],
        OPEN,
    );
    case(
        "absolute form, capitals",
        &line("GET HTTP://vm/v1/status HTTP/1.1"),
        &[200],
        OPEN,
    );
    case(
        "absolute form without a path",
        &line("GET http://vm HTTP/1.1"),
        &[404],
        OPEN,
    );
    case("asterisk form", &line("OPTIONS * HTTP/1.1"), &[404], OPEN);
    case(
        "authority form",
        &line("CONNECT vm:80 HTTP/1.1"),
        // Not an IP address, or CONNECT is not built in.
        &[ERROR],
        CLOSES,
    );
    case("no slash", &line("GET v1/status HTTP/1.1"), &[400], CLOSES);
    case(
        "an escaped path is another path",
        &line("GET /v1/%73tatus HTTP/1.1"),
        &[404],
        OPEN,
    );
    case(
        "dots are not resolved",
        &line("GET /v1/../v1/status HTTP/1.1"),
        &[404],
        OPEN,
    );
    case(
        "a double slash is another path",
        &line("GET //v1/status HTTP/1.1"),
        &[404],
        OPEN,
    );
    case(
        "a longer path",
        &line("GET /v1/statusx HTTP/1.1"),
        &[404],
        OPEN,
    );
    case("no path", &line("GET / HTTP/1.1"), &[404], OPEN);
    case(
        "an unknown method",
        &line("BREW /v1/status HTTP/1.1"),
        &[405],
        OPEN,
    );
    case(
        "methods have one case",
        &line("get /v1/status HTTP/1.1"),
        &[405],
        OPEN,
    );
    case(
        "HEAD where there is POST",
        &line("HEAD /v1/signals HTTP/1.1"),
        &[405],
        OPEN,
    );
    case(
        "two spaces after the method",
        &line("GET  /v1/status HTTP/1.1"),
        &[400],
        CLOSES,
    );
    case(
        "two spaces before the version",
        &line("GET /v1/status  HTTP/1.1"),
        &[ERROR],
        CLOSES,
    );
    case(
        "a space at the end",
        &line("GET /v1/status HTTP/1.1 "),
        &[ERROR],
        CLOSES,
    );
    case(
        "a tab for a space",
        &line("GET\t/v1/status HTTP/1.1"),
        &[400],
        CLOSES,
    );
    case(
        "a space before",
        &line(" GET /v1/status HTTP/1.1"),
        &[400],
        CLOSES,
    );
    case(
        "a space in the path",
        &line("GET /v1/sta tus HTTP/1.1"),
        &[ERROR],
        CLOSES,
    );
    case("no version", "GET /v1/status\r\n\r\n", &[400], CLOSES);
    case("no path and no version", "GET\r\n\r\n", &[400], CLOSES);
    case("HTTP/2.0", &line("GET /v1/status HTTP/2.0"), &[505], CLOSES);
    case("HTTP/0.9", &line("GET /v1/status HTTP/0.9"), &[505], CLOSES);
    case(
        "a version of another protocol",
        &line("GET /v1/status ICY/1.1"),
        &[ERROR],
        CLOSES,
    );
    case(
        "a version in small letters",
        &line("GET /v1/status http/1.1"),
        &[ERROR],
        CLOSES,
    );
    case("HTTP/1.", &line("GET /v1/status HTTP/1."), &[ERROR], CLOSES);
    case(
        "HTTP/1.10",
        &line("GET /v1/status HTTP/1.10"),
        &[ERROR],
        CLOSES,
    );
    case(
        "HTTP/2's preface",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        &[505],
        CLOSES,
    );
    case(
        "a method with a colon",
        &line("GE:T /v1/status HTTP/1.1"),
        &[400],
        CLOSES,
    );
    case(
        "a NUL in the path",
        &line("GET /v1/sta\0tus HTTP/1.1"),
        &[400],
        CLOSES,
    );
    case(
        "a TLS client",
        "\x16\x03\x01\x02\0\x01\0\x01\x7c\x03\x03\r\n\r\n",
        &[400],
        CLOSES,
    );
    case(
        "an SSH client",
        "SSH-2.0-OpenSSH_9.6\r\n\r\n",
        &[400],
        CLOSES,
    );
    case(
        "one empty line before",
        &format!("\r\n{status}"),
        &[200],
        OPEN,
    );
    case(
        "some empty lines before",
        &format!("\r\n\r\n{status}"),
        &[200],
        OPEN,
    );
    case("a bare LF before", &format!("\n{status}"), &[400], CLOSES);
    case(
        "empty lines without end",
        &"\r\n".repeat(100),
        &[400],
        CLOSES,
    );

    // Line endings.
    case(
        "bare LF everywhere",
        "GET /v1/status HTTP/1.1\nHost: x\n\n",
        &[400],
        CLOSES,
    );
    case(
        "bare LF after the request line",
        "GET /v1/status HTTP/1.1\nHost: x\r\n\r\n",
        &[400],
        CLOSES,
    );
    case(
        "bare LF after a header",
        "GET /v1/status HTTP/1.1\r\nHost: x\n\r\n",
        &[400],
        CLOSES,
    );
    case(
        "bare LF for the empty line",
        "GET /v1/status HTTP/1.1\r\nHost: x\r\n\n",
        &[400],
        CLOSES,
    );
    case("a bare CR in a value", &get("A: b\rc\r\n"), &[400], CLOSES);
    case(
        "a bare CR as a line end",
        &get("A: b\rContent-Length: 5\r\n"),
        &[400],
        CLOSES,
    );
    case("CR CR LF", &get("A: b\r\r\n"), &[400], CLOSES);

    // Header lines.
    case(
        "no white space after the colon",
        &get("A:b\r\n"),
        &[200],
        OPEN,
    );
    case(
        "white space around a value",
        &get("Connection: \t keep-alive \t \r\n"),
        &[200],
        OPEN,
    );
    case("an empty value", &get("A:\r\n"), &[200], OPEN);
    case(
        "bytes above ASCII in a value",
        &get("A: h\u{e9}\r\n"),
        &[200],
        OPEN,
    );
    case(
        "all of a name's characters",
        &get("!#$%&'*+-.^_`|~09aZ: b\r\n"),
        &[200],
        OPEN,
    );
    case(
        "a header continued on the next line",
        &get("A: b\r\n c\r\n"),
        &[400],
        CLOSES,
    );
    case(
        "a header continued after a tab",
        &get("A: b\r\n\tc\r\n"),
        &[400],
        CLOSES,
    );
    case(
        "a length continued on the next line",
        &post("Content-Length:\r\n 13\r\n", SIGNAL),
        &[400],
        CLOSES,
    );
    case(
        "white space before the first header",
        "GET /v1/status HTTP/1.1\r\n Host: x\r\n\r\n",
        &[400],
        CLOSES,
    );
    case(
        "white space before the colon",
        &get("A : b\r\n"),
        &[400],
        CLOSES,
    );
    case("a tab before the colon", &get("A\t: b\r\n"), &[400], CLOSES);
    case("no colon", &get("A b\r\n"), &[400], CLOSES);
    case("no name", &get(": b\r\n"), &[400], CLOSES);
    case("a NUL in a name", &get("A\0: b\r\n"), &[400], CLOSES);
    case("a NUL in a value", &get("A: b\0\r\n"), &[400], CLOSES);
    case(
        "a control character in a value",
        &get("A: b\x01\r\n"),
        &[400],
        CLOSES,
    );
    case("DEL in a value", &get("A: b\x7f\r\n"), &[400], CLOSES);
    case("a name in brackets", &get("[A]: b\r\n"), &[400], CLOSES);
    case("no Host", "GET /v1/status HTTP/1.1\r\n\r\n", &[400], CLOSES);
    case("two Hosts", &get("Host: y\r\n"), &[400], CLOSES);
    case(
        "an empty Host",
        "GET /v1/status HTTP/1.1\r\nHost:\r\n\r\n",
        &[200],
        OPEN,
    );
    case(
        "no Host in HTTP/1.0",
        "GET /v1/status HTTP/1.0\r\n\r\n",
        &[200],
        CLOSES,
    );
    case("the longest head", &head_of(HEAD), &[200], OPEN);
    case("a head too long by one", &head_of(HEAD + 1), &[431], CLOSES);
    case(
        "a head without end",
        &head_of(2 * HEAD)[..2 * HEAD - 4],
        &[431],
        CLOSES,
    );
    case(
        "the most headers",
        &get(&"A: b\r\n".repeat(63)),
        &[200],
        OPEN,
    );
    case(
        "too many headers",
        &get(&"A: b\r\n".repeat(64)),
        &[431],
        CLOSES,
    );

    // Persistence.
    case(
        "Connection: close",
        &get("Connection: close\r\n"),
        &[200],
        CLOSES,
    );
    case(
        "close in a list",
        &get("Connection: foo, Close\r\n"),
        &[200],
        CLOSES,
    );
    case(
        "close in another line",
        &get("Connection: foo\r\nConnection: close\r\n"),
        &[200],
        CLOSES,
    );
    case(
        "close and keep-alive",
        &get("Connection: keep-alive, close\r\n"),
        &[200],
        CLOSES,
    );
    case(
        "HTTP/1.0 that stays",
        "GET /v1/status HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
        &[200],
        OPEN,
    );
    case(
        "a pipeline",
        &format!("{status}{signal}{status}"),
        &[200, 200, 200],
        OPEN,
    );
    case(
        "a pipeline of errors",
        &format!(
            "{}{}{status}",
            line("GET /x HTTP/1.1"),
            line("PUT /v1/exec HTTP/1.1")
        ),
        &[404, 405, 200],
        OPEN,
    );
    case("a long pipeline", &status.repeat(300), &[200; 300], OPEN);
    case(
        "nothing after close",
        &format!("{}{status}", get("Connection: close\r\n")),
        &[200],
        CLOSES,
    );
    case(
        "nothing after a malformed request",
        &format!("{}{status}", get("A b\r\n")),
        &[400],
        CLOSES,
    );

    // Lengths.
    case("a body", &signal, &[200], OPEN);
    case("no body where one is needed", &post("", ""), &[400], OPEN);
    case(
        "a body of length 0",
        &post("Content-Length: 0\r\n", ""),
        &[400],
        OPEN,
    );
    case(
        "a body of a GET is read past",
        &format!("{}hello{status}", get("Content-Length: 5\r\n")),
        &[200, 200],
        OPEN,
    );
    case(
        "the name in capitals",
        &post("CONTENT-LENGTH: 13\r\n", SIGNAL),
        &[200],
        OPEN,
    );
    case(
        "zeros before a length",
        &post("Content-Length: 0000000000000000000000013\r\n", SIGNAL),
        &[200],
        OPEN,
    );
    case(
        "the same length twice",
        &post("Content-Length: 13\r\nContent-Length: 13\r\n", SIGNAL),
        &[200],
        OPEN,
    );
    case(
        "two different lengths",
        &post("Content-Length: 13\r\nContent-Length: 14\r\n", SIGNAL),
        &[400],
        CLOSES,
    );
    case(
        "two different lengths in one line",
        &post("Content-Length: 13, 14\r\n", SIGNAL),
        &[400],
        CLOSES,
    );
    case(
        "a length and nothing in one line",
        &post("Content-Length: 13,\r\n", SIGNAL),
        &[400],
        CLOSES,
    );
    case(
        "a negative length",
        &post("Content-Length: -1\r\n", ""),
        &[400],
        CLOSES,
    );
    case(
        "a length with a plus",
        &post("Content-Length: +13\r\n", SIGNAL),
        &[400],
        CLOSES,
    );
    case(
        "a length in hexadecimal",
        &post("Content-Length: 0xd\r\n", SIGNAL),
        &[400],
        CLOSES,
    );
    case(
        "a length with a fraction",
        &post("Content-Length: 13.0\r\n", SIGNAL),
        &[400],
        CLOSES,
    );
    case(
        "a length with an underscore",
        &post("Content-Length: 1_3\r\n", SIGNAL),
        &[400],
        CLOSES,
    );
    case(
        "a length in quotes",
        &post("Content-Length: \"13\"\r\n", SIGNAL),
        &[400],
        CLOSES,
    );
    case(
        "a length of two numbers",
        &post("Content-Length: 1 3\r\n", SIGNAL),
        &[400],
        CLOSES,
    );
    case(
        "an empty length",
        &post("Content-Length:\r\n", SIGNAL),
        &[400],
        CLOSES,
    );
    case(
        "a length in other digits",
        &post("Content-Length: \u{661}\u{663}\r\n", SIGNAL),
        &[400],
        CLOSES,
    );
    case(
        "the longest body",
        &post(&format!("Content-Length: {BODY}\r\n"), &padded(BODY)),
        &[200],
        OPEN,
    );
    case(
        "a body too long by one",
        &post(&format!("Content-Length: {}\r\n", BODY + 1), ""),
        &[413],
        CLOSES,
    );
    case(
        "a length beyond 32 bits",
        &post("Content-Length: 4294967309\r\n", SIGNAL),
        &[413],
        CLOSES,
    );
    case(
        "a length beyond 64 bits",
        &post("Content-Length: 18446744073709551629\r\n", SIGNAL),
        &[413],
        CLOSES,
    );
    case(
        "a length of a hundred digits",
        &post(&format!("Content-Length: {}\r\n", "9".repeat(100)), ""),
        &[413],
        CLOSES,
    );

    // Transfer encodings: ambiguous lengths are rejected (request smuggling).
    case(
        "chunked",
        &chunks(&format!("d\r\n{SIGNAL}\r\n0\r\n\r\n")),
        &[200],
        OPEN,
    );
    case(
        "chunked, in capitals",
        &post(
            "TRANSFER-ENCODING: CHUNKED\r\n",
            &format!("D\r\n{SIGNAL}\r\n0\r\n\r\n"),
        ),
        &[200],
        OPEN,
    );
    case(
        "chunked and a length",
        &post(
            "Transfer-Encoding: chunked\r\nContent-Length: 13\r\n",
            &format!("d\r\n{SIGNAL}\r\n0\r\n\r\n"),
        ),
        &[400],
        CLOSES,
    );
    case(
        "a length and chunked",
        &post(
            "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
            &format!("d\r\n{SIGNAL}\r\n0\r\n\r\n"),
        ),
        &[400],
        CLOSES,
    );
    case(
        "a length of 0 and chunked",
        &post(
            "Content-Length: 0\r\nTransfer-Encoding: chunked\r\n",
            "0\r\n\r\n",
        ),
        &[400],
        CLOSES,
    );
    case(
        "identity",
        &post("Transfer-Encoding: identity\r\n", SIGNAL),
        &[ERROR],
        CLOSES,
    );
    case(
        "gzip",
        &post("Transfer-Encoding: gzip\r\n", ""),
        &[501],
        CLOSES,
    );
    case(
        "gzip and chunked",
        &post("Transfer-Encoding: gzip, chunked\r\n", "0\r\n\r\n"),
        &[ERROR],
        CLOSES,
    );
    case(
        "chunked and gzip",
        &post("Transfer-Encoding: chunked, gzip\r\n", "0\r\n\r\n"),
        &[ERROR],
        CLOSES,
    );
    case(
        "chunked twice",
        &post("Transfer-Encoding: chunked, chunked\r\n", "0\r\n\r\n"),
        &[400],
        CLOSES,
    );
    case(
        "chunked in two lines",
        &post(
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
            "0\r\n\r\n",
        ),
        &[400],
        CLOSES,
    );
    case(
        "chunked and identity in two lines",
        &post(
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
            "0\r\n\r\n",
        ),
        &[ERROR],
        CLOSES,
    );
    case(
        "an empty transfer encoding",
        &post("Transfer-Encoding:\r\n", SIGNAL),
        &[400],
        CLOSES,
    );
    case(
        "a comma alone",
        &post("Transfer-Encoding: ,\r\n", "0\r\n\r\n"),
        &[ERROR],
        CLOSES,
    );
    case(
        "xchunked",
        &post("Transfer-Encoding: xchunked\r\n", "0\r\n\r\n"),
        &[501],
        CLOSES,
    );
    case(
        "chunked with a parameter",
        &post("Transfer-Encoding: chunked;q=1\r\n", "0\r\n\r\n"),
        &[ERROR],
        CLOSES,
    );
    case(
        "chunked after a vertical tab",
        &post("Transfer-Encoding: \x0bchunked\r\n", "0\r\n\r\n"),
        &[400],
        CLOSES,
    );
    case(
        "chunked in quotes",
        &post("Transfer-Encoding: \"chunked\"\r\n", "0\r\n\r\n"),
        &[ERROR],
        CLOSES,
    );
    case(
        "white space before chunked's colon",
        &post("Transfer-Encoding : chunked\r\n", "0\r\n\r\n"),
        &[400],
        CLOSES,
    );
    case(
        "chunked in HTTP/1.0",
        "POST /v1/signals HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        &[400],
        CLOSES,
    );

    // Chunks.
    case(
        "many chunks",
        &chunks(&format!(
            "1\r\n{{\r\n00b\r\n{}\r\n1\r\n}}\r\n000\r\n\r\n",
            &SIGNAL[1..12]
        )),
        &[200],
        OPEN,
    );
    case(
        "chunks and then a request",
        &format!("{}{status}", chunks(&format!("d\r\n{SIGNAL}\r\n0\r\n\r\n"))),
        &[200, 200],
        OPEN,
    );
    case(
        "extensions",
        &chunks(&format!("d;a=b;c=\"d;e\"\r\n{SIGNAL}\r\n0;x\r\n\r\n")),
        &[200],
        OPEN,
    );
    case(
        "white space before an extension",
        &chunks(&format!("d ;a\r\n{SIGNAL}\r\n0\r\n\r\n")),
        &[200],
        OPEN,
    );
    case(
        "trailers",
        &chunks(&format!("d\r\n{SIGNAL}\r\n0\r\nA: b\r\nC: d\r\n\r\n")),
        &[200],
        OPEN,
    );
    case(
        "a length among the trailers",
        &chunks(&format!(
            "d\r\n{SIGNAL}\r\n0\r\nContent-Length: 5\r\n\r\n{status}"
        )),
        &[200, 200],
        OPEN,
    );
    case(
        "the largest body in chunks",
        &chunks(&format!("20000\r\n{}\r\n0\r\n\r\n", padded(BODY))),
        &[200],
        OPEN,
    );
    case(
        "a large body in chunks of ten bytes",
        &chunks(&format!("{}0\r\n\r\n", in_chunks(&padded(100_000), 10))),
        &[200],
        OPEN,
    );
    case(
        "a long head, the largest body and long trailers",
        &post(
            &format!(
                "A: {}\r\nTransfer-Encoding: chunked\r\n",
                "x".repeat(15 << 10)
            ),
            &format!(
                "{}0\r\nT: {}\r\n\r\n",
                in_chunks(&padded(BODY), 1000),
                "t".repeat(9 << 10)
            ),
        ),
        &[200],
        OPEN,
    );
    case(
        "chunks too large by one",
        &chunks(&format!("20000\r\n{}\r\n1\r\n", padded(BODY))),
        &[413],
        CLOSES,
    );
    case("a chunk too large", &chunks("20001\r\n"), &[413], CLOSES);
    case(
        "a size beyond 32 bits",
        &chunks("10000000d\r\n"),
        &[413],
        CLOSES,
    );
    case(
        "a size beyond 64 bits",
        &chunks("1000000000000000d\r\n"),
        &[413],
        CLOSES,
    );
    case("a negative size", &chunks("-1\r\n"), &[400], CLOSES);
    case("a size with a plus", &chunks("+d\r\n"), &[400], CLOSES);
    case("a size with 0x", &chunks("0xd\r\n"), &[400], CLOSES);
    case("a size that is none", &chunks("g\r\n"), &[400], CLOSES);
    case("no size", &chunks("\r\n"), &[400], CLOSES);
    case("only an extension", &chunks(";a=b\r\n"), &[400], CLOSES);
    case(
        "white space before a size",
        &chunks(" d\r\n"),
        &[400],
        CLOSES,
    );
    case(
        "white space after a size",
        &chunks("d \r\n"),
        &[400],
        CLOSES,
    );
    case("a size in two parts", &chunks("1 3\r\n"), &[400], CLOSES);
    case(
        "an underscore in a size",
        &chunks("0_d\r\n"),
        &[400],
        CLOSES,
    );
    case(
        "bare LF after a size",
        &chunks(&format!("d\n{SIGNAL}\r\n0\r\n\r\n")),
        &[400],
        CLOSES,
    );
    case(
        "bare CR in an extension",
        &chunks(&format!("d;a\rb\r\n{SIGNAL}\r\n0\r\n\r\n")),
        &[400],
        CLOSES,
    );
    case(
        "bare LF after a chunk",
        &chunks(&format!("d\r\n{SIGNAL}\n0\r\n\r\n")),
        &[400],
        CLOSES,
    );
    case(
        "bare CR after a chunk",
        &chunks(&format!("d\r\n{SIGNAL}\r0\r\n\r\n")),
        &[400],
        CLOSES,
    );
    case(
        "a chunk longer than its size",
        &chunks(&format!("c\r\n{SIGNAL}\r\n0\r\n\r\n")),
        &[400],
        CLOSES,
    );
    case(
        "a chunk shorter than its size",
        &chunks(&format!("e\r\n{SIGNAL}\r\n0\r\n\r\n")),
        &[400],
        CLOSES,
    );
    case(
        "no last CRLF but a request",
        &chunks(&format!("d\r\n{SIGNAL}\r\n0\r\n{status}")),
        &[400],
        CLOSES,
    );
    case(
        "a trailer that is none",
        &chunks("0\r\nno colon\r\n\r\n"),
        &[400],
        CLOSES,
    );
    case(
        "a trailer that goes on",
        &chunks("0\r\nA: b\r\n c\r\n\r\n"),
        &[400],
        CLOSES,
    );
    case(
        "a trailer with a bare LF",
        &chunks("0\r\nA: b\n\r\n"),
        &[400],
        CLOSES,
    );
    case(
        "an endless extension",
        &chunks(&format!("d;{}", "e".repeat(HEAD + 1))),
        &[431],
        CLOSES,
    );
    case(
        "endless trailers",
        &chunks(&format!("0\r\n{}", "A: b\r\n".repeat(HEAD))),
        &[431],
        CLOSES,
    );

    // Expectations.
    case(
        "100-continue with the body at once",
        &post("Expect: 100-continue\r\nContent-Length: 13\r\n", SIGNAL),
        &[200],
        OPEN,
    );
    case(
        "another expectation",
        &post("Expect: 200-ok\r\nContent-Length: 13\r\n", SIGNAL),
        &[417],
        CLOSES,
    );
    case(
        "100-continue for too large a body",
        &post("Expect: 100-continue\r\nContent-Length: 131073\r\n", ""),
        &[413],
        CLOSES,
    );

    // Bodies.
    case(
        "not JSON",
        &post("Content-Length: 3\r\n", "{]}"),
        &[400],
        OPEN,
    );
    case(
        "JSON and more",
        &post("Content-Length: 15\r\n", r#"{"signal":28}{}"#),
        &[400],
        OPEN,
    );
    case(
        "nested without end",
        &post("Content-Length: 100000\r\n", &"[".repeat(100_000)),
        &[400],
        OPEN,
    );
    case(
        "nested too deep in what is ignored",
        &post(
            "Content-Length: 1010\r\n",
            &format!("{{\"x\":{}{}}}   ", "[".repeat(501), "]".repeat(501))[..1010],
        ),
        &[400],
        OPEN,
    );

    // Handshakes.
    case(
        "no handshake",
        &line("GET /v1/ws/exec HTTP/1.1"),
        &[426],
        OPEN,
    );
    case(
        "POST for a handshake",
        &handshake("POST", "1.1", ("", "")),
        &[405],
        OPEN,
    );
    case(
        "a handshake in HTTP/1.0",
        &handshake("GET", "1.0", ("", "")),
        &[426],
        CLOSES,
    );
    case(
        "version 8",
        &handshake("GET", "1.1", ("Sec-WebSocket-Version", "8")),
        &[426],
        OPEN,
    );
    case(
        "no version of the protocol",
        &handshake("GET", "1.1", ("Sec-WebSocket-Version", "")),
        &[426],
        OPEN,
    );
    case(
        "no key",
        &handshake("GET", "1.1", ("Sec-WebSocket-Key", "")),
        &[ERROR],
        OPEN,
    );
    case(
        "a key that is no base64",
        &handshake(
            "GET",
            "1.1",
            ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=!"),
        ),
        &[ERROR],
        OPEN,
    );
    case(
        "a key too short",
        &handshake("GET", "1.1", ("Sec-WebSocket-Key", "c2hvcnQ=")),
        &[ERROR],
        OPEN,
    );
    case(
        "an upgrade to something else",
        &handshake("GET", "1.1", ("Upgrade", "h2c")),
        &[426],
        OPEN,
    );
    case(
        "an upgrade without Connection",
        &handshake("GET", "1.1", ("Connection", "keep-alive")),
        &[426],
        OPEN,
    );
    case(
        "an upgrade of another path is ignored",
        &get("Upgrade: websocket\r\nConnection: Upgrade\r\n"),
        &[200],
        OPEN,
    );
    case(
        "a handshake",
        &handshake("GET", "1.1", ("", "")),
        &[101],
        CLOSES,
    );
    case(
        "a handshake as browsers send it",
        &handshake("GET", "1.1", ("Connection", "keep-alive, Upgrade")),
        &[101],
        CLOSES,
    );
    case(
        "a handshake in other letters",
        &handshake("GET", "1.1", ("Upgrade", "WebSocket")),
        &[101],
        CLOSES,
    );
    let head = "POST /v1/signals HTTP/1.1\r\nHost: x\r\nContent-Length: 17\r\n\r\n";
    cases.push(Exchange {
        name: "a body that is not UTF-8",
        bytes: [head.as_bytes(), b"{\"signal\":28,\"\xff\":"].concat(),
        statuses: vec![400],
        open: true,
    });
    cases
}

/// This frame header, a mask of zeros, and the payload.
fn raw(header: &[u8], payload: &[u8]) -> Vec<u8> {
    [header, &[0; 4], payload].concat()
}

pub fn frames() -> Vec<Frames> {
    let mut cases = vec![];
    let mut case = |name, frames: &[Vec<u8>], echo: &[u8], pongs: &[&[u8]], close| {
        cases.push(Frames {
            name,
            bytes: frames.concat(),
            echo: echo.into(),
            pongs: pongs.iter().map(|pong| pong.to_vec()).collect(),
            close,
        });
    };
    let frame = ws::frame;
    let text = |payload: &[u8]| frame(TEXT, payload);
    let resize = br#"{"cols":80,"rows":24}"#;
    let protocol = Some(Some(1002));
    let not_utf8 = Some(Some(1007));
    let too_big = Some(Some(1009));
    let long: Vec<u8> = (0..MESSAGE).map(|at| at as u8).collect();

    // Messages.
    case("a message", &[frame(BINARY, b"hello")], b"hello", &[], None);
    case(
        "an empty message",
        &[frame(BINARY, b""), frame(BINARY, b"x")],
        b"x",
        &[],
        None,
    );
    case(
        "125 bytes",
        &[frame(BINARY, &long[..125])],
        &long[..125],
        &[],
        None,
    );
    case(
        "126 bytes",
        &[frame(BINARY, &long[..126])],
        &long[..126],
        &[],
        None,
    );
    case(
        "65535 bytes",
        &[frame(BINARY, &long[..65_535])],
        &long[..65_535],
        &[],
        None,
    );
    case(
        "65536 bytes",
        &[frame(BINARY, &long[..65_536])],
        &long[..65_536],
        &[],
        None,
    );
    case(
        "the longest message",
        &[frame(BINARY, &long)],
        &long,
        &[],
        None,
    );
    case(
        "a mask of zeros",
        &[raw(&[0x82, 0x82], b"ok")],
        b"ok",
        &[],
        None,
    );
    case(
        "a control message",
        &[text(resize), frame(BINARY, b"x")],
        b"x",
        &[],
        None,
    );
    case(
        "fragments",
        &[
            frame(BINARY & !LAST, b"a"),
            frame(CONTINUATION, b"b"),
            frame(CONTINUATION | LAST, b"c"),
        ],
        b"abc",
        &[],
        None,
    );
    case(
        "empty fragments",
        &[
            frame(BINARY & !LAST, b""),
            frame(CONTINUATION, b""),
            frame(CONTINUATION | LAST, b""),
        ],
        b"",
        &[],
        None,
    );
    case(
        "the longest message in two",
        &[
            frame(BINARY & !LAST, &long[..100]),
            frame(CONTINUATION | LAST, &long[100..]),
        ],
        &long,
        &[],
        None,
    );
    case(
        "fragments of a text",
        &[
            frame(TEXT & !LAST, &resize[..7]),
            frame(CONTINUATION | LAST, &resize[7..]),
        ],
        b"",
        &[],
        None,
    );
    case(
        "a character in two fragments",
        &[
            frame(TEXT & !LAST, b"{\"\xc3"),
            frame(CONTINUATION | LAST, b"\xa9\":1}"),
            frame(BINARY, b"x"),
        ],
        b"x",
        &[],
        None,
    );

    // Too much.
    case(
        "a message too long by one",
        &[raw(&[0x82, 0xff, 0, 0, 0, 0, 0, 2, 0, 1], b"")],
        b"",
        &[],
        too_big,
    );
    case(
        "a message of 2^62 bytes",
        &[raw(&[0x82, 0xff, 0x40, 0, 0, 0, 0, 0, 0, 0], b"")],
        b"",
        &[],
        too_big,
    );
    case(
        "fragments too long by one",
        &[
            frame(BINARY & !LAST, &long),
            frame(CONTINUATION | LAST, b"x"),
        ],
        b"",
        &[],
        too_big,
    );
    case(
        "fragments without end",
        &[
            frame(BINARY & !LAST, &long),
            frame(CONTINUATION, b""),
            frame(CONTINUATION, &long[..200]),
        ],
        b"",
        &[],
        too_big,
    );

    // Pings.
    case("a ping", &[frame(PING, b"hello")], b"", &[b"hello"], None);
    case("an empty ping", &[frame(PING, b"")], b"", &[b""], None);
    case(
        "the longest ping",
        &[frame(PING, &[9; 125])],
        b"",
        &[&[9; 125]],
        None,
    );
    case(
        "a ping that is not UTF-8",
        &[frame(PING, b"\xff\0")],
        b"",
        &[b"\xff\0"],
        None,
    );
    case(
        "many pings",
        &[frame(PING, b"1"), frame(PING, b"2"), frame(PING, b"3")],
        b"",
        &[b"1", b"2", b"3"],
        None,
    );
    case(
        "a pong nobody asked for",
        &[frame(PONG, b"x"), frame(BINARY, b"y")],
        b"y",
        &[],
        None,
    );
    case(
        "pings between fragments",
        &[
            frame(BINARY & !LAST, b"a"),
            frame(PING, b"p"),
            frame(CONTINUATION, b"b"),
            frame(PONG, b""),
            frame(PING, b"q"),
            frame(CONTINUATION | LAST, b"c"),
        ],
        b"abc",
        &[b"p", b"q"],
        None,
    );
    case(
        "a ping of 126 bytes",
        &[frame(PING, &[9; 126])],
        b"",
        &[],
        protocol,
    );
    case(
        "a pong of 126 bytes",
        &[frame(PONG, &[9; 126])],
        b"",
        &[],
        protocol,
    );
    case(
        "a ping of 64 KiB",
        &[frame(PING, &long[..65_536])],
        b"",
        &[],
        protocol,
    );
    case(
        "a ping in fragments",
        &[frame(PING & !LAST, b"x")],
        b"",
        &[],
        protocol,
    );
    case(
        "a pong in fragments",
        &[frame(PONG & !LAST, b"x")],
        b"",
        &[],
        protocol,
    );

    // The order of fragments.
    case(
        "a continuation of nothing",
        &[frame(CONTINUATION | LAST, b"x")],
        b"",
        &[],
        protocol,
    );
    case(
        "a continuation that goes on of nothing",
        &[frame(CONTINUATION, b"x")],
        b"",
        &[],
        protocol,
    );
    case(
        "a continuation after the last one",
        &[
            frame(BINARY & !LAST, b"a"),
            frame(CONTINUATION | LAST, b"b"),
            frame(CONTINUATION | LAST, b"c"),
        ],
        b"ab",
        &[],
        protocol,
    );
    case(
        "a message in a message",
        &[frame(BINARY & !LAST, b"a"), frame(BINARY, b"b")],
        b"",
        &[],
        protocol,
    );
    case(
        "a text in a message",
        &[frame(BINARY & !LAST, b"a"), frame(TEXT & !LAST, b"b")],
        b"",
        &[],
        protocol,
    );

    // Bits and opcodes.
    case(
        "RSV1, as if compressed",
        &[frame(0xc2, b"x")],
        b"",
        &[],
        protocol,
    );
    case("RSV2", &[frame(0xa2, b"x")], b"", &[], protocol);
    case("RSV3", &[frame(0x92, b"x")], b"", &[], protocol);
    case(
        "RSV1 in a control frame",
        &[frame(0xc9, b"x")],
        b"",
        &[],
        protocol,
    );
    case(
        "RSV2 in a continuation",
        &[frame(BINARY & !LAST, b"a"), frame(0xa0, b"x")],
        b"",
        &[],
        protocol,
    );
    for opcode in 3..8 {
        case(
            "a reserved data opcode",
            &[frame(0x80 | opcode, b"")],
            b"",
            &[],
            protocol,
        );
    }
    for opcode in 11..16 {
        case(
            "a reserved control opcode",
            &[frame(0x80 | opcode, b"")],
            b"",
            &[],
            protocol,
        );
    }
    case(
        "a reserved opcode between fragments",
        &[frame(BINARY & !LAST, b"a"), frame(0x83, b"")],
        b"",
        &[],
        protocol,
    );

    // Masks and lengths.
    case("no mask", &[vec![0x82, 1, b'x']], b"", &[], protocol);
    case(
        "no mask and no payload",
        &[vec![0x82, 0]],
        b"",
        &[],
        protocol,
    );
    case(
        "a ping without a mask",
        &[vec![0x89, 0]],
        b"",
        &[],
        protocol,
    );
    case(
        "a close without a mask",
        &[vec![0x88, 0]],
        b"",
        &[],
        protocol,
    );
    case(
        "125 in two bytes",
        &[raw(&[0x82, 0xfe, 0, 125], &long[..125])],
        b"",
        &[],
        protocol,
    );
    case(
        "0 in two bytes",
        &[raw(&[0x82, 0xfe, 0, 0], b"")],
        b"",
        &[],
        protocol,
    );
    case(
        "65535 in eight bytes",
        &[raw(&[0x82, 0xff, 0, 0, 0, 0, 0, 0, 0xff, 0xff], b"")],
        b"",
        &[],
        protocol,
    );
    case(
        "a negative length",
        &[raw(&[0x82, 0xff, 0x80, 0, 0, 0, 0, 0, 0, 1], b"")],
        b"",
        &[],
        protocol,
    );
    case(
        "a length of all ones",
        &[raw(
            &[0x82, 0xff, 255, 255, 255, 255, 255, 255, 255, 255],
            b"",
        )],
        b"",
        &[],
        protocol,
    );
    case(
        "a ping with a long length",
        &[raw(&[0x89, 0xfe, 0, 5], b"hello")],
        b"",
        &[],
        protocol,
    );

    // UTF-8.
    case(
        "a byte that is never UTF-8",
        &[text(b"\xff")],
        b"",
        &[],
        not_utf8,
    );
    case(
        "a continuation byte alone",
        &[text(b"{\"\x80\":1}")],
        b"",
        &[],
        not_utf8,
    );
    case(
        "an overlong slash",
        &[text(b"\xc0\xaf")],
        b"",
        &[],
        not_utf8,
    );
    case(
        "half of a surrogate pair",
        &[text(b"\xed\xa0\x80")],
        b"",
        &[],
        not_utf8,
    );
    case(
        "beyond Unicode",
        &[text(b"\xf4\x90\x80\x80")],
        b"",
        &[],
        not_utf8,
    );
    case(
        "a character cut short",
        &[text(b"\xe2\x82")],
        b"",
        &[],
        not_utf8,
    );
    case(
        "a character cut short by a fragment's end",
        &[
            frame(TEXT & !LAST, b"\xf0\x9f"),
            frame(CONTINUATION | LAST, b"\x90"),
        ],
        b"",
        &[],
        not_utf8,
    );
    case(
        "bytes in a fragment that no other mends",
        &[
            frame(TEXT & !LAST, b"a\xff"),
            frame(CONTINUATION | LAST, b"b"),
        ],
        b"",
        &[],
        not_utf8,
    );

    // Closes.
    case("a close", &[frame(CLOSE, b"")], b"", &[], Some(None));
    case(
        "a close with 1000",
        &[frame(CLOSE, b"\x03\xe8")],
        b"",
        &[],
        Some(Some(1000)),
    );
    case(
        "a close with a reason",
        &[frame(CLOSE, "\u{3}\u{e9}".as_bytes())],
        b"",
        &[],
        protocol,
    );
    case(
        "a close with 1001 and words",
        &[frame(CLOSE, b"\x03\xe9bye \xf0\x9f\x90\xa6")],
        b"",
        &[],
        Some(Some(1001)),
    );
    case(
        "a close with 3000",
        &[frame(CLOSE, &3000u16.to_be_bytes())],
        b"",
        &[],
        Some(Some(3000)),
    );
    case(
        "a close with 4999",
        &[frame(CLOSE, &4999u16.to_be_bytes())],
        b"",
        &[],
        Some(Some(4999)),
    );
    case(
        "a close of 1 byte",
        &[frame(CLOSE, b"\x03")],
        b"",
        &[],
        protocol,
    );
    case(
        "a close of 126 bytes",
        &[frame(CLOSE, &[b'x'; 126])],
        b"",
        &[],
        protocol,
    );
    case(
        "a close in fragments",
        &[frame(CLOSE & !LAST, b"")],
        b"",
        &[],
        protocol,
    );
    case(
        "a close whose words are not UTF-8",
        &[frame(CLOSE, b"\x03\xe8\xff")],
        b"",
        &[],
        not_utf8,
    );
    for code in [0, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, 65535u16] {
        case(
            "a close with a code that may not be sent",
            &[frame(CLOSE, &code.to_be_bytes())],
            b"",
            &[],
            protocol,
        );
    }
    case(
        "a ping before a close",
        &[frame(PING, b"x"), frame(CLOSE, b"\x03\xe8")],
        b"",
        &[b"x"],
        Some(Some(1000)),
    );
    case(
        "nothing after a close",
        &[frame(CLOSE, b"\x03\xe8"), frame(PING, b"x")],
        b"",
        &[],
        Some(Some(1000)),
    );
    case(
        "a close between fragments",
        &[frame(BINARY & !LAST, b"a"), frame(CLOSE, b"\x03\xe8")],
        b"",
        &[],
        Some(Some(1000)),
    );
    cases
}
