//! HTTP requests with their bodies: however the bytes are split, the same requests are found, and
//! they are those that a simple parser for RFC 9112 finds in all bytes at once.
#![no_main]

use libfuzzer_sys::fuzz_target;
use proto::http::{
    BodyDecoder, Framing, HeadParser, MAX_CHUNK_LINE, MAX_HEAD, MAX_HEADERS, MAX_TRAILER, Method,
    RequestError, Target, decode_query,
};

const BODY: u64 = 128 << 10;

#[derive(Debug, PartialEq)]
struct Request {
    method: Method,
    /// The path or the host, and the query or the port.
    target: (String, String),
    keep_alive: bool,
    http10: bool,
    expects_continue: bool,
    websocket: bool,
    body: Vec<u8>,
}

/// The complete requests in some bytes, and why there are no more.
#[derive(Debug, PartialEq)]
struct Found<E> {
    requests: Vec<Request>,
    end: Option<E>,
}

/// The program's parser, with bytes that arrive in pieces.
fn read(bytes: &[u8], step: usize) -> Found<RequestError> {
    let mut requests = vec![];
    let end = read_pieces(bytes, step, &mut requests).err();
    Found { requests, end }
}

fn read_pieces(bytes: &[u8], step: usize, requests: &mut Vec<Request>) -> Result<(), RequestError> {
    let mut received = vec![];
    let mut parser = HeadParser::default();
    let mut body: Option<(Request, BodyDecoder)> = None;
    for piece in bytes.chunks(step) {
        received.extend(piece);
        loop {
            if let Some((request, decoder)) = &mut body {
                let decoded = decoder.decode(&mut received)?;
                request.body.extend(&received[..decoded.content]);
                received.drain(..decoded.consumed);
                assert!(request.body.len() as u64 <= BODY);
                if !decoder.is_complete() {
                    assert!(received.is_empty());
                    break;
                }
                requests.extend(body.take().map(|(request, _)| request));
            }
            let Some(head) = parser.parse(&received)? else {
                break;
            };
            let target = match head.target {
                Target::Resource { path, query } => (path.to_owned(), query.to_owned()),
                Target::Authority { host, port } => (host.to_owned(), port.to_string()),
            };
            let mut room = [0; 64];
            if let Ok(decoded) = decode_query(&target.0, &mut room) {
                assert!(decoded.len() <= target.0.len() && !decoded.contains(&0));
            }
            let request = Request {
                method: head.method,
                target,
                keep_alive: head.reply.keep_alive,
                http10: head.reply.http10,
                expects_continue: head.expects_continue,
                websocket: head.websocket.is_some(),
                body: vec![],
            };
            assert_eq!(head.reply.head_only, head.method == Method::Head);
            let decoder = BodyDecoder::new(head.framing, BODY)?;
            let length = head.length;
            assert!(length <= received.len() && length <= MAX_HEAD);
            received.drain(..length);
            body = Some((request, decoder));
        }
    }
    Ok(())
}

/// A malformed request.
#[derive(Debug, PartialEq)]
struct Refused;

/// The simple parser.
fn plain(mut bytes: &[u8]) -> Found<Refused> {
    let mut requests = vec![];
    loop {
        match plain_request(&mut bytes) {
            Ok(Some(request)) => requests.push(request),
            Ok(None) => {
                return Found {
                    requests,
                    end: None,
                };
            }
            Err(refused) => {
                return Found {
                    requests,
                    end: Some(refused),
                };
            }
        }
    }
}

/// `None` if it is incomplete.
fn plain_request(bytes: &mut &[u8]) -> Result<Option<Request>, Refused> {
    let all = *bytes;
    let blank = all.chunks(2).take_while(|line| line == b"\r\n").count();
    if blank > 4 {
        return Err(Refused);
    }
    let text = &all[2 * blank..];
    let end = text.windows(4).position(|end| end == b"\r\n\r\n");
    let head = &text[..end.map_or(text.len(), |end| end + 4)];
    let lone = |at: usize| head[at] == b'\n' && (at == 0 || head[at - 1] != b'\r');
    // Only within the allowed length.
    if (0..head.len().min(MAX_HEAD - 2 * blank)).any(lone) || 2 * blank + head.len() > MAX_HEAD {
        return Err(Refused);
    }
    let Some(end) = end else {
        return Ok(None);
    };
    // Each ends with CRLF, as a LF without CR was rejected above.
    let lines = text[..end + 2].split_inclusive(|byte| *byte == b'\n');
    let mut lines = lines.map(|line| &line[..line.len() - 2]);
    let line = std::str::from_utf8(lines.next().unwrap_or_default()).map_err(|_| Refused)?;
    let [method, target, version] = line.split(' ').collect::<Vec<_>>()[..] else {
        return Err(Refused);
    };
    let http10 = match version {
        "HTTP/1.0" => true,
        "HTTP/1.1" => false,
        _ => return Err(Refused),
    };
    if !is_token(method) || target.is_empty() || target.chars().any(|c| c.is_ascii_control()) {
        return Err(Refused);
    }
    let mut fields: Vec<(String, Vec<u8>)> = vec![];
    for line in lines {
        let colon = line.iter().position(|byte| *byte == b':').ok_or(Refused)?;
        let name = std::str::from_utf8(&line[..colon]).map_err(|_| Refused)?;
        let value = &line[colon + 1..];
        let valid = |byte: &u8| *byte == b'\t' || (*byte >= b' ' && *byte != 0x7f);
        if !is_token(name) || !value.iter().all(valid) {
            return Err(Refused);
        }
        fields.push((name.to_ascii_lowercase(), value.trim_ascii().to_vec()));
    }
    if fields.len() > MAX_HEADERS {
        return Err(Refused);
    }
    let all_of = |name: &str| -> Vec<String> {
        let of_name = fields.iter().filter(|field| field.0 == name);
        of_name
            .map(|field| String::from_utf8_lossy(&field.1).into_owned())
            .collect()
    };
    let list = |name: &str| -> Vec<String> {
        let values = all_of(name);
        let members = values.iter().flat_map(|value| value.split(','));
        members
            .map(|member| member.trim_matches([' ', '\t']).to_ascii_lowercase())
            .collect()
    };
    let has = |name: &str, word: &str| list(name).iter().any(|member| member == word);

    let hosts = all_of("host");
    let host_byte = |c: char| c.is_ascii_alphanumeric() || "-._~%!$&'()*+,;=:[]".contains(c);
    let right_hosts = if http10 {
        hosts.len() <= 1
    } else {
        hosts.len() == 1
    };
    if !right_hosts || !hosts.iter().all(|host| host.chars().all(host_byte)) {
        return Err(Refused);
    }
    let (encodings, lengths) = (list("transfer-encoding"), list("content-length"));
    let framing = if !encodings.is_empty() {
        if encodings != ["chunked"] || !lengths.is_empty() || http10 {
            return Err(Refused);
        }
        Framing::Chunked
    } else if let Some(first) = lengths.first() {
        let number = |digits: &String| -> Result<u64, Refused> {
            if digits.is_empty() || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
                return Err(Refused);
            }
            Ok(digits.parse().unwrap_or(u64::MAX))
        };
        let length = number(first)?;
        for other in &lengths {
            if number(other)? != length {
                return Err(Refused);
            }
        }
        if length > BODY {
            return Err(Refused);
        }
        Framing::Length(length)
    } else {
        Framing::None
    };
    let method = match method {
        "GET" => Method::Get,
        "HEAD" => Method::Head,
        "POST" => Method::Post,
        "PUT" => Method::Put,
        "DELETE" => Method::Delete,
        "CONNECT" => Method::Connect,
        _ => Method::Other,
    };
    if method == Method::Connect && framing != Framing::None {
        return Err(Refused);
    }
    let target = plain_target(method, target)?;
    let expectations = all_of("expect");
    let expects = |value: &String| value.eq_ignore_ascii_case("100-continue");
    if !http10 && !expectations.iter().all(expects) {
        return Err(Refused);
    }
    let keys = all_of("sec-websocket-key");
    let is_base64 = |c: char| c.is_ascii_alphanumeric() || c == '+' || c == '/';
    let websocket = method == Method::Get
        && !http10
        && framing == Framing::None
        && has("connection", "upgrade")
        && has("upgrade", "websocket")
        && all_of("sec-websocket-version")
            .last()
            .is_some_and(|version| version == "13")
        && keys.len() == 1
        && keys[0].len() == 24
        && keys[0]
            .strip_suffix("==")
            .is_some_and(|digits| digits.chars().all(is_base64));
    let mut rest = &text[end + 4..];
    let Some(body) = plain_body(framing, &mut rest)? else {
        return Ok(None);
    };
    *bytes = rest;
    Ok(Some(Request {
        method,
        target,
        keep_alive: !has("connection", "close") && (!http10 || has("connection", "keep-alive")),
        http10,
        expects_continue: !http10 && !expectations.is_empty(),
        websocket,
        body,
    }))
}

fn is_token(text: &str) -> bool {
    let valid = |c: char| c.is_ascii_graphic() && !"\"(),/:;<=>?@[\\]{}".contains(c);
    !text.is_empty() && text.chars().all(valid)
}

fn plain_target(method: Method, target: &str) -> Result<(String, String), Refused> {
    if method == Method::Connect {
        let (host, port) = target.rsplit_once(':').ok_or(Refused)?;
        let port = port
            .bytes()
            .all(|digit| digit.is_ascii_digit())
            .then(|| port.parse::<u16>());
        let port = port
            .ok_or(Refused)?
            .ok()
            .filter(|port| *port > 0)
            .ok_or(Refused)?;
        let address = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'));
        let host = match address {
            Some(address) if address.parse::<std::net::Ipv6Addr>().is_ok() => address,
            None if !host.is_empty()
                && host
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || "-._".contains(c)) =>
            {
                host
            }
            _ => return Err(Refused),
        };
        return Ok((host.into(), port.to_string()));
    }
    let scheme = target
        .get(..7)
        .is_some_and(|start| start.eq_ignore_ascii_case("http://"));
    let mut path = target.to_owned();
    if scheme {
        let authority = target[7..]
            .split(['/', '?', '#'])
            .next()
            .unwrap_or_default();
        path = target[7 + authority.len()..].to_owned();
        if authority.is_empty() {
            return Err(Refused);
        }
        if !path.starts_with('/') {
            path.insert(0, '/');
        }
    }
    if target.contains('#') || !(path.starts_with('/') || path == "*" && !scheme) {
        return Err(Refused);
    }
    let (path, query) = path.split_once('?').unwrap_or((&path, ""));
    Ok((path.into(), query.into()))
}

fn plain_body(framing: Framing, bytes: &mut &[u8]) -> Result<Option<Vec<u8>>, Refused> {
    let mut content = vec![];
    match framing {
        Framing::None => return Ok(Some(content)),
        Framing::Length(length) => return Ok(take(bytes, length as usize).map(<[u8]>::to_vec)),
        Framing::Chunked => {}
    }
    loop {
        let Some(line) = take_line(bytes)? else {
            return Ok(None);
        };
        let digits = line
            .iter()
            .take_while(|byte| byte.is_ascii_hexdigit())
            .count();
        let (size, extension) = line.split_at(digits);
        let valid = |byte: &u8| *byte == b'\t' || (*byte >= b' ' && *byte != 0x7f);
        if digits == 0
            || line.len() > MAX_CHUNK_LINE
            || !extension.iter().all(valid)
            || !(extension.is_empty() || extension.trim_ascii_start().starts_with(b";"))
        {
            return Err(Refused);
        }
        let size = size.iter().fold(0u64, |size, digit| {
            let digit = char::from(*digit).to_digit(16).unwrap();
            size.saturating_mul(16).saturating_add(u64::from(digit))
        });
        if size > BODY - content.len() as u64 {
            return Err(Refused);
        }
        if size == 0 {
            break;
        }
        let Some(chunk) = take(bytes, size as usize) else {
            return Ok(None);
        };
        content.extend(chunk);
        match take(bytes, 2) {
            Some(b"\r\n") => {}
            Some(_) => return Err(Refused),
            None => return Ok(None),
        }
    }
    let before = bytes.len();
    loop {
        let Some(line) = take_line(bytes)? else {
            return Ok(None);
        };
        if before - bytes.len() > MAX_TRAILER {
            return Err(Refused);
        }
        if line.is_empty() {
            return Ok(Some(content));
        }
        let colon = line.iter().position(|byte| *byte == b':').ok_or(Refused)?;
        let name = std::str::from_utf8(&line[..colon]).map_err(|_| Refused)?;
        let valid = |byte: &u8| *byte == b'\t' || (*byte >= b' ' && *byte != 0x7f);
        if !is_token(name) || !line[colon..].iter().all(valid) {
            return Err(Refused);
        }
    }
}

fn take<'b>(bytes: &mut &'b [u8], count: usize) -> Option<&'b [u8]> {
    let (first, rest) = bytes.split_at_checked(count)?;
    *bytes = rest;
    Some(first)
}

/// A line without its CRLF.
fn take_line<'b>(bytes: &mut &'b [u8]) -> Result<Option<&'b [u8]>, Refused> {
    let Some(end) = bytes.iter().position(|byte| *byte == b'\n') else {
        return Ok(None);
    };
    let line = take(bytes, end + 1).unwrap_or_default();
    let line = line.strip_suffix(b"\r\n").ok_or(Refused)?;
    if line.contains(&b'\r') {
        Err(Refused)
    } else {
        Ok(Some(line))
    }
}

// The first byte is the size of the pieces.
fuzz_target!(|data: &[u8]| {
    let [step, bytes @ ..] = data else {
        return;
    };
    let whole = read(bytes, usize::MAX);
    assert_eq!(read(bytes, 1), whole);
    assert_eq!(read(bytes, usize::from(*step).max(1)), whole);
    let plain = plain(bytes);
    assert_eq!(whole.requests, plain.requests);
    // An error may be found before the whole request has arrived.
    assert!(whole.end.is_some() || plain.end.is_none(), "{plain:?}");
});
