//! Starts the helpers that freeze, thaw and restore, and reads their results.

use crate::api::{CallError, report_error, status_of_exit};
use crate::context::{Cgroups, Context};
use crate::error;
use crate::error::{Error, Log};
use crate::process::freezer::Freezer;
use crate::process::helper::{self, Helper, HelperLog};
use crate::sys;
use proto::http::Status;
use rustix::fd::OwnedFd;
use rustix::process::WaitStatus;

/// The freezer for these cgroups; `None` without cgroup v2.
pub fn freezer<'a>(cgroups: &'a Cgroups, proc: &'a OwnedFd) -> Option<Freezer<'a>> {
    Some(Freezer {
        root: cgroups.root.as_ref()?,
        workload: cgroups.workload.as_ref(),
        proc,
    })
}

/// Starts a helper that freezes or thaws.
pub fn spawn(
    context: &Context,
    work: &dyn Fn(&Freezer, &HelperLog) -> Result<(), CallError>,
) -> Result<Helper, CallError> {
    let Some(freezer) = freezer(&context.cgroups, &context.proc) else {
        let error = error!("there is no cgroup v2");
        return Err(CallError::new(Status::NotImplemented, error));
    };
    Ok(fork(&context.proc, &mut |log| {
        close_all_but(Some(&freezer), log);
        work(&freezer, log)
    })?)
}

/// Starts a helper whose exit code carries the status of its error.
pub fn fork(
    proc: &OwnedFd,
    work: &mut dyn FnMut(&HelperLog) -> Result<(), CallError>,
) -> Result<Helper, Error> {
    helper::fork_oom_protected(proc, &mut |log| report_error(work(log), log))
}

/// Closes all other descriptors: a file that PID 1 closes must not stay open in this child.
pub fn close_all_but(freezer: Option<&Freezer>, log: &HelperLog) {
    match freezer {
        Some(Freezer {
            root,
            workload,
            proc,
        }) => sys::close_others(&[root, workload.unwrap_or(root), proc, log.pipe()]),
        None => sys::close_others(&[log.pipe()]),
    }
}

/// The helper's result; a helper that has not exited is killed.
pub fn result(
    helper: Helper,
    ended: Option<WaitStatus>,
    log: &mut dyn Log,
) -> Result<Error, CallError> {
    let Some(status) = ended else {
        return Err(CallError::new(Status::GatewayTimeout, helper.kill(log)));
    };
    let reports = helper::read_reports(&helper.log, log);
    let error = match (reports.error, reports.result) {
        (None, Some(result)) => return Ok(result),
        (error, _) => error.unwrap_or_else(|| error!("a helper was killed")),
    };
    Err(CallError::new(status_of_exit(status.exit_status()), error))
}
