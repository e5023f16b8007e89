//! Disks at shutdown: hidden file systems, disks that hang, and the limit of 45 s.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use pigeon_lab::{
    End, Vm, assets,
    disk::{Disk, Image, Tree},
    guest,
    mmds::{Mmds, Push},
    process::run,
    vm::Builder,
};
use serde_json::{Value, json};

/// Long, as other VMs may run at the same time.
const TIMEOUT: Duration = Duration::from_secs(180);

/// The limit of every shutdown.
const END_LIMIT: Duration = Duration::from_secs(45);

fn root() -> Result<Image> {
    root_of(Tree::busybox()?)
}

fn root_of(tree: Tree) -> Result<Image> {
    Image::ext4(&tree.dir("/data", 0o755)?.dir("/other", 0o755)?, 32)
}

fn volume() -> Result<Image> {
    Image::ext4(&Tree::empty()?, 8)
}

/// A volume without a journal: ext2, whose state is only in its superblock.
fn without_journal() -> Result<Image> {
    let image = volume()?;
    run(Command::new(assets::tool("tune2fs")?)
        .args(["-O", "^has_journal"])
        .arg(image.path()))?;
    Ok(image)
}

/// A shell script as the workload, with /dev/vdb on /data and /dev/vdc on /other.
fn with_volumes(script: &str) -> Value {
    guest::shell(
        script,
        json!({"Mounts": [
            {"DevicePath": "/dev/vdb", "MountPath": "/data"},
            {"DevicePath": "/dev/vdc", "MountPath": "/other"},
        ]}),
    )
}

fn boot(config: &Value, disks: &[&Image]) -> Result<Vm> {
    builder(config, disks).boot()
}

fn builder(config: &Value, disks: &[&Image]) -> Builder {
    let mut builder = Vm::builder().config(config).timeout(TIMEOUT).on_qemu();
    for disk in disks {
        builder = builder.disk(*disk);
    }
    builder
}

/// The VM shuts down in time, and only this file system is reported.
fn assert_ends_without(vm: &mut Vm, file_system: &str) -> Result<()> {
    let took = time_of_end(vm)?;
    assert!(took < END_LIMIT, "{took:?}");
    let warnings = warnings(vm);
    let named = format!("\"timed out unmounting {file_system}\"");
    assert!(
        matches!(&warnings[..], [one] if one.contains(&named)),
        "{warnings:?}"
    );
    Ok(())
}

/// Sets a disk's bytes per second.
fn throttle(vm: &mut Vm, disk: &str, rate: u64) -> Result<()> {
    let limits = json!({"device": disk, "bps": rate, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0});
    vm.qmp("block_set_io_throttle", limits).map(drop)
}

/// Makes a disk hang: it transfers a byte per second.
fn hang(vm: &mut Vm, disk: &str) -> Result<()> {
    throttle(vm, disk, 1)?;
    vm.yield_slot();
    Ok(())
}

/// The time until the VM's reboot.
fn time_of_end(vm: &mut Vm) -> Result<Duration> {
    let start = Instant::now();
    ensure!(vm.wait_end()? == End::Reboot, "{}", vm.console());
    println!("the end took {:?}", start.elapsed());
    Ok(start.elapsed())
}

/// The warnings on the console.
fn warnings(vm: &Vm) -> Vec<String> {
    guest::warnings(&vm.console())
}

#[track_caller]
fn assert_no_warnings(vm: &Vm) {
    let none: Vec<String> = vec![];
    assert_eq!(warnings(vm), none);
}

/// Each disk is clean, and has the data written to it.
fn assert_kept(disks: &[(&str, &Image)]) -> Result<()> {
    for (name, disk) in disks {
        disk.check().with_context(|| name.to_string())?;
        let kept = disk.read("/file").with_context(|| name.to_string())?;
        assert_eq!(kept, "kept\n", "{name}");
    }
    Ok(())
}

#[test]
fn a_volume_that_another_mount_namespace_holds_is_clean() -> Result<()> {
    let (root, data, other) = (root()?, volume()?, without_journal()?);
    let script = "set -e
        mkdir /run/ns; mount -t tmpfs x /run/ns; touch /run/ns/mnt; unshare --mount=/run/ns/mnt true
        echo kept >/data/file; echo kept >/other/file";
    let mut vm = boot(&with_volumes(script), &[&root, &data, &other])?;
    vm.wait_for("exit_code=0")?;
    time_of_end(&mut vm)?;
    assert_no_warnings(&vm);
    root.check()?;
    assert_kept(&[("vdb", &data), ("vdc", &other)])
}

#[test]
fn a_disk_with_a_swap_file_on_a_detached_mount_is_clean() -> Result<()> {
    let (root, data, other, plain) = (root()?, volume()?, volume()?, without_journal()?);
    let script = "set -e
        swap() { dd if=/dev/zero of=$1 bs=64k count=16 2>/dev/null; chmod 600 $1; mkswap $1 >/dev/null; swapon $1; }
        mkdir /d; mount /dev/vdd /d
        for dir in /data /d; do echo kept >$dir/file; swap $dir/s; done
        umount -l /d; cat /proc/swaps; echo kept >/other/file; swap /var/s";
    let mut vm = boot(&with_volumes(script), &[&root, &data, &other, &plain])?;
    vm.wait_for("exit_code=0")?;
    time_of_end(&mut vm)?;
    assert_no_warnings(&vm);
    root.check()?;
    assert_kept(&[("vdb", &data), ("vdc", &other), ("vdd", &plain)])
}

#[test]
fn disks_below_overlays_loop_devices_and_deep_paths_are_clean() -> Result<()> {
    let tree = Tree::busybox()?
        .file("/overlay.ko", 0o600, assets::module("overlay")?)?
        .file("/loop.ko", 0o600, assets::module("loop")?)?;
    let root = root_of(tree)?;
    let (data, other) = (volume()?, volume()?);
    let (upper, outer, deep) = (volume()?, volume()?, without_journal()?);
    // An overlay like containerd's whose upper layer's mount was detached; a loop device whose file is on a
    // detached mount, with a file system; a mount point deeper than PATH_MAX.
    let script = "set -e
        insmod /overlay.ko; insmod /loop.ko
        mkdir /u; mount /dev/vdd /u; mkdir -p /u/upper /u/work /run/containerd/rootfs
        echo kept >/u/file
        mount -t overlay -o lowerdir=/bin,upperdir=/u/upper,workdir=/u/work overlay /run/containerd/rootfs
        echo kept >/run/containerd/rootfs/layer; umount -l /u
        mkdir /l /inner; mount /dev/vde /l; echo kept >/l/file
        dd if=/dev/zero of=/l/img bs=64k count=16 2>/dev/null; mke2fs -F /l/img >/dev/null
        losetup /dev/loop0 /l/img; mount /dev/loop0 /inner; echo kept >/inner/file; umount -l /l
        long=$(printf %0200d 0); for i in $(seq 1 25); do mkdir $long; cd -P $long; done
        mkdir m; mount /dev/vdf m; echo kept >m/file
        echo kept >/data/file; echo kept >/other/file";
    let disks = [&root, &data, &other, &upper, &outer, &deep];
    let mut vm = boot(&with_volumes(script), &disks)?;
    vm.wait_for("exit_code=0")?;
    time_of_end(&mut vm)?;
    assert_no_warnings(&vm);
    root.check()?;
    let kept = [
        ("vdb", &data),
        ("vdc", &other),
        ("vdd", &upper),
        ("vde", &outer),
        ("vdf", &deep),
    ];
    assert_kept(&kept)?;
    assert_eq!(upper.read("/upper/layer")?, "kept\n");
    // The file system in the file.
    let inner = tempfile::NamedTempFile::new()?.into_temp_path();
    let dump = format!("dump /img {}", inner.display());
    run(Command::new(assets::tool("debugfs")?)
        .args(["-R", &dump])
        .arg(outer.path()))?;
    run(Command::new(assets::tool("e2fsck")?).arg("-fn").arg(&inner))?;
    let file = run(Command::new(assets::tool("debugfs")?)
        .args(["-R", "cat /file"])
        .arg(&inner))?;
    assert_eq!(file, "kept\n");
    Ok(())
}

#[test]
fn a_disk_waits_for_devices_that_it_may_back() -> Result<()> {
    /// The start of the file's only partition, in sectors and bytes.
    const START: (u32, usize) = (2048, 1 << 20);
    let inner = volume()?;
    let contents = std::fs::read(inner.path())?;
    let mut file = vec![0; START.1];
    let sectors = (contents.len() / 512) as u32;
    file[450] = 0x83; // Linux
    file[454..458].copy_from_slice(&START.0.to_le_bytes());
    file[458..462].copy_from_slice(&sectors.to_le_bytes());
    file[510..512].copy_from_slice(&[0x55, 0xaa]);
    file.extend(contents);
    let outer = Image::ext4(&Tree::empty()?.file("/img", 0o600, file)?, 24)?;
    let root = root_of(Tree::busybox()?.file("/loop.ko", 0o600, assets::module("loop")?)?)?;
    let (data, other) = (volume()?, volume()?);
    let script = "set -e
        insmod /loop.ko; mkdir /l /inner; mount /dev/vdd /l
        losetup -P /dev/loop0 /l/img; mount /dev/loop0p1 /inner
        echo ready; read -r line
        dd if=/dev/zero of=/inner/zeros bs=64k count=64 2>/dev/null
        for dir in /inner /l /data /other; do echo kept >$dir/file; done";
    let mut vm = boot(&with_volumes(script), &[&root, &data, &other, &outer])?;
    vm.wait_for("ready")?;
    // Writing back the dirty pages takes seconds.
    throttle(&mut vm, "disk3", 1 << 20)?;
    vm.type_text("\n")?;
    vm.wait_for("exit_code=0")?;
    time_of_end(&mut vm)?;
    assert_no_warnings(&vm);
    root.check()?;
    assert_kept(&[("vdb", &data), ("vdc", &other), ("vdd", &outer)])?;
    let file = tempfile::NamedTempFile::new()?;
    let dump = format!("dump /img {}", file.path().display());
    run(Command::new(assets::tool("debugfs")?)
        .args(["-R", &dump])
        .arg(outer.path()))?;
    std::fs::write(inner.path(), &std::fs::read(file.path())?[START.1..])?;
    assert_kept(&[("loop0p1", &inner)])
}

#[test]
fn file_systems_unknown_to_pid_1_are_clean_too() -> Result<()> {
    let tree = Tree::busybox()?;
    let root = Image::ext4(&tree.dir("/data", 0o755)?.dir("/other", 0o755)?, 32)?;
    let (data, other) = (volume()?, volume()?);
    // The smallest xfs that mkfs.xfs(8) makes.
    let (xfs, vfat) = (Image::blank(300)?, Image::blank(8)?);
    run(Command::new(assets::tool("mkfs.xfs")?)
        .arg("-q")
        .arg(xfs.path()))?;
    run(Command::new(assets::tool("mkfs.vfat")?).arg(vfat.path()))?;
    let script = "set -e; mkdir /run/ns /x /v; mount -t tmpfs x /run/ns; touch /run/ns/mnt
        mount -t xfs /dev/vdd /x; mount -t vfat /dev/vde /v; unshare --mount=/run/ns/mnt true
        for dir in /data /other /x /v; do echo kept >$dir/file; done";
    let disks = [&root, &data, &other, &xfs, &vfat];
    let mut builder = builder(&with_volumes(script), &disks);
    for module in ["xfs", "vfat", "nls_ascii", "nls_cp437"] {
        builder = builder.module(module);
    }
    let mut vm = builder.boot()?;
    vm.wait_for("exit_code=0")?;
    time_of_end(&mut vm)?;
    assert_no_warnings(&vm);
    root.check()?;
    assert_kept(&[("vdb", &data), ("vdc", &other)])?;
    let log = run(Command::new(assets::tool("xfs_logprint")?)
        .arg("-t")
        .arg(xfs.path()))?;
    assert!(log.contains("state: <CLEAN>"), "{log}");
    // Fails for a volume that was not unmounted.
    run(Command::new(assets::tool("fsck.vfat")?)
        .arg("-n")
        .arg(vfat.path()))
    .map(drop)
}

#[test]
fn a_disk_that_cannot_be_left_clean_is_named() -> Result<()> {
    let tree = Tree::busybox()?.file("/loop.ko", 0o600, assets::module("loop")?)?;
    let (root, data, other) = (root_of(tree)?, volume()?, without_journal()?);
    // The loop devices' file systems are mounted in another namespace, so their files stay open for writing.
    // So the root is frozen, which leaves it clean, and a file system without a journal stays dirty.
    let script = "set -e
        insmod /loop.ko; mkdir /run/ns; mount -t tmpfs x /run/ns; touch /run/ns/mnt
        i=0; for dir in /other /var; do
            dd if=/dev/zero of=$dir/img bs=64k count=16 2>/dev/null
            mke2fs -F $dir/img >/dev/null; losetup /dev/loop$i $dir/img; i=$((i + 1))
        done
        unshare --mount=/run/ns/mnt sh -c 'mount /dev/loop0 /mnt; mount /dev/loop1 /root; echo kept >/mnt/file'
        echo kept >/data/file; echo kept >/other/file";
    let mut vm = boot(&with_volumes(script), &[&root, &data, &other])?;
    vm.wait_for("exit_code=0")?;
    time_of_end(&mut vm)?;
    let warnings = warnings(&vm);
    let named =
        |line: &String| line.contains("/other (/dev/vdc) is not clean: it was not unmounted");
    assert!(matches!(&warnings[..], [one] if named(one)), "{warnings:?}");
    root.check()?;
    assert_kept(&[("vdb", &data)])
}

#[test]
fn a_volume_that_hangs_while_mounting_fails_the_boot_and_is_named() -> Result<()> {
    let (root, data, other) = (root()?, volume()?, volume()?);
    let document = with_volumes("echo the workload runs");
    let mmds = Mmds::serving(document).push(Push::After(Duration::from_secs(2)));
    let builder = Vm::builder()
        .mmds(mmds)
        .disk(&root)
        .disk(&data)
        .disk(&other);
    let mut vm = builder
        .arg("PIGEON_MMDS_TIMEOUT_MS=60000")
        .arg("PIGEON_EXIT_LINGER_MS=60000")
        .timeout(TIMEOUT)
        .on_qemu()
        .boot()?;
    while vm.mmds_requests().is_empty() {
        std::thread::sleep(Duration::from_millis(20));
    }
    hang(&mut vm, "disk1")?;
    let mut api = vm.api()?;
    assert_eq!(api.get("/v1/status")?.status, 200);
    let exit = api.get("/v1/exit_code")?.json()?;
    assert_eq!(exit["code"], 125, "{exit}");
    assert_eq!(
        exit["error"],
        "mount /dev/vdb on /data: timed out after 30 s"
    );
    let took = time_of_end(&mut vm)?;
    assert!(took < END_LIMIT, "{took:?}");
    let console = vm.console();
    assert_eq!(console.matches("level=error").count(), 1, "{console}");
    assert!(!console.contains("the workload runs"), "{console}");
    root.check()?;
    other.check()
}

#[test]
fn a_signal_before_the_workload_starts_aborts_the_boot() -> Result<()> {
    let (root, data, other) = (root()?, volume()?, volume()?);
    let document = with_volumes("echo the workload runs");
    let mmds = Mmds::serving(document).push(Push::After(Duration::from_secs(2)));
    let builder = Vm::builder().mmds(mmds).arg("PIGEON_MMDS_TIMEOUT_MS=60000");
    let builder = builder.arg("PIGEON_EXIT_LINGER_MS=60000").on_qemu();
    let builder = builder.disk(&root).disk(&data).disk(&other);
    let mut vm = builder.timeout(TIMEOUT).boot()?;
    while vm.mmds_requests().is_empty() {
        std::thread::sleep(Duration::from_millis(20));
    }
    // While the mount hangs there is time for a signal.
    hang(&mut vm, "disk1")?;
    let mut api = vm.api()?;
    let start = Instant::now();
    match assets::arch().has_keyboard() {
        true => vm.ctrl_alt_delete()?,
        false => drop(api.post("/v1/stop", &json!({}))?.success()?),
    }
    let exit = api.get("/v1/exit_code")?.json()?;
    assert_eq!(
        exit,
        json!({"code": 125, "oom_killed": false, "error": "stopped before the workload was started"})
    );
    // Before the mount times out.
    assert!(start.elapsed() < Duration::from_secs(25));
    let took = time_of_end(&mut vm)?;
    assert!(took < END_LIMIT, "{took:?}");
    assert!(!vm.console().contains("the workload runs"));
    root.check()?;
    other.check()
}

/// Writes to all disks, and continues with those that do not hang.
const WRITE: &str = "echo kept >/data/file; echo kept >/other/file; echo kept >/var/file; sync
    echo ready; read -r line; for dir in /var /data /other; do echo more >$dir/more; done";

#[test]
fn a_volume_that_hangs_at_shutdown_is_named_and_no_other_disk_suffers() -> Result<()> {
    let (root, data, other) = (root()?, volume()?, volume()?);
    let script = format!("{WRITE}; exit 3");
    let mut vm = boot(&with_volumes(&script), &[&root, &data, &other])?;
    vm.wait_for("ready")?;
    hang(&mut vm, "disk1")?;
    vm.type_text("\n")?;
    vm.wait_for("exit_code=3")?;
    assert_ends_without(&mut vm, "/data (/dev/vdb)")?;
    root.check()?;
    assert_eq!(root.read("/var/more")?, "more\n");
    assert_kept(&[("vdc", &other)])?;
    assert_eq!(other.read("/more")?, "more\n");
    Ok(())
}

#[test]
fn a_loop_device_that_cannot_be_opened_costs_no_other_disk() -> Result<()> {
    let outer = Image::ext4(&Tree::empty()?.file("/img", 0o600, vec![1; 1 << 20])?, 8)?;
    let root = root_of(Tree::busybox()?.file("/loop.ko", 0o600, assets::module("loop")?)?)?;
    let (data, other) = (volume()?, volume()?);
    // losetup reads the partition table from a disk that hangs, and nothing can open the loop device
    // meanwhile (loop_reread_partitions).
    // Linux 6.18 syncs the file first, which must not wait for the disk.
    let script =
        "insmod /loop.ko; mkdir /l; mount -o noatime,barrier=0 /dev/vdd /l; ls -l /l/img; sync
        echo ready; read -r line
        dd if=/l/img of=/dev/null bs=4k skip=128 count=128 & usleep 300000
        losetup -P /dev/loop0 /l/img &
        until grep loop0 /proc/partitions; do usleep 10000; done; usleep 100000
        for dir in /var /data /other; do echo kept >$dir/file; done; exit 3";
    let mut vm = boot(&with_volumes(script), &[&root, &data, &other, &outer])?;
    vm.wait_for("ready")?;
    hang(&mut vm, "disk3")?;
    vm.type_text("\n")?;
    vm.wait_for("exit_code=3")?;
    let took = time_of_end(&mut vm)?;
    assert!(took < END_LIMIT, "{took:?}");
    let warnings = warnings(&vm);
    for said in [
        "timed out unmounting /dev/loop0",
        "timed out unmounting /l (/dev/vdd)",
    ] {
        assert!(
            warnings.iter().any(|line| line.contains(said)),
            "{warnings:?}"
        );
    }
    root.check()?;
    assert_eq!(root.read("/var/file")?, "kept\n");
    assert_kept(&[("vdb", &data), ("vdc", &other)])
}

#[test]
fn a_workload_blocked_by_a_hung_disk_is_given_up_2_s_after_sigkill() -> Result<()> {
    let (root, data, other) = (root()?, volume()?, volume()?);
    let script = format!("{WRITE}; exec dd if=/dev/zero of=/data/more bs=64k count=1 conv=fsync");
    let mut vm = boot(&with_volumes(&script), &[&root, &data, &other])?;
    vm.wait_for("ready")?;
    hang(&mut vm, "disk1")?;
    vm.type_text("\n")?;
    let mut api = vm.api()?;
    // Until dd is blocked: `D` is uninterruptible sleep (proc_pid_stat(5)).
    let state = json!({"cmd": ["sh", "-c", "cut -d' ' -f3 /proc/$(pidof dd)/stat"]});
    let start = Instant::now();
    while api.post("/v1/exec", &state)?.json()?["stdout"] != "D\n" {
        ensure!(start.elapsed() < TIMEOUT, "{}", vm.console());
    }
    let start = Instant::now();
    let stop = json!({"timeout_ms": 1000});
    api.post("/v1/stop", &stop)?.success()?;
    let exit = api.get("/v1/exit_code")?.json()?;
    let given_up = start.elapsed();
    let error = "the workload cannot be killed";
    assert_eq!(
        exit,
        json!({"code": 137, "oom_killed": false, "error": error})
    );
    assert!(given_up >= Duration::from_secs(3), "{given_up:?}");
    let took = time_of_end(&mut vm)?;
    assert!(took < END_LIMIT, "{took:?}");
    let warnings = warnings(&vm);
    for said in [
        "the workload does not stop: killed",
        "a process cannot be killed",
        "timed out unmounting /data (/dev/vdb)",
    ] {
        assert!(
            warnings.iter().any(|line| line.contains(said)),
            "{warnings:?}"
        );
    }
    assert!(
        vm.console()
            .contains(&format!("level=error msg=\"{error}\"")),
        "{}",
        vm.console()
    );
    root.check()?;
    assert_eq!(root.read("/var/more")?, "more\n");
    assert_kept(&[("vdc", &other)])
}

#[test]
fn a_root_that_hangs_at_shutdown_is_named_and_no_volume_suffers() -> Result<()> {
    let (root, data, other) = (root()?, volume()?, volume()?);
    let script = format!("{WRITE}; exit 3");
    let mut vm = boot(&with_volumes(&script), &[&root, &data, &other])?;
    vm.wait_for("ready")?;
    hang(&mut vm, "disk0")?;
    vm.type_text("\n")?;
    vm.wait_for("exit_code=3")?;
    assert_ends_without(&mut vm, "/ (/dev/vda)")?;
    assert_kept(&[("vdb", &data), ("vdc", &other)])
}

/// The same program with symbols, and the address of its panic handler.
fn with_symbols() -> Result<(PathBuf, u64)> {
    let build = assets::repository().join("build.sh");
    let program = run(Command::new(build).arg("symbols"))?;
    let program = assets::repository().join(program.trim());
    let symbols = run(Command::new(assets::tool("nm")?).arg(&program))?;
    let handler = symbols
        .lines()
        .find(|line| line.ends_with("rust_begin_unwind"))
        .and_then(|line| line.split(' ').next())
        .context("no panic handler")?;
    Ok((program, u64::from_str_radix(handler, 16)?))
}

/// A root with the program of `attack.c`.
fn attacker() -> Result<Image> {
    let program = assets::guest_program("attack")?;
    root_of(Tree::busybox()?.file("/bin/attack", 0o755, program)?)
}

/// A VM whose PID 1 is made to call its panic handler after a line of input.
fn boot_to_panic(program: &Path, handler: u64, disks: &[&Image]) -> Result<Vm> {
    let script = format!("{WRITE}; (trap '' TERM; exec sleep 1000) & attack panic {handler:x}");
    let vm = builder(&with_volumes(&script), disks)
        .init(program)?
        .boot()?;
    vm.wait_for("ready")?;
    Ok(vm)
}

#[test]
fn a_panic_shuts_down_in_the_usual_order_and_time() -> Result<()> {
    let (program, handler) = with_symbols()?;
    let (root, data, other) = (attacker()?, volume()?, volume()?);
    let mut vm = boot_to_panic(&program, handler, &[&root, &data, &other])?;
    vm.type_text("\n")?;
    vm.wait_for("level=error msg=\"panic\"")?;
    let took = time_of_end(&mut vm)?;
    assert!(took < Duration::from_secs(15), "{took:?}");
    assert_no_warnings(&vm);
    root.check()?;
    assert_eq!(root.read("/var/more")?, "more\n");
    assert_kept(&[("vdb", &data), ("vdc", &other)])?;

    let (root, data, other) = (attacker()?, volume()?, volume()?);
    let mut vm = boot_to_panic(&program, handler, &[&root, &data, &other])?;
    hang(&mut vm, "disk1")?;
    vm.type_text("\n")?;
    vm.wait_for("level=error msg=\"panic\"")?;
    let took = time_of_end(&mut vm)?;
    assert!(took < END_LIMIT, "{took:?}");
    let warnings = warnings(&vm);
    let named = |line: &String| line.contains("\"timed out unmounting /data (/dev/vdb)\"");
    assert!(warnings.iter().any(named), "{warnings:?}");
    root.check()?;
    assert_kept(&[("vdc", &other)])
}

/// Puts PID 1 into a cgroup without room for another process.
const TRAP: &str =
    "mkdir -p $pids/trap; echo 1 >$pids/trap/cgroup.procs; echo 1 >$pids/trap/pids.max";

#[test]
fn without_room_for_a_child_a_hung_disk_blocks_no_other() -> Result<()> {
    let (root, data, other) = (root()?, volume()?, volume()?);
    let script = format!("{WRITE}; pids=/sys/fs/cgroup/pids; {TRAP}; exit 3");
    let mut vm = boot(&with_volumes(&script), &[&root, &data, &other])?;
    vm.wait_for("ready")?;
    hang(&mut vm, "disk1")?;
    vm.type_text("\n")?;
    vm.wait_for("exit_code=3")?;
    assert_ends_without(&mut vm, "/data (/dev/vdb)")?;
    root.check()?;
    assert_kept(&[("vdc", &other)])
}

#[test]
fn a_pid_1_that_cannot_fork_makes_the_kernel_remount_read_only() -> Result<()> {
    let (root, data, other) = (attacker()?, volume()?, volume()?);
    let script = format!("{WRITE}; attack sterilize; exit 3");
    let mut vm = boot(&with_volumes(&script), &[&root, &data, &other])?;
    vm.wait_for("ready")?;
    vm.type_text("\n")?;
    vm.wait_for("exit_code=3")?;
    let took = time_of_end(&mut vm)?;
    assert!(took < Duration::from_secs(15), "{took:?}");
    let warnings = warnings(&vm);
    let why = |line: &String| line.contains("\"fork: EAGAIN\"");
    assert!(matches!(&warnings[..], [one] if why(one)), "{warnings:?}");
    root.check()?;
    assert_eq!(root.read("/var/more")?, "more\n");
    assert_kept(&[("vdb", &data), ("vdc", &other)])?;

    let (root, data, other) = (attacker()?, volume()?, volume()?);
    let mut vm = boot(&with_volumes(&script), &[&root, &data, &other])?;
    vm.wait_for("ready")?;
    hang(&mut vm, "disk1")?;
    vm.type_text("\n")?;
    vm.wait_for("exit_code=3")?;
    let took = time_of_end(&mut vm)?;
    assert!(took < END_LIMIT, "{took:?}");
    let warnings = self::warnings(&vm);
    let named = |line: &String| line.contains("timed out") && line.contains("/data (/dev/vdb)");
    assert!(warnings.iter().any(named), "{warnings:?}");
    Ok(())
}

#[test]
fn processes_frozen_by_a_v1_cgroup_are_killed_and_disks_are_clean() -> Result<()> {
    let (root, data, other) = (root()?, volume()?, without_journal()?);
    let script = "set -e
        f=/sys/fs/cgroup/freezer/a/b; mkdir -p $f
        (echo 0 >$f/cgroup.procs; exec setsid sh -c 'exec 9>/other/open; echo kept >/other/file; echo >/run/up; while :; do sleep 0.1; done') &
        while [ ! -e /run/up ]; do sleep 0.05; done
        echo FROZEN >$f/freezer.state; echo FROZEN >/sys/fs/cgroup/freezer/a/freezer.state
        while [ $(cat $f/freezer.state) != FROZEN ]; do sleep 0.05; done
        u=/sys/fs/cgroup/unified/c; mkdir $u
        (echo 0 >$u/cgroup.procs; exec setsid sleep 1000) &
        while ! grep -q . $u/cgroup.procs; do sleep 0.05; done; echo 1 >$u/cgroup.freeze
        echo kept >/data/file; exit 3";
    let mut vm = boot(&with_volumes(script), &[&root, &data, &other])?;
    vm.wait_for("exit_code=3")?;
    time_of_end(&mut vm)?;
    assert_no_warnings(&vm);
    root.check()?;
    assert_kept(&[("vdb", &data), ("vdc", &other)])
}

#[test]
fn mounts_shared_with_a_copy_of_the_tree_are_unmounted() -> Result<()> {
    let (root, data, other) = (root()?, volume()?, without_journal()?);
    let script = "set -e
        mount --make-rshared /; mkdir /host; mount --rbind / /host
        echo kept >/data/file; echo kept >/host/other/file; exit 3";
    let mut vm = boot(&with_volumes(script), &[&root, &data, &other])?;
    vm.wait_for("exit_code=3")?;
    time_of_end(&mut vm)?;
    assert_no_warnings(&vm);
    root.check()?;
    assert_kept(&[("vdb", &data), ("vdc", &other)])
}

/// An image whose journal must be replayed.
fn dirty(image: Image) -> Result<Image> {
    run(Command::new(assets::tool("debugfs")?)
        .args(["-w", "-R", "feature +needs_recovery"])
        .arg(image.path()))?;
    Ok(image)
}

#[test]
fn a_read_only_disk_with_a_dirty_journal_is_refused() -> Result<()> {
    const WHY: &str =
        "ext4: EROFS (its journal must be replayed, and the device is write-protected)";
    let root = dirty(root()?)?;
    let builder = Vm::builder().config(&guest::shell("echo the workload runs", json!({})));
    let mut vm = builder.disk(Disk::from(&root).read_only()).boot()?;
    vm.wait_for(&format!(
        "level=error msg=\"mount /dev/vda on /newroot: {WHY}\""
    ))?;
    time_of_end(&mut vm)?;

    let (root, data) = (self::root()?, dirty(volume()?)?);
    let config = guest::shell(
        "echo the workload runs",
        json!({"Mounts": [{"DevicePath": "/dev/vdb", "MountPath": "/data"}]}),
    );
    let builder = Vm::builder().config(&config).disk(&root);
    let builder = builder.arg("PIGEON_EXIT_LINGER_MS=60000");
    let mut vm = builder.disk(Disk::from(&data).read_only()).boot()?;
    let exit = vm.api()?.get("/v1/exit_code")?.json()?;
    assert_eq!(
        exit["error"],
        format!("mount /dev/vdb on /data: {WHY}"),
        "{exit}"
    );
    time_of_end(&mut vm)?;
    assert!(!vm.console().contains("the workload runs"));
    root.check()
}
