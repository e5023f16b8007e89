//! Converts the bundle's `config.json` (OCI runtime-spec, config.md and config-linux.md) to a VM, and refuses
//! unsupported settings by name.

mod config;
mod mounts;
mod support;

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde_json::{Value, json};

pub use config::Process;
use config::{Config, Cpu, Memory};
pub use support::check_process;

/// Annotations of containerd's CRI plugin that mark a pod's sandbox.
const CRI_TYPE: &str = "io.kubernetes.cri.container-type";
/// Memory in MiB of a VM whose container has no limit.
const MEMORY: u64 = 256;
/// Memory in MiB of a VM in addition to its container's limit: for the guest's kernel and the init.
const OVERHEAD: u64 = 64;
/// Default period of a CPU quota in microseconds; `ctr run --cpu-quota` sets it to 0. (Linux
/// Documentation/scheduler/sched-bwc.rst)
const PERIOD: u64 = 100_000;
/// Maximum number of virtual processors.
const MAX_CPUS: u64 = 32;

/// The VM for a container.
#[derive(Debug)]
pub struct Plan {
    /// Whether it is a pod's sandbox, which runs nothing.
    pub is_sandbox: bool,
    /// The container's process.
    pub process: Process,
    /// The configuration document, without disks.
    pub document: Value,
    /// The root, from `root.path`.
    pub root: PathBuf,
    /// Whether the root is read-only.
    pub read_only: bool,
    /// Directories of the host that become disks.
    pub folders: Vec<Folder>,
    /// Files of the host that are copied into the root.
    pub files: Vec<(PathBuf, String)>,
    /// MiB
    pub memory: u32,
    /// Virtual processors.
    pub cpus: u32,
    /// Differences from other runtimes.
    pub warnings: Vec<String>,
}

/// A directory of the host, copied to a path in the VM.
#[derive(Debug, PartialEq)]
pub struct Folder {
    /// The path on the host.
    pub source: PathBuf,
    /// The path in the VM.
    pub target: String,
    /// Whether it is read-only.
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
    let kind = config.annotations.get(CRI_TYPE).map(String::as_str);
    let mut plan = Plan {
        is_sandbox: kind == Some("sandbox"),
        document: json!({}),
        root: bundle.join(&config.root.path),
        read_only: config.root.readonly,
        folders: vec![],
        files: vec![],
        memory: memory(&config.linux.resources.memory),
        cpus: cpus(&config.linux.resources.cpu),
        warnings: vec![],
        process: Process::default(),
    };
    if plan.is_sandbox {
        support::check_sandbox(&config)?;
        plan.process = config.process;
        return Ok(plan);
    }
    plan.warnings = support::check(&config, kind.is_some())?;
    let hostname = match config.hostname.as_str() {
        "" => mounts::hostname(&config.mounts)
            // By default the hostname is derived from the container's id, as in Docker.
            .unwrap_or_else(|| id.get(..id.len().min(12)).unwrap_or(id).into()),
        hostname => hostname.into(),
    };
    plan.document["Hostname"] = json!(hostname);
    let mut sysctls = config.linux.sysctl;
    if !config.domainname.is_empty() {
        sysctls.insert("kernel.domainname".into(), config.domainname);
    }
    if !sysctls.is_empty() {
        plan.document["Sysctls"] = json!(sysctls);
    }
    for mount in &config.mounts {
        plan.add(mount)
            .with_context(|| format!("mount on {}", mount.destination))?;
    }
    plan.process = config.process;
    Ok(plan)
}

/// Memory of a VM in MiB.
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
    let period = cpu.period.filter(|period| *period > 0).unwrap_or(PERIOD);
    let cpus = match quota {
        Some(quota @ 1..) => quota.div_ceil(period).min(MAX_CPUS),
        _ => 1,
    };
    u32::try_from(cpus).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::{mounts::MAX_BIND, *};

    fn plan_of(config: &Value) -> Result<Plan> {
        let mut config = config.clone();
        if config["process"].is_null() {
            config["process"] = json!({"args": ["sh"]});
        }
        let own = ["pid", "network", "ipc", "mount", "uts"].map(|kind| json!({"type": kind}));
        config["linux"]["namespaces"] = json!(own);
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
                "user": {"uid": 1000, "gid": 100, "additionalGids": [10]},
            },
            "root": {"path": "rootfs"},
            "domainname": "example",
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
            "Sysctls": {"kernel.domainname": "example", "net.core.somaxconn": "512"},
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
        for (cpu, cpus) in [
            (json!({"quota": 200_000}), 2),
            (json!({"quota": 200_000, "period": 0}), 2),
            (json!({"quota": -1, "period": 0}), 1),
        ] {
            let plan = plan_of(&json!({"linux": {"resources": {"cpu": cpu}}})).unwrap();
            assert_eq!(plan.cpus, cpus, "{cpu}");
        }
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
    fn what_a_vm_cannot_have_is_refused_by_name() {
        assert!(error(&json!({"process": {"args": []}})).contains("process.args"));
        let nfs = json!({"mounts": [{"destination": "/n", "type": "nfs", "source": "x"}]});
        assert!(error(&nfs).contains("mount on /n: a mount of type nfs"));
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
    fn a_pods_sandbox_is_detected_by_its_annotation() {
        let config = json!({"process": {"args": ["/pause"]}, "annotations": {CRI_TYPE: "sandbox"}});
        assert!(plan_of(&config).unwrap().is_sandbox);
        let config = json!({"annotations": {CRI_TYPE: "container"}, "hooks": {"prestart": []}});
        let plan = plan_of(&config).unwrap();
        assert!(!plan.is_sandbox);
        assert_eq!(plan.warnings, ["hooks are not run: prestart"]);
    }
}
