//! Programs of a few instructions, as static ELF files of one segment (elf(5)).

use crate::Arch;

/// Where a program is loaded.
const ADDRESS: u64 = 0x40_0000;
/// Bytes of the file's header and of its only segment's.
const HEADERS: usize = 64 + 56;

/// Where the data of [`program_with_data`] is, aligned.
pub(crate) const DATA: u64 = ADDRESS + HEADERS as u64;

/// The file of a program whose instructions are `code`.
pub(crate) fn static_program(arch: Arch, code: &[u8]) -> Vec<u8> {
    program_with_data(arch, vec![], code)
}

/// The same with data before the instructions, at [`DATA`].
pub(crate) fn program_with_data(arch: Arch, mut contents: Vec<u8>, code: &[u8]) -> Vec<u8> {
    // aarch64 wants instructions aligned.
    contents.resize(contents.len().next_multiple_of(8), 0);
    let entry = DATA + contents.len() as u64;
    contents.extend(code);
    /// e_machine of the two (elf.h: EM_X86_64, EM_AARCH64).
    const MACHINES: [u16; 2] = [62, 183];
    let machine = match arch {
        Arch::X86_64 => MACHINES[0],
        Arch::Aarch64 => MACHINES[1],
    };
    let size = (HEADERS + contents.len()) as u64;
    let mut file = vec![];
    // 64 bits, little-endian, of this version.
    file.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    file.extend(2u16.to_le_bytes()); // an executable
    file.extend(machine.to_le_bytes());
    file.extend(1u32.to_le_bytes());
    file.extend(entry.to_le_bytes());
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
    file.extend(contents);
    file
}
