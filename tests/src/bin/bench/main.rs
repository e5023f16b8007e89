//! The benchmark: `./build.sh bench`. Boots the init, the sequential floor and other inits in turns
//! and prints one table.
//!
//! How the figures are measured:
//!
//! - **Time** is the guest's. Under `-icount` its clock counts executed instructions, 1 ns each,
//!   and jumps to the next timer when the guest is idle, so that a boot takes the same time
//!   whatever else the host does. The kernel often waits for a tick: the runs start /init at evenly
//!   spread instants between two ticks. The *median* of the runs is shown; the JSON has all.
//! - **The processor** has RDRAND, as each that Firecracker runs on: without it the kernel hashes
//!   its own state for every inode and process that it creates in this time.
//! - **Disks** are RAM disks (brd), which the loader has filled: the guest's clock does not include
//!   the time of a host's disk, and would jump from timer to timer meanwhile. Disk requests are
//!   counted in separate boots, with virtio disks.
//! - **The start** is a loader (`tests/bench/load.c`), the same for each init. It is the kernel's
//!   /init: it loads the stock kernel's modules (a kernel made for Firecracker has the drivers
//!   built in), deletes them, records the time in the kernel's log and executes the init under
//!   test.
//! - **The workload** (`workload.c`, 4 KiB, no libc) reads the clock with its first instructions,
//!   and PID 1's processor time with the next.
//! - **The floor** (`floor.c`) makes the mounts of the boot one after the other, executes the
//!   workload, and does nothing else. **Parallel** is the same with the root mounted at the same
//!   time, and expedited RCU: the minimum that the kernel needs.
//! - **MMDS** is a process in the same VM, at the other end of a veth pair and in its own network
//!   namespace: a peer outside would respond in the host's time. Its processor time is subtracted.
//! - **The end** is from an instant that the workload has printed and then spins for to the
//!   kernel's line `reboot: Restarting system`, which is later than reboot(2) by the time for the
//!   devices. Either no client reads the code (`PIGEON_EXIT_LINGER_MS=0`), or a call of
//!   /v1/exit_code waits for it.
//! - **System calls, page faults, steps** come from the kernel's tracing in a separate boot, as
//!   tracing itself takes time. An instruction in user space is a nanosecond between two calls.
//! - **Ready** is from listen(2) on the API's port to the write of the event `ready`, which the
//!   host has received; by the same tracing.
//! - **Unpacking** is between two lines of the kernel's log, with only the init and the loader (5
//!   KiB) in the initrd.
//! - **Memory** is read from /proc/1/smaps_rollup, /proc/1/status and /proc/meminfo a second after
//!   the workload's start.
//! - **Idle**: in a minute without events, /proc/1/schedstat counts how often PID 1 gets the
//!   processor. A process that never runs makes no system call.
//! - **The API** is measured from the host in real time, alternating with an echo server, a minimal
//!   server that executes commands, and a spawn loop in the same VM: the ratio of medians of each
//!   VM, and the median of the VMs.
//! - **The whole document** is that of `tests/example`, with a volume, names, hosts, resolv.conf
//!   and a network. Both floors have a program that does the same.
//! - **Two processors** are measured in real time, as QEMU only counts the instructions of one:
//!   this is emulation, ten times slower than a real processor and than what the kernel waits for.
//!   Compare the columns, on an idle host.
//! - **Disk requests** are the hypervisor's count at the workload's first line, of two boots of the
//!   whole document on the same disks.

mod boots;
mod guest;
mod parameters;
mod table;
mod trace;

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result, bail, ensure};
use pigeon_lab::assets;

use boots::{Kind, Lab, Mode, Subject, Told};
use table::{Entry, Samples};

const USAGE: &str = "\
usage: bench [--runs N] [--vs NAME=PATH[:CONFIGPATH]]... [--only MODE[,MODE...]] [--json FILE]
       bench --kernel-parameters [--runs N]

  --runs N    boots of each kind; 5 when not said
  --vs        another init, and where in its initrd it has its configuration (/pigeon/run.json)
  --only      of file, mmds, whole, whole-mmds, unified, overlay, two-processors, requests, reader,
              unpack, serve, commands, trace, trace-mmds, trace-whole, trace-unified, trace-end, ready
  --json      all samples and all traces, too
  --kernel-parameters
              what kernel parameters, the initrd and the root cost a cold start, and nothing else";

/// The default path of an init's configuration.
const CONFIG_PATH: &str = "/pigeon/run.json";

const MODES: [Mode; 18] = [
    Mode::File,
    Mode::Mmds,
    Mode::Whole,
    Mode::WholeMmds,
    Mode::Unified,
    Mode::Overlay,
    Mode::TwoProcessors,
    Mode::Requests,
    Mode::Reader,
    Mode::Unpack,
    Mode::Serve,
    Mode::Commands,
    Mode::Trace,
    Mode::TraceMmds,
    Mode::TraceWhole,
    Mode::TraceUnified,
    Mode::TraceEnd,
    Mode::Ready,
];

struct Options {
    runs: usize,
    others: Vec<Subject>,
    modes: Vec<Mode>,
    json: Option<PathBuf>,
    parameters: bool,
}

fn main() -> ExitCode {
    let words: Vec<_> = env::args().skip(1).collect();
    let options = match parse(&words) {
        Ok(options) => options,
        Err(error) => {
            eprintln!("bench: {error:#}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn parse(words: &[String]) -> Result<Options> {
    let mut options = Options {
        runs: 5,
        others: vec![],
        modes: MODES.into(),
        json: None,
        parameters: false,
    };
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let mut value = || {
            words
                .next()
                .with_context(|| format!("{word} needs a value"))
        };
        match word.as_str() {
            "--runs" => options.runs = value()?.parse().context("--runs")?,
            "--vs" => options.others.push(other(value()?)?),
            "--only" => {
                let mode = |name| MODES.into_iter().find(|mode: &Mode| mode.name() == name);
                let modes = value()?
                    .split(',')
                    .map(|name| mode(name).context("no such mode"));
                options.modes = modes.collect::<Result<_>>()?;
            }
            "--kernel-parameters" => options.parameters = true,
            "--json" => options.json = Some(value()?.into()),
            _ => bail!("what is {word:?}?"),
        }
    }
    ensure!(options.runs > 0, "--runs: at least one");
    Ok(options)
}

/// NAME=PATH[:CONFIGPATH]
fn other(text: &str) -> Result<Subject> {
    let (name, path) = text
        .split_once('=')
        .context("--vs NAME=PATH[:CONFIGPATH]")?;
    let (init, config_path) = path.rsplit_once(':').unwrap_or((path, CONFIG_PATH));
    ensure!(Path::new(init).is_file(), "--vs: there is no {init}");
    Ok(Subject {
        name: name.into(),
        init: init.into(),
        config_path: config_path.into(),
        kind: Kind::Other,
    })
}

/// Measures and prints everything; false if a figure of the product or the floor is missing.
fn run(options: Options) -> Result<bool> {
    eprintln!("bench: compiling the guest's programs, making its disk");
    let lab = Lab::new()?;
    let ours = |name: &str, init, kind| Subject {
        name: name.into(),
        init,
        config_path: CONFIG_PATH.into(),
        kind,
    };
    let product = ours(
        "pigeon-init",
        assets::build_dir().join("init"),
        Kind::Product,
    );
    if options.parameters {
        parameters::run(&lab, &product, options.runs)?;
        return Ok(true);
    }
    let mut subjects = vec![
        product,
        ours("floor", lab.program("floor"), Kind::Floor),
        ours("parallel", lab.program("parallel"), Kind::Parallel),
    ];
    subjects.extend(options.others);
    let mut entries = Vec::new();
    for subject in subjects {
        let size =
            fs::metadata(&subject.init).with_context(|| subject.init.display().to_string())?;
        entries.push(Entry {
            binary_size: size.len() as f64,
            initrd_size: lab.initrd_size(&subject)? as f64,
            subject,
            samples: Samples::default(),
            failures: vec![],
            breakdowns: BTreeMap::new(),
        });
    }

    let times = |mode: Mode| if mode.is_repeated() { options.runs } else { 1 };
    let boots = |entry: &Entry| {
        let modes = options
            .modes
            .iter()
            .filter(|mode| mode.suits(entry.subject.kind));
        modes.map(|mode| times(*mode)).sum::<usize>()
    };
    let total: usize = entries.iter().map(boots).sum();
    let mut done = 0;
    for run in 0..options.runs {
        for mode in &options.modes {
            for entry in &mut entries {
                if mode.suits(entry.subject.kind) && run < times(*mode) {
                    done += 1;
                    eprintln!(
                        "bench: {done} of {total}: {}, {}",
                        entry.subject.name,
                        mode.name()
                    );
                    let phase = run as f64 / options.runs as f64;
                    take(entry, *mode, lab.boot(&entry.subject, *mode, phase));
                }
            }
        }
    }

    print!("{}", table::show_all(&entries));
    if let Some(path) = options.json {
        let text = serde_json::to_string_pretty(&table::json(&entries, options.runs))?;
        fs::write(&path, text + "\n").with_context(|| path.display().to_string())?;
    }
    Ok(entries
        .iter()
        .all(|e| e.subject.kind == Kind::Other || e.failures.is_empty()))
}

/// Adds the result of a boot.
fn take(entry: &mut Entry, mode: Mode, told: Result<Told>) {
    match told {
        Ok(Told {
            mut figures,
            breakdown,
        }) => {
            if let Some(breakdown) = breakdown {
                let title = format!("{}, {}", entry.subject.name, mode.name());
                println!("{}", breakdown.show(&title));
                breakdown.summarise(&mut figures);
                entry.breakdowns.insert(mode.name(), breakdown.json());
            }
            entry.samples.add(mode, figures);
        }
        Err(error) => {
            eprintln!("bench: {}, {}: {error:#}", entry.subject.name, mode.name());
            entry
                .failures
                .push(format!("{}: {}", mode.name(), error.root_cause()));
        }
    }
}
