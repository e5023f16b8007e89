//! How large a document may be.

/// Largest document, in bytes: 20 times Firecracker's default MMDS store.
pub const DOCUMENT: usize = 1 << 20;
/// Most arguments of a list: of `Entrypoint`, and of `Cmd`.
pub const ARGV: usize = 1024;
/// Most entries of an environment list or map.
pub const ENV: usize = 4096;
/// Most addresses.
pub const ADDRESSES: usize = 64;
/// Most extra volumes.
pub const MOUNTS: usize = 64;
/// Most entries for /etc/hosts.
pub const HOSTS: usize = 256;
/// Most name servers; resolvers use the first three.
pub const NAMESERVERS: usize = 16;
/// Most search domains, and most options, of /etc/resolv.conf.
pub const RESOLV_WORDS: usize = 32;
/// Most kernel parameters.
pub const SYSCTLS: usize = 256;
/// Longest path, its NUL included (PATH_MAX, limits.h).
pub const PATH: usize = 4096;
/// Longest host name (HOST_NAME_MAX, sethostname(2)).
pub const HOSTNAME: usize = 64;
/// Longest name of a network interface (IFNAMSIZ less its NUL, linux/if.h).
pub const INTERFACE: usize = 15;
