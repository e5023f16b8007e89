//! Kernel parameters: parameters unknown to the kernel are passed to init as environment variables
//! (Documentation/admin-guide/kernel-parameters).

use super::cgroups::Layout;
use super::config_source::{self, Source};
use crate::error::Error;
use crate::output_log::{Destination, OutputLog};
use crate::shutdown::budget::LINGER;
use crate::sys::StackStrings;
use proto::bytes::split_once;
use proto::decimal;
use proto::message::{Level, ToLossy};

/// Without the `logs` feature no output is kept.
const DEFAULT_OUTPUT: Destination = match cfg!(feature = "logs") {
    true => Destination::Both,
    false => Destination::Console,
};

/// Default of `PIGEON_LOG_KIB`.
const LOG_KIB: u64 = 64;

/// Maximum value of `PIGEON_LOG_KIB`.
#[cfg(feature = "logs")]
const MAX_LOG_KIB: u64 = 64 << 10;

/// What triggers a restore: `PIGEON_RESTORE`.
#[cfg(feature = "snapshot")]
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum RestoreMode {
    /// The kernel or a call.
    Auto,
    /// Only a call.
    Host,
    /// Nothing; the calls return 501.
    Off,
}

/// The kernel parameters.
pub struct KernelParams {
    /// `INIT_LOG_LEVEL=debug|info|warn`: the lowest level that is logged. `debug` is the same as `info`.
    pub level: Level,
    /// `PIGEON_CONFIG=auto|mmds|file`: where the configuration comes from.
    pub source: Source,
    /// `PIGEON_MMDS_TIMEOUT_MS`: how long MMDS is polled, in milliseconds.
    pub mmds_timeout: u64,
    /// `PIGEON_CGROUPS=hybrid|unified|none`: which cgroup hierarchies are mounted.
    pub cgroups: Layout,
    /// `PIGEON_EXIT_LINGER_MS`: how long the exit code can be read, in milliseconds.
    pub linger: u64,
    /// `PIGEON_OUTPUT=both|console|log`: where the workload's output goes.
    pub output: Destination,
    /// `PIGEON_LOG_KIB`: how much output is kept for the API, in KiB.
    pub log_kib: u64,
    /// `PIGEON_EVENTS_PORT`: the host's vsock port that receives events.
    pub events_port: Option<u32>,
    /// `PIGEON_RESTORE=auto|host|off`: what triggers a restore.
    #[cfg(feature = "snapshot")]
    pub restore: RestoreMode,
    /// A warning that names the parameters with invalid values.
    pub invalid: Option<Error>,
}

impl KernelParams {
    /// Parses the kernel parameters.
    pub fn read(words: StackStrings) -> Self {
        let mut params = Self {
            level: Level::Info,
            source: Source::Auto,
            mmds_timeout: config_source::MMDS_TIMEOUT,
            cgroups: Layout::Hybrid,
            linger: LINGER,
            output: DEFAULT_OUTPUT,
            log_kib: LOG_KIB,
            events_port: None,
            #[cfg(feature = "snapshot")]
            restore: RestoreMode::Auto,
            invalid: None,
        };
        for word in words.iter() {
            let Some((name, value)) = split_once(word.to_bytes(), b'=') else {
                continue;
            };
            // No known name or value is invalid UTF-8.
            let known = |text| core::str::from_utf8(text).unwrap_or_default();
            if let Err(allowed) = params.set(known(name), known(value)) {
                let (name, value) = (name.lossy(), value.lossy());
                let invalid = format_args!("kernel parameter {name}={value}: must be {allowed}");
                match &mut params.invalid {
                    Some(before) => before.append(format_args!("; {invalid}")),
                    None => params.invalid = Some(Error::format(invalid)),
                }
            }
        }
        params
    }

    /// Sets a parameter; unknown names are ignored. The error says which values are allowed.
    fn set(&mut self, name: &str, value: &str) -> Result<(), &'static str> {
        match name {
            "INIT_LOG_LEVEL" => {
                self.level = match value {
                    "debug" | "info" => Level::Info,
                    "warn" => Level::Warn,
                    _ => return Err("debug, info or warn"),
                }
            }
            "PIGEON_CONFIG" => {
                self.source = match value {
                    "auto" => Source::Auto,
                    "mmds" => Source::Mmds,
                    "file" => Source::File,
                    _ => return Err("auto, mmds or file"),
                }
            }
            "PIGEON_CGROUPS" => {
                self.cgroups = match value {
                    "hybrid" => Layout::Hybrid,
                    "unified" => Layout::Unified,
                    "none" => Layout::None,
                    _ => return Err("hybrid, unified or none"),
                }
            }
            "PIGEON_MMDS_TIMEOUT_MS" => self.mmds_timeout = number(value)?,
            #[cfg(feature = "logs")]
            "PIGEON_OUTPUT" => {
                self.output = match value {
                    "both" => Destination::Both,
                    "console" => Destination::Console,
                    "log" => Destination::Log,
                    _ => return Err("both, console or log"),
                }
            }
            #[cfg(feature = "logs")]
            "PIGEON_LOG_KIB" => {
                let size = number(value).ok().filter(|size| *size <= MAX_LOG_KIB);
                self.log_kib = size.ok_or("a whole number up to 65536")?;
            }
            #[cfg(feature = "snapshot")]
            "PIGEON_RESTORE" => {
                self.restore = match value {
                    "auto" => RestoreMode::Auto,
                    "host" => RestoreMode::Host,
                    "off" => RestoreMode::Off,
                    _ => return Err("auto, host or off"),
                }
            }
            "PIGEON_EVENTS_PORT" => {
                self.events_port = Some(decimal::parse(value.as_bytes()).ok_or("a port")?);
            }
            "PIGEON_EXIT_LINGER_MS" => self.linger = number(value)?,
            _ => {}
        }
        Ok(())
    }

    /// The output log that the parameters ask for.
    pub fn output_log(&self) -> OutputLog {
        match self.output {
            Destination::Console => OutputLog::none(),
            _ => OutputLog::new((self.log_kib << 10) as usize),
        }
    }
}

fn number(value: &str) -> Result<u64, &'static str> {
    let number: Option<u32> = decimal::parse(value.as_bytes());
    number.map(u64::from).ok_or("a whole number")
}
