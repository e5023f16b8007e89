//! The shutdown after a panic, and the fallback when PID 1 cannot fork.

use crate::console::Console;
use crate::context;
use crate::error::Log;
use crate::process::helper::{self, Helper};
use crate::shutdown::budget::{self, CONSOLE_DRAIN_TIMEOUT, KILL_TIMEOUT, TERM_GRACE};
use crate::shutdown::{
    self,
    detached_fs::{self, KernelFile},
    file_systems,
};
use crate::sys::signal::{SIGKILL, SIGTERM};
use crate::sys::{self, Stopwatch, files};
use proto::message::Level;
use rustix::fd::OwnedFd;
use rustix::fs::{FileType, Mode, OFlags, SeekFrom, makedev};
use rustix::io::Errno;
use rustix::process::WaitOptions;

/// Polling interval, in milliseconds.
const RETRY: i64 = 5;

/// Shuts down after a panic, in the usual order, without the state of the code that panicked.
pub fn after_panic() -> ! {
    let Some(unmount_timeout) = budget::begin_after_panic() else {
        shutdown::reboot();
    };
    let mut console = Console::new();
    console.open(Level::Info);
    console.error(&"panic");
    sys::kill_all(SIGTERM);
    if !wait_for_children(TERM_GRACE) {
        sys::kill_all(SIGKILL);
        let _killed_above = shutdown::kill_remaining();
        if !wait_for_children(KILL_TIMEOUT) {
            console.warn(&"a process cannot be killed");
        }
    }
    match shutdown::quiesce() {
        Ok(helper) => {
            let ended = helper.wait_for(unmount_timeout);
            log_reports(&helper, ended, &mut console);
        }
        Err(error) => {
            console.warn(&error);
            remount_by_kernel(unmount_timeout, &mut console);
        }
    }
    let watch = Stopwatch::start();
    while console.pending() > 0 && watch.elapsed() < CONSOLE_DRAIN_TIMEOUT {
        console.flush();
        sys::sleep(1);
    }
    shutdown::reboot()
}

/// Reaps until there are no children. Returns false if there still are after `timeout` milliseconds.
fn wait_for_children(timeout: u64) -> bool {
    let watch = Stopwatch::start();
    loop {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some(_)) | Err(Errno::INTR) => {}
            Err(_) => return true,
            Ok(None) if watch.elapsed() >= timeout => return false,
            Ok(None) => sys::sleep(RETRY),
        }
    }
}

/// Logs what a helper has reported; if it has timed out, also what it was doing.
pub fn log_reports(helper: &Helper, ended: bool, log: &mut dyn Log) {
    let reports = helper::read_reports(&helper.log, log);
    if let Some(error) = reports.error {
        log.warn(&error);
    }
    if !ended && let Some(step) = reports.step {
        log.warn(&format_args!("timed out {step}"));
    }
}

/// Makes the kernel sync all file systems and remount them read-only (sysrq `s` and `u`,
/// Documentation/admin-guide/sysrq.rst). Kernel threads do it, so PID 1 never waits for a disk; they do it
/// sequentially, so a hung disk blocks those after it. Each key gets half of `timeout` milliseconds. Logs
/// what is still writable then.
pub fn remount_by_kernel(timeout: u64, log: &mut dyn Log) {
    let half = timeout / 2;
    let done = kernel_log().and_then(|(proc, kernel)| {
        sysrq(&proc, &kernel, b"s", b"Emergency Sync complete", half)?;
        if !sysrq(&proc, &kernel, b"u", b"Emergency Remount complete", half)? {
            let mounts = KernelFile::read(&proc, c"self/mountinfo")?;
            file_systems::each_writable_mount(&mounts, "timed out unmounting", &mut |_, text| {
                log.warn(text)
            });
        }
        Ok(())
    });
    if let Err(errno) = done {
        log.warn(&context!("make all file systems read-only")(errno));
    }
}

/// Opens a procfs, and the kernel's log at its end.
fn kernel_log() -> Result<(OwnedFd, OwnedFd), Errno> {
    let proc = detached_fs::proc()?;
    let nodes = detached_fs::mount(c"tmpfs", b"")?;
    // /dev/kmsg (Documentation/admin-guide/devices.txt)
    let (kind, mode) = (FileType::CharacterDevice, Mode::RUSR);
    rustix::fs::mknodat(&nodes, c"kmsg", kind, mode, makedev(1, 11))?;
    let log = files::open_at(&nodes, c"kmsg", OFlags::NONBLOCK)?;
    rustix::fs::seek(&log, SeekFrom::End(0))?;
    Ok((proc, log))
}

/// Triggers a sysrq function and waits until the kernel logs that it is complete. Returns false after
/// `timeout` milliseconds.
fn sysrq(
    proc: &OwnedFd,
    log: &OwnedFd,
    key: &[u8],
    done: &[u8],
    timeout: u64,
) -> Result<bool, Errno> {
    files::write_at(proc, c"sysrq-trigger", key)?;
    let watch = Stopwatch::start();
    // The longest record (CONSOLE_EXT_LOG_MAX, linux/printk.h).
    let mut record = [0; 8192];
    while watch.elapsed() < timeout {
        match files::read(log, &mut record) {
            Ok(count) => {
                let record = record.get(..count).unwrap_or(&[]);
                if record.windows(done.len()).any(|words| words == done) {
                    return Ok(true);
                }
            }
            // Records that were overwritten meanwhile.
            Err(Errno::PIPE) => {}
            Err(_) => sys::sleep(RETRY),
        }
    }
    Ok(false)
}
