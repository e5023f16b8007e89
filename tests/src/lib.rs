//! The VM lab: boots pigeon-init on real kernels in micro-VMs, from ordinary Rust tests.
//!
//! ```no_run
//! use pigeon_lab::{End, Vm, disk::{Image, Tree}};
//! use serde_json::json;
//!
//! let root = Image::ext4(&Tree::busybox()?, 32)?;
//! let mut vm = Vm::builder()
//!     .config(&json!({"ExecOverride": ["/bin/sh", "-c", "echo hello; exit 7"]}))
//!     .disk(&root)
//!     .boot()?;
//! vm.wait_for("hello")?;
//! assert_eq!(vm.api()?.get("/v1/exit_code")?.json()?["code"], 7);
//! assert_eq!(vm.wait_end()?, End::Reboot);
//! root.check()?;
//! # anyhow::Ok(())
//! ```
//!
//! A VM runs on Firecracker if `/dev/kvm` works, a `firecracker` binary is found and Firecracker supports
//! what the test needs; otherwise on QEMU. Its architecture is [`assets::arch`]. The API is synchronous, and
//! VMs end with the process that started them.

pub mod assets;
pub mod disk;
pub mod guest;
pub mod mmds;
pub mod net;
pub mod noise;
pub mod process;
pub mod serial;
pub mod vm;
pub mod ws;

pub use pigeon::{Arch, http, initrd, proxy, qmp, vsock};
pub use vm::{End, Vm};
