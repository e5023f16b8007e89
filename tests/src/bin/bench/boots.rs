//! The benchmark's VMs: each boots one init for one purpose and prints figures.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use pigeon_lab::{
    Arch, End, Vm,
    assets::{self, Kernel},
    disk::{Disk, Format, Image, Tree},
    http::Client,
    initrd::Initrd,
    vm::Builder,
};
use serde_json::{Value, json};
use tempfile::{NamedTempFile, TempDir};

use crate::{
    guest::Programs,
    trace::{self, Breakdown, Names},
};

/// The result of a boot.
pub struct Told {
    pub figures: Figures,
    /// The parts of its time, if it was traced.
    pub breakdown: Option<Breakdown>,
}

/// What is measured, by name.
pub type Figures = BTreeMap<String, f64>;

/// A program to boot as /init.
#[derive(Clone)]
pub struct Subject {
    pub name: String,
    pub init: PathBuf,
    /// The path of its configuration in the initrd.
    pub config_path: String,
    pub kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// The init of this repository.
    Product,
    /// The sequential floor: no configuration, no network, no API.
    Floor,
    /// The same with parallel mounts.
    Parallel,
    /// Another init.
    Other,
}

impl Kind {
    fn is_floor(self) -> bool {
        matches!(self, Kind::Floor | Kind::Parallel)
    }
}

/// The purpose of a VM.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mode {
    /// Boot, memory, idling, end; configuration in the initrd.
    File,
    /// Boot; configuration from MMDS.
    Mmds,
    /// Boot and end; a document with every field.
    Whole,
    /// The same by MMDS.
    WholeMmds,
    /// Boot; cgroup v2 alone.
    Unified,
    /// Boot; the root is a squashfs below a tmpfs (overlayfs).
    Overlay,
    /// Boot; two processors, in real time.
    TwoProcessors,
    /// Disk requests of two boots of the document with every field.
    Requests,
    /// The end, with a call of /v1/exit_code that waits for it.
    Reader,
    /// The initrd as made by `./build.sh initrd`, which is only unpacked.
    Unpack,
    /// The API in real time.
    Serve,
    /// The processor time of commands.
    Commands,
    /// The boot's system calls.
    Trace,
    /// The boot's system calls with MMDS.
    TraceMmds,
    /// The boot's system calls with the whole document.
    TraceWhole,
    /// The boot's system calls with cgroup v2 alone.
    TraceUnified,
    /// The end's system calls, with a call of /v1/exit_code that waits for it.
    TraceEnd,
    /// The boot's system calls, with a host that waits for the event `ready`.
    Ready,
    /// Boot, with one difference ([`Variant`]).
    Variant,
}

impl Mode {
    /// Whether it applies to this kind of init.
    pub fn suits(self, kind: Kind) -> bool {
        match self {
            Mode::File
            | Mode::Whole
            | Mode::TwoProcessors
            | Mode::Unpack
            | Mode::Trace
            | Mode::TraceWhole
            | Mode::Variant => true,
            Mode::Mmds
            | Mode::WholeMmds
            | Mode::Unified
            | Mode::Overlay
            | Mode::Requests
            | Mode::Reader
            | Mode::Serve
            | Mode::Commands
            | Mode::TraceMmds
            | Mode::TraceUnified
            | Mode::TraceEnd
            | Mode::Ready => !kind.is_floor(),
        }
    }

    /// Whether the document has every field.
    fn is_whole(self) -> bool {
        matches!(
            self,
            Mode::Whole | Mode::WholeMmds | Mode::TraceWhole | Mode::Requests
        )
    }

    /// Whether the file systems are on RAM disks, which respond at once: while the guest waits for
    /// a disk of the host, its clock jumps from timer to timer.
    fn has_ram_disks(self) -> bool {
        self != Mode::Requests
    }

    /// Whether another boot may give other figures: those of a trace do not vary.
    pub fn is_repeated(self) -> bool {
        !matches!(
            self,
            Mode::Unpack
                | Mode::Requests
                | Mode::Commands
                | Mode::Trace
                | Mode::TraceMmds
                | Mode::TraceWhole
                | Mode::TraceUnified
                | Mode::TraceEnd
                | Mode::Ready
        )
    }

    pub fn name(self) -> &'static str {
        match self {
            Mode::File => "file",
            Mode::Mmds => "mmds",
            Mode::Whole => "whole",
            Mode::WholeMmds => "whole-mmds",
            Mode::Unified => "unified",
            Mode::Overlay => "overlay",
            Mode::TwoProcessors => "two-processors",
            Mode::Requests => "requests",
            Mode::Reader => "reader",
            Mode::Unpack => "unpack",
            Mode::Serve => "serve",
            Mode::Commands => "commands",
            Mode::Trace => "trace",
            Mode::TraceMmds => "trace-mmds",
            Mode::TraceWhole => "trace-whole",
            Mode::TraceUnified => "trace-unified",
            Mode::TraceEnd => "trace-end",
            Mode::Ready => "ready",
            Mode::Variant => "variant",
        }
    }
}

/// The difference of a boot.
pub struct Variant {
    pub name: &'static str,
    /// Additional kernel parameters.
    pub arguments: &'static [&'static str],
    /// The root's format, if not ext4.
    pub root: Option<(Format, &'static str)>,
    /// The compressor of the initrd.
    pub compressor: &'static [&'static str],
}

/// The parts of all VMs.
pub struct Lab {
    programs: Programs,
    kernel: Kernel,
    tree: Tree,
    root: Image,
    squashfs: Image,
    volume: Image,
    /// The configuration with every field that `tests/example` has.
    whole: Value,
    names: Names,
}

/// Nanoseconds between two ticks of the stock kernel (CONFIG_HZ=250).
const TICK: f64 = 4e6;

/// RAM disks that the loader copies the disks to: how many, and their size in KiB.
const RAM_DISKS: &str = "rd_nr=2 rd_size=32768";

/// The processor, if it is not the lab's: each that Firecracker runs on has RDRAND, which the
/// kernel trusts (CONFIG_RANDOM_TRUST_CPU). Without it, every inode and process made before the
/// kernel's random numbers are ready costs a hash of 10,000 instructions.
fn cpu(arch: Arch) -> &'static [&'static str] {
    match arch {
        Arch::X86_64 => &["-cpu", "qemu64,+rdrand"],
        Arch::Aarch64 => &[],
    }
}

/// The ports that the workload serves in addition to the API's.
const ECHO_PORT: u32 = 20_000;
const SPAWN_PORT: u32 = 20_001;
const EXEC_PORT: u32 = 20_002;

/// The host's port that events are sent to.
const EVENTS_PORT: u32 = 7077;

/// A host that listens for events, and its thread.
struct Host {
    dir: TempDir,
    lines: mpsc::Receiver<String>,
}

impl Host {
    fn listen() -> Result<Host> {
        let dir = tempfile::tempdir()?;
        let listener = UnixListener::bind(dir.path().join(format!("vm.vsock_{EVENTS_PORT}")))?;
        let (send, lines) = mpsc::channel();
        thread::spawn(move || {
            // It runs until the process exits: the VM connects once.
            if let Ok((stream, _)) = listener.accept() {
                let lines = BufReader::new(stream).lines().map_while(Result::ok);
                lines.for_each(|line| drop(send.send(line)));
            }
        });
        Ok(Host { dir, lines })
    }

    fn vsock(&self) -> PathBuf {
        self.dir.path().join("vm.vsock")
    }

    fn check_ready_event(&self) -> Result<()> {
        let line = self.lines.recv_timeout(Duration::from_secs(10));
        let line = line.context("the host has received no event")?;
        ensure!(
            line == r#"{"event":"ready"}"#,
            "the host has received {line}"
        );
        Ok(())
    }
}

impl Lab {
    pub fn new() -> Result<Lab> {
        let programs = Programs::compile()?;
        let tree = Tree::busybox()?
            .file("bin/workload", 0o755, fs::read(programs.path("workload"))?)?
            .file("bin/servers", 0o755, fs::read(programs.path("servers"))?)?
            .dir("newroot", 0o755)?;
        let example = assets::repository().join("tests/example/run.json");
        let mut whole: Value = serde_json::from_slice(&fs::read(example)?)?;
        whole["ExecOverride"] = json!(["/bin/workload"]);
        // Only root can read the kernel's log.
        whole["UserOverride"] = json!("root");
        Ok(Lab {
            root: Image::ext4(&tree, 32)?,
            squashfs: Image::packed(&tree, Format::Squashfs)?,
            tree,
            volume: Image::ext4(&Tree::empty()?, 16)?,
            whole,
            kernel: assets::kernel()?,
            names: programs.system_calls()?,
            programs,
        })
    }

    /// Size of an initrd with only this init.
    pub fn initrd_size(&self, subject: &Subject) -> Result<usize> {
        if subject.kind == Kind::Product {
            return Ok(assets::initrd()?.len());
        }
        let mut initrd = Initrd::default();
        initrd.file("/init", 0o755, fs::read(&subject.init)?);
        Ok(initrd.archive().len())
    }

    /// One of the compiled programs.
    pub fn program(&self, name: &str) -> PathBuf {
        self.programs.path(name)
    }

    /// Boots `subject`, with its /init started at this phase between two ticks of the kernel.
    pub fn boot(&self, subject: &Subject, mode: Mode, phase: f64) -> Result<Told> {
        // Copies, as a mount modifies them, which the next boot would find.
        let root = match mode {
            Mode::Overlay => scratch(&self.squashfs)?,
            _ => scratch(&self.root)?,
        };
        let volume = scratch(&self.volume)?;
        let boot = || {
            let mut builder = self
                .builder(subject, mode, phase, &[])?
                .disk(Disk::file(root.path()))
                .name(&format!("bench-{}-{}", subject.name, mode.name()))
                .qemu(cpu(assets::arch()))
                .quiet();
            if mode.is_whole() {
                builder = builder.disk(Disk::file(volume.path()));
            }
            let host = match mode {
                Mode::Ready => Some(Host::listen()?),
                _ => None,
            };
            if let Some(host) = &host {
                builder = builder
                    .vsock(&host.vsock())
                    .arg(&format!("PIGEON_EVENTS_PORT={EVENTS_PORT}"));
            }
            builder = match mode {
                Mode::Serve | Mode::Requests | Mode::TwoProcessors => builder.on_qemu(),
                _ => builder.deterministic(),
            };
            let mut vm = builder.boot()?;
            let result = measure(&mut vm, mode).and_then(|figures| {
                let breakdown = self.breakdown(&vm.console(), &figures, mode)?;
                Ok(Told { figures, breakdown })
            });
            let result = result.and_then(|mut result| {
                if let Some(host) = &host {
                    host.check_ready_event()?;
                    let time = trace::ready(&vm.console(), &self.names)?;
                    result.figures.insert("ready_us".into(), time);
                }
                Ok(result)
            });
            result.with_context(|| {
                let log = vm.serial().log().display();
                format!("the console ({log}) ends with\n{}\n", vm.serial().tail(10))
            })
        };
        let mut result = boot()?;
        if mode == Mode::Requests {
            let again = boot()?.figures;
            let again = again
                .into_iter()
                .map(|(name, value)| (name + "_again", value));
            result.figures.extend(again);
        }
        Ok(result)
    }

    /// Boots the product with a difference.
    pub fn boot_variant(&self, subject: &Subject, variant: &Variant) -> Result<Figures> {
        let packed = match variant.root {
            Some((format, _)) => Some(Image::packed(&self.tree, format)?),
            None => None,
        };
        let root = scratch(packed.as_ref().unwrap_or(&self.root))?;
        let mut builder = self
            .builder(
                subject,
                Mode::Variant,
                0.0,
                variant.root.map(|(_, module)| module).as_slice(),
            )?
            .disk(Disk::file(root.path()))
            .name("bench-variant")
            .qemu(cpu(assets::arch()))
            .compressed(variant.compressor)
            .deterministic()
            .quiet();
        for argument in variant.arguments {
            builder = builder.arg(argument);
        }
        let mut vm = builder.boot()?;
        let mut figures = measure(&mut vm, Mode::Variant)?;
        // The workload's first lines are printed after the boot's.
        let console = vm.console();
        let bytes = console.split("bench: ").next().map_or(0, str::len);
        figures.insert("console_bytes".into(), bytes as f64);
        Ok(figures)
    }

    fn breakdown(&self, console: &str, figures: &Figures, mode: Mode) -> Result<Option<Breakdown>> {
        let instant = |name| figures.get(name).copied().unwrap_or_default() / 1e3;
        Ok(match mode {
            Mode::Trace | Mode::TraceMmds | Mode::TraceWhole | Mode::TraceUnified => {
                let (from, to) = (instant("exec_at_ns"), instant("first_at_ns"));
                Some(trace::boot(console, from, to, &self.names))
            }
            Mode::TraceEnd => Some(trace::end(console, &self.names)?),
            _ => None,
        })
    }

    /// A VM with the loader as the kernel's /init, its instructions in /bench, and the init under
    /// test.
    ///
    /// `modules` are additional ones that the root needs.
    fn builder(
        &self,
        subject: &Subject,
        mode: Mode,
        phase: f64,
        modules: &[&str],
    ) -> Result<Builder> {
        let init = match subject.kind {
            Kind::Floor if mode.is_whole() => self.program("floor-whole"),
            Kind::Parallel if mode.is_whole() => self.program("parallel-whole"),
            _ => subject.init.clone(),
        };
        let mut builder = Vm::builder()
            .without_modules()
            .init(&init)?
            .arg("rdinit=/bench/load")
            .arg("PIGEON_EXIT_LINGER_MS=0");
        if mode != Mode::Variant {
            // Their self-tests are two thirds of the boot before /init, and not measured.
            builder = builder.arg("cryptomgr.notests");
        }
        let mut files = vec!["/bench/load".to_string(), "/bench/files".into()];
        builder = builder.file("/bench/load", 0o755, fs::read(self.programs.path("load"))?);
        let mut add = |builder: Builder, name: &str, contents: Vec<u8>| {
            let path = format!("/bench/{name}");
            files.push(path.clone());
            builder.file(&path, 0o644, contents)
        };
        if mode == Mode::Unpack {
            // The initrd has little more than the init.
            builder = add(builder, "unpack", b"please".to_vec());
            return Ok(builder.arg("initramfs_async=0"));
        }
        let mut document = match mode.is_whole() {
            true => self.whole.clone(),
            false => {
                json!({"ImageConfig": {"Cmd": ["/bin/workload"]}, "ExecOverride": ["/bin/workload"]})
            }
        };
        if matches!(mode, Mode::Whole | Mode::TraceWhole | Mode::Requests) {
            // On a tap device, as with Firecracker: only there checksum offload can be switched.
            builder = builder.tap().arg("PIGEON_CONFIG=file");
        }
        if mode == Mode::TwoProcessors {
            builder = builder.cpus(2);
        }
        let mut more = modules.to_vec();
        if mode.has_ram_disks() {
            document["RootDevice"] = json!("/dev/ram0");
            if let Some(volume) = document.pointer_mut("/Mounts/0/DevicePath") {
                *volume = json!("/dev/ram1");
            }
        }
        if mode == Mode::Overlay {
            document["RootOverlay"] = json!("tmpfs");
            more.extend(["squashfs", "overlay"]);
        }
        if matches!(mode, Mode::Unified | Mode::TraceUnified) {
            builder = builder.arg("PIGEON_CGROUPS=unified");
        }
        let more: Vec<_> = more.into_iter().map(String::from).collect();
        let mut modules = self.kernel.modules_and(&more)?;
        if mode.has_ram_disks() {
            modules.push(("brd.ko".into(), assets::module("brd")?));
        }
        if matches!(mode, Mode::Mmds | Mode::WholeMmds | Mode::TraceMmds) {
            modules.push(("veth.ko".into(), assets::module("veth")?));
            builder = add(builder, "run.json", document.to_string().into());
        } else if !subject.kind.is_floor() {
            builder = builder.file(&subject.config_path, 0o600, document.to_string());
        }
        let phase = (phase * TICK).round();
        builder = add(builder, "phase", phase.to_string().into());
        let mut list = String::new();
        for (name, contents) in modules {
            let parameters = match name == "brd.ko" {
                true => RAM_DISKS,
                false => "",
            };
            list += format!("/bench/lib/{name} {parameters}").trim_end();
            list += "\n";
            builder = builder.file(&format!("/bench/lib/{name}"), 0o644, contents);
        }
        builder = add(builder, "modules", list.into());
        if matches!(
            mode,
            Mode::Trace
                | Mode::TraceMmds
                | Mode::TraceWhole
                | Mode::TraceUnified
                | Mode::TraceEnd
                | Mode::Ready
        ) {
            let end = if mode == Mode::TraceEnd {
                trace::ORDERS_AT_END
            } else {
                ""
            };
            builder = add(
                builder,
                "trace",
                (trace::orders(assets::arch()) + end).into(),
            );
        }
        let list = files.join("\n") + "\n";
        builder = builder.file("/bench/files", 0o644, list);
        let workload = match mode {
            Mode::File => "full",
            Mode::Mmds
            | Mode::Whole
            | Mode::WholeMmds
            | Mode::Unified
            | Mode::Overlay
            | Mode::TwoProcessors
            | Mode::Unpack
            | Mode::Variant => "boot",
            Mode::Reader | Mode::Requests => "reader",
            Mode::Serve | Mode::Commands => "serve",
            Mode::Trace | Mode::TraceMmds | Mode::TraceWhole | Mode::TraceUnified | Mode::Ready => {
                "trace"
            }
            Mode::TraceEnd => "end",
        };
        Ok(builder.arg(&format!("bench.mode={workload}")))
    }
}

/// A copy of an image, in the host's memory and deleted after the boot.
fn scratch(image: &Image) -> Result<NamedTempFile> {
    let copy = tempfile::Builder::new()
        .suffix(".ext4")
        .tempfile_in("/dev/shm")?;
    fs::copy(image.path(), copy.path())?;
    Ok(copy)
}

fn measure(vm: &mut Vm, mode: Mode) -> Result<Figures> {
    let mut figures = Figures::new();
    match mode {
        Mode::Reader | Mode::TraceEnd => {
            vm.wait_for("bench: boot_ns")?;
            let mut reader = vm.api()?;
            reader.send(b"GET /v1/exit_code HTTP/1.1\r\nHost: bench\r\n\r\n")?;
            // After these responses, the call before them has been read.
            let mut other = vm.api()?;
            for _ in 0..3 {
                other.get("/v1/status")?.success()?;
            }
            vm.type_text("\n")?;
            let response = reader.receive(false)?.json()?;
            ensure!(response["code"] == 7, "the exit code is {response}");
        }
        Mode::Requests => {
            vm.wait_for("bench: boot_ns")?;
            requests(vm, &mut figures)?;
            vm.type_text("\n")?;
        }
        Mode::Serve => {
            vm.wait_for("bench: serving")?;
            serve(vm, &mut figures)?;
            vm.type_text("\n")?;
        }
        Mode::Commands => {
            vm.wait_for("bench: serving")?;
            commands(vm, &mut figures)?;
            vm.type_text("\n")?;
        }
        _ => {}
    }
    let end = vm.wait_end()?;
    let console = vm.console();
    ensure!(end == End::Reboot, "the VM ended with {end:?}");
    read_figures(&console, &mut figures)?;
    if let (Some(exit), Some(reboot)) = (figures.get("exit_at_us"), reboot_instant(&console)) {
        figures.insert("end_us".into(), reboot * 1e6 - exit);
    }
    Ok(figures)
}

/// Adds the number of disk requests so far.
fn requests(vm: &mut Vm, figures: &mut Figures) -> Result<()> {
    let stats = vm.qmp("query-blockstats", json!({}))?;
    let devices = stats.as_array().context("no devices")?;
    for (name, field) in [("writes", "wr_operations"), ("flushes", "flush_operations")] {
        let counts = devices.iter().map(|device| device["stats"][field].as_f64());
        let count: Option<f64> = counts.sum();
        figures.insert(name.into(), count.context("no count")?);
    }
    Ok(())
}

/// Adds the figures that a VM has printed on its console.
fn read_figures(console: &str, figures: &mut Figures) -> Result<()> {
    for line in console.lines() {
        let Some((_, figure)) = line.split_once("bench: ") else {
            continue;
        };
        let (name, value) = figure.split_once(' ').context("an incomplete figure")?;
        ensure!(name != "error", "{figure}");
        let value = value.trim_end();
        figures.insert(
            name.into(),
            value
                .parse()
                .with_context(|| format!("{name}: {value:?}"))?,
        );
    }
    Ok(())
}

/// When the kernel restarted the machine, in seconds of its log's clock.
fn reboot_instant(console: &str) -> Option<f64> {
    let (before, _) = console.split_once("] reboot: Restarting system")?;
    before.rsplit_once('[')?.1.trim().parse().ok()
}

/// Round trips and commands, alternating between the API and the bare servers, so that the
/// conditions are the same.
fn serve(vm: &mut Vm, figures: &mut Figures) -> Result<()> {
    const ROUND_TRIPS: usize = 1000;
    const CONNECTIONS: usize = 300;
    const COMMANDS: usize = 1000;
    const BATCH: usize = 50;
    const STATUS: &[u8] = b"GET /v1/status HTTP/1.1\r\nHost: localhost\r\n\r\n";

    let ports = [("status", pigeon_lab::vsock::API_PORT), ("echo", ECHO_PORT)];
    let mut streams = vec![];
    for (_, port) in ports {
        streams.push(vm.connect(port)?);
    }
    let mut times = [vec![], vec![]];
    for _ in 0..ROUND_TRIPS {
        for (stream, times) in streams.iter_mut().zip(&mut times) {
            times.push(timed(|| exchange(stream, STATUS))?);
        }
    }
    for ((name, _), times) in ports.iter().zip(&mut times) {
        figures.insert(format!("{name}_us"), median(times));
    }
    drop(streams);

    let mut times = [vec![], vec![]];
    for _ in 0..CONNECTIONS {
        for ((_, port), times) in ports.iter().zip(&mut times) {
            times.push(timed(|| exchange(&mut vm.connect(*port)?, STATUS))?);
        }
    }
    for ((name, _), times) in ports.iter().zip(&mut times) {
        figures.insert(format!("{name}_connect_us"), median(times));
    }

    let mut api = vm.api()?;
    let mut least = Client::new(vm.connect(EXEC_PORT)?);
    let mut bare = vm.connect(SPAWN_PORT)?;
    let [mut api_us, mut least_us, mut bare_us] = [0.0; 3];
    for _ in 0..COMMANDS / BATCH {
        api_us += timed(|| exec(&mut api, BATCH))?;
        least_us += timed(|| exec(&mut least, BATCH))?;
        bare_us += timed(|| exchange(&mut bare, format!("{BATCH}\n").as_bytes()))?;
    }
    figures.insert("exec_us".into(), api_us / COMMANDS as f64);
    figures.insert("least_us".into(), least_us / COMMANDS as f64);
    figures.insert("spawn_us".into(), bare_us / COMMANDS as f64);
    Ok(())
}

/// Executes a command that often.
fn exec(api: &mut Client<UnixStream>, times: usize) -> Result<()> {
    for _ in 0..times {
        let command = json!({"cmd": ["/bin/true"]});
        let response: Value = api.post("/v1/exec", &command)?.success()?.json()?;
        ensure!(response["exit_code"] == 0, "/bin/true: {response}");
    }
    Ok(())
}

/// Writes a message, and reads one.
fn exchange(stream: &mut UnixStream, message: &[u8]) -> Result<()> {
    let mut buffer = [0; 4096];
    stream.write_all(message)?;
    ensure!(stream.read(&mut buffer)? > 0, "no answer");
    Ok(())
}

/// The cost of commands in the guest, without host and transport: the time in which processes ran.
fn commands(vm: &mut Vm, figures: &mut Figures) -> Result<()> {
    const COMMANDS: usize = 1000;
    let mut api = vm.api()?;
    let mut least = Client::new(vm.connect(EXEC_PORT)?);
    let mut bare = vm.connect(SPAWN_PORT)?;
    let mut runs: [(_, &mut dyn FnMut() -> Result<()>); 3] = [
        ("exec_busy_us", &mut || exec(&mut api, COMMANDS)),
        ("least_busy_us", &mut || exec(&mut least, COMMANDS)),
        ("spawn_busy_us", &mut || {
            exchange(&mut bare, format!("{COMMANDS}\n").as_bytes())
        }),
    ];
    for (name, run) in &mut runs {
        let before = busy_us(vm)?;
        run()?;
        figures.insert((*name).into(), (busy_us(vm)? - before) / COMMANDS as f64);
    }
    Ok(())
}

/// Microseconds for which processes ran, including the kernel's
/// (Documentation/scheduler/sched-stats.rst: the seventh number of a processor). Ticks would miss
/// shorter times.
fn busy_us(vm: &mut Vm) -> Result<f64> {
    let command = json!({"cmd": ["cat", "/proc/schedstat"]});
    let response = vm.api()?.post("/v1/exec", &command)?.success()?.json()?;
    let text = response["stdout"].as_str().context("no output")?;
    let cpu = text.lines().find(|line| line.starts_with("cpu0 "));
    let ran = cpu.and_then(|cpu| cpu.split(' ').nth(7));
    Ok(ran.context("no line for cpu0")?.parse::<f64>()? / 1e3)
}

/// How long `f` takes, in microseconds.
fn timed(f: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    f()?;
    Ok(start.elapsed().as_secs_f64() * 1e6)
}

/// The median of some values.
pub fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    let (low, high) = (values[(values.len() - 1) / 2], values[values.len() / 2]);
    (low + high) / 2.0
}
