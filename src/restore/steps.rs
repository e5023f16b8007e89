//! The steps of a restore, run in a helper: disks and MMDS can block.

use crate::api::{CallError, read_body};
use crate::boot::config_source::{self, FetchError, Source};
use crate::boot::{environment, etc_files, network};
use crate::context;
use crate::context::{AppliedConfig, Interfaces, Snapshot};
use crate::error;
use crate::error::Result;
use crate::page::PageBox;
use crate::process::credentials;
use crate::process::freezer::Freezer;
use crate::process::helper::HelperLog;
use crate::sys::{self, files, random};
use crate::volumes;
use core::ffi::CStr;
use core::fmt::Write;
use core::sync::atomic::{AtomicU8, Ordering};
use proto::bodies::RestoreRequest;
use proto::config::{Config, MAX_DOCUMENT_SIZE, MEMBERS};
use proto::digest::decode_base64;
use proto::environment::Environment;
use proto::http::Status;
use proto::message;
use proto::message::Message;
use proto::users::Identity;
use rustix::fd::OwnedFd;
use rustix::fs::OFlags;
use rustix::io::Errno;

/// By how much the clock may be off, in microseconds.
const CLOCK_TOLERANCE: i64 = 10_000;

/// The parameters of a restore.
pub struct Job<'a> {
    /// The call's body; empty without a call.
    pub body: &'a mut [u8],
    /// When the call arrived, in microseconds of the monotonic clock; `None` if the kernel triggered it.
    pub call_received_us: Option<u64>,
    /// When the restore began, likewise.
    pub started_us: u64,
    /// The token of the hold, or of the last one.
    pub token: Option<&'a str>,
    /// The workload is frozen.
    pub is_held: bool,
    /// The previous restore was killed while it waited for MMDS.
    pub was_preempted: bool,
    /// The kernel has reseeded its random numbers already.
    pub is_reseeded: bool,
    /// 1 plus the number of restores of this VM.
    pub generation: u64,
    /// Whether MMDS is polled.
    pub source: Source,
    /// How long, in milliseconds.
    pub mmds_timeout: u64,
    /// Buffer for files.
    pub scratch: &'a mut [u8],
}

/// A step of a restore, as described in the README.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Step {
    Call,
    Entropy,
    Clock,
    Config,
    Hostname,
    Etc,
    Network,
    Mounts,
    Environment,
    Generation,
    Thaw,
}

impl Step {
    const ALL: [(Self, &'static str); 11] = [
        (Self::Call, "call"),
        (Self::Entropy, "entropy"),
        (Self::Clock, "clock"),
        (Self::Config, "config"),
        (Self::Hostname, "hostname"),
        (Self::Etc, "etc"),
        (Self::Network, "network"),
        (Self::Mounts, "mounts"),
        (Self::Environment, "environment"),
        (Self::Generation, "generation"),
        (Self::Thaw, "thaw"),
    ];
}

/// The helper's current step, which PID 1 may read at any time.
#[derive(Default)]
pub struct CurrentStep(AtomicU8);

impl CurrentStep {
    /// Starts the next step.
    pub fn set(&self, step: Step) {
        self.0.store(step as u8, Ordering::Release);
    }

    /// Whether the helper is in this step.
    pub fn is(&self, step: Step) -> bool {
        self.0.load(Ordering::Acquire) == step as u8
    }

    /// Whether the step waits for a disk; then the report is not being written.
    pub fn waits_for_disk(&self) -> bool {
        self.is(Step::Etc) || self.is(Step::Mounts)
    }

    /// The step's name.
    pub fn name(&self) -> &'static str {
        let mut steps = Step::ALL.iter();
        steps
            .find(|(step, _)| self.is(*step))
            .map_or("", |(_, name)| name)
    }
}

/// What a restore reports to PID 1, in shared memory.
pub struct Report {
    /// The current step.
    pub step: CurrentStep,
    /// The configuration in force; after a failure, the one that may be partly in force.
    pub applied: AppliedConfig,
    /// The interfaces that have addresses, or, after a failure, may have.
    pub interfaces: Interfaces,
    /// Later commands get `environment`.
    pub has_environment: bool,
    /// The new environment, also in shared memory.
    pub environment: PageBox<Environment>,
    /// The document sets HOME in it.
    pub sets_home: bool,
}

impl Report {
    /// The report of a restore that has not changed anything yet.
    pub fn new(before: &Snapshot, environment: PageBox<Environment>) -> Self {
        Self {
            step: CurrentStep::default(),
            applied: before.applied,
            interfaces: before.interfaces.clone(),
            has_environment: false,
            environment,
            sets_home: false,
        }
    }
}

/// Runs all steps; thawing is the last one. A restore that fails can be repeated. `arena` holds the
/// strings of the call, `memory` a document from MMDS and its strings.
pub fn run(
    job: &mut Job,
    arena: &mut [u8],
    memory: &mut [u8],
    freezer: Option<&Freezer>,
    report: &mut Report,
    log: &HelperLog,
) -> Result<(), CallError> {
    let random = random::open().map_err(context!("open /dev/urandom"))?;
    // Mixes in the body without credit: its time and names are this VM's own.
    files::write(&random, job.body).map_err(context!("mix the call into the random numbers"))?;
    let mut config = config_source::empty()?;
    let mut request = RestoreRequest::new(&mut config);
    if job.call_received_us.is_some() {
        decode_call(job, arena, &mut request)?;
    }

    report.step.set(Step::Entropy);
    let is_reseeded = add_entropy(&random, request.entropy)? || job.is_reseeded;

    report.step.set(Step::Clock);
    let received_us = job.call_received_us.unwrap_or(job.started_us);
    let clock_step = set_clock(request.unix_us, received_us)?;

    report.step.set(Step::Config);
    if job.was_preempted {
        config_source::remove_stale_mmds_route()?;
    }
    let (document, strings) = memory
        .split_at_mut_checked(MAX_DOCUMENT_SIZE)
        .unwrap_or_default();
    let fetched = match request.has_config {
        true => None,
        false => fetch(job, document, strings, report, log)?,
    };
    let (source, config) = match &fetched {
        _ if request.has_config => ("call", Some(&*request.config)),
        Some(config) => ("mmds", Some(&**config)),
        None => ("none", None),
    };
    let mut changed = Message::new();
    if let Some(config) = config {
        apply(config, job, report, log, &mut changed)?;
        report.applied.is_from_mmds = !request.has_config;
    }

    report.step.set(Step::Generation);
    if let Err(why) = write_generation(job.generation) {
        log.warn(&why);
    }

    report.step.set(Step::Thaw);
    if let Some(freezer) = freezer {
        freezer.thaw()?;
    }
    log.result(&message!(
        "{{\"ok\":true,\"generation\":{},\"reseeded\":{is_reseeded},\"clock_step_ms\":{},\"config\":\"{source}\",\"changed\":[{changed}],\"elapsed_us\":{}}}",
        job.generation,
        clock_step / 1000,
        sys::microseconds().saturating_sub(job.started_us)
    ));
    Ok(())
}

/// Decodes the body of the call, and compares its token.
fn decode_call<'a>(
    job: &mut Job,
    arena: &'a mut [u8],
    request: &mut RestoreRequest<'_, 'a>,
) -> Result<(), CallError> {
    read_body(job.body, arena, request)?;
    let needs_token = job.is_held || !request.token.is_empty();
    if needs_token && job.token != Some(request.token) {
        let error = error!("the workload is not held under this token");
        return Err(CallError::new(Status::Conflict, error));
    }
    Ok(())
}

/// Fetches the document from MMDS, as at boot. Returns `None` if the current one stays in force: MMDS is
/// not used, or has no document and none is required.
fn fetch<'a>(
    job: &Job,
    document: &mut [u8],
    strings: &'a mut [u8],
    report: &mut Report,
    log: &HelperLog,
) -> Result<Option<PageBox<Config<'a>>>> {
    let Some(eth0) = config_source::mmds_interface(job.source) else {
        return Ok(None);
    };
    match config_source::fetch(eth0, job.mmds_timeout, document, strings) {
        Ok(length) => {
            let document = document.get_mut(..length).unwrap_or(&mut []);
            config_source::decode(document, strings).map(Some)
        }
        Err(FetchError::Invalid(error)) => Err(error!("MMDS: {error}")),
        Err(FetchError::NoDocument(error))
            if job.call_received_us.is_some() && report.applied.is_from_mmds =>
        {
            Err(error!("MMDS: {error}"))
        }
        Err(FetchError::NoDocument(error)) => {
            log.warn(&format_args!(
                "restore: MMDS: {error}; the old configuration stays"
            ));
            Ok(None)
        }
    }
}

/// A digest of each member of a document.
type Digests = [u64; MEMBERS.len()];

/// The changes that decide whether a step has anything to do.
#[derive(Default)]
struct Changes {
    environment: bool,
    hosts: bool,
    addresses: bool,
}

/// Compares a document with the configuration in force. Appends the names of the members that differ to
/// `changed`, as entries of a JSON list.
fn compare(digests: &Digests, in_force: &mut Digests, changed: &mut Message) -> Changes {
    let mut changes = Changes::default();
    for (name, (new, old)) in MEMBERS.iter().zip(digests.iter().zip(in_force)) {
        if new == old {
            continue;
        }
        let separator = if changed.is_empty() { "" } else { "," };
        // Writing to a message never fails.
        let _ = write!(changed, "{separator}\"{name}\"");
        match *name {
            "ImageConfig" | "ExtraEnv" => changes.environment = true,
            // Until they are applied, neither the new nor the old ones count as in force.
            "EtcHosts" => (changes.hosts, *old) = (true, !new),
            "IPConfigs" => (changes.addresses, *old) = (true, !new),
            _ => {}
        }
    }
    changes
}

/// Applies a document, except for what only a boot can change.
fn apply(
    config: &Config,
    job: &mut Job,
    report: &mut Report,
    log: &HelperLog,
    changed: &mut Message,
) -> Result {
    config.check()?;
    let digests = config.digests();
    let changes = compare(&digests, &mut report.applied.digests, changed);

    report.step.set(Step::Hostname);
    etc_files::set_host_name(config)?;

    report.step.set(Step::Etc);
    if changes.hosts && config.etc_hosts.is_empty() {
        etc_files::write_hosts(config, job.scratch, log)?;
    }
    etc_files::write(config, job.scratch, log)?;

    report.step.set(Step::Network);
    network::replace(config, changes.addresses, &mut report.interfaces)?;

    report.step.set(Step::Mounts);
    let mut identity = Identity::default();
    if changes.environment || !config.mounts.is_empty() {
        credentials::resolve(config.user(), job.scratch, &mut identity)?;
    }
    volumes::mount_new(config, (identity.uid, identity.gid), log)?;

    report.step.set(Step::Environment);
    if changes.environment {
        report.has_environment = true;
        report.sets_home = environment::fill(&mut report.environment, config, &identity.home)?;
    }
    report.applied.digests = digests;
    report.applied.restore_signal = config.restore_signal;
    Ok(())
}

/// Reseeds the kernel's random numbers from the call's entropy, if any, and from what the kernel has
/// collected. Returns whether the call had any.
fn add_entropy(device: &OwnedFd, base64: &str) -> Result<bool> {
    let mut piece = [0; random::PIECE];
    let mut filled = 0;
    let mut added = Ok(());
    let mut add = |bytes: &[u8]| {
        for byte in bytes {
            if let Some(slot) = piece.get_mut(filled) {
                *slot = *byte;
            }
            filled += 1;
        }
        // Pieces of three bytes, except the last, fill the buffer exactly.
        if filled == random::PIECE || bytes.is_empty() && filled > 0 {
            added = added.and_then(|()| random::add(device, piece, filled));
            filled = 0;
        }
    };
    if !decode_base64(base64, &mut add) {
        return Err(error!("entropy: not base64"));
    }
    add(b"");
    added.map_err(context!("add random numbers"))?;
    random::reseed(device).map_err(context!("make random numbers new"))?;
    Ok(!base64.is_empty())
}

/// Sets the clock to the host's time, or else to a clock device's, if it is off. Returns the step in
/// microseconds. `received_us`: the monotonic time at which the host's time was received.
fn set_clock(host: Option<u64>, received_us: u64) -> Result<i64> {
    let target = match host {
        Some(time) => time.saturating_add(sys::microseconds().saturating_sub(received_us)) as i64,
        None => {
            let device = files::open(c"/dev/ptp0", OFlags::RDONLY);
            match device.and_then(|device| sys::device_time(&device)) {
                Ok(time) => time,
                // There is no such device, or the hypervisor does not support it.
                Err(_) => return Ok(0),
            }
        }
    };
    let current = sys::real_time().map_err(context!("read the clock"))?;
    let step = target.saturating_sub(current);
    if (-CLOCK_TOLERANCE..=CLOCK_TOLERANCE).contains(&step) {
        return Ok(0);
    }
    sys::set_real_time(target).map_err(context!("set the clock"))?;
    Ok(step)
}

/// Writes the generation to a file, for programs in the VM.
fn write_generation(generation: u64) -> Result {
    const PATH: &CStr = c"/run/pigeon/generation";
    files::require_directory(c"/run/pigeon", 0o755)?;
    let text = message!("{generation}\n");
    match files::replace(PATH, c"/run/pigeon/.generation", text.as_bytes()) {
        // Any process can fill /run: then the existing file is overwritten in place.
        Err(Errno::NOSPC) => files::open(PATH, OFlags::WRONLY | OFlags::NOFOLLOW)
            .and_then(|file| files::write_whole(&file, text.as_bytes())),
        other => other,
    }
    .map_err(error::on("write", PATH))
}
