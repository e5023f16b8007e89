//! Bugs that were reported for other inits, runtimes and agents (runc, crun, conmon, catatonit, dumb-init,
//! systemd, buildah, kata), tried on this one. Each input has its report.

use std::{
    os::unix::net::UnixStream,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use pigeon_lab::{
    End, Vm, assets,
    disk::{Image, Tree},
    guest,
    http::Client,
    process::run,
    vsock::API_PORT,
    ws::{Ended, Socket},
};
use serde_json::{Value, json};

/// Long, as other VMs may run at the same time.
const TIMEOUT: Duration = Duration::from_secs(180);

/// Account files as in images, and from attackers.
const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n\
    +::::::\n\
    +@team:x:::::\n\
    torn:x:abc:def::/:/bin/sh\n\
    empty:x:::::\n\
    daemon:x:1:1::/usr/sbin:/bin/false\n\
    crlf:x:1003:1003::/home/crlf:/bin/sh\r\n\
    twice:x:1004:1004::/home/first:/bin/sh\n\
    twice:x:0:0::/root:/bin/sh\n\
    app:x:1000:1000::/home/app:/bin/sh\n\
    last:x:1005:1005::/home/last:/bin/sh";

const GROUP: &str = "root:x:0:\n\
    +:::\n\
    app:x:1000:\n\
    video:x:44:app,app,last\n\
    torn:x:abc:app\n\
    audio:x:29:app,\n\
    spaced:x:30: app";

fn exec(api: &mut Client<UnixStream>, body: &Value) -> Result<Value> {
    api.post("/v1/exec", body)?.json()
}

/// The output of a shell command.
fn shell(api: &mut Client<UnixStream>, script: &str) -> Result<String> {
    let response = exec(api, &json!({"cmd": ["/bin/sh", "-c", script]}))?;
    Ok(response["stdout"].as_str().unwrap_or_default().into())
}

#[test]
fn account_files_that_broke_other_runtimes_work() -> Result<()> {
    let tree =
        Tree::busybox()?
            .file("/etc/passwd", 0o644, PASSWD)?
            .file("/etc/group", 0o644, GROUP)?;
    let root = Image::ext4(&tree, 32)?;
    let config = json!({
        "ExecOverride": ["/bin/sh", "-c", "id; exec sleep 100000"],
        "UserOverride": "app",
        "ImageConfig": {"WorkingDir": "srv/app"},
    });
    let builder = Vm::builder().config(&config).disk(&root);
    let mut vm = builder.timeout(TIMEOUT).start()?;
    // The lines before it are not accounts, and do not end the search (buildah 7047).
    vm.wait_for("uid=1000(app) gid=1000(app) groups=29(audio),44(video),1000(app)")?;
    let mut api = vm.api()?;
    // The workload's working directory.
    assert_eq!(shell(&mut api, "pwd")?, "/srv/app\n");
    for (user, expected) in [
        // A number is that ID, whatever lines precede it (crun, CVE-2026-30892: 1 was 0).
        ("1", "1 1 1 /usr/sbin"),
        ("1:0", "1 0 0 /usr/sbin"),
        // Without the workload's groups (crun 394, 645). Files that images give to root's group for any user
        // (`chgrp -R 0`) are accessible, as in Docker and Kubernetes.
        ("4242", "4242 0 0 /"),
        ("daemon", "1 1 1 /usr/sbin"),
        ("app", "1000 1000 1000 29 44 /home/app"),
        ("app:video", "1000 44 44 /home/app"),
        // The first of two lines; a line with CR; a last line without LF.
        ("twice", "1004 1004 1004 /home/first"),
        ("crlf", "1003 1003 1003 /home/crlf"),
        ("last", "1005 1005 1005 44 /home/last"),
        // Without a user, or without a group.
        (":44", "0 44 44 /root"),
        ("app:", "1000 1000 1000 29 44 /home/app"),
    ] {
        let script =
            "echo $(id -u) $(id -g) $(id -G | tr ' ' '\\n' | sort -n | tr '\\n' ' ') $HOME";
        let response = exec(
            &mut api,
            &json!({"cmd": ["sh", "-c", script], "user": user}),
        )?;
        let said = response["stdout"].as_str().unwrap_or_default();
        let sorted = |text: &str| {
            let mut words: Vec<_> = text.split_whitespace().map(String::from).collect();
            if words.len() > 3 {
                let groups = words.len() - 1;
                words[2..groups].sort();
            }
            words
        };
        assert_eq!(sorted(said), sorted(expected), "{user}: {response}");
    }
    // An invalid ID is not 0 (mql 8659), nor is something that other parsers take for a number.
    for user in [
        "torn",
        "empty",
        "+",
        "-1",
        "+1",
        "0x0",
        " 0",
        "1e3",
        "app:torn",
        "4294967295",
        "1:-1",
    ] {
        let body = json!({"cmd": ["id", "-u"], "user": user});
        let response = api.post("/v1/exec", &body)?;
        ensure!(response.status != 200, "{user:?}: {response}");
    }
    Ok(())
}

/// A session whose first message was sent.
fn session(vm: &mut Vm, first: &Value) -> Result<Socket> {
    let mut socket = Socket::open(vm.connect(API_PORT)?, "/v1/ws/exec")?;
    socket.text(first)?;
    Ok(socket)
}

fn tty(script: &str) -> Value {
    json!({"command": ["/bin/sh", "-c", script], "tty": true})
}

fn exited(code: i32) -> Option<Value> {
    Some(json!({"Exit": {"code": code, "signal": null}}))
}

#[test]
fn terminals_and_sessions_that_broke_other_agents_work() -> Result<()> {
    let root = Image::ext4(&Tree::busybox()?, 32)?;
    let config = json!({"ExecOverride": ["/bin/sleep", "100000"], "UserOverride": "app"});
    let builder = Vm::builder().config(&config).disk(&root);
    let mut vm = builder.timeout(TIMEOUT).start()?;
    // Terminals are opened in the devpts mounted at boot, whatever is at the usual path.
    let mut api = vm.api()?;
    assert_eq!(
        shell(&mut api, "rm /dev/ptmx; mkfifo /dev/ptmx; echo $?")?,
        "0\n"
    );
    // The command and its orphans exit at the same time: their SIGCHLDs are merged (catatonit 4).
    let scripts = "sh -c 'sleep 0.01 & kill -9 $$'; sleep 0.009; exit 6";
    for _ in 0..20 {
        let ended =
            session(&mut vm, &json!({"command": ["/bin/sh", "-c", scripts]}))?.wait_end()?;
        assert_eq!(ended.message, exited(6));
    }
    // The last output of a short-lived command is not lost when its terminal closes (socktainer 220).
    for _ in 0..10 {
        let Ended {
            output, message, ..
        } = session(&mut vm, &tty("seq 3000; exit 4"))?.wait_end()?;
        let output = String::from_utf8_lossy(&output).into_owned();
        ensure!(output.ends_with("\r\n3000\r\n"), "{output}");
        assert_eq!((output.lines().count(), message), (3000, exited(4)));
    }
    // A background process that keeps the terminal does not keep the session open (conmon-rs 620).
    let start = Instant::now();
    let ended =
        session(&mut vm, &tty("trap '' HUP; sleep 600 & echo begun; exit 5"))?.wait_end()?;
    assert_eq!(ended.message, exited(5));
    ensure!(
        start.elapsed() < Duration::from_secs(20),
        "{:?}",
        start.elapsed()
    );
    // Ctrl-Z: a shell's job stops, but a session's leader, which nothing could continue (dumb-init 25), does
    // not, and Ctrl-C still ends it.
    let first = json!({"command": ["/bin/sh"], "tty": true, "env": ["PS1=pigeon> "]});
    let mut shell = session(&mut vm, &first)?;
    shell.output_with("pigeon> ")?;
    shell.binary(b"/bin/busybox sleep 1000\r")?;
    let start = Instant::now();
    while self::shell(&mut api, "ps -o args | grep '^/bin/busybox sleep'")?.is_empty() {
        ensure!(start.elapsed() < TIMEOUT, "it never runs");
    }
    shell.binary(b"\x1a")?;
    shell.output_with("Stopped")?;
    shell
        .binary(b"stty tostop; (sleep 0.2; echo behind) & sleep 0.6; kill -9 %1 %2; sleep 0.2; jobs; exit 7\r")?;
    assert_eq!(shell.wait_end()?.message, exited(7));
    let mut leader = session(
        &mut vm,
        &tty("trap 'exit 8' INT; echo up; while :; do sleep 0.1; done"),
    )?;
    leader.output_with("up")?;
    leader.binary(b"\x1a")?;
    leader.binary(b"\x03")?;
    assert_eq!(leader.wait_end()?.message, exited(8));
    // Sizes of 0, of a terminal that closes meanwhile, and of a closed one (kata runtime 3143).
    let mut sized = session(&mut vm, &tty("read x; stty size; exit 9"))?;
    for (cols, rows) in [(0, 0), (65_535, 65_535), (80, 24)] {
        sized.text(&json!({"cols": cols, "rows": rows}))?;
    }
    sized.binary(b"\r")?;
    let _ended = sized.text(&json!({"cols": 1, "rows": 1}));
    let ended = sized.wait_end()?;
    ensure!(
        String::from_utf8_lossy(&ended.output).contains("24 80"),
        "{ended:?}"
    );
    assert_eq!(ended.message, exited(9));
    // A command that closes all its descriptors has not exited, with or without a terminal.
    for terminal in [false, true] {
        let script = "exec <&- >&- 2>&-; sleep 0.5; exit 3";
        let first = json!({"command": ["/bin/sh", "-c", script], "tty": terminal});
        assert_eq!(session(&mut vm, &first)?.wait_end()?.message, exited(3));
    }
    Ok(())
}

#[test]
fn requests_that_starved_other_agents_work() -> Result<()> {
    let root = Image::ext4(&Tree::busybox()?, 32)?;
    let config = json!({"ExecOverride": ["/bin/sleep", "100000"]});
    let builder = Vm::builder().config(&config).disk(&root);
    let mut vm = builder.timeout(TIMEOUT).start()?;
    let mut api = vm.api()?;
    // No page of PID 1 is ever swapped out.
    let locked = shell(&mut api, "awk '/^VmLck/ {print $2}' /proc/1/status")?;
    ensure!(!["", "0\n"].contains(&locked.as_str()), "{locked}");
    // Many metrics requests at once (kata 13709): all get responses, and so do calls meanwhile.
    #[cfg(feature = "sysinfo")]
    {
        let mut asked = vec![];
        for _ in 0..60 {
            let mut one = vm.api()?;
            one.send(b"GET /v1/sysinfo HTTP/1.1\r\nHost: x\r\n\r\n")?;
            asked.push(one);
        }
        let start = Instant::now();
        assert_eq!(api.get("/v1/status")?.status, 200);
        ensure!(
            start.elapsed() < Duration::from_secs(5),
            "{:?}",
            start.elapsed()
        );
        for mut one in asked {
            assert_eq!(one.receive(false)?.status, 200);
        }
    }
    // Heads sent byte by byte by as many clients as possible (kata 13496: one stalled frame stops all).
    let mut slow = vec![];
    for _ in 0..200 {
        let mut one = vm.api()?;
        one.send(b"GET /v1/st")?;
        slow.push(one);
    }
    for round in 0..3 {
        for one in &mut slow {
            one.send(b"a")?;
        }
        let start = Instant::now();
        assert_eq!(vm.api()?.get("/v1/status")?.status, 200, "{round}");
        assert_eq!(shell(&mut api, "echo $((6 * 7))")?, "42\n");
        ensure!(
            start.elapsed() < Duration::from_secs(5),
            "{:?}",
            start.elapsed()
        );
    }
    drop(slow);
    // Commands that cannot start, one after the other: nothing is left of them (runc leaves states).
    let open =
        |api: &mut Client<UnixStream>| shell(api, "ls /proc/1/fd | wc -l; ps -o stat | grep -c Z");
    let before = open(&mut api)?;
    for number in 0..300 {
        let command = ["/none", "/etc", "/etc/passwd"][number % 3];
        let response = api.post("/v1/exec", &json!({"cmd": [command]}))?;
        assert_eq!(response.status, 500, "{response}");
    }
    assert_eq!(open(&mut api)?, before);
    // More arguments than execve accepts (E2BIG), and invalid ones.
    let long = "x".repeat(100_000);
    let many: Vec<_> = (0..200)
        .map(|n| format!("V{n}={}", "y".repeat(400)))
        .collect();
    let response = exec(&mut api, &json!({"cmd": ["sh", "-c", "echo ${#0}", long]}))?;
    assert_eq!(response["stdout"], "100000\n", "{response}");
    let response = exec(
        &mut api,
        &json!({"cmd": ["sh", "-c", "env | grep -c ^V"], "env": many}),
    )?;
    assert_eq!(response["stdout"], "200\n", "{response}");
    for (body, status) in [
        (json!({"cmd": ["echo", "a\0b"]}), 400),
        (json!({"cmd": []}), 400),
        (json!({"cmd": [""]}), 400),
        (json!({"cmd": ["true"], "env": ["=x", "x"]}), 200),
    ] {
        let response = api.post("/v1/exec", &body)?;
        assert_eq!(response.status, status, "{body}: {response}");
    }
    // Descendants that outlive a command delay neither its response nor the next command (runc 1721).
    for _ in 0..100 {
        let start = Instant::now();
        assert_eq!(shell(&mut api, "setsid sleep 300 & echo begun")?, "begun\n");
        ensure!(
            start.elapsed() < Duration::from_secs(10),
            "{:?}",
            start.elapsed()
        );
    }
    Ok(())
}

#[test]
fn disks_that_other_inits_left_dirty_are_clean_or_named() -> Result<()> {
    let root = Image::ext4(
        &Tree::busybox()?
            .dir("/a", 0o755)?
            .dir("/b", 0o755)?
            .dir("/c", 0o755)?
            .dir("/d", 0o755)?,
        32,
    )?;
    let volumes =
        [(); 4].map(|()| Image::ext4(&Tree::empty().expect("a tree"), 16).expect("an image"));
    let mounts = ["a", "b", "c", "d"]
        .iter()
        .zip(["vdb", "vdc", "vdd", "vde"])
        .map(|(name, device)| {
            json!({
                "DevicePath": format!("/dev/{device}"), "MountPath": format!("/{name}"),
                "Options": if *name == "c" { "commit=3600,data=journal" } else { "noatime" },
            })
        });
    // A frozen file system with a blocked writer (qemu-ga; kata); a full one with dirty data; one whose
    // journal is written once an hour; one that is read-only by a bind mount alone; the root, frozen last.
    let script = "
        echo kept >/a/file; echo kept >/c/file; echo kept >/d/file; echo kept >/b/file
        dd if=/dev/zero of=/b/full bs=64k 2>/dev/null
        mkdir /run/bound; mount --bind /d /run/bound; mount -o remount,ro,bind /d; echo more >/run/bound/more
        fsfreeze --freeze /a; (echo never >/a/never) & sleep 0.2
        echo frozen; exit 3";
    let config = guest::shell(script, json!({"Mounts": mounts.collect::<Vec<_>>()}));
    let mut builder = Vm::builder().config(&config).disk(&root);
    for volume in &volumes {
        builder = builder.disk(volume);
    }
    let mut vm = builder.timeout(TIMEOUT).boot()?;
    vm.wait_for("exit_code=3")?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    // The blocked writer is in an uninterruptible sleep.
    let warnings = guest::warnings(&vm.console());
    let waits = |line: &String| line.contains("\"a process cannot be killed\"");
    assert!(matches!(&warnings[..], [one] if waits(one)), "{warnings:?}");
    root.check()?;
    for (volume, name) in volumes.iter().zip(["a", "b", "c", "d"]) {
        volume.check().context(name)?;
        assert_eq!(volume.read("/file")?, "kept\n", "{name}");
    }
    assert_eq!(volumes[3].read("/more")?, "more\n");

    // The root is frozen, too, by a workload that then exits.
    let root = Image::ext4(&Tree::busybox()?, 32)?;
    let script = "echo kept >/file; fsfreeze --freeze /; exit 4";
    let builder = Vm::builder()
        .config(&guest::shell(script, json!({})))
        .disk(&root);
    let mut vm = builder.timeout(TIMEOUT).boot()?;
    vm.wait_for("exit_code=4")?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    assert_eq!(guest::warnings(&vm.console()), [""; 0], "{}", vm.console());
    root.check()?;
    assert_eq!(root.read("/file")?, "kept\n");

    // The driver of a mounted volume is unbound: the root is clean.
    let (root, volume) = (
        Image::ext4(&Tree::busybox()?.dir("/a", 0o755)?, 32)?,
        Image::ext4(&Tree::empty()?, 16)?,
    );
    let script = "echo kept >/file; echo lost >/a/file
        driver=$(readlink -f /sys/block/vdb/device); echo ${driver##*/} >/sys/bus/virtio/drivers/virtio_blk/unbind
        ls /sys/block; echo lost >/a/more; exit 5";
    let config = guest::shell(
        script,
        json!({"Mounts": [{"DevicePath": "/dev/vdb", "MountPath": "/a"}]}),
    );
    let builder = Vm::builder().config(&config).disk(&root).disk(&volume);
    let mut vm = builder.timeout(TIMEOUT).boot()?;
    vm.wait_for("exit_code=5")?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    let warnings = guest::warnings(&vm.console());
    let named = "lost the device of /a (/dev/vdb)";
    assert!(
        matches!(&warnings[..], [one] if one.contains(named)),
        "{warnings:?}"
    );
    root.check()?;
    assert_eq!(root.read("/file")?, "kept\n");
    Ok(())
}

#[test]
fn networks_and_images_that_broke_other_inits_work() -> Result<()> {
    let hosts = "127.0.0.1\tlocalhost\n";
    let tree = Tree::busybox()?.file("/etc/hosts", 0o644, hosts)?;
    let root = Image::ext4(&tree, 32)?;
    // An immutable file (chattr +i) cannot be renamed over, not even by root.
    let debugfs = assets::tool("debugfs")?;
    run(Command::new(debugfs)
        .args(["-w", "-R", "set_inode_field /etc/hosts flags 0x80010"])
        .arg(root.path()))?;
    let script = guest::report(&[
        ("where", "pwd; echo \"<$PATH> $HOME\"; cat /etc/hosts"),
        ("mtus", "cd /sys/class/net; cat eth0/mtu lo/mtu"),
        (
            "addresses",
            "ip -o address show dev eth0 | sed 's/^[0-9]*: //; s/  */ /g'",
        ),
        ("routes", "ip route show; ip -6 route show default"),
    ]) + "read -r line; exit 3";
    let config = json!({
        "ExecOverride": ["/bin/sh", "-c", script],
        "ImageConfig": {"WorkingDir": "srv/app", "Env": ["PATH=", "HOME="]},
        "Hostname": "h".repeat(64),
        "EtcHosts": [{"Host": "db", "IP": "10.1.0.9"}],
        "IPConfigs": [
            // A network of two hosts (RFC 3021), and an address without a network.
            {"IP": "10.0.0.1", "Mask": 31, "Gateway": "10.0.0.0"},
            {"IP": "10.1.0.5", "Mask": 32},
            {"IP": "10.1.0.5", "Mask": 32},
            // A link-local gateway.
            {"IP": "fd00::5", "Mask": 128, "Gateway": "fe80::1"},
            {"IP": "192.0.2.7", "Mask": 32, "Device": "lo"},
        ],
    });
    // As on hosts with tunnels, the network card has an MTU below the default.
    let builder = Vm::builder()
        .config(&config)
        .nic()
        .qemu(&["-global", "virtio-net-device.host_mtu=1400"])
        .disk(&root);
    let mut vm = builder.timeout(TIMEOUT).boot()?;
    assert_eq!(vm.section("mtus")?, ["1400", "65536"]);
    assert!(!vm.console().contains("lo's checksum offload"));
    // The directory is created; an empty PATH is kept, an empty HOME is not (runc).
    let place = [
        "/srv/app",
        "<> /root",
        "127.0.0.1\tlocalhost",
        "10.1.0.9\tdb\t# pigeon-init",
    ];
    assert_eq!(vm.section("where")?, place);
    let home = json!({"cmd": ["/bin/sh", "-c", "echo $HOME"], "env": ["HOME="]});
    assert_eq!(exec(&mut vm.api()?, &home)?["stdout"], "/root\n");
    let addresses = vm.section("addresses")?.join("\n");
    for address in [
        "inet 10.0.0.1/31 ",
        "inet 10.1.0.5/32 ",
        "inet6 fd00::5/128 ",
    ] {
        assert_eq!(addresses.matches(address).count(), 1, "{addresses}");
    }
    let routes: Vec<_> = vm.section("routes")?;
    let routes: Vec<_> = routes.iter().map(|line| line.trim_end()).collect();
    let expected = [
        "default via 10.0.0.0 dev eth0",
        "10.0.0.0/31 dev eth0 scope link  src 10.0.0.1",
        "default via fe80::1 dev eth0  metric 1024 onlink",
    ];
    assert_eq!(routes, expected);
    vm.type_text("\n")?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check()?;
    assert_eq!(root.read("/etc/hosts")?, hosts);

    // Too small for IPv6 (RFC 8200, 5): the error names the address.
    let root = Image::ext4(&Tree::busybox()?, 32)?;
    let config = json!({
        "ExecOverride": ["/bin/sh", "-c", "echo the workload runs"],
        "MTU": 1200,
        "IPConfigs": [{"IP": "fd00::5", "Mask": 64}],
    });
    let builder = Vm::builder().config(&config).nic().disk(&root);
    let mut vm = builder.timeout(TIMEOUT).boot()?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    let console = vm.console();
    let said = "level=error msg=\"add fd00:0:0:0:0:0:0:5/64 to eth0: EINVAL\"";
    ensure!(console.contains(said), "{console}");
    ensure!(!console.contains("the workload runs"), "{console}");
    root.check()
}
