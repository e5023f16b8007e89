//! The lab's commands for `./build.sh`: `setup` fetches what VMs need, `run` boots a VM with its console shown.

use std::{
    env, fs,
    io::{self, BufRead, IsTerminal},
    path::Path,
    process::ExitCode,
    sync::mpsc,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use pigeon_lab::{
    Arch, End, Vm, assets,
    disk::{Disk, Image, Tree},
    mmds::Mmds,
};
use serde_json::Value;
use signal_hook::{
    consts::{SIGINT, SIGTERM},
    iterator::Signals,
};

const USAGE: &str = "\
usage: pigeon-lab setup             fetch what the lab's VMs are made of
       pigeon-lab run [run.json [WORD...]]
                                    boot build/initrd.cpio with the example's disks and these
                                    words on the kernel command line";

/// MiB of the example's disks.
const ROOT_SIZE: u32 = 32;
const DATA_SIZE: u32 = 16;

fn main() -> ExitCode {
    let words: Vec<_> = env::args().skip(1).collect();
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        ["setup"] => setup(),
        ["run"] => run(&assets::repository().join("tests/example/run.json"), &[]),
        ["run", config, ref args @ ..] => run(Path::new(config), args),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pigeon-lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn setup() -> Result<()> {
    assets::kernel()?;
    if assets::arch() == Arch::X86_64 {
        assets::restorable_kernel()?;
    }
    assets::busybox().map(drop)
}

/// Boots the example with `config` from MMDS. Its disks are created once and kept in `build/`, so a second boot
/// finds what the first one wrote.
fn run(config: &Path, args: &[&str]) -> Result<()> {
    let text = fs::read(config).with_context(|| format!("unable to read {}", config.display()))?;
    let config: Value = serde_json::from_slice(&text)
        .with_context(|| format!("{} is not JSON", config.display()))?;
    let build = assets::build_dir();
    let [root, data, vsock] = ["rootfs.ext4", "data.ext4", "vm.vsock"].map(|name| build.join(name));
    let app = include_bytes!("../../example/myapp");
    make(&root, ROOT_SIZE, || {
        Tree::busybox()?.file("bin/myapp", 0o755, app)
    })?;
    make(&data, DATA_SIZE, Tree::empty)?;

    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let builder = args
        .iter()
        .fold(Vm::builder(), |builder, arg| builder.arg(arg));
    let mut vm = builder
        .name("run")
        .mmds(Mmds::serving(config))
        .disk(Disk::file(&root))
        .disk(Disk::file(&data))
        .vsock(&vsock)
        .echo()
        .boot()?;
    introduce(&vsock);

    let typed = typed_lines();
    let mut asked = false;
    let end = loop {
        if let Some(end) = vm.ended()? {
            break end;
        }
        for line in typed.try_iter() {
            // It may end while the user types.
            let _ = vm.type_text(&line);
        }
        for _ in signals.pending() {
            if asked {
                vm.kill();
            } else {
                eprintln!("[pigeon-lab] stopping the VM; Ctrl-C again to kill it");
                vm.stop()?;
                asked = true;
            }
        }
        thread::sleep(Duration::from_millis(20));
    };
    let log = vm.serial().log().display().to_string();
    eprintln!("[pigeon-lab] the VM has ended: {end:?}; its console is kept in {log}");
    if end != End::Reboot {
        bail!("not the end it should have");
    }
    Ok(())
}

/// Makes an image at `path` unless there is one.
fn make(path: &Path, mib: u32, tree: impl FnOnce() -> Result<Tree>) -> Result<()> {
    if !path.exists() {
        eprintln!("[pigeon-lab] making {}", path.display());
        Image::ext4(&tree()?, mib)?.keep(path)?;
    }
    Ok(())
}

/// Prints how to reach the VM.
fn introduce(vsock: &Path) {
    let vsock = vsock.display();
    eprintln!(
        r#"[pigeon-lab] The VM boots; its console follows. Ctrl-C stops it cleanly.
[pigeon-lab] Its API is HTTP on vsock port 10000, through the Unix socket {vsock}.
[pigeon-lab] From another terminal:
  ./build.sh pigeon exec --uds '{vsock}' -it sh
"#
    );
}

/// Input from the terminal.
fn typed_lines() -> mpsc::Receiver<String> {
    let (sender, lines) = mpsc::channel();
    let stdin = io::stdin();
    if stdin.is_terminal() {
        thread::spawn(move || {
            for line in stdin.lock().lines().map_while(Result::ok) {
                if sender.send(line + "\n").is_err() {
                    break;
                }
            }
        });
    }
    lines
}
