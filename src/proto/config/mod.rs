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
    ADDRESSES, ARGV, DOCUMENT, ENV, HOSTNAME, HOSTS, INTERFACE, MOUNTS, NAMESERVERS, PATH,
    RESOLV_WORDS, SYSCTLS,
};
