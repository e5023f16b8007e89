//! PID 1 for Firecracker micro-VMs.
//!
//! The life of a VM: [`boot`] takes it from the kernel's exec of /init to the running workload, the
//! [`supervisor`] serves the host through the [`api`] until the workload ends, and [`shutdown`]
//! leaves the disks clean. With the feature `snapshot`, `restore` gives a clone its own identity.
#![no_std]
#![no_main]

mod api;
mod boot;
mod console;
mod context;
mod error;
mod output_log;
mod page;
mod process;
#[cfg(feature = "snapshot")]
mod restore;
mod shutdown;
mod supervisor;
mod sys;
mod volumes;

use crate::api::Api;
use crate::boot::DeferredCleanup;
use crate::boot::cli;
use crate::boot::kernel_params::KernelParams;
use crate::boot::mounts;
use crate::console::Console;
use crate::context::{ARENA, Buffers, CommandDefaults, Context, TEMP_BUFFER, document_memory};
use crate::error::Result;
#[cfg(feature = "snapshot")]
use crate::restore::Restore;
use crate::supervisor::{Events, HANDLED, Supervisor};
use crate::sys::epoll::{EventBuffer, NO_EVENTS, Poller};
use crate::sys::{GuestThreads, Region, StackStrings, Static};
use rustix::fd::{AsRawFd, IntoRawFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use rustix::process::{DumpableBehavior, Pid};

/// Everything that is too large for the stack; zero pages until they are touched.
struct Memory {
    console: Console,
    api: Api,
    defaults: CommandDefaults,
    buffers: Buffers,
    events: EventBuffer,
    guest_threads: GuestThreads,
}

static MEMORY: Static<Memory> = Static::new(Memory {
    console: Console::new(),
    api: Api::new(),
    defaults: CommandDefaults::new(),
    buffers: Buffers {
        arena: [0; ARENA],
        temp: [0; TEMP_BUFFER],
    },
    events: NO_EVENTS,
    guest_threads: GuestThreads::new(),
});

entry!(start);

/// The first safe code of the process, called by [`entry!`] with the strings that the kernel put on the
/// stack.
fn start(arguments: StackStrings, environment: StackStrings) -> ! {
    let Some(memory) = MEMORY.take() else {
        sys::exit(1);
    };
    if rustix::process::getpid() != Pid::INIT {
        sys::exit(cli::run(arguments, &mut memory.defaults.environment));
    }
    live(memory, &KernelParams::read(environment))
}

/// Boots, serves, and shuts down.
fn live(memory: &'static mut Memory, params: &KernelParams) -> ! {
    let Memory {
        console,
        api,
        defaults,
        buffers,
        events,
        guest_threads,
    } = memory;
    sys::block_signals(HANDLED);
    // Before Linux 5.16 a core dump of a child that shares this memory kills all processes that share
    // it.
    let _infallible = rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable);
    let devices = mounts::mount_devtmpfs().and_then(|()| open_standard_streams());
    console.open(params.level);
    let opened = devices.and_then(|()| open_resources(events));
    let (poller, signals, proc, scratch) = match opened {
        Ok(opened) => opened,
        Err(error) => {
            console.error(&error);
            shutdown::reboot();
        }
    };
    // Ctrl-Alt-Del then sends SIGINT to PID 1 (reboot(2)).
    let _unsupported = rustix::system::reboot(rustix::system::RebootCommand::CadOff);
    let context = Context::new(poller, defaults, buffers, scratch, guest_threads, proc);
    let mut supervisor = Supervisor::new(console, api, context, signals, params.linger);
    supervisor.events = Events::new(params.events_port);
    supervisor.set_output(params.output, params.output_log());
    let mut cleanup = DeferredCleanup::default();
    let booted = document_memory()
        .and_then(|mut memory| boot::run(&mut supervisor, params, &mut memory, &mut cleanup));
    boot::finish(&mut supervisor, cleanup);
    // Frees the pages that the boot has touched, with their page tables; from now on children use it.
    if let Ok(memory) = document_memory() {
        supervisor.context.scratch = memory;
    }
    sys::release_stack();
    if let Err(errno) = sys::lock_memory() {
        supervisor
            .console
            .warn(&context!("lock the memory of PID 1")(errno));
    }
    #[cfg(feature = "snapshot")]
    let mut restore = Restore::new(params);
    match booted {
        Ok(()) => {
            #[cfg(feature = "snapshot")]
            restore.begin(&mut supervisor.context);
        }
        Err(error) => supervisor.fail(error),
    }
    loop {
        supervisor.run_once();
        #[cfg(feature = "snapshot")]
        restore.advance(&mut supervisor);
    }
}

/// Opens what PID 1 cannot do without: an epoll instance, a signalfd, /proc, and memory for files.
fn open_resources(events: &'static mut EventBuffer) -> Result<(Poller, OwnedFd, OwnedFd, Region)> {
    let poller = Poller::new(events)?;
    let signals = sys::signalfd(HANDLED).map_err(context!("create a signalfd"))?;
    Ok((poller, signals, mounts::mount_procfs()?, document_memory()?))
}

/// Opens /dev/null as descriptors 0 to 2, so that no other file ever gets these numbers, and as the
/// standard input of commands without one.
fn open_standard_streams() -> Result {
    // Without a console in the initramfs this becomes descriptor 0 itself, so it must survive an exec.
    let opened = rustix::fs::open(c"/dev/null", OFlags::RDWR, Mode::empty());
    let null = opened
        .and_then(|null| sys::set_streams(Some(&null), &null, &null).map(|()| null))
        .map_err(context!("open /dev/null"))?;
    if null.as_raw_fd() <= 2 {
        let _leaked = null.into_raw_fd();
    }
    Ok(())
}

/// A panic is a bug in this program: logs it and shuts the VM down in order.
///
/// The message and location are not logged, so that the compiler can leave their text out.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    if rustix::process::getpid() != Pid::INIT {
        sys::exit(1);
    }
    shutdown::last_resort::after_panic()
}
