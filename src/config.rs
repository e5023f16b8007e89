//! The configuration document: the contract between the host driver and this program.

use crate::json::{self, Record, Records, Shape, Text, Texts};
use crate::text::Line;
use crate::text;
use core::net::IpAddr;
use serde::Deserialize;

/// Largest document, in bytes: 20 times Firecracker's default MMDS store.
pub const DOCUMENT: usize = 1 << 20;
/// Most arguments of a command.
pub const ARGV: usize = 1024;
/// Most entries of an environment list or map.
pub const ENV: usize = 4096;
/// Most addresses of eth0.
pub const ADDRESSES: usize = 64;
/// Most extra volumes.
pub const MOUNTS: usize = 64;
/// Most entries for /etc/hosts.
pub const HOSTS: usize = 256;
/// Most name servers; resolvers use the first three.
pub const NAMESERVERS: usize = 16;
/// Longest path, its NUL included (PATH_MAX, limits.h).
pub const PATH: usize = 4096;
/// Longest host name (HOST_NAME_MAX, sethostname(2)).
pub const HOSTNAME: usize = 64;

/// The root device unless the configuration names another.
pub const ROOT_DEVICE: &core::ffi::CStr = c"/dev/vda";
/// The MTU of eth0 unless the configuration names another.
pub const MTU: u32 = 1500;

static SHAPE: Shape = Shape::Record(&[
    (
        "ImageConfig",
        Shape::Record(&[
            ("Entrypoint", Shape::Texts(ARGV)),
            ("Cmd", Shape::Texts(ARGV)),
            ("Env", Shape::Texts(ENV)),
            ("WorkingDir", Shape::Text),
            ("User", Shape::Text),
        ]),
    ),
    ("ExecOverride", Shape::Texts(ARGV)),
    ("CmdOverride", Shape::Text),
    ("UserOverride", Shape::Text),
    ("ExtraEnv", Shape::Pairs(ENV)),
    ("MTU", Shape::Number(65_535)),
    ("IPConfigs", Shape::Records(ADDRESSES, &IP_CONFIG)),
    ("Hostname", Shape::Text),
    ("Mounts", Shape::Records(MOUNTS, &MOUNT)),
    ("RootDevice", Shape::Text),
    (
        "EtcResolv",
        Shape::Record(&[("Nameservers", Shape::Texts(NAMESERVERS))]),
    ),
    ("EtcHosts", Shape::Records(HOSTS, &HOST)),
]);
static IP_CONFIG: [(&str, Shape); 3] = [
    ("Gateway", Shape::Text),
    ("IP", Shape::Text),
    ("Mask", Shape::Number(128)),
];
static MOUNT: [(&str, Shape); 2] = [("DevicePath", Shape::Text), ("MountPath", Shape::Text)];
static HOST: [(&str, Shape); 3] = [
    ("Host", Shape::Text),
    ("IP", Shape::Text),
    ("Desc", Shape::Text),
];

/// The whole document; what is absent is empty or 0.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default, deny_unknown_fields)]
pub struct Config<'a> {
    /// What the image says about itself (OCI image configuration).
    #[serde(borrow)]
    pub image_config: ImageConfig<'a>,
    /// Replaces the entire argv.
    pub exec_override: Texts<'a>,
    /// Replaces the image's `Cmd`, as one argument.
    pub cmd_override: Text<'a>,
    /// Replaces the image's `User`.
    pub user_override: Text<'a>,
    /// Set on top of the image's `Env`, as `KEY=value` items.
    pub extra_env: Texts<'a>,
    /// MTU of eth0; 0 is [`MTU`].
    #[serde(rename = "MTU")]
    pub mtu: u32,
    /// Addresses and routes of eth0.
    #[serde(rename = "IPConfigs")]
    ip_configs: Records<'a>,
    /// Host name of the guest.
    pub hostname: Text<'a>,
    /// Volumes beside the root.
    mounts: Records<'a>,
    /// Block device of the root; empty is [`ROOT_DEVICE`].
    pub root_device: Text<'a>,
    /// Content of /etc/resolv.conf.
    pub etc_resolv: EtcResolv<'a>,
    /// Additions to /etc/hosts.
    etc_hosts: Records<'a>,
}

/// The part of the OCI image configuration that says what to run.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default, deny_unknown_fields)]
pub struct ImageConfig<'a> {
    /// First part of the argv.
    #[serde(borrow)]
    pub entrypoint: Texts<'a>,
    /// Second part of the argv.
    pub cmd: Texts<'a>,
    /// Environment, as `KEY=value` items.
    pub env: Texts<'a>,
    /// Working directory; empty is `/`.
    pub working_dir: Text<'a>,
    /// `user`, `uid`, `user:group` or `uid:gid`; empty is root.
    pub user: Text<'a>,
}

/// One address of eth0, as written.
#[derive(Clone, Copy, Debug)]
pub struct IpConfig<'a> {
    /// Default gateway, perhaps with a prefix length; empty is none.
    pub gateway: Text<'a>,
    /// The address.
    pub ip: Text<'a>,
    /// Prefix length in bits.
    pub mask: u8,
}

/// One extra volume.
#[derive(Clone, Copy, Debug)]
pub struct Mount<'a> {
    /// The block device.
    pub device_path: Text<'a>,
    /// Where it is mounted.
    pub mount_path: Text<'a>,
}

/// Name servers.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default, deny_unknown_fields)]
pub struct EtcResolv<'a> {
    /// Their addresses.
    #[serde(borrow)]
    pub nameservers: Texts<'a>,
}

/// One entry for /etc/hosts.
#[derive(Clone, Copy, Debug)]
pub struct Host<'a> {
    /// The name.
    pub host: Text<'a>,
    /// The address.
    pub ip: Text<'a>,
    /// A comment.
    pub desc: Text<'a>,
}

/// One address of eth0, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// The address.
    pub ip: IpAddr,
    /// Its prefix length in bits.
    pub prefix: u8,
    /// The default gateway, of the same family.
    pub gateway: Option<IpAddr>,
}

impl IpConfig<'_> {
    /// Checks and converts the entry; the error says what is wrong with which field.
    pub fn address(&self) -> Result<Address, Line> {
        let ip = self
            .ip
            .ip()
            .ok_or_else(|| text!("IP: not an address: ", self.ip))?;
        let bits = if ip.is_ipv4() { 32 } else { 128 };
        if self.mask > bits {
            return Err(text!("Mask: must be from 0 to ", u32::from(bits)));
        }
        let gateway = match self.gateway.is_empty() {
            true => None,
            false => Some(
                self.gateway()
                    .filter(|gateway| gateway.is_ipv4() == ip.is_ipv4())
                    .ok_or_else(|| text!("Gateway: not an address of the IP's family: ", self.gateway))?,
            ),
        };
        Ok(Address {
            ip,
            prefix: self.mask,
            gateway,
        })
    }

    /// The gateway without its prefix length, which says nothing the route needs.
    fn gateway(&self) -> Option<IpAddr> {
        let bytes = self.gateway.copy::<56>()?;
        let text = core::str::from_utf8(&bytes).ok()?;
        let (address, prefix) = text.split_once('/').unwrap_or((text, "0"));
        prefix.parse::<u8>().ok().filter(|bits| *bits <= 128)?;
        address.parse().ok()
    }
}

impl<'a> Config<'a> {
    /// The addresses of eth0.
    pub fn ip_configs(&self) -> impl Iterator<Item = IpConfig<'a>> {
        self.ip_configs.iter().map(|record: Record<'a>| IpConfig {
            gateway: record.field(0),
            ip: record.field(1),
            mask: record.number(2) as u8,
        })
    }

    /// The extra volumes.
    pub fn mounts(&self) -> impl Iterator<Item = Mount<'a>> {
        self.mounts.iter().map(|record: Record<'a>| Mount {
            device_path: record.field(0),
            mount_path: record.field(1),
        })
    }

    /// The entries for /etc/hosts.
    pub fn etc_hosts(&self) -> impl Iterator<Item = Host<'a>> {
        self.etc_hosts.iter().map(|record: Record<'a>| Host {
            host: record.field(0),
            ip: record.field(1),
            desc: record.field(2),
        })
    }

    /// Checks a document and condenses it in place; the answer is its new length, for
    /// [`parse`](Self::parse). The error names the field.
    pub fn condense(document: &mut [u8]) -> Result<usize, json::Error> {
        json::condense(document, &SHAPE).map(<[u8]>::len)
    }

    /// Reads a condensed document.
    pub fn parse(condensed: &'a [u8]) -> Result<Self, json::Error> {
        json::parse(condensed)
    }

    /// Both in one.
    pub fn read(document: &'a mut [u8]) -> Result<Self, json::Error> {
        json::parse(json::condense(document, &SHAPE)?)
    }

    /// Whether there is something to run.
    pub fn has_command(&self) -> bool {
        self.argv().next().is_some()
    }

    /// What is run: `ExecOverride`, else `Entrypoint` and (`CmdOverride` as one argument, else `Cmd`).
    pub fn argv(&self) -> impl Iterator<Item = Text<'a>> {
        let none = Texts::default();
        let (first, middle, last) = if !self.exec_override.is_empty() {
            (self.exec_override, None, none)
        } else if !self.cmd_override.is_empty() {
            (self.image_config.entrypoint, Some(self.cmd_override), none)
        } else {
            (self.image_config.entrypoint, None, self.image_config.cmd)
        };
        first.iter().chain(middle).chain(last.iter())
    }

    /// Who runs it: `UserOverride`, else the image's `User`; empty is root.
    pub fn user(&self) -> Text<'a> {
        if self.user_override.is_empty() {
            self.image_config.user
        } else {
            self.user_override
        }
    }

    /// MTU of eth0.
    pub fn mtu(&self) -> u32 {
        if self.mtu == 0 { MTU } else { self.mtu }
    }

    /// Checks what the document's form does not show. The error names the field.
    pub fn check(&self) -> Result<(), Line> {
        for argument in self.argv().take(1) {
            if argument.is_empty() {
                return Err(text!("the command's name is empty"));
            }
        }
        path("RootDevice", self.root_device, Device)?;
        path("ImageConfig.WorkingDir", self.image_config.working_dir, Directory)?;
        if self.hostname.copy::<HOSTNAME>().is_none() {
            return Err(text!("Hostname: longer than ", HOSTNAME, " bytes"));
        }
        for (at, entry) in self.ip_configs().enumerate() {
            entry
                .address()
                .map_err(|why| text!("IPConfigs[", at, "].", why))?;
        }
        for (at, mount) in self.mounts().enumerate() {
            mount.check(at)?;
            let mut earlier = self.mounts().take(at);
            if earlier.any(|other| other.mount_path.same_path(mount.mount_path)) {
                return Err(text!("Mounts[", at, "].MountPath: used twice: ", mount.mount_path));
            }
        }
        for (at, server) in self.etc_resolv.nameservers.iter().enumerate() {
            if !is_name_server(server) {
                return Err(text!("EtcResolv.Nameservers[", at, "]: not an address: ", server));
            }
        }
        for (at, host) in self.etc_hosts().enumerate() {
            host.check()
                .map_err(|why| text!("EtcHosts[", at, "].", why))?;
        }
        Ok(())
    }
}

/// An address, perhaps with an IPv6 zone (`fe80::1%eth0`, resolv.conf(5)).
fn is_name_server(server: Text) -> bool {
    let Some(bytes) = server.copy::<64>() else {
        return false;
    };
    let text = core::str::from_utf8(&bytes).unwrap_or("");
    let (address, zone) = text.split_once('%').unwrap_or((text, "-"));
    let scoped = zone != "-";
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    address
        .parse::<IpAddr>()
        .is_ok_and(|ip| !scoped || ip.is_ipv6())
        && !zone.is_empty()
        && zone.bytes().all(plain)
}

/// What a path is for.
#[derive(Clone, Copy, PartialEq)]
enum PathKind {
    Device,
    Directory,
}
use PathKind::{Device, Directory};

fn path(field: &str, path: Text, kind: PathKind) -> Result<(), Line> {
    if path.is_empty() {
        return Ok(());
    }
    if path.bytes().next() != Some(b'/') {
        // As in the OCI image specification, a relative working directory starts at the root.
        if kind == Directory {
            return Ok(());
        }
        return Err(text!(field, ": not an absolute path: ", path));
    }
    if path.bytes().count() >= PATH {
        return Err(text!(field, ": longer than ", PATH - 1, " bytes"));
    }
    Ok(())
}

impl Mount<'_> {
    fn check(&self, at: usize) -> Result<(), Line> {
        let field = |name| text!("Mounts[", at, "].", name);
        for (name, value) in [("DevicePath", self.device_path), ("MountPath", self.mount_path)] {
            if value.bytes().next() != Some(b'/') {
                return Err(text!(field(name), ": not an absolute path: ", value));
            }
            if value.bytes().count() >= PATH {
                return Err(text!(field(name), ": longer than ", PATH - 1, " bytes"));
            }
        }
        let mut parts = self.mount_path.parts();
        match parts.next().as_deref() {
            None => return Err(text!(field("MountPath"), ": would hide the root")),
            // What this program mounts itself, and needs to the end.
            Some(b"proc" | b"sys" | b"dev" | b"run") if parts.next().is_none() => {
                return Err(text!(field("MountPath"), ": would hide ", self.mount_path));
            }
            Some(_) => {}
        }
        if self.mount_path.parts().any(|part| part == b"..") {
            return Err(text!(field("MountPath"), ": has '..': ", self.mount_path));
        }
        Ok(())
    }
}

impl Host<'_> {
    fn check(&self) -> Result<(), Line> {
        if self.ip.ip().is_none() {
            return Err(text!("IP: not an address: ", self.ip));
        }
        let plain = |byte: u8| byte > b' ' && byte != 0x7f && byte != b'#';
        if self.host.is_empty() || !self.host.bytes().all(plain) {
            return Err(text!("Host: not a host name: ", self.host));
        }
        Ok(())
    }
}

impl<'a> Text<'a> {
    /// The names of a path, without empty ones and `.`.
    fn parts(self) -> impl Iterator<Item = heapless::Vec<u8, 256>> {
        let mut bytes = self.bytes().peekable();
        core::iter::from_fn(move || {
            loop {
                while bytes.next_if_eq(&b'/').is_some() {}
                bytes.peek()?;
                let mut part = heapless::Vec::new();
                while let Some(byte) = bytes.next_if(|byte| *byte != b'/') {
                    // Over NAME_MAX: the kernel refuses the path, whatever the rest is.
                    let _kept = part.push(byte);
                }
                if part != b"." {
                    return Some(part);
                }
            }
        })
    }

    fn same_path(self, other: Text) -> bool {
        self.parts().eq(other.parts())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json::Fault;

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

    fn with<R>(document: &str, look: impl FnOnce(Config) -> R) -> R {
        let mut bytes = document.as_bytes().to_vec();
        look(Config::read(&mut bytes).unwrap())
    }

    fn string(text: Text) -> String {
        String::from_utf8(text.bytes().collect()).unwrap()
    }

    fn argv(document: &str) -> Vec<String> {
        with(document, |config| config.argv().map(string).collect())
    }

    fn complaint(document: &str) -> String {
        with(document, |config| match config.check() {
            Ok(()) => String::new(),
            Err(line) => String::from_utf8(line.as_bytes().to_vec()).unwrap(),
        })
    }

    #[test]
    fn the_example_is_read_whole() {
        with(EXAMPLE, |config| {
            config.check().unwrap();
            assert_eq!(string(config.image_config.working_dir), "/app");
            assert_eq!(string(config.user()), "nobody");
            assert_eq!(config.mtu(), 1500);
            assert_eq!(config.extra_env.iter().map(string).collect::<Vec<_>>(), ["DATABASE_URL=postgres://...", "LOG_LEVEL=info"]);
            assert_eq!(
                config.ip_configs().next().unwrap().address().unwrap(),
                Address { ip: "10.0.0.2".parse().unwrap(), prefix: 24, gateway: "169.254.0.1".parse().ok() }
            );
            assert_eq!(string(config.mounts().next().unwrap().device_path), "/dev/vdb");
            assert_eq!(string(config.mounts().next().unwrap().mount_path), "/data");
            assert_eq!(string(config.etc_resolv.nameservers.iter().next().unwrap()), "8.8.8.8");
            assert_eq!(string(config.etc_hosts().next().unwrap().desc), "app alias");
            assert_eq!(string(config.hostname), "my-app-abcdef");
        });
        assert_eq!(argv(EXAMPLE), ["/bin/myapp", "--port", "8080"]);
    }

    #[test]
    fn the_argv_follows_the_order_of_precedence() {
        let image = r#""ImageConfig":{"Entrypoint":["/e","1"],"Cmd":["c","d"]}"#;
        assert_eq!(argv(&format!("{{{image}}}")), ["/e", "1", "c", "d"]);
        assert_eq!(argv(&format!(r#"{{{image},"CmdOverride":"x y"}}"#)), ["/e", "1", "x y"]);
        assert_eq!(argv(&format!(r#"{{{image},"CmdOverride":"x","ExecOverride":["/o"]}}"#)), ["/o"]);
        assert_eq!(argv(r#"{"ImageConfig":{"Cmd":["c"]}}"#), ["c"]);
        assert_eq!(argv(r#"{"ImageConfig":{"Entrypoint":["", "a"]}}"#), ["", "a"]);
        assert!(argv("{}").is_empty());
    }

    #[test]
    fn mtu_zero_and_no_mtu_are_the_default() {
        assert_eq!(with("{}", |config| config.mtu()), 1500);
        assert_eq!(with(r#"{"MTU":0}"#, |config| config.mtu()), 1500);
        assert_eq!(with(r#"{"MTU":9000}"#, |config| config.mtu()), 9000);
    }

    #[test]
    fn a_gateway_may_be_absent_empty_or_carry_a_prefix_length() {
        let gateway = |text: &str| {
            with(&format!(r#"{{"IPConfigs":[{{"IP":"10.0.0.2","Mask":24{text}}}]}}"#), |config| {
                config.ip_configs().next().unwrap().address().map(|address| address.gateway).map_err(|_| ())
            })
        };
        assert_eq!(gateway(""), Ok(None));
        assert_eq!(gateway(r#","Gateway":"""#), Ok(None));
        assert_eq!(gateway(r#","Gateway":"10.0.0.1/24""#), Ok("10.0.0.1".parse().ok()));
        assert_eq!(gateway(r#","Gateway":"fd00::1""#), Err(()));
        assert_eq!(gateway(r#","Gateway":"10.0.0.1/x""#), Err(()));
    }

    #[test]
    fn the_promised_numbers_of_entries_fit() {
        let list = |count: usize, item: &str| vec![item; count].join(",");
        let document = format!(
            r#"{{"ExecOverride":[{}],"ImageConfig":{{"Env":[{}]}},"IPConfigs":[{}],"Mounts":[{}],"EtcHosts":[{}]}}"#,
            list(ARGV, r#""a""#),
            list(ENV, r#""a=b""#),
            list(ADDRESSES, r#"{"IP":"10.0.0.2"}"#),
            list(MOUNTS, "{}"),
            list(HOSTS, "{}"),
        );
        with(&document, |config| {
            assert_eq!(config.argv().count(), ARGV);
            assert_eq!(config.image_config.env.iter().count(), ENV);
            assert_eq!((config.ip_configs().count(), config.mounts().count(), config.etc_hosts().count()), (ADDRESSES, MOUNTS, HOSTS));
        });
        let mut over = format!(r#"{{"Mounts":[{}]}}"#, list(MOUNTS + 1, "{}")).into_bytes();
        let error = Config::read(&mut over).unwrap_err();
        assert_eq!((error.fault, error.path.as_str()), (Fault::TooMany(64), "Mounts[64]"));
    }

    #[test]
    fn a_member_given_twice_is_an_error() {
        let mut bytes = br#"{"MTU":1,"MTU":2}"#.to_vec();
        assert_eq!(Config::read(&mut bytes).unwrap_err().fault, Fault::Twice);
    }

    #[test]
    fn what_cannot_work_is_named() {
        for (document, wanted) in [
            (r#"{"ExecOverride":[""]}"#, "the command's name is empty"),
            (r#"{"RootDevice":"vda"}"#, "RootDevice: not an absolute path: vda"),
            (r#"{"IPConfigs":[{"IP":"10.0.0.2","Mask":33}]}"#, "IPConfigs[0].Mask: must be from 0 to 32"),
            (r#"{"IPConfigs":[{"IP":"10.0.0.256","Mask":24}]}"#, "IPConfigs[0].IP: not an address: 10.0.0.256"),
            (r#"{"IPConfigs":[{}]}"#, "IPConfigs[0].IP: not an address: "),
            (r#"{"Mounts":[{"DevicePath":"/dev/vdb","MountPath":"//./"}]}"#, "Mounts[0].MountPath: would hide the root"),
            (r#"{"Mounts":[{"DevicePath":"/dev/vdb","MountPath":"/proc"}]}"#, "Mounts[0].MountPath: would hide /proc"),
            (r#"{"Mounts":[{"DevicePath":"/dev/vdb","MountPath":"/a/../b"}]}"#, "Mounts[0].MountPath: has '..': /a/../b"),
            (r#"{"Mounts":[{"DevicePath":"","MountPath":"/a"}]}"#, "Mounts[0].DevicePath: not an absolute path: "),
            (
                r#"{"Mounts":[{"DevicePath":"/dev/vdb","MountPath":"/a/b"},{"DevicePath":"/dev/vdc","MountPath":"/a//b/"}]}"#,
                "Mounts[1].MountPath: used twice: /a//b/",
            ),
            (r#"{"EtcResolv":{"Nameservers":["8.8.8.8","x"]}}"#, "EtcResolv.Nameservers[1]: not an address: x"),
            (r#"{"EtcHosts":[{"Host":"a b","IP":"10.0.0.2"}]}"#, "EtcHosts[0].Host: not a host name: a b"),
            (r#"{"EtcHosts":[{"Host":"a","IP":""}]}"#, "EtcHosts[0].IP: not an address: "),
        ] {
            assert_eq!(complaint(document), wanted);
        }
        assert_eq!(complaint(&format!(r#"{{"Hostname":"{}"}}"#, "h".repeat(65))), "Hostname: longer than 64 bytes");
        assert_eq!(complaint(r#"{"EtcResolv":{"Nameservers":["fe80::1%eth0","::1"]}}"#), "");
    }
}
