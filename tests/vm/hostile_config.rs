//! Bad configurations and bad roots: each causes one clear line and an orderly shutdown.
//!
//! Starting a VM takes much longer than a boot. So one VM runs all boots: each has pigeon-init as PID 1 of a
//! PID namespace, with its own initramfs and root, and its reboot ends the namespace (pid_namespaces(7)). The
//! VM's own PID 1 leaves the vsock port to them.

use std::{collections::HashSet, fs};

use anyhow::{Context, Result, ensure};
use pigeon_lab::{
    End, Vm, assets,
    disk::{Image, Tree},
    guest,
};
use serde_json::{Value, json};

/// A document that is invalid on any root, and its error from `--check` and at boot.
struct Refused {
    name: String,
    document: Vec<u8>,
    says: String,
}

/// A valid document, with the fields of `rest`.
fn with(rest: Value) -> Vec<u8> {
    let mut document = rest;
    if document["ExecOverride"].is_null() {
        document["ExecOverride"] = json!(["/bin/true"]);
    }
    document.to_string().into_bytes()
}

/// Every kind of error in a document alone.
fn refused() -> Vec<Refused> {
    let mut all = vec![];
    let mut add = |name: &str, document: Vec<u8>, says: &str| {
        all.push(Refused {
            name: name.into(),
            document,
            says: says.into(),
        });
    };

    // A wrong type for each field.
    for (field, wrong, wants) in [
        ("ImageConfig", json!([]), "an object"),
        ("ExecOverride", json!("/bin/sh -c id"), "a list of strings"),
        ("CmdOverride", json!(["x"]), "a string"),
        ("UserOverride", json!(1000), "a string"),
        ("ExtraEnv", json!(["A=1"]), "an object of strings"),
        ("MTU", json!("1500"), "a whole number"),
        ("IPConfigs", json!({"IP": "10.0.0.2"}), "a list"),
        ("Hostname", json!(true), "a string"),
        ("Mounts", json!("/dev/vdc:/data"), "a list"),
        ("RootDevice", json!(["/dev/vda"]), "a string"),
        ("EtcResolv", json!(["8.8.8.8"]), "an object"),
        ("EtcHosts", json!("10.0.0.2 x"), "a list"),
    ] {
        let document = with(json!({ field: wrong }));
        add(
            &format!("type-{field}"),
            document,
            &format!("{field}: must be {wants}"),
        );
    }
    for (field, wrong, says) in [
        (
            "Entrypoint",
            json!("/bin/sh"),
            "ImageConfig.Entrypoint: must be a list of strings",
        ),
        (
            "Cmd",
            json!([["x"]]),
            "ImageConfig.Cmd[0]: must be a string",
        ),
        (
            "Env",
            json!(["A=1", 2]),
            "ImageConfig.Env[1]: must be a string",
        ),
        (
            "WorkingDir",
            json!({}),
            "ImageConfig.WorkingDir: must be a string",
        ),
        ("User", json!(0), "ImageConfig.User: must be a string"),
    ] {
        let document = with(json!({"ImageConfig": { field: wrong }}));
        add(&format!("type-{field}"), document, says);
    }
    for (name, rest, says) in [
        (
            "env-value",
            json!({"ExtraEnv": {"A": "1", "B": 2}}),
            "ExtraEnv.B: must be a string",
        ),
        (
            "env-equals",
            json!({"ExtraEnv": {"A=B": "1"}}),
            "a name is empty or has '=' in it",
        ),
        (
            "env-empty",
            json!({"ExtraEnv": {"": "1"}}),
            "a name is empty or has '=' in it",
        ),
        (
            "env-nul",
            json!({"ExtraEnv": {"A": "x\u{0}y"}}),
            "has a NUL character",
        ),
        (
            "argument-nul",
            json!({"ExecOverride": ["/bin/true", "a\u{0}"]}),
            "ExecOverride[1]: has a NUL",
        ),
        (
            "path-nul",
            json!({"RootDevice": "/dev/vda\u{0}"}),
            "RootDevice: has a NUL character",
        ),
        (
            "argument-null",
            json!({"ExecOverride": ["/bin/true", null]}),
            "ExecOverride[1]: must be a string",
        ),
        (
            "command-empty",
            json!({"ExecOverride": [""]}),
            "the command's name is empty",
        ),
        (
            "mtu-negative",
            json!({"MTU": -1}),
            "MTU: must be from 0 to 65535",
        ),
        (
            "mtu-70000",
            json!({"MTU": 70000}),
            "MTU: must be from 0 to 65535",
        ),
        (
            "mtu-2^64",
            json!({"MTU": 18446744073709551615u64}),
            "MTU: must be from 0 to 65535",
        ),
        (
            "mtu-fraction",
            json!({"MTU": 1500.5}),
            "MTU: must be a whole number",
        ),
        (
            "mask-33",
            json!({"IPConfigs": [{"IP": "10.0.0.2", "Mask": 33}]}),
            "IPConfigs[0].Mask: must be from 0 to 32",
        ),
        (
            "mask-129",
            json!({"IPConfigs": [{"IP": "fd00::2", "Mask": 129}]}),
            "IPConfigs[0].Mask: must be from 0 to 128",
        ),
        (
            "mask-negative",
            json!({"IPConfigs": [{"IP": "10.0.0.2", "Mask": -8}]}),
            "IPConfigs[0].Mask: must be from 0 to 128",
        ),
        (
            "mask-text",
            json!({"IPConfigs": [{"IP": "10.0.0.2", "Mask": "24"}]}),
            "IPConfigs[0].Mask: must be a whole number",
        ),
        (
            "ip-256",
            json!({"IPConfigs": [{"IP": "10.0.0.256", "Mask": 24}]}),
            "IPConfigs[0].IP: not an address: 10.0.0.256",
        ),
        (
            "ip-octal",
            json!({"IPConfigs": [{"IP": "10.0.0.010", "Mask": 24}]}),
            "IPConfigs[0].IP: not an address: 10.0.0.010",
        ),
        (
            "ip-three",
            json!({"IPConfigs": [{"IP": "10.0.2", "Mask": 24}]}),
            "IPConfigs[0].IP: not an address: 10.0.2",
        ),
        (
            "ip-prefix",
            json!({"IPConfigs": [{"IP": "10.0.0.2/24", "Mask": 24}]}),
            "IPConfigs[0].IP: not an address: 10.0.0.2/24",
        ),
        (
            "ip-name",
            json!({"IPConfigs": [{"IP": "localhost", "Mask": 24}]}),
            "IPConfigs[0].IP: not an address: localhost",
        ),
        (
            "ip-absent",
            json!({"IPConfigs": [{"IP": "10.0.0.2", "Mask": 24}, {"Mask": 24}]}),
            "IPConfigs[1].IP: missing",
        ),
        (
            "ip6-colons",
            json!({"IPConfigs": [{"IP": "fd00::1::2", "Mask": 64}]}),
            "IPConfigs[0].IP: not an address: fd00::1::2",
        ),
        (
            "gateway-family",
            json!({"IPConfigs": [{"IP": "10.0.0.2", "Mask": 24, "Gateway": "fd00::1"}]}),
            "IPConfigs[0].Gateway: not of the IP's family",
        ),
        (
            "gateway-prefix",
            json!({"IPConfigs": [{"IP": "10.0.0.2", "Mask": 24, "Gateway": "10.0.0.1/x"}]}),
            "IPConfigs[0].Gateway: not an address: 10.0.0.1/x",
        ),
        (
            "gateway-list",
            json!({"IPConfigs": [{"IP": "10.0.0.2", "Mask": 24, "Gateway": []}]}),
            "IPConfigs[0].Gateway: must be a string",
        ),
        (
            "hostname-65",
            json!({"Hostname": "h".repeat(65)}),
            "Hostname: longer than 64 bytes",
        ),
        (
            "root-relative",
            json!({"RootDevice": "vda"}),
            "RootDevice: not an absolute path: vda",
        ),
        (
            "root-long",
            json!({"RootDevice": format!("/{}", "d".repeat(4096))}),
            "RootDevice: longer than 4095 bytes",
        ),
        (
            "directory-long",
            json!({"ImageConfig": {"WorkingDir": format!("/{}", "d".repeat(4096))}}),
            "ImageConfig.WorkingDir: longer than 4095 bytes",
        ),
        (
            "mount-root",
            json!({"Mounts": [{"DevicePath": "/dev/vdc", "MountPath": "/"}]}),
            "Mounts[0].MountPath: would hide the root",
        ),
        (
            "mount-root-too",
            json!({"Mounts": [{"DevicePath": "/dev/vdc", "MountPath": "//.//"}]}),
            "Mounts[0].MountPath: would hide the root",
        ),
        (
            "mount-proc",
            json!({"Mounts": [{"DevicePath": "/dev/vdc", "MountPath": "/proc/"}]}),
            "Mounts[0].MountPath: would hide /proc",
        ),
        (
            "mount-dev",
            json!({"Mounts": [{"DevicePath": "/dev/vdc", "MountPath": "/./dev"}]}),
            "Mounts[0].MountPath: would hide /./dev",
        ),
        (
            "mount-parent",
            json!({"Mounts": [{"DevicePath": "/dev/vdc", "MountPath": "/data/../proc"}]}),
            "Mounts[0].MountPath: has '..'",
        ),
        (
            "mount-relative",
            json!({"Mounts": [{"DevicePath": "/dev/vdc", "MountPath": "data"}]}),
            "Mounts[0].MountPath: not an absolute path: data",
        ),
        (
            "mount-absent",
            json!({"Mounts": [{"DevicePath": "/dev/vdc"}]}),
            "Mounts[0].MountPath: not an absolute path: ",
        ),
        (
            "mount-no-device",
            json!({"Mounts": [{"MountPath": "/data"}]}),
            "Mounts[0].DevicePath: not an absolute path: ",
        ),
        (
            "mount-twice",
            json!({"Mounts": [{"DevicePath": "/dev/vdc", "MountPath": "/data"}, {"DevicePath": "/dev/vdd", "MountPath": "//data/."}]}),
            "Mounts[1].MountPath: used twice: //data/.",
        ),
        (
            "mount-text",
            json!({"Mounts": ["/dev/vdc"]}),
            "Mounts[0]: must be an object",
        ),
        (
            "nameserver-name",
            json!({"EtcResolv": {"Nameservers": ["8.8.8.8", "dns.example"]}}),
            "EtcResolv.Nameservers[1]: not an address: dns.example",
        ),
        (
            "nameserver-lines",
            json!({"EtcResolv": {"Nameservers": ["8.8.8.8\nsearch evil"]}}),
            "EtcResolv.Nameservers[0]: not an address: 8.8.8.8",
        ),
        (
            "nameserver-text",
            json!({"EtcResolv": {"Nameservers": "8.8.8.8"}}),
            "EtcResolv.Nameservers: must be a list of strings",
        ),
        (
            "host-empty",
            json!({"EtcHosts": [{"Host": "", "IP": "10.0.0.2"}]}),
            "EtcHosts[0].Host: not a host name: ",
        ),
        (
            "host-lines",
            json!({"EtcHosts": [{"Host": "a\n6.6.6.6 bank", "IP": "10.0.0.2"}]}),
            "EtcHosts[0].Host: not a host name: a",
        ),
        (
            "host-ip",
            json!({"EtcHosts": [{"Host": "a", "IP": "10.0.0"}]}),
            "EtcHosts[0].IP: not an address: 10.0.0",
        ),
    ] {
        add(name, with(rest), says);
    }

    // Limits.
    let many = |count: usize, item: Value| vec![item; count];
    for (name, rest, says) in [
        (
            "many-arguments",
            json!({"ExecOverride": many(1025, json!("a"))}),
            "ExecOverride: more than 1024 entries",
        ),
        (
            "many-env",
            json!({"ImageConfig": {"Env": many(4097, json!("A=1"))}}),
            "ImageConfig.Env: more than 4096 entries",
        ),
        (
            "many-addresses",
            json!({"IPConfigs": many(65, json!({"IP": "10.0.0.2"}))}),
            "IPConfigs: more than 64 entries",
        ),
        (
            "many-mounts",
            json!({"Mounts": many(65, json!({}))}),
            "Mounts: more than 64 entries",
        ),
        (
            "many-servers",
            json!({"EtcResolv": {"Nameservers": many(17, json!("8.8.8.8"))}}),
            "EtcResolv.Nameservers: more than 16 entries",
        ),
        (
            "many-hosts",
            json!({"EtcHosts": many(257, json!({}))}),
            "EtcHosts: more than 256 entries",
        ),
    ] {
        add(name, with(rest), says);
    }

    // Invalid documents.
    let fine = with(json!({}));
    for (name, document, says) in [
        ("empty", b"".to_vec(), "not JSON at byte 0"),
        ("blank", b" \n".to_vec(), "not JSON at byte 2"),
        ("list", b"[]".to_vec(), "must be an object"),
        ("nothing-to-run", b"{}".to_vec(), "nothing to run"),
        ("null", b"null".to_vec(), "must be an object"),
        (
            "truncated",
            fine[..fine.len() - 1].to_vec(),
            "not JSON at byte",
        ),
        (
            "truncated-string",
            b"{\"ExecOverride\":[\"/bin/tr".to_vec(),
            "not JSON at byte",
        ),
        (
            "truncated-escape",
            b"{\"ExecOverride\":[\"\\u00".to_vec(),
            "not JSON at byte",
        ),
        (
            "garbage-after",
            [&fine, &b"{}"[..]].concat(),
            "not JSON at byte",
        ),
        (
            "comment",
            [b"// mine\n", &fine[..]].concat(),
            "not JSON at byte 0",
        ),
        (
            "comma",
            b"{\"ExecOverride\":[\"a\",]}".to_vec(),
            "not JSON at byte",
        ),
        (
            "quotes",
            b"{'ExecOverride':['a']}".to_vec(),
            "not JSON at byte 1",
        ),
        (
            "not-utf8",
            b"{\"ExecOverride\":[\"\xff\xfe\"]}".to_vec(),
            "not UTF-8",
        ),
        (
            "overlong-utf8",
            b"{\"ExecOverride\":[\"\xc0\x80\"]}".to_vec(),
            "not UTF-8",
        ),
        ("binary", (0..=255).collect(), "not UTF-8"),
        (
            "deep",
            format!("{{\"X\":{}", "[".repeat(1_000_000)).into_bytes(),
            "nested deeper than 64 levels",
        ),
        (
            "deep-objects",
            "{\"X\":".repeat(65).into_bytes(),
            "nested deeper than 64 levels",
        ),
        (
            "long",
            [&vec![b' '; 1 << 20][..], &fine].concat(),
            "over 1048576 bytes",
        ),
    ] {
        add(name, document, says);
    }
    all
}

#[test]
fn check_reports_each_bad_document_in_one_line() -> Result<()> {
    let cases = refused();
    let names: HashSet<_> = cases.iter().map(|case| &case.name).collect();
    assert!(
        names.len() == cases.len() && cases.len() >= 60,
        "{}",
        names.len()
    );
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("run.json");
    let mut wrong = vec![];
    for Refused {
        name,
        document,
        says,
    } in &cases
    {
        fs::write(&file, document)?;
        let output = assets::run_here(&assets::build_dir().join("init"))?
            .arg("--check")
            .arg(&file)
            .output()?;
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        let one_line = error.contains(says.as_str()) && error.matches('\n').count() == 1;
        if output.status.code() != Some(1) || !output.stdout.is_empty() || !one_line {
            wrong.push(format!("{name}: {:?}: {error}", output.status.code()));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    Ok(())
}

/// A boot with its own root.
struct Boot {
    name: &'static str,
    /// Shell commands that modify /mnt, a copy of a good root.
    prepare: &'static str,
    rest: Value,
    /// Part of the only error; empty if there is none, and the workload runs.
    says: &'static str,
    /// The error occurs when the API is up, so it reports it, too.
    is_late: bool,
}

/// Errors that only occur at boot.
fn boots() -> Vec<Boot> {
    let volume = |path: &str| json!({"Mounts": [{"DevicePath": "/dev/vdc", "MountPath": path}]});
    let user = |user: &str| json!({"UserOverride": user});
    let hosts = || json!({"EtcHosts": [{"Host": "a", "IP": "10.0.0.2"}]});
    let resolv = || json!({"EtcResolv": {"Nameservers": ["8.8.8.8"]}});
    let device = |device: &str| json!({"RootDevice": device});
    let boot = |name, prepare, rest, says| Boot {
        name,
        prepare,
        rest,
        says,
        is_late: false,
    };
    let late = |name, prepare, rest, says| Boot {
        is_late: true,
        ..boot(name, prepare, rest, says)
    };
    vec![
        boot("fine", "", json!({}), ""),
        // The root's device.
        boot(
            "root-absent",
            "",
            device("/dev/vdz"),
            "mount /dev/vdz on /newroot: no such device after 2 s",
        ),
        boot(
            "root-directory",
            "",
            device("/dev"),
            "mount /dev on /newroot: read the superblock: EISDIR",
        ),
        boot(
            "root-character",
            "",
            device("/dev/null"),
            "mount /dev/null on /newroot: no ext2, ext3, ext4, xfs, btrfs, squashfs or erofs",
        ),
        boot(
            "root-blank",
            "",
            device("/dev/vdd"),
            "mount /dev/vdd on /newroot: no ext2, ext3, ext4, xfs, btrfs, squashfs or erofs",
        ),
        boot(
            "root-late",
            "(sleep 1.5; ln -s vdb /dev/late) &",
            device("/dev/late"),
            "",
        ),
        // The root's own directories.
        boot(
            "proc-file",
            "rmdir /mnt/proc; touch /mnt/proc",
            json!({}),
            "move /proc onto the root: EINVAL",
        ),
        boot(
            "proc-link",
            "rmdir /mnt/proc; ln -s /dev /mnt/proc",
            json!({}),
            "move /proc onto the root: EINVAL",
        ),
        boot(
            "run-link-out",
            "rmdir /mnt/run; ln -s ../../../pigeon /mnt/run",
            json!({}),
            "move /run onto the root: EINVAL",
        ),
        boot(
            "no-directories",
            "rmdir /mnt/proc /mnt/sys /mnt/dev /mnt/run /mnt/root",
            json!({}),
            "",
        ),
        // Accounts.
        boot("user-unknown", "", user("nosuch"), "unknown user nosuch"),
        boot(
            "user-garbage",
            "printf 'app\\n:x:1:1::/:\\napp:x:abc:1::/:\\napp:x:1\\n\\xff\\xfe\\n' >/mnt/etc/passwd",
            user("app"),
            "unknown user app",
        ),
        boot(
            "user-no-passwd",
            "rm /mnt/etc/passwd",
            user("app"),
            "unknown user app",
        ),
        boot(
            "user-overflow",
            "",
            user("4294967296"),
            "user id 4294967296 is not from 0 to 4294967294",
        ),
        boot(
            "user-no-change",
            "",
            user("4294967295"),
            "user id 4294967295 is not from 0 to 4294967294",
        ),
        boot(
            "user-wraps",
            "",
            user("18446744073709551617"),
            "user id 18446744073709551617 is not from 0 to 4294967294",
        ),
        boot(
            "user-negative",
            "",
            user("-1"),
            "user id -1 is not from 0 to 4294967294",
        ),
        boot(
            "user-passwd-overflow",
            "echo 'big:x:4294967296:0::/:' >>/mnt/etc/passwd",
            user("big"),
            "unknown user big",
        ),
        boot(
            "group-unknown",
            "",
            user("app:nosuch"),
            "unknown group nosuch",
        ),
        boot(
            "group-overflow",
            "",
            user("app:4294967295"),
            "group id 4294967295 is not from 0 to 4294967294",
        ),
        boot(
            "groups-many",
            "i=0; while [ $i -lt 300 ]; do echo \"g$i:x:$((5000 + i)):app\"; i=$((i + 1)); done >>/mnt/etc/group",
            user("app"),
            "user app is in more than 256 groups",
        ),
        boot(
            "home-long",
            "printf 'far:x:7:7::/%0300d:\\n' 0 >>/mnt/etc/passwd",
            user("far"),
            "the home directory of far is over 256 bytes",
        ),
        boot(
            "passwd-directory",
            "rm /mnt/etc/passwd; mkdir /mnt/etc/passwd",
            json!({}),
            "read /etc/passwd: not a regular file",
        ),
        boot(
            "passwd-pipe",
            "rm /mnt/etc/passwd; mkfifo /mnt/etc/passwd",
            json!({}),
            "read /etc/passwd: not a regular file",
        ),
        boot(
            "passwd-terminal",
            "rm /mnt/etc/passwd; mknod /mnt/etc/passwd c 5 1",
            json!({}),
            "read /etc/passwd: not a regular file",
        ),
        boot(
            "passwd-endless",
            "rm /mnt/etc/passwd; mknod /mnt/etc/passwd c 1 5",
            json!({}),
            "read /etc/passwd: not a regular file",
        ),
        boot(
            "passwd-loop",
            "ln -sf passwd /mnt/etc/passwd",
            json!({}),
            "read /etc/passwd: ELOOP",
        ),
        boot(
            "passwd-kernel",
            // Read before anything is mounted on /proc.
            "ln -sf /proc/kmsg /mnt/etc/passwd",
            user("app"),
            "unknown user app",
        ),
        boot(
            "group-large",
            "dd if=/dev/zero of=/mnt/etc/group bs=1M count=2 2>/dev/null",
            json!({}),
            "read /etc/group: over 1048576 bytes",
        ),
        // Volumes: links of the root in their paths.
        late(
            "link-proc",
            "ln -s /proc /mnt/data",
            volume("/data"),
            "mount on /data: would hide /proc",
        ),
        late(
            "link-root",
            "ln -s .. /mnt/data",
            volume("/data"),
            "mount on /data: would hide /",
        ),
        late(
            "link-chain",
            "ln -s etc/../data2 /mnt/data; ln -s /dev/../sys /mnt/data2",
            volume("/data"),
            "mount on /data: would hide /sys",
        ),
        late(
            "link-middle",
            "ln -s / /mnt/data",
            volume("/data/run"),
            "mount on /data/run: would hide /run",
        ),
        late(
            "link-loop",
            "ln -s data /mnt/data",
            volume("/data"),
            "mount /dev/vdc on /data: ext4: ELOOP",
        ),
        late(
            "link-loop-above",
            "ln -s data /mnt/data",
            volume("/data/x"),
            "create /data/x: ELOOP",
        ),
        late(
            "link-dangling",
            "ln -s /nowhere /mnt/data",
            volume("/data"),
            "mount /dev/vdc on /data: ext4: ENOENT",
        ),
        boot(
            "link-inside",
            "mkdir -p /mnt/srv/real; ln -s ../../srv/real /mnt/data",
            json!({
                "Mounts": [{"DevicePath": "/dev/vdc", "MountPath": "/data"}],
                "ExecOverride": ["sh", "-ec", "grep '^/dev/vdc /srv/real ext4 rw' /proc/mounts; echo ran >/data/ran; echo the workload runs"]
            }),
            "",
        ),
        late(
            "volume-on-file",
            "",
            volume("/etc/passwd"),
            "mount /dev/vdc on /etc/passwd: ext4: ENOTDIR",
        ),
        late(
            "volume-below-file",
            "",
            volume("/etc/passwd/data"),
            "create /etc/passwd/data: ENOTDIR",
        ),
        late(
            "volume-below-proc",
            "",
            volume("/proc/data"),
            "create /proc/data: ENOENT",
        ),
        late(
            "volume-absent",
            "",
            json!({"Mounts": [{"DevicePath": "/dev/vdz", "MountPath": "/data"}]}),
            "mount /dev/vdz on /data: no such device after 2 s",
        ),
        late(
            "volume-blank",
            "",
            json!({"Mounts": [{"DevicePath": "/dev/vdd", "MountPath": "/data"}]}),
            "mount /dev/vdd on /data: no ext2, ext3",
        ),
        late(
            "volume-character",
            "",
            json!({"Mounts": [{"DevicePath": "/dev/null", "MountPath": "/data"}]}),
            "mount /dev/null on /data: no ext2, ext3",
        ),
        late(
            "volume-is-root",
            "",
            json!({"Mounts": [{"DevicePath": "/dev/vdc", "MountPath": "/data"}, {"DevicePath": "/dev/vdd", "MountPath": "/data/more"}]}),
            "mount /dev/vdd on /data/more: no ext2, ext3",
        ),
        boot(
            "volume-late",
            "(sleep 1.5; ln -s vdc /dev/later) &",
            json!({"Mounts": [{"DevicePath": "/dev/later", "MountPath": "/data"}]}),
            "",
        ),
        // Files of /etc that are elsewhere, or not regular files.
        late(
            "hosts-directory",
            "rm -f /mnt/etc/hosts; mkdir /mnt/etc/hosts",
            hosts(),
            "read /etc/hosts: not a regular file",
        ),
        late(
            "hosts-pipe",
            "rm -f /mnt/etc/hosts; mkfifo /mnt/etc/hosts",
            hosts(),
            "read /etc/hosts: not a regular file",
        ),
        boot(
            "hosts-link",
            "echo precious >/mnt/precious; ln -sf ../precious /mnt/etc/hosts",
            json!({
                "EtcHosts": [{"Host": "a", "IP": "10.0.0.2"}],
                "ExecOverride": ["sh", "-ec", "[ \"$(cat /precious)\" = precious ]; grep 10.0.0.2 /etc/hosts; [ ! -L /etc/hosts ]; echo the workload runs"]
            }),
            "",
        ),
        late(
            "resolv-directory",
            "rm -f /mnt/etc/resolv.conf; mkdir /mnt/etc/resolv.conf",
            resolv(),
            "write /etc/resolv.conf: EISDIR",
        ),
        boot(
            "etc-file",
            "rm -r /mnt/etc; touch /mnt/etc",
            resolv(),
            "read /etc/passwd: ENOTDIR",
        ),
        late(
            "etc-dangling",
            "rm -r /mnt/etc; ln -s /nowhere /mnt/etc",
            resolv(),
            "write /etc/resolv.conf: ENOENT",
        ),
        late(
            "etc-proc",
            "rm -r /mnt/etc; ln -s /proc /mnt/etc",
            resolv(),
            "write /etc/resolv.conf: ",
        ),
        boot(
            "disk-full",
            "touch /mnt/etc/resolv.conf; dd if=/dev/zero of=/mnt/full bs=64k 2>/dev/null; sync; i=0; while echo x >/mnt/full$i; do i=$((i + 1)); done 2>/dev/null; sync",
            json!({
                "EtcResolv": {"Nameservers": ["8.8.8.8"]},
                "ExecOverride": ["sh", "-ec", "grep 8.8.8.8 /etc/resolv.conf; ! echo x >/more; echo the workload runs"]
            }),
            "",
        ),
        // Network.
        late(
            "addresses-no-nic",
            "",
            json!({"IPConfigs": [{"IP": "10.0.0.2", "Mask": 24}]}),
            "eth0",
        ),
        // If the workload cannot be executed, the boot has not failed: exit code 126 or 127, and a line.
        boot(
            "directory-file",
            "",
            json!({"ImageConfig": {"WorkingDir": "/etc/passwd"}}),
            "enter /etc/passwd: ENOTDIR",
        ),
        boot(
            "directory-loop",
            "ln -s app /mnt/app",
            json!({"ImageConfig": {"WorkingDir": "/app"}}),
            "enter /app: ELOOP",
        ),
        boot(
            "directory-link",
            "ln -s /proc /mnt/app",
            json!({"ImageConfig": {"WorkingDir": "/app"}, "ExecOverride": ["sh", "-ec", "[ \"$(readlink /proc/self/cwd)\" = /proc ]; echo the workload runs"]}),
            "",
        ),
        boot(
            "argument-large",
            "",
            json!({"ExecOverride": ["sh", "-c", "true", "x".repeat(200_000)]}),
            "execute sh: E2BIG",
        ),
        boot(
            "command-loop",
            "ln -s run /mnt/bin/run",
            json!({"ExecOverride": ["run"]}),
            "execute run: ELOOP",
        ),
        boot(
            "command-device",
            "",
            json!({"ExecOverride": ["/dev/vda"]}),
            "execute /dev/vda: EACCES",
        ),
        boot(
            "command-garbage",
            "head -c 4096 /dev/urandom >/mnt/bin/noise; chmod 755 /mnt/bin/noise",
            json!({"ExecOverride": ["noise"]}),
            "execute noise: ENOEXEC",
        ),
    ]
}

/// Boots case $1 as PID 1 of a PID namespace. The console's lines of this script and of the inner PID 1 stay
/// in order, as both write to the terminal directly.
const NESTED: &str = r#"#!/bin/sh
case=$1
cd /
# The file systems of the last boot go a moment after its namespace.
while [ -e /proc/fs/ext4/vdb ] || [ -e /proc/fs/ext4/vdc ]; do sleep 0.01; done
if [ -e /cases/$case.sh ]; then
    rm -f /dev/late /dev/later
    cat /pristine >/dev/vdb
    mount -t ext4 /dev/vdb /mnt && . /cases/$case.sh; umount /mnt || echo "cannot unmount" >/dev/console
fi
echo "<<< $case" >/dev/console
export PIGEON_CONFIG=file PIGEON_EXIT_LINGER_MS=0
unshare -m -p -f -n -u -i sh -ec '
    mount -t tmpfs tmpfs /initramfs
    cd /initramfs
    mkdir pigeon old
    cp /init init
    cp /cases/$0.json pigeon/run.json
    [ ! -e /cases/$0.told ] || touch told
    pivot_root . old
    cd /
    /old/bin/busybox umount -l /old
    [ ! -e /told ] || export PIGEON_EXIT_LINGER_MS=60000
    exec /init' $case
echo ">>> $case $?" >/dev/console
"#;

/// Exit status of unshare(1) after a reboot in its PID namespace, whose PID 1 counts as killed by SIGHUP
/// (reboot(2)).
const REBOOTED: i32 = 128 + 1;

#[test]
fn bad_documents_and_roots_end_with_one_line_and_clean_disks() -> Result<()> {
    let (documents, boots) = (refused(), boots());
    let pristine = Image::ext4(&Tree::busybox()?, 12)?;
    let mut tree = Tree::busybox()?
        .dir("/initramfs", 0o755)?
        .dir("/cases", 0o755)?
        .file("/init", 0o755, fs::read(assets::build_dir().join("init"))?)?
        .file("/nested", 0o755, NESTED)?
        .file("/pristine", 0o600, fs::read(pristine.path())?)?;
    let mut run = String::new();
    for Refused { name, document, .. } in &documents {
        tree = tree.file(&format!("/cases/{name}.json"), 0o644, document)?;
        run += &format!("/nested {name}\n");
    }
    for Boot {
        name,
        prepare,
        rest,
        is_late,
        ..
    } in &boots
    {
        if *is_late {
            tree = tree.file(&format!("/cases/{name}.told"), 0o644, "")?;
        }
        let mut document =
            guest::shell("echo the workload runs", json!({"RootDevice": "/dev/vdb"}));
        for (field, value) in rest.as_object().context("an object")? {
            document[field] = value.clone();
        }
        tree = tree
            .file(&format!("/cases/{name}.json"), 0o644, document.to_string())?
            .file(&format!("/cases/{name}.sh"), 0o755, prepare)?;
        run += &format!("/nested {name}\n");
    }
    // This VM's PID 1 does not have vsock: the driver is loaded later.
    let (vsock, others): (Vec<_>, Vec<_>) = assets::kernel()?
        .modules()?
        .into_iter()
        .partition(|(name, _)| name.contains("vsock"));
    let mut builder = Vm::builder().without_modules();
    let mut list = String::new();
    for (name, contents) in others {
        builder = builder.file(&format!("/pigeon/{name}"), 0o644, contents);
        list += &format!("/pigeon/{name}\n");
    }
    let mut load = String::new();
    for (name, contents) in vsock {
        tree = tree.file(&format!("/modules/{name}"), 0o644, contents)?;
        load += &format!("insmod /modules/{name}\n");
    }
    let root = Image::ext4(&tree, 64)?;
    let [used, volume, blank] = [
        Image::blank(12)?,
        Image::ext4(&Tree::empty()?, 8)?,
        Image::blank(1)?,
    ];
    let mut vm = builder
        .file("/pigeon/modules", 0o644, list)
        .config(&guest::shell(&format!("{load}{run}exit 42"), json!({})))
        // Makes the removal of dozens of namespaces fast.
        .arg("rcupdate.rcu_expedited=1")
        .disk(&root)
        .disk(&used)
        .disk(&volume)
        .disk(&blank)
        .timeout(std::time::Duration::from_secs(300))
        .boot()?;
    for Boot { name, says, .. } in boots.iter().filter(|boot| boot.is_late) {
        vm.wait_for(&format!("<<< {name}"))?;
        let exit = vm.api()?.get("/v1/exit_code")?.json()?;
        let error = exit["error"].as_str().unwrap_or_default();
        assert!(exit["code"] == 125 && exit["oom_killed"] == false, "{exit}");
        assert!(error.contains(says), "{name}: {exit}");
    }
    vm.wait_for("exit_code=42")?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    for image in [&root, &used, &volume] {
        image.check()?;
    }
    let console = vm.console();
    assert!(!console.contains("cannot unmount"), "{console}");
    for Refused { name, says, .. } in &documents {
        assert_case(&console, name, says).with_context(|| name.clone())?;
    }
    for Boot { name, says, .. } in &boots {
        assert_case(&console, name, says).with_context(|| *name)?;
    }
    Ok(())
}

/// The case shut down in order, with only this error, or without an error and with the workload's line.
fn assert_case(console: &str, name: &str, says: &str) -> Result<()> {
    let start = format!("<<< {name}\n");
    let (_, said) = console.split_once(&start).context("it did not start")?;
    let (said, rest) = said
        .split_once(&format!(">>> {name} "))
        .context("it did not end")?;
    let status: i32 = rest.lines().next().unwrap_or_default().parse()?;
    ensure!(status == REBOOTED, "status {status}: {said}");
    let errors: Vec<_> = said
        .lines()
        .filter(|line| line.contains("level=error"))
        .collect();
    let ran = said.contains("the workload runs");
    if says.is_empty() {
        ensure!(errors.is_empty() && ran, "{said}");
        return Ok(());
    }
    ensure!(errors.len() == 1 && !ran, "{said}");
    let says = says.replace('"', "\\\"");
    ensure!(errors[0].contains(&says), "not {says:?}: {said}");
    Ok(())
}
