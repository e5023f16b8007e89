//! The client with a stand-in for the API, and commands based on it.

mod common;
#[path = "common/pty.rs"]
mod pty;

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    os::{
        fd::OwnedFd,
        unix::{
            fs::{FileExt, PermissionsExt},
            net::UnixStream,
            process::ExitStatusExt,
        },
    },
    process::{Child, Command, Output, Stdio},
    sync::{Mutex, mpsc},
    time::Duration,
};

use common::{
    Place, Tar,
    fake::{self, Connection, Vm},
};
use pigeon::{
    Client, Error,
    files::WriteOptions,
    forward::Forward,
    logs::Stream,
    mounts::Mount,
    process::Process,
    proxy::Proxy,
    snapshot::{Prepare, Restore},
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tar::EntryType;
use tungstenite::{
    Message, WebSocket,
    protocol::{CloseFrame, Role, frame::coding::CloseCode},
};

fn pigeon(place: &Place, vm: &Vm, words: &[&str], input: &[u8]) -> Output {
    let mut child = spawn(place, vm, words);
    // It may exit without reading its input.
    let _ = child.stdin.take().unwrap().write_all(input);
    child.wait_with_output().unwrap()
}

fn spawn(place: &Place, vm: &Vm, words: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_pigeon"))
        .args(words)
        .current_dir(place.0.path())
        .env("XDG_RUNTIME_DIR", place.0.path())
        .env("XDG_STATE_HOME", place.0.path())
        .env("PIGEON_UDS", &vm.uds)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn a_signal_aborts_a_snapshot_once_the_vm_is_resumed() {
    for (signal, code) in [
        (Signal::HUP, 129),
        (Signal::INT, 130),
        (Signal::QUIT, 131),
        (Signal::TERM, 143),
    ] {
        let place = Place::new();
        let vm = Vm::start(place.0.path(), |mut connection| {
            connection.respond(200, "", b"{\"ok\":true,\"token\":\"a1\"}");
        });
        // The record of a running VM of `pigeon run --restorable`.
        let kept = place.path("pigeon/vms/app");
        fs::create_dir_all(&kept).unwrap();
        let restorable =
            json!({"dir": place.path(""), "kernel": "/kernel", "disks": [], "nic": "none"});
        let record = json!({"name": "app", "uds": vm.uds, "restorable": restorable});
        fs::write(kept.join("vm.json"), record.to_string()).unwrap();
        let lock = fs::File::create(kept.join("lock")).unwrap();
        lock.lock().unwrap();
        let (starting, started) = mpsc::channel::<Pid>();
        let (sender, calls) = mpsc::channel();
        let state = place.path("made/state");
        fake::firecracker(&place.path("api.sock"), move |mut connection| {
            if connection.request.line == "PUT /snapshot/create" {
                fs::write(&state, "half").unwrap();
                kill_process(started.recv().unwrap(), signal).unwrap();
            }
            let body = text(&connection.request.body);
            sender
                .send((connection.request.line.clone(), body))
                .unwrap();
            connection.respond(204, "", b"");
        });
        let child = spawn(&place, &vm, &["snapshot", "app", "made"]);
        starting.send(Pid::from_child(&child)).unwrap();
        let output = child.wait_with_output().unwrap();
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{signal:?}: {stderr}");
        assert!(stderr.contains("no snapshot: ended by SIG"), "{stderr}");
        let calls: Vec<_> = calls.try_iter().collect();
        let state = |state: &str| ("PATCH /vm".into(), json!({"state": state}).to_string());
        assert_eq!(calls.len(), 3, "{calls:?}");
        assert_eq!(
            (&calls[0], &calls[2]),
            (&state("Paused"), &state("Resumed"))
        );
        let expected = ["POST /v1/snapshot/prepare", "POST /v1/snapshot/cancel"];
        assert_eq!(vm.lines(), expected);
        assert!(!place.path("made").exists());
    }
}

#[test]
fn calls_have_the_documented_form() {
    let place = Place::new();
    let vm = Vm::start(place.0.path(), |mut connection| {
        let response = match connection.request.line.as_str() {
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
        connection.respond(200, "", response.to_string().as_bytes());
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
fn a_timeout_can_be_as_long_as_a_duration() {
    let place = Place::new();
    let vm = Vm::start(place.0.path(), |mut connection| {
        connection.respond(200, "", b"{\"exit_code\":0}");
    });
    Client::connect_within(&vm.uds, Duration::MAX).unwrap();
    let client = Client::new(&vm.uds).with_retry_timeout(Duration::MAX);
    let client = client.within(Duration::MAX);
    client.stop(None, Some(Duration::MAX)).unwrap();
    let command = pigeon::Command::new(["x"]).timeout(Duration::MAX);
    assert_eq!(client.exec(&command).unwrap().exit_code, 0);
    for request in vm.requests() {
        let body: Value = serde_json::from_slice(&request.body).unwrap();
        assert_eq!(body["timeout_ms"], u64::MAX, "{}", request.line);
    }
}

#[test]
fn volumes_are_mounted_and_unmounted_by_a_command() {
    let place = Place::new();
    let vm = Vm::start(place.0.path(), |mut connection| {
        match connection.request.line.as_str() {
            "DELETE /v1/mounts?path=/busy" => {
                connection.respond(409, "", br#"{"error":"unmount /busy: EBUSY"}"#);
            }
            _ => connection.respond(200, "", br#"{"ok":true}"#),
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
fn logs_are_read_by_frame_and_a_gap_is_reported() {
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
        // Chunk boundaries are independent of frames.
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

/// The files of a VM with `/etc/motd`, a directory `/etc`, and a full disk at `/full`.
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
        ("GET", "path=/etc/motd") => connection.respond(200, headers, b"welcome\n"),
        ("PUT", "path=/full") => connection.respond(507, "", br#"{"error":"/full: ENOSPC"}"#),
        ("PUT", _) => {
            let body = json!({"ok": true, "bytes": connection.request.body.len()});
            connection.respond(201, "", body.to_string().as_bytes());
        }
        _ => connection.respond(404, "", br#"{"error":"no such file"}"#),
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
    let (_, stderr, code) = copy(&[":/none", "x"], b"");
    assert!(
        stderr.contains("no such file") && code == Some(125),
        "{stderr}"
    );
    let (_, stderr, _) = copy(&["none", ":/x"], b"");
    assert!(stderr.contains("unable to read none"), "{stderr}");
    let (_, stderr, _) = copy(&["a", "b"], b"");
    assert!(
        stderr.contains("exactly one of source and destination must be in a VM"),
        "{stderr}"
    );
    let (_, stderr, _) = copy(&["here", ":relative"], b"");
    assert!(
        stderr.contains("paths in a VM must be absolute"),
        "{stderr}"
    );
}

#[test]
fn with_nohup_a_hangup_ends_no_proxy() {
    let place = Place::new();
    let vm = Vm::start(place.0.path(), files);
    let mut proxy = Command::new("nohup")
        .args([env!("CARGO_BIN_EXE_pigeon"), "proxy", "api.sock"])
        .current_dir(place.0.path())
        .env("XDG_RUNTIME_DIR", place.0.path())
        .env("XDG_STATE_HOME", place.0.path())
        .env("PIGEON_UDS", &vm.uds)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    while !place.path("api.sock").exists() {
        assert!(proxy.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(1));
    }
    kill_process(Pid::from_child(&proxy), Signal::HUP).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    assert!(proxy.try_wait().unwrap().is_none());
    kill_process(Pid::from_child(&proxy), Signal::TERM).unwrap();
    assert!(proxy.wait().unwrap().success());
    assert!(!place.path("api.sock").exists());
}

#[test]
fn a_signal_during_cp_leaves_the_old_file_and_nothing_else() {
    let place = Place::new();
    let vm = Vm::start(place.0.path(), |mut connection| {
        let head = "HTTP/1.1 200 OK\r\nContent-Length: 100\r\nFile-Mode: 0644\r\n\r\n";
        connection.send(head.as_bytes());
        if connection.request.line.starts_with("GET") {
            connection.send(b"half");
            std::thread::sleep(Duration::from_secs(1000));
        }
    });
    fs::create_dir(place.path("to")).unwrap();
    place.write("to/note", "precious");
    let mut copy = spawn(&place, &vm, &["cp", ":/note", "to"]);
    let left = || fs::read_dir(place.path("to")).unwrap().count();
    while left() == 1 {
        assert!(copy.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(1));
    }
    kill_process(Pid::from_child(&copy), Signal::TERM).unwrap();
    assert_eq!(copy.wait().unwrap().signal(), Some(15));
    assert_eq!(
        (left(), fs::read(place.path("to/note")).unwrap()),
        (1, b"precious".to_vec())
    );
}

#[test]
fn cp_replaces_only_regular_files_and_targets_of_links() {
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    use std::os::unix::fs::{FileTypeExt, symlink};
    let place = Place::new();
    let vm = Vm::start(place.0.path(), files);
    let copy = |destination: &str| {
        let output = pigeon(&place, &vm, &["cp", ":/etc/motd", destination], b"");
        (text(&output.stderr), output.status.code())
    };
    let refused = |destination: &str| {
        let (stderr, code) = copy(destination);
        assert!(
            stderr.contains("exists and is not a regular file"),
            "{stderr}"
        );
        assert_eq!(code, Some(125));
    };
    fs::create_dir(place.path("dir")).unwrap();
    for fifo in ["fifo", "dir/motd"] {
        mknodat(CWD, place.path(fifo), FileType::Fifo, Mode::RWXU, 0).unwrap();
    }
    symlink("fifo", place.path("to_fifo")).unwrap();
    let _listener = std::os::unix::net::UnixListener::bind(place.path("socket")).unwrap();
    for destination in ["fifo", "to_fifo", "dir", "socket", "/proc/self/fd/1"] {
        refused(destination);
    }
    for fifo in ["fifo", "dir/motd"] {
        let kind = fs::symlink_metadata(place.path(fifo)).unwrap().file_type();
        assert!(kind.is_fifo());
    }
    // A separate device node, as the host's could be lost.
    let device = rustix::fs::makedev(1, 3);
    let null = place.path("null");
    if mknodat(CWD, &null, FileType::CharacterDevice, Mode::RWXU, device).is_ok() {
        symlink("null", place.path("to_null")).unwrap();
        refused("null");
        refused("to_null");
        let kind = fs::symlink_metadata(&null).unwrap().file_type();
        assert!(kind.is_char_device());
    }
    // The link is kept, and its target is written; also through a second link, and for a missing target.
    fs::create_dir(place.path("far")).unwrap();
    fs::write(place.path("far/old"), "old").unwrap();
    for (link, target) in [("a", "far/old"), ("b", "a"), ("c", "far/new")] {
        symlink(target, place.path(link)).unwrap();
        assert_eq!(copy(link), (String::new(), Some(0)));
        assert_eq!(
            fs::read_link(place.path(link)).unwrap().to_str(),
            Some(target)
        );
        assert_eq!(fs::read_to_string(place.path(link)).unwrap(), "welcome\n");
        let file = fs::canonicalize(place.path(link)).unwrap();
        fs::write(file, "old").unwrap();
    }
    symlink("loop", place.path("loop")).unwrap();
    assert!(copy("loop").0.contains("too many symbolic links"));
    // A link that a guest has created in a directory is not followed.
    fs::create_dir(place.path("copied")).unwrap();
    symlink("../far/old", place.path("copied/motd")).unwrap();
    assert_eq!(copy("copied").1, Some(0));
    assert!(
        fs::symlink_metadata(place.path("copied/motd"))
            .unwrap()
            .is_file()
    );
    assert_eq!(fs::read_to_string(place.path("far/old")).unwrap(), "old");
}

/// A guest's responses besides the session for an archive: commands succeed, no session has a name.
fn respond_beside_a_session(mut connection: Connection) {
    match connection.request.line.as_str() {
        "GET /v1/sessions" => connection.respond(200, "", b"[]"),
        _ => {
            let done = json!({"exit_code": 0, "exit_signal": 0, "stdout": "", "stderr": ""});
            connection.respond(200, "", done.to_string().as_bytes());
        }
    }
}

/// Runs `pigeon cp :/data DESTINATION` in `place`, from a guest whose tar sends `archive`. Returns its
/// message and exit code.
fn cp_directory(place: &Place, archive: Vec<u8>, destination: &str) -> (String, Option<i32>) {
    cp_directory_from(place, ":/data", archive, destination)
}

fn cp_directory_from(
    place: &Place,
    source: &str,
    archive: Vec<u8>,
    destination: &str,
) -> (String, Option<i32>) {
    let guest = tempfile::tempdir().unwrap();
    let vm = Vm::start(guest.path(), move |mut connection| {
        match connection.request.line.as_str() {
            "HEAD /v1/files?path=/data" | "HEAD /v1/files?path=/data/." => {
                connection.send(b"HTTP/1.1 409 Conflict\r\n\r\n");
            }
            "POST /v1/exec" | "GET /v1/sessions" => respond_beside_a_session(connection),
            _ => {
                let mut socket = upgrade(connection);
                socket.read().unwrap();
                for piece in archive.chunks(60 << 10) {
                    let piece = [b"\x01", piece].concat();
                    socket.send(Message::binary(piece)).unwrap();
                }
                let exit = r#"{"Exit":{"code":0,"signal":null}}"#;
                socket.send(Message::text(exit)).unwrap();
                while socket.read().is_ok() {}
            }
        }
    });
    let output = pigeon(place, &vm, &["cp", source, destination], b"");
    (text(&output.stderr), output.status.code())
}

#[test]
fn cp_of_a_directory_and_a_dot_copies_what_is_in_it() {
    let place = Place::new();
    fs::create_dir(place.path("dir")).unwrap();
    fs::create_dir(place.path("out")).unwrap();
    place.write("dir/file", "x");
    let tar = Tar::new().dir("./", 0o755, (0, 0)).entry(
        EntryType::Regular,
        b"./got",
        b"",
        (0, 0),
        0o644,
        b"x",
    );
    let (stderr, code) = cp_directory_from(&place, ":/data/.", tar.bytes(), "out");
    assert_eq!(code, Some(0), "{stderr}");
    assert!(place.path("out/got").exists());

    // A guest without commands, and a full disk: the message contains the path of the file.
    let guest = tempfile::tempdir().unwrap();
    let vm = Vm::start(guest.path(), |mut connection| {
        let line = connection.request.line.as_str();
        if line == "HEAD /v1/files?path=/data" {
            return connection.send(b"HTTP/1.1 409 Conflict\r\n\r\n");
        }
        match line.starts_with("HEAD ") {
            true => connection.send(b"HTTP/1.1 404 Not Found\r\n\r\n"),
            false => connection.respond(507, "", br#"{"error":"full"}"#),
        }
    });
    for (source, destination, file) in [
        ("dir", ":/data", "/data/dir/file"),
        ("dir/", ":/data", "/data/dir/file"),
        ("dir/.", ":/data", "/data/file"),
        (".", ":/data", "/data/dir/file"),
        ("dir", ":/new/", "/new/file"),
        ("dir/file", ":/new/", "there is no directory /new/"),
    ] {
        let output = pigeon(&place, &vm, &["cp", source, destination], b"");
        let stderr = text(&output.stderr);
        assert!(stderr.contains(file), "{source} {destination}: {stderr}");
    }
}

#[test]
fn a_directory_from_a_guest_keeps_its_modes_except_setuid() {
    let place = Place::new();
    let tar = Tar::new()
        .dir("./", 0o7750, (0, 0))
        .dir("./sealed", 0o7555, (0, 0))
        .entry(
            EntryType::Regular,
            b"./sealed/su",
            b"",
            (0, 0),
            0o6751,
            b"x",
        )
        .entry(EntryType::Char, b"./null", b"", (0, 0), 0o666, b"")
        .entry(EntryType::Fifo, b"./fifo", b"", (0, 0), 0o666, b"")
        .symlink("./link", "/etc/passwd")
        .hard_link("./hard", "./sealed/su");
    let (stderr, code) = cp_directory(&place, tar.bytes(), "here");
    let mode = |name: &str| {
        let found = fs::symlink_metadata(place.path(name)).unwrap();
        found.permissions().mode() & 0o7777
    };
    assert_eq!(mode("here"), 0o750);
    assert_eq!(mode("here/sealed"), 0o555);
    assert_eq!(mode("here/sealed/su"), 0o751);
    assert_eq!(mode("here/hard"), 0o751);
    assert_eq!(
        fs::read_link(place.path("here/link")).unwrap().to_str(),
        Some("/etc/passwd")
    );
    let mut names: Vec<_> = fs::read_dir(place.path("here")).unwrap().collect();
    names.sort_by_key(|entry| entry.as_ref().unwrap().file_name());
    let names: Vec<_> = names
        .into_iter()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names, ["hard", "link", "sealed"]);
    let left_out = |name: &str| format!("pigeon: \"{name}\": left out: a device or a FIFO\n");
    assert_eq!(stderr, [left_out("./null"), left_out("./fifo")].concat());
    assert_eq!(code, Some(0));
}

#[test]
fn a_directory_from_a_guest_is_this_users_only_until_it_is_complete() {
    let place = Place::new();
    fs::create_dir(place.path("old")).unwrap();
    fs::set_permissions(place.path("old"), fs::Permissions::from_mode(0o751)).unwrap();
    fs::create_dir(place.path("usual")).unwrap();
    let tar = || {
        Tar::new()
            .dir("./", 0o755, (0, 0))
            .dir("./in", 0o755, (0, 0))
            .file("./in/key", "x")
    };
    let mode = |name: &str| fs::metadata(place.path(name)).unwrap().permissions().mode() & 0o777;
    // The last entry cannot be unpacked.
    let broken = tar().hard_link("./hard", "./none").bytes();
    for (source, destination) in [(":/data", "new/er"), (":/data/.", "old")] {
        let (stderr, code) = cp_directory_from(&place, source, broken.clone(), destination);
        assert_eq!(code, Some(125), "{stderr}");
        assert_eq!(mode(&format!("{destination}/in")), 0o700);
    }
    assert_eq!((mode("new"), mode("new/er")), (mode("usual"), 0o700));
    let (stderr, code) = cp_directory_from(&place, ":/data/.", tar().bytes(), "old");
    assert_eq!(code, Some(0), "{stderr}");
    // A directory that exists keeps its mode, as with cp -r.
    assert_eq!((mode("old"), mode("old/in")), (0o751, 0o755));
}

#[test]
fn a_hostile_directory_from_a_guest_stays_within_its_destination() {
    use std::os::unix::fs::{MetadataExt, symlink};
    let outside = Place::new();
    fs::set_permissions(outside.0.path(), fs::Permissions::from_mode(0o700)).unwrap();
    let victim = outside.write("victim", "kept");
    let dir = outside.0.path().to_str().unwrap().to_string();
    let victim = victim.to_str().unwrap().to_string();
    let file = |tar: Tar, name: &str| tar.file(name, "evil");
    let archives = [
        ("an absolute name", file(Tar::new(), &victim)),
        ("a parent", file(Tar::new(), "../../victim")),
        (
            "parents",
            file(Tar::new().dir("a", 0o755, (0, 0)), "a/../../../victim"),
        ),
        (
            "a link to a directory",
            file(Tar::new().symlink("l", &dir), "l/victim"),
        ),
        (
            "a link to it below",
            file(Tar::new().symlink("l", &dir), "l/new/victim"),
        ),
        (
            "a relative link",
            file(Tar::new().symlink("l", "../.."), "l/victim"),
        ),
        (
            "a link to a link",
            file(Tar::new().symlink("m", &dir).symlink("l", "m"), "l/victim"),
        ),
        (
            "a link in the file's place",
            file(Tar::new().symlink("l", &victim), "l"),
        ),
        (
            "a link in the directory's place",
            Tar::new().symlink("l", &dir).dir("l", 0o777, (0, 0)),
        ),
        (
            "a directory below a link",
            Tar::new().symlink("l", &dir).dir("l/new", 0o777, (0, 0)),
        ),
        ("a hard link", file(Tar::new().hard_link("h", &victim), "h")),
        (
            "a hard link to a parent's",
            file(Tar::new().hard_link("h", "../../victim"), "h"),
        ),
        (
            "a hard link by a link",
            file(
                Tar::new().symlink("l", &dir).hard_link("h", "l/victim"),
                "h",
            ),
        ),
        (
            "a hard link of a link",
            Tar::new().symlink("l", &victim).hard_link("h", "l"),
        ),
    ];
    for (what, tar) in archives {
        // In a directory next to the victim, so that `..` leads to it.
        let place = Place(tempfile::tempdir_in(outside.0.path()).unwrap());
        let into = place.path("into");
        let (stderr, code) = cp_directory(&place, tar.bytes(), into.to_str().unwrap());
        println!("{what}: {code:?} {stderr}");
        let found = fs::metadata(&victim).unwrap();
        assert_eq!(fs::read_to_string(&victim).unwrap(), "kept", "{what}");
        assert_eq!(found.nlink(), 1, "{what}");
        let mode = fs::metadata(&dir).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700, "{what}");
        let names = |dir: &std::path::Path| fs::read_dir(dir).unwrap().count();
        assert_eq!(
            (names(outside.0.path()), names(place.0.path())),
            (2, 1),
            "{what}"
        );
    }
    // A link from an earlier copy is not followed either.
    let place = Place::new();
    fs::create_dir(place.path("copied")).unwrap();
    symlink(&dir, place.path("copied/data")).unwrap();
    let (stderr, code) = cp_directory(&place, file(Tar::new(), "victim").bytes(), "copied");
    assert!(
        stderr.contains("copied/data is a symbolic link"),
        "{stderr}"
    );
    assert_eq!(code, Some(125));
    assert_eq!(fs::read_to_string(&victim).unwrap(), "kept");
}

#[test]
fn a_name_from_a_guest_has_a_limit() {
    let place = Place::new();
    let tar = |size: usize| {
        let name = vec![b'n'; size];
        let tar = Tar::new().entry(
            EntryType::GNULongName,
            b"././@LongLink",
            b"",
            (0, 0),
            0,
            &name,
        );
        tar.file("x", "y").bytes()
    };
    let (stderr, code) = cp_directory(&place, tar(200), "short");
    assert_eq!((stderr.as_str(), code), ("", Some(0)));
    assert!(place.path("short").join("n".repeat(200)).exists());
    let (stderr, code) = cp_directory(&place, tar(2 << 20), "long");
    assert!(stderr.contains("headers of over 1048576 bytes"), "{stderr}");
    assert_eq!(code, Some(125));
}

#[test]
fn the_beginning_of_a_text_is_read_however_long_it_is() {
    let place = Place::new();
    let vm = Vm::start(place.0.path(), |mut connection| {
        if connection.request.line == "GET /v1/files?path=/small" {
            return connection.respond(200, "", b"caf\xe9");
        }
        connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n");
        while connection.stream.get_mut().write_all(&[b'z'; 4096]).is_ok() {}
    });
    let client = Client::new(&vm.uds);
    assert_eq!(client.read_text("/small", 100).unwrap(), "caf\u{fffd}");
    assert_eq!(client.read_text("/endless", 100).unwrap(), "z".repeat(100));
}

#[test]
fn a_guests_error_message_has_a_limit() {
    let place = Place::new();
    let vm = Vm::start(place.0.path(), |mut connection| {
        match connection.request.line.as_str() {
            "HEAD /v1/files?path=/data" => connection.send(b"HTTP/1.1 409 Conflict\r\n\r\n"),
            "POST /v1/exec" => connection.respond(200, "", b"{}"),
            "GET /v1/sessions" => connection.respond(200, "", b"[]"),
            _ => {
                let mut socket = upgrade(connection);
                socket.read().unwrap();
                for _ in 0..4 {
                    let piece = [&b"\x02"[..], &[b'e'; 60_000]].concat();
                    socket.send(Message::binary(piece)).unwrap();
                }
                let exit = r#"{"Exit":{"code":1,"signal":null}}"#;
                socket.send(Message::text(exit)).unwrap();
                while socket.read().is_ok() {}
            }
        }
    });
    let output = pigeon(&place, &vm, &["cp", ":/data", "here"], b"");
    assert_eq!(output.status.code(), Some(125));
    let expected = format!("pigeon: tar in the VM: {}\n", "e".repeat(64 << 10));
    assert!(text(&output.stderr) == expected, "{}", output.stderr.len());
}

/// Runs `pigeon cp OPTIONS SOURCE :/data` in `place`, to a guest whose tar reads all of its input. Returns
/// its message, its exit code, and the archive, if that is complete.
fn cp_directory_to_guest(
    place: &Place,
    options: &[&str],
    source: &str,
) -> (String, Option<i32>, Option<Vec<u8>>) {
    const TIMEOUT: Duration = Duration::from_secs(60);
    let guest = tempfile::tempdir().unwrap();
    let (sender, archives) = mpsc::channel();
    let vm = Vm::start(guest.path(), move |mut connection| {
        match connection.request.line.as_str() {
            "HEAD /v1/files?path=/data" => connection.send(b"HTTP/1.1 404 Not Found\r\n\r\n"),
            "POST /v1/exec" if text(&connection.request.body).contains("[\"id\"") => {
                let id = text(&connection.request.body)
                    .contains("-u")
                    .then_some("1000");
                let output = json!({"stdout": format!("{}\n", id.unwrap_or("1001"))});
                connection.respond(200, "", output.to_string().as_bytes());
            }
            "POST /v1/exec" | "GET /v1/sessions" => respond_beside_a_session(connection),
            _ => {
                let mut socket = upgrade(connection);
                socket.get_ref().set_read_timeout(Some(TIMEOUT)).unwrap();
                let mut archive = vec![];
                socket.read().unwrap();
                while let Ok(message) = socket.read() {
                    match message {
                        Message::Binary(bytes) => archive.extend(bytes),
                        _ => {
                            sender.send(archive).unwrap();
                            let exit = r#"{"Exit":{"code":0,"signal":null}}"#;
                            socket.send(Message::text(exit)).unwrap();
                            while socket.read().is_ok() {}
                            return;
                        }
                    }
                }
            }
        }
    });
    let words = [&["cp"], options, &[source, ":/data"]].concat();
    let output = pigeon(place, &vm, &words, b"");
    let archive = archives.try_recv().ok();
    (text(&output.stderr), output.status.code(), archive)
}

#[test]
fn a_directory_is_copied_to_a_guest_without_sockets_and_unreadable_files() {
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    let place = Place::new();
    fs::create_dir_all(place.path("dir/sub")).unwrap();
    place.write("dir/sub/file", "x");
    std::os::unix::fs::symlink("sub/file", place.path("dir/link")).unwrap();
    mknodat(CWD, place.path("dir/fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
    let _listener = std::os::unix::net::UnixListener::bind(place.path("dir/socket")).unwrap();
    // One file belongs to another user if chown is permitted; one has a hole.
    let _ = std::os::unix::fs::chown(place.path("dir/sub/file"), Some(1234), Some(1234));
    let holed = fs::File::create(place.path("dir/sub/holed")).unwrap();
    holed.set_len(3 << 20).unwrap();
    holed.write_all_at(b"data", 1 << 20).unwrap();
    let (stderr, code, archive) = cp_directory_to_guest(&place, &[], "dir");
    assert!(
        stderr.contains("dir/socket: left out: a socket"),
        "{stderr}"
    );
    assert_eq!(code, Some(0), "{stderr}");
    let archive = archive.unwrap();
    let mut archive = tar::Archive::new(&archive[..]);
    let entries = archive.entries().unwrap().map(|entry| {
        let entry = entry.unwrap();
        let header = entry.header();
        assert_eq!((header.uid().unwrap(), header.gid().unwrap()), (0, 0));
        (text(&entry.path_bytes()), header.entry_type())
    });
    let expected = [
        (".", EntryType::Directory),
        ("fifo", EntryType::Fifo),
        ("link", EntryType::Symlink),
        ("sub", EntryType::Directory),
        ("sub/file", EntryType::Regular),
        ("sub/holed", EntryType::Regular),
    ];
    assert_eq!(
        entries.collect::<Vec<_>>(),
        expected.map(|(name, kind)| (name.to_string(), kind))
    );
    let (stderr, code, archive) = cp_directory_to_guest(&place, &["-u", "app"], "dir");
    assert_eq!(code, Some(0), "{stderr}");
    let archive = archive.unwrap();
    for entry in tar::Archive::new(&archive[..]).entries().unwrap() {
        let header = entry.unwrap().header().clone();
        assert_eq!((header.uid().unwrap(), header.gid().unwrap()), (1000, 1001));
    }
    // Root cannot read it either.
    let (stderr, code, archive) = cp_directory_to_guest(&place, &[], "/proc/sys/net/ipv4/route");
    let expected = "route/flush: Permission denied";
    assert!(stderr.contains(expected) && code == Some(125), "{stderr}");
    assert!(archive.is_some());
}

#[test]
fn a_reader_that_closes_early_is_not_an_error_message() {
    let place = Place::new();
    let vm = Vm::start(place.0.path(), files);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = Command::new(env!("CARGO_BIN_EXE_pigeon"))
        .args(["cp", ":/etc/motd", "-"])
        .env("XDG_RUNTIME_DIR", place.0.path())
        .env("XDG_STATE_HOME", place.0.path())
        .env("PIGEON_UDS", &vm.uds)
        .stdout(writer)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(141));
    assert_eq!(text(&output.stderr), "");
}

#[test]
fn a_tunnel_carries_bytes_both_ways_and_reports_a_refusal() {
    let place = Place::new();
    let vm = Vm::start(place.0.path(), |mut connection| {
        if connection.request.line == "CONNECT 127.0.0.1:1" {
            return connection.respond(502, "", br#"{"error":"127.0.0.1:1: ECONNREFUSED"}"#);
        }
        // The first bytes follow the response.
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
    let address = forward.address();
    let talk = |number: u32| {
        let mut stream = TcpStream::connect(address).unwrap();
        let request = format!("request {number}").repeat(2000);
        let mut writer = stream.try_clone().unwrap();
        let sent = request.clone();
        let writer = std::thread::spawn(move || {
            writer.write_all(sent.as_bytes()).unwrap();
            writer.shutdown(Shutdown::Write).unwrap();
        });
        let mut response = String::new();
        stream.read_to_string(&mut response).unwrap();
        writer.join().unwrap();
        assert_eq!(response, format!("banner\n{}bye\n", request.to_uppercase()));
    };
    for number in 0..10 {
        talk(number);
    }
    std::thread::scope(|scope| {
        for number in 0..50 {
            scope.spawn(move || talk(number));
        }
    });
    drop(forward);
    assert!(TcpStream::connect(address).is_err());
    TcpListener::bind(address).expect("the port is free");
    // A refused client's connection is closed, and the reason is reported.
    let (sender, failure) = std::sync::mpsc::channel();
    let sender = std::sync::Mutex::new(sender);
    let sender = std::sync::Arc::new(sender);
    let failed = move |error: Error| {
        let _ = sender.lock().unwrap().send(error.to_string());
    };
    let forward = Forward::start(("127.0.0.1", 0), &vm.uds, "127.0.0.1:1", failed).unwrap();
    let mut stream = TcpStream::connect(forward.address()).unwrap();
    let _ = stream.read(&mut [0]);
    let failure = failure.recv_timeout(Duration::from_secs(10)).unwrap();
    assert!(failure.contains("ECONNREFUSED"), "{failure}");
}

#[test]
fn a_response_after_the_clients_half_close_is_forwarded() {
    let place = Place::new();
    let vm = Vm::start(place.0.path(), |mut connection| {
        if connection.request.line.starts_with("CONNECT") {
            connection.send(b"HTTP/1.1 200 OK\r\n\r\n");
            assert_eq!(connection.stream.read(&mut [0; 64]).unwrap(), 7);
        }
        // Like Firecracker: the end of the client's bytes closes both directions.
        let timeout = Some(Duration::from_millis(100));
        let socket = connection.stream.get_ref();
        socket.set_read_timeout(timeout).unwrap();
        if !matches!(connection.stream.read(&mut [0]), Ok(0)) {
            connection.respond(200, "", b"response");
        }
    });
    let ask = |client: OwnedFd, request: &[u8]| {
        let mut stream = std::fs::File::from(client);
        stream.write_all(request).unwrap();
        rustix::net::shutdown(&stream, rustix::net::Shutdown::Write).unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).unwrap();
        assert!(response.ends_with("response"), "{response:?}");
    };
    let failed = |error| panic!("{error}");
    let forward = Forward::start(("127.0.0.1", 0), &vm.uds, "127.0.0.1:80", failed).unwrap();
    let client = TcpStream::connect(forward.address()).unwrap();
    ask(client.into(), b"request");
    let socket = place.0.path().join("api.sock");
    let _proxy = Proxy::start(&socket, &vm.uds).unwrap();
    let client = UnixStream::connect(socket).unwrap();
    ask(client.into(), b"GET /v1/sysinfo HTTP/1.1\r\n\r\n");
}

/// The server's end of a session.
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
fn exec_separates_stdout_and_stderr_if_the_init_does() {
    let place = Place::new();
    let vm = Vm::start(place.0.path(), |mut connection| {
        if connection.request.line == "GET /v1/sessions" {
            return connection.respond(200, "", b"[]");
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
fn an_exec_stopped_and_continued_before_its_session_begins_is_not_interrupted() {
    let place = Place::new();
    let (requested, request) = mpsc::channel();
    let (release, released) = mpsc::channel();
    let released = Mutex::new(released);
    let vm = Vm::start(place.0.path(), move |mut connection| {
        if connection.request.line == "GET /v1/sessions" {
            return connection.respond(200, "", b"[]");
        }
        requested.send(()).unwrap();
        released.lock().unwrap().recv().unwrap();
        let mut socket = upgrade(connection);
        socket
            .send(Message::text(r#"{"Exit":{"code":3,"signal":null}}"#))
            .unwrap();
        let _ = socket.close(None);
        while socket.read().is_ok() {}
    });
    let exec = spawn(&place, &vm, &["exec", "x"]);
    request.recv().unwrap();
    let pid = Pid::from_child(&exec);
    // It waits for the response; after SIGCONT its call fails with EINTR (signal(7)).
    for signal in [Signal::STOP, Signal::CONT] {
        std::thread::sleep(Duration::from_millis(200));
        kill_process(pid, signal).unwrap();
    }
    std::thread::sleep(Duration::from_millis(200));
    release.send(()).unwrap();
    let output = exec.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
}

#[test]
fn a_session_with_a_closed_output_restores_the_terminal_silently() {
    use rustix::termios::LocalModes;
    let place = Place::new();
    let vm = Vm::start(place.0.path(), |connection| {
        let mut socket = upgrade(connection);
        // Until the client has disconnected.
        while socket.send(Message::binary(&b"y\n"[..])).is_ok() {}
    });
    let script = format!(
        "{} exec -it yes | head -n1; echo code ${{PIPESTATUS[0]}}",
        env!("CARGO_BIN_EXE_pigeon")
    );
    let mut command = Command::new("bash");
    command
        .args(["-c", &script])
        .env("XDG_RUNTIME_DIR", place.0.path())
        .env("XDG_STATE_HOME", place.0.path())
        .env("PIGEON_UDS", &vm.uds);
    let mut terminal = pty::Terminal::spawn(command, (80, 24));
    terminal.expect("code 141");
    assert!(!terminal.shown().contains("pigeon"), "{}", terminal.shown());
    let modes = terminal.modes().local_modes;
    assert!(
        modes.contains(LocalModes::ECHO | LocalModes::ICANON),
        "{modes:?}"
    );
}

#[test]
fn an_init_without_named_sessions_is_not_asked_for_streams() {
    let place = Place::new();
    let vm = Vm::start(place.0.path(), |mut connection| {
        if connection.request.line == "GET /v1/sessions" {
            return connection.respond(404, "", br#"{"error":"no such call"}"#);
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
fn a_named_session_can_be_detached_and_attached() {
    let place = Place::new();
    let vm = Vm::start(place.0.path(), |mut connection| {
        match connection.request.line.as_str() {
            "GET /v1/sessions" => {
                let sessions = json!([{
                    "id": "build-1", "pid": 9, "command": ["make", "all"], "tty": false,
                    "attached": false, "exit": null,
                }]);
                return connection.respond(200, "", sessions.to_string().as_bytes());
            }
            line if !line.contains("/ws/") => {
                return connection.respond(200, "", b"{\"ok\":true}");
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
    let (_, stderr, code) = run(&["attach", "other"]);
    assert!(
        stderr.contains("there is no session other") && code == Some(125),
        "{stderr}"
    );
    assert_eq!(run(&["attach", "--kill", "build-1"]).2, Some(0));
    assert!(
        vm.lines()
            .contains(&"DELETE /v1/sessions/build-1".to_string())
    );
}

#[test]
fn a_session_ended_by_the_init_reports_its_reason() {
    let place = Place::new();
    let vm = Vm::start(place.0.path(), |mut connection| {
        if connection.request.line == "GET /v1/sessions" {
            let sessions = json!(["taken", "silent"].map(|id| json!({
                "id": id, "pid": 9, "command": ["make"], "tty": false, "attached": false, "exit": null,
            })));
            return connection.respond(200, "", sessions.to_string().as_bytes());
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
        let stderr = text(&output.stderr);
        assert!(stderr.contains(words), "{stderr}");
        assert_eq!(output.status.code(), Some(125));
    }
}

#[test]
fn a_command_that_cannot_start_reports_the_reason() {
    let place = Place::new();
    let vm = Vm::start(place.0.path(), |mut connection| {
        if connection.request.line == "GET /v1/sessions" {
            return connection.respond(404, "", b"{}");
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
        let stderr = text(&output.stderr);
        assert!(stderr.contains(words), "{stderr}");
        assert_eq!(output.status.code(), Some(code));
    }
}

#[test]
fn forwarding_is_not_limited_by_the_soft_limit_of_open_files() {
    let place = Place::new();
    let vm = Vm::start(place.0.path(), |mut connection| {
        connection.send(b"HTTP/1.1 200 OK\r\n\r\n");
        while let Ok(1) = connection.stream.read(&mut [0]) {
            connection.send(b"x");
        }
    });
    let mut command = Command::new("sh");
    let script = "ulimit -Sn 64; exec \"$0\" forward --uds \"$1\" 127.0.0.1::80";
    command
        .args(["-c", script, env!("CARGO_BIN_EXE_pigeon")])
        .arg(&vm.uds)
        .stdout(Stdio::piped());
    let mut pigeon = Process::spawn(command).unwrap();
    let mut line = String::new();
    BufReader::new(pigeon.child().stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    let address = line.split("->").next().unwrap();
    let mut streams = vec![];
    for number in 0..100 {
        let mut stream = TcpStream::connect(address).unwrap();
        let limit = Some(Duration::from_secs(30));
        stream.set_read_timeout(limit).unwrap();
        stream.write_all(b"x").unwrap();
        let back = stream.read_exact(&mut [0]);
        assert!(back.is_ok(), "connection {number}: {back:?}");
        streams.push(stream);
    }
}
