//! host
pub mod assets;
pub mod http;
pub mod image;
pub mod initrd;
pub mod machine;
pub mod process;
pub mod qmp;
pub mod tsc;
pub mod vsock;
