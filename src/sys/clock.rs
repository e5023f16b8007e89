//! Time (clock_gettime(2), nanosleep(2)).

use super::syscall::call;
use core::cell::Cell;
use linux_raw_sys::general as uapi;
use rustix::event::Timespec;

/// Milliseconds of CLOCK_MONOTONIC.
///
/// By a system call: rustix reads the clock through the vDSO, whose lookup is 2.4 KiB of code.
pub fn milliseconds() -> u64 {
    let mut time = uapi::__kernel_timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let arguments = [
        uapi::CLOCK_MONOTONIC as usize,
        &raw mut time as usize,
        0,
        0,
        0,
    ];
    // SAFETY: writes one timespec at `time`. It fails for no clock that every kernel has.
    let _always = unsafe { call(uapi::__NR_clock_gettime, arguments) };
    (time.tv_sec as u64)
        .wrapping_mul(1000)
        .wrapping_add(time.tv_nsec as u64 / 1_000_000)
}

/// A longer step of the clock than a second is a pause of the VM, where steps are short.
pub const PAUSED: u64 = 1000;

/// How long something takes, in milliseconds; the VM's pauses count as [`PAUSED`] at most.
pub struct Stopwatch {
    last: Cell<u64>,
    elapsed: Cell<u64>,
}

impl Stopwatch {
    /// Starts at 0.
    pub fn start() -> Self {
        Self {
            last: Cell::new(milliseconds()),
            elapsed: Cell::new(0),
        }
    }

    /// The time up to now; to be asked again and again.
    pub fn elapsed(&self) -> u64 {
        let now = milliseconds();
        let step = now.saturating_sub(self.last.replace(now)).min(PAUSED);
        self.elapsed.set(self.elapsed.get().saturating_add(step));
        self.elapsed.get()
    }
}

/// Sleeps: in children, and in PID 1 where nothing else is to be done, as in the end after a panic.
pub fn sleep(milliseconds: i64) {
    let time = Timespec {
        tv_sec: milliseconds / 1000,
        tv_nsec: milliseconds % 1000 * 1_000_000,
    };
    let _interrupted = rustix::thread::nanosleep(&time);
}
