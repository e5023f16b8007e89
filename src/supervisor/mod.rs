//! PID 1 while it serves: one event loop, from the first moment at which something can happen to the
//! reboot.

mod event_loop;
mod oom;
mod output;
mod phases;
mod state;
mod workload;

pub use event_loop::HANDLED;
pub use state::Supervisor;

/// How long the API waits for somebody to read the exit code, in milliseconds.
pub const LINGER: u64 = 1000;
