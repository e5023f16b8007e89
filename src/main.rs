//! PID 1 for Firecracker micro-VMs: from "the kernel runs /init" to "the workload runs", and to a
//! clean end. [`boot`] is the order in which it happens.
#![no_std]
#![no_main]

mod api;
mod cli;
mod commands;
mod console;
mod end;
mod files;
mod interface;
mod metadata;
mod modules;
mod mounts;
mod poll;
mod root;
mod setup;
mod spawn;
mod supervisor;
mod sys;
mod task;

use crate::api::{Api, Host, SINK};
use crate::console::Console;
use crate::metadata::{PATIENCE, Source};
use crate::poll::{Events, NO_EVENTS, Poller};
use crate::supervisor::{HANDLED, LINGER, Supervisor};
use crate::sys::{Static, Words};
use crate::task::Outcome;
use pigeon_init::accounts::Identity;
use pigeon_init::bytes::decimal;
use pigeon_init::command::Environment;
use pigeon_init::config::{Config, DOCUMENT};
use pigeon_init::json::Spans;
use pigeon_init::text;
use pigeon_init::text::Level;
use rustix::fd::{AsRawFd, IntoRawFd};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Resource, Rlimit};

/// All that is too large for the stack. It is zero pages until it is touched.
struct Memory {
    console: Console,
    api: Api,
    environment: Environment,
    /// The configuration document; given back when the workload runs.
    document: [u8; DOCUMENT],
    /// Files being read, by whoever reads one.
    scratch: [u8; 2 * DOCUMENT],
    /// What is read to be looked at once.
    sink: [u8; SINK],
    events: Events,
}

// SAFETY: a name that only init.ld knows, which puts it behind all others.
#[unsafe(link_section = ".bss.memory")]
static MEMORY: Static<Memory> = Static::new(Memory {
    console: Console::new(),
    api: Api::new(),
    environment: Environment::new(),
    document: [0; DOCUMENT],
    scratch: [0; 2 * DOCUMENT],
    sink: [0; SINK],
    events: NO_EVENTS,
});

/// Open files a process may have.
const OPEN_FILES: u64 = 10_240;

/// What the kernel command line may say.
struct Knobs {
    level: Level,
    source: Source,
    /// How long MMDS is asked, in milliseconds.
    patience: u64,
    /// How long the exit code can be read, in milliseconds.
    linger: u64,
}

impl Knobs {
    fn read(words: Words) -> Self {
        let number = |name: &[u8], default| {
            let number = words.get(name).and_then(decimal);
            number.map_or(default, u64::from)
        };
        Self {
            level: Level::parse(words.get(b"INIT_LOG_LEVEL").unwrap_or_default()),
            source: Source::parse(words.get(b"PIGEON_CONFIG").unwrap_or_default()),
            patience: number(b"PIGEON_MMDS_TIMEOUT_MS", PATIENCE),
            linger: number(b"PIGEON_EXIT_LINGER_MS", LINGER),
        }
    }
}

/// What was taken from the kernel; [`sys`] comes here first.
fn start(arguments: Words, words: Words) -> ! {
    let Some(memory) = MEMORY.take() else {
        sys::exit(1);
    };
    let Memory {
        console,
        api,
        environment,
        document,
        scratch,
        sink,
        events,
    } = memory;
    if rustix::process::getpid() != Pid::INIT {
        sys::exit(cli::run(arguments, environment, document));
    }
    sys::block_signals(HANDLED);
    let knobs = Knobs::read(words);
    let devices = mounts::devices().and_then(|()| standard_streams());
    console.open(knobs.level);
    let started = devices.and_then(|()| {
        let poller = Poller::new(events)?;
        let signals = sys::signalfd(HANDLED).map_err(why!("create a signalfd"))?;
        Ok((poller, signals))
    });
    let (poller, signals) = match started {
        Ok(started) => started,
        Err(why) => {
            console.error(why);
            end::reboot();
        }
    };
    // Ctrl-Alt-Del becomes a signal for us (reboot(2)).
    let _without = rustix::system::reboot(rustix::system::RebootCommand::CadOff);
    let host = Host::new(poller, environment, scratch, sink);
    let mut supervisor = Supervisor::new(console, api, host, signals, knobs.linger);
    let outcome = boot(&mut supervisor, &knobs, document);
    sys::release(document);
    sys::release(supervisor.host.scratch);
    if let Err(why) = outcome {
        supervisor.fail(why);
    }
    supervisor.serve()
}

/// The boot, to the workload's start.
///
/// The kernel waits long in two places, the first ext4 mount and the cgroup mounts: they are made
/// side by side, the root's in a child, and the cgroups' beside the configuration's arrival.
#[inline(never)]
fn boot(supervisor: &mut Supervisor, knobs: &Knobs, document: &mut [u8; DOCUMENT]) -> Outcome {
    mounts::sysfs()?;
    let expedited = mounts::Expedited::on();
    modules::load(supervisor.console, supervisor.host.scratch)?;
    // Beside an answer from the network in a child; beside the root mount alone here, a fork less.
    let fetches = knobs.source != Source::File && interface::eth0_index().is_some();
    let cgroups = match fetches {
        true => Some(task::start(&mut |report| {
            mounts::cgroups(&mut |why| report.warn(why))
        })?),
        false => None,
    };
    mounts::rest(&mut |why| supervisor.console.warn(why))?;
    let mut spans = Spans::default();
    let source = metadata::load(knobs.source, knobs.patience, document, &mut spans)?;
    let config = Config::new(document, &spans);
    config.check().map_err(|why| why.after("configuration: "))?;
    let console = &mut *supervisor.console;
    console.log(
        Level::Info,
        text!("configuration loaded"),
        text!(" source=", source),
    );
    let device = sys::c_str(config.root_device().bytes_with_nul());
    let root = task::start(&mut |report| root::mount(device, supervisor.host.scratch, report))?;
    match cgroups {
        Some(task) => task.wait(c"cgroups", supervisor.console)?,
        None => mounts::cgroups(&mut |why| supervisor.console.warn(why))?,
    }
    root.wait(device, supervisor.console)?;
    root::switch(&mut |why| supervisor.console.warn(why))?;
    drop(expedited);
    limit_open_files()?;
    let mut identity = Identity::default();
    resolve_user(supervisor, &config, &mut identity)?;
    fill_environment(supervisor, &config, &identity)?;
    if let Err(why) = supervisor.api.listen(&supervisor.host.poller) {
        supervisor.console.warn(text!("no API: ", why));
    }
    supervisor.run(&config, &identity)
}

/// /dev/null as descriptors 0 to 2: no other ever gets one of these numbers, and commands without
/// input have this one.
fn standard_streams() -> Outcome {
    let opened = rustix::fs::open(c"/dev/null", OFlags::RDWR, Mode::empty());
    let connected = opened.and_then(|null| {
        let streams = [Some(null), None, None];
        sys::set_streams(&streams)?;
        Ok(streams)
    });
    let [null, ..] = connected.map_err(why!("open /dev/null"))?;
    if let Some(null) = null.filter(|null| null.as_raw_fd() <= 2) {
        let _for_ever = null.into_raw_fd();
    }
    Ok(())
}

fn limit_open_files() -> Outcome {
    let limit = Rlimit {
        current: Some(OPEN_FILES),
        maximum: Some(OPEN_FILES),
    };
    rustix::process::setrlimit(Resource::Nofile, limit).map_err(why!("set the limit of open files"))
}

fn resolve_user(supervisor: &mut Supervisor, config: &Config, identity: &mut Identity) -> Outcome {
    let user = config.user().bytes();
    spawn::resolve(user, supervisor.host.scratch, identity)?;
    supervisor.console.set_identity(identity.uid, identity.gid);
    Ok(())
}

fn fill_environment(supervisor: &mut Supervisor, config: &Config, identity: &Identity) -> Outcome {
    cli::fill_environment(supervisor.host.environment, config)?;
    let environment = &mut supervisor.host.environment;
    environment.set_default(b"HOME=", &identity.home)
}

/// A panic is a fault in this program: it says so and takes the VM down in order.
///
/// It does not say where: as nobody reads it, the compiler leaves the text out of the program.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    if rustix::process::getpid() != Pid::INIT {
        sys::exit(1);
    }
    if let Some((device, _)) = console::open_first() {
        let _written = files::write(&device, b"pigeon-init: level=error msg=\"panic\"\n");
    }
    end::emergency()
}
