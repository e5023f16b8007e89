//! Wire formats and file formats: parsers and encoders that take bytes and give values.
//!
//! Nothing here makes a system call, so everything is tested and fuzzed on the host.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]
#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::expect_used
    )
)]

pub mod address;
pub mod arena;
pub mod block;
pub mod bodies;
pub mod buffer;
pub mod bytes;
pub mod config;
pub mod decimal;
pub mod digest;
pub mod docker_frames;
pub mod environment;
pub mod etc_files;
pub mod http;
pub mod json;
pub mod kmsg;
pub mod message;
pub mod mmds;
pub mod mountinfo;
pub mod netlink;
pub mod process_stat;
pub mod ring;
pub mod rlimit;
pub mod signal;
pub mod slab;
pub mod superblock;
pub mod sysctl;
pub mod sysinfo;
pub mod users;
pub mod vmclock;
pub mod websocket;
