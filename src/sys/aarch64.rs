//! What differs on aarch64: program entry, the system call instruction, memory functions.

use core::arch::{asm, global_asm};
use core::ffi::c_void;
use core::ptr::NonNull;
use linux_raw_sys::general::{__NR_clone3, clone_args};

/// The largest page size (CONFIG_ARM64_64K_PAGES); other kernels have 4 or 16 KiB.
pub const PAGE: usize = 64 << 10;

// The kernel enters here with the stack pointer at argc.
global_asm!(
    ".globl _start",
    "_start:",
    "mov x29, #0",
    "mov x30, #0",
    "mov x0, sp",
    "and x1, x0, #-16",
    "mov sp, x1",
    "bl start_with_stack",
    "brk #1",
);

/// Makes a system call with up to five arguments. Returns the kernel's result: on failure, a negated errno.
///
/// # Safety
/// The arguments must be valid for call `number`; so must the pointers among them.
#[inline(always)]
pub unsafe fn syscall(number: u32, args: [usize; 5]) -> isize {
    let [a, b, c, d, e] = args;
    let result;
    // SAFETY: the kernel's calling convention (syscall(2)); the caller guarantees the arguments.
    unsafe {
        asm!(
            "svc #0",
            in("x8") number as usize,
            inlateout("x0") a => result,
            in("x1") b, in("x2") c, in("x3") d, in("x4") e,
            options(nostack),
        );
    }
    result
}

/// Starts a process or thread that calls `run(argument)` on its own stack (clone3(2)). Returns the kernel's
/// result in the parent.
///
/// # Safety
/// `arguments` must be valid for clone3, with a stack that nothing else uses meanwhile; `run` must be sound
/// to call there.
pub unsafe fn clone_on_stack(
    arguments: &clone_args,
    run: extern "C" fn(NonNull<c_void>) -> !,
    argument: NonNull<c_void>,
) -> isize {
    let result;
    // SAFETY: the child has the parent's registers, except for x0 and sp; it never returns from `run`, so it
    // does not touch the parent's stack.
    unsafe {
        asm!(
            "svc #0",
            "cbnz x0, 2f",
            "mov x29, #0",
            "mov x0, {argument}",
            "blr {run}",
            "brk #1",
            "2:",
            run = in(reg) run,
            argument = in(reg) argument.as_ptr(),
            in("x8") __NR_clone3 as usize,
            inlateout("x0") arguments => result,
            in("x1") size_of::<clone_args>(),
            out("x30") _,
        );
    }
    result
}

// The compiler calls these. Sixteen bytes at a time, then single ones.
// SAFETY (all): the C standard's contract of each function, which the compiler keeps.
global_asm!(
    ".globl memcpy",
    "memcpy:",
    "mov x3, x0",
    "1:",
    "subs x2, x2, #16",
    "b.lo 2f",
    "ldp x4, x5, [x1], #16",
    "stp x4, x5, [x3], #16",
    "b 1b",
    "2:",
    "adds x2, x2, #16",
    "b.eq 4f",
    "3:",
    "ldrb w4, [x1], #1",
    "strb w4, [x3], #1",
    "subs x2, x2, #1",
    "b.ne 3b",
    "4:",
    "ret",
    ".globl memmove",
    "memmove:",
    "sub x3, x0, x1",
    "cmp x3, x2",
    "b.hs memcpy",
    // The destination starts inside the source: from the end.
    "add x3, x0, x2",
    "add x1, x1, x2",
    "1:",
    "subs x2, x2, #1",
    "b.lo 2f",
    "ldrb w4, [x1, #-1]!",
    "strb w4, [x3, #-1]!",
    "b 1b",
    "2:",
    "ret",
    ".globl memset",
    "memset:",
    "mov x3, x0",
    "and x1, x1, #0xff",
    "mov x4, #0x0101010101010101",
    "mul x4, x4, x1",
    "1:",
    "subs x2, x2, #16",
    "b.lo 2f",
    "stp x4, x4, [x3], #16",
    "b 1b",
    "2:",
    "adds x2, x2, #16",
    "b.eq 4f",
    "3:",
    "strb w1, [x3], #1",
    "subs x2, x2, #1",
    "b.ne 3b",
    "4:",
    "ret",
    ".globl memcmp",
    ".globl bcmp",
    "memcmp:",
    "bcmp:",
    "mov x3, x0",
    "mov w0, #0",
    "1:",
    "subs x2, x2, #1",
    "b.lo 2f",
    "ldrb w4, [x3], #1",
    "ldrb w5, [x1], #1",
    "subs w0, w4, w5",
    "b.eq 1b",
    "2:",
    "ret",
    ".globl strlen",
    "strlen:",
    "mov x1, x0",
    "1:",
    "ldrb w2, [x1], #1",
    "cbnz w2, 1b",
    "sub x0, x1, x0",
    "sub x0, x0, #1",
    "ret",
);
