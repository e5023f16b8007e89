//! Child processes: forking, short-lived helpers, commands and who they run as.

pub mod exec;
pub mod helper;
