//! `pigeon run`: a root image, booted.

use std::{
    collections::VecDeque,
    fs::{self, File},
    io::{self, IsTerminal, Read, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{ChildStdin, ChildStdout},
    sync::mpsc,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use pigeon::{
    Arch, Client, Exit, assets,
    image::run_json_path,
    initrd::Initrd,
    machine::{Disk, End, Machine, Nic, Spec, USER_NETWORK},
    vsock,
};
use serde_json::{Value, json};
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    iterator::Signals,
};

use crate::{FAILED, Guest, exec::variable, terminal, vms};

/// Exit code after a kill, as a shell has it: 128 + SIGKILL.
const KILLED: u8 = 137;
/// Bytes of the console's end that are looked at for a panic.
const TAIL: usize = 16 << 10;

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Hypervisor {
    /// Firecracker where it and KVM are there, else QEMU
    Auto,
    Firecracker,
    Qemu,
}

#[derive(Args)]
pub struct Run {
    /// A root image, such as ./build.sh rootfs makes; then arguments in place of its Cmd (after
    /// its Entrypoint, if it has one)
    #[arg(required = true, trailing_var_arg = true, value_name = "IMAGE [CMD]")]
    words: Vec<String>,
    /// The configuration [default: IMAGE's NAME.run.json, if it is there]
    #[arg(short, long, value_name = "RUN.JSON")]
    config: Option<PathBuf>,
    /// A command in place of the image's Entrypoint
    #[arg(long, value_name = "PROGRAM")]
    entrypoint: Option<String>,
    /// Set a variable, or pass on one that is set here
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// Run as this user
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// Run in this directory
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// The guest's hostname
    #[arg(long, value_name = "NAME")]
    hostname: Option<String>,
    /// Mount another ext4 image; those given are mounted in place of the configuration's Mounts
    #[arg(long, value_name = "IMAGE:PATH")]
    disk: Vec<String>,
    /// The host's network for the guest, by address translation (QEMU), in place of IPConfigs
    #[arg(long)]
    net: bool,
    /// Pass a TCP port of the host on to the guest (QEMU; means --net)
    #[arg(short, long, value_name = "HOST:GUEST")]
    publish: Vec<String>,
    /// A tap device that is there; its addresses come from --config
    #[arg(long, value_name = "DEVICE", conflicts_with_all = ["net", "publish"])]
    tap: Option<String>,
    /// Memory in MiB
    #[arg(short, long, value_name = "MIB", default_value_t = 256)]
    memory: u32,
    /// Virtual processors
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// The VM's name for --vm [default: the image's]
    #[arg(long)]
    name: Option<String>,
    /// Where the Unix socket of the VM's vsock is to be
    #[arg(long, value_name = "SOCKET")]
    uds: Option<PathBuf>,
    /// An uncompressed kernel with all drivers in it [default: Debian's cloud kernel]
    #[arg(long, value_name = "VMLINUX")]
    kernel: Option<PathBuf>,
    /// The initramfs with pigeon-init [default: build/initrd.cpio of the repository]
    #[arg(long, value_name = "CPIO", env = "PIGEON_INITRD")]
    initrd: Option<PathBuf>,
    /// A word of the kernel command line, such as INIT_LOG_LEVEL=debug
    #[arg(long, value_name = "WORD")]
    append: Vec<String>,
    #[command(flatten)]
    guest: Guest,
    /// What runs the VM
    #[arg(long, value_enum, default_value = "auto")]
    vmm: Hypervisor,
    /// Print the configuration and do not boot
    #[arg(long)]
    dry_run: bool,
    /// Print the end as JSON on standard output; the console goes to standard error
    #[arg(long)]
    json: bool,
}

/// `LEFT:RIGHT`
fn pair<'a>(option: &str, text: &'a str) -> Result<(&'a str, &'a str)> {
    let pair = text.rsplit_once(':');
    let pair = pair.filter(|(left, right)| !left.is_empty() && !right.is_empty());
    pair.with_context(|| {
        format!("{option} {text}: there have to be two parts, with a colon between")
    })
}

impl Run {
    fn image(&self) -> &Path {
        Path::new(&self.words[0])
    }

    fn command(&self) -> &[String] {
        &self.words[1..]
    }

    pub fn run(&self) -> Result<u8> {
        ensure!(
            self.image().is_file(),
            "there is no image {}; `./build.sh rootfs SOURCE {0}` makes one of a container image",
            self.image().display()
        );
        let document = self.document()?;
        if self.dry_run {
            println!("{}", serde_json::to_string_pretty(&document)?);
            return Ok(0);
        }
        ensure_ext4(self.image())?;
        for disk in &self.disk {
            ensure_ext4(Path::new(pair("--disk", disk)?.0))?;
        }
        let stem = self
            .image()
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy();
        let claim = vms::claim(self.name.as_deref(), &stem)?;
        let uds = self.uds.as_ref().unwrap_or(&claim.uds);
        vsock::ensure_vacant(uds)?;
        match fs::remove_file(uds) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("unable to replace {}", uds.display()));
            }
            _ => {}
        }
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
        let dir = tempfile::Builder::new().prefix("pigeon-vm-").tempdir()?;
        let mut machine = self.start(&document, dir.path(), uds)?;
        eprintln!(
            "pigeon: {} boots on {}; Ctrl-C stops it; from elsewhere: pigeon exec -it {} sh",
            claim.name,
            machine.hypervisor(),
            match &self.uds {
                None => format!("--vm {}", claim.name),
                Some(uds) => format!("--uds {}", uds.display()),
            }
        );
        let ended = self.watch(machine.as_mut(), uds, &mut signals)?;
        if self.uds.is_some() {
            let _ = fs::remove_file(uds); // the hypervisor may have done so
        }
        Ok(self.tell(&ended))
    }

    /// The configuration: the file's, with what the options say.
    fn document(&self) -> Result<Value> {
        let beside = run_json_path(self.image());
        let path = match &self.config {
            Some(path) => Some(path),
            None => beside.exists().then_some(&beside),
        };
        let mut document = match path {
            None => json!({}),
            Some(path) => {
                let shown = path.display();
                let text = fs::read(path).with_context(|| format!("unable to read {shown}"))?;
                serde_json::from_slice(&text).with_context(|| format!("{shown} is not JSON"))?
            }
        };
        ensure!(document.is_object(), "a configuration is a JSON object");
        if !document["ImageConfig"].is_object() {
            document["ImageConfig"] = json!({});
        }
        if let Some(entrypoint) = &self.entrypoint {
            document["ImageConfig"]["Entrypoint"] = json!([entrypoint]);
        }
        if self.entrypoint.is_some() || !self.command().is_empty() {
            document["ImageConfig"]["Cmd"] = json!(self.command());
            document["ExecOverride"] = Value::Null;
            document["CmdOverride"] = Value::Null;
        }
        if let Some(dir) = &self.workdir {
            document["ImageConfig"]["WorkingDir"] = json!(dir);
        }
        if let Some(user) = &self.user {
            document["UserOverride"] = json!(user);
        }
        if let Some(hostname) = &self.hostname {
            document["Hostname"] = json!(hostname);
        }
        ensure!(
            document["ExtraEnv"].is_object() || document["ExtraEnv"].is_null(),
            "ExtraEnv: must be an object of strings"
        );
        for (name, value) in self.env.iter().filter_map(|text| variable(text)) {
            document["ExtraEnv"][name] = json!(value);
        }
        if !self.disk.is_empty() {
            let mounts = self.disk.iter().zip('b'..='z').map(|(disk, letter)| {
                let (_, path) = pair("--disk", disk)?;
                Ok(json!({"DevicePath": format!("/dev/vd{letter}"), "MountPath": path}))
            });
            document["Mounts"] = Value::Array(mounts.collect::<Result<_>>()?);
        }
        if self.net || !self.publish.is_empty() {
            let net = USER_NETWORK;
            document["IPConfigs"] =
                json!([{"IP": net.guest, "Mask": net.mask, "Gateway": net.gateway}]);
            document["EtcResolv"] = json!({"Nameservers": [net.nameserver]});
        }
        let given = |value: &Value| value.as_array().is_some_and(|words| !words.is_empty());
        let image = &document["ImageConfig"];
        ensure!(
            given(&document["ExecOverride"])
                || document["CmdOverride"].is_string()
                || given(&image["Entrypoint"])
                || given(&image["Cmd"]),
            "nothing to run: there is no {}; give a command: pigeon run {} /bin/sh -c 'echo hello'",
            beside.display(),
            self.image().display()
        );
        if !given(&document["ExecOverride"]) && !given(&image["Entrypoint"]) {
            ensure!(
                !self
                    .command()
                    .first()
                    .is_some_and(|word| word.starts_with('-')),
                "{} would be the program, as there is no Entrypoint: options go before the image",
                self.command()[0]
            );
        }
        document
            .as_object_mut()
            .expect("checked above")
            .retain(|_, value| !value.is_null());
        Ok(document)
    }

    fn start(&self, document: &Value, dir: &Path, uds: &Path) -> Result<Box<dyn Machine>> {
        let product = match &self.initrd {
            Some(path) => {
                fs::read(path).with_context(|| format!("unable to read {}", path.display()))?
            }
            None => assets::initrd(self.guest.arch)?,
        };
        let mut files = Initrd::default();
        let kernel = match &self.kernel {
            Some(kernel) => kernel.clone(),
            None => {
                let kernel = assets::Kernel::stock(self.guest.arch)?;
                files.modules(&kernel)?;
                kernel.image()
            }
        };
        files.file("/pigeon/run.json", 0o600, document.to_string());
        let initrd = dir.join("initrd");
        fs::write(&initrd, files.on_top_of(product))?;

        let mut disks = vec![Disk::file(&fs::canonicalize(self.image())?)];
        for disk in &self.disk {
            let (path, _) = pair("--disk", disk)?;
            let path = fs::canonicalize(path).with_context(|| format!("unable to find {path}"))?;
            disks.push(Disk::file(&path));
        }
        let ports = self.publish.iter().map(|ports| {
            let (host, guest) = pair("--publish", ports)?;
            let number = |text: &str| text.parse().with_context(|| format!("{text:?} is no port"));
            Ok((number(host)?, number(guest)?))
        });
        let nic = match &self.tap {
            Some(tap) => Nic::Tap(tap.clone()),
            None if self.net || !self.publish.is_empty() => {
                Nic::User(ports.collect::<Result<_>>()?)
            }
            None => Nic::None,
        };
        // There is no MMDS to be waited for.
        let mut args = vec!["PIGEON_CONFIG=file".to_string()];
        args.extend(self.append.iter().cloned());
        let firecracker = assets::firecracker().filter(|_| self.guest.arch == Arch::HOST);
        let on_qemu = match (self.vmm, &nic) {
            (Hypervisor::Auto, Nic::User(_)) | (Hypervisor::Qemu, _) => true,
            (Hypervisor::Auto, _) => firecracker.is_none(),
            (Hypervisor::Firecracker, _) => false,
        };
        let spec = Spec {
            args,
            memory_mib: self.memory,
            cpus: self.cpus,
            disks,
            nic,
            vsock: Some(uds.into()),
            ..Spec::new(dir, self.guest.arch, &kernel, &initrd)
        };
        if on_qemu {
            return spec.start_qemu();
        }
        let program = firecracker.context(
            "there is no Firecracker that could run: it needs /dev/kvm, and to be in PATH or named \
             by FIRECRACKER; --vmm qemu needs neither",
        )?;
        spec.start_firecracker(&program)
    }

    /// Shows the console and passes keys and signals on until the VM has ended.
    fn watch(&self, machine: &mut dyn Machine, uds: &Path, signals: &mut Signals) -> Result<Ended> {
        let child = machine.process().child();
        let (console, keyboard) = (child.stdout.take(), child.stdin.take());
        let _restore = match terminal::is_ours() {
            true => Some(terminal::console().context("unable to set the terminal up")?),
            false => None,
        };
        if let Some(keyboard) = keyboard {
            pass_keys(keyboard);
        }
        let console = console.context("the console is piped")?;
        let json = self.json;
        let console = thread::spawn(move || show(console, json));
        let exit = ask_exit_code(uds);
        let mut stopping = false;
        let mut killed = false;
        let status = loop {
            if let Some(status) = machine.process().wait(Duration::from_millis(20))? {
                break status;
            }
            for _ in signals.pending() {
                if stopping {
                    machine.process().kill();
                    killed = true;
                } else {
                    eprintln!("pigeon: stopping it; once more kills it");
                    if self.guest.arch.has_keyboard() {
                        machine.ctrl_alt_delete()?;
                    } else {
                        terminate(uds);
                    }
                    stopping = true;
                }
            }
        };
        let tail = console.join().unwrap_or_default();
        let tail = String::from_utf8_lossy(&tail);
        let end = match machine.end(status) {
            _ if tail.contains("Kernel panic - not syncing") => End::Panic,
            end => end,
        };
        // What was answered has come before the VM's end; nothing else will.
        let exit = exit.recv_timeout(Duration::from_millis(200)).ok();
        let exit = exit.or_else(|| logged_exit(&tail));
        Ok(Ended { exit, end, killed })
    }

    /// Says how it ended and returns the exit code.
    fn tell(&self, ended: &Ended) -> u8 {
        let code = match (&ended.exit, ended.killed) {
            (Some(exit), _) => u8::try_from(exit.code & 0xff).expect("a byte"),
            (None, true) => KILLED,
            (None, false) => FAILED,
        };
        if self.json {
            let end = match ended.end {
                _ if ended.killed => "killed",
                End::Reboot | End::PowerOff => "orderly",
                End::Panic => "panic",
                End::Failed(_) => "failed",
            };
            let (exit, end) = (json!(ended.exit), json!(end));
            println!("{}", json!({"exit": exit, "end": end, "exit_code": code}));
        }
        let error = ended.exit.as_ref().and_then(|exit| exit.error.clone());
        let said = match (&ended.exit, ended.end) {
            _ if ended.killed => "killed".into(),
            (Some(exit), _) if exit.oom_killed => {
                format!(
                    "the workload was killed, out of memory ({} MiB; -m gives more)",
                    self.memory
                )
            }
            (Some(_), _) if error.is_some() => {
                format!(
                    "the workload could not be run: {}",
                    error.unwrap_or_default()
                )
            }
            (Some(exit), End::Reboot | End::PowerOff) => {
                format!("ended with exit code {}", exit.code)
            }
            (_, End::Panic) => "the guest's kernel panicked: its console above says why".into(),
            (_, End::Failed(status)) => format!("the hypervisor failed ({status:?})"),
            (None, _) => "it ended before its API came up: the console above says why".into(),
        };
        eprintln!("pigeon: {said}");
        code
    }
}

/// How a VM has ended.
struct Ended {
    exit: Option<Exit>,
    end: End,
    killed: bool,
}

/// Copies what is typed, or piped in, to the console, as long as there is both.
fn pass_keys(mut keyboard: ChildStdin) {
    if io::stdin().is_terminal() && !terminal::is_ours() {
        // In the background, reading would stop us; the open pipe is left to the VM.
        std::mem::forget(keyboard);
        return;
    }
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(size) = io::stdin().read(&mut buffer) {
            if size == 0 || keyboard.write_all(&buffer[..size]).is_err() {
                break;
            }
        }
        // The end of our input is not the end of the console.
        std::mem::forget(keyboard);
    });
}

/// Shows the console and returns its end.
fn show(mut console: ChildStdout, on_stderr: bool) -> Vec<u8> {
    let mut tail = VecDeque::new();
    let mut buffer = [0; 4096];
    while let Ok(size) = console.read(&mut buffer) {
        if size == 0 {
            break;
        }
        let chunk = &buffer[..size];
        // The VM goes on without anybody who looks.
        let _ = if on_stderr {
            io::stderr().write_all(chunk)
        } else {
            let mut stdout = io::stdout().lock();
            stdout.write_all(chunk).and_then(|()| stdout.flush())
        };
        tail.extend(chunk);
        let surplus = tail.len().saturating_sub(TAIL);
        tail.drain(..surplus);
    }
    tail.into()
}

/// The exit code in the init's last words, for a VM that ended before its API was reached.
fn logged_exit(tail: &str) -> Option<Exit> {
    const MESSAGE: &str = "msg=\"workload exited\" ";
    let line = tail
        .lines()
        .rfind(|line| line.starts_with("pigeon-init: level=") && line.contains(MESSAGE))?;
    let value = |key: &str| {
        let mut words = line.split_whitespace();
        words.find_map(|word| word.strip_prefix(key))
    };
    Some(Exit {
        code: value("exit_code=")?.parse().ok()?,
        oom_killed: value("oom_killed=")? == "true",
        error: None,
    })
}

/// Sends the workload SIGTERM as soon as there is an API, as Ctrl-Alt-Del would.
fn terminate(uds: &Path) {
    const TERM: u8 = 15;
    let uds = uds.to_path_buf();
    thread::spawn(move || {
        // A VM that has ended meanwhile needs no signal.
        let client = Client::connect_within(&uds, Duration::from_secs(60));
        let _ = client.and_then(|client| client.signal(TERM));
    });
}

/// Asks for the workload's exit code as soon as there is an API, and waits for it.
fn ask_exit_code(uds: &Path) -> mpsc::Receiver<Exit> {
    let (sender, exit) = mpsc::channel();
    let uds = uds.to_path_buf();
    thread::spawn(move || {
        // Until the process ends, which is when the VM has.
        let forever = Duration::from_secs(u32::MAX.into());
        let told = Client::connect_within(&uds, forever).and_then(|client| client.exit_code());
        if let Ok(exit) = told {
            let _ = sender.send(exit);
        }
    });
    exit
}

/// What the guest's kernel says of another file is an errno, and which one depends on the file.
fn ensure_ext4(image: &Path) -> Result<()> {
    /// The superblock's `s_magic` (linux/Documentation/filesystems/ext4/super.rst).
    const MAGIC: (u64, [u8; 2]) = (1024 + 0x38, 0xef53_u16.to_le_bytes());
    let mut magic = [0; 2];
    let file = File::open(image).with_context(|| format!("unable to open {}", image.display()))?;
    let read = file.read_exact_at(&mut magic, MAGIC.0);
    ensure!(
        read.is_ok() && magic == MAGIC.1,
        "{} is no ext4 image; `./build.sh rootfs` makes one of a container image",
        image.display()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Words {
        #[command(flatten)]
        run: Run,
    }

    fn document(config: &Value, words: &[&str]) -> Result<Value> {
        let dir = tempfile::tempdir()?;
        let image = dir.path().join("app.ext4");
        fs::write(run_json_path(&image), config.to_string())?;
        let image = image.to_str().context("not UTF-8")?;
        let words: Vec<_> = ["run"]
            .iter()
            .chain(words)
            .map(|word| word.replace("IMAGE", image))
            .collect();
        Words::parse_from(words).run.document()
    }

    #[test]
    fn options_change_the_images_configuration_as_docker_run_does() {
        let image =
            json!({"ImageConfig": {"Entrypoint": ["/app"], "Cmd": ["serve"], "User": "www"}});
        assert_eq!(document(&image, &["IMAGE"]).unwrap(), image);
        let words = [
            "-e", "A=b=c", "-w", "/srv", "-u", "0:0", "IMAGE", "check", "-x",
        ];
        let expected = json!({
            "ImageConfig": {"Entrypoint": ["/app"], "Cmd": ["check", "-x"], "User": "www", "WorkingDir": "/srv"},
            "ExtraEnv": {"A": "b=c"},
            "UserOverride": "0:0",
        });
        assert_eq!(document(&image, &words).unwrap(), expected);
        let words = ["--entrypoint", "sh", "IMAGE", "-c", "id"];
        let shell = &document(&image, &words).unwrap()["ImageConfig"];
        assert_eq!(
            (&shell["Entrypoint"], &shell["Cmd"]),
            (&json!(["sh"]), &json!(["-c", "id"]))
        );
    }

    #[test]
    fn disks_and_networks_are_configured_in_the_guest_too() {
        let config = json!({"ExecOverride": ["/a"]});
        let words = [
            "--disk",
            "a.ext4:/data",
            "--disk",
            "b.ext4:/b",
            "-p",
            "8080:80",
            "IMAGE",
        ];
        let document = document(&config, &words).unwrap();
        let expected = json!([
            {"DevicePath": "/dev/vdb", "MountPath": "/data"},
            {"DevicePath": "/dev/vdc", "MountPath": "/b"},
        ]);
        assert_eq!(document["Mounts"], expected);
        assert_eq!(document["IPConfigs"][0]["Gateway"], "10.0.2.2");
    }

    #[test]
    fn the_console_tells_the_exit_code_too() {
        let console = "serving\r\npigeon-init: level=info msg=\"workload exited\" exit_code=9 \
                       oom_killed=false uid=0 gid=0\r\n[    8.2] reboot: Restarting system\r\n";
        let exit = logged_exit(console).unwrap();
        assert_eq!((exit.code, exit.oom_killed), (9, false));
        assert_eq!(logged_exit("echo pigeon-init: level=info"), None);
    }

    #[test]
    fn nothing_to_run_is_said_before_the_boot() {
        let error = document(&json!({}), &["IMAGE"]).unwrap_err().to_string();
        assert!(error.starts_with("nothing to run"), "{error}");
        let words = ["IMAGE", "-m", "512"];
        let error = document(&json!({}), &words).unwrap_err().to_string();
        assert!(error.contains("options go before the image"), "{error}");
        let words = ["-e", "A=B", "IMAGE", "/a"];
        let error = document(&json!({"ExtraEnv": ["A=B"]}), &words).unwrap_err();
        assert!(error.to_string().starts_with("ExtraEnv: "), "{error}");
        assert!(document(&json!({"ExecOverride": ["/a"]}), &["--disk", "x", "IMAGE"]).is_err());
    }
}
