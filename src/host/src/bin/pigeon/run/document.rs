//! Converts the options of `pigeon run` to the configuration document and the disks.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use pigeon::{
    config,
    image::{
        disk::{Format, parse_disk_size, write_volume},
        kind::{Kind, describe},
        run_json_path,
    },
    machine::USER_NETWORK,
};
use serde_json::{Value, json};

use super::Run;
use crate::{exec::variables, output::note, ports::Port};

/// Where the idle workload is mounted if the real one is a session.
const HOLD: &str = "/run/pigeon/hold";
/// Default size of a new writable layer, in bytes.
const OVERLAY_SIZE: u64 = 1 << 30;

/// A file used as a disk of the VM.
#[derive(Clone, Debug, PartialEq)]
pub struct DiskFile {
    pub path: PathBuf,
    pub read_only: bool,
    /// Size with which it is created if it does not exist.
    pub size: Option<u64>,
}

/// A file mounted at a path of the VM: `FILE:PATH[,size=SIZE][,ro]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Volume {
    pub disk: DiskFile,
    pub target: String,
}

impl Volume {
    pub fn parse(text: &str) -> Result<Volume> {
        let usage = || format!("{text:?} is not FILE:PATH[,size=SIZE][,ro]");
        let (places, options) = text.split_once(',').unwrap_or((text, ""));
        let (path, target) = places.rsplit_once(':').with_context(usage)?;
        ensure!(!path.is_empty() && target.starts_with('/'), usage());
        let mut disk = DiskFile {
            path: path.into(),
            read_only: false,
            size: None,
        };
        for option in options.split(',').filter(|option| !option.is_empty()) {
            match option.split_once('=') {
                None if option == "ro" => disk.read_only = true,
                None if option == "rw" => disk.read_only = false,
                Some(("size", size)) => disk.size = Some(parse_disk_size(size)?),
                _ => bail!("{text:?}: there is no option {option}, but size=SIZE, ro and rw"),
            }
        }
        Ok(Volume {
            disk,
            target: target.into(),
        })
    }
}

impl DiskFile {
    /// Creates and locks it if it does not exist.
    pub fn make(&self) -> Result<Option<File>> {
        let shown = self.path.display();
        if self.path.exists() {
            return Ok(None);
        }
        let size = self
            .size
            .with_context(|| format!("{shown} does not exist: add ,size=1G to create it"))?;
        let file = write_volume(&self.path, size)?;
        note!("{shown}: created, {} MiB", size >> 20);
        Ok(Some(file))
    }

    /// Its file system, if the guest can mount it.
    pub fn kind(&self) -> Result<Kind> {
        let shown = self.path.display();
        let kind = describe(&self.path)?;
        match kind {
            Kind::Image(_) | Kind::OtherImage(_) => Ok(kind),
            Kind::Empty => bail!(
                "{shown} has no file system: run `mkfs.ext4 {shown}`, or remove it and give a size, \
                 as in {shown}:/data,size=1G"
            ),
            kind => bail!("{shown} is {kind}, not an image with a file system"),
        }
    }
}

/// The writable layer over the root.
#[derive(Clone, Debug, PartialEq)]
pub enum Overlay {
    /// In memory, optionally with mount options.
    Memory(String),
    Disk(DiskFile),
}

impl Overlay {
    pub fn parse(text: &str) -> Result<Overlay> {
        if text == "tmpfs" || text.starts_with("tmpfs:") {
            return Ok(Overlay::Memory(text.into()));
        }
        let (path, size) = match text.split_once(",size=") {
            Some((path, size)) => (path, parse_disk_size(size)?),
            None => (text, OVERLAY_SIZE),
        };
        Ok(Overlay::Disk(DiskFile {
            path: path.into(),
            read_only: false,
            size: Some(size),
        }))
    }
}

/// The result of all options.
pub struct Plan {
    /// The configuration document, with the requested workload.
    pub document: Value,
    /// Disks in the order of their names, from /dev/vda on.
    pub disks: Vec<DiskFile>,
    /// Ports forwarded to the VM.
    pub ports: Vec<Port>,
    /// The workload, if it runs in a session: the last disk is then the idle workload of the init.
    pub session: Option<SessionPlan>,
    /// Volume paths of the image that have no volume.
    pub unkept: Vec<String>,
}

impl Plan {
    /// The configuration document for the init.
    pub fn guest_document(&self) -> Result<Value> {
        let mut document = self.document.clone();
        if self.session.is_some() {
            document["ExecOverride"] = json!([format!("{HOLD}/{}", pigeon::hold::PROGRAM)]);
            if document["Mounts"].is_null() {
                document["Mounts"] = json!([]);
            }
            if let Some(mounts) = document["Mounts"].as_array_mut() {
                let device = device(self.disks.len())?;
                mounts.push(json!({"DevicePath": device, "MountPath": HOLD}));
            }
        }
        config::check(&document)?;
        Ok(document)
    }
}

/// The workload as a session.
pub struct SessionPlan {
    pub argv: Vec<String>,
    pub user: Option<String>,
    pub workdir: Option<String>,
}

impl SessionPlan {
    fn of(document: &Value) -> SessionPlan {
        let text = |value: &Value| value.as_str().map(String::from);
        let image = &document["ImageConfig"];
        SessionPlan {
            argv: argv(document),
            user: text(&document["UserOverride"]).or_else(|| text(&image["User"])),
            workdir: text(&image["WorkingDir"]),
        }
    }
}

/// The command of a configuration document.
pub fn argv(document: &Value) -> Vec<String> {
    let list = |value: &Value| -> Vec<String> {
        let words = value.as_array().into_iter().flatten();
        words.filter_map(Value::as_str).map(String::from).collect()
    };
    let image = &document["ImageConfig"];
    let mut words = list(&document["ExecOverride"]);
    if words.is_empty() {
        words = list(&image["Entrypoint"]);
        match document["CmdOverride"].as_str() {
            Some(cmd) => words.push(cmd.into()),
            None => words.extend(list(&image["Cmd"])),
        }
    }
    words
}

impl Run {
    /// The configuration document, without the VM's name.
    pub fn document(&self) -> Result<Value> {
        let mut document = self.read_document()?;
        if let Some(signal) = &self.stop_signal {
            ensure!(
                pigeon::signal::number(signal).is_some(),
                "--stop-signal {signal}: there is no such signal"
            );
        }
        self.override_command(&mut document);
        self.check_command(&document)?;
        self.check_platform(&document)?;
        for (name, value) in variables(&self.env_file, &self.env)? {
            document["ExtraEnv"][name] = json!(value);
        }
        let network = self.net;
        if network {
            let net = USER_NETWORK;
            document["IPConfigs"] =
                json!([{"IP": net.guest, "Mask": net.mask, "Gateway": net.gateway}]);
            document["EtcResolv"] = json!({"Nameservers": [net.nameserver]});
        }
        self.set_limits(&mut document)?;
        self.set_root(&mut document)?;
        self.set_mounts(&mut document)?;
        if let Some(members) = document.as_object_mut() {
            members.retain(|_, value| !value.is_null());
        }
        Ok(document)
    }

    /// The plan for a VM with this name.
    pub fn plan(&self, mut document: Value, name: &str) -> Result<Plan> {
        self.set_names(&mut document, name);
        self.plan_of(document)
    }

    /// The plan for a VM with this configuration, which includes all options.
    pub fn plan_of(&self, document: Value) -> Result<Plan> {
        let mut ports = vec![];
        for text in &self.publish {
            ports.push(text.parse::<Port>()?);
        }
        if self.publish_all {
            ports.extend(exposed_ports(&document).into_iter().map(Port::any));
        }
        let plan = Plan {
            disks: self.disks()?,
            ports,
            session: (self.interactive || self.tty).then(|| SessionPlan::of(&document)),
            unkept: unkept_volumes(&document),
            document,
        };
        plan.guest_document()?;
        Ok(plan)
    }

    fn overlay(&self) -> Result<Option<Overlay>> {
        self.overlay.as_deref().map(Overlay::parse).transpose()
    }

    /// The root, its writable layer, and volumes.
    fn disks(&self) -> Result<Vec<DiskFile>> {
        let mut disks = vec![DiskFile {
            path: self.image().into(),
            read_only: self.read_only || self.overlay.is_some(),
            size: None,
        }];
        if let Some(Overlay::Disk(disk)) = self.overlay()? {
            disks.push(disk);
        }
        for text in &self.volume {
            disks.push(Volume::parse(text)?.disk);
        }
        Ok(disks)
    }

    /// The configuration file, with an `ImageConfig`.
    fn read_document(&self) -> Result<Value> {
        let beside = run_json_path(self.image());
        let path = match &self.config {
            Some(path) => Some(path),
            None => beside.exists().then_some(&beside),
        };
        let mut document = match path {
            None => json!({}),
            Some(path) => {
                let shown = path.display();
                let text = fs::read(path).with_context(|| format!("unable to read {shown}"))?;
                let document = serde_json::from_slice(&text);
                let document = document.with_context(|| format!("{shown} is not JSON"))?;
                config::check(&document).with_context(|| shown.to_string())?;
                document
            }
        };
        if document["ImageConfig"].is_null() {
            document["ImageConfig"] = json!({});
        }
        Ok(document)
    }

    /// Applies options that override the image's configuration.
    fn override_command(&self, document: &mut Value) {
        if let Some(entrypoint) = &self.entrypoint {
            // An empty entrypoint clears the image's, as in docker.
            let words = Some(entrypoint).filter(|entrypoint| !entrypoint.is_empty());
            document["ImageConfig"]["Entrypoint"] = json!(Vec::from_iter(words));
        }
        if self.entrypoint.is_some() || !self.command().is_empty() {
            document["ImageConfig"]["Cmd"] = json!(self.command());
            document["ExecOverride"] = Value::Null;
            document["CmdOverride"] = Value::Null;
        }
        if let Some(dir) = &self.workdir {
            document["ImageConfig"]["WorkingDir"] = json!(dir);
        }
        if let Some(user) = &self.user {
            document["UserOverride"] = json!(user);
        }
        if let Some(signal) = &self.stop_signal {
            document["ImageConfig"]["StopSignal"] = json!(signal);
        }
        self.health.change(document);
    }

    fn check_command(&self, document: &Value) -> Result<()> {
        let given = |value: &Value| value.as_array().is_some_and(|words| !words.is_empty());
        let image = &document["ImageConfig"];
        let has_program = given(&document["ExecOverride"]) || given(&image["Entrypoint"]);
        if !has_program && !document["CmdOverride"].is_string() && !given(&image["Cmd"]) {
            let from = match &self.config {
                Some(path) => format!("{} names no command", path.display()),
                None => match run_json_path(self.image()) {
                    beside if beside.exists() => format!("{} names no command", beside.display()),
                    beside => format!("there is no {}", beside.display()),
                },
            };
            bail!(
                "nothing to run: {from}; give a command: pigeon run {} /bin/sh -c 'echo hello'",
                self.image().display()
            );
        }
        if let Some(first) = self.command().first().filter(|_| !has_program) {
            ensure!(
                !first.starts_with('-'),
                "{first} would be the program, as there is no Entrypoint: options go before the image"
            );
        }
        Ok(())
    }

    fn check_platform(&self, document: &Value) -> Result<()> {
        let ours = self.guest.arch.platform();
        match document["Platform"].as_str() {
            Some(platform) if platform != ours => bail!(
                "the image is for {platform}, but the VM is {ours}: try --arch {}",
                platform.rsplit('/').next().unwrap_or_default()
            ),
            _ => Ok(()),
        }
    }

    /// Sets the VM's host name and its address.
    fn set_names(&self, document: &mut Value, name: &str) {
        if let Some(hostname) = &self.hostname {
            document["Hostname"] = json!(hostname);
        } else if document["Hostname"].is_null() {
            document["Hostname"] = json!(name);
        }
        let hostname = document["Hostname"].clone();
        let address = document["IPConfigs"][0]["IP"]
            .as_str()
            .unwrap_or("127.0.1.1");
        let own = json!({"Host": hostname, "IP": address});
        match document["EtcHosts"].as_array_mut() {
            Some(hosts) => {
                if hosts.iter().all(|host| host["Host"] != hostname) {
                    hosts.push(own);
                }
            }
            // The init adds localhost if the image has no hosts file.
            None => document["EtcHosts"] = json!([own]),
        }
    }

    fn set_limits(&self, document: &mut Value) -> Result<()> {
        for text in &self.sysctl {
            let pair = text.split_once('=');
            let (name, value) = pair.with_context(|| format!("{text:?} is not NAME=VALUE"))?;
            document["Sysctls"][name] = json!(value);
        }
        for text in &self.ulimit {
            let (name, limit) = parse_ulimit(text)?;
            document["Rlimits"][name] = limit;
        }
        Ok(())
    }

    fn set_root(&self, document: &mut Value) -> Result<()> {
        if self.read_only {
            document["RootReadOnly"] = json!(true);
        }
        match self.overlay()? {
            None => {}
            Some(Overlay::Memory(options)) => document["RootOverlay"] = json!(options),
            Some(Overlay::Disk(_)) => document["RootOverlay"] = json!(device(1)?),
        }
        Ok(())
    }

    /// Adds volumes and tmpfs mounts. Volumes given as options replace the file's mounts.
    fn set_mounts(&self, document: &mut Value) -> Result<()> {
        if !self.volume.is_empty() {
            document["Mounts"] = json!([]);
        }
        let mut mounts = match document["Mounts"].take() {
            Value::Array(mounts) => mounts,
            _ => vec![],
        };
        let first = 1 + usize::from(matches!(self.overlay()?, Some(Overlay::Disk(_))));
        for (text, number) in self.volume.iter().zip(first..) {
            let Volume { disk, target } = Volume::parse(text)?;
            let mut mount = json!({"DevicePath": device(number)?, "MountPath": target});
            if disk.read_only {
                mount["ReadOnly"] = json!(true);
            }
            mounts.push(mount);
        }
        for text in &self.tmpfs {
            let (path, options) = text.split_once(':').unwrap_or((text, ""));
            ensure!(path.starts_with('/'), "{text:?} is not PATH[:OPTIONS]");
            let mut mount = json!({"FSType": "tmpfs", "MountPath": path});
            if !options.is_empty() {
                mount["Options"] = json!(options);
            }
            mounts.push(mount);
        }
        if !mounts.is_empty() {
            document["Mounts"] = json!(mounts);
        }
        Ok(())
    }
}

/// The name of the disk with this index.
fn device(number: usize) -> Result<String> {
    let letter = ('a'..='z')
        .nth(number)
        .context("a VM has 26 disks at most")?;
    Ok(format!("/dev/vd{letter}"))
}

/// Parses `nofile=65536`, `nofile=1024:65536`, `core=-1`, as in `docker run --ulimit`.
fn parse_ulimit(text: &str) -> Result<(String, Value)> {
    let usage = || format!("{text:?} is not NAME=SOFT[:HARD], such as nofile=65536");
    let (name, limits) = text.split_once('=').with_context(usage)?;
    let one = |text: &str| match text {
        "-1" | "unlimited" => Ok("unlimited".to_string()),
        _ => text.parse::<u64>().map(|number| number.to_string()),
    };
    let name = name.to_ascii_uppercase();
    Ok((
        name,
        match limits.split_once(':') {
            None => match one(limits).with_context(usage)? {
                unlimited if unlimited == "unlimited" => json!(unlimited),
                number => json!(number.parse::<u64>()?),
            },
            Some((soft, hard)) => {
                let soft = one(soft).with_context(usage)?;
                let hard = one(hard).with_context(usage)?;
                let number = |limit: &str| limit.parse().unwrap_or(u64::MAX);
                ensure!(
                    number(&soft) <= number(&hard),
                    "{text:?}: the soft limit is above the hard one"
                );
                json!(format!("{soft}:{hard}"))
            }
        },
    ))
}

/// TCP ports exposed by the image.
fn exposed_ports(document: &Value) -> Vec<u16> {
    let exposed = document["ImageConfig"]["ExposedPorts"].as_object();
    let mut ports: Vec<u16> = exposed
        .into_iter()
        .flat_map(|ports| ports.keys())
        .filter_map(|port| port.strip_suffix("/tcp").unwrap_or(port).parse().ok())
        .collect();
    ports.sort_unstable();
    ports
}

/// Volume paths of the image on which nothing is mounted.
fn unkept_volumes(document: &Value) -> Vec<String> {
    let mounts = document["Mounts"].as_array().cloned().unwrap_or_default();
    let is_mounted = |path: &str| {
        mounts.iter().any(|mount| {
            let target = mount["MountPath"].as_str().unwrap_or_default();
            Path::new(path).starts_with(target)
        })
    };
    let volumes = document["ImageConfig"]["Volumes"].as_object();
    volumes
        .into_iter()
        .flat_map(|volumes| volumes.keys())
        .filter(|path| !is_mounted(path))
        .cloned()
        .collect()
}

/// Modules that the guest's kernel needs for the file systems of these disks.
pub fn file_systems(kinds: &[Kind], overlay: bool) -> Vec<String> {
    let module = |kind: &Kind| match kind {
        Kind::Image(Format::Squashfs) => Some("squashfs"),
        Kind::Image(Format::Erofs) => Some("erofs"),
        Kind::OtherImage("XFS") => Some("xfs"),
        Kind::OtherImage("Btrfs") => Some("btrfs"),
        _ => None,
    };
    let overlay = overlay.then_some("overlay");
    let wanted: BTreeSet<_> = kinds.iter().filter_map(module).chain(overlay).collect();
    wanted.into_iter().map(String::from).collect()
}

#[cfg(test)]
mod tests {
    use super::{super::Options, *};
    use clap::Parser;

    fn plan(config: &Value, words: &[&str]) -> Result<Plan> {
        let dir = tempfile::tempdir()?;
        let image = dir.path().join("app.ext4");
        fs::write(run_json_path(&image), config.to_string())?;
        let image = image.to_str().context("not UTF-8")?;
        let words: Vec<_> = ["run"]
            .iter()
            .chain(words)
            .map(|word| word.replace("IMAGE", image))
            .collect();
        let run = Options::try_parse_from(words)?.run;
        run.plan(run.document()?, "app")
    }

    /// The document, without the host names that every VM has.
    fn document(config: &Value, words: &[&str]) -> Result<Value> {
        let mut document = plan(config, words)?.document;
        if document["Hostname"] == "app" {
            document["Hostname"].take();
            document["EtcHosts"].take();
        }
        let members = document.as_object_mut().context("an object")?;
        members.retain(|_, value| !value.is_null());
        Ok(document)
    }

    fn run(words: &[&str]) -> Result<Value> {
        document(&json!({"ExecOverride": ["/a"]}), words)
    }

    fn error(config: &Value, words: &[&str]) -> String {
        format!("{:#}", document(config, words).unwrap_err())
    }

    #[test]
    fn options_change_the_images_configuration_as_docker_run_does() {
        let image =
            json!({"ImageConfig": {"Entrypoint": ["/app"], "Cmd": ["serve"], "User": "www"}});
        assert_eq!(document(&image, &["IMAGE"]).unwrap(), image);
        let words = [
            "-e",
            "A=b=c",
            "-w",
            "/srv",
            "-u",
            "0:0",
            "--stop-signal",
            "SIGINT",
            "IMAGE",
            "check",
            "-x",
        ];
        let expected = json!({
            "ImageConfig": {
                "Entrypoint": ["/app"],
                "Cmd": ["check", "-x"],
                "User": "www",
                "WorkingDir": "/srv",
                "StopSignal": "SIGINT",
            },
            "ExtraEnv": {"A": "b=c"},
            "UserOverride": "0:0",
        });
        assert_eq!(document(&image, &words).unwrap(), expected);
        let words = ["--entrypoint", "sh", "IMAGE", "-c", "id"];
        let shell = &document(&image, &words).unwrap()["ImageConfig"];
        assert_eq!(
            (&shell["Entrypoint"], &shell["Cmd"]),
            (&json!(["sh"]), &json!(["-c", "id"]))
        );
        let words = ["--entrypoint", "", "IMAGE", "/id"];
        let cleared = &document(&image, &words).unwrap()["ImageConfig"];
        assert_eq!(
            (&cleared["Entrypoint"], &cleared["Cmd"]),
            (&json!([]), &json!(["/id"]))
        );
        let error_text = error(&image, &["--entrypoint=", "IMAGE"]);
        assert!(error_text.starts_with("nothing to run"), "{error_text}");
    }

    #[test]
    fn a_health_check_is_the_images_or_that_of_options() {
        let check = json!({"Test": ["CMD", "/check"], "Retries": 5});
        let image = json!({"ImageConfig": {"Cmd": ["/a"], "Healthcheck": check}});
        let of = |words: &[&str]| {
            let document = document(&image, words).unwrap();
            document["ImageConfig"]["Healthcheck"].clone()
        };
        assert_eq!(of(&["IMAGE"]), check);
        let words = [
            "--health-interval",
            "1m1.5s",
            "--health-timeout=2ms",
            "IMAGE",
        ];
        let expected = json!({
            "Test": ["CMD", "/check"],
            "Retries": 5,
            "Interval": 61_500_000_000u64,
            "Timeout": 2_000_000,
        });
        assert_eq!(of(&words), expected);
        let words = ["--health-cmd", "a || b", "--health-retries", "9", "IMAGE"];
        let expected = json!({"Test": ["CMD-SHELL", "a || b"], "Retries": 9});
        assert_eq!(of(&words), expected);
        assert_eq!(
            of(&["--no-healthcheck", "IMAGE"]),
            json!({"Test": ["NONE"]})
        );
        for bad in ["1", "s", "1x", "-1s", "1s2", "1e9h", ""] {
            assert!(run(&["--health-interval", bad, "IMAGE"]).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_vms_name_resolves() {
        let names = |config: &Value, words: &[&str]| {
            let document = plan(config, words).unwrap().document;
            (document["Hostname"].clone(), document["EtcHosts"].clone())
        };
        let command = json!({"ExecOverride": ["/a"]});
        let (hostname, hosts) = names(&command, &["IMAGE"]);
        assert_eq!(hostname, "app");
        assert_eq!(hosts, json!([{"Host": "app", "IP": "127.0.1.1"}]));
        let (hostname, hosts) = names(&command, &["--net", "--hostname", "db", "IMAGE"]);
        assert_eq!(hostname, "db");
        assert_eq!(hosts, json!([{"Host": "db", "IP": "10.0.2.15"}]));
        // The configuration takes precedence.
        let own = json!({
            "ExecOverride": ["/a"],
            "Hostname": "me",
            "EtcHosts": [{"Host": "me", "IP": "10.9.9.9"}],
        });
        let (hostname, hosts) = names(&own, &["IMAGE"]);
        assert_eq!(
            (&hostname, hosts.as_array().unwrap().len()),
            (&json!("me"), 1)
        );
    }

    #[test]
    fn volumes_become_disks_and_mounts() {
        let words = [
            "-v",
            "a.img:/data,size=1.5G",
            "--disk",
            "b:c.img:/b,ro",
            "IMAGE",
        ];
        let plan = plan(&json!({"ExecOverride": ["/a"], "Mounts": [{}]}), &words).unwrap();
        let expected = json!([
            {"DevicePath": "/dev/vdb", "MountPath": "/data"},
            {"DevicePath": "/dev/vdc", "MountPath": "/b", "ReadOnly": true},
        ]);
        assert_eq!(plan.document["Mounts"], expected);
        let disk = |path: &str, read_only, size| DiskFile {
            path: path.into(),
            read_only,
            size,
        };
        let expected = [
            disk("a.img", false, Some(3 << 29)),
            disk("b:c.img", true, None),
        ];
        assert_eq!(plan.disks[1..], expected);
        for bad in ["a.img", "a.img:data", ":/data", "a:/b,x", "a:/b,size=x"] {
            assert!(Volume::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_volume_is_created_if_it_has_a_size_and_must_exist_otherwise() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data.img");
        let disk = |size| DiskFile {
            path: path.clone(),
            read_only: false,
            size,
        };
        let error = disk(None).make().unwrap_err().to_string();
        assert!(error.contains("add ,size=1G to create it"), "{error}");
        assert!(disk(Some(16 << 20)).make().unwrap().is_some());
        assert_eq!(disk(None).kind().unwrap(), Kind::Image(Format::Ext4));
        // An existing file is not changed.
        assert!(disk(Some(32 << 20)).make().unwrap().is_none());
        assert_eq!(fs::metadata(&path).unwrap().len(), 16 << 20);
        fs::write(&path, [0; 4096]).unwrap();
        let error = disk(None).kind().unwrap_err().to_string();
        assert!(
            error.contains("has no file system: run `mkfs.ext4"),
            "{error}"
        );
        fs::write(&path, "hello").unwrap();
        let error = disk(None).kind().unwrap_err().to_string();
        assert!(error.contains("is of an unknown kind"), "{error}");
    }

    #[test]
    fn a_root_is_read_only_or_has_a_writable_layer() {
        let root = |words: &[&str]| {
            let words: Vec<_> = words.iter().copied().chain(["IMAGE"]).collect();
            let plan = plan(&json!({"ExecOverride": ["/a"]}), &words).unwrap();
            (
                plan.document["RootReadOnly"].clone(),
                plan.document["RootOverlay"].clone(),
                plan.disks,
            )
        };
        let (read_only, overlay, disks) = root(&[]);
        assert!(read_only.is_null() && overlay.is_null() && !disks[0].read_only);
        let (read_only, overlay, disks) = root(&["--read-only"]);
        assert!(read_only == true && overlay.is_null() && disks[0].read_only);
        let (read_only, overlay, disks) = root(&["--overlay"]);
        assert!(read_only.is_null() && overlay == "tmpfs" && disks[0].read_only);
        assert_eq!(root(&["--overlay=tmpfs:size=64m"]).1, "tmpfs:size=64m");
        let (_, overlay, disks) = root(&["--overlay=layer.img,size=2G", "-v", "v.img:/v"]);
        assert_eq!(overlay, "/dev/vdb");
        assert!(disks[0].read_only && !disks[1].read_only);
        assert_eq!(
            (&disks[1].path, disks[1].size),
            (&"layer.img".into(), Some(2 << 30))
        );
        assert_eq!(disks.len(), 3);
    }

    #[test]
    fn memory_file_systems_limits_and_parameters_are_in_the_document() {
        let words = [
            "--tmpfs",
            "/tmp",
            "--tmpfs",
            "/cache:size=64m,mode=1777",
            "--sysctl",
            "net.core.somaxconn=1024",
            "--ulimit",
            "nofile=65536",
            "--ulimit",
            "core=-1",
            "--ulimit",
            "nproc=10:unlimited",
            "IMAGE",
        ];
        let document = run(&words).unwrap();
        let expected = json!([
            {"FSType": "tmpfs", "MountPath": "/tmp"},
            {"FSType": "tmpfs", "MountPath": "/cache", "Options": "size=64m,mode=1777"},
        ]);
        assert_eq!(document["Mounts"], expected);
        assert_eq!(document["Sysctls"], json!({"net.core.somaxconn": "1024"}));
        let expected = json!({"NOFILE": 65536, "CORE": "unlimited", "NPROC": "10:unlimited"});
        assert_eq!(document["Rlimits"], expected);
        for bad in [
            ["--ulimit", "nofile"],
            ["--ulimit", "nofile=x"],
            ["--ulimit", "nofile=5:3"],
            ["--ulimit", "core=-1:3"],
            ["--stop-signal", "SIGFOO"],
            ["-e", "=x"],
            ["-e", ""],
            ["--sysctl", "x"],
        ] {
            assert!(run(&[bad[0], bad[1], "IMAGE"]).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_session_takes_the_place_of_the_workload() {
        let image = json!({
            "ImageConfig": {"Entrypoint": ["/app"], "Cmd": ["x"], "User": "www", "WorkingDir": "/srv"},
        });
        let plan = plan(&image, &["-it", "-v", "a.img:/data", "IMAGE"]).unwrap();
        let session = plan.session.as_ref().unwrap();
        assert_eq!(session.argv, ["/app", "x"]);
        assert_eq!(session.user.as_deref(), Some("www"));
        assert_eq!(session.workdir.as_deref(), Some("/srv"));
        assert!(plan.document["ExecOverride"].is_null());
        let document = plan.guest_document().unwrap();
        let expected = json!({"DevicePath": "/dev/vdc", "MountPath": "/run/pigeon/hold"});
        assert_eq!(document["Mounts"][1], expected);
        assert_eq!(document["ExecOverride"], json!(["/run/pigeon/hold/hold"]));
    }

    #[test]
    fn exposed_ports_and_volumes_are_known() {
        let image = json!({"ImageConfig": {
            "Cmd": ["/a"],
            "ExposedPorts": {"443/tcp": {}, "80": {}, "53/udp": {}},
            "Volumes": {"/data": {}, "/other": {}},
        }});
        let plan = plan(&image, &["-P", "-v", "a.img:/data", "IMAGE"]).unwrap();
        let guests: Vec<_> = plan.ports.iter().map(|port| port.guest).collect();
        assert_eq!(guests, [80, 443]);
        assert_eq!(plan.unkept, ["/other"]);
    }

    #[test]
    fn errors_are_reported_before_the_boot() {
        let error_text = error(&json!({}), &["IMAGE"]);
        assert!(
            error_text.starts_with("nothing to run") && error_text.contains("names no command"),
            "{error_text}"
        );
        let error_text = error(&json!({}), &["IMAGE", "-m", "512"]);
        assert!(
            error_text.contains("options go before the image"),
            "{error_text}"
        );
        let error_text = error(&json!({"ExtraEnv": ["A=B"]}), &["-e", "A=B", "IMAGE", "/a"]);
        assert!(
            error_text.contains("app.run.json: ExtraEnv: "),
            "{error_text}"
        );
        let error_text = error(&json!({"ImageConfig": {"entrypoint": ["/a"]}}), &["IMAGE"]);
        assert!(
            error_text.contains("did you mean Entrypoint?"),
            "{error_text}"
        );
        let error_text = error(&json!({"Platform": "linux/s390x"}), &["IMAGE", "/a"]);
        assert!(
            error_text.contains("the image is for linux/s390x"),
            "{error_text}"
        );
        assert!(
            error(&json!({"ExecOverride": ["/a"]}), &["--disk", "x", "IMAGE"])
                .contains("FILE:PATH")
        );
    }
}
