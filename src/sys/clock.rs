//! Time (clock_gettime(2), nanosleep(2)).

use super::syscall::call;
use core::cell::Cell;
use linux_raw_sys::general as uapi;
use rustix::event::Timespec;
#[cfg(feature = "snapshot")]
use rustix::fd::{AsRawFd, OwnedFd};
use rustix::io::Result;
#[cfg(feature = "snapshot")]
use rustix::time::ClockId;

/// A clock's time in nanoseconds.
///
/// A plain system call: rustix uses the vDSO, whose lookup takes 2.4 KiB of code.
fn nanoseconds(clock: u32) -> Result<i64> {
    let mut time = uapi::__kernel_timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let arguments = [clock as i32 as usize, &raw mut time as usize, 0, 0, 0];
    // SAFETY: writes one timespec at `time`.
    unsafe { call(uapi::__NR_clock_gettime, arguments) }?;
    Ok(time
        .tv_sec
        .wrapping_mul(1_000_000_000)
        .wrapping_add(time.tv_nsec))
}

/// Milliseconds of CLOCK_MONOTONIC.
pub fn milliseconds() -> u64 {
    // It cannot fail for this clock.
    nanoseconds(uapi::CLOCK_MONOTONIC).unwrap_or(0) as u64 / 1_000_000
}

/// Microseconds of the same clock.
#[cfg(feature = "snapshot")]
pub fn microseconds() -> u64 {
    nanoseconds(uapi::CLOCK_MONOTONIC).unwrap_or(0) as u64 / 1000
}

/// Microseconds since 1970.
#[cfg(feature = "snapshot")]
pub fn real_time() -> Result<i64> {
    nanoseconds(uapi::CLOCK_REALTIME).map(|time| time / 1000)
}

/// The time of a clock device, in microseconds since 1970 (FD_TO_CLOCKID, clock_getres(2)).
#[cfg(feature = "snapshot")]
pub fn device_time(device: &OwnedFd) -> Result<i64> {
    const CLOCKFD: u32 = 3;
    nanoseconds((!(device.as_raw_fd() as u32)) << 3 | CLOCKFD).map(|time| time / 1000)
}

/// Sets the time, in microseconds since 1970 (clock_settime(2)).
#[cfg(feature = "snapshot")]
pub fn set_real_time(time: i64) -> Result<()> {
    let time = Timespec {
        tv_sec: time.div_euclid(1_000_000),
        tv_nsec: time.rem_euclid(1_000_000) * 1000,
    };
    rustix::time::clock_settime(ClockId::Realtime, time)
}

/// A step of the clock longer than this, in milliseconds, is taken for a pause of the VM.
pub const PAUSE_THRESHOLD: u64 = 1000;

/// Measures elapsed time in milliseconds; each pause of the VM counts as at most [`PAUSE_THRESHOLD`].
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

    /// The elapsed time. Must be called at short intervals, as pauses are detected between calls.
    pub fn elapsed(&self) -> u64 {
        let now = milliseconds();
        let step = now
            .saturating_sub(self.last.replace(now))
            .min(PAUSE_THRESHOLD);
        self.elapsed.set(self.elapsed.get().saturating_add(step));
        self.elapsed.get()
    }
}

/// Sleeps. For children, and for PID 1 only where it has nothing else to do: between polls of MMDS, and after
/// a panic.
pub fn sleep(milliseconds: i64) {
    let time = Timespec {
        tv_sec: milliseconds / 1000,
        tv_nsec: milliseconds % 1000 * 1_000_000,
    };
    let _interrupted = rustix::thread::nanosleep(&time);
}
