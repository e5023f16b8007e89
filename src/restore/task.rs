//! Tracks the helper that freezes, thaws or restores.

use super::calls::finish_call;
use super::helpers::result;
use super::state::{Restore, Task, TaskKind};
use super::steps::Report;
use crate::api::{CallError, not_running};
use crate::context::{Context, NEVER};
use crate::error;
use crate::process::helper::{self, Helper};
use crate::supervisor::Supervisor;
use proto::http::Status;
use proto::slab::Key;

/// Records what a restore has changed: the steps that succeeded count even if a later one failed.
fn record(report: &Report, context: &mut Context) {
    context.snapshot.interfaces = report.interfaces.clone();
    context.snapshot.applied.digests = report.applied.digests;
    if report.has_environment {
        context.defaults.environment.copy(&report.environment);
        context.defaults.sets_home = report.sets_home;
    }
}

impl Restore {
    /// Tracks a running helper, which may take `timeout` milliseconds in addition to [`helper::TIMEOUT`].
    pub(super) fn begin_task(
        &mut self,
        helper: Helper,
        timeout: u64,
        owner: Option<Key>,
        kind: TaskKind,
        context: &mut Context,
    ) {
        context.snapshot.helper = Some(helper.pid);
        let timeout = timeout.saturating_add(helper::TIMEOUT);
        self.task = Some(Task {
            helper,
            deadline: context.now.saturating_add(timeout),
            owner,
            kind,
        });
    }

    /// Handles the result of a helper that has exited or timed out.
    pub(super) fn finish_task(&mut self, supervisor: &mut Supervisor) {
        let context = &mut supervisor.context;
        let ended = context.snapshot.helper_status.take();
        let now = context.now;
        let is_over = |task: &Task| ended.is_some() || task.deadline <= now;
        if !self.task.as_ref().is_some_and(is_over) {
            return;
        }
        let Some(Task {
            helper,
            owner,
            kind,
            ..
        }) = self.task.take()
        else {
            return;
        };
        context.snapshot.helper = None;
        let result = result(helper, ended, supervisor.console);
        let mut step = "";
        let result = match kind {
            TaskKind::Freeze { token, hold } => {
                let failure = match result {
                    Ok(_) if !supervisor.is_running() => not_running(),
                    // The restore would end the hold.
                    Ok(_) if self.due != NEVER => {
                        let error = error!("the VM was restored from a snapshot meanwhile");
                        CallError::new(Status::Conflict, error)
                    }
                    Ok(held) => return self.begin_hold(token, hold, held, owner, supervisor),
                    Err(failure) => failure,
                };
                match self.start_thaw(owner, Some(failure), supervisor) {
                    Ok(()) => return,
                    Err(error) => Err(error),
                }
            }
            TaskKind::Thaw { failure } => {
                supervisor.console.info(&"the workload goes on", &"");
                failure.map_or(result, Err)
            }
            TaskKind::Restore { generation, report } => {
                step = report.step.name();
                // A helper that hangs in another step may be writing the report.
                if ended.is_some() || report.step.waits_for_disk() {
                    record(&report, &mut supervisor.context);
                }
                match &result {
                    Ok(_) => self.finish_restore(generation, &report, owner, supervisor),
                    // A call that was rejected had preempted the restore triggered by the kernel.
                    Err(CallError {
                        status: Status::BadRequest | Status::Conflict,
                        ..
                    }) if self.replaces_notified => self.due = now,
                    Err(_) => {}
                }
                result
            }
        };
        finish_call(owner, result, step, supervisor);
    }
}
