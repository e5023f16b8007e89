//! Pipes and terminals that are shared with the guest's processes, used without being blocked by them.
//!
//! Every operation on a pipe takes its lock, even with O_NONBLOCK (fs/pipe.c), and a process that has the pipe
//! open can hold that lock indefinitely: by splice(2) from a socket without data. The same is true of a
//! terminal (drivers/tty/tty_ldisc.c), and of the lock of its size, which a process holds while TIOCGWINSZ
//! waits for a page fault (userfaultfd(2); tiocgwinsz in drivers/tty/tty_io.c). So threads make these calls on
//! behalf of the event loop, which waits for them for a short time and then continues.
//!
//! A thread is started when none is idle, and ended when another one is idle: there is one, and one more for
//! each blocked call. Everything here runs in the event loop's thread, except [`Thread::serve`].

use super::arch;
use super::clock::sleep;
use super::memory::Region;
use super::process::{clone_arguments, exit_thread};
use super::terminal::{self, Size};
use crate::page::PageBox;
use core::cell::{Cell, UnsafeCell};
use core::ffi::c_void;
use core::mem::{ManuallyDrop, MaybeUninit};
use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use linux_raw_sys::general as uapi;
use proto::bytes;
use rustix::event::Timespec;
use rustix::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use rustix::io::{Errno, Result};
use rustix::process::{Pid, Signal};
use rustix::thread::futex;

/// Most bytes of one call: the default capacity of a pipe (pipe(7)).
const BUFFER: usize = 64 << 10;

/// As much of the buffer keeps its memory from one file to the next: a page on most kernels.
const KEPT: usize = 4 << 10;

/// More stack than [`Thread::serve`] needs. The fields that follow share its last page.
const STACK: usize = (16 << 10) - 256;

/// How long to wait for a call at a time. Most return in microseconds.
const WAIT: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 5_000_000,
};

/// How long to sleep if no thread can be started, in milliseconds.
const RETRY: i64 = 5;

/// How often to wait for a call. More than once, as a pause of the VM uses up one wait.
const WAITS: u32 = 3;
/// How often to wait for all calls after the process has ended, together.
const LAST_WAITS: u32 = 10;

/// Our end of a pipe or a terminal.
pub struct GuestFile {
    /// A thread closes it.
    fd: ManuallyDrop<OwnedFd>,
    is_closed: bool,
    /// How often to still wait for calls after the process has ended.
    last_waits: u32,
    /// No thread could be started for the last call.
    lacks_thread: bool,
    /// The thread whose call has not returned, or whose result was not taken.
    pending: Option<&'static Thread>,
    threads: &'static GuestThreads,
}

impl GuestFile {
    /// Wraps a non-blocking end.
    pub fn new(fd: OwnedFd, threads: &'static GuestThreads) -> Self {
        Self {
            fd: ManuallyDrop::new(fd),
            is_closed: false,
            last_waits: LAST_WAITS,
            lacks_thread: false,
            pending: None,
            threads,
        }
    }

    /// The end, for calls that do not take the lock, unless a pending call has closed it.
    pub fn fd(&self) -> Option<&OwnedFd> {
        // The number may have been reused since.
        let is_closed = |thread: &Thread| thread.has_closed.load(Ordering::SeqCst);
        match self.pending.is_some_and(is_closed) {
            true => None,
            false => Some(&self.fd),
        }
    }

    /// Whether a call has not returned, or its result was not taken. [`GuestThreads::settle`]
    /// says when to continue.
    pub fn is_pending(&self) -> bool {
        self.pending.is_some()
    }

    /// Whether the last call could not be made, or has not returned.
    pub fn is_locked(&self) -> bool {
        self.is_pending() || self.lacks_thread
    }

    /// Whether a call has returned, and its result was not taken.
    pub fn has_returned(&self) -> bool {
        self.pending.is_some_and(Thread::is_idle)
    }

    /// Reads at most `limit` bytes (read(2)) and passes them to `take`. EAGAIN if there are none now, or the call
    /// is pending. The end of the file and any other error close it.
    ///
    /// `last`: the process has ended, and later output may be lost, so it waits longer.
    pub fn read(&mut self, limit: usize, last: bool, take: &mut dyn FnMut(&[u8])) -> Result<usize> {
        let call = self.call(Kind::Read, &[], limit, last)?;
        self.is_closed = call.is_closed();
        let result = call.result.map(|count| {
            // A pending call may have read more than this limit.
            let end = count.min(call.taken.saturating_add(limit));
            let bytes = call.buffer.get(call.taken..end).unwrap_or(&[]);
            if !bytes.is_empty() {
                take(bytes);
            }
            call.taken = end;
            (bytes.len(), end == count)
        });
        if !matches!(result, Ok((_, false))) {
            self.release();
        }
        result.map(|(taken, _)| taken)
    }

    /// Writes some of these bytes (write(2)). EAGAIN if none are accepted now, or the call is pending: then call
    /// again with the same bytes, unless they are [forgotten](Self::forget).
    pub fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        self.call_once(Kind::Write, bytes, bytes.len())
    }

    fn call_once(&mut self, kind: Kind, bytes: &[u8], length: usize) -> Result<usize> {
        let result = self.call(kind, bytes, length, false)?.result;
        self.release();
        result
    }

    /// Sets a terminal's size (ioctl_tty(2)). EAGAIN if the call is pending: then call again with the same
    /// size, unless it is [forgotten](Self::forget).
    pub fn resize(&mut self, size: Size) -> Result<usize> {
        self.call_once(Kind::Resize, &[], size.to_bits())
    }

    /// Drops the result of a pending write or resize: the next one has other bytes or another size.
    pub fn forget(&mut self) {
        if let Some(thread) = self.pending
            && matches!(thread.owner.get(), Owner::File(Kind::Write | Kind::Resize))
        {
            thread.owner.set(Owner::Forgetful);
        }
    }

    /// Begins a call, or continues the pending one. EAGAIN if it has not returned, or another one is
    /// pending.
    fn call(
        &mut self,
        kind: Kind,
        bytes: &[u8],
        length: usize,
        last: bool,
    ) -> Result<&'static mut Call> {
        let is_forgotten = |thread: &Thread| thread.owner.get().has_forgotten() && thread.is_idle();
        if self.pending.is_some_and(is_forgotten) {
            self.release();
        }
        let (thread, waits) = match self.pending {
            // It was waited for already.
            Some(thread) => (thread, 0),
            None => {
                let begun = self.threads.begin(kind, &self.fd, bytes, length);
                self.lacks_thread = begun.is_err();
                (begun?, WAITS)
            }
        };
        self.pending = Some(thread);
        match last {
            true => self.last_waits = thread.wait(self.last_waits),
            false => _ = thread.wait(waits),
        }
        let is_wanted = thread.owner.get() == Owner::File(kind);
        thread.call().filter(|_| is_wanted).ok_or(Errno::AGAIN)
    }

    /// Releases the thread, after the result was taken.
    fn release(&mut self) {
        if let Some(thread) = self.pending.take() {
            thread.owner.set(Owner::None);
        }
    }
}

impl Drop for GuestFile {
    fn drop(&mut self) {
        match self.pending {
            Some(thread) => {
                thread.owner.set(Owner::Gone);
                thread.close_if_gone();
            }
            None if self.is_closed => {}
            // Without memory for a thread it stays open: closing it here could block.
            None => {
                if let Ok(thread) = self.threads.begin(Kind::Close, &self.fd, &[], 0) {
                    thread.wait(WAITS);
                }
            }
        }
    }
}

/// All threads.
pub struct GuestThreads {
    newest: Cell<Option<&'static Thread>>,
}

impl GuestThreads {
    /// None yet.
    pub const fn new() -> Self {
        Self {
            newest: Cell::new(None),
        }
    }

    fn iter(&self) -> impl Iterator<Item = &'static Thread> {
        core::iter::successors(self.newest.get(), |thread| thread.next.get())
    }

    /// Closes files that were dropped while a call was pending, if that has returned, and ends free threads,
    /// except for one. Returns whether a call of another file has returned, which must be used again. Call
    /// after each SIGCHLD, which is sent in both cases.
    pub fn settle(&self) -> bool {
        let (mut has_returned, mut has_free) = (false, false);
        for thread in self.iter() {
            thread.close_if_gone();
            let owner = thread.owner.get();
            if thread.is_idle() && matches!(owner, Owner::File(_) | Owner::Forgetful) {
                has_returned = true;
                // Its result will not be taken, so it is reported only once.
                if owner == Owner::Forgetful {
                    thread.owner.set(Owner::Forgotten);
                }
            }
            if thread.is_free() {
                match has_free {
                    true => thread.end(),
                    false => has_free = true,
                }
            }
        }
        self.free_ended();
        has_returned
    }

    /// Frees the memory of the threads that have ended.
    fn free_ended(&self) {
        let mut place = &self.newest;
        while let Some(thread) = place.get() {
            // It is not used afterwards.
            if thread.runs.load(Ordering::Acquire) != 0 {
                place = &thread.next;
                continue;
            }
            place.set(thread.next.get());
            // SAFETY: `start` has leaked it, only free threads are ended, which no file uses, and it was removed
            // from the list.
            drop(unsafe { PageBox::reclaim(thread) });
        }
    }

    /// Starts a call in an idle thread, with these bytes or with a buffer of `length` bytes.
    fn begin(
        &self,
        kind: Kind,
        fd: &OwnedFd,
        bytes: &[u8],
        length: usize,
    ) -> Result<&'static Thread> {
        let thread = match self.iter().find(|thread| thread.is_free()) {
            Some(thread) => thread,
            // The caller retries, after a while: nothing reports when there is memory.
            None => self.start().map_err(|_| {
                sleep(RETRY);
                Errno::AGAIN
            })?,
        };
        if let Some(call) = thread.call() {
            call.kind = kind;
            call.fd = fd.as_raw_fd();
            call.length = length;
            bytes::copy(bytes, &mut call.buffer);
            call.taken = 0;
            thread.owner.set(match kind {
                Kind::Close => Owner::None,
                kind => Owner::File(kind),
            });
            thread.go(false);
        }
        Ok(thread)
    }

    fn start(&self) -> Result<&'static Thread> {
        let buffer = Region::new(BUFFER)?;
        let thread = PageBox::new(|| Thread {
            stack: UnsafeCell::new(MaybeUninit::uninit()),
            begun: AtomicU32::new(0),
            returned: AtomicU32::new(0),
            notifies: AtomicBool::new(false),
            has_closed: AtomicBool::new(false),
            call: UnsafeCell::new(Call {
                kind: Kind::Close,
                fd: -1,
                buffer,
                used: 0,
                length: 0,
                result: Ok(0),
                taken: 0,
            }),
            owner: Cell::new(Owner::None),
            runs: AtomicU32::new(1),
            next: self.newest.clone(),
        })?;
        let mut arguments = clone_arguments(None);
        arguments.flags = THREAD_OF_THIS_PROCESS;
        arguments.exit_signal = 0;
        arguments.child_tid = thread.runs.as_ptr() as u64;
        arguments.stack = thread.stack.get() as u64;
        arguments.stack_size = STACK as u64;
        let start = NonNull::from(&*thread).cast();
        // SAFETY: the thread has its own stack, and its memory stays until `runs` is 0. `begun` and `returned`
        // say which thread owns `call`; the other fields belong to the event loop.
        let result = unsafe { arch::clone_on_stack(&arguments, enter, start) };
        if result < 0 {
            return Err(Errno::from_raw_os_error(-result as i32));
        }
        let thread = thread.leak();
        self.newest.set(Some(thread));
        Ok(thread)
    }
}

/// A thread that makes one call at a time.
///
/// The stack comes first: it grows down, away from the other fields.
#[repr(C)]
struct Thread {
    stack: UnsafeCell<MaybeUninit<[u128; STACK / size_of::<u128>()]>>,
    /// Number of calls that were started. While `returned` differs, the thread owns `call`, otherwise the event
    /// loop does.
    begun: AtomicU32,
    /// Number of calls that have returned.
    returned: AtomicU32,
    /// The event loop no longer waits: send SIGCHLD when the call returns.
    notifies: AtomicBool,
    /// The call is closing, or has closed, the descriptor.
    has_closed: AtomicBool,
    call: UnsafeCell<Call>,
    owner: Cell<Owner>,
    /// Not 0 until the thread has ended: then the kernel clears it (CLONE_CHILD_CLEARTID).
    runs: AtomicU32,
    next: Cell<Option<&'static Self>>,
}

/// Who wants the result of a thread's call.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Owner {
    /// Nobody: the thread is free once the call has returned.
    None,
    /// A file, which has started this kind of call.
    File(Kind),
    /// A file that waits for its call, but does not want the result.
    Forgetful,
    /// The same, and it was reported that the call has returned.
    Forgotten,
    /// A dropped file, to be closed.
    Gone,
}

impl Owner {
    fn has_forgotten(self) -> bool {
        matches!(self, Self::Forgetful | Self::Forgotten)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Resize,
    Close,
    /// No call: the thread ends.
    End,
}

/// A call and its result.
struct Call {
    kind: Kind,
    fd: RawFd,
    buffer: Region,
    /// Most bytes of a call.
    used: usize,
    /// Number of bytes to write, size of the buffer, or [`Size::to_bits`].
    length: usize,
    result: Result<usize>,
    /// How many of the bytes read were taken.
    taken: usize,
}

impl Thread {
    /// Whether it makes no call.
    fn is_idle(&self) -> bool {
        // The thread's writes are visible afterwards.
        self.returned.load(Ordering::SeqCst) == self.begun.load(Ordering::Relaxed)
    }

    /// Whether it can be used for a new call.
    fn is_free(&self) -> bool {
        self.owner.get() == Owner::None && self.is_idle()
    }

    /// The call, unless the thread owns it.
    #[allow(clippy::mut_from_ref, reason = "one at a time, by the event loop")]
    fn call(&self) -> Option<&mut Call> {
        match self.is_idle() {
            // SAFETY: the thread owns it once `begun` changes, and no reference here is kept until then.
            true => Some(unsafe { &mut *self.call.get() }),
            false => None,
        }
    }

    /// Lets the thread make the call. `notifies`: the event loop does not wait for it.
    fn go(&self, notifies: bool) {
        self.notifies.store(notifies, Ordering::Relaxed);
        self.has_closed.store(false, Ordering::Relaxed);
        let next = self.begun.load(Ordering::Relaxed).wrapping_add(1);
        self.begun.store(next, Ordering::Release);
        let _woken = futex::wake(&self.begun, futex::Flags::PRIVATE, 1);
    }

    /// Waits up to `times` times until the call has returned; after that, the thread sends SIGCHLD. Returns the
    /// number of waits left.
    fn wait(&self, mut times: u32) -> u32 {
        while times > 0 && !self.is_idle() {
            let before = self.begun.load(Ordering::Relaxed).wrapping_sub(1);
            let flags = futex::Flags::PRIVATE;
            if futex::wait(&self.returned, flags, before, Some(&WAIT)) == Err(Errno::TIMEDOUT) {
                times -= 1;
            }
        }
        self.notifies.store(!self.is_idle(), Ordering::SeqCst);
        times
    }

    /// If its file was dropped and the call has returned, closes the file.
    fn close_if_gone(&self) {
        if self.owner.get() != Owner::Gone {
            return;
        }
        if let Some(call) = self.call() {
            self.owner.set(Owner::None);
            if !call.is_closed() {
                call.kind = Kind::Close;
                self.go(true);
            }
        }
    }

    /// Ends the thread. The call never returns, so the thread is not free any more.
    fn end(&self) {
        if let Some(call) = self.call() {
            call.kind = Kind::End;
            self.go(false);
        }
    }

    /// The thread's main loop: makes the calls that are started.
    fn serve(&self) -> ! {
        let mut count = 0;
        loop {
            while self.begun.load(Ordering::Acquire) == count {
                let _begun = futex::wait(&self.begun, futex::Flags::PRIVATE, count, None);
            }
            count = count.wrapping_add(1);
            // SAFETY: the event loop does not touch it until `returned` equals `begun`.
            let call = unsafe { &mut *self.call.get() };
            call.make();
            if call.is_closed() {
                // Before the number can be reused.
                self.has_closed.store(true, Ordering::SeqCst);
                // SAFETY: its owner no longer uses it.
                unsafe { rustix::io::close(call.fd) }
                // Large output is rare, and the next file may have none.
                if call.used > KEPT {
                    call.used = 0;
                    call.buffer.free_contents();
                }
            }
            self.returned.store(count, Ordering::SeqCst);
            let _woken = futex::wake(&self.returned, futex::Flags::PRIVATE, 1);
            if self.notifies.load(Ordering::SeqCst) {
                let _sent = rustix::process::kill_process(Pid::INIT, Signal::CHILD);
            }
        }
    }
}

impl Call {
    fn make(&mut self) {
        let length = self.length.min(BUFFER);
        let bytes = self.buffer.get_mut(..length).unwrap_or(&mut []);
        // SAFETY: its owner leaves it to this thread to close.
        let fd = unsafe { BorrowedFd::borrow_raw(self.fd) };
        match self.kind {
            Kind::Write => self.result = rustix::io::write(fd, bytes),
            Kind::Read => self.result = rustix::io::read(fd, bytes),
            Kind::Resize => {
                self.result = terminal::resize(fd, Size::from_bits(self.length)).map(|()| 0)
            }
            Kind::Close => {}
            Kind::End => exit_thread(),
        }
        self.used = self.used.max(self.result.unwrap_or(0));
    }

    /// Whether the thread closes the descriptor afterwards: on a close, the end of the file, or an error.
    fn is_closed(&self) -> bool {
        match self.kind {
            Kind::Read => !matches!(self.result, Ok(1..) | Err(Errno::AGAIN)),
            Kind::Close => true,
            Kind::Write | Kind::Resize | Kind::End => false,
        }
    }
}

/// A thread of this process: it cannot be killed or waited for on its own. It also shares the working
/// directory, so that it keeps no file system busy.
const THREAD_OF_THIS_PROCESS: u64 = (uapi::CLONE_VM
    | uapi::CLONE_FS
    | uapi::CLONE_FILES
    | uapi::CLONE_SIGHAND
    | uapi::CLONE_THREAD
    | uapi::CLONE_CHILD_CLEARTID) as u64;

/// A thread's first and last function.
extern "C" fn enter(thread: NonNull<c_void>) -> ! {
    // SAFETY: `start` passes a thread that stays valid.
    unsafe { thread.cast::<Thread>().as_ref() }.serve()
}
