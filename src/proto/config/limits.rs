//! The limits of a document.

/// Maximum size of a document in bytes: 20 times Firecracker's default MMDS store.
pub const MAX_DOCUMENT_SIZE: usize = 1 << 20;
/// Maximum number of arguments in a list: in `Entrypoint`, and in `Cmd`.
pub const MAX_ARGS: usize = 1024;
/// Maximum number of entries in an environment list or map.
pub const MAX_ENV_ENTRIES: usize = 4096;
/// Maximum number of addresses.
pub const MAX_ADDRESSES: usize = 64;
/// Maximum number of extra volumes.
pub const MAX_MOUNTS: usize = 64;
/// Maximum number of entries for /etc/hosts.
pub const MAX_HOSTS: usize = 256;
/// Maximum number of name servers; resolvers use the first three.
pub const MAX_NAMESERVERS: usize = 16;
/// Maximum number of search domains, and of options, in /etc/resolv.conf.
pub const MAX_RESOLV_WORDS: usize = 32;
/// Maximum number of sysctls.
pub const MAX_SYSCTLS: usize = 256;
/// Maximum length of a path, its NUL included (PATH_MAX, limits.h).
pub const PATH_MAX: usize = 4096;
/// Maximum length of a host name (HOST_NAME_MAX, sethostname(2)).
pub const MAX_HOSTNAME: usize = 64;
/// Maximum length of a network interface's name (IFNAMSIZ less its NUL, linux/if.h).
pub const MAX_INTERFACE_NAME: usize = 15;
