//! The configuration document: the contract between the host driver and this program.

mod check;
mod digest;
mod document;
mod limits;

pub use digest::MEMBERS;
pub use document::{
    Address, Config, DEVICE, EtcResolv, Host, ImageConfig, IpConfig, MTU, Mount, Overlay,
    ROOT_DEVICE,
};
pub use limits::{
    MAX_ADDRESSES, MAX_ARGS, MAX_DOCUMENT_SIZE, MAX_ENV_ENTRIES, MAX_HOSTNAME, MAX_HOSTS,
    MAX_INTERFACE_NAME, MAX_MOUNTS, MAX_NAMESERVERS, MAX_RESOLV_WORDS, MAX_SYSCTLS, PATH_MAX,
};
