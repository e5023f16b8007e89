//! Differences between x86_64 and aarch64: each test passes on both.

use anyhow::{Context, Result};
use pigeon_lab::{
    Arch, End, Vm,
    assets::{self, Kernel},
    disk::{Image, Tree},
    guest, process,
    ws::Socket,
};
use serde_json::json;

fn root() -> Result<Image> {
    Image::ext4(&Tree::busybox()?, 32)
}

#[test]
fn the_console_is_found_without_a_console_parameter() -> Result<()> {
    let root = root()?;
    let script = guest::report(&[
        ("input", "readlink /proc/$$/fd/0"),
        ("console", "cat /sys/class/tty/console/active"),
        ("others", "ls /dev/ttyS0"),
    ]) + "read -r line; echo \"read: $line\"";
    let builder = || {
        Vm::builder()
            .config(&guest::shell(&script, json!({})))
            .disk(&root)
            .arg("INIT_LOG_LEVEL=warn")
    };
    for builder in [builder(), builder().firecrackers_console()] {
        let mut vm = builder.boot()?;
        let console = vm.section("console")?.concat();
        assert_eq!(vm.section("input")?, [format!("/dev/{console}")]);
        // There are some without hardware where QEMU has a PL011.
        assert_eq!(vm.section("others")?, ["/dev/ttyS0"]);
        vm.type_text("typed\n")?;
        vm.wait_for("read: typed")?;
        assert_eq!(vm.wait_end()?, End::Reboot);
        root.check()?;
    }
    Ok(())
}

#[test]
fn the_machine_restarts_and_ctrl_alt_del_is_handled() -> Result<()> {
    let root = root()?;
    let script = guest::report(&[
        (
            "keyboard",
            "ls /sys/bus/platform/devices | grep -c '^i8042$'",
        ),
        ("firmware", "dmesg | grep -c 'psci: PSCIv'"),
        ("taken over", "cat /proc/sys/kernel/ctrl-alt-del"),
    ]);
    let mut vm = Vm::builder()
        .config(&guest::shell(&script, json!({})))
        .disk(&root)
        .boot()?;
    // The keyboard controller's reset line, or a firmware call.
    let [keyboard, firmware] = match assets::arch() {
        Arch::X86_64 => ["1", "0"],
        Arch::Aarch64 => ["0", "1"],
    };
    assert_eq!(vm.section("keyboard")?, [keyboard]);
    assert_eq!(vm.section("firmware")?, [firmware]);
    assert_eq!(vm.section("taken over")?, ["0"]);
    assert_eq!(vm.wait_end()?, End::Reboot);
    vm.wait_for("reboot: Restarting system")?;
    root.check()
}

#[test]
fn kernel_structures_and_clone_match_the_architecture() -> Result<()> {
    let root = root()?;
    let script = "trap 'echo signalled' USR1; echo ready; while :; do sleep 0.1; done";
    let mut vm = Vm::builder()
        .config(&guest::shell(script, json!({})))
        .disk(&root)
        .boot()?;
    vm.wait_for("ready")?;
    // struct epoll_event, which is packed on x86_64 only: many sources at once must not be mixed up.
    let mut connections = vec![];
    for number in 0..8 {
        let mut api = vm.api()?;
        let body = json!({"cmd": ["sh", "-c", format!("sleep 0.5; echo {number} $PPID")]});
        let body = body.to_string();
        let head = format!(
            "POST /v1/exec HTTP/1.1\r\nHost: vm\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        api.send((head + &body).as_bytes())?;
        connections.push(api);
    }
    for (number, api) in connections.iter_mut().enumerate() {
        let response = api.receive(false)?.json()?;
        assert_eq!(response["stdout"], format!("{number} 1\n"), "{response}");
    }
    // struct stat: account files are only read if they are regular files.
    let mut api = vm.api()?;
    let ids = json!({"cmd": ["id", "-u"], "user": "app"});
    assert_eq!(api.post("/v1/exec", &ids)?.json()?["stdout"], "1000\n");
    // struct signalfd_siginfo
    let signal = json!({"cmd": ["kill", "-USR1", "1"]});
    assert_eq!(api.post("/v1/exec", &signal)?.json()?["exit_code"], 0);
    vm.wait_for("signalled")?;
    // struct winsize and the terminal calls
    let mut session = Socket::open(vm.connect(pigeon_lab::vsock::API_PORT)?, "/v1/ws/exec")?;
    session.text(&json!({"command": ["stty", "size"], "tty": true, "cols": 123, "rows": 45}))?;
    assert_eq!(session.wait_end()?.output.trim_ascii(), b"45 123");
    let kill = json!({"signal": 9});
    api.post("/v1/signals", &kill)?.success()?;
    assert_eq!(api.get("/v1/exit_code")?.json()?["code"], 137);
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check()
}

#[test]
fn a_kernel_with_debians_largest_pages_boots_it() -> Result<()> {
    let (kernel, page) = match assets::arch() {
        Arch::X86_64 => (assets::kernel()?, "4"),
        Arch::Aarch64 => (Kernel::with_16k_pages()?, "16"),
    };
    let root = root()?;
    let volume = Image::ext4(&Tree::empty()?, 16)?;
    let script = guest::report(&[
        ("page", "grep -m 1 KernelPageSize /proc/1/smaps"),
        ("huge", "grep hugetlbfs /proc/mounts"),
        (
            "write",
            "dd if=/dev/urandom of=/data/file bs=64k count=64 && md5sum /data/file",
        ),
    ]) + "echo ready; read -r line; exit 7";
    let config = guest::shell(
        &script,
        json!({"Mounts": [{"DevicePath": "/dev/vdb", "MountPath": "/data"}]}),
    );
    let mut vm = Vm::builder()
        .kernel(kernel)
        .config(&config)
        .disk(&root)
        .disk(&volume)
        .boot()?;
    vm.wait_for("ready")?;
    let line = vm.section("page")?.concat();
    let size = line.split_whitespace().nth(1).context("a size")?;
    assert_eq!(size, page);
    assert!(vm.section("huge")?.concat().contains("pagesize=2M"));
    // More than one page of output; memory is mapped and unmapped.
    let mut api = vm.api()?;
    let much = json!({"cmd": ["head", "-c", "300000", "/dev/zero"]});
    for _ in 0..3 {
        let response = api.post("/v1/exec", &much)?.json()?;
        let stdout = response["stdout"].as_str().unwrap_or_default();
        assert_eq!(stdout.len(), 300_000);
    }
    vm.type_text("\n")?;
    assert_eq!(api.get("/v1/exit_code")?.json()?["code"], 7);
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check()?;
    volume.check()
}

/// A loadable segment of an ELF file (elf(5), Elf64_Phdr).
struct Segment {
    offset: u64,
    address: u64,
    size: u64,
    align: u64,
}

fn segments(elf: &[u8]) -> Vec<Segment> {
    const PT_LOAD: u64 = 1;
    let number = |at: usize, size: usize| {
        let mut bytes = [0; 8];
        bytes[..size].copy_from_slice(&elf[at..at + size]);
        u64::from_le_bytes(bytes)
    };
    let (start, size, count) = (number(32, 8), number(54, 2), number(56, 2));
    (0..count)
        .map(|index| (start + index * size) as usize)
        .filter(|header| number(*header, 4) == PT_LOAD)
        .map(|header| Segment {
            offset: number(header + 8, 8),
            address: number(header + 16, 8),
            size: number(header + 40, 8),
            align: number(header + 48, 8),
        })
        .collect()
}

#[test]
fn its_segments_are_aligned_for_every_page_size() -> Result<()> {
    let largest = match assets::arch() {
        Arch::X86_64 => 4 << 10,
        Arch::Aarch64 => 64 << 10,
    };
    let program = assets::build_dir().join("init");
    let segments = segments(&std::fs::read(&program)?);
    assert_eq!(segments.len(), 2);
    for segment in &segments {
        assert_eq!(segment.align, largest);
        assert_eq!(segment.offset % largest, segment.address % largest);
    }
    let end = segments[0].address + segments[0].size;
    assert!(end.next_multiple_of(largest) <= segments[1].address / largest * largest);
    // QEMU's user emulation uses pages of this size, if it runs this program.
    let example = assets::repository().join("tests/example/run.json");
    let mut check = assets::run_here(&program)?;
    check.env("QEMU_PAGESIZE", largest.to_string());
    let said = process::run(check.arg("--check").arg(example))?;
    assert!(said.starts_with("argv: "), "{said}");
    Ok(())
}
