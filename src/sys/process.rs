//! Processes: fork, execve, signals, and inherited descriptors.

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

/// The result of [`fork`].
pub enum Fork {
    /// In the new process.
    Child,
    /// In the parent: the child's pid.
    Parent(Pid),
}

/// Forks (fork(2), by clone3(2)).
pub fn fork() -> Result<Fork> {
    let arguments = clone_arguments(None);
    let (address, size) = (&raw const arguments as usize, size_of_val(&arguments));
    // SAFETY: reads the arguments. Without CLONE_VM the child has a copy of all memory, including this
    // stack. No thread holds a lock.
    let pid = unsafe { call(uapi::__NR_clone3, [address, size, 0, 0, 0]) }?;
    Ok(Pid::from_raw(pid as i32).map_or(Fork::Child, Fork::Parent))
}

/// Arguments for a child in a control group, or in the parent's.
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

/// Replaces the program (execve(2)); returns only on failure.
///
/// # Safety
/// `argv` and `envp` must be null-terminated vectors of NUL-terminated strings.
pub unsafe fn execve(path: &CStr, argv: *const *const c_char, envp: *const *const c_char) -> Errno {
    let arguments = [path.as_ptr() as usize, argv as usize, envp as usize, 0, 0];
    // SAFETY: as promised by the caller.
    match unsafe { call(uapi::__NR_execve, arguments) } {
        Err(errno) => errno,
        Ok(_) => Errno::NOSYS,
    }
}

/// Closes all descriptors from 3 on, except these (close_range(2)).
///
/// For children, in which no Rust value owns the closed ones.
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

/// Waits at most `seconds` until the other end of a pipe closes, or a connection fails (poll(2)).
pub fn has_hung_up(pipe: &OwnedFd, seconds: i64) -> Result<bool> {
    wait_for(pipe, PollFlags::empty(), seconds)
}

/// Waits at most `seconds` until there is something to read (poll(2)).
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

/// Sends a signal to a process group (kill(2)), or to its leader if that has not created it yet.
pub fn kill_group(leader: Pid, signal: u32) -> Result<()> {
    let signal = number(signal)?;
    rustix::process::kill_process_group(leader, signal)
        .or_else(|_| rustix::process::kill_process(leader, signal))
}

/// Kills the remaining processes of a group whose leader was reaped (kill(2)).
pub fn kill_rest_of_group(leader: Pid) {
    let _nobody_left = rustix::process::kill_process_group(leader, Signal::KILL);
}

/// Sends a signal to every process but this one (kill(2)).
pub fn kill_all(signal: u32) {
    // For the group of process 1, rustix calls kill(-1): all processes.
    let _nobody_left =
        number(signal).and_then(|signal| rustix::process::kill_process_group(Pid::INIT, signal));
}

/// Any signal, including real-time ones.
fn number(signal: u32) -> Result<Signal> {
    match signal {
        // SAFETY: not 0; without a C library no signal is reserved.
        1..=64 => Ok(unsafe { Signal::from_raw_unchecked(signal as i32) }),
        _ => Err(Errno::INVAL),
    }
}

/// The number of a descriptor that a child inherits.
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
        // SAFETY: only used in the child, where nothing owns the descriptor.
        unsafe { BorrowedFd::borrow_raw(self.0) }
    }
}

/// Replaces standard input, output and error (dup3(2)); without an input, standard input is left alone.
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
    // SAFETY: nothing owns or closes descriptors 0 to 2; using a closed one only fails.
    unsafe { [stdin(), stdout(), stderr()] }
}
