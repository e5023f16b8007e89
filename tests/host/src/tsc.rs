//! The host's time stamp counter.
//!
//! QEMU's microvm has neither PIT nor HPET to calibrate against, so its guest kernel has to be
//! told the frequency (`tsc_early_khz=`); under TCG the guest's counter is the host's own.

use std::{
    arch::x86_64::_rdtsc,
    sync::LazyLock,
    thread,
    time::{Duration, Instant},
};

/// Frequency of the host's TSC in kHz, measured once.
pub fn khz() -> u64 {
    static KHZ: LazyLock<u64> = LazyLock::new(|| {
        // The median shrugs off a sample during which the thread was preempted between two reads.
        let mut samples = [(); 5].map(|()| sample(Duration::from_millis(20)));
        samples.sort_unstable();
        samples[2]
    });
    *KHZ
}

fn sample(length: Duration) -> u64 {
    let ticks = || {
        // SAFETY: every x86-64 processor has RDTSC, and Linux leaves it to user space.
        unsafe { _rdtsc() }
    };
    let (start, from) = (Instant::now(), ticks());
    thread::sleep(length);
    let (elapsed, to) = (start.elapsed(), ticks());
    u64::try_from(u128::from(to - from) * 1_000_000 / elapsed.as_nanos()).expect("kHz fit in u64")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_samples_agree_within_a_percent() {
        let (a, b) = (khz(), sample(Duration::from_millis(100)));
        assert!(a.abs_diff(b) < a / 100, "{a} kHz, then {b} kHz");
    }
}
