//! Events sent to the host, and orderly stops.

use std::{
    io::{BufRead, BufReader},
    os::unix::net::UnixListener,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use pigeon_lab::{
    End, Vm,
    disk::{Image, Tree},
    guest,
    mmds::{Mmds, Push},
    vm::Builder,
};
use serde_json::{Value, json};

/// Long, as other VMs may run at the same time.
const TIMEOUT: Duration = Duration::from_secs(180);

fn vm(script: &str, stop_signal: &str) -> Result<(Builder, Image)> {
    let root = Image::ext4(&Tree::busybox()?, 48)?;
    let config = json!({
        "ExecOverride": ["/bin/sh", "-c", script],
        "ImageConfig": {"StopSignal": stop_signal},
    });
    let builder = Vm::builder().config(&config).disk(&root).timeout(TIMEOUT);
    Ok((builder, root))
}

#[test]
fn events_report_the_vms_life_cycle() -> Result<()> {
    const QUICK: Duration = Duration::from_millis(900);
    // Other load on this machine may make a run slower, never faster.
    let mut shortest = Duration::MAX;
    for _ in 0..5 {
        shortest = shortest.min(from_the_exit_event_to_the_end()?);
        if shortest < QUICK {
            return Ok(());
        }
    }
    bail!("the shutdown takes {shortest:?}")
}

fn from_the_exit_event_to_the_end() -> Result<Duration> {
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("vm.vsock");
    // As with Firecracker, the port's socket is in the directory of the VM's.
    let listener = UnixListener::bind(dir.path().join("vm.vsock_7077"))?;
    let (events, received) = std::sync::mpsc::channel();
    thread::spawn(move || -> Result<()> {
        // One event per line, on any number of connections.
        for stream in listener.incoming() {
            for line in BufReader::new(stream?).lines() {
                events.send((Instant::now(), serde_json::from_str::<Value>(&line?)?))?;
            }
        }
        Ok(())
    });
    let (builder, _root) = vm("echo hello; sleep 0.2; exit 7", "")?;
    let mut vm = builder
        .vsock(&socket)
        .arg("PIGEON_EVENTS_PORT=7077")
        .boot()?;
    let next = || received.recv_timeout(TIMEOUT).context("no event");
    let (_, ready) = next()?;
    assert_eq!(ready, json!({"event": "ready"}));
    let (_, started) = next()?;
    assert_eq!(started["event"], "started");
    assert!(
        started["pid"].as_u64().is_some_and(|pid| pid > 1),
        "{started}"
    );
    let (exited, event) = next()?;
    assert_eq!(
        event,
        json!({"event": "exited", "code": 7, "oom_killed": false})
    );
    // The event counts as a delivered exit code: there is no linger.
    assert_eq!(vm.wait_end()?, End::Reboot);
    Ok(exited.elapsed())
}

#[test]
fn a_host_that_listens_late_gets_later_events() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("vm.vsock");
    let root = Image::ext4(&Tree::busybox()?, 32)?;
    let document = guest::shell("exec sleep 1000", json!({}));
    let mut vm = Vm::builder()
        .mmds(Mmds::serving(document).push(Push::After(Duration::from_secs(2))))
        .on_qemu()
        .arg("PIGEON_MMDS_TIMEOUT_MS=60000")
        .arg("PIGEON_EVENTS_PORT=7077")
        .vsock(&socket)
        .disk(&root)
        .timeout(TIMEOUT)
        .boot()?;
    // By then, the first attempt to connect has been refused.
    let start = Instant::now();
    while vm.mmds_requests().is_empty() {
        ensure!(start.elapsed() < TIMEOUT, "MMDS was not asked");
        thread::sleep(Duration::from_millis(10));
    }
    let listener = UnixListener::bind(dir.path().join("vm.vsock_7077"))?;
    vm.wait_for("workload started")?;
    listener.set_nonblocking(true)?;
    let start = Instant::now();
    let stream = loop {
        match listener.accept() {
            Ok((stream, _)) => break stream,
            Err(_) => ensure!(start.elapsed() < TIMEOUT, "no connection for events"),
        }
        thread::sleep(Duration::from_millis(10));
    };
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    for (event, line) in ["ready", "started"]
        .iter()
        .zip(BufReader::new(stream).lines())
    {
        assert_eq!(serde_json::from_str::<Value>(&line?)?["event"], *event);
    }
    vm.stop()?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check()
}

#[test]
fn nothing_happens_when_nobody_listens_for_events() -> Result<()> {
    let (builder, _root) = vm("echo hello; exec sleep 1000", "")?;
    let mut vm = builder.arg("PIGEON_EVENTS_PORT=7078").boot()?;
    vm.wait_for("hello")?;
    vm.api()?.get("/v1/status")?.success()?;
    assert_eq!(guest::warnings(&vm.console()), [""; 0]);
    Ok(())
}

#[test]
fn a_stop_sends_the_stop_signal_and_then_sigkill() -> Result<()> {
    // Real-time signals have names relative to the first one, which is 34.
    let script = "trap 'echo got it; exit 3' 37; echo ready; while :; do sleep 0.1; done";
    let (builder, _root) = vm(script, "SIGRTMIN+3")?;
    let mut vm = builder.boot()?;
    vm.wait_for("ready")?;
    let mut api = vm.api()?;
    let response = api.post("/v1/stop", &json!({}))?.success()?.json()?;
    assert_eq!(response, json!({"ok": true}));
    let exit = api.get("/v1/exit_code")?.success()?.json()?;
    assert_eq!(exit, json!({"code": 3, "oom_killed": false}));
    assert_eq!(vm.wait_end()?, End::Reboot);

    Ok(())
}

#[test]
fn a_second_stop_can_only_shorten_the_timeout() -> Result<()> {
    let script = "trap '' TERM INT; echo ready; while :; do sleep 0.1; done";
    let (builder, _root) = vm(script, "SIGINT")?;
    let mut vm = builder.boot()?;
    vm.wait_for("ready")?;
    let mut api = vm.api()?;
    // Two requests at once.
    let both: String = ["{\"timeout_ms\":20000}", "{\"timeout_ms\":60000}"]
        .map(|body| {
            format!(
                "POST /v1/stop HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            )
        })
        .concat();
    api.send(both.as_bytes())?;
    for _ in 0..2 {
        api.receive(false)?.success()?;
    }
    vm.wait_for("signal=2 timeout_ms=20000")?;
    for (body, status) in [
        (json!({"signal": "SIGTERM", "timeout_ms": 60_000}), 200),
        (json!({"signal": 15, "timeout_ms": 500}), 200),
        (json!({"timeout_ms": 60_000}), 200),
        (json!({"signal": "SIGNOTHING"}), 400),
        (json!({"timeout_ms": -1}), 400),
    ] {
        assert_eq!(api.post("/v1/stop", &body)?.status, status, "{body}");
    }
    let start = Instant::now();
    let exit = api.get("/v1/exit_code")?.success()?.json()?;
    assert_eq!(exit["code"], 137);
    assert!(start.elapsed() < Duration::from_secs(30));
    Ok(())
}
