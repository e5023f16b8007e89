//! Host processes, and a limit for the number of running VMs.

use std::{
    fs::{self, File, TryLockError},
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
pub use pigeon::process::{Process, run};

use crate::assets;

/// How long a VM waits before that is reported.
const REPORT_AFTER: Duration = Duration::from_secs(2);

/// A permit to run a VM. Their number is limited per machine, for all processes together.
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

    /// Waits for a free slot. The kernel releases it when this process exits.
    pub fn acquire() -> Result<Slot> {
        let dir = assets::cache_dir().join("slots");
        fs::create_dir_all(&dir)?;
        let begun = Instant::now();
        let mut reported = false;
        loop {
            for n in 0..Slot::count() {
                let lock = File::create(dir.join(n.to_string()))?;
                match lock.try_lock() {
                    Ok(()) => return Ok(Slot { _lock: lock }),
                    Err(TryLockError::WouldBlock) => {}
                    Err(TryLockError::Error(error)) => return Err(error.into()),
                }
            }
            if !reported && begun.elapsed() > REPORT_AFTER {
                reported = true;
                let count = Slot::count();
                eprintln!("waiting until one of {count} VMs has ended (PIGEON_VMS)");
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}
