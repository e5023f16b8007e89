//! Workloads that attack PID 1, the shutdown, and the machine's memory.

use std::{
    io::Write,
    os::unix::net::UnixStream,
    panic::{self, AssertUnwindSafe},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use pigeon_lab::{
    End, Vm, assets,
    disk::{Image, Tree},
    guest,
    http::Client,
    vsock,
    ws::Socket,
};
use serde_json::{Value, json};

/// Prints more than the log of output holds (64 KiB by default), and more than a command's response.
const FILL: &str = "yes 'a flood of output' | head -c 200000";

type Api = Client<UnixStream>;

/// Long, as other VMs may run at the same time.
const TIMEOUT: Duration = Duration::from_secs(180);

/// A root with the program of `attack.c`.
fn tree() -> Result<Tree> {
    Tree::busybox()?.file("/bin/attack", 0o755, assets::guest_program("attack")?)
}

/// Runs a shell command as `user`.
fn exec(api: &mut Api, user: &str, script: &str) -> Result<Value> {
    let body = json!({"cmd": ["sh", "-c", script], "user": user, "timeout_ms": 120_000});
    api.post("/v1/exec", &body)?.success()?.json()
}

/// The output of a command that succeeds.
fn output(api: &mut Api, script: &str) -> Result<String> {
    let response = exec(api, "root", script)?;
    ensure!(response["exit_code"] == 0, "{script}: {response}");
    Ok(response["stdout"].as_str().context("no text")?.into())
}

/// Sends calls and commands, each on its own connection, until `stop` is set. Returns the number of valid
/// responses, and the longest time.
fn burst(socket: &std::path::Path, stop: &AtomicBool) -> Result<(u32, Duration)> {
    let (mut count, mut slowest) = (0, Duration::ZERO);
    while !stop.load(Ordering::Relaxed) {
        let start = Instant::now();
        let stream = vsock::connect(socket, vsock::API_PORT, TIMEOUT)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        let mut api = Client::new(stream);
        ensure!(api.get("/v1/status")?.status == 200);
        let response = api.post("/v1/exec", &json!({"cmd": ["/bin/echo", "here"]}))?;
        ensure!(response.json()?["stdout"] == "here\n", "{response}");
        slowest = slowest.max(start.elapsed());
        count += 1;
    }
    Ok((count, slowest))
}

/// PID 1's memory in KiB without its program, whose pages are counted when they are first used. Buffers that
/// fill once are full: a connection's, and the log if the workload started with `FILL`.
fn memory(vm: &mut Vm) -> Result<u32> {
    exec(&mut vm.api()?, "root", FILL)?;
    // Mappings that change meanwhile may only be counted in part.
    let script = "for i in 1 2 3; do awk '/^Pss_Anon:/ {print $2}' /proc/1/smaps_rollup; done | sort -n | tail -n 1";
    Ok(output(&mut vm.api()?, script)?.trim().parse()?)
}

#[test]
fn a_workload_that_attacks_pid_1_harms_only_itself() -> Result<()> {
    let root = Image::ext4(&tree()?, 32)?;
    let volume = Image::ext4(&Tree::empty()?, 16)?;
    // Ignores the signals that PID 1 forwards, and prints a lot on request. The process that has to survive
    // the fork bomb is not a shell, which exits if it cannot fork.
    let script = format!(
        "trap '' HUP INT QUIT USR1 USR2 TERM; echo kept >/data/file
        mkfifo /run/now
        setsid attack last /run/now &
        {FILL}
        (while :; do [ ! -e /run/flood ] || {FILL}; sleep 0.05; done) &
        echo ready
        exec attack nothing"
    );
    let config = guest::shell(
        &script,
        json!({"Mounts": [{"DevicePath": "/dev/vdb", "MountPath": "/data"}]}),
    );
    let mut vm = Vm::builder()
        .config(&config)
        .disk(&root)
        .disk(&volume)
        // Each fork that a cgroup denies leaves a process's memory to RCU, of which 10,000 may be pending
        // (qhimark, kernel/rcu/tree.c): on a slow machine, a fork bomb in a cgroup holds 256 MiB.
        .memory_mib(512)
        .timeout(TIMEOUT)
        .boot()?;
    vm.wait_for("ready")?;
    let (mut api, mut waiting) = (vm.api()?, vm.api()?);
    waiting.send(b"GET /v1/exit_code HTTP/1.1\r\nHost: x\r\n\r\n")?;

    let before = memory(&mut vm)?;

    // Bursts of calls and commands during the attack.
    let socket = vm.vsock().context("no vsock")?.to_owned();
    let stop = AtomicBool::new(false);
    let bursts = thread::scope(|scope| {
        let burst = scope.spawn(|| burst(&socket, &stop));
        // They must stop if an assertion fails, too, as the scope waits for its threads.
        let attacked = panic::catch_unwind(AssertUnwindSafe(|| attack(&mut api)));
        stop.store(true, Ordering::Relaxed);
        let bursts = burst.join().expect("no panic");
        attacked
            .unwrap_or_else(|failed| panic::resume_unwind(failed))
            .and(bursts)
    })?;
    println!("{} bursts, the slowest in {:?}", bursts.0, bursts.1);
    assert!(bursts.0 >= 10, "{}", bursts.0);
    // A connection keeps the pages used for a response.
    api = vm.api()?;
    let after = memory(&mut vm)?;
    println!("PID 1: {before} KiB before, {after} KiB after");
    assert!(after <= before + 64, "{before} {after}");

    // No free descriptor: a new client waits, and PID 1 is idle.
    let shut = ["sh", "-c", "attack shut 4 | tee /dev/console"];
    api.send(&exec_request(&shut))?;
    vm.wait_for("shut")?;
    let mut waits = vm.api()?;
    waits.send(b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n")?;
    let response = api.receive(false)?.json()?;
    let busy = response["stdout"]
        .as_str()
        .and_then(|text| text.lines().nth(1));
    let busy: u32 = busy.context("no time")?.parse()?;
    println!("PID 1 was busy for {busy} of 400 ticks without descriptors");
    assert!(busy <= 100, "{busy}");
    assert_eq!(waits.receive(false)?.status, 200);

    // No free process: a fork bomb uses all of them.
    output(&mut api, "echo 400 >/proc/sys/kernel/pid_max")?;
    let mut bomb = vm.api()?;
    bomb.send(&exec_request(&["attack", "bomb"]))?;
    let start = Instant::now();
    loop {
        let response = api.post("/v1/exec", &json!({"cmd": ["true"]}))?;
        if response.status == 500 {
            assert!(
                response.text().contains("start a process: EAGAIN"),
                "{response}"
            );
            break;
        }
        ensure!(
            start.elapsed() < TIMEOUT,
            "the fork bomb has no effect: {response}"
        );
    }
    assert_eq!(api.get("/v1/status")?.status, 200);
    // kill(-1) by root, from a process that was started before, reaches all processes but PID 1.
    drop(bomb);
    let start = Instant::now();
    let ended = loop {
        let response = api.post("/v1/exec", &json!({"cmd": ["sh", "-c", "echo >/run/now"]}));
        if response.is_err() || response.is_ok_and(|response| response.status == 200) {
            break waiting.receive(false)?.json()?;
        }
        ensure!(start.elapsed() < TIMEOUT, "no process can be started");
    };
    assert_eq!(ended, json!({"code": 137, "oom_killed": false}));
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check()?;
    volume.check()?;
    assert_eq!(volume.read("/file")?, "kept\n");
    Ok(())
}

/// The workload sends signals to commands of `nobody` before they execute, while they share PID 1's memory:
/// this must only affect the commands.
fn strike(rest: Value) -> Result<()> {
    let root = Image::ext4(&tree()?, 32)?;
    // PID 1's threads exist by then, so their IDs are not taken for those of commands.
    let script = "echo ready; sleep 1; exec attack strike";
    let mut vm = Vm::builder()
        .config(&guest::shell(script, rest))
        .disk(&root)
        .cpus(2)
        .timeout(TIMEOUT)
        .boot()?;
    vm.wait_for("ready")?;
    let mut struck = 0;
    // The workload is stopped while the results are checked.
    let mut run = |struck: &mut u32| -> Result<(String, String)> {
        for _ in 0..100 {
            let body = json!({"cmd": ["/bin/echo", "here"], "user": "nobody"});
            let response = vm.api()?.post("/v1/exec", &body)?.success()?.json()?;
            match response["exit_code"].as_i64() {
                Some(0) => ensure!(response["stdout"] == "here\n", "{response}"),
                _ => *struck += 1,
            }
        }
        let mut api = vm.api()?;
        let stop = api.post("/v1/signals", &json!({"signal": 19}))?;
        let rollup = output(&mut api, "cat /proc/1/smaps_rollup")?;
        let files = output(&mut api, "ls /")?;
        let go_on = api.post("/v1/signals", &json!({"signal": 18}))?;
        ensure!(stop.status == 200 && go_on.status == 200, "{stop} {go_on}");
        Ok((rollup, files))
    };
    let pss = |rollup: &str| -> Result<u32> {
        let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"));
        let size = line.and_then(|size| size.split_whitespace().next());
        Ok(size.context("no Pss")?.parse()?)
    };
    let before = pss(&run(&mut struck)?.0)?;
    let start = Instant::now();
    let (after, files) = loop {
        let (rollup, files) = run(&mut struck)?;
        if struck >= 20 {
            break (pss(&rollup)?, files);
        }
        ensure!(start.elapsed() < TIMEOUT, "{struck} struck");
    };
    println!("{struck} struck; PID 1: {before} KiB before, {after} KiB after");
    assert!(after <= before + 16, "{before} {after}");
    assert!(!files.contains("core"), "{files}");
    assert_eq!(vm.api()?.get("/v1/status")?.status, 200);
    Ok(())
}

#[test]
fn commands_killed_before_execve_leave_pid_1_intact() -> Result<()> {
    strike(json!({"Rlimits": {"CORE": "unlimited"}}))
}

/// A command's user can send it signals once it runs as that user. The kernel is set to dump core for
/// programs with changed IDs, as with systemd-coredump and apport.
#[test]
fn commands_killed_by_their_user_do_not_leak_pid_1s_memory() -> Result<()> {
    strike(json!({
        "UserOverride": "nobody",
        "Rlimits": {"CORE": "unlimited"},
        "Sysctls": {"fs.suid_dumpable": "2", "kernel.core_pattern": "/core.%p"},
    }))
}

#[test]
fn filling_all_memory_file_systems_leaves_some_memory() -> Result<()> {
    let root = Image::ext4(&tree()?, 32)?;
    let script = "for dir in /dev/shm /run/lock; do
            dd if=/dev/zero of=$dir/full bs=64k 2>&1 | grep -o 'No space left on device'
        done
        echo both are full; while :; do sleep 1; done";
    let config = guest::shell(script, json!({"UserOverride": "app"}));
    let mut vm = Vm::builder()
        .config(&config)
        .disk(&root)
        .memory_mib(128)
        .timeout(TIMEOUT)
        .boot()?;
    vm.wait_for("both are full")?;
    let mut api = vm.api()?;
    for _ in 0..20 {
        assert_eq!(output(&mut api, "echo here")?, "here\n");
    }
    api.post("/v1/signals", &json!({"signal": 9}))?.success()?;
    assert_eq!(api.get("/v1/exit_code")?.json()?["code"], 137);
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check()
}

fn exec_request(command: &[&str]) -> Vec<u8> {
    let body = json!({"cmd": command, "timeout_ms": 3_600_000}).to_string();
    let head = "POST /v1/exec HTTP/1.1\r\nHost: x\r\nContent-Length: ";
    format!("{head}{}\r\n\r\n{body}", body.len()).into_bytes()
}

fn attack(api: &mut Api) -> Result<()> {
    // OOM scores.
    let scores = output(api, "cat /proc/[0-9]*/oom_score_adj 2>/dev/null | sort -u")?;
    assert_eq!(scores, "0\n");

    // All signals, as root and as nobody: PID 1 has no handlers, so the kernel drops them.
    let signals = "for s in $(seq 1 64); do kill -$s 1 2>/dev/null || echo refused $s; done";
    assert_eq!(output(api, signals)?, "");
    let refused = exec(api, "nobody", signals)?;
    let refused = refused["stdout"].as_str().unwrap_or_default();
    assert_eq!(refused.matches("refused").count(), 64, "{refused}");
    let state = output(api, "awk '/^State/ {print $2}' /proc/1/status")?;
    assert!(matches!(&*state, "S\n" | "R\n"), "{state}");

    // An unprivileged workload is denied everything.
    let attempts = exec(api, "nobody", "attack meddle")?;
    let attempts = attempts["stdout"].as_str().unwrap_or_default();
    assert_eq!(attempts.lines().count(), 17, "{attempts}");
    for line in attempts.lines() {
        assert!(
            line.ends_with(": EPERM") || line.ends_with(": EACCES"),
            "{attempts}"
        );
    }

    // Endless output: on the console, and in a command's response.
    let much = |api: &mut Api, blocks: u32| -> Result<()> {
        let script = format!("dd if=/dev/zero bs=64k count={blocks} 2>/dev/null; echo the end >&2");
        let response = exec(api, "root", &script)?;
        let ended = (&response["exit_code"], &response["stderr"]);
        assert_eq!(ended, (&json!(0), &json!("the end\n")));
        assert_eq!(response["stdout_truncated"], true);
        Ok(())
    };
    output(api, "touch /run/flood")?;
    much(api, 32)?;
    output(api, "rm /run/flood")?;
    much(api, 1024)?;

    // Fills a disk, and uses all inodes.
    let full = output(
        api,
        "dd if=/dev/zero of=/var/full bs=64k 2>&1; i=0; mkdir /data/n; while true >/data/n/$i; do i=$((i + 1)); done 2>/dev/null; echo inodes $i",
    )?;
    assert!(full.contains("No space left on device"), "{full}");
    output(api, "rm -r /var/full /data/n")?;

    // A thousand orphans that exit at once, twice.
    for _ in 0..2 {
        output(
            api,
            "echo 16000 >/proc/sys/kernel/threads-max; attack orphans 500",
        )?;
    }
    let start = Instant::now();
    while output(
        api,
        "cat /proc/[0-9]*/stat 2>/dev/null | grep -c ') Z ' || true",
    )? != "0\n"
    {
        ensure!(start.elapsed() < TIMEOUT, "zombies stay");
    }

    // A fork bomb in a cgroup.
    let caged = "cage=/sys/fs/cgroup/pids/cage; mkdir -p $cage; echo 200 >$cage/pids.max
        (echo 0 >$cage/cgroup.procs; exec attack bomb) &
        while [ $(cat $cage/pids.current) -lt 200 ]; do sleep 0.05; done
        sleep 1; while [ $(cat $cage/pids.current) -gt 0 ]; do kill -KILL $(cat $cage/cgroup.procs) 2>/dev/null; done; rmdir $cage";
    output(api, caged)?;
    Ok(())
}

/// Everything that keeps a disk busy or hides it, at once; `extra` runs before the shell exits.
fn resist(extra: &str) -> Result<()> {
    let tree = tree()?.file("/loop.ko", 0o600, assets::module("loop")?)?;
    let root = Image::ext4(&tree, 32)?;
    let disk = || Image::ext4(&Tree::empty()?.dir("/sub", 0o755)?, 8);
    let disks = [disk()?, disk()?, disk()?, disk()?];
    let script = format!(
        r#"set -e
        mkdir /over /bound /hidden; insmod /loop.ko
        losetup /dev/loop0 /dev/vdc; mkdir /data/loop; mount -t ext4 /dev/loop0 /data/loop
        echo kept >/data/loop/file; echo kept >/data/file; echo kept >/var/file
        mount -o bind /data/sub /bound
        daemon() {{ (setsid sh -c "trap '' HUP INT TERM
            $1
            echo >/run/\$\$; while :; do sleep 1; done" &) & }}
        daemon 'cd /data/sub'
        daemon 'exec 9>/data/open; rm /data/open'
        daemon 'attack map /data/mapped & while [ ! -s /data/mapped ]; do sleep 0.05; done'
        daemon 'cp /bin/busybox /data/program; /data/program sleep 1000 &'
        (unshare -m sh -c "trap '' HUP INT TERM; mount -t ext4 /dev/vdd /mnt; echo kept >/mnt/file; echo >/run/\$\$; while :; do sleep 1; done" &) &
        while [ $(ls /run | grep -c '^[0-9]') -lt 5 ]; do sleep 0.05; done
        mount -t ext4 /dev/vde /over; echo kept >/over/file
        {extra}
        mount -t tmpfs tmpfs /data; mount -t tmpfs tmpfs /dev; mount -t tmpfs tmpfs /run
        mount -t tmpfs tmpfs /sys; mount -t tmpfs tmpfs /proc
        mount -o bind /over /; umount /over
        exit 3"#
    );
    let config = guest::shell(
        &script,
        json!({"Mounts": [{"DevicePath": "/dev/vdb", "MountPath": "/data"}]}),
    );
    let mut builder = Vm::builder().config(&config).disk(&root);
    for disk in &disks {
        builder = builder.disk(disk);
    }
    let mut vm = builder.timeout(TIMEOUT).boot()?;
    vm.wait_for("exit_code=3")?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check().context("the root")?;
    assert_eq!(root.read("/var/file")?, "kept\n");
    for (disk, name) in disks.iter().zip(["vdb", "vdc", "vdd", "vde"]) {
        disk.check().context(name)?;
        assert_eq!(disk.read("/file")?, "kept\n", "{name}");
    }
    assert!(disks[0].read("/mapped")?.starts_with("mapped\n"));
    Ok(())
}

#[test]
fn disks_held_hidden_and_mounted_elsewhere_are_clean() -> Result<()> {
    resist("")
}

#[test]
fn disks_are_clean_even_if_pid_1_cannot_fork_or_allocate() -> Result<()> {
    resist(
        "trap=/sys/fs/cgroup/pids/trap; mkdir $trap; echo 1 >$trap/cgroup.procs; echo 1 >$trap/pids.max
        attack limits",
    )
}

#[test]
fn a_gibibyte_of_output_and_endless_output_are_drained() -> Result<()> {
    let root = Image::ext4(&tree()?, 32)?;
    // It writes until it is killed: the console gets as much as it accepts.
    let script = format!("{FILL}; echo ready; read -r line; exec yes");
    let config = guest::shell(&script, json!({}));
    let builder = Vm::builder().config(&config).disk(&root);
    let mut vm = builder.timeout(TIMEOUT).boot()?;
    vm.wait_for("ready")?;
    let mut api = vm.api()?;
    let before = memory(&mut vm)?;
    let mut much = vm.api()?;
    let script = "dd if=/dev/zero bs=64k count=16384; echo >/run/done";
    much.send(&exec_request(&["sh", "-c", script]))?;
    let call = |vm: &mut Vm| -> Result<Duration> {
        let start = Instant::now();
        assert_eq!(vm.api()?.get("/v1/status")?.status, 200);
        Ok(start.elapsed())
    };
    let (start, mut calls, mut slowest) = (Instant::now(), 0, Duration::ZERO);
    while exec(&mut api, "root", "[ -e /run/done ]")?["exit_code"] != 0 {
        slowest = slowest.max(call(&mut vm)?);
        calls += 1;
        ensure!(start.elapsed() < TIMEOUT, "the command does not end");
        thread::sleep(Duration::from_millis(200));
    }
    let response = much.receive(false)?.success()?.json()?;
    println!(
        "a gibibyte in {:?}, {calls} calls beside it",
        start.elapsed()
    );
    let stderr = response["stderr"].as_str().unwrap_or_default();
    let whole = stderr.contains("16384+0 records out");
    assert!(response["exit_code"] == 0 && whole, "{stderr}");
    assert_eq!(response["stdout_truncated"], true);

    vm.type_text("\n")?;
    for _ in 0..20 {
        slowest = slowest.max(call(&mut vm)?);
        output(&mut api, "true")?;
    }
    println!("the slowest call took {slowest:?}");
    assert!(slowest < Duration::from_secs(20), "{slowest:?}");
    // A connection keeps the pages used for a response.
    drop(much);
    let after = memory(&mut vm)?;
    println!("PID 1: {before} KiB before, {after} KiB after");
    assert!(after <= before + 64, "{before} {after}");
    api.post("/v1/signals", &json!({"signal": 9}))?.success()?;
    let exit = api.get("/v1/exit_code")?.json()?;
    assert_eq!(exit, json!({"code": 137, "oom_killed": false}));
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check()
}

/// An unprivileged process can keep a pipe locked with splice(2).
#[test]
fn pipes_that_are_kept_locked_block_nothing_else() -> Result<()> {
    let root = Image::ext4(&tree()?, 32)?;
    let script = "attack plug 'before
' 3
        echo ready
        until [ -e /run/go ]; do sleep 0.05; done
        attack plug 'last words
' 1000
        exit 7";
    let config = guest::shell(script, json!({"UserOverride": "app"}));
    let mut vm = Vm::builder()
        .config(&config)
        .disk(&root)
        .timeout(TIMEOUT)
        .boot()?;
    vm.wait_for("workload started")?;
    let mut slowest = Duration::ZERO;
    let mut call = |vm: &mut Vm| -> Result<()> {
        let start = Instant::now();
        assert_eq!(vm.api()?.get("/v1/status")?.status, 200);
        slowest = slowest.max(start.elapsed());
        Ok(())
    };
    // Output from before and after the lock is not lost.
    while !vm.console().contains("ready\n") {
        call(&mut vm)?;
    }
    let console = vm.console();
    let all = console.find("before\n").zip(console.find("unplugged\n"));
    assert!(
        all.is_some_and(|(first, second)| first < second),
        "{console}"
    );

    // Commands and their children, more of them than the event loop allows turns.
    for text in ["", "x"].into_iter().cycle().take(20) {
        let start = Instant::now();
        let body = json!({"cmd": ["attack", "plug", text, "1000"], "user": "app"});
        let response = vm.api()?.post("/v1/exec", &body)?.success()?.json()?;
        assert_eq!(response["exit_code"], 0, "{response}");
        println!("plugged with {text:?}: answered in {:?}", start.elapsed());
        call(&mut vm)?;
    }
    assert_eq!(output(&mut vm.api()?, "echo here")?, "here\n");

    // One pipe stays locked, and the other gets data after each wait.
    let start = Instant::now();
    let mut session = Socket::open(vm.connect(vsock::API_PORT)?, "/v1/ws/exec")?;
    session
        .text(&json!({"command": ["attack", "drip", "1000"], "user": "app", "streams": true}))?;
    session.wait_end()?;
    call(&mut vm)?;
    println!("dripping: answered in {:?}", start.elapsed());
    assert!(
        start.elapsed() < Duration::from_secs(5),
        "{:?}",
        start.elapsed()
    );

    // A session's input.
    let mut session = Socket::open(vm.connect(vsock::API_PORT)?, "/v1/ws/exec")?;
    session.text(&json!({"command": ["attack", "stop-up", "2"], "user": "app"}))?;
    session.output_with("full\n")?;
    session.binary(b"lost")?;
    thread::sleep(Duration::from_millis(300));
    session.binary(b"late\n")?;
    session.text(&json!({"stdin": "eof"}))?;
    call(&mut vm)?;
    let ended = session.wait_end()?;
    assert_eq!(ended.text(), "empty\nlate\n");
    assert_eq!(
        ended.message,
        Some(json!({"Exit": {"code": 0, "signal": null}}))
    );
    call(&mut vm)?;
    println!("the slowest call took {slowest:?}");
    assert!(slowest < Duration::from_secs(2), "{slowest:?}");

    // One thread per locked pipe waits, and exits when that is unlocked: one stays for the next call, and
    // another one may be in a call.
    let threads = |vm: &mut Vm| -> Result<u32> {
        let count = output(&mut vm.api()?, "ls /proc/1/task | wc -l")?;
        Ok(count.trim().parse()?)
    };
    let held_up = threads(&mut vm)?;
    assert!(held_up >= 20, "{held_up} threads");
    output(&mut vm.api()?, "killall attack")?;
    let start = Instant::now();
    while threads(&mut vm)? > 3 {
        ensure!(
            start.elapsed() < TIMEOUT / 6,
            "{} threads",
            threads(&mut vm)?
        );
    }

    output(&mut vm.api()?, "touch /run/go")?;
    assert_eq!(vm.api()?.get("/v1/exit_code")?.json()?["code"], 7);
    assert_eq!(vm.wait_end()?, End::Reboot);
    let console = vm.console();
    assert!(console.contains("last words\n"), "{console}");
    assert!(console.contains("exit_code=7"), "{console}");
    root.check()
}

#[test]
fn output_delayed_by_a_locked_pipe_is_read_once_a_stalled_follower_is_dropped() -> Result<()> {
    let root = Image::ext4(&tree()?, 32)?;
    // When the lock is released, the log has no room for the data that was read.
    let script = "read line; attack plug '' 30; attack fill-stderr; exec sleep 100000";
    let config = guest::shell(script, json!({"SeparateStderr": true}));
    let mut vm = Vm::builder()
        .config(&config)
        .disk(&root)
        .arg("PIGEON_OUTPUT=log")
        .arg("PIGEON_LOG_KIB=4")
        .timeout(TIMEOUT)
        .boot()?;
    vm.wait_for("workload started")?;
    let mut follower = vm.connect(vsock::API_PORT)?;
    write!(
        follower,
        "GET /v1/logs?follow=1 HTTP/1.1\r\nHost: x\r\n\r\n"
    )?;
    // From here on only PID 1's timer wakes it, 30 s after the follower's last read.
    vm.type_text("\n")?;
    vm.wait_for("stderr full")?;
    vm.wait_for("stdout read")?;
    Ok(())
}

/// A VM with an idle workload, and its disk.
fn idle() -> Result<(Vm, Image)> {
    let root = Image::ext4(&tree()?, 32)?;
    let config = guest::shell("exec sleep 100000", json!({}));
    let builder = Vm::builder().config(&config).disk(&root);
    Ok((builder.timeout(TIMEOUT / 3).boot()?, root))
}

#[test]
fn commands_that_lock_their_output_immediately_block_nothing_else() -> Result<()> {
    let (mut vm, _root) = idle()?;
    let start = Instant::now();
    for round in 0..20 {
        let body = json!({"cmd": ["attack", "lock-output"], "user": "app", "timeout_ms": 50});
        let response = vm.api()?.post("/v1/exec", &body)?.success()?.json()?;
        assert_eq!(response["timed_out"], true, "{round}: {response}");
    }
    println!("twenty commands took {:?}", start.elapsed());
    Ok(())
}

#[test]
fn a_terminal_with_a_locked_size_blocks_nothing_else() -> Result<()> {
    let (mut vm, _root) = idle()?;
    let mut session = Socket::open(vm.connect(vsock::API_PORT)?, "/v1/ws/exec")?;
    let script = "attack hold-size & read a; kill -9 $!; read b; stty size";
    session.text(&json!({"command": ["sh", "-c", script], "tty": true}))?;
    session.output_with("held")?;
    thread::sleep(Duration::from_millis(500));
    for cols in 80..90 {
        session.text(&json!({"cols": cols, "rows": 24}))?;
    }
    let start = Instant::now();
    for _ in 0..10 {
        assert_eq!(vm.api()?.get("/v1/status")?.status, 200);
    }
    println!("ten calls took {:?}", start.elapsed());

    // Input still works; once the lock is released, the last size is set.
    session.binary(b"\n")?;
    output(&mut vm.api()?, "while pidof attack; do sleep 0.1; done")?;
    thread::sleep(Duration::from_millis(500));
    session.binary(b"\n")?;
    let ended = session.wait_end()?;
    assert!(ended.text().contains("24 89"), "{}", ended.text());
    Ok(())
}

#[test]
fn only_the_workload_that_eats_all_memory_is_killed() -> Result<()> {
    let root = Image::ext4(&tree()?, 32)?;
    let volume = Image::ext4(&Tree::empty()?, 16)?;
    // First files in memory, which no kill frees.
    let script = "echo kept >/data/file
        dd if=/dev/zero of=/dev/shm/full bs=64k 2>&1 | grep -c 'No space'
        exec attack eat";
    let config = guest::shell(
        script,
        json!({"UserOverride": "app", "Mounts": [{"DevicePath": "/dev/vdb", "MountPath": "/data"}]}),
    );
    let mut vm = Vm::builder()
        .config(&config)
        .disk(&root)
        .disk(&volume)
        .memory_mib(128)
        .timeout(TIMEOUT)
        .boot()?;
    let exit = vm.api()?.get("/v1/exit_code")?.json()?;
    assert_eq!(exit, json!({"code": 137, "oom_killed": true}));
    assert_eq!(vm.wait_end()?, End::Reboot);
    let console = vm.console();
    assert_eq!(console.matches("Killed process").count(), 1, "{console}");
    root.check()?;
    volume.check()?;
    assert_eq!(volume.read("/file")?, "kept\n");
    Ok(())
}

#[test]
fn memory_held_by_files_leaves_enough_for_api_and_shutdown() -> Result<()> {
    let root = Image::ext4(&tree()?, 32)?;
    let volume = Image::ext4(&Tree::empty()?, 16)?;
    // They may take half of the memory.
    let script = "echo kept >/data/file; exec attack fill /dev/shm";
    let config = guest::shell(
        script,
        json!({"UserOverride": "app", "Mounts": [{"DevicePath": "/dev/vdb", "MountPath": "/data"}]}),
    );
    let mut vm = Vm::builder()
        .config(&config)
        .disk(&root)
        .disk(&volume)
        .memory_mib(160)
        .arg("PIGEON_EXIT_LINGER_MS=600000")
        .timeout(TIMEOUT)
        .boot()?;
    vm.wait_for("Out of memory")?;
    let mut slowest = Duration::ZERO;
    for _ in 0..30 {
        let start = Instant::now();
        let mut api = vm.api()?;
        assert_eq!(api.get("/v1/status")?.status, 200);
        // There may be no memory for a command; its caller gets an error.
        let response = api.post("/v1/exec", &json!({"cmd": ["/bin/echo", "here"]}))?;
        assert!(matches!(response.status, 200 | 500), "{response}");
        slowest = slowest.max(start.elapsed());
    }
    println!("the slowest call and command took {slowest:?}");
    let mut api = vm.api()?;
    // Unless the OOM killer has killed it already.
    let killed = api.post("/v1/signals", &json!({"signal": 9}))?;
    assert!(matches!(killed.status, 200 | 409), "{killed}");
    assert_eq!(api.get("/v1/exit_code")?.json()?["code"], 137);
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check()?;
    volume.check()?;
    assert_eq!(volume.read("/file")?, "kept\n");
    Ok(())
}
