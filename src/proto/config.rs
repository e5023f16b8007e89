//! The configuration document: the contract between the host driver and this program.

use crate::address;
use crate::bytes::{Split, before, decimal, split};
use crate::json::{self, Document, Fields, Objects, Record, Shape, Spans, Strings, Text, field};
use crate::message;
use crate::message::Message;
use core::net::IpAddr;

/// Largest document, in bytes: 20 times Firecracker's default MMDS store.
pub const DOCUMENT: usize = 1 << 20;
/// Most arguments of a list: of `Entrypoint`, and of `Cmd`.
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
pub const ROOT_DEVICE: Text = Text::of(c"/dev/vda");
/// The MTU of eth0 unless the configuration names another.
pub const MTU: u32 = 1500;

/// The document's members, with their slots.
#[rustfmt::skip]
static FIELDS: Fields = &[
    field("ImageConfig", Shape::record(5)),
        field("Entrypoint", Shape::texts(0, ARGV)),
        field("Cmd", Shape::texts(1, ARGV)),
        field("Env", Shape::texts(2, ENV)),
        field("WorkingDir", Shape::text(3)),
        field("User", Shape::text(4)),
    field("ExecOverride", Shape::texts(5, ARGV)),
    field("CmdOverride", Shape::text(6)),
    field("UserOverride", Shape::text(7)),
    field("ExtraEnv", Shape::pairs(8, ENV)),
    field("MTU", Shape::number(9, 65_535)),
    field("IPConfigs", Shape::records(10, ADDRESSES, 4)),
        field("[]", Shape::record(3)),
            field("Gateway", Shape::text(b'G')),
            field("IP", Shape::text(b'I')),
            field("Mask", Shape::number(b'M', 128)),
    field("Hostname", Shape::text(11)),
    field("Mounts", Shape::records(12, MOUNTS, 3)),
        field("[]", Shape::record(2)),
            field("DevicePath", Shape::text(b'D')),
            field("MountPath", Shape::text(b'M')),
    field("RootDevice", Shape::text(13)),
    field("EtcResolv", Shape::record(1)),
        field("Nameservers", Shape::texts(14, NAMESERVERS)),
    field("EtcHosts", Shape::records(15, HOSTS, 4)),
        field("[]", Shape::record(3)),
            field("Host", Shape::text(b'H')),
            field("IP", Shape::text(b'I')),
            field("Desc", Shape::text(b'D')),
];

/// The whole document; what is absent is empty or 0.
#[derive(Clone, Copy, Debug)]
pub struct Config<'a>(Document<'a>);

/// One address of eth0, as written.
#[derive(Clone, Copy, Debug)]
pub struct IpConfig<'a>(Record<'a>);

/// One extra volume.
#[derive(Clone, Copy, Debug)]
pub struct Mount<'a> {
    /// The block device.
    pub device_path: Text<'a>,
    /// Where it is mounted.
    pub mount_path: Text<'a>,
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
    pub fn address(&self) -> Result<Address, Message> {
        let (gateway, text) = (self.0.text(b'G'), self.0.text(b'I'));
        let Some(ip) = text.ip() else {
            return Err(message!("IP: not an address: {text}"));
        };
        let (prefix, bits) = (self.0.number(b'M'), if ip.is_ipv4() { 32 } else { 128 });
        if prefix > bits {
            return Err(message!("Mask: must be from 0 to {bits}"));
        }
        let address = Address {
            ip,
            prefix: prefix as u8,
            gateway: without_prefix(gateway),
        };
        let right = |gateway: IpAddr| gateway.is_ipv4() == ip.is_ipv4();
        if !gateway.is_empty() && !address.gateway.is_some_and(right) {
            return Err(message!(
                "Gateway: not an address of the IP's family: {gateway}"
            ));
        }
        Ok(address)
    }
}

/// An address without the prefix length behind it, which says nothing a route needs.
fn without_prefix(gateway: Text) -> Option<IpAddr> {
    let text = gateway.bytes();
    let address = before(text, b'/');
    let wrong = |prefix| decimal(prefix).is_none_or(|bits| bits > 128);
    if text.get(address.len() + 1..).is_some_and(wrong) {
        return None;
    }
    address::parse(address)
}

impl<'a> Config<'a> {
    /// Checks a document and decodes it where it lies. The error names the field.
    pub fn decode(document: &mut [u8], spans: &mut Spans) -> Result<(), Message> {
        json::read(document, FIELDS, spans)
    }

    /// A decoded document.
    pub fn new(document: &'a [u8], spans: &'a Spans) -> Self {
        Self(Document::new(document, spans))
    }

    /// Whether there is something to run.
    pub fn has_command(&self) -> bool {
        self.argv().next().is_some()
    }

    /// What is run: `ExecOverride`, else `Entrypoint` and (`CmdOverride` as one argument, else `Cmd`).
    pub fn argv(&self) -> impl Iterator<Item = Text<'a>> + Clone {
        let [first, last] = self.arguments();
        first.iter().chain(last.iter())
    }

    /// The same, as one list behind another.
    pub fn arguments(&self) -> [Strings<'a>; 2] {
        let (exec_override, cmd_override) = (self.0.texts(5), self.0.text(6));
        if !exec_override.is_empty() {
            [exec_override, Strings::default()]
        } else if !cmd_override.is_empty() {
            [self.0.texts(0), Strings::one(cmd_override)]
        } else {
            [self.0.texts(0), self.0.texts(1)]
        }
    }

    /// The environment: `ImageConfig.Env`, then `ExtraEnv` on top.
    pub fn environment(&self) -> [Strings<'a>; 2] {
        [self.0.texts(2), self.0.texts(8)]
    }

    /// Working directory; empty is `/`.
    pub fn working_dir(&self) -> Text<'a> {
        self.0.text(3)
    }

    /// Who runs it: `UserOverride`, else `ImageConfig.User`; empty is root.
    pub fn user(&self) -> Text<'a> {
        let user_override = self.0.text(7);
        if user_override.is_empty() {
            self.0.text(4)
        } else {
            user_override
        }
    }

    /// MTU of eth0.
    pub fn mtu(&self) -> u32 {
        match self.0.number(9) {
            0 => MTU,
            mtu => mtu,
        }
    }

    /// The addresses of eth0.
    pub fn ip_configs(&self) -> impl Iterator<Item = IpConfig<'a>> {
        self.0.records(10).iter().map(IpConfig)
    }

    /// Calls `each` with the addresses of eth0, until one is wrong or `each` fails.
    pub fn addresses(
        &self,
        each: &mut dyn FnMut(&Address) -> Result<(), Message>,
    ) -> Result<(), Message> {
        for (at, entry) in self.ip_configs().enumerate() {
            match &entry.address() {
                Ok(address) => each(address)?,
                Err(why) => return Err(message!("IPConfigs[{at}].{why}")),
            }
        }
        Ok(())
    }

    /// Host name of the guest; empty is none.
    pub fn hostname(&self) -> Text<'a> {
        self.0.text(11)
    }

    /// The extra volumes.
    pub fn mounts(&self) -> impl Iterator<Item = Mount<'a>> {
        self.0.records(12).iter().map(|record| Mount {
            device_path: record.text(b'D'),
            mount_path: record.text(b'M'),
        })
    }

    /// Block device of the root.
    pub fn root_device(&self) -> Text<'a> {
        let device = self.0.text(13);
        if device.is_empty() {
            ROOT_DEVICE
        } else {
            device
        }
    }

    /// Addresses for /etc/resolv.conf.
    pub fn nameservers(&self) -> Strings<'a> {
        self.0.texts(14)
    }

    /// The entries for /etc/hosts.
    pub fn etc_hosts(&self) -> impl Iterator<Item = Host<'a>> {
        self.0.records(15).iter().map(|record| Host {
            host: record.text(b'H'),
            ip: record.text(b'I'),
            desc: record.text(b'D'),
        })
    }

    /// Checks what the document's form does not show. The error names the field.
    pub fn check(&self) -> Result<(), Message> {
        if self.argv().next().is_some_and(Text::is_empty) {
            return Err(message!("the command's name is empty"));
        }
        if !self.0.text(13).is_empty() {
            check_path("RootDevice", self.0.text(13))?;
        }
        check_length("ImageConfig.WorkingDir", self.working_dir(), PATH - 1)?;
        check_length("Hostname", self.hostname(), HOSTNAME)?;
        self.addresses(&mut |_| Ok(()))?;
        self.check_each("Mounts", 12, check_mount)?;
        for (at, server) in self.nameservers().iter().enumerate() {
            if !is_name_server(server) {
                let why = message!("not an address: {server}");
                return Err(message!("EtcResolv.Nameservers[{at}]: {why}"));
            }
        }
        self.check_each("EtcHosts", 15, |_, entry| check_host(entry))
    }

    /// Checks the objects of a list; the check is given the list, too.
    fn check_each(
        &self,
        name: &str,
        slot: u8,
        check: fn(Objects<'a>, Record<'a>) -> Result<(), Message>,
    ) -> Result<(), Message> {
        let all = self.0.records(slot);
        for (at, entry) in all.iter().enumerate() {
            check(all, entry).map_err(|why| message!("{name}[{at}].{why}"))?;
        }
        Ok(())
    }
}

fn check_length(field: &str, text: Text, most: usize) -> Result<(), Message> {
    if text.bytes().len() > most {
        return Err(message!("{field}: longer than {most} bytes"));
    }
    Ok(())
}

/// A path for the kernel: absolute, and not too long.
fn check_path(field: &str, path: Text) -> Result<(), Message> {
    if !path.bytes().starts_with(b"/") {
        return Err(message!("{field}: not an absolute path: {path}"));
    }
    check_length(field, path, PATH - 1)
}

/// The names of a path, without empty ones and `.`.
#[derive(Clone)]
struct Names<'a>(Split<'a>);

impl<'a> Names<'a> {
    fn of(path: Text<'a>) -> Self {
        Self(split(path.bytes(), b'/'))
    }
}

impl<'a> Iterator for Names<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        self.0.find(|name| !matches!(*name, b"" | b"."))
    }
}

/// An address, perhaps with an IPv6 zone (`fe80::1%eth0`, resolv.conf(5)).
fn is_name_server(server: Text) -> bool {
    let text = server.bytes();
    let address = before(text, b'%');
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    match (address::parse(address), text.get(address.len() + 1..)) {
        (Some(IpAddr::V6(_)), Some(zone)) => !zone.is_empty() && zone.iter().all(plain),
        (ip, zone) => ip.is_some() && zone.is_none(),
    }
}

/// What this program mounts itself, and needs to the end.
const OURS: [&[u8]; 4] = [b"proc", b"sys", b"dev", b"run"];

fn check_mount(all: Objects, entry: Record) -> Result<(), Message> {
    let path = entry.text(b'M');
    check_path("DevicePath", entry.text(b'D'))?;
    check_path("MountPath", path)?;
    let wrong = |why: &str| Err(message!("MountPath: {why}{path}"));
    let mut names = Names::of(path);
    let Some(first) = names.next() else {
        return Err(message!("MountPath: would hide the root"));
    };
    if OURS.contains(&first) && names.next().is_none() {
        return wrong("would hide ");
    }
    if Names::of(path).any(|name| name == b"..") {
        return wrong("has '..': ");
    }
    for earlier in all.iter() {
        if earlier == entry {
            break;
        }
        if Names::of(earlier.text(b'M')).eq(Names::of(path)) {
            return wrong("used twice: ");
        }
    }
    Ok(())
}

fn check_host(entry: Record) -> Result<(), Message> {
    let (host, ip) = (entry.text(b'H'), entry.text(b'I'));
    if ip.ip().is_none() {
        return Err(message!("IP: not an address: {ip}"));
    }
    let plain = |byte: &u8| *byte > b' ' && *byte != 0x7f && *byte != b'#';
    if host.is_empty() || !host.bytes().iter().all(plain) {
        return Err(message!("Host: not a host name: {host}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let mut spans = Spans::default();
        Config::decode(&mut bytes, &mut spans).unwrap();
        look(Config::new(&bytes, &spans))
    }

    fn string(text: Text) -> String {
        String::from_utf8(text.bytes().to_vec()).unwrap()
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
            assert_eq!(string(config.working_dir()), "/app");
            assert_eq!(string(config.user()), "nobody");
            assert_eq!(config.mtu(), 1500);
            assert_eq!(
                config
                    .environment()
                    .map(|entries| entries.iter().map(string).collect::<Vec<_>>())
                    .concat(),
                [
                    "PATH=/usr/local/bin:/usr/bin:/bin",
                    "DATABASE_URL=postgres://...",
                    "LOG_LEVEL=info"
                ]
            );
            assert_eq!(
                config.ip_configs().next().unwrap().address().unwrap(),
                Address {
                    ip: "10.0.0.2".parse().unwrap(),
                    prefix: 24,
                    gateway: "169.254.0.1".parse().ok()
                }
            );
            assert_eq!(
                string(config.mounts().next().unwrap().device_path),
                "/dev/vdb"
            );
            assert_eq!(string(config.mounts().next().unwrap().mount_path), "/data");
            assert_eq!(
                string(config.nameservers().iter().next().unwrap()),
                "8.8.8.8"
            );
            assert_eq!(string(config.etc_hosts().next().unwrap().desc), "app alias");
            assert_eq!(string(config.hostname()), "my-app-abcdef");
        });
        assert_eq!(argv(EXAMPLE), ["/bin/myapp", "--port", "8080"]);
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
        assert_eq!(with("{}", |config| config.mtu()), 1500);
        assert_eq!(with(r#"{"MTU":0}"#, |config| config.mtu()), 1500);
        assert_eq!(with(r#"{"MTU":9000}"#, |config| config.mtu()), 9000);
    }

    #[test]
    fn a_gateway_may_be_absent_empty_or_carry_a_prefix_length() {
        let gateway = |text: &str| {
            with(
                &format!(r#"{{"IPConfigs":[{{"IP":"10.0.0.2","Mask":24{text}}}]}}"#),
                |config| {
                    config
                        .ip_configs()
                        .next()
                        .unwrap()
                        .address()
                        .map(|address| address.gateway)
                        .map_err(|_| ())
                },
            )
        };
        assert_eq!(gateway(""), Ok(None));
        assert_eq!(gateway(r#","Gateway":"""#), Ok(None));
        assert_eq!(
            gateway(r#","Gateway":"10.0.0.1/24""#),
            Ok("10.0.0.1".parse().ok())
        );
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
            assert_eq!(config.environment()[0].iter().count(), ENV);
            assert_eq!(
                (
                    config.ip_configs().count(),
                    config.mounts().count(),
                    config.etc_hosts().count()
                ),
                (ADDRESSES, MOUNTS, HOSTS)
            );
        });
        let mut over = format!(r#"{{"Mounts":[{}]}}"#, list(MOUNTS + 1, "{}")).into_bytes();
        let why = Config::decode(&mut over, &mut Spans::default()).unwrap_err();
        assert_eq!(why.as_bytes(), b"Mounts[64]: more than 64 entries");
    }

    #[test]
    fn what_cannot_work_is_named() {
        for (document, wanted) in [
            (r#"{"ExecOverride":[""]}"#, "the command's name is empty"),
            (
                r#"{"RootDevice":"vda"}"#,
                "RootDevice: not an absolute path: vda",
            ),
            (
                r#"{"IPConfigs":[{"IP":"10.0.0.2","Mask":33}]}"#,
                "IPConfigs[0].Mask: must be from 0 to 32",
            ),
            (
                r#"{"IPConfigs":[{"IP":"10.0.0.256","Mask":24}]}"#,
                "IPConfigs[0].IP: not an address: 10.0.0.256",
            ),
            (r#"{"IPConfigs":[{}]}"#, "IPConfigs[0].IP: not an address: "),
            (
                r#"{"Mounts":[{"DevicePath":"/dev/vdb","MountPath":"//./"}]}"#,
                "Mounts[0].MountPath: would hide the root",
            ),
            (
                r#"{"Mounts":[{"DevicePath":"/dev/vdb","MountPath":"/proc"}]}"#,
                "Mounts[0].MountPath: would hide /proc",
            ),
            (
                r#"{"Mounts":[{"DevicePath":"/dev/vdb","MountPath":"/a/../b"}]}"#,
                "Mounts[0].MountPath: has '..': /a/../b",
            ),
            (
                r#"{"Mounts":[{"DevicePath":"","MountPath":"/a"}]}"#,
                "Mounts[0].DevicePath: not an absolute path: ",
            ),
            (
                r#"{"Mounts":[{"DevicePath":"/dev/vdb","MountPath":"/a/b"},{"DevicePath":"/dev/vdc","MountPath":"/a//b/"}]}"#,
                "Mounts[1].MountPath: used twice: /a//b/",
            ),
            (
                r#"{"EtcResolv":{"Nameservers":["8.8.8.8","x"]}}"#,
                "EtcResolv.Nameservers[1]: not an address: x",
            ),
            (
                r#"{"EtcHosts":[{"Host":"a b","IP":"10.0.0.2"}]}"#,
                "EtcHosts[0].Host: not a host name: a b",
            ),
            (
                r#"{"EtcHosts":[{"Host":"a","IP":""}]}"#,
                "EtcHosts[0].IP: not an address: ",
            ),
        ] {
            assert_eq!(complaint(document), wanted);
        }
        assert_eq!(
            complaint(&format!(r#"{{"Hostname":"{}"}}"#, "h".repeat(65))),
            "Hostname: longer than 64 bytes"
        );
        assert_eq!(
            complaint(r#"{"EtcResolv":{"Nameservers":["fe80::1%eth0","::1"]}}"#),
            ""
        );
    }
}
