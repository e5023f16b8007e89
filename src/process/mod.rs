//! Child processes: forks, short-lived helpers, commands and their credentials.

pub mod channel;
pub mod credentials;
pub mod exec;
#[cfg(feature = "snapshot")]
pub mod freezer;
pub mod helper;
pub mod oom_score;
pub mod pipe;
pub mod rlimits;
