//! Complete runs: the README's own example, and one root that is booted twice.

use anyhow::Result;
use pigeon_lab::{
    End, Vm,
    disk::{Image, Tree},
    guest,
    mmds::{Mmds, Push},
    vm::Builder,
};
use serde_json::{Value, json};

/// The example of the README, with every field.
const EXAMPLE: &str = include_str!("../example/run.json");

/// Boots the example with its application as the workload, and stops it with SIGTERM.
fn boot_example(builder: Builder) -> Result<()> {
    let application = guest::report(&[
        ("argv", r#"echo "$0"; printf '[%s]' "$@"; echo"#),
        ("id", "id; pwd"),
        ("environment", r"tr '\0' '\n' </proc/$$/environ | sort"),
        ("hostname", "hostname"),
        ("hosts", "cat /etc/hosts"),
        ("resolv.conf", "cat /etc/resolv.conf"),
        (
            "network",
            "ip -o -4 address show dev eth0 | sed 's/^[0-9]*: //; s/  */ /g'; ip route; cat /sys/class/net/eth0/mtu",
        ),
        (
            "gateway",
            "/bin/ping -c 1 -W 10 169.254.0.1; /bin/ping -c 1 -W 10 203.0.113.9",
        ),
        (
            "data",
            "stat -c %u:%g /data; grep ' /data ' /proc/mounts; echo mine >/data/file",
        ),
    ]);
    let script = format!(
        "#!/bin/sh\ntrap 'echo stopped >>/data/file; exit 0' TERM\n{application}echo ready\nwhile :; do sleep 0.05; done\n"
    );
    // Ping is allowed for all groups, as in stock distributions.
    let tree = Tree::busybox()?
        .file("/bin/myapp", 0o755, script)?
        .without("/bin/ping")?
        .file(
            "/bin/ping",
            0o4755,
            std::fs::read(pigeon_lab::assets::busybox()?)?,
        )?
        .file("/etc/hosts", 0o644, "127.0.0.1 localhost\n")?;
    let root = Image::ext4(&tree, 32)?;
    let volume = Image::ext4(&Tree::empty()?, 16)?;
    let mut vm = builder.disk(&root).disk(&volume).boot()?;
    vm.wait_for("ready")?;
    assert_eq!(vm.section("argv")?, ["/bin/myapp", "[--port][8080]"]);
    assert_eq!(
        vm.section("id")?,
        [
            "uid=65534(nobody) gid=65534(nogroup) groups=65534(nogroup)",
            "/app"
        ]
    );
    assert_eq!(
        vm.section("environment")?,
        [
            "DATABASE_URL=postgres://...",
            "HOME=/nonexistent",
            "LOG_LEVEL=info",
            "PATH=/usr/local/bin:/usr/bin:/bin",
        ]
    );
    assert_eq!(vm.section("hostname")?, ["my-app-abcdef"]);
    let hosts = vm.section("hosts")?;
    assert_eq!(hosts[0], "127.0.0.1 localhost");
    let alias: Vec<_> = hosts[1].split_whitespace().take(2).collect();
    assert_eq!(
        (alias, hosts.len()),
        (vec!["10.0.0.2", "my-app.internal"], 2)
    );
    assert_eq!(vm.section("resolv.conf")?, ["nameserver 8.8.8.8"]);
    let network = vm.section("network")?;
    assert!(
        network[0].starts_with("eth0 inet 10.0.0.2/24 "),
        "{network:?}"
    );
    assert_eq!(
        network[1..]
            .iter()
            .map(|line| line.trim_end())
            .collect::<Vec<_>>(),
        [
            "default via 169.254.0.1 dev eth0 onlink",
            "10.0.0.0/24 dev eth0 scope link  src 10.0.0.2",
            "1500",
        ]
    );
    let pings = vm.section("gateway")?;
    assert_eq!(
        pings
            .iter()
            .filter(|line| line.contains("1 packets received"))
            .count(),
        2,
        "{pings:?}"
    );
    let data = vm.section("data")?;
    assert_eq!(data, ["65534:65534", "/dev/vdb /data ext4 rw,relatime 0 0"]);

    let mut api = vm.api()?;
    assert_eq!(api.get("/v1/status")?.json()?, json!({"ok": true}));
    assert_eq!(
        api.post("/v1/signals", &json!({"signal": 15}))?.json()?,
        json!({"ok": true})
    );
    assert_eq!(
        api.get("/v1/exit_code")?.json()?,
        json!({"code": 0, "oom_killed": false})
    );
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check()?;
    volume.check()?;
    assert_eq!(volume.read("/file")?, "mine\nstopped\n");
    assert!(volume.stat("/file")?.contains("User: 65534   Group: 65534"));
    Ok(())
}

#[test]
fn the_example_boots_from_mmds() -> Result<()> {
    let mmds = Mmds::serving(serde_json::from_str(EXAMPLE)?).push(Push::AfterRequests(3));
    boot_example(Vm::builder().mmds(mmds).on_qemu())
}

#[test]
fn the_example_boots_from_the_file() -> Result<()> {
    let builder = Vm::builder().file("/pigeon/run.json", 0o600, EXAMPLE);
    boot_example(builder.nic().arg("PIGEON_CONFIG=file"))
}

#[test]
fn a_root_that_boots_twice_has_everything_once() -> Result<()> {
    let own = "127.0.0.1 localhost\n192.0.2.9 mine\n";
    let tree = Tree::busybox()?.file("/etc/hosts", 0o644, own)?.file(
        "/etc/resolv.conf",
        0o644,
        "nameserver 192.0.2.53\nsearch example.org\n",
    )?;
    let root = Image::ext4(&tree, 32)?;
    let volume = Image::ext4(&Tree::empty()?, 8)?;
    let script = guest::report(&[
        (
            "addresses",
            "ip -o address show dev eth0 | grep -c 'scope global'",
        ),
        (
            "routes",
            "ip route show | grep -c ^default; ip -6 route show | grep -c ^default",
        ),
        ("boots", "echo boot >>/data/boots; cat /data/boots"),
    ]);
    let config = |address: &str, desc: Value| {
        guest::shell(
            &script,
            json!({
                "IPConfigs": [
                    {"Gateway": "10.0.0.1/24", "IP": "10.0.0.2", "Mask": 24},
                    {"Gateway": "10.0.0.1", "IP": "10.0.0.3", "Mask": 24},
                    {"Gateway": "10.0.0.1", "IP": "10.0.0.3", "Mask": 24},
                    {"Gateway": "fe80::1", "IP": "fd00::2", "Mask": 64},
                    {"Gateway": "fe80::1", "IP": "fd00::3", "Mask": 64}
                ],
                "EtcHosts": [
                    {"Host": "app.internal", "IP": address, "Desc": desc},
                    {"Host": "mine", "IP": "192.0.2.9"}
                ],
                "EtcResolv": {"Nameservers": ["8.8.8.8"]},
                "Mounts": [{"DevicePath": "/dev/vdb", "MountPath": "/data/"}],
                "Hostname": "again"
            }),
        )
    };
    let boot = |config: &Value, boots: usize| -> Result<String> {
        let builder = Vm::builder().nic().arg("PIGEON_CONFIG=file").config(config);
        let mut vm = builder.disk(&root).disk(&volume).boot()?;
        assert_eq!(vm.section("addresses")?, ["4"]);
        assert_eq!(vm.section("routes")?, ["1", "1"]);
        assert_eq!(vm.section("boots")?, vec!["boot"; boots]);
        vm.wait_for("exit_code=0")?;
        assert_eq!(vm.wait_end()?, End::Reboot);
        root.check()?;
        volume.check()?;
        root.read("/etc/hosts")
    };
    let app = config("10.0.0.2", "app alias".into());
    let first = boot(&app, 1)?;
    assert!(first.starts_with(own), "{first}");
    assert_eq!(
        (
            first.matches("app.internal").count(),
            first.matches("mine").count()
        ),
        (1, 1),
        "{first}"
    );
    assert_eq!(root.read("/etc/resolv.conf")?, "nameserver 8.8.8.8\n");
    assert_eq!(boot(&app, 2)?, first);
    // An entry whose position has changed is not duplicated either.
    let moved = boot(&config("10.0.0.3", Value::Null), 3)?;
    assert!(
        moved.starts_with(own) && moved.contains("10.0.0.3"),
        "{moved}"
    );
    assert_eq!(moved.matches("app.internal").count(), 1, "{moved}");
    Ok(())
}
