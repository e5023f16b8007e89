//! `/v1/mounts`: volumes that are mounted and unmounted while the workload runs.

use std::{
    os::unix::net::UnixStream,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use pigeon_lab::{
    End, Vm, assets,
    disk::{Image, Tree},
    guest,
    http::Client,
    process::run,
    vm::Builder,
};
use serde_json::{Value, json};

type Api = Client<UnixStream>;

/// Long, as other VMs may run at the same time.
const TIMEOUT: Duration = Duration::from_secs(240);

/// The limit of every shutdown.
const END_LIMIT: Duration = Duration::from_secs(45);

/// A VM with these disks after its root; the workload runs as app, and exits after reading a line.
fn with_disks(disks: &[&Image]) -> Result<(Builder, Image)> {
    let root = Image::ext4(&Tree::busybox()?, 32)?;
    let config = guest::shell("read -r line", json!({"UserOverride": "app"}));
    let builder = Vm::builder().config(&config).disk(&root);
    let builder = disks
        .iter()
        .fold(builder, |builder, disk| builder.disk(*disk));
    Ok((builder.timeout(TIMEOUT).on_qemu(), root))
}

fn volume() -> Result<Image> {
    Image::ext4(&Tree::empty()?, 8)
}

fn mount(api: &mut Api, volume: &Value) -> Result<(u16, Value)> {
    let response = api.post("/v1/mounts", volume)?;
    Ok((response.status, response.json()?))
}

fn unmount(api: &mut Api, query: &str) -> Result<(u16, Value)> {
    let response = api.request("DELETE", &format!("/v1/mounts{query}"), &[], b"")?;
    Ok((response.status, response.json()?))
}

fn shell(api: &mut Api, script: &str, user: &str) -> Result<String> {
    let body = json!({"cmd": ["sh", "-c", script], "user": user, "timeout_ms": 120_000});
    let response = api.post("/v1/exec", &body)?.success()?.json()?;
    ensure!(response["exit_code"] == 0, "{script}: {response}");
    Ok(response["stdout"].as_str().context("no text")?.into())
}

/// Waits until a shell test succeeds.
fn wait_until(api: &mut Api, test: &str) -> Result<()> {
    let start = Instant::now();
    while shell(api, &format!("if {test}; then echo yes; fi"), "root")? != "yes\n" {
        ensure!(start.elapsed() < TIMEOUT, "{test} is not true");
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn done() -> (u16, Value) {
    (200, json!({"ok": true}))
}

fn failed(status: u16, error: &str) -> (u16, Value) {
    (status, json!({"error": error}))
}

/// Ends the workload by sending the line that it waits for.
fn end(vm: &mut Vm) -> Result<Duration> {
    vm.type_text("\n")?;
    vm.wait_for("exit_code=0")?;
    let start = Instant::now();
    assert_eq!(vm.wait_end()?, End::Reboot);
    Ok(start.elapsed())
}

#[test]
fn a_volume_is_mounted_unmounted_and_keeps_its_data() -> Result<()> {
    let (data, blank, vfat) = (volume()?, Image::blank(8)?, Image::blank(8)?);
    run(Command::new(assets::tool("mkfs.vfat")?).arg(vfat.path()))?;
    // Its table of users' quotas is damaged.
    let quota = Image::blank(8)?;
    run(Command::new(assets::tool("mkfs.ext4")?)
        .args(["-q", "-F", "-O", "quota", "-b", "1024"])
        .arg(quota.path()))?;
    run(Command::new(assets::tool("debugfs")?)
        .args(["-w", "-R", "zap_block -f <3> -p 0xff 1"])
        .arg(quota.path()))?;
    let (builder, root) = with_disks(&[&data, &blank, &vfat, &quota])?;
    let modules = ["vfat", "nls_ascii", "nls_cp437", "quota_v2"];
    let mut vm = modules.into_iter().fold(builder, Builder::module).start()?;
    let mut api = vm.api()?;
    let data_on = |place: &str| json!({"DevicePath": "/dev/vdb", "MountPath": place});
    let mounts = "grep -E ' (/srv/data|/scratch) ' /proc/mounts | cut -d' ' -f1-4";

    // Written by the workload's user, on a mount point that was created.
    assert_eq!(mount(&mut api, &data_on("/srv/data"))?, done());
    assert_eq!(
        shell(&mut api, "stat -c %u:%g /srv/data", "root")?,
        "1000:1000\n"
    );
    shell(&mut api, "echo kept >/srv/data/file", "app")?;
    let taken = failed(409, "mount on /srv/data: something is mounted there");
    assert_eq!(mount(&mut api, &data_on("/srv/data"))?, taken);
    let other = json!({"FSType": "tmpfs", "MountPath": "/srv/./data/"});
    assert_eq!(mount(&mut api, &other)?.0, 409);

    // A process has its working directory there.
    let work = "cd /srv/data; setsid sh -c 'echo $$ >/tmp/pid; exec sleep 1000' >/dev/null 2>&1 &";
    shell(&mut api, work, "root")?;
    wait_until(&mut api, "[ -s /tmp/pid ]")?;
    let busy = failed(409, "unmount /srv/data: EBUSY");
    assert_eq!(unmount(&mut api, "?path=/srv/data")?, busy);
    shell(&mut api, "kill $(cat /tmp/pid)", "root")?;
    wait_until(&mut api, "! kill -0 $(cat /tmp/pid)")?;
    assert_eq!(unmount(&mut api, "?path=/srv/data")?, done());
    assert_eq!(shell(&mut api, "ls -A /srv/data", "root")?, "");
    let none = failed(404, "unmount /srv/data: EINVAL");
    assert_eq!(unmount(&mut api, "?path=/srv/data")?, none);

    // Read-only, and through a symbolic link.
    let read_only = json!({"DevicePath": "/dev/vdb", "MountPath": "/srv/data", "ReadOnly": true});
    assert_eq!(mount(&mut api, &read_only)?, done());
    assert_eq!(
        shell(&mut api, mounts, "root")?,
        "/dev/vdb /srv/data ext4 ro,relatime\n"
    );
    assert_eq!(shell(&mut api, "cat /srv/data/file", "app")?, "kept\n");
    shell(
        &mut api,
        "ln -s /srv/data '/a link'; ln -s /proc /kernel",
        "root",
    )?;
    assert_eq!(unmount(&mut api, "?path=%2Fa+link")?, done());

    // In memory, with options.
    let scratch = json!({"FSType": "tmpfs", "MountPath": "/scratch", "Options": "size=1m,noexec"});
    assert_eq!(mount(&mut api, &scratch)?, done());
    let mounted = shell(&mut api, mounts, "root")?;
    assert!(
        mounted.starts_with("tmpfs /scratch tmpfs rw,noexec,relatime,size=1024k"),
        "{mounted}"
    );
    assert_eq!(unmount(&mut api, "?path=/scratch")?, done());

    // Without owners.
    let fat = json!({"DevicePath": "/dev/vdd", "FSType": "vfat", "MountPath": "/fat"});
    assert_eq!(mount(&mut api, &fat)?, done());
    assert_eq!(shell(&mut api, "stat -c %u:%g /fat", "root")?, "0:0\n");
    assert_eq!(unmount(&mut api, "?path=/fat")?, done());

    // With an owner that cannot be changed.
    let quota = json!({"DevicePath": "/dev/vde", "MountPath": "/quota"});
    let refused = failed(500, "change the owner of /quota: EUCLEAN");
    assert_eq!(mount(&mut api, &quota)?, refused);
    assert_eq!(mount(&mut api, &quota)?, refused);

    // Paths that are not mounted, and mounts that must not be removed.
    for (query, response) in [
        ("", failed(400, "path: not an absolute path")),
        ("?path=", failed(400, "path: not an absolute path")),
        ("?path=srv/data", failed(400, "path: not an absolute path")),
        (
            "?path=/%",
            failed(400, "path: a percent-encoding is malformed"),
        ),
        ("?path=/a%00b", failed(400, "path: a parameter has a NUL")),
        ("?path=/none", failed(404, "unmount /none: ENOENT")),
        (
            "?path=/etc/passwd/x",
            failed(404, "unmount /etc/passwd/x: ENOTDIR"),
        ),
        ("?path=/home", failed(404, "unmount /home: EINVAL")),
        ("?path=/", failed(409, "unmount /: EBUSY")),
        ("?path=/proc", failed(409, "unmount /proc: EBUSY")),
        ("?path=/sys", failed(409, "unmount /sys: EBUSY")),
        ("?path=/dev", failed(409, "unmount /dev: EBUSY")),
        ("?path=/run", failed(409, "unmount /run: EBUSY")),
        ("?path=//run/.", failed(409, "unmount //run/.: EBUSY")),
        ("?path=/kernel", failed(409, "unmount /kernel: EBUSY")),
    ] {
        assert_eq!(unmount(&mut api, query)?, response, "{query}");
    }
    let long = format!("?path=/{}", "x".repeat(4095));
    assert_eq!(
        unmount(&mut api, &long)?,
        failed(400, "path: a parameter is too long")
    );
    let with_body = api.request("DELETE", "/v1/mounts?path=/home", &[], b"{}")?;
    assert_eq!(
        (with_body.status, with_body.json()?),
        failed(400, "this call takes no body")
    );

    // Mounts that fail.
    let start = Instant::now();
    let missing = json!({"DevicePath": "/dev/vdz", "MountPath": "/x"});
    let why = "mount /dev/vdz on /x: no such device after 2 s";
    assert_eq!(mount(&mut api, &missing)?, failed(500, why));
    assert!(
        start.elapsed() >= Duration::from_secs(2),
        "{:?}",
        start.elapsed()
    );
    for (volume, response) in [
        (json!({}), failed(400, "DevicePath: not an absolute path: ")),
        (json!([]), failed(400, "must be an object")),
        (
            json!({"DevicePath": "vdb", "MountPath": "/x"}),
            failed(400, "DevicePath: not an absolute path: vdb"),
        ),
        (data_on("/proc"), failed(400, "MountPath: would hide /proc")),
        (data_on("/"), failed(400, "MountPath: would hide the root")),
        (
            data_on("/x/../proc"),
            failed(400, "MountPath: has '..': /x/../proc"),
        ),
        (
            data_on("/kernel"),
            failed(409, "mount on /kernel: something is mounted there"),
        ),
        (
            data_on("/etc/passwd"),
            failed(500, "mount /dev/vdb on /etc/passwd: ext4: ENOTDIR"),
        ),
        (
            json!({"DevicePath": "/dev/vdc", "MountPath": "/x"}),
            failed(
                500,
                "mount /dev/vdc on /x: no ext2, ext3, ext4, xfs, btrfs, squashfs or erofs",
            ),
        ),
        (
            json!({"DevicePath": "/dev/vdb", "MountPath": "/x", "FSType": "nosuch"}),
            failed(
                500,
                "mount /dev/vdb on /x: nosuch: ENODEV (the kernel has no such file system)",
            ),
        ),
    ] {
        assert_eq!(mount(&mut api, &volume)?, response, "{volume}");
    }
    let mut waiting = vm.api()?;
    let body = missing.to_string();
    let length = body.len();
    let head = format!("POST /v1/mounts HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n");
    waiting.send((head + &body).as_bytes())?;
    let kill = "for at in /proc/[0-9]*; do pid=${at#/proc/}
        if [ $pid != 1 ] && [ \"$(cat $at/comm)\" = init ]; then kill -9 $pid; fi; done";
    shell(&mut api, kill, "root")?;
    let response = waiting.receive(false)?;
    assert_eq!(
        (response.status, response.json()?),
        failed(500, "a helper was killed")
    );
    let torn = api.request("POST", "/v1/mounts", &[], b"{\"MountPath\":")?;
    assert_eq!(torn.status, 400, "{torn}");
    let wrong = api.get("/v1/mounts")?;
    assert_eq!(
        (wrong.status, wrong.header("allow")),
        (405, Some("POST, DELETE"))
    );

    // Volumes that were mounted after the boot are unmounted at shutdown, too.
    assert_eq!(mount(&mut api, &data_on("/srv/data"))?, done());
    shell(&mut api, "echo more >/srv/data/more", "app")?;
    end(&mut vm)?;
    assert_eq!(guest::warnings(&vm.console()), Vec::<String>::new());
    root.check()?;
    data.check()?;
    assert_eq!(
        (data.read("/file")?, data.read("/more")?),
        ("kept\n".into(), "more\n".into())
    );
    Ok(())
}

#[test]
fn a_hot_plugged_disk_is_found_on_the_pci_bus() -> Result<()> {
    let plugged = volume()?;
    let (builder, root) = with_disks(&[])?;
    let mut vm = builder
        .pci_port()
        .module("virtio_pci")
        // Without the port's driver the kernel gets no hotplug event: PID 1 has to trigger a rescan.
        .arg("pcie_ports=compat")
        .start()?;
    let mut api = vm.api()?;
    let volume = json!({"DevicePath": "/dev/vdb", "MountPath": "/data"});
    let image = plugged.path().to_str().context("not UTF-8")?.to_owned();
    vm.qmp(
        "blockdev-add",
        json!({"driver": "raw", "node-name": "plugged", "file": {"driver": "file", "filename": image}}),
    )?;
    vm.qmp(
        "device_add",
        json!({"driver": "virtio-blk-pci", "id": "plug", "drive": "plugged", "bus": "pci_port"}),
    )?;
    for word in ["first", "second"] {
        thread::sleep(Duration::from_secs(3));
        assert_eq!(shell(&mut api, "ls /dev | grep vdb || true", "root")?, "");
        assert_eq!(mount(&mut api, &volume)?, done());
        shell(&mut api, &format!("echo {word} >>/data/file"), "app")?;
        if word == "first" {
            // After its removal from the bus it is clean.
            assert_eq!(unmount(&mut api, "?path=/data")?, done());
            shell(&mut api, "echo 1 >/sys/block/vdb/device/../remove", "root")?;
            wait_until(&mut api, "[ ! -e /dev/vdb ]")?;
            plugged.check()?;
            assert_eq!(plugged.read("/file")?, "first\n");
        }
    }
    end(&mut vm)?;
    assert_eq!(guest::warnings(&vm.console()), Vec::<String>::new());
    root.check()?;
    plugged.check()?;
    assert_eq!(plugged.read("/file")?, "first\nsecond\n");
    Ok(())
}

#[test]
fn a_hung_disk_blocks_neither_other_calls_nor_the_shutdown() -> Result<()> {
    let (hanging, other) = (volume()?, volume()?);
    let (builder, root) = with_disks(&[&hanging, &other])?;
    let mut vm = builder.start()?;
    let limits = json!({"device": "disk1", "bps": 1, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0});
    vm.qmp("block_set_io_throttle", limits)?;
    vm.yield_slot();
    let (mut api, mut waiting) = (vm.api()?, vm.api()?);
    let request = |device: &str, place: &str| {
        let body = json!({"DevicePath": device, "MountPath": place}).to_string();
        let length = body.len();
        format!("POST /v1/mounts HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n{body}")
    };
    let start = Instant::now();
    waiting.send(request("/dev/vdb", "/data").as_bytes())?;

    // A client that disconnects: its request is still completed.
    let mut gone = vm.api()?;
    gone.send(request("/dev/late", "/other").as_bytes())?;
    wait_until(&mut api, "[ -e /other ]")?;
    drop(gone);
    thread::sleep(Duration::from_millis(500));
    shell(&mut api, "ln -s /dev/vdc /dev/late", "root")?;
    wait_until(&mut api, "grep -q ' /other ' /proc/mounts")?;
    wait_until(&mut api, "[ $(stat -c %u /other) = 1000 ]")?;
    shell(&mut api, "echo kept >/other/file", "app")?;

    let response = waiting.receive(false)?;
    assert_eq!(
        (response.status, response.json()?),
        failed(504, "mount /dev/vdb on /data: timed out after 30 s")
    );
    assert!(
        start.elapsed() >= Duration::from_secs(30),
        "{:?}",
        start.elapsed()
    );
    assert_eq!(api.get("/v1/status")?.status, 200);

    // The VM shuts down while the disk hangs again.
    waiting.send(request("/dev/vdb", "/again").as_bytes())?;
    wait_until(&mut api, "[ -e /again ]")?;
    let took = end(&mut vm)?;
    assert!(took < END_LIMIT, "{took:?}");
    let warnings = guest::warnings(&vm.console());
    let named = |line: &String| line.contains("\"timed out unmounting /dev/vdb\"");
    assert!(warnings.iter().any(named), "{warnings:?}");
    root.check()?;
    other.check()?;
    assert_eq!(other.read("/file")?, "kept\n");
    Ok(())
}
