//! The shutdown: remaining processes are stopped, and every disk is clean.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use pigeon_lab::{
    End, Vm, assets,
    disk::{Image, Tree},
    guest,
};
use serde_json::{Value, json};

/// A root, and a volume for /data.
fn disks() -> Result<(Image, Image)> {
    Ok((
        Image::ext4(&Tree::busybox()?, 32)?,
        Image::ext4(&Tree::empty()?, 16)?,
    ))
}

fn with_volume(script: &str) -> Value {
    guest::shell(
        script,
        json!({"Mounts": [{"DevicePath": "/dev/vdb", "MountPath": "/data"}]}),
    )
}

/// One endless writer per disk, each in its own session and ignoring SIGTERM; the script continues when both
/// have started.
const WRITERS: &str = r#"
    for dir in /var /data; do
        setsid sh -c 'cd $0; trap "" TERM; while :; do echo $((n += 1)) >>log; cp log copy; mv copy last; done' $dir &
    done
    while [ ! -s /var/last ] || [ ! -s /data/last ]; do sleep 0.05; done
"#;

/// The writers' first data is on the disks.
fn assert_written(root: &Image, volume: &Image) -> Result<()> {
    root.check()?;
    volume.check()?;
    assert!(root.read("/var/log")?.starts_with("1\n2\n"));
    assert!(volume.read("/log")?.starts_with("1\n2\n"));
    Ok(())
}

#[test]
fn a_workload_killed_while_writing_leaves_clean_disks() -> Result<()> {
    let (root, volume) = disks()?;
    let script =
        format!("{WRITERS} echo kept >/data/synced; sync; echo also >/data/written; kill -KILL $$");
    let builder = Vm::builder()
        .config(&with_volume(&script))
        .disk(&root)
        .disk(&volume);
    let mut vm = builder.boot()?;
    let exit = vm.api()?.get("/v1/exit_code")?.json()?;
    assert_eq!(exit, json!({"code": 137, "oom_killed": false}));
    assert_eq!(vm.wait_end()?, End::Reboot);
    assert_eq!(guest::warnings(&vm.console()), [""; 0]);
    assert_written(&root, &volume)?;
    assert_eq!(volume.read("/synced")?, "kept\n");
    assert_eq!(volume.read("/written")?, "also\n");
    Ok(())
}

#[test]
fn remaining_processes_get_sigterm_and_may_finish() -> Result<()> {
    let (root, volume) = disks()?;
    let script = r#"
        setsid sh -c 'trap "echo finished >/data/daemon; exit 0" TERM; echo >/run/up; while :; do sleep 0.02; done' &
        while [ ! -e /run/up ]; do sleep 0.05; done"#;
    let builder = Vm::builder()
        .config(&with_volume(script))
        .disk(&root)
        .disk(&volume);
    let mut vm = builder.boot()?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    assert_eq!(volume.read("/daemon")?, "finished\n");
    root.check()?;
    volume.check()
}

#[test]
fn ctrl_alt_del_asks_the_workload_to_stop() -> Result<()> {
    let (root, volume) = disks()?;
    let script = format!(
        "{WRITERS} trap 'echo stopped >/data/bye; exit 3' TERM
        trap 'echo interrupted' INT; echo ready; while :; do sleep 0.05; done"
    );
    let builder = Vm::builder()
        .config(&with_volume(&script))
        .disk(&root)
        .disk(&volume);
    let mut vm = builder.boot()?;
    vm.wait_for("ready")?;
    vm.stop()?;
    let exit = vm.api()?.get("/v1/exit_code")?.json()?;
    assert_eq!(exit, json!({"code": 3, "oom_killed": false}));
    assert_eq!(vm.wait_end()?, End::Reboot);
    assert!(!vm.console().contains("interrupted"), "{}", vm.console());
    assert_written(&root, &volume)?;
    assert_eq!(volume.read("/bye")?, "stopped\n");
    Ok(())
}

#[test]
fn a_workload_that_ignores_ctrl_alt_del_is_killed_after_10_s() -> Result<()> {
    let (root, volume) = disks()?;
    let script = format!("{WRITERS} trap 'cut -d. -f1 /proc/uptime >/run/asked' TERM
        setsid sh -c 'echo >/run/up; while :; do [ ! -e /run/asked ] || echo \"asked $(cat /run/asked) now $(cut -d. -f1 /proc/uptime)\"; sleep 0.2; done' &
        while [ ! -e /run/up ]; do sleep 0.05; done
        echo ready; while :; do sleep 0.05; done");
    let builder = Vm::builder()
        .config(&with_volume(&script))
        .disk(&root)
        .disk(&volume);
    let mut vm = builder.boot()?;
    vm.wait_for("ready")?;
    vm.stop()?;
    // Meanwhile the API works, and pressing the keys again does not change the timeout.
    let mut api = vm.api()?;
    vm.wait_for("asked ")?;
    vm.stop()?;
    if !assets::arch().has_keyboard() {
        // Without a keyboard the stop is a signal by the API, which has no timeout: the host has to kill.
        let late = |line: &str| asked(line).is_some_and(|(asked, now)| now - asked > 13);
        vm.serial().wait_for_line(Duration::from_secs(60), late)?;
        api.post("/v1/signals", &json!({"signal": 9}))?.success()?;
    }
    assert_eq!(api.get("/v1/status")?.status, 200);
    assert_eq!(
        api.get("/v1/exit_code")?.json()?,
        json!({"code": 137, "oom_killed": false})
    );
    assert_eq!(vm.wait_end()?, End::Reboot);
    // Measured with the guest's clock in whole seconds; the last one may not be printed.
    let console = vm.console();
    let waited = console.lines().filter_map(asked).next_back();
    let waited = waited.map(|(asked, now)| now - asked);
    let expected = if assets::arch().has_keyboard() {
        8..=13
    } else {
        14..=60
    };
    assert!(
        waited.is_some_and(|seconds| expected.contains(&seconds)),
        "{waited:?} {console}"
    );
    assert_written(&root, &volume)
}

/// The times of the request to stop and of the line, in seconds.
fn asked(line: &str) -> Option<(i64, i64)> {
    let (asked, now) = line.strip_prefix("asked ")?.split_once(" now ")?;
    Some((asked.parse().ok()?, now.parse().ok()?))
}

#[test]
fn busy_disks_are_left_clean() -> Result<()> {
    let (root, volume) = disks()?;
    let inner = Image::ext4(&Tree::empty()?, 8)?;
    // Swap files keep both file systems busy after all processes have exited; there are stacked mounts.
    let script = "
        set -e
        for file in /var/swap /data/swap; do
            dd if=/dev/zero of=$file bs=1M count=2 2>/dev/null; chmod 600 $file; mkswap $file >/dev/null; swapon $file
        done
        mkdir /data/tmpfs /data/bound /data/disk
        mount -t tmpfs tmpfs /data/tmpfs; mount -o bind /var /data/bound
        mount -t ext4 /dev/vdc /data/disk; echo inner >/data/disk/file
        echo kept >/data/file; echo kept >/var/file
        grep -c swap /proc/swaps";
    let builder = Vm::builder()
        .config(&with_volume(script))
        .disk(&root)
        .disk(&volume);
    let mut vm = builder.disk(&inner).boot()?;
    vm.wait_for("exit_code=0")?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    assert!(vm.console().contains("\n2\n"), "{}", vm.console());
    for image in [&root, &volume, &inner] {
        image.check()?;
    }
    assert_eq!(volume.read("/file")?, "kept\n");
    assert_eq!(root.read("/var/file")?, "kept\n");
    assert_eq!(inner.read("/file")?, "inner\n");
    Ok(())
}

#[test]
fn a_late_reader_still_gets_the_exit_code() -> Result<()> {
    let (root, _) = disks()?;
    let config = guest::shell("exit 9", json!({}));
    let builder = Vm::builder().config(&config).disk(&root);
    let mut vm = builder.arg("PIGEON_EXIT_LINGER_MS=600000").boot()?;
    vm.wait_for("exit_code=9")?;
    // Other calls do not end the linger.
    assert_eq!(vm.api()?.get("/v1/status")?.status, 200);
    let refused = vm.api()?.post("/v1/signals", &json!({"signal": 15}))?;
    assert_eq!(refused.status, 409);
    assert_eq!(vm.api()?.get("/v1/exit_code")?.json()?["code"], 9);
    // The linger would be ten minutes: the VM ends within the lab's timeout of one minute.
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check()
}

#[test]
fn a_waiting_reader_ends_the_linger_at_once() -> Result<()> {
    let (root, _) = disks()?;
    let config = guest::shell("read -r line; exit 4", json!({}));
    let builder = Vm::builder().config(&config).disk(&root);
    let mut vm = builder.arg("PIGEON_EXIT_LINGER_MS=600000").boot()?;
    // Two clients: both get the response.
    let (mut one, mut two) = (vm.api()?, vm.api()?);
    for client in [&mut one, &mut two] {
        client.send(b"GET /v1/exit_code HTTP/1.1\r\nHost: x\r\n\r\n")?;
    }
    // After a third client's response, PID 1 has read the requests of the two.
    assert_eq!(vm.api()?.get("/v1/status")?.status, 200);
    vm.type_text("\n")?;
    for client in [&mut one, &mut two] {
        assert_eq!(client.receive(false)?.json()?["code"], 4);
    }
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check()
}

#[test]
fn without_a_reader_the_linger_lasts_as_configured() -> Result<()> {
    let (root, _) = disks()?;
    let config = guest::shell("exit 0", json!({}));
    let builder = Vm::builder().config(&config).disk(&root);
    let mut vm = builder.arg("PIGEON_EXIT_LINGER_MS=4000").boot()?;
    vm.wait_for("workload exited")?;
    let start = Instant::now();
    assert_eq!(vm.wait_end()?, End::Reboot);
    // The line takes time to arrive while the guest's clock runs, but most of the linger is left.
    assert!(
        start.elapsed() > Duration::from_secs(3),
        "{:?}",
        start.elapsed()
    );
    root.check()
}

#[test]
fn without_vsock_there_is_no_linger() -> Result<()> {
    let (root, _) = disks()?;
    let config = guest::shell("exit 0", json!({}));
    let builder = Vm::builder().config(&config).disk(&root).without_vsock();
    let mut vm = builder.arg("PIGEON_EXIT_LINGER_MS=600000").boot()?;
    vm.wait_for("workload exited")?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check()
}

#[test]
fn a_slow_console_does_not_extend_the_shutdown_beyond_45_s() -> Result<()> {
    let root = Image::ext4(&Tree::busybox()?, 32)?;
    // Fills both pipes and the buffers of PID 1, the driver and the host: when the workload exits, more than
    // a minute's worth is left at 2 KiB per second, and the console never stalls for 3 s.
    let script = "seq 1000000 & seq 1000000 >&2 & read -r line; exit 3";
    let config = guest::shell(script, json!({"SeparateStderr": true}));
    let builder = Vm::builder().config(&config).disk(&root);
    let mut vm = builder
        .firecrackers_console()
        .timeout(Duration::from_secs(180))
        .boot()?;
    vm.wait_for("1000")?;
    vm.serial().hold();
    let mut api = vm.api()?;
    thread::sleep(Duration::from_secs(3));
    vm.serial().trickle(4096, Duration::from_secs(2));
    vm.type_text("\n")?;
    assert_eq!(api.get("/v1/exit_code")?.json()?["code"], 3);
    let start = Instant::now();
    vm.yield_slot();
    assert_eq!(vm.wait_end()?, End::Reboot);
    let took = start.elapsed();
    println!("the end took {took:?}");
    // Without the limit it would take more than a minute, and less if it ended after 3 s without progress.
    // The exit code is read at once, so that part of the 45 s is not used.
    assert!(took > Duration::from_secs(35), "{took:?}");
    assert!(took < Duration::from_secs(45), "{took:?}");
    root.check()
}
