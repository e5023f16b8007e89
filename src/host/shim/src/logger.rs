//! A program that receives a container's output, for `binary://PATH?KEY=VALUE`: it reads standard output from
//! descriptor 3 and standard error from 4, and closes 5 when it is ready. (containerd runtime/v2/logging)

use std::{
    fs,
    io::{self, PipeReader, Read},
    mem::ManuallyDrop,
    os::{
        fd::{AsFd, FromRawFd, OwnedFd, RawFd},
        unix::process::CommandExt,
    },
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::OFlags,
    io::{dup2, fcntl_dupfd_cloexec},
    process::{Pid, Signal, kill_process},
};

use crate::stdio::{self, Output};

/// How long a program may take to become ready.
const READY: Duration = Duration::from_secs(10);
/// How long it may take to exit after the end of its input, and after a SIGTERM.
const END: [Duration; 2] = [Duration::from_secs(10), Duration::from_secs(2)];
/// How long its exit may take in total.
pub const TIMEOUT: Duration = Duration::from_secs(14);
/// Its first descriptor; the others follow.
const FIRST: RawFd = 3;
/// Minimum number of the descriptors in this process, so that they do not conflict with the final numbers.
const ABOVE: RawFd = 10;

/// A running program.
pub struct Logger(Child);

impl Logger {
    /// Starts the program after `binary://`, and waits until it is ready.
    pub fn start(place: &str, id: &str, namespace: &str) -> Result<(Logger, [Output; 2])> {
        let (path, query) = place.split_once('?').unwrap_or((place, ""));
        let path = stdio::decode(path);
        ensure!(
            path.starts_with('/'),
            "binary://{path}: the path is not absolute"
        );
        let [(output, their_output), (error, their_error)] =
            [io::pipe()?, io::pipe()?].map(|(theirs, ours)| (OwnedFd::from(ours), theirs));
        let (mut ready, their_ready) = io::pipe()?;
        let theirs = [
            their_output.as_fd(),
            their_error.as_fd(),
            their_ready.as_fd(),
        ]
        .map(|descriptor| fcntl_dupfd_cloexec(descriptor, ABOVE));
        let [first, second, third] = theirs;
        let theirs = [first?, second?, third?];
        drop((their_output, their_error, their_ready));

        let mut command = Command::new(&path);
        command
            .args(arguments(query))
            .env_clear()
            .env("CONTAINER_ID", id)
            .env("CONTAINER_NAMESPACE", namespace)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0);
        // SAFETY: dup2(2) is async-signal-safe, and closes nothing that the child needs: exec closes all
        // other descriptors.
        unsafe {
            command.pre_exec(move || {
                for (number, descriptor) in (FIRST..).zip(&theirs) {
                    let mut target = ManuallyDrop::new(OwnedFd::from_raw_fd(number));
                    dup2(descriptor, &mut target)?;
                }
                Ok(())
            });
        }
        let child = command.spawn();
        let child = child.with_context(|| format!("unable to start {path}"))?;
        // Closes this process's copies of the program's descriptors.
        drop(command);
        let mut logger = Logger(child);
        logger
            .wait_ready(&mut ready)
            .with_context(|| path.clone())?;
        let mut outputs = [Output::default(), Output::default()];
        for (output, pipe) in outputs.iter_mut().zip([output, error]) {
            rustix::fs::fcntl_setfl(&pipe, OFlags::NONBLOCK)?;
            *output = Output::to(pipe.into());
        }
        Ok((logger, outputs))
    }

    /// Waits until it has closed the pipe, or has exited successfully.
    fn wait_ready(&mut self, ready: &mut PipeReader) -> Result<()> {
        let timeout = Timespec::try_from(READY)?;
        let is_ready = poll(&mut [PollFd::new(ready, PollFlags::IN)], Some(&timeout))? > 0;
        ensure!(is_ready, "it is not ready after {} s", READY.as_secs());
        let _ = ready.read(&mut [0]);
        let status = match self.ends() {
            true => Some(self.0.wait()?),
            false => self.0.try_wait()?,
        };
        let status = status.filter(|status| !status.success());
        status.map_or(Ok(()), |status| bail!("it has ended: {status}"))
    }

    /// Whether it is exiting: a process closes its files before it can be waited for.
    fn ends(&self) -> bool {
        /// linux/sched.h
        const PF_EXITING: u32 = 4;
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap_or_default();
        // The flags are the seventh field after the name (proc_pid_stat(5)).
        let flags = stat
            .rsplit_once(") ")
            .and_then(|(_, rest)| rest.split(' ').nth(6));
        flags.is_some_and(|flags| {
            flags
                .parse()
                .is_ok_and(|flags: u32| flags & PF_EXITING != 0)
        })
    }

    /// Waits for its exit after the end of its input; sends SIGTERM if that takes too long.
    pub fn finish(mut self) {
        if self.has_ended(END[0]) {
            return;
        }
        let _ = kill_process(Pid::from_child(&self.0), Signal::TERM);
        self.has_ended(END[1]);
        // If it still runs, drop kills it.
    }

    fn has_ended(&mut self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        while matches!(self.0.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                return false;
            }
            thread::sleep(Duration::from_millis(5));
        }
        true
    }
}

impl Drop for Logger {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Alternating keys and values of a query.
fn arguments(query: &str) -> Vec<String> {
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    let words = pairs.flat_map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        [key, value]
    });
    words
        .map(|word| stdio::decode(&word.replace('+', " ")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::soon;
    use pigeon::process::write_program;
    use std::{fs, path::Path};

    fn script(dir: &Path, text: &str) -> String {
        let path = dir.join("logger");
        write_program(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        path.display().to_string()
    }

    #[test]
    fn a_logger_gets_both_streams_and_its_environment() {
        let dir = tempfile::tempdir().unwrap();
        let text = "cd ${0%/*}; echo \"$CONTAINER_ID $CONTAINER_NAMESPACE $*\" >said; exec 5>&-; \
                    cat <&3 >out & cat <&4 >err; wait";
        let place = script(dir.path(), text) + "?to=a%20b&level=1+2&dry";
        let (logger, [mut output, mut error]) = Logger::start(&place, "web", "k8s.io").unwrap();
        let read = |name: &str| fs::read(dir.path().join(name)).unwrap();
        assert_eq!(read("said"), b"web k8s.io to a b level 1 2 dry \n");
        let bytes = vec![7; 200_000];
        error.write(b"of the error");
        output.write(&bytes);
        let deadline = Instant::now() + Duration::from_secs(30);
        while output.pending() > 0 {
            assert!(Instant::now() < deadline);
            thread::sleep(Duration::from_millis(1));
            output.flush();
        }
        drop((output, error));
        let start = Instant::now();
        logger.finish();
        assert!(start.elapsed() < END[0]);
        assert_eq!(read("out"), bytes);
        assert_eq!(read("err"), b"of the error");
    }

    #[test]
    fn a_failing_logger_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let refusal = |place: &str| format!("{:#}", Logger::start(place, "", "").err().unwrap());
        let found = refusal("/none?x=y");
        assert!(
            found.contains("unable to start /none: No such file"),
            "{found}"
        );
        let place = script(dir.path(), "exit 3");
        let found = refusal(&place);
        assert!(
            found.contains("logger: it has ended: exit status: 3"),
            "{found}"
        );
        assert!(refusal("cat").contains("not absolute"));
    }

    #[test]
    fn output_of_a_logger_that_has_died_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let place = script(dir.path(), "exec 5>&-; exit 0");
        let (mut logger, [mut output, _]) = Logger::start(&place, "", "").unwrap();
        assert!(logger.has_ended(Duration::from_secs(30)));
        output.write(&[0; 200_000]);
        assert!(soon(|| {
            output.flush();
            output.pending() == 0
        }));
    }
}
