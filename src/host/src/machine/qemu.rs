//! QEMU with software emulation, using the machines closest to Firecracker's: they run on any host.

use std::{
    fs,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::{
    End, GUEST_CID, GUEST_MAC, HostPort, LONE_TAP, Machine, Nic, Snapshot, Spec, Start,
    and_resumed, beside_tap, vsock_device::VsockDevice,
};
use crate::{Arch, assets, process::Process, qmp::Qmp};

// Files in the VM's directory.
/// Sockets of QEMU's monitor, which accepts one client, and of a second one for other processes, for a
/// restorable VM.
const QMP: &str = "qmp.sock";
const QMP_OF_OTHERS: &str = "qmp-others.sock";
/// The vsock device's socket for QEMU.
const VHOST: &str = "vhost.sock";
/// A restorable VM's memory.
const MEMORY: &str = "memory";

struct Qemu {
    arch: Arch,
    process: Process,
    monitor: Monitor,
    _vsock: Option<VsockDevice>,
}

/// QEMU's monitor, and the VM's vsock state.
struct Monitor {
    qmp: Qmp,
    dir: PathBuf,
    vsock: Vsock,
}

/// Whether the guest has vsock.
#[derive(Clone, Copy, PartialEq)]
enum Vsock {
    None,
    Plugged,
    /// The device exists, but QEMU is not connected to it.
    Unplugged,
}

pub(super) fn start(spec: &Spec) -> Result<Box<dyn Machine>> {
    let vsock = spec.vsock.as_ref().map(|socket| {
        let [vhost, log] = [VHOST, "vsock.log"].map(|name| spec.dir.join(name));
        VsockDevice::start(GUEST_CID, &vhost, socket, &log)
    });
    let vsock = vsock.transpose()?;
    if let Start::Restore(snapshot) = &spec.start {
        // The guest writes to this file.
        fs::copy(&snapshot.memory, spec.dir.join(MEMORY))
            .with_context(|| format!("unable to copy {}", snapshot.memory.display()))?;
    }
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
    let explain = |error: anyhow::Error| {
        let log = fs::read_to_string(spec.dir.join("qemu.log")).unwrap_or_default();
        error.context(format!("unable to start QEMU: {}", log.trim_end()))
    };
    let mut monitor = Monitor {
        qmp: connect(spec, &mut process).map_err(explain)?,
        dir: spec.dir.clone(),
        vsock: match (&spec.start, &vsock) {
            (_, None) => Vsock::None,
            (Start::Restore(_), Some(_)) => Vsock::Unplugged,
            (Start::Boot | Start::BootRestorable, Some(_)) => Vsock::Plugged,
        },
    };
    if let Start::Restore(snapshot) = &spec.start {
        monitor.restore(snapshot).map_err(explain)?;
    }
    Ok(Box::new(Qemu {
        arch: spec.arch,
        process,
        monitor,
        _vsock: vsock,
    }))
}

/// Takes a snapshot of another process's VM, see [`super::snapshot`].
pub(super) fn snapshot(
    dir: &Path,
    files: &Snapshot,
    meanwhile: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let mut monitor = Monitor::of_other(dir)?;
    let taken = monitor.snapshot(files).and_then(|()| meanwhile());
    and_resumed(taken, monitor.resume())
}

/// Resumes another process's VM, see [`super::resume_orphaned`]. The snapshot may have been interrupted at
/// any step.
pub(super) fn resume_orphaned(dir: &Path) -> Result<()> {
    let mut monitor = Monitor::of_other(dir)?;
    // Fails if there is no migration.
    let _ = monitor.qmp("migrate_cancel", json!({}));
    // Resumed first, as unplugging needs the guest's cooperation.
    monitor.qmp("cont", json!({}))?;
    if monitor.vsock == Vsock::Plugged {
        monitor.replug_vsock()?;
    }
    Ok(())
}

/// Waits for QEMU's monitor.
fn connect(spec: &Spec, process: &mut Process) -> Result<Qmp> {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match UnixStream::connect(spec.dir.join(QMP)) {
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

    let pcie = match spec.pci_port {
        true => spec.arch.pcie_on_qemu(),
        false => "",
    };
    let restorable = !matches!(spec.start, Start::Boot);
    let [machine, cpu] = match restorable {
        true => spec.arch.restorable_machine()?,
        false => spec.arch.machine(),
    };
    // The vsock device shares the guest's memory; for snapshots the memory is in a named file.
    let memory = match (restorable, spec.vsock.is_some()) {
        (true, _) => Some(format!(
            "memory-backend-file,mem-path={},share=on",
            path(MEMORY)?
        )),
        (false, true) => Some("memory-backend-memfd,share=on".into()),
        (false, false) => None,
    };
    let backend = if memory.is_some() {
        ",memory-backend=mem0"
    } else {
        ""
    };
    // Suffix of virtio device names: on PCI, or on virtio-mmio.
    let (bus, rom) = match restorable {
        true => ("pci", ",romfile="),
        false => ("device", ""),
    };
    add(&[
        "-M",
        &format!("{machine}{pcie}{backend}"),
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
    if !restorable {
        add(&["-global", "virtio-mmio.force-legacy=false"]);
    }
    add(&[
        "-m",
        &format!("{}M", spec.memory_mib),
        "-smp",
        &spec.cpus.to_string(),
    ]);
    let (console, serial) = spec.arch.console_on_qemu(spec.firecrackers_console);
    add(&["-chardev", "stdio,id=console,signal=off"]);
    add(&serial);
    let mut monitors = vec![QMP];
    if restorable {
        monitors.push(QMP_OF_OTHERS);
    }
    for monitor in monitors {
        let socket = format!("unix:{},server=on,wait=off", path(monitor)?);
        add(&["-qmp", &socket]);
    }

    if spec.deterministic {
        add(&["-icount", "shift=0,sleep=off", "-seed", "1"]);
        // Submits a disk request before the guest becomes idle, which would advance its clock.
        let transport = if restorable {
            "virtio-blk-pci"
        } else {
            "virtio-mmio"
        };
        add(&["-global", &format!("{transport}.ioeventfd=off")]);
        add(&["-rtc", "base=2026-01-01T00:00:00,clock=vm"]);
    }
    // A machine with a kernel has other ROMs than one without, so a restored one needs it as well.
    add(&["-kernel", spec.kernel.to_str().context("not UTF-8")?]);
    if !matches!(spec.start, Start::Restore(_)) {
        add(&["-initrd", spec.initrd.to_str().context("not UTF-8")?]);
    }
    let parameters = spec.arch.parameters_on_qemu(spec.deterministic)?;
    add(&["-append", &spec.command_line(console, &parameters)]);

    if spec.pci_port {
        // The guest need not switch the power on.
        let port = "pcie-root-port,id=pci_port,chassis=1,slot=1,power_controller_present=off";
        add(&["-device", port]);
    }
    // A PC always has one.
    if spec.i8042 && spec.arch.has_keyboard() && !restorable {
        add(&["-device", "i8042"]);
    }
    if let Some(memory) = memory {
        let size = format!("{memory},id=mem0,size={}M", spec.memory_mib);
        add(&["-object", &size]);
    }
    let mut vsock_bus = "";
    if restorable {
        // The port for unplugging vsock. Also added without vsock, so that devices have the same addresses.
        add(&[
            "-device",
            "pcie-root-port,id=vsock-port,bus=pcie.0,chassis=1,slot=1",
        ]);
        vsock_bus = ",bus=vsock-port";
        if spec.generation_id {
            add(&["-device", "vmgenid,guid=auto"]);
        }
    }
    if matches!(spec.start, Start::Restore(_)) {
        // vsock is plugged once the VM runs.
        add(&["-incoming", "defer"]);
    } else if spec.vsock.is_some() {
        add(&[
            "-chardev",
            &format!("socket,id=vsock,path={}", path(VHOST)?),
        ]);
        add(&[
            "-device",
            &format!("vhost-user-vsock-{bus},id=vsock,chardev=vsock{vsock_bus}"),
        ]);
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
            // No boot ROM is needed.
            &format!("virtio-net-{bus},netdev=net,mac={GUEST_MAC}{rom}"),
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
        // By default, QEMU stops the whole VM if the host's disk is full.
        let drive = format!(
            "if=none,id=disk{number},format=raw,cache={cache},readonly={read_only},werror=report"
        );
        add(&["-drive", &format!("{drive},{image}")]);
        add(&["-device", &format!("virtio-blk-{bus},drive=disk{number}")]);
    }
    line.extend_from_slice(&spec.qemu_options);
    Ok(line)
}

/// A value in a QEMU option, with commas doubled.
fn option_value(value: &str) -> String {
    value.replace(',', ",,")
}

/// A migration URI that runs a shell command on a file.
fn exec_uri(command: &str, path: &Path) -> Result<String> {
    let path = path.to_str().context("not UTF-8")?;
    Ok(format!("exec:{command} '{}'", path.replace('\'', r"'\''")))
}

/// How long a guest may take to release a device.
const UNPLUG_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a migration to or from a file may take.
const MIGRATION_TIMEOUT: Duration = Duration::from_secs(60);

impl Monitor {
    /// Connects to the monitor of another process's VM.
    fn of_other(dir: &Path) -> Result<Monitor> {
        let stream = UnixStream::connect(dir.join(QMP_OF_OTHERS));
        Ok(Monitor {
            qmp: Qmp::new(stream.context("unable to reach QEMU")?)?,
            dir: dir.into(),
            vsock: match dir.join(VHOST).exists() {
                true => Vsock::Plugged,
                false => Vsock::None,
            },
        })
    }

    fn qmp(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.qmp.execute(command, arguments)
    }

    /// Excludes the memory from migration: its file is copied instead.
    fn leave_out_memory(&mut self) -> Result<()> {
        let shared = json!([{"capability": "x-ignore-shared", "state": true}]);
        self.qmp("migrate-set-capabilities", json!({"capabilities": shared}))
            .map(drop)
    }

    /// Restores a snapshot and resumes.
    fn restore(&mut self, snapshot: &Snapshot) -> Result<()> {
        self.leave_out_memory()?;
        let uri = exec_uri("cat", &snapshot.state)?;
        self.qmp("migrate-incoming", json!({"uri": uri}))?;
        let deadline = Instant::now() + MIGRATION_TIMEOUT;
        while self.qmp("query-status", json!({}))?["status"] == "inmigrate" {
            ensure!(Instant::now() < deadline, "timed out restoring");
            thread::sleep(Duration::from_millis(2));
        }
        self.resume()
    }

    /// vhost-user-vsock does not migrate (QEMU hw/virtio/vhost-user-vsock.c, unmigratable).
    fn unplug_vsock(&mut self) -> Result<()> {
        if self.vsock == Vsock::Plugged {
            self.qmp("device_del", json!({"id": "vsock"}))?;
            self.qmp.device_event("DEVICE_DELETED", "vsock")?;
            self.vsock = Vsock::Unplugged;
            self.qmp("chardev-remove", json!({"id": "vsock"}))?;
        }
        Ok(())
    }

    fn plug_vsock(&mut self) -> Result<()> {
        if self.vsock == Vsock::Unplugged {
            let address = json!({"type": "unix", "data": {"path": self.dir.join(VHOST)}});
            let backend = json!({
                "type": "socket",
                "data": {"addr": address, "server": false},
            });
            self.qmp("chardev-add", json!({"id": "vsock", "backend": backend}))?;
            let device = json!({
                "driver": "vhost-user-vsock-pci",
                "id": "vsock",
                "chardev": "vsock",
                "bus": "vsock-port",
            });
            self.qmp("device_add", device)?;
            self.vsock = Vsock::Plugged;
        }
        Ok(())
    }

    /// Unplugs vsock, if it is plugged, and plugs it in again.
    fn replug_vsock(&mut self) -> Result<()> {
        let deadline = Instant::now() + UNPLUG_TIMEOUT;
        while self.has_vsock()? {
            // Fails if an unplug is already pending.
            let _ = self.qmp("device_del", json!({"id": "vsock"}));
            ensure!(
                Instant::now() < deadline,
                "the guest does not release its vsock"
            );
            thread::sleep(Duration::from_millis(20));
        }
        let _ = self.qmp("chardev-remove", json!({"id": "vsock"}));
        self.vsock = Vsock::Unplugged;
        self.plug_vsock()
    }

    fn has_vsock(&mut self) -> Result<bool> {
        let devices = self.qmp("qom-list", json!({"path": "/machine/peripheral"}))?;
        let mut devices = devices.as_array().into_iter().flatten();
        Ok(devices.any(|device| device["name"] == "vsock"))
    }

    fn pause(&mut self) -> Result<()> {
        self.qmp("stop", json!({})).map(drop)
    }

    fn resume(&mut self) -> Result<()> {
        let continued = self.qmp("cont", json!({}));
        self.plug_vsock()?;
        continued.map(drop)
    }

    fn snapshot(&mut self, snapshot: &Snapshot) -> Result<()> {
        let memory = self.dir.join(MEMORY);
        ensure!(
            memory.exists(),
            "snapshots of this machine cannot be restored"
        );
        self.unplug_vsock()?;
        self.leave_out_memory()?;
        self.pause()?;
        let written = self.write_state(&snapshot.state);
        if written.is_err() {
            // A migration that continues would stop the VM again.
            let _ = self.qmp("migrate_cancel", json!({}));
        }
        written?;
        fs::copy(memory, &snapshot.memory)
            .with_context(|| format!("unable to write {}", snapshot.memory.display()))?;
        Ok(())
    }

    /// Writes the state of the stopped machine to a file.
    fn write_state(&mut self, path: &Path) -> Result<()> {
        let uri = exec_uri("cat >", path)?;
        self.qmp("migrate", json!({"uri": uri}))?;
        let deadline = Instant::now() + MIGRATION_TIMEOUT;
        loop {
            let migration = self.qmp("query-migrate", json!({}))?;
            match migration["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => bail!("the snapshot failed: {migration}"),
                _ => thread::sleep(Duration::from_millis(2)),
            }
            ensure!(Instant::now() < deadline, "timed out taking a snapshot");
        }
    }
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
        self.monitor.pause()
    }

    fn resume(&mut self) -> Result<()> {
        self.monitor.resume()
    }

    fn snapshot(&mut self, snapshot: &Snapshot) -> Result<()> {
        self.monitor.snapshot(snapshot)
    }

    fn end(&mut self, status: ExitStatus) -> End {
        let events = self.monitor.qmp.last_events().unwrap_or_default();
        let shutdown = events.iter().find(|event| event["event"] == "SHUTDOWN");
        match shutdown.and_then(|event| event["data"]["reason"].as_str()) {
            Some("guest-reset") => End::Reboot,
            Some("guest-shutdown") => End::PowerOff,
            Some("guest-panic") => End::Panic,
            _ => End::Failed(status.code()),
        }
    }

    fn qmp(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.monitor.qmp(command, arguments)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead, BufReader, Write},
        os::unix::net::UnixListener,
    };

    use super::*;

    /// The reply to a successful command.
    const SUCCESS: &str = r#"{"return":{}}"#;

    /// A QEMU of another process: `respond` is called with each command. Returns the commands.
    fn fake_qemu(
        dir: &Path,
        mut respond: impl FnMut(&str) -> String + Send + 'static,
    ) -> thread::JoinHandle<Vec<String>> {
        let listener = UnixListener::bind(dir.join(QMP_OF_OTHERS)).unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            writeln!(stream, "{}", json!({"QMP": {}})).unwrap();
            let mut commands = vec![];
            for line in BufReader::new(stream.try_clone().unwrap()).lines() {
                let command: Value = serde_json::from_str(&line.unwrap()).unwrap();
                let command = command["execute"].as_str().unwrap().to_string();
                writeln!(stream, "{}", respond(&command)).unwrap();
                commands.push(command);
            }
            commands
        })
    }

    /// Runs a failing snapshot of a VM with vsock. QEMU gives these replies, and success for all other
    /// commands. Returns the error and the commands.
    fn failing_snapshot(replies: &[(&'static str, &'static str)]) -> (String, Vec<String>) {
        let dir = tempfile::tempdir().unwrap();
        for name in [VHOST, MEMORY] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        let replies = replies.to_vec();
        let qemu = fake_qemu(dir.path(), move |command| {
            let reply = replies.iter().find(|(name, _)| *name == command);
            let reply = reply.map_or(SUCCESS, |(_, reply)| *reply);
            match command {
                "device_del" => {
                    let data = json!({"device": "vsock"});
                    let event = json!({"event": "DEVICE_DELETED", "data": data});
                    format!("{reply}\n{event}")
                }
                _ => reply.into(),
            }
        });
        let [state, memory] = ["made-state", "made-memory"].map(|name| dir.path().join(name));
        let taken = snapshot(dir.path(), &Snapshot { state, memory }, || Ok(()));
        (format!("{:#}", taken.unwrap_err()), qemu.join().unwrap())
    }

    #[test]
    fn a_vm_continues_with_its_vsock_if_its_snapshot_fails() {
        let refused = "{\"error\":{\"desc\":\"no\"}}";
        let plug = ["cont", "chardev-add", "device_add"];
        for (command, reply, behind) in [
            ("chardev-remove", refused, &plug[..]),
            ("migrate-set-capabilities", refused, &plug),
            ("stop", refused, &plug),
            (
                "migrate",
                refused,
                &["migrate_cancel", "cont", "chardev-add", "device_add"],
            ),
            (
                "query-migrate",
                "{\"return\":{\"status\":\"failed\"}}",
                &["migrate_cancel", "cont", "chardev-add", "device_add"],
            ),
            ("device_del", refused, &["cont"]),
        ] {
            let (error, commands) = failing_snapshot(&[(command, reply)]);
            let at = commands.iter().position(|name| name == command).unwrap();
            assert_eq!(commands[at + 1..], *behind, "{error}");
        }
    }

    #[test]
    fn a_vm_whose_snapshot_was_interrupted_is_resumed_with_its_vsock() {
        // vsock was being unplugged, or was unplugged.
        for names in [
            &[r#"[{"name":"vsock"},{"name":"disk0"}]"#, "[]"][..],
            &["[]"],
        ] {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join(VHOST), "").unwrap();
            let mut listed = names.iter();
            let qemu = fake_qemu(dir.path(), move |command| match command {
                "qom-list" => format!("{{\"return\":{}}}", listed.next().unwrap()),
                "migrate_cancel" | "device_del" => r#"{"error":{"desc":"no"}}"#.into(),
                _ => SUCCESS.into(),
            });
            resume_orphaned(dir.path()).unwrap();
            let commands = qemu.join().unwrap();
            let begin = ["qmp_capabilities", "migrate_cancel", "cont", "qom-list"];
            assert_eq!(commands[..4], begin);
            let mut plugged = vec!["chardev-remove", "chardev-add", "device_add"];
            if names.len() > 1 {
                plugged.splice(0..0, ["device_del", "qom-list"]);
            }
            assert_eq!(commands[4..], plugged);
        }
    }

    #[test]
    fn a_vm_that_cannot_be_resumed_gets_its_vsock_back_and_an_error() {
        let (error, commands) = failing_snapshot(&[
            ("query-migrate", "{\"return\":{\"status\":\"completed\"}}"),
            ("cont", "{\"error\":{\"desc\":\"no\"}}"),
        ]);
        assert_eq!(
            error,
            "the VM does not go on after the snapshot: cont: \"no\""
        );
        assert_eq!(commands.last().unwrap(), "device_add");
    }
}
