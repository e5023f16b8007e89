//! The lab itself, with busybox as the guest's init: what tests of pigeon-init rely on.

use std::{
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use pigeon_lab::{
    Arch, End, Vm, assets,
    disk::{Disk, Image, Tree},
    guest,
    mmds::{Fault, Mmds, Push, Version},
    vm::Builder,
    vsock,
};
use serde_json::json;

/// A VM in which busybox's init runs `script`, with the drivers loaded and eth0 configured as pigeon-init
/// does for MMDS.
fn busybox(script: &str) -> Result<Builder> {
    const SET_UP: &str = "\
        /bin/busybox --install -s /bin\n\
        mkdir -p /proc /sys /mnt && mount -t proc proc /proc && mount -t sysfs sysfs /sys\n\
        mount -t devtmpfs dev /dev\n\
        while read module; do insmod $module; done </pigeon/modules\n\
        [ ! -e /sys/class/net/eth0 ] || ip address add 169.254.169.1/16 dev eth0\n\
        [ ! -e /sys/class/net/eth0 ] || ip link set eth0 up\n";
    const INITTAB: &str = "::sysinit:/bin/busybox sh /script\n\
                           ::ctrlaltdel:/bin/busybox reboot -f\n";
    Ok(Vm::builder()
        .init(&assets::busybox()?)?
        .file("/bin/busybox", 0o755, std::fs::read(assets::busybox()?)?)
        .file("/etc/inittab", 0o644, INITTAB)
        .file("/script", 0o644, [SET_UP, script].concat()))
}

/// A shell function that sends a request to MMDS and prints the response, with `$` for CR.
const ASK: &str =
    "ask() { printf \"$1\" | timeout 1 nc 169.254.169.254 80 | tr '\\r' '$'; echo; }\n";

#[test]
fn what_a_guest_writes_is_on_its_disk_afterwards() -> Result<()> {
    let tree = || Tree::empty()?.file("/hello", 0o644, "from the host\n");
    let [first, second] = [Image::ext4(&tree()?, 16)?, Image::ext4(&tree()?, 16)?];
    let script = guest::report(&[
        ("words", "cat /proc/cmdline; cat /extra"),
        (
            "first",
            "mount /dev/vda /mnt && cat /mnt/hello && echo from the guest >/mnt/answer",
        ),
        ("sync", "umount /mnt"),
        ("read-only", "cat /sys/block/vda/ro /sys/block/vdb/ro"),
        ("processors", "grep -c ^processor /proc/cpuinfo"),
    ]) + "reboot -f\n";
    let mut vm = busybox(&script)?
        .file("/extra", 0o600, "an extra file\n")
        .disk(&first)
        .disk(Disk::from(&second).read_only())
        .arg("SOME=word")
        .cpus(2)
        .boot()?;
    assert_eq!(vm.section("first")?, ["from the host"]);
    assert!(vm.section("words")?[0].ends_with(" SOME=word"));
    assert_eq!(vm.section("words")?[1], "an extra file");
    assert_eq!(vm.section("processors")?, ["2"]);
    assert_eq!(vm.section("read-only")?, ["0", "1"]);
    assert_eq!(vm.wait_end()?, End::Reboot);
    first.check()?;
    second.check()?;
    assert_eq!(first.read("/answer")?, "from the guest\n");
    Ok(())
}

#[test]
fn a_disk_fails_as_configured() -> Result<()> {
    let image = Image::ext4(&Tree::empty()?, 16)?;
    let damaged = "[inject-error]\nevent = \"read_aio\"\nerrno = \"5\"\nsector = \"2\"\n";
    // ENOSPC: the host's disk is full.
    let without_room = "[inject-error]\nevent = \"write_aio\"\nerrno = \"28\"\n";
    let write = "dd if=/dev/zero of=/dev/vdb bs=4k count=1 conv=fsync";
    let script = guest::report(&[("mount", "mount -t ext4 /dev/vda /mnt"), ("write", write)])
        + "reboot -f\n";
    let mut vm = busybox(&script)?
        .disk(Disk::from(&image).blkdebug(damaged))
        .disk(Disk::from(&Image::blank(1)?).blkdebug(without_room))
        .boot()?;
    assert!(vm.section("mount")?.concat().contains("Input/output error"));
    assert!(vm.section("write")?.concat().contains("error"));
    assert_eq!(vm.wait_end()?, End::Reboot);
    Ok(())
}

#[test]
fn a_panic_is_distinguished_from_a_reboot() -> Result<()> {
    let mut vm = busybox("echo c >/proc/sysrq-trigger\n")?.boot()?;
    assert_eq!(vm.wait_end()?, End::Panic);
    Ok(())
}

#[test]
fn the_guest_gets_typed_keys_and_ctrl_alt_del() -> Result<()> {
    let mut vm = busybox("echo ready; read line; echo \"read: $line\"\n")?.boot()?;
    vm.wait_for("ready")?;
    vm.pause()?;
    vm.type_text("a line\n")?;
    vm.resume()?;
    vm.wait_for("read: a line")?;
    if assets::arch().has_keyboard() {
        vm.ctrl_alt_delete()?;
        assert_eq!(vm.wait_end()?, End::Reboot);
    } else {
        assert!(vm.ctrl_alt_delete().is_err());
        assert_eq!(vm.ended()?, None);
    }
    Ok(())
}

#[test]
fn mmds_gives_a_token_and_then_the_document_once_it_is_pushed() -> Result<()> {
    let script = [
        ASK,
        &guest::report(&[
            ("no token", r"ask 'GET / HTTP/1.1\r\nAccept: application/json\r\n\r\n'"),
            ("token", r"ask 'PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 60\r\n\r\n'"),
            (
                "get",
                r#"token=$(ask 'PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 60\r\n\r\n' | tail -n 1)
                for i in 1 2 3; do ask "GET / HTTP/1.1\r\nX-metadata-token: $token\r\nAccept: application/json\r\n\r\n" | tail -n 1; done"#,
            ),
        ]),
        "reboot -f\n",
    ]
    .concat();
    let mmds = Mmds::serving(json!({"b": {"c": [1, null]}, "a": "x"})).push(Push::AfterRequests(2));
    let mut vm = busybox(&script)?.mmds(mmds).on_qemu().boot()?;
    assert_eq!(vm.section("no token")?[0], "HTTP/1.1 401 $");
    let token = vm.section("token")?;
    assert_eq!(
        token[..3],
        [
            "HTTP/1.1 200 $",
            "Server: Firecracker API$",
            "Connection: keep-alive$"
        ]
    );
    assert_eq!(
        token[3..6],
        ["Content-Type: text/plain$", "Content-Length: 48$", "$"]
    );
    assert_eq!(
        vm.section("get")?,
        ["null", "null", r#"{"a":"x","b":{"c":[1,null]}}"#]
    );
    assert_eq!(vm.wait_end()?, End::Reboot);

    let requests = vm.mmds_requests();
    let methods: Vec<_> = requests
        .iter()
        .map(|r| (r.connection, r.method.as_str()))
        .collect();
    assert_eq!(
        methods,
        [
            (0, "GET"),
            (1, "PUT"),
            (2, "PUT"),
            (3, "GET"),
            (4, "GET"),
            (5, "GET")
        ]
    );
    assert_eq!(
        requests[3].header("x-metadata-token"),
        Some(token[6].as_str())
    );
    Ok(())
}

#[test]
fn each_connection_to_mmds_fails_in_its_own_way() -> Result<()> {
    use Fault::*;
    let script = [
        ASK,
        "get() { ask 'GET / HTTP/1.1\\r\\nAccept: application/json\\r\\n\\r\\n'; }\n",
        &guest::report(&[
            ("refuse", "get"),
            ("silent", "get"),
            ("stall", "get"),
            ("reset", "get"),
            (
                "close",
                "time -f %e sh -c 'printf GET | nc 169.254.169.254 80'",
            ),
            ("drip", "get"),
            ("instead", "get"),
            ("fine", "get"),
        ]),
        "reboot -f\n",
    ]
    .concat();
    let mmds = Mmds::serving(json!({"a": 1})).version(Version::V1).faults([
        Refuse,
        Silent,
        Stall(8),
        Reset(12),
        Close(0),
        Drip(Duration::from_millis(1)),
        Instead(b"SSH-2.0\n".to_vec()),
    ]);
    let mut vm = busybox(&script)?.mmds(mmds).boot()?;
    let last_line = |name| anyhow::Ok(vm.section(name)?.pop().unwrap_or_default());
    assert!(vm.section("refuse")?[0].ends_with("Connection refused"));
    // The shell reports the clients that were killed.
    assert_eq!(vm.section("silent")?, ["Terminated", ""]);
    assert_eq!(vm.section("stall")?, ["HTTP/1.1Terminated", ""]);
    assert_eq!(vm.section("reset")?, ["HTTP/1.1 200"]);
    assert!(vm.section("close")?[0].parse::<f32>()? < 0.5);
    assert_eq!(last_line("drip")?, r#"{"a":1}"#);
    assert_eq!(vm.section("instead")?[0], "SSH-2.0");
    assert_eq!(last_line("fine")?, r#"{"a":1}"#);
    assert_eq!(vm.wait_end()?, End::Reboot);
    Ok(())
}

#[test]
fn any_gateway_responds_but_not_an_absent_mmds() -> Result<()> {
    let script = guest::report(&[
        (
            "far",
            "ip address add 10.0.0.2/24 dev eth0
             ip route add 169.254.0.1 dev eth0
             ip route add default via 169.254.0.1
             ping -c 1 -W 5 203.0.113.7",
        ),
        ("mmds", "ping -c 1 -W 1 169.254.169.254"),
    ]) + "reboot -f\n";
    let mut vm = busybox(&script)?.nic().boot()?;
    assert!(vm.section("far")?.concat().contains("1 packets received"));
    assert!(vm.section("mmds")?.concat().contains("0 packets received"));
    assert_eq!(vm.wait_end()?, End::Reboot);
    assert!(!vm.traffic().frames().is_empty());
    Ok(())
}

#[test]
fn deterministic_time_is_repeatable() -> Result<()> {
    let uptime = || {
        let script = guest::report(&[("sched", "head -n 3 /proc/sched_debug /proc/uptime")]);
        let mut vm = busybox(&(script + "reboot -f\n"))?
            .deterministic()
            .without_vsock()
            .boot()?;
        let section = vm.section("sched")?;
        assert_eq!(vm.wait_end()?, End::Reboot);
        anyhow::Ok(section)
    };
    assert_eq!(uptime()?, uptime()?);
    Ok(())
}

#[test]
fn without_modules_no_device_has_a_driver() -> Result<()> {
    let script = guest::report(&[
        (
            "devices",
            "ls /sys/bus/platform/devices | grep -e LNRO0005 -e virtio_mmio",
        ),
        ("drivers", "ls /sys/bus/virtio/devices 2>/dev/null"),
    ]) + "reboot -f\n";
    let mut vm = busybox(&script)?.without_modules().boot()?;
    assert!(!vm.section("devices")?.is_empty());
    assert_eq!(vm.section("drivers")?, [""; 0]);
    assert_eq!(vm.wait_end()?, End::Reboot);
    Ok(())
}

/// The ports of `vsock.c`: the guest's, and the host's to which it sends hello.
const GUEST_PORT: u32 = 20_000;
const HOST_PORT: u32 = 20_001;

/// A VM that only runs `vsock.c`.
fn vsock_vm() -> Result<Builder> {
    let program = assets::guest_program("vsock")?;
    Ok(busybox("exec /vsock\n")?.file("/vsock", 0o755, program))
}

/// A connection in echo mode.
fn echo(vm: &mut Vm) -> Result<UnixStream> {
    let mut stream = vm.connect(GUEST_PORT)?;
    stream.write_all(b"e")?;
    Ok(stream)
}

/// Sends `size` bytes to an echo while reading, and compares the bytes that come back.
fn exchange(stream: &UnixStream, size: usize) -> Result<()> {
    let sent: Vec<u8> = (0..size).map(|n| (n ^ n >> 8 ^ n >> 16) as u8).collect();
    let mut received = vec![0; size];
    thread::scope(|scope| {
        let writer = scope.spawn(|| (&mut &*stream).write_all(&sent));
        let read = (&mut &*stream).read_exact(&mut received);
        if read.is_err() {
            // The writer may block, too.
            stream.shutdown(Shutdown::Both)?;
        }
        let written = writer.join().expect("no panic");
        read.context("the echo stalled")?;
        anyhow::Ok(written?)
    })?;
    ensure!(received == sent, "other bytes came back");
    Ok(())
}

#[test]
fn bulk_data_in_both_directions_does_not_stall() -> Result<()> {
    for cpus in [1, 2] {
        let mut vm = vsock_vm()?.cpus(cpus).boot()?;
        for _ in 0..3 {
            exchange(&echo(&mut vm)?, 8 << 20)?;
        }
        // Several at once, each with its own flow control.
        let streams: Vec<_> = (0..4).map(|_| echo(&mut vm)).collect::<Result<_>>()?;
        thread::scope(|scope| {
            let exchanges: Vec<_> = streams
                .iter()
                .map(|stream| scope.spawn(|| exchange(stream, 1 << 20)))
                .collect();
            exchanges
                .into_iter()
                .try_for_each(|exchange| exchange.join().expect("no panic"))
        })?;
    }
    Ok(())
}

#[test]
fn all_data_sent_before_a_close_arrives_before_the_end() -> Result<()> {
    const SENT: usize = 1 << 20;
    let mut vm = vsock_vm()?.boot()?;
    // A reader that pauses with this much unread: in some cases the guest has closed, and the last bytes have
    // left the guest but are not in the reader's socket yet.
    for unread in (1..=12).map(|n| n * (32 << 10)) {
        let mut stream = vm.connect(GUEST_PORT)?;
        stream.write_all(b"s")?;
        let mut received = vec![0; SENT];
        let (first, last) = received.split_at_mut(SENT - unread);
        stream.read_exact(first)?;
        thread::sleep(Duration::from_millis(300));
        let lost = || format!("with {unread} bytes unread");
        stream.read_exact(last).with_context(lost)?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        let more = stream.read(&mut [0]).with_context(lost)?;
        ensure!(more == 0 && received == vec![b's'; SENT], lost());
    }
    Ok(())
}

#[test]
fn a_connection_before_the_guest_has_booted_does_no_harm() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("vm.vsock");
    let mut vm = vsock_vm()?.vsock(&socket).boot()?;
    // From before the first instruction to the first response.
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut refused = 0;
    let timeout = Duration::from_secs(10);
    let mut stream = loop {
        match vsock::connect(&socket, GUEST_PORT, timeout) {
            Ok(stream) => break stream,
            Err(error) => {
                ensure!(Instant::now() < deadline, "no answer: {error}");
                refused += 1;
            }
        }
    };
    assert!(refused > 0, "the guest was there from the start");
    stream.write_all(b"e")?;
    exchange(&stream, 100_000)?;
    exchange(&echo(&mut vm)?, 100_000)
}

#[test]
fn vsock_continues_after_a_pause() -> Result<()> {
    let mut vm = vsock_vm()?.boot()?;
    let before = echo(&mut vm)?;
    exchange(&before, 1000)?;
    for _ in 0..5 {
        vm.pause()?;
        // Data sent meanwhile is delivered later.
        (&mut &before).write_all(b"meanwhile")?;
        thread::sleep(Duration::from_millis(50));
        vm.resume()?;
        let mut response = [0; 9];
        (&mut &before).read_exact(&mut response)?;
        assert_eq!(&response, b"meanwhile");
        exchange(&echo(&mut vm)?, 1000)?;
    }
    Ok(())
}

#[test]
fn vsock_is_replugged_in_the_vm_and_its_clone_after_a_snapshot() -> Result<()> {
    if assets::arch() != Arch::X86_64 {
        // No machine here supports it.
        assert!(vsock_vm()?.restorable().boot().is_err());
        return Ok(());
    }
    let mut vm = vsock_vm()?.restorable().memory_mib(128).boot()?;
    let before = echo(&mut vm)?;
    exchange(&before, 100_000)?;
    let snapshot = vm.snapshot()?;
    // Open connections are closed, as after a restore by Firecracker.
    assert_eq!((&mut &before).read(&mut [0])?, 0);
    let mut clone = snapshot.restore().start()?;
    vm.resume()?;
    for vm in [&mut clone, &mut vm] {
        exchange(&echo(vm)?, 1 << 20)?;
    }
    // Again, with both.
    let snapshot = clone.snapshot()?;
    exchange(&echo(&mut snapshot.restore().start()?)?, 100_000)?;
    vm.snapshot()?;
    vm.resume()?;
    exchange(&echo(&mut vm)?, 100_000)
}

#[test]
fn a_guest_reaches_listening_ports_of_the_host() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("vm.vsock");
    let mut vm = vsock_vm()?.vsock(&socket).boot()?;
    vm.wait_for("hello: Connection reset by peer")?;
    vm.kill();

    let listener = UnixListener::bind(dir.path().join(format!("vm.vsock_{HOST_PORT}")))?;
    let mut vm = vsock_vm()?.vsock(&socket).boot()?;
    let (mut stream, _) = listener.accept()?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    assert_eq!(said, "hello\n");
    exchange(&echo(&mut vm)?, 1000)
}
