//! The real thing, where KVM is. (Firecracker docs/getting-started.md, docs/mmds/, docs/vsock.md,
//! and the API's src/firecracker/swagger/firecracker.yaml.)

use std::{
    fs,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::{End, GUEST_CID, GUEST_MAC, LONE_TAP, Machine, Nic, Spec, beside_tap};
use crate::{http, process::Process};

/// The address of the metadata service.
const MMDS_ADDRESS: &str = "169.254.169.254";
/// The API's socket in the VM's directory.
const API: &str = "api.sock";

/// Room for the largest document that pigeon-init takes.
const MMDS_SIZE_LIMIT: usize = 2 << 20;

struct Firecracker {
    process: Process,
    api: PathBuf,
}

pub(super) fn start(spec: &Spec, program: &Path) -> Result<Box<dyn Machine>> {
    let file = |name: &str, contents: &Value| {
        let path = spec.dir.join(name);
        fs::write(&path, contents.to_string()).map(|()| path)
    };
    let [api, log_path] = [API, "firecracker.log"].map(|name| spec.dir.join(name));
    let log = fs::File::create(&log_path)?;
    let mut command = Command::new(program);
    command.arg("--api-sock").arg(&api);
    // Standard output is the console's alone.
    command
        .arg("--log-path")
        .arg(&log_path)
        .args(["--level", "Error"]);
    command
        .arg("--config-file")
        .arg(file("firecracker.json", &configuration(spec)?)?);
    if let Some(metadata) = &spec.metadata {
        command.args(["--mmds-size-limit", &MMDS_SIZE_LIMIT.to_string()]);
        command.args(["--http-api-max-payload-size", &MMDS_SIZE_LIMIT.to_string()]);
        if let Some(document) = &metadata.document {
            command
                .arg("--metadata")
                .arg(file("metadata.json", document)?);
        }
    }
    if spec.nic == Nic::LoneTap {
        command = beside_tap(&command)?;
    }
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(log);
    let mut machine = Firecracker {
        process: Process::spawn(command)?,
        api,
    };
    if let Err(error) = machine.wait_started() {
        let said = fs::read_to_string(log_path)?;
        return Err(error.context(format!("unable to start Firecracker: {}", said.trim_end())));
    }
    Ok(Box::new(machine))
}

/// The configuration file. Firecracker starts the VM at once when it has read it.
fn configuration(spec: &Spec) -> Result<Value> {
    let drives = spec.disks.iter().enumerate().map(|(number, disk)| {
        json!({
            "drive_id": format!("disk{number}"),
            "path_on_host": disk.path,
            "is_root_device": false, // the init finds it, not the kernel
            "is_read_only": disk.read_only,
            "cache_type": if disk.scratch { "Unsafe" } else { "Writeback" },
        })
    });
    let mut configuration = json!({
        "boot-source": {
            "kernel_image_path": spec.kernel,
            "initrd_path": spec.initrd,
            "boot_args": spec.command_line("ttyS0", spec.arch.parameters_on_firecracker()),
        },
        "machine-config": {"vcpu_count": spec.cpus, "mem_size_mib": spec.memory_mib},
        "drives": drives.collect::<Vec<_>>(),
    });
    if let Some(socket) = &spec.vsock {
        configuration["vsock"] = json!({"guest_cid": GUEST_CID, "uds_path": socket});
    }
    let tap = match &spec.nic {
        Nic::None => None,
        Nic::Tap(name) => Some(name.as_str()),
        Nic::LoneTap => Some(LONE_TAP),
        Nic::Stream(_) | Nic::User(_) => bail!("Firecracker's network is a tap device"),
    };
    if let Some(tap) = tap {
        configuration["network-interfaces"] =
            json!([{"iface_id": "eth0", "guest_mac": GUEST_MAC, "host_dev_name": tap}]);
    }
    if let Some(metadata) = &spec.metadata {
        configuration["mmds-config"] = json!({
            "version": if metadata.v1 { "V1" } else { "V2" },
            "network_interfaces": ["eth0"],
            "ipv4_address": MMDS_ADDRESS,
        });
    }
    Ok(configuration)
}

/// Puts a document into the metadata service of the VM that was started in `dir`.
pub fn put_metadata(dir: &Path, document: &Value) -> Result<()> {
    request(&dir.join(API), "PUT", "/mmds", document).map(drop)
}

/// One call of Firecracker's API.
fn request(socket: &Path, method: &str, path: &str, body: &Value) -> Result<http::Response> {
    let stream = UnixStream::connect(socket).context("unable to reach Firecracker's API")?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let mut client = http::Client::new(stream);
    match method {
        "GET" => client.get(path),
        "PUT" => client.put(path, body),
        _ => client.patch(path, body),
    }?
    .success()
}

impl Firecracker {
    /// Waits until the API says that the VM runs.
    fn wait_started(&mut self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let state = request(&self.api, "GET", "/", &Value::Null).and_then(|r| r.json());
            if state.is_ok_and(|state| state["state"] == "Running") {
                return Ok(());
            }
            if let Some(status) = self.process.status()? {
                bail!("{status}");
            }
            ensure!(Instant::now() < deadline, "no answer from its API in 30 s");
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Machine for Firecracker {
    fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    fn hypervisor(&self) -> &'static str {
        "Firecracker"
    }

    fn ctrl_alt_delete(&mut self) -> Result<()> {
        request(
            &self.api,
            "PUT",
            "/actions",
            &json!({"action_type": "SendCtrlAltDel"}),
        )
        .map(drop)
    }

    fn pause(&mut self) -> Result<()> {
        request(&self.api, "PATCH", "/vm", &json!({"state": "Paused"})).map(drop)
    }

    fn resume(&mut self) -> Result<()> {
        request(&self.api, "PATCH", "/vm", &json!({"state": "Resumed"})).map(drop)
    }

    fn end(&mut self, status: ExitStatus) -> End {
        // Firecracker has no power-off: a reset through the keyboard controller is its only good end.
        if status.success() {
            End::Reboot
        } else {
            End::Failed(status.code())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Arch,
        machine::{Disk, Metadata},
    };

    fn spec() -> Spec {
        Spec {
            vsock: Some("/d/vm.vsock".into()),
            ..Spec::new(
                Path::new("/d"),
                Arch::X86_64,
                Path::new("/k/vmlinux"),
                Path::new("/d/initrd"),
            )
        }
    }

    #[test]
    fn the_configuration_is_as_firecracker_documents_it() {
        let spec = Spec {
            nic: Nic::LoneTap,
            metadata: Some(Metadata {
                v1: false,
                document: None,
            }),
            disks: vec![Disk::file(Path::new("/r.ext4")).read_only().scratch()],
            args: vec!["PIGEON_CONFIG=mmds".into()],
            ..spec()
        };
        let expected = json!({
            "boot-source": {
                "kernel_image_path": "/k/vmlinux",
                "initrd_path": "/d/initrd",
                "boot_args": "console=ttyS0 reboot=k panic=-1 quiet \
                              i8042.noaux i8042.nomux i8042.nopnp pci=off PIGEON_CONFIG=mmds",
            },
            "machine-config": {"vcpu_count": 1, "mem_size_mib": 256},
            "drives": [{
                "drive_id": "disk0",
                "path_on_host": "/r.ext4",
                "is_root_device": false,
                "is_read_only": true,
                "cache_type": "Unsafe",
            }],
            "network-interfaces": [
                {"iface_id": "eth0", "guest_mac": "06:00:ac:10:00:02", "host_dev_name": "tap0"}
            ],
            "vsock": {"guest_cid": 3, "uds_path": "/d/vm.vsock"},
            "mmds-config": {
                "version": "V2",
                "network_interfaces": ["eth0"],
                "ipv4_address": "169.254.169.254",
            },
        });
        assert_eq!(configuration(&spec).unwrap(), expected);
    }

    #[test]
    fn without_a_nic_there_is_no_network_in_the_configuration() {
        let configuration = configuration(&spec()).unwrap();
        assert!(configuration.get("network-interfaces").is_none());
        assert!(configuration.get("mmds-config").is_none());
    }
}
