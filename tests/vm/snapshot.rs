//! Held still for a snapshot, and made another VM after one: what the guest does of it, without a
//! hypervisor that takes any.

use std::{
    os::unix::net::UnixStream,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use pigeon_lab::{
    End, Vm,
    disk::{Image, Tree},
    guest,
    http::{Client, Response},
    vsock::API_PORT,
    ws::Socket,
};
use serde_json::{Value, json};

/// Generous: other VMs may run beside this one.
const PATIENCE: Duration = Duration::from_secs(180);

const V2: &str = "/sys/fs/cgroup/unified";

/// What stands still is watched for so long.
const STILL: Duration = Duration::from_millis(1500);

/// Counts on the console, a line a tenth of a second.
fn count(name: &str) -> String {
    format!("i=0; while :; do i=$((i+1)); echo count-{name} $i >/dev/console; sleep 0.1; done")
}

fn exec(vm: &mut Vm, script: &str) -> Result<String> {
    let body = json!({"cmd": ["sh", "-c", script]});
    let answer = vm.api()?.post("/v1/exec", &body)?.success()?.json()?;
    ensure!(answer["exit_code"] == 0, "{script}: {answer}");
    Ok(answer["stdout"].as_str().unwrap_or_default().into())
}

fn lines(vm: &Vm, name: &str) -> usize {
    let start = format!("count-{name} ");
    let console = vm.console();
    console.lines().filter(|line| line.contains(&start)).count()
}

/// Waits until each counts on.
fn assert_counting(vm: &Vm, names: &[&str]) -> Result<()> {
    for name in names {
        let (before, start) = (lines(vm, name), Instant::now());
        while lines(vm, name) < before + 3 {
            ensure!(start.elapsed() < PATIENCE, "{name} does not count");
            thread::sleep(Duration::from_millis(50));
        }
    }
    Ok(())
}

/// Nothing is counted for a while. What the console had not yet shown is let pass.
fn assert_still(vm: &Vm, names: &[&str]) {
    let seen = || names.iter().map(|name| lines(vm, name)).collect::<Vec<_>>();
    thread::sleep(Duration::from_millis(300));
    let before = seen();
    thread::sleep(STILL);
    assert_eq!(seen(), before, "{names:?}");
}

fn prepare(api: &mut Client<UnixStream>, body: Value) -> Result<Response> {
    Ok(api.post("/v1/snapshot/prepare", &body)?)
}

fn cancel(api: &mut Client<UnixStream>, token: &str) -> Result<Response> {
    Ok(api.post("/v1/snapshot/cancel", &json!({"token": token}))?)
}

fn error(response: &Response) -> Result<String> {
    Ok(response.json()?["error"].as_str().unwrap_or("none").into())
}

#[test]
fn all_processes_stand_still_while_held_and_go_on_where_they_were() -> Result<()> {
    let root = Image::ext4(&Tree::busybox()?, 32)?;
    let script = format!(
        "trap 'echo got term; exit 3' TERM; ({}) & wait",
        count("workload")
    );
    let mut vm = Vm::builder()
        .config(&guest::shell(&script, json!({})))
        .disk(&root)
        .patience(PATIENCE)
        .boot()?;
    let others = [
        // A container engine's group, beside the workload's.
        format!(
            "mkdir -p {V2}/docker/c1; (echo 0 >{V2}/docker/c1/cgroup.procs; {})",
            count("container")
        ),
        // What root has moved to where PID 1 is.
        format!("(echo 0 >{V2}/cgroup.procs; {})", count("stray")),
        // A command that outlives its call.
        format!("({})", count("command")),
    ];
    for other in &others {
        exec(&mut vm, &format!("{other} >/dev/null 2>&1 </dev/null &"))?;
    }
    let mut session = Socket::open(vm.connect(API_PORT)?, "/v1/ws/exec")?;
    session.text(&json!({"command": ["sh", "-c", count("session")], "id": "count"}))?;
    let all = ["workload", "container", "stray", "command", "session"];
    assert_counting(&vm, &all)?;

    let mut api = vm.api()?;
    for (body, wanted) in [
        (json!({}), "token: missing"),
        (
            json!({"token": "t".repeat(65)}),
            "token: longer than 64 bytes",
        ),
        (
            json!({"token": "a1", "hold_ms": -1}),
            "hold_ms: must be from 0 to 86400000",
        ),
    ] {
        let refused = prepare(&mut api, body)?;
        assert_eq!((refused.status, error(&refused)?), (400, wanted.into()));
    }
    assert_eq!(cancel(&mut api, "a1")?.status, 409);
    assert_counting(&vm, &["workload"])?;

    let mut idle = vm.api()?;
    idle.get("/v1/status")?.success()?;
    let held = prepare(&mut api, json!({"token": "a1"}))?;
    assert_eq!(held.status, 200, "{}", held.text());
    let answer = held.json()?;
    assert_eq!(
        (&answer["ok"], &answer["token"]),
        (&json!(true), &json!("a1"))
    );
    // Shells and their sleeps, if these were not between two.
    let frozen = answer["frozen"].as_u64().unwrap_or(0);
    assert!((6..=12).contains(&frozen), "{answer}");
    assert!(
        answer["freeze_ms"].is_u64() && answer["sync_ms"].is_u64(),
        "{answer}"
    );
    idle.wait_closed()?;
    assert_eq!(session.wait_end()?.close, Some(1001));
    assert_still(&vm, &all);

    api.get("/v1/status")?.success()?;
    let exec_body = json!({"cmd": ["true"]});
    for (path, body) in [
        ("/v1/exec", &exec_body),
        ("/v1/signals", &json!({"signal": 15})),
    ] {
        let refused = api.post(path, body)?;
        let wanted = "the workload is held for a snapshot";
        assert_eq!(
            (refused.status, error(&refused)?),
            (409, wanted.into()),
            "{path}"
        );
    }
    let mut refused = Socket::open(vm.connect(API_PORT)?, "/v1/ws/exec")?;
    refused.text(&json!({"command": ["true"]}))?;
    assert_eq!(refused.wait_end()?.close, Some(1011));
    #[cfg(feature = "files")]
    assert_eq!(vm.api()?.get("/v1/files?path=/etc/passwd")?.status, 409);
    #[cfg(feature = "tunnel")]
    assert_eq!(
        vm.api()?
            .request("CONNECT", "127.0.0.1:80", &[], b"")?
            .status,
        409
    );

    // The host may not have had the answer.
    let again = prepare(&mut api, json!({"token": "a1"}))?;
    assert_eq!((again.status, again.json()?), (200, answer));
    let other = prepare(&mut api, json!({"token": "b2"}))?;
    let wanted = "the workload is not held under this token";
    assert_eq!((other.status, error(&other)?), (409, wanted.into()));
    assert_eq!(cancel(&mut api, "b2")?.status, 409);
    assert_still(&vm, &all);

    assert_eq!(
        cancel(&mut api, "a1")?.success()?.json()?,
        json!({"ok": true})
    );
    assert_counting(&vm, &all)?;
    let groups = exec(
        &mut vm,
        &format!(
            "grep -c . {V2}/docker/cgroup.procs {V2}/*/cgroup.freeze; cat {V2}/*/cgroup.freeze"
        ),
    )?;
    assert!(groups.ends_with("0\n0\n0\n"), "{groups}");
    let mut session = Socket::open(vm.connect(API_PORT)?, "/v1/ws/exec")?;
    session.text(&json!({"attach": "count"}))?;

    // Nobody ends the hold.
    let held = prepare(
        &mut api,
        json!({"token": "c3", "hold_ms": 2000, "sync": false}),
    )?;
    assert_eq!(held.success()?.json()?["sync_ms"], 0);
    assert_still(&vm, &all);
    vm.wait_for("the hold c3 ends by itself")?;
    assert_counting(&vm, &all)?;
    assert_eq!(cancel(&mut api, "c3")?.status, 409);
    exec(&mut vm, "true")?;

    // The end, out of a hold.
    prepare(&mut api, json!({"token": "d4"}))?.success()?;
    api.post("/v1/stop", &json!({}))?.success()?;
    let exit = api.get("/v1/exit_code")?.success()?.json()?;
    assert_eq!(exit["code"], 3, "{exit}");
    assert!(vm.console().contains("got term"), "{}", vm.console());
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check()
}

#[test]
fn who_cannot_be_frozen_is_named_and_all_goes_on() -> Result<()> {
    let root = Image::ext4(&Tree::busybox()?, 32)?;
    let volume = Image::ext4(&Tree::empty()?, 32)?;
    let config = guest::shell(
        &count("workload"),
        json!({"Mounts": [{"DevicePath": "/dev/vdb", "MountPath": "/data"}]}),
    );
    let mut vm = Vm::builder()
        .config(&config)
        .disk(&root)
        .disk(&volume)
        .patience(PATIENCE)
        .boot()?;
    assert_counting(&vm, &["workload"])?;
    // Who writes to a file system that is frozen waits in the kernel, in a sleep that no signal ends.
    exec(
        &mut vm,
        "fsfreeze --freeze /data; touch /data/file >/dev/null 2>&1 &",
    )?;
    exec(
        &mut vm,
        "until grep -q ' D ' /proc/[0-9]*/stat; do sleep 0.1; done",
    )?;
    let mut api = vm.api()?;
    let late = prepare(&mut api, json!({"token": "a1", "timeout_ms": 300}))?;
    assert_eq!(late.status, 504, "{}", late.text());
    let why = error(&late)?;
    assert!(
        why.starts_with("still running after 300 ms: touch ("),
        "{why}"
    );
    assert_counting(&vm, &["workload"])?;
    exec(&mut vm, "fsfreeze --unfreeze /data")?;
    prepare(&mut api, json!({"token": "a1"}))?.success()?;
    assert_still(&vm, &["workload"]);
    // A workload that is killed while it is held is the end, too.
    assert!(vm.ended()?.is_none());
    cancel(&mut api, "a1")?.success()?;
    // One that root has frozen itself before stays so.
    exec(
        &mut vm,
        &format!("mkdir {V2}/paused; echo 1 >{V2}/paused/cgroup.freeze"),
    )?;
    prepare(&mut api, json!({"token": "a2"}))?.success()?;
    cancel(&mut api, "a2")?.success()?;
    let frozen = exec(
        &mut vm,
        &format!("cat {V2}/paused/cgroup.freeze {V2}/workload/cgroup.freeze"),
    )?;
    assert_eq!(frozen, "1\n0\n");
    vm.stop()?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check()?;
    volume.check()
}

#[test]
fn without_cgroup_v2_and_where_it_is_off_there_is_no_hold() -> Result<()> {
    for (arg, why) in [
        ("PIGEON_CGROUPS=none", "there is no cgroup v2"),
        ("PIGEON_RESTORE=off", "PIGEON_RESTORE is off"),
    ] {
        let root = Image::ext4(&Tree::busybox()?, 32)?;
        let mut vm = Vm::builder()
            .config(&guest::shell("read -r line", json!({})))
            .arg(arg)
            .disk(&root)
            .patience(PATIENCE)
            .boot()?;
        vm.wait_for("workload started")?;
        let refused = prepare(&mut vm.api()?, json!({"token": "a1"}))?;
        assert_eq!((refused.status, error(&refused)?), (501, why.into()));
        exec(&mut vm, "true")?;
        vm.type_text("\n")?;
        assert_eq!(vm.wait_end()?, End::Reboot);
    }
    Ok(())
}
