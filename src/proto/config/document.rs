//! The document: its fields, and values derived from them.

use super::limits::{
    MAX_ADDRESSES, MAX_ARGS, MAX_ENV_ENTRIES, MAX_HOSTS, MAX_MOUNTS, MAX_NAMESERVERS,
    MAX_RESOLV_WORDS, MAX_SYSCTLS,
};
use crate::address;
use crate::arena::{Arena, Strings};
use crate::bytes::split_text_once;
use crate::decimal;
use crate::json::{self, Object, Parse, Place};
use crate::message::Message;
use crate::rlimit::Rlimits;
use crate::signal::Signal;
use core::ffi::CStr;
use core::net::IpAddr;

/// The root device unless the configuration names another.
pub const ROOT_DEVICE: &CStr = c"/dev/vda";
/// The network interface of an address unless it names another.
pub const DEVICE: &str = "eth0";
/// The MTU of interfaces with addresses unless the configuration names another.
pub const MTU: u32 = 1500;

/// The whole document, some 22 KiB: too large for the stack. Absent fields are empty, false or `None`.
/// Its strings are in an [`Arena`].
#[derive(Clone, Debug)]
pub struct Config<'a> {
    /// The image's configuration.
    pub image_config: ImageConfig<'a>,
    /// Replaces the image's command altogether.
    pub exec_override: Strings<'a>,
    /// Replaces the image's `Cmd`, as one argument.
    pub cmd_override: &'a CStr,
    /// Replaces the image's `User`.
    pub user_override: &'a str,
    /// Set on top of the image's environment: `NAME=value`.
    pub extra_env: Strings<'a>,
    pub(super) mtu: u32,
    /// Host name of the guest; empty is none.
    pub hostname: &'a str,
    pub(super) root_device: &'a CStr,
    /// Mount the root read-only.
    pub root_read_only: bool,
    pub(super) root_overlay: &'a CStr,
    /// For /etc/resolv.conf.
    pub etc_resolv: EtcResolv<'a>,
    /// Resource limits of the workload.
    pub rlimits: Rlimits,
    pub(super) sysctls: Strings<'a>,
    /// Standard error has its own pipe.
    pub separate_stderr: bool,
    /// Sent to the workload after a restore.
    pub restore_signal: Option<Signal>,
    /// Addresses of network interfaces.
    pub ip_configs: heapless::Vec<IpConfig<'a>, MAX_ADDRESSES>,
    /// Extra volumes.
    pub mounts: heapless::Vec<Mount<'a>, MAX_MOUNTS>,
    /// Entries for /etc/hosts.
    pub etc_hosts: heapless::Vec<Host<'a>, MAX_HOSTS>,
}

/// The configuration of an image's command (OCI image specification, config.md).
#[derive(Clone, Copy, Debug, Hash)]
pub struct ImageConfig<'a> {
    /// The first arguments.
    pub entrypoint: Strings<'a>,
    /// The arguments after them.
    pub cmd: Strings<'a>,
    /// The environment: `NAME=value`.
    pub env: Strings<'a>,
    /// Working directory; empty is `/`.
    pub working_dir: &'a CStr,
    /// The user, in the syntax of [`Identity::resolve`](crate::users::Identity::resolve); empty is root.
    pub user: &'a str,
    /// The signal of an orderly stop; SIGTERM if absent.
    pub stop_signal: Option<Signal>,
}

/// An address of a network interface.
#[derive(Clone, Copy, Debug, Default, Hash)]
pub struct IpConfig<'a> {
    pub(super) gateway: Gateway,
    pub(super) ip: Option<IpAddr>,
    pub(super) mask: Option<u8>,
    pub(super) device: &'a str,
}

/// A gateway; a prefix length after it is ignored.
#[derive(Clone, Copy, Debug, Default, Hash)]
pub(super) struct Gateway(pub(super) Option<IpAddr>);

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
    /// Type of its file system; empty: identified by the superblock.
    pub fs_type: &'a CStr,
    /// Mount it read-only.
    pub read_only: bool,
    /// Options, comma-separated.
    pub options: &'a CStr,
}

/// For /etc/resolv.conf (resolv.conf(5)).
#[derive(Clone, Copy, Debug, Default, Hash)]
pub struct EtcResolv<'a> {
    /// Addresses of name servers.
    pub nameservers: Strings<'a>,
    /// Search domains.
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

/// The writable layer of an overlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overlay<'a> {
    /// A tmpfs with these options.
    Tmpfs(&'a CStr),
    /// The ext4 on this device.
    Device(&'a CStr),
}

impl<'a> Object<'a> for Config<'a> {
    fn member(&mut self, name: &str) -> Place<'_, 'a> {
        match name {
            "ImageConfig" => Place::Object(&mut self.image_config),
            "ExecOverride" => Place::Strings(&mut self.exec_override, MAX_ARGS),
            "CmdOverride" => Place::CStr(&mut self.cmd_override),
            "UserOverride" => Place::Str(&mut self.user_override),
            "ExtraEnv" => Place::StringMap(&mut self.extra_env, MAX_ENV_ENTRIES),
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
            "Sysctls" => Place::StringMap(&mut self.sysctls, MAX_SYSCTLS),
            "SeparateStderr" => Place::Flag(&mut self.separate_stderr),
            "RestoreSignal" => Place::ParsedOrNumber(&mut self.restore_signal),
            _ => Place::Unknown,
        }
    }
}

impl<'a> Object<'a> for ImageConfig<'a> {
    fn member(&mut self, name: &str) -> Place<'_, 'a> {
        match name {
            "Entrypoint" => Place::Strings(&mut self.entrypoint, MAX_ARGS),
            "Cmd" => Place::Strings(&mut self.cmd, MAX_ARGS),
            "Env" => Place::Strings(&mut self.env, MAX_ENV_ENTRIES),
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
            "Nameservers" => Place::Strings(&mut self.nameservers, MAX_NAMESERVERS),
            "Search" => Place::Strings(&mut self.search, MAX_RESOLV_WORDS),
            "Options" => Place::Strings(&mut self.options, MAX_RESOLV_WORDS),
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
    /// A document without any fields.
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

    /// Decodes a document into an empty one. The error names the field. The text can be decoded again
    /// afterwards.
    pub fn decode(&mut self, document: &mut [u8], arena: &mut Arena<'a>) -> Result<(), Message> {
        json::decode(document, arena, self)
    }

    /// Whether it has a command.
    pub fn has_command(&self) -> bool {
        self.argv().next().is_some()
    }

    /// The command: `ExecOverride`, else `Entrypoint` and (`CmdOverride` as one argument, else `Cmd`).
    pub fn argv(&self) -> impl Iterator<Item = &'a CStr> + Clone {
        let [first, last] = self.arguments();
        first.iter().chain(last)
    }

    /// The same, as two lists.
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

    /// The environment: `ImageConfig.Env`, then `ExtraEnv`, which takes precedence.
    pub fn environment(&self) -> [Strings<'a>; 2] {
        [self.image_config.env, self.extra_env]
    }

    /// The user: `UserOverride`, else `ImageConfig.User`; empty is root.
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

    /// Whether the document gives an MTU.
    pub fn has_mtu(&self) -> bool {
        self.mtu != 0
    }

    /// The addresses; complete for a configuration that was checked.
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

    /// The writable layer over the root, if any.
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

    /// The sysctls: names, in the syntax of [`sysctl::path`](crate::sysctl::path), and values.
    pub fn sysctls(&self) -> impl Iterator<Item = (&'a str, &'a str)> + Clone {
        let pairs = self.sysctls.iter().filter_map(|pair| pair.to_str().ok());
        pairs.filter_map(|pair| split_text_once(pair, b'='))
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
    /// The address, if the entry is complete.
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
}

impl<'a> EtcResolv<'a> {
    /// Whether nothing is configured for /etc/resolv.conf.
    pub fn is_empty(&self) -> bool {
        self.nameservers.is_empty() && self.search.is_empty() && self.options.is_empty()
    }
}

#[cfg(test)]
pub(super) mod tests {
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

    pub fn with<R>(document: &str, look: impl FnOnce(&Config) -> R) -> Result<R, String> {
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

    #[test]
    fn all_fields_of_the_example_are_decoded() {
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
    fn fields_that_the_example_lacks_are_decoded() {
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
            let resource = |name| Resource::parse(name).unwrap();
            assert_eq!(
                config.rlimits.iter().collect::<Vec<_>>(),
                [
                    (resource("CORE"), limit(None, None)),
                    (resource("NPROC"), limit(Some(10), Some(20))),
                    (resource("NOFILE"), limit(Some(65536), Some(65536))),
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
    fn the_last_limit_of_a_resource_wins() {
        let document = r#"{"Rlimits":{"NOFILE":1,"CORE":2,"RLIMIT_NOFILE":3}}"#;
        let limits = with(document, |config| {
            let softs = config
                .rlimits
                .iter()
                .map(|(resource, limit)| (resource, limit.soft));
            softs.collect::<Vec<_>>()
        });
        let resource = |name| Resource::parse(name).unwrap();
        assert_eq!(
            limits.unwrap(),
            [(resource("CORE"), Some(2)), (resource("NOFILE"), Some(3))]
        );
    }

    #[test]
    fn overrides_of_the_command_follow_their_precedence() {
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
            let found = with(document, |config| (config.mtu(), config.has_mtu()));
            assert_eq!(found, Ok((mtu, mtu == 9000)));
        }
    }
}
