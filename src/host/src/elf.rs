//! Programs of a few instructions, as static ELF files of one segment (elf(5)).

use crate::Arch;

/// The load address of a program.
const ADDRESS: u64 = 0x40_0000;
/// Size of the file header and the only segment's header.
const HEADERS: usize = 64 + 56;

/// The address of the data of [`program_with_data`]; it is aligned.
pub(crate) const DATA: u64 = ADDRESS + HEADERS as u64;

/// An ELF file with the instructions `code`.
pub(crate) fn static_program(arch: Arch, code: &[u8]) -> Vec<u8> {
    program_with_data(arch, vec![], code)
}

/// The same with data before the instructions, at [`DATA`].
pub(crate) fn program_with_data(arch: Arch, mut contents: Vec<u8>, code: &[u8]) -> Vec<u8> {
    // aarch64 instructions must be aligned.
    contents.resize(contents.len().next_multiple_of(8), 0);
    let entry = DATA + contents.len() as u64;
    contents.extend(code);
    /// e_machine of both (elf.h: EM_X86_64, EM_AARCH64).
    const MACHINES: [u16; 2] = [62, 183];
    let machine = match arch {
        Arch::X86_64 => MACHINES[0],
        Arch::Aarch64 => MACHINES[1],
    };
    let size = (HEADERS + contents.len()) as u64;
    let mut file = vec![];
    // 64 bits, little-endian, current version.
    file.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    file.extend(2u16.to_le_bytes()); // executable
    file.extend(machine.to_le_bytes());
    file.extend(1u32.to_le_bytes());
    file.extend(entry.to_le_bytes());
    file.extend(64u64.to_le_bytes()); // offset of the segment's header
    file.extend(0u64.to_le_bytes());
    file.extend(0u32.to_le_bytes());
    for field in [64u16, 56, 1, 0, 0, 0] {
        file.extend(field.to_le_bytes());
    }
    file.extend(1u32.to_le_bytes()); // PT_LOAD
    file.extend(5u32.to_le_bytes()); // readable and executable
    for field in [0, ADDRESS, ADDRESS, size, size, 0x1000] {
        file.extend(field.to_le_bytes());
    }
    file.extend(contents);
    file
}
