//! A small blocking HTTP/1.1 client for any stream.

use std::{
    fmt,
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// Header lines that a response may have at most.
const MAX_HEADERS: usize = 64;

/// One connection. Requests follow each other on it as long as the server keeps it open.
pub struct Client<S> {
    stream: BufReader<S>,
}

/// A response, read to its end.
#[derive(Clone, Debug, PartialEq)]
pub struct Response {
    pub status: u16,
    pub reason: String,
    pub headers: Headers,
    pub body: Vec<u8>,
}

/// The headers of a message: names as they were sent, in order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Headers(pub Vec<(String, String)>);

impl Headers {
    /// Those of a parsed head.
    pub fn of(parsed: &[httparse::Header]) -> Self {
        let text = |value| String::from_utf8_lossy(value).into_owned();
        Self(
            parsed
                .iter()
                .map(|header| (header.name.into(), text(header.value)))
                .collect(),
        )
    }

    /// The first header of this name, in any case.
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

    /// Sends bytes as they are: half a request, two of them, or none at all.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream
            .get_mut()
            .write_all(bytes)
            .context("unable to send")
    }

    /// Reads the next response; `bodiless` when it answers a HEAD.
    pub fn receive(&mut self, bodiless: bool) -> Result<Response> {
        let mut head = Vec::new();
        loop {
            let size = self.stream.read_until(b'\n', &mut head)?;
            ensure!(
                size > 0,
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
        let mut response = Response {
            status: parsed.code.unwrap_or_default(),
            reason: parsed.reason.unwrap_or_default().into(),
            headers: Headers::of(parsed.headers),
            body: Vec::new(),
        };
        if !bodiless && !matches!(response.status, 100..200 | 204 | 304) {
            response.body = self.body(&response)?;
        }
        Ok(response)
    }

    fn body(&mut self, response: &Response) -> Result<Vec<u8>> {
        let mut body = Vec::new();
        if response.header("transfer-encoding") == Some("chunked") {
            loop {
                let mut line = String::new();
                self.stream.read_line(&mut line)?;
                let size = usize::from_str_radix(line.trim_end(), 16)
                    .with_context(|| format!("bad chunk size {line:?}"))?;
                let mut chunk = vec![0; size + 2];
                self.stream.read_exact(&mut chunk)?;
                ensure!(chunk.ends_with(b"\r\n"), "a chunk does not end in CR LF");
                body.extend(&chunk[..size]);
                if size == 0 {
                    return Ok(body);
                }
            }
        }
        match response.header("content-length") {
            Some(length) => {
                body.resize(
                    length
                        .parse()
                        .with_context(|| format!("bad length {length:?}"))?,
                    0,
                );
                self.stream
                    .read_exact(&mut body)
                    .context("the connection ended in the body")?;
            }
            None => drop(self.stream.read_to_end(&mut body)?),
        }
        Ok(body)
    }

    /// The stream and what has been read from it but not used, as for a WebSocket's start.
    pub fn into_stream(self) -> (S, Vec<u8>) {
        let unused = self.stream.buffer().to_vec();
        (self.stream.into_inner(), unused)
    }

    /// Waits for the server to close the connection; what it sends instead is an error.
    pub fn wait_closed(&mut self) -> Result<()> {
        match self.stream.fill_buf()? {
            [] => Ok(()),
            bytes => bail!("more bytes: {:?}", bytes.escape_ascii().to_string()),
        }
    }
}

impl Client<UnixStream> {
    /// How long an answer is waited for from now on.
    pub fn set_read_timeout(&mut self, timeout: Duration) -> Result<()> {
        Ok(self.stream.get_ref().set_read_timeout(Some(timeout))?)
    }
}

impl Response {
    /// The first header of this name, in any case.
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

    /// Itself when the status is 2xx, else an error that shows it.
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

    /// A client whose server has already said `answers`.
    fn client(answers: &[u8]) -> Client<UnixStream> {
        let (near, mut far) = UnixStream::pair().unwrap();
        let answers = answers.to_vec();
        thread::spawn(move || far.write_all(&answers));
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
    fn a_body_cut_short_is_an_error() {
        let error = client(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort").receive(false);
        assert!(format!("{:#}", error.unwrap_err()).contains("ended in the body"));
    }
}
