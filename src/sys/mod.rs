//! Start-up, and the few system calls rustix has no public function for.

#[cfg(target_arch = "aarch64")]
#[path = "aarch64.rs"]
mod arch;
#[cfg(target_arch = "x86_64")]
#[path = "x86_64.rs"]
mod arch;

pub mod epoll;
pub mod files;

use arch::{PAGE, syscall};
use core::cell::{Cell, UnsafeCell};
use core::ffi::{CStr, c_char};
use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, Ordering};
use linux_raw_sys::general as uapi;
use proto::bytes::find;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use rustix::io::{Errno, Result};
use rustix::process::Pid;

/// One system call of up to three arguments: a descriptor, a count or a process id is the answer.
///
/// # Safety
/// As for [`syscall`].
unsafe fn call(number: u32, a: usize, b: usize, c: usize) -> Result<u32> {
    // SAFETY: as promised by the caller.
    unsafe { call_with(number, a, b, c, 0, 0) }
}

/// One of up to five.
///
/// # Safety
/// As for [`syscall`].
unsafe fn call_with(number: u32, a: usize, b: usize, c: usize, d: usize, e: usize) -> Result<u32> {
    // SAFETY: as promised by the caller.
    match unsafe { syscall(number, [a, b, c, d, e, 0]) } as i32 {
        errno @ ..0 => Err(Errno::from_raw_os_error(errno.wrapping_neg())),
        value => Ok(value as u32),
    }
}

/// A descriptor as a call has it.
fn raw(fd: &OwnedFd) -> usize {
    fd.as_raw_fd() as usize
}

fn fd(value: u32) -> OwnedFd {
    // SAFETY: the kernel has just given this descriptor to us and to nobody else.
    unsafe { OwnedFd::from_raw_fd(value as i32) }
}

/// The bytes up to the first NUL; empty when there is none. core's has a fast search of 250 bytes.
pub fn c_str(bytes: &[u8]) -> &CStr {
    let text = find(bytes, 0).and_then(|end| bytes.get(..=end));
    // SAFETY: the first NUL of these bytes is their last.
    text.map_or(c"", |text| unsafe {
        CStr::from_bytes_with_nul_unchecked(text)
    })
}

/// Strings one behind the other, each ended by NUL.
#[derive(Clone, Copy)]
pub struct List(pub &'static [u8]);

impl Iterator for List {
    type Item = &'static CStr;

    fn next(&mut self) -> Option<&'static CStr> {
        let (_, _) = self.0.split_first()?;
        let string = c_str(self.0);
        self.0 = self.0.get(string.to_bytes_with_nul().len()..)?;
        Some(string)
    }
}

/// Argument and environment strings as the kernel laid them on the stack.
#[derive(Clone, Copy)]
pub struct Words(NonNull<*const c_char>);

impl Words {
    /// The strings in their order.
    pub fn iter(self) -> impl Iterator<Item = &'static CStr> {
        let mut next = self.0;
        core::iter::from_fn(move || {
            // SAFETY: the vector ends with a null pointer, behind which `next` never moves; the
            // strings are NUL-terminated and stay for as long as the process (execve(2)).
            unsafe {
                let word = *next.as_ptr();
                if word.is_null() {
                    return None;
                }
                next = next.add(1);
                Some(CStr::from_ptr(word))
            }
        })
    }
}

/// First Rust code of the process: finds the strings above the stack pointer.
unsafe extern "C" fn start(stack: NonNull<usize>) -> ! {
    // SAFETY: at entry the stack holds argc, argv and its null, envp and its null (execve(2)).
    let (arguments, environment) = unsafe {
        let argc = *stack.as_ptr();
        let argv = stack.add(1);
        (Words(argv.cast()), Words(argv.add(argc + 1).cast()))
    };
    crate::start(arguments, environment)
}

/// Ends this process.
pub fn exit(code: i32) -> ! {
    loop {
        // SAFETY: takes a number.
        unsafe { syscall(uapi::__NR_exit_group, [code as usize, 0, 0, 0, 0, 0]) };
    }
}

/// What [`fork`] returned in which process.
pub enum Fork {
    /// In the new process.
    Child,
    /// In the old one: the new one's id.
    Parent(Pid),
}

/// Splits the process in two (fork(2), as clone(2), which every architecture has).
pub fn fork() -> Result<Fork> {
    // SAFETY: without CLONE_VM the child has a copy of all memory, this stack included. There is
    // one thread, so no lock is held by another.
    let pid = unsafe { call_with(uapi::__NR_clone, uapi::SIGCHLD as usize, 0, 0, 0, 0) }?;
    Ok(Pid::from_raw(pid as i32).map_or(Fork::Child, Fork::Parent))
}

/// Replaces the program (execve(2)); returns only when that failed.
///
/// # Safety
/// `argv` and `envp` must be vectors of NUL-terminated strings, each ended by a null pointer.
pub unsafe fn execve(path: &CStr, argv: *const *const u8, envp: *const *const u8) -> Errno {
    // SAFETY: as promised by the caller.
    match unsafe {
        call(
            uapi::__NR_execve,
            path.as_ptr() as usize,
            argv as usize,
            envp as usize,
        )
    } {
        Err(errno) => errno,
        Ok(_) => Errno::NOSYS,
    }
}

/// A set of signals as the kernel has it: bit `n - 1` is signal `n`.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct SignalSet(u64);

impl SignalSet {
    /// No signal.
    pub const EMPTY: Self = Self(0);

    /// These signals, by number.
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

/// Blocks exactly these signals (rt_sigprocmask(2)).
pub fn block_signals(set: SignalSet) {
    let (how, place) = (uapi::SIG_SETMASK as usize, &raw const set as usize);
    // SAFETY: reads eight bytes at `set`; no handler exists that the mask could surprise.
    let _set = unsafe {
        call_with(
            uapi::__NR_rt_sigprocmask,
            how,
            place,
            0,
            size_of_val(&set),
            0,
        )
    };
}

/// A descriptor from which the signals of `set` are read (signalfd(2)).
pub fn signalfd(set: SignalSet) -> Result<OwnedFd> {
    // SFD_CLOEXEC and SFD_NONBLOCK are defined as these (linux/signalfd.h).
    let flags = uapi::O_CLOEXEC | uapi::O_NONBLOCK;
    let (place, size) = (&raw const set as usize, size_of_val(&set));
    // SAFETY: reads eight bytes at `set`; -1 asks for a new descriptor.
    unsafe {
        call_with(
            uapi::__NR_signalfd4,
            usize::MAX,
            place,
            size,
            flags as usize,
            0,
        )
    }
    .map(fd)
}

/// A signal read from a signalfd.
pub struct Signal {
    /// Its number.
    pub number: u32,
    /// Sent by the kernel itself, not by a process (SI_KERNEL).
    pub from_kernel: bool,
}

/// Reads one waiting signal.
pub fn read_signal(fd: &OwnedFd) -> Result<Signal> {
    // struct signalfd_siginfo: ssi_signo, ssi_errno, ssi_code, …; 128 bytes on every architecture.
    let mut info = [0u32; 32];
    let place = &raw mut info as usize;
    // SAFETY: writes at most the array; a signal comes whole or not at all.
    unsafe { call(uapi::__NR_read, raw(fd), place, size_of_val(&info)) }?;
    let [number, _, code, ..] = info;
    Ok(Signal {
        number,
        from_kernel: code == uapi::SI_KERNEL,
    })
}

/// Milliseconds of CLOCK_MONOTONIC (clock_gettime(2)).
pub fn milliseconds() -> u64 {
    let mut time = uapi::__kernel_timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let (clock, place) = (uapi::CLOCK_MONOTONIC as usize, &raw mut time as usize);
    // SAFETY: writes one timespec at `time`.
    let _told = unsafe { call(uapi::__NR_clock_gettime, clock, place, 0) };
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

/// An ioctl(2) with a number for its argument.
///
/// # Safety
/// `request` must take a number, not a pointer.
pub unsafe fn ioctl_number(fd: &OwnedFd, request: u32, value: usize) -> Result<()> {
    // SAFETY: as promised by the caller.
    unsafe { call(uapi::__NR_ioctl, raw(fd), request as usize, value) }.map(drop)
}

/// An ioctl(2) on a structure.
///
/// # Safety
/// `request` must read and write at most a `T`, and any bytes it writes must be a valid `T`.
pub unsafe fn ioctl_struct<T>(fd: &OwnedFd, request: u32, value: &mut T) -> Result<()> {
    // SAFETY: as promised by the caller; `value` is exclusive for the call.
    unsafe { ioctl_number(fd, request, &raw mut *value as usize) }
}

/// Terminals (ioctl_tty(2)).
pub mod terminal {
    use super::{OwnedFd, Result, call, fd, ioctl_struct, raw, uapi};
    use rustix::fs::OFlags;

    // asm-generic/ioctls.h
    const TIOCSWINSZ: u32 = 0x5414;
    const TIOCSPTLCK: u32 = 0x4004_5431;
    const TIOCGPTPEER: u32 = 0x5441;

    /// Opens a new terminal: its master, which does not block (pts(4)).
    pub fn open() -> Result<OwnedFd> {
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK;
        super::files::open(c"/dev/pts/ptmx", flags)
    }

    /// Opens the other end of a new terminal, for this process only.
    pub fn open_peer(master: &OwnedFd) -> Result<OwnedFd> {
        // SAFETY: reads an int.
        unsafe { ioctl_struct(master, TIOCSPTLCK, &mut 0i32) }?;
        let flags = uapi::O_RDWR | uapi::O_NOCTTY | uapi::O_CLOEXEC;
        let (request, flags) = (TIOCGPTPEER as usize, flags as usize);
        // SAFETY: takes numbers; the answer is a new descriptor.
        unsafe { call(uapi::__NR_ioctl, raw(master), request, flags) }.map(fd)
    }

    /// Tells it its size.
    pub fn resize(terminal: &OwnedFd, cols: u16, rows: u16) -> Result<()> {
        // struct winsize: rows, columns, and their pixels.
        let mut size = [rows, cols, 0, 0];
        // SAFETY: reads four u16.
        unsafe { ioctl_struct(terminal, TIOCSWINSZ, &mut size) }
    }
}

/// Memory with one owner: large buffers that must not lie on the stack.
///
/// It is zero pages until it is touched.
pub struct Static<T> {
    taken: AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: `take` gives the value to one caller only, ever.
unsafe impl<T> Sync for Static<T> {}

impl<T> Static<T> {
    /// Wraps a value.
    pub const fn new(value: T) -> Self {
        Self {
            taken: AtomicBool::new(false),
            value: UnsafeCell::new(value),
        }
    }

    /// The value, for the first caller in this process; `None` for later ones.
    #[allow(clippy::mut_from_ref, reason = "given out once")]
    pub fn take(&'static self) -> Option<&'static mut T> {
        if self.taken.load(Ordering::Relaxed) {
            return None;
        }
        self.taken.store(true, Ordering::Relaxed);
        // SAFETY: the flag was false until now, and there is one thread, so no other reference
        // exists.
        Some(unsafe { &mut *self.value.get() })
    }
}

/// Gives the pages of a buffer that is no longer needed back (MADV_DONTNEED, madvise(2)); its bytes
/// are zero then.
pub fn release(buffer: &mut [u8]) {
    // A range of smaller pages is one of those, too.
    let start = (buffer.as_mut_ptr() as usize).next_multiple_of(PAGE);
    let end = (buffer.as_mut_ptr() as usize + buffer.len()) / PAGE * PAGE;
    if start < end {
        // SAFETY: whole pages inside a buffer that is borrowed exclusively; zeros are valid bytes.
        let _advice = unsafe {
            rustix::mm::madvise(
                start as *mut _,
                end - start,
                rustix::mm::Advice::LinuxDontNeed,
            )
        };
    }
}

/// Memory from the kernel, given back when dropped (mmap(2)). Untouched pages cost nothing.
///
/// By default there is none.
pub struct Region {
    start: NonNull<u8>,
    length: usize,
}

impl Region {
    /// Maps `length` zero bytes.
    pub fn new(length: usize) -> Result<Self> {
        use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing.
        let start = unsafe {
            mmap_anonymous(
                core::ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                flags,
            )
        }?;
        let start = NonNull::new(start.cast()).ok_or(Errno::NOMEM)?;
        Ok(Self { start, length })
    }
}

impl Default for Region {
    fn default() -> Self {
        Self {
            start: NonNull::dangling(),
            length: 0,
        }
    }
}

impl core::ops::Deref for Region {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the mapping is ours, readable, initialised and `length` bytes long, or that is 0.
        unsafe { core::slice::from_raw_parts(self.start.as_ptr(), self.length) }
    }
}

impl core::ops::DerefMut for Region {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, writable, and borrowed exclusively through `self`.
        unsafe { core::slice::from_raw_parts_mut(self.start.as_ptr(), self.length) }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        if self.length > 0 {
            // SAFETY: `new` mapped exactly this range, and no borrow of it outlives `self`.
            let _gone = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.length) };
        }
    }
}

/// Waits at most so many seconds for the other end of a pipe to close (poll(2)).
pub fn has_hung_up(pipe: &OwnedFd, seconds: i64) -> Result<bool> {
    wait_for(pipe, PollFlags::empty(), seconds)
}

/// Waits at most so many seconds for something to read (poll(2)).
pub fn is_readable(fd: &OwnedFd, seconds: i64) -> Result<bool> {
    wait_for(fd, PollFlags::IN, seconds)
}

/// Waits at most so many seconds for one of `events`, or a hang-up.
fn wait_for(fd: &OwnedFd, events: PollFlags, seconds: i64) -> Result<bool> {
    let timeout = Timespec {
        tv_sec: seconds,
        tv_nsec: 0,
    };
    let ready = rustix::event::poll(&mut [PollFd::new(fd, events)], Some(&timeout))?;
    Ok(ready > 0)
}

/// Sleeps; for children only.
pub fn sleep(milliseconds: i64) {
    let time = Timespec {
        tv_sec: milliseconds / 1000,
        tv_nsec: milliseconds % 1000 * 1_000_000,
    };
    let _interrupted = rustix::thread::nanosleep(&time);
}

/// Sockets between the VM and its host (linux/vm_sockets.h).
pub mod vsock {
    use super::{Errno, OwnedFd, PollFlags, Result, call, call_with, fd, raw, uapi};
    use rustix::fs::OFlags;
    use rustix::net::{AddressFamily, SocketFlags, SocketType};

    /// VMADDR_CID_ANY
    const ANY: u32 = u32::MAX;
    /// VMADDR_CID_HOST
    pub const HOST: u32 = 2;

    /// struct sockaddr_vm
    #[repr(C)]
    struct Address {
        family: u16,
        reserved: u16,
        port: u32,
        cid: u32,
        /// Flags, and zeros.
        rest: u32,
    }

    impl Address {
        /// A port of any CID.
        fn new(port: u32) -> Self {
            Self {
                family: AddressFamily::VSOCK.as_raw(),
                reserved: 0,
                port,
                cid: ANY,
                rest: 0,
            }
        }
    }

    /// Whether there is a vsock device: without one, sockets can be made but never reached.
    fn has_device() -> Result<bool> {
        // linux/vm_sockets.h
        const IOCTL_VM_SOCKETS_GET_LOCAL_CID: u32 = 0x7b9;
        let device = super::files::open(c"/dev/vsock", OFlags::RDONLY)?;
        let mut cid = ANY;
        // SAFETY: the call writes an unsigned int.
        unsafe { super::ioctl_struct(&device, IOCTL_VM_SOCKETS_GET_LOCAL_CID, &mut cid) }?;
        Ok(cid != ANY)
    }

    /// A socket that listens on `port` of every CID of this VM.
    pub fn listen(port: u32, backlog: usize) -> Result<OwnedFd> {
        if !has_device()? {
            return Err(Errno::NODEV);
        }
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            rustix::net::socket_with(AddressFamily::VSOCK, SocketType::STREAM, flags, None)?;
        let address = Address::new(port);
        let place = &raw const address as usize;
        // SAFETY: reads the address, whose size is given.
        unsafe { call(uapi::__NR_bind, raw(&socket), place, size_of_val(&address)) }?;
        // SAFETY: takes numbers.
        unsafe { call(uapi::__NR_listen, raw(&socket), backlog, 0) }?;
        Ok(socket)
    }

    /// Takes a waiting connection, and says from which CID it came.
    pub fn accept(socket: &OwnedFd) -> Result<(OwnedFd, u32)> {
        // An accept4 that finds none sleeps to the next tick, also where it must not block
        // (vsock_accept, net/vmw_vsock/af_vsock.c).
        if !super::wait_for(socket, PollFlags::IN, 0)? {
            return Err(Errno::AGAIN);
        }
        let mut peer = Address::new(0);
        let mut length = size_of::<Address>() as u32;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (place, size) = (&raw mut peer as usize, &raw mut length as usize);
        let flags = flags.bits() as usize;
        // SAFETY: writes at most the address, whose size is given, and its length.
        let connection =
            unsafe { call_with(uapi::__NR_accept4, raw(socket), place, size, flags, 0) }?;
        Ok((fd(connection), peer.cid))
    }
}

/// Closes all descriptors from 3 on but these, which are in ascending order or the same
/// (close_range(2)).
///
/// For children that do not run Rust code that owns the closed ones.
pub fn close_others(keep: &[&OwnedFd]) {
    let mut first = 3;
    for fd in keep {
        let fd = fd.as_raw_fd() as u32;
        close_range(first, fd.wrapping_sub(1));
        first = first.max(fd + 1);
    }
    close_range(first, u32::MAX);
}

fn close_range(first: u32, last: u32) {
    if first <= last {
        // SAFETY: takes numbers. The owners of these descriptors live in the parent.
        let _closed = unsafe { call(uapi::__NR_close_range, first as usize, last as usize, 0) };
    }
}

/// Sends a signal, by number, to a process group (kill(2)), or to its leader while it is not one yet.
pub fn kill_group(leader: Pid, signal: u32) -> Result<()> {
    let leader = leader.as_raw_pid();
    kill(leader.wrapping_neg(), signal).or_else(|_| kill(leader, signal))
}

/// Kills what is left of a process group whose leader was reaped (kill(2)).
pub fn kill_rest_of_group(leader: Pid) {
    let _nobody_left = kill(leader.as_raw_pid().wrapping_neg(), 9);
}

/// Sends a signal to every process but this one (kill(2)).
pub fn kill_all(signal: u32) {
    let _nobody_left = kill(-1, signal);
}

fn kill(target: i32, signal: u32) -> Result<()> {
    // SAFETY: takes numbers.
    unsafe { call(uapi::__NR_kill, target as usize, signal as usize, 0) }.map(drop)
}

/// Stops swapping to a file or device (swapoff(2)).
pub fn swap_off(path: &CStr) -> Result<()> {
    // SAFETY: reads a path that ends with NUL.
    unsafe { call(uapi::__NR_swapoff, path.as_ptr() as usize, 0, 0) }.map(drop)
}

/// Sets how gladly the OOM killer takes this process, its children to come included
/// (proc_pid_oom_score_adj(5)). Without /proc it stays as it is.
pub fn set_oom_score(score: &[u8]) {
    use crate::sys::files;
    let file = files::open(c"/proc/self/oom_score_adj", rustix::fs::OFlags::WRONLY);
    let _unchanged = file.and_then(|file| files::write(&file, score));
}

/// Sets how long sending and receiving wait, in milliseconds under a second (SO_SNDTIMEO, SO_RCVTIMEO).
pub fn set_timeouts(socket: &OwnedFd, milliseconds: u32) {
    use linux_raw_sys::net::{SO_RCVTIMEO_OLD, SO_SNDTIMEO_OLD, SOL_SOCKET};
    // struct timeval of 64-bit architectures: seconds, microseconds
    let time = [0, i64::from(milliseconds) * 1000];
    let _set = set(socket, SOL_SOCKET, SO_SNDTIMEO_OLD, &time);
    let _set = set(socket, SOL_SOCKET, SO_RCVTIMEO_OLD, &time);
}

/// Sets a socket option that is a number (setsockopt(2)).
pub fn set_option(socket: &OwnedFd, level: u32, option: u32, value: u32) -> Result<()> {
    set(socket, level, option, &value)
}

fn set<T: Copy>(socket: &OwnedFd, level: u32, option: u32, value: &T) -> Result<()> {
    let (level, option) = (level as usize, option as usize);
    let (place, size) = (&raw const *value as usize, size_of::<T>());
    // SAFETY: reads the value's bytes.
    unsafe {
        call_with(
            uapi::__NR_setsockopt,
            raw(socket),
            level,
            option,
            place,
            size,
        )
    }
    .map(drop)
}

/// Makes standard input, output and error copies of these (dup3(2)); without an input that stays as
/// it is.
pub fn set_streams(input: Option<&OwnedFd>, output: &OwnedFd, error: &OwnedFd) -> Result<()> {
    for (number, stream) in [input, Some(output), Some(error)].into_iter().enumerate() {
        if let Some(fd) = stream.map(raw)
            && fd != number
        {
            // SAFETY: takes numbers; nobody owns descriptors 0 to 2.
            unsafe { call(uapi::__NR_dup3, fd, number, 0) }?;
        }
    }
    Ok(())
}

/// Standard output and error of a process that is not PID 1.
pub fn standard_streams() -> [BorrowedFd<'static>; 2] {
    // SAFETY: nobody owns or closes descriptors 1 and 2; a write to a closed one only fails.
    unsafe { [rustix::stdio::stdout(), rustix::stdio::stderr()] }
}

/// Gives up root: groups first, without root they cannot be set (setgroups(2), setresgid(2),
/// setresuid(2)). Standard output and error become the user's, who could not open them by their
/// names else (/dev/stdout).
pub fn become_user(uid: u32, gid: u32, groups: &[u32]) -> Result<()> {
    let (user, group) = (uid as usize, gid as usize);
    for stream in 1..3 {
        // SAFETY: takes numbers; -1 leaves the group as it is.
        let _no_file = unsafe { call(uapi::__NR_fchown, stream, user, usize::MAX) };
    }
    let list = groups.as_ptr() as usize;
    // SAFETY: reads the groups, whose number is given.
    unsafe { call(uapi::__NR_setgroups, groups.len(), list, 0) }?;
    // SAFETY: takes numbers.
    unsafe { call(uapi::__NR_setresgid, group, group, group) }?;
    // SAFETY: takes numbers.
    unsafe { call(uapi::__NR_setresuid, user, user, user) }.map(drop)
}
