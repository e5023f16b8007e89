//! The page of a vmclock device (include/uapi/linux/vmclock-abi.h, struct vmclock_abi).

/// Number of bytes of the structure that are read.
pub const LENGTH: usize = 112;

/// VMCLOCK_MAGIC, "VCLK".
const MAGIC: u32 = 0x4b4c_4356;
const FLAGS: usize = 24;
/// VMCLOCK_FLAG_VM_GEN_COUNTER_PRESENT
const HAS_GENERATION: u64 = 1 << 8;
const GENERATION: usize = 104;

/// The VM's generation, which changes with each restore; `None` if the device has none.
pub fn generation(page: &[u8; LENGTH]) -> Option<u64> {
    let number = |at: usize| Some(u64::from_le_bytes(*page.get(at..)?.first_chunk()?));
    let magic = u32::from_le_bytes(*page.first_chunk()?);
    let has_generation = number(FLAGS)? & HAS_GENERATION != 0;
    match magic == MAGIC && has_generation {
        true => number(GENERATION),
        false => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As a device of version 1 with both flags has it.
    fn page(generation: u64) -> [u8; LENGTH] {
        let mut page = [0; LENGTH];
        page[..4].copy_from_slice(b"VCLK");
        page[4..8].copy_from_slice(&4096u32.to_le_bytes());
        page[8] = 1;
        page[24..32].copy_from_slice(&0x300u64.to_le_bytes());
        page[104..].copy_from_slice(&generation.to_le_bytes());
        page
    }

    #[test]
    fn the_generation_is_read_if_there_is_one() {
        assert_eq!(generation(&page(7)), Some(7));
        assert_eq!(generation(&page(u64::MAX)), Some(u64::MAX));
        let mut without = page(7);
        without[25] = 2;
        assert_eq!(generation(&without), None);
        let mut other = page(7);
        other[0] = b'v';
        assert_eq!(generation(&other), None);
    }
}
