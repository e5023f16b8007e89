//! Firecracker, which needs KVM. (Firecracker docs/getting-started.md, docs/mmds/, docs/vsock.md,
//! docs/snapshotting/, and the API's src/firecracker/swagger/firecracker.yaml.)

use std::{
    fs,
    os::unix::{fs::symlink, net::UnixStream},
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::{
    End, GUEST_CID, GUEST_MAC, LONE_TAP, Machine, Nic, Snapshot, Spec, Start, and_resumed,
    beside_tap,
};
use crate::{http, process::Process};

/// The address of the metadata service.
const MMDS_ADDRESS: &str = "169.254.169.254";
/// The API's socket in the VM's directory.
const API: &str = "api.sock";

/// The network card's name in API calls.
const NIC_ID: &str = "eth0";

/// Maximum size of a document, as accepted by pigeon-init.
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
    let [api, log_path, stderr_path] =
        [API, "firecracker.log", "firecracker.stderr"].map(|name| spec.dir.join(name));
    fs::File::create(&log_path)?;
    // A separate file: Firecracker opens the log itself, and they would overwrite each other.
    let stderr = fs::File::create(&stderr_path)?;
    let mut command = Command::new(program.canonicalize()?);
    command.arg("--api-sock").arg(&api);
    // Standard output is only for the console.
    command
        .arg("--log-path")
        .arg(&log_path)
        .args(["--level", "Error"]);
    let restored = match &spec.start {
        Start::Restore(snapshot) => Some(snapshot),
        Start::Boot | Start::BootRestorable => None,
    };
    if let Some(metadata) = &spec.metadata {
        command.args(["--mmds-size-limit", &MMDS_SIZE_LIMIT.to_string()]);
        command.args(["--http-api-max-payload-size", &MMDS_SIZE_LIMIT.to_string()]);
        if let Some(document) = metadata.document.as_ref().filter(|_| restored.is_none()) {
            command
                .arg("--metadata")
                .arg(file("metadata.json", document)?);
        }
    }
    if spec.nic == Nic::LoneTap {
        command = beside_tap(&command)?;
    }
    if !matches!(spec.start, Start::Boot) {
        for (number, disk) in spec.disks.iter().enumerate() {
            let file = std::path::absolute(&disk.path)?;
            symlink(file, spec.dir.join(disk_link(number)))?;
        }
        command.current_dir(&spec.dir);
    }
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(stderr);
    let mut machine = Firecracker {
        process: Process::spawn(command)?,
        api,
    };
    let started = machine.wait_for_api().and_then(|()| match restored {
        None => boot(&machine.api, &configuration(spec)?),
        Some(snapshot) => restore(&machine.api, spec, snapshot),
    });
    if let Err(error) = started {
        let output = fs::read_to_string(stderr_path)? + &fs::read_to_string(log_path)?;
        let output = match output.trim_end() {
            "" => String::new(),
            output => format!(": {output}"),
        };
        return Err(error.context(format!("unable to start Firecracker{output}")));
    }
    Ok(Box::new(machine))
}

/// The path of a disk of a VM whose snapshots can be restored: relative to the VM's directory, where a clone
/// finds its own disk, as no API call replaces a disk. (docs/snapshotting/snapshot-support.md)
fn disk_link(number: usize) -> String {
    format!("disk{number}")
}

/// The tap device of a VM.
fn tap(spec: &Spec) -> Result<Option<&str>> {
    Ok(match &spec.nic {
        Nic::None => None,
        Nic::Tap(name) => Some(name.as_str()),
        Nic::LoneTap => Some(LONE_TAP),
        Nic::Stream(_) | Nic::User(_) => bail!("Firecracker's network is a tap device"),
    })
}

/// The objects of a configuration, in the order of the calls that set them: the metadata service needs its network
/// interface. Each element of a list is set by its own call, whose path ends with the element's ID.
const OBJECTS: [(&str, &str, Option<&str>); 6] = [
    ("boot-source", "/boot-source", None),
    ("machine-config", "/machine-config", None),
    ("drives", "/drives", Some("drive_id")),
    (
        "network-interfaces",
        "/network-interfaces",
        Some("iface_id"),
    ),
    ("mmds-config", "/mmds/config", None),
    ("vsock", "/vsock", None),
];

/// Configures a Firecracker and starts its VM. Each response has the reason for a failure. With `--config-file`, a
/// VM that cannot be started would abort Firecracker without a reason if a call arrives meanwhile (Firecracker
/// src/firecracker/src/api_server_adapter.rs).
fn boot(api: &Path, configuration: &Value) -> Result<()> {
    for (name, path, id) in OBJECTS {
        let object = &configuration[name];
        match id {
            Some(id) => {
                for element in object.as_array().into_iter().flatten() {
                    let id = element[id].as_str().unwrap_or_default();
                    request(api, "PUT", &format!("{path}/{id}"), element)?;
                }
            }
            None if object.is_null() => {}
            None => {
                request(api, "PUT", path, object)?;
            }
        }
    }
    let start = json!({"action_type": "InstanceStart"});
    request(api, "PUT", "/actions", &start).map(drop)
}

/// Loads a snapshot in a Firecracker that was started without a configuration. The document is put before the
/// guest runs: a snapshot does not include the metadata store.
fn restore(api: &Path, spec: &Spec, snapshot: &Snapshot) -> Result<()> {
    let mut load = json!({
        "snapshot_path": snapshot.state,
        "mem_backend": {"backend_type": "File", "backend_path": snapshot.memory},
        "resume_vm": false,
    });
    if let Some(tap) = tap(spec)? {
        load["network_overrides"] = json!([{"iface_id": NIC_ID, "host_dev_name": tap}]);
    }
    if let Some(socket) = &spec.vsock {
        load["vsock_override"] = json!({"uds_path": socket});
    }
    request(api, "PUT", "/snapshot/load", &load)?;
    if let Some(document) = spec.metadata.as_ref().and_then(|m| m.document.as_ref()) {
        request(api, "PUT", "/mmds", document)?;
    }
    set_state(api, "Resumed")
}

/// Takes a snapshot of another process's VM, see [`super::snapshot`].
pub(super) fn snapshot(
    dir: &Path,
    files: &Snapshot,
    meanwhile: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let api = dir.join(API);
    let taken = create_snapshot(&api, files).and_then(|()| meanwhile());
    // After a timeout, the snapshot is still being written, and this call waits for that; Firecracker discards the
    // calls of clients that have disconnected.
    let resumed = json!({"state": "Resumed"});
    let resumed = request_within(SNAPSHOT_TIMEOUT, &api, "PATCH", "/vm", &resumed);
    and_resumed(taken, resumed.map(drop))
}

/// Resumes another process's VM if it is paused, see [`super::resume_orphaned`].
pub(super) fn resume_orphaned(dir: &Path) -> Result<()> {
    let api = dir.join(API);
    let state = request(&api, "GET", "/", &Value::Null)?.json()?;
    match state["state"] == "Paused" {
        true => set_state(&api, "Resumed"),
        false => Ok(()),
    }
}

/// Whether a Firecracker was started in this directory.
pub(super) fn is_in(dir: &Path) -> bool {
    dir.join(API).exists()
}

/// Stops the VM and takes a full snapshot.
fn create_snapshot(api: &Path, snapshot: &Snapshot) -> Result<()> {
    set_state(api, "Paused")?;
    let create = json!({
        "snapshot_type": "Full",
        "snapshot_path": snapshot.state,
        "mem_file_path": snapshot.memory,
    });
    request_within(SNAPSHOT_TIMEOUT, api, "PUT", "/snapshot/create", &create).map(drop)
}

/// Stops or resumes the virtual processors.
fn set_state(api: &Path, state: &str) -> Result<()> {
    request(api, "PATCH", "/vm", &json!({"state": state})).map(drop)
}

/// The configuration, as in a file for `--config-file`.
fn configuration(spec: &Spec) -> Result<Value> {
    let drives = spec.disks.iter().enumerate().map(|(number, disk)| {
        let path = match spec.start {
            Start::Boot => disk.path.clone(),
            Start::BootRestorable | Start::Restore(_) => disk_link(number).into(),
        };
        json!({
            "drive_id": format!("disk{number}"),
            "path_on_host": path,
            "is_root_device": false, // the init finds it, not the kernel
            "is_read_only": disk.read_only,
            "cache_type": if disk.scratch { "Unsafe" } else { "Writeback" },
        })
    });
    let mut configuration = json!({
        "boot-source": {
            // It may run in a different directory.
            "kernel_image_path": std::path::absolute(&spec.kernel)?,
            "initrd_path": std::path::absolute(&spec.initrd)?,
            "boot_args": spec.command_line("ttyS0", &spec.arch.parameters_on_firecracker()),
        },
        "machine-config": {"vcpu_count": spec.cpus, "mem_size_mib": spec.memory_mib},
        "drives": drives.collect::<Vec<_>>(),
    });
    if let Some(socket) = &spec.vsock {
        configuration["vsock"] = json!({"guest_cid": GUEST_CID, "uds_path": socket});
    }
    if let Some(tap) = tap(spec)? {
        configuration["network-interfaces"] =
            json!([{"iface_id": NIC_ID, "guest_mac": GUEST_MAC, "host_dev_name": tap}]);
    }
    if let Some(metadata) = &spec.metadata {
        configuration["mmds-config"] = json!({
            "version": if metadata.v1 { "V1" } else { "V2" },
            "network_interfaces": [NIC_ID],
            "ipv4_address": MMDS_ADDRESS,
        });
    }
    Ok(configuration)
}

/// Puts a document into the metadata service of the VM in `dir`.
pub fn put_metadata(dir: &Path, document: &Value) -> Result<()> {
    request(&dir.join(API), "PUT", "/mmds", document).map(drop)
}

/// Time limit of a call, and of one that writes all of the guest's memory: until it completes, Firecracker
/// accepts no other call, such as one that resumes the VM.
const TIMEOUT: Duration = Duration::from_secs(30);
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(600);

/// Makes a call to Firecracker's API.
fn request(socket: &Path, method: &str, path: &str, body: &Value) -> Result<http::Response> {
    request_within(TIMEOUT, socket, method, path, body)
}

fn request_within(
    timeout: Duration,
    socket: &Path,
    method: &str,
    path: &str,
    body: &Value,
) -> Result<http::Response> {
    let stream = UnixStream::connect(socket).context("unable to reach Firecracker's API")?;
    stream.set_read_timeout(Some(timeout))?;
    let mut client = http::Client::new(stream);
    match method {
        "GET" => client.get(path),
        "PUT" => client.put(path, body),
        _ => client.patch(path, body),
    }?
    .success()
}

impl Firecracker {
    /// Waits until there is an API.
    fn wait_for_api(&mut self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let state = request(&self.api, "GET", "/", &Value::Null).and_then(|r| r.json());
            if state.is_ok_and(|state| state["state"] == "Not started") {
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
        set_state(&self.api, "Paused")
    }

    fn resume(&mut self) -> Result<()> {
        set_state(&self.api, "Resumed")
    }

    fn snapshot(&mut self, snapshot: &Snapshot) -> Result<()> {
        create_snapshot(&self.api, snapshot)
    }

    fn end(&mut self, status: ExitStatus) -> End {
        // Firecracker has no power-off: the only orderly shutdown is a reset through the keyboard controller.
        if status.success() {
            End::Reboot
        } else {
            End::Failed(status.code())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead, BufReader, Read, Write},
        os::unix::net::UnixListener,
    };

    use super::*;
    use crate::{
        Arch,
        machine::{Disk, Metadata},
        process::run,
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
                              i8042.noaux i8042.nomux i8042.nopnp pci=off cryptomgr.notests \
                              PIGEON_CONFIG=mmds",
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

    /// Responds to the calls of `calls` like Firecracker, and returns method, path and body of each.
    fn calls(calls: impl FnOnce(&Path) -> Result<()>) -> Vec<(String, Value)> {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join(API);
        let listener = UnixListener::bind(&socket).unwrap();
        let server = thread::spawn(move || {
            let mut seen = vec![];
            loop {
                let mut stream = BufReader::new(listener.accept().unwrap().0);
                let mut head = String::new();
                while !head.ends_with("\r\n\r\n") {
                    if stream.read_line(&mut head).unwrap() == 0 {
                        return seen; // the test's own connection
                    }
                }
                let lower = head.to_ascii_lowercase();
                let length = lower
                    .lines()
                    .find_map(|line| line.strip_prefix("content-length:"));
                let length = length.map_or(0, |length| length.trim().parse().unwrap());
                let mut body = vec![0; length];
                stream.read_exact(&mut body).unwrap();
                let call = head.split(" HTTP/1.1").next().unwrap().to_string();
                let response = match call.as_str() {
                    "GET /" => {
                        "HTTP/1.1 200 \r\nContent-Length: 23\r\n\r\n{\"state\":\"Not started\"}"
                    }
                    _ => "HTTP/1.1 204 \r\nServer: Firecracker API\r\n\r\n",
                };
                seen.push((call, serde_json::from_slice(&body).unwrap_or_default()));
                stream.get_mut().write_all(response.as_bytes()).unwrap();
            }
        });
        calls(&socket).unwrap();
        drop(UnixStream::connect(&socket).unwrap());
        server.join().unwrap()
    }

    fn snapshot() -> Snapshot {
        Snapshot {
            state: "/s/state".into(),
            memory: "/s/memory".into(),
        }
    }

    #[test]
    fn a_vm_is_configured_in_calls_and_then_started() {
        let spec = Spec {
            nic: Nic::LoneTap,
            metadata: Some(Metadata {
                v1: false,
                document: None,
            }),
            disks: vec![
                Disk::file(Path::new("/r.ext4")),
                Disk::file(Path::new("/d.ext4")),
            ],
            ..spec()
        };
        let configuration = configuration(&spec).unwrap();
        let seen = calls(|api| boot(api, &configuration));
        let expected = [
            ("/boot-source", &configuration["boot-source"]),
            ("/machine-config", &configuration["machine-config"]),
            ("/drives/disk0", &configuration["drives"][0]),
            ("/drives/disk1", &configuration["drives"][1]),
            (
                "/network-interfaces/eth0",
                &configuration["network-interfaces"][0],
            ),
            ("/mmds/config", &configuration["mmds-config"]),
            ("/vsock", &configuration["vsock"]),
            ("/actions", &json!({"action_type": "InstanceStart"})),
        ];
        let expected = expected.map(|(path, body)| (format!("PUT {path}"), body.clone()));
        assert_eq!(seen, expected);
    }

    #[test]
    fn a_snapshot_is_taken_of_a_paused_vm() {
        let expected = [
            ("PATCH /vm".into(), json!({"state": "Paused"})),
            (
                "PUT /snapshot/create".into(),
                json!({
                    "snapshot_type": "Full",
                    "snapshot_path": "/s/state",
                    "mem_file_path": "/s/memory",
                }),
            ),
        ];
        assert_eq!(calls(|api| create_snapshot(api, &snapshot())), expected);
    }

    #[test]
    fn a_clone_has_its_own_tap_socket_and_metadata_before_it_runs() {
        let document = json!({"Hostname": "clone"});
        let spec = Spec {
            nic: Nic::Tap("tap7".into()),
            metadata: Some(Metadata {
                v1: false,
                document: Some(document.clone()),
            }),
            start: Start::Restore(snapshot()),
            ..spec()
        };
        let expected = [
            (
                "PUT /snapshot/load".into(),
                json!({
                    "snapshot_path": "/s/state",
                    "mem_backend": {"backend_type": "File", "backend_path": "/s/memory"},
                    "resume_vm": false,
                    "network_overrides": [{"iface_id": "eth0", "host_dev_name": "tap7"}],
                    "vsock_override": {"uds_path": "/d/vm.vsock"},
                }),
            ),
            ("PUT /mmds".into(), document),
            ("PATCH /vm".into(), json!({"state": "Resumed"})),
        ];
        assert_eq!(calls(|api| restore(api, &spec, &snapshot())), expected);
    }

    #[test]
    fn a_clone_runs_in_the_directory_of_its_own_disks() {
        let seen = calls(|api| {
            let dir = api.parent().unwrap();
            let program = dir.join("firecracker");
            // It records its arguments, and the target of its first disk.
            let script = "#!/bin/sh\n\
                (readlink disk0; printf '%s\\n' \"$@\") >said.new && mv said.new said\n\
                exec sleep 60\n";
            fs::write(dir.join("script"), script)?;
            // Not written by this process, where another thread may fork while the file is open (ETXTBSY).
            let mut install = Command::new("install");
            run(install.arg("-m755").arg(dir.join("script")).arg(&program))?;
            let spec = Spec {
                dir: dir.into(),
                disks: vec![Disk::file(Path::new("/clones/1.ext4"))],
                start: Start::Restore(snapshot()),
                ..spec()
            };
            let _machine = start(&spec, &program)?;
            let deadline = Instant::now() + Duration::from_secs(10);
            while !dir.join("said").exists() {
                ensure!(Instant::now() < deadline, "it was not started");
                thread::sleep(Duration::from_millis(5));
            }
            let said = fs::read_to_string(dir.join("said"))?;
            let socket = format!("/clones/1.ext4\n--api-sock\n{}\n", api.display());
            assert!(said.starts_with(&socket), "{said}");
            assert!(!said.contains("--config-file"), "{said}");
            Ok(())
        });
        let seen: Vec<_> = seen.iter().map(|(call, _)| call.as_str()).collect();
        assert_eq!(seen, ["GET /", "PUT /snapshot/load", "PATCH /vm"]);
    }

    #[test]
    fn a_restorable_vm_has_relative_disk_paths() {
        let spec = Spec {
            disks: vec![Disk::file(Path::new("/images/root.ext4"))],
            start: Start::BootRestorable,
            ..spec()
        };
        let configuration = configuration(&spec).unwrap();
        assert_eq!(configuration["drives"][0]["path_on_host"], "disk0");
    }

    #[test]
    fn the_kernel_is_found_from_the_vms_directory() {
        let spec = Spec {
            kernel: "vmlinux".into(),
            start: Start::BootRestorable,
            ..spec()
        };
        let configuration = configuration(&spec).unwrap();
        let kernel = configuration["boot-source"]["kernel_image_path"].as_str();
        assert!(Path::new(kernel.unwrap()).is_absolute(), "{kernel:?}");
    }

    #[test]
    fn without_a_nic_there_is_no_network_in_the_configuration() {
        let configuration = configuration(&spec()).unwrap();
        assert!(configuration.get("network-interfaces").is_none());
        assert!(configuration.get("mmds-config").is_none());
    }
}
