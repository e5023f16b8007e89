//! QEMU under software emulation, with the machines that are closest to Firecracker's: they run
//! anywhere.

use std::{
    fs,
    os::unix::net::UnixStream,
    process::{Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::{
    End, GUEST_CID, GUEST_MAC, HostPort, LONE_TAP, Machine, Nic, Spec, beside_tap,
    vsock_device::VsockDevice,
};
use crate::{Arch, assets, process::Process, qmp::Qmp};

struct Qemu {
    arch: Arch,
    process: Process,
    qmp: Qmp,
    /// The vsock device, which QEMU is connected to.
    _vsock: Option<VsockDevice>,
}

pub(super) fn start(spec: &Spec) -> Result<Box<dyn Machine>> {
    let vsock = spec.vsock.as_ref().map(|socket| {
        let [vhost, log] = ["vhost.sock", "vsock.log"].map(|name| spec.dir.join(name));
        VsockDevice::start(GUEST_CID, &vhost, socket, &log)
    });
    let vsock = vsock.transpose()?;
    let mut command = Command::new(assets::tool(&format!("qemu-system-{}", spec.arch.name()))?);
    command.args(arguments(spec)?);
    if spec.nic == Nic::LoneTap {
        command = beside_tap(&command)?;
    }
    let log = fs::File::create(spec.dir.join("qemu.log"))?;
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(log);
    let mut process = Process::spawn(command)?;
    let qmp = connect(spec, &mut process).or_else(|error| {
        let said = fs::read_to_string(spec.dir.join("qemu.log"))?;
        Err(error.context(format!("unable to start QEMU: {}", said.trim_end())))
    })?;
    Ok(Box::new(Qemu {
        arch: spec.arch,
        process,
        qmp,
        _vsock: vsock,
    }))
}

/// Waits for QEMU's monitor.
fn connect(spec: &Spec, process: &mut Process) -> Result<Qmp> {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match UnixStream::connect(spec.dir.join("qmp.sock")) {
            Ok(stream) => return Qmp::new(stream),
            Err(error) if Instant::now() > deadline => return Err(error.into()),
            Err(_) => thread::sleep(Duration::from_millis(5)),
        }
        if let Some(status) = process.status()? {
            bail!("{status}");
        }
    }
}

fn arguments(spec: &Spec) -> Result<Vec<String>> {
    let path = |name: &str| {
        let path = spec.dir.join(name);
        anyhow::Ok(option_value(path.to_str().context("not UTF-8")?))
    };
    let mut line: Vec<String> = Vec::new();
    let mut add = |words: &[&str]| line.extend(words.iter().map(|word| word.to_string()));

    let [machine, cpu] = spec.arch.machine();
    let backend = if spec.vsock.is_some() {
        ",memory-backend=mem0"
    } else {
        ""
    };
    add(&[
        "-M",
        &format!("{machine}{backend}"),
        "-cpu",
        cpu,
        "-accel",
        "tcg",
    ]);
    add(&[
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
    ]);
    add(&["-global", "virtio-mmio.force-legacy=false"]);
    add(&[
        "-m",
        &format!("{}M", spec.memory_mib),
        "-smp",
        &spec.cpus.to_string(),
    ]);
    let (console, serial) = spec.arch.console_on_qemu(spec.firecrackers_console);
    add(&["-chardev", "stdio,id=console,signal=off"]);
    add(&serial);
    add(&[
        "-qmp",
        &format!("unix:{},server=on,wait=off", path("qmp.sock")?),
    ]);

    if spec.deterministic {
        add(&["-icount", "shift=0,sleep=off", "-seed", "1"]);
        // A disk request is on its way before the guest goes idle, and its clock ahead.
        add(&["-global", "virtio-mmio.ioeventfd=off"]);
        add(&["-rtc", "base=2026-01-01T00:00:00,clock=vm"]);
    }
    add(&["-kernel", spec.kernel.to_str().context("not UTF-8")?]);
    add(&["-initrd", spec.initrd.to_str().context("not UTF-8")?]);
    let parameters = spec.arch.parameters_on_qemu(spec.deterministic)?;
    add(&["-append", &spec.command_line(console, &parameters)]);

    if spec.i8042 && spec.arch.has_keyboard() {
        add(&["-device", "i8042"]);
    }
    if spec.vsock.is_some() {
        // The device shares the guest's memory.
        let memory = format!(
            "memory-backend-memfd,id=mem0,size={}M,share=on",
            spec.memory_mib
        );
        add(&["-object", &memory]);
        add(&[
            "-chardev",
            &format!("socket,id=vsock,path={}", path("vhost.sock")?),
        ]);
        add(&["-device", "vhost-user-vsock-device,id=vsock,chardev=vsock"]);
    }
    let tap = |name: &str| format!("tap,id=net,ifname={name},script=no,downscript=no");
    let network = match &spec.nic {
        Nic::None => None,
        Nic::Stream(socket) => {
            let socket = option_value(socket.to_str().context("not UTF-8")?);
            Some(format!(
                "stream,id=net,server=off,addr.type=unix,addr.path={socket}"
            ))
        }
        Nic::User(ports) => {
            let forward = |port: &HostPort| {
                let HostPort {
                    address,
                    host,
                    guest,
                } = port;
                format!(",hostfwd=tcp:{address}:{host}-:{guest}")
            };
            let forward: String = ports.iter().map(forward).collect();
            Some(format!("user,id=net{forward}"))
        }
        Nic::Tap(name) => Some(tap(&option_value(name))),
        Nic::LoneTap => Some(tap(LONE_TAP)),
    };
    if let Some(network) = network {
        add(&["-netdev", &network]);
        add(&[
            "-device",
            &format!("virtio-net-device,netdev=net,mac={GUEST_MAC}"),
        ]);
    }
    let mut disks: Vec<_> = spec.disks.iter().enumerate().collect();
    if spec.arch.names_disks_backwards() {
        disks.reverse();
    }
    for (number, disk) in disks {
        let file = option_value(disk.path.to_str().context("not UTF-8")?);
        let image = match &disk.blkdebug {
            None => format!("file={file}"),
            Some(config) => {
                let config_file = spec.dir.join(format!("blkdebug{number}"));
                fs::write(config_file, config)?;
                let config = path(&format!("blkdebug{number}"))?;
                format!("file.driver=blkdebug,file.config={config},file.image.filename={file}")
            }
        };
        let cache = if disk.scratch { "unsafe" } else { "writeback" };
        let read_only = if disk.read_only { "on" } else { "off" };
        let drive =
            format!("if=none,id=disk{number},format=raw,cache={cache},readonly={read_only}");
        add(&["-drive", &format!("{drive},{image}")]);
        add(&["-device", &format!("virtio-blk-device,drive=disk{number}")]);
    }
    line.extend_from_slice(&spec.qemu_options);
    Ok(line)
}

/// A value inside a QEMU option, where a comma is doubled.
fn option_value(value: &str) -> String {
    value.replace(',', ",,")
}

impl Machine for Qemu {
    fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    fn hypervisor(&self) -> &'static str {
        "QEMU"
    }

    fn ctrl_alt_delete(&mut self) -> Result<()> {
        ensure!(self.arch.has_keyboard(), "this machine has no keyboard");
        let keys = ["ctrl", "alt", "delete"].map(|key| json!({"type": "qcode", "data": key}));
        self.qmp("send-key", json!({"keys": keys})).map(drop)
    }

    fn pause(&mut self) -> Result<()> {
        self.qmp("stop", json!({})).map(drop)
    }

    fn resume(&mut self) -> Result<()> {
        self.qmp("cont", json!({})).map(drop)
    }

    fn end(&mut self, status: ExitStatus) -> End {
        let events = self.qmp.last_events().unwrap_or_default();
        let shutdown = events.iter().find(|event| event["event"] == "SHUTDOWN");
        match shutdown.and_then(|event| event["data"]["reason"].as_str()) {
            Some("guest-reset") => End::Reboot,
            Some("guest-shutdown") => End::PowerOff,
            Some("guest-panic") => End::Panic,
            _ => End::Failed(status.code()),
        }
    }

    fn qmp(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.qmp.execute(command, arguments)
    }
}
