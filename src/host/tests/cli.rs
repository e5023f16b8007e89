//! The command without a VM: its messages, and how it gets images by name.

mod common;
#[path = "common/pty.rs"]
mod pty;

use std::{
    fs,
    io::{Read, Write},
    os::unix::{
        fs::{OpenOptionsExt, PermissionsExt},
        net::UnixListener,
        process::{CommandExt, ExitStatusExt},
    },
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
    thread,
    time::Duration,
};

use common::{
    Place, Tar, docker_save,
    fake::{self, Qemu, Vm},
    owner,
};
use pigeon::{
    Arch,
    logs::{Frame, Stream},
    process::write_program,
};
use rustix::{
    fs::{CWD, FileType, Mode, OFlags, mknodat},
    process::{Pid, Signal, kill_process, kill_process_group},
};
use serde_json::{Value, json};

/// Standard output, standard error and exit code of `pigeon WORDS` in the directory of `place`.
fn pigeon(place: &Place, words: &[&str]) -> (String, String, i32) {
    finished(command(place, words).output().unwrap())
}

/// The same, with this `PATH`.
fn pigeon_with(place: &Place, path: &str, words: &[&str]) -> (String, String, i32) {
    finished(command(place, words).env("PATH", path).output().unwrap())
}

fn finished(output: Output) -> (String, String, i32) {
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (
        text(output.stdout),
        text(output.stderr),
        output.status.code().unwrap(),
    )
}

/// `pigeon WORDS` in the directory of `place`, without input.
fn command(place: &Place, words: &[&str]) -> Command {
    let path = std::env::var("PATH").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_pigeon"));
    command
        .args(words)
        .current_dir(place.0.path())
        .env("PATH", format!("{}:{path}", place.0.path().display()))
        .env("XDG_RUNTIME_DIR", place.0.path())
        .env("XDG_STATE_HOME", place.0.path())
        .env_remove("PIGEON_UDS")
        .env_remove("PIGEON_ARCH")
        .stdin(Stdio::null());
    command
}

/// The same, started, with its output in pipes.
fn spawn(command: &mut Command) -> Child {
    let command = command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

/// Records a running VM, as its owner does, until the file is dropped.
fn record(place: &Place, record: Value) -> fs::File {
    let dir = place.path("pigeon/vms/app");
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("vm.json"), record.to_string()).unwrap();
    let lock = fs::File::create(dir.join("lock")).unwrap();
    lock.lock().unwrap();
    lock
}

/// `app.ext4`, which is recognized as an image of that format.
fn write_image(place: &Place) {
    let mut ext4 = vec![0; 2 << 10];
    ext4[1080..1082].copy_from_slice(&[0x53, 0xef]);
    place.write("app.ext4", ext4);
}

/// A running VM `app` with the socket `vm.vsock`: its directory, and its owner's lock.
fn running_vm(place: &Place) -> (PathBuf, fs::File) {
    let uds = place.path("vm.vsock");
    let lock = record(place, json!({"name": "app", "uds": uds, "pid": 1}));
    (place.path("pigeon/vms/app"), lock)
}

/// A command line of `pigeon run` for a VM with the socket `app.vsock`, on a stand-in for QEMU.
fn run_on_stand_in(place: &Place) -> (Command, Vm, Qemu) {
    run_on_stand_in_with(place, &[])
}

/// The same, with additional options.
fn run_on_stand_in_with(place: &Place, options: &[&str]) -> (Command, Vm, Qemu) {
    let vm = Vm::start(place.0.path(), |mut connection| {
        match connection.request.line.as_str() {
            "POST /v1/signals" => connection.respond(200, "", b"{\"ok\":true}"),
            "GET /v1/logs?follow=1&offset=0" => {
                let (stream, bytes) = (Stream::Stdout, vec![b'x'; 1000]);
                let frames = Frame { stream, bytes }.encode().repeat(100);
                connection.respond(200, "", &frames);
            }
            _ => connection.respond(404, "", b"{\"error\":\"no such path\"}"),
        }
    });
    let console = "pigeon-init: level=info msg=\"workload exited\" exit_code=7 oom_killed=false\n";
    let qemu = Qemu::start(&vm, &place.path("app.vsock"), console);
    write_image(place);
    place.write("kernel", "");
    place.write("initrd", "");
    let path = std::env::var("PATH").unwrap();
    let path = format!("{}:{path}", place.0.path().display());
    let mut command = Command::new(env!("CARGO_BIN_EXE_pigeon"));
    command
        .args(["run", "--vmm", "qemu", "--kernel", "kernel"])
        .args(options)
        .args(["--initrd", "initrd", "--uds", "app.vsock", "app.ext4", "id"])
        .current_dir(place.0.path())
        .env("PATH", path)
        .env("XDG_RUNTIME_DIR", place.0.path())
        .env("XDG_STATE_HOME", place.0.path())
        .env_remove("PIGEON_UDS")
        .env_remove("PIGEON_ARCH");
    (command, vm, qemu)
}

/// The error of `pigeon WORDS`; its exit code must be that of the command's own failures.
fn error_of(place: &Place, words: &[&str]) -> String {
    let (out, stderr, code) = pigeon(place, words);
    assert_eq!((out.as_str(), code), ("", 125), "{stderr}");
    stderr
}

fn program(place: &Place, name: &str, script: &str) {
    write_program(&place.path(name), format!("#!/bin/sh\n{script}")).unwrap();
}

#[test]
fn an_error_says_what_to_do_next() {
    let place = Place::new();
    let stderr = error_of(&place, &["status"]);
    assert!(stderr.contains("no VM is running: start one"), "{stderr}");
    let stderr = error_of(&place, &["exec", "--vm", "app", "id"]);
    assert!(
        stderr.contains("there is no VM called app") && stderr.contains("pigeon run IMAGE"),
        "{stderr}"
    );
    let stderr = error_of(&place, &["wait", "--uds", "none.vsock"]);
    assert!(
        stderr.contains("none.vsock: No such file") && stderr.contains("`pigeon ps`"),
        "{stderr}"
    );
    let stderr = error_of(&place, &["run", "app.ext4"]);
    assert!(
        stderr.contains("no image app.ext4") && stderr.contains("`pigeon rootfs SOURCE app.ext4`"),
        "{stderr}"
    );
    place.write("app.ext4", "");
    let stderr = error_of(&place, &["run", "app.ext4"]);
    assert!(
        stderr.contains("app.ext4 is empty, not a root image"),
        "{stderr}"
    );
    let archive = Tar::new().file("x", "x").bytes();
    place.write("app.tar", &archive);
    let stderr = error_of(&place, &["run", "app.tar"]);
    let expected = "app.tar is a tar archive, not a root image; `pigeon rootfs app.tar NAME.ext4`";
    assert!(stderr.contains(expected), "{stderr}");
    write_image(&place);
    let stderr = error_of(&place, &["run", "app.ext4"]);
    assert!(
        stderr.contains("nothing to run") && stderr.contains("app.run.json"),
        "{stderr}"
    );
    place.write(
        "mine.json",
        json!({"ImageConfig": {"Entrypoint": "/s"}}).to_string(),
    );
    let stderr = error_of(&place, &["run", "-c", "mine.json", "app.ext4"]);
    assert!(
        stderr.contains("mine.json: ImageConfig.Entrypoint: a list of strings expected"),
        "{stderr}"
    );
    let stderr = error_of(&place, &["run", "-m", "8", "app.ext4", "id"]);
    assert!(
        stderr.contains("8 MiB of memory are not enough"),
        "{stderr}"
    );
    let words = ["run", "--disk", "none:/data", "app.ext4", "id"];
    let stderr = error_of(&place, &words);
    assert!(
        stderr.contains("none does not exist: add ,size=1G"),
        "{stderr}"
    );
    // A failed start keeps the files of the image's last VM.
    fs::create_dir_all(place.0.path().join("pigeon/vms/app")).unwrap();
    let record = json!({"name": "app", "auto": true, "started": 1, "ended": 2, "exit_code": 5});
    place.write("pigeon/vms/app/vm.json", record.to_string());
    place.write("pigeon/vms/app/console", "the last words");
    let words = ["run", "--uds", "app.ext4", "app.ext4", "id"];
    let stderr = error_of(&place, &words);
    assert!(
        stderr.contains("app.ext4 exists and is not a socket"),
        "{stderr}"
    );
    // Another VM has reserved this socket.
    let reservation = pigeon::vsock::Reservation::new(&place.path("other.vsock")).unwrap();
    let stderr = error_of(&place, &["run", "--uds", "other.vsock", "app.ext4", "id"]);
    assert!(stderr.contains("other.vsock is in use already"), "{stderr}");
    assert!(place.path("other.vsock.lock").exists());
    drop(reservation);
    assert!(!place.path("other.vsock.lock").exists() && !place.path("app.ext4.lock").exists());
    let (listed, _, _) = pigeon(&place, &["ps", "-a"]);
    assert!(listed.contains("exited (5)"), "{listed}");
    let (console, _, _) = pigeon(&place, &["logs", "--console", "app"]);
    assert_eq!(console, "the last words");
    let (removed, _, code) = pigeon(&place, &["rm", "app"]);
    assert_eq!((removed.as_str(), code), ("app\n", 0));
    error_of(&place, &words);
    assert!(!place.0.path().join("pigeon/vms/app").exists());
    let stderr = error_of(&place, &["rootfs", "./none.tar", "out.ext4"]);
    assert!(stderr.contains("there is no ./none.tar"), "{stderr}");
    let stderr = error_of(&place, &["rootfs", "app.ext4", "nowhere/out.ext4"]);
    assert!(
        stderr.contains("unable to write beside nowhere/out.ext4"),
        "{stderr}"
    );
    assert_eq!(pigeon(&place, &["signal", "NOSUCH"]).2, 125);
    assert_eq!(pigeon(&place, &["run", "--help"]).2, 0);
    assert_eq!(pigeon(&place, &["list", "--json"]).0, "[]\n");
}

#[test]
fn only_an_unused_socket_of_an_ended_vm_is_removed() {
    let place = Place::new();
    let path = |name: &str| place.path(name);
    let ended = |name: &str, uds: &str| {
        let dir = path(&format!("pigeon/vms/{name}"));
        fs::create_dir_all(&dir).unwrap();
        let record = json!({"name": name, "uds": path(uds), "ended": 2, "exit_code": 0});
        fs::write(dir.join("vm.json"), record.to_string()).unwrap();
        fs::write(dir.join("lock"), "").unwrap();
    };
    ended("a", "vm.vsock");
    ended("b", "notes");
    ended("c", "left.vsock");
    // A socket in use by another VM, a user's file, and a leftover socket.
    let other = UnixListener::bind(path("vm.vsock")).unwrap();
    other.set_nonblocking(true).unwrap();
    place.write("notes", "precious");
    drop(UnixListener::bind(path("left.vsock")).unwrap());
    let (listed, stderr, code) = pigeon(&place, &["ps", "-a", "-q"]);
    assert_eq!((listed.as_str(), code), ("a\nb\nc\n", 0), "{stderr}");
    // Listing does not even connect.
    assert!(other.accept().is_err());
    assert!(path("vm.vsock").exists() && path("notes").exists());
    let (removed, stderr, code) = pigeon(&place, &["rm", "a", "b", "c"]);
    assert_eq!((removed.as_str(), code), ("a\nb\nc\n", 0), "{stderr}");
    assert!(path("vm.vsock").exists() && !path("left.vsock").exists());
    assert_eq!(fs::read_to_string(path("notes")).unwrap(), "precious");
}

#[test]
fn a_file_at_the_path_of_the_events_socket_is_kept() {
    let place = Place::new();
    let (mut command, vm, qemu) = run_on_stand_in(&place);
    let path = place.write("app.vsock_10001", "precious");
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let mut run = command.stderr(Stdio::piped()).spawn().unwrap();
    // The VM is up once it receives a request.
    while vm.lines().is_empty() && run.try_wait().unwrap().is_none() {
        thread::sleep(Duration::from_millis(5));
    }
    qemu.end();
    let output = run.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(7), "{stderr}");
    assert!(
        stderr.contains("app.vsock_10001 exists and is not a socket"),
        "{stderr}"
    );
    assert_eq!(fs::read_to_string(path).unwrap(), "precious");
}

#[test]
fn a_vm_is_resumed_when_its_snapshot_command_was_killed() {
    let place = Place::new();
    if Arch::HOST != Arch::X86_64 {
        return; // QEMU has no machine type for snapshots there
    }
    let (mut command, vm, qemu) = run_on_stand_in_with(&place, &["--restorable"]);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let mut run = command.stderr(Stdio::piped()).spawn().unwrap();
    while vm.lines().is_empty() && run.try_wait().unwrap().is_none() {
        thread::sleep(Duration::from_millis(5));
    }
    let (output, _, _) = pigeon(&place, &["inspect", "app"]);
    let record: Value = serde_json::from_str(&output).unwrap();
    let dir = PathBuf::from(record[0]["restorable"]["dir"].as_str().unwrap());
    let monitor = UnixListener::bind(dir.join("qmp-others.sock")).unwrap();
    // The lock file as a killed `pigeon snapshot` leaves it, except that it is still locked.
    let lock = fs::File::create(dir.join("snapshot")).unwrap();
    lock.lock().unwrap();
    fs::write(dir.join("snapshot"), "pigeon-1-2").unwrap();
    monitor.set_nonblocking(true).unwrap();
    thread::sleep(Duration::from_secs(2));
    assert!(monitor.accept().is_err());
    monitor.set_nonblocking(false).unwrap();
    drop(lock);
    let commands = fake::serve_monitor(monitor.accept().unwrap().0);
    assert!(commands.contains(&"cont".to_string()), "{commands:?}");
    let cancel = || {
        let mut requests = vm.requests().into_iter();
        requests.find(|request| request.line == "POST /v1/snapshot/cancel")
    };
    while cancel().is_none() {
        assert!(run.try_wait().unwrap().is_none());
        thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(cancel().unwrap().body, b"{\"token\":\"pigeon-1-2\"}");
    while dir.join("snapshot").exists() {
        thread::sleep(Duration::from_millis(5));
    }
    qemu.end();
    let output = run.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        stderr.contains("a snapshot was interrupted; the VM was resumed"),
        "{stderr}"
    );
}

#[test]
fn a_vm_whose_configuration_no_clone_could_be_sent_has_no_snapshots() {
    let place = Place::new();
    let vm = Vm::start(place.0.path(), |mut connection| {
        connection.respond(409, "", b"{\"error\":\"not now\"}")
    });
    let restorable =
        json!({"dir": place.0.path(), "kernel": "/vmlinux", "disks": [], "nic": "none"});
    for (length, expected) in [(126 << 10, "not now"), (127 << 10, "over 127 KiB")] {
        let config = json!({"ExecOverride": ["x".repeat(length)]});
        let _lock = record(
            &place,
            json!({"name": "app", "uds": vm.uds, "restorable": restorable, "config": config}),
        );
        let stderr = error_of(&place, &["snapshot", "app", "app.snapshot"]);
        assert!(stderr.contains(expected), "{stderr}");
    }
}

#[test]
fn a_vm_that_does_not_respond_after_a_snapshot_is_left_to_its_owner() {
    for is_refused in [false, true] {
        let place = Place::new();
        let vm = Vm::start(place.0.path(), move |mut connection| {
            let prepared = br#"{"ok":true,"token":"a1","frozen":1,"freeze_ms":1,"sync_ms":1}"#;
            match connection.request.line.as_str() {
                "POST /v1/snapshot/prepare" => connection.respond(200, "", prepared),
                _ if is_refused => connection.respond(409, "", b"{\"error\":\"not held\"}"),
                _ => {}
            }
        });
        let restorable =
            json!({"dir": place.0.path(), "kernel": "/vmlinux", "disks": [], "nic": "none"});
        let running = json!({"name": "app", "uds": vm.uds, "restorable": restorable});
        let _lock = record(&place, running);
        error_of(&place, &["snapshot", "app", "app.snapshot"]);
        assert_eq!(vm.lines().last().unwrap(), "POST /v1/snapshot/cancel");
        let token = fs::read_to_string(place.path("snapshot")).ok();
        let is_left = token.is_some_and(|token| token.starts_with("pigeon-"));
        assert_eq!(is_left, !is_refused);
    }
}

#[test]
fn the_disks_of_a_clone_that_has_ended_are_kept() {
    if Arch::HOST != Arch::X86_64 {
        return; // QEMU has no machine type for snapshots there
    }
    let place = Place::new();
    let vm = Vm::start(place.0.path(), |mut connection| {
        let restored = br#"{"ok":true,"generation":2,"reseeded":true}"#;
        match connection.request.line.as_str() {
            "POST /v1/restore" => connection.respond(200, "", restored),
            _ => connection.respond(404, "", b"{\"error\":\"no such path\"}"),
        }
    });
    let qemu = Qemu::start(&vm, &place.path("pigeon/app.vsock"), "");
    fs::create_dir(place.path("app.snapshot")).unwrap();
    place.write("app.ext4", "");
    for name in ["state", "memory", "disk0"] {
        place.write(&format!("app.snapshot/{name}"), name);
    }
    let disk = |name: &str, read_only| json!({"path": place.path(name), "read_only": read_only});
    // Takes a snapshot with this disk, and starts a clone of it, which ends at once. Returns its name.
    let clone = |disk: Value| {
        let manifest = json!({
            "name": "app", "image": "app.ext4", "token": "a1", "arch": "x86_64", "hypervisor": "QEMU",
            "memory_mib": 256, "cpus": 1, "kernel": place.write("kernel", ""), "disks": [disk],
            "nic": "none", "config": {"ExecOverride": ["/x"]},
        });
        place.write("app.snapshot/snapshot.json", manifest.to_string());
        let (name, stderr, code) = pigeon(&place, &["restore", "app.snapshot"]);
        assert_eq!(code, 0, "{stderr}");
        qemu.end();
        let name = name.trim_end().to_string();
        while !pigeon(&place, &["ps", "-q"]).0.is_empty() {
            thread::sleep(Duration::from_millis(20));
        }
        fs::remove_file(place.path("ended")).unwrap();
        name
    };
    // One without a disk of its own is replaced.
    assert_eq!(clone(disk("app.ext4", true)), "app");
    assert_eq!(clone(disk("app.snapshot/disk0", false)), "app");
    let program = place.path("qemu-system-x86_64");
    let script = fs::read_to_string(&program).unwrap();
    write_program(&program, script.replace("app.vsock", "app-2.vsock")).unwrap();
    assert_eq!(clone(disk("app.snapshot/disk0", false)), "app-2");
    for name in ["app", "app-2"] {
        let copy = place.path(&format!("pigeon/vms/{name}/disk0"));
        assert_eq!(fs::read_to_string(&copy).unwrap(), "disk0", "{name}");
        assert_eq!(pigeon(&place, &["rm", name]).2, 0);
        assert!(!copy.exists());
    }
}

#[test]
fn a_vm_that_is_being_started_again_has_the_record_of_its_new_process() {
    let place = Place::new();
    let (mut run, vm, qemu) = run_on_stand_in(&place);
    run.stdin(Stdio::null()).stdout(Stdio::null());
    let mut run = run.stderr(Stdio::null()).spawn().unwrap();
    while vm.lines().is_empty() && run.try_wait().unwrap().is_none() {
        thread::sleep(Duration::from_millis(5));
    }
    qemu.end();
    assert_eq!(run.wait().unwrap().code(), Some(7));
    let record = || {
        let (output, _, _) = pigeon(&place, &["inspect", "app"]);
        let mut record: Value = serde_json::from_str(&output).unwrap();
        record[0].take()
    };
    let before = record();
    assert_eq!(before["exit_code"], 7);

    // It starts once its initrd was read, and then fails.
    fs::remove_file(place.path("initrd")).unwrap();
    mknodat(CWD, place.path("initrd"), FileType::Fifo, Mode::RWXU, 0).unwrap();
    program(
        &place,
        &format!("qemu-system-{}", Arch::HOST.name()),
        "exit 1",
    );
    let mut start = command(&place, &["start", "--attach", "app"]);
    let mut start = start
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let initrd = loop {
        // Fails until the other end is open.
        let mut options = fs::File::options();
        let flags = OFlags::NONBLOCK.bits() as i32;
        match options
            .write(true)
            .custom_flags(flags)
            .open(place.path("initrd"))
        {
            Ok(initrd) => break initrd,
            Err(_) => assert!(start.try_wait().unwrap().is_none()),
        }
        thread::sleep(Duration::from_millis(5));
    };
    let now = record();
    assert_eq!(
        (&now["running"], &now["pid"]),
        (&json!(true), &json!(start.id()))
    );
    for member in ["ended", "exit", "exit_code"] {
        assert!(now[member].is_null(), "{member}");
    }
    assert_eq!(now["uds"], before["uds"]);
    drop(initrd);
    assert_eq!(start.wait().unwrap().code(), Some(125));
    let after = record();
    for member in ["running", "pid", "started", "ended", "exit_code", "config"] {
        assert_eq!(after[member], before[member], "{member}");
    }
}

#[test]
fn a_command_for_several_vms_continues_after_a_failure() {
    let place = Place::new();
    for name in ["a", "b"] {
        let dir = place.path(&format!("pigeon/vms/{name}"));
        fs::create_dir_all(&dir).unwrap();
        let record = json!({"name": name, "ended": 2, "exit_code": 0});
        fs::write(dir.join("vm.json"), record.to_string()).unwrap();
        fs::write(dir.join("lock"), "").unwrap();
    }
    let (out, stderr, code) = pigeon(&place, &["stop", "none", "a", "nor", "b"]);
    assert_eq!((out.as_str(), code), ("a\nb\n", 125), "{stderr}");
    assert!(
        stderr.contains("no VM called none") && stderr.contains("called nor"),
        "{stderr}"
    );
    // None of them can be started: each one causes an error.
    let (out, stderr, code) = pigeon(&place, &["start", "a", "none", "b"]);
    assert_eq!((out.as_str(), code), ("", 125), "{stderr}");
    assert_eq!(stderr.lines().count(), 3, "{stderr}");
    let (out, stderr, code) = pigeon(&place, &["rm", "none", "a", "b"]);
    assert_eq!((out.as_str(), code), ("a\nb\n", 125), "{stderr}");
    assert!(stderr.contains("no VM called none"), "{stderr}");
}

#[test]
fn output_keeps_its_offsets_when_the_oldest_was_removed() {
    let place = Place::new();
    let dir = place.path("pigeon/vms/app");
    fs::create_dir_all(&dir).unwrap();
    let record = json!({"name": "app", "ended": 2, "exit_code": 0});
    fs::write(dir.join("vm.json"), record.to_string()).unwrap();
    fs::write(dir.join("lock"), "").unwrap();
    let frames = |lines: &[&str]| {
        let frame = |line: &&str| {
            let (stream, bytes) = (Stream::Stdout, line.as_bytes().to_vec());
            Frame { stream, bytes }.encode()
        };
        lines.iter().flat_map(frame).collect::<Vec<_>>()
    };
    fs::write(dir.join("output-100"), frames(&["one\n", "two\n"])).unwrap();
    fs::write(dir.join("output-108"), frames(&["three\n"])).unwrap();
    fs::write(dir.join("console-7"), "kernel\n").unwrap();
    for (words, shown, lost) in [
        (
            &["logs"][..],
            "one\ntwo\nthree\n",
            "100 bytes of output are lost",
        ),
        (
            &["logs", "-f"],
            "one\ntwo\nthree\n",
            "100 bytes of output are lost",
        ),
        (
            &["logs", "--since-offset", "90"],
            "one\ntwo\nthree\n",
            "10 bytes of output",
        ),
        (&["logs", "--since-offset", "104"], "two\nthree\n", ""),
        (&["logs", "--since-offset", "110"], "ree\n", ""),
        (&["logs", "-n", "2"], "two\nthree\n", ""),
        (&["logs", "-n", "9"], "one\ntwo\nthree\n", ""),
        (&["logs", "--console"], "kernel\n", ""),
    ] {
        let (out, stderr, code) = pigeon(&place, words);
        assert_eq!((out.as_str(), code), (shown, 0), "{words:?}: {stderr}");
        assert_eq!(stderr.is_empty(), lost.is_empty(), "{words:?}: {stderr}");
        assert!(stderr.contains(lost), "{words:?}: {stderr}");
    }
}

#[test]
fn output_is_shown_even_if_it_cannot_be_recorded() {
    const SIZE: usize = 100_000;
    let place = Place::new();
    let (command, vm, qemu) = run_on_stand_in_with(&place, &["-q"]);
    // Limits files to 16 blocks: 8 or 16 KiB, depending on the shell.
    let mut limited = Command::new("sh");
    let script = "trap '' XFSZ; ulimit -f 16; exec \"$0\" \"$@\"";
    limited.args(["-c", script]).arg(command.get_program());
    limited.args(command.get_args()).current_dir(place.0.path());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => limited.env(name, value),
            None => limited.env_remove(name),
        };
    }
    limited.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut run = limited.stderr(Stdio::piped()).spawn().unwrap();
    while !vm.lines().iter().any(|line| line.contains("/v1/logs")) {
        assert!(run.try_wait().unwrap().is_none());
        thread::sleep(Duration::from_millis(5));
    }
    qemu.end();
    let output = run.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(
        (output.stdout.len(), output.status.code()),
        (SIZE, Some(7)),
        "{stderr}"
    );
    assert_eq!(
        stderr
            .matches("unable to keep the output for `pigeon logs`")
            .count(),
        1,
        "{stderr}"
    );
    // The frames that fit are complete.
    let (kept, stderr, code) = pigeon(&place, &["logs", "app"]);
    assert_eq!((kept.len() % 1000, code), (0, 0), "{stderr}");
    assert!((4000..SIZE).contains(&kept.len()), "{}", kept.len());
}

#[test]
fn followers_of_a_vm_with_rm_see_its_last_output_and_succeed() {
    for (file, words) in [
        ("output", &["logs", "-f", "app"][..]),
        ("console", &["logs", "-f", "--console", "app"]),
        ("events", &["events", "-f", "app"]),
    ] {
        let place = Place::new();
        let (dir, lock) = running_vm(&place);
        let bytes = |line: &str| match file {
            "output" => {
                let (stream, bytes) = (Stream::Stdout, line.into());
                Frame { stream, bytes }.encode()
            }
            _ => line.into(),
        };
        let mut log = fs::File::create(dir.join(file)).unwrap();
        log.write_all(&bytes("one\n")).unwrap();
        let mut follower = spawn(&mut command(&place, words));
        let mut seen = [0; 4];
        let shown = follower.stdout.as_mut().unwrap();
        shown.read_exact(&mut seen).unwrap();
        // As its owner does.
        log.write_all(&bytes("two\n")).unwrap();
        fs::remove_dir_all(&dir).unwrap();
        drop(lock);
        let (rest, stderr, code) = finished(follower.wait_with_output().unwrap());
        assert_eq!(
            (&seen, rest.as_str(), stderr.as_str(), code),
            (b"one\n", "two\n", "", 0)
        );
    }
    // It has not written anything yet.
    let place = Place::new();
    let (dir, lock) = running_vm(&place);
    let mut follower = spawn(&mut command(&place, &["events", "-f", "app"]));
    thread::sleep(Duration::from_millis(500));
    assert!(follower.try_wait().unwrap().is_none());
    fs::remove_dir_all(&dir).unwrap();
    drop(lock);
    let (shown, stderr, code) = finished(follower.wait_with_output().unwrap());
    assert_eq!((shown.as_str(), stderr.as_str(), code), ("", "", 0));
}

#[test]
fn wait_and_kill_return_once_the_vm_has_ended() {
    for (words, expected) in [(["wait", "app"], "137\n"), (["kill", "app"], "app\n")] {
        let place = Place::new();
        let (_, lock) = running_vm(&place);
        let vm = Vm::start(place.0.path(), |mut connection| {
            connection.respond(200, "", b"{\"code\":137,\"oom_killed\":false}");
        });
        let mut run = spawn(&mut command(&place, &words));
        while vm.lines().is_empty() && run.try_wait().unwrap().is_none() {
            thread::sleep(Duration::from_millis(5));
        }
        // The workload has ended, and the VM shuts down.
        thread::sleep(Duration::from_millis(500));
        assert!(run.try_wait().unwrap().is_none(), "{words:?}");
        drop(lock);
        let (shown, stderr, code) = finished(run.wait_with_output().unwrap());
        assert_eq!((shown.as_str(), code), (expected, 0), "{words:?}: {stderr}");
    }
}

#[test]
fn the_exit_code_is_the_workloads_even_if_it_cannot_be_recorded() {
    for (options, is_kept) in [(&[][..], true), (&["--rm"], false)] {
        let place = Place::new();
        let (mut run, vm, qemu) = run_on_stand_in_with(&place, options);
        let mut run = spawn(run.stdin(Stdio::null()));
        while vm.lines().is_empty() && run.try_wait().unwrap().is_none() {
            thread::sleep(Duration::from_millis(5));
        }
        let dir = place.path("pigeon/vms/app");
        // A directory at the path of the new record, which cannot be written then, also by root.
        fs::create_dir(dir.join("vm.json.new")).unwrap();
        qemu.end();
        let (_, stderr, code) = finished(run.wait_with_output().unwrap());
        assert_eq!((code, dir.exists()), (7, is_kept), "{stderr}");
        assert_eq!(stderr.contains("unable to write"), is_kept, "{stderr}");
        let (listed, _, _) = pigeon(&place, &["ps", "-a"]);
        let lost = "lost: its end was not recorded";
        assert_eq!(listed.contains(lost), is_kept, "{listed}");
    }
}

#[test]
fn a_signal_ends_a_run_that_still_fetches_the_kernel() {
    let place = Place::new();
    write_image(&place);
    place.write("initrd", "");
    program(&place, "apt-get", ": >fetching; exec sleep 60");
    let run = || {
        let mut run = command(
            &place,
            &[
                "run", "--vmm", "qemu", "--initrd", "initrd", "app.ext4", "id",
            ],
        );
        run.env("PIGEON_CACHE", place.path("cache"));
        run.env("PIGEON_KERNEL", "6.12");
        run
    };
    // With apt-get in its process group, as on a terminal.
    let mut first = spawn(run().process_group(0));
    while !place.path("fetching").exists() {
        assert!(first.try_wait().unwrap().is_none());
        thread::sleep(Duration::from_millis(5));
    }
    kill_process_group(Pid::from_child(&first), Signal::INT).unwrap();
    let output = first.wait_with_output().unwrap();
    assert_eq!(output.status.signal(), Some(2), "{output:?}");
    assert!(!place.path("pigeon/vms/app").exists());
    // The next one replaces what it left behind.
    program(&place, "apt-get", "exit 1");
    let (_, stderr, code) = finished(run().output().unwrap());
    assert_eq!(code, 125, "{stderr}");
    let entries = fs::read_dir(place.path("cache")).unwrap();
    let names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
    let lock = format!("debian-6.12-{}.lock", Arch::HOST.name());
    assert_eq!(names, [lock.as_str()]);
}

#[test]
fn sigusr1_and_sigusr2_go_to_the_workload() {
    let place = Place::new();
    let (mut run, vm, qemu) = run_on_stand_in(&place);
    let mut run = spawn(run.stdin(Stdio::null()));
    while vm.lines().is_empty() && run.try_wait().unwrap().is_none() {
        thread::sleep(Duration::from_millis(5));
    }
    for (signal, body) in [
        (Signal::USR1, &b"{\"signal\":10}"[..]),
        (Signal::USR2, b"{\"signal\":12}"),
    ] {
        kill_process(Pid::from_child(&run), signal).unwrap();
        while !vm.requests().iter().any(|request| request.body == body) {
            assert!(run.try_wait().unwrap().is_none());
            thread::sleep(Duration::from_millis(5));
        }
    }
    qemu.end();
    let (_, stderr, code) = finished(run.wait_with_output().unwrap());
    assert_eq!(code, 7, "{stderr}");
}

#[test]
fn ctrl_backslash_goes_to_the_workload_and_the_terminal_is_restored() {
    let place = Place::new();
    let (command, vm, qemu) = run_on_stand_in(&place);
    let mut terminal = pty::Terminal::spawn(command, (80, 24));
    let before = terminal.modes().local_modes;
    terminal.expect("Ctrl-C stops it");
    while terminal.modes().local_modes == before {
        assert!(!terminal.has_ended(), "{}", terminal.shown());
        thread::sleep(Duration::from_millis(5));
    }
    terminal.type_text("\x1c");
    let sent = || {
        let mut requests = vm.requests().into_iter();
        requests.find(|request| request.line == "POST /v1/signals")
    };
    while sent().is_none() {
        assert!(!terminal.has_ended(), "{}", terminal.shown());
        thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(sent().unwrap().body, b"{\"signal\":3}");
    qemu.end();
    assert_eq!(terminal.wait().code(), Some(7), "{}", terminal.shown());
    assert_eq!(terminal.modes().local_modes, before);
}

#[test]
fn an_invalid_size_is_refused_as_it_was_understood() {
    let place = Place::new();
    let archive = Tar::new().file("x", vec![1; 20 << 20]).bytes();
    place.write("app.tar", archive);
    let range = "is out of range (8 MiB to 16 TiB); numbers without a unit are bytes\n";
    for size in ["5", "1000K", "20T"] {
        let stderr = error_of(&place, &["rootfs", "app.tar", "app.ext4", size]);
        assert!(
            stderr.contains(" bytes ") && stderr.ends_with(range),
            "{stderr}"
        );
    }
    let stderr = error_of(&place, &["rootfs", "app.tar", "app.ext4", "16M"]);
    assert!(
        stderr.contains("a size of 16 MiB is too small: the files need"),
        "{stderr}"
    );
    assert_eq!(
        pigeon(&place, &["rootfs", "app.tar", "app.ext4", "40M"]).2,
        0
    );
    for option in ["--volume=v.img:/v,size=5", "--overlay=v.img,size=5"] {
        let stderr = error_of(&place, &["run", option, "app.ext4", "/x"]);
        assert!(
            stderr.starts_with("pigeon: 5 bytes") && stderr.ends_with(range),
            "{stderr}"
        );
        assert!(!place.path("v.img").exists());
    }
    for words in [
        ["-m", "0"],
        ["--cpus", "0"],
        ["--cpus", "33"],
        ["--cpus", "1.5"],
    ] {
        let stderr = error_of(
            &place,
            &[&["run"], &words[..], &["app.ext4", "/x"]].concat(),
        );
        assert!(
            stderr.contains(&format!("invalid value '{}'", words[1])),
            "{stderr}"
        );
    }
}

#[test]
fn a_timeout_that_the_init_does_not_accept_is_refused() {
    let place = Place::new();
    for words in [
        &["stop", "-t", "1e19", "app"][..],
        &["restart", "-t", "1e19", "app"],
        &["exec", "--json", "--timeout", "1e19", "id"],
        &["run", "--stop-timeout", "1e19", "app.ext4"],
        &["snapshot", "--freeze-timeout", "1e19", "app", "dir"],
    ] {
        let stderr = error_of(&place, words);
        assert!(
            stderr.contains("invalid value '1e19'") && stderr.contains("from 0 to 86400"),
            "{stderr}"
        );
    }
    // This one is not sent to the init.
    let _vm = Vm::start(place.0.path(), |_| ());
    let _running = running_vm(&place);
    let (up, stderr, code) = pigeon(&place, &["status", "--boot-timeout", "1e19", "app"]);
    assert!(code == 0 && up.starts_with("up: "), "{stderr}");
}

#[test]
fn a_vm_without_the_init_is_distinguished_from_no_vm() {
    let place = Place::new();
    let listener = UnixListener::bind(place.path("vm.vsock")).unwrap();
    // Like Firecracker while nothing listens on the port.
    let host = std::thread::spawn(move || listener.incoming().for_each(drop));
    let stderr = error_of(
        &place,
        &["status", "--uds", "vm.vsock", "--boot-timeout", "0.2"],
    );
    assert!(
        stderr.contains("nothing listens on the guest's port 10000"),
        "{stderr}"
    );
    assert!(stderr.contains("look at its console"), "{stderr}");
    drop(host);
}

#[test]
fn an_image_by_name_comes_from_docker_and_is_pulled_if_needed() {
    let place = Place::new();
    let config = json!({"config": {"Cmd": ["/bin/true"]}});
    let layer = Tar::new().file("hello", "hello").bytes();
    place.write("saved", docker_save(&[layer], &config, "demo:1"));
    let script = "echo \"$*\" >>docker.log\n\
        case $1 in\n\
        info) exit 0 ;;\n\
        image) head -n 1 pulled ;;\n\
        pull) echo \"$3\" >>pulled ;;\n\
        save) [ \"$4\" = -- ] || grep -qx \"$5\" pulled && cp saved \"$3\" ;;\n\
        *) exit 1 ;;\n\
        esac\n";
    program(&place, "docker", script);
    for _ in 0..2 {
        let (out, stderr, code) = pigeon(&place, &["rootfs", "--force", "demo:1", "demo.ext4"]);
        assert_eq!(code, 0, "{stderr}");
        assert!(
            out.contains("from a docker save archive\ndemo.run.json: runs /bin/true\n"),
            "{out}"
        );
        assert_eq!(owner(&place.path("demo.ext4"), "/hello"), "0644 0 0");
    }
    let log = fs::read_to_string(place.path("docker.log")).unwrap();
    let calls: Vec<_> = log
        .lines()
        .map(|line| line.split(' ').next().unwrap())
        .collect();
    assert_eq!(
        calls,
        ["info", "image", "pull", "save", "info", "image", "save"]
    );
    assert_eq!(log.matches(" -- demo:1\n").count(), 5, "{log}");
    // A local image is not used for another architecture, unless it is stored for that, too.
    let (foreign, platform) = match Arch::HOST {
        Arch::X86_64 => ("aarch64", "linux/arm64"),
        Arch::Aarch64 => ("x86_64", "linux/amd64"),
    };
    let words = ["rootfs", "-f", "--arch", foreign, "demo:1", "demo.ext4"];
    for _ in 0..2 {
        assert_eq!(pigeon(&place, &words).2, 0);
        let log = fs::read_to_string(place.path("docker.log")).unwrap();
        let pull = format!("\npull --platform {platform} -- demo:1\nsave ");
        assert_eq!(log.matches(&pull).count(), 1, "{log}");
        let save = log.lines().next_back().unwrap();
        assert!(
            save.ends_with(&format!(" --platform {platform} -- demo:1")),
            "{log}"
        );
    }
    // Docker before 28 has no such option.
    program(
        &place,
        "docker",
        &script.replace("|| grep -qx \"$5\" pulled", ""),
    );
    let (_, stderr, code) = pigeon(&place, &["rootfs", "--force", "demo:1", "demo.ext4"]);
    assert_eq!(code, 0, "{stderr}");
}

#[test]
fn an_image_name_without_a_tag_is_its_latest() {
    let place = Place::new();
    let saved = docker_save(&[Tar::new().bytes()], &json!({}), "demo:1");
    place.write("saved", saved);
    let script = "echo \"$*\" >>docker.log\n\
        case $1 in\n\
        image) case $6 in demo:latest|0123abcd) echo linux/amd64 ;; *) exit 1 ;; esac ;;\n\
        save) cp saved \"$3\" ;;\n\
        esac\n";
    program(&place, "docker", script);
    for (name, saved) in [
        ("demo", "demo:latest"),
        ("0123abcd", "0123abcd"),
        ("localhost:5000/other", "localhost:5000/other:latest"),
        ("demo@sha256:0123", "demo@sha256:0123"),
    ] {
        let (_, stderr, code) = pigeon(&place, &["rootfs", "--force", name, "x.ext4"]);
        assert_eq!(code, 0, "{stderr}");
        let log = fs::read_to_string(place.path("docker.log")).unwrap();
        let save = log.lines().next_back().unwrap();
        assert!(
            save.starts_with("save ") && save.ends_with(&format!(" -- {saved}")),
            "{log}"
        );
        let is_stored = ["demo", "0123abcd"].contains(&name);
        assert_eq!(!log.contains("\npull "), is_stored, "{log}");
        fs::remove_file(place.path("docker.log")).unwrap();
    }
}

#[test]
fn an_image_by_name_comes_from_skopeo_if_docker_fails() {
    let place = Place::new();
    place.write(
        "saved",
        docker_save(&[Tar::new().bytes()], &json!({}), "demo:1"),
    );
    program(&place, "docker", "exit 1\n");
    program(
        &place,
        "skopeo",
        "[ \"$1 $2 $3\" = 'copy -- docker://demo:1' ] && cp saved \"${4#docker-archive:}\"\n",
    );
    let (out, stderr, code) = pigeon(&place, &["rootfs", "--json", "demo:1", "demo.ext4"]);
    assert_eq!(code, 0, "{stderr}");
    let out: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(
        (&out["form"], &out["layers"]),
        (&json!("docker save archive"), &json!(1))
    );
    let stderr = error_of(&place, &["rootfs", "demo:2", "other.ext4"]);
    let expected = format!(
        "there is no file demo:2, and skopeo gave no image of that name for {}: exit status: 1\n",
        Arch::HOST.platform()
    );
    assert!(stderr.ends_with(&expected), "{stderr}");
    // A name that can only be a file is not passed to docker or skopeo.
    for name in ["demo.tar.gz", "demo.tar.zst", "demo.oci", "./demo"] {
        let stderr = error_of(&place, &["rootfs", name, "other.ext4"]);
        assert_eq!(stderr, format!("pigeon: there is no {name}\n"));
    }
    fs::remove_file(place.path("skopeo")).unwrap();
    let alone = place.0.path().to_str().unwrap();
    let (_, stderr, code) = pigeon_with(&place, alone, &["rootfs", "demo:1", "other.ext4"]);
    assert!(
        stderr.contains("docker save demo:1 --output image.tar"),
        "{stderr}"
    );
    assert_eq!(code, 125);
}

#[test]
fn an_archive_may_come_on_standard_input() {
    let place = Place::new();
    let source = place.write(
        "a.tar",
        docker_save(&[Tar::new().file("x", "").bytes()], &json!({}), "a"),
    );
    let status = Command::new(env!("CARGO_BIN_EXE_pigeon"))
        .args(["rootfs", "-", "a.ext4", "64M"])
        .current_dir(place.0.path())
        .stdin(fs::File::open(source).unwrap())
        .stdout(Stdio::null())
        .status();
    assert!(status.unwrap().success());
    assert_eq!(fs::metadata(place.path("a.ext4")).unwrap().len(), 64 << 20);
}

#[test]
fn a_configuration_that_a_source_without_one_keeps_is_named() {
    let place = Place::new();
    place.write("a.tar", Tar::new().file("x", "").bytes());
    let made = || pigeon(&place, &["rootfs", "--force", "a.tar", "a.ext4"]).0;
    let none = "no command is configured: pigeon run a.ext4 COMMAND...\n";
    assert!(made().ends_with(none));
    place.write("a.run.json", r#"{"ImageConfig": {"Cmd": ["/x"]}}"#);
    let out = made();
    assert!(out.ends_with("\na.run.json is kept\n"), "{out}");
}

#[test]
fn what_squashfs_tools_complain_about_is_shown() {
    let place = Place::new();
    place.write("a.tar", Tar::new().file("x", "").bytes());
    let sqfstar = pigeon::assets::tool("sqfstar").unwrap();
    let script = format!("echo odd >&2\nexec {} \"$@\"\n", sqfstar.display());
    program(&place, "sqfstar", &script);
    let words = ["rootfs", "--format", "squashfs", "a.tar", "a.squashfs"];
    let (_, stderr, code) = pigeon(&place, &words);
    assert_eq!((stderr.as_str(), code), ("sqfstar: odd\n", 0));
}

#[test]
fn an_image_that_appears_during_a_build_is_kept() {
    let place = Place::new();
    let config = json!({"config": {"Cmd": ["/x"]}});
    let archive = docker_save(&[Tar::new().bytes()], &config, "a");
    let mut rootfs = Command::new(env!("CARGO_BIN_EXE_pigeon"))
        .args(["rootfs", "-", "a.ext4"])
        .current_dir(place.0.path())
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let files = || fs::read_dir(place.0.path()).unwrap().count();
    while files() == 0 {
        thread::sleep(Duration::from_millis(1));
    }
    place.write("a.ext4", "another's");
    rootfs.stdin.take().unwrap().write_all(&archive).unwrap();
    let output = rootfs.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    let stderr = String::from_utf8(output.stderr).unwrap();
    let expected = "pigeon: a.ext4 exists already; --force overwrites it\n";
    assert_eq!(stderr, expected);
    assert_eq!(fs::read(place.path("a.ext4")).unwrap(), b"another's");
    assert_eq!(files(), 1);
}

#[test]
fn a_signal_during_an_image_build_leaves_no_files_behind() {
    let place = Place::new();
    // With nohup(1), SIGHUP does not terminate it.
    let mut rootfs = Command::new("nohup")
        .args([env!("CARGO_BIN_EXE_pigeon"), "rootfs", "-", "a.ext4"])
        .current_dir(place.0.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    // Kept open: `wait` would close it.
    let _input = rootfs.stdin.take();
    let left = || fs::read_dir(place.0.path()).unwrap().count();
    while left() == 0 {
        assert!(rootfs.try_wait().unwrap().is_none());
        thread::sleep(Duration::from_millis(1));
    }
    kill_process(Pid::from_child(&rootfs), Signal::HUP).unwrap();
    thread::sleep(Duration::from_millis(200));
    assert!(rootfs.try_wait().unwrap().is_none());
    kill_process(Pid::from_child(&rootfs), Signal::TERM).unwrap();
    assert_eq!(rootfs.wait().unwrap().signal(), Some(15));
    assert_eq!(left(), 0);
}

#[test]
fn unreadable_files_keep_their_owners_without_root() {
    let place = Place::new();
    let entry = |tar: Tar, name: &[u8], mode| {
        tar.entry(tar::EntryType::Regular, name, b"", (0, 42), mode, b"secret")
    };
    let tar = Tar::new().dir("etc/", 0o000, (0, 0)).xattr(
        "security.capability",
        b"\x01\0\0\x02\x0a\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
    );
    let tar = entry(entry(tar, b"etc/shadow", 0o000), b"etc/drop", 0o200);
    place.write("a.tar", tar.bytes());
    fs::set_permissions(place.0.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_pigeon"));
    command
        .args(["rootfs", "a.tar", "a.ext4"])
        .current_dir(place.0.path());
    if rustix::process::geteuid().is_root() {
        command.uid(65_534).gid(65_534);
    }
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let image = place.path("a.ext4");
    common::check(&image);
    assert_eq!(owner(&image, "/etc"), "0000 0 0");
    assert_eq!(owner(&image, "/etc/shadow"), "0000 0 42");
    assert_eq!(owner(&image, "/etc/drop"), "0200 0 42");
    assert_eq!(common::debugfs(&image, "cat /etc/drop"), "secret");
    let stat = common::debugfs(&image, "stat /etc/shadow");
    assert!(stat.contains("security.capability (20)"), "{stat}");
}

#[test]
fn a_closed_pipe_is_not_a_panic() {
    let place = Place::new();
    let full = format!(
        "{} completions bash | true; {0} ps --json 2>&1 | true",
        env!("CARGO_BIN_EXE_pigeon")
    );
    let output = Command::new("bash")
        .args([
            "-c",
            &format!("for n in 1 2 3 4 5; do {full}; done; echo ${{PIPESTATUS[0]}}"),
        ])
        .env("XDG_RUNTIME_DIR", place.0.path())
        .env("XDG_STATE_HOME", place.0.path())
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    // A pipe that is closed before the first byte.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = Command::new(env!("CARGO_BIN_EXE_pigeon"));
    let output = command
        .args(["completions", "bash"])
        .stdout(writer)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(141));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

#[test]
fn shells_complete_and_the_manual_has_every_command() {
    let place = Place::new();
    for shell in ["bash", "zsh", "fish"] {
        let (script, stderr, code) = pigeon(&place, &["completions", shell]);
        assert_eq!(code, 0, "{stderr}");
        assert!(
            script.contains("rootfs") && script.contains("stop-timeout"),
            "{shell}"
        );
        if pigeon::assets::tool(shell).is_ok() {
            let path = place.write(shell, &script);
            let checked = Command::new(shell).arg("-n").arg(path).output().unwrap();
            assert!(checked.status.success(), "{checked:?}");
        }
    }
    let (page, _, code) = pigeon(&place, &["man"]);
    assert_eq!(code, 0);
    for command in [
        "run", "exec", "logs", "rootfs", "forward", "start", "restart", "kill",
    ] {
        assert!(page.contains(&format!("pigeon\\-{command}")), "{command}");
        let (page, _, code) = pigeon(&place, &["man", command]);
        assert_eq!(code, 0);
        assert!(page.starts_with(".ie"), "{page}");
    }
    assert!(error_of(&place, &["man", "nosuch"]).contains("there is no command nosuch"));
}

#[test]
fn progress_is_shown_on_a_terminal_only() {
    let place = Place::new();
    place.write("a.tar", Tar::new().file("x", vec![1; 300_000]).bytes());
    let script = format!(
        "(cat a.tar; sleep 1.2; cat a.tar; sleep 0.5) | {} rootfs -f - a.ext4",
        env!("CARGO_BIN_EXE_pigeon")
    );
    let shell = || {
        let mut shell = Command::new("sh");
        shell.args(["-c", &script]).current_dir(place.0.path());
        shell
    };
    let mut terminal = pty::Terminal::spawn(shell(), (80, 24));
    terminal.expect("reading standard input");
    assert!(terminal.wait().success(), "{}", terminal.shown());
    let output = shell().output().unwrap();
    assert!(output.status.success());
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

#[test]
fn table_titles_are_bold_only_on_a_terminal_with_colours() {
    let place = Place::new();
    let command = |no_color: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pigeon"));
        command
            .arg("ps")
            .env("XDG_RUNTIME_DIR", place.0.path())
            .env("XDG_STATE_HOME", place.0.path())
            .env("NO_COLOR", no_color);
        command
    };
    // An empty value is ignored (no-color.org).
    for (value, is_bold) in [("", true), ("1", false)] {
        let mut terminal = pty::Terminal::spawn(command(value), (80, 24));
        terminal.expect("IMAGE");
        assert!(terminal.wait().success());
        assert_eq!(terminal.shown().contains('\x1b'), is_bold, "{value:?}");
    }
    let piped = command("").output().unwrap().stdout;
    assert!(!piped.contains(&b'\x1b') && piped.starts_with(b"NAME"));
}

#[test]
fn architectures_also_have_debians_and_dockers_names() {
    let place = Place::new();
    write_image(&place);
    for (name, platform) in [("arm64", "linux/arm64"), ("amd64", "linux/amd64")] {
        let document = json!({"ImageConfig": {"Cmd": ["x"]}, "Platform": platform});
        place.write("app.run.json", document.to_string());
        let (out, stderr, code) = pigeon(&place, &["run", "--dry-run", "--arch", name, "app.ext4"]);
        assert_eq!((stderr.as_str(), code), ("", 0));
        assert!(out.contains(platform), "{out}");
        let other = ["arm64", "amd64"].into_iter().find(|other| *other != name);
        let stderr = error_of(
            &place,
            &["run", "--dry-run", "--arch", other.unwrap(), "app.ext4"],
        );
        assert!(
            stderr.contains(&format!("the image is for {platform}")),
            "{stderr}"
        );
    }
}
