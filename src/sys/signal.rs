//! Signal masks and signalfd (signal(7), signalfd(2), rt_sigprocmask(2)).

use super::syscall::{call, call_for_fd};
use linux_raw_sys::general as uapi;
use rustix::fd::OwnedFd;
use rustix::io::Result;

pub use uapi::{SIGCHLD, SIGHUP, SIGINT, SIGKILL, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};

/// A set of signals in the kernel's format: bit `n - 1` is signal `n`.
#[derive(Clone, Copy)]
pub struct SignalSet(u64);

impl SignalSet {
    /// No signal.
    pub const EMPTY: Self = Self(0);
    /// All of them.
    pub const ALL: Self = Self(u64::MAX);

    /// A set of signals, by number.
    pub const fn of<const N: usize>(signals: [u32; N]) -> Self {
        let mut set = 0;
        let mut rest: &[u32] = &signals;
        while let [first, others @ ..] = rest {
            set |= 1 << (*first - 1);
            rest = others;
        }
        Self(set)
    }
}

/// Blocks exactly these signals.
pub fn block_signals(set: SignalSet) {
    let mask = &raw const set.0 as usize;
    let arguments = [uapi::SIG_SETMASK as usize, mask, 0, size_of::<u64>(), 0];
    // SAFETY: reads eight bytes at `mask`. It only fails for invalid addresses and sizes.
    let _infallible = unsafe { call(uapi::__NR_rt_sigprocmask, arguments) };
}

/// A descriptor for reading the signals of `set`.
pub fn signalfd(set: SignalSet) -> Result<OwnedFd> {
    // SFD_CLOEXEC and SFD_NONBLOCK are defined as these (linux/signalfd.h).
    let flags = (uapi::O_CLOEXEC | uapi::O_NONBLOCK) as usize;
    let mask = &raw const set.0 as usize;
    // SAFETY: reads eight bytes at `mask`; -1 asks for a new descriptor.
    unsafe {
        call_for_fd(
            uapi::__NR_signalfd4,
            [usize::MAX, mask, size_of::<u64>(), flags, 0],
        )
    }
}

/// A signal read from a signalfd.
pub struct Signal {
    /// Its number.
    pub number: u32,
    /// Sent by the kernel itself, not by a process (SI_KERNEL).
    pub from_kernel: bool,
}

/// Reads one pending signal.
pub fn read_signal(fd: &OwnedFd) -> Result<Signal> {
    // struct signalfd_siginfo, which is never read partially: ssi_signo, ssi_errno, ssi_code, …
    let mut info = [[0; 4]; 32];
    rustix::io::read(fd, info.as_flattened_mut())?;
    let [number, _, code, ..] = info.map(u32::from_ne_bytes);
    Ok(Signal {
        number,
        from_kernel: code == uapi::SI_KERNEL,
    })
}
