//! The table of [`cases`] twice: by the parsers themselves, cut in every way, and by a whole VM.

#[path = "conformance_cases.rs"]
mod cases;

use std::{
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
    bodies::{self, Exec},
    http::{self, Call, Progress, Reader, Target},
    json::Spans,
    websocket::{self, Decoder, Event},
};
use serde_json::json;

/// Generous: other VMs may run beside this one.
const PATIENCE: Duration = Duration::from_secs(180);

/// One answer.
const ANSWER: Duration = Duration::from_secs(30);

/// Whether these are the statuses wanted.
fn matches(seen: &[u16], wanted: &[u16]) -> bool {
    let right = |(seen, wanted): (&u16, &u16)| {
        seen == wanted || (*wanted == ERROR && (400..600).contains(seen))
    };
    seen.len() == wanted.len() && seen.iter().zip(wanted).all(right)
}

/// What the request parser alone makes of bytes that come in pieces: statuses, and whether the
/// connection goes on.
fn parse(bytes: &[u8], step: usize) -> (Vec<u16>, bool) {
    let (mut buffer, mut filled) = (vec![0; http::BUFFER], 0);
    let (mut reader, mut statuses) = (Reader::default(), vec![]);
    for piece in bytes.chunks(step) {
        buffer[filled..filled + piece.len()].copy_from_slice(piece);
        filled += piece.len();
        loop {
            match reader.advance(&mut buffer, &mut filled) {
                Progress::More | Progress::Continue => break,
                Progress::Ready => {}
                Progress::Refused(refusal) => {
                    statuses.push(refusal.status() as u16);
                    return (statuses, false);
                }
            }
            let end = reader.body().end;
            let body = &mut buffer[reader.body()];
            statuses.push(match reader.target {
                Target::Call(Call::Signals) if bodies::signal(body).unwrap_or(0) == 0 => 400,
                Target::Call(Call::Exec) if Exec::read(body, &mut Spans::default()).is_err() => 400,
                Target::Call(_) => 200,
                Target::WrongMethod(_) => 405,
                Target::NoUpgrade => 426,
                Target::Unknown => 404,
                Target::Upgrade(_) => {
                    statuses.push(101);
                    return (statuses, false);
                }
            });
            if !reader.style.keep_alive {
                return (statuses, false);
            }
            buffer.copy_within(end..filled, 0);
            filled -= end;
            reader = Reader::default();
        }
    }
    (statuses, !reader.started())
}

#[test]
fn the_request_parser_conforms_however_the_bytes_are_cut() {
    let mut faults = vec![];
    for Exchange {
        name,
        bytes,
        statuses,
        open,
    } in cases::exchanges()
    {
        for step in [bytes.len(), 4096, 7, 1] {
            // Byte by byte only what is short: the parser looks at a partial head again and again.
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
fn the_frame_decoder_conforms_however_the_bytes_are_cut() {
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
                        Event::More => break,
                        Event::Binary => seen.extend_from_slice(&buffer[decoder.payload.clone()]),
                        Event::Ping => pinged.push(buffer[decoder.payload.clone()].to_vec()),
                        Event::Text | Event::Pong => {}
                        Event::Close(code) => {
                            closed = Some(code);
                            break 'bytes;
                        }
                        Event::Fail(code) => {
                            closed = Some(Some(code as u16));
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

/// One exchange with the VM.
fn exchange(vm: &mut Vm, case: &Exchange) -> Result<()> {
    let mut client = Client::new(vm.connect(API_PORT)?);
    client.set_read_timeout(ANSWER)?;
    // A server that has heard enough may have closed before the last byte.
    let sent = client.send(&case.bytes);
    let mut seen = vec![];
    for _ in &case.statuses {
        let bodiless = case.bytes.starts_with(b"HEAD") || case.statuses == [101];
        let answer = client
            .receive(bodiless)
            .with_context(|| format!("after {seen:?}"))?;
        ensure!(
            answer.status != 100 || case.statuses.contains(&100),
            "100 in between"
        );
        if answer.status >= 400 {
            ensure!(
                bodiless || answer.json()?["error"].is_string(),
                "no error: {answer}"
            );
        }
        seen.push(answer.status);
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
        sent?;
        let after = client.get("/v1/status").context("no following request")?;
        ensure!(after.status == 200, "then {after}");
    } else {
        // Bytes that it did not take may have reset the connection.
        match client.wait_closed() {
            Ok(()) => {}
            Err(error) if error.is::<std::io::Error>() => {
                let error = error.downcast::<std::io::Error>()?;
                ensure!(
                    error.kind() == std::io::ErrorKind::ConnectionReset,
                    "{error}"
                );
            }
            Err(error) => return Err(error.context("it stays open")),
        }
    }
    Ok(())
}

/// The frames of one case in a session of `cat`.
fn session(vm: &mut Vm, case: &Frames) -> Result<()> {
    let mut socket = Socket::open(vm.connect(API_PORT)?, "/v1/ws/exec")?;
    socket.stream().set_read_timeout(Some(ANSWER))?;
    socket.text(&json!({"command": ["cat"]}))?;
    let mut sender = socket.sender()?;
    let (bytes, goes_on) = (case.bytes.clone(), case.close.is_none());
    let sending = thread::spawn(move || -> Result<()> {
        let sent = sender.send_raw(&bytes);
        if goes_on {
            sent?;
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
            "{} bytes came back",
            echo.len()
        );
    } else {
        ensure!(case.echo.starts_with(&echo), "output that was no input");
    }
    Ok(())
}

/// Half a request, and how long it took to be told that this is too slow; `drip` sends on, byte
/// after byte.
fn slow(mut client: Client<std::os::unix::net::UnixStream>, drip: bool) -> Result<Duration> {
    let start = Instant::now();
    client.set_read_timeout(2 * ANSWER)?;
    client.send(b"GET /v1/status HTTP/1.1\r\nHost: x\r\nA: ")?;
    if drip {
        let (mut stream, _) = client.into_stream();
        let mut sender = stream.try_clone()?;
        thread::spawn(move || {
            while std::io::Write::write_all(&mut sender, b"b").is_ok() {
                thread::sleep(Duration::from_millis(500));
            }
        });
        let mut answer = [0; 12];
        std::io::Read::read_exact(&mut stream, &mut answer)?;
        ensure!(&answer == b"HTTP/1.1 408", "{answer:?}");
    } else {
        let answer = client.receive(false)?;
        ensure!(answer.status == 408, "{answer}");
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
        .patience(PATIENCE)
        .start()?;
    let slow_ones: Vec<_> = [false, true]
        .into_iter()
        .map(|drip| {
            let client = vm.api()?;
            Ok(thread::spawn(move || slow(client, drip)))
        })
        .collect::<Result<_>>()?;
    // Nothing sent is no slow request: such a connection stays.
    let mut idle = vm.api()?;

    let (exchanges, frames) = (cases::exchanges(), cases::frames());
    assert!(exchanges.len() + frames.len() >= 150);
    let mut faults = vec![];
    for case in &exchanges {
        if let Err(error) = exchange(&mut vm, case) {
            faults.push(format!("{}: {error:#}", case.name));
        }
    }
    for case in &frames {
        if let Err(error) = session(&mut vm, case) {
            faults.push(format!("{}: {error:#}", case.name));
        }
    }

    // 100-continue: asked for, and no body before it.
    let mut patient = vm.api()?;
    patient.send(
        b"POST /v1/signals HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 13\r\n\r\n",
    )?;
    assert_eq!(patient.receive(false)?.status, 100);
    patient.send(br#"{"signal":28}"#)?;
    assert_eq!(patient.receive(false)?.status, 200);
    // A client that asks first is told first.
    patient.send(
        b"POST /v1/nothing HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 13\r\n\r\n",
    )?;
    assert_eq!(patient.receive(false)?.status, 404);

    // A client that pipelines and does not read costs its own connection only.
    let deaf = vm.connect(API_PORT)?;
    deaf.set_write_timeout(Some(Duration::from_secs(2)))?;
    let request = b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n".repeat(1000);
    let sent = (0..200).take_while(|_| std::io::Write::write_all(&mut &deaf, &request).is_ok());
    assert!(
        sent.count() < 200,
        "it reads on though nobody takes its answers"
    );
    assert_eq!(vm.api()?.get("/v1/status")?.status, 200);
    drop(deaf);

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
