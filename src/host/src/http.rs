//! A small blocking HTTP/1.1 client for any stream.

use std::{
    fmt,
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// Maximum number of header lines in a response.
const MAX_HEADERS: usize = 64;
/// Maximum size of a response's head, and of a body that is read as a whole, as a guest is not trusted.
const MAX_HEAD: u64 = 64 << 10;
const MAX_BODY: u64 = 64 << 20;
/// Maximum size of a line between two chunks in bytes.
const MAX_LINE: u64 = 4096;

/// One connection. It can be used for several requests as long as the server keeps it open.
pub struct Client<S> {
    stream: BufReader<S>,
}

/// A complete response.
#[derive(Clone, Debug, PartialEq)]
pub struct Response {
    pub status: u16,
    pub reason: String,
    pub headers: Headers,
    pub body: Vec<u8>,
}

/// The headers of a message: names as received, in order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Headers(pub Vec<(String, String)>);

impl Headers {
    /// The headers of a parsed head.
    pub fn of(parsed: &[httparse::Header]) -> Self {
        let text = |value| String::from_utf8_lossy(value).into_owned();
        Self(
            parsed
                .iter()
                .map(|header| (header.name.into(), text(header.value)))
                .collect(),
        )
    }

    /// The first header with this name, case-insensitive.
    pub fn get(&self, name: &str) -> Option<&str> {
        let mut named = self.0.iter().filter(|(n, _)| n.eq_ignore_ascii_case(name));
        named.next().map(|(_, value)| value.as_str())
    }
}

impl<S: Read + Write> Client<S> {
    /// A client on a connected stream.
    pub fn new(stream: S) -> Self {
        Client {
            stream: BufReader::new(stream),
        }
    }

    /// `GET path`.
    pub fn get(&mut self, path: &str) -> Result<Response> {
        self.request("GET", path, &[], b"")
    }

    /// `POST path` with a JSON body.
    pub fn post(&mut self, path: &str, body: &Value) -> Result<Response> {
        self.json("POST", path, body)
    }

    /// `PUT path` with a JSON body.
    pub fn put(&mut self, path: &str, body: &Value) -> Result<Response> {
        self.json("PUT", path, body)
    }

    /// `PATCH path` with a JSON body.
    pub fn patch(&mut self, path: &str, body: &Value) -> Result<Response> {
        self.json("PATCH", path, body)
    }

    fn json(&mut self, method: &str, path: &str, body: &Value) -> Result<Response> {
        let headers = [("Content-Type", "application/json")];
        self.request(method, path, &headers, body.to_string().as_bytes())
    }

    /// Sends a request and reads its response.
    pub fn request(
        &mut self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Result<Response> {
        let mut head = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n");
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        if !body.is_empty() {
            head += &format!("Content-Length: {}\r\n", body.len());
        }
        head += "\r\n";
        // One write, so that a server sees the request in one piece.
        self.send(&[head.as_bytes(), body].concat())?;
        self.receive(method == "HEAD")
            .with_context(|| format!("no answer to {method} {path}"))
    }

    /// Sends raw bytes: half a request, two of them, or none at all.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream
            .get_mut()
            .write_all(bytes)
            .context("unable to send")
    }

    /// Reads the next response; `bodiless` if it is a response to HEAD.
    pub fn receive(&mut self, bodiless: bool) -> Result<Response> {
        let mut response = self.receive_head()?;
        if !bodiless && !matches!(response.status, 100..200 | 204 | 304) {
            response.body = self.body(&response)?;
        }
        Ok(response)
    }

    /// Reads the head of the next response, but not its body.
    pub fn receive_head(&mut self) -> Result<Response> {
        let mut head = Vec::new();
        loop {
            let room = MAX_HEAD - head.len() as u64;
            ensure!(room > 0, "a head of over {MAX_HEAD} bytes");
            let mut line = self.stream.by_ref().take(room);
            ensure!(
                line.read_until(b'\n', &mut head)? > 0,
                "the connection ended in the head {:?}",
                head.escape_ascii().to_string()
            );
            if head.ends_with(b"\r\n\r\n") {
                break;
            }
        }
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut parsed = httparse::Response::new(&mut headers);
        parsed
            .parse(&head)
            .with_context(|| format!("bad head {:?}", head.escape_ascii().to_string()))?;
        Ok(Response {
            status: parsed.code.unwrap_or_default(),
            reason: parsed.reason.unwrap_or_default().into(),
            headers: Headers::of(parsed.headers),
            body: Vec::new(),
        })
    }

    /// Streams the body of a response whose head has been read, for long or endless bodies.
    pub fn into_body(self, response: &Response) -> Result<Body<S>> {
        let left = if response.header("transfer-encoding") == Some("chunked") {
            Left::Chunk(0)
        } else {
            match response.header("content-length") {
                Some(length) => Left::Bytes(
                    length
                        .parse()
                        .with_context(|| format!("bad length {length:?}"))?,
                ),
                None => Left::All,
            }
        };
        Ok(Body {
            stream: self.stream,
            left,
            first: true,
        })
    }

    /// Sends a request with a body of any length, and reads the response. Without a length the
    /// body is sent in chunks. If the server responds before everything was sent, that response is returned.
    pub fn send_body(
        &mut self,
        method: &str,
        path: &str,
        body: &mut dyn Read,
        length: Option<u64>,
    ) -> Result<Response> {
        let framing = match length {
            Some(length) => format!("Content-Length: {length}"),
            None => "Transfer-Encoding: chunked".into(),
        };
        let head = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n{framing}\r\n\r\n");
        self.send(head.as_bytes())?;
        let mut buffer = vec![0; 64 << 10];
        let mut left = length;
        loop {
            let most = left.map_or(buffer.len(), |left| {
                buffer
                    .len()
                    .min(usize::try_from(left).unwrap_or(usize::MAX))
            });
            let size = match most {
                0 => 0,
                most => body.read(&mut buffer[..most]).context("unable to read")?,
            };
            if size == 0 && left.is_some_and(|left| left > 0) {
                bail!("what is to be sent has become shorter meanwhile");
            }
            let sent = match left {
                Some(_) => self.send(&buffer[..size]),
                None => {
                    let mut chunk = format!("{size:x}\r\n").into_bytes();
                    chunk.extend_from_slice(&buffer[..size]);
                    chunk.extend(b"\r\n");
                    self.send(&chunk)
                }
            };
            left = left.map(|left| left - size as u64);
            // A server that stops reading has sent a response or closed the connection.
            if sent.is_err() || size == 0 {
                let reply = self.receive(false);
                return match sent {
                    Err(error) if reply.is_err() => Err(error),
                    _ => reply.with_context(|| format!("no answer to {method} {path}")),
                };
            }
        }
    }

    fn body(&mut self, response: &Response) -> Result<Vec<u8>> {
        let mut body = Vec::new();
        if response.header("transfer-encoding") == Some("chunked") {
            loop {
                let mut line = String::new();
                let mut source = self.stream.by_ref().take(MAX_LINE);
                source.read_line(&mut line)?;
                let size = u64::from_str_radix(line.trim_end(), 16)
                    .with_context(|| format!("bad chunk size {line:?}"))?;
                self.append(size, &mut body)?;
                let mut end = [0; 2];
                self.stream.read_exact(&mut end)?;
                ensure!(end == *b"\r\n", "a chunk does not end in CR LF");
                if size == 0 {
                    return Ok(body);
                }
            }
        }
        match response.header("content-length") {
            Some(length) => {
                let length = length.parse();
                self.append(length.context("bad Content-Length")?, &mut body)?;
            }
            None => {
                let mut rest = self.stream.by_ref().take(MAX_BODY + 1);
                let size = rest.read_to_end(&mut body)?;
                ensure!(size as u64 <= MAX_BODY, "a body of over {MAX_BODY} bytes");
            }
        }
        Ok(body)
    }

    /// Reads this many more bytes of a body.
    fn append(&mut self, size: u64, body: &mut Vec<u8>) -> Result<()> {
        let room = MAX_BODY - body.len() as u64;
        ensure!(size <= room, "a body of over {MAX_BODY} bytes");
        let read = self.stream.by_ref().take(size).read_to_end(body)?;
        ensure!(read as u64 == size, "the connection ended in the body");
        Ok(())
    }

    /// The underlying stream.
    pub fn get_mut(&mut self) -> &mut S {
        self.stream.get_mut()
    }

    /// The stream and the bytes that were read from it but not used, for instance of a WebSocket.
    pub fn into_stream(self) -> (S, Vec<u8>) {
        let unused = self.stream.buffer().to_vec();
        (self.stream.into_inner(), unused)
    }

    /// Waits for the server to close the connection. Data is an error.
    pub fn wait_closed(&mut self) -> Result<()> {
        match self.stream.fill_buf()? {
            [] => Ok(()),
            bytes => bail!("more bytes: {:?}", bytes.escape_ascii().to_string()),
        }
    }
}

/// The rest of a body.
enum Left {
    /// That many bytes.
    Bytes(u64),
    /// That many bytes of a chunk, and more chunks.
    Chunk(u64),
    /// Everything until the connection is closed.
    All,
}

/// The streamed body of a response.
pub struct Body<S> {
    stream: BufReader<S>,
    left: Left,
    first: bool,
}

impl<S> Body<S> {
    /// Its connection.
    pub fn get_ref(&self) -> &S {
        self.stream.get_ref()
    }
}

impl<S: Read> Body<S> {
    /// The size of the next chunk; 0 is the end.
    fn next_chunk(&mut self) -> io::Result<u64> {
        let bad = |line: &str| io::Error::other(format!("bad chunk size {line:?}"));
        let mut line = String::new();
        if !std::mem::take(&mut self.first) {
            self.stream.by_ref().take(MAX_LINE).read_line(&mut line)?;
            if line.trim_end() != "" {
                return Err(bad(&line));
            }
        }
        line.clear();
        self.stream.by_ref().take(MAX_LINE).read_line(&mut line)?;
        let digits = line.trim_end().split(';').next().unwrap_or_default();
        u64::from_str_radix(digits, 16).map_err(|_| bad(&line))
    }
}

impl<S: Read> Read for Body<S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Left::Chunk(0) = self.left {
            self.left = match self.next_chunk()? {
                0 => Left::Bytes(0),
                size => Left::Chunk(size),
            };
        }
        let left = match &mut self.left {
            Left::All => return self.stream.read(buffer),
            Left::Bytes(left) | Left::Chunk(left) => left,
        };
        let most = usize::try_from(*left).unwrap_or(usize::MAX);
        let most = most.min(buffer.len());
        let size = self.stream.read(&mut buffer[..most])?;
        if size == 0 && most > 0 {
            let error = "the connection ended in the body";
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, error));
        }
        *left -= size as u64;
        Ok(size)
    }
}

impl Client<UnixStream> {
    /// Sets the time limit for responses.
    pub fn set_read_timeout(&mut self, timeout: Duration) -> Result<()> {
        Ok(self.stream.get_ref().set_read_timeout(Some(timeout))?)
    }
}

impl Response {
    /// The first header with this name, case-insensitive.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_slice(&self.body).with_context(|| format!("not JSON: {self}"))
    }

    /// The response itself if the status is 2xx, otherwise an error with it.
    pub fn success(self) -> Result<Response> {
        ensure!((200..300).contains(&self.status), "{self}");
        Ok(self)
    }
}

impl fmt::Display for Response {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} {}", self.status, self.text())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    /// A client whose server has already sent `replies`.
    fn client(replies: &[u8]) -> Client<UnixStream> {
        let (near, mut far) = UnixStream::pair().unwrap();
        let replies = replies.to_vec();
        thread::spawn(move || far.write_all(&replies));
        Client::new(near)
    }

    #[test]
    fn responses_follow_each_other_on_one_connection() {
        let mut client = client(
            b"HTTP/1.1 200 \r\nContent-Length: 2\r\nX: 1\r\n\r\nok\
              HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n1\r\nd\r\n0\r\n\r\n\
              HTTP/1.1 404 Not Found\r\n\r\ngone",
        );
        let first = client.receive(false).unwrap();
        assert_eq!(
            (first.status, first.reason.as_str(), first.text()),
            (200, "", "ok".into())
        );
        assert_eq!(first.header("x"), Some("1"));
        assert_eq!(client.receive(false).unwrap().text(), "abcd");
        assert_eq!(client.receive(false).unwrap().text(), "gone");
        client.wait_closed().unwrap();
    }

    #[test]
    fn a_body_can_be_read_as_it_arrives() {
        let read = |reply: &[u8]| {
            let mut client = client(reply);
            let head = client.receive_head().unwrap();
            let mut body = String::new();
            let result = client.into_body(&head).unwrap().read_to_string(&mut body);
            result.map(|_| body)
        };
        let chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\
                        3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n";
        assert_eq!(read(chunked).unwrap(), "abcde");
        assert_eq!(
            read(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nabc").unwrap(),
            "ab"
        );
        assert_eq!(
            read(b"HTTP/1.1 200 OK\r\n\r\nall of it").unwrap(),
            "all of it"
        );
        assert!(read(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc").is_err());
        assert!(read(&chunked[..chunked.len() - 7]).is_err());
    }

    #[test]
    fn a_response_before_the_whole_request_is_sent_is_read() {
        let (near, mut far) = UnixStream::pair().unwrap();
        thread::spawn(move || {
            let mut head = [0; 100];
            let _ = far.read(&mut head);
            let _ = far.write_all(b"HTTP/1.1 507 Full\r\nContent-Length: 4\r\n\r\nfull");
        });
        let mut endless = io::repeat(7).take(1 << 30);
        let reply = Client::new(near).send_body("PUT", "/f", &mut endless, Some(1 << 30));
        let reply = reply.unwrap();
        assert_eq!((reply.status, reply.text().as_str()), (507, "full"));
    }

    #[test]
    fn a_body_of_unknown_length_is_sent_in_chunks() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let server = thread::spawn(move || {
            let mut request = vec![];
            while !request.ends_with(b"\r\n0\r\n\r\n") {
                let mut byte = [0];
                far.read_exact(&mut byte).unwrap();
                request.push(byte[0]);
            }
            far.write_all(b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")
                .unwrap();
            String::from_utf8(request).unwrap()
        });
        let mut body = &b"hello"[..];
        let reply = Client::new(near).send_body("PUT", "/f", &mut body, None);
        assert_eq!(reply.unwrap().status, 201);
        let request = server.join().unwrap();
        assert!(
            request.ends_with("Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"),
            "{request}"
        );
    }

    #[test]
    fn an_announced_length_is_not_allocated() {
        let receive = |reply: &[u8]| {
            let error = client(reply).receive(false).unwrap_err();
            format!("{error:#}")
        };
        for length in ["67108865", "18446744073709551615"] {
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\nx");
            let error = receive(head.as_bytes());
            assert!(error.contains("a body of over"), "{error}");
        }
        for size in ["4000001", "ffffffffffffffff"] {
            let head = format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{size}\r\nx");
            let error = receive(head.as_bytes());
            assert!(error.contains("a body of over"), "{error}");
        }
        let head = [&b"HTTP/1.1 200 OK\r\nX: "[..], &[b'x'; 100_000]].concat();
        assert!(receive(&head).contains("a head of over"));
        let line = [
            &b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"[..],
            &[b'0'; 9000],
        ]
        .concat();
        assert!(receive(&line).contains("a chunk does not end in CR LF"));
    }

    #[test]
    fn a_body_cut_short_is_an_error() {
        let error = client(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort").receive(false);
        assert!(format!("{:#}", error.unwrap_err()).contains("ended in the body"));
    }
}
