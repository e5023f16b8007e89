//! What differs on x86_64: program entry, the system call instruction, memory functions.

use core::arch::{asm, global_asm};
use core::ffi::c_void;
use core::ptr::NonNull;
use linux_raw_sys::general::{__NR_clone3, clone_args};

/// The only page size.
pub const PAGE: usize = 4 << 10;

// The kernel enters here with the stack pointer at argc (System V ABI, AMD64 supplement, 3.4.1).
global_asm!(
    ".globl _start",
    "_start:",
    "xor ebp, ebp",
    "mov rdi, rsp",
    "and rsp, -16",
    "call start_with_stack",
    "ud2",
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
            "syscall",
            inlateout("rax") number as usize => result,
            in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") e,
            lateout("rcx") _, lateout("r11") _,
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
    // SAFETY: the child has the parent's registers, except for rax and rsp; it never returns from `run`, so it
    // does not touch the parent's stack.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, {argument}",
            "call {run}",
            "ud2",
            "2:",
            run = in(reg) run,
            argument = in(reg) argument.as_ptr(),
            inlateout("rax") __NR_clone3 as usize => result,
            in("rdi") arguments, in("rsi") size_of::<clone_args>(),
            out("rcx") _, out("r11") _,
        );
    }
    result
}

// The compiler calls these. String instructions are small and fast enough; longer copies use eight bytes at
// a time, for processors that are slow with single ones.
// SAFETY (all): the C standard's contract of each function, which the compiler keeps.
global_asm!(
    ".globl memmove",
    "memmove:",
    "mov rcx, rdi",
    "sub rcx, rsi",
    "cmp rcx, rdx",
    "jb 3f",
    ".globl memcpy",
    "memcpy:",
    "mov rax, rdi",
    "mov rcx, rdx",
    "cmp rdx, 128",
    "jb 2f",
    "shr rcx, 3",
    "rep movsq",
    "mov ecx, edx",
    "and ecx, 7",
    "2:",
    "rep movsb",
    "ret",
    // The destination starts inside the source: from the end.
    "3:",
    "mov rax, rdi",
    "mov rcx, rdx",
    "lea rdi, [rdi + rdx - 1]",
    "lea rsi, [rsi + rdx - 1]",
    "std",
    "rep movsb",
    "cld",
    "ret",
    ".globl memset",
    "memset:",
    "mov r8, rdi",
    "mov eax, esi",
    "mov rcx, rdx",
    "rep stosb",
    "mov rax, r8",
    "ret",
    ".globl memcmp",
    ".globl bcmp",
    "memcmp:",
    "bcmp:",
    "mov rcx, rdx",
    "xor eax, eax",
    "cmp rcx, rcx",
    "repe cmpsb",
    "je 2f",
    "movzx eax, byte ptr [rdi - 1]",
    "movzx ecx, byte ptr [rsi - 1]",
    "sub eax, ecx",
    "2:",
    "ret",
    ".globl strlen",
    "strlen:",
    "mov rax, rdi",
    "3:",
    "inc rax",
    "cmp byte ptr [rax - 1], 0",
    "jne 3b",
    "sub rax, rdi",
    "dec rax",
    "ret",
);
