//! The table of [`cases`] twice: with the parsers alone, split in every way, and with a VM.

#[path = "conformance_cases.rs"]
mod cases;

use std::{
    os::unix::net::UnixStream,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use cases::{ERROR, Exchange, Frames};
use pigeon_lab::{
    Vm,
    disk::{Image, Tree},
    http::Client,
    vsock::API_PORT,
    ws::{BINARY, CLOSE, Frame, PONG, Socket},
};
use proto::{
    arena::Arena,
    bodies::{self, ExecRequest, SignalRequest},
    http::{BodyDecoder, Head, HeadParser, Method, RequestError, Target},
    websocket::{self, Decoder, Event},
};
use serde_json::json;

/// Long, as other VMs may run at the same time.
const TIMEOUT: Duration = Duration::from_secs(180);

/// One answer.
const RESPONSE: Duration = Duration::from_secs(30);

/// How many connections try a case at the same time. Most of the time they wait for the end of a connection:
/// after an error response the VM waits 10 s for the client to close.
const AT_ONCE: usize = 96;

/// Whether the statuses are those expected.
fn matches(seen: &[u16], wanted: &[u16]) -> bool {
    let right = |(seen, wanted): (&u16, &u16)| {
        seen == wanted || (*wanted == ERROR && (400..600).contains(seen))
    };
    seen.len() == wanted.len() && seen.iter().zip(wanted).all(right)
}

/// The longest body that the API accepts.
const MAX_BODY: usize = 128 << 10;

/// The result of the request parsers alone for bytes that arrive in pieces, with a stub for the API's
/// handler: statuses, and whether the connection stays open.
fn parse(bytes: &[u8], step: usize) -> (Vec<u16>, bool) {
    let (mut buffer, mut statuses) = (vec![], vec![]);
    let (mut parser, mut request) = (HeadParser::default(), None::<Request>);
    for piece in bytes.chunks(step) {
        buffer.extend_from_slice(piece);
        loop {
            let Some(reading) = &mut request else {
                match parser.parse(&buffer) {
                    Ok(None) => break,
                    Ok(Some(head)) => {
                        let length = head.length;
                        match Request::new(&head) {
                            Ok(fresh) => request = Some(fresh),
                            Err(error) => return refused(statuses, error),
                        }
                        buffer.drain(..length);
                        continue;
                    }
                    Err(error) => return refused(statuses, error),
                }
            };
            let decoded = match reading.decoder.decode(&mut buffer) {
                Ok(decoded) => decoded,
                Err(error) => return refused(statuses, error),
            };
            reading.body.extend_from_slice(&buffer[..decoded.content]);
            buffer.drain(..decoded.consumed);
            // A client that expects 100-continue gets an error at once.
            let is_declined = reading.expects && reading.status() >= 400;
            if !(reading.decoder.is_complete() || is_declined) {
                break;
            }
            let request = request.take().expect("it was being read");
            let status = request.status();
            statuses.push(status);
            if status == 101 || !request.keep_alive || (request.expects && status >= 400) {
                return (statuses, false);
            }
        }
    }
    let idle = request.is_none() && !parser.started();
    (statuses, idle)
}

fn refused(mut statuses: Vec<u16>, error: RequestError) -> (Vec<u16>, bool) {
    let status = error.status().to_string();
    let (code, _reason) = status.split_once(' ').expect("a status without a code");
    statuses.push(code.parse().expect("a code that is no number"));
    (statuses, false)
}

/// A request whose body is being read.
struct Request {
    method: Method,
    path: String,
    websocket: bool,
    keep_alive: bool,
    expects: bool,
    decoder: BodyDecoder,
    body: Vec<u8>,
}

impl Request {
    fn new(head: &Head) -> Result<Self, RequestError> {
        let path = match head.target {
            Target::Resource { path, .. } => path.to_owned(),
            Target::Authority { .. } => return Err(RequestError::RequestTarget),
        };
        Ok(Self {
            method: head.method,
            path,
            websocket: head.websocket.is_some(),
            keep_alive: head.reply.keep_alive,
            expects: head.expects_continue,
            decoder: BodyDecoder::new(head.framing, MAX_BODY as u64)?,
            body: vec![],
        })
    }

    /// The status of the API's response, as far as the cases need it.
    fn status(&self) -> u16 {
        let mut memory = vec![0; MAX_BODY + 1024];
        let mut arena = Arena::new(&mut memory);
        let mut body = self.body.clone();
        let mut status = |request| match bodies::decode(&mut body, &mut arena, request) {
            Ok(()) => 200,
            Err(_) => 400,
        };
        match (self.method, self.path.as_str()) {
            (Method::Get | Method::Head, "/v1/status" | "/v1/exit_code") => 200,
            (Method::Post, "/v1/signals") if !self.decoder.is_complete() => 200,
            (Method::Post, "/v1/exec") if !self.decoder.is_complete() => 200,
            (Method::Post, "/v1/signals") => status(&mut SignalRequest::default()),
            (Method::Post, "/v1/exec") => status(&mut ExecRequest::default()),
            (Method::Get, "/v1/ws/exec") if self.websocket => 101,
            (Method::Get, "/v1/ws/exec") => 426,
            (_, "/v1/status" | "/v1/exit_code" | "/v1/signals" | "/v1/exec" | "/v1/ws/exec") => 405,
            _ => 404,
        }
    }
}

#[test]
fn the_request_parser_conforms_however_the_bytes_are_split() {
    let mut faults = vec![];
    for Exchange {
        name,
        bytes,
        statuses,
        open,
    } in cases::exchanges()
    {
        for step in [bytes.len(), 4096, 7, 1] {
            // Only short inputs byte by byte.
            if step < 4096 && bytes.len() > 40_000 {
                continue;
            }
            let step = step.min(4096);
            let (seen, goes_on) = parse(&bytes, step);
            if !matches(&seen, &statuses) || goes_on != open {
                faults.push(format!(
                    "{name} in pieces of {step}: {seen:?} {goes_on}, not {statuses:?} {open}"
                ));
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn the_frame_decoder_conforms_however_the_bytes_are_split() {
    let mut faults = vec![];
    for case in cases::frames() {
        let Frames {
            name,
            bytes,
            echo,
            pongs,
            close,
        } = case;
        for step in [4096, 7, 1] {
            let (mut buffer, mut filled) = (vec![0; websocket::BUFFER], 0);
            let mut decoder = Decoder::default();
            let (mut seen, mut pinged, mut closed) = (vec![], vec![], None);
            'bytes: for piece in bytes.chunks(step) {
                buffer[filled..filled + piece.len()].copy_from_slice(piece);
                filled += piece.len();
                loop {
                    match decoder.next(&mut buffer, &mut filled) {
                        Event::Incomplete => break,
                        Event::Binary(payload) => seen.extend_from_slice(&buffer[payload]),
                        Event::Ping(payload) => pinged.push(buffer[payload].to_vec()),
                        Event::Text(_) | Event::Pong => {}
                        Event::Close(code) => {
                            closed = Some(code);
                            break 'bytes;
                        }
                        Event::Error(error) => {
                            closed = Some(Some(error.close_code() as u16));
                            break 'bytes;
                        }
                    }
                }
            }
            if seen != echo || pinged != pongs || closed != close {
                faults.push(format!(
                    "{name} in pieces of {step}: {closed:?}, not {close:?}"
                ));
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// Runs each case on its own connection, many at a time: after an error a connection stays open for a while.
fn all_cases<C: Sync>(
    vm: &mut Vm,
    cases: &[C],
    name: fn(&C) -> &str,
    try_case: fn(UnixStream, &C) -> Result<()>,
    faults: &mut Vec<String>,
) -> Result<()> {
    for some in cases.chunks(AT_ONCE) {
        let streams: Vec<_> = some
            .iter()
            .map(|_| vm.connect(API_PORT))
            .collect::<Result<_>>()?;
        thread::scope(|scope| {
            let running: Vec<_> = some
                .iter()
                .zip(streams)
                .map(|(case, stream)| scope.spawn(move || try_case(stream, case)))
                .collect();
            for (case, running) in some.iter().zip(running) {
                if let Err(error) = running.join().expect("no panic") {
                    faults.push(format!("{}: {error:#}", name(case)));
                }
            }
        });
    }
    Ok(())
}

/// One exchange with the VM.
fn exchange(stream: UnixStream, case: &Exchange) -> Result<()> {
    let mut client = Client::new(stream);
    client.set_read_timeout(RESPONSE)?;
    // A client must be able to send everything.
    client.send(&case.bytes)?;
    let mut seen = vec![];
    for _ in &case.statuses {
        let bodiless = case.bytes.starts_with(b"HEAD") || case.statuses == [101];
        let response = client
            .receive(bodiless)
            .with_context(|| format!("after {seen:?}"))?;
        ensure!(
            response.status != 100 || case.statuses.contains(&100),
            "100 in between"
        );
        if response.status >= 400 {
            ensure!(
                bodiless || response.json()?["error"].is_string(),
                "no error: {response}"
            );
        }
        seen.push(response.status);
    }
    ensure!(
        matches(&seen, &case.statuses),
        "{seen:?}, not {:?}",
        case.statuses
    );
    if case.statuses == [101] {
        return Ok(());
    }
    if case.open {
        let after = client.get("/v1/status").context("no following request")?;
        ensure!(after.status == 200, "then {after}");
    } else {
        client.wait_closed().context("it stays open")?;
    }
    Ok(())
}

/// The frames of one case in a session of `cat`.
fn session(stream: UnixStream, case: &Frames) -> Result<()> {
    let mut socket = Socket::open(stream, "/v1/ws/exec")?;
    socket.stream().set_read_timeout(Some(RESPONSE))?;
    socket.text(&json!({"command": ["cat"]}))?;
    let mut sender = socket.sender()?;
    let (bytes, goes_on) = (case.bytes.clone(), case.close.is_none());
    let sending = thread::spawn(move || -> Result<()> {
        sender.send_raw(&bytes)?;
        if goes_on {
            sender.binary(b"<end>")?;
        }
        Ok(())
    });
    let (mut echo, mut pongs, mut close) = (vec![], vec![], None);
    while !(goes_on && echo.ends_with(b"<end>")) {
        match socket.next_frame()? {
            Some(Frame {
                first: BINARY,
                payload,
            }) => echo.extend(payload),
            Some(Frame {
                first: PONG,
                payload,
            }) => pongs.push(payload),
            Some(Frame {
                first: CLOSE,
                payload,
            }) => {
                let code = payload.first_chunk().map(|code| u16::from_be_bytes(*code));
                close = Some(code);
            }
            Some(frame) => anyhow::bail!("unexpected {frame:?}"),
            None => break,
        }
    }
    sending.join().expect("no panic")?;
    ensure!(
        close == case.close,
        "closed with {close:?}, not {:?}",
        case.close
    );
    ensure!(pongs == case.pongs, "pongs {pongs:?}");
    if goes_on {
        ensure!(
            echo == [&case.echo[..], b"<end>"].concat(),
            "{} bytes were echoed",
            echo.len()
        );
    } else {
        ensure!(case.echo.starts_with(&echo), "output that was no input");
    }
    Ok(())
}

/// Sends half a request, and measures the time until the 408; `drip` keeps sending single bytes.
fn slow(mut client: Client<UnixStream>, drip: bool) -> Result<Duration> {
    let start = Instant::now();
    client.set_read_timeout(2 * RESPONSE)?;
    client.send(b"GET /v1/status HTTP/1.1\r\nHost: x\r\nA: ")?;
    if drip {
        let (mut stream, _) = client.into_stream();
        let mut sender = stream.try_clone()?;
        thread::spawn(move || {
            while std::io::Write::write_all(&mut sender, b"b").is_ok() {
                thread::sleep(Duration::from_millis(500));
            }
        });
        let mut response = [0; 12];
        std::io::Read::read_exact(&mut stream, &mut response)?;
        ensure!(&response == b"HTTP/1.1 408", "{response:?}");
    } else {
        let response = client.receive(false)?;
        ensure!(response.status == 408, "{response}");
        client.wait_closed().context("open after the 408")?;
    }
    Ok(start.elapsed())
}

#[test]
fn the_api_conforms_over_vsock() -> Result<()> {
    let root = Image::ext4(&Tree::busybox()?, 32)?;
    let config = json!({"ExecOverride": ["/bin/sleep", "100000"]});
    let mut vm = Vm::builder()
        .config(&config)
        .disk(&root)
        .timeout(TIMEOUT)
        .start()?;
    let slow_ones: Vec<_> = [false, true]
        .into_iter()
        .map(|drip| {
            let client = vm.api()?;
            Ok(thread::spawn(move || slow(client, drip)))
        })
        .collect::<Result<_>>()?;
    // An idle connection is not a slow request: it stays open.
    let mut idle = vm.api()?;

    let (exchanges, frames) = (cases::exchanges(), cases::frames());
    assert!(exchanges.len() + frames.len() >= 150);
    let mut faults = vec![];
    all_cases(&mut vm, &exchanges, |case| case.name, exchange, &mut faults)?;
    all_cases(&mut vm, &frames, |case| case.name, session, &mut faults)?;

    // With 100-continue, and without sending the body first.
    let mut expecting = vm.api()?;
    expecting.send(
        b"POST /v1/signals HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 13\r\n\r\n",
    )?;
    assert_eq!(expecting.receive(false)?.status, 100);
    expecting.send(br#"{"signal":28}"#)?;
    assert_eq!(expecting.receive(false)?.status, 200);
    // A client that expects 100-continue gets the error before it sends the body.
    expecting.send(
        b"POST /v1/nothing HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 13\r\n\r\n",
    )?;
    assert_eq!(expecting.receive(false)?.status, 404);

    // A client that pipelines without reading blocks only its own connection.
    let unread = vm.connect(API_PORT)?;
    unread.set_write_timeout(Some(Duration::from_secs(2)))?;
    let request = b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n".repeat(1000);
    let sent = (0..200).take_while(|_| std::io::Write::write_all(&mut &unread, &request).is_ok());
    assert!(
        sent.count() < 200,
        "it keeps reading although no response is read"
    );
    assert_eq!(vm.api()?.get("/v1/status")?.status, 200);
    drop(unread);

    for slow in slow_ones {
        let took = slow.join().expect("no panic")?;
        assert!(took > Duration::from_secs(8), "{took:?}");
    }
    assert_eq!(idle.get("/v1/status")?.status, 200);
    assert!(
        faults.is_empty(),
        "{} faults\n{}",
        faults.len(),
        faults.join("\n")
    );
    Ok(())
}
