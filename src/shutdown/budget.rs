//! How long the end may take, in milliseconds: 45 s from the workload's end to the machine's, whatever
//! hangs. Its steps follow each other, on each path.

use crate::sys;
use core::sync::atomic::{AtomicU64, Ordering};

/// The whole.
const TOTAL: u64 = 45_000;
/// How long the exit code can be read, unless the kernel command line says otherwise: then the end is
/// as much longer or shorter.
pub const LINGER: u64 = 1000;
/// How long what is left may take to stop when it is asked to.
pub const TERM_GRACE: u64 = 500;
/// How long what is killed may take to go: a process in the kernel may stay.
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

/// What all but the file systems takes.
const REST: u64 = TERM_GRACE + KILL_TIMEOUT + CONSOLE_DRAIN_TIMEOUT;

const _: () = assert!(VOLUMES_TIMEOUT < UNMOUNT_TIMEOUT && UNMOUNT_TIMEOUT + REST <= STEPS);
// After a panic in the midst of it: where there is no time for the rest once more, the file systems have
// had theirs.
const _: () = assert!(TERM_GRACE + KILL_TIMEOUT + UNMOUNT_TIMEOUT + REST <= STEPS);

/// When the end is over, on the monotonic clock. There is one thread: a load and a store are a swap,
/// which on aarch64 would need the run-time library's atomics.
static DEADLINE: AtomicU64 = AtomicU64::new(u64::MAX);

/// Begins the end: how long it may take.
pub fn begin() -> u64 {
    DEADLINE.store(sys::milliseconds().saturating_add(STEPS), Ordering::Relaxed);
    STEPS
}

/// Begins the end after a panic, in the time that is left of one that has begun: how long all file
/// systems may take. None when there is no time for the rest, and after a panic on this way.
pub fn begin_after_panic() -> Option<u64> {
    let deadline = DEADLINE.load(Ordering::Relaxed);
    DEADLINE.store(0, Ordering::Relaxed);
    let left = deadline.saturating_sub(sys::milliseconds());
    left.checked_sub(REST).map(|most| most.min(UNMOUNT_TIMEOUT))
}
