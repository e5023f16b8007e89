//! A program that does nothing until it is killed: the workload of a VM whose real command runs as a session,
//! on a terminal or with input.

use anyhow::{Context, Result};
use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use crate::{
    Arch,
    elf::static_program,
    image::{
        self,
        disk::{self, Format},
    },
};

/// The program's name in a volume of [`write_volume`].
pub const PROGRAM: &str = "hold";

/// The signals that end the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// Any signal that terminates programs by default.
    Signal,
    /// Only SIGKILL: it survives a signal to all processes.
    Kill,
}

/// Calls pause(2) in a loop.
fn code(arch: Arch, until: Until) -> Vec<u8> {
    let mut code = match until {
        Until::Signal => vec![],
        Until::Kill => block_signals(arch),
    };
    match arch {
        // mov eax, SYS_pause; syscall; jmp back to the start
        Arch::X86_64 => code.extend([0xb8, 34, 0, 0, 0, 0x0f, 0x05, 0xeb, 0xf7]),
        Arch::Aarch64 => {
            // aarch64 has no pause: ppoll(0, 0, 0, 0) is equivalent.
            let branch_back = 0x1400_0000 | (0x3ff_ffff & -6i32 as u32);
            let words = [
                load(0, 0),
                load(1, 0),
                load(2, 0),
                load(3, 0),
                load(8, 73),
                SUPERVISOR_CALL,
                branch_back,
            ];
            code.extend(words.into_iter().flat_map(u32::to_le_bytes));
        }
    }
    code
}

/// sigprocmask(SIG_SETMASK, all signals); the set is on the stack.
fn block_signals(arch: Arch) -> Vec<u8> {
    match arch {
        // push -1; mov rsi, rsp; mov edi, SIG_SETMASK; xor edx, edx; mov r10d, 8;
        // mov eax, SYS_rt_sigprocmask; syscall
        Arch::X86_64 => vec![
            0x6a, 0xff, 0x48, 0x89, 0xe6, 0xbf, 2, 0, 0, 0, 0x31, 0xd2, 0x41, 0xba, 8, 0, 0, 0,
            0xb8, 14, 0, 0, 0, 0x0f, 0x05,
        ],
        Arch::Aarch64 => {
            let all_in_x9 = 0x9280_0009;
            let push_x9 = 0xf81f_0fe9;
            let stack_in_x1 = 0x9100_03e1;
            [
                all_in_x9,
                push_x9,
                load(0, 2),
                stack_in_x1,
                load(2, 0),
                load(3, 8),
                load(8, 135),
                SUPERVISOR_CALL,
            ]
            .into_iter()
            .flat_map(u32::to_le_bytes)
            .collect()
        }
    }
}

/// aarch64: loads a number into a register; makes a system call.
fn load(register: u32, value: u32) -> u32 {
    0xd280_0000 | value << 5 | register
}
const SUPERVISOR_CALL: u32 = 0xd400_0001;

/// The program: a static ELF file.
pub fn program(arch: Arch, until: Until) -> Vec<u8> {
    static_program(arch, &code(arch, until))
}

/// Makes an image that contains the program.
pub fn write_volume(out: &Path, arch: Arch, until: Until, format: Format) -> Result<()> {
    let dir = tempfile::Builder::new()
        .prefix(".pigeon-")
        .tempdir_in(disk::directory_of(out))
        .with_context(|| format!("unable to write beside {}", out.display()))?;
    let path = dir.path().join(PROGRAM);
    fs::write(&path, program(arch, until))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755))?;
    image::pack(dir.path(), out, format)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::{Process, write_program};
    use rustix::process::{Pid, Signal, kill_process};
    use std::{
        os::unix::process::ExitStatusExt,
        process::Command,
        time::{Duration, Instant},
    };

    fn run(until: Until) -> Process {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hold");
        write_program(&path, program(Arch::HOST, until)).unwrap();
        let mut process = Process::spawn(Command::new(&path)).unwrap();
        let path = format!("/proc/{}/status", process.child().id());
        let deadline = Instant::now() + Duration::from_secs(20);
        // Waits until it sleeps.
        loop {
            let status = fs::read_to_string(&path).unwrap();
            if status.contains("State:\tS") {
                return process;
            }
            assert!(Instant::now() < deadline, "{status}");
            assert_eq!(process.wait(Duration::from_millis(5)).unwrap(), None);
        }
    }

    #[test]
    fn the_program_runs_until_a_signal_ends_it() {
        let mut process = run(Until::Signal);
        let pid = Pid::from_child(process.child());
        kill_process(pid, Signal::TERM).unwrap();
        let status = process.wait(Duration::from_secs(10)).unwrap().unwrap();
        assert_eq!(status.signal(), Some(15));
    }

    #[test]
    fn only_sigkill_ends_the_program_that_blocks_signals() {
        let mut process = run(Until::Kill);
        let pid = Pid::from_child(process.child());
        for signal in [Signal::TERM, Signal::HUP, Signal::INT, Signal::USR1] {
            kill_process(pid, signal).unwrap();
        }
        assert_eq!(process.wait(Duration::from_millis(200)).unwrap(), None);
        kill_process(pid, Signal::KILL).unwrap();
        let status = process.wait(Duration::from_secs(10)).unwrap().unwrap();
        assert_eq!(status.signal(), Some(9));
    }

    #[test]
    fn the_aarch64_program_has_the_assemblers_encoding() {
        let words: Vec<u32> = code(Arch::Aarch64, Until::Kill)
            .chunks(4)
            .map(|word| u32::from_le_bytes(word.try_into().unwrap()))
            .collect();
        // As an assembler has them: mov x9, #-1; str x9, [sp, #-16]!; mov x0, #2; mov x1, sp;
        // mov x2, #0; mov x3, #8; mov x8, #135; svc #0; mov x0, #0 … mov x8, #73; svc #0; b .-24
        let expected = [
            0x9280_0009,
            0xf81f_0fe9,
            0xd280_0040,
            0x9100_03e1,
            0xd280_0002,
            0xd280_0103,
            0xd280_10e8,
            0xd400_0001,
            0xd280_0000,
            0xd280_0001,
            0xd280_0002,
            0xd280_0003,
            0xd280_0928,
            0xd400_0001,
            0x17ff_fffa,
        ];
        assert_eq!(words, expected);
    }
}
