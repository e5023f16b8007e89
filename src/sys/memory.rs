//! Memory: buffers with one owner, and mappings (mmap(2), madvise(2)).

use super::arch::PAGE;
use crate::page;
use core::cell::{Cell, UnsafeCell};
use core::ptr::NonNull;
use rustix::io::Result;
use rustix::mm::{Advice, MapFlags, MlockAllFlags};

/// A large value with one owner, which must not lie on the stack.
pub struct Static<T> {
    taken: Cell<bool>,
    value: UnsafeCell<T>,
}

// SAFETY: the first thread of a process of this program is the only one that takes it.
unsafe impl<T> Sync for Static<T> {}

impl<T> Static<T> {
    /// Wraps a value.
    pub const fn new(value: T) -> Self {
        Self {
            taken: Cell::new(false),
            value: UnsafeCell::new(value),
        }
    }

    /// The value, for the first caller in this process; `None` for later ones.
    #[allow(clippy::mut_from_ref, reason = "given out once")]
    pub fn take(&'static self) -> Option<&'static mut T> {
        if self.taken.replace(true) {
            return None;
        }
        // SAFETY: the flag was false until now, so no other reference exists.
        Some(unsafe { &mut *self.value.get() })
    }
}

/// Keeps this process in memory when the VM swaps (mlockall(2)). Pages that are not touched stay away.
pub fn lock_memory() -> Result<()> {
    rustix::mm::mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT)
}

/// Gives the stack back that deeper calls have used: boot goes deep, serving does not.
///
/// In a frame of its own: what is alive in its caller's lies above.
#[inline(never)]
pub fn release_stack() {
    /// Deeper than anything goes.
    const DEPTH: usize = 256 << 10;
    let here = 0u8;
    // A page is left to this call.
    let end = (&raw const here as usize / PAGE - 1) * PAGE;
    let start = end.saturating_sub(DEPTH) as *mut _;
    // SAFETY: nothing is alive below the frame of the innermost call. What of the range is not mapped
    // stays so.
    let _advice = unsafe { rustix::mm::madvise(start, DEPTH, Advice::LinuxDontNeed) };
}

/// Memory from the kernel, given back when dropped. Untouched pages cost nothing.
///
/// By default there is none.
pub struct Region {
    start: NonNull<u8>,
    length: usize,
}

impl Region {
    /// Maps `length` zero bytes.
    pub fn new(length: usize) -> Result<Self> {
        let start = page::map(length, MapFlags::PRIVATE)?;
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
            // SAFETY: `map` made exactly this mapping, and no borrow of it outlives `self`.
            let _gone = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.length) };
        }
    }
}
