//! Signals to any process of a guest: the init's own call is for the workload's group only. A tiny program that
//! sends the signal is written into the guest and run there, so that it works in an image without `kill`.

use std::time::Duration;

use crate::{Arch, Client, Command, Error, Output, elf::static_program, files::WriteOptions};

/// Where the program is written: a tmpfs mounted by the init.
const PATH: &str = "/run/pigeon/kill";
/// How long a guest may take to run it; it may be busy.
const TIMEOUT: Duration = Duration::from_secs(30);

/// The target of a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The process with this pid.
    Process(u32),
    /// The process group with this id.
    Group(u32),
    /// All processes but the init.
    All,
}

/// The result of sending a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// It was sent.
    Sent,
    /// There is no such process.
    NoProcess,
}

/// kill(2), then exit(2) with its errno.
fn code(arch: Arch, target: Target, signal: u8) -> Vec<u8> {
    let pid = match target {
        Target::Process(pid) => pid,
        Target::Group(id) => id.wrapping_neg(),
        Target::All => -1i32 as u32,
    };
    match arch {
        Arch::X86_64 => {
            let mut code = vec![0xbf]; // mov edi, pid
            code.extend(pid.to_le_bytes());
            code.push(0xbe); // mov esi, signal
            code.extend(u32::from(signal).to_le_bytes());
            // mov eax, SYS_kill; syscall; neg eax; mov edi, eax; mov eax, SYS_exit; syscall
            code.extend([0xb8, 62, 0, 0, 0, 0x0f, 0x05, 0xf7, 0xd8, 0x89, 0xc7]);
            code.extend([0xb8, 60, 0, 0, 0, 0x0f, 0x05]);
            code
        }
        Arch::Aarch64 => {
            let load = |register: u32, value: u32| 0x5280_0000 | value << 5 | register;
            let load_high = |register: u32, value: u32| 0x72a0_0000 | value << 5 | register;
            let supervisor_call = 0xd400_0001;
            let negate_w0 = 0x4b00_03e0;
            [
                load(0, pid & 0xffff),
                load_high(0, pid >> 16),
                load(1, signal.into()),
                load(8, 129), // kill
                supervisor_call,
                negate_w0,
                load(8, 93), // exit
                supervisor_call,
            ]
            .into_iter()
            .flat_map(u32::to_le_bytes)
            .collect()
        }
    }
}

impl Client {
    /// Sends a signal to a process of the guest, to a group, or to all of them. Calls for one VM must not
    /// overlap, except those for groups: the others use one file.
    pub fn kill(&self, arch: Arch, target: Target, signal: u8) -> Result<Sent, Error> {
        let program = static_program(arch, &code(arch, target, signal));
        // A file is replaced atomically, here by the same program.
        let path = match target {
            Target::Group(id) => format!("{PATH}-{id}-{signal}"),
            _ => PATH.into(),
        };
        let options = WriteOptions {
            mode: Some(0o700),
            user: None,
        };
        let length = program.len() as u64;
        self.write_file(&path, &mut program.as_slice(), Some(length), &options)?;
        let output = self.exec(&Command::new([path]).dir("/").timeout(TIMEOUT))?;
        outcome(target, &output)
            .map_err(|why| Error::Broken(format!("unable to send signal {signal}: {why}")))
    }
}

/// Interprets the program's exit.
fn outcome(target: Target, output: &Output) -> Result<Sent, String> {
    match output.exit_code {
        0 => Ok(Sent::Sent),
        errno if errno == rustix::io::Errno::SRCH.raw_os_error() => Ok(Sent::NoProcess),
        _ if output.timed_out => Err("the guest has not run the program that sends it".into()),
        // It was a target itself.
        _ if output.exit_signal != 0 && target == Target::All => Ok(Sent::Sent),
        _ if output.exit_signal != 0 => Err("the program that sends it was killed".into()),
        errno => Err(std::io::Error::from_raw_os_error(errno).to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::write_program;
    use std::{
        os::unix::process::{CommandExt, ExitStatusExt},
        process,
    };

    #[test]
    fn the_program_sends_its_signal_and_reports_a_missing_process() {
        let dir = tempfile::tempdir().unwrap();
        let kill = |target: Target, signal: u8| {
            let path = dir.path().join(format!("kill-{target:?}-{signal}"));
            let code = code(Arch::HOST, target, signal);
            write_program(&path, static_program(Arch::HOST, &code)).unwrap();
            process::Command::new(path).status().unwrap().code()
        };
        for target in [Target::Process, Target::Group] {
            let mut sleep = process::Command::new("sleep");
            let mut sleep = sleep.arg("60").process_group(0).spawn().unwrap();
            let target = target(sleep.id());
            assert_eq!(kill(target, 0), Some(0));
            assert_eq!(kill(target, 15), Some(0));
            assert_eq!(sleep.wait().unwrap().signal(), Some(15));
            assert_eq!(kill(target, 15), Some(3));
        }
    }

    #[test]
    fn being_killed_counts_as_sent_only_when_signalling_all() {
        let killed = |timed_out: bool| Output {
            exit_code: -1,
            exit_signal: 9,
            timed_out,
            ..Output::default()
        };
        let one = Target::Process(7);
        assert_eq!(outcome(Target::All, &killed(false)), Ok(Sent::Sent));
        assert!(outcome(Target::All, &killed(true)).is_err());
        assert!(outcome(one, &killed(false)).is_err());
        let ended = |exit_code: i32| Output {
            exit_code,
            ..Output::default()
        };
        assert_eq!(outcome(one, &ended(0)), Ok(Sent::Sent));
        assert_eq!(outcome(one, &ended(3)), Ok(Sent::NoProcess));
        let why = outcome(one, &ended(1)).unwrap_err();
        assert!(why.contains("not permitted"), "{why}");
    }

    #[test]
    fn the_aarch64_program_has_the_assemblers_encoding() {
        let words: Vec<u32> = code(Arch::Aarch64, Target::Process(0x1_0002), 9)
            .chunks(4)
            .map(|word| u32::from_le_bytes(word.try_into().unwrap()))
            .collect();
        // As an assembler has them: mov w0, #2; movk w0, #1, lsl #16; mov w1, #9; mov w8, #129;
        // svc #0; neg w0, w0; mov w8, #93; svc #0
        let expected = [
            0x5280_0040,
            0x72a0_0020,
            0x5280_0121,
            0x5280_1028,
            0xd400_0001,
            0x4b00_03e0,
            0x5280_0ba8,
            0xd400_0001,
        ];
        assert_eq!(words, expected);
    }
}
