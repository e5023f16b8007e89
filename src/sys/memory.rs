//! Memory: static values with one owner, and mappings (mmap(2), madvise(2)).

use super::arch::PAGE;
use crate::page;
use core::cell::{Cell, UnsafeCell};
use core::mem::MaybeUninit;
use core::ptr::NonNull;
use rustix::io::Result;
use rustix::mm::{Advice, MapFlags, MlockAllFlags, MlockFlags, madvise, mlock_with, munlock};

/// A large static value that can be taken once.
pub struct Static<T> {
    taken: Cell<bool>,
    value: UnsafeCell<T>,
}

// SAFETY: only the first thread of a process takes it.
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

/// Keeps this process in memory when the VM swaps (mlockall(2)). Untouched pages are not allocated.
pub fn lock_memory() -> Result<()> {
    rustix::mm::mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT)
}

/// Frees the stack pages that deeper calls have used: the boot goes deep, serving does not.
///
/// Not inlined, so that its caller's frame lies above its own.
#[inline(never)]
pub fn release_stack() {
    /// More stack than the program ever uses.
    const DEPTH: usize = 256 << 10;
    let here = 0u8;
    // One page is left for this call.
    let end = (&raw const here as usize / PAGE - 1) * PAGE;
    let start = end.saturating_sub(DEPTH) as *mut _;
    // SAFETY: nothing is alive below the innermost frame. Unmapped parts of the range are not affected.
    let _advice = unsafe { madvise(start, DEPTH, Advice::LinuxDontNeed) };
}

/// Anonymous memory that is unmapped on drop. Untouched pages cost nothing.
///
/// The default is empty.
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

    /// Frees the memory that was touched: if that succeeds, the bytes are zero again.
    pub fn free_contents(&mut self) {
        // SAFETY: the mapping is ours, and borrowed exclusively through `self`.
        unsafe { free(self.start.as_ptr(), self.length) }
    }
}

/// Frees the whole pages of private memory without values.
pub fn free_unused<T>(unused: &mut [MaybeUninit<T>]) {
    // SAFETY: nothing is stored there, and it is borrowed exclusively.
    unsafe { free_whole_pages(unused.as_mut_ptr().cast(), size_of_val(unused)) }
}

/// # Safety
/// As for [`free`].
unsafe fn free_whole_pages(start: *mut u8, length: usize) {
    let skipped = start.addr().wrapping_neg() % PAGE;
    let length = length.saturating_sub(skipped) / PAGE * PAGE;
    // SAFETY: as the caller promises.
    unsafe { free(start.wrapping_add(skipped), length) }
}

/// Frees pages of private memory, which are zero afterwards. If that fails, they stay as they are.
///
/// They are unlocked meanwhile, as madvise(2) does not free locked pages. (It does since Linux 5.18, by a request
/// of its own. A new mapping in their place could fail after the old one was removed.)
///
/// # Safety
/// These bytes must not be borrowed, and zeros must be valid for them.
unsafe fn free(start: *mut u8, length: usize) {
    if length == 0 {
        return;
    }
    let start = start.cast();
    // SAFETY: as the caller promises.
    unsafe {
        if munlock(start, length).is_ok() {
            let _kept = madvise(start, length, Advice::LinuxDontNeed);
            let _unlocked = mlock_with(start, length, MlockFlags::ONFAULT);
        }
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
            // SAFETY: `map` made this mapping, and no borrow of it outlives `self`.
            let _gone = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.length) };
        }
    }
}
