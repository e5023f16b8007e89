//! The bundle's `config.json` (OCI runtime-spec, config.md and config-linux.md) as a VM: what of it
//! makes sense in one, and what is refused by name.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

/// Annotations of containerd's CRI plugin that tell a pod's sandbox.
const CRI_TYPE: &str = "io.kubernetes.cri.container-type";
/// Memory of a VM whose container has no limit, in MiB.
const MEMORY: u64 = 256;
/// Memory of a VM beside its container's limit, in MiB: the guest's kernel and the init.
const OVERHEAD: u64 = 64;
/// Where the init mounts what it needs itself; a container's mount there is that.
const OWN_MOUNTS: [&str; 7] = [
    "/proc",
    "/sys",
    "/dev",
    "/dev/pts",
    "/dev/shm",
    "/dev/mqueue",
    "/run",
];
/// Kinds of file systems of the kernel's, which the init mounts.
const KERNEL_MOUNTS: [&str; 6] = ["proc", "sysfs", "devpts", "mqueue", "cgroup", "cgroup2"];
/// Most bytes of a file or a folder of the host that is copied into a VM.
pub const MAX_BIND: u64 = 256 << 20;
/// Flags of a mount that the configuration document knows. (README, `Mounts[].Options`)
const FLAGS: [&str; 7] = [
    "ro",
    "nosuid",
    "nodev",
    "noexec",
    "noatime",
    "nodiratime",
    "strictatime",
];
/// Most virtual processors.
const MAX_CPUS: u64 = 32;

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Config {
    process: Process,
    root: Root,
    hostname: String,
    mounts: Vec<Mount>,
    annotations: BTreeMap<String, String>,
    hooks: Value,
    linux: Linux,
}

/// A process to be run.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Process {
    /// Its streams are a terminal.
    pub terminal: bool,
    /// The terminal's size.
    pub console_size: Option<ConsoleSize>,
    /// Who it runs as.
    pub user: User,
    /// The program and its arguments.
    pub args: Vec<String>,
    /// Its environment.
    pub env: Vec<String>,
    /// Its working directory.
    pub cwd: String,
    rlimits: Vec<Rlimit>,
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

/// A user by numbers.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct User {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Supplementary groups.
    pub additional_gids: Vec<u32>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Rlimit {
    #[serde(rename = "type")]
    kind: String,
    soft: u64,
    hard: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Root {
    path: String,
    readonly: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Mount {
    destination: String,
    #[serde(rename = "type")]
    kind: String,
    source: String,
    options: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Linux {
    sysctl: BTreeMap<String, String>,
    devices: Vec<Device>,
    resources: Resources,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Device {
    path: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Resources {
    memory: Memory,
    cpu: Cpu,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Memory {
    limit: Option<i64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Cpu {
    quota: Option<i64>,
    period: Option<u64>,
}

/// A container as a VM.
#[derive(Debug)]
pub struct Plan {
    /// A pod's sandbox: nothing runs in it.
    pub is_sandbox: bool,
    /// What is run.
    pub process: Process,
    /// The configuration document, but for disks.
    pub document: Value,
    /// The root, from `root.path`.
    pub root: PathBuf,
    /// The root cannot be written to.
    pub read_only: bool,
    /// Folders of the host that become disks.
    pub folders: Vec<Folder>,
    /// Files of the host that are copied into the root.
    pub files: Vec<(PathBuf, String)>,
    /// MiB
    pub memory: u32,
    /// Virtual processors.
    pub cpus: u32,
    /// What is not as with another runtime.
    pub warnings: Vec<String>,
}

/// A folder of the host, copied to a path of the VM.
#[derive(Debug, PartialEq)]
pub struct Folder {
    /// The host's.
    pub source: PathBuf,
    /// The VM's.
    pub target: String,
    /// It cannot be written to.
    pub read_only: bool,
}

/// Reads the bundle's configuration.
pub fn read(bundle: &Path, id: &str) -> Result<Plan> {
    let path = bundle.join("config.json");
    let text = fs::read(&path).with_context(|| format!("unable to read {}", path.display()))?;
    plan(&text, bundle, id)
}

fn plan(text: &[u8], bundle: &Path, id: &str) -> Result<Plan> {
    let config: Config = serde_json::from_slice(text).context("config.json")?;
    let mut plan = Plan {
        is_sandbox: config.annotations.get(CRI_TYPE).map(String::as_str) == Some("sandbox"),
        document: json!({}),
        root: bundle.join(&config.root.path),
        read_only: config.root.readonly,
        folders: vec![],
        files: vec![],
        memory: memory(&config.linux.resources.memory),
        cpus: cpus(&config.linux.resources.cpu),
        warnings: vec![],
        process: config.process,
    };
    if plan.is_sandbox {
        return Ok(plan);
    }
    ensure!(
        !plan.process.args.is_empty(),
        "process.args: nothing to run"
    );
    let hostname = match config.hostname.as_str() {
        // A container without a name of its own has its id's, as in Docker.
        "" => id.get(..id.len().min(12)).unwrap_or(id),
        hostname => hostname,
    };
    plan.document["Hostname"] = json!(hostname);
    if !config.linux.sysctl.is_empty() {
        plan.document["Sysctls"] = json!(config.linux.sysctl);
    }
    for limit in &plan.process.rlimits {
        let name = limit.kind.strip_prefix("RLIMIT_").unwrap_or(&limit.kind);
        let number = |number: u64| match number {
            u64::MAX => "unlimited".to_string(),
            number => number.to_string(),
        };
        let value = format!("{}:{}", number(limit.soft), number(limit.hard));
        plan.document["Rlimits"][name] = json!(value);
    }
    if let Some(device) = config.linux.devices.first() {
        bail!(
            "linux.devices: {}: a VM has no devices of the host",
            device.path
        );
    }
    if let Some(hooks) = config.hooks.as_object() {
        let names: Vec<_> = hooks.keys().map(String::as_str).collect();
        let warning = format!("hooks are not run: {}", names.join(", "));
        plan.warnings.push(warning);
    }
    for mount in &config.mounts {
        plan.add(mount)
            .with_context(|| format!("mount on {}", mount.destination))?;
    }
    Ok(plan)
}

impl Plan {
    fn add(&mut self, mount: &Mount) -> Result<()> {
        let target = mount.destination.trim_end_matches('/');
        let own = OWN_MOUNTS.contains(&target);
        let is_bind = mount.kind == "bind"
            || mount
                .options
                .iter()
                .any(|option| option == "bind" || option == "rbind");
        if is_bind {
            return self.bind(mount, target);
        }
        match mount.kind.as_str() {
            kind if KERNEL_MOUNTS.contains(&kind) => Ok(()),
            "tmpfs" if own => Ok(()),
            "tmpfs" => {
                let wanted =
                    |option: &&String| FLAGS.contains(&option.as_str()) || option.contains('=');
                let options: Vec<_> = mount.options.iter().filter(wanted).cloned().collect();
                let mut entry = json!({"FSType": "tmpfs", "MountPath": target});
                if !options.is_empty() {
                    entry["Options"] = json!(options.join(","));
                }
                self.mount(entry);
                Ok(())
            }
            kind => bail!("a mount of type {kind} cannot be had in a VM"),
        }
    }

    /// Adds to the document's mounts.
    pub fn mount(&mut self, entry: Value) {
        match self.document["Mounts"].as_array_mut() {
            Some(mounts) => mounts.push(entry),
            None => self.document["Mounts"] = json!([entry]),
        }
    }

    fn bind(&mut self, mount: &Mount, target: &str) -> Result<()> {
        let source = Path::new(&mount.source);
        let found = fs::metadata(source).with_context(|| format!("unable to find {source:?}"))?;
        let read_only = mount.options.iter().any(|option| option == "ro");
        if found.is_dir() {
            // /dev/shm and the like of a pod, shared between containers; this one has its own.
            if OWN_MOUNTS.contains(&target) {
                self.warnings
                    .push(format!("{target} is the VM's own, not {}", mount.source));
                return Ok(());
            }
            let size = size_of(source)?;
            ensure!(size <= MAX_BIND, too_large(source, size));
            if !read_only {
                self.warnings.push(format!(
                    "{target} is a copy of {}: what is written there stays in the VM",
                    mount.source
                ));
            }
            self.folders.push(Folder {
                source: source.into(),
                target: target.into(),
                read_only,
            });
            return Ok(());
        }
        let kind = found.file_type();
        ensure!(
            kind.is_file(),
            "{source:?} is a {}: it cannot be copied into a VM",
            match kind {
                kind if kind.is_socket() => "socket",
                kind if kind.is_fifo() => "FIFO",
                _ => "device",
            }
        );
        ensure!(found.len() <= MAX_BIND, too_large(source, found.len()));
        let in_root = !["/dev/", "/run/"].iter().any(|dir| target.starts_with(dir));
        if self.read_only && in_root {
            return self.bind_read_only(source, target);
        }
        self.files.push((source.into(), target.into()));
        Ok(())
    }

    /// A file on a root that cannot be written to: what engines mount into every container can be
    /// said in the document.
    fn bind_read_only(&mut self, source: &Path, target: &str) -> Result<()> {
        let text = || fs::read_to_string(source);
        match target {
            "/etc/hostname" => Ok(()),
            "/etc/hosts" => {
                self.document["EtcHosts"] = hosts(&text()?);
                Ok(())
            }
            "/etc/resolv.conf" => {
                self.document["EtcResolv"] = resolv(&text()?);
                Ok(())
            }
            _ => bail!("a file cannot be copied onto a root that is read-only"),
        }
    }
}

fn too_large(source: &Path, size: u64) -> String {
    format!(
        "{source:?} has {} MiB, and is copied into the VM: at most {} MiB can be",
        size >> 20,
        MAX_BIND >> 20
    )
}

/// Bytes of the files in a folder.
fn size_of(dir: &Path) -> Result<u64> {
    let mut size = 0;
    let mut dirs = vec![dir.to_path_buf()];
    while let Some(dir) = dirs.pop() {
        let entries = fs::read_dir(&dir).with_context(|| format!("unable to read {dir:?}"))?;
        for entry in entries {
            let entry = entry?;
            let found = entry.path().symlink_metadata()?;
            match found.is_dir() {
                true => dirs.push(entry.path()),
                false => size += found.len(),
            }
            if size > MAX_BIND {
                return Ok(size);
            }
        }
    }
    Ok(size)
}

/// Lines of hosts(5) as the document has them.
fn hosts(text: &str) -> Value {
    let mut hosts = vec![];
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default();
        let mut words = line.split_whitespace();
        if let Some(address) = words.next() {
            hosts.extend(words.map(|host| json!({"Host": host, "IP": address})));
        }
    }
    json!(hosts)
}

/// resolv.conf(5) as the document has it.
fn resolv(text: &str) -> Value {
    let mut lists: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let list = match words.next() {
            Some("nameserver") => "Nameservers",
            Some("search") => "Search",
            Some("options") => "Options",
            _ => continue,
        };
        lists.entry(list).or_default().extend(words);
    }
    json!(lists)
}

/// MiB of a VM.
fn memory(memory: &Memory) -> u32 {
    let limit = memory.limit.and_then(|limit| u64::try_from(limit).ok());
    let mib = match limit {
        Some(limit @ 1..) => limit.div_ceil(1 << 20) + OVERHEAD,
        _ => MEMORY,
    };
    u32::try_from(mib.max(2 * OVERHEAD)).unwrap_or(u32::MAX)
}

/// Virtual processors of a VM.
fn cpus(cpu: &Cpu) -> u32 {
    let quota = cpu.quota.and_then(|quota| u64::try_from(quota).ok());
    let cpus = match (quota, cpu.period) {
        (Some(quota @ 1..), Some(period @ 1..)) => quota.div_ceil(period).min(MAX_CPUS),
        _ => 1,
    };
    u32::try_from(cpus).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan_of(config: &Value) -> Result<Plan> {
        let mut config = config.clone();
        if config["process"].is_null() {
            config["process"] = json!({"args": ["sh"]});
        }
        plan(
            config.to_string().as_bytes(),
            Path::new("/bundle"),
            "0123456789abcdef",
        )
    }

    fn error(config: &Value) -> String {
        format!("{:#}", plan_of(config).unwrap_err())
    }

    #[test]
    fn a_container_is_a_document() {
        let plan = plan_of(&json!({
            "process": {
                "args": ["sh"],
                "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1024, "hard": u64::MAX}],
                "user": {"uid": 1000, "gid": 100, "additionalGids": [10]},
            },
            "root": {"path": "rootfs"},
            "linux": {
                "sysctl": {"net.core.somaxconn": "512"},
                "resources": {
                    "memory": {"limit": 100 << 20},
                    "cpu": {"quota": 150_000, "period": 100_000},
                },
            },
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/run", "type": "tmpfs", "source": "tmpfs"},
                {"destination": "/cache", "type": "tmpfs", "source": "tmpfs",
                 "options": ["nosuid", "rprivate", "size=8m"]},
            ],
        }))
        .unwrap();
        let expected = json!({
            "Hostname": "0123456789ab",
            "Sysctls": {"net.core.somaxconn": "512"},
            "Rlimits": {"NOFILE": "1024:unlimited"},
            "Mounts": [{"FSType": "tmpfs", "MountPath": "/cache", "Options": "nosuid,size=8m"}],
        });
        assert_eq!(plan.document, expected);
        assert_eq!((plan.memory, plan.cpus), (164, 2));
        assert_eq!(plan.root, Path::new("/bundle/rootfs"));
        assert_eq!(plan.process.user.additional_gids, [10]);
        assert!(!plan.is_sandbox && !plan.read_only && plan.warnings.is_empty());
    }

    #[test]
    fn a_vm_without_limits_has_a_default_size() {
        let plan = plan_of(&json!({})).unwrap();
        assert_eq!((plan.memory, plan.cpus), (256, 1));
        let small = json!({"linux": {"resources": {"memory": {"limit": 4 << 20}}}});
        assert_eq!(plan_of(&small).unwrap().memory, 128);
    }

    #[test]
    fn files_and_folders_of_the_host_are_copied() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "x").unwrap();
        let mount = |source: &Path, target: &str, options: &[&str]| json!({"destination": target, "type": "bind", "source": source, "options": options});
        let plan = plan_of(&json!({"mounts": [
            mount(&file, "/etc/file", &["rbind", "ro"]),
            mount(dir.path(), "/data", &["rbind"]),
            mount(dir.path(), "/config", &["rbind", "ro"]),
        ]}))
        .unwrap();
        assert_eq!(plan.files, [(file.clone(), "/etc/file".to_string())]);
        let folder = |target: &str, read_only| Folder {
            source: dir.path().into(),
            target: target.into(),
            read_only,
        };
        assert_eq!(
            plan.folders,
            [folder("/data", false), folder("/config", true)]
        );
        assert_eq!(plan.warnings.len(), 1);
    }

    #[test]
    fn a_read_only_root_gets_its_names_by_the_document() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            fs::write(dir.path().join(name), text).unwrap();
            let source = dir.path().join(name);
            json!({"destination": format!("/etc/{name}"), "type": "bind", "source": source})
        };
        let resolv = "search a b\nnameserver 1.2.3.4\noptions ndots:5\n";
        let mut config = json!({
            "root": {"path": "rootfs", "readonly": true},
            "mounts": [
                file("hosts", "# pod\n10.0.0.1\tweb web.local # x\n"),
                file("resolv.conf", resolv),
                file("hostname", "web\n"),
            ],
        });
        let document = plan_of(&config).unwrap().document;
        let expected = json!([
            {"Host": "web", "IP": "10.0.0.1"},
            {"Host": "web.local", "IP": "10.0.0.1"},
        ]);
        assert_eq!(document["EtcHosts"], expected);
        let expected = json!({
            "Nameservers": ["1.2.3.4"], "Search": ["a", "b"], "Options": ["ndots:5"],
        });
        assert_eq!(document["EtcResolv"], expected);
        config["mounts"] = json!([file("other", "")]);
        assert!(error(&config).contains("/etc/other: a file cannot be copied"));
    }

    #[test]
    fn what_a_vm_cannot_have_is_refused_by_name() {
        assert!(error(&json!({"process": {"args": []}})).contains("process.args"));
        let nfs = json!({"mounts": [{"destination": "/n", "type": "nfs", "source": "x"}]});
        assert!(error(&nfs).contains("mount on /n: a mount of type nfs"));
        let device = json!({"linux": {"devices": [{"path": "/dev/fuse"}]}});
        assert!(error(&device).contains("linux.devices: /dev/fuse"));
        let null = json!({"mounts": [
            {"destination": "/x", "type": "bind", "source": "/dev/null", "options": ["bind"]},
        ]});
        assert!(error(&null).contains("is a device"));
        let dir = tempfile::tempdir().unwrap();
        let large = dir.path().join("large");
        let file = fs::File::create(&large).unwrap();
        file.set_len(MAX_BIND + 1).unwrap();
        for source in [dir.path(), &large] {
            let mounts = json!([{"destination": "/x", "type": "bind", "source": source}]);
            let error = error(&json!({"mounts": mounts}));
            assert!(error.contains("at most 256 MiB"), "{error}");
        }
    }

    #[test]
    fn a_pods_sandbox_is_told_by_its_annotation() {
        let config = json!({"process": {"args": ["/pause"]}, "annotations": {CRI_TYPE: "sandbox"}});
        assert!(plan_of(&config).unwrap().is_sandbox);
        let config = json!({"annotations": {CRI_TYPE: "container"}, "hooks": {"prestart": []}});
        let plan = plan_of(&config).unwrap();
        assert!(!plan.is_sandbox);
        assert_eq!(plan.warnings, ["hooks are not run: prestart"]);
    }
}
