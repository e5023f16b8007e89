//! The guest's side of snapshots and restores: holds, and changes to another VM. Without a hypervisor that
//! takes snapshots.

use std::{
    io::{BufRead, BufReader},
    os::unix::net::{UnixListener, UnixStream},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use pigeon_lab::{
    End, Vm, assets,
    disk::{Image, Tree},
    guest,
    http::{Client, Response},
    mmds::{Before, Fault, Mmds, Push},
    vsock::API_PORT,
    ws::{Socket, handshake},
};
use serde_json::{Value, json};

/// Long, as other VMs may run at the same time.
const TIMEOUT: Duration = Duration::from_secs(180);

const V2: &str = "/sys/fs/cgroup/unified";

/// How long a frozen process is observed.
const STILL: Duration = Duration::from_millis(1500);

/// Prints a number on the console every 100 ms.
fn count(name: &str) -> String {
    format!("i=0; while :; do i=$((i+1)); echo count-{name} $i >/dev/console; sleep 0.1; done")
}

fn exec(vm: &mut Vm, script: &str) -> Result<String> {
    let body = json!({"cmd": ["sh", "-c", script]});
    let reply = vm.api()?.post("/v1/exec", &body)?.success()?.json()?;
    ensure!(reply["exit_code"] == 0, "{script}: {reply}");
    Ok(reply["stdout"].as_str().unwrap_or_default().into())
}

fn lines(vm: &Vm, name: &str) -> usize {
    let start = format!("count-{name} ");
    let console = vm.console();
    console.lines().filter(|line| line.contains(&start)).count()
}

/// Waits until each counter continues.
fn assert_counting(vm: &Vm, names: &[&str]) -> Result<()> {
    for name in names {
        let (before, start) = (lines(vm, name), Instant::now());
        while lines(vm, name) < before + 3 {
            ensure!(start.elapsed() < TIMEOUT, "{name} does not count");
            thread::sleep(Duration::from_millis(50));
        }
    }
    Ok(())
}

/// No counter continues for a while, apart from output that was still in transit.
fn assert_still(vm: &Vm, names: &[&str]) {
    let seen = || names.iter().map(|name| lines(vm, name)).collect::<Vec<_>>();
    thread::sleep(Duration::from_millis(300));
    let before = seen();
    thread::sleep(STILL);
    assert_eq!(seen(), before, "{names:?}");
}

fn prepare(api: &mut Client<UnixStream>, body: Value) -> Result<Response> {
    api.post("/v1/snapshot/prepare", &body)
}

fn cancel(api: &mut Client<UnixStream>, token: &str) -> Result<Response> {
    api.post("/v1/snapshot/cancel", &json!({"token": token}))
}

fn error(response: &Response) -> Result<String> {
    Ok(response.json()?["error"].as_str().unwrap_or("none").into())
}

#[test]
fn all_processes_are_frozen_during_a_hold_and_continue_after_it() -> Result<()> {
    let root = Image::ext4(&Tree::busybox()?, 32)?;
    let script = format!(
        "trap 'echo got term; exit 3' TERM; ({}) & wait",
        count("workload")
    );
    let mut vm = Vm::builder()
        .config(&guest::shell(&script, json!({})))
        .disk(&root)
        .timeout(TIMEOUT)
        .boot()?;
    let others = [
        // A container engine's cgroup, beside the workload's.
        format!(
            "mkdir -p {V2}/docker/c1; (echo 0 >{V2}/docker/c1/cgroup.procs; {})",
            count("container")
        ),
        // A cgroup that ls does not show.
        format!(
            "mkdir {V2}/.hidden; (echo 0 >{V2}/.hidden/cgroup.procs; {})",
            count("hidden")
        ),
        // A process that root has moved to PID 1's cgroup.
        format!("(echo 0 >{V2}/cgroup.procs; {})", count("stray")),
        // A command that outlives its call.
        format!("({})", count("command")),
    ];
    for other in &others {
        exec(&mut vm, &format!("{other} >/dev/null 2>&1 </dev/null &"))?;
    }
    let mut session = Socket::open(vm.connect(API_PORT)?, "/v1/ws/exec")?;
    session.text(&json!({"command": ["sh", "-c", count("session")], "id": "count"}))?;
    let all = [
        "workload",
        "container",
        "hidden",
        "stray",
        "command",
        "session",
    ];
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
    let reply = held.json()?;
    assert_eq!(
        (&reply["ok"], &reply["token"]),
        (&json!(true), &json!("a1"))
    );
    // Each shell with its sleep, unless it is between two.
    let frozen = reply["frozen"].as_u64().unwrap_or(0);
    assert!((7..=14).contains(&frozen), "{reply}");
    assert!(
        reply["freeze_ms"].is_u64() && reply["sync_ms"].is_u64(),
        "{reply}"
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
    let session = vm.api()?.request("GET", "/v1/ws/exec", &handshake(), b"")?;
    assert_eq!(session.status, 409);
    #[cfg(feature = "files")]
    assert_eq!(vm.api()?.get("/v1/files?path=/etc/passwd")?.status, 409);
    #[cfg(feature = "tunnel")]
    assert_eq!(
        vm.api()?
            .request("CONNECT", "127.0.0.1:80", &[], b"")?
            .status,
        409
    );

    // If the host has not received the response.
    let again = prepare(&mut api, json!({"token": "a1"}))?;
    assert_eq!((again.status, again.json()?), (200, reply));
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

    // As Docker in Docker does with all processes of the root. PID 1 is not frozen.
    let moved =
        format!("mkdir {V2}/init; echo 1 >{V2}/init/cgroup.procs; tail -n 1 /proc/1/cgroup");
    assert_eq!(exec(&mut vm, &moved)?, "0::/init\n");
    // The hold times out.
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

    // A stop during a hold.
    prepare(&mut api, json!({"token": "d4"}))?.success()?;
    api.post("/v1/stop", &json!({}))?.success()?;
    let exit = api.get("/v1/exit_code")?.success()?.json()?;
    assert_eq!(exit["code"], 3, "{exit}");
    assert_eq!(vm.wait_end()?, End::Reboot);
    // The console is slower than the response.
    assert!(vm.console().contains("got term"), "{}", vm.console());
    root.check()
}

#[test]
fn processes_that_cannot_be_frozen_are_named_and_all_are_thawed() -> Result<()> {
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
        .timeout(TIMEOUT)
        .boot()?;
    assert_counting(&vm, &["workload"])?;
    // A writer to a frozen file system is in an uninterruptible sleep.
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
    // Other calls wait meanwhile, and waiting calls do not take all places.
    let mut waiting = vec![];
    for (call, timeout) in [("prepare", 3000)].into_iter().chain([("cancel", 0); 7]) {
        let mut api = vm.api()?;
        let body = json!({"token": "a1", "timeout_ms": timeout}).to_string();
        let head = format!("POST /v1/snapshot/{call} HTTP/1.1\r\nHost: x\r\nContent-Length: ");
        api.send(format!("{head}{}\r\n\r\n{body}", body.len()).as_bytes())?;
        // Keeps the order.
        assert_eq!(vm.api()?.get("/v1/status")?.status, 200);
        waiting.push(api);
    }
    assert_eq!(cancel(&mut api, "a1")?.status, 503);
    let statuses = waiting.iter_mut().map(|api| Ok(api.receive(false)?.status));
    let statuses = statuses.collect::<Result<Vec<_>>>()?;
    assert_eq!(statuses, [504, 409, 409, 409, 409, 409, 409, 409]);
    assert_counting(&vm, &["workload"])?;
    exec(&mut vm, "fsfreeze --unfreeze /data")?;
    prepare(&mut api, json!({"token": "a1"}))?.success()?;
    assert_still(&vm, &["workload"]);
    assert!(vm.ended()?.is_none());
    cancel(&mut api, "a1")?.success()?;
    // A cgroup that root has frozen before stays frozen.
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
fn a_hold_needs_cgroup_v2_and_can_be_disabled() -> Result<()> {
    for (arg, why) in [
        ("PIGEON_CGROUPS=none", "there is no cgroup v2"),
        ("PIGEON_RESTORE=off", "PIGEON_RESTORE is off"),
    ] {
        let root = Image::ext4(&Tree::busybox()?, 32)?;
        let mut vm = Vm::builder()
            .config(&guest::shell("read -r line", json!({})))
            .arg(arg)
            .disk(&root)
            .timeout(TIMEOUT)
            .boot()?;
        vm.wait_for("workload started")?;
        let refused = prepare(&mut vm.api()?, json!({"token": "a1"}))?;
        assert_eq!((refused.status, error(&refused)?), (501, why.into()));
        // A process's record in the kernel's log is not taken for a notification of the kernel's.
        exec(
            &mut vm,
            "echo '<5>random: crng reseeded due to virtual machine fork' >/dev/kmsg",
        )?;
        exec(&mut vm, "dmesg | grep 'virtual machine fork'; sleep 1")?;
        assert!(!vm.console().contains("restored"), "{}", vm.console());
        vm.type_text("\n")?;
        assert_eq!(vm.wait_end()?, End::Reboot);
    }
    Ok(())
}

fn restore(api: &mut Client<UnixStream>, body: Value) -> Result<Response> {
    api.post("/v1/restore", &body)
}

/// The workload counts, and prints the signals that it receives.
fn script() -> String {
    format!(
        "trap 'echo got usr1 >/dev/console' USR1; trap 'echo got usr2 >/dev/console' USR2\n{}",
        count("workload")
    )
}

/// A document with all fields that a restore applies.
fn document(name: &str, net: u8, signal: u8) -> Value {
    guest::shell(
        &script(),
        json!({
            "Hostname": name,
            "ExtraEnv": {"WHO": name},
            "MTU": 1400 + u32::from(net),
            "IPConfigs": [
                {"IP": format!("10.0.{net}.7"), "Mask": 24, "Gateway": format!("10.0.{net}.1")},
                {"IP": format!("fd00:{net}::7"), "Mask": 64, "Gateway": format!("fd00:{net}::1")},
                {"IP": format!("fe80::{net}:7"), "Mask": 64},
            ],
            "EtcHosts": [{"Host": "db", "IP": format!("10.0.{net}.9")}],
            "EtcResolv": {"Nameservers": [format!("10.0.{net}.53")]},
            "RestoreSignal": signal,
        }),
    )
}

/// Checks in the VM what a document sets. The kernel's own address contains the MAC.
fn assert_is(vm: &mut Vm, name: &str, net: u8) -> Result<()> {
    let state = exec(
        vm,
        "hostname; echo $WHO; cat /sys/class/net/eth0/mtu
        ip -o addr show dev eth0 | awk '{print $4}' | grep -v ff:fe | sort
        ip route | grep default; ip -6 route | grep default | sed 's/ metric.*//'
        grep db /etc/hosts | cut -f 1; cat /etc/resolv.conf",
    )?;
    let wanted = format!(
        "{name}\n{name}\n{mtu}\n10.0.{net}.7/24\nfd00:{net}::7/64\nfe80::{net}:7/64\n\
         default via 10.0.{net}.1 dev eth0 \ndefault via fd00:{net}::1 dev eth0 \n\
         10.0.{net}.9\nnameserver 10.0.{net}.53\n",
        mtu = 1400 + u32::from(net)
    );
    assert_eq!(state.replace(" \n", "\n"), wanted.replace(" \n", "\n"));
    Ok(())
}

fn seconds(vm: &mut Vm) -> Result<u64> {
    Ok(exec(vm, "date +%s")?.trim().parse()?)
}

#[test]
fn a_restore_by_a_call_gives_the_vm_a_new_identity() -> Result<()> {
    let root = Image::ext4(&Tree::busybox()?, 32)?;
    let volume = Image::ext4(&Tree::empty()?.file("here", 0o644, "volume")?, 32)?;
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("vm.vsock");
    let events = UnixListener::bind(dir.path().join("vm.vsock_7077"))?;
    let first = document("template", 1, 10);
    let mut vm = Vm::builder()
        .config(&first)
        .nic()
        .vsock(&socket)
        .arg("PIGEON_MMDS_TIMEOUT_MS=500")
        .arg("PIGEON_EVENTS_PORT=7077")
        .disk(&root)
        .disk(&volume)
        .timeout(TIMEOUT)
        .boot()?;
    let (sender, received) = mpsc::channel();
    thread::spawn(move || -> Result<()> {
        for stream in events.incoming() {
            for line in BufReader::new(stream?).lines() {
                sender.send(serde_json::from_str::<Value>(&line?)?)?;
            }
        }
        Ok(())
    });
    assert_counting(&vm, &["workload"])?;
    assert_is(&mut vm, "template", 1)?;

    // Without a hold and with the same document: the workload's own routes stay.
    exec(
        &mut vm,
        "ip route add 10.9.0.0/16 via 10.0.1.1; ping -c 1 -W 5 10.0.1.30 && ip neigh | grep -q 10.0.1.30",
    )?;
    let mut api = vm.api()?;
    let same = restore(&mut api, json!({"config": first}))?
        .success()?
        .json()?;
    assert_eq!(
        (&same["generation"], &same["changed"], &same["config"]),
        (&json!(2), &json!([]), &json!("call")),
        "{same}"
    );
    assert_eq!(
        (&same["reseeded"], &same["clock_step_ms"]),
        (&json!(false), &json!(0))
    );
    vm.wait_for("got usr1")?;
    assert_eq!(
        exec(
            &mut vm,
            "cat /run/pigeon/generation; ip route | grep 10.9.0.0"
        )?
        .trim_end(),
        "2\n10.9.0.0/16 via 10.0.1.1 dev eth0"
    );
    assert_eq!(exec(&mut vm, "ip neigh | grep 10.0.1.30 || true")?, "");

    // A hold with failing restores: the workload stays frozen.
    prepare(&mut api, json!({"token": "a1"}))?.success()?;
    for (body, status, step) in [
        (json!({"config": first}), 409, Value::Null),
        (json!({"token": "b2", "config": first}), 409, Value::Null),
        (
            json!({"token": "a1", "entropy": "Zg="}),
            500,
            json!("entropy"),
        ),
        (json!({"token": "a1", "unix_us": 1}), 500, json!("clock")),
        (
            json!({"token": "a1", "config": {"MTU": "x"}}),
            400,
            Value::Null,
        ),
        (
            json!({"token": "a1", "config": {"Mounts": [{"MountPath": "data"}]}}),
            500,
            json!("config"),
        ),
        (
            json!({"token": "a1", "config": {"IPConfigs": [{"IP": "10.0.2.7", "Mask": 24, "Device": "eth9"}]}}),
            500,
            json!("network"),
        ),
        (
            json!({"token": "a1", "config": {"Mounts": [{"MountPath": "/data", "DevicePath": "/dev/none"}]}}),
            500,
            json!("mounts"),
        ),
    ] {
        let refused = restore(&mut api, body.clone())?;
        assert_eq!(refused.status, status, "{body}: {}", refused.text());
        assert_eq!(refused.json()?["step"], step, "{body}: {}", refused.text());
    }
    assert_still(&vm, &["workload"]);

    // Another VM, with a clock that is years behind.
    let mut second = document("clone", 2, 12);
    second["Mounts"] = json!([{"DevicePath": "/dev/vdb", "MountPath": "/data"}]);
    let body = json!({
        "token": "a1",
        "unix_us": 1_000_000_000_000_000u64,
        "entropy": "bm90aGluZyBidXQgdGhlIGhvc3Qga25vd3MgdGhlc2Uu",
        "config": second,
    });
    let other = restore(&mut api, body)?.success()?.json()?;
    assert_eq!(
        (&other["generation"], &other["reseeded"]),
        (&json!(3), &json!(true)),
        "{other}"
    );
    assert_eq!(
        other["changed"],
        json!([
            "ExtraEnv",
            "MTU",
            "IPConfigs",
            "Hostname",
            "Mounts",
            "EtcResolv",
            "EtcHosts",
            "RestoreSignal"
        ])
    );
    assert!(
        other["clock_step_ms"]
            .as_i64()
            .is_some_and(|step| step < -600_000_000_000),
        "{other}"
    );
    assert!(
        other["elapsed_us"].as_u64().is_some_and(|time| time > 0),
        "{other}"
    );
    vm.wait_for("got usr2")?;
    assert_counting(&vm, &["workload"])?;
    assert_is(&mut vm, "clone", 2)?;
    let now = seconds(&mut vm)?;
    assert!((1_000_000_000..1_000_000_200).contains(&now), "{now}");
    let rest = exec(
        &mut vm,
        "cat /run/pigeon/generation /data/here; ip route | grep -c 10.9.0.0; ip neigh | grep -c 10.0.1; ip -6 route | grep -c fd00:1: || true",
    )?;
    assert_eq!(rest, "3\nvolume0\n0\n0\n");

    // And back, years later, without a hold. The workload has a route to an old gateway and a mount over one
    // of our files, and sysfs does not show the interfaces.
    exec(
        &mut vm,
        "ip -6 route add fd99::/64 via fd00:2::1
        cp /etc/hosts /run/theirs && mount --bind /run/theirs /etc/hosts
        mount -t tmpfs none /sys/class/net",
    )?;
    let body = json!({"unix_us": 2_000_000_000_000_000u64, "config": document("again", 3, 10)});
    let again = restore(&mut api, body)?.success()?.json()?;
    assert_eq!(again["generation"], 4, "{again}");
    exec(&mut vm, "umount /sys/class/net")?;
    assert_is(&mut vm, "again", 3)?;
    assert_eq!(exec(&mut vm, "ip -6 route | grep fd99 || true")?, "");
    exec(&mut vm, "umount /etc/hosts && umount /etc/hosts")?;
    let now = seconds(&mut vm)?;
    assert!((2_000_000_000..2_000_000_200).contains(&now), "{now}");

    // What a document no longer has is removed, but lo's own address stays, also when a step fails.
    let mut alone = document("alone", 3, 10);
    alone["EtcHosts"] = json!([]);
    for entry in alone["IPConfigs"].as_array_mut().into_iter().flatten() {
        entry["Gateway"] = json!("");
    }
    let mut with_lo = alone.clone();
    with_lo["IPConfigs"] = json!([{"IP": "10.7.0.7", "Mask": 32, "Device": "lo"}]);
    with_lo["Mounts"] = json!([{"MountPath": "/none", "DevicePath": "/dev/none"}]);
    let failed = restore(&mut api, json!({"config": with_lo}))?;
    assert_eq!(failed.json()?["step"], "mounts", "{}", failed.text());
    let addresses =
        "ip -o addr show scope global | awk '{print $4}' | sort; ping -c 1 -W 5 127.0.0.1 >&2";
    assert_eq!(exec(&mut vm, addresses)?, "10.7.0.7/32\n");
    restore(&mut api, json!({"config": alone}))?.success()?;
    assert_eq!(exec(&mut vm, addresses)?, "10.0.3.7/24\nfd00:3::7/64\n");
    let stale = "ip route | grep default; ip -6 route | grep default; grep db /etc/hosts; true";
    assert_eq!(exec(&mut vm, stale)?, "");
    let again = document("again", 3, 10);
    restore(&mut api, json!({"config": again}))?.success()?;
    assert_is(&mut vm, "again", 3)?;
    restore(&mut api, json!({"config": alone}))?.success()?;
    assert_eq!(exec(&mut vm, stale)?, "");
    // This includes what a failed restore has left.
    let mut broken = again.clone();
    broken["Mounts"] = json!([{"MountPath": "/none", "DevicePath": "/dev/none"}]);
    let failed = restore(&mut api, json!({"config": broken}))?;
    assert_eq!(failed.json()?["step"], "mounts", "{}", failed.text());
    restore(&mut api, json!({"config": alone}))?.success()?;
    assert_eq!(exec(&mut vm, stale)?, "");
    restore(&mut api, json!({"config": again}))?.success()?;

    // MMDS does not respond, just as at boot: the old document stays.
    let without = restore(&mut api, json!({}))?.success()?.json()?;
    assert_eq!(
        (&without["generation"], &without["config"]),
        (&json!(10), &json!("none"))
    );
    vm.wait_for("restore: MMDS: no answer; the old configuration stays")?;
    assert_is(&mut vm, "again", 3)?;

    // /run without a free page: all users can fill it.
    exec(
        &mut vm,
        "dd if=/dev/zero of=/run/lock/fill bs=64k 2>/dev/null; true",
    )?;
    restore(&mut api, json!({"config": document("again", 3, 10)}))?.success()?;
    let generation = exec(&mut vm, "cat /run/pigeon/generation; rm /run/lock/fill")?;
    assert_eq!(generation, "11\n");

    // A full disk.
    exec(
        &mut vm,
        "dd if=/dev/zero of=/fill bs=64k 2>/dev/null; dd if=/dev/zero of=/fill2 bs=512 2>/dev/null; true",
    )?;
    let before = exec(&mut vm, "stat -c %i /etc/hosts")?;
    restore(&mut api, json!({"config": document("full", 4, 10)}))?.success()?;
    assert_is(&mut vm, "full", 4)?;
    // The file is in memory, and was replaced there.
    assert_ne!(exec(&mut vm, "stat -c %i /etc/hosts")?, before);
    assert_eq!(
        exec(&mut vm, "grep -c ' /etc/.* tmpfs ' /proc/mounts")?,
        "2\n"
    );
    exec(&mut vm, "rm /fill /fill2")?;
    let last = restore(&mut api, json!({"config": document("last", 5, 10)}))?
        .success()?
        .json()?;
    assert_eq!(last["generation"], 13);
    assert_is(&mut vm, "last", 5)?;

    let restored: Vec<Value> = received
        .try_iter()
        .filter(|event| event["event"] == "restored")
        .collect();
    let wanted: Vec<Value> = (2..=13)
        .map(|generation| json!({"event": "restored", "generation": generation}))
        .collect();
    assert_eq!(restored, wanted);
    vm.stop()?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check()?;
    volume.check()
}

#[test]
fn a_restore_fetches_the_document_from_mmds() -> Result<()> {
    let root = Image::ext4(&Tree::busybox()?, 32)?;
    // The document pushed after the boot's request is the clone's.
    let mmds = Mmds::serving(document("clone", 2, 12))
        .before(Before::Document(document("template", 1, 10)))
        .push(Push::AfterRequests(1));
    let mut vm = Vm::builder()
        .mmds(mmds)
        .on_qemu()
        .disk(&root)
        .timeout(TIMEOUT)
        .boot()?;
    assert_counting(&vm, &["workload"])?;
    assert_is(&mut vm, "template", 1)?;
    let mut api = vm.api()?;
    prepare(&mut api, json!({"token": "a1"}))?.success()?;
    let reply = restore(&mut api, json!({"token": "a1"}))?
        .success()?
        .json()?;
    assert_eq!(
        (&reply["config"], &reply["changed"]),
        (
            &json!("mmds"),
            &json!([
                "ExtraEnv",
                "MTU",
                "IPConfigs",
                "Hostname",
                "EtcResolv",
                "EtcHosts",
                "RestoreSignal"
            ])
        )
    );
    assert_is(&mut vm, "clone", 2)?;
    vm.wait_for("got usr2")?;
    let link = exec(&mut vm, "ip addr show dev eth0; ip route")?;
    assert!(!link.contains("169.254"), "{link}");
    // The workload's own route to the service is not removed.
    let before = exec(&mut vm, "ip route add 169.254.169.254 dev eth0; ip route")?;
    assert!(before.contains("169.254.169.254 dev eth0"), "{before}");
    let reply = restore(&mut api, json!({}))?.success()?.json()?;
    assert_eq!(
        (&reply["config"], &reply["changed"]),
        (&json!("mmds"), &json!([]))
    );
    assert_is(&mut vm, "clone", 2)?;
    assert_eq!(exec(&mut vm, "ip route")?, before);
    vm.stop()?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check()
}

#[test]
fn a_restore_call_fails_when_mmds_is_gone() -> Result<()> {
    let root = Image::ext4(&Tree::busybox()?, 32)?;
    let mut faults = vec![Fault::Drip(Duration::from_micros(1))];
    faults.resize(64, Fault::Silent);
    let first = document("template", 1, 10);
    let mut vm = Vm::builder()
        .mmds(Mmds::serving(first.clone()).faults(faults))
        .on_qemu()
        .disk(&root)
        .timeout(TIMEOUT)
        .boot()?;
    assert_counting(&vm, &["workload"])?;
    let mut api = vm.api()?;
    prepare(&mut api, json!({"token": "a1"}))?.success()?;
    // PID 1 does not block.
    api.send(
        b"POST /v1/restore HTTP/1.1\r\nHost: x\r\nContent-Length: 14\r\n\r\n{\"token\":\"a1\"}",
    )?;
    let start = Instant::now();
    vm.api()?.get("/v1/status")?.success()?;
    assert!(
        start.elapsed() < Duration::from_secs(2),
        "{:?}",
        start.elapsed()
    );
    let failed = api.receive(false)?;
    assert_eq!(
        (failed.status, &failed.json()?["step"]),
        (500, &json!("config")),
        "{}",
        failed.text()
    );
    assert!(error(&failed)?.starts_with("MMDS: "), "{}", failed.text());
    assert_still(&vm, &["workload"]);
    let given = restore(&mut api, json!({"token": "a1", "config": first}))?
        .success()?
        .json()?;
    assert_eq!(
        (&given["generation"], &given["changed"]),
        (&json!(2), &json!([]))
    );
    assert_counting(&vm, &["workload"])?;
    assert_is(&mut vm, "template", 1)?;
    // The configuration in force is the call's.
    let kept = restore(&mut api, json!({}))?.success()?.json()?;
    assert_eq!(kept["config"], "none", "{kept}");
    assert_is(&mut vm, "template", 1)?;
    vm.stop()?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check()
}

/// The timeout for MMDS in the test below.
const MMDS_TIMEOUT: Duration = Duration::from_secs(6);

/// A shell command that changes the generation of the vmclock.
fn set_generation(generation: u8) -> String {
    format!(
        "printf '\\{generation:03o}' | dd of=/dev/vmclock0 bs=1 seek=104 conv=notrunc 2>/dev/null"
    )
}

/// With disks that hang: one to be mounted, and one to be synced.
#[test]
fn a_restore_blocked_by_a_disk_is_given_up() -> Result<()> {
    let root = Image::ext4(&Tree::busybox()?, 32)?;
    let disks = [
        Image::ext4(&Tree::empty()?, 32)?,
        Image::ext4(&Tree::empty()?, 8)?,
    ];
    let data = json!({"DevicePath": "/dev/vdb", "MountPath": "/data"});
    let script = "trap 'exit 7' TERM; echo ready; while :; do sleep 0.05; done";
    let first = guest::shell(script, json!({"Mounts": [&data]}));
    let mut vm = Vm::builder()
        .config(&first)
        .on_qemu()
        .disk(&root)
        .disk(&disks[0])
        .disk(&disks[1])
        .timeout(TIMEOUT)
        .boot()?;
    vm.wait_for("ready")?;
    let throttle = |vm: &mut Vm, disk: usize, rate: u64| {
        let limits = json!({"device": format!("disk{disk}"), "bps": rate, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0});
        vm.qmp("block_set_io_throttle", limits).map(drop)
    };
    let mut api = vm.api()?;
    api.set_read_timeout(TIMEOUT)?;

    // Names and addresses of a restore that timed out are removed by the next one.
    throttle(&mut vm, 2, 1)?;
    let mut hangs = first.clone();
    hangs["Mounts"] = json!([&data, {"DevicePath": "/dev/vdc", "MountPath": "/more"}]);
    hangs["EtcHosts"] = json!([{"Host": "gone", "IP": "10.0.0.9"}]);
    hangs["IPConfigs"] = json!([{"IP": "10.7.0.7", "Mask": 32, "Device": "lo"}]);
    let failed = restore(&mut api, json!({"config": hangs}))?;
    assert_eq!(
        (failed.status, &failed.json()?["step"]),
        (504, &json!("mounts")),
        "{}",
        failed.text()
    );
    let left = "ip addr show dev lo | grep -c 10.7.0.7; grep -c gone /etc/hosts; true";
    assert_eq!(exec(&mut vm, left)?, "1\n1\n");
    restore(&mut api, json!({"config": first}))?.success()?;
    assert_eq!(exec(&mut vm, left)?, "0\n0\n");
    throttle(&mut vm, 2, 1 << 30)?;

    // A workload that is being stopped is not held: it has its full timeout, however long the disk takes.
    exec(
        &mut vm,
        "dd if=/dev/zero of=/data/file bs=64k count=64 2>/dev/null",
    )?;
    throttle(&mut vm, 1, 1)?;
    let body = json!({"token": "a1"}).to_string();
    let head = "POST /v1/snapshot/prepare HTTP/1.1\r\nHost: x\r\nContent-Length: ";
    api.send(format!("{head}{}\r\n\r\n{body}", body.len()).as_bytes())?;
    thread::sleep(STILL);
    let mut other = vm.api()?;
    let stop = json!({"timeout_ms": 15_000});
    other.post("/v1/stop", &stop)?.success()?;
    let held = api.receive(false)?;
    assert_eq!(
        (held.status, error(&held)?),
        (409, "the workload is not running".into())
    );
    assert_eq!(other.get("/v1/exit_code")?.json()?["code"], 7);
    throttle(&mut vm, 1, 1 << 30)?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check()?;
    disks[0].check()
}

fn restores(vm: &Vm) -> usize {
    vm.console().matches("msg=\"restored\"").count()
}

/// Makes the kernel log something: its help, with the keys Alt, SysRq and H, or a break and that letter on
/// the console.
fn make_kernel_log(vm: &mut Vm) -> Result<()> {
    if !assets::arch().has_keyboard() {
        vm.qmp("chardev-send-break", json!({"id": "console"}))?;
        return vm.type_text("h");
    }
    let keys = ["alt", "sysrq", "h"].map(|key| json!({"type": "qcode", "data": key}));
    vm.qmp("send-key", json!({"keys": keys})).map(drop)
}

/// With a file instead of the device, which cannot be polled: it is read when the kernel logs something.
#[test]
fn a_new_vmclock_generation_triggers_a_restore() -> Result<()> {
    let attack = assets::guest_program("attack")?;
    let root = Image::ext4(&Tree::busybox()?.file("/bin/attack", 0o755, attack)?, 32)?;
    let volume = Image::ext4(&Tree::empty()?, 32)?;
    let mut first = document("template", 1, 10);
    first["Mounts"] = json!([{"DevicePath": "/dev/vdb", "MountPath": "/data"}]);
    // MMDS serves the boot's connection, and is silent afterwards.
    let mut faults = vec![Fault::Drip(Duration::from_micros(1))];
    faults.resize(256, Fault::Silent);
    let mut vm = Vm::builder()
        .mmds(
            Mmds::serving(first)
                .push(Push::After(Duration::from_secs(4)))
                .faults(faults),
        )
        .on_qemu()
        .arg(&format!(
            "PIGEON_MMDS_TIMEOUT_MS={}",
            MMDS_TIMEOUT.as_millis()
        ))
        .disk(&root)
        .disk(&volume)
        .timeout(TIMEOUT)
        .boot()?;
    let throttle = |vm: &mut Vm, rate: u64| {
        let limits = json!({"device": "disk1", "bps": rate, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0});
        vm.qmp("block_set_io_throttle", limits).map(drop)
    };
    // While the volume hangs, the API is up but the workload is not started.
    throttle(&mut vm, 1)?;
    let page = "{ printf 'VCLK\\0\\020\\0\\0\\001'; head -c 16 /dev/zero; printf '\\001'; head -c 86 /dev/zero; } >/dev/vmclock0";
    exec(&mut vm, page)?;
    exec(&mut vm, "test $(stat -c %s /dev/vmclock0) = 112")?;
    let early = restore(&mut vm.api()?, json!({}))?;
    assert_eq!(
        (early.status, error(&early)?),
        (409, "the workload is not running".into())
    );
    throttle(&mut vm, 1 << 30)?;
    assert_counting(&vm, &["workload"])?;

    // Held, and restored by the kernel's notification, which waits for MMDS; the host's call does not. PID 1
    // then waits for events with another epoll instance.
    exec(&mut vm, &set_generation(2))?;
    let mut api = vm.api()?;
    for _ in 0..1100 {
        api.get("/v1/status")?.success()?;
    }
    prepare(&mut api, json!({"token": "a1"}))?.success()?;
    make_kernel_log(&mut vm)?;
    assert_still(&vm, &["workload"]);
    let start = Instant::now();
    let body = json!({"token": "a1", "config": document("clone", 2, 12)});
    let reply = restore(&mut api, body)?.success()?.json()?;
    assert!(start.elapsed() < MMDS_TIMEOUT / 2, "{:?}", start.elapsed());
    assert_eq!(
        (&reply["generation"], &reply["config"]),
        (&json!(2), &json!("call"))
    );
    assert_counting(&vm, &["workload"])?;
    assert_is(&mut vm, "clone", 2)?;
    assert_eq!(restores(&vm), 1, "{}", vm.console());
    let link = exec(&mut vm, "ip addr show dev eth0; ip route")?;
    assert!(!link.contains("169.254"), "{link}");

    // Without a call or MMDS, the workload continues with the old document. A later call belongs to the same
    // restore.
    exec(&mut vm, &set_generation(3))?;
    prepare(&mut api, json!({"token": "b2"}))?.success()?;
    make_kernel_log(&mut vm)?;
    vm.wait_for("the old configuration stays")?;
    vm.wait_for("msg=\"restored\" generation=3")?;
    assert_counting(&vm, &["workload"])?;
    assert_is(&mut vm, "clone", 2)?;
    let body = json!({"token": "b2", "config": document("late", 3, 12)});
    let reply = restore(&mut api, body.clone())?.success()?.json()?;
    assert_eq!(reply["generation"], 3, "{reply}");
    assert_is(&mut vm, "late", 3)?;
    assert_eq!(restore(&mut api, body)?.status, 409);

    // What the kernel reports after a call's restore is about that one.
    exec(&mut vm, &set_generation(4))?;
    let body = json!({"config": document("early", 4, 12)});
    let reply = restore(&mut api, body)?.success()?.json()?;
    assert_eq!(reply["generation"], 4, "{reply}");
    exec(&mut vm, "echo x >/dev/kmsg")?;
    thread::sleep(MMDS_TIMEOUT + Duration::from_secs(2));
    assert_eq!(exec(&mut vm, "cat /run/pigeon/generation")?, "4\n");

    // Processes are not held if the kernel reports a restore while they are being frozen.
    let write = "dd if=/dev/zero of=/data/file bs=64k count=16 2>/dev/null";
    exec(&mut vm, &format!("{write}; {}", set_generation(5)))?;
    throttle(&mut vm, 1)?;
    let body = json!({"token": "c3"}).to_string();
    let head = "POST /v1/snapshot/prepare HTTP/1.1\r\nHost: x\r\nContent-Length: ";
    api.send(format!("{head}{}\r\n\r\n{body}", body.len()).as_bytes())?;
    thread::sleep(STILL);
    make_kernel_log(&mut vm)?;
    thread::sleep(STILL);
    throttle(&mut vm, 1 << 30)?;
    let refused = api.receive(false)?;
    assert_eq!(
        (refused.status, error(&refused)?),
        (409, "the VM was restored from a snapshot meanwhile".into())
    );
    vm.wait_for("msg=\"restored\" generation=5")?;
    assert_counting(&vm, &["workload"])?;

    // A restore during a restore is not lost.
    exec(
        &mut vm,
        &format!(
            "{}; echo x >/dev/kmsg; sleep 1; {}; echo x >/dev/kmsg",
            set_generation(6),
            set_generation(7)
        ),
    )?;
    vm.wait_for("msg=\"restored\" generation=6")?;
    vm.wait_for("msg=\"restored\" generation=7")?;
    // The same generation again is not a restore.
    exec(
        &mut vm,
        "echo '<5>random: crng reseeded due to virtual machine fork' >/dev/kmsg",
    )?;
    thread::sleep(Duration::from_secs(2));
    assert_eq!(exec(&mut vm, "cat /run/pigeon/generation")?, "7\n");

    // A restore that cannot be started is retried.
    exec(
        &mut vm,
        &format!(
            "{}; attack starve 3 & sleep 1; echo x >/dev/kmsg; wait",
            set_generation(8)
        ),
    )?;
    vm.wait_for("out of memory")?;
    vm.wait_for("msg=\"restored\" generation=8")?;
    vm.stop()?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check()?;
    volume.check()
}

/// Pages that PID 1 has touched, or copied after a fork, since it started (proc_pid_stat(5), minflt).
fn pages_touched(vm: &mut Vm) -> Result<i64> {
    Ok(exec(vm, "cut -d ' ' -f 10 /proc/1/stat")?.trim().parse()?)
}

/// With the guest's deterministic clock: figures do not depend on the machine.
#[test]
fn a_hold_and_a_restore_take_little_time_and_few_pages() -> Result<()> {
    let root = Image::ext4(&Tree::busybox()?, 32)?;
    let first = document("template", 1, 10);
    let mut vm = Vm::builder()
        .config(&first)
        .nic()
        .deterministic()
        .disk(&root)
        .timeout(TIMEOUT)
        .boot()?;
    assert_counting(&vm, &["workload"])?;
    let clone = document("clone", 2, 12);
    // The minimum of several: sometimes another process runs meanwhile.
    for (name, configs, limits) in [
        ("nothing changed", [&first, &first], [5, 1000, 40]),
        ("names and addresses", [&clone, &first], [5, 3000, 40]),
    ] {
        let mut least = [u64::MAX; 3];
        for config in configs.iter().cycle().take(8) {
            // The pages of two commands, without a restore in between and with one.
            let before = pages_touched(&mut vm)?;
            let between = pages_touched(&mut vm)?;
            let mut api = vm.api()?;
            let held = prepare(&mut api, json!({"token": "a1"}))?;
            let held = held.success()?.json()?;
            let body = json!({"token": "a1", "config": config});
            let restored = restore(&mut api, body)?.success()?.json()?;
            drop(api);
            let touched = pages_touched(&mut vm)? - between - (between - before);
            let figures = [
                held["freeze_ms"].as_u64().context("no freeze_ms")?,
                restored["elapsed_us"].as_u64().context("no elapsed_us")?,
                u64::try_from(touched)?,
            ];
            least = std::array::from_fn(|at| least[at].min(figures[at]));
        }
        eprintln!("{name}: freeze_ms, elapsed_us, pages: {least:?}");
        for (figure, limit) in least.iter().zip(limits) {
            assert!(*figure <= limit, "{name}: {least:?}, not {limits:?}");
        }
    }
    vm.stop()?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check()
}
