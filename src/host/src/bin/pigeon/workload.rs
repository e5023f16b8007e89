//! Signals to a VM's workload, and stopping it. With -i or -t it is a session, which the init's own calls do
//! not reach: they end the idle workload, and with it the VM.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use pigeon::{
    Arch, Client,
    kill::{Sent, Target},
};

use crate::vms::Record;

/// The name of the workload's session.
pub const SESSION: &str = "pigeon.run";
/// How long a guest may take to send the session a signal.
const SEND: Duration = Duration::from_secs(5);
const KILL: u8 = 9;
const TERM: u8 = 15;

/// Sends a signal to the session's process group. None if there is no session: it has not started, or has
/// ended and its output was read.
fn send(record: &Record, client: &Client, signal: u8) -> Result<Option<Sent>> {
    let client = client.within(SEND);
    let sessions = client.sessions()?;
    let Some(session) = sessions.iter().find(|session| session.id == SESSION) else {
        return Ok(None);
    };
    let Some(pid) = session.pid.filter(|_| session.exit.is_null()) else {
        return Ok(Some(Sent::NoProcess));
    };
    let arch = Arch::from_str(&record.arch, false).ok();
    let arch = arch.context("the VM's architecture is unknown")?;
    Ok(Some(client.kill(arch, Target::Group(pid), signal)?))
}

/// Sends a signal to the workload's process group.
pub fn signal(record: &Record, client: &Client, signal: u8) -> Result<()> {
    if record.session {
        match send(record, client, signal) {
            Ok(Some(Sent::Sent)) => return Ok(()),
            // The signal ends the VM in any case.
            _ if signal == KILL => {}
            Ok(_) => bail!(
                "{} has not started its workload, or has ended it",
                record.name
            ),
            Err(error) => return Err(error),
        }
    }
    Ok(client.signal(signal)?)
}

/// Stops the workload, by default with the configuration's signal, and with SIGKILL after `timeout`. `wait`
/// waits for the VM's end with that timeout, and returns whether it has ended.
pub fn stop(
    record: &Record,
    client: &Client,
    signal: Option<u8>,
    timeout: Duration,
    wait: impl FnOnce(Duration) -> bool,
) -> Result<()> {
    if !record.session {
        return Ok(client.stop(signal, Some(timeout))?);
    }
    let first = signal.unwrap_or_else(|| stop_signal(record));
    match send(record, client, first) {
        Ok(Some(_)) => {
            if !wait(timeout) {
                // Fails if the VM is about to end.
                let _ = self::signal(record, client, KILL);
            }
            Ok(())
        }
        _ => Ok(client.stop(signal, Some(timeout))?),
    }
}

fn stop_signal(record: &Record) -> u8 {
    let signal = &record.config["ImageConfig"]["StopSignal"];
    let number = match signal.as_str() {
        Some(name) => pigeon::signal::number(name),
        None => signal.as_u64().and_then(|number| number.try_into().ok()),
    };
    number.unwrap_or(TERM)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn the_stop_signal_is_the_configurations() {
        let of = |signal: Value| {
            stop_signal(&Record {
                config: json!({"ImageConfig": {"StopSignal": signal}}),
                ..Record::default()
            })
        };
        let signals = [json!("SIGQUIT"), json!("RTMIN+3"), json!(10), Value::Null];
        assert_eq!(signals.map(of), [3, 37, 10, 15]);
    }
}
