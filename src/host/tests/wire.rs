//! The client against a stand-in for the API, and the commands that are made of it.

mod common;

use std::{
    fs,
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    os::unix::fs::PermissionsExt,
    process::{Command, Output, Stdio},
    time::Duration,
};

use common::{
    Place,
    fake::{Connection, Vm},
};
use pigeon::{
    Client, Error,
    files::WriteOptions,
    forward::Forward,
    logs::Stream,
    mounts::Mount,
    snapshot::{Prepare, Restore},
};
use serde_json::{Value, json};
use tungstenite::{
    Message, WebSocket,
    protocol::{CloseFrame, Role, frame::coding::CloseCode},
};

fn pigeon(place: &Place, vm: &Vm, words: &[&str], input: &[u8]) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_pigeon"))
        .args(words)
        .current_dir(place.0.path())
        .env("XDG_RUNTIME_DIR", place.0.path())
        .env("XDG_STATE_HOME", place.0.path())
        .env("PIGEON_UDS", &vm.uds)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // It may end without reading it.
    let _ = child.stdin.take().unwrap().write_all(input);
    child.wait_with_output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn calls_are_as_the_contract_has_them() {
    let place = Place::new();
    let vm = Vm::start(place.0.path(), |mut connection| {
        let answer = match connection.request.line.as_str() {
            "GET /v1/sessions" => json!([{
                "id": "build-1", "pid": 90, "command": ["make"], "tty": false, "attached": true,
                "exit": null,
            }]),
            "POST /v1/snapshot/prepare" => {
                json!({"ok": true, "token": "a1", "frozen": 7, "freeze_ms": 1, "sync_ms": 4})
            }
            "POST /v1/restore" => json!({
                "ok": true, "generation": 2, "reseeded": true, "clock_step_ms": 8123,
                "config": "mmds", "changed": ["IPConfigs"], "elapsed_us": 900,
            }),
            _ => json!({"ok": true}),
        };
        connection.answer(200, "", answer.to_string().as_bytes());
    });
    let client = Client::new(&vm.uds);
    client.stop(None, None).unwrap();
    client
        .stop(Some(3), Some(Duration::from_millis(1500)))
        .unwrap();
    let sessions = client.sessions().unwrap();
    assert_eq!(
        (sessions[0].id.as_str(), sessions[0].attached),
        ("build-1", true)
    );
    client.end_session("a b").unwrap();
    let mount = Mount {
        device_path: Some("/dev/vdb".into()),
        mount_path: "/x".into(),
        read_only: true,
        ..Mount::default()
    };
    client.mount(&mount).unwrap();
    client.unmount("/x y").unwrap();
    let prepare = Prepare {
        token: "a1".into(),
        timeout_ms: Some(2000),
        sync: Some(true),
        hold_ms: None,
    };
    assert_eq!(client.prepare_snapshot(&prepare).unwrap().frozen, 7);
    client.cancel_snapshot("a1").unwrap();
    let restored = client.restore(&Restore::default()).unwrap();
    assert_eq!((restored.generation, restored.changed.len()), (2, 1));
    client.sysinfo().unwrap();
    let body = |request: &common::fake::Request| match request.body.is_empty() {
        true => Value::Null,
        false => serde_json::from_slice(&request.body).unwrap(),
    };
    let requests: Vec<_> = vm
        .requests()
        .iter()
        .map(|request| (request.line.clone(), body(request)))
        .collect();
    let expected = [
        ("POST /v1/stop", json!({})),
        ("POST /v1/stop", json!({"signal": 3, "timeout_ms": 1500})),
        ("GET /v1/sessions", Value::Null),
        ("DELETE /v1/sessions/a%20b", Value::Null),
        (
            "POST /v1/mounts",
            json!({"DevicePath": "/dev/vdb", "MountPath": "/x", "ReadOnly": true}),
        ),
        ("DELETE /v1/mounts?path=/x%20y", Value::Null),
        (
            "POST /v1/snapshot/prepare",
            json!({"token": "a1", "timeout_ms": 2000, "sync": true}),
        ),
        ("POST /v1/snapshot/cancel", json!({"token": "a1"})),
        ("POST /v1/restore", json!({})),
        ("GET /v1/sysinfo", Value::Null),
    ];
    assert_eq!(
        requests,
        expected.map(|(line, body)| (line.to_string(), body))
    );
}

#[test]
fn volumes_are_mounted_and_unmounted_by_a_command() {
    let place = Place::new();
    let vm = Vm::start(place.0.path(), |mut connection| {
        match connection.request.line.as_str() {
            "DELETE /v1/mounts?path=/busy" => {
                connection.answer(409, "", br#"{"error":"unmount /busy: EBUSY"}"#);
            }
            _ => connection.answer(200, "", br#"{"ok":true}"#),
        };
    });
    for words in [
        &["mount", "/dev/vdb", "/data", "-o", "noatime", "-r"][..],
        &["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", ":/a:b"],
        &["unmount", "/data"],
        &["umount", ":/a:b"],
    ] {
        let output = pigeon(&place, &vm, words, b"");
        assert!(output.status.success(), "{output:?}");
        assert_eq!(
            (text(&output.stdout), text(&output.stderr)),
            ("".into(), "".into())
        );
    }
    let output = pigeon(&place, &vm, &["unmount", "/busy"], b"");
    assert_eq!(output.status.code(), Some(125));
    assert!(
        text(&output.stderr).contains("unmount /busy: EBUSY"),
        "{output:?}"
    );
    let output = pigeon(&place, &vm, &["mount", "/dev/vdb", "data"], b"");
    assert!(
        text(&output.stderr).contains("not an absolute path"),
        "{output:?}"
    );
    let calls: Vec<_> = vm
        .requests()
        .iter()
        .map(|request| (request.line.clone(), text(&request.body)))
        .collect();
    let mounted = calls
        .iter()
        .filter(|(line, _)| line.starts_with("POST /v1/mounts"));
    let mounted: Vec<Value> = mounted
        .map(|(_, body)| serde_json::from_str(body).unwrap())
        .collect();
    let expected = [
        json!({"DevicePath": "/dev/vdb", "MountPath": "/data", "ReadOnly": true, "Options": "noatime"}),
        json!({"FSType": "tmpfs", "MountPath": "/a:b", "Options": "size=64m"}),
    ];
    assert_eq!(mounted, expected);
    for target in ["/data", "/a%3Ab"] {
        let line = format!("DELETE /v1/mounts?path={target}");
        assert!(
            calls.iter().any(|(called, _)| *called == line),
            "{line}: {calls:?}"
        );
    }
}

#[test]
fn logs_are_read_by_frames_and_a_gap_is_told() {
    let place = Place::new();
    let vm = Vm::start(place.0.path(), |mut connection| {
        assert!(
            connection.request.line.starts_with("GET /v1/logs"),
            "{:?}",
            connection.request
        );
        let chunk =
            |bytes: &[u8]| [format!("{:x}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n"].concat();
        let frames = b"\x01\0\0\0\0\0\0\x04out\n\x02\0\0\0\0\0\0\x04err\n";
        let head = "HTTP/1.1 200 OK\r\nContent-Type: application/vnd.docker.multiplexed-stream\r\n\
                    Log-Offset: 100\r\nTransfer-Encoding: chunked\r\n\r\n";
        connection.send(head.as_bytes());
        // Chunks and frames have nothing to do with each other.
        connection.send(&chunk(&frames[..10]));
        connection.send(&chunk(&frames[10..]));
        connection.send(b"0\r\n\r\n");
    });
    let mut logs = Client::new(&vm.uds).logs(true, Some(7)).unwrap();
    assert_eq!(logs.offset(), 100);
    let mut seen = vec![];
    while let Some(frame) = logs.next_frame().unwrap() {
        seen.push((frame.stream, text(&frame.bytes)));
    }
    assert_eq!(
        seen,
        [
            (Stream::Stdout, "out\n".into()),
            (Stream::Stderr, "err\n".into())
        ]
    );
    assert_eq!(logs.offset(), 108);
    let output = pigeon(&place, &vm, &["logs", "--since-offset", "40"], b"");
    assert_eq!(text(&output.stdout), "out\n");
    assert_eq!(
        text(&output.stderr),
        "pigeon: 60 bytes of output are lost\nerr\n"
    );
    assert_eq!(
        vm.lines(),
        ["GET /v1/logs?follow=1&offset=7", "GET /v1/logs?offset=40"]
    );
}

/// Files of a VM that has `/etc/motd`, a directory `/etc`, and a full disk at `/full`.
fn files(mut connection: Connection) {
    let line = connection.request.line.clone();
    let (method, target) = line.split_once(' ').unwrap();
    let query = target.split_once('?').map_or("", |(_, query)| query);
    let headers = "File-Mode: 0640\r\nFile-Owner: 0:42\r\nFile-Mtime: 1700000000\r\n";
    match (method, query.split('&').next().unwrap()) {
        ("HEAD", "path=/etc/motd") => {
            let head = format!("HTTP/1.1 200 OK\r\n{headers}Content-Length: 8\r\n\r\n");
            connection.send(head.as_bytes());
        }
        ("HEAD", "path=/etc" | "path=/tmp") => connection.send(b"HTTP/1.1 409 Conflict\r\n\r\n"),
        ("HEAD", _) => connection.send(b"HTTP/1.1 404 Not Found\r\n\r\n"),
        ("GET", "path=/etc/motd") => connection.answer(200, headers, b"welcome\n"),
        ("PUT", "path=/full") => connection.answer(507, "", br#"{"error":"/full: ENOSPC"}"#),
        ("PUT", _) => {
            let body = json!({"ok": true, "bytes": connection.request.body.len()});
            connection.answer(201, "", body.to_string().as_bytes());
        }
        _ => connection.answer(404, "", br#"{"error":"no such file"}"#),
    }
}

#[test]
fn files_go_both_ways_with_mode_and_owner() {
    let place = Place::new();
    let vm = Vm::start(place.0.path(), files);
    let client = Client::new(&vm.uds);
    let info = client.file_info("/etc/motd").unwrap();
    assert_eq!((info.size, info.mode), (8, Some(0o640)));
    assert_eq!(info.owner.as_deref(), Some("0:42"));
    let (_, mut body) = client.read_file("/etc/motd").unwrap();
    let mut contents = String::new();
    body.read_to_string(&mut contents).unwrap();
    assert_eq!(contents, "welcome\n");
    let options = WriteOptions {
        mode: Some(0o600),
        user: Some("app:1".into()),
    };
    let written = client.write_file("/a b", &mut &b"hello"[..], Some(5), &options);
    assert_eq!(written.unwrap().bytes, 5);
    let error = client.write_file("/full", &mut &b"x"[..], None, &WriteOptions::default());
    match error.unwrap_err() {
        Error::Refused { status, message } => {
            assert_eq!((status, message.as_str()), (507, "/full: ENOSPC"));
        }
        error => panic!("{error}"),
    }
    assert!(matches!(
        client.read_file("/none"),
        Err(Error::Refused { status: 404, .. })
    ));
    assert_eq!(
        vm.lines()[2],
        "PUT /v1/files?path=/a%20b&mode=0600&user=app%3A1"
    );
}

#[test]
fn cp_copies_to_a_file_or_into_a_directory() {
    let place = Place::new();
    let vm = Vm::start(place.0.path(), files);
    let copy = |words: &[&str], input: &[u8]| {
        let output = pigeon(&place, &vm, &[&["cp"], words].concat(), input);
        (
            text(&output.stdout),
            text(&output.stderr),
            output.status.code(),
        )
    };
    assert_eq!(
        copy(&[":/etc/motd", "-"], b""),
        ("welcome\n".into(), String::new(), Some(0))
    );
    assert_eq!(copy(&[":/etc/motd", "here"], b"").2, Some(0));
    let mode = fs::metadata(place.path("here"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o640);
    fs::create_dir(place.path("dir")).unwrap();
    assert_eq!(copy(&[":/etc/motd", "dir"], b"").2, Some(0));
    assert_eq!(
        fs::read_to_string(place.path("dir/motd")).unwrap(),
        "welcome\n"
    );
    fs::set_permissions(place.path("here"), fs::Permissions::from_mode(0o755)).unwrap();
    assert_eq!(copy(&["here", ":/tmp"], b"").2, Some(0));
    assert_eq!(copy(&["-u", "app", "here", ":/srv/there"], b"").2, Some(0));
    assert_eq!(copy(&["-", ":/srv/in"], b"typed").2, Some(0));
    let puts: Vec<_> = vm
        .requests()
        .into_iter()
        .filter(|request| request.line.starts_with("PUT"))
        .map(|request| (request.line, text(&request.body)))
        .collect();
    let expected = [
        ("PUT /v1/files?path=/tmp/here&mode=0755", "welcome\n"),
        (
            "PUT /v1/files?path=/srv/there&mode=0755&user=app",
            "welcome\n",
        ),
        ("PUT /v1/files?path=/srv/in", "typed"),
    ];
    assert_eq!(
        puts,
        expected.map(|(line, body)| (line.to_string(), body.to_string()))
    );
    let (_, said, code) = copy(&[":/none", "x"], b"");
    assert!(said.contains("no such file") && code == Some(125), "{said}");
    let (_, said, _) = copy(&["none", ":/x"], b"");
    assert!(said.contains("unable to read none"), "{said}");
    let (_, said, _) = copy(&["a", "b"], b"");
    assert!(
        said.contains("exactly one of source and destination must be in a VM"),
        "{said}"
    );
    let (_, said, _) = copy(&["here", ":relative"], b"");
    assert!(said.contains("paths in a VM must be absolute"), "{said}");
}

#[test]
fn a_tunnel_carries_bytes_both_ways_and_its_refusal_is_told() {
    let place = Place::new();
    let vm = Vm::start(place.0.path(), |mut connection| {
        if connection.request.line == "CONNECT 127.0.0.1:1" {
            return connection.answer(502, "", br#"{"error":"127.0.0.1:1: ECONNREFUSED"}"#);
        }
        // The first bytes come with the answer.
        connection.send(b"HTTP/1.1 200 OK\r\n\r\nbanner\n");
        let mut buffer = [0; 4096];
        while let Ok(size @ 1..) = connection.stream.read(&mut buffer) {
            let upper = buffer[..size].to_ascii_uppercase();
            connection.send(&upper);
        }
        connection.send(b"bye\n");
    });
    let client = Client::new(&vm.uds);
    match client.tunnel("127.0.0.1:1").unwrap_err() {
        Error::Refused { status, message } => {
            assert_eq!(
                (status, message.as_str()),
                (502, "127.0.0.1:1: ECONNREFUSED")
            );
        }
        error => panic!("{error}"),
    }
    let failed = |error| panic!("{error}");
    let forward = Forward::start(("127.0.0.1", 0), &vm.uds, "127.0.0.1:80", failed).unwrap();
    let talk = |number: u32| {
        let mut stream = TcpStream::connect(forward.address()).unwrap();
        let request = format!("request {number}").repeat(2000);
        let mut writer = stream.try_clone().unwrap();
        let sent = request.clone();
        let writer = std::thread::spawn(move || {
            writer.write_all(sent.as_bytes()).unwrap();
            writer.shutdown(Shutdown::Write).unwrap();
        });
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        writer.join().unwrap();
        assert_eq!(answer, format!("banner\n{}bye\n", request.to_uppercase()));
    };
    for number in 0..200 {
        talk(number);
    }
    std::thread::scope(|scope| {
        for number in 0..50 {
            scope.spawn(move || talk(number));
        }
    });
    // Who is refused sees an end, and the reason is told.
    let (sender, told) = std::sync::mpsc::channel();
    let sender = std::sync::Mutex::new(sender);
    let sender = std::sync::Arc::new(sender);
    let failed = move |error: Error| {
        let _ = sender.lock().unwrap().send(error.to_string());
    };
    let forward = Forward::start(("127.0.0.1", 0), &vm.uds, "127.0.0.1:1", failed).unwrap();
    let mut stream = TcpStream::connect(forward.address()).unwrap();
    let _ = stream.read(&mut [0]);
    let told = told.recv_timeout(Duration::from_secs(10)).unwrap();
    assert!(told.contains("ECONNREFUSED"), "{told}");
}

/// A session's server end.
fn upgrade(mut connection: Connection) -> WebSocket<std::os::unix::net::UnixStream> {
    let key = connection.request.headers.iter().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("sec-websocket-key")
            .then(|| value.trim().to_string())
    });
    let accept = tungstenite::handshake::derive_accept_key(key.unwrap().as_bytes());
    let head = format!(
        "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Accept: {accept}\r\n\r\n"
    );
    connection.send(head.as_bytes());
    WebSocket::from_raw_socket(connection.stream.into_inner(), Role::Server, None)
}

#[test]
fn exec_tells_the_two_outputs_apart_where_the_init_does() {
    let place = Place::new();
    let vm = Vm::start(place.0.path(), |mut connection| {
        if connection.request.line == "GET /v1/sessions" {
            return connection.answer(200, "", b"[]");
        }
        let mut socket = upgrade(connection);
        let first: Value = serde_json::from_str(socket.read().unwrap().to_text().unwrap()).unwrap();
        assert_eq!(first["streams"], true, "{first}");
        socket.send(Message::binary(&b"\x01out\n"[..])).unwrap();
        socket.send(Message::binary(&b"\x02err\n"[..])).unwrap();
        socket
            .send(Message::text(r#"{"Exit":{"code":3,"signal":null}}"#))
            .unwrap();
        let _ = socket.close(None);
        while socket.read().is_ok() {}
    });
    let output = pigeon(&place, &vm, &["exec", "sh", "-c", "x"], b"");
    assert_eq!(
        (
            text(&output.stdout),
            text(&output.stderr),
            output.status.code()
        ),
        ("out\n".into(), "err\n".into(), Some(3))
    );
}

#[test]
fn an_init_without_named_sessions_is_not_asked_for_two_outputs() {
    let place = Place::new();
    let vm = Vm::start(place.0.path(), |mut connection| {
        if connection.request.line == "GET /v1/sessions" {
            return connection.answer(404, "", br#"{"error":"no such call"}"#);
        }
        let mut socket = upgrade(connection);
        let first: Value = serde_json::from_str(socket.read().unwrap().to_text().unwrap()).unwrap();
        assert!(first["streams"].is_null(), "{first}");
        socket.send(Message::binary(&b"\x01as it is"[..])).unwrap();
        socket
            .send(Message::text(r#"{"Exit":{"code":0,"signal":null}}"#))
            .unwrap();
        let _ = socket.close(None);
        while socket.read().is_ok() {}
    });
    let output = pigeon(&place, &vm, &["exec", "x"], b"");
    assert_eq!(output.stdout, b"\x01as it is");
}

#[test]
fn a_session_with_a_name_is_detached_from_and_attached_to() {
    let place = Place::new();
    let vm = Vm::start(place.0.path(), |mut connection| {
        match connection.request.line.as_str() {
            "GET /v1/sessions" => {
                let sessions = json!([{
                    "id": "build-1", "pid": 9, "command": ["make", "all"], "tty": false,
                    "attached": false, "exit": null,
                }]);
                return connection.answer(200, "", sessions.to_string().as_bytes());
            }
            line if !line.contains("/ws/") => {
                return connection.answer(200, "", b"{\"ok\":true}");
            }
            _ => {}
        }
        let mut socket = upgrade(connection);
        let first: Value = serde_json::from_str(socket.read().unwrap().to_text().unwrap()).unwrap();
        if first["attach"] == "build-1" {
            socket.send(Message::binary(&b"\x01missed\n"[..])).unwrap();
            socket
                .send(Message::text(r#"{"Exit":{"code":5,"signal":null}}"#))
                .unwrap();
            let _ = socket.close(None);
        } else {
            assert_eq!(
                (&first["id"], &first["tty"]),
                (&json!("build-1"), &json!(false))
            );
        }
        while socket.read().is_ok() {}
    });
    let run = |words: &[&str]| {
        let output = pigeon(&place, &vm, words, b"");
        (
            text(&output.stdout),
            text(&output.stderr),
            output.status.code(),
        )
    };
    let started = run(&["exec", "-d", "--id", "build-1", "make", "all"]);
    assert_eq!(started, ("build-1\n".into(), String::new(), Some(0)));
    let (listed, _, _) = run(&["attach"]);
    assert!(listed.contains("build-1   running   make all"), "{listed}");
    assert_eq!(
        run(&["attach", "build-1"]),
        ("missed\n".into(), String::new(), Some(5))
    );
    let (_, said, code) = run(&["attach", "other"]);
    assert!(
        said.contains("there is no session other") && code == Some(125),
        "{said}"
    );
    assert_eq!(run(&["attach", "--kill", "build-1"]).2, Some(0));
    assert!(
        vm.lines()
            .contains(&"DELETE /v1/sessions/build-1".to_string())
    );
}

#[test]
fn a_session_that_the_init_ends_is_told_in_its_words() {
    let place = Place::new();
    let vm = Vm::start(place.0.path(), |mut connection| {
        if connection.request.line == "GET /v1/sessions" {
            let sessions = json!(["taken", "silent"].map(|id| json!({
                "id": id, "pid": 9, "command": ["make"], "tty": false, "attached": false, "exit": null,
            })));
            return connection.answer(200, "", sessions.to_string().as_bytes());
        }
        let mut socket = upgrade(connection);
        let first: Value = serde_json::from_str(socket.read().unwrap().to_text().unwrap()).unwrap();
        let reason = match first["attach"].as_str() {
            Some("taken") => "the session was taken or ended",
            _ => "",
        };
        let code = CloseCode::Away;
        let reason = reason.into();
        let _ = socket.close(Some(CloseFrame { code, reason }));
        while socket.read().is_ok() {}
    });
    for (id, words) in [
        ("taken", "pigeon: the session was taken or ended\n"),
        ("silent", "pigeon: the connection broke: closed with 1001"),
    ] {
        let output = pigeon(&place, &vm, &["attach", id], b"");
        let said = text(&output.stderr);
        assert!(said.contains(words), "{said}");
        assert_eq!(output.status.code(), Some(125));
    }
}

#[test]
fn a_command_that_cannot_start_is_told_in_words() {
    let place = Place::new();
    let vm = Vm::start(place.0.path(), |mut connection| {
        if connection.request.line == "GET /v1/sessions" {
            return connection.answer(404, "", b"{}");
        }
        let mut socket = upgrade(connection);
        let first: Value = serde_json::from_str(socket.read().unwrap().to_text().unwrap()).unwrap();
        let command = first["command"][0].as_str().unwrap();
        let error = match command {
            "nosuch" => "ENOENT",
            "foreign" => "ENOEXEC",
            _ => "EACCES",
        };
        let message = json!({"Error": {"message": format!("execute {command}: {error}")}});
        socket.send(Message::text(message.to_string())).unwrap();
        while socket.read().is_ok() {}
    });
    for (program, words, code) in [
        ("nosuch", "nosuch: not found in the VM", 127),
        (
            "foreign",
            "neither a program for the VM's architecture nor a script that begins with #!",
            126,
        ),
        ("secret", "secret: execute secret: EACCES", 126),
    ] {
        let output = pigeon(&place, &vm, &["exec", program], b"");
        let said = text(&output.stderr);
        assert!(said.contains(words), "{said}");
        assert_eq!(output.status.code(), Some(code));
    }
}
