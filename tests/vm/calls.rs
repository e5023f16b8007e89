//! The system calls of PID 1 from the workload's start to the reboot, traced by the kernel.

use std::{
    collections::BTreeSet,
    io::Read,
    os::unix::net::UnixStream,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use pigeon_lab::{
    End, Vm,
    disk::{Image, Tree},
    guest,
    http::Client,
    vsock,
    ws::Socket,
};
use serde_json::json;

/// Long, as other VMs may run at the same time.
const TIMEOUT: Duration = Duration::from_secs(120);

/// The list under test.
const LIST: &str = include_str!("../THREATS.md");

/// The names in the list's block that starts with this word.
fn listed(word: &str) -> Result<BTreeSet<String>> {
    let (_, rest) = LIST
        .split_once(&format!("\n{word}:"))
        .with_context(|| format!("no {word} in the list"))?;
    let (names, _) = rest.split_once("\n```").context("no end")?;
    let (names, _) = names.split_once("\n\n").unwrap_or((names, ""));
    Ok(names.split_whitespace().map(String::from).collect())
}

fn shell(api: &mut Client<UnixStream>, script: &str) -> Result<String> {
    let response = api.post("/v1/exec", &json!({"cmd": ["sh", "-c", script]}))?;
    let response = response.success()?.json()?;
    ensure!(response["exit_code"] == 0, "{script}: {response}");
    Ok(response["stdout"].as_str().unwrap_or_default().into())
}

/// Uses everything that the host can request.
fn use_all(vm: &mut Vm, api: &mut Client<UnixStream>) -> Result<()> {
    // Often enough that PID 1 waits with another epoll instance.
    for _ in 0..1100 {
        assert_eq!(api.get("/v1/status")?.status, 200);
    }
    assert_eq!(api.get("/v1/none")?.status, 404);
    api.post("/v1/signals", &json!({"signal": 1}))?.success()?;
    // More output than is kept, on both streams, of a command that forks and leaves orphans.
    let much =
        "head -c 3000000 /dev/zero; head -c 3000000 /dev/zero >&2; (sleep 0.1 &); (sleep 0.2 &)";
    let much = api.post("/v1/exec", &json!({"cmd": ["sh", "-c", much]}))?;
    assert_eq!(much.json()?["stdout_truncated"], true);
    let absent = api.post("/v1/exec", &json!({"cmd": ["nothing"]}))?;
    assert_eq!(absent.status, 500);
    let slow = api.post(
        "/v1/exec",
        &json!({"cmd": ["sleep", "100"], "timeout_ms": 200}),
    )?;
    assert_eq!(slow.json()?["exit_signal"], 9);
    let mut vanishes = vm.api()?;
    vanishes.send(b"POST /v1/exec HTTP/1.1\r\nHost: x\r\nContent-Length: 21\r\n\r\n{\"cmd\":[\"sleep\",\"99\"]}")?;
    drop(vanishes);

    let first = json!({"command": ["sh"], "tty": true, "env": ["PS1=pigeon> "]});
    let mut terminal = Socket::open(vm.connect(vsock::API_PORT)?, "/v1/ws/exec")?;
    terminal.text(&first)?;
    terminal.output_with("pigeon> ")?;
    terminal.text(&json!({"cols": 80, "rows": 30}))?;
    terminal.binary(b"stty size\n")?;
    terminal.output_with("30 80")?;
    terminal.output_with("pigeon> ")?;
    terminal.text(&json!({"stdin": "eof"}))?;
    terminal.wait_end()?;
    let mut session = Socket::open(vm.connect(vsock::API_PORT)?, "/v1/ws/exec")?;
    session.text(&json!({"command": ["cat"]}))?;
    session.binary(&[b'x'; 100_000])?;
    session.text(&json!({"stdin": "eof"}))?;
    assert_eq!(session.wait_end()?.output.len(), 100_000);
    let mut killed = Socket::open(vm.connect(vsock::API_PORT)?, "/v1/ws/exec")?;
    killed.text(&json!({"command": ["sleep", "99"]}))?;
    killed.close(1000)?;
    let body = [b'x'; 300_000];
    let path = "/v1/files?path=/tmp/file";
    assert_eq!(vm.api()?.request("PUT", path, &[], &body)?.status, 201);
    assert!(vm.api()?.get(path)?.body == body);
    api.get("/v1/sysinfo")?.success()?;
    let volume = json!({"FSType": "tmpfs", "MountPath": "/scratch"});
    api.post("/v1/mounts", &volume)?.success()?;
    api.request("DELETE", "/v1/mounts?path=/scratch", &[], b"")?
        .success()?;
    shell(api, "nc -ll -p 7001 -e cat >/dev/null 2>&1 & sleep 1")?;
    for (port, status) in [(7001, 200), (7002, 502)] {
        let mut tunnel = vm.api()?;
        let head = format!("CONNECT 127.0.0.1:{port} HTTP/1.1\r\nHost: x\r\n\r\n");
        tunnel.send(head.as_bytes())?;
        assert_eq!(tunnel.receive(true)?.status, status);
        if status == 200 {
            tunnel.send(&body)?;
            let (mut stream, mut back) = tunnel.into_stream();
            while back.len() < body.len() {
                let mut piece = [0; 4096];
                let count = stream.read(&mut piece)?;
                back.extend(&piece[..count]);
                ensure!(count > 0, "the tunnel is closed");
            }
            assert!(back == body);
        }
    }
    #[cfg(feature = "snapshot")]
    {
        let hold = json!({"token": "a1"});
        // A hold closes other connections: so it has its own.
        let mut holder = vm.api()?;
        holder.post("/v1/snapshot/prepare", &hold)?.success()?;
        holder.post("/v1/snapshot/cancel", &hold)?.success()?;
        let config = json!({"Hostname": "clone", "ExtraEnv": {"A": "1"}});
        holder
            .post("/v1/restore", &json!({"config": config}))?
            .success()?;
        *api = vm.api()?;
    }
    // Killed processes and orphans are reaped.
    let start = Instant::now();
    while shell(api, "ps -o args | grep -cE '^sleep (0.*|99|100)$' || true")? != "0\n" {
        ensure!(start.elapsed() < TIMEOUT, "a sleep is still running");
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// The names of `sys_NAME` in front of `end`.
fn names(text: &str, end: char) -> BTreeSet<String> {
    let parts = text.split("sys_").skip(1);
    let names = parts.filter_map(|part| part.split_once(end).map(|(name, _)| name));
    let is_name = |name: &&str| name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    names.filter(is_name).map(String::from).collect()
}

#[test]
fn pid_1_makes_no_system_call_that_is_not_listed() -> Result<()> {
    const TRACING: &str = "mkdir -p /sys/kernel/tracing; mount -t tracefs tracefs /sys/kernel/tracing; cd /sys/kernel/tracing
        echo 'hist:keys=id.syscall:size=1024 if common_pid == 1' >events/raw_syscalls/sys_enter/trigger";
    /// Prints each call of PID 1 as a line on the console, up to the last one.
    const PRINTING: &str = "cd /sys/kernel/tracing; cat events/raw_syscalls/sys_enter/hist
        echo 8 >/proc/sys/kernel/printk; echo 1 >/proc/sys/kernel/tracepoint_printk
        echo 'common_pid == 1' >events/syscalls/filter
        for call in events/syscalls/sys_enter_*; do echo 1 >$call/enable; done";
    let root = Image::ext4(&Tree::busybox()?, 32)?;
    let volume = Image::ext4(&Tree::empty()?, 8)?;
    let script = "trap 'echo hung up' HUP; (trap '' HUP TERM; exec sleep 1000) &
        echo ready; while ! read -t 1 -r line; do :; done; head -c 70000 /dev/zero | tr '\\0' x; exit 3";
    let config = guest::shell(
        script,
        json!({"Mounts": [{"DevicePath": "/dev/vdb", "MountPath": "/data"}]}),
    );
    let mut vm = Vm::builder()
        .config(&config)
        .disk(&root)
        .disk(&volume)
        .arg("tp_printk")
        // Otherwise, reading the kernel's log would itself be printed there.
        .arg("PIGEON_RESTORE=host")
        .timeout(TIMEOUT)
        .boot()?;
    vm.wait_for("ready")?;
    let mut api = vm.api()?;
    shell(&mut api, TRACING)?;
    use_all(&mut vm, &mut api)?;
    let mut waiting = vm.api()?;
    waiting.send(b"GET /v1/exit_code HTTP/1.1\r\nHost: x\r\n\r\n")?;
    vm.wait_for("hung up")?;
    let running = names(&shell(&mut api, PRINTING)?, ' ');
    vm.type_text("\n")?;
    assert_eq!(
        waiting.receive(false)?.json()?,
        json!({"code": 3, "oom_killed": false})
    );
    assert_eq!(vm.wait_end()?, End::Reboot);
    let console = vm.console();
    let ending = names(&console, '(');
    println!("running: {running:?}\nending: {ending:?}");
    let unlisted = |seen: &BTreeSet<String>, list: &BTreeSet<String>| {
        let names: Vec<_> = seen.difference(list).cloned().collect();
        names.join(" ")
    };
    let (in_running, in_ending) = (listed("running")?, listed("ending")?);
    assert_eq!(unlisted(&running, &in_running), "", "not listed as running");
    assert_eq!(unlisted(&in_running, &running), "", "listed, and not made");
    let all = &in_running | &in_ending;
    assert_eq!(unlisted(&ending, &all), "", "not listed as ending");
    assert_eq!(unlisted(&in_ending, &ending), "", "listed, and not made");
    Ok(())
}
