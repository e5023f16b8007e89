//! Sessions that outlive their connection, and sessions with separate output streams.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pigeon_lab::{
    Vm,
    disk::{Image, Tree},
    vsock::API_PORT,
    ws::Socket,
};
use serde_json::{Value, json};

/// Long, as other VMs may run at the same time.
const TIMEOUT: Duration = Duration::from_secs(180);

fn vm() -> Result<(Vm, Image)> {
    let root = Image::ext4(&Tree::busybox()?, 48)?;
    let config = json!({"ExecOverride": ["/bin/sleep", "100000"]});
    let vm = Vm::builder()
        .config(&config)
        .disk(&root)
        .timeout(TIMEOUT)
        .boot()?;
    Ok((vm, root))
}

fn open(vm: &mut Vm, first: &Value) -> Result<Socket> {
    let mut socket = Socket::open(vm.connect(API_PORT)?, "/v1/ws/exec")?;
    socket.text(first)?;
    Ok(socket)
}

fn sessions(vm: &mut Vm) -> Result<Value> {
    vm.api()?.get("/v1/sessions")?.success()?.json()
}

/// Waits until the list of sessions satisfies `wanted`.
fn wait_for(vm: &mut Vm, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
    let start = Instant::now();
    loop {
        let list = sessions(vm)?;
        if wanted(&list) {
            return Ok(list);
        }
        ensure!(start.elapsed() < TIMEOUT, "still {list}");
    }
}

#[test]
fn a_named_session_survives_its_client_and_replays_missed_output() -> Result<()> {
    let (mut vm, _root) = vm()?;
    assert_eq!(sessions(&mut vm)?, json!([]));
    let script =
        "echo one; read a; echo two $a; sleep 0.5; echo three; read b; echo four $b; exit 4";
    let command = json!({"command": ["sh", "-c", script], "id": "build-1"});
    let mut socket = open(&mut vm, &command)?;
    socket.output_with("one")?;
    let list = sessions(&mut vm)?;
    let session = &list[0];
    assert_eq!(
        (
            &session["id"],
            &session["tty"],
            &session["attached"],
            &session["exit"]
        ),
        (&json!("build-1"), &json!(false), &json!(true), &Value::Null)
    );
    assert_eq!(session["command"][0], "sh");
    assert!(session["pid"].as_u64().is_some());

    // A name is unique; another client can take the session over, and the first one is notified.
    let refused = open(&mut vm, &command)?.wait_end()?;
    assert_eq!(refused.close, Some(1011));
    let mut second = open(&mut vm, &json!({"attach": "build-1"}))?;
    assert_eq!(socket.wait_end()?.close, Some(1001));
    second.binary(b"x\n")?;
    second.output_with("two x")?;
    drop(second);
    wait_for(&mut vm, |list| list[0]["attached"] == false)?;
    std::thread::sleep(Duration::from_secs(2));

    // Output since then comes first, without what was read already.
    let mut third = open(&mut vm, &json!({"attach": "build-1"}))?;
    let missed = third.output_with("three")?;
    assert!(!missed.contains("two"), "{missed}");
    third.binary(b"y\n")?;
    let end = third.wait_end()?;
    assert_eq!(
        (end.text().contains("four y"), end.close),
        (true, Some(1000))
    );
    assert_eq!(sessions(&mut vm)?, json!([]));
    let unknown = open(&mut vm, &json!({"attach": "build-1"}))?.wait_end()?;
    assert_eq!(unknown.close, Some(1011));
    Ok(())
}

#[test]
fn missed_output_is_sent_even_if_no_more_follows() -> Result<()> {
    let (mut vm, _root) = vm()?;
    let script = "for i in $(seq 20); do echo out $i; echo error $i >&2; done; exec sleep 100000";
    let command = json!({"command": ["sh", "-c", script], "id": "quiet", "streams": true});
    drop(open(&mut vm, &command)?);
    wait_for(&mut vm, |list| {
        list[0]["attached"] == false && list[0]["pid"] != Value::Null
    })?;
    std::thread::sleep(Duration::from_secs(3));
    let mut socket = open(&mut vm, &json!({"attach": "quiet", "streams": true}))?;
    // The order is only kept within a stream.
    let output = socket.output_until(|output| {
        let text = String::from_utf8_lossy(output);
        text.contains("out 20\n") && text.contains("error 20\n")
    })?;
    let text = String::from_utf8_lossy(&output);
    for number in 1..=20 {
        assert!(text.contains(&format!("out {number}\n")), "{text:?}");
    }
    Ok(())
}

#[test]
fn an_ended_session_is_kept_and_a_running_one_can_be_deleted() -> Result<()> {
    let (mut vm, _root) = vm()?;
    let script = "until [ -e /run/go ]; do sleep 0.1; done; seq 30000; exit 9";
    let quick = json!({"command": ["sh", "-c", script], "id": "quick"});
    drop(open(&mut vm, &quick)?);
    // PID 1 then waits for events with another epoll instance.
    let mut api = vm.api()?;
    for _ in 0..1100 {
        api.get("/v1/status")?.success()?;
    }
    api.post("/v1/exec", &json!({"cmd": ["touch", "/run/go"]}))?
        .success()?;
    let list = wait_for(&mut vm, |list| list[0]["exit"] != Value::Null)?;
    assert_eq!(list[0]["exit"], json!({"code": 9, "signal": null}));
    // 168,894 bytes of output: the last 64 KiB are kept.
    let end = open(&mut vm, &json!({"attach": "quick"}))?.wait_end()?;
    let text = end.text();
    assert!(
        text.len() >= 65_536 && text.ends_with("29999\n30000\n"),
        "{}",
        text.len()
    );
    assert_eq!(end.message.context("no exit")?["Exit"]["code"], 9);

    // Each client of a terminal can end its input.
    let script = "cat; cat; echo middle; cat; echo last; exit 5";
    let command = json!({"command": ["sh", "-c", script], "tty": true, "id": "ends"});
    let mut first = open(&mut vm, &command)?;
    first.text(&json!({"stdin": "eof"}))?;
    first.output_with("middle")?;
    drop(first);
    wait_for(&mut vm, |list| list[0]["attached"] == false)?;
    let mut second = open(&mut vm, &json!({"attach": "ends"}))?;
    second.text(&json!({"stdin": "eof"}))?;
    let end = second.wait_end()?;
    assert_eq!(end.message.context("no exit")?["Exit"]["code"], 5);

    // Attached and detached a thousand times.
    let mut socket = open(
        &mut vm,
        &json!({"command": ["cat"], "id": "cat", "tty": true}),
    )?;
    for _ in 0..1000 {
        drop(socket);
        socket = open(&mut vm, &json!({"attach": "cat"}))?;
    }
    socket.binary(b"still here\n")?;
    socket.output_with("still here")?;
    let mut api = vm.api()?;
    let response = api
        .request("DELETE", "/v1/sessions/cat", &[], b"")?
        .success()?
        .json()?;
    assert_eq!(response, json!({"ok": true}));
    assert_eq!(socket.wait_end()?.close, Some(1001));
    let gone = api.request("DELETE", "/v1/sessions/cat", &[], b"")?;
    assert_eq!(gone.status, 404);
    assert_eq!(sessions(&mut vm)?, json!([]));

    // Two sessions that are ended in one write: each client is notified.
    let attached = ["one", "two"].map(|id| json!({"command": ["cat"], "id": id}));
    let [mut one, mut two] = [open(&mut vm, &attached[0])?, open(&mut vm, &attached[1])?];
    wait_for(&mut vm, |list| {
        list.as_array().is_some_and(|list| list.len() == 2)
    })?;
    let delete = |id| format!("DELETE /v1/sessions/{id} HTTP/1.1\r\nHost: x\r\n\r\n");
    api.send((delete("one") + &delete("two")).as_bytes())?;
    assert_eq!(
        [api.receive(false)?.status, api.receive(false)?.status],
        [200, 200]
    );
    assert_eq!(
        [one.wait_end()?.close, two.wait_end()?.close],
        [Some(1001), Some(1001)]
    );

    // One that is ended by a request pipelined after a command: its client is also notified at once, and not
    // only at the next event.
    let mut three = open(&mut vm, &json!({"command": ["cat"], "id": "three"}))?;
    wait_for(&mut vm, |list| list[0]["id"] == "three")?;
    let body = r#"{"cmd":["sleep","1"]}"#;
    let length = body.len();
    let exec =
        format!("POST /v1/exec HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n{body}");
    api.send((exec + &delete("three")).as_bytes())?;
    assert_eq!(
        [api.receive(false)?.status, api.receive(false)?.status],
        [200, 200]
    );
    assert_eq!(three.wait_end()?.close, Some(1001));
    Ok(())
}

#[test]
fn attaching_works_when_all_command_slots_are_taken() -> Result<()> {
    let (mut vm, _root) = vm()?;
    let echo = json!({"command": ["cat"], "id": "echo"});
    drop(open(&mut vm, &echo)?);
    wait_for(&mut vm, |list| list[0]["attached"] == false)?;
    let mut others = vec![];
    let other = json!({"command": ["sh", "-c", "echo ready; exec cat"]});
    for _ in 0..127 {
        let mut socket = open(&mut vm, &other)?;
        socket.output_with("ready")?;
        others.push(socket);
    }
    assert_eq!(open(&mut vm, &other)?.wait_end()?.close, Some(1011));
    let mut socket = open(&mut vm, &json!({"attach": "echo"}))?;
    socket.binary(b"still here\n")?;
    socket.output_with("still here")?;
    Ok(())
}

#[test]
fn an_exit_status_that_was_not_delivered_is_kept_for_the_next_client() -> Result<()> {
    let (mut vm, _root) = vm()?;
    // It blocks while its client does not read, so it exits before its output is sent.
    let command = json!({"command": ["timeout", "3", "yes"], "id": "lost"});
    let client = open(&mut vm, &command)?;
    let list = wait_for(&mut vm, |list| list[0]["exit"] != Value::Null)?;
    assert_eq!(list[0]["attached"], true);
    drop(client);
    let list = wait_for(&mut vm, |list| list[0]["attached"] == false)?;
    let end = open(&mut vm, &json!({"attach": "lost"}))?.wait_end()?;
    assert_eq!(end.close, Some(1000));
    assert!(end.text().ends_with("y\ny\n"));
    assert_eq!(end.message, Some(json!({"Exit": list[0]["exit"]})));
    assert_eq!(sessions(&mut vm)?, json!([]));
    Ok(())
}

#[test]
fn sessions_without_their_clients_leave_pid_1_idle() -> Result<()> {
    let (mut vm, _root) = vm()?;
    // A terminal whose command has exited, one whose command waits, one that its command has closed, and
    // input that ended while the pipe was full.
    let ended = json!({"command": ["sh", "-c", "sleep 0.3; exit 1"], "id": "ended", "tty": true});
    drop(open(&mut vm, &ended)?);
    drop(open(
        &mut vm,
        &json!({"command": ["cat"], "id": "waiting", "tty": true}),
    )?);
    let apart = "exec </dev/null >/dev/null 2>&1; touch /run/apart; exec sleep 100000";
    drop(open(
        &mut vm,
        &json!({"command": ["sh", "-c", apart], "id": "apart", "tty": true}),
    )?);
    let is_apart = "while [ ! -e /run/apart ]; do sleep 0.1; done";
    let body = json!({"cmd": ["sh", "-c", is_apart]});
    vm.api()?.post("/v1/exec", &body)?.success()?;
    let mut full = open(
        &mut vm,
        &json!({"command": ["sleep", "100000"], "id": "full"}),
    )?;
    full.binary(&[0; 100_000])?;
    full.text(&json!({"stdin": "eof"}))?;
    drop(full);
    wait_for(&mut vm, |list| {
        let Some(list) = list.as_array() else {
            return false;
        };
        // The order is not known, as the test does not wait for a session's start.
        let is_away = |session: &Value| session["attached"] == false;
        let has_ended = |session: &Value| session["exit"] != Value::Null;
        list.len() == 4 && list.iter().all(is_away) && list.iter().any(has_ended)
    })?;
    // The first number is the processor time, in nanoseconds.
    let script = "cut -d' ' -f1 /proc/1/schedstat; sleep 3; cut -d' ' -f1 /proc/1/schedstat";
    let body = json!({"cmd": ["sh", "-c", script]});
    let response = vm.api()?.post("/v1/exec", &body)?.success()?.json()?;
    let times = response["stdout"].as_str().context("no output")?;
    let times = times
        .lines()
        .map(str::parse)
        .collect::<Result<Vec<u64>, _>>()?;
    let [before, after] = times[..] else {
        anyhow::bail!("{times:?}");
    };
    assert!(after - before < 500_000_000, "{before} {after}");
    Ok(())
}

#[test]
fn streams_are_marked_by_the_first_byte_of_a_message() -> Result<()> {
    let (mut vm, _root) = vm()?;
    let script = "echo out; sleep 0.3; echo err >&2; sleep 0.3; echo out again";
    let command = json!({"command": ["sh", "-c", script], "streams": true});
    let end = open(&mut vm, &command)?.wait_end()?;
    assert_eq!(end.output, b"\x01out\n\x02err\n\x01out again\n");
    Ok(())
}

#[test]
fn idle_sessions_free_the_memory_of_their_start() -> Result<()> {
    const SESSIONS: u32 = 30;
    let (mut vm, _root) = vm()?;
    let mut api = vm.api()?;
    let mut pss = || -> Result<u32> {
        let script = "awk '/^Pss:/ {print $2}' /proc/1/smaps_rollup";
        let body = json!({"cmd": ["sh", "-c", script]});
        let response = api.post("/v1/exec", &body)?.success()?.json()?;
        let size = response["stdout"].as_str().context("no output")?;
        Ok(size.trim().parse()?)
    };
    let before = pss()?;
    let mut silent = vec![];
    for _ in 0..SESSIONS {
        silent.push(open(&mut vm, &json!({"command": ["sleep", "100000"]}))?);
    }
    let start = Instant::now();
    // Memory for a connection and its session, in touched pages.
    loop {
        let after = pss()?;
        if after < before + SESSIONS * 16 {
            return Ok(());
        }
        ensure!(start.elapsed() < TIMEOUT / 6, "{before} {after}");
    }
}
