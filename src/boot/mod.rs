//! What happens once: from the kernel's exec of /init to the running workload.
//!
//! The kernel waits long in two places, the first mount of a disk and the cgroup mounts: they are
//! made side by side, the root's in a helper, and the cgroups' beside the configuration's arrival.

pub mod check;
pub mod config_source;
pub mod kernel_params;
pub mod modules;
pub mod mounts;
pub mod network;
pub mod root;
pub mod volumes;

use crate::context;
use crate::error::Result;
use crate::process::exec::{self, Command};
use crate::process::helper::Helper;
use crate::supervisor::Supervisor;
use crate::sys;
use config_source::Source;
use kernel_params::KernelParams;
use proto::config::{Config, DOCUMENT};
use proto::json::Spans;
use proto::message;
use proto::users::Identity;
use rustix::process::{Resource, Rlimit};

/// Open files a process may have.
const OPEN_FILES: u64 = 10_240;

/// Boots: devices and console are there already.
pub fn run(
    supervisor: &mut Supervisor,
    params: &KernelParams,
    document: &mut [u8; DOCUMENT],
) -> Result {
    if let Some(refused) = &params.refused {
        supervisor.console.warn(refused.clone());
    }
    mounts::sysfs()?;
    let expedited = mounts::ExpeditedRcu::on();
    modules::load(supervisor.context.scratch, &mut |warning| {
        supervisor.console.warn(warning)
    })?;
    // Beside an answer from the network in a helper; beside the root mount alone here, a fork less.
    let fetches = params.source != Source::File && network::eth0_index().is_some();
    let cgroups = match fetches {
        true => Some(Helper::start(&mut |log| {
            mounts::cgroups(&mut |warning| log.warn(warning))
        })?),
        false => None,
    };
    mounts::mount_remaining(&mut |warning| supervisor.console.warn(warning))?;

    let mut spans = Spans::default();
    let source = config_source::load(params.source, params.mmds_timeout, document, &mut spans)?;
    let config = Config::new(document, &spans);
    config
        .check()
        .map_err(|error| message!("configuration: {error}"))?;
    supervisor.console.info(
        message!("configuration loaded"),
        message!(" source={source}"),
    );

    let device = sys::c_str(config.root_device().bytes_with_nul());
    let root = Helper::start(&mut |log| root::mount(device, supervisor.context.scratch, log))?;
    let warn = &mut |warning| supervisor.console.warn(warning);
    match cgroups {
        Some(cgroups) => cgroups.wait(warn)?,
        None => mounts::cgroups(warn)?,
    }
    root.wait(warn)?;
    root::switch(warn)?;
    drop(expedited);

    limit_open_files()?;
    let mut identity = Identity::default();
    exec::resolve(
        config.user().bytes(),
        supervisor.context.scratch,
        &mut identity,
    )?;
    supervisor.console.set_identity(identity.uid, identity.gid);
    let environment = &mut *supervisor.context.environment;
    check::fill_environment(environment, &config)?;
    environment.set_default(b"HOME=", &identity.home)?;

    supervisor.listen();
    prepare(supervisor, &config, &identity)?;
    if supervisor.has_ended() {
        return Ok(());
    }
    supervisor.start_workload(&Command {
        argv: config.arguments(),
        identity: &identity,
        directory: config.working_dir(),
    })
}

/// Volumes, names and network: what may wait for a disk runs in a helper, while the API is served.
fn prepare(supervisor: &mut Supervisor, config: &Config, identity: &Identity) -> Result {
    if volumes::may_block(config) {
        let scratch = &mut *supervisor.context.scratch;
        let helper = Helper::start(&mut |log| volumes::disks(config, identity, scratch, log))?;
        supervisor.begin_setup(helper);
    }
    volumes::host_name(config)?;
    network::configure(config, &mut |warning| supervisor.console.warn(warning))?;
    supervisor.finish_setup();
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
