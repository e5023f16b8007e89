//! The boot, seen from inside.
use anyhow::Result;
use pigeon_lab::disk::{Image, Tree};
use pigeon_lab::guest;
use pigeon_lab::vm::{End, Vm};
use serde_json::json;

#[test]
fn the_workload_runs_as_the_configured_user_and_its_exit_code_is_told() -> Result<()> {
    let script = guest::report(&[("id", "id"), ("mounts", "cat /proc/self/mountinfo")]) + "exit 7";
    let root = Image::ext4(&Tree::busybox()?.file("/t", 0o755, format!("#!/bin/sh\n{script}"))?, 32)?;
    let config = json!({"ExecOverride": ["/t"], "UserOverride": "app"});
    let mut vm = Vm::builder().config(&config).disk(&root).boot()?;
    assert_eq!(vm.section("id")?, ["uid=1000(app) gid=1000(app) groups=1000(app),44(video),50(staff)"]);
    assert_eq!(vm.api()?.get("/v1/exit_code")?.json()?, json!({"code": 7, "oom_killed": false}));
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check()
}
