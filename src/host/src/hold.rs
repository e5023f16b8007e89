//! A program that does nothing until it is killed: the workload of `pigeon run -it`, where the
//! real command runs as a session on a terminal.

use anyhow::Result;
use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use crate::{
    Arch,
    image::{self, Options},
};

/// The program's name in the volume that [`write_volume`] makes.
pub const PROGRAM: &str = "hold";

/// Where the program is loaded.
const ADDRESS: u64 = 0x40_0000;
/// Bytes of the file's header and of its only segment's (elf(5)).
const HEADERS: usize = 64 + 56;

/// pause(2), again and again.
fn code(arch: Arch) -> Vec<u8> {
    match arch {
        // mov eax, SYS_pause; syscall; jmp back to the start
        Arch::X86_64 => vec![0xb8, 34, 0, 0, 0, 0x0f, 0x05, 0xeb, 0xf7],
        Arch::Aarch64 => {
            // There is no pause here: ppoll(0, 0, 0, 0) is one.
            let load = |register: u32, value: u32| 0xd280_0000 | value << 5 | register;
            let supervisor_call = 0xd400_0001;
            let branch_back = 0x1400_0000 | (0x3ff_ffff & -6i32 as u32);
            [
                load(0, 0),
                load(1, 0),
                load(2, 0),
                load(3, 0),
                load(8, 73),
                supervisor_call,
                branch_back,
            ]
            .into_iter()
            .flat_map(u32::to_le_bytes)
            .collect()
        }
    }
}

/// The program: a static ELF file of one segment.
pub fn program(arch: Arch) -> Vec<u8> {
    /// e_machine of the two (elf.h: EM_X86_64, EM_AARCH64).
    const MACHINES: [u16; 2] = [62, 183];
    let machine = match arch {
        Arch::X86_64 => MACHINES[0],
        Arch::Aarch64 => MACHINES[1],
    };
    let code = code(arch);
    let size = (HEADERS + code.len()) as u64;
    let mut file = vec![];
    // 64 bits, little-endian, of this version.
    file.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    file.extend(2u16.to_le_bytes()); // an executable
    file.extend(machine.to_le_bytes());
    file.extend(1u32.to_le_bytes());
    file.extend((ADDRESS + HEADERS as u64).to_le_bytes()); // its entry
    file.extend(64u64.to_le_bytes()); // where the segment's header is
    file.extend(0u64.to_le_bytes());
    file.extend(0u32.to_le_bytes());
    for field in [64u16, 56, 1, 0, 0, 0] {
        file.extend(field.to_le_bytes());
    }
    file.extend(1u32.to_le_bytes()); // to be loaded
    file.extend(5u32.to_le_bytes()); // to be read and executed
    for field in [0, ADDRESS, ADDRESS, size, size, 0x1000] {
        file.extend(field.to_le_bytes());
    }
    file.extend(code);
    file
}

/// Makes an image with the program in it.
pub fn write_volume(out: &Path, arch: Arch) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join(PROGRAM);
    fs::write(&path, program(arch))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755))?;
    let options = Options {
        arch,
        size: Some(16 << 20),
        ..Options::default()
    };
    image::build(dir.path(), out, &options)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::Process;
    use std::{process::Command, time::Duration};

    #[test]
    fn the_program_runs_until_it_is_killed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hold");
        fs::write(&path, program(Arch::HOST)).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let mut process = Process::spawn(Command::new(&path)).unwrap();
        let ended = process.wait(Duration::from_millis(200)).unwrap();
        assert_eq!(ended, None);
        let status = fs::read_to_string(format!("/proc/{}/status", process.child().id())).unwrap();
        assert!(status.contains("State:\tS"), "{status}");
    }

    #[test]
    fn the_foreign_program_is_as_the_architecture_has_it() {
        let words: Vec<u32> = code(Arch::Aarch64)
            .chunks(4)
            .map(|word| u32::from_le_bytes(word.try_into().unwrap()))
            .collect();
        // As an assembler has them: mov x0, #0 … mov x8, #73; svc #0; b .-24
        let expected = [
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
