//! Memory pages from the kernel, and values that own their pages: there is no heap.

use core::mem::{ManuallyDrop, align_of, size_of};
use core::ops::{Deref, DerefMut};
use core::ptr::NonNull;
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

/// The smallest huge page (x86_64, and aarch64 with pages of 4 KiB).
const HUGE_PAGE: usize = 2 << 20;

/// Maps zero pages for `length` bytes (mmap(2)). Untouched pages cost nothing, and transparent huge
/// pages are disabled, so that touching one page does not allocate 2 MiB.
pub fn map(length: usize, kind: MapFlags) -> Result<NonNull<u8>, Errno> {
    let (access, flags) = (
        ProtFlags::READ | ProtFlags::WRITE,
        kind | MapFlags::NORESERVE,
    );
    // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing.
    let start = unsafe { mmap_anonymous(core::ptr::null_mut(), length, access, flags) }?;
    if length >= HUGE_PAGE {
        // SAFETY: does not change the contents. It fails on a kernel without huge pages.
        let _unsupported = unsafe { madvise(start, length, Advice::LinuxNoHugepage) };
    }
    NonNull::new(start.cast()).ok_or(Errno::NOMEM)
}

/// A value in its own pages, which are unmapped on drop.
pub struct PageBox<T> {
    value: NonNull<T>,
}

impl<T> PageBox<T> {
    /// Creates a value in place, so that a large one does not pass over the stack.
    pub fn new(value: impl FnOnce() -> T) -> Result<Self, Errno> {
        Self::map(value, MapFlags::PRIVATE)
    }

    /// The same, in memory shared with children: what one process writes, the other reads.
    ///
    /// Except for atomics, they must not access it at the same time.
    pub fn shared(value: impl FnOnce() -> T) -> Result<Self, Errno> {
        Self::map(value, MapFlags::SHARED)
    }

    /// Leaks it, unless it is [reclaimed](Self::reclaim) later.
    pub fn leak<'a>(self) -> &'a T {
        let value = ManuallyDrop::new(self).value;
        // SAFETY: as in `deref`, and it is never dropped.
        unsafe { value.as_ref() }
    }

    /// Takes ownership of a leaked value again.
    ///
    /// # Safety
    /// `value` must come from [`leak`](Self::leak), no other reference to it may be used afterwards, and
    /// it may have been written to only through cells.
    pub unsafe fn reclaim(value: &T) -> Self {
        let value = NonNull::from(value);
        Self { value }
    }

    fn map(value: impl FnOnce() -> T, kind: MapFlags) -> Result<Self, Errno> {
        // Pages are aligned to their own size.
        const { assert!(size_of::<T>() > 0 && align_of::<T>() <= 4096) };
        let pages = map(size_of::<T>(), kind)?.cast::<T>();
        // SAFETY: the mapping is large enough for a `T`, aligned for it, and not used elsewhere.
        unsafe { pages.write(value()) };
        Ok(Self { value: pages })
    }
}

impl<T> Deref for PageBox<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: `map` wrote a `T` there, which stays until `self` is dropped.
        unsafe { self.value.as_ref() }
    }
}

impl<T> DerefMut for PageBox<T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as above; `self` is borrowed exclusively.
        unsafe { self.value.as_mut() }
    }
}

impl<T> Drop for PageBox<T> {
    fn drop(&mut self) {
        // SAFETY: the value is dropped once, and its mapping is exactly the one that `map` made.
        unsafe {
            self.value.drop_in_place();
            let _gone = munmap(self.value.as_ptr().cast(), size_of::<T>());
        }
    }
}
