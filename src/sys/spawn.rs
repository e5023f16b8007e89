//! Children that share this program's memory until they call execve (clone(2), CLONE_VM).
//!
//! A fork copies the page tables, and then each page that either process writes to, which takes most of the
//! time of a small command. posix_spawn(3) avoids that, but blocks its caller. Here the parent does not wait
//! (no CLONE_VFORK: a child that starts in a frozen cgroup does not run): the child has its own stack and
//! value, and the kernel reports when it no longer uses them.

use super::arch;
use super::process::{clone_arguments, exit};
use crate::page::PageBox;
use core::cell::UnsafeCell;
use core::ffi::c_void;
use core::mem::{ManuallyDrop, MaybeUninit};
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU32, Ordering};
use linux_raw_sys::general as uapi;
use rustix::fd::OwnedFd;
use rustix::io::{Errno, Result};
use rustix::process::Pid;
use rustix::thread::futex;

/// More stack than a child needs; untouched pages cost nothing.
const STACK: usize = 256 << 10;

/// A value for a child to work on.
///
/// The child shares this program's memory, and has copies of its descriptors. It must not map memory, which
/// would leak if it is killed.
pub struct Spawn<T: 'static> {
    memory: ManuallyDrop<PageBox<ChildMemory<T>>>,
}

/// The stack comes first: it grows down, away from the other fields.
#[repr(C)]
struct ChildMemory<T> {
    stack: UnsafeCell<MaybeUninit<Stack>>,
    /// Not 0 until the child has called execve or exited: then the kernel clears it (CLONE_CHILD_CLEARTID).
    in_use: AtomicU32,
    /// Not 0 once the child may continue.
    resumed: AtomicU32,
    run: fn(&mut T) -> i32,
    value: UnsafeCell<T>,
}

/// Aligned as both architectures require.
type Stack = [u128; STACK / size_of::<u128>()];

impl<T> Spawn<T> {
    /// Creates the value in its own pages. The child calls `run` on it, which returns the exit code if
    /// execve fails.
    pub fn new(value: impl FnOnce() -> T, run: fn(&mut T) -> i32) -> Result<Self> {
        let memory = PageBox::new(|| ChildMemory {
            stack: UnsafeCell::new(MaybeUninit::uninit()),
            in_use: AtomicU32::new(0),
            resumed: AtomicU32::new(0),
            run,
            value: UnsafeCell::new(value()),
        })?;
        let memory = ManuallyDrop::new(memory);
        Ok(Self { memory })
    }

    /// Whether a child uses the value.
    pub fn is_in_use(&self) -> bool {
        // Acquire: the child's writes are visible afterwards.
        self.memory.in_use.load(Ordering::Acquire) != 0
    }

    /// The value, unless a child uses it.
    pub fn value(&mut self) -> Option<&mut T> {
        match self.is_in_use() {
            true => None,
            false => Some(self.memory.value.get_mut()),
        }
    }

    /// Lets the child continue.
    pub fn resume(&self) {
        self.memory.resumed.store(1, Ordering::Release);
        let _woken = futex::wake(&self.memory.resumed, futex::Flags::PRIVATE, 1);
    }

    /// Starts the child in a control group, or in this program's. The child waits for
    /// [`resume`](Self::resume).
    pub fn start(&mut self, cgroup: Option<&OwnedFd>) -> Result<Pid> {
        if self.is_in_use() {
            return Err(Errno::BUSY);
        }
        let memory = &**self.memory;
        memory.in_use.store(1, Ordering::Relaxed);
        let mut arguments = clone_arguments(cgroup);
        arguments.flags |= u64::from(uapi::CLONE_VM | uapi::CLONE_CHILD_CLEARTID);
        arguments.child_tid = memory.in_use.as_ptr() as u64;
        arguments.stack = memory.stack.get() as u64;
        arguments.stack_size = STACK as u64;
        let start = NonNull::from(memory).cast();
        // SAFETY: the memory stays mapped until `in_use` is 0 again, and its stack and value are not touched
        // until then.
        let result = unsafe { arch::clone_on_stack(&arguments, enter::<T>, start) };
        match Pid::from_raw(result as i32).filter(|_| result > 0) {
            Some(pid) => Ok(pid),
            None => {
                memory.in_use.store(0, Ordering::Relaxed);
                Err(Errno::from_raw_os_error(-result as i32))
            }
        }
    }
}

/// The child's first and last function.
extern "C" fn enter<T>(memory: NonNull<c_void>) -> ! {
    // SAFETY: `start` passes a `ChildMemory`, of which the parent only uses `in_use` and `resumed` until
    // this process has exited or called execve.
    let memory = unsafe { memory.cast::<ChildMemory<T>>().as_ref() };
    while memory.resumed.load(Ordering::Acquire) == 0 {
        let _woken = futex::wait(&memory.resumed, futex::Flags::PRIVATE, 0, None);
    }
    // SAFETY: as above.
    exit((memory.run)(unsafe { &mut *memory.value.get() }))
}

impl<T> Drop for Spawn<T> {
    fn drop(&mut self) {
        // Otherwise it is leaked: a child that cannot be killed may still run.
        if !self.is_in_use() {
            // SAFETY: dropped once, here.
            unsafe { ManuallyDrop::drop(&mut self.memory) }
        }
    }
}
