//! `pigeon restore`: VMs from a snapshot, each with its own name, identity and disks.

use std::{
    env,
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Parser, ValueEnum};
use data_encoding::BASE64;
use pigeon::{
    Arch, Client, assets, config,
    image::disk,
    machine::{Disk, Machine, Nic, Spec, Start},
    snapshot, vsock,
};
use serde_json::{Value, json};

use super::{
    Held, Options, Owner, Scratch, detach,
    document::{DiskFile, Plan},
    owner, sweep,
};
use crate::{
    output::say,
    snapshot::{Manifest, RecordedNic, Restorable, files},
    vms::{self, Claim},
};

/// Random bytes for a clone's kernel: twice the state of its generator.
const ENTROPY: usize = 64;
/// How long a clone may take to respond.
const UP: Duration = Duration::from_secs(30);

/// Differences from the snapshotted VM.
const LIMITS: &str = "\
Each VM gets a name, which is its host name, the time, random numbers, and copies of the disks that it
can write; `pigeon rm` removes them. Its workload then goes on where it was, and gets the
configuration's RestoreSignal.

Ports published for the original are not published again: use `pigeon forward`. With --net, TCP
connections to the outside are lost. A tap device is one VM's: give each its own by --tap.";

/// VMs from a snapshot of `pigeon snapshot`, in the background.
#[derive(Args)]
#[command(after_help = LIMITS)]
pub struct Restore {
    /// The snapshot's directory
    dir: PathBuf,
    /// How many VMs
    #[arg(long, value_name = "N", default_value_t = 1)]
    count: u32,
    /// The VM's name [default: derived from the snapshot's]
    #[arg(long, conflicts_with = "count")]
    name: Option<String>,
    /// A configuration in place of the snapshot's
    #[arg(short, long, value_name = "RUN.JSON")]
    config: Option<PathBuf>,
    /// A tap device in place of the snapshot's (Firecracker)
    #[arg(long, value_name = "DEVICE", conflicts_with = "count")]
    tap: Option<String>,
}

impl Restore {
    pub fn run(&self) -> Result<u8> {
        let manifest = Manifest::read(&self.dir)?;
        ensure!(self.count > 0, "--count is at least 1");
        if !detach::is_detached() {
            // Each process runs one VM.
            for _ in 0..self.count {
                match detach::start(env::args_os().skip(1))? {
                    Ok(name) => say!("{name}")?,
                    Err(code) => return Ok(code),
                }
            }
            return Ok(0);
        }
        let claim = Arc::new(vms::claim(self.name.as_deref(), &manifest.name)?);
        let run = self.run_clone(&manifest, &claim);
        if run.is_err() {
            claim.give_up();
        }
        run
    }

    /// Restores a VM until its workload continues, and runs it.
    fn run_clone(&self, manifest: &Manifest, claim: &Arc<Claim>) -> Result<u8> {
        let record = claim.record();
        let image = manifest.image.as_os_str();
        let words = ["pigeon".as_ref(), "--detach".as_ref(), "--".as_ref(), image];
        // The options of a detached VM.
        let mut options = Options::try_parse_from(words)?.run;
        let arch = Arch::from_str(&manifest.arch, false).ok();
        options.guest.arch = arch.context("the snapshot's architecture is not known")?;
        let reservation = vsock::Reservation::new(&record.uds)?;
        sweep();
        let scratch = Scratch::new()?;
        let signals = owner::signals()?;
        let plan = Plan {
            document: self.document(manifest, &record.name)?,
            disks: own_disks(manifest, &claim.dir)?,
            ports: vec![],
            session: None,
            unkept: vec![],
        };
        let held = Held::new(&plan.disks)?;
        let spec = Spec {
            // The hypervisor's working directory may be another one.
            start: Start::Restore(files(&fs::canonicalize(&self.dir)?)),
            vsock: Some(record.uds.clone()),
            ..self.spec(manifest, &plan.disks, scratch.path(), options.guest.arch)?
        };
        let restorable = Restorable::of(&spec)?;
        let machine = start(&spec, &manifest.hypervisor)?;
        let owner = Owner {
            _reservation: reservation,
            run: &options,
            claim: claim.clone(),
            plan,
            uds: record.uds,
        };
        let events = owner.listen_for_events();
        adopt(&owner.uds, &manifest.token, &owner.plan.document)?;
        claim.update(|record| {
            // Its own disks are kept until `pigeon rm`.
            record.auto &= manifest.disks.iter().all(|disk| disk.read_only);
            record.image = manifest.image.clone();
            record.arch = manifest.arch.clone();
            record.hypervisor = manifest.hypervisor.clone();
            (record.memory_mib, record.cpus) = (manifest.memory_mib, manifest.cpus);
            record.config = owner.plan.document.clone();
            record.restorable = Some(restorable);
        })?;
        detach::report(&record.name, &claim.dir)?;
        owner.watch(machine, signals, events, held)
    }

    /// The clone's configuration.
    fn document(&self, manifest: &Manifest, name: &str) -> Result<Value> {
        let Some(path) = &self.config else {
            return Ok(renamed(manifest.config.clone(), name));
        };
        let shown = path.display();
        let text = fs::read(path).with_context(|| format!("unable to read {shown}"))?;
        let document = serde_json::from_slice(&text);
        let document = document.with_context(|| format!("{shown} is not JSON"))?;
        config::check(&document).with_context(|| shown.to_string())?;
        Ok(document)
    }

    /// The specification of the snapshot's VM.
    fn spec(
        &self,
        manifest: &Manifest,
        disks: &[DiskFile],
        dir: &Path,
        arch: Arch,
    ) -> Result<Spec> {
        let disks = disks.iter().map(|disk| match disk.read_only {
            true => Disk::file(&disk.path).read_only(),
            false => Disk::file(&disk.path),
        });
        // A clone does not boot, so it needs no initrd.
        let nothing = Path::new("");
        Ok(Spec {
            memory_mib: manifest.memory_mib,
            cpus: manifest.cpus,
            disks: disks.collect(),
            nic: match (&manifest.nic, &self.tap) {
                (RecordedNic::Tap(_), Some(tap)) | (RecordedNic::Tap(tap), None) => {
                    Nic::Tap(tap.clone())
                }
                (_, Some(_)) => bail!("the snapshot's VM has no tap device"),
                (RecordedNic::None, None) => Nic::None,
                (RecordedNic::User, None) => Nic::User(vec![]),
            },
            ..Spec::new(dir, arch, &manifest.kernel, nothing)
        })
    }
}

/// The disks of a clone: copies, in `dir`, of the writable ones.
fn own_disks(manifest: &Manifest, dir: &Path) -> Result<Vec<DiskFile>> {
    let mut disks = vec![];
    for (number, disk) in manifest.disks.iter().enumerate() {
        let mut path = disk.path.clone();
        if !disk.read_only {
            path = dir.join(format!("disk{number}"));
            disk::copy(&disk.path, &path)
                .with_context(|| format!("unable to copy {}", disk.path.display()))?;
        }
        disks.push(DiskFile {
            path,
            read_only: disk.read_only,
            size: None,
        });
    }
    Ok(disks)
}

fn start(spec: &Spec, hypervisor: &str) -> Result<Box<dyn Machine>> {
    if hypervisor == "QEMU" {
        return spec.start_qemu();
    }
    let program = assets::firecracker().context(
        "the snapshot is Firecracker's, which is not available: it needs /dev/kvm, and to be in \
         PATH or named by FIRECRACKER",
    )?;
    spec.start_firecracker(&program)
}

/// Changes the host name in a configuration, and in its hosts.
fn renamed(mut document: Value, name: &str) -> Value {
    let old = document["Hostname"].take();
    for host in document["EtcHosts"].as_array_mut().into_iter().flatten() {
        if host["Host"] == old {
            host["Host"] = json!(name);
        }
    }
    document["Hostname"] = json!(name);
    document
}

/// Gives the clone behind `uds` its identity, and thaws its workload.
fn adopt(uds: &Path, token: &str, document: &Value) -> Result<()> {
    let mut entropy = [0; ENTROPY];
    File::open("/dev/urandom")?.read_exact(&mut entropy)?;
    let client = Client::connect_within(uds, UP)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let restored = client.restore(&snapshot::Restore {
        token: Some(token.into()),
        unix_us: Some(now.as_micros().try_into()?),
        entropy: Some(BASE64.encode(&entropy)),
        config: Some(document.clone()),
    })?;
    ensure!(
        restored.reseeded,
        "the guest's random numbers are still those of the snapshot"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clones_hosts_file_has_its_own_name() {
        let document = json!({
            "Hostname": "app",
            "EtcHosts": [{"Host": "db", "IP": "10.0.0.9"}, {"Host": "app", "IP": "127.0.1.1"}],
        });
        let expected = json!({
            "Hostname": "app-2",
            "EtcHosts": [{"Host": "db", "IP": "10.0.0.9"}, {"Host": "app-2", "IP": "127.0.1.1"}],
        });
        assert_eq!(renamed(document, "app-2"), expected);
    }
}
