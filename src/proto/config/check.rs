//! Semantic checks of a decoded document.

use super::document::{Config, EtcResolv, Host, IpConfig, Mount, Overlay};
use super::limits::{MAX_HOSTNAME, MAX_INTERFACE_NAME, PATH_MAX};
use crate::address;
use crate::arena::Strings;
use crate::bytes::{is_name_byte, split, split_text_once};
use crate::message::{Message, ToLossy};
use crate::sysctl;
use core::ffi::CStr;
use core::fmt::Write;
use core::net::IpAddr;

impl Config<'_> {
    /// Checks what decoding does not. The error names the field.
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
        let fits = self.hostname.len() <= MAX_HOSTNAME;
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
            entry.check_after(earlier, &mut checks);
        }
        self.etc_resolv.check(&mut checks);
        for (at, entry) in self.etc_hosts.iter().enumerate() {
            checks.place = Some(("EtcHosts", at, "."));
            entry.check(&mut checks);
        }
        checks.result()
    }
}

/// An entry of a list: the list's name, the index, and a separator.
type ListEntry = (&'static str, usize, &'static str);

/// Finds the first fault.
#[derive(Default)]
struct Checks {
    /// The entry that is being checked.
    place: Option<ListEntry>,
    /// The first fault, `Mounts[1].MountPath: used twice: /data`; empty if there is none.
    fault: Message,
}

impl Checks {
    /// Records a fault unless `is_right`: the reason, followed by the value.
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

    /// Checks a path: absolute, and not too long.
    fn path(&mut self, field: &'static str, path: &CStr) {
        let bytes = path.to_bytes();
        let is_absolute = bytes.starts_with(b"/");
        self.require_of(field, is_absolute, ": not an absolute path: ", bytes);
        self.path_length(field, path);
    }

    fn path_length(&mut self, field: &'static str, path: &CStr) {
        let fits = path.count_bytes() < PATH_MAX;
        self.require_of(field, fits, ": longer than 4095 bytes", b"");
    }

    /// Checks each string of a list.
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

impl IpConfig<'_> {
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
        let is_name = name.len() <= MAX_INTERFACE_NAME
            && !matches!(name, b"." | b"..")
            && name.iter().all(is_plain);
        checks.require(is_name, "Device: not a network interface: ", name);
    }
}

/// Mount points that this program needs itself until the shutdown.
const RESERVED: [&[u8]; 4] = [b"proc", b"sys", b"dev", b"run"];

impl<'a> Mount<'a> {
    /// Checks a single mount.
    pub fn check(&self) -> Result<(), Message> {
        let mut checks = Checks::default();
        self.check_after(&[], &mut checks);
        checks.result()
    }

    /// The number of components of its mount point, at least 1 once it was checked.
    pub fn depth(&self) -> usize {
        names(self.mount_path).count()
    }

    /// Checks a mount against `earlier` ones.
    fn check_after(&self, earlier: &[Self], checks: &mut Checks) {
        let fs_type = self.fs_type.to_bytes();
        let is_type = fs_type.iter().all(|byte| is_name_byte(*byte));
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
                checks.require(!RESERVED.contains(&first), "MountPath: would hide ", path);
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

/// The components of a path, without empty ones and `.`.
fn names(path: &CStr) -> impl Iterator<Item = &[u8]> {
    let names = split(path.to_bytes(), b'/');
    names.filter(|name| !matches!(*name, b"" | b"."))
}

impl EtcResolv<'_> {
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
    match split_text_once(server, b'%') {
        None => address::parse(server).is_some(),
        Some((address, zone)) => {
            matches!(address::parse(address), Some(IpAddr::V6(_)))
                && !zone.is_empty()
                && zone.bytes().all(is_name_byte)
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

/// Whether a byte is neither a blank nor an ASCII control character.
fn is_graphic(byte: u8) -> bool {
    byte > b' ' && byte != 0x7f
}

#[cfg(test)]
mod tests {
    use super::super::document::tests::with;
    use super::super::limits::*;

    /// What is wrong with a document; empty if nothing is.
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
    fn documented_limits_are_accepted_and_one_more_entry_is_an_error() {
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
            ("ExecOverride", MAX_ARGS, &|n| {
                member("ExecOverride", list(n, r#""a""#))
            }),
            ("ImageConfig.Entrypoint", MAX_ARGS, &|n| {
                image("Entrypoint", list(n, r#""""#))
            }),
            ("ImageConfig.Cmd", MAX_ARGS, &|n| {
                image("Cmd", list(n, r#""""#))
            }),
            ("ImageConfig.Env", MAX_ENV_ENTRIES, &|n| {
                image("Env", list(n, r#""a=b""#))
            }),
            ("ExtraEnv", MAX_ENV_ENTRIES, &|n| member("ExtraEnv", map(n))),
            ("IPConfigs", MAX_ADDRESSES, &|n| {
                member("IPConfigs", list(n, r#"{"IP":"::1"}"#))
            }),
            ("Mounts", MAX_MOUNTS, &|n| member("Mounts", list(n, "{}"))),
            ("EtcHosts", MAX_HOSTS, &|n| {
                member("EtcHosts", list(n, "{}"))
            }),
            ("EtcResolv.Nameservers", MAX_NAMESERVERS, &|n| {
                resolv("Nameservers", list(n, r#""::1""#))
            }),
            ("EtcResolv.Search", MAX_RESOLV_WORDS, &|n| {
                resolv("Search", list(n, r#""a""#))
            }),
            ("EtcResolv.Options", MAX_RESOLV_WORDS, &|n| {
                resolv("Options", list(n, r#""a""#))
            }),
            ("Sysctls", MAX_SYSCTLS, &|n| member("Sysctls", map(n))),
        ];
        let all = members.map(|(_, most, member)| member(most)).join(",");
        with(&format!("{{{all}}}"), |config| {
            let argv = [
                config.exec_override,
                config.image_config.entrypoint,
                config.image_config.cmd,
            ];
            assert_eq!(argv.map(|list| list.iter().count()), [MAX_ARGS; 3]);
            assert_eq!(
                config.environment().map(|list| list.iter().count()),
                [MAX_ENV_ENTRIES; 2]
            );
            assert_eq!(config.ip_configs.len(), MAX_ADDRESSES);
            assert_eq!(config.mounts.len(), MAX_MOUNTS);
            assert_eq!(config.etc_hosts.len(), MAX_HOSTS);
            assert_eq!(
                config.etc_resolv.nameservers.iter().count(),
                MAX_NAMESERVERS
            );
            assert_eq!(config.etc_resolv.search.iter().count(), MAX_RESOLV_WORDS);
            assert_eq!(config.etc_resolv.options.iter().count(), MAX_RESOLV_WORDS);
            assert_eq!(config.sysctls().count(), MAX_SYSCTLS);
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
    fn invalid_values_are_named() {
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
