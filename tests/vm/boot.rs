//! Every step of the boot, seen from the guest: all tests here share one VM's report.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::LazyLock,
};

use anyhow::Result;
use pigeon_lab::{
    End, Vm, assets,
    disk::{Disk, Image, Tree},
    guest,
};
use serde_json::{Value, json};

/// The workload's report, and the result of its VM.
struct Seen {
    console: String,
    sections: BTreeMap<&'static str, Vec<String>>,
    status: Value,
    exit: Value,
    end: End,
    root: Image,
    volumes: [Image; 2],
}

static SEEN: LazyLock<Seen> = LazyLock::new(|| look().expect("the VM boots and reports"));

/// Commands whose output the tests check.
const SECTIONS: &[(&str, &str)] = &[
    ("argv", r#"printf '[%s]' "$0" "$@"; echo"#),
    (
        "cwd",
        "pwd; stat -c '%a %u:%g' /made /made/for /made/for/it",
    ),
    ("environment", r"tr '\0' '\n' </proc/$$/environ"),
    ("status", "cat /proc/$$/status"),
    ("signals", "cat /proc/self/status"),
    ("ids", "cut -d ' ' -f 1,4-8 /proc/$$/stat"),
    (
        "limits",
        "cat /proc/$$/limits /proc/1/limits | grep 'open files'",
    ),
    ("mounts", "cat /proc/self/mountinfo"),
    (
        "modes",
        "stat -c '%n %F %a %u:%g' /dev/shm /run /run/lock /dev/pts/ptmx",
    ),
    (
        "links",
        "for link in fd stdin stdout stderr; do readlink /dev/$link; done",
    ),
    (
        "cgroups",
        "cat /proc/self/cgroup; cat /sys/fs/cgroup/unified/cgroup.procs | head -n 1",
    ),
    ("hostname", "hostname"),
    ("hosts", "cat /etc/hosts"),
    (
        "resolv.conf",
        "cat /etc/resolv.conf; stat -c %F /etc/resolv.conf; ls /run/nowhere",
    ),
    (
        "mtu",
        "cat /sys/class/net/eth0/mtu; cat /sys/class/net/lo/operstate",
    ),
    (
        "addresses",
        "ip -o address show | sed 's/^[0-9]*: //; s/  */ /g'",
    ),
    ("inet6", "grep eth0 /proc/net/if_inet6"),
    ("routes", "ip route show; ip -6 route show | grep -v ^fe80:"),
    ("lo", "ping -c 1 -W 5 127.0.0.1"),
    (
        "volumes",
        "stat -c '%n %u:%g' /data /data/inner/deep; cat /data/note /data/inner/deep/note; touch /data/mine",
    ),
    ("memory", "grep -E '^(Shmem|MemTotal):' /proc/meminfo"),
    (
        "processes",
        r"for p in /proc/[0-9]*; do read -r pid name state parent rest <$p/stat && [ $parent = 1 ] && echo $pid $name $state; done 2>/dev/null; echo $$",
    ),
    ("expedited", "cat /sys/kernel/rcu_expedited"),
    ("binfmt", "cat /proc/sys/fs/binfmt_misc/status"),
    ("console", "cat /sys/class/tty/console/active"),
    ("log", "dmesg | grep -c pigeon-init"),
];

fn look() -> Result<Seen> {
    let root = Image::ext4(
        &Tree::busybox()?
            .symlink("/etc/resolv.conf", "../run/nowhere/resolv.conf")?
            .dir("/data", 0o700)?,
        32,
    )?;
    let note = |text| Image::ext4(&Tree::empty()?.file("/note", 0o644, text)?, 8);
    let volumes = [note("outer\n")?, note("inner\n")?];
    // A redirection of the shell itself saves descriptors: so these come first.
    let script = "echo '<<< fds'; ls -l /proc/$$/fd; echo '>>> fds 0'\n".to_string()
        + &guest::report(SECTIONS)
        + "echo ready; read -r line; echo \"stdin: $line\"; exit 0";
    let config = json!({
        "ImageConfig": {
            "Entrypoint": ["sh", "-c"],
            "Cmd": [script, "zero", "two words", "", "ünï\u{1f426}"],
            "Env": ["A=1", "B=image", "NOT_AN_ENTRY", "A=2", "EMPTY=", "=nameless", "EQUAL=a=b"],
            "WorkingDir": "/made/for/it",
            "User": "app:video"
        },
        "UserOverride": "root",
        "ExtraEnv": {"B": "extra", "QUOTED": "a \"b\"\n\u{1f426}"},
        "MTU": 1400,
        "IPConfigs": [
            {"Gateway": "169.254.0.1", "IP": "10.0.0.2", "Mask": 24},
            {"Gateway": "169.254.0.1", "IP": "10.0.1.2", "Mask": 24},
            {"Gateway": "", "IP": "172.16.0.2", "Mask": 12},
            {"IP": "192.0.2.7", "Mask": 32},
            {"Gateway": "fd00:1::1/64", "IP": "fd00:1::2", "Mask": 64},
            {"Gateway": "fd00:1::1", "IP": "fd00:2::2", "Mask": 128}
        ],
        "Hostname": "my-app-abcdef",
        "Mounts": [
            {"DevicePath": "/dev/vdb", "MountPath": "/data"},
            {"DevicePath": "/dev/vdc", "MountPath": "/data/inner/deep"}
        ],
        "EtcResolv": {"Nameservers": ["8.8.8.8", "fd00::53"]},
        "EtcHosts": [
            {"Host": "my-app.internal", "IP": "10.0.0.2", "Desc": "app alias"},
            {"Host": "six.internal", "IP": "fd00:1::2"}
        ]
    });
    let mut vm = Vm::builder()
        .name("boot")
        .config(&config)
        .file("/pigeon/secret/large", 0o600, vec![b'x'; 16 << 20])
        .disk(&root)
        .disk(&volumes[0])
        .disk(&volumes[1])
        .tap()
        .boot()?;
    vm.wait_for("ready")?;
    let status = vm.api()?.get("/v1/status")?.json()?;
    vm.type_text("typed by hand\n")?;
    let exit = vm.api()?.get("/v1/exit_code")?.json()?;
    let end = vm.wait_end()?;
    let mut sections = BTreeMap::new();
    for name in SECTIONS.iter().map(|(name, _)| *name).chain(["fds"]) {
        sections.insert(name, vm.section(name)?);
    }
    Ok(Seen {
        console: vm.console(),
        sections,
        status,
        exit,
        end,
        root,
        volumes,
    })
}

fn section(name: &str) -> &'static [String] {
    &SEEN.sections[name]
}

/// The value of a line `name:\tvalue` of /proc/PID/status.
fn field(section_name: &str, name: &str) -> &'static str {
    let mut lines = section(section_name).iter();
    let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    value.expect("the kernel reports it").trim()
}

/// A mount: its type, its own options and those of its file system.
struct Mount<'a> {
    kind: &'a str,
    source: &'a str,
    options: BTreeSet<&'a str>,
}

fn mounts() -> BTreeMap<&'static str, Mount<'static>> {
    let parse = |line: &'static String| {
        let (left, right) = line.split_once(" - ").expect("proc_pid_mountinfo(5)");
        let target = left.split(' ').nth(4).expect("a target");
        let options = left.split(' ').nth(5).expect("options");
        let mut right = right.split(' ');
        let mut word = || right.next().expect("type, source, options");
        let (kind, source) = (word(), word());
        let options = options.split(',').chain(word().split(',')).collect();
        (
            target,
            Mount {
                kind,
                source,
                options,
            },
        )
    };
    section("mounts").iter().map(parse).collect()
}

#[track_caller]
fn assert_mount(target: &str, kind: &str, options: &str, never: &str) {
    let mounts = mounts();
    let mount = mounts
        .get(target)
        .unwrap_or_else(|| panic!("nothing on {target}"));
    assert_eq!(mount.kind, kind, "{target}");
    for option in options.split(' ') {
        assert!(
            mount.options.contains(option),
            "{target} without {option}: {:?}",
            mount.options
        );
    }
    for option in never.split(' ').filter(|option| !option.is_empty()) {
        assert!(
            !mount.options.contains(option),
            "{target} with {option}: {:?}",
            mount.options
        );
    }
}

#[test]
fn the_root_is_mounted_from_the_first_disk() {
    assert_mount("/", "ext4", "rw relatime", "nosuid nodev noexec");
    assert_eq!(mounts()["/"].source, "/dev/vda");
}

#[test]
fn the_kernels_file_systems_are_mounted_with_their_options() {
    assert_mount("/dev", "devtmpfs", "rw", "noexec nodev");
    assert_mount("/proc", "proc", "rw nodev noexec nosuid", "");
    assert_mount("/sys", "sysfs", "rw nodev noexec nosuid", "");
    assert_mount(
        "/dev/pts",
        "devpts",
        "noexec nosuid noatime mode=620 gid=5 ptmxmode=666",
        "nodev",
    );
    assert_mount("/dev/mqueue", "mqueue", "nodev noexec nosuid", "");
    assert_mount("/dev/shm", "tmpfs", "nosuid nodev", "noexec");
    assert_mount("/dev/hugepages", "hugetlbfs", "relatime pagesize=2M", "");
    assert_mount("/proc/sys/fs/binfmt_misc", "binfmt_misc", "rw", "");
    assert_mount("/run", "tmpfs", "nosuid nodev mode=755", "noexec");
    assert_eq!(section("binfmt"), ["enabled"]);
}

#[test]
fn directories_have_their_modes_and_dev_its_links() {
    assert_eq!(
        section("modes"),
        [
            "/dev/shm directory 1777 0:0",
            "/run directory 755 0:0",
            "/run/lock directory 1777 0:0",
            "/dev/pts/ptmx character special file 666 0:0",
        ]
    );
    assert_eq!(
        section("links"),
        [
            "/proc/self/fd",
            "/proc/self/fd/0",
            "/proc/self/fd/1",
            "/proc/self/fd/2"
        ]
    );
}

#[test]
fn cgroups_are_a_hybrid_of_v1_controllers_and_v2() {
    assert_mount("/sys/fs/cgroup", "tmpfs", "mode=755", "");
    assert_mount("/sys/fs/cgroup/unified", "cgroup2", "nsdelegate", "");
    let missing = assets::missing_v1_controllers().expect("the kernel's configuration");
    let mut controllers = vec![
        "net_cls,net_prio",
        "hugetlb",
        "pids",
        "freezer",
        "cpu,cpuacct",
        "devices",
        "blkio",
        "memory",
        "perf_event",
        "cpuset",
    ];
    controllers.retain(|names| !missing.contains(names));
    // A missing one is a warning, not a kernel message.
    let warnings = SEEN.console.matches("mount cgroup on ").count();
    assert_eq!(warnings, missing.len(), "{}", SEEN.console);
    assert!(!SEEN.console.contains("Unknown subsys"), "{}", SEEN.console);
    for names in &controllers {
        assert_mount(
            &format!("/sys/fs/cgroup/{names}"),
            "cgroup",
            &names.replace(',', " "),
            "",
        );
    }
    let below = |path: &&str| path.starts_with("/sys/fs/cgroup/");
    assert_eq!(
        mounts().into_keys().filter(below).count(),
        controllers.len() + 1
    );
    // The workload is in the root of each v1 hierarchy, and in its own v2 group; PID 1 is not.
    let mut lines = section("cgroups").to_vec();
    assert_eq!(lines.pop().as_deref(), Some("1"));
    assert_eq!(lines.pop().as_deref(), Some("0::/workload"));
    assert_eq!(lines.len(), controllers.len());
    assert!(lines.iter().all(|line| line.ends_with(":/")), "{lines:?}");
}

#[test]
fn nothing_undocumented_is_mounted() {
    let known = |target: &&str| {
        let own = [
            "/",
            "/proc",
            "/run",
            "/data",
            "/data/inner/deep",
            "/proc/sys/fs/binfmt_misc",
        ];
        own.contains(target)
            || ["/dev", "/sys"].contains(target)
            || ["/dev/pts", "/dev/mqueue", "/dev/shm", "/dev/hugepages"].contains(target)
            || target.starts_with("/sys/fs/cgroup")
    };
    let mounts = mounts();
    let unknown: Vec<_> = mounts.keys().filter(|target| !known(target)).collect();
    assert!(unknown.is_empty(), "{unknown:?}");
    assert_eq!(
        mounts.len(),
        section("mounts").len(),
        "a mount hides another one"
    );
}

#[test]
fn the_limit_of_open_files_is_10240() {
    let words = |line: &String| {
        line.split_whitespace()
            .map(String::from)
            .collect::<Vec<_>>()
    };
    for line in section("limits") {
        assert_eq!(words(line)[3..5], ["10240", "10240"], "{line}");
    }
    assert_eq!(section("limits").len(), 2);
}

#[test]
fn the_user_override_replaces_the_images_user() {
    assert_eq!(field("status", "Uid"), "0\t0\t0\t0");
    assert_eq!(field("status", "Gid"), "0\t0\t0\t0");
    assert_eq!(field("status", "Groups"), "0");
}

#[test]
fn the_environment_is_merged_from_image_extra_env_and_defaults() {
    let environment: BTreeSet<_> = section("environment").iter().map(String::as_str).collect();
    let expected = [
        "A=2",
        "B=extra",
        "EMPTY=",
        "EQUAL=a=b",
        "HOME=/root",
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "QUOTED=a \"b\"",
        "\u{1f426}",
    ];
    assert_eq!(environment, BTreeSet::from(expected));
    assert_eq!(
        section("environment").len(),
        expected.len(),
        "one entry a name"
    );
}

#[test]
fn entrypoint_and_cmd_form_argv_and_path_is_searched() {
    assert_eq!(section("argv"), ["[zero][two words][][ünï\u{1f426}]"]);
}

#[test]
fn the_working_directory_is_created() {
    let directory = "755 0:0";
    assert_eq!(
        section("cwd"),
        ["/made/for/it", directory, directory, directory]
    );
}

#[test]
fn the_workload_inherits_only_descriptors_0_to_2() {
    let links: Vec<_> = section("fds")
        .iter()
        .filter_map(|line| line.rsplit_once(" -> "))
        .map(|(left, target)| (left.rsplit(' ').next().unwrap_or_default(), target))
        .collect();
    let [(zero, input), (one, output), (two, errors)] = links[..] else {
        panic!("not three descriptors: {links:?}");
    };
    assert_eq!([zero, one, two], ["0", "1", "2"]);
    // Its name is set for the kernel (console=), but PID 1 has to find it.
    assert_eq!(input, format!("/dev/{}", section("console")[0]));
    assert!(output.starts_with("pipe:["), "{output}");
    assert_eq!(output, errors, "one pipe for both");
}

#[test]
fn no_signal_is_blocked_or_ignored() {
    for name in ["SigBlk", "SigIgn", "SigPnd", "ShdPnd"] {
        assert_eq!(field("signals", name), "0000000000000000", "{name}");
    }
}

#[test]
fn the_workload_leads_a_session_without_a_terminal() {
    let ids: Vec<i32> = section("ids")[0]
        .split(' ')
        .map(|id| id.parse().unwrap())
        .collect();
    let [pid, parent, group, session, terminal, foreground] = ids[..] else {
        panic!("{ids:?}");
    };
    assert_eq!((parent, group, session), (1, pid, pid));
    assert_eq!((terminal, foreground), (0, -1));
}

#[test]
fn no_other_process_is_left_from_the_boot() {
    let [workload, pid] = section("processes") else {
        panic!("{:?}", section("processes"));
    };
    assert!(workload.starts_with(&format!("{pid} (sh) ")), "{workload}");
}

#[test]
fn the_host_name_is_set() {
    assert_eq!(section("hostname"), ["my-app-abcdef"]);
}

#[test]
fn a_missing_hosts_file_gets_localhost_and_the_entries() {
    let hosts: Vec<Vec<_>> = section("hosts")
        .iter()
        .map(|line| {
            line.split('#')
                .next()
                .unwrap_or_default()
                .split_whitespace()
                .collect()
        })
        .collect();
    for entry in [
        vec!["127.0.0.1", "localhost"],
        vec!["10.0.0.2", "my-app.internal"],
        vec!["fd00:1::2", "six.internal"],
    ] {
        assert_eq!(
            hosts.iter().filter(|line| **line == entry).count(),
            1,
            "{entry:?} in {hosts:?}"
        );
    }
    assert!(
        hosts
            .iter()
            .any(|line| line.starts_with(&["::1", "localhost"])),
        "{hosts:?}"
    );
    assert!(
        section("hosts")
            .iter()
            .any(|line| line.contains("app alias"))
    );
}

#[test]
fn resolv_conf_is_replaced_also_when_it_is_a_dangling_link() {
    let [first, second, kind, nowhere] = section("resolv.conf") else {
        panic!("{:?}", section("resolv.conf"));
    };
    assert_eq!(
        [first, second, kind],
        ["nameserver 8.8.8.8", "nameserver fd00::53", "regular file"]
    );
    assert!(
        nowhere.contains("No such file"),
        "the link's target was made: {nowhere}"
    );
}

#[test]
fn eth0_has_its_mtu_and_its_addresses() {
    assert_eq!(section("mtu")[0], "1400");
    let addresses = section("addresses");
    for address in [
        "eth0 inet 10.0.0.2/24 ",
        "eth0 inet 10.0.1.2/24 ",
        "eth0 inet 172.16.0.2/12 ",
        "eth0 inet 192.0.2.7/32 ",
        "eth0 inet6 fd00:1::2/64 ",
        "eth0 inet6 fd00:2::2/128 ",
        "lo inet 127.0.0.1/8 ",
        "lo inet6 ::1/128 ",
    ] {
        let count = addresses
            .iter()
            .filter(|line| line.starts_with(address))
            .count();
        assert_eq!(count, 1, "{address} in {addresses:?}");
    }
    let own = |line: &&String| line.contains(" inet ") && line.starts_with("eth0");
    assert_eq!(addresses.iter().filter(own).count(), 4, "{addresses:?}");
    assert!(section("lo").concat().contains("1 packets received"));
}

#[test]
fn an_ipv6_address_can_be_used_at_once() {
    // linux/if_addr.h
    const NODAD: u32 = 0x02;
    const TENTATIVE: u32 = 0x40;
    let flags = |address: &str| {
        let mut lines = section("inet6").iter();
        let line = lines
            .find(|line| line.starts_with(address))
            .expect("the address is there");
        let flags = line
            .split_whitespace()
            .nth(4)
            .expect("if_inet6 has six columns");
        u32::from_str_radix(flags, 16).expect("hexadecimal")
    };
    for address in [
        "fd000001000000000000000000000002",
        "fd000002000000000000000000000002",
    ] {
        assert_eq!(flags(address) & (NODAD | TENTATIVE), NODAD, "{address}");
    }
}

#[test]
fn several_addresses_share_a_gateway_which_may_be_off_subnet() {
    let routes = section("routes");
    let default: Vec<_> = routes
        .iter()
        .filter(|route| route.starts_with("default "))
        .collect();
    let [four, six] = default[..] else {
        panic!("{routes:?}");
    };
    assert!(
        four.starts_with("default via 169.254.0.1 dev eth0"),
        "{four}"
    );
    assert!(six.starts_with("default via fd00:1::1 dev eth0"), "{six}");
    assert!(!routes.concat().contains("169.254.169"), "{routes:?}");
}

#[test]
fn checksum_offload_is_disabled_silently_if_the_device_can() {
    assert!(!SEEN.console.contains("offload"), "{}", SEEN.console);
}

#[test]
fn nested_volumes_are_mounted_and_belong_to_the_user() {
    assert_mount("/data", "ext4", "rw relatime", "nosuid nodev noexec");
    assert_mount(
        "/data/inner/deep",
        "ext4",
        "rw relatime",
        "nosuid nodev noexec",
    );
    assert_eq!(mounts()["/data"].source, "/dev/vdb");
    assert_eq!(mounts()["/data/inner/deep"].source, "/dev/vdc");
    assert_eq!(
        section("volumes"),
        ["/data 0:0", "/data/inner/deep 0:0", "outer", "inner"]
    );
}

#[test]
fn the_initramfs_and_its_secrets_are_gone() -> Result<()> {
    // A root file system in memory would count as shared memory: 16 MiB, if it were still there. The
    // program's own pages stay while it runs.
    let words = section("memory")[1].split_whitespace();
    let kilobytes: u64 = words.clone().nth(1).expect("a number").parse()?;
    let program = std::fs::metadata(assets::build_dir().join("init"))?.len() / 1024;
    assert!(kilobytes <= program + 64, "{:?}", section("memory"));
    Ok(())
}

#[test]
fn expedited_grace_periods_are_off_again() {
    assert_eq!(section("expedited"), ["0"]);
}

#[test]
fn standard_input_is_the_console() {
    assert!(
        SEEN.console.contains("\nstdin: typed by hand\n"),
        "{}",
        SEEN.console
    );
}

#[test]
fn the_log_has_the_boots_steps_and_the_workloads_ids() {
    let lines: Vec<_> = SEEN
        .console
        .lines()
        .filter(|line| line.starts_with("pigeon-init: level=info msg="))
        .collect();
    assert_eq!(
        lines[0],
        "pigeon-init: level=info msg=\"configuration loaded\" source=file"
    );
    assert!(
        lines[1].contains("msg=\"workload started\" pid="),
        "{lines:?}"
    );
    let exited = lines
        .iter()
        .find(|line| line.contains("workload exited"))
        .expect("the line is printed");
    assert!(exited.contains(" exit_code=0 oom_killed=false"), "{exited}");
    assert!(exited.ends_with(" uid=0 gid=0"), "{exited}");
    assert_eq!(
        section("log"),
        ["0"],
        "the log is the console's, not the kernel's"
    );
}

#[test]
fn the_api_responds_while_the_workload_runs_and_returns_its_exit_code() {
    assert_eq!(SEEN.status, json!({"ok": true}));
    assert_eq!(SEEN.exit, json!({"code": 0, "oom_killed": false}));
    assert_eq!(SEEN.end, End::Reboot);
}

#[test]
fn all_disks_are_clean_afterwards_with_all_data() -> Result<()> {
    SEEN.root.check()?;
    SEEN.volumes[0].check()?;
    SEEN.volumes[1].check()?;
    SEEN.volumes[0].stat("/mine")?;
    assert_eq!(
        SEEN.root.read("/etc/resolv.conf")?,
        "nameserver 8.8.8.8\nnameserver fd00::53\n"
    );
    // Volumes leave nothing below their mount points.
    assert!(SEEN.root.stat("/data/note").is_err());
    Ok(())
}

#[test]
fn write_protected_disks_are_mounted_and_stay_unchanged() -> Result<()> {
    let tree = Tree::busybox()?.file("/etc/hosts", 0o644, "192.0.2.9 old\n")?;
    let root = Image::ext4(&tree.dir("/vol", 0o755)?, 32)?;
    let volume = Image::ext4(&Tree::empty()?.file("/note", 0o644, "kept")?, 8)?;
    let more = json!({
        "EtcHosts": [{"Host": "one", "IP": "192.0.2.1"}],
        "Mounts": [{"DevicePath": "/dev/vdb", "MountPath": "/vol"}],
        "UserOverride": "4242"
    });
    let mut vm = Vm::builder()
        .config(&guest::shell(
            "cat /vol/note /etc/hosts; echo; touch /x /vol/x",
            more,
        ))
        .disk(Disk::from(&root).read_only())
        .disk(Disk::from(&volume).read_only())
        .boot()?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    let console = vm.console();
    for words in [
        "/dev/vda is write-protected: mounted read-only",
        "/dev/vdb is write-protected: mounted read-only",
        "kept192.0.2.9 old",
        "192.0.2.1\tone",
        "/x: Read-only file system",
        "exit_code=1",
    ] {
        assert!(console.contains(words), "{words}");
    }
    assert!(!console.contains("level=error"));
    root.check()?;
    volume.check()
}

#[test]
fn a_root_with_only_a_shell_gets_its_mount_points() -> Result<()> {
    let shell = std::fs::read(assets::busybox()?)?;
    let root = Image::ext4(&Tree::empty()?.file("/busybox", 0o755, shell)?, 16)?;
    let script = guest::report(&[
        (
            "modes",
            "/busybox stat -c '%a %n' /root /run/lock /dev/shm /proc/1 /vol",
        ),
        ("environment", r"/busybox tr '\0' '\n' </proc/$$/environ"),
        ("ids", "/busybox grep -E '^(Uid|Groups)' /proc/self/status"),
        ("hosts", "/busybox cat /etc/hosts"),
    ]) + "exit 1";
    let config = json!({
        "ImageConfig": {"Entrypoint": ["/busybox", "sh", "-c"], "Cmd": ["no", "no"]},
        "CmdOverride": script,
        "RootDevice": "/dev/vdb",
        "EtcHosts": [{"Host": "one", "IP": "192.0.2.1"}],
        "Mounts": [{"DevicePath": "/dev/vda", "MountPath": "/vol"}],
        "UserOverride": null,
        "Hostname": null
    });
    let volume = Image::ext4(&Tree::empty()?, 8)?;
    let mut vm = Vm::builder()
        .config(&config)
        .disk(&volume)
        .disk(&root)
        .boot()?;
    assert_eq!(
        vm.section("modes")?,
        [
            "700 /root",
            "1777 /run/lock",
            "1777 /dev/shm",
            "555 /proc/1",
            "755 /vol"
        ]
    );
    assert_eq!(
        vm.section("environment")?,
        [
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME=/root"
        ]
    );
    assert_eq!(vm.section("ids")?, ["Uid:\t0\t0\t0\t0", "Groups:\t0 "]);
    assert!(vm.section("hosts")?.concat().contains("192.0.2.1"));
    assert_eq!(vm.api()?.get("/v1/exit_code")?.json()?["code"], 1);
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check()?;
    volume.check()
}

#[test]
fn the_workload_runs_as_the_configured_user_in_its_groups() -> Result<()> {
    let root = Image::ext4(&Tree::busybox()?, 32)?;
    let volume = Image::ext4(&Tree::empty()?, 8)?;
    let script = guest::report(&[
        (
            "status",
            "grep -E '^(Uid|Gid|Groups|Cap(Inh|Prm|Eff|Amb))' /proc/self/status",
        ),
        (
            "home",
            "echo $HOME; touch /data/mine && stat -c %u:%g /data /data/mine",
        ),
        ("denied", "touch /etc/mine"),
    ]) + "exit 7";
    let config = guest::shell(
        &script,
        json!({
            "ImageConfig": {"User": "app"},
            "Mounts": [{"DevicePath": "/dev/vdb", "MountPath": "/data"}]
        }),
    );
    let mut vm = Vm::builder()
        .config(&config)
        .disk(&root)
        .disk(&volume)
        .boot()?;
    let none = "0000000000000000";
    assert_eq!(
        vm.section("status")?,
        [
            "Uid:\t1000\t1000\t1000\t1000",
            "Gid:\t1000\t1000\t1000\t1000",
            "Groups:\t44 50 1000 ",
            &format!("CapInh:\t{none}"),
            &format!("CapPrm:\t{none}"),
            &format!("CapEff:\t{none}"),
            &format!("CapAmb:\t{none}"),
        ]
    );
    assert_eq!(vm.section("home")?, ["/home/app", "1000:1000", "1000:1000"]);
    assert!(vm.section("denied")?.concat().contains("Permission denied"));
    vm.wait_for("exit_code=7 oom_killed=false uid=1000 gid=1000")?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check()?;
    volume.check()?;
    assert!(volume.stat("/mine")?.contains("User:  1000   Group:  1000"));
    Ok(())
}
