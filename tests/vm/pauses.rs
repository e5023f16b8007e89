//! A machine that is paused for a minute, in each state of PID 1.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use pigeon_lab::{
    End, Vm, assets,
    disk::{Image, Tree},
    guest,
    mmds::{Mmds, Push},
    vm::Builder,
    vsock,
    ws::Socket,
};
use serde_json::{Value, json};

/// Long, as other VMs may run at the same time.
const TIMEOUT: Duration = Duration::from_secs(180);

/// Longer than any timeout of PID 1.
const MINUTE: Duration = Duration::from_secs(60);

/// Time until the host pushes the document: meanwhile a disk is throttled.
const PUSH: Duration = Duration::from_secs(4);

fn disks() -> Result<(Image, Image)> {
    let volume = Image::ext4(&Tree::empty()?, 32)?;
    Ok((Image::ext4(&Tree::busybox()?, 32)?, volume))
}

fn with_volume(script: &str) -> Value {
    guest::shell(
        script,
        json!({"Mounts": [{"DevicePath": "/dev/vdb", "MountPath": "/data"}]}),
    )
}

fn boot(builder: Builder, root: &Image, volume: &Image) -> Result<Vm> {
    let builder = builder.disk(root).disk(volume);
    builder.timeout(TIMEOUT).boot()
}

/// The shutdown is clean, without warnings or errors.
fn assert_clean(mut vm: Vm, root: &Image, volume: &Image) -> Result<()> {
    assert_eq!(vm.wait_end()?, End::Reboot);
    let console = vm.console();
    assert_eq!(guest::warnings(&console), [""; 0], "{console}");
    assert!(!console.contains("level=error"), "{console}");
    root.check()?;
    volume.check()
}

/// Sets a disk's bytes per second.
fn throttle(vm: &mut Vm, disk: &str, rate: u64) -> Result<()> {
    let limits = json!({"device": disk, "bps": rate, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0});
    vm.qmp("block_set_io_throttle", limits).map(drop)
}

/// A VM that polls MMDS, whose document is pushed after [`PUSH`].
fn boot_by_mmds(document: Value, root: &Image, volume: &Image) -> Result<Vm> {
    let mmds = Mmds::serving(document).push(Push::After(PUSH));
    // Only QEMU records requests, and can throttle disks.
    let builder = Vm::builder().mmds(mmds).on_qemu();
    let vm = boot(builder.arg("PIGEON_MMDS_TIMEOUT_MS=20000"), root, volume)?;
    let start = Instant::now();
    while vm.mmds_requests().is_empty() {
        ensure!(start.elapsed() < TIMEOUT, "MMDS is not polled");
        thread::sleep(Duration::from_millis(20));
    }
    Ok(vm)
}

fn while_waiting_for_metadata() -> Result<()> {
    let (root, volume) = disks()?;
    let mut vm = boot_by_mmds(with_volume("exit 5"), &root, &volume)?;
    // Longer than the timeout, and the document is pushed meanwhile.
    vm.freeze(MINUTE)?;
    vm.wait_for("configuration loaded\" source=mmds")?;
    vm.wait_for("exit_code=5")?;
    assert_clean(vm, &root, &volume)
}

fn while_waiting_for_the_root_device() -> Result<()> {
    /// The disk's driver is loaded after a line of input.
    const INIT: &str = "#!/busybox sh
        /busybox mount -t devtmpfs dev /dev
        (read -r line </dev/console; exec /busybox insmod /driver) &
        exec /product";
    let (root, volume) = disks()?;
    let mut builder = Vm::builder().without_modules();
    let mut list = String::new();
    for (name, contents) in assets::kernel()?.modules()? {
        if name.contains("virtio_blk") {
            builder = builder.file("/driver", 0o644, contents);
        } else {
            list += &format!("/pigeon/lib/{name}\n");
            builder = builder.file(&format!("/pigeon/lib/{name}"), 0o644, contents);
        }
    }
    let product = std::fs::read(assets::build_dir().join("init"))?;
    let builder = builder
        .file("/pigeon/modules", 0o644, list)
        .file("/busybox", 0o755, std::fs::read(assets::busybox()?)?)
        .file("/product", 0o755, product)
        .file("/init", 0o755, INIT)
        .config(&with_volume("exit 5"));
    let mut vm = boot(builder, &root, &volume)?;
    vm.wait_for("configuration loaded")?;
    // The timeout for the device is two seconds.
    thread::sleep(Duration::from_millis(200));
    vm.freeze_and(MINUTE, |vm| vm.type_text("\n"))?;
    vm.wait_for("exit_code=5")?;
    assert_clean(vm, &root, &volume)
}

fn while_mounting_the_root() -> Result<()> {
    let (root, volume) = disks()?;
    let mut vm = boot_by_mmds(with_volume("exit 5"), &root, &volume)?;
    throttle(&mut vm, "disk0", 1)?;
    vm.wait_for("configuration loaded")?;
    thread::sleep(Duration::from_secs(1));
    vm.freeze(MINUTE)?;
    // The mount does not time out.
    thread::sleep(Duration::from_secs(2));
    throttle(&mut vm, "disk0", 1 << 30)?;
    vm.wait_for("exit_code=5")?;
    assert_clean(vm, &root, &volume)
}

fn while_mounting_a_volume() -> Result<()> {
    let (root, volume) = disks()?;
    let mut vm = boot_by_mmds(with_volume("exit 5"), &root, &volume)?;
    throttle(&mut vm, "disk1", 1)?;
    // The root is mounted, as the API is up.
    let (mut api, mut waiting) = (vm.api()?, vm.api()?);
    waiting.send(b"GET /v1/exit_code HTTP/1.1\r\nHost: x\r\n\r\n")?;
    vm.freeze(MINUTE)?;
    assert_eq!(api.get("/v1/status")?.status, 200);
    thread::sleep(Duration::from_secs(2));
    throttle(&mut vm, "disk1", 1 << 30)?;
    assert_eq!(waiting.receive(false)?.json()?["code"], 5);
    assert_clean(vm, &root, &volume)
}

/// With a command, a session, a half-sent request and a waiting client.
fn while_the_workload_runs() -> Result<()> {
    let (root, volume) = disks()?;
    let script = "echo ready; read -r line; echo kept >/data/last";
    let builder = Vm::builder().config(&with_volume(script));
    let mut vm = boot(builder, &root, &volume)?;
    vm.wait_for("ready")?;
    let (mut api, mut waiting, mut command, mut slow) =
        (vm.api()?, vm.api()?, vm.api()?, vm.api()?);
    waiting.send(b"GET /v1/exit_code HTTP/1.1\r\nHost: x\r\n\r\n")?;
    slow.send(b"GET /v1/status HTTP/1.1\r\nHo")?;
    let mut exec = |words: &[&str]| -> Result<Value> {
        let response = api.post("/v1/exec", &json!({"cmd": words}))?.success()?;
        let response = response.json()?;
        ensure!(response["exit_code"] == 0, "{response}");
        Ok(response["stdout"].clone())
    };
    exec(&["mkfifo", "/run/go"])?;
    let body = r#"{"cmd":["sh","-c","echo begun >/dev/console; read -r line </run/go; echo done"],"timeout_ms":10000}"#;
    let head = "POST /v1/exec HTTP/1.1\r\nHost: x\r\nContent-Length: ";
    command.send(format!("{head}{}\r\n\r\n{body}", body.len()).as_bytes())?;
    let mut session = Socket::open(vm.connect(vsock::API_PORT)?, "/v1/ws/exec")?;
    session.text(&json!({"command": ["cat"]}))?;
    vm.wait_for("begun")?;
    let mut seconds = || -> Result<u64> {
        let uptime = exec(&["cut", "-d.", "-f1", "/proc/uptime"])?;
        Ok(uptime.as_str().unwrap_or_default().trim().parse()?)
    };
    let before = seconds()?;
    vm.freeze(MINUTE)?;
    let passed = seconds()? - before;
    assert!(passed >= MINUTE.as_secs(), "{passed}");
    slow.send(b"st: x\r\n\r\n")?;
    assert_eq!(slow.receive(false)?.status, 200);
    session.binary(b"still here\n")?;
    session.output_with("still here")?;
    exec(&["sh", "-c", "echo >/run/go"])?;
    let response = command.receive(false)?.json()?;
    let response = (&response["exit_code"], &response["stdout"]);
    assert_eq!(response, (&json!(0), &json!("done\n")));
    vm.type_text("\n")?;
    assert_eq!(waiting.receive(false)?.json()?["code"], 0);
    assert_clean(vm, &root, &volume)?;
    assert_eq!(volume.read("/last")?, "kept\n");
    Ok(())
}

/// The hypervisor's own pause: on QEMU the clock stops, too.
fn while_the_workload_runs_without_a_clock() -> Result<()> {
    let (root, volume) = disks()?;
    let builder = Vm::builder().config(&with_volume("echo ready; read -r line; exit 9"));
    let mut vm = boot(builder.without_vsock(), &root, &volume)?;
    vm.wait_for("ready")?;
    vm.pause()?;
    vm.stand_still(MINUTE)?;
    vm.resume()?;
    vm.type_text("\n")?;
    vm.wait_for("exit_code=9")?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check()?;
    volume.check()
}

/// A pause that begins while PID 1 is busy.
fn while_output_is_drained() -> Result<()> {
    let (root, volume) = disks()?;
    let builder = Vm::builder().config(&with_volume("read -r line"));
    let mut vm = boot(builder, &root, &volume)?;
    let mut api = vm.api()?;
    // Takes about two seconds here, of a timeout of nine, which is shorter than the pause.
    let mut blocks = 2048;
    let all = json!({"cmd": ["dd", "if=/dev/zero", "bs=64k", format!("count={blocks}")], "timeout_ms": 120_000});
    let start = Instant::now();
    api.post("/v1/exec", &all)?.success()?;
    let took = start.elapsed().as_millis().max(1);
    blocks = blocks.min((blocks * 2000 / took).max(1));
    for round in 0..MINUTE.as_secs() / 10 {
        let script =
            format!("echo begun {round} >/dev/console; exec dd if=/dev/zero bs=64k count={blocks}");
        let body = json!({"cmd": ["sh", "-c", script], "timeout_ms": 9000}).to_string();
        let head = "POST /v1/exec HTTP/1.1\r\nHost: x\r\nContent-Length: ";
        api.send(format!("{head}{}\r\n\r\n{body}", body.len()).as_bytes())?;
        vm.wait_for(&format!("begun {round}"))?;
        thread::sleep(Duration::from_millis(100));
        vm.freeze(Duration::from_secs(10))?;
        let response = api.receive(false)?.json()?;
        assert_eq!(response["exit_code"], 0, "in round {round}");
    }
    vm.type_text("\n")?;
    assert_eq!(api.get("/v1/exit_code")?.json()?["code"], 0);
    assert_clean(vm, &root, &volume)
}

fn while_a_workload_is_asked_to_stop() -> Result<()> {
    let (root, volume) = disks()?;
    let script = "mkfifo /run/go; trap 'echo asked; read -r line </run/go; exit 7' TERM
        echo ready; while :; do sleep 0.05; done";
    let builder = Vm::builder().config(&with_volume(script));
    let mut vm = boot(builder, &root, &volume)?;
    vm.wait_for("ready")?;
    let mut api = vm.api()?;
    vm.stop()?;
    vm.wait_for("asked")?;
    // The timeout is ten seconds.
    vm.freeze(MINUTE)?;
    let go = json!({"cmd": ["sh", "-c", "echo >/run/go"]});
    api.post("/v1/exec", &go)?.success()?;
    assert_eq!(api.get("/v1/exit_code")?.json()?["code"], 7);
    assert_clean(vm, &root, &volume)
}

fn while_a_late_reader_is_waited_for() -> Result<()> {
    let (root, volume) = disks()?;
    let builder = Vm::builder().config(&with_volume("exit 8"));
    let builder = builder.arg("PIGEON_EXIT_LINGER_MS=30000");
    let mut vm = boot(builder, &root, &volume)?;
    vm.wait_for("exit_code=8")?;
    vm.freeze(MINUTE)?;
    assert_eq!(vm.api()?.get("/v1/exit_code")?.json()?["code"], 8);
    assert_clean(vm, &root, &volume)
}

fn while_what_is_left_is_asked_to_go() -> Result<()> {
    let (root, volume) = disks()?;
    // It ignores SIGTERM: the timeout is half a second.
    let script = r#"
        setsid sh -c 'trap "echo asked >/dev/console" TERM; echo >/run/up; while :; do echo $((n += 1)) >>/data/log; sleep 0.02; done' &
        while [ ! -e /run/up ]; do sleep 0.05; done"#;
    let builder = Vm::builder().config(&with_volume(script));
    let mut vm = boot(builder, &root, &volume)?;
    vm.wait_for("asked")?;
    vm.freeze(MINUTE)?;
    assert_clean(vm, &root, &volume)?;
    assert!(volume.read("/log")?.starts_with("1\n2\n"));
    Ok(())
}

fn while_unmounting() -> Result<()> {
    let (root, volume) = disks()?;
    let script = "echo ready; read -r line; dd if=/dev/zero of=/data/file bs=64k count=128 2>/dev/null; echo kept >/data/last";
    let builder = Vm::builder().config(&with_volume(script)).on_qemu();
    let mut vm = boot(builder, &root, &volume)?;
    vm.wait_for("ready")?;
    let mut waiting = vm.api()?;
    waiting.send(b"GET /v1/exit_code HTTP/1.1\r\nHost: x\r\n\r\n")?;
    // Slow enough for the pause to begin while it is unmounted.
    throttle(&mut vm, "disk1", 1 << 20)?;
    vm.type_text("\n")?;
    assert_eq!(waiting.receive(false)?.json()?["code"], 0);
    thread::sleep(Duration::from_secs(2));
    assert!(vm.ended()?.is_none(), "the disk is too fast for this test");
    // The timeout for disks is thirty seconds.
    vm.freeze(MINUTE)?;
    assert_clean(vm, &root, &volume)?;
    assert_eq!(volume.read("/last")?, "kept\n");
    Ok(())
}

fn while_the_console_gets_its_last_bytes() -> Result<()> {
    /// More than the buffers up to the reader hold, and less than those and a pipe.
    const SIZE: usize = 100_000;
    let (root, volume) = disks()?;
    let script = format!("echo ready; read -r line; head -c {SIZE} /dev/zero | tr '\\0' x");
    let builder = Vm::builder().config(&with_volume(&script));
    let mut vm = boot(builder.firecrackers_console(), &root, &volume)?;
    vm.wait_for("ready")?;
    let mut waiting = vm.api()?;
    waiting.send(b"GET /v1/exit_code HTTP/1.1\r\nHost: x\r\n\r\n")?;
    vm.serial().hold();
    vm.type_text("\n")?;
    assert_eq!(waiting.receive(false)?.json()?["code"], 0);
    thread::sleep(Duration::from_secs(1));
    assert!(vm.ended()?.is_none(), "the console buffers all of it");
    // The timeout for a stalled console is three seconds.
    vm.freeze(MINUTE)?;
    vm.serial().release();
    vm.wait_for("exit_code=0")?;
    let console = vm.console();
    assert_clean(vm, &root, &volume)?;
    // The kernel may print a message about a stalled processor in between.
    let runs = console.split(|c| c != 'x').map(str::len);
    assert_eq!(runs.filter(|&run| run > 100).sum::<usize>(), SIZE);
    Ok(())
}

/// A state, and its test.
type State = (&'static str, fn() -> Result<()>);

#[test]
fn a_pause_of_a_minute_changes_nothing_in_any_state() -> Result<()> {
    let states: [State; 12] = [
        ("metadata", while_waiting_for_metadata),
        ("device", while_waiting_for_the_root_device),
        ("root", while_mounting_the_root),
        ("volume", while_mounting_a_volume),
        ("running", while_the_workload_runs),
        ("paused", while_the_workload_runs_without_a_clock),
        ("busy", while_output_is_drained),
        ("stop", while_a_workload_is_asked_to_stop),
        ("linger", while_a_late_reader_is_waited_for),
        ("leftovers", while_what_is_left_is_asked_to_go),
        ("unmounting", while_unmounting),
        ("console", while_the_console_gets_its_last_bytes),
    ];
    // All at once: a stopped machine uses no processor.
    let failed = thread::scope(|scope| {
        let running = states.map(|(name, state)| {
            let thread = thread::Builder::new().name(format!("pause.{name}"));
            (name, thread.spawn_scoped(scope, state).expect("a thread"))
        });
        let ended = running.map(|(name, state)| match state.join() {
            Ok(Ok(())) => None,
            Ok(Err(why)) => Some(format!("{name}: {why:#}")),
            Err(_) => Some(format!("{name}: see above")),
        });
        Vec::from_iter(ended.into_iter().flatten())
    });
    ensure!(failed.is_empty(), "{}", failed.join("\n"));
    Ok(())
}
