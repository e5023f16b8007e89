//! A separate containerd for a test, with runc. It needs root, containerd, ctr and runc.
#![allow(dead_code, reason = "each test binary uses a part")]

#[path = "../../../tests/common/mod.rs"]
mod common;

use std::{
    fs::{self, File, TryLockError},
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

pub use common::{Place, Tar, busybox_layer, digest, docker_save};
use containerd_shim_protos::{
    Client, TaskClient,
    ttrpc::{self, Code},
};
use pigeon::process::Process;
use rustix::process::Pid;
use serde_json::json;

/// The image for all tests, with two layers.
pub const IMAGE: &str = "docker.io/library/test:1";
pub const RUNC: &str = "io.containerd.runc.v2";
pub const PIGEON: &str = "io.containerd.pigeon.v2";
/// How long a command may take: the machine may be busy with other VMs.
pub const TIMEOUT: Duration = Duration::from_secs(150);

/// A slot for running a VM, as in the lab: only a few run at once on a machine.
struct Slot(#[expect(dead_code, reason = "it is held")] File);

impl Slot {
    fn acquire() -> Slot {
        let count = std::env::var("PIGEON_VMS").ok();
        let count = count.and_then(|count| count.parse().ok()).unwrap_or(2);
        let dir = pigeon::assets::cache_dir().join("slots");
        fs::create_dir_all(&dir).unwrap();
        loop {
            for number in 0..count {
                let lock = File::create(dir.join(number.to_string())).unwrap();
                match lock.try_lock() {
                    Ok(()) => return Slot(lock),
                    Err(TryLockError::WouldBlock) => {}
                    Err(TryLockError::Error(error)) => panic!("{error}"),
                }
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// The status code of a refused call; None if it succeeded, or the error is not the shim's.
pub fn code<T>(result: ttrpc::Result<T>) -> Option<Code> {
    match result {
        Err(ttrpc::Error::RpcStatus(status)) => Some(status.code()),
        _ => None,
    }
}

/// containerd with all its files in one directory.
pub struct Containerd {
    pub place: Place,
    environment: Vec<(&'static str, String)>,
    process: Option<Process>,
    _slot: Slot,
}

/// The result of a command.
#[derive(Debug, PartialEq)]
pub struct Outcome {
    pub status: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Containerd {
    pub fn start() -> Containerd {
        let mut containerd = Containerd {
            place: Place::new(),
            environment: vec![],
            process: None,
            _slot: Slot::acquire(),
        };
        let dir = containerd.place.0.path().display();
        let config = format!(
            "version = 2\nroot = \"{dir}/root\"\nstate = \"{dir}/state\"\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
             [grpc]\naddress = \"{dir}/c.sock\"\n[ttrpc]\naddress = \"{dir}/c.sock.ttrpc\"\n"
        );
        containerd.place.write("config.toml", config);
        containerd.restart();
        let second = Tar::new()
            .file("etc/second", "of the second layer\n")
            .bytes();
        let config = json!({
            "architecture": pigeon::Arch::HOST.debian_name(),
            "os": "linux",
            "config": {"Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"], "Cmd": ["sh"]},
            "rootfs": {"type": "layers", "diff_ids": []},
        });
        let layers = [busybox_layer(pigeon::Arch::HOST), second];
        let mut config = config;
        for layer in &layers {
            let diff_ids = config["rootfs"]["diff_ids"].as_array_mut().unwrap();
            diff_ids.push(json!(format!("sha256:{}", digest(layer))));
        }
        let archive = docker_save(&layers, &config, "test:1");
        let archive = containerd.place.write("image.tar", archive);
        containerd.ok(&["image", "import", archive.to_str().unwrap()]);
        containerd
    }

    /// Restarts it with additional environment variables, which its shims inherit.
    pub fn restart_with(&mut self, environment: &[(&'static str, String)]) {
        self.environment = environment.into();
        self.restart();
    }

    /// Stops it; its shims continue.
    pub fn stop(&mut self) {
        self.process = None;
    }

    /// Starts it, or restarts it.
    pub fn restart(&mut self) {
        self.stop();
        let shim = Path::new(env!("CARGO_BIN_EXE_containerd-shim-pigeon-v2"));
        let mut path = shim.parent().unwrap().as_os_str().to_os_string();
        path.push(":/usr/sbin:/sbin:");
        path.push(std::env::var_os("PATH").unwrap_or_default());
        let mut log = File::options();
        let log = log.create(true).append(true);
        let log = log.open(self.place.path("log")).unwrap();
        let mut command = Command::new(pigeon::assets::tool("containerd").unwrap());
        command
            .arg("--config")
            .arg(self.place.path("config.toml"))
            .env("PATH", path)
            .env("PIGEON_STATE", self.state())
            .envs(self.environment.iter().cloned())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        self.process = Some(Process::spawn(command).unwrap());
        let deadline = Instant::now() + TIMEOUT;
        while self.ctr(&["version"]).status != Some(0) {
            assert!(Instant::now() < deadline, "{}", self.log());
            thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn state(&self) -> PathBuf {
        self.place.path("pigeon")
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.place.path("log")).unwrap()
    }

    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(pigeon::assets::tool("ctr").unwrap());
        let address = self.place.path("c.sock");
        command.arg("--address").arg(address).args(words);
        command.stdin(Stdio::null());
        command
    }

    pub fn ctr(&self, words: &[&str]) -> Outcome {
        self.ctr_with(words, b"")
    }

    /// The same with this input.
    pub fn ctr_with(&self, words: &[&str], input: &[u8]) -> Outcome {
        let [stdout, stderr] = ["stdout", "stderr"].map(|name| {
            let number = thread::current().id();
            self.place.path(&format!("{name}-{number:?}"))
        });
        let mut command = self.command(words);
        command.stdout(File::create(&stdout).unwrap());
        command.stderr(File::create(&stderr).unwrap());
        command.stdin(Stdio::piped());
        let mut process = Process::spawn(command).unwrap();
        let mut stdin = process.child().stdin.take().unwrap();
        let _ = stdin.write_all(input);
        drop(stdin);
        let status = process.wait(TIMEOUT).unwrap();
        let read = |path: &Path| String::from_utf8_lossy(&fs::read(path).unwrap()).into_owned();
        let status = status.unwrap_or_else(|| {
            panic!(
                "{words:?} hangs: {} {} {}",
                read(&stdout),
                read(&stderr),
                self.log()
            )
        });
        Outcome {
            status: status.code(),
            stdout: read(&stdout),
            stderr: read(&stderr),
        }
    }

    /// The output of a command that must succeed.
    #[track_caller]
    pub fn ok(&self, words: &[&str]) -> String {
        let outcome = self.ctr(words);
        assert_eq!(
            outcome.status,
            Some(0),
            "{words:?}: {outcome:?}\n{}",
            self.log()
        );
        outcome.stdout
    }

    /// Runs a container in the foreground.
    pub fn run(&self, runtime: &str, options: &[&str], id: &str, command: &[&str]) -> Outcome {
        let words = ["run", "--rm", "--runtime", runtime];
        self.ctr(&[&words[..], options, &[IMAGE, id], command].concat())
    }

    /// Starts a container in the background.
    #[track_caller]
    pub fn run_detached(&self, runtime: &str, options: &[&str], id: &str, command: &[&str]) {
        let words = ["run", "-d", "--runtime", runtime];
        self.ok(&[&words[..], options, &[IMAGE, id], command].concat());
    }

    /// The state of a task, as shown by `ctr task ls`.
    pub fn status(&self, id: &str) -> Option<String> {
        let tasks = self.ok(&["task", "ls"]);
        let mut lines = tasks
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>());
        lines.find_map(|words| (words[0] == id).then(|| words[2].to_string()))
    }

    /// The pid of a task.
    pub fn pid(&self, id: &str) -> Pid {
        let tasks = self.ok(&["task", "ls"]);
        let mut lines = tasks
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>());
        let pid = lines.find_map(|words| (words[0] == id).then(|| words[1].parse().unwrap()));
        Pid::from_raw(pid.unwrap()).unwrap()
    }

    /// The shim of a task, which is the parent of its VM.
    pub fn shim(&self, id: &str) -> Pid {
        let vm = self.pid(id).as_raw_nonzero();
        let status = fs::read_to_string(format!("/proc/{vm}/status")).unwrap();
        let shim = status.lines().find_map(|line| line.strip_prefix("PPid:\t"));
        Pid::from_raw(shim.unwrap().parse().unwrap()).unwrap()
    }

    /// A client of the only container's shim.
    pub fn shim_client(&self) -> TaskClient {
        let shims = fs::read_dir(self.state().join("containers"));
        let [shim] = &shims.unwrap().map(|shim| shim.unwrap()).collect::<Vec<_>>()[..] else {
            panic!("expected one shim");
        };
        let socket = shim.path().join("shim.sock");
        TaskClient::new(Client::connect(&format!("unix://{}", socket.display())).unwrap())
    }

    /// The files of shared root images.
    pub fn images(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.state().join("images"));
        let entries = entries.into_iter().flatten();
        let paths = entries.map(|entry| entry.unwrap().path());
        paths
            .filter(|path| {
                path.extension()
                    .is_some_and(|extension| extension == "erofs")
            })
            .collect()
    }

    #[track_caller]
    pub fn wait_status(&self, id: &str, wanted: &str) {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let status = self.status(id);
            if status.as_deref() == Some(wanted) {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "{id} is {status:?}, not {wanted}\n{}",
                self.log()
            );
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Processes whose command line contains the test's directory: shims and their VMs.
    pub fn processes(&self) -> Vec<String> {
        let dir = self.place.0.path().to_str().unwrap().to_string();
        let own = std::process::id().to_string();
        let mut found = vec![];
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            let is_containerd = line.contains("config.toml");
            if entry.file_name() != *own && line.contains(&dir) && !is_containerd {
                found.push(line);
            }
        }
        found
    }

    /// Checks that only the image is left.
    #[track_caller]
    pub fn assert_clean(&self) {
        self.assert_left(|line| line.contains(self.place.0.path().to_str().unwrap()));
    }

    /// The same for a test that has its own mounts.
    #[track_caller]
    pub fn assert_clean_but_for_mounts(&self) {
        self.assert_left(|_| false);
    }

    #[track_caller]
    fn assert_left(&self, is_left: impl Fn(&str) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let containers = fs::read_dir(self.state().join("containers"));
            let mut left: Vec<_> = containers
                .into_iter()
                .flatten()
                .map(|entry| entry.unwrap().path().display().to_string())
                .collect();
            left.extend(self.processes());
            let bundles = self
                .place
                .path("state/io.containerd.runtime.v2.task/default");
            let bundles = fs::read_dir(bundles).into_iter().flatten();
            left.extend(bundles.map(|entry| entry.unwrap().path().display().to_string()));
            let mounts = fs::read_to_string("/proc/mounts").unwrap();
            left.extend(
                mounts
                    .lines()
                    .filter(|line| is_left(line))
                    .map(String::from),
            );
            if left.is_empty() {
                return;
            }
            assert!(Instant::now() < deadline, "left: {left:#?}");
            thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // Only after a failed test.
        for id in self.ctr(&["task", "ls", "-q"]).stdout.lines() {
            self.ctr(&["task", "rm", "-f", id]);
        }
    }
}
