//! Settings of a container that a VM does not support. A setting that would have no effect is refused by
//! name; one that only isolates containers on a shared kernel, or divides the host's resources, is ignored
//! with a warning.

use anyhow::{Result, bail, ensure};
use serde_json::Value;

use super::config::{Config, Linux, Namespace, Process};
use crate::launch::{CAPABILITIES, RESOURCES};

/// Namespaces that a VM cannot share with the host. (It has its own hostname and mounts.)
const HOSTS: [&str; 3] = ["pid", "network", "ipc"];
/// Namespaces that a pod's containers may share: each VM has its own, as documented in the README.
const OF_POD: [&str; 4] = ["network", "ipc", "uts", "pid"];
/// Propagation without an effect in a VM.
const PRIVATE: [&str; 5] = ["", "private", "rprivate", "unbindable", "runbindable"];

/// Checks a container. Returns warnings if it is supported. `of_pod`: it was requested by containerd's CRI
/// plugin.
pub fn check(config: &Config, of_pod: bool) -> Result<Vec<String>> {
    let linux = &config.linux;
    let shares_processes = check_namespaces(linux, of_pod)?;
    if let [first, more @ ..] = &linux.devices[..] {
        let more = match more.len() {
            0 => String::new(),
            count => format!(" and {count} more"),
        };
        bail!(
            "linux.devices: {}{more}: a VM has no devices of the host",
            first.path
        );
    }
    ensure!(
        linux.uid_mappings.is_empty(),
        "linux.uidMappings: a VM's users are not those of the host, and cannot be mapped to them"
    );
    let propagation = linux.rootfs_propagation.as_str();
    ensure!(
        PRIVATE.contains(&propagation),
        "linux.rootfsPropagation: {propagation}: mounts do not pass between the host and a VM"
    );
    for (name, value) in [
        ("intelRdt", &linux.intel_rdt),
        ("personality", &linux.personality),
        ("timeOffsets", &linux.time_offsets),
    ] {
        ensure!(value.is_none(), "linux.{name}: a VM cannot have it");
    }

    let mut warnings = check_process(&config.process)?;
    if shares_processes {
        warnings.push("linux.namespaces: the pod's processes are not seen in the VM".into());
    }
    if linux.seccomp.is_some() {
        warnings.push("linux.seccomp: there is no filter in the VM".into());
    }
    if !linux.mount_label.is_empty() {
        warnings.push("linux.mountLabel: there is no SELinux in the VM".into());
    }
    let resources = &linux.resources;
    let others = resources.others.iter().filter(|(name, value)| {
        // A VM has none of the host's devices.
        *name != "devices" && limits(value)
    });
    let mut names: Vec<_> = others.map(|(name, _)| name.as_str()).collect();
    if !resources.cpu.cpus.is_empty() {
        names.push("cpu.cpus");
    }
    for name in names {
        warnings.push(format!(
            "linux.resources.{name}: the VM is not limited by it"
        ));
    }
    if !config.hooks.is_empty() {
        let names: Vec<_> = config.hooks.keys().map(String::as_str).collect();
        warnings.push(format!("hooks are not run: {}", names.join(", ")));
    }
    Ok(warnings)
}

/// The same for a pod's sandbox, which runs nothing.
pub fn check_sandbox(config: &Config) -> Result<()> {
    check_namespaces(&config.linux, true).map(drop)
}

/// Whether a limit is set: engines write zeros for absent limits.
fn limits(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(value) => *value,
        Value::Number(number) => number.as_i64().is_none_or(|number| number > 0),
        // A page size or a device's name; the limit is another member.
        Value::String(_) => false,
        Value::Array(values) => values.iter().any(limits),
        Value::Object(values) => values.values().any(limits),
    }
}

/// Checks namespaces. Returns whether a pod's processes should see each other.
fn check_namespaces(linux: &Linux, of_pod: bool) -> Result<bool> {
    for kind in HOSTS {
        ensure!(
            linux
                .namespaces
                .iter()
                .any(|namespace| namespace.kind == kind),
            "linux.namespaces: no {kind} namespace: a VM cannot be in the host's"
        );
    }
    let joined = |namespace: &&Namespace| !namespace.path.is_empty();
    for namespace in linux.namespaces.iter().filter(joined) {
        let kind = namespace.kind.as_str();
        ensure!(
            of_pod && OF_POD.contains(&kind),
            "linux.namespaces: {kind} of {}: a VM cannot join a namespace of the host",
            namespace.path
        );
    }
    let mut joined = linux.namespaces.iter().filter(joined);
    Ok(joined.any(|namespace| namespace.kind == "pid"))
}

/// The same for a process, including exec processes.
pub fn check_process(process: &Process) -> Result<Vec<String>> {
    ensure!(!process.args.is_empty(), "process.args: nothing to run");
    for limit in &process.rlimits {
        let kind = limit.kind.as_str();
        ensure!(
            RESOURCES.contains(&kind),
            "process.rlimits: {kind} is not known"
        );
    }
    for (name, value) in [
        ("ioPriority", &process.io_priority),
        ("scheduler", &process.scheduler),
    ] {
        ensure!(value.is_none(), "process.{name}: it cannot be set in a VM");
    }
    let mut warnings = vec![];
    let sets = &process.capabilities;
    for name in &sets.bounding {
        if !CAPABILITIES.contains(&name.as_str()) {
            warnings.push(format!("process.capabilities: {name} is not known"));
        }
    }
    for (name, value) in [
        ("apparmorProfile", &process.apparmor_profile),
        ("selinuxLabel", &process.selinux_label),
    ] {
        if !value.is_empty() && value != "unconfined" {
            warnings.push(format!("process.{name}: {value} is not there in the VM"));
        }
    }
    Ok(warnings)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config(part: &Value) -> Config {
        let mut config = json!({
            "process": {"args": ["sh"]},
            "linux": {"namespaces": [
                {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "mount"},
            ]},
        });
        for (name, values) in part.as_object().unwrap() {
            for (key, value) in values.as_object().unwrap() {
                config[name][key] = value.clone();
            }
        }
        serde_json::from_value(config).unwrap()
    }

    fn refusal(part: &Value) -> String {
        check(&config(part), false).unwrap_err().to_string()
    }

    #[test]
    fn unsupported_settings_are_refused_by_name() {
        for (part, expected) in [
            (
                json!({"linux": {"devices": [{"path": "/dev/fuse"}, {"path": "/dev/kvm"}]}}),
                "linux.devices: /dev/fuse and 1 more: a VM has no devices",
            ),
            (
                json!({"linux": {"namespaces": [{"type": "pid"}, {"type": "ipc"}]}}),
                "linux.namespaces: no network namespace",
            ),
            (
                json!({"linux": {"namespaces": [
                    {"type": "pid"}, {"type": "ipc"}, {"type": "network", "path": "/run/n"},
                ]}}),
                "linux.namespaces: network of /run/n",
            ),
            (
                json!({"linux": {"uidMappings": [{"hostID": 1000}]}}),
                "linux.uidMappings",
            ),
            (
                json!({"linux": {"rootfsPropagation": "rshared"}}),
                "linux.rootfsPropagation: rshared",
            ),
            (
                json!({"linux": {"intelRdt": {"closID": "x"}}}),
                "linux.intelRdt",
            ),
            (
                json!({"process": {"args": []}}),
                "process.args: nothing to run",
            ),
            (
                json!({"process": {"rlimits": [{"type": "RLIMIT_X"}]}}),
                "process.rlimits: RLIMIT_X is not known",
            ),
            (json!({"process": {"scheduler": {}}}), "process.scheduler"),
        ] {
            let found = refusal(&part);
            assert!(found.starts_with(expected), "{found}");
        }
    }

    #[test]
    fn a_pods_container_has_the_pods_namespaces_by_path() {
        let of_pod = |kind: &str| {
            let mut config = config(&json!({}));
            config.linux.namespaces.push(Namespace {
                kind: kind.into(),
                path: "/proc/7/ns/x".into(),
            });
            check(&config, true)
        };
        for kind in ["network", "ipc", "uts"] {
            assert!(of_pod(kind).unwrap().is_empty(), "{kind}");
        }
        assert!(of_pod("pid").unwrap()[0].contains("processes are not seen"));
        let refused = of_pod("user").unwrap_err().to_string();
        assert!(refused.contains("user of /proc/7/ns/x"), "{refused}");
    }

    #[test]
    fn a_pod_in_the_hosts_network_is_refused() {
        let mut config = config(&json!({}));
        assert!(check_sandbox(&config).is_ok());
        let namespaces = &mut config.linux.namespaces;
        namespaces.retain(|namespace| namespace.kind != "network");
        let refused = check_sandbox(&config).unwrap_err().to_string();
        assert!(refused.contains("no network namespace"), "{refused}");
    }

    #[test]
    fn host_limits_and_hardening_are_warnings() {
        let found = check(
            &config(&json!({
                "process": {
                    "apparmorProfile": "cri-containerd.apparmor.d",
                    "capabilities": {"bounding": ["CAP_CHOWN", "CAP_FLY"]},
                },
                "linux": {
                    "seccomp": {"defaultAction": "SCMP_ACT_ERRNO"},
                    "resources": {
                        "cpu": {"cpus": "0-1", "shares": 1024},
                        "devices": [{"allow": true, "access": "rwm"}],
                        "hugepageLimits": [{"pageSize": "2MB", "limit": 0}],
                        "pids": {"limit": 100},
                    },
                },
            })),
            false,
        );
        let expected = [
            "process.capabilities: CAP_FLY is not known",
            "process.apparmorProfile: cri-containerd.apparmor.d is not there in the VM",
            "linux.seccomp: there is no filter in the VM",
            "linux.resources.pids: the VM is not limited by it",
            "linux.resources.cpu.cpus: the VM is not limited by it",
        ];
        assert_eq!(found.unwrap(), expected);
    }
}
