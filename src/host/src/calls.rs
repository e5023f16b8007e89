//! Machine code for a sequence of system calls, for programs that run in any guest.

use crate::{Arch, elf};

/// A system call's numbers (asm/unistd.h) on x86_64 and aarch64.
#[derive(Clone, Copy)]
pub struct Number(pub u32, pub u32);

const WRITE: Number = Number(1, 64);
const EXIT_GROUP: Number = Number(231, 94);
/// ENOENT, EACCES, ENOTDIR: the next program in the search path is tried.
const NEXT: [u8; 3] = [2, 13, 20];

/// An argument of a system call.
#[derive(Clone, Copy)]
pub enum Argument {
    /// A number, or an address returned by [`Calls::data`].
    Number(u64),
    /// The result [kept](Calls::keep).
    Kept,
}

/// A program under construction. It can keep one call's result, a file descriptor, to which it writes which
/// call failed; its exit code is then the errno.
pub struct Calls {
    arch: Arch,
    data: Vec<u8>,
    code: Vec<u8>,
}

impl Calls {
    /// An empty program.
    pub fn new(arch: Arch) -> Calls {
        Calls {
            arch,
            data: vec![],
            code: vec![],
        }
    }

    /// Adds data, and returns its address.
    pub fn data(&mut self, bytes: &[u8]) -> u64 {
        self.data.resize(self.data.len().next_multiple_of(8), 0);
        let address = elf::DATA + self.data.len() as u64;
        self.data.extend(bytes);
        address
    }

    /// A NUL-terminated string.
    pub fn text(&mut self, text: &str) -> u64 {
        self.data(&[text.as_bytes(), b"\0"].concat())
    }

    /// A null-terminated array of addresses.
    pub fn list(&mut self, addresses: &[u64]) -> u64 {
        let words = addresses.iter().chain(&[0]);
        let bytes: Vec<u8> = words.flat_map(|word| word.to_le_bytes()).collect();
        self.data(&bytes)
    }

    /// A call with up to four arguments.
    pub fn call(&mut self, number: Number, arguments: &[Argument]) {
        match self.arch {
            Arch::X86_64 => {
                // movabs to rdi, rsi, rdx, r10; mov rdi, rbx
                const REGISTERS: [[u8; 2]; 4] =
                    [[0x48, 0xbf], [0x48, 0xbe], [0x48, 0xba], [0x49, 0xba]];
                for (register, argument) in REGISTERS.iter().zip(arguments) {
                    match argument {
                        Argument::Number(value) => {
                            self.code.extend(register);
                            self.code.extend(value.to_le_bytes());
                        }
                        Argument::Kept => self.code.extend([0x48, 0x89, 0xdf]),
                    }
                }
                self.code.push(0xb8); // mov eax
                self.code.extend(number.0.to_le_bytes());
                self.code.extend([0x0f, 0x05]); // syscall
            }
            Arch::Aarch64 => {
                for (register, argument) in (0..4).zip(arguments) {
                    match argument {
                        Argument::Number(value) => self.load(register, *value),
                        Argument::Kept => self.word(0xaa13_03e0), // mov x0, x19
                    }
                }
                self.load(8, number.1.into());
                self.word(0xd400_0001); // svc #0
            }
        }
    }

    /// Appends an aarch64 instruction.
    fn word(&mut self, word: u32) {
        self.code.extend(word.to_le_bytes());
    }

    /// Loads a number into an aarch64 register, by movz and movk.
    fn load(&mut self, register: u32, value: u64) {
        for part in 0..4u32 {
            let bits = (value >> (16 * part)) as u32 & 0xffff;
            let instruction = if part == 0 { 0xd280_0000 } else { 0xf280_0000 };
            if part == 0 || bits != 0 {
                self.word(instruction | part << 21 | bits << 5 | register);
            }
        }
    }

    /// Keeps the result of the last call.
    pub fn keep(&mut self) {
        match self.arch {
            Arch::X86_64 => self.code.extend([0x48, 0x89, 0xc3]), // mov rbx, rax
            Arch::Aarch64 => self.word(0xaa00_03f3),              // mov x19, x0
        }
    }

    /// Exits if the last call failed; `what` describes its purpose.
    pub fn check(&mut self, what: &str) {
        let failure = self.failure(what);
        match self.arch {
            // test rax, rax; jns
            Arch::X86_64 => {
                self.code.extend([0x48, 0x85, 0xc0]);
                self.jump(0x79, failure.len());
            }
            // tbz x0, #63
            Arch::Aarch64 => self.word(0xb6f8_0000 | words(failure.len() + 4) << 5),
        }
        self.code.extend(failure);
    }

    /// Executes the first of these programs that exists (execve(2)). `argv` and `envp` are
    /// [lists](Calls::list) of strings.
    pub fn execute(&mut self, candidates: &[u64], argv: u64, envp: u64, what: &str) {
        const EXECVE: Number = Number(59, 221);
        let failure = self.failure(what);
        for (number, path) in candidates.iter().enumerate() {
            let arguments = [*path, argv, envp].map(Argument::Number);
            self.call(EXECVE, &arguments);
            if number + 1 == candidates.len() {
                break;
            }
            // For each of these errors, execution continues after the failure code.
            for (index, errno) in NEXT.into_iter().enumerate() {
                let left = NEXT.len() - 1 - index;
                match self.arch {
                    // cmp eax, -errno; je
                    Arch::X86_64 => {
                        self.code.extend([0x83, 0xf8, errno.wrapping_neg()]);
                        self.jump(0x74, left * 5 + failure.len());
                    }
                    // cmn w0, #errno; b.eq
                    Arch::Aarch64 => {
                        self.word(0x3100_001f | u32::from(errno) << 10);
                        self.word(0x5400_0000 | words(left * 8 + failure.len() + 4) << 5);
                    }
                }
            }
            self.code.extend(&failure);
        }
        self.code.extend(failure);
    }

    /// x86_64: the length of a jump. The code for failures is short.
    fn jump(&mut self, instruction: u8, bytes: usize) {
        let bytes = u8::try_from(bytes).ok().filter(|bytes| *bytes < 0x80);
        self.code
            .extend([instruction, bytes.expect("a failure is short")]);
    }

    /// The code that reports the failure, and exits with the errno.
    fn failure(&mut self, what: &str) -> Vec<u8> {
        let text = self.data(what.as_bytes());
        let mut code = Calls::new(self.arch);
        let write = [
            Argument::Kept,
            Argument::Number(text),
            Argument::Number(what.len() as u64),
        ];
        match self.arch {
            Arch::X86_64 => {
                code.code.extend([0x49, 0x89, 0xc4]); // mov r12, rax
                code.call(WRITE, &write);
                code.code.extend([0x4c, 0x89, 0xe7, 0xf7, 0xdf]); // mov rdi, r12; neg edi
            }
            Arch::Aarch64 => {
                code.word(0xaa00_03f4); // mov x20, x0
                code.call(WRITE, &write);
                code.word(0x4b14_03e0); // neg w0, w20
            }
        }
        code.call(EXIT_GROUP, &[]);
        code.code
    }

    /// The program: a static ELF file.
    pub fn program(self) -> Vec<u8> {
        elf::program_with_data(self.arch, self.data, &self.code)
    }
}

/// aarch64: a distance in instructions.
fn words(bytes: usize) -> u32 {
    (bytes / 4) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::write_program;
    use std::{
        fs,
        os::unix::ffi::OsStrExt,
        path::Path,
        process::{Command, Output},
    };

    const OPENAT: Number = Number(257, 56);
    const CHDIR: Number = Number(80, 49);
    const AT_FDCWD: u64 = -100i64 as u64;
    const WRITE_NEW: u64 = 0o1 | 0o100;

    /// A program that reports a failure in a file.
    fn calls(failure: &Path) -> Calls {
        let mut calls = Calls::new(Arch::HOST);
        let path = calls.text(failure.to_str().unwrap());
        calls.call(
            OPENAT,
            &[AT_FDCWD, path, WRITE_NEW, 0o600].map(Argument::Number),
        );
        calls.keep();
        calls
    }

    fn run(dir: &Path, calls: Calls) -> Output {
        let path = dir.join("program");
        write_program(&path, calls.program()).unwrap();
        Command::new(path).output().unwrap()
    }

    #[test]
    fn the_first_existing_program_is_executed() {
        let dir = tempfile::tempdir().unwrap();
        let failure = dir.path().join("failure");
        let mut calls = calls(&failure);
        let to = calls.text(dir.path().to_str().unwrap());
        calls.call(CHDIR, &[Argument::Number(to)]);
        calls.check("unable to change the directory");
        let candidates =
            ["/none/sh", "/dev/null/sh", "/etc", "/bin/sh"].map(|path| calls.text(path));
        let argv = ["sh", "-c", "pwd; echo $A; exit 3"].map(|word| calls.text(word));
        let envp = [calls.text("A=x y")];
        let [argv, envp] = [&argv[..], &envp].map(|texts| calls.list(texts));
        calls.execute(&candidates, argv, envp, "unable to run sh");
        let output = run(dir.path(), calls);
        let expected = [dir.path().as_os_str().as_bytes(), b"\nx y\n"].concat();
        assert_eq!(output.stdout, expected);
        assert_eq!(output.status.code(), Some(3));
        assert_eq!(fs::read(&failure).unwrap(), b"");
    }

    #[test]
    fn a_failing_program_names_the_call_and_exits_with_the_errno() {
        let dir = tempfile::tempdir().unwrap();
        let failure = dir.path().join("failure");
        let mut first = calls(&failure);
        let to = first.text("/none");
        first.call(CHDIR, &[Argument::Number(to)]);
        first.check("unable to change the directory");
        assert_eq!(run(dir.path(), first).status.code(), Some(2));
        assert_eq!(
            fs::read(&failure).unwrap(),
            b"unable to change the directory"
        );

        // The search stops at a program that cannot be executed; if none exists, the last error counts.
        let script = dir.path().join("script");
        write_program(&script, "no program").unwrap();
        for (candidates, errno) in [
            (vec![script.to_str().unwrap(), "/bin/true"], 8),
            (vec!["/none/true", "/etc"], 13),
            (vec!["/etc", "/none/true"], 2),
        ] {
            fs::remove_file(&failure).unwrap();
            let mut calls = calls(&failure);
            let candidates: Vec<_> = candidates.iter().map(|path| calls.text(path)).collect();
            let empty = calls.list(&[]);
            calls.execute(&candidates, empty, empty, "unable to run it");
            assert_eq!(run(dir.path(), calls).status.code(), Some(errno));
            assert_eq!(fs::read(&failure).unwrap(), b"unable to run it");
        }
    }

    #[test]
    fn the_aarch64_program_has_the_assemblers_encoding() {
        let mut calls = Calls::new(Arch::Aarch64);
        calls.call(CHDIR, &[Argument::Number(0x40_0078)]);
        calls.keep();
        calls.check("chdir");
        let [first, second] = ["/a", "/b"].map(|path| calls.text(path));
        calls.execute(&[first, second], 0, 0, "exec");
        let found = calls.code.chunks(4);
        let found: Vec<_> = found
            .map(|word| u32::from_le_bytes(word.try_into().unwrap()))
            .collect();
        // The output of an assembler.
        let failure = |text: u32, length: u32| {
            [
                0xaa00_03f4,               // mov x20, x0
                0xaa13_03e0,               // mov x0, x19
                0xd280_0001 | text << 5,   // mov x1, #text
                0xf2a0_0801,               // movk x1, #64, lsl #16
                0xd280_0002 | length << 5, // mov x2, #length
                0xd280_0808,               // mov x8, #64
                0xd400_0001,               // svc #0
                0x4b14_03e0,               // neg w0, w20
                0xd280_0bc8,               // mov x8, #94
                0xd400_0001,               // svc #0
            ]
        };
        let execve = |path: u32| {
            [
                0xd280_0000 | path << 5, // mov x0, #path
                0xf2a0_0800,             // movk x0, #64, lsl #16
                0xd280_0001,             // mov x1, #0
                0xd280_0002,             // mov x2, #0
                0xd280_1ba8,             // mov x8, #221
                0xd400_0001,             // svc #0
            ]
        };
        let mut expected = vec![
            0xd280_0f00, // mov x0, #0x78
            0xf2a0_0800, // movk x0, #64, lsl #16
            0xd280_0628, // mov x8, #49
            0xd400_0001, // svc #0
            0xaa00_03f3, // mov x19, x0
            0xb6f8_0160, // tbz x0, #63, .+44
        ];
        expected.extend(failure(0x78, 5));
        expected.extend(execve(0x80));
        expected.extend([
            0x3100_081f, // cmn w0, #2
            0x5400_01e0, // b.eq .+60
            0x3100_341f, // cmn w0, #13
            0x5400_01a0, // b.eq .+52
            0x3100_501f, // cmn w0, #20
            0x5400_0160, // b.eq .+44
        ]);
        expected.extend(failure(0x90, 4));
        expected.extend(execve(0x88));
        expected.extend(failure(0x90, 4));
        assert_eq!(found, expected);
    }
}
