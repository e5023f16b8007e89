//! Which VM a command is for.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use pigeon::{Client, Error};

use crate::vms::{self, Vm};

/// Which VM.
#[derive(Args)]
pub struct Target {
    /// The Unix socket of the VM's vsock
    #[arg(
        long,
        value_name = "SOCKET",
        env = "PIGEON_UDS",
        hide_env_values = true
    )]
    uds: Option<PathBuf>,
    /// A VM of `pigeon run`; optional if only one is running
    #[arg(long, value_name = "NAME", conflicts_with = "uds")]
    vm: Option<String>,
    /// How long to wait for a VM that is still booting
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 30.0,
        alias = "patience"
    )]
    boot_timeout: f64,
}

impl Target {
    fn timeout(&self) -> Result<Duration> {
        Duration::try_from_secs_f64(self.boot_timeout).context("bad --boot-timeout")
    }

    /// The socket given as an option.
    pub fn uds(&self) -> Option<&std::path::Path> {
        self.uds.as_deref()
    }

    /// Whether an option names a VM.
    pub fn is_given(&self) -> bool {
        self.uds.is_some() || self.vm.is_some()
    }

    /// The selected VM of `pigeon run`; None if a socket is given.
    pub fn vm(&self, name: Option<&str>) -> Result<Option<Vm>> {
        ensure!(
            name.is_none() || !self.is_given(),
            "the VM is given twice: by name and by option"
        );
        Ok(match (name.or(self.vm.as_deref()), &self.uds) {
            (Some(name), _) => Some(vms::find(name)?),
            (None, Some(_)) => None,
            (None, None) => Some(vms::only()?),
        })
    }

    /// The API of the VM; it is called `name` if no option selects another one.
    pub fn client(&self, name: Option<&str>) -> Result<Client> {
        ensure!(
            name.is_none() || !self.is_given(),
            "the VM is given twice: by name and by option"
        );
        let timeout = self.timeout()?;
        let vm = match (&self.uds, name.or(self.vm.as_deref())) {
            (Some(uds), _) => {
                // A socket without a listener will not get one again: the VM has ended.
                let client = Client::connect(uds).or_else(|error| match error {
                    Error::NotListening { .. } => Client::connect_within(uds, timeout),
                    error => Err(error),
                });
                return Ok(client?);
            }
            (None, Some(name)) => vms::find_running(name)?,
            (None, None) => vms::only_running()?,
        };
        let begin = Instant::now();
        loop {
            let connected = Client::connect_within(&vm.record.uds, Duration::from_millis(500));
            match connected {
                Err(error) if error.is_not_yet() && begin.elapsed() < timeout => {
                    // Fails if it has ended meanwhile.
                    vms::find_running(&vm.record.name)?;
                }
                client => return Ok(client?),
            }
        }
    }
}
