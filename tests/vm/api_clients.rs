//! The API with third-party clients.

use std::{
    fs,
    io::{self, Read, Write},
    net::{Shutdown, TcpListener},
    os::unix::net::UnixStream,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use pigeon_lab::{
    Vm, assets,
    disk::{Image, Tree},
    guest,
    http::Client,
    process::run,
    proxy::Proxy,
    vsock::API_PORT,
    ws::{CLOSE, Socket},
};
use serde_json::{Value, json};
use tungstenite::{Message, protocol::frame::coding::CloseCode};

/// Long, as other VMs may run at the same time.
const TIMEOUT: Duration = Duration::from_secs(180);

fn boot() -> Result<(Vm, Image)> {
    let root = Image::ext4(&Tree::busybox()?, 32)?;
    let config = json!({"ExecOverride": ["/bin/sleep", "100000"]});
    let vm = Vm::builder()
        .config(&config)
        .disk(&root)
        .timeout(TIMEOUT)
        .start()?;
    Ok((vm, root))
}

fn proxy(vm: &Vm) -> Result<Proxy> {
    let uds = vm.vsock().context("no vsock")?;
    Proxy::start(&uds.with_extension("api"), uds)
}

#[test]
fn tungstenite_runs_sessions() -> Result<()> {
    let (mut vm, _root) = boot()?;
    let mut api = vm.api()?;
    let mut open = |first: &Value| -> Result<_> {
        let stream = vm.connect(API_PORT)?;
        let (mut socket, response) = tungstenite::client("ws://vm/v1/ws/exec", stream)
            .map_err(|error| anyhow::anyhow!("no handshake: {error}"))?;
        assert_eq!(response.status(), 101);
        socket.send(Message::text(first.to_string()))?;
        Ok(socket)
    };

    let mut cat = open(&json!({"command": ["cat"]}))?;
    let sent: Vec<u8> = (0..100_000u32).map(|at| (at % 251) as u8).collect();
    cat.send(Message::binary(sent.clone()))?;
    cat.send(Message::Ping("are you there".into()))?;
    let (mut back, mut ponged) = (vec![], false);
    while back.len() < sent.len() || !ponged {
        match cat.read()? {
            Message::Binary(bytes) => back.extend(bytes),
            Message::Pong(bytes) => ponged = bytes == "are you there",
            other => panic!("{other}"),
        }
    }
    assert!(back == sent);
    cat.send(Message::text(json!({"stdin": "eof"}).to_string()))?;
    let exit = cat.read()?.into_text()?;
    assert_eq!(exit.as_str(), r#"{"Exit":{"code":0,"signal":null}}"#);
    let Message::Close(Some(frame)) = cat.read()? else {
        panic!("no close frame");
    };
    assert_eq!(frame.code, CloseCode::Normal);
    assert!(matches!(
        cat.read(),
        Err(tungstenite::Error::ConnectionClosed)
    ));

    // An interactive shell.
    let mut shell =
        open(&json!({"command": ["sh"], "tty": true, "env": ["PS1=> "], "cols": 80, "rows": 24}))?;
    let until = |socket: &mut tungstenite::WebSocket<_>, wanted: &str| -> Result<String> {
        let mut text = String::new();
        while !text.contains(wanted) {
            match socket.read()? {
                Message::Binary(bytes) => text += &String::from_utf8_lossy(&bytes),
                other => anyhow::bail!("{other} after {text:?}"),
            }
        }
        Ok(text)
    };
    until(&mut shell, "> ")?;
    shell.send(Message::text(r#"{"cols":123,"rows":45}"#))?;
    shell.send(Message::binary("stty size\n"))?;
    until(&mut shell, "45 123\r\n> ")?;
    shell.send(Message::binary("sleep 1000\n"))?;
    // A key sent before the command has started goes to the shell.
    let ask = json!({"cmd": ["sh", "-c", "ps -o args | grep '^sleep 1000'"]});
    let start = Instant::now();
    while api.post("/v1/exec", &ask)?.json()?["exit_code"] != 0 {
        anyhow::ensure!(start.elapsed() < TIMEOUT, "no sleep");
    }
    shell.send(Message::binary("\x03"))?;
    until(&mut shell, "> ")?;
    shell.send(Message::binary("exit 9\n"))?;
    let mut last = String::new();
    while let Ok(message) = shell.read() {
        if let Message::Text(text) = message {
            last = text.to_string();
        }
    }
    assert_eq!(last, r#"{"Exit":{"code":9,"signal":null}}"#);

    // The client closes first.
    let mut sleep = open(&json!({"command": ["sleep", "1000"]}))?;
    sleep.close(None)?;
    assert!(matches!(sleep.read()?, Message::Close(None)));
    assert!(matches!(
        sleep.read(),
        Err(tungstenite::Error::ConnectionClosed)
    ));

    let mut none = open(&json!({"command": ["/no/such"]}))?;
    assert!(none.read()?.into_text()?.contains("/no/such"));
    let Message::Close(Some(frame)) = none.read()? else {
        panic!("no close frame");
    };
    assert_eq!(frame.code, CloseCode::Error);
    Ok(())
}

#[test]
fn python_websockets_runs_sessions() -> Result<()> {
    let (vm, _root) = boot()?;
    let proxy = proxy(&vm)?;
    let script = assets::repository().join("tests/vm/api_sessions.py");
    let said = run(Command::new(assets::python()?)
        .arg(script)
        .arg(proxy.socket()))?;
    assert_eq!(said, "all sessions went well\n");
    Ok(())
}

#[test]
fn dockers_library_decodes_the_logs_frames() -> Result<()> {
    let root = Image::ext4(&Tree::busybox()?, 32)?;
    let script = "for n in 1 2 3 4 5; do echo out $n; echo error $n >&2; done; exec sleep 100000";
    let config = guest::shell(script, json!({"SeparateStderr": true}));
    let vm = Vm::builder()
        .config(&config)
        .disk(&root)
        .timeout(TIMEOUT)
        .boot()?;
    vm.wait_for("out 5")?;
    vm.wait_for("error 5")?;
    let proxy = proxy(&vm)?;
    let script = assets::repository().join("tests/vm/api_logs.py");
    let said = run(Command::new(assets::python()?)
        .arg(script)
        .arg(proxy.socket()))?;
    assert_eq!(said, "all frames are Docker's\n");
    Ok(())
}

/// Excluded: calls that affect the workload, the shutdown or the clock, and responses without an end.
const NOT_GENERATED: &str = "/v1/(stop|exit_code|signals|ws/exec|logs|mounts|snapshot.*|restore)";

#[test]
fn requests_generated_from_openapi_get_described_responses() -> Result<()> {
    let (vm, _root) = boot()?;
    let proxy = proxy(&vm)?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let url = format!("http://{}", listener.local_addr()?);
    // A proxy, as the client does not support Unix sockets. It runs until this process exits.
    let socket = proxy.socket().to_owned();
    thread::spawn(move || -> Result<()> {
        for client in listener.incoming() {
            let (client, api) = (client?, UnixStream::connect(&socket)?);
            let (mut requests, mut to_api) = (client.try_clone()?, api.try_clone()?);
            let (mut responses, mut to_client) = (api, client);
            thread::spawn(move || {
                let _client_gone = io::copy(&mut requests, &mut to_api);
                to_api.shutdown(Shutdown::Write)
            });
            thread::spawn(move || {
                let _api_gone = io::copy(&mut responses, &mut to_client);
                to_client.shutdown(Shutdown::Both)
            });
        }
        Ok(())
    });
    // Where the client stores what it has found.
    let dir = tempfile::tempdir()?;
    let said = run(Command::new(assets::python()?)
        .current_dir(&dir)
        .args(["-m", "schemathesis.cli", "run"])
        .arg(assets::repository().join("src/api/openapi.yaml"))
        .args(["--url", &url, "--exclude-path-regex", NOT_GENERATED])
        .args(["--phases", "coverage,fuzzing", "--max-examples", "30"])
        .args(["--generation-deterministic", "--request-timeout", "60"])
        .args(["--checks", "all", "--warnings", "off"])
        // A command that cannot be executed gets 500, and an unknown user 400.
        .args([
            "--exclude-checks",
            "not_a_server_error,positive_data_acceptance",
        ]))?;
    assert!(said.contains("Tested: 8"), "{said}");
    Ok(())
}

#[test]
fn curl_calls_everything() -> Result<()> {
    let (vm, _root) = boot()?;
    let proxy = proxy(&vm)?;
    let curl = |path: &str, arguments: &[&str]| -> Result<String> {
        run(Command::new(assets::tool("curl")?)
            .args(["--silent", "--show-error", "--max-time", "180"])
            .arg("--unix-socket")
            .arg(proxy.socket())
            .args(["--write-out", " %{http_code} %{num_connects}"])
            .args(arguments)
            .arg(format!("http://vm{path}")))
    };
    assert_eq!(curl("/v1/status", &[])?, r#"{"ok":true} 200 1"#);
    assert!(curl("/v1/status", &["--head"])?.ends_with(" 200 1"));
    assert!(curl("/v1/status", &["--http1.0"])?.ends_with(" 200 1"));
    assert!(curl("/v1/nothing", &[])?.ends_with(" 404 1"));
    let exec = r#"{"cmd":["echo","hi"]}"#;
    let hi = r#"{"exit_code":0,"exit_signal":0,"stdout":"hi\n","stderr":""}"#;
    assert_eq!(curl("/v1/exec", &["--json", exec])?, format!("{hi} 200 1"));
    let chunked = ["--header", "Transfer-Encoding: chunked", "--json", exec];
    assert_eq!(curl("/v1/exec", &chunked)?, format!("{hi} 200 1"));
    // Two calls on one connection.
    let twice = curl("/v1/status", &["http://vm/v1/status"])?;
    assert_eq!(twice, r#"{"ok":true} 200 1{"ok":true} 200 0"#);
    // For more than a megabyte, curl expects 100-continue first; it gets the error before it has sent the body.
    let dir = tempfile::tempdir()?;
    for size in [120 << 10, 200 << 10, 4 << 20] {
        let body = dir.path().join("body");
        fs::write(&body, format!("{exec}{}", " ".repeat(size - exec.len())))?;
        let data = format!("@{}", body.display());
        let wanted = if size < 128 << 10 { " 200 1" } else { " 413 1" };
        for expect in ["Expect: 100-continue", "Expect:"] {
            let said = curl("/v1/exec", &["--header", expect, "--data-binary", &data])?;
            assert!(said.ends_with(wanted), "{size} {expect}: {said}");
        }
    }
    Ok(())
}

#[test]
fn a_client_that_sends_its_whole_body_first_reads_the_error() -> Result<()> {
    let (mut vm, _root) = boot()?;
    // Far more than the buffers of vsock and the sockets hold.
    let piece = vec![b' '; 1 << 20];
    let chunk = [b"100000\r\n", &piece[..], b"\r\n"].concat();
    for (framing, piece) in [
        ("Content-Length: 8388608", &piece),
        ("Transfer-Encoding: chunked", &chunk),
    ] {
        let mut api = vm.api()?;
        let head = format!("POST /v1/exec HTTP/1.1\r\nHost: x\r\n{framing}\r\n\r\n");
        api.send(head.as_bytes())?;
        for part in 0..8 {
            api.send(piece).context("cut off while sending")?;
            if part == 4 {
                thread::sleep(Duration::from_secs(3));
            }
        }
        let response = api.receive(false)?;
        assert_eq!(
            (response.status, response.header("connection")),
            (413, Some("close"))
        );
        assert_eq!(response.text(), r#"{"error":"the body is too large"}"#);
        // A client that has the response and keeps the connection open is disconnected soon.
        let start = Instant::now();
        api.wait_closed()?;
        assert!(start.elapsed() < Duration::from_secs(20));
    }
    // One that never stops sending is disconnected, too, after some time.
    let mut api = vm.api()?;
    api.send(b"POST /v1/exec HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")?;
    let start = Instant::now();
    while api.send(&chunk).is_ok() {
        ensure!(start.elapsed() < Duration::from_secs(120), "still taken");
    }
    assert!(
        start.elapsed() > Duration::from_secs(5),
        "{:?}",
        start.elapsed()
    );
    assert_eq!(vm.api()?.get("/v1/status")?.status, 200);
    Ok(())
}

#[test]
fn a_client_that_keeps_sending_after_an_error_reads_the_error() -> Result<()> {
    let (mut vm, _root) = boot()?;
    let refused = if cfg!(feature = "tunnel") { 502 } else { 400 };
    // Far more than the buffers of vsock and the sockets hold.
    let rest = vec![b' '; 8 << 20];
    for (head, status) in [
        (
            "POST /v1/exec HTTP/1.1\r\nHost: x\r\nNo colon\r\n\r\n".into(),
            400,
        ),
        (
            "POST /v1/exec HTTP/1.1\r\nHost: x\r\nExpect: more\r\n\r\n".into(),
            417,
        ),
        (
            "POST /v1/exec HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n".into(),
            501,
        ),
        (
            "POST /v1/nothing HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n\
             Content-Length: 100000\r\n\r\n"
                .into(),
            404,
        ),
        (
            "CONNECT 127.0.0.1:1 HTTP/1.1\r\nHost: x\r\n\r\n".into(),
            refused,
        ),
        (
            format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(64 << 10)),
            431,
        ),
    ] {
        let mut api = vm.api()?;
        api.send(head.as_bytes())?;
        api.send(&rest)
            .with_context(|| format!("{status}: cut off while sending"))?;
        assert_eq!(api.receive(false)?.status, status);
    }
    let mut session = Socket::open(vm.connect(API_PORT)?, "/v1/ws/exec")?;
    let mut sender = session.sender()?;
    sender.send_raw(b"\x82\x01!")?;
    sender
        .send_raw(&rest)
        .context("cut off while sending frames")?;
    let frame = session.next_frame()?.context("no close frame")?;
    assert_eq!(
        (frame.first, frame.payload.get(..2)),
        (CLOSE, Some(&1002_u16.to_be_bytes()[..]))
    );
    Ok(())
}

/// As Go's net/http does for a body of unknown length and with `DisableKeepAlives`: head and chunks in
/// separate writes, and one connection per call.
#[test]
fn a_client_like_gos_sends_chunks_and_closes_after_each_call() -> Result<()> {
    let (mut vm, _root) = boot()?;
    for (path, body, wanted) in [
        (
            "/v1/exec",
            r#"{"cmd":["sh","-c","echo $0","go"]}"#,
            "\"stdout\":\"go\\n\"",
        ),
        ("/v1/signals", r#"{"signal":28}"#, r#"{"ok":true}"#),
        ("/v1/signals", r#"{"signal":0}"#, "error"),
    ] {
        for _ in 0..10 {
            let mut stream = vm.connect(API_PORT)?;
            let head = format!(
                "POST {path} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: Go-http-client/1.1\r\n\
                 Connection: close\r\nTransfer-Encoding: chunked\r\n\
                 Content-Type: application/json\r\nAccept-Encoding: gzip\r\n\r\n"
            );
            stream.write_all(head.as_bytes())?;
            for part in body.as_bytes().chunks(9) {
                write!(stream, "{:x}\r\n", part.len())?;
                stream.write_all(part)?;
                stream.write_all(b"\r\n")?;
            }
            stream.write_all(b"0\r\n\r\n")?;
            let mut client = Client::new(stream);
            let response = client.receive(false)?;
            assert!(response.text().contains(wanted), "{response}");
            assert_eq!(response.header("connection"), Some("close"));
            client.wait_closed()?;
        }
    }
    // Calls without a body.
    for _ in 0..10 {
        let mut stream = vm.connect(API_PORT)?;
        stream.write_all(
            b"GET /v1/status HTTP/1.1\r\nHost: localhost\r\nUser-Agent: Go-http-client/1.1\r\n\
              Accept-Encoding: gzip\r\nConnection: close\r\n\r\n",
        )?;
        let mut response = String::new();
        stream.read_to_string(&mut response)?;
        assert!(
            response.starts_with("HTTP/1.1 200 OK\r\n")
                && response.ends_with("\r\n\r\n{\"ok\":true}")
        );
    }
    Ok(())
}
