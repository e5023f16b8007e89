//! The VMs of `pigeon run`, by name. Each has a directory with its record, output and console, which is kept
//! when it ends, and a socket in the user's runtime directory. There is no daemon: the process that runs a VM
//! holds a lock on its directory.

use std::{
    collections::BTreeMap,
    env,
    fs::{self, File, Permissions},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail, ensure};
use pigeon::{Exit, lock::is_at, vsock};
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::snapshot::Restorable;

/// Maximum length of a VM's name: a Unix socket's path has 107 bytes, a host name 64.
const MAX_NAME: usize = 40;

/// The record of a VM.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Record {
    pub name: String,
    /// Whether the name was derived from the image, and a later VM may replace it.
    pub auto: bool,
    pub image: PathBuf,
    /// The Unix socket of its vsock.
    pub uds: PathBuf,
    /// The process that runs it.
    pub pid: u32,
    pub arch: String,
    pub hypervisor: String,
    pub memory_mib: u32,
    pub cpus: u32,
    /// Its configuration document.
    pub config: Value,
    /// Whether its workload is the session [`SESSION`](crate::workload::SESSION).
    pub session: bool,
    /// Time limit for the workload's exit when it is stopped, in seconds.
    pub stop_timeout: Option<f64>,
    /// Forwarded ports of the host, such as `127.0.0.1:8080->80/tcp`.
    pub ports: Vec<String>,
    /// How to start it again, if possible.
    pub launch: Option<Launch>,
    /// Seconds since 1970.
    pub started: u64,
    /// When its workload was started.
    pub up: Option<u64>,
    pub ended: Option<u64>,
    /// The exit of its workload, if known.
    pub exit: Option<Exit>,
    /// The kind of the VM's end: `orderly`, `panic`, `killed`, `hypervisor`.
    pub end: Option<String>,
    /// The exit code of `pigeon run`.
    pub exit_code: Option<u8>,
    /// The status of the image's health check: `starting`, `healthy`, `unhealthy`.
    pub health: Option<String>,
    /// The data for its snapshots, if they can be restored.
    pub restorable: Option<Restorable>,
}

/// A command line of `pigeon run`, with its environment.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Launch {
    /// The arguments after `pigeon run`.
    pub arguments: Vec<String>,
    /// The working directory, for relative paths.
    pub directory: PathBuf,
    /// The [`Launch::VARIABLES`] that are set.
    pub environment: BTreeMap<String, String>,
}

impl Launch {
    /// Variables that replace options.
    pub const VARIABLES: [&str; 4] = [
        "PIGEON_ARCH",
        "PIGEON_KERNEL",
        "PIGEON_INITRD",
        "FIRECRACKER",
    ];

    /// This process's command line; None if it is not UTF-8.
    pub fn this() -> Option<Launch> {
        let words = env::args_os().skip(2).map(|word| word.into_string().ok());
        let set = |name: &str| Some((name.to_string(), env::var(name).ok()?));
        Some(Launch {
            arguments: words.collect::<Option<_>>()?,
            directory: env::current_dir().ok()?,
            environment: Launch::VARIABLES.iter().copied().filter_map(set).collect(),
        })
    }
}

impl Record {
    /// Time limit for the workload's exit: `given` seconds, or that of `pigeon run`.
    pub fn stop_timeout(&self, given: Option<f64>) -> Result<Duration> {
        let seconds = given.or(self.stop_timeout).unwrap_or(STOP_TIMEOUT);
        Duration::try_from_secs_f64(seconds).context("bad --timeout")
    }

    /// The status for people to read.
    pub fn status(&self, running: bool) -> String {
        let since = |then: u64| crate::output::duration(now().saturating_sub(then));
        match (running, self.ended) {
            (true, _) => {
                let health = self.health.as_ref();
                let health = health
                    .map(|health| format!(" ({health})"))
                    .unwrap_or_default();
                format!("up {}{health}", since(self.started))
            }
            (false, Some(ended)) => {
                let what = match self.end.as_deref() {
                    Some("killed") => "killed",
                    Some("panic") => "panicked",
                    _ => "exited",
                };
                let code = self.exit_code.map(|code| format!(" ({code})"));
                format!("{what}{} {} ago", code.unwrap_or_default(), since(ended))
            }
            (false, None) => "lost: its end was not recorded".into(),
        }
    }
}

/// Seconds since 1970.
pub fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs())
}

/// A running or ended VM.
pub struct Vm {
    pub record: Record,
    pub running: bool,
    /// The directory with its record.
    pub dir: PathBuf,
}

/// Default time limit for the workload's exit, in seconds.
pub const STOP_TIMEOUT: f64 = 10.0;

/// Files in a VM's directory.
const RECORD: &str = "vm.json";
const LOCK: &str = "lock";
/// The workload's output, in frames.
pub const OUTPUT: &str = "output";
/// The unfiltered console.
pub const CONSOLE: &str = "console";
/// Events of the init, one line of JSON each.
pub const EVENTS: &str = "events";
/// Messages of `pigeon run -d`.
pub const MESSAGES: &str = "messages";
/// Locked while the VM is restarted, so that `--rm` does not remove its record.
const RESTARTS: &str = "restarts";
/// The files of an ended VM, until another VM with its name has started.
const EARLIER: &str = "earlier";

impl Vm {
    /// Whether it runs now.
    pub fn is_running(&self) -> bool {
        is_locked(&self.dir)
    }

    /// Waits until it has ended. Returns whether it has.
    pub fn wait(&self, timeout: Duration) -> bool {
        let begin = Instant::now();
        while self.is_running() {
            if begin.elapsed() >= timeout {
                return false;
            }
            thread::sleep(Duration::from_millis(20));
        }
        true
    }

    /// Its current record.
    pub fn reread(&self) -> Result<Record> {
        read_record(&self.dir)
    }

    /// Sends a signal to the process that runs it.
    pub fn signal_owner(&self, signal: Signal) -> Result<()> {
        let send = || {
            // It may have been started again by another process.
            let record = self.reread()?;
            let pid = i32::try_from(record.pid).ok().and_then(Pid::from_raw);
            let pid = pid.context("its process is not known")?;
            // The pid can be reused only after its lock is released.
            if record.ended.is_none() && self.is_running() {
                kill_process(pid, signal).context("unable to signal the process that runs it")?;
            }
            Ok(())
        };
        let sent = send();
        // If the process has ended meanwhile, an error means nothing.
        if self.is_running() { sent } else { Ok(()) }
    }

    /// Announces that it is started again once it has ended. Dropping the file withdraws that.
    pub fn announce_restart(&self) -> Result<File> {
        let path = self.dir.join(RESTARTS);
        let cannot = || format!("unable to write {}", path.display());
        let announced = File::create(&path).with_context(cannot)?;
        announced.lock_shared().with_context(cannot)?;
        Ok(announced)
    }

    /// Removes its files.
    pub fn remove(&self) -> Result<()> {
        // A VM with --rm was removed, or its owner is about to remove it.
        let Ok(lock) = File::open(self.dir.join(LOCK)) else {
            return remove_tree(&self.dir);
        };
        let name = &self.record.name;
        ensure!(try_lock(&lock, File::try_lock), "{name} is running again");
        if !is_at(&lock, &self.dir.join(LOCK)) {
            return Ok(()); // it was removed meanwhile, and this is another VM
        }
        // A killed VM leaves its socket behind.
        drop(vsock::Reservation::new(&self.record.uds));
        remove_tree(&self.dir)
    }
}

/// A name that is locked for this VM until dropped.
pub struct Claim {
    pub dir: PathBuf,
    records: Mutex<Records>,
    lock: File,
}

struct Records {
    current: Record,
    /// The record of a VM's previous run, until it has started again.
    previous: Option<Record>,
}

impl Claim {
    fn new(dir: PathBuf, record: Record, previous: Option<Record>, lock: File) -> Result<Claim> {
        let record = Record {
            uds: runtime_dir()?.join(format!("{}.vsock", record.name)),
            pid: std::process::id(),
            started: now(),
            ..record
        };
        Ok(Claim {
            dir,
            records: Mutex::new(Records {
                current: record,
                previous,
            }),
            lock,
        })
    }

    /// The record.
    pub fn record(&self) -> Record {
        self.lock().current.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Records> {
        self.records
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Changes the record in memory; the next [`Claim::update`] writes it.
    pub fn set(&self, change: impl FnOnce(&mut Record)) {
        change(&mut self.lock().current);
    }

    /// Whether it is started again once it has ended.
    pub fn restarts(&self) -> bool {
        let announced = File::open(self.dir.join(RESTARTS));
        announced.is_ok_and(|file| file.try_lock().is_err())
    }

    /// Changes the record in memory and on disk. The files of an earlier VM are removed then.
    pub fn update(&self, change: impl FnOnce(&mut Record)) -> Result<()> {
        let mut records = self.lock();
        change(&mut records.current);
        write_record(&self.dir, &records.current)?;
        records.previous = None;
        remove_tree(&self.dir.join(EARLIER))
    }

    /// Removes its files.
    pub fn remove(&self) -> Result<()> {
        remove_tree(&self.dir)
    }

    /// Removes the files of a VM that never came up; those of an earlier VM, or the record of the previous run,
    /// are restored.
    pub fn give_up(&self) {
        if !is_at(&self.lock, &self.dir.join(LOCK)) {
            return;
        }
        let _ = match self.lock().previous.take() {
            Some(previous) => write_record(&self.dir, &previous),
            None if !self.dir.join(RECORD).exists() => self.give_back(),
            None => Ok(()),
        };
    }

    fn give_back(&self) -> Result<()> {
        let earlier = self.dir.join(EARLIER);
        if !earlier.exists() {
            return self.remove();
        }
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            if path != earlier && path != self.dir.join(LOCK) {
                remove_if_there(&path)?;
            }
        }
        put_back(&self.dir)
    }
}

/// Moves the files of an ended VM aside.
fn put_aside(dir: &Path) -> Result<()> {
    let earlier = private(dir.join(EARLIER))?;
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        if name != EARLIER && name != LOCK {
            fs::rename(dir.join(&name), earlier.join(&name))?;
        }
    }
    Ok(())
}

/// Moves them back, if there are any.
fn put_back(dir: &Path) -> Result<()> {
    let earlier = dir.join(EARLIER);
    if !earlier.exists() {
        return Ok(());
    }
    for entry in fs::read_dir(&earlier)? {
        let name = entry?.file_name();
        fs::rename(earlier.join(&name), dir.join(&name))?;
    }
    remove_tree(&earlier)
}

fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("unable to remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.give_up();
    }
}

fn read_record(dir: &Path) -> Result<Record> {
    let path = dir.join(RECORD);
    let text = fs::read(&path).with_context(|| format!("unable to read {}", path.display()))?;
    let record = serde_json::from_slice(&text);
    record.with_context(|| format!("{} is damaged", path.display()))
}

/// Atomic, so that a reader sees the old or the new record.
fn write_record(dir: &Path, record: &Record) -> Result<()> {
    let path = dir.join(RECORD);
    let new = dir.join(format!("{RECORD}.new"));
    let text = serde_json::to_vec_pretty(record)?;
    let written = fs::write(&new, text).and_then(|()| fs::rename(&new, &path));
    written.with_context(|| format!("unable to write {}", path.display()))
}

/// Creates a directory for this user only.
fn private(dir: PathBuf) -> Result<PathBuf> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&dir)
        .with_context(|| format!("unable to create {}", dir.display()))?;
    let found = dir.symlink_metadata()?;
    ensure!(
        found.is_dir() && found.uid() == rustix::process::geteuid().as_raw(),
        "{} is another user's",
        dir.display()
    );
    fs::set_permissions(&dir, Permissions::from_mode(0o700))?;
    Ok(dir)
}

/// The directory in a variable. Relative paths are ignored, as required by the XDG specification.
fn variable(name: &str) -> Option<PathBuf> {
    env::var_os(name)
        .map(PathBuf::from)
        .filter(|dir| dir.is_absolute())
}

/// The directory for sockets.
fn runtime_dir() -> Result<PathBuf> {
    private(
        match variable("XDG_RUNTIME_DIR").filter(|dir| dir.is_dir()) {
            Some(dir) => dir.join("pigeon"),
            None => env::temp_dir().join(format!("pigeon-{}", rustix::process::geteuid().as_raw())),
        },
    )
}

/// The state directory. (XDG Base Directory Specification)
fn state_dir() -> Result<PathBuf> {
    private(
        match (variable("XDG_STATE_HOME"), variable("HOME")) {
            (Some(dir), _) => dir.join("pigeon"),
            (None, Some(home)) => home.join(".local/state/pigeon"),
            (None, None) => runtime_dir()?.join("state"),
        }
        .join("vms"),
    )
}

/// Reserves a name for a new VM: the wanted one, or one derived from `stem`.
pub fn claim(wanted: Option<&str>, stem: &str) -> Result<Claim> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if let Some(name) = wanted {
        let good = name.len() <= MAX_NAME && name.chars().all(plain) && !name.starts_with('.');
        ensure!(
            good && !name.is_empty(),
            "a VM's name has letters, digits, '-', '_' and '.', {MAX_NAME} at most"
        );
        return match try_claim(name, false)? {
            Ok(claim) => Ok(claim),
            Err(Taken::Running) => bail!("a VM called {name} is running already"),
            Err(Taken::Ended) => bail!(
                "a VM called {name} has ended and is still recorded: `pigeon rm {name}` removes it"
            ),
        };
    }
    let stem: String = stem
        .chars()
        .map(|c| if plain(c) { c } else { '-' })
        .take(MAX_NAME - 4)
        .collect();
    let stem = stem.trim_start_matches('.');
    let stem = if stem.is_empty() { "vm" } else { stem };
    for number in 1..1000 {
        let name = match number {
            1 => stem.to_string(),
            _ => format!("{stem}-{number}"),
        };
        if let Ok(claim) = try_claim(&name, true)? {
            return Ok(claim);
        }
    }
    bail!("there are too many VMs called {stem}");
}

/// Why a name cannot be used.
enum Taken {
    Running,
    Ended,
}

fn try_claim(name: &str, auto: bool) -> Result<Result<Claim, Taken>> {
    let dir = private(state_dir()?.join(name))?;
    let Some(lock) = lock(&dir)? else {
        return Ok(Err(Taken::Running));
    };
    // Its owner may have been killed before the VM came up.
    put_back(&dir)?;
    if let Ok(old) = read_record(&dir) {
        if !(auto && old.auto) {
            return Ok(Err(Taken::Ended));
        }
        put_aside(&dir)?;
    }
    let record = Record {
        name: name.into(),
        auto,
        ..Record::default()
    };
    Ok(Ok(Claim::new(dir, record, None, lock)?))
}

/// Reserves the name of an ended VM, with its record.
pub fn claim_again(vm: &Vm) -> Result<Claim> {
    let name = &vm.record.name;
    let lock = lock(&vm.dir)?;
    let lock = lock.with_context(|| format!("{name} is running already"))?;
    let previous = read_record(&vm.dir)?;
    let record = Record {
        up: None,
        ended: None,
        exit: None,
        end: None,
        exit_code: None,
        health: None,
        ..previous.clone()
    };
    remove_if_there(&vm.dir.join(RESTARTS))?;
    let uds = previous.uds.clone();
    let claim = Claim::new(vm.dir.clone(), record, Some(previous), lock)?;
    // While it starts, other commands need this process's pid, not that of the previous run.
    let starting = Record {
        uds,
        ..claim.record()
    };
    write_record(&claim.dir, &starting)?;
    Ok(claim)
}

/// Locks the directory of a VM; None if another process holds the lock.
fn lock(dir: &Path) -> Result<Option<File>> {
    let path = dir.join(LOCK);
    let cannot = || format!("unable to lock {}", dir.display());
    let lock = File::create(&path).with_context(cannot)?;
    if !try_lock(&lock, File::try_lock) {
        return Ok(None);
    }
    // Its owner may have removed it between open and lock.
    Ok(is_at(&lock, &path).then_some(lock))
}

fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("unable to remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Tries to take a lock. Other processes may hold it briefly, to test it.
fn try_lock(lock: &File, try_it: impl Fn(&File) -> Result<(), fs::TryLockError>) -> bool {
    (0..5).any(|_| {
        let locked = try_it(lock).is_ok();
        if !locked {
            thread::sleep(Duration::from_millis(5));
        }
        locked
    })
}

fn is_locked(dir: &Path) -> bool {
    File::open(dir.join(LOCK)).is_ok_and(|lock| lock.try_lock_shared().is_err())
}

/// All running and ended VMs, sorted by name.
pub fn all() -> Result<Vec<Vm>> {
    let mut vms = vec![];
    for entry in fs::read_dir(state_dir()?)? {
        let dir = entry?.path();
        let running = is_locked(&dir);
        // A VM that is just starting has no record yet.
        let Ok(record) = read_record(&dir) else {
            continue;
        };
        vms.push(Vm {
            record,
            running,
            dir,
        });
    }
    vms.sort_by(|a, b| a.record.name.cmp(&b.record.name));
    Ok(vms)
}

/// The VM with this name, which may have ended.
pub fn find(name: &str) -> Result<Vm> {
    let mut vms = all()?;
    if let Some(at) = vms.iter().position(|vm| vm.record.name == name) {
        return Ok(vms.swap_remove(at));
    }
    let names: Vec<_> = vms.iter().map(|vm| vm.record.name.as_str()).collect();
    match names[..] {
        [] => bail!("there is no VM called {name}, and no other; `pigeon run IMAGE` starts one"),
        _ => bail!("there is no VM called {name}, but {}", names.join(", ")),
    }
}

/// The running VM with this name.
pub fn find_running(name: &str) -> Result<Vm> {
    let vm = find(name)?;
    ensure!(
        vm.running,
        "the VM {name} has ended ({}); `pigeon logs {name}` shows its output",
        vm.record.status(false)
    );
    Ok(vm)
}

/// The only running VM.
pub fn only_running() -> Result<Vm> {
    let mut vms = all()?;
    vms.retain(|vm| vm.running);
    match vms.len() {
        1 => Ok(vms.swap_remove(0)),
        0 => bail!(
            "no VM is running: start one with `pigeon run`, or pass the Unix socket of a VM's \
             vsock as --uds"
        ),
        _ => {
            let names: Vec<_> = vms
                .iter()
                .map(|vm| format!("--vm {}", vm.record.name))
                .collect();
            bail!(
                "several VMs are running: choose with {}",
                names.join(" or ")
            )
        }
    }
}

/// The only running VM, or the only recorded one.
pub fn only() -> Result<Vm> {
    let mut vms = all()?;
    if !vms.iter().any(|vm| vm.running) && vms.len() == 1 {
        return Ok(vms.swap_remove(0));
    }
    only_running()
}

#[cfg(test)]
mod tests {
    use super::*;
    use pigeon::process::Process;
    use std::{os::unix::process::ExitStatusExt, process::Command};

    #[test]
    fn a_stop_without_a_time_takes_the_one_of_run() {
        let seconds = |recorded, given| {
            let stop_timeout = recorded;
            let record = Record {
                stop_timeout,
                ..Record::default()
            };
            record.stop_timeout(given).unwrap().as_secs()
        };
        assert_eq!(seconds(None, None), 10);
        assert_eq!(seconds(Some(60.0), None), 60);
        assert_eq!(seconds(Some(60.0), Some(1.0)), 1);
        assert!(Record::default().stop_timeout(Some(-1.0)).is_err());
    }

    #[test]
    fn a_signal_goes_to_the_process_that_runs_the_vm_now() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let sleep = || {
            let mut sleep = Command::new("sleep");
            sleep.arg("60");
            Process::spawn(sleep).unwrap()
        };
        let (mut before, mut now) = (sleep(), sleep());
        let record_of = |process: &mut Process| Record {
            pid: process.child().id(),
            ..Record::default()
        };
        let vm = Vm {
            record: record_of(&mut before),
            running: true,
            dir: dir.into(),
        };
        let held = lock(dir).unwrap().unwrap();
        // The process that starts it again has not written its record yet.
        let ended = Record {
            ended: Some(1),
            ..record_of(&mut before)
        };
        write_record(dir, &ended).unwrap();
        vm.signal_owner(Signal::TERM).unwrap();
        write_record(dir, &record_of(&mut now)).unwrap();
        vm.signal_owner(Signal::TERM).unwrap();
        let status = now.wait(Duration::from_secs(20)).unwrap().unwrap();
        assert_eq!(status.signal(), Some(15));
        assert_eq!(before.wait(Duration::from_millis(100)).unwrap(), None);
        // Its process has been waited for, but it has not released the lock.
        assert!(vm.signal_owner(Signal::TERM).is_err());
        drop(held);
        // A process that another test starts may have it open until execve.
        while vm.is_running() {}
        vm.signal_owner(Signal::TERM).unwrap();
        fs::remove_file(dir.join(RECORD)).unwrap();
        vm.signal_owner(Signal::TERM).unwrap();
    }

    #[test]
    fn the_record_of_a_restarted_vm_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("app");
        fs::create_dir(&dir).unwrap();
        let vm = Vm {
            record: Record {
                name: "app".into(),
                ..Record::default()
            },
            running: false,
            dir: dir.clone(),
        };
        let started = lock(&dir).unwrap().unwrap();
        let error = vm.remove().unwrap_err().to_string();
        assert_eq!(error, "app is running again");
        assert!(dir.exists());
        drop(started);
        vm.remove().unwrap();
        assert!(!dir.exists());
        vm.remove().unwrap();
    }
}
