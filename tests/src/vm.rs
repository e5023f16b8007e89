//! A micro-VM on QEMU or Firecracker, from boot to shutdown.

mod snapshot;

use std::{
    collections::HashMap,
    fs::{self, File},
    os::unix::net::UnixStream,
    panic::Location,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, LazyLock, Mutex, atomic::AtomicU32},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
pub use pigeon::machine::End;
use pigeon::machine::{self, Machine, Metadata, Spec, Start};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

pub use snapshot::{Restore, Snapshot};

use crate::{
    assets::{self, Kernel},
    disk::{Disk, Image},
    guest, http,
    initrd::Initrd,
    mmds::{Mmds, Push, Request, Version},
    net::{self, Traffic},
    process::Slot,
    serial::Serial,
    vsock,
};

/// Number of console lines that a failing test shows.
const TAIL: usize = 60;

/// Time limit of one attempt to connect to a port of the guest.
const HANDSHAKE: Duration = Duration::from_secs(3);

/// What the guest's network card is connected to.
#[derive(Clone, Debug, Default)]
enum Nic {
    /// There is no eth0.
    #[default]
    None,
    /// A host in this process (see [`crate::net`]), with or without MMDS.
    Cable(Option<Mmds>),
    /// A tap device, which supports checksum offload; nothing answers on it.
    Tap,
}

/// A VM to be booted. The defaults are those of a common Firecracker setup: 256 MiB, one vCPU, vsock, a keyboard
/// controller on x86_64; no network without MMDS or a NIC.
pub struct Builder {
    name: String,
    /// Whether the initramfs starts with build/initrd.cpio.
    product: bool,
    files: Initrd,
    modules: bool,
    more_modules: Vec<String>,
    kernel: Option<Kernel>,
    disks: Vec<Disk>,
    nic: Nic,
    vsock: Option<PathBuf>,
    has_vsock: bool,
    args: Vec<String>,
    memory_mib: u32,
    cpus: u32,
    deterministic: bool,
    i8042: bool,
    firecrackers_console: bool,
    pci_port: bool,
    echo: bool,
    quiet: bool,
    on_qemu: bool,
    restorable: bool,
    generation_id: bool,
    qemu_options: Vec<String>,
    compressor: &'static [&'static str],
    timeout: Option<Duration>,
    slot: Option<Arc<Slot>>,
}

impl Builder {
    /// Names the VM's log; by default it is named after the test.
    pub fn name(self, name: &str) -> Self {
        Builder {
            name: name.into(),
            ..self
        }
    }

    /// Puts `/pigeon/run.json` into the initrd.
    pub fn config(self, config: &Value) -> Self {
        self.file("/pigeon/run.json", 0o600, config.to_string())
    }

    /// Adds a network card with MMDS.
    pub fn mmds(self, mmds: Mmds) -> Self {
        Builder {
            nic: Nic::Cable(Some(mmds)),
            ..self
        }
    }

    /// Adds a network card without MMDS: its host answers ARP and ping for any other IPv4 address.
    pub fn nic(self) -> Self {
        Builder {
            nic: Nic::Cable(None),
            ..self
        }
    }

    /// Adds a network card on a tap device: checksum offload can be switched, and nothing answers.
    pub fn tap(self) -> Self {
        Builder {
            nic: Nic::Tap,
            ..self
        }
    }

    /// Adds a block device: the first one is `/dev/vda`.
    pub fn disk(mut self, disk: impl Into<Disk>) -> Self {
        // An image is deleted with its test.
        self.disks.push(disk.into().scratch());
        self
    }

    /// Adds a file to the initrd.
    pub fn file(mut self, path: &str, mode: u32, contents: impl Into<Vec<u8>>) -> Self {
        self.files.file(path, mode, contents);
        self
    }

    /// Uses another program as `/init`, instead of the built initrd.
    pub fn init(self, program: &Path) -> Result<Self> {
        let program = fs::read(program).with_context(|| format!("unable to read {program:?}"))?;
        Ok(Builder {
            product: false,
            ..self
        }
        .file("/init", 0o755, program))
    }

    /// Adds a module to `/pigeon/modules`, after its dependencies, unless the kernel has it built in.
    pub fn module(mut self, name: &str) -> Self {
        self.more_modules.push(name.into());
        self
    }

    /// Leaves out `/pigeon/modules`: on a stock kernel no device has a driver then.
    pub fn without_modules(self) -> Self {
        Builder {
            modules: false,
            ..self
        }
    }

    /// Uses another kernel than [`assets::kernel`].
    pub fn kernel(self, kernel: Kernel) -> Self {
        Builder {
            kernel: Some(kernel),
            ..self
        }
    }

    /// Leaves out the vsock device.
    pub fn without_vsock(self) -> Self {
        Builder {
            has_vsock: false,
            ..self
        }
    }

    /// Sets the path of the vsock device's Unix socket; by default it is in a temporary directory.
    pub fn vsock(self, socket: &Path) -> Self {
        Builder {
            vsock: Some(socket.into()),
            ..self
        }
    }

    /// Adds a kernel parameter, after those that the lab needs.
    pub fn arg(mut self, arg: &str) -> Self {
        self.args.push(arg.into());
        self
    }

    /// Sets the guest's memory in MiB.
    pub fn memory_mib(self, memory_mib: u32) -> Self {
        Builder { memory_mib, ..self }
    }

    /// Sets the number of vCPUs.
    pub fn cpus(self, cpus: u32) -> Self {
        Builder { cpus, ..self }
    }

    /// Makes the guest's clock count its instructions, so that the same boot always takes the same time.
    pub fn deterministic(self) -> Self {
        Builder {
            deterministic: true,
            ..self
        }
    }

    /// Leaves out the keyboard controller, and so Ctrl-Alt-Del.
    pub fn without_i8042(self) -> Self {
        Builder {
            i8042: false,
            ..self
        }
    }

    /// Uses Firecracker's console, which [`Serial::hold`] makes slow on each architecture.
    pub fn firecrackers_console(self) -> Self {
        Builder {
            firecrackers_console: true,
            ..self
        }
    }

    /// Adds a PCI Express port named `pci_port`, for a device that is plugged by [`Vm::qmp`].
    pub fn pci_port(self) -> Self {
        Builder {
            pci_port: true,
            on_qemu: true,
            ..self
        }
    }

    /// Copies the console to standard output.
    pub fn echo(self) -> Self {
        Builder {
            echo: true,
            quiet: true,
            ..self
        }
    }

    /// Does not print the end of the console when the VM is dropped.
    pub fn quiet(self) -> Self {
        Builder {
            quiet: true,
            ..self
        }
    }

    /// Uses QEMU even if Firecracker is available, for tests that read [`Vm::traffic`].
    pub fn on_qemu(self) -> Self {
        Builder {
            on_qemu: true,
            ..self
        }
    }

    /// Uses a machine whose [snapshots](Vm::snapshot) can be restored: a PC on QEMU with kernel 6.12, which
    /// supports VMGenID.
    pub fn restorable(self) -> Self {
        Builder {
            restorable: true,
            ..self
        }
    }

    /// Leaves out VMGenID: the kernel does not detect a restore.
    pub fn without_generation_id(self) -> Self {
        Builder {
            generation_id: false,
            ..self
        }
    }

    /// Adds options of QEMU, and uses QEMU.
    pub fn qemu(self, options: &[&str]) -> Self {
        Builder {
            on_qemu: true,
            qemu_options: options.iter().map(|option| option.to_string()).collect(),
            ..self
        }
    }

    /// Compresses the initramfs with this program, a filter.
    pub fn compressed(self, compressor: &'static [&'static str]) -> Self {
        Builder { compressor, ..self }
    }

    /// Sets the time limit of [`Vm`]'s methods: 60 s by default, 180 s in deterministic time.
    pub fn timeout(self, timeout: Duration) -> Self {
        Builder {
            timeout: Some(timeout),
            ..self
        }
    }

    /// Uses this slot, which its owner keeps for several VMs in turn.
    pub fn in_slot(self, slot: &Arc<Slot>) -> Self {
        Builder {
            slot: Some(slot.clone()),
            ..self
        }
    }

    /// Boots the VM, and waits until the workload has started.
    pub fn start(self) -> Result<Vm> {
        let vm = self.boot()?;
        vm.wait_for("workload started")?;
        Ok(vm)
    }

    /// Starts the VM once a [`Slot`] is free.
    pub fn boot(self) -> Result<Vm> {
        let slot = match &self.slot {
            Some(slot) => slot.clone(),
            None => Arc::new(Slot::acquire()?),
        };
        let dir = TempDir::with_prefix("pigeon-vm-")?;
        let kernel = match &self.kernel {
            Some(kernel) => kernel.clone(),
            None if self.restorable => assets::restorable_kernel()?,
            None => assets::kernel()?,
        };
        let initrd = dir.path().join("initrd");
        fs::write(&initrd, self.archive(&kernel)?)?;
        if let [program, arguments @ ..] = self.compressor {
            let filter = Command::new(program)
                .args(arguments)
                .stdin(File::open(&initrd)?)
                .output()
                .with_context(|| format!("unable to run {program}"))?;
            ensure!(filter.status.success(), "{program}: {}", filter.status);
            fs::write(&initrd, filter.stdout)?;
        }
        let vsock = self.has_vsock.then(|| {
            let own = || dir.path().join(machine::VSOCK);
            self.vsock.clone().unwrap_or_else(own)
        });
        if let Some(socket) = &vsock {
            let _ = fs::remove_file(socket); // of an earlier VM
        }
        let spec = Spec {
            args: self.args.clone(),
            memory_mib: self.memory_mib,
            cpus: self.cpus,
            disks: self.disks.clone(),
            vsock,
            i8042: self.i8042,
            firecrackers_console: self.firecrackers_console,
            deterministic: self.deterministic,
            pci_port: self.pci_port,
            start: match self.restorable {
                true => Start::BootRestorable,
                false => Start::Boot,
            },
            generation_id: self.generation_id,
            qemu_options: self.qemu_options.clone(),
            ..Spec::new(dir.path(), assets::arch(), &kernel.image(), &initrd)
        };
        let (spec, machine, traffic) =
            match assets::firecracker().filter(|_| self.firecracker_can()) {
                Some(program) => {
                    let machine = self.on_firecracker(spec.clone(), &program)?;
                    (spec, machine, Traffic::default())
                }
                None => on_qemu(spec, &self.nic)?,
            };
        let timeout = self
            .timeout
            .unwrap_or(Duration::from_secs(match self.deterministic {
                false => 60,
                true => 180,
            }));
        let mut vm = Vm::of(machine, spec, &self.name, dir, self.echo)?;
        vm.traffic = traffic;
        vm.timeout = timeout;
        vm.quiet = self.quiet;
        vm.slot = Some(slot);
        Ok(vm)
    }

    fn on_firecracker(&self, mut spec: Spec, program: &Path) -> Result<Box<dyn Machine>> {
        let mmds = match &self.nic {
            Nic::Cable(mmds) => mmds.clone(),
            Nic::None | Nic::Tap => None,
        };
        if !matches!(self.nic, Nic::None) {
            spec.nic = machine::Nic::LoneTap;
        }
        spec.metadata = mmds.as_ref().map(|mmds| Metadata {
            v1: mmds.version == Version::V1,
            document: (mmds.push == Push::BeforeStart).then(|| mmds.document.clone()),
        });
        let machine = spec.start_firecracker(program)?;
        if let Some(Mmds {
            push: Push::After(delay),
            document,
            ..
        }) = mmds
        {
            thread::spawn(move || {
                thread::sleep(delay);
                // Fails if the VM has ended already, which does not matter.
                let _ = machine::put_metadata(&spec.dir, &document);
            });
        }
        Ok(machine)
    }

    /// Whether Firecracker supports what was requested.
    fn firecracker_can(&self) -> bool {
        let genuine = match &self.nic {
            Nic::Cable(Some(mmds)) => mmds.is_genuine(),
            Nic::Cable(None) => false, // there would be no answer
            Nic::None | Nic::Tap => true,
        };
        let faulty_disk = self.disks.iter().any(|disk| disk.is_faulty());
        let qemus = self.on_qemu || self.deterministic || self.restorable;
        genuine && self.i8042 && !qemus && !faulty_disk
    }

    /// The initramfs: build/initrd.cpio, and after it what this VM adds.
    fn archive(&self, kernel: &Kernel) -> Result<Vec<u8>> {
        let product = if self.product {
            assets::initrd()?
        } else {
            vec![]
        };
        let mut files = self.files.clone();
        if self.modules {
            files.modules_and(kernel, &self.more_modules)?;
        }
        Ok(files.on_top_of(product))
    }
}

/// A running (or ended) micro-VM. Dropping it ends it and prints the end of its console, which the test runner
/// shows for a failing test. The whole console is in `build/logs/TEST.log`.
pub struct Vm {
    machine: Box<dyn Machine>,
    spec: Spec,
    /// The name of its log; a clone has that of the VM that was booted.
    name: String,
    /// Number of clones of that VM so far.
    clones: Arc<AtomicU32>,
    serial: Serial,
    traffic: Traffic,
    timeout: Duration,
    quiet: bool,
    /// A clone's own disks.
    images: Vec<Image>,
    _dir: TempDir,
    slot: Option<Arc<Slot>>,
}

impl Vm {
    /// A VM on a machine that was started.
    fn of(
        mut machine: Box<dyn Machine>,
        spec: Spec,
        name: &str,
        dir: TempDir,
        echo: bool,
    ) -> Result<Vm> {
        let console = machine
            .process()
            .child()
            .stdout
            .take()
            .expect("stdout is piped");
        let log = assets::build_dir()
            .join("logs")
            .join(name)
            .with_added_extension("log");
        Ok(Vm {
            serial: Serial::record(console, &log, echo)?,
            machine,
            spec,
            name: name.into(),
            clones: Arc::default(),
            traffic: Traffic::default(),
            timeout: Duration::from_secs(60),
            quiet: false,
            images: vec![],
            _dir: dir,
            slot: None,
        })
    }

    /// A VM that is named after the test that boots it, as its log is.
    #[track_caller]
    pub fn builder() -> Builder {
        Builder {
            name: log_name(thread::current().name(), Location::caller()),
            product: true,
            files: Initrd::default(),
            modules: true,
            more_modules: vec![],
            kernel: None,
            disks: vec![],
            nic: Nic::None,
            vsock: None,
            has_vsock: true,
            args: vec![],
            memory_mib: 256,
            cpus: 1,
            deterministic: false,
            i8042: true,
            firecrackers_console: false,
            pci_port: false,
            echo: false,
            quiet: false,
            on_qemu: false,
            restorable: false,
            generation_id: true,
            qemu_options: vec![],
            compressor: &[],
            timeout: None,
            slot: None,
        }
    }

    /// The console.
    pub fn serial(&self) -> &Serial {
        &self.serial
    }

    /// The console's output so far.
    pub fn console(&self) -> String {
        self.serial.text()
    }

    /// Waits for a whole console line that contains `text` and returns it; it may have been printed already.
    pub fn wait_for(&self, text: &str) -> Result<String> {
        self.serial.wait_for(text, self.timeout)
    }

    /// Waits for a section of a [`guest::report`] and returns its lines.
    pub fn section(&self, name: &str) -> Result<Vec<String>> {
        guest::section(&self.serial, name, self.timeout)
    }

    /// Types on the console.
    pub fn type_text(&mut self, text: &str) -> Result<()> {
        let keyboard = self
            .machine
            .process()
            .child()
            .stdin
            .as_mut()
            .expect("stdin is piped");
        Ok(std::io::Write::write_all(keyboard, text.as_bytes())?)
    }

    /// The vsock device's Unix socket on the host.
    pub fn vsock(&self) -> Option<&Path> {
        self.spec.vsock.as_deref()
    }

    /// Connects to a vsock port of the guest as soon as something listens there.
    pub fn connect(&mut self, port: u32) -> Result<UnixStream> {
        let socket = self.vsock().context("the VM has no vsock")?.to_owned();
        let deadline = Instant::now() + self.timeout;
        loop {
            match vsock::connect(&socket, port, HANDSHAKE) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(self.timeout))?;
                    return Ok(stream);
                }
                Err(error) if Instant::now() > deadline => return Err(error.into()),
                Err(error) if self.machine.process().status()?.is_some() => {
                    return Err(anyhow::Error::from(error).context("the VM has ended"));
                }
                Err(_) => thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    /// A new connection to pigeon-init's API, as soon as it listens.
    pub fn api(&mut self) -> Result<http::Client<UnixStream>> {
        Ok(http::Client::new(self.connect(vsock::API_PORT)?))
    }

    /// The network traffic. On Firecracker, and on a tap, none is recorded.
    pub fn traffic(&self) -> &Traffic {
        &self.traffic
    }

    /// MMDS requests so far: [`Traffic::requests`].
    pub fn mmds_requests(&self) -> Vec<Request> {
        self.traffic.requests()
    }

    /// Sends Ctrl-Alt-Del; only x86_64 machines have a keyboard.
    pub fn ctrl_alt_delete(&mut self) -> Result<()> {
        self.machine.ctrl_alt_delete()
    }

    /// Asks the workload to stop: by Ctrl-Alt-Del, or by a signal if there is no keyboard.
    pub fn stop(&mut self) -> Result<()> {
        if assets::arch().has_keyboard() {
            return self.ctrl_alt_delete();
        }
        let term = serde_json::json!({"signal": 15});
        self.api()?.post("/v1/signals", &term)?.success().map(drop)
    }

    /// Pauses the vCPUs.
    pub fn pause(&mut self) -> Result<()> {
        self.machine.pause()
    }

    /// Resumes the vCPUs.
    pub fn resume(&mut self) -> Result<()> {
        self.machine.resume()
    }

    /// Stops the hypervisor process for at least that long: unlike with [`pause`](Self::pause) on QEMU, the
    /// guest's clock continues meanwhile.
    pub fn freeze(&mut self, time: Duration) -> Result<()> {
        self.freeze_and(time, |_| Ok(()))
    }

    /// The same, and calls a function just before it continues.
    pub fn freeze_and(
        &mut self,
        time: Duration,
        last: impl FnOnce(&mut Vm) -> Result<()>,
    ) -> Result<()> {
        let id = self.machine.process().child().id();
        let process = Pid::from_raw(id.try_into()?).context("no process")?;
        kill_process(process, Signal::STOP)?;
        self.stand_still(time)?;
        last(self)?;
        Ok(kill_process(process, Signal::CONT)?)
    }

    /// Sleeps while the machine is stopped. It runs nothing, so another VM can use its slot meanwhile.
    pub fn stand_still(&mut self, time: Duration) -> Result<()> {
        self.slot = None;
        thread::sleep(time);
        self.slot = Some(Arc::new(Slot::acquire()?));
        Ok(())
    }

    /// Releases the slot, as the machine mostly waits from now on: for a deadline, or a disk that hangs.
    pub fn yield_slot(&mut self) {
        self.slot = None;
    }

    /// Runs a QMP command; only on QEMU.
    pub fn qmp(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.machine.qmp(command, arguments)
    }

    /// Waits for the VM to end by itself.
    pub fn wait_end(&mut self) -> Result<End> {
        let Some(status) = self.machine.process().wait(self.timeout)? else {
            bail!("the VM still runs after {:?}", self.timeout);
        };
        // The test may boot its next VM while it still holds this one.
        self.slot = None;
        self.serial.release();
        self.serial.wait_end();
        let panicked = self.console().contains("Kernel panic - not syncing");
        Ok(if panicked {
            End::Panic
        } else {
            self.machine.end(status)
        })
    }

    /// How it ended, or None while it runs.
    pub fn ended(&mut self) -> Result<Option<End>> {
        let running = self.machine.process().status()?.is_none();
        if running {
            Ok(None)
        } else {
            self.wait_end().map(Some)
        }
    }

    /// Kills the VM, as a crash of the host would.
    pub fn kill(&mut self) {
        self.machine.process().kill();
        self.slot = None;
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if let Some(socket) = self.vsock() {
            let _ = fs::remove_file(socket); // which may lie outside of our directory
        }
        if !self.quiet {
            let log = self.serial.log().display();
            let tail = self.serial.tail(TAIL);
            eprintln!("---- end of the console ({log})\n{tail}\n----");
        }
    }
}

/// Starts a VM with this network link on QEMU.
fn on_qemu(mut spec: Spec, nic: &Nic) -> Result<(Spec, Box<dyn Machine>, Traffic)> {
    let (nic, traffic) = match nic {
        Nic::None => (machine::Nic::None, Traffic::default()),
        Nic::Tap => (machine::Nic::LoneTap, Traffic::default()),
        Nic::Cable(mmds) => {
            let socket = spec.dir.join("net.sock");
            let traffic = net::attach(&socket, mmds.clone())?;
            (machine::Nic::Stream(socket), traffic)
        }
    };
    spec.nic = nic;
    let machine = spec.start_qemu()?;
    Ok((spec, machine, traffic))
}

/// A file name for the next VM of a test: the second one of a process gets `-2`. A test that runs on the main
/// thread is named after its location in the source.
fn log_name(thread: Option<&str>, place: &Location) -> String {
    static BOOTS: LazyLock<Mutex<HashMap<String, u32>>> = LazyLock::new(Mutex::default);
    let test = match thread.filter(|&name| name != "main") {
        Some(name) => name.replace("::", "."),
        None => format!("{}-{}", place.file().replace('/', "."), place.line()),
    };
    let mut boots = BOOTS.lock().expect("no poison");
    let count = boots.entry(test.clone()).or_default();
    *count += 1;
    if *count == 1 {
        test
    } else {
        format!("{test}-{count}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_vm_of_a_test_has_a_log_of_its_own() {
        let place = Location::caller();
        assert_eq!(log_name(Some("a::b"), place), "a.b");
        assert_eq!(log_name(Some("a::b"), place), "a.b-2");
        assert_eq!(log_name(Some("c"), place), "c");
        let main = log_name(Some("main"), place);
        assert_eq!(main, format!("src.vm.rs-{}", place.line()));
    }

    #[test]
    fn firecracker_is_used_only_when_requested() {
        use crate::mmds::{Fault, Push};
        let mmds = || Mmds::serving(Value::Null);
        assert!(
            Vm::builder()
                .mmds(mmds().push(Push::Never))
                .firecracker_can()
        );
        assert!(
            !Vm::builder()
                .mmds(mmds().always(Fault::Silent))
                .firecracker_can()
        );
        assert!(
            !Vm::builder()
                .mmds(mmds().push(Push::AfterRequests(1)))
                .firecracker_can()
        );
        assert!(!Vm::builder().deterministic().firecracker_can());
        assert!(!Vm::builder().on_qemu().firecracker_can());
    }
}
