//! Kernel parameters: words of the kernel command line that the kernel does not know reach init as
//! environment variables (Documentation/admin-guide/kernel-parameters).

use super::cgroups::Layout;
use super::config_source::{self, Source};
use crate::output_log::{Destination, OutputLog};
use crate::supervisor::LINGER;
use crate::sys::Words;
use proto::bytes::split_once;
use proto::decimal;
use proto::message;
use proto::message::{Level, Message, ToLossy};

/// Without the API's call for it no output is kept.
const DEFAULT_OUTPUT: Destination = match cfg!(feature = "logs") {
    true => Destination::Both,
    false => Destination::Console,
};

/// How much output is kept for the API, in KiB, unless the kernel command line says otherwise.
const LOG_KIB: u64 = 64;

/// Most that can be kept, in KiB.
const MAX_LOG_KIB: u64 = 64 << 10;

/// The kernel parameters.
pub struct KernelParams {
    /// `INIT_LOG_LEVEL=debug|info|warn`: the lowest level that is logged. There is nothing to say at
    /// `debug` that is not said at `info`.
    pub level: Level,
    /// `PIGEON_CONFIG=auto|mmds|file`: where the configuration comes from.
    pub source: Source,
    /// `PIGEON_MMDS_TIMEOUT_MS`: how long MMDS is asked, in milliseconds.
    pub mmds_timeout: u64,
    /// `PIGEON_CGROUPS=hybrid|unified|none`: which hierarchies of control groups there are.
    pub cgroups: Layout,
    /// `PIGEON_EXIT_LINGER_MS`: how long the exit code can be read, in milliseconds.
    pub linger: u64,
    /// `PIGEON_OUTPUT=both|console|log`: where the workload's output goes.
    pub output: Destination,
    /// `PIGEON_LOG_KIB`: how much output is kept for the API, in KiB.
    pub log_kib: u64,
    /// A value that was none of the allowed ones.
    pub refused: Option<Message>,
}

impl KernelParams {
    /// Reads them.
    pub fn read(words: Words) -> Self {
        let mut params = Self {
            level: Level::Info,
            source: Source::Auto,
            mmds_timeout: config_source::TIMEOUT,
            cgroups: Layout::Hybrid,
            linger: LINGER,
            output: DEFAULT_OUTPUT,
            log_kib: LOG_KIB,
            refused: None,
        };
        for word in words.iter() {
            let Some((name, value)) = split_once(word.to_bytes(), b'=') else {
                continue;
            };
            let allowed = match name {
                b"INIT_LOG_LEVEL" => params.set_level(value),
                b"PIGEON_CONFIG" => params.set_source(value),
                b"PIGEON_CGROUPS" => params.set_cgroups(value),
                b"PIGEON_MMDS_TIMEOUT_MS" => set_number(&mut params.mmds_timeout, value),
                #[cfg(feature = "logs")]
                b"PIGEON_OUTPUT" => params.set_output(value),
                #[cfg(feature = "logs")]
                b"PIGEON_LOG_KIB" => set_number(&mut params.log_kib, value),
                b"PIGEON_EXIT_LINGER_MS" => set_number(&mut params.linger, value),
                _ => continue,
            };
            if let Err(allowed) = allowed {
                params.refused = Some(message!(
                    "kernel parameter {}={}: must be {allowed}",
                    name.lossy(),
                    value.lossy()
                ));
            }
        }
        params
    }

    /// The log that they ask for.
    pub fn output_log(&self) -> OutputLog {
        match self.output {
            Destination::Console => OutputLog::none(),
            _ => OutputLog::new((self.log_kib.min(MAX_LOG_KIB) << 10) as usize),
        }
    }

    fn set_level(&mut self, value: &[u8]) -> Result<(), &'static str> {
        self.level = match value {
            b"debug" | b"info" => Level::Info,
            b"warn" => Level::Warn,
            _ => return Err("debug, info or warn"),
        };
        Ok(())
    }

    #[cfg(feature = "logs")]
    fn set_output(&mut self, value: &[u8]) -> Result<(), &'static str> {
        self.output = match value {
            b"both" => Destination::Both,
            b"console" => Destination::Console,
            b"log" => Destination::Log,
            _ => return Err("both, console or log"),
        };
        Ok(())
    }

    fn set_source(&mut self, value: &[u8]) -> Result<(), &'static str> {
        self.source = match value {
            b"auto" => Source::Auto,
            b"mmds" => Source::Mmds,
            b"file" => Source::File,
            _ => return Err("auto, mmds or file"),
        };
        Ok(())
    }

    fn set_cgroups(&mut self, value: &[u8]) -> Result<(), &'static str> {
        self.cgroups = match value {
            b"hybrid" => Layout::Hybrid,
            b"unified" => Layout::Unified,
            b"none" => Layout::None,
            _ => return Err("hybrid, unified or none"),
        };
        Ok(())
    }
}

fn set_number(number: &mut u64, value: &[u8]) -> Result<(), &'static str> {
    *number = decimal::parse(value).ok_or("a whole number")?;
    Ok(())
}
