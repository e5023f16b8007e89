//! Time limits of the shutdown, in milliseconds: 45 s in all from the workload's exit to the reboot,
//! whatever hangs. On every path, its steps follow each other.

use crate::sys;
use core::sync::atomic::{AtomicU64, Ordering};

/// The whole.
const TOTAL: u64 = 45_000;
/// How long the exit code can be read, unless the kernel command line says otherwise: then the shutdown
/// takes as much longer or shorter.
pub const LINGER: u64 = 1000;
/// How long remaining processes may take to exit after SIGTERM.
pub const TERM_GRACE: u64 = 500;
/// How long processes may take to exit after SIGKILL: one that is in the kernel may stay.
pub const KILL_TIMEOUT: u64 = 2000;
/// How long all file systems may take, the kernel making them read-only included.
pub const UNMOUNT_TIMEOUT: u64 = 34_000;
/// How much of it all devices but the root's may take together; the rest is the root's.
pub const VOLUMES_TIMEOUT: u64 = 20_000;
/// How long a console that takes nothing is waited for.
pub const CONSOLE_DRAIN_TIMEOUT: u64 = 3000;
/// What the kernel and the machine take to restart.
const RESTART: u64 = 1000;
/// All between those who ask for the exit code and the restart. What the steps leave of it is for a
/// console that takes little.
const STEPS: u64 = TOTAL - LINGER - RESTART;

/// Time for everything but the file systems.
const OTHER_STEPS: u64 = TERM_GRACE + KILL_TIMEOUT + CONSOLE_DRAIN_TIMEOUT;

const _: () = assert!(VOLUMES_TIMEOUT < UNMOUNT_TIMEOUT && UNMOUNT_TIMEOUT + OTHER_STEPS <= STEPS);
// After a panic during the shutdown: if there is no time to repeat the other steps, the file systems have
// had theirs.
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
