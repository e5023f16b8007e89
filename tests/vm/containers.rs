//! Debian programs in a VM: container engines and an init system, and how they use cgroups; a database with
//! its client on the host.

use std::{process::Command, time::Duration};

use anyhow::{Context, Result, ensure};
use pigeon::{
    forward::Forward,
    image::{self, Options, disk::Format},
};
use pigeon_lab::{End, Vm, assets, disk::Disk, guest, process::run, vm::Builder};
use serde_json::{Value, json};
use tempfile::{NamedTempFile, TempPath};

/// It has the script that runs systemd.
const README: &str = include_str!("../../README.md");

/// An image of a Debian system with these packages.
fn debian(packages: &[&str]) -> Result<TempPath> {
    let image = NamedTempFile::with_suffix(".erofs")?.into_temp_path();
    let options = Options {
        arch: assets::arch(),
        format: Format::Erofs,
        force: true,
        ..Options::default()
    };
    image::build(&assets::debian(packages)?, &image, &options)?;
    Ok(image)
}

fn vm(debian: &TempPath, config: Value) -> Builder {
    let mut config = config;
    config["RootOverlay"] = json!("tmpfs:size=300m");
    ["erofs", "overlay"]
        .into_iter()
        .fold(Vm::builder(), Builder::module)
        .config(&config)
        .arg("PIGEON_CGROUPS=unified")
        .disk(Disk::file(debian).read_only())
        .memory_mib(1024)
        .timeout(Duration::from_secs(400))
}

/// The standard output of a command in the VM.
fn exec(vm: &mut Vm, script: &str) -> Result<String> {
    let command = json!({"cmd": ["sh", "-c", script], "timeout_ms": 300_000});
    let response = vm.api()?.post("/v1/exec", &command)?.success()?.json()?;
    ensure!(response["exit_code"] == 0, "{script}: {response}");
    Ok(response["stdout"].as_str().unwrap_or_default().into())
}

#[test]
fn systemd_in_its_own_namespaces_reaches_running() -> Result<()> {
    let debian = debian(&["dbus", "procps", "systemd-sysv"])?;
    // A cgroup for systemd alone, as a group whose children have controllers cannot have processes; and a
    // cgroup2 mount that is made in its cgroup namespace, as a mount shows the paths of the namespace in
    // which it was made.
    let script = README
        .split("```text\n")
        .find_map(|block| block.starts_with("own=").then(|| block.split("```").next()))
        .flatten()
        .context("no script in the README")?;
    let config = json!({"ExecOverride": ["sh", "-c", script]});
    let mut vm = vm(&debian, config).start()?;
    let report = exec(
        &mut vm,
        "enter() { nsenter --all --target=$(pgrep -P $(pgrep -x unshare)) \"$@\"; }
        until enter test -S /run/systemd/private; do sleep 0.2; done
        enter systemctl is-system-running --wait; enter systemctl --failed --no-legend
        enter cat /proc/1/cgroup
        enter systemd-run --quiet --wait --pipe -p MemoryMax=32M -p TasksMax=8 \\
            sh -c 'cd /sys/fs/cgroup$(cut -d : -f 3 /proc/self/cgroup); cat memory.max pids.max'",
    )?;
    assert_eq!(report, "running\n0::/init.scope\n33554432\n8\n");
    let console = vm.console();
    assert!(!console.contains("[FAILED]"), "{console}");
    exec(
        &mut vm,
        "nsenter --all --target=$(pgrep -P $(pgrep -x unshare)) systemctl --no-block poweroff",
    )?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    assert_eq!(guest::warnings(&vm.console()), [""; 0]);
    Ok(())
}

#[test]
fn podman_runs_a_users_container_with_limits() -> Result<()> {
    let debian = debian(&["busybox-static", "podman", "procps", "runc", "uidmap"])?;
    // Its own cgroup is split: one for podman, and one for the container (podman-run(1)).
    let script = "export HOME=/home/app XDG_RUNTIME_DIR=/run/app
        mkdir -p ~/box/bin; cp /bin/busybox ~/box/bin
        for name in sh cat dd sleep; do ln -s busybox ~/box/bin/$name; done
        cd ~; podman --cgroup-manager=cgroupfs --runtime=runc --events-backend=file run --rm \
            --cgroups=split --network=none --log-driver=none --memory=32m --pids-limit=8 \
            --rootfs ~/box /bin/sh -c '
            cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max
            dd if=/dev/zero of=/dev/null bs=64M count=1; echo memory $?
            (for i in 1 2 3 4 5 6 7 8 9 10; do sleep 1000 & done); echo processes $?; exit 9'
        echo ended with $?";
    let config = json!({
        "ExecOverride": ["sh", "-c", script],
        "UserOverride": "app",
        "Mounts": [{"FSType": "tmpfs", "MountPath": "/run/app"}],
    });
    let mut vm = vm(&debian, config).boot()?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    let console = vm.console();
    for said in [
        "33554432\n8\n",
        "memory 137\n",
        "can't fork: Resource temporarily unavailable\n",
        "processes 2\n",
        "ended with 9\n",
    ] {
        assert!(console.contains(said), "no {said:?} in {console}");
    }
    Ok(())
}

#[test]
fn redis_responds_to_a_client_on_the_host_through_a_tunnel() -> Result<()> {
    let debian = debian(&["redis-server"])?;
    let config = json!({
        "ExecOverride": ["redis-server", "--port", "6379", "--save", "", "--dir", "/tmp"],
        "UserOverride": "redis",
    });
    let vm = vm(&debian, config).boot()?;
    vm.wait_for("Ready to accept connections")?;
    let uds = vm.vsock().context("no vsock")?;
    let forward = Forward::start("127.0.0.1:0", uds, "127.0.0.1:6379", |error| {
        eprintln!("{error}")
    })?;
    let port = forward.address().port().to_string();
    let tool = |name, arguments: &[&str]| {
        run(Command::new(assets::tool(name)?)
            .args(["-p", &port])
            .args(arguments))
    };
    assert_eq!(tool("redis-cli", &["set", "key", "value"])?, "OK\n");
    assert_eq!(tool("redis-cli", &["get", "key"])?, "value\n");
    // 50 connections at once, then one after the other, each with a megabyte.
    let many = ["-q", "-c", "50", "-n", "5000", "-t", "set,get"];
    let figures = tool("redis-benchmark", &many)?;
    assert!(
        figures.contains("SET: ") && figures.contains("GET: "),
        "{figures}"
    );
    let large = [
        "-q", "-c", "1", "-n", "20", "-d", "1000000", "-k", "0", "-t", "set",
    ];
    assert!(tool("redis-benchmark", &large)?.contains("SET: "));
    let connections = tool("redis-cli", &["info", "clients"])?;
    assert!(
        connections.contains("connected_clients:1\r\n"),
        "{connections}"
    );
    Ok(())
}
