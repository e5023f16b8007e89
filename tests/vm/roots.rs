//! Roots and volumes of all kinds: identified by their superblocks, shared, with an overlay.

use std::{fs, path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use pigeon_lab::{
    Arch, End, Vm, assets,
    disk::{Disk, Format, Image, Table, Tree},
    guest,
    process::run as run_command,
    vm::Builder,
};
use serde_json::{Value, json};

/// A root with a file that proves that it was read.
fn tree() -> Result<Tree> {
    Tree::busybox()?.file("/etc/note", 0o644, "from the image\n")
}

/// A VM with the kernel modules for a root's file system.
fn vm(script: &str, rest: Value) -> Builder {
    // A kernel without the v1 memory controller warns about it.
    let builder = Vm::builder()
        .config(&guest::shell(script, rest))
        .arg("PIGEON_CGROUPS=none");
    ["overlay", "squashfs", "erofs"]
        .into_iter()
        .fold(builder, Builder::module)
}

/// The same, with the file systems of cloud images.
fn vm_with_more(script: &str, rest: Value) -> Builder {
    ["xfs", "btrfs"]
        .into_iter()
        .fold(vm(script, rest), Builder::module)
}

/// Runs a VM to its end. Returns its console if the workload exited with this code.
fn run(builder: Builder, code: i32) -> Result<String> {
    let mut vm = builder.boot()?;
    ensure!(vm.wait_end()? == End::Reboot, "no orderly end");
    let console = vm.console();
    let exit = format!("exit_code={code} ");
    ensure!(console.contains(&exit), "no {exit} in {console}");
    Ok(console)
}

#[track_caller]
fn assert_says(console: &str, words: &[&str]) {
    for words in words {
        assert!(console.contains(words), "no {words:?} in {console}");
    }
}

fn bytes(image: &Image) -> Result<Vec<u8>> {
    fs::read(image.path()).context("read an image")
}

#[test]
fn roots_of_read_only_types_are_found_and_mounted() -> Result<()> {
    for (format, name) in [(Format::Squashfs, "squashfs"), (Format::Erofs, "erofs")] {
        let root = Image::packed(&tree()?, format)?;
        let before = bytes(&root)?;
        let script = "cat /etc/note; grep ' / ' /proc/mounts | tail -n 1; touch /x || exit 7";
        let console = run(vm(script, json!({})).disk(&root), 7)?;
        let mounted = format!("/dev/root / {name} ro,relatime");
        let named = format!("/dev/vda / {name} ro,relatime");
        assert!(
            console.contains(&mounted) || console.contains(&named),
            "{console}"
        );
        assert_says(&console, &["from the image"]);
        assert_eq!(guest::warnings(&console), [""; 0], "{console}");
        assert!(before == bytes(&root)?, "the image was written to");
    }
    Ok(())
}

#[test]
fn a_root_can_be_mounted_read_only() -> Result<()> {
    let root = Image::ext4(&tree()?, 32)?;
    let script = "grep ' / ' /proc/mounts | tail -n 1; touch /x || exit 7";
    let console = run(vm(script, json!({"RootReadOnly": true})).disk(&root), 7)?;
    assert_says(&console, &["/ ext4 ro,relatime"]);
    assert_eq!(guest::warnings(&console), [""; 0], "{console}");
    root.check()
}

#[test]
fn a_root_with_an_overlay_in_memory_is_never_written_to() -> Result<()> {
    for (format, name) in [
        (None, "ext4"),
        (Some(Format::Squashfs), "squashfs"),
        (Some(Format::Erofs), "erofs"),
    ] {
        let (root, mode) = match format {
            None => (Image::ext4(&tree()?, 32)?, "root has 755 0:0"),
            Some(format) => {
                let tree = tree()?.dir(".", 0o711)?.owned(".", 0, 50);
                (Image::packed(&tree, format)?, "root has 711 0:50")
            }
        };
        let before = bytes(&root)?;
        let script = "stat -c 'root has %a %u:%g' /; echo mine >>/etc/note; rm /etc/group; mkdir /made; cat /etc/note
            grep ' / ' /proc/mounts; grep -c -E ' /(lower|writable) ' /proc/mounts; df -m / | tail -n 1; exit 5";
        let rest = json!({"RootOverlay": "tmpfs:size=24m"});
        // The image is writable, but the VM does not write to it.
        let console = run(vm(script, rest).disk(&root), 5)?;
        assert_says(
            &console,
            &[
                mode,
                "from the image\nmine\n",
                "overlay / overlay rw,relatime,lowerdir=/lower,upperdir=/writable/upper,workdir=/writable/work",
                "\n0\n",
                " 24 ",
            ],
        );
        assert_eq!(guest::warnings(&console), [""; 0], "{name}: {console}");
        assert!(before == bytes(&root)?, "{name}: the image was written to");
    }
    Ok(())
}

#[test]
fn a_full_layer_is_only_the_workloads_problem() -> Result<()> {
    let root = Image::packed(&tree()?, Format::Erofs)?;
    let script = "dd if=/dev/zero of=/filled bs=64k count=300; echo filled $?; echo ready; read -r line; exit 8";
    let rest = json!({"RootOverlay": "tmpfs:size=8m"});
    let mut vm = vm(script, rest).disk(&root).boot()?;
    vm.wait_for("filled 1")?;
    vm.wait_for("ready")?;
    let response = vm.api()?.post(
        "/v1/exec",
        &json!({"cmd": ["sh", "-c", "df / | tail -n 1 | grep -c 100%; echo more >/y"]}),
    )?;
    let response = response.success()?.json()?;
    assert_eq!(response["stdout"], "1\n", "{response}");
    assert_eq!(response["exit_code"], 1, "{response}");
    vm.type_text("\n")?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    let console = vm.console();
    assert_says(&console, &["No space left on device", "exit_code=8"]);
    Ok(())
}

#[test]
fn an_overlay_on_a_device_persists_and_two_vms_share_a_base() -> Result<()> {
    let base = Image::packed(&tree()?, Format::Erofs)?;
    let before = bytes(&base)?;
    let layers = [
        Image::ext4(&Tree::empty()?, 16)?,
        Image::ext4(&Tree::empty()?, 16)?,
    ];
    let rest =
        || json!({"RootOverlay": "/dev/vdb", "EtcHosts": [{"Host": "one", "IP": "192.0.2.1"}]});
    let script = "cat /mine; echo again >>/mine; ls /; stat -c 'root has %a' /; chmod 711 /; echo ready; read -r line; exit 6";
    let boot = |layer: &Image| {
        vm(script, rest())
            .disk(Disk::from(&base).read_only())
            .disk(layer)
            .boot()
    };
    // Both at the same time; then the first one again.
    let mut both = [boot(&layers[0])?, boot(&layers[1])?];
    for vm in &mut both {
        vm.wait_for("ready")?;
        assert_says(&vm.console(), &["can't open '/mine'", "root has 755"]);
    }
    for mut vm in both {
        vm.type_text("\n")?;
        assert_eq!(vm.wait_end()?, End::Reboot);
        assert_says(&vm.console(), &["exit_code=6"]);
        assert_eq!(guest::warnings(&vm.console()), [""; 0]);
    }
    for layer in &layers {
        layer.check()?;
        assert_eq!(layer.read("/upper/mine")?, "again\n");
    }
    let mut once_more = boot(&layers[0])?;
    once_more.wait_for("ready")?;
    assert_says(&once_more.console(), &["\nagain\n", "root has 711"]);
    once_more.stop()?;
    assert_eq!(once_more.wait_end()?, End::Reboot);
    layers[0].check()?;
    assert_eq!(layers[0].read("/upper/mine")?, "again\nagain\n");
    assert_eq!(layers[1].read("/upper/mine")?, "again\n");
    assert!(before == bytes(&base)?, "the base was written to");
    Ok(())
}

/// Writes to an ext4 image in a VM that is killed, so that its journal must be replayed.
fn leave_a_journal(root: &Image) -> Result<()> {
    let script = "echo new >/new; sync -f /new; while :; do echo more >>/new; sync; done & echo written; sleep 1000";
    let mut vm = vm(script, json!({})).disk(root).boot()?;
    vm.wait_for("written")?;
    std::thread::sleep(std::time::Duration::from_secs(2));
    vm.kill();
    ensure!(root.check().is_err(), "the journal is clean");
    Ok(())
}

#[test]
fn a_shared_root_with_a_dirty_journal_is_refused() -> Result<()> {
    let root = Image::ext4(&tree()?, 32)?;
    leave_a_journal(&root)?;
    let before = bytes(&root)?;
    let why = "mount /dev/vda on /lower: ext4: EROFS (its journal must be replayed, and the device is write-protected)";
    let mut overlaid = vm("exit 0", json!({"RootOverlay": "tmpfs"}))
        .disk(&root)
        .boot()?;
    assert_eq!(overlaid.wait_end()?, End::Reboot);
    assert_says(&overlaid.console(), &["level=error", why]);
    assert!(before == bytes(&root)?, "the image was written to");

    let mut protected = vm("exit 0", json!({}))
        .disk(Disk::from(&root).read_only())
        .boot()?;
    assert_eq!(protected.wait_end()?, End::Reboot);
    assert_says(
        &protected.console(),
        &["level=error", &why.replace("/lower", "/newroot")],
    );
    Ok(())
}

#[test]
fn a_read_only_root_without_mount_points_says_which() -> Result<()> {
    let tree = Tree::empty()?
        .dir("/dev", 0o755)?
        .dir("/sys", 0o755)?
        .file("/bin/sh", 0o755, "#!nothing")?;
    let root = Image::packed(&tree, Format::Erofs)?;
    let mut bare = vm("exit 0", json!({})).disk(&root).boot()?;
    assert_eq!(bare.wait_end()?, End::Reboot);
    assert_says(
        &bare.console(),
        &["level=error", "the root is read-only and has no /proc"],
    );
    Ok(())
}

#[test]
fn a_root_that_the_kernel_has_no_driver_for_says_so() -> Result<()> {
    let root = Image::packed(&tree()?, Format::Erofs)?;
    let mut vm = Vm::builder()
        .config(&guest::shell("exit 0", json!({})))
        .disk(&root)
        .boot()?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    assert_says(
        &vm.console(),
        &["mount /dev/vda on /newroot: erofs: ENODEV (the kernel has no such file system)"],
    );
    Ok(())
}

#[test]
fn volumes_can_have_types_options_be_read_only_or_tmpfs() -> Result<()> {
    let root = Image::ext4(&Tree::busybox()?, 32)?;
    let volumes = [
        Image::ext4(&Tree::empty()?.file("/note", 0o644, "kept\n")?, 8)?,
        Image::packed(
            &Tree::empty()?.file("/note", 0o644, "packed\n")?,
            Format::Squashfs,
        )?,
        Image::ext4(&Tree::empty()?, 8)?,
        Image::blank(8)?,
    ];
    let vfat = volumes[3].path();
    run_command(Command::new(assets::tool("mkfs.vfat")?).arg(vfat))?;
    let rest = json!({"UserOverride": "app", "Mounts": [
        {"DevicePath": "/dev/vdb", "MountPath": "/kept", "ReadOnly": true, "Options": "defaults,rw"},
        {"DevicePath": "/dev/vdc", "MountPath": "/packed", "FSType": "squashfs"},
        {"DevicePath": "/dev/vdd", "MountPath": "/data", "Options": "ro,nodev,rw,dev,exec,relatime,noexec,nosuid,noatime,data=journal"},
        {"MountPath": "/scratch", "FSType": "tmpfs", "Options": "size=4m,mode=0700"},
        {"DevicePath": "/dev/vde", "MountPath": "/fat", "FSType": "vfat"}
    ]});
    let script = "cat /kept/note /packed/note; touch /kept/x || echo kept out
        touch /data/mine /scratch/mine && stat -c '%n %a %u' /scratch /data /fat
        grep -E ' /(kept|packed|data|scratch) ' /proc/mounts; exit 9";
    let mut builder = vm(script, rest).disk(&root);
    for module in ["vfat", "nls_ascii", "nls_cp437"] {
        builder = builder.module(module);
    }
    let console = run(volumes.iter().fold(builder, Builder::disk), 9)?;
    assert_says(
        &console,
        &[
            "kept\npacked\n",
            "kept out",
            "/scratch 700 1000",
            "/data 755 1000",
            "/fat 755 0",
            "/dev/vdb /kept ext4 ro,relatime",
            "/dev/vdc /packed squashfs ro,relatime",
            "/dev/vdd /data ext4 rw,nosuid,noexec,noatime,",
            "data=journal",
            "tmpfs /scratch tmpfs rw,relatime,size=4096k,mode=700",
        ],
    );
    // Its file system has no owners.
    let fat = "level=warn msg=\"change the owner of /fat: EPERM\"";
    let warnings = guest::warnings(&console);
    assert!(
        matches!(&warnings[..], [one] if one.contains(fat)),
        "{console}"
    );
    root.check()?;
    volumes[2].check()?;
    assert!(Path::new(volumes[0].path()).exists());
    volumes[0].check()
}

#[test]
fn xfs_and_btrfs_work_as_roots_and_volumes_and_are_left_clean() -> Result<()> {
    // Each is also mounted in another mount namespace, which a file keeps alive.
    const HOLD: &str = "mkdir /run/ns; mount -t tmpfs x /run/ns; touch /run/ns/mnt
        unshare --mount=/run/ns/mnt true";
    let xfs = Image::xfs(&tree()?)?.partitioned(Table::Gpt)?;
    let data = Image::btrfs(&Tree::empty()?.file("/note", 0o644, "kept\n")?)?;
    let rest = json!({
        "RootDevice": "/dev/vda1",
        "EtcHosts": [{"Host": "one", "IP": "192.0.2.1"}],
        "Mounts": [{"DevicePath": "/dev/vdb", "MountPath": "/data"}],
    });
    let script = format!(
        "cat /etc/note /data/note; grep -E ' (/|/data) ' /proc/mounts; {HOLD}
        echo mine >/etc/mine; echo mine >/data/mine; exit 4"
    );
    let first = vm_with_more(&script, rest).disk(&xfs).disk(&data);
    let console = run(first, 4)?;
    assert_says(
        &console,
        &[
            "from the image\nkept\n",
            " / xfs rw,relatime,",
            "/dev/vdb /data btrfs rw,relatime,",
        ],
    );
    assert_eq!(guest::warnings(&console), [""; 0], "{console}");
    xfs.check()?;
    data.check()?;

    // The next VM reads what this one wrote; its root is of the other type.
    let btrfs = Image::btrfs(&tree()?)?.partitioned(Table::Mbr)?;
    let fresh = Image::xfs(&Tree::empty()?)?;
    let rest = json!({
        "RootDevice": "/dev/vda1",
        "EtcHosts": [{"Host": "one", "IP": "192.0.2.1"}],
        "Mounts": [
            {"DevicePath": "/dev/vdb1", "MountPath": "/before", "ReadOnly": true},
            {"DevicePath": "/dev/vdc", "MountPath": "/data", "Options": "noatime"},
            {"DevicePath": "/dev/vdd", "MountPath": "/fresh", "FSType": "xfs"},
        ],
    });
    let script = format!(
        "cat /etc/note /before/etc/mine /data/mine; grep one /before/etc/hosts
        grep -E ' /[a-z]* (xfs|btrfs) ' /proc/mounts; touch /before/x || echo kept out; {HOLD}
        for dir in /etc /data /fresh; do echo more >$dir/more; done; echo ready; sleep 1000"
    );
    let mut second = vm_with_more(&script, rest)
        .disk(&btrfs)
        .disk(&xfs)
        .disk(&data)
        .disk(&fresh)
        .boot()?;
    second.wait_for("ready")?;
    second.stop()?;
    assert_eq!(second.wait_end()?, End::Reboot);
    let console = second.console();
    assert_says(
        &console,
        &[
            "from the image\nmine\nmine\n192.0.2.1\tone",
            " / btrfs rw,relatime,",
            "/dev/vdb1 /before xfs ro,relatime,",
            "/dev/vdc /data btrfs rw,noatime,",
            "/dev/vdd /fresh xfs rw,relatime,",
            "kept out",
        ],
    );
    assert_eq!(guest::warnings(&console), [""; 0], "{console}");
    for disk in [&xfs, &btrfs, &data, &fresh] {
        disk.check()?;
    }
    Ok(())
}

#[test]
fn an_xfs_or_btrfs_with_a_dirty_log_is_replayed_or_refused() -> Result<()> {
    let base = Image::ext4(&tree()?.dir("/x", 0o755)?.dir("/b", 0o755)?, 32)?;
    let (xfs, btrfs) = (Image::xfs(&tree()?)?, Image::btrfs(&tree()?)?);
    let rest = json!({"Mounts": [
        {"DevicePath": "/dev/vdb", "MountPath": "/x"},
        {"DevicePath": "/dev/vdc", "MountPath": "/b"},
    ]});
    // A btrfs has a log of synced files until everything is committed, every 30 s.
    let script = "put() { echo $1 | dd of=$2 conv=fsync 2>/dev/null; }; sync
        for dir in /x /b; do put new $dir/new; done; echo written
        while :; do for dir in /x /b; do put more $dir/more; done; done";
    let mut killed = vm_with_more(script, rest)
        .disk(&base)
        .disk(&xfs)
        .disk(&btrfs)
        .boot()?;
    killed.wait_for("written")?;
    std::thread::sleep(std::time::Duration::from_secs(2));
    killed.kill();
    for image in [&xfs, &btrfs] {
        ensure!(image.check().is_err(), "the journal is empty");
    }

    for (root, why) in [(&xfs, "xfs: EROFS"), (&btrfs, "btrfs: EIO")] {
        let mut refused = vm_with_more("exit 0", json!({}))
            .disk(Disk::from(root).read_only())
            .boot()?;
        assert_eq!(refused.wait_end()?, End::Reboot);
        let why = format!(
            "mount /dev/vda on /newroot: {why} (its journal must be replayed, and the device is write-protected)"
        );
        assert_says(&refused.console(), &["level=error", &why]);
    }

    let rest = json!({
        "RootReadOnly": true,
        "Mounts": [{"DevicePath": "/dev/vdb", "MountPath": "/mnt", "ReadOnly": true}],
    });
    let script =
        "cat /new /mnt/new; grep -E ' (/|/mnt) (xfs|btrfs) ro,' /proc/mounts | wc -l; exit 6";
    let console = run(vm_with_more(script, rest).disk(&xfs).disk(&btrfs), 6)?;
    assert_says(&console, &["new\nnew\n2\n"]);
    assert_eq!(guest::warnings(&console), [""; 0], "{console}");
    xfs.check()?;
    btrfs.check()
}

#[test]
fn a_frozen_xfs_is_named_and_a_frozen_btrfs_is_clean() -> Result<()> {
    let root = Image::ext4(&tree()?, 32)?;
    let (xfs, btrfs) = (Image::xfs(&Tree::empty()?)?, Image::btrfs(&Tree::empty()?)?);
    let rest = json!({"Mounts": [
        {"DevicePath": "/dev/vdb", "MountPath": "/x"},
        {"DevicePath": "/dev/vdc", "MountPath": "/b"},
    ]});
    // The loop devices' file systems are mounted in another namespace, so their files stay open for writing.
    let script = "set -e
        mkdir /run/ns; mount -t tmpfs x /run/ns; touch /run/ns/mnt
        i=0; for dir in /x /b; do
            dd if=/dev/zero of=$dir/img bs=64k count=16 2>/dev/null
            mke2fs -F $dir/img >/dev/null; losetup /dev/loop$i $dir/img; i=$((i + 1))
        done
        unshare --mount=/run/ns/mnt sh -c 'mount /dev/loop0 /mnt; mount /dev/loop1 /root'";
    let builder = vm_with_more(script, rest).module("loop");
    let console = run(builder.disk(&root).disk(&xfs).disk(&btrfs), 0)?;
    let warnings = guest::warnings(&console);
    let named = |line: &String| {
        line.contains("/x (/dev/vdb) is not clean: it was busy, and could only be frozen")
    };
    assert!(matches!(&warnings[..], [one] if named(one)), "{warnings:?}");
    ensure!(xfs.check().is_err(), "it is clean");
    root.check()?;
    btrfs.check()
}

#[test]
fn a_btrfs_that_hangs_at_shutdown_is_named_and_a_btrfs_root_is_clean() -> Result<()> {
    let root = Image::btrfs(&tree()?.dir("/b", 0o755)?)?;
    let btrfs = Image::btrfs(&Tree::empty()?)?;
    let rest = json!({"Mounts": [{"DevicePath": "/dev/vdb", "MountPath": "/b"}]});
    let script = "echo ready; read -r line; echo more >/b/more; echo more >/etc/more; exit 3";
    let mut vm = vm_with_more(script, rest)
        .disk(&root)
        .disk(&btrfs)
        .on_qemu()
        .timeout(std::time::Duration::from_secs(120))
        .boot()?;
    vm.wait_for("ready")?;
    let throttle = json!({"device": "disk1", "bps": 1, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0});
    vm.qmp("block_set_io_throttle", throttle)?;
    vm.yield_slot();
    vm.type_text("\n")?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    let warnings = guest::warnings(&vm.console());
    let named = |line: &String| line.contains("\"timed out unmounting /b (/dev/vdb)\"");
    assert!(matches!(&warnings[..], [one] if named(one)), "{warnings:?}");
    root.check()
}

/// Position and size of persistent memory in the guest's, in MiB.
const PMEM: (u64, u64) = (256, 48);

#[test]
fn a_root_can_be_in_persistent_memory() -> Result<()> {
    if assets::arch() != Arch::X86_64 {
        // memmap= only exists on x86, and the lab's machines do not support virtio-pmem.
        return Ok(());
    }
    let (start, size) = PMEM;
    let root = Image::ext4(&tree()?, u32::try_from(size)?)?;
    // The machine has no such device, so the kernel uses a part of the memory as one (memmap=,
    // Documentation/admin-guide/kernel-parameters.txt), at an address that PCI leaves free.
    let loader = format!(
        "loader,file={},addr={:#x},force-raw=on",
        root.path().display(),
        start << 20
    );
    let script = "cat /etc/note; grep ' / ' /proc/mounts; cat /sys/block/pmem0/size; echo mine >/etc/mine; exit 3";
    let mut vm = vm(script, json!({"RootDevice": "/dev/pmem0"}))
        .module("nd_e820")
        .module("nd_pmem")
        .memory_mib(512)
        .arg(&format!("memmap={size}M!{start}M"))
        .qemu(&["-machine", "pcie=on", "-device", &loader])
        .boot()?;
    // The memory is read after the guest has shut down.
    vm.qmp("set-action", json!({"shutdown": "pause"}))?;
    vm.wait_for("exit_code=3")?;
    while vm.qmp("query-status", json!({}))?["status"] != "shutdown" {
        ensure!(vm.ended()?.is_none(), "the VM is gone");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let console = vm.console();
    assert_says(
        &console,
        &[
            "from the image",
            "/ ext4 rw,relatime",
            &format!("\n{}\n", size << 11),
        ],
    );
    assert_eq!(guest::warnings(&console), [""; 0], "{console}");
    let after = Image::blank(u32::try_from(size)?)?;
    let memory = json!({"val": start << 20, "size": size << 20, "filename": after.path()});
    vm.qmp("pmemsave", memory)?;
    after.check()?;
    assert_eq!(after.read("/etc/mine")?, "mine\n");
    Ok(())
}
