//! Control groups: the layouts, the group of each process, and the permissions of the workload's user.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use pigeon_lab::{
    End, Vm, assets,
    disk::{Image, Tree},
    guest,
};
use serde_json::{Value, json};

fn root() -> Result<Image> {
    Image::ext4(&Tree::busybox()?, 32)
}

/// The standard output of a command in the VM.
fn exec(vm: &mut Vm, script: &str) -> Result<String> {
    let response = vm
        .api()?
        .post("/v1/exec", &json!({"cmd": ["sh", "-c", script]}))?;
    let response = response.success()?.json()?;
    ensure!(response["exit_code"] == 0, "{script}: {response}");
    Ok(response["stdout"].as_str().unwrap_or_default().into())
}

#[test]
fn unified_is_only_v2_with_all_controllers_enabled() -> Result<()> {
    let root = root()?;
    let script = guest::report(&[
        ("mounts", "grep cgroup /proc/mounts"),
        ("own", "cat /proc/self/cgroup"),
        ("all", "cat /sys/fs/cgroup/cgroup.controllers"),
        ("enabled", "cat /sys/fs/cgroup/cgroup.subtree_control"),
        ("mine", "cat /sys/fs/cgroup/workload/cgroup.controllers"),
        ("one", "cat /proc/1/cgroup"),
    ]);
    let mut vm = Vm::builder()
        .config(&guest::shell(&(script + "read -r line"), json!({})))
        .arg("PIGEON_CGROUPS=unified")
        .disk(&root)
        .boot()?;
    let mounts = vm.section("mounts")?;
    assert_eq!(mounts.len(), 1, "{mounts:?}");
    assert!(
        mounts[0].starts_with("cgroup2 /sys/fs/cgroup cgroup2 ")
            && mounts[0].contains("nosuid,nodev,noexec,relatime,nsdelegate"),
        "{mounts:?}"
    );
    assert_eq!(vm.section("own")?, ["0::/workload"]);
    assert_eq!(vm.section("one")?, ["0::/"]);
    let all = vm.section("all")?;
    for controller in ["cpu", "memory", "pids", "io", "cpuset"] {
        assert!(
            all[0].split(' ').any(|name| name == controller),
            "no {controller}: {all:?}"
        );
    }
    assert_eq!(vm.section("enabled")?, all);
    assert_eq!(vm.section("mine")?, all);
    assert_eq!(exec(&mut vm, "cat /proc/self/cgroup")?, "0::/commands\n");
    assert_eq!(guest::warnings(&vm.console()), [""; 0]);
    vm.type_text("\n")?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check()
}

#[test]
fn without_cgroups_nothing_is_mounted_and_everything_works() -> Result<()> {
    let root = root()?;
    let script = "grep -c cgroup /proc/mounts; ls -A /sys/fs/cgroup; read -r line; exit 4";
    let mut vm = Vm::builder()
        .config(&guest::shell(script, json!({"UserOverride": "app"})))
        .arg("PIGEON_CGROUPS=none")
        .disk(&root)
        .boot()?;
    assert_eq!(exec(&mut vm, "echo fine")?, "fine\n");
    vm.type_text("\n")?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    let console = vm.console();
    assert!(console.contains("\n0\n"), "{console}");
    assert!(console.contains("exit_code=4"), "{console}");
    assert_eq!(guest::warnings(&console), [""; 0], "{console}");
    root.check()
}

#[test]
fn an_invalid_layout_is_a_warning_and_hybrid_is_used() -> Result<()> {
    let root = root()?;
    let mut vm = Vm::builder()
        .config(&guest::shell("cat /proc/self/cgroup", json!({})))
        .arg("PIGEON_CGROUPS=v2")
        .disk(&root)
        .boot()?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    let console = vm.console();
    assert!(
        console.contains("kernel parameter PIGEON_CGROUPS=v2: must be hybrid, unified or none"),
        "{console}"
    );
    assert!(console.contains("0::/workload"), "{console}");
    root.check()
}

#[test]
fn the_workloads_user_owns_its_group_and_root_that_of_commands() -> Result<()> {
    for (layout, v2) in [
        ("hybrid", "/sys/fs/cgroup/unified"),
        ("unified", "/sys/fs/cgroup"),
    ] {
        let root = root()?;
        // What a user's container engine does: create groups, move processes, set limits.
        let script = format!(
            "cd {v2}/workload && mkdir inner outer && echo $$ >inner/cgroup.procs && cat /proc/self/cgroup | tail -n 1
            if [ {layout} = unified ]; then
                echo '+memory +pids' >cgroup.subtree_control && echo 50000000 >outer/memory.max &&
                echo 20 >outer/pids.max && cat outer/pids.max
            fi
            until [ -d {v2}/commands ]; do sleep 0.01; done
            echo $$ >{v2}/commands/cgroup.procs || echo kept out of commands
            echo $$ >{v2}/cgroup.procs || echo kept out of the root
            read -r line"
        );
        let mut vm = Vm::builder()
            .config(&guest::shell(&script, json!({"UserOverride": "app"})))
            .arg(&format!("PIGEON_CGROUPS={layout}"))
            .disk(&root)
            .boot()?;
        vm.wait_for("kept out of the root")?;
        let console = vm.console();
        assert!(console.contains("kept out of commands"), "{console}");
        assert!(console.contains("0::/workload/inner"), "{console}");
        assert_eq!(console.contains("\n20\n"), layout == "unified", "{console}");
        let owners = format!(
            "cd {v2}; stat -c '%n %u:%g' workload workload/cgroup.procs workload/cgroup.threads \
             workload/cgroup.subtree_control workload/cgroup.freeze commands commands/cgroup.procs"
        );
        assert_eq!(
            exec(&mut vm, &owners)?,
            "workload 1000:1000\nworkload/cgroup.procs 1000:1000\n\
             workload/cgroup.threads 1000:1000\nworkload/cgroup.subtree_control 1000:1000\n\
             workload/cgroup.freeze 0:0\ncommands 0:0\ncommands/cgroup.procs 0:0\n"
        );
        vm.type_text("\n")?;
        assert_eq!(vm.wait_end()?, End::Reboot);
        root.check()?;
    }
    Ok(())
}

#[test]
fn a_workload_that_freezes_its_group_does_not_lock_out_the_host() -> Result<()> {
    let root = root()?;
    let script = "echo frozen soon; echo 1 >/sys/fs/cgroup/unified/workload/cgroup.freeze; exit 7";
    let mut vm = Vm::builder()
        .config(&guest::shell(script, json!({})))
        .disk(&root)
        .timeout(Duration::from_secs(120))
        .boot()?;
    vm.wait_for("frozen soon")?;
    let group = "/sys/fs/cgroup/unified/workload";
    let frozen = format!("until grep -q 'frozen 1' {group}/cgroup.events; do sleep 0.1; done");
    exec(&mut vm, &frozen)?;
    let gone = vm.api()?.get("/v1/status")?;
    assert_eq!(gone.status, 200);
    exec(&mut vm, &format!("echo 0 >{group}/cgroup.freeze"))?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    assert!(vm.console().contains("exit_code=7"), "{}", vm.console());
    root.check()
}

#[test]
fn commands_start_in_the_root_cgroup_if_their_group_was_removed() -> Result<()> {
    let root = root()?;
    let script = "cd /sys/fs/cgroup/unified; until [ -d commands ]; do sleep 0.01; done
        rmdir commands && echo taken; read -r line";
    let mut vm = Vm::builder()
        .config(&guest::shell(script, json!({})))
        .disk(&root)
        .boot()?;
    vm.wait_for("taken")?;
    assert_eq!(exec(&mut vm, "tail -n 1 /proc/self/cgroup")?, "0::/\n");
    vm.type_text("\n")?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check()
}

/// A command that is frozen before it executes has copies of all descriptors of PID 1.
#[test]
fn commands_frozen_at_their_start_keep_no_connection_open() -> Result<()> {
    let root = root()?;
    let script = "cd /sys/fs/cgroup/unified; until [ -d commands ]; do sleep 0.01; done
        echo ready; until [ -e /run/freeze ]; do sleep 0.01; done
        echo 1 >commands/cgroup.freeze; echo frozen
        while sleep 1; do set -- $(cat /proc/1/stat); echo ticks $((${14} + ${15})); done";
    let mut vm = Vm::builder()
        .config(&guest::shell(script, json!({})))
        .disk(&root)
        .timeout(Duration::from_secs(120))
        .boot()?;
    vm.wait_for("ready")?;
    let mut kept = vm.api()?;
    kept.get("/v1/status")?.success()?;
    exec(&mut vm, "touch /run/freeze")?;
    vm.wait_for("frozen")?;
    let mut command = vm.api()?;
    let body = json!({"cmd": ["true"], "timeout_ms": 600_000}).to_string();
    let head = "POST /v1/exec HTTP/1.1\r\nHost: x\r\nContent-Length: ";
    command.send(format!("{head}{}\r\n\r\n{body}", body.len()).as_bytes())?;
    vm.api()?.get("/v1/status")?.success()?;

    // A connection that was opened before.
    kept.send(b"GET /v1/status HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
    kept.receive(false)?.success()?;
    kept.wait_closed().context("the connection stays open")?;
    drop(kept);
    let ticks = |vm: &Vm| -> Vec<u32> {
        let console = vm.console();
        let ticks = console
            .lines()
            .filter_map(|line| line.strip_prefix("ticks "));
        ticks
            .filter_map(|ticks| ticks.trim().parse().ok())
            .collect()
    };
    let count = ticks(&vm).len();
    let start = Instant::now();
    let ticks = loop {
        let ticks = ticks(&vm);
        if ticks.len() >= count + 5 {
            break ticks;
        }
        ensure!(start.elapsed() < Duration::from_secs(120), "{ticks:?}");
        thread::sleep(Duration::from_millis(100));
    };
    // Of the 300 ticks in three seconds.
    let [.., first, _, _, last] = ticks[..] else {
        bail!("{ticks:?}");
    };
    ensure!(last - first < 30, "PID 1 does not sleep: {ticks:?}");
    drop(command);
    vm.api()?
        .post("/v1/signals", &json!({"signal": 9}))?
        .success()?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check()
}

/// Limits of a container: 32 MiB and 8 processes.
fn limits() -> Value {
    json!({"memory": {"limit": 32 << 20}, "pids": {"limit": 8}})
}

/// The container's script: it exceeds its limits of memory and of processes.
const CONTAINED: &str = "echo contained $$ $(id -u)
    cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max 2>/dev/null
    dd if=/dev/zero of=/dev/null bs=64M count=1; echo memory $?
    grep '^oom_kill ' /sys/fs/cgroup/memory.events 2>/dev/null
    (for i in 1 2 3 4 5 6 7 8 9 10; do sleep 1000 & done); echo processes $?; exit 9";

/// The container's part of the OCI configuration (runtime-spec, config-linux.md) for the user `app`.
fn of_app(resources: Value) -> Value {
    json!({
        "uidMappings": [{"containerID": 0, "hostID": 1000, "size": 1}],
        "gidMappings": [{"containerID": 0, "hostID": 1000, "size": 1}],
        "namespaces": ["user", "cgroup"],
        "resources": resources,
    })
}

/// A root with Debian's runc and containers that use its `/bin`: a name and the `linux` part of the
/// configuration for each, which is in `/srv/NAME`.
fn with_runc(containers: &[(&str, Value)]) -> Result<Image> {
    let mut tree = Tree::busybox()?.packages(&["runc", "libseccomp2", "libc6"])?;
    for (name, linux) in containers {
        let mut linux = linux.clone();
        let more = linux["namespaces"].as_array().into_iter().flatten();
        let all = ["pid", "ipc", "uts", "mount"].map(Value::from);
        linux["namespaces"] = all
            .iter()
            .chain(more)
            .map(|kind| json!({"type": kind}))
            .collect();
        let config = json!({
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": 0, "gid": 0}, "cwd": "/", "env": ["PATH=/bin"],
                "args": ["sh", "-c", CONTAINED], "noNewPrivileges": true,
            },
            "root": {"path": "rootfs", "readonly": true},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
                {"destination": "/bin", "type": "bind", "source": "/bin", "options": ["rbind", "ro"]},
                {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]},
            ],
            "linux": linux,
        });
        let bundle = format!("/srv/{name}");
        tree = tree.file(&format!("{bundle}/config.json"), 0o644, config.to_string())?;
        for directory in ["bin", "dev", "proc", "sys/fs/cgroup"] {
            tree = tree.dir(&format!("{bundle}/rootfs/{directory}"), 0o755)?;
        }
    }
    Image::ext4(&tree, 96)
}

/// The command that runs the container in `/srv/NAME`.
fn runc(name: &str) -> String {
    format!("runc --root /tmp/runc run --bundle /srv/{name} {name}; echo {name} ended with $?")
}

#[test]
fn in_unified_a_users_container_has_memory_and_pids_limits() -> Result<()> {
    let mut linux = of_app(limits());
    linux["cgroupsPath"] = json!("/workload/box");
    let root = with_runc(&[("box", linux)])?;
    // A group that delegates controllers cannot have processes (cgroups(7)).
    let script = format!(
        "mkdir /sys/fs/cgroup/workload/shell; echo 0 >/sys/fs/cgroup/workload/shell/cgroup.procs
        {}",
        runc("box")
    );
    let mut vm = Vm::builder()
        .config(&guest::shell(&script, json!({"UserOverride": "app"})))
        .arg("PIGEON_CGROUPS=unified")
        .disk(&root)
        .timeout(Duration::from_secs(180))
        .boot()?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    let console = vm.console();
    for said in [
        "contained 1 0\n33554432\n8\n",
        "memory 137\n",
        "oom_kill 1\n",
        "can't fork: Resource temporarily unavailable\n",
        "processes 2\n",
        "box ended with 9\n",
        "exit_code=0 oom_killed=false",
    ] {
        assert!(console.contains(said), "no {said:?} in {console}");
    }
    root.check()
}

#[test]
fn in_hybrid_only_roots_containers_have_limits() -> Result<()> {
    let of_root = json!({"cgroupsPath": "/box", "resources": limits()});
    let root = with_runc(&[
        ("free", of_app(json!({}))),
        ("limited", of_app(limits())),
        ("box", of_root),
    ])?;
    let script = format!(
        "{}; {}; echo ready; read -r line",
        runc("free"),
        runc("limited")
    );
    let mut vm = Vm::builder()
        .config(&guest::shell(&script, json!({"UserOverride": "app"})))
        .disk(&root)
        .timeout(Duration::from_secs(180))
        .boot()?;
    vm.wait_for("ready")?;
    let console = vm.console();
    for said in [
        "contained 1 0\n",
        "memory 0\nprocesses 0\nfree ended with 9\n",
        "cannot set memory limit: container could not join or create cgroup",
        "limited ended with 1\n",
    ] {
        assert!(console.contains(said), "no {said:?} in {console}");
    }
    // The kernel no longer has a v1 memory hierarchy, or root's container has both limits.
    let has_memory = !assets::missing_v1_controllers()?.contains(&"memory");
    let said = exec(&mut vm, &format!("{{ {}; }} 2>&1", runc("box")))?;
    let expected: &[&str] = match has_memory {
        true => &[
            "memory 137\n",
            "can't fork",
            "processes 2\n",
            "box ended with 9\n",
        ],
        false => &["cannot set memory limit", "box ended with 1\n"],
    };
    for words in expected {
        assert!(said.contains(words), "no {words:?} in {said}");
    }
    vm.type_text("\n")?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check()
}
