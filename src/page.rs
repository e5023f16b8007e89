//! Pages from the kernel, and values in pages of their own: there is no heap.

use core::mem::{ManuallyDrop, align_of, size_of};
use core::ops::{Deref, DerefMut};
use core::ptr::NonNull;
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

/// The smallest huge page (x86_64, and aarch64 with pages of 4 KiB).
const HUGE_PAGE: usize = 2 << 20;

/// Pages of zeros, enough for `length` bytes (mmap(2)). Those that are not touched cost nothing, and the
/// first that is does not bring 2 MiB with it where the kernel gives huge pages unasked.
pub fn map(length: usize, kind: MapFlags) -> Result<NonNull<u8>, Errno> {
    let (access, flags) = (
        ProtFlags::READ | ProtFlags::WRITE,
        kind | MapFlags::NORESERVE,
    );
    // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing.
    let start = unsafe { mmap_anonymous(core::ptr::null_mut(), length, access, flags) }?;
    if length >= HUGE_PAGE {
        // SAFETY: changes nothing of what is there. A kernel without huge pages refuses.
        let _without = unsafe { madvise(start, length, Advice::LinuxNoHugepage) };
    }
    NonNull::new(start.cast()).ok_or(Errno::NOMEM)
}

/// Owns a value in pages of its own, which are given back on drop.
pub struct PageBox<T> {
    value: NonNull<T>,
}

impl<T> PageBox<T> {
    /// Makes a value there: a large one without a way over the stack.
    pub fn new(value: impl FnOnce() -> T) -> Result<Self, Errno> {
        Self::map(value, MapFlags::PRIVATE)
    }

    /// The same, for this process and a child of it: what one writes, the other reads.
    ///
    /// They must not do so at the same time, but for atomics.
    #[cfg(feature = "snapshot")]
    pub fn shared(value: impl FnOnce() -> T) -> Result<Self, Errno> {
        Self::map(value, MapFlags::SHARED)
    }

    /// Keeps it for ever, or until it is [reclaimed](Self::reclaim).
    pub fn leak<'a>(self) -> &'a T {
        let value = ManuallyDrop::new(self).value;
        // SAFETY: as in `deref`, and it is never dropped.
        unsafe { value.as_ref() }
    }

    /// Owns again what was leaked.
    ///
    /// # Safety
    /// `value` must be a whole one that [`leak`](Self::leak) gave, without use after this; what of it is
    /// written must be in cells.
    pub unsafe fn reclaim(value: &T) -> Self {
        let value = NonNull::from(value);
        Self { value }
    }

    fn map(value: impl FnOnce() -> T, kind: MapFlags) -> Result<Self, Errno> {
        // Pages are aligned to their own size.
        const { assert!(size_of::<T>() > 0 && align_of::<T>() <= 4096) };
        let place = map(size_of::<T>(), kind)?.cast::<T>();
        // SAFETY: the mapping is large enough for a `T`, aligned for it, and nobody else has it.
        unsafe { place.write(value()) };
        Ok(Self { value: place })
    }
}

impl<T> Deref for PageBox<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: `map` wrote a `T` there, and it stays until `self` is dropped.
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
