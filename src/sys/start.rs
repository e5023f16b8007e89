//! From the kernel's entry to the first safe code.

use core::ffi::{CStr, c_char};
use core::ptr::NonNull;

/// Argument or environment strings, as the kernel put them on the stack.
#[derive(Clone, Copy)]
pub struct StackStrings(NonNull<*const c_char>);

impl StackStrings {
    /// The strings, in order.
    pub fn iter(self) -> impl Iterator<Item = &'static CStr> {
        let mut next = self.0;
        core::iter::from_fn(move || {
            // SAFETY: the vector ends with a null pointer, which `next` never passes; the strings are
            // NUL-terminated and stay valid for the life of the process (execve(2)).
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

/// The arguments and the environment, above the initial stack pointer.
///
/// # Safety
/// `stack` must be the stack pointer at the process's entry, with nothing above it changed.
pub unsafe fn initial_strings(stack: NonNull<usize>) -> (StackStrings, StackStrings) {
    // SAFETY: at entry the stack holds argc, argv and its null, envp and its null (execve(2)).
    unsafe {
        let argc = *stack.as_ptr();
        let argv = stack.add(1);
        (
            StackStrings(argv.cast()),
            StackStrings(argv.add(argc + 1).cast()),
        )
    }
}

/// Makes a `fn(StackStrings, StackStrings) -> !` the safe entry point of the process.
#[macro_export]
macro_rules! entry {
    ($start:path) => {
        /// Called by `_start`.
        #[unsafe(no_mangle)]
        unsafe extern "C" fn start_with_stack(stack: ::core::ptr::NonNull<usize>) -> ! {
            // SAFETY: `_start` calls this with the stack pointer as the kernel has set it.
            let (arguments, environment) = unsafe { $crate::sys::start::initial_strings(stack) };
            $start(arguments, environment)
        }
    };
}
