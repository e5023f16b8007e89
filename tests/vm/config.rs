//! The sources of the configuration, and how they may fail.

use std::time::Duration;

use anyhow::Result;
use pigeon_lab::{
    End, Vm,
    disk::{Image, Tree},
    guest,
    mmds::{Before, Fault, Mmds, Push, Version},
};
use serde_json::{Value, json};

/// Leftovers of the MMDS session in the workload.
const LEFTOVERS: (&str, &str) = (
    "leftovers",
    "ip -o -4 address show dev eth0; ip -4 route show; grep -i :50 /proc/net/tcp",
);

fn root() -> Result<Image> {
    Image::ext4(&Tree::busybox()?, 32)
}

/// A document whose workload prints its origin, and the leftovers of the MMDS session.
fn document(origin: &str) -> Value {
    let script = guest::report(&[("origin", &format!("echo {origin}")), LEFTOVERS]);
    guest::shell(&script, json!({}))
}

/// The workload of `document(origin)` has run without MMDS leftovers, and the shutdown was clean.
fn assert_ran(mut vm: Vm, origin: &str, source: &str, root: &Image) -> Result<()> {
    assert_eq!(vm.section("origin")?, [origin]);
    assert_eq!(vm.section("leftovers")?, [""; 0]);
    vm.wait_for(&format!("msg=\"configuration loaded\" source={source}"))?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check()
}

#[test]
fn mmds_v2_is_polled_on_one_connection_until_the_host_has_pushed() -> Result<()> {
    let root = root()?;
    let mmds = Mmds::serving(document("mmds")).push(Push::AfterRequests(4));
    let builder = Vm::builder().config(&document("file")).disk(&root);
    let vm = builder.mmds(mmds).on_qemu().boot()?;
    vm.wait_for("configuration loaded")?;
    let requests = vm.mmds_requests();
    assert_ran(vm, "mmds", "mmds", &root)?;

    let (token, documents) = requests.split_first().expect("MMDS was asked");
    assert_eq!((&*token.method, &*token.path), ("PUT", "/latest/api/token"));
    assert_eq!(token.header("X-metadata-token-ttl-seconds"), Some("60"));
    assert_eq!(documents.len(), 5);
    for request in documents {
        assert_eq!((&*request.method, &*request.path), ("GET", "/"));
        assert_eq!(request.header("Accept"), Some("application/json"));
        assert_eq!(request.header("X-metadata-token").map(str::len), Some(48));
    }
    assert!(requests.iter().all(|request| request.connection == 0));
    Ok(())
}

#[test]
fn mmds_v1_is_used_when_v2_is_refused() -> Result<()> {
    let root = root()?;
    let mmds = Mmds::serving(document("mmds"))
        .version(Version::V1Only)
        .before(Before::NotFound)
        .push(Push::AfterRequests(2));
    let builder = Vm::builder().disk(&root).mmds(mmds).on_qemu();
    let vm = builder.arg("PIGEON_CONFIG=auto").boot()?;
    vm.wait_for("configuration loaded")?;
    let requests = vm.mmds_requests();
    assert_ran(vm, "mmds", "mmds", &root)?;

    let gets: Vec<_> = requests.iter().filter(|r| r.method == "GET").collect();
    assert_eq!(gets.len(), 3);
    assert!(gets.iter().all(|r| r.header("X-metadata-token").is_none()));
    assert!(
        gets.iter()
            .all(|r| r.header("Accept") == Some("application/json"))
    );
    Ok(())
}

#[test]
fn a_document_pushed_after_the_start_is_waited_for() -> Result<()> {
    let root = root()?;
    // Other metadata of the host is there before the command.
    let before =
        json!({"latest": {"meta-data": {"ImageConfig": {}}}, "ImageConfig": {"User": "app"}});
    let mmds = Mmds::serving(document("mmds"))
        .before(Before::Document(before))
        .push(Push::After(Duration::from_millis(700)));
    let builder = Vm::builder()
        .config(&document("file"))
        .disk(&root)
        .mmds(mmds);
    assert_ran(builder.boot()?, "mmds", "mmds", &root)
}

#[test]
fn lost_truncated_slow_and_invalid_responses_are_retried() -> Result<()> {
    let root = root()?;
    let mmds = Mmds::serving(document("mmds"))
        .faults([
            Fault::Refuse,
            Fault::Silent,
            Fault::Stall(0),
            Fault::Stall(8),
            Fault::Stall(200),
            Fault::Reset(0),
            Fault::Reset(200),
            Fault::Close(0),
            Fault::Close(40),
            Fault::Close(330),
            Fault::Instead(b"SSH-2.0-OpenSSH_9.2\r\n".to_vec()),
            Fault::Instead(b"HTTP/1.1 200 \r\n\r\n".to_vec()),
            Fault::Instead(b"HTTP/1.1 200 \r\nContent-Length: 99999999\r\n\r\n".to_vec()),
            Fault::Instead(b"HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n".to_vec()),
        ])
        .always(Fault::Drip(Duration::from_millis(1)));
    let builder = Vm::builder().disk(&root).mmds(mmds);
    let vm = builder.arg("PIGEON_MMDS_TIMEOUT_MS=30000").boot()?;
    assert_ran(vm, "mmds", "mmds", &root)
}

#[test]
fn the_file_is_used_when_mmds_has_no_command_in_time() -> Result<()> {
    let root = root()?;
    let mmds = Mmds::serving(document("mmds"))
        .before(Before::Document(
            json!({"Hostname": "x", "ImageConfig": {"Env": ["A=1"]}}),
        ))
        .push(Push::Never);
    let builder = Vm::builder()
        .config(&document("file"))
        .disk(&root)
        .mmds(mmds);
    let vm = builder.arg("PIGEON_MMDS_TIMEOUT_MS=300").boot()?;
    assert_ran(vm, "file", "file", &root)
}

#[test]
fn the_file_is_used_when_mmds_does_not_respond() -> Result<()> {
    let root = root()?;
    let builder = Vm::builder().config(&document("file")).disk(&root).nic();
    assert_ran(builder.boot()?, "file", "file", &root)
}

#[test]
fn with_config_file_mmds_is_not_used_and_warn_level_is_silent() -> Result<()> {
    let root = root()?;
    let mut vm = Vm::builder()
        .config(&document("file"))
        .disk(&root)
        .mmds(Mmds::serving(document("mmds")))
        .arg("PIGEON_CONFIG=file")
        .arg("INIT_LOG_LEVEL=warn")
        .on_qemu()
        .boot()?;
    assert_eq!(vm.section("origin")?, ["file"]);
    assert_eq!(vm.wait_end()?, End::Reboot);
    assert_eq!(vm.mmds_requests(), []);
    let frames = vm.traffic().frames();
    let ipv4 = frames.iter().filter(|frame| frame[12..14] == [8, 0]);
    assert_eq!(ipv4.count(), 0, "the link stays down for IPv4");
    let console = vm.console();
    assert!(!console.contains("pigeon-init: level=info"), "{console}");
    assert_eq!(guest::warnings(&console), [""; 0]);
    root.check()
}

#[test]
fn a_document_at_all_limits_is_accepted() -> Result<()> {
    let root = root()?;
    let script = guest::report(&[
        ("argv", r#"echo $# "$1" "${1020}" "${2044}""#),
        (
            "environment",
            r"tr '\0' '\n' </proc/$$/environ | grep -c ^ENTRY_; echo $ENTRY_0 $ENTRY_4095",
        ),
        (
            "addresses",
            "ip -o address show dev eth0 | grep -c 'scope global'",
        ),
        ("hosts", r"grep -c '\.internal' /etc/hosts"),
    ]);
    let arguments = (0..2045).map(|n| format!("argument {n}"));
    let argv: Vec<_> = ["/bin/sh", "-c", &script]
        .map(String::from)
        .into_iter()
        .chain(arguments)
        .collect();
    let (entrypoint, cmd) = argv.split_at(1024);
    let environment: Vec<_> = (0..4096).map(|n| format!("ENTRY_{n}={n}")).collect();
    let addresses: Vec<_> = (0..64)
        .map(|n| json!({"IP": format!("10.{n}.0.2"), "Mask": 24}))
        .collect();
    let hosts: Vec<_> = (0..256)
        .map(|n| json!({"IP": format!("10.1.2.{n}"), "Host": format!("host{n}.internal"), "Desc": null}))
        .collect();
    let mut document = json!({
        "ImageConfig": {"Entrypoint": entrypoint, "Cmd": cmd, "Env": environment,
            "Unknown": [{"deep": [1, -2.5e3, true, null]}]},
        "IPConfigs": addresses,
        "EtcHosts": hosts,
        "MTU": 0,
        "Padding": ""
    });
    // Escapes in the padding show that it is parsed as a string.
    let room = (1 << 20) - document.to_string().len();
    document["Padding"] = "\"}]\u{1f426}".repeat(room / 8).into();
    let size = document.to_string().len();
    assert!(size <= 1 << 20 && size > 1_000_000, "{size}");

    let mmds = Mmds::serving(document);
    let builder = Vm::builder().disk(&root).mmds(mmds);
    let mut vm = builder.arg("PIGEON_MMDS_TIMEOUT_MS=30000").boot()?;
    // The shell's $0 is the first one.
    assert_eq!(
        vm.section("argv")?,
        ["2044 argument 1 argument 1020 argument 2044"]
    );
    assert_eq!(vm.section("environment")?, ["4096", "0 4095"]);
    assert_eq!(vm.section("addresses")?, ["64"]);
    assert_eq!(vm.section("hosts")?, ["256"]);
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check()
}

#[test]
fn escapes_nulls_and_unknown_fields_follow_json() -> Result<()> {
    let root = root()?;
    let file = r#" {
        "Zone": {"ExecOverride": ["/bin/false"], "x": [[], {}, "\ud83d\udc26", 1e9]},
        "ImageConfig": {"Entrypoint": ["/bin/false"], "Cmd": null, "Env": null, "WorkingDir": null, "User": null},
        "ExecOverride": ["\/bin\/sh", "-c", "echo \"<$\u0041,$B>\" \ud83d\udc26; cat /sys/class/net/eth0/mtu; grep nameserver /etc/resolv.conf"],
        "CmdOverride": null, "UserOverride": null,
        "ExtraEnv": {"A": "tab\there", "B": null},
        "MTU": null, "IPConfigs": null, "Hostname": null, "Mounts": null, "RootDevice": null,
        "EtcResolv": {"Nameservers": null}, "EtcHosts": null
    } "#;
    let mut vm = Vm::builder()
        .file("/pigeon/run.json", 0o600, file)
        .disk(&root)
        .boot()?;
    vm.wait_for("<tab\there,> \u{1f426}")?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check()
}

#[test]
fn modules_load_in_order_and_a_failure_is_a_warning() -> Result<()> {
    let root = root()?;
    let mut builder = Vm::builder().without_modules().disk(&root);
    let mut list = String::from("/pigeon/lib/missing.ko\n\n");
    for (name, contents) in pigeon_lab::assets::kernel()?.modules()? {
        builder = builder.file(&format!("/pigeon/lib/{name}"), 0o644, contents);
        list += &format!("/pigeon/lib/{name}\n");
    }
    let script = guest::report(&[("modules", "cut -d ' ' -f 1 /proc/modules")]);
    let mut vm = builder
        .file("/pigeon/modules", 0o644, list.trim_end())
        .config(&guest::shell(&script, json!({})))
        .boot()?;
    let warning = vm.wait_for("level=warn")?;
    assert!(
        warning.contains("/pigeon/lib/missing.ko") && warning.contains("ENOENT"),
        "{warning}"
    );
    let modules = vm.section("modules")?;
    for module in [
        "virtio_mmio",
        "virtio_blk",
        "vmw_vsock_virtio_transport",
        "binfmt_misc",
    ] {
        assert!(modules.iter().any(|loaded| loaded == module), "{modules:?}");
    }
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check()
}
