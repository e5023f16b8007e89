//! The kernel's interface: system calls that rustix has no public function for, each in the smallest safe
//! function, and typed wrappers, one module per subject.

#[cfg(target_arch = "aarch64")]
#[path = "aarch64.rs"]
mod arch;
#[cfg(target_arch = "x86_64")]
#[path = "x86_64.rs"]
mod arch;

mod clock;
pub mod disk;
pub mod epoll;
pub mod files;
mod guest_file;
mod memory;
pub mod mount;
pub mod network;
mod process;
#[cfg(feature = "snapshot")]
pub mod random;
pub mod signal;
mod spawn;
pub mod start;
mod syscall;
pub mod terminal;
pub mod vsock;

pub use clock::{PAUSE_THRESHOLD, Stopwatch, milliseconds, sleep};
#[cfg(feature = "snapshot")]
pub use clock::{device_time, microseconds, real_time, set_real_time};
pub use files::c_str;
pub use guest_file::{GuestFile, GuestThreads};
pub use memory::{Region, Static, free_unused, lock_memory, release_stack};
pub use process::{
    Fork, Inherited, close_others, execve, exit, fork, has_hung_up, is_readable, kill_all,
    kill_group, kill_rest_of_group, set_streams, standard_streams,
};
pub use signal::{SignalSet, block_signals, read_signal, signalfd};
pub use spawn::Spawn;
pub use start::StackStrings;
