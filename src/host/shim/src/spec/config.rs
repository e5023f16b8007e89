//! The supported parts of `config.json`.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;
use serde_json::{Map, Value};

/// A container.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Config {
    pub process: Process,
    pub root: Root,
    pub hostname: String,
    pub domainname: String,
    pub mounts: Vec<Mount>,
    pub annotations: BTreeMap<String, String>,
    pub hooks: Map<String, Value>,
    pub linux: Linux,
}

/// A process to run.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Process {
    /// Whether its streams are a terminal.
    pub terminal: bool,
    /// The terminal's size.
    pub console_size: Option<ConsoleSize>,
    /// The user.
    pub user: User,
    /// The program and its arguments.
    pub args: Vec<String>,
    /// Its environment.
    pub env: Vec<String>,
    /// Its working directory.
    pub cwd: String,
    /// Its resource limits.
    pub rlimits: Vec<Rlimit>,
    /// Its capabilities; none if absent.
    pub capabilities: Capabilities,
    /// Whether executing programs cannot add privileges.
    pub no_new_privileges: bool,
    /// The OOM score adjustment of the VM on the host.
    pub oom_score_adj: Option<i32>,
    pub apparmor_profile: String,
    pub selinux_label: String,
    pub io_priority: Option<Value>,
    pub scheduler: Option<Value>,
}

/// Columns and rows.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub struct ConsoleSize {
    /// Rows.
    pub height: u16,
    /// Columns.
    pub width: u16,
}

/// A user by ids.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct User {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Supplementary groups.
    pub additional_gids: Vec<u32>,
    /// The file mode creation mask.
    pub umask: Option<u32>,
}

/// A resource limit (getrlimit(2)); u64::MAX means unlimited.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Rlimit {
    #[serde(rename = "type")]
    pub kind: String,
    pub soft: u64,
    pub hard: u64,
}

/// Sets of capabilities (capabilities(7)).
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Capabilities {
    pub bounding: BTreeSet<String>,
    pub effective: BTreeSet<String>,
    pub permitted: BTreeSet<String>,
    pub inheritable: BTreeSet<String>,
    pub ambient: BTreeSet<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Root {
    pub path: String,
    pub readonly: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Mount {
    pub destination: String,
    #[serde(rename = "type")]
    pub kind: String,
    pub source: String,
    pub options: Vec<String>,
    pub uid_mappings: Vec<Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Linux {
    pub sysctl: BTreeMap<String, String>,
    pub devices: Vec<Device>,
    pub namespaces: Vec<Namespace>,
    pub resources: Resources,
    pub rootfs_propagation: String,
    pub uid_mappings: Vec<Value>,
    pub seccomp: Option<Value>,
    pub mount_label: String,
    pub intel_rdt: Option<Value>,
    pub personality: Option<Value>,
    pub time_offsets: Option<Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Device {
    pub path: String,
}

/// A new namespace, unless it has a path.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Namespace {
    #[serde(rename = "type")]
    pub kind: String,
    pub path: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Resources {
    pub memory: Memory,
    pub cpu: Cpu,
    /// Other resources by name.
    #[serde(flatten)]
    pub others: Map<String, Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Memory {
    pub limit: Option<i64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Cpu {
    pub quota: Option<i64>,
    pub period: Option<u64>,
    /// The host's processors to use.
    pub cpus: String,
}
