//! The VM of a container.

use std::{
    collections::VecDeque,
    fs,
    io::Read,
    path::{Path, PathBuf},
    process::ChildStdout,
    sync::{Arc, Condvar, Mutex, OnceLock},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use pigeon::{
    Arch, Client, assets,
    events::{Event, Listener},
    files::FileInfo,
    hold::{self, Until},
    image::{self, disk},
    initrd::Initrd,
    kill::{Sent, Target},
    machine::{Disk, End, Machine, Spec},
};
use rustix::{
    event::{PollFd, PollFlags, poll},
    process::{Pid, PidfdFlags, pidfd_open},
};
use serde_json::json;

use crate::{
    log, rootfs,
    service::{lock, lock_until},
    spec::Plan,
};

/// The vsock port for the init's events.
const EVENTS_PORT: u32 = 10_001;
/// Where the idle program is mounted.
const HOLD: &str = "/run/pigeon/hold";
/// Size of a container's writable layer: a sparse file on the host.
const WRITABLE: u64 = 8 << 30;
/// Names the initramfs, if it is not in the shim's directory.
const INITRD: &str = "PIGEON_INITRD";
/// How long a guest may be too busy to accept a connection.
const BUSY: Duration = Duration::from_secs(30);
/// How long a VM may take to boot.
const BOOT: Duration = Duration::from_secs(120);
/// Time limit for all calls to the guest for one request of containerd, so that containerd always gets a
/// response. As kata's `defaultRequestTimeout` (kata_agent.go).
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);
/// Bytes of the end of the console that are kept for error messages.
const CONSOLE: usize = 16 << 10;
/// Lines of it that are part of an error message.
const SHOWN_LINES: usize = 10;

/// The stage of a VM.
#[derive(Clone, Debug, PartialEq)]
enum Phase {
    Booting,
    Started,
    /// With the reason.
    Ended(String),
}

/// A VM that was started.
pub struct Vm {
    machine: Mutex<Box<dyn Machine>>,
    /// Its API, for calls without a deadline; see [`Vm::client_until`].
    pub client: Client,
    request_timeout: Duration,
    arch: Arch,
    /// The init's program, once it was requested.
    init: OnceLock<FileInfo>,
    /// The hypervisor's process.
    pub pid: u32,
    /// Whether the root becomes read-only when the container's process starts.
    pub read_only: bool,
    phase: Mutex<Phase>,
    changed: Condvar,
    console: Mutex<VecDeque<u8>>,
    /// Held while a signal is sent, which uses a file in the guest.
    signals: Mutex<()>,
    /// Held while a process starts, which uses a file as well.
    pub launches: Mutex<()>,
}

impl Vm {
    /// Boots the VM of a plan. `root` is its root's image, `dir` the container's directory.
    pub fn boot(plan: &mut Plan, root: &Path, dir: &Path) -> Result<Arc<Vm>> {
        let arch = Arch::HOST;
        let spec = spec(plan, root, dir, arch)?;
        let uds = spec.vsock.clone().context("it has vsock")?;
        let events = Listener::bind(&uds, EVENTS_PORT)?;
        let mut machine = match assets::firecracker() {
            Some(program) => spec.start_firecracker(&program)?,
            None => spec.start_qemu()?,
        };
        let child = machine.process().child();
        let pid = child.id();
        if let Some(score) = plan.process.oom_score_adj {
            let path = format!("/proc/{pid}/oom_score_adj");
            fs::write(path, score.to_string()).context("process.oomScoreAdj")?;
        }
        let console = child.stdout.take().context("the console is piped")?;
        // There is no input, but the pipe stays open for the VM.
        std::mem::forget(child.stdin.take());
        let vm = Arc::new(Vm {
            machine: Mutex::new(machine),
            client: Client::new(uds).with_retry_timeout(BUSY),
            request_timeout: REQUEST_TIMEOUT,
            arch,
            init: OnceLock::new(),
            pid,
            read_only: plan.read_only,
            phase: Mutex::new(Phase::Booting),
            changed: Condvar::new(),
            console: Mutex::new(VecDeque::new()),
            signals: Mutex::new(()),
            launches: Mutex::new(()),
        });
        vm.clone().watch_events(events);
        let console = vm.clone().watch_console(console);
        let watched = vm.clone();
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let end = pidfd_open(pid.context("a process has a number")?, PidfdFlags::empty())?;
        thread::spawn(move || {
            while let Err(rustix::io::Errno::INTR) =
                poll(&mut [PollFd::new(&end, PollFlags::IN)], None)
            {}
            // Waits for the end of the console's output.
            let _ = console.join();
            watched.ended();
        });
        Ok(vm)
    }

    fn watch_events(self: Arc<Vm>, listener: Listener) {
        thread::spawn(move || {
            let mut events = listener.accept()?;
            while let Some(event) = events.next_event()? {
                if matches!(event, Event::Started { .. }) {
                    self.enter(Phase::Started);
                }
            }
            anyhow::Ok(())
        });
    }

    fn watch_console(self: Arc<Vm>, mut console: ChildStdout) -> thread::JoinHandle<()> {
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(size @ 1..) = console.read(&mut buffer) {
                let mut kept = lock(&self.console);
                kept.extend(&buffer[..size]);
                let excess = kept.len().saturating_sub(CONSOLE);
                kept.drain(..excess);
            }
        })
    }

    fn console(&self) -> String {
        let bytes: Vec<u8> = lock(&self.console).iter().copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn enter(&self, phase: Phase) {
        let mut current = lock(&self.phase);
        if !matches!(*current, Phase::Ended(_)) {
            *current = phase;
        }
        self.changed.notify_all();
    }

    /// Handles the exit of the hypervisor.
    fn ended(&self) {
        let mut machine = lock(&self.machine);
        let status = machine.process().wait(Duration::from_secs(1));
        let end = match status {
            Ok(Some(status)) => machine.end(status),
            _ => End::Failed(None),
        };
        let console = self.console();
        let why = match end {
            _ if console.contains("Kernel panic - not syncing") => "the guest's kernel panicked",
            End::Panic => "the guest's kernel panicked",
            End::Reboot | End::PowerOff => "the VM has shut down",
            End::Failed(_) => "the hypervisor was killed, or failed",
        };
        let lines: Vec<_> = console.lines().rev().take(SHOWN_LINES).collect();
        let lines: Vec<_> = lines.into_iter().rev().collect();
        self.enter(Phase::Ended(match lines.is_empty() {
            true => why.into(),
            false => format!("{why}; the end of its console: {}", lines.join(" | ")),
        }));
    }

    /// Waits until the VM is up.
    pub fn wait_started(&self) -> Result<()> {
        let deadline = Instant::now() + BOOT;
        let mut phase = lock(&self.phase);
        loop {
            match &*phase {
                Phase::Started => return Ok(()),
                Phase::Ended(why) => bail!("{why}"),
                Phase::Booting => {}
            }
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(
                !left.is_zero(),
                "the VM has not booted in {} s",
                BOOT.as_secs()
            );
            phase = match self.changed.wait_timeout(phase, left) {
                Ok((phase, _)) => phase,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }

    /// Waits at most `timeout` for its end. Returns the reason.
    pub fn end_within(&self, timeout: Duration) -> Option<String> {
        let deadline = Instant::now() + timeout;
        let mut phase = lock(&self.phase);
        loop {
            if let Phase::Ended(why) = &*phase {
                return Some(why.clone());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            phase = match self.changed.wait_timeout(phase, left) {
                Ok((phase, _)) => phase,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }

    /// The deadline of a request that starts now.
    pub fn deadline(&self) -> Instant {
        Instant::now() + self.request_timeout
    }

    /// A client for its API with this deadline.
    pub fn client_until(&self, deadline: Instant) -> Client {
        let left = deadline.saturating_duration_since(Instant::now());
        self.client.within(left)
    }

    /// The init's program, which a process runs before it executes its own.
    pub fn init(&self, client: &Client) -> Result<&FileInfo> {
        if let Some(init) = self.init.get() {
            return Ok(init);
        }
        let init = client.file_info("/proc/1/exe")?;
        Ok(self.init.get_or_init(|| init))
    }

    /// Kills it. Its writable layer is deleted afterwards, so an orderly shutdown is not needed.
    pub fn end(&self) {
        lock(&self.machine).process().kill();
    }

    /// Stops the virtual processors.
    pub fn pause(&self) -> Result<()> {
        lock(&self.machine).pause()
    }

    /// Resumes them.
    pub fn resume(&self) -> Result<()> {
        lock(&self.machine).resume()
    }

    /// Sends a signal to processes of the guest.
    pub fn signal(&self, target: Target, signal: u8) -> Result<Sent> {
        let deadline = self.deadline();
        let _one_at_a_time = lock_until(&self.signals, deadline);
        ensure!(_one_at_a_time.is_some(), "the guest does not respond");
        let client = self.client_until(deadline);
        Ok(client.kill(self.arch, target, signal)?)
    }

    /// Whether the kernel reported that its OOM killer killed this process. (mm/oom_kill.c)
    pub fn was_killed_for_memory(&self, pid: u32) -> bool {
        let console = self.console();
        console.contains(&format!("ut of memory: Killed process {pid} "))
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.end();
    }
}

/// The specification of a plan's VM: its workload is the idle program; the container's process is a session.
fn spec(plan: &mut Plan, root: &Path, dir: &Path, arch: Arch) -> Result<Spec> {
    let mut disks = vec![Disk::file(root).read_only()];
    let hold = dir.join("hold.erofs");
    hold::write_volume(&hold, arch, Until::Kill, disk::Format::Erofs)?;
    let device = add(&mut disks, Disk::file(&hold).read_only())?;
    plan.document["ExecOverride"] = json!([format!("{HOLD}/{}", hold::PROGRAM)]);
    plan.mount(json!({"DevicePath": device, "MountPath": HOLD, "ReadOnly": true}));
    // A read-only root needs it too, as missing mount points and copied files are created first.
    let writable = dir.join("writable.ext4");
    disk::write_volume(&writable, WRITABLE)?;
    let device = add(&mut disks, Disk::file(&writable).scratch())?;
    plan.document["RootOverlay"] = json!(device);
    for number in 0..plan.folders.len() {
        let folder = &plan.folders[number];
        let (format, image) = match folder.read_only {
            true => (disk::Format::Erofs, dir.join(format!("bind{number}.erofs"))),
            false => (disk::Format::Ext4, dir.join(format!("bind{number}.ext4"))),
        };
        image::pack(&folder.source, &image, format)
            .with_context(|| format!("mount on {}", folder.target))?;
        let (target, read_only) = (folder.target.clone(), folder.read_only);
        let device = add(
            &mut disks,
            match read_only {
                true => Disk::file(&image).read_only(),
                false => Disk::file(&image).scratch(),
            },
        )?;
        plan.mount(json!({"DevicePath": device, "MountPath": target, "ReadOnly": read_only}));
    }
    pigeon::config::check(&plan.document)?;

    let kernel = assets::Kernel::chosen(arch)?;
    let mut files = Initrd::default();
    files.modules_and(&kernel, &["erofs".into(), "overlay".into()])?;
    files.file("/pigeon/run.json", 0o600, plan.document.to_string());
    let initrd = dir.join("initrd");
    fs::write(&initrd, files.on_top_of(product(arch)?))
        .with_context(|| format!("unable to write {}", initrd.display()))?;
    Ok(Spec {
        args: [
            "PIGEON_CONFIG=file",
            "PIGEON_CGROUPS=unified",
            "PIGEON_OUTPUT=log",
            "PIGEON_RESTORE=off",
            &format!("PIGEON_EVENTS_PORT={EVENTS_PORT}"),
        ]
        .map(String::from)
        .into(),
        memory_mib: plan.memory,
        cpus: plan.cpus,
        disks,
        ..Spec::new(dir, arch, &kernel.image(), &initrd)
    })
}

/// Adds a disk and returns its name.
fn add(disks: &mut Vec<Disk>, disk: Disk) -> Result<String> {
    let letter = ('a'..='z').nth(disks.len());
    let letter = letter.context("a VM has 26 disks at most: there are too many mounts")?;
    disks.push(disk);
    Ok(format!("/dev/vd{letter}"))
}

/// The initramfs with the init.
fn product(arch: Arch) -> Result<Vec<u8>> {
    let given = std::env::var_os(INITRD).filter(|path| !path.is_empty());
    match given.map(PathBuf::from).or_else(assets::initrd_beside) {
        Some(path) => fs::read(&path).with_context(|| format!("unable to read {}", path.display())),
        None => assets::initrd(arch),
    }
}

/// Makes the root's image for a container.
pub fn root(
    mounts: &[containerd_shim_protos::api::Mount],
    plan: &Plan,
    dir: &Path,
) -> Result<PathBuf> {
    for warning in &plan.warnings {
        log::warn(warning);
    }
    rootfs::image(mounts, &plan.root, dir)
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use pigeon::{machine::Snapshot, process::Process};
    use std::{
        io::Write,
        os::unix::net::UnixListener,
        process::{Command, ExitStatus},
    };

    /// A hypervisor that ignores every request.
    struct Idle(Process);

    impl Machine for Idle {
        fn process(&mut self) -> &mut Process {
            &mut self.0
        }
        fn hypervisor(&self) -> &'static str {
            "idle"
        }
        fn ctrl_alt_delete(&mut self) -> Result<()> {
            Ok(())
        }
        fn pause(&mut self) -> Result<()> {
            Ok(())
        }
        fn resume(&mut self) -> Result<()> {
            Ok(())
        }
        fn snapshot(&mut self, _: &Snapshot) -> Result<()> {
            Ok(())
        }
        fn end(&mut self, status: ExitStatus) -> End {
            End::Failed(status.code())
        }
    }

    /// A VM whose kernel accepts connections, but whose init does not respond.
    pub fn unresponsive_vm(dir: &Path, request_timeout: Duration) -> Arc<Vm> {
        let uds = dir.join("vm.vsock");
        let listener = UnixListener::bind(&uds).unwrap();
        thread::spawn(move || {
            let mut open = vec![];
            for mut stream in listener.incoming().flatten() {
                stream
                    .read_exact(&mut [0; "CONNECT 10000\n".len()])
                    .unwrap();
                stream.write_all(b"OK 1073741824\n").unwrap();
                open.push(stream);
            }
        });
        let mut sleep = Command::new("sleep");
        sleep.arg("1000");
        let mut idle = Process::spawn(sleep).unwrap();
        Arc::new(Vm {
            pid: idle.child().id(),
            machine: Mutex::new(Box::new(Idle(idle))),
            client: Client::new(uds).with_retry_timeout(BUSY),
            request_timeout,
            arch: Arch::HOST,
            init: OnceLock::new(),
            read_only: false,
            phase: Mutex::new(Phase::Started),
            changed: Condvar::new(),
            console: Mutex::new(VecDeque::new()),
            signals: Mutex::new(()),
            launches: Mutex::new(()),
        })
    }
}
