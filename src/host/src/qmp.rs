//! QEMU's machine protocol (QEMU docs/interop/qmp-spec.rst).

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

/// A connection in command mode.
pub struct Qmp {
    stream: BufReader<UnixStream>,
    events: Vec<Value>,
}

impl Qmp {
    /// Reads the greeting and enters command mode.
    pub fn new(stream: UnixStream) -> Result<Qmp> {
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        let mut qmp = Qmp {
            stream: BufReader::new(stream),
            events: vec![],
        };
        qmp.next()?.context("QEMU ended before its greeting")?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command; events received before its response are kept.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let message = json!({"execute": command, "arguments": arguments});
        writeln!(self.stream.get_mut(), "{message}").context("unable to talk to QEMU")?;
        loop {
            let mut message = self.next()?.context("QEMU has ended")?;
            ensure!(
                message.get("error").is_none(),
                "{command}: {}",
                message["error"]["desc"]
            );
            match message.get_mut("return") {
                Some(value) => return Ok(value.take()),
                None => self.events.push(message),
            }
        }
    }

    /// Waits for an event with this name and device, and removes it from the kept ones.
    pub fn device_event(&mut self, name: &str, device: &str) -> Result<()> {
        loop {
            let wanted =
                |event: &Value| event["event"] == name && event["data"]["device"] == device;
            if let Some(at) = self.events.iter().position(wanted) {
                self.events.remove(at);
                return Ok(());
            }
            let event = self.next()?.context("QEMU has ended")?;
            self.events.push(event);
        }
    }

    /// All events until QEMU exits.
    pub fn last_events(&mut self) -> Result<&[Value]> {
        while let Some(event) = self.next()? {
            self.events.push(event);
        }
        Ok(&self.events)
    }

    fn next(&mut self) -> Result<Option<Value>> {
        let mut line = String::new();
        match self.stream.read_line(&mut line) {
            Ok(0) => Ok(None),
            Ok(_) => Ok(Some(serde_json::from_str(&line)?)),
            // QEMU exited with unread data.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => Ok(None),
            Err(error) => bail!("unable to read from QEMU: {error}"),
        }
    }
}
