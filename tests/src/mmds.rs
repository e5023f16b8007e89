//! Firecracker's metadata service as of version 1.17: the protocol without the network.
//! (Firecracker docs/mmds/mmds-user-guide.md.)

use std::{
    fmt::Write,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::http::Headers;

/// The connection of a request of at least this length is reset.
pub const MAX_REQUEST: usize = 2500;

/// The protocol that a client may use.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Version {
    /// A GET without a token gets 401.
    #[default]
    V2,
    /// Tokens are issued but not required, as for V1 since Firecracker 1.13.
    V1,
    /// A PUT gets 405, as for V1 before that.
    V1Only,
}

/// When the host puts the document into the store.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Push {
    /// Before the VM starts.
    #[default]
    BeforeStart,
    /// After that many requests for the document were answered without it.
    AfterRequests(usize),
    /// That long after the first request (on Firecracker: after the start of the VM).
    After(Duration),
    /// Never.
    Never,
}

/// The response to a GET of `/` before the push.
#[derive(Clone, Debug, PartialEq)]
pub enum Before {
    /// 200 with this document.
    Document(Value),
    /// 404.
    NotFound,
}

/// A fault of a connection. Byte counts are of everything that the server sends on it.
#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    /// The SYN is not answered, as Firecracker does with the 31st open connection.
    Silent,
    /// The SYN is answered with a reset, as if nothing listened.
    Refuse,
    /// Nothing is sent after that many bytes: a lost segment, which Firecracker never retransmits.
    Stall(usize),
    /// A reset after that many bytes.
    Reset(usize),
    /// A FIN after that many bytes.
    Close(usize),
    /// One byte per interval.
    Drip(Duration),
    /// These bytes instead of each response.
    Instead(Vec<u8>),
}

/// A metadata service and its document.
///
/// ```
/// use pigeon_lab::mmds::{Fault, Mmds, Push, Version};
/// let document = serde_json::json!({"ExecOverride": ["/bin/true"]});
/// let mmds = Mmds::serving(document)
///     .version(Version::V1)
///     .push(Push::AfterRequests(3))
///     .faults([Fault::Stall(100)]); // on the first connection; all later ones are fine
/// ```
#[derive(Clone, Debug)]
pub struct Mmds {
    pub(crate) document: Value,
    pub(crate) version: Version,
    pub(crate) push: Push,
    pub(crate) before: Before,
    pub(crate) faults: Vec<Fault>,
    pub(crate) always: Option<Fault>,
}

impl Mmds {
    /// A version 2 service that has `document` from the start.
    pub fn serving(document: Value) -> Mmds {
        Mmds {
            document,
            version: Version::default(),
            push: Push::default(),
            before: Before::Document(Value::Null),
            faults: vec![],
            always: None,
        }
    }

    /// Sets the protocol version.
    pub fn version(self, version: Version) -> Mmds {
        Mmds { version, ..self }
    }

    /// Sets when the document is pushed.
    pub fn push(self, push: Push) -> Mmds {
        Mmds { push, ..self }
    }

    /// Sets the response before the push, instead of `null`.
    pub fn before(self, before: Before) -> Mmds {
        Mmds { before, ..self }
    }

    /// Sets the faults of the first connections, one each. Later connections have none.
    pub fn faults(self, faults: impl Into<Vec<Fault>>) -> Mmds {
        Mmds {
            faults: faults.into(),
            ..self
        }
    }

    /// Sets a fault for every connection after those of [`faults`](Self::faults).
    pub fn always(self, fault: Fault) -> Mmds {
        Mmds {
            always: Some(fault),
            ..self
        }
    }

    /// The fault of connection `number`, counted from 0.
    pub(crate) fn fault(&self, number: usize) -> Option<&Fault> {
        self.faults.get(number).or(self.always.as_ref())
    }

    /// Whether Firecracker itself can behave like this.
    pub(crate) fn is_genuine(&self) -> bool {
        self.faults.is_empty()
            && self.always.is_none()
            && self.version != Version::V1Only
            && self.before == Before::Document(Value::Null)
            && !matches!(self.push, Push::AfterRequests(_))
    }
}

/// A request, as the guest sent it.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// The number of its connection, counted from 0.
    pub connection: usize,
    /// When it was complete.
    pub at: Instant,
    pub method: String,
    pub path: String,
    pub headers: Headers,
}

impl Request {
    /// Parses the head of a request; also returns its length. None while it is incomplete.
    pub(crate) fn parse(
        bytes: &[u8],
        connection: usize,
    ) -> Result<Option<(Request, usize)>, httparse::Error> {
        let mut headers = [httparse::EMPTY_HEADER; 32];
        let mut parsed = httparse::Request::new(&mut headers);
        let httparse::Status::Complete(length) = parsed.parse(bytes)? else {
            return Ok(None);
        };
        let request = Request {
            connection,
            at: Instant::now(),
            method: parsed.method.unwrap_or_default().into(),
            path: parsed.path.unwrap_or_default().into(),
            headers: Headers::of(parsed.headers),
        };
        Ok(Some((request, length)))
    }

    /// The first header of this name, in any case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)
    }
}

/// The service's state: the requests so far, and the token issued.
pub(crate) struct Service {
    mmds: Mmds,
    first_request: Option<Instant>,
    documents_asked: usize,
}

/// 48 characters of base64, like Firecracker's tokens.
const TOKEN: &str = "cGlnZW9uLWxhYi10b2tlbi1wYWRkZWQtdG8tMzYtYnl0ZXMu";
const TOKEN_PATH: &str = "/latest/api/token";
const MAX_TTL_SECONDS: u32 = 21_600;

impl Service {
    pub fn new(mmds: Mmds) -> Service {
        Service {
            mmds,
            first_request: None,
            documents_asked: 0,
        }
    }

    /// The whole response to a request.
    pub fn respond(&mut self, request: &Request) -> Vec<u8> {
        self.first_request.get_or_insert(request.at);
        match (request.method.as_str(), self.mmds.version) {
            ("PUT", Version::V2 | Version::V1) => respond_token(request),
            ("GET", Version::V2) => match request.header("X-metadata-token") {
                Some(TOKEN) => self.respond_document(request),
                Some(_) => response(401, "", "MMDS token not valid."),
                None => response(
                    401,
                    "",
                    "No MMDS token provided. Use `X-metadata-token` header to specify the session \
                     token.",
                ),
            },
            ("GET", _) => self.respond_document(request),
            (_, Version::V1Only) => response(405, "Allow: GET\r\n", "Not allowed HTTP method."),
            _ => response(405, "Allow: GET, PUT\r\n", "Not allowed HTTP method."),
        }
    }

    fn respond_document(&mut self, request: &Request) -> Vec<u8> {
        let pushed = match self.mmds.push {
            Push::BeforeStart => true,
            Push::AfterRequests(count) => self.documents_asked >= count,
            Push::After(delay) => self
                .first_request
                .is_some_and(|first| first.elapsed() >= delay),
            Push::Never => false,
        };
        self.documents_asked += 1;
        let store = match &self.mmds.before {
            _ if pushed => Some(&self.mmds.document),
            Before::Document(document) => Some(document),
            Before::NotFound => None,
        };
        // A path is a JSON pointer, but for its last slash.
        let pointer = request.path.trim_end_matches('/');
        let Some(value) = store.and_then(|store| store.pointer(pointer)) else {
            return response(404, "", &format!("Resource not found: {}.", request.path));
        };
        match (request.header("Accept"), value) {
            (Some("application/json"), value) => response(200, "", &value.to_string()),
            (_, Value::String(text)) => response(200, "", text),
            (_, Value::Object(map)) => response(200, "", &listing(map)),
            _ => response(
                501,
                "",
                "Cannot retrieve value. The value has an unsupported type.",
            ),
        }
    }
}

fn respond_token(request: &Request) -> Vec<u8> {
    if request.path != TOKEN_PATH {
        return response(404, "", &format!("Resource not found: {}.", request.path));
    }
    let ttl = request.header("X-metadata-token-ttl-seconds");
    match ttl.map(|ttl| ttl.parse()) {
        Some(Ok(1..=MAX_TTL_SECONDS)) => response(200, "", TOKEN),
        Some(_) => response(400, "", "Invalid time to live value provided for token."),
        None => response(
            400,
            "",
            "Token time to live value not found. Use `X-metadata-token-ttl-seconds` header to \
             specify the token's lifetime.",
        ),
    }
}

/// The keys of an object, one per line, with a slash if the value is an object (EC2's format).
fn listing(map: &serde_json::Map<String, Value>) -> String {
    let keys = map.iter().map(|(key, value)| match value {
        Value::Object(_) => format!("{key}/"),
        _ => key.clone(),
    });
    keys.collect::<Vec<_>>().join("\n")
}

/// A response in the format of Firecracker's server: the reason phrase is empty.
fn response(status: u16, extra: &str, body: &str) -> Vec<u8> {
    let media = if body == TOKEN {
        "text/plain"
    } else {
        "application/json"
    };
    let mut response = format!(
        "HTTP/1.1 {status} \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n{extra}"
    );
    write!(
        response,
        "Content-Type: {media}\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .expect("a String takes it all");
    response.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn ask(service: &mut Service, request: &str) -> String {
        let (request, length) = Request::parse(request.as_bytes(), 0).unwrap().unwrap();
        assert!(length > 0);
        String::from_utf8(service.respond(&request)).unwrap()
    }

    const GET: &str = "GET / HTTP/1.1\r\nAccept: application/json\r\n\r\n";

    #[test]
    fn version_2_asks_for_the_token_it_gives() {
        let mut service = Service::new(Mmds::serving(json!({"b": 1, "a": 2})));
        assert!(ask(&mut service, GET).starts_with("HTTP/1.1 401 \r\n"));
        let put = "PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 60\r\n\r\n";
        let token = ask(&mut service, put);
        let token = token.rsplit("\r\n").next().unwrap();
        assert_eq!(token.len(), 48);
        let get = GET.replace(
            "\r\n\r\n",
            &format!("\r\nx-metadata-token: {token}\r\n\r\n"),
        );
        assert_eq!(
            ask(&mut service, &get),
            "HTTP/1.1 200 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\
             Content-Type: application/json\r\nContent-Length: 13\r\n\r\n{\"a\":2,\"b\":1}"
        );
        assert!(ask(&mut service, &put.replace("60", "0")).starts_with("HTTP/1.1 400 "));
    }

    #[test]
    fn old_version_1_refuses_a_token_and_works_without() {
        let mut service = Service::new(Mmds::serving(json!({})).version(Version::V1Only));
        let put = ask(&mut service, "PUT /latest/api/token HTTP/1.1\r\n\r\n");
        assert!(put.starts_with("HTTP/1.1 405 \r\n") && put.contains("\r\nAllow: GET\r\n"));
        assert!(ask(&mut service, GET).ends_with("\r\n\r\n{}"));
    }

    #[test]
    fn without_the_right_accept_header_there_is_a_listing() {
        let document = json!({"a": {"b": 1}, "c": "text"});
        let mut service = Service::new(Mmds::serving(document).version(Version::V1));
        let mut get = |path| ask(&mut service, &format!("GET {path} HTTP/1.1\r\n\r\n"));
        assert!(get("/").ends_with("\r\n\r\na/\nc"));
        assert!(get("/c").ends_with("\r\n\r\ntext"));
        assert!(get("/a/b").starts_with("HTTP/1.1 501 "));
        assert!(get("/x").starts_with("HTTP/1.1 404 "));
    }

    #[test]
    fn there_is_null_before_the_push() {
        let mmds = Mmds::serving(json!({"a": 1}))
            .version(Version::V1)
            .push(Push::AfterRequests(2));
        let mut service = Service::new(mmds);
        assert!(ask(&mut service, GET).ends_with("\r\n\r\nnull"));
        assert!(ask(&mut service, GET).ends_with("\r\n\r\nnull"));
        assert!(ask(&mut service, GET).ends_with("\r\n\r\n{\"a\":1}"));
    }
}
