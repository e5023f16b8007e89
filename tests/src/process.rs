//! Host processes, and how many VMs run at once.

use std::{
    fs::{self, File, TryLockError},
    thread,
    time::Duration,
};

use anyhow::Result;
pub use pigeon::process::{Process, run};

use crate::assets;

/// The right to run one VM. There are few on a machine, whichever processes ask for them.
pub struct Slot {
    _lock: File,
}

impl Slot {
    /// How many VMs run at once: `PIGEON_VMS`, or 2.
    fn count() -> usize {
        std::env::var("PIGEON_VMS")
            .ok()
            .and_then(|n| n.parse().ok())
            .unwrap_or(2)
    }

    /// Waits for a free slot. The kernel gives it back when this process ends, however it ends.
    pub fn acquire() -> Result<Slot> {
        let dir = assets::cache_dir().join("slots");
        fs::create_dir_all(&dir)?;
        loop {
            for n in 0..Slot::count() {
                let lock = File::create(dir.join(n.to_string()))?;
                match lock.try_lock() {
                    Ok(()) => return Ok(Slot { _lock: lock }),
                    Err(TryLockError::WouldBlock) => {}
                    Err(TryLockError::Error(error)) => return Err(error.into()),
                }
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}
