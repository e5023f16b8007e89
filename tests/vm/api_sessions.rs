//! Sessions: `GET /v1/ws/exec` with a simple client that sees every frame.

use std::{
    io::Write,
    os::unix::net::UnixStream,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use pigeon_lab::{
    Vm,
    disk::{Image, Tree},
    guest,
    http::Client,
    vsock::API_PORT,
    ws::{self, BINARY, CONTINUATION, Ended, Frame, LAST, PING, PONG, Socket, TEXT},
};
use serde_json::{Value, json};

/// Long, as other VMs may run at the same time.
const TIMEOUT: Duration = Duration::from_secs(180);

/// A VM whose workload sleeps forever.
fn boot() -> Result<(Vm, Image)> {
    let root = Image::ext4(&Tree::busybox()?, 48)?;
    let config = json!({
        "ExecOverride": ["/bin/sleep", "100000"],
        "UserOverride": "app",
        "ExtraEnv": {"FROM_CONFIG": "yes", "OTHER": "workload"},
    });
    let mut vm = Vm::builder()
        .config(&config)
        .disk(&root)
        .timeout(TIMEOUT)
        .start()?;
    vm.connect(API_PORT)?;
    Ok((vm, root))
}

/// A session whose first message was sent.
fn session(vm: &mut Vm, first: &Value) -> Result<Socket> {
    let mut socket = Socket::open(vm.connect(API_PORT)?, "/v1/ws/exec")?;
    socket.text(first)?;
    Ok(socket)
}

/// A session of a shell script without a terminal.
fn script(vm: &mut Vm, script: &str) -> Result<Socket> {
    session(
        vm,
        &json!({"command": ["/bin/sh", "-c", script], "tty": false}),
    )
}

/// A session of an interactive shell.
fn terminal(vm: &mut Vm, first: &Value) -> Result<Socket> {
    let mut message = json!({"command": ["/bin/sh"], "tty": true, "env": ["PS1=pigeon> "]});
    let members = first.as_object().into_iter().flatten();
    members.for_each(|(name, value)| message[name] = value.clone());
    let mut socket = session(vm, &message)?;
    socket.output_with("pigeon> ")?;
    Ok(socket)
}

/// The result of a session whose command was started.
fn exit(code: Value, signal: Value, output: &str) -> Ended {
    Ended {
        output: output.into(),
        message: Some(json!({"Exit": {"code": code, "signal": signal}})),
        close: Some(1000),
    }
}

/// The output of a shell command, by `/v1/exec`.
fn shell(api: &mut Client<UnixStream>, script: &str) -> Result<String> {
    let response = api.post("/v1/exec", &json!({"cmd": ["/bin/sh", "-c", script]}))?;
    let response = response.success()?.json()?;
    Ok(response["stdout"].as_str().unwrap_or_default().into())
}

/// Waits until a shell command in the guest prints something that satisfies `wanted`.
fn wait_until(
    api: &mut Client<UnixStream>,
    command: &str,
    mut wanted: impl FnMut(&str) -> bool,
) -> Result<()> {
    let start = Instant::now();
    loop {
        let output = shell(api, command)?;
        if wanted(&output) {
            return Ok(());
        }
        ensure!(start.elapsed() < TIMEOUT, "{command} still says {output}");
        thread::sleep(Duration::from_millis(100));
    }
}

/// Waits until no process has this command line.
fn wait_gone(api: &mut Client<UnixStream>, pattern: &str) -> Result<()> {
    wait_until(
        api,
        &format!("ps -o args | grep -E '{pattern}'"),
        str::is_empty,
    )
}

/// PID 1's memory in KiB.
fn memory(api: &mut Client<UnixStream>) -> Result<u64> {
    let out = shell(api, "awk '/^Pss:/ {print $2}' /proc/1/smaps_rollup")?;
    Ok(out.trim_end().parse()?)
}

#[test]
fn without_a_terminal_output_comes_first_then_the_exit_then_the_close() -> Result<()> {
    let (mut vm, _root) = boot()?;
    let vm = &mut vm;

    let merged = script(vm, "echo out; echo err >&2; echo out again; exit 5")?.wait_end()?;
    assert_eq!(merged, exit(json!(5), Value::Null, "out\nerr\nout again\n"));
    let killed = script(vm, "echo before; kill -KILL $$")?.wait_end()?;
    assert_eq!(killed, exit(Value::Null, json!(9), "before\n"));
    let told = json!({
        "command": ["sh", "-c", "id; pwd; echo $FROM_CONFIG $OTHER $TERM; test -t 1 || echo no terminal"],
        "env": ["OTHER=told"], "cwd": "/tmp", "user": "app:staff", "unknown": {"x": []},
    });
    assert_eq!(
        session(vm, &told)?.wait_end()?,
        exit(
            json!(0),
            Value::Null,
            "uid=1000(app) gid=50(staff) groups=50(staff)\n/tmp\nyes told\nno terminal\n"
        )
    );

    // Standard input and its end.
    let mut cat = session(vm, &json!({"command": ["cat"]}))?;
    cat.binary(b"one ")?;
    assert_eq!(cat.output_with("one ")?, "one ");
    cat.binary(b"")?;
    cat.binary(b"two\0\xff")?;
    cat.text(&json!({"stdin": "eof"}))?;
    let two = cat.wait_end()?;
    assert_eq!(
        (two.output.as_slice(), two.close),
        (&b"two\0\xff"[..], Some(1000))
    );
    let mut none = session(vm, &json!({"command": ["wc", "-c"]}))?;
    none.text(&json!({"stdin": "eof"}))?;
    // Input after the end, and a size without a terminal, are ignored.
    none.binary(b"late")?;
    none.text(&json!({"cols": 80, "rows": 25}))?;
    none.text(&json!({"stdin": "eof"}))?;
    assert_eq!(none.wait_end()?, exit(json!(0), Value::Null, "0\n"));
    // Input that is not read.
    let mut closed = script(vm, "exec <&-; echo closed; sleep 1; echo end")?;
    closed.output_with("closed\n")?;
    closed.binary(&[b'x'; 100_000])?;
    closed.binary(b"more")?;
    assert_eq!(closed.wait_end()?, exit(json!(0), Value::Null, "end\n"));

    // A grandchild that keeps the output open does not keep the session open.
    let left = script(vm, "(sleep 8881; echo never) & echo started")?.wait_end()?;
    assert_eq!(left, exit(json!(0), Value::Null, "started\n"));

    // A lot of output arrives completely, before the exit status.
    let seq: String = (1..=1_000_000)
        .map(|number| format!("{number}\n"))
        .collect();
    let all = session(vm, &json!({"command": ["seq", "1", "1000000"]}))?.wait_end()?;
    assert_eq!(all.output.len(), seq.len());
    assert!(all == exit(json!(0), Value::Null, &seq));
    Ok(())
}

#[test]
fn eight_mebibytes_through_cat_come_back_unchanged() -> Result<()> {
    const SIZE: usize = 8 << 20;
    // One thread sends and receives, and is at most this many bytes ahead.
    const AHEAD: usize = 192 << 10;
    let (mut vm, _root) = boot()?;
    let mut random = 1u32;
    let bytes: Vec<u8> = (0..SIZE)
        .map(|_| {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (random >> 24) as u8
        })
        .collect();
    let mut cat = session(&mut vm, &json!({"command": ["cat"], "tty": false}))?;
    let (mut sent, mut size, mut back) = (0, 1, vec![]);
    while back.len() < SIZE {
        // Messages of various sizes up to the maximum.
        while sent < SIZE && sent - back.len() < AHEAD {
            let message = &bytes[sent..SIZE.min(sent + size)];
            cat.binary(message)?;
            sent += message.len();
            size = (size * 3 + 1) % ((128 << 10) + 1);
        }
        back.extend(cat.output_until(|output| !output.is_empty())?);
    }
    assert!(back == bytes, "not what was sent");
    cat.text(&json!({"stdin": "eof"}))?;
    assert_eq!(cat.wait_end()?, exit(json!(0), Value::Null, ""));
    Ok(())
}

#[test]
fn bulk_data_in_both_directions_does_not_stall_a_session() -> Result<()> {
    const MESSAGE: usize = 50_000;
    const MESSAGES: usize = 80;
    for cpus in [1, 2] {
        let root = Image::ext4(&Tree::busybox()?, 48)?;
        let mut vm = Vm::builder()
            .config(&json!({"ExecOverride": ["/bin/sleep", "100000"]}))
            .disk(&root)
            .cpus(cpus)
            .timeout(TIMEOUT)
            .start()?;
        for _ in 0..3 {
            let mut cat = session(&mut vm, &json!({"command": ["cat"]}))?;
            let mut sender = cat.sender()?;
            // The sender is only limited by the connection.
            let sent = thread::spawn(move || -> Result<()> {
                for number in 0..MESSAGES {
                    sender.binary(&vec![number as u8; MESSAGE])?;
                }
                sender.text(&json!({"stdin": "eof"}))
            });
            let end = cat.wait_end()?;
            sent.join().expect("no panic")?;
            let expected: Vec<u8> = (0..MESSAGES * MESSAGE)
                .map(|at| (at / MESSAGE) as u8)
                .collect();
            assert!(end.output == expected, "{} bytes", end.output.len());
            assert_eq!(end.close, Some(1000), "{:?}", end.message);
        }
    }
    Ok(())
}

#[test]
fn a_terminal_behaves_like_a_terminal() -> Result<()> {
    let (mut vm, _root) = boot()?;
    let vm = &mut vm;

    let mut shell = terminal(vm, &json!({"cols": 100, "rows": 37}))?;
    let mut ask = |question: &str, response: &str| -> Result<String> {
        shell.binary(format!("{question}\n").as_bytes())?;
        shell.output_with(response)?;
        shell.output_with("pigeon> ")
    };
    ask("stty size", "37 100\r\n")?;
    ask(
        "echo TERM is $TERM, $FROM_CONFIG",
        "TERM is xterm-256color, yes\r\n",
    )?;
    ask(
        "test -t 0 && test -t 1 && test -t 2 && echo thr''ee",
        "three\r\n",
    )?;
    ask("echo controlling >/dev/tty", "controlling\r\n")?;
    // A session of its own, whose leader is the shell: its pid is the session's ID.
    ask(
        "set -- $(cat /proc/$$/stat); test $1 = $6 && test $7 != 0 && echo lea''der",
        "leader\r\n",
    )?;
    Ok(())
}

#[test]
fn a_terminal_is_resized_interrupted_and_ended() -> Result<()> {
    let (mut vm, _root) = boot()?;
    let vm = &mut vm;
    let mut api = vm.api()?;

    // A resize applies to the terminal, and its foreground group gets SIGWINCH.
    let watch = "trap 'stty size' WINCH; stty size; while :; do sleep 0.1; done";
    let first = json!({"command": ["sh", "-c", watch], "tty": true, "cols": 80, "rows": 24});
    let mut watcher = session(vm, &first)?;
    watcher.output_with("24 80\r\n")?;
    watcher.text(&json!({"cols": 132, "rows": 50}))?;
    watcher.output_with("50 132\r\n")?;
    watcher.text(&json!({"rows": 51, "cols": 133}))?;
    watcher.output_with("51 133\r\n")?;
    // Ctrl-C kills the foreground process.
    watcher.binary(b"\x03")?;
    let end = watcher.wait_end()?;
    assert_eq!(
        end.message,
        Some(json!({"Exit": {"code": null, "signal": 2}}))
    );
    // The terminal hangs up when its leader exits, before or after it has echoed the key.
    assert_eq!(end.close, Some(1000));
    assert!(["", "^C"].contains(&end.text().as_str()));

    // In an interactive shell only its command; the shell reports the exit status.
    let mut shell = terminal(vm, &json!({}))?;
    shell.binary(b"sleep 8882\n")?;
    wait_until(&mut api, "ps -o args | grep -E '^sleep 8882'", |out| {
        !out.is_empty()
    })?;
    shell.binary(b"\x03")?;
    shell.output_with("pigeon> ")?;
    shell.binary(b"echo status $?\n")?;
    // In one call: both may arrive in one message.
    shell.output_with("status 130\r\npigeon> ")?;
    shell.binary(b"exit 42\n")?;
    let end = shell.wait_end()?;
    assert_eq!(
        end.message,
        Some(json!({"Exit": {"code": 42, "signal": null}}))
    );
    assert_eq!(end.close, Some(1000));

    // The end of input is sent as the terminal's key for it.
    let mut cat = session(vm, &json!({"command": ["cat"], "tty": true}))?;
    cat.binary(b"line\n")?;
    cat.output_with("line\r\nline\r\n")?;
    cat.text(&json!({"stdin": "eof"}))?;
    assert_eq!(cat.wait_end()?, exit(json!(0), Value::Null, ""));
    // After an unfinished line, too.
    let mut cat = session(vm, &json!({"command": ["cat"], "tty": true}))?;
    cat.binary(b"word")?;
    cat.text(&json!({"stdin": "eof"}))?;
    assert_eq!(cat.wait_end()?, exit(json!(0), Value::Null, "wordword"));

    // All output of a terminal comes before its end, too.
    let seq = "seq 1 2000; seq 2001 100000 | cat"; // line by line, and in large pieces
    let all = session(vm, &json!({"command": ["sh", "-c", seq], "tty": true}))?.wait_end()?;
    let seq: String = (1..=100_000)
        .map(|number| format!("{number}\r\n"))
        .collect();
    assert_eq!(all.output.len(), seq.len());
    assert!(all == exit(json!(0), Value::Null, &seq));
    Ok(())
}

#[test]
fn a_terminal_lives_as_long_as_its_command() -> Result<()> {
    let (mut vm, _root) = boot()?;
    let terminal = |script: &str| json!({"command": ["sh", "-c", script], "tty": true});
    let away = terminal("exec >/tmp/l 2>&1 </dev/null; sleep 1; exit 4");
    let end = session(&mut vm, &away)?.wait_end()?;
    assert_eq!(end, exit(json!(4), Value::Null, ""));
    // The command closes the terminal, and opens it again.
    let back = terminal(
        "tty=$(tty); exec </dev/null >/dev/null 2>&1; sleep 1
        exec <$tty >$tty 2>&1; echo back; read -r line; echo $line; exit 5",
    );
    let mut back = session(&mut vm, &back)?;
    back.output_with("back\r\n")?;
    back.binary(b"typed\n")?;
    let end = back.wait_end()?;
    assert_eq!(end, exit(json!(5), Value::Null, "typed\r\ntyped\r\n"));
    Ok(())
}

#[test]
fn a_shell_forwards_the_hang_up_to_its_jobs() -> Result<()> {
    let (mut vm, _root) = boot()?;
    let mut api = vm.api()?;
    // As bash does: its jobs have their own process groups, which only the shell knows.
    let script = "set -m; trap 'kill %1; exit' HUP; sleep 6664 & wait";
    let first = json!({"command": ["sh", "-c", script], "tty": true});
    let socket = session(&mut vm, &first)?;
    let job = "ps -o pid,pgid,args | awk '$3 == \"sleep\" && $4 == \"6664\" && $1 == $2'";
    wait_until(&mut api, job, |out| !out.is_empty())?;
    drop(socket);
    wait_gone(&mut api, "^sleep 6664")
}

#[test]
fn the_end_of_input_waits_for_a_full_terminal() -> Result<()> {
    const LINES: usize = 8000;
    let (mut vm, _root) = boot()?;
    let mut api = vm.api()?;
    let script = "stty -echo; echo up; while [ ! -e /run/go ]; do sleep 0.1; done; wc -l; exit 6";
    let first = json!({"command": ["sh", "-c", script], "tty": true});
    let mut full = session(&mut vm, &first)?;
    full.output_with("up\r\n")?;
    // More than a terminal holds unread: 4 KiB, and 64 KiB in its buffer.
    full.binary(&b"a line of input\n".repeat(LINES))?;
    full.text(&json!({"stdin": "eof"}))?;
    // Time for all of it to be transferred as far as possible.
    thread::sleep(Duration::from_secs(1));
    shell(&mut api, "touch /run/go")?;
    let end = full.wait_end()?;
    assert_eq!(end, exit(json!(6), Value::Null, &format!("{LINES}\r\n")));
    Ok(())
}

#[test]
fn what_cannot_be_started_is_an_error_and_a_close_of_1011() -> Result<()> {
    let (mut vm, _root) = boot()?;
    for (first, word) in [
        (json!({"command": ["no-such-command"]}), "no-such-command"),
        (
            json!({"command": ["no-such-command"], "tty": true}),
            "no-such-command",
        ),
        (json!({"command": ["/etc/passwd"]}), "EACCES"),
        (json!({"command": ["id"], "user": "nosuch"}), "nosuch"),
        (
            json!({"command": ["id"], "cwd": "/etc/passwd"}),
            "/etc/passwd",
        ),
        (json!({"command": []}), "command"),
        (json!({"command": [""]}), "command"),
        (json!({"command": "id"}), "command"),
        (json!({"cmd": ["id"]}), "command"),
        (json!({"command": ["id"], "tty": "yes"}), "tty"),
        (
            json!({"command": ["id"], "tty": true, "cols": 70000}),
            "cols",
        ),
        (json!([]), ""),
    ] {
        let end = session(&mut vm, &first)?.wait_end()?;
        let message = end.message.clone().unwrap_or_default();
        let message = message["Error"]["message"]
            .as_str()
            .unwrap_or_else(|| panic!("{first}"));
        assert!(message.contains(word), "{first}: {message}");
        assert_eq!(
            (end.close, end.text().as_str()),
            (Some(1011), ""),
            "{first}"
        );
    }
    for (first, payload) in [
        (TEXT, &b"{\"command\":[\"id\"]"[..]),
        (TEXT, b""),
        (BINARY, b"ls"),
    ] {
        let mut socket = Socket::open(vm.connect(API_PORT)?, "/v1/ws/exec")?;
        socket.send(first, payload)?;
        let end = socket.wait_end()?;
        assert!(end.message.unwrap_or_default()["Error"]["message"].is_string());
        assert_eq!(end.close, Some(1011));
    }
    Ok(())
}

#[test]
fn fragments_with_pings_between_are_joined_and_a_close_kills_the_group() -> Result<()> {
    let (mut vm, _root) = boot()?;
    let mut api = vm.api()?;

    // Everything including the handshake in one write; then byte by byte.
    let message = br#"{"command":["cat"]}"#;
    let mut frames = [
        ws::frame(TEXT & !LAST, &message[..5]),
        ws::frame(PING, b"between"),
        ws::frame(CONTINUATION, b""),
        ws::frame(PONG, b"unasked"),
        ws::frame(CONTINUATION | LAST, &message[5..]),
        ws::frame(BINARY & !LAST, b"in "),
        ws::frame(CONTINUATION, b"three "),
        ws::frame(PING, &[7; 125]),
        ws::frame(CONTINUATION | LAST, b"parts"),
    ]
    .concat();
    for at_once in [true, false] {
        let mut stream = vm.connect(API_PORT)?;
        let mut request = String::from("GET /v1/ws/exec HTTP/1.1\r\nHost: x\r\n");
        for (name, value) in ws::handshake() {
            request += &format!("{name}: {value}\r\n");
        }
        let all = [request.as_bytes(), b"\r\n", &frames].concat();
        let size = if at_once { all.len() } else { 1 };
        all.chunks(size)
            .try_for_each(|piece| stream.write_all(piece))?;
        let mut response = Client::new(stream);
        assert_eq!(response.receive(true)?.status, 101);
        let (mut stream, mut bytes) = response.into_stream();
        while !bytes.ends_with(b"parts") {
            let mut buffer = [0; 4096];
            let count = std::io::Read::read(&mut stream, &mut buffer)?;
            ensure!(count > 0, "closed after {bytes:?}");
            bytes.extend(&buffer[..count]);
        }
        // The pongs are in order.
        let between = bytes
            .windows(9)
            .position(|part| part == b"\x8a\x07between")
            .unwrap();
        let long = [&[0x8a, 125][..], &[7; 125]].concat();
        let long = bytes.windows(127).position(|part| part == long).unwrap();
        assert!(between < long);
    }
    // One message in thousands of fragments.
    frames = ws::frame(TEXT & !LAST, b"{\"command\":[\"cat\"]");
    (0..2000).for_each(|_| frames.extend(ws::frame(CONTINUATION, b"")));
    frames.extend(ws::frame(CONTINUATION | LAST, b"}"));
    let mut socket = Socket::open(vm.connect(API_PORT)?, "/v1/ws/exec")?;
    socket.send_raw(&frames)?;
    socket.binary(b"works")?;
    socket.output_with("works")?;

    // Close frames: the reply has the same code, and the process group is killed.
    for (number, (payload, code)) in [
        (&b""[..], None),
        (b"\x03\xe8", Some(1000)),
        (b"\x03\xe9going away", Some(1001)),
        (b"\x0f\xa0", Some(4000)),
    ]
    .into_iter()
    .enumerate()
    {
        let [child, parent] = [format!("sleep 50{number}1"), format!("sleep 50{number}2")];
        let mut socket = script(&mut vm, &format!("{child} & {parent}; true"))?;
        wait_until(
            &mut api,
            &format!("ps -o args | grep -E '^{child}|^{parent}'"),
            |out| out.lines().count() == 2,
        )?;
        socket.send(ws::CLOSE, payload)?;
        let end = socket.wait_end()?;
        assert_eq!((end.message, end.close), (None, code));
        wait_gone(&mut api, &format!("^sleep 50{number}[12]"))?;
    }
    // The group of a terminal, too, and without a close frame.
    for tty in [false, true] {
        let command = "sleep 6661 & sleep 6662; true";
        let first = json!({"command": ["sh", "-c", command], "tty": tty});
        let socket = session(&mut vm, &first)?;
        wait_until(&mut api, "ps -o args | grep -E '^sleep 666[12]'", |out| {
            out.lines().count() == 2
        })?;
        drop(socket);
        wait_gone(&mut api, "^sleep 666[12]")?;
    }
    // Invalid messages of a running session.
    for (message, wrong) in [
        ("{", "JSON"),
        ("[]", "object"),
        ("input, as if it was binary", "JSON"),
        (r#"{"cols":"wide"}"#, "cols: must be"),
    ] {
        let mut socket = script(&mut vm, "sleep 6663")?;
        socket.send(TEXT, message.as_bytes())?;
        // The reason names the error.
        let (code, reason) = socket.wait_close()?;
        assert_eq!(code, 1008, "{message}: {reason}");
        assert!(reason.contains(wrong), "{message}: {reason}");
        wait_gone(&mut api, "^sleep 6663")?;
    }
    Ok(())
}

#[test]
fn a_client_that_does_not_read_blocks_only_its_command() -> Result<()> {
    let (mut vm, _root) = boot()?;
    let mut api = vm.api()?;
    let before = memory(&mut api)?;
    for tty in [false, true] {
        // In large pieces: to a terminal, `yes` writes each line by itself.
        let first = json!({"command": ["sh", "-c", "yes no-reader | cat"], "tty": tty});
        let mut stuck = session(&mut vm, &first)?;
        // What `cat` has written stops growing.
        let written = "awk '/^wchar/ {print $2}' /proc/$(pidof cat)/io";
        let mut last = String::new();
        wait_until(&mut api, &format!("{written}; sleep 1"), |now| {
            let same = !now.trim().is_empty() && now == last;
            last = now.into();
            same
        })?;
        // Everybody else is served.
        assert_eq!(api.get("/v1/status")?.status, 200);
        let other = session(&mut vm, &json!({"command": ["echo", "other"]}))?.wait_end()?;
        assert_eq!(other, exit(json!(0), Value::Null, "other\n"));
        let during = memory(&mut api)?;
        assert!(during < before + 600, "from {before} to {during} KiB");
        // It goes on when it is read on, with nothing lost.
        let some = stuck.output_until(|output| output.len() > 4 << 20)?;
        let line = if tty {
            &b"no-reader\r\n"[..]
        } else {
            b"no-reader\n"
        };
        let right = some.chunks(line.len()).all(|part| line.starts_with(part));
        assert!(right, "not the same line over and over");
        // It is stopped again, and a close is heard all the same.
        stuck.close(1000)?;
        wait_gone(&mut api, "^yes")?;
        assert_eq!(stuck.wait_end()?.close, Some(1000));
    }
    Ok(())
}

#[test]
fn a_command_that_does_not_read_blocks_only_its_client() -> Result<()> {
    let (mut vm, _root) = boot()?;
    let mut api = vm.api()?;
    let before = memory(&mut api)?;
    for tty in [false, true] {
        let first = json!({"command": ["sleep", "7100"], "tty": tty});
        let mut stuck = session(&mut vm, &first)?;
        stuck
            .stream()
            .set_write_timeout(Some(Duration::from_secs(3)))?;
        // Lines, as a terminal buffers only those that fit.
        let message = b"a line of input\n".repeat(2048);
        let sent = (0..2000)
            .take_while(|_| stuck.binary(&message).is_ok())
            .count();
        assert!(sent < 200, "{sent} messages of 32 KiB were accepted");
        assert_eq!(api.get("/v1/status")?.status, 200);
        let other = session(&mut vm, &json!({"command": ["echo", "other"]}))?.wait_end()?;
        assert_eq!(other, exit(json!(0), Value::Null, "other\n"));
        let during = memory(&mut api)?;
        assert!(during < before + 600, "from {before} to {during} KiB");
        // When the command exits, unread input is discarded, and the exit status is reported.
        shell(
            &mut api,
            "kill $(ps -o pid,args | awk '$2 == \"sleep\" {print $1}')",
        )?;
        let end = stuck.wait_end()?;
        assert_eq!(
            end.message,
            Some(json!({"Exit": {"code": null, "signal": 15}}))
        );
    }
    Ok(())
}

#[test]
fn a_client_that_reads_late_still_gets_all_output_the_exit_and_the_close() -> Result<()> {
    let (mut vm, _root) = boot()?;
    let mut api = vm.api()?;
    // Sizes around those of the buffers: for some of them the exit status itself has to wait.
    let sizes: Vec<usize> = (0..12)
        .map(|step| (128 << 10) + step * (40 << 10))
        .collect();
    let sockets: Vec<_> = sizes
        .iter()
        .map(|size| script(&mut vm, &format!("head -c {size} /dev/zero")))
        .collect::<Result<_>>()?;
    // Commands whose output fits have exited by now, longer ago than any grace period.
    wait_until(&mut api, "sleep 3", |_| true)?;
    for (size, mut socket) in sizes.into_iter().zip(sockets) {
        let end = socket.wait_end()?;
        assert_eq!(end.output.len(), size);
        assert_eq!(
            end.message,
            Some(json!({"Exit": {"code": 0, "signal": null}})),
            "{size}"
        );
        assert_eq!(end.close, Some(1000), "{size}");
    }
    Ok(())
}

#[test]
fn sessions_end_with_the_workload() -> Result<()> {
    let (mut vm, root) = boot()?;
    let mut socket = script(&mut vm, "echo here; exec sleep 7200")?;
    socket.output_with("here\n")?;
    let mut api = vm.api()?;
    api.post("/v1/signals", &json!({"signal": 15}))?.success()?;
    assert_eq!(api.get("/v1/exit_code")?.json()?["code"], 143);
    let end = socket.wait_end()?;
    assert_eq!(end.output, b"");
    assert!(matches!(end.close, None | Some(1001)), "{end:?}");
    vm.wait_end()?;
    root.check()
}

#[test]
fn nothing_is_sent_after_an_unanswered_close_frame() -> Result<()> {
    let (mut vm, _root) = boot()?;
    let mut socket = script(&mut vm, "exit 3")?;
    let mut frames = vec![];
    let mut stop = Some(());
    while let Some(frame) = socket.next_frame()? {
        frames.push(frame.first);
        if frame.first == ws::CLOSE && stop.take().is_some() {
            vm.stop()?;
        }
    }
    assert_eq!(frames, [TEXT, ws::CLOSE]);
    Ok(())
}

#[test]
fn a_late_ping_or_pong_after_the_exit_is_not_an_error() -> Result<()> {
    let (mut vm, _root) = boot()?;
    let mut socket = script(&mut vm, "echo x")?;
    let mut frames = vec![];
    while let Some(frame) = socket.next_frame()? {
        let Frame { first, payload } = frame;
        if first == ws::CLOSE {
            assert_eq!(payload, 1000u16.to_be_bytes());
            // These could have been sent before the client received the close frame.
            socket.send(PONG, b"")?;
            socket.binary(b"late input")?;
            socket.close(1000)?;
        }
        frames.push(first);
    }
    assert_eq!(frames, [BINARY, TEXT, ws::CLOSE]);
    assert_eq!(vm.api()?.get("/v1/status")?.status, 200);
    Ok(())
}

#[test]
fn a_command_can_open_its_output_by_name() -> Result<()> {
    const SCRIPT: &str = "echo out >/dev/stdout; echo err >/dev/stderr";
    let root = Image::ext4(&Tree::busybox()?, 32)?;
    let script = format!("{SCRIPT}; echo done; sleep 1000");
    let config = guest::shell(&script, json!({"UserOverride": "4242"}));
    let mut vm = Vm::builder().config(&config).disk(&root).boot()?;
    vm.wait_for("done")?;
    assert!(vm.console().contains("out\nerr\n"), "{}", vm.console());
    let body = json!({"cmd": ["sh", "-c", SCRIPT], "user": "4243"});
    let response = vm.api()?.post("/v1/exec", &body)?.json()?;
    assert_eq!(
        response,
        json!({"exit_code": 0, "exit_signal": 0, "stdout": "out\n", "stderr": "err\n"})
    );
    for tty in [false, true] {
        let body = json!({"command": ["sh", "-c", SCRIPT], "user": "4243", "tty": tty});
        let ended = session(&mut vm, &body)?.wait_end()?;
        let line = if tty { "\r\n" } else { "\n" };
        assert_eq!(
            ended,
            exit(json!(0), json!(null), &format!("out{line}err{line}"))
        );
    }
    vm.kill();
    Ok(())
}
