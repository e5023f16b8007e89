//! The boot: from the kernel's exec of /init to the running workload.
//!
//! Two operations take long in the kernel, the first mount of a disk and the cgroup mounts, so they run in
//! parallel: the root is mounted in a helper, and the cgroups while the configuration arrives. The same
//! helper does everything else that may block. It exits, and the initramfs is emptied, once the workload
//! runs, so that the workload does not wait for either.

pub mod cgroups;
pub mod cli;
pub mod config_source;
pub mod environment;
pub mod etc_files;
pub mod kernel_params;
pub mod modules;
pub mod mounts;
pub mod network;
#[cfg(feature = "overlay")]
pub mod overlay;
pub mod root;
pub mod run_dir;
pub mod sysctls;

use crate::context;
use crate::error;
use crate::error::Result;
use crate::page::PageBox;
use crate::process::credentials;
use crate::process::helper::{Helper, HelperLog, Rendezvous};
use crate::supervisor::Supervisor;
use crate::sys::files;
use crate::volumes;
use config_source::Source;
use kernel_params::KernelParams;
use mounts::ExpeditedRcu;
use proto::config::{Config, MAX_DOCUMENT_SIZE};
use proto::users::{Identity, MAX_HOME};
use rustix::fd::OwnedFd;
use rustix::fs::OFlags;
use rustix::process::{Resource, Rlimit};

/// Limit of open files (RLIMIT_NOFILE).
const OPEN_FILES: u64 = 10_240;

/// Resources that are released after the boot, even if it failed.
#[derive(Default)]
pub struct DeferredCleanup {
    initramfs: Option<OwnedFd>,
    /// The connection to the helper that mounts disks; closing it lets the helper exit.
    disk_helper: Option<Rendezvous>,
}

/// Runs the boot, after devices and console were set up. `memory` is for the document and its strings.
///
/// Not inlined, so that its stack frame is freed.
#[inline(never)]
pub fn run(
    supervisor: &mut Supervisor,
    params: &KernelParams,
    memory: &mut [u8],
    cleanup: &mut DeferredCleanup,
) -> Result {
    if let Some(invalid) = &params.invalid {
        supervisor.console.warn(invalid);
    }
    mounts::mount_sysfs()?;
    let expedited_rcu = ExpeditedRcu::begin();
    modules::load(&mut supervisor.context.scratch, supervisor.console)?;
    supervisor.events.connect();
    // In a helper while MMDS is polled; otherwise in PID 1 while the root is mounted, which saves a fork.
    let eth0 = config_source::mmds_interface(params.source);
    let cgroup_helper = match eth0.is_some() {
        true => Some(Helper::start(&mut |log| {
            cgroups::mount(params.cgroups, &mut &*log);
            Ok(())
        })?),
        false => None,
    };
    mounts::mount_remaining(supervisor.console)?;
    supervisor.context.pts = files::open(c"/dev/pts", OFlags::PATH).ok();

    let config = load_config(supervisor, params, eth0, memory)?;

    let mut users = PageBox::shared(Users::default).map_err(context!("allocate memory"))?;
    let scratch = &mut supervisor.context.scratch;
    let (disk_helper, rendezvous) = Helper::start_with_rendezvous(&mut |log, rendezvous| {
        prepare_disks(&config, scratch, &mut users, rendezvous, log)
    })?;
    let rendezvous = cleanup.disk_helper.insert(rendezvous);
    let log = &mut *supervisor.console;
    match cgroup_helper {
        Some(helper) => helper.wait(log)?,
        None => cgroups::mount(params.cgroups, log),
    }
    let disk_helper = rendezvous.wait_for_helper(disk_helper, log)?;
    cleanup.initramfs = Some(root::switch()?);
    supervisor.context.rcu_expedited = expedited_rcu.map(ExpeditedRcu::end);

    limit_open_files()?;
    let identity = &users.workload;
    supervisor.console.set_identity(identity.uid, identity.gid);
    supervisor.context.cgroups = cgroups::open(params.cgroups, identity, supervisor.console);
    set_defaults(supervisor, &config, &users)?;

    supervisor.context.workload.stop_signal = config.image_config.stop_signal;
    supervisor.context.workload.owner = (identity.uid, identity.gid);
    supervisor.listen();
    prepare(supervisor, &config, disk_helper, rendezvous)?;
    supervisor.read_signals();
    if supervisor.has_exit() {
        return Ok(());
    }
    #[cfg(feature = "snapshot")]
    if params.restore == kernel_params::RestoreMode::Auto {
        let open = |path| files::open(path, OFlags::RDONLY | OFlags::NONBLOCK).ok();
        supervisor.context.snapshot.kernel_log = open(c"/dev/kmsg");
        supervisor.context.snapshot.vmclock = open(c"/dev/vmclock0");
    }
    supervisor.start_workload(identity.uid, config.separate_stderr, &|command| {
        command.identity = identity.clone();
        command.rlimits = config.rlimits.clone();
        command.set_arguments(&config.arguments())?;
        command.set_directory(config.image_config.working_dir)
    })?;
    // After the start, so that the workload does not wait for it.
    #[cfg(feature = "snapshot")]
    {
        supervisor.context.snapshot.applied.digests = config.digests();
    }
    Ok(())
}

/// Steps that are deferred until the workload runs.
pub fn finish(supervisor: &mut Supervisor, cleanup: DeferredCleanup) {
    cgroups::make_commands(&mut supervisor.context.cgroups);
    if let Some(initramfs) = cleanup.initramfs
        && let Err(errno) = root::empty(initramfs)
    {
        let why = context!("empty the initramfs")(errno);
        supervisor.console.warn(&why);
    }
}

/// Loads and checks the configuration. Its text and its strings are in `memory`.
fn load_config<'m>(
    supervisor: &mut Supervisor,
    params: &KernelParams,
    eth0: Option<u32>,
    memory: &'m mut [u8],
) -> Result<PageBox<Config<'m>>> {
    let (document, strings) = memory
        .split_at_mut_checked(MAX_DOCUMENT_SIZE)
        .unwrap_or_default();
    let loaded = config_source::load(params.source, eth0, params.mmds_timeout, document, strings)?;
    let document = document.get_mut(..loaded.length).unwrap_or(&mut []);
    let (name, origin) = match loaded.source {
        Source::Mmds => ("mmds", "MMDS"),
        _ => ("file", "/pigeon/run.json"),
    };
    let config = config_source::decode_checked(document, strings).map_err(|error| {
        let mut error = error!("configuration from {origin}: {error}");
        if let Some(why) = &loaded.mmds_error {
            error.append(format_args!("; MMDS: {why}"));
        }
        error
    })?;
    supervisor
        .console
        .info(&"configuration loaded", &format_args!(" source={name}"));
    #[cfg(feature = "snapshot")]
    {
        let applied = &mut supervisor.context.snapshot.applied;
        applied.restore_signal = config.restore_signal;
        applied.is_from_mmds = loaded.source == Source::Mmds;
    }
    Ok(config)
}

/// What the helper reads from the root file system's files of users, for PID 1 as well.
#[derive(Default)]
struct Users {
    workload: Identity,
    root_home: heapless::Vec<u8, MAX_HOME>,
}

fn resolve_users(config: &Config, scratch: &mut [u8], users: &mut Users) -> Result {
    credentials::resolve(config.user(), scratch, &mut users.workload)?;
    users.root_home = match config.user() {
        "" | "root" => users.workload.home.clone(),
        _ => {
            let mut root = Identity::default();
            credentials::resolve("root", scratch, &mut root)?;
            root.home
        }
    };
    Ok(())
}

/// In a helper: mounts the root; then, once PID 1 has switched to it, mounts volumes, writes the /etc files
/// and sets sysctls, while PID 1 serves the API.
fn prepare_disks(
    config: &Config,
    scratch: &mut [u8],
    users: &mut Users,
    rendezvous: &Rendezvous,
    log: &HelperLog,
) -> Result {
    root::mount(config, scratch, log)?;
    resolve_users(config, scratch, users)?;
    if !rendezvous.arrive_and_wait() {
        // Nothing more is configured, or the boot has failed.
        return Ok(());
    }
    let owner = (users.workload.uid, users.workload.gid);
    volumes::mount_all(config, owner, log)?;
    etc_files::write(config, scratch, log)?;
    // After the network.
    if rendezvous.wait_for_peer() {
        sysctls::set_all(config, log)?;
        // Exiting takes as long as starting the workload, so it waits for that.
        rendezvous.arrive_and_wait();
    }
    Ok(())
}

/// Sets host name, network and default sysctls, in parallel with the helper.
fn prepare(
    supervisor: &mut Supervisor,
    config: &Config,
    helper: Helper,
    rendezvous: &Rendezvous,
) -> Result {
    let has_more = !config.mounts.is_empty()
        || etc_files::are_configured(config)
        || sysctls::are_configured(config);
    if has_more {
        rendezvous.release_peer();
        supervisor.begin_setup(helper);
    }
    etc_files::set_host_name(config)?;
    let interfaces = network::configure(config, supervisor.console)?;
    supervisor.context.set_interfaces(interfaces);
    sysctls::set_defaults(supervisor.console);
    if has_more {
        // Configured sysctls may belong to interfaces, which are up now.
        rendezvous.release_peer();
        supervisor.finish_setup(rendezvous);
    }
    Ok(())
}

/// Sets the workload's environment and directory, which commands inherit.
fn set_defaults(supervisor: &mut Supervisor, config: &Config, users: &Users) -> Result {
    let defaults = &mut *supervisor.context.defaults;
    let home = &users.workload.home;
    defaults.sets_home = environment::fill(&mut defaults.environment, config, home)?;
    let directory = config.image_config.working_dir.to_bytes_with_nul();
    // The document was checked: the path fits.
    let _fits = defaults.working_dir.extend_from_slice(directory);
    defaults.root_home = users.root_home.clone();
    defaults.rlimits = config.rlimits.clone();
    Ok(())
}

fn limit_open_files() -> Result {
    let limit = Rlimit {
        current: Some(OPEN_FILES),
        maximum: Some(OPEN_FILES),
    };
    rustix::process::setrlimit(Resource::Nofile, limit)
        .map_err(context!("set the limit of open files"))
}
