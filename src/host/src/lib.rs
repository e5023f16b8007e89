//! The host's side of pigeon-init: boots micro-VMs of container images and drives them over vsock.
//!
//! [`Client`] talks to any running VM. [`machine`] starts one, on Firecracker or QEMU; [`image`] makes its
//! root disk. The `pigeon` command combines all three.
//!
//! Everything is synchronous.

mod arch;
pub mod assets;
pub mod calls;
mod client;
pub mod config;
mod connection;
mod elf;
mod error;
pub mod events;
pub mod files;
pub mod forward;
pub mod hold;
pub mod http;
pub mod image;
pub mod initrd;
pub mod kill;
pub mod lock;
pub mod logs;
pub mod machine;
pub mod mounts;
pub mod process;
pub mod progress;
pub mod proxy;
pub mod qmp;
pub mod scratch;
pub mod session;
pub mod signal;
pub mod snapshot;
pub mod tsc;
pub mod vsock;

pub use arch::Arch;
pub use client::{Client, Command, Exit, Output};
pub use connection::Connection;
pub use error::Error;
pub use session::Session;
