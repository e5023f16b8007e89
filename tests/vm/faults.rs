//! Disks that fail, hang or are full, and a network without other hosts.

use std::{
    fs,
    io::{Read, Write},
    os::unix::fs::FileExt,
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use pigeon_lab::{
    End, Vm, assets,
    disk::{Disk, Image, Tree},
    guest,
    mmds::{Mmds, Push},
    process::run,
};
use serde_json::{Value, json};

/// Long, as other VMs may run at the same time.
const TIMEOUT: Duration = Duration::from_secs(180);

fn root() -> Result<Image> {
    Image::ext4(&Tree::busybox()?, 32)
}

fn with_volume(script: &str) -> Value {
    guest::shell(
        script,
        json!({"Mounts": [{"DevicePath": "/dev/vdb", "MountPath": "/data"}]}),
    )
}

/// A disk that serves `requests` requests, and then fails on each of `events`.
fn fails_after(requests: u32, image: &Image, events: &[&str]) -> Disk {
    let mut faults = String::new();
    for event in events {
        for state in 1..requests {
            let next = state + 1;
            faults += &format!(
                "[set-state]\nevent = \"{event}\"\nstate = \"{state}\"\nnew_state = \"{next}\"\n"
            );
        }
        faults += &format!(
            "[inject-error]\nevent = \"{event}\"\nerrno = \"5\"\nstate = \"{requests}\"\n"
        );
    }
    Disk::from(image).blkdebug(&faults)
}

#[test]
fn a_hung_root_is_reported_and_does_not_block_pid_1() -> Result<()> {
    let root = root()?;
    let document = guest::shell("echo the workload runs", json!({}));
    let mmds = Mmds::serving(document).push(Push::After(Duration::from_secs(2)));
    let builder = Vm::builder().mmds(mmds).disk(&root).on_qemu();
    let mut vm = builder
        .arg("PIGEON_MMDS_TIMEOUT_MS=60000")
        .timeout(TIMEOUT)
        .boot()?;
    while vm.mmds_requests().is_empty() {
        thread::sleep(Duration::from_millis(20));
    }
    // From here on, a byte per second.
    let throttle = json!({"device": "disk0", "bps": 1, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0});
    vm.qmp("block_set_io_throttle", throttle)?;
    vm.yield_slot();
    vm.wait_for("mount /dev/vda on /newroot: timed out after 30 s")?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    let console = vm.console();
    assert_eq!(console.matches("level=error").count(), 1, "{console}");
    assert!(!console.contains("the workload runs"), "{console}");
    Ok(())
}

#[test]
fn a_failed_volume_affects_neither_the_shutdown_nor_the_root() -> Result<()> {
    let (root, volume) = (root()?, Image::ext4(&Tree::empty()?, 16)?);
    let script = "echo kept >/var/file
        i=0; while dd if=/dev/zero of=/data/$i bs=4k count=4 conv=fsync 2>/dev/null; do i=$((i + 1)); done
        echo failed after $i; grep ' /data ' /proc/mounts; exit 6";
    let builder = Vm::builder().config(&with_volume(script)).disk(&root);
    let mut vm = builder
        .disk(fails_after(60, &volume, &["write_aio"]))
        .timeout(TIMEOUT)
        .boot()?;
    let failed = vm.wait_for("failed after")?;
    assert_ne!(failed, "failed after 0", "it never worked");
    let exit = vm.api()?.get("/v1/exit_code")?.json()?;
    assert_eq!(exit, json!({"code": 6, "oom_killed": false}));
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check()?;
    assert_eq!(root.read("/var/file")?, "kept\n");
    Ok(())
}

#[test]
fn a_root_that_fails_later_affects_neither_api_nor_shutdown() -> Result<()> {
    let tree = Tree::busybox()?.file("/bin/cold", 0o755, "#!/bin/sh\necho warm\n")?;
    let (root, volume) = (Image::ext4(&tree, 32)?, Image::ext4(&Tree::empty()?, 16)?);
    let script = "echo kept >/data/file; sync
        i=0; while dd if=/dev/zero of=/var/$i bs=4k count=4 conv=fsync 2>/dev/null; do i=$((i + 1)); done
        echo failed after $i; trap 'exit 6' TERM; while :; do sleep 0.1; done";
    let builder = Vm::builder().config(&with_volume(script));
    let mut vm = builder
        .disk(fails_after(120, &root, &["write_aio"]))
        .disk(&volume)
        .timeout(TIMEOUT)
        .boot()?;
    let failed = vm.wait_for("failed after")?;
    assert_ne!(failed, "failed after 0", "it never worked");
    let mut api = vm.api()?;
    // The journal has failed, so nothing can be written.
    let exec = |command: &str| json!({"cmd": ["sh", "-c", command]});
    let write = api
        .post("/v1/exec", &exec("echo x >/var/more 2>&1"))?
        .json()?;
    assert_ne!(write["exit_code"], 0, "{write}");
    // A command may be unreadable, too; the call still gets a response.
    let read = api.post("/v1/exec", &exec("cold"))?;
    let failed = read.status == 500 && read.text().contains("EIO");
    assert!(failed || read.text().contains("warm"), "{read}");
    assert_eq!(api.get("/v1/status")?.status, 200);
    api.post("/v1/signals", &json!({"signal": 15}))?.success()?;
    assert_eq!(api.get("/v1/exit_code")?.json()?["code"], 6);
    assert_eq!(vm.wait_end()?, End::Reboot);
    volume.check()?;
    assert_eq!(volume.read("/file")?, "kept\n");
    Ok(())
}

/// A root that becomes read-only at the first error, has had one, and is damaged by these requests of
/// debugfs.
fn damaged(requests: &[&str]) -> Result<Image> {
    let tree = Tree::busybox()?
        .file("/etc/hosts", 0o644, "127.0.0.1 localhost\n")?
        .file("/var/broken", 0o644, "")?
        .dir("/data", 0o755)?;
    let root = Image::ext4(&tree, 32)?;
    let policy = ["-e", "remount-ro"];
    run(Command::new(assets::tool("tune2fs")?)
        .args(policy)
        .arg(root.path()))?;
    for request in [&["ssv state 2"], requests].concat() {
        let arguments = ["-w", "-R", request];
        run(Command::new(assets::tool("debugfs")?)
            .args(arguments)
            .arg(root.path()))?;
    }
    Ok(root)
}

fn boot_damaged(root: &Image, volume: &Image, script: &str) -> Result<Vm> {
    let mut config = with_volume(script);
    config["EtcHosts"] = json!([{"Host": "app", "IP": "10.0.0.2"}]);
    config["EtcResolv"] = json!({"Nameservers": ["10.0.0.3"]});
    let builder = Vm::builder().config(&config).disk(root).disk(volume);
    builder
        .arg("PIGEON_EXIT_LINGER_MS=60000")
        .timeout(TIMEOUT)
        .boot()
}

#[test]
fn a_root_remounted_read_only_on_errors_affects_nothing_else() -> Result<()> {
    let (root, volume) = (
        damaged(&["clri /var/broken"])?,
        Image::ext4(&Tree::empty()?, 16)?,
    );
    let script =
        "cat /etc/hosts; echo kept >/data/file; cat /var/broken; echo x >/var/more; exit 6";
    let mut vm = boot_damaged(&root, &volume, script)?;
    let mut api = vm.api()?;
    assert_eq!(api.get("/v1/exit_code")?.json()?["code"], 6);
    assert_eq!(vm.wait_end()?, End::Reboot);
    let console = vm.console();
    for said in ["10.0.0.2\tapp", "Structure needs cleaning"] {
        assert!(console.contains(said), "no {said:?} in {console}");
    }
    // The kernel's message, which is different since 6.12.
    let refused = [
        "Read-only file system",
        "can't create /var/more: Input/output error",
    ];
    assert!(
        refused.iter().any(|said| console.contains(said)),
        "{console}"
    );
    assert!(!console.contains("level=error"), "{console}");
    volume.check()?;
    assert_eq!(volume.read("/file")?, "kept\n");
    Ok(())
}

#[test]
fn a_root_that_becomes_read_only_during_the_boot_still_boots() -> Result<()> {
    // No inode can be allocated.
    let (root, volume) = (damaged(&[])?, Image::ext4(&Tree::empty()?, 16)?);
    let layout = run(Command::new(assets::tool("dumpe2fs")?).arg(root.path()))?;
    let number = |line: &str, name: &str| -> Option<u64> {
        let word = line.split_once(name)?.1.split_whitespace().next()?;
        word.parse().ok()
    };
    let size = layout.lines().find_map(|line| number(line, "Block size:"));
    let size = size.context("no block size")?;
    let image = fs::File::options().write(true).open(root.path())?;
    let mut bitmaps = 0;
    for block in layout
        .lines()
        .filter_map(|line| number(line, "Inode bitmap at "))
    {
        image.write_all_at(&[0x55; 256], block * size)?;
        bitmaps += 1;
    }
    ensure!(bitmaps > 0, "{layout}");
    let script = "cat /etc/hosts; echo kept >/data/file; exit 6";
    let mut vm = boot_damaged(&root, &volume, script)?;
    let exit = vm.api()?.get("/v1/exit_code")?.json()?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    let console = vm.console();
    let warning = "warn msg=\"/etc/resolv.conf cannot be written; mount over it: ENOENT\"";
    assert!(console.contains(warning), "{console}");
    volume.check()?;
    // Some kernels, including 6.12, cannot even read from such a root (EXT4_FLAGS_SHUTDOWN).
    if exit["code"] == 126 {
        assert!(console.contains("execute /bin/sh: EIO"), "{console}");
        return Ok(());
    }
    assert_eq!(exit["code"], 6, "{exit}");
    assert!(console.contains("\n127.0.0.1 localhost\n"), "{console}");
    assert_eq!(volume.read("/file")?, "kept\n");
    Ok(())
}

#[test]
fn a_root_with_damaged_files_is_reported() -> Result<()> {
    let (root, volume) = (
        damaged(&["clri /etc/hosts"])?,
        Image::ext4(&Tree::empty()?, 16)?,
    );
    let mut vm = boot_damaged(&root, &volume, "echo the workload runs")?;
    let exit = vm.api()?.get("/v1/exit_code")?.json()?;
    assert_eq!(exit["code"], 125);
    assert_eq!(exit["error"], "read /etc/hosts: EUCLEAN");
    assert_eq!(vm.wait_end()?, End::Reboot);
    let console = vm.console();
    assert_eq!(console.matches("level=error").count(), 1, "{console}");
    assert!(!console.contains("the workload runs"), "{console}");
    volume.check()
}

#[test]
fn a_command_on_an_unreadable_root_returns_an_error() -> Result<()> {
    let noise: Vec<u8> = (0..1 << 20)
        .map(|n: u32| (n.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let mut tree = Tree::busybox()?.dir("/cold", 0o755)?;
    for n in 0..24 {
        tree = tree.file(&format!("/cold/{n}"), 0o755, &noise)?;
    }
    let root = Image::ext4(&tree, 64)?;
    let script = "i=0; while cat /cold/$i >/dev/null 2>&1; do i=$((i + 1)); done; echo failed after $i; read -r line; exit 6";
    let builder = Vm::builder().config(&guest::shell(script, json!({})));
    let mut vm = builder
        .disk(fails_after(150, &root, &["read_aio"]))
        .timeout(TIMEOUT)
        .boot()?;
    let failed = vm.wait_for("failed after")?;
    assert!(
        failed != "failed after 0" && failed != "failed after 24",
        "{failed}"
    );
    let mut api = vm.api()?;
    let response = api.post("/v1/exec", &json!({"cmd": ["/cold/23"]}))?;
    assert_eq!(
        (response.status, response.text().contains("EIO")),
        (500, true),
        "{response}"
    );
    let response = api.post("/v1/exec", &json!({"cmd": ["/bin/echo", "still"]}))?;
    assert_eq!(response.json()?["stdout"], "still\n");
    vm.type_text("\n")?;
    assert_eq!(api.get("/v1/exit_code")?.json()?["code"], 6);
    assert_eq!(vm.wait_end()?, End::Reboot);
    Ok(())
}

#[test]
fn an_empty_network_costs_only_the_mmds_timeout() -> Result<()> {
    let root = root()?;
    let config = guest::shell("exit 8", json!({}));
    let builder = Vm::builder().tap().config(&config).disk(&root);
    let mut vm = builder.arg("PIGEON_MMDS_TIMEOUT_MS=1000").boot()?;
    vm.wait_for("msg=\"configuration loaded\" source=file")?;
    vm.wait_for("exit_code=8")?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check()
}

#[test]
fn a_connection_that_cannot_be_registered_is_retried() -> Result<()> {
    let root = root()?;
    // From here on, no file can be added to an epoll instance of root's (epoll(7)).
    let script = "limit=/proc/sys/fs/epoll/max_user_watches; usual=$(cat $limit)
        echo 1 >$limit; echo full; read -r line; echo $usual >$limit; echo room; read -r line; exit 5";
    let builder = Vm::builder().config(&guest::shell(script, json!({})));
    let mut vm = builder.disk(&root).timeout(TIMEOUT).boot()?;
    vm.wait_for("full")?;
    // It is accepted before it sends data.
    let mut connection = vm.connect(10_000)?;
    thread::sleep(Duration::from_secs(2));
    connection.write_all(b"GET /v1/status HTTP/1.1\r\nHost: pigeon\r\n\r\n")?;
    connection.set_read_timeout(Some(Duration::from_secs(2)))?;
    let mut response = [0; 15];
    let early = connection.read(&mut response);
    ensure!(early.is_err(), "it was registered: {early:?}");
    vm.type_text("\n")?;
    vm.wait_for("room")?;
    connection.read_exact(&mut response)?;
    assert_eq!(&response, b"HTTP/1.1 200 OK");
    vm.type_text("\n")?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    assert!(vm.console().contains("exit_code=5"), "{}", vm.console());
    root.check()
}

#[test]
fn failed_registrations_of_signals_and_listener_are_retried() -> Result<()> {
    let root = root()?;
    // No file can be added to an epoll instance until the document's own setting applies; by then PID 1 has
    // opened its signalfd and its listener.
    let extra = json!({"Sysctls": {"fs.epoll.max_user_watches": "10000"}});
    let config = guest::shell("echo runs; read -r line; exit 5", extra);
    let builder = Vm::builder().config(&config).disk(&root);
    let mut vm = builder
        .arg("sysctl.fs.epoll.max_user_watches=0")
        .timeout(TIMEOUT)
        .boot()?;
    vm.wait_for("runs")?;
    let mut api = vm.api()?;
    api.get("/v1/status")?.success()?;
    vm.type_text("\n")?;
    assert_eq!(api.get("/v1/exit_code")?.json()?["code"], 5);
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check()
}
