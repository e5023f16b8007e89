//! Host processes that are killed when the process that started them ends.

use std::{
    io::{self, Write},
    os::unix::process::CommandExt,
    path::Path,
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::{LazyLock, mpsc},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use rustix::process::{
    Resource, Rlimit, Signal, getrlimit, set_parent_process_death_signal, setrlimit,
};
use tempfile::NamedTempFile;

/// A child process, killed on drop, and by the kernel if this process dies first.
pub struct Process {
    child: Child,
    name: String,
}

impl Process {
    /// Starts `command` in its own process group, so that a terminal's Ctrl-C does not reach it. Its standard
    /// streams are those of the command.
    pub fn spawn(mut command: Command) -> Result<Process> {
        command.process_group(0);
        let name = command.get_program().to_string_lossy().into_owned();
        let (reply, child) = mpsc::channel();
        SPAWNER
            .send((command, reply))
            .expect("the spawner never ends");
        let child = child
            .recv()?
            .with_context(|| format!("unable to start {name}"))?;
        Ok(Process { child, name })
    }

    /// The process itself, with its pid and piped streams.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Its exit status, or None while it runs.
    pub fn status(&mut self) -> Result<Option<ExitStatus>> {
        self.child
            .try_wait()
            .with_context(|| format!("unable to wait for {}", self.name))
    }

    /// Waits at most `timeout` for its exit; None if it still runs then.
    pub fn wait(&mut self, timeout: Duration) -> Result<Option<ExitStatus>> {
        let begin = Instant::now();
        loop {
            match self.status()? {
                None if begin.elapsed() < timeout => thread::sleep(Duration::from_millis(5)),
                status => return Ok(status),
            }
        }
    }

    /// Sends SIGKILL and waits for the exit.
    pub fn kill(&mut self) {
        // Both fail only if the process has exited already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

type Job = (Command, mpsc::Sender<io::Result<Child>>);

/// PR_SET_PDEATHSIG refers to the *thread* that forked: a child started by one test's thread would be killed
/// at that test's end, even if the next test still used it. So one thread that lives as long as the process
/// starts all children.
static SPAWNER: LazyLock<mpsc::Sender<Job>> = LazyLock::new(|| {
    let (sender, jobs) = mpsc::channel::<Job>();
    thread::spawn(move || {
        for (mut command, reply) in jobs {
            // SAFETY: prctl(2) is async-signal-safe and the closure touches no memory of ours.
            unsafe {
                command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?));
            }
            // The send fails only if the requesting thread has died: kill the child.
            if let Err(mpsc::SendError(Ok(mut orphan))) = reply.send(command.spawn()) {
                let _ = orphan.kill();
            }
        }
    });
    sender
});

/// More files than a VM and its forwarded ports keep open, but few enough for a program that loops over all
/// descriptors up to the limit.
const OPEN_FILES: u64 = 1 << 16;

/// Raises the limit of open files to the hard limit, at most 65536: the usual soft limit of 1024 is for
/// programs that use select(2), and is reached at some 350 connections to a VM. Child processes inherit it:
/// QEMU's network and Firecracker's vsock need as many.
pub fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    let allowed = limit.maximum.unwrap_or(OPEN_FILES).min(OPEN_FILES);
    if limit.current.is_some_and(|current| current < allowed) {
        let raised = Rlimit {
            current: Some(allowed),
            ..limit
        };
        // Without it, connections wait until others are closed.
        let _as_it_was = setrlimit(Resource::Nofile, raised);
    }
}

/// Runs a tool until it exits and returns its output; an error contains the output.
pub fn run(command: &mut Command) -> Result<String> {
    let Output {
        status,
        mut stdout,
        stderr,
    } = command
        .stdin(Stdio::null())
        .env("LC_ALL", "C")
        .output()
        .with_context(|| format!("unable to start {}", command.get_program().display()))?;
    if !status.success() {
        stdout.extend(stderr);
        bail!(
            "{command:?}: {status}\n{}",
            String::from_utf8_lossy(&stdout).trim_end()
        );
    }
    Ok(String::from_utf8_lossy(&stdout).into_owned())
}

/// Writes a program that can be executed at once. Another process writes it: a child started by another
/// thread would inherit this process's writable descriptor until its execve, and the kernel does not execute
/// a file that is open for writing (ETXTBSY of execve(2)).
pub fn write_program(path: &Path, contents: impl AsRef<[u8]>) -> Result<()> {
    let mut source = NamedTempFile::new()?;
    source.write_all(contents.as_ref())?;
    run(Command::new("install")
        .arg("-m755")
        .args([source.path(), path]))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_process_outlives_the_thread_that_started_it() {
        let mut sleep = Command::new("sleep");
        sleep.arg("60");
        let mut process = thread::spawn(|| Process::spawn(sleep).unwrap())
            .join()
            .unwrap();
        assert!(process.wait(Duration::from_millis(50)).unwrap().is_none());
    }

    #[test]
    fn a_dropped_process_is_gone() {
        let mut sleep = Command::new("sleep");
        sleep.arg("60");
        let mut process = Process::spawn(sleep).unwrap();
        let proc = format!("/proc/{}", process.child().id());
        assert!(fs::exists(&proc).unwrap());
        drop(process);
        assert!(!fs::exists(&proc).unwrap());
    }

    #[test]
    fn an_exit_is_awaited_without_a_limit() {
        let mut process = Process::spawn(Command::new("true")).unwrap();
        let status = process.wait(Duration::MAX).unwrap().unwrap();
        assert!(status.success());
    }

    #[test]
    fn the_error_of_a_failed_tool_has_its_output() {
        let error = run(Command::new("sh").args(["-c", "echo out; echo err >&2; exit 3"]));
        let error = error.unwrap_err().to_string();
        assert!(error.contains("exit status: 3\nout\nerr"), "{error}");
    }
}
