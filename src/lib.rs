//! The pure half of pigeon-init: parsers and encoders that take bytes and give values.
//!
//! Nothing here makes a system call, so all of it is tested and fuzzed on the host.
//! The other half, [the program](../init/index.html), owns every file descriptor.
#![cfg_attr(not(test), no_std)]
#![deny(unsafe_code)]
#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::expect_used
    )
)]

pub mod accounts;
pub mod address;
pub mod buffer;
pub mod bytes;
pub mod command;
pub mod config;
pub mod digest;
pub mod etc;
pub mod http;
pub mod json;
pub mod kmsg;
pub mod mmds;
pub mod mountinfo;
pub mod netlink;
pub mod request;
pub mod slab;
pub mod text;
pub mod websocket;
