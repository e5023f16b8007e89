//! The host's time stamp counter.
//!
//! QEMU's microvm has neither PIT nor HPET to calibrate against, so its guest kernel needs the frequency as a
//! parameter (`tsc_early_khz=`); under TCG the guest's counter is the host's.

use std::{
    sync::LazyLock,
    thread,
    time::{Duration, Instant},
};

/// Frequency of the host's TSC in kHz, measured once; None if the host has no TSC.
pub fn khz() -> Option<u64> {
    static KHZ: LazyLock<Option<u64>> = LazyLock::new(|| {
        // The median ignores a sample during which the thread was preempted between two reads.
        let mut samples = [(); 5].map(|()| sample(Duration::from_millis(20)));
        samples.sort_unstable();
        samples[2]
    });
    *KHZ
}

fn sample(length: Duration) -> Option<u64> {
    let (start, from) = (Instant::now(), ticks()?);
    thread::sleep(length);
    let (elapsed, to) = (start.elapsed(), ticks()?);
    u64::try_from(u128::from(to - from) * 1_000_000 / elapsed.as_nanos()).ok()
}

#[cfg(target_arch = "x86_64")]
fn ticks() -> Option<u64> {
    // SAFETY: every x86-64 processor has RDTSC, and Linux permits it in user space.
    Some(unsafe { std::arch::x86_64::_rdtsc() })
}

#[cfg(not(target_arch = "x86_64"))]
fn ticks() -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_samples_agree_within_a_percent() {
        let (a, b) = (khz(), sample(Duration::from_millis(100)));
        assert_eq!(a.is_some(), cfg!(target_arch = "x86_64"));
        let apart = a
            .zip(b)
            .map_or(0.0, |(a, b)| a.abs_diff(b) as f64 / a as f64);
        assert!(apart < 0.01, "{a:?} kHz, then {b:?} kHz");
    }
}
