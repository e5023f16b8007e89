//! Digests for comparing a document with an earlier one that is no longer in memory.

use super::document::Config;
use core::hash::{Hash, Hasher};

/// The members of a document.
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

impl Config<'_> {
    /// A digest of each of the [`MEMBERS`].
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
}

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::Arena;

    #[test]
    fn a_digest_changes_exactly_when_its_member_does() {
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
        // The formatting of a document does not matter.
        assert_eq!(
            digests(r#"{"MTU":1400,"ImageConfig":{"Env":["A=<"],"User":"a"}}"#),
            digests(
                "{ \"ImageConfig\": {\"User\": \"a\", \"Env\":[\"A=\\u003c\"]}, \"MTU\": 1400}"
            )
        );
    }
}
