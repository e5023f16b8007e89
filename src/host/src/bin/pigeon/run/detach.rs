//! `pigeon run -d`: runs the same command again as a detached process.

use std::{
    env,
    ffi::OsString,
    fs::{File, OpenOptions},
    io::{self, Read},
    os::{fd::AsFd, unix::process::CommandExt},
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result};
use rustix::stdio::{dup2_stderr, dup2_stdout};

use crate::{FAILED, output::say, vms::MESSAGES};

/// Set in the detached process.
const VARIABLE: &str = "PIGEON_DETACHED";
/// Prefix of the line that reports the VM's name.
const STARTED: &str = "started: ";

/// Whether this is the detached process.
pub fn is_detached() -> bool {
    env::var_os(VARIABLE).is_some()
}

/// Runs pigeon with these arguments, and waits until its VM has started. Returns the name, or the exit code
/// of a failure that was already reported.
pub fn start(arguments: impl IntoIterator<Item = OsString>) -> Result<Result<String, u8>> {
    let (mut reader, writer) = io::pipe()?;
    let mut command = Command::new("/proc/self/exe");
    command
        .args(arguments)
        .env(VARIABLE, "1")
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer);
    // SAFETY: setsid(2) is async-signal-safe, and the closure accesses no memory of this process.
    unsafe {
        command.pre_exec(|| Ok(rustix::process::setsid().map(drop)?));
    }
    let mut child = command
        .spawn()
        .context("unable to start pigeon once more")?;
    // Closes this process's copies of the pipe's write end.
    drop(command);
    let mut output = String::new();
    reader.read_to_string(&mut output)?;
    let (others, name) = split(&output);
    if !others.is_empty() {
        let _ = io::Write::write_all(&mut io::stderr(), others.as_bytes());
    }
    if let Some(name) = name {
        return Ok(Ok(name));
    }
    let status = child.wait()?;
    let code = status.code().and_then(|code| code.try_into().ok());
    Ok(Err(code.unwrap_or(FAILED)))
}

/// Splits the output of a VM's owner: its messages, and the VM's name if it has started.
fn split(output: &str) -> (String, Option<String>) {
    let is_name = |line: &&str| line.starts_with(STARTED);
    let lines = output.split_inclusive('\n');
    let name = lines.clone().find(is_name);
    let name = name.and_then(|line| line.trim_end().strip_prefix(STARTED));
    let others = lines.filter(|line| !is_name(line)).collect();
    (others, name.map(String::from))
}

/// Reports that the VM has started, and redirects further messages to a file.
pub fn report(name: &str, dir: &Path) -> Result<()> {
    say!("{STARTED}{name}")?;
    let messages = OpenOptions::new()
        .create(true)
        .append(true)
        .open(dir.join(MESSAGES))?;
    let nothing = File::options().write(true).open("/dev/null")?;
    dup2_stdout(nothing.as_fd())?;
    dup2_stderr(messages.as_fd())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_is_found_among_other_messages() {
        let output = "pigeon: a hint\nstarted: app\n";
        assert_eq!(
            split(output),
            ("pigeon: a hint\n".into(), Some("app".into()))
        );
        assert_eq!(split("pigeon: no\n"), ("pigeon: no\n".into(), None));
    }
}
