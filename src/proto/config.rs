//! The configuration document: the contract between the host driver and this program.

use crate::address;
use crate::arena::{Arena, Strings};
use crate::bytes::{split, split_text_once};
use crate::decimal;
use crate::json::{self, Object, Parse, Place};
use crate::message::{Message, ToLossy};
use crate::rlimit::Rlimits;
use crate::signal::Signal;
use crate::sysctl;
use core::ffi::CStr;
use core::fmt::Write;
use core::hash::{Hash, Hasher};
use core::net::IpAddr;

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

/// The root device unless the configuration names another.
pub const ROOT_DEVICE: &CStr = c"/dev/vda";
/// The network interface of an address unless it names another.
pub const DEVICE: &str = "eth0";
/// The MTU of interfaces with addresses unless the configuration names another.
pub const MTU: u32 = 1500;

/// The whole document, some 22 KiB: too large for the stack. What is absent is empty, false or `None`.
/// Its strings lie in an [`Arena`].
#[derive(Clone, Debug)]
pub struct Config<'a> {
    /// The image's own.
    pub image_config: ImageConfig<'a>,
    /// Replaces the image's command altogether.
    pub exec_override: Strings<'a>,
    /// Replaces the image's `Cmd`, as one argument.
    pub cmd_override: &'a CStr,
    /// Replaces the image's `User`.
    pub user_override: &'a str,
    /// Set on top of the image's environment: `NAME=value`.
    pub extra_env: Strings<'a>,
    mtu: u32,
    /// Host name of the guest; empty is none.
    pub hostname: &'a str,
    root_device: &'a CStr,
    /// Mount the root read-only.
    pub root_read_only: bool,
    root_overlay: &'a CStr,
    /// For /etc/resolv.conf.
    pub etc_resolv: EtcResolv<'a>,
    /// Resource limits of the workload.
    pub rlimits: Rlimits,
    sysctls: Strings<'a>,
    /// Standard error is a pipe of its own.
    pub separate_stderr: bool,
    /// Sent to the workload after a restore.
    pub restore_signal: Option<Signal>,
    /// Addresses of network interfaces.
    pub ip_configs: heapless::Vec<IpConfig<'a>, ADDRESSES>,
    /// Extra volumes.
    pub mounts: heapless::Vec<Mount<'a>, MOUNTS>,
    /// Entries for /etc/hosts.
    pub etc_hosts: heapless::Vec<Host<'a>, HOSTS>,
}

/// What an image says of its command (OCI image specification, config.md).
#[derive(Clone, Copy, Debug, Hash)]
pub struct ImageConfig<'a> {
    /// The first arguments.
    pub entrypoint: Strings<'a>,
    /// The arguments behind them.
    pub cmd: Strings<'a>,
    /// The environment: `NAME=value`.
    pub env: Strings<'a>,
    /// Working directory; empty is `/`.
    pub working_dir: &'a CStr,
    /// Who runs it, as [`Identity::resolve`](crate::users::Identity::resolve) has it; empty is root.
    pub user: &'a str,
    /// What an orderly stop sends; SIGTERM when absent.
    pub stop_signal: Option<Signal>,
}

/// An address of a network interface.
#[derive(Clone, Copy, Debug, Default, Hash)]
pub struct IpConfig<'a> {
    gateway: Gateway,
    ip: Option<IpAddr>,
    mask: Option<u8>,
    device: &'a str,
}

/// A gateway; the prefix length behind it, if any, says nothing that a route needs.
#[derive(Clone, Copy, Debug, Default, Hash)]
struct Gateway(Option<IpAddr>);

/// An address of a network interface, complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address<'a> {
    /// The address.
    pub ip: IpAddr,
    /// Its prefix length in bits.
    pub prefix: u8,
    /// The default gateway, of the same family.
    pub gateway: Option<IpAddr>,
    /// The interface's name.
    pub device: &'a str,
}

/// An extra volume.
#[derive(Clone, Copy, Debug, Default, Hash)]
pub struct Mount<'a> {
    /// The block device; empty for a tmpfs.
    pub device_path: &'a CStr,
    /// Where it is mounted.
    pub mount_path: &'a CStr,
    /// Type of its file system; empty: what the superblock says.
    pub fs_type: &'a CStr,
    /// Mount it read-only.
    pub read_only: bool,
    /// Options of the file system, with commas between (mount(2), data).
    pub options: &'a CStr,
}

/// For /etc/resolv.conf (resolv.conf(5)).
#[derive(Clone, Copy, Debug, Default, Hash)]
pub struct EtcResolv<'a> {
    /// Addresses of name servers.
    pub nameservers: Strings<'a>,
    /// Domains in which a short name is looked for.
    pub search: Strings<'a>,
    /// Options of the resolver.
    pub options: Strings<'a>,
}

/// An entry for /etc/hosts.
#[derive(Clone, Copy, Debug, Default, Hash)]
pub struct Host<'a> {
    /// The name.
    pub host: &'a str,
    /// The address.
    pub ip: &'a str,
    /// A comment.
    pub desc: &'a str,
}

/// Where what is written to an overlaid root goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overlay<'a> {
    /// Into memory, by a tmpfs with these options.
    Tmpfs(&'a CStr),
    /// To the ext4 on this device.
    Device(&'a CStr),
}

impl<'a> Object<'a> for Config<'a> {
    fn member(&mut self, name: &str) -> Place<'_, 'a> {
        match name {
            "ImageConfig" => Place::Object(&mut self.image_config),
            "ExecOverride" => Place::Strings(&mut self.exec_override, ARGV),
            "CmdOverride" => Place::CStr(&mut self.cmd_override),
            "UserOverride" => Place::Str(&mut self.user_override),
            "ExtraEnv" => Place::StringMap(&mut self.extra_env, ENV),
            "MTU" => Place::Number(&mut self.mtu, 0..=65_535),
            "IPConfigs" => Place::Objects(&mut self.ip_configs),
            "Hostname" => Place::Str(&mut self.hostname),
            "Mounts" => Place::Objects(&mut self.mounts),
            "RootDevice" => Place::CStr(&mut self.root_device),
            "RootReadOnly" => Place::Flag(&mut self.root_read_only),
            "RootOverlay" => Place::CStr(&mut self.root_overlay),
            "EtcResolv" => Place::Object(&mut self.etc_resolv),
            "EtcHosts" => Place::Objects(&mut self.etc_hosts),
            "Rlimits" => Place::Object(&mut self.rlimits),
            "Sysctls" => Place::StringMap(&mut self.sysctls, SYSCTLS),
            "SeparateStderr" => Place::Flag(&mut self.separate_stderr),
            "RestoreSignal" => Place::ParsedOrNumber(&mut self.restore_signal),
            _ => Place::Unknown,
        }
    }
}

impl<'a> Object<'a> for ImageConfig<'a> {
    fn member(&mut self, name: &str) -> Place<'_, 'a> {
        match name {
            "Entrypoint" => Place::Strings(&mut self.entrypoint, ARGV),
            "Cmd" => Place::Strings(&mut self.cmd, ARGV),
            "Env" => Place::Strings(&mut self.env, ENV),
            "WorkingDir" => Place::CStr(&mut self.working_dir),
            "User" => Place::Str(&mut self.user),
            "StopSignal" => Place::ParsedOrNumber(&mut self.stop_signal),
            _ => Place::Unknown,
        }
    }
}

impl<'a> Object<'a> for IpConfig<'a> {
    fn member(&mut self, name: &str) -> Place<'_, 'a> {
        match name {
            "Gateway" => Place::Parsed(&mut self.gateway),
            "IP" => Place::Parsed(&mut self.ip),
            "Mask" => Place::Number(&mut self.mask, 0..=128),
            "Device" => Place::Str(&mut self.device),
            _ => Place::Unknown,
        }
    }
}

impl<'a> Object<'a> for Mount<'a> {
    fn member(&mut self, name: &str) -> Place<'_, 'a> {
        match name {
            "DevicePath" => Place::CStr(&mut self.device_path),
            "MountPath" => Place::CStr(&mut self.mount_path),
            "FSType" => Place::CStr(&mut self.fs_type),
            "ReadOnly" => Place::Flag(&mut self.read_only),
            "Options" => Place::CStr(&mut self.options),
            _ => Place::Unknown,
        }
    }
}

impl<'a> Object<'a> for EtcResolv<'a> {
    fn member(&mut self, name: &str) -> Place<'_, 'a> {
        match name {
            "Nameservers" => Place::Strings(&mut self.nameservers, NAMESERVERS),
            "Search" => Place::Strings(&mut self.search, RESOLV_WORDS),
            "Options" => Place::Strings(&mut self.options, RESOLV_WORDS),
            _ => Place::Unknown,
        }
    }
}

impl<'a> Object<'a> for Host<'a> {
    fn member(&mut self, name: &str) -> Place<'_, 'a> {
        match name {
            "Host" => Place::Str(&mut self.host),
            "IP" => Place::Str(&mut self.ip),
            "Desc" => Place::Str(&mut self.desc),
            _ => Place::Unknown,
        }
    }
}

impl Parse for Option<IpAddr> {
    fn parse(&mut self, text: &str) -> Result<(), &'static str> {
        *self = Some(address::parse(text).ok_or("not an address")?);
        Ok(())
    }
}

impl Parse for Gateway {
    fn parse(&mut self, text: &str) -> Result<(), &'static str> {
        if text.is_empty() {
            self.0 = None;
            return Ok(());
        }
        let (address, prefix) = split_text_once(text, b'/').unwrap_or((text, "0"));
        match decimal::parse(prefix.as_bytes()) {
            Some(0..=128) => self.0.parse(address),
            _ => Err("not an address"),
        }
    }
}

impl<'a> Config<'a> {
    /// One in which all is absent.
    pub const fn new() -> Self {
        Self {
            image_config: ImageConfig::new(),
            exec_override: Strings::new(&[]),
            cmd_override: c"",
            user_override: "",
            extra_env: Strings::new(&[]),
            mtu: 0,
            hostname: "",
            root_device: c"",
            root_read_only: false,
            root_overlay: c"",
            etc_resolv: EtcResolv {
                nameservers: Strings::new(&[]),
                search: Strings::new(&[]),
                options: Strings::new(&[]),
            },
            rlimits: Rlimits::new(),
            sysctls: Strings::new(&[]),
            separate_stderr: false,
            restore_signal: None,
            ip_configs: heapless::Vec::new(),
            mounts: heapless::Vec::new(),
            etc_hosts: heapless::Vec::new(),
        }
    }

    /// Decodes a document into a new one. The error names the field. The document can be decoded
    /// again afterwards.
    pub fn decode(&mut self, document: &mut [u8], arena: &mut Arena<'a>) -> Result<(), Message> {
        json::decode(document, arena, self)
    }

    /// Whether there is something to run.
    pub fn has_command(&self) -> bool {
        self.argv().next().is_some()
    }

    /// What is run: `ExecOverride`, else `Entrypoint` and (`CmdOverride` as one argument, else `Cmd`).
    pub fn argv(&self) -> impl Iterator<Item = &'a CStr> + Clone {
        let [first, last] = self.arguments();
        first.iter().chain(last)
    }

    /// The same, as one list behind another.
    pub fn arguments(&self) -> [Strings<'a>; 2] {
        let image = &self.image_config;
        if !self.exec_override.is_empty() {
            [self.exec_override, Strings::default()]
        } else if !self.cmd_override.is_empty() {
            [image.entrypoint, Strings::one(self.cmd_override)]
        } else {
            [image.entrypoint, image.cmd]
        }
    }

    /// The environment: `ImageConfig.Env`, then `ExtraEnv` on top.
    pub fn environment(&self) -> [Strings<'a>; 2] {
        [self.image_config.env, self.extra_env]
    }

    /// Who runs it: `UserOverride`, else `ImageConfig.User`; empty is root.
    pub fn user(&self) -> &'a str {
        if self.user_override.is_empty() {
            self.image_config.user
        } else {
            self.user_override
        }
    }

    /// MTU of the interfaces that get addresses.
    pub fn mtu(&self) -> u32 {
        match self.mtu {
            0 => MTU,
            mtu => mtu,
        }
    }

    /// The addresses of a configuration that was checked.
    pub fn addresses(&self) -> impl Iterator<Item = Address<'a>> + Clone {
        self.ip_configs.iter().filter_map(IpConfig::address)
    }

    /// Block device of the root.
    pub fn root_device(&self) -> &'a CStr {
        if self.root_device.is_empty() {
            ROOT_DEVICE
        } else {
            self.root_device
        }
    }

    /// Where what is written to the root goes, if not to its device.
    pub fn root_overlay(&self) -> Option<Overlay<'a>> {
        let text = self.root_overlay.to_bytes_with_nul();
        let behind = |start: &[u8]| CStr::from_bytes_until_nul(text.strip_prefix(start)?).ok();
        if text.starts_with(b"/") {
            Some(Overlay::Device(self.root_overlay))
        } else if text == b"tmpfs\0" {
            Some(Overlay::Tmpfs(c""))
        } else {
            behind(b"tmpfs:").map(Overlay::Tmpfs)
        }
    }

    /// Kernel parameters: their names, as [`sysctl::path`] has them, and values.
    pub fn sysctls(&self) -> impl Iterator<Item = (&'a str, &'a str)> + Clone {
        let pairs = self.sysctls.iter().filter_map(|pair| pair.to_str().ok());
        pairs.filter_map(|pair| split_text_once(pair, b'='))
    }

    /// A digest of each of the [`MEMBERS`], by which two documents can be compared when one of them is
    /// gone.
    pub fn digests(&self) -> [u64; MEMBERS.len()] {
        [
            digest(&self.image_config),
            digest(&self.exec_override),
            digest(&self.cmd_override),
            digest(&self.user_override),
            digest(&self.extra_env),
            digest(&self.mtu),
            digest(&self.ip_configs),
            digest(&self.hostname),
            digest(&self.mounts),
            digest(&self.root_device),
            digest(&self.root_read_only),
            digest(&self.root_overlay),
            digest(&self.etc_resolv),
            digest(&self.etc_hosts),
            digest(&self.rlimits),
            digest(&self.sysctls),
            digest(&self.separate_stderr),
            digest(&self.restore_signal),
        ]
    }

    /// Checks what the document's form does not show. The error names the field.
    pub fn check(&self) -> Result<(), Message> {
        let mut checks = Checks::default();
        let has_name = !self.argv().next().is_some_and(CStr::is_empty);
        checks.require(has_name, "the command's name is empty", b"");
        checks.path("RootDevice", self.root_device());
        match self.root_overlay() {
            Some(Overlay::Tmpfs(options)) => checks.path_length("RootOverlay", options),
            Some(Overlay::Device(device)) => checks.path("RootOverlay", device),
            None => checks.require(
                self.root_overlay.is_empty(),
                "RootOverlay: neither tmpfs nor a device: ",
                self.root_overlay.to_bytes(),
            ),
        }
        checks.path_length("ImageConfig.WorkingDir", self.image_config.working_dir);
        let fits = self.hostname.len() <= HOSTNAME;
        checks.require(fits, "Hostname: longer than 64 bytes", b"");
        let mut room = sysctl::ROOM;
        for (name, _) in self.sysctls() {
            let is_known = sysctl::path(name, &mut room).is_some();
            checks.require(
                is_known,
                "Sysctls: not a kernel parameter: ",
                name.as_bytes(),
            );
        }
        for (at, entry) in self.ip_configs.iter().enumerate() {
            checks.place = Some(("IPConfigs", at, "."));
            entry.check(&mut checks);
        }
        for (at, entry) in self.mounts.iter().enumerate() {
            checks.place = Some(("Mounts", at, "."));
            let earlier = self.mounts.get(..at).unwrap_or_default();
            entry.check_behind(earlier, &mut checks);
        }
        self.etc_resolv.check(&mut checks);
        for (at, entry) in self.etc_hosts.iter().enumerate() {
            checks.place = Some(("EtcHosts", at, "."));
            entry.check(&mut checks);
        }
        checks.result()
    }
}

/// The members that a document can have.
pub const MEMBERS: [&str; 18] = [
    "ImageConfig",
    "ExecOverride",
    "CmdOverride",
    "UserOverride",
    "ExtraEnv",
    "MTU",
    "IPConfigs",
    "Hostname",
    "Mounts",
    "RootDevice",
    "RootReadOnly",
    "RootOverlay",
    "EtcResolv",
    "EtcHosts",
    "Rlimits",
    "Sysctls",
    "SeparateStderr",
    "RestoreSignal",
];

fn digest(value: &impl Hash) -> u64 {
    let mut hasher = Fnv1a(0xcbf2_9ce4_8422_2325);
    value.hash(&mut hasher);
    hasher.finish()
}

/// FNV-1a, 64 bits (draft-eastlake-fnv).
struct Fnv1a(u64);

impl Hasher for Fnv1a {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        }
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// An entry of a list: the list, the entry's number, and what is between that and the fault.
type Entry = (&'static str, usize, &'static str);

/// Looks for the first fault.
#[derive(Default)]
struct Checks {
    /// The entry that is being checked.
    place: Option<Entry>,
    /// `Mounts[1].MountPath: used twice: /data`; empty: none yet.
    fault: Message,
}

impl Checks {
    /// Unless something is right, says why not, and shows the value behind it.
    fn require(&mut self, is_right: bool, why: &str, value: &[u8]) {
        self.require_of("", is_right, why, value);
    }

    fn require_of(&mut self, field: &str, is_right: bool, why: &str, value: &[u8]) {
        if is_right || !self.fault.is_empty() {
            return;
        }
        // Writing to a message never fails.
        if let Some((list, at, separator)) = self.place {
            let _ = write!(self.fault, "{list}[{at}]{separator}");
        }
        let _ = write!(self.fault, "{field}{why}{}", value.lossy());
    }

    /// A path for the kernel: absolute, and not too long.
    fn path(&mut self, field: &'static str, path: &CStr) {
        let bytes = path.to_bytes();
        let is_absolute = bytes.starts_with(b"/");
        self.require_of(field, is_absolute, ": not an absolute path: ", bytes);
        self.path_length(field, path);
    }

    fn path_length(&mut self, field: &'static str, path: &CStr) {
        let fits = path.count_bytes() < PATH;
        self.require_of(field, fits, ": longer than 4095 bytes", b"");
    }

    /// A list of strings.
    fn each(
        &mut self,
        list: &'static str,
        strings: Strings,
        is_right: &dyn Fn(&str) -> bool,
        why: &'static str,
    ) {
        for (at, string) in strings.iter().enumerate() {
            self.place = Some((list, at, ": "));
            self.require(string.to_str().is_ok_and(is_right), why, string.to_bytes());
        }
    }

    fn result(self) -> Result<(), Message> {
        match self.fault.is_empty() {
            true => Ok(()),
            false => Err(self.fault),
        }
    }
}

impl Default for Config<'_> {
    fn default() -> Self {
        Self::new()
    }
}

impl ImageConfig<'_> {
    const fn new() -> Self {
        Self {
            entrypoint: Strings::new(&[]),
            cmd: Strings::new(&[]),
            env: Strings::new(&[]),
            working_dir: c"",
            user: "",
            stop_signal: None,
        }
    }
}

impl<'a> IpConfig<'a> {
    /// The address, when the entry is complete.
    fn address(&self) -> Option<Address<'a>> {
        Some(Address {
            ip: self.ip?,
            prefix: self.mask?,
            gateway: self.gateway.0,
            device: if self.device.is_empty() {
                DEVICE
            } else {
                self.device
            },
        })
    }

    fn check(&self, checks: &mut Checks) {
        let Some(ip) = self.ip else {
            return checks.require(false, "IP: missing", b"");
        };
        checks.require(self.mask.is_some(), "Mask: missing", b"");
        let (longest, why) = match ip {
            IpAddr::V4(_) => (32, "Mask: must be from 0 to 32"),
            IpAddr::V6(_) => (128, "Mask: must be from 0 to 128"),
        };
        checks.require(self.mask.is_none_or(|mask| mask <= longest), why, b"");
        let is_same_family = |gateway: IpAddr| gateway.is_ipv4() == ip.is_ipv4();
        let has_route = self.gateway.0.is_none_or(is_same_family);
        checks.require(has_route, "Gateway: not of the IP's family", b"");
        // dev_valid_name, net/core/dev.c
        let name = self.device.as_bytes();
        let is_plain = |byte: &u8| is_graphic(*byte) && *byte != b'/';
        let is_name =
            name.len() <= INTERFACE && !matches!(name, b"." | b"..") && name.iter().all(is_plain);
        checks.require(is_name, "Device: not a network interface: ", name);
    }
}

/// What this program mounts itself, and needs to the end.
const OURS: [&[u8]; 4] = [b"proc", b"sys", b"dev", b"run"];

impl<'a> Mount<'a> {
    /// Checks one that stands alone.
    pub fn check(&self) -> Result<(), Message> {
        let mut checks = Checks::default();
        self.check_behind(&[], &mut checks);
        checks.result()
    }

    /// Checks one behind `earlier` ones.
    fn check_behind(&self, earlier: &[Self], checks: &mut Checks) {
        let fs_type = self.fs_type.to_bytes();
        let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"._-".contains(byte);
        let is_type = fs_type.iter().all(is_plain);
        checks.require(is_type, "FSType: not a type of file system: ", fs_type);
        if !(fs_type == b"tmpfs" && self.device_path.is_empty()) {
            checks.path("DevicePath", self.device_path);
        }
        checks.path("MountPath", self.mount_path);
        checks.path_length("Options", self.options);
        let path = self.mount_path.to_bytes();
        let mut names = names(self.mount_path);
        match (names.next(), names.next()) {
            (None, _) => checks.require(false, "MountPath: would hide the root", b""),
            (Some(first), None) => {
                checks.require(!OURS.contains(&first), "MountPath: would hide ", path);
            }
            _ => {}
        }
        let goes_up = self::names(self.mount_path).any(|name| name == b"..");
        checks.require(!goes_up, "MountPath: has '..': ", path);
        let is_same = |other: &Self| self::names(other.mount_path).eq(self::names(self.mount_path));
        let is_used = earlier.iter().any(is_same);
        checks.require(!is_used, "MountPath: used twice: ", path);
    }
}

/// The names of a path, without empty ones and `.`.
fn names(path: &CStr) -> impl Iterator<Item = &[u8]> {
    let names = split(path.to_bytes(), b'/');
    names.filter(|name| !matches!(*name, b"" | b"."))
}

impl<'a> EtcResolv<'a> {
    /// Whether there is anything for /etc/resolv.conf.
    pub fn is_empty(&self) -> bool {
        self.nameservers.is_empty() && self.search.is_empty() && self.options.is_empty()
    }

    fn check(&self, checks: &mut Checks) {
        let is_word = |word: &str| !word.is_empty() && word.bytes().all(is_graphic);
        let Self {
            nameservers,
            search,
            options,
        } = *self;
        let why = "not an address: ";
        checks.each("EtcResolv.Nameservers", nameservers, &is_name_server, why);
        checks.each("EtcResolv.Search", search, &is_word, "not a domain: ");
        checks.each("EtcResolv.Options", options, &is_word, "not an option: ");
    }
}

/// An address, perhaps with an IPv6 zone (`fe80::1%eth0`, resolv.conf(5)).
fn is_name_server(server: &str) -> bool {
    let is_zone = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    match split_text_once(server, b'%') {
        None => address::parse(server).is_some(),
        Some((address, zone)) => {
            matches!(address::parse(address), Some(IpAddr::V6(_)))
                && !zone.is_empty()
                && zone.bytes().all(is_zone)
        }
    }
}

impl<'a> Host<'a> {
    fn check(&self, checks: &mut Checks) {
        let is_address = address::parse(self.ip).is_some();
        checks.require(is_address, "IP: not an address: ", self.ip.as_bytes());
        let is_plain = |byte| is_graphic(byte) && byte != b'#';
        let is_name = !self.host.is_empty() && self.host.bytes().all(is_plain);
        checks.require(is_name, "Host: not a host name: ", self.host.as_bytes());
    }
}

/// Neither a blank nor a control character; part of a character of UTF-8 may be.
fn is_graphic(byte: u8) -> bool {
    byte > b' ' && byte != 0x7f
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rlimit::{Limit, Resource};

    /// The example of the project's first description, whole.
    pub const EXAMPLE: &str = r#"{
        "ImageConfig": {"Entrypoint": ["/bin/myapp"], "Cmd": ["--port", "8080"],
            "Env": ["PATH=/usr/local/bin:/usr/bin:/bin"], "WorkingDir": "/app", "User": "nobody"},
        "ExecOverride": null, "CmdOverride": null, "UserOverride": null,
        "ExtraEnv": {"DATABASE_URL": "postgres://...", "LOG_LEVEL": "info"},
        "MTU": 1500, "IPConfigs": [{"Gateway": "169.254.0.1", "IP": "10.0.0.2", "Mask": 24}],
        "Hostname": "my-app-abcdef", "Mounts": [{"DevicePath": "/dev/vdb", "MountPath": "/data"}],
        "RootDevice": null, "EtcResolv": {"Nameservers": ["8.8.8.8"]},
        "EtcHosts": [{"Host": "my-app.internal", "IP": "10.0.0.2", "Desc": "app alias"}]}"#;

    fn with<R>(document: &str, look: impl FnOnce(&Config) -> R) -> Result<R, String> {
        let mut bytes = document.as_bytes().to_vec();
        let mut memory = vec![0; bytes.len()];
        let mut config = Config::new();
        let decoded = config.decode(&mut bytes, &mut Arena::new(&mut memory));
        decoded.map_err(|why| why.as_str().to_owned())?;
        Ok(look(&config))
    }

    fn listed<'a>(strings: impl IntoIterator<Item = &'a CStr>) -> Vec<String> {
        let shown = strings.into_iter().map(|string| string.to_str().unwrap());
        shown.map(str::to_owned).collect()
    }

    fn argv(document: &str) -> Vec<String> {
        with(document, |config| listed(config.argv())).unwrap()
    }

    /// What is wrong with a document; empty when nothing is.
    fn complaint(document: &str) -> String {
        let checked = with(document, |config| {
            config.check().map_err(|why| why.as_str().to_owned())
        });
        checked
            .and_then(|checked| checked)
            .err()
            .unwrap_or_default()
    }

    #[test]
    fn a_member_has_another_digest_when_its_value_is_another_one() {
        let digests = |text: &str| {
            let mut document = text.as_bytes().to_vec();
            let mut memory = vec![0; document.len()];
            let mut config = Config::new();
            let decoded = config.decode(&mut document, &mut Arena::new(&mut memory));
            decoded.map(|()| config.digests()).unwrap()
        };
        let absent = digests("{}");
        let members = [
            ("ImageConfig", [r#"{"Cmd":["a","b"]}"#, r#"{"Cmd":["ab"]}"#]),
            ("ExecOverride", [r#"["a"]"#, r#"["b"]"#]),
            ("CmdOverride", [r#""a""#, r#""b""#]),
            ("UserOverride", [r#""a""#, r#""b""#]),
            ("ExtraEnv", [r#"{"A":"1"}"#, r#"{"A":"2"}"#]),
            ("MTU", ["1400", "1401"]),
            (
                "IPConfigs",
                [
                    r#"[{"IP":"10.0.0.2","Mask":24,"Gateway":"10.0.0.1"}]"#,
                    r#"[{"IP":"10.0.0.2","Mask":24,"Gateway":"10.0.0.3"}]"#,
                ],
            ),
            ("Hostname", [r#""a""#, r#""b""#]),
            (
                "Mounts",
                [
                    r#"[{"DevicePath":"/dev/vdb","MountPath":"/a"}]"#,
                    r#"[{"DevicePath":"/dev/vdb","MountPath":"/a","ReadOnly":true}]"#,
                ],
            ),
            ("RootDevice", [r#""/dev/vda1""#, r#""/dev/vda2""#]),
            ("RootReadOnly", ["true", "true"]),
            ("RootOverlay", [r#""tmpfs""#, r#""/dev/vdb""#]),
            ("EtcResolv", [r#"{"Search":["a"]}"#, r#"{"Options":["a"]}"#]),
            (
                "EtcHosts",
                [
                    r#"[{"Host":"a","IP":"1.1.1.1"}]"#,
                    r#"[{"Host":"a","IP":"1.1.1.2"}]"#,
                ],
            ),
            ("Rlimits", [r#"{"NOFILE":1}"#, r#"{"NOFILE":2}"#]),
            ("Sysctls", [r#"{"a.b":"1"}"#, r#"{"a.b":"2"}"#]),
            ("SeparateStderr", ["true", "true"]),
            ("RestoreSignal", ["10", r#""USR2""#]),
        ];
        assert_eq!(MEMBERS, members.map(|(name, _)| name));
        for (at, (name, values)) in members.iter().enumerate() {
            let seen = values.map(|value| digests(&format!(r#"{{"{name}":{value}}}"#)));
            for digests in seen {
                for (other, (digest, none)) in digests.iter().zip(&absent).enumerate() {
                    assert_eq!(digest == none, other != at, "{name}");
                }
            }
            assert_eq!(seen[0] == seen[1], values[0] == values[1], "{name}");
        }
        // How a document is written does not matter.
        assert_eq!(
            digests(r#"{"MTU":1400,"ImageConfig":{"Env":["A=<"],"User":"a"}}"#),
            digests(
                "{ \"ImageConfig\": {\"User\": \"a\", \"Env\":[\"A=\\u003c\"]}, \"MTU\": 1400}"
            )
        );
    }

    #[test]
    fn the_example_is_read_whole() {
        with(EXAMPLE, |config| {
            config.check().unwrap();
            assert_eq!(config.image_config.working_dir, c"/app");
            assert_eq!(config.user(), "nobody");
            assert_eq!(config.mtu(), 1500);
            assert_eq!(
                config.environment().map(listed).concat(),
                [
                    "PATH=/usr/local/bin:/usr/bin:/bin",
                    "DATABASE_URL=postgres://...",
                    "LOG_LEVEL=info"
                ]
            );
            let address = Address {
                ip: "10.0.0.2".parse().unwrap(),
                prefix: 24,
                gateway: "169.254.0.1".parse().ok(),
                device: "eth0",
            };
            assert_eq!(config.addresses().collect::<Vec<_>>(), [address]);
            assert_eq!(config.mounts[0].device_path, c"/dev/vdb");
            assert_eq!(config.mounts[0].mount_path, c"/data");
            assert_eq!(config.root_device(), c"/dev/vda");
            assert_eq!(listed(config.etc_resolv.nameservers), ["8.8.8.8"]);
            assert_eq!(config.etc_hosts[0].desc, "app alias");
            assert_eq!(config.hostname, "my-app-abcdef");
        })
        .unwrap();
        assert_eq!(argv(EXAMPLE), ["/bin/myapp", "--port", "8080"]);
    }

    #[test]
    fn fields_beside_those_of_the_example_are_read() {
        let document = r#"{
            "ImageConfig": {"Entrypoint": ["/e"], "StopSignal": "SIGQUIT"},
            "IPConfigs": [{"IP": "fd00::2", "Mask": 64, "Device": "eth1"}],
            "Mounts": [
                {"MountPath": "/tmp", "FSType": "tmpfs", "Options": "size=64m"},
                {"DevicePath": "/dev/vdc", "MountPath": "/ro", "ReadOnly": true}],
            "RootDevice": "/dev/pmem0", "RootReadOnly": true, "RootOverlay": "tmpfs:size=64m",
            "EtcResolv": {"Search": ["example.com", "example.org"], "Options": ["ndots:2"]},
            "Rlimits": {"NOFILE": 65536, "CORE": "unlimited", "RLIMIT_NPROC": "10:20"},
            "Sysctls": {"net.core.somaxconn": "1024", "vm/swappiness": "10"},
            "SeparateStderr": true, "RestoreSignal": 10}"#;
        with(document, |config| {
            config.check().unwrap();
            let signals = [config.image_config.stop_signal, config.restore_signal];
            assert_eq!(signals.map(|signal| signal.unwrap().number()), [3, 10]);
            let address = config.addresses().next().unwrap();
            assert_eq!((address.device, address.gateway), ("eth1", None));
            assert_eq!(config.mounts[0].fs_type, c"tmpfs");
            assert_eq!(config.mounts[0].options, c"size=64m");
            assert!(!config.mounts[0].read_only && config.mounts[1].read_only);
            assert_eq!(config.root_device(), c"/dev/pmem0");
            assert!(config.root_read_only && config.separate_stderr);
            assert_eq!(config.root_overlay(), Some(Overlay::Tmpfs(c"size=64m")));
            assert_eq!(
                listed(config.etc_resolv.search),
                ["example.com", "example.org"]
            );
            assert_eq!(listed(config.etc_resolv.options), ["ndots:2"]);
            let limit = |soft, hard| Limit { soft, hard };
            assert_eq!(
                config.rlimits.iter().collect::<Vec<_>>(),
                [
                    (Resource::Core, limit(None, None)),
                    (Resource::Nproc, limit(Some(10), Some(20))),
                    (Resource::Nofile, limit(Some(65536), Some(65536))),
                ]
            );
            assert_eq!(
                config.sysctls().collect::<Vec<_>>(),
                [("net.core.somaxconn", "1024"), ("vm/swappiness", "10")]
            );
        })
        .unwrap();
    }

    #[test]
    fn a_root_overlay_is_in_memory_or_on_a_device() {
        let overlay = |text: &str| {
            let document = format!(r#"{{"RootOverlay":"{text}"}}"#);
            with(&document, |config| match config.root_overlay() {
                Some(Overlay::Tmpfs(options)) => format!("tmpfs {}", options.to_str().unwrap()),
                Some(Overlay::Device(device)) => format!("device {}", device.to_str().unwrap()),
                None => String::new(),
            })
            .unwrap()
        };
        assert_eq!(overlay("tmpfs"), "tmpfs ");
        assert_eq!(overlay("tmpfs:"), "tmpfs ");
        assert_eq!(overlay("tmpfs:size=64m"), "tmpfs size=64m");
        assert_eq!(overlay("/dev/vdb"), "device /dev/vdb");
        assert_eq!(overlay("tmpfsx"), "");
        assert_eq!(overlay(""), "");
    }

    #[test]
    fn a_limit_of_a_resource_given_twice_is_the_last_one() {
        let document = r#"{"Rlimits":{"NOFILE":1,"CORE":2,"RLIMIT_NOFILE":3}}"#;
        let limits = with(document, |config| {
            let softs = config
                .rlimits
                .iter()
                .map(|(resource, limit)| (resource, limit.soft));
            softs.collect::<Vec<_>>()
        });
        assert_eq!(
            limits.unwrap(),
            [(Resource::Core, Some(2)), (Resource::Nofile, Some(3))]
        );
    }

    #[test]
    fn the_argv_follows_the_order_of_precedence() {
        let image = r#""ImageConfig":{"Entrypoint":["/e","1"],"Cmd":["c","d"]}"#;
        assert_eq!(argv(&format!("{{{image}}}")), ["/e", "1", "c", "d"]);
        assert_eq!(
            argv(&format!(r#"{{{image},"CmdOverride":"x y"}}"#)),
            ["/e", "1", "x y"]
        );
        assert_eq!(
            argv(&format!(
                r#"{{{image},"CmdOverride":"x","ExecOverride":["/o"]}}"#
            )),
            ["/o"]
        );
        assert_eq!(argv(r#"{"ImageConfig":{"Cmd":["c"]}}"#), ["c"]);
        assert_eq!(
            argv(r#"{"ImageConfig":{"Entrypoint":["", "a"]}}"#),
            ["", "a"]
        );
        assert!(argv("{}").is_empty());
    }

    #[test]
    fn mtu_zero_and_no_mtu_are_the_default() {
        for (document, mtu) in [
            ("{}", 1500),
            (r#"{"MTU":null}"#, 1500),
            (r#"{"MTU":0}"#, 1500),
            (r#"{"MTU":9000}"#, 9000),
        ] {
            assert_eq!(with(document, |config| config.mtu()), Ok(mtu));
        }
    }

    #[test]
    fn a_gateway_may_be_absent_empty_or_carry_a_prefix_length() {
        let gateway = |text: &str| {
            let document = format!(r#"{{"IPConfigs":[{{"IP":"10.0.0.2","Mask":24{text}}}]}}"#);
            with(&document, |config| {
                let checked = config.check().map_err(|why| why.as_str().to_owned());
                checked.map(|()| config.addresses().next().unwrap().gateway)
            })?
        };
        let address = Ok("10.0.0.1".parse().ok());
        assert_eq!(gateway(""), Ok(None));
        assert_eq!(gateway(r#","Gateway":"""#), Ok(None));
        assert_eq!(gateway(r#","Gateway":"10.0.0.1""#), address);
        assert_eq!(gateway(r#","Gateway":"10.0.0.1/24""#), address);
        for text in [
            "10.0.0.1/x",
            "10.0.0.1/",
            "10.0.0.1/+1",
            "10.0.0.1/129",
            "x",
            "/24",
        ] {
            assert_eq!(
                gateway(&format!(r#","Gateway":"{text}""#)),
                Err(format!("IPConfigs[0].Gateway: not an address: {text}"))
            );
        }
        assert_eq!(
            gateway(r#","Gateway":"fd00::1""#),
            Err("IPConfigs[0].Gateway: not of the IP's family".to_owned())
        );
    }

    #[test]
    fn the_promised_numbers_of_entries_fit_and_one_more_is_an_error() {
        let list = |count: usize, entry: &str| format!("[{}]", vec![entry; count].join(","));
        let map = |count: usize| {
            let entries = (0..count).map(|at| format!(r#""a{at}":"b""#));
            format!("{{{}}}", entries.collect::<Vec<_>>().join(","))
        };
        let image = |name: &str, value: String| format!(r#""ImageConfig":{{"{name}":{value}}}"#);
        let resolv = |name: &str, value: String| format!(r#""EtcResolv":{{"{name}":{value}}}"#);
        let member = |name: &str, value: String| format!(r#""{name}":{value}"#);
        type Member<'m> = &'m dyn Fn(usize) -> String;
        let members: [(&str, usize, Member); 12] = [
            ("ExecOverride", ARGV, &|n| {
                member("ExecOverride", list(n, r#""a""#))
            }),
            ("ImageConfig.Entrypoint", ARGV, &|n| {
                image("Entrypoint", list(n, r#""""#))
            }),
            ("ImageConfig.Cmd", ARGV, &|n| image("Cmd", list(n, r#""""#))),
            ("ImageConfig.Env", ENV, &|n| {
                image("Env", list(n, r#""a=b""#))
            }),
            ("ExtraEnv", ENV, &|n| member("ExtraEnv", map(n))),
            ("IPConfigs", ADDRESSES, &|n| {
                member("IPConfigs", list(n, r#"{"IP":"::1"}"#))
            }),
            ("Mounts", MOUNTS, &|n| member("Mounts", list(n, "{}"))),
            ("EtcHosts", HOSTS, &|n| member("EtcHosts", list(n, "{}"))),
            ("EtcResolv.Nameservers", NAMESERVERS, &|n| {
                resolv("Nameservers", list(n, r#""::1""#))
            }),
            ("EtcResolv.Search", RESOLV_WORDS, &|n| {
                resolv("Search", list(n, r#""a""#))
            }),
            ("EtcResolv.Options", RESOLV_WORDS, &|n| {
                resolv("Options", list(n, r#""a""#))
            }),
            ("Sysctls", SYSCTLS, &|n| member("Sysctls", map(n))),
        ];
        let all = members.map(|(_, most, member)| member(most)).join(",");
        with(&format!("{{{all}}}"), |config| {
            let argv = [
                config.exec_override,
                config.image_config.entrypoint,
                config.image_config.cmd,
            ];
            assert_eq!(argv.map(|list| list.iter().count()), [ARGV; 3]);
            assert_eq!(
                config.environment().map(|list| list.iter().count()),
                [ENV; 2]
            );
            assert_eq!(config.ip_configs.len(), ADDRESSES);
            assert_eq!(config.mounts.len(), MOUNTS);
            assert_eq!(config.etc_hosts.len(), HOSTS);
            assert_eq!(config.etc_resolv.nameservers.iter().count(), NAMESERVERS);
            assert_eq!(config.etc_resolv.search.iter().count(), RESOLV_WORDS);
            assert_eq!(config.etc_resolv.options.iter().count(), RESOLV_WORDS);
            assert_eq!(config.sysctls().count(), SYSCTLS);
        })
        .unwrap();
        for (path, most, member) in members {
            assert_eq!(
                complaint(&format!("{{{}}}", member(most + 1))),
                format!("{path}: more than {most} entries")
            );
        }
    }

    #[test]
    fn what_cannot_work_is_named() {
        let mount = |rest: &str| format!(r#"{{"Mounts":[{{{rest}}}]}}"#);
        let at = |path: &str| mount(&format!(r#""DevicePath":"/dev/vdb","MountPath":"{path}""#));
        let ip = |rest: &str| format!(r#"{{"IPConfigs":[{{{rest}}}]}}"#);
        let resolv = |rest: &str| format!(r#"{{"EtcResolv":{{{rest}}}}}"#);
        let text = |field: &str, value: &str| format!(r#"{{"{field}":"{value}"}}"#);
        let ip_device = |name: &str| ip(&format!(r#""IP":"::1","Mask":128,"Device":"{name}""#));
        for (document, wanted) in [
            (
                r#"{"ExecOverride":[""]}"#.to_owned(),
                "the command's name is empty",
            ),
            (
                text("RootDevice", "vda"),
                "RootDevice: not an absolute path: vda",
            ),
            (
                text("RootDevice", &format!("/{}", "d".repeat(4095))),
                "RootDevice: longer than 4095 bytes",
            ),
            (
                format!(
                    r#"{{"ImageConfig":{{"WorkingDir":"/{}"}}}}"#,
                    "d".repeat(4095)
                ),
                "ImageConfig.WorkingDir: longer than 4095 bytes",
            ),
            (
                text("RootOverlay", "ramfs"),
                "RootOverlay: neither tmpfs nor a device: ramfs",
            ),
            (
                text("Hostname", &"h".repeat(65)),
                "Hostname: longer than 64 bytes",
            ),
            (
                ip(r#""IP":"10.0.0.2","Mask":33"#),
                "IPConfigs[0].Mask: must be from 0 to 32",
            ),
            (
                ip(r#""IP":"::1","Mask":129"#),
                "IPConfigs[0].Mask: must be from 0 to 128",
            ),
            (ip(r#""IP":"10.0.0.2""#), "IPConfigs[0].Mask: missing"),
            (
                ip(r#""IP":"10.0.0.2","Mask":null"#),
                "IPConfigs[0].Mask: missing",
            ),
            (
                ip(r#""IP":"10.0.0.256","Mask":24"#),
                "IPConfigs[0].IP: not an address: 10.0.0.256",
            ),
            (ip(""), "IPConfigs[0].IP: missing"),
            (
                ip_device("a/b"),
                "IPConfigs[0].Device: not a network interface: a/b",
            ),
            (
                ip_device(".."),
                "IPConfigs[0].Device: not a network interface: ..",
            ),
            (
                ip_device("0123456789abcdef"),
                "IPConfigs[0].Device: not a network interface: 0123456789abcdef",
            ),
            (at("//./"), "Mounts[0].MountPath: would hide the root"),
            (at("/proc"), "Mounts[0].MountPath: would hide /proc"),
            (at("/./dev/"), "Mounts[0].MountPath: would hide /./dev/"),
            (at("/a/../b"), "Mounts[0].MountPath: has '..': /a/../b"),
            (at("a"), "Mounts[0].MountPath: not an absolute path: a"),
            (
                mount(r#""DevicePath":"","MountPath":"/a""#),
                "Mounts[0].DevicePath: not an absolute path: ",
            ),
            (
                mount(
                    r#""DevicePath":"/dev/vdb","MountPath":"/a"},{"DevicePath":"/dev/vdc","MountPath":"//a/.""#,
                ),
                "Mounts[1].MountPath: used twice: //a/.",
            ),
            (
                mount(r#""DevicePath":"/dev/vdb","MountPath":"/a","FSType":"a b""#),
                "Mounts[0].FSType: not a type of file system: a b",
            ),
            (
                mount(r#""DevicePath":"vdb","MountPath":"/a","FSType":"tmpfs""#),
                "Mounts[0].DevicePath: not an absolute path: vdb",
            ),
            (
                resolv(r#""Nameservers":["8.8.8.8","x"]"#),
                "EtcResolv.Nameservers[1]: not an address: x",
            ),
            (
                resolv(r#""Nameservers":["8.8.8.8%eth0"]"#),
                "EtcResolv.Nameservers[0]: not an address: 8.8.8.8%eth0",
            ),
            (
                resolv(r#""Search":["a","b c"]"#),
                "EtcResolv.Search[1]: not a domain: b c",
            ),
            (
                resolv(r#""Options":[""]"#),
                "EtcResolv.Options[0]: not an option: ",
            ),
            (
                r#"{"EtcHosts":[{"Host":"a b","IP":"10.0.0.2"}]}"#.to_owned(),
                "EtcHosts[0].Host: not a host name: a b",
            ),
            (
                r#"{"EtcHosts":[{"Host":"a","IP":""}]}"#.to_owned(),
                "EtcHosts[0].IP: not an address: ",
            ),
            (
                r#"{"Sysctls":{"../x":"1"}}"#.to_owned(),
                "Sysctls: not a kernel parameter: ../x",
            ),
            (
                r#"{"Sysctls":{"vm.swappiness":10}}"#.to_owned(),
                "Sysctls.vm.swappiness: must be a string",
            ),
            (
                r#"{"Rlimits":{"NOFILES":1}}"#.to_owned(),
                "Rlimits.NOFILES: not a resource with a limit",
            ),
            (
                r#"{"Rlimits":{"NOFILE":"2:1"}}"#.to_owned(),
                "Rlimits.NOFILE: not a limit: 2:1",
            ),
            (
                r#"{"ImageConfig":{"StopSignal":"SIGFOO"}}"#.to_owned(),
                "ImageConfig.StopSignal: not a signal: SIGFOO",
            ),
            (
                r#"{"ExtraEnv":{"A":"1","B":2}}"#.to_owned(),
                "ExtraEnv.B: must be a string",
            ),
            (
                resolv(r#""Nameservers":["fe80::1%eth0","::1"],"Search":["é.example"]"#),
                "",
            ),
            (mount(r#""MountPath":"/a","FSType":"tmpfs""#), ""),
        ] {
            assert_eq!(complaint(&document), wanted);
        }
    }
}
