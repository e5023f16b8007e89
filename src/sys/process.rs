//! Processes: fork, execve, signals, and the descriptors that pass on.

use super::syscall::call;
use core::ffi::{CStr, c_char};
use linux_raw_sys::general as uapi;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use rustix::io::{Errno, Result};
use rustix::process::{Pid, Signal};

/// Ends this process.
pub fn exit(code: i32) -> ! {
    loop {
        // SAFETY: takes a number.
        let _never = unsafe { call(uapi::__NR_exit_group, [code as usize, 0, 0, 0, 0]) };
    }
}

/// Ends this thread.
pub(super) fn exit_thread() -> ! {
    loop {
        // SAFETY: takes a number.
        let _never = unsafe { call(uapi::__NR_exit, [0; 5]) };
    }
}

/// linux/sched.h
const CLONE_INTO_CGROUP: u64 = 1 << 33;

/// What [`fork`] returned in which process.
pub enum Fork {
    /// In the new process.
    Child,
    /// In the old one: the new one's id.
    Parent(Pid),
}

/// Splits the process in two (fork(2), as clone3(2)).
pub fn fork() -> Result<Fork> {
    let arguments = clone_arguments(None);
    let (place, size) = (&raw const arguments as usize, size_of_val(&arguments));
    // SAFETY: reads the arguments. Without CLONE_VM the child has a copy of all memory, this stack
    // included. No thread has a lock.
    let pid = unsafe { call(uapi::__NR_clone3, [place, size, 0, 0, 0]) }?;
    Ok(Pid::from_raw(pid as i32).map_or(Fork::Child, Fork::Parent))
}

/// For a child born in that control group, or in the parent's.
pub(super) fn clone_arguments(cgroup: Option<&OwnedFd>) -> uapi::clone_args {
    uapi::clone_args {
        flags: cgroup.map_or(0, |_| CLONE_INTO_CGROUP),
        exit_signal: u64::from(uapi::SIGCHLD),
        cgroup: cgroup.map_or(0, |cgroup| cgroup.as_raw_fd() as u64),
        pidfd: 0,
        child_tid: 0,
        parent_tid: 0,
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
    }
}

/// Replaces the program (execve(2)); returns only when that failed.
///
/// # Safety
/// `argv` and `envp` must be vectors of NUL-terminated strings, each ended by a null pointer.
pub unsafe fn execve(path: &CStr, argv: *const *const c_char, envp: *const *const c_char) -> Errno {
    let arguments = [path.as_ptr() as usize, argv as usize, envp as usize, 0, 0];
    // SAFETY: as promised by the caller.
    match unsafe { call(uapi::__NR_execve, arguments) } {
        Err(errno) => errno,
        Ok(_) => Errno::NOSYS,
    }
}

/// Closes all descriptors from 3 on but these (close_range(2)).
///
/// For children that do not run Rust code that owns the closed ones.
pub fn close_others(keep: &[&OwnedFd]) {
    let numbers = || keep.iter().map(|fd| fd.as_raw_fd() as u32);
    let mut first = 3;
    while let Some(next) = numbers().filter(|fd| *fd >= first).min() {
        close_range(first, next.wrapping_sub(1));
        first = next + 1;
    }
    close_range(first, u32::MAX);
}

fn close_range(first: u32, last: u32) {
    if first <= last {
        let arguments = [first as usize, last as usize, 0, 0, 0];
        // SAFETY: takes numbers. The owners of these descriptors live in the parent.
        let _closed = unsafe { call(uapi::__NR_close_range, arguments) };
    }
}

/// Waits at most `seconds` for the other end of a pipe to close, or a connection to fail (poll(2)).
pub fn has_hung_up(pipe: &OwnedFd, seconds: i64) -> Result<bool> {
    wait_for(pipe, PollFlags::empty(), seconds)
}

/// Waits at most `seconds` for something to read (poll(2)).
pub fn is_readable(fd: &OwnedFd, seconds: i64) -> Result<bool> {
    wait_for(fd, PollFlags::IN, seconds)
}

/// Waits at most `seconds` for one of `events`, or a hang-up.
fn wait_for(fd: &OwnedFd, events: PollFlags, seconds: i64) -> Result<bool> {
    let timeout = Timespec {
        tv_sec: seconds,
        tv_nsec: 0,
    };
    let mut polled = [PollFd::new(fd, events)];
    Ok(rustix::event::poll(&mut polled, Some(&timeout))? > 0)
}

/// Sends a signal, by number, to a process group (kill(2)), or to its leader while it is not one yet.
pub fn kill_group(leader: Pid, signal: u32) -> Result<()> {
    let signal = number(signal)?;
    rustix::process::kill_process_group(leader, signal)
        .or_else(|_| rustix::process::kill_process(leader, signal))
}

/// Kills what is left of a process group whose leader was reaped (kill(2)).
pub fn kill_rest_of_group(leader: Pid) {
    let _nobody_left = rustix::process::kill_process_group(leader, Signal::KILL);
}

/// Sends a signal to every process but this one (kill(2)).
pub fn kill_all(signal: u32) {
    // The group of process 1 stands for all there is: kill(-1).
    let _nobody_left =
        number(signal).and_then(|signal| rustix::process::kill_process_group(Pid::INIT, signal));
}

/// Any signal, real-time ones included.
fn number(signal: u32) -> Result<Signal> {
    match signal {
        // SAFETY: not 0; without a C library no number is reserved for one.
        1..=64 => Ok(unsafe { Signal::from_raw_unchecked(signal as i32) }),
        _ => Err(Errno::INVAL),
    }
}

/// A descriptor of this process, by its number, for a child that starts with a copy of it.
#[derive(Clone, Copy)]
pub struct Inherited(RawFd);

impl Inherited {
    /// For children that start while `fd` is open.
    pub fn new(fd: &OwnedFd) -> Self {
        Self(fd.as_raw_fd())
    }
}

impl AsFd for Inherited {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: used by the child alone, where nobody owns the descriptor.
        unsafe { BorrowedFd::borrow_raw(self.0) }
    }
}

/// Makes standard input, output and error copies of these (dup3(2)); without an input that stays as
/// it is.
pub fn set_streams(input: Option<impl AsFd>, output: impl AsFd, error: impl AsFd) -> Result<()> {
    if let Some(input) = input {
        rustix::stdio::dup2_stdin(input)?;
    }
    rustix::stdio::dup2_stdout(output)?;
    rustix::stdio::dup2_stderr(error)
}

/// Standard input, output and error.
pub fn standard_streams() -> [BorrowedFd<'static>; 3] {
    use rustix::stdio::{stderr, stdin, stdout};
    // SAFETY: nobody owns or closes descriptors 0 to 2; what is done with a closed one only fails.
    unsafe { [stdin(), stdout(), stderr()] }
}
