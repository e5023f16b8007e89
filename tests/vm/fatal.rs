//! Fatal errors: each is reported in one line, followed by an orderly shutdown.

use anyhow::Result;
use pigeon_lab::{
    End, Vm,
    disk::{Disk, Image, Tree},
    guest,
    mmds::{Before, Fault, Mmds, Push},
    vm::Builder,
};
use serde_json::{Value, json};

/// A workload that must never run.
const COMMAND: &str = "echo the workload runs";

fn root() -> Result<Image> {
    Image::ext4(&Tree::busybox()?, 32)
}

fn config(rest: Value) -> Value {
    guest::shell(COMMAND, rest)
}

/// The VM's only error, after an orderly shutdown and without the workload.
fn error_of(vm: &mut Vm) -> Result<String> {
    assert_eq!(vm.wait_end()?, End::Reboot);
    let console = vm.console();
    assert!(!console.contains("the workload runs"), "{console}");
    assert!(!console.contains("workload started"), "{console}");
    let errors: Vec<_> = console
        .lines()
        .filter(|line| line.contains("level=error"))
        .collect();
    let [error] = errors[..] else {
        panic!("not one error: {errors:?}\n{console}");
    };
    assert!(
        error.starts_with("pigeon-init: level=error msg="),
        "{error}"
    );
    Ok(error.into())
}

#[track_caller]
fn assert_says(error: &str, parts: &[&str]) {
    for part in parts {
        assert!(error.contains(part), "no {part:?} in {error}");
    }
}

/// Boots to an error that occurs before the API is up.
fn early(builder: Builder, parts: &[&str]) -> Result<()> {
    let mut vm = builder.boot()?;
    assert_says(&error_of(&mut vm)?, parts);
    Ok(())
}

/// Boots to an error that the API reports, too.
fn late(builder: Builder, parts: &[&str]) -> Result<()> {
    let mut vm = builder.arg("PIGEON_EXIT_LINGER_MS=60000").boot()?;
    let exit = vm.api()?.get("/v1/exit_code")?.json()?;
    assert_eq!(
        (&exit["code"], &exit["oom_killed"]),
        (&json!(125), &json!(false))
    );
    assert_says(exit["error"].as_str().unwrap_or_default(), parts);
    assert_says(&error_of(&mut vm)?, parts);
    Ok(())
}

#[test]
fn without_a_configuration_the_error_names_each_source() -> Result<()> {
    let mmds = Mmds::serving(Value::Null).push(Push::Never);
    let builder = Vm::builder().mmds(mmds).arg("PIGEON_MMDS_TIMEOUT_MS=1500");
    early(
        builder,
        &[
            "no configuration",
            "MMDS",
            "null",
            "/pigeon/run.json",
            "no such file",
        ],
    )
}

#[test]
fn with_config_mmds_the_file_is_not_read() -> Result<()> {
    let root = root()?;
    let mmds = Mmds::serving(Value::Null).always(Fault::Silent);
    let builder = Vm::builder()
        .mmds(mmds)
        .disk(&root)
        .config(&config(json!({})));
    let builder = builder
        .arg("PIGEON_CONFIG=mmds")
        .arg("PIGEON_MMDS_TIMEOUT_MS=600");
    early(builder, &["no configuration", "MMDS", "no answer"])?;
    root.check()
}

#[test]
fn without_a_network_mmds_is_not_waited_for() -> Result<()> {
    early(
        Vm::builder().arg("PIGEON_CONFIG=mmds"),
        &["no configuration", "MMDS", "eth0"],
    )
}

#[test]
fn a_missing_document_is_reported_with_the_status() -> Result<()> {
    let mmds = Mmds::serving(Value::Null)
        .before(Before::NotFound)
        .push(Push::Never);
    let builder = Vm::builder().mmds(mmds).arg("PIGEON_MMDS_TIMEOUT_MS=6000");
    early(builder, &["no configuration", "404", "/pigeon/run.json"])
}

#[test]
fn a_failure_before_the_first_step_is_on_the_console() -> Result<()> {
    // A file in the initrd takes the place of the mount point.
    let builder = Vm::builder().file("/proc", 0o644, "");
    early(builder, &["mount proc on /proc: ENOTDIR\""])
}

#[test]
fn a_wrong_type_in_the_file_names_the_field() -> Result<()> {
    let config = config(
        json!({"EtcHosts": [{"Host": "a", "IP": "10.0.0.1"}, {"Host": 7, "IP": "10.0.0.2"}]}),
    );
    early(
        Vm::builder().config(&config),
        &["/pigeon/run.json", "EtcHosts", "Host"],
    )
}

#[test]
fn an_invalid_document_in_mmds_fails_at_once() -> Result<()> {
    let root = root()?;
    let mmds = Mmds::serving(config(json!({"Hostname": 5})));
    let builder = Vm::builder()
        .mmds(mmds)
        .disk(&root)
        .config(&config(json!({})));
    early(builder, &["MMDS", "Hostname"])
}

#[test]
fn a_document_with_nothing_to_run_says_so_and_why_it_is_not_from_mmds() -> Result<()> {
    let config = json!({"ImageConfig": {"Entrypoint": [], "Cmd": []}, "Hostname": "x"});
    let builder = Vm::builder()
        .config(&config)
        .mmds(Mmds::serving(Value::Null).push(Push::Never))
        .arg("PIGEON_MMDS_TIMEOUT_MS=300");
    early(builder, &["/pigeon/run.json: nothing to run; MMDS: null"])
}

#[test]
fn a_root_device_without_a_driver_is_waited_for_and_then_named() -> Result<()> {
    let root = root()?;
    let builder = Vm::builder()
        .without_modules()
        .disk(&root)
        .config(&config(json!({})));
    early(builder, &["mount", "/dev/vda", "no such device"])?;
    root.check()
}

#[test]
fn a_root_without_a_file_system_is_named() -> Result<()> {
    let config = config(json!({"RootDevice": "/dev/vdb"}));
    let [fine, blank] = [root()?, Image::blank(8)?];
    let builder = Vm::builder().disk(&fine).disk(&blank).config(&config);
    early(
        builder,
        &["mount /dev/vdb on /newroot: no ext2, ext3, ext4"],
    )
}

#[test]
fn a_root_that_cannot_be_read_is_named() -> Result<()> {
    let root = root()?;
    let faults = "[inject-error]\nevent = \"read_aio\"\nerrno = \"5\"\nsector = \"2\"\n";
    let builder = Vm::builder()
        .disk(Disk::from(&root).blkdebug(faults))
        .config(&config(json!({})));
    early(builder, &["mount", "/dev/vda", "EIO"])
}

#[test]
fn an_unknown_user_is_named_and_the_root_is_clean() -> Result<()> {
    let root = root()?;
    let config = config(json!({"ImageConfig": {"User": "app"}, "UserOverride": "nosuch:app"}));
    early(
        Vm::builder().disk(&root).config(&config),
        &["unknown user", "nosuch"],
    )?;
    root.check()
}

#[test]
fn an_unknown_group_is_named_and_the_root_is_clean() -> Result<()> {
    let root = root()?;
    let config = config(json!({"ImageConfig": {"User": "app:nosuch"}}));
    early(
        Vm::builder().disk(&root).config(&config),
        &["unknown group", "nosuch"],
    )?;
    root.check()
}

#[test]
fn a_missing_volume_is_reported_by_the_api_and_disks_are_clean() -> Result<()> {
    let [root, volume] = [root()?, Image::ext4(&Tree::empty()?, 8)?];
    let config = config(json!({"Mounts": [
        {"DevicePath": "/dev/vdb", "MountPath": "/data"},
        {"DevicePath": "/dev/vdx", "MountPath": "/more"}
    ]}));
    let builder = Vm::builder().disk(&root).disk(&volume).config(&config);
    late(builder, &["mount", "/dev/vdx", "/more", "no such device"])?;
    root.check()?;
    volume.check()
}

#[test]
fn a_volume_without_a_file_system_is_reported_by_the_api() -> Result<()> {
    let [root, volume] = [root()?, Image::blank(8)?];
    let config = config(json!({"Mounts": [{"DevicePath": "/dev/vdb", "MountPath": "/data"}]}));
    late(
        Vm::builder().disk(&root).disk(&volume).config(&config),
        &["mount /dev/vdb on /data: no ext2, ext3, ext4"],
    )?;
    root.check()
}

#[test]
fn addresses_without_a_network_are_an_error() -> Result<()> {
    let root = root()?;
    let config = config(json!({"IPConfigs": [{"IP": "10.0.0.2", "Mask": 24}]}));
    late(Vm::builder().disk(&root).config(&config), &["eth0"])?;
    root.check()
}

#[test]
fn the_kernels_reason_for_a_refused_setting_is_reported() -> Result<()> {
    let root = root()?;
    let config = config(json!({"MTU": 60, "IPConfigs": [{"IP": "10.0.0.2", "Mask": 24}]}));
    let builder = Vm::builder()
        .disk(&root)
        .nic()
        .arg("PIGEON_CONFIG=file")
        .config(&config);
    late(
        builder,
        &["eth0", "MTU 60", "EINVAL", "mtu less than device minimum"],
    )?;
    root.check()
}
