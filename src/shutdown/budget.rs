//! Time limits of the shutdown, in milliseconds: 45 s in total from the workload's exit to the reboot,
//! whatever hangs. The steps are sequential on every path.

use crate::sys;
use core::sync::atomic::{AtomicU64, Ordering};

/// The whole shutdown.
const TOTAL: u64 = 45_000;
/// How long the exit code can be read, unless the kernel command line sets another value, by which the
/// shutdown gets longer or shorter.
pub const LINGER: u64 = 1000;
/// How long remaining processes may take to exit after SIGTERM.
pub const TERM_GRACE: u64 = 500;
/// How long processes may take to exit after SIGKILL: one that is blocked in the kernel may not exit.
pub const KILL_TIMEOUT: u64 = 2000;
/// How long all file systems may take, including the kernel's emergency remount.
pub const UNMOUNT_TIMEOUT: u64 = 34_000;
/// How much of that all devices but the root's may take together; the remainder is for the root.
pub const VOLUMES_TIMEOUT: u64 = 20_000;
/// How long to wait for a console that accepts nothing.
pub const CONSOLE_DRAIN_TIMEOUT: u64 = 3000;
/// How long the kernel and the machine take to restart.
const RESTART: u64 = 1000;
/// Everything between lingering and the restart. What the steps do not use is left for a slow console.
const STEPS: u64 = TOTAL - LINGER - RESTART;

/// Time for everything but the file systems.
const OTHER_STEPS: u64 = TERM_GRACE + KILL_TIMEOUT + CONSOLE_DRAIN_TIMEOUT;

const _: () = assert!(VOLUMES_TIMEOUT < UNMOUNT_TIMEOUT && UNMOUNT_TIMEOUT + OTHER_STEPS <= STEPS);
// After a panic during the shutdown: if there is no time to repeat the other steps, the file systems have
// had their time already.
const _: () = assert!(TERM_GRACE + KILL_TIMEOUT + UNMOUNT_TIMEOUT + OTHER_STEPS <= STEPS);

/// Deadline of the shutdown, on the monotonic clock. One thread uses it: a load and a store are a swap,
/// which on aarch64 would need the run-time library's atomics.
static DEADLINE: AtomicU64 = AtomicU64::new(u64::MAX);

/// Starts the shutdown. Returns how long it may take.
pub fn begin() -> u64 {
    DEADLINE.store(sys::milliseconds().saturating_add(STEPS), Ordering::Relaxed);
    STEPS
}

/// Starts the shutdown after a panic, within the deadline of one already started. Returns the time for
/// unmounting; `None` if there is none left, or if this path has panicked before.
pub fn begin_after_panic() -> Option<u64> {
    let deadline = DEADLINE.load(Ordering::Relaxed);
    DEADLINE.store(0, Ordering::Relaxed);
    let left = deadline.saturating_sub(sys::milliseconds());
    left.checked_sub(OTHER_STEPS)
        .map(|most| most.min(UNMOUNT_TIMEOUT))
}
