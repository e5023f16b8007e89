//! PID 1 while it serves: one event loop, from the start of the API to the reboot.

mod event_loop;
mod events;
mod input;
mod oom;
mod output;
mod phases;
mod state;
mod workload;

pub use event_loop::HANDLED;
pub use events::Events;
pub use state::Supervisor;
