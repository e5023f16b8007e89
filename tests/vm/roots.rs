//! Roots and volumes of any kind: found by their superblocks, shared, with a layer over them.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};
use pigeon_lab::{
    End, Vm,
    disk::{Disk, Format, Image, Tree},
    guest,
    vm::Builder,
};
use serde_json::{Value, json};

/// A root that says that it was read.
fn tree() -> Result<Tree> {
    Tree::busybox()?.file("/etc/note", 0o644, "from the image\n")
}

/// A VM with what a root's file system needs of the kernel.
fn vm(script: &str, rest: Value) -> Builder {
    // A kernel without v1 memory warns of it.
    let builder = Vm::builder()
        .config(&guest::shell(script, rest))
        .arg("PIGEON_CGROUPS=none");
    ["overlay", "squashfs", "erofs"]
        .into_iter()
        .fold(builder, Builder::module)
}

/// Runs a VM to its end; its console, when the workload ended with that code.
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
fn roots_of_read_only_kinds_are_found_and_mounted() -> Result<()> {
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
        let root = match format {
            None => Image::ext4(&tree()?, 32)?,
            Some(format) => Image::packed(&tree()?, format)?,
        };
        let before = bytes(&root)?;
        let script = "echo mine >>/etc/note; rm /etc/group; mkdir /made; cat /etc/note
            grep ' / ' /proc/mounts; grep -c -E ' /(lower|writable) ' /proc/mounts; df -m / | tail -n 1; exit 5";
        let rest = json!({"RootOverlay": "tmpfs:size=24m"});
        // The image takes writes; the VM makes none.
        let console = run(vm(script, rest).disk(&root), 5)?;
        assert_says(
            &console,
            &[
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
fn a_full_layer_is_the_workloads_affair() -> Result<()> {
    let root = Image::packed(&tree()?, Format::Erofs)?;
    let script = "dd if=/dev/zero of=/filled bs=64k count=300; echo filled $?; echo ready; read -r line; exit 8";
    let rest = json!({"RootOverlay": "tmpfs:size=8m"});
    let mut vm = vm(script, rest).disk(&root).boot()?;
    vm.wait_for("filled 1")?;
    vm.wait_for("ready")?;
    let answer = vm.api()?.post(
        "/v1/exec",
        &json!({"cmd": ["sh", "-c", "df / | tail -n 1 | grep -c 100%; echo more >/y"]}),
    )?;
    let answer = answer.success()?.json()?;
    assert_eq!(answer["stdout"], "1\n", "{answer}");
    assert_eq!(answer["exit_code"], 1, "{answer}");
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
    let script = "cat /mine; echo again >>/mine; ls /; echo ready; read -r line; exit 6";
    let boot = |layer: &Image| {
        vm(script, rest())
            .disk(Disk::from(&base).read_only())
            .disk(layer)
            .boot()
    };
    // Both at the same time; then the first once more.
    let mut both = [boot(&layers[0])?, boot(&layers[1])?];
    for vm in &mut both {
        vm.wait_for("ready")?;
        assert!(vm.console().contains("can't open '/mine'"));
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
    assert_says(&once_more.console(), &["\nagain\n"]);
    once_more.ctrl_alt_delete()?;
    assert_eq!(once_more.wait_end()?, End::Reboot);
    layers[0].check()?;
    assert_eq!(layers[0].read("/upper/mine")?, "again\nagain\n");
    assert_eq!(layers[1].read("/upper/mine")?, "again\n");
    assert!(before == bytes(&base)?, "the base was written to");
    Ok(())
}

/// Writes into an ext4 image in a VM that is killed, so that its journal has something to replay.
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
fn a_shared_root_whose_journal_was_left_is_refused_with_that_reason() -> Result<()> {
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
fn volumes_have_types_and_options_and_can_be_read_only_or_in_memory() -> Result<()> {
    let root = Image::ext4(&Tree::busybox()?, 32)?;
    let volumes = [
        Image::ext4(&Tree::empty()?.file("/note", 0o644, "kept\n")?, 8)?,
        Image::packed(
            &Tree::empty()?.file("/note", 0o644, "packed\n")?,
            Format::Squashfs,
        )?,
        Image::ext4(&Tree::empty()?, 8)?,
    ];
    let rest = json!({"UserOverride": "app", "Mounts": [
        {"DevicePath": "/dev/vdb", "MountPath": "/kept", "ReadOnly": true},
        {"DevicePath": "/dev/vdc", "MountPath": "/packed", "FSType": "squashfs"},
        {"DevicePath": "/dev/vdd", "MountPath": "/data", "Options": "noexec,nosuid,noatime,data=journal"},
        {"MountPath": "/scratch", "FSType": "tmpfs", "Options": "size=4m,mode=0700"}
    ]});
    let script = "cat /kept/note /packed/note; touch /kept/x || echo kept out
        touch /data/mine /scratch/mine && stat -c '%n %a %u' /scratch /data
        grep -E ' /(kept|packed|data|scratch) ' /proc/mounts; exit 9";
    let console = run(
        volumes
            .iter()
            .fold(vm(script, rest).disk(&root), |vm, volume| vm.disk(volume)),
        9,
    )?;
    assert_says(
        &console,
        &[
            "kept\npacked\n",
            "kept out",
            "/scratch 700 1000",
            "/data 755 1000",
            "/dev/vdb /kept ext4 ro,relatime",
            "/dev/vdc /packed squashfs ro,relatime",
            "/dev/vdd /data ext4 rw,nosuid,noexec,noatime,",
            "data=journal",
            "tmpfs /scratch tmpfs rw,relatime,size=4096k,mode=700",
        ],
    );
    assert_eq!(guest::warnings(&console), [""; 0], "{console}");
    root.check()?;
    volumes[2].check()?;
    assert!(Path::new(volumes[0].path()).exists());
    volumes[0].check()
}
