//! Host processes, and a limit for VMs that run at once.

use std::{
    fs::{self, File, TryLockError},
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
pub use pigeon::process::{Process, run};

use crate::assets;

/// How long a VM waits before it says so.
const TELL_AFTER: Duration = Duration::from_secs(2);

/// A permit to run a VM. Their number is limited on a machine, for all processes together.
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
        let begun = Instant::now();
        let mut told = false;
        loop {
            for n in 0..Slot::count() {
                let lock = File::create(dir.join(n.to_string()))?;
                match lock.try_lock() {
                    Ok(()) => return Ok(Slot { _lock: lock }),
                    Err(TryLockError::WouldBlock) => {}
                    Err(TryLockError::Error(error)) => return Err(error.into()),
                }
            }
            if !told && begun.elapsed() > TELL_AFTER {
                told = true;
                let count = Slot::count();
                eprintln!("waiting until one of {count} VMs has ended (PIGEON_VMS)");
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}
