//! What images and their programs expect from a container engine.

use std::io::Write;

use anyhow::{Result, ensure};
use pigeon_lab::{
    End, Vm,
    disk::{Disk, Image, Tree},
    guest, vsock,
    ws::Socket,
};
use serde_json::{Value, json};

/// Runs a command by a call.
fn exec(vm: &mut Vm, call: &Value) -> Result<Value> {
    vm.api()?.post("/v1/exec", call)?.success()?.json()
}

/// The standard output of a shell script in the VM.
fn shell(vm: &mut Vm, script: &str) -> Result<String> {
    let response = exec(vm, &json!({"cmd": ["sh", "-c", script]}))?;
    ensure!(response["exit_code"] == 0, "{script}: {response}");
    Ok(response["stdout"].as_str().unwrap_or_default().into())
}

#[test]
fn the_images_run_directory_is_copied() -> Result<()> {
    let tree = Tree::busybox()?
        .symlink("/var/run", "/run")?
        .dir("/run/sshd", 0o755)?
        .dir("/run/postgresql", 0o1775)?
        .owned("/run/postgresql", 1000, 44)
        .file("/run/postgresql/deep/er/note", 0o640, "small\n")?
        .owned("/run/postgresql/deep/er/note", 65534, 5)
        .file("/run/tool", 0o4755, "x")?
        .symlink("/run/link", "/etc/shadow")?
        .dir("/run/lock", 0o700)?
        .file("/run/lock/held", 0o600, "by nobody\n")?;
    let root = Image::ext4(&tree, 32)?;
    let script = guest::report(&[(
        "run",
        "cd /var/run && find . | sort | xargs stat -c '%n %F %a %u:%g %s'; cat postgresql/deep/er/note lock/held; readlink link",
    )]);
    let mut vm = Vm::builder()
        .config(&guest::shell(&(script + "exit 3"), json!({})))
        .disk(&root)
        .boot()?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    // The size of a directory in a tmpfs varies.
    let seen = vm.section("run")?;
    let seen: Vec<_> = seen
        .iter()
        .map(|line| match line.split_once(" directory ") {
            Some((name, rest)) => format!("{name}/ {}", rest.rsplit_once(' ').unwrap().0),
            None => line.clone(),
        })
        .collect();
    assert_eq!(
        seen,
        [
            "./ 755 0:0",
            "./link symbolic link 777 0:0 11",
            "./lock/ 1777 0:0",
            "./lock/held regular file 600 0:0 10",
            "./postgresql/ 1775 1000:44",
            "./postgresql/deep/ 755 0:0",
            "./postgresql/deep/er/ 755 0:0",
            "./postgresql/deep/er/note regular file 640 65534:5 6",
            "./sshd/ 755 0:0",
            "./tool regular file 4755 0:0 1",
            "small",
            "by nobody",
            "/etc/shadow",
        ]
    );
    let console = vm.console();
    assert_eq!(guest::warnings(&console), [""; 0], "{console}");
    assert!(console.contains("exit_code=3"), "{console}");
    root.check()
}

#[test]
fn exceeding_the_limits_of_run_is_a_warning() -> Result<()> {
    let mut many = Tree::busybox()?.dir("/run/first", 0o755)?;
    for number in 0..1100 {
        many = many.file(&format!("/run/many/{number}"), 0o644, "")?;
    }
    let mut deep = String::from("/run");
    for _ in 0..40 {
        deep += "/d";
    }
    let mut large = Tree::busybox()?;
    for number in 0..20 {
        large = large.file(&format!("/run/{number}"), 0o644, vec![b'x'; 64 << 10])?;
    }
    for (tree, why) in [
        (many, "more than 1,024 entries"),
        (large, "more than 1 MiB"),
        (
            Tree::busybox()?.file("/run/log", 0o644, vec![b'x'; (64 << 10) + 1])?,
            "a file over 64 KiB",
        ),
        (
            Tree::busybox()?.dir(&deep, 0o755)?,
            "more than 32 directories in each other",
        ),
    ] {
        let root = Image::ext4(&tree, 32)?;
        let mut vm = Vm::builder()
            .config(&guest::shell("exit 5", json!({})))
            .disk(&root)
            .boot()?;
        assert_eq!(vm.wait_end()?, End::Reboot);
        let console = vm.console();
        let warning = format!("level=warn msg=\"/run of the image: {why}");
        assert!(console.contains(&warning), "{why}: {console}");
        assert!(console.contains("exit_code=5"), "{console}");
    }
    Ok(())
}

#[test]
fn an_entry_that_run_has_already_does_not_end_the_copy() -> Result<()> {
    let mut tree = Tree::busybox()?.symlink("/run/lock", "/srv")?;
    for number in 0..20 {
        tree = tree.file(&format!("/run/file-{number}"), 0o644, "")?;
    }
    let root = Image::ext4(&tree, 32)?;
    let script = "test -d /run/lock -a ! -L /run/lock && exit $(ls /run | grep -c file-)";
    let mut vm = Vm::builder()
        .config(&guest::shell(script, json!({})))
        .disk(&root)
        .boot()?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    let console = vm.console();
    assert_eq!(guest::warnings(&console), [""; 0], "{console}");
    assert!(console.contains("exit_code=20"), "{console}");
    root.check()
}

#[test]
fn the_standard_streams_can_be_opened_by_name() -> Result<()> {
    let root = Image::ext4(&Tree::busybox()?, 32)?;
    // As the user of the console, of a pipe and of a terminal; /dev/null keeps its mode.
    let script =
        "echo ready; read -r line </dev/stdin && echo \"workload: $line\" >/dev/stdout; echo error >/dev/stderr
        read -r line";
    let mut vm = Vm::builder()
        .config(&guest::shell(script, json!({"UserOverride": "app"})))
        .disk(&root)
        .boot()?;
    vm.wait_for("ready")?;
    vm.type_text("typed\n")?;
    vm.wait_for("workload: typed")?;
    let response = exec(
        &mut vm,
        &json!({"cmd": ["sh", "-c", "cat /dev/stdin; echo one >/dev/stdout; echo two >/dev/stderr"], "user": "app"}),
    )?;
    assert_eq!(response["exit_code"], 0, "{response}");
    assert_eq!(
        (&response["stdout"], &response["stderr"]),
        (&json!("one\n"), &json!("two\n"))
    );
    for tty in [false, true] {
        let mut session = Socket::open(vm.connect(vsock::API_PORT)?, "/v1/ws/exec")?;
        session.text(&json!({
            "command": ["sh", "-c", "read -r line </dev/stdin; echo got $line >/dev/stdout"],
            "tty": tty, "user": "app"
        }))?;
        session.binary(b"input\n")?;
        session.output_with("got input")?;
        let exit = json!({"Exit": {"code": 0, "signal": null}});
        assert_eq!(session.wait_end()?.message, Some(exit), "tty {tty}");
    }
    assert_eq!(shell(&mut vm, "stat -c '%a %u' /dev/null")?, "666 0\n");
    vm.type_text("\n")?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check()
}

#[test]
fn a_user_can_serve_port_80_and_ping() -> Result<()> {
    let root = Image::ext4(&Tree::busybox()?, 32)?;
    let script = "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/net/ipv4/ping_group_range
        (echo hello | nc -l -p 80) & until nc 127.0.0.1 80 </dev/null 2>/dev/null; do sleep 0.1; done";
    let mut vm = Vm::builder()
        .config(&guest::shell(script, json!({"UserOverride": "app"})))
        .disk(&root)
        .boot()?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    let console = vm.console();
    assert!(console.contains("\n0\n0\t2147483647\n"), "{console}");
    assert!(console.contains("hello"), "{console}");
    root.check()
}

#[test]
fn only_helpers_are_exempt_from_the_oom_killer() -> Result<()> {
    let root = Image::ext4(&Tree::busybox()?, 32)?;
    // A bind mount of /proc stays readable.
    let script = "cat /proc/self/oom_score_adj; mkdir /tmp/proc; mount --bind /proc /tmp/proc
        mount -t tmpfs cover /proc; echo covered; read -r line";
    let mut vm = Vm::builder()
        .config(&guest::shell(script, json!({})))
        .disk(&root)
        .boot()?;
    vm.wait_for("covered")?;
    assert!(vm.console().contains("\n0\ncovered"), "{}", vm.console());
    let look = "cat /tmp/proc/self/oom_score_adj";
    assert_eq!(shell(&mut vm, look)?, "0\n");
    // A helper process waits for the body.
    let mut upload = vm.connect(vsock::API_PORT)?;
    upload.write_all(
        b"PUT /v1/files?path=/tmp/file HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n",
    )?;
    let look = "cat /tmp/proc/[0-9]*/oom_score_adj | sort -u";
    assert_eq!(shell(&mut vm, look)?, "-1000\n0\n");
    drop(upload);
    vm.type_text("\n")?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check()
}

#[test]
fn hosts_and_resolv_conf_are_mounted_over_on_a_read_only_root() -> Result<()> {
    let config = |script: &str| {
        guest::shell(
            script,
            json!({
                "EtcHosts": [{"Host": "one.internal", "IP": "192.0.2.1"}],
                "EtcResolv": {"Nameservers": ["192.0.2.53"]}
            }),
        )
    };
    let tree = Tree::busybox()?
        .file("/etc/hosts", 0o644, "192.0.2.9 old\n")?
        .symlink("/etc/resolv.conf", "../run/nowhere/resolv.conf")?;
    let root = Image::ext4(&tree, 32)?;
    let mut vm = Vm::builder()
        .config(&config(
            "cat /etc/hosts /etc/resolv.conf; grep -c ' /etc/' /proc/mounts; touch /x",
        ))
        .disk(Disk::from(&root).read_only())
        .boot()?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    let console = vm.console();
    for words in [
        "192.0.2.9 old",
        "192.0.2.1\tone.internal",
        "nameserver 192.0.2.53",
        "\n2\n",
        "/x: Read-only file system",
    ] {
        assert!(console.contains(words), "{words}: {console}");
    }
    root.check()?;

    // They cannot be created on a read-only root: a warning names them, and the boot continues.
    let root = Image::ext4(&Tree::busybox()?, 32)?;
    let mut vm = Vm::builder()
        .config(&config("exit 6"))
        .disk(Disk::from(&root).read_only())
        .boot()?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    let console = vm.console();
    for name in ["hosts", "resolv.conf"] {
        let words = format!("/etc/{name} cannot be written; mount over it: ENOENT");
        assert!(console.contains(&words), "{words}: {console}");
    }
    assert!(console.contains("exit_code=6"), "{console}");
    root.check()
}

#[test]
fn resource_limits_apply_to_workload_and_commands_only() -> Result<()> {
    let root = Image::ext4(&Tree::busybox()?, 32)?;
    let rest = json!({
        "UserOverride": "app",
        "Rlimits": {"NOFILE": "1000:20000", "CORE": "unlimited", "NICE": 30, "STACK": 4_194_304}
    });
    let script = "ulimit -Sn; ulimit -Hn; ulimit -c; ulimit -s; grep 'Max nice' /proc/self/limits; read -r line";
    let mut vm = Vm::builder()
        .config(&guest::shell(script, rest))
        .disk(&root)
        .boot()?;
    vm.wait_for("Max nice priority         30                   30")?;
    let console = vm.console();
    assert!(
        console.contains("\n1000\n20000\nunlimited\n4096\n"),
        "{console}"
    );
    let look = "ulimit -Sn; ulimit -Hn; grep -E 'open files' /proc/1/limits | tr -s ' '";
    assert_eq!(
        shell(&mut vm, look)?,
        "1000\n20000\nMax open files 10240 10240 files \n"
    );
    vm.type_text("\n")?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check()
}

#[test]
fn sysctls_are_set_and_a_failing_one_is_fatal_and_named() -> Result<()> {
    let root = Image::ext4(&Tree::busybox()?, 32)?;
    let rest = json!({"Sysctls": {
        "net.core.somaxconn": "1234",
        "net/ipv4/ip_unprivileged_port_start": "81",
        "net.ipv4.conf.lo.forwarding": "1",
        "kernel.core_pattern": ""
    }});
    let script = "cd /proc/sys/net; cat core/somaxconn ipv4/ip_unprivileged_port_start ipv4/conf/lo/forwarding
        echo \"cores: '$(cat /proc/sys/kernel/core_pattern)'\"; exit 3";
    let mut vm = Vm::builder()
        .config(&guest::shell(script, rest))
        .disk(&root)
        .boot()?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    let console = vm.console();
    assert!(console.contains("\n1234\n81\n1\ncores: ''\n"), "{console}");
    assert!(console.contains("exit_code=3"), "{console}");

    for (name, value, why) in [
        ("net.core.nosuch", "1", "ENOENT"),
        // The kernel accepts the first number.
        ("net.core.somaxconn", "12 many", "EINVAL"),
    ] {
        let rest = json!({"Sysctls": {name: value}});
        let mut vm = Vm::builder()
            .config(&guest::shell("exit 0", rest))
            .arg("PIGEON_EXIT_LINGER_MS=60000")
            .disk(&root)
            .boot()?;
        let exit = vm.api()?.get("/v1/exit_code")?.json()?;
        assert_eq!(
            exit,
            json!({"code": 125, "oom_killed": false, "error": format!("set {name} to {value}: {why}")})
        );
        assert_eq!(vm.wait_end()?, End::Reboot);
    }
    root.check()
}

#[test]
fn addresses_are_added_to_their_interface() -> Result<()> {
    let root = Image::ext4(&Tree::busybox()?, 32)?;
    let boot = |device: &str| {
        let rest = json!({"IPConfigs": [
            {"IP": "10.0.0.2", "Mask": 24, "Gateway": "10.0.0.1"},
            {"IP": "192.0.2.7", "Mask": 32, "Device": device},
            {"IP": "fd00::2", "Mask": 64, "Gateway": "fd00::1"},
            {"IP": "fd01::2", "Mask": 64, "Gateway": "fd01::1"}
        ]});
        let script = "ip -o -4 address show | sed 's/^[0-9]*: //; s/  */ /g'; ip -6 route show default; echo end of routes";
        Vm::builder()
            .config(&guest::shell(script, rest))
            .disk(&root)
            .tap()
            .boot()
    };
    let mut vm = boot("lo")?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    let console = vm.console();
    assert!(console.contains("lo inet 192.0.2.7/32 "), "{console}");
    assert!(console.contains("eth0 inet 10.0.0.2/24 "), "{console}");
    // The first default gateway wins; a second one would be another path of the same route.
    assert!(
        console.contains("default via fd00::1 dev eth0"),
        "{console}"
    );
    assert!(!console.contains("fd01::1"), "{console}");
    let mut vm = boot("eth7")?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    let console = vm.console();
    assert!(
        console.contains("level=error msg=\"no network interface eth7\""),
        "{console}"
    );
    root.check()
}

#[test]
fn a_volume_listed_before_the_one_above_it_is_not_hidden() -> Result<()> {
    let root = Image::ext4(&Tree::busybox()?, 32)?;
    // As with `pigeon run -v data.img:/srv/data --tmpfs /srv`.
    let rest = json!({"Mounts": [
        {"FSType": "tmpfs", "MountPath": "/srv/data/deep", "Options": "size=1m"},
        {"FSType": "tmpfs", "MountPath": "/srv/data", "Options": "size=2m"},
        {"FSType": "tmpfs", "MountPath": "/srv", "Options": "size=3m"}
    ]});
    let script = "df /srv /srv/data /srv/data/deep && exit 3";
    let mut vm = Vm::builder()
        .config(&guest::shell(script, rest))
        .disk(&root)
        .boot()?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    let console = vm.console();
    assert!(console.contains("exit_code=3"), "{console}");
    root.check()
}

/// The numbers of writes and flushes on the root's disk.
fn writes(vm: &mut Vm) -> Result<(u64, u64)> {
    let stats = vm.qmp("query-blockstats", json!({}))?;
    let disk = stats.as_array().into_iter().flatten().find(|disk| {
        disk["qdev"]
            .as_str()
            .is_some_and(|name| name.contains("d0"))
            || disk["device"]
                .as_str()
                .is_some_and(|name| name.ends_with('0'))
            || disk["node-name"].is_string()
    });
    let count = |name: &str| disk.and_then(|disk| disk["stats"][name].as_u64());
    match (count("wr_operations"), count("flush_operations")) {
        (Some(writes), Some(flushes)) => Ok((writes, flushes)),
        _ => anyhow::bail!("no disk in {stats}"),
    }
}

#[test]
fn unchanged_etc_files_are_not_written_and_never_flushed() -> Result<()> {
    let tree = Tree::busybox()?
        .file("/etc/hosts", 0o644, "127.0.0.1 localhost\n")?
        .dir("/data", 0o755)?;
    let root = Image::ext4(&tree, 32)?;
    let boot = |rest: Value| -> Result<(u64, u64)> {
        let mut vm = Vm::builder()
            .on_qemu()
            .config(&guest::shell("echo ready; read -r line", rest))
            .disk(&root)
            .boot()?;
        vm.wait_for("ready")?;
        let counts = writes(&mut vm)?;
        vm.type_text("\n")?;
        assert_eq!(vm.wait_end()?, End::Reboot);
        root.check()?;
        Ok(counts)
    };
    let names = || {
        json!({
            "Hostname": "named",
            "EtcHosts": [{"Host": "one", "IP": "192.0.2.1", "Desc": "first"}],
            "EtcResolv": {"Nameservers": ["192.0.2.53"], "Search": ["internal"], "Options": ["ndots:2"]}
        })
    };
    let (_, bare_flushes) = boot(json!({}))?;
    let (_, first_flushes) = boot(names())?;
    let bare = boot(json!({}))?;
    let second = boot(names())?;
    assert_eq!(first_flushes, bare_flushes);
    assert_eq!(second, bare);
    assert_eq!(
        root.read("/etc/resolv.conf")?,
        "nameserver 192.0.2.53\nsearch internal\noptions ndots:2\n"
    );
    assert!(root.read("/etc/hosts")?.contains("192.0.2.1\tone"));
    Ok(())
}
