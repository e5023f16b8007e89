//! Snapshots and restores: the workload is frozen while a snapshot is taken, and a restored VM gets its
//! own identity before the workload is thawed.
//!
//! PID 1 only coordinates, between iterations of the event loop; one helper at a time does the work, and
//! API calls wait for it. This module is above `boot`, as a restore repeats some of its steps.

mod calls;
mod helpers;
mod hold;
mod state;
mod steps;
mod task;
mod triggers;

use crate::api::{CallError, PendingCall, SnapshotCall, not_running};
use crate::boot::config_source::mmds_interface;
use crate::boot::kernel_params::RestoreMode;
use crate::context;
use crate::context::{Context, NEVER, document_memory};
use crate::error;
use crate::page::PageBox;
use crate::supervisor::Supervisor;
use crate::sys;
use calls::finish_call;
use helpers::{close_all_but, fork, freezer};
use proto::environment::Environment;
use proto::http::Status;
use proto::slab::Key;
use rustix::event::epoll::EventFlags;
use state::{NotifiedRestore, Task, TaskKind};
use steps::{Job, Report, Step};

pub use state::Restore;

/// Time until a restore that could not be started is retried, in milliseconds.
const RETRY: u64 = 1_000;

impl Restore {
    /// Starts watching for restores, once the workload runs.
    pub fn begin(&mut self, context: &mut Context) {
        if self.mode == RestoreMode::Auto {
            self.triggers.watch(context);
        }
    }

    /// Does what is due after an iteration of the event loop.
    pub fn advance(&mut self, supervisor: &mut Supervisor) {
        let context = &mut supervisor.context;
        self.triggers.rewatch(context);
        let flags = core::mem::replace(&mut context.snapshot.trigger_events, EventFlags::empty());
        if !flags.is_empty() {
            let notification = self.triggers.poll(flags, context);
            self.is_reseeded |= notification.is_reseeded;
            // While a restore requested by a call is running, the notification is about the same one.
            let is_called = matches!(
                &self.task,
                Some(Task {
                    owner: Some(_),
                    kind: TaskKind::Restore { .. },
                    ..
                })
            );
            if notification.is_restored && is_called {
                self.replaces_notified = true;
            } else if notification.is_restored {
                self.due = context.now;
            }
        }
        self.cancel_freeze(supervisor);
        self.finish_task(supervisor);
        if supervisor.context.snapshot.pending_calls > 0 {
            self.start_pending_calls(supervisor);
        }
        if self.task.is_none() {
            self.run_due(supervisor);
        }
        supervisor.context.snapshot.deadline = match (&self.task, &self.hold) {
            (Some(task), _) => task.deadline,
            (None, Some(hold)) => hold.until.min(self.due),
            (None, None) => self.due,
        };
    }

    /// Cancels a freeze if the workload has ended or was asked to stop.
    fn cancel_freeze(&mut self, supervisor: &mut Supervisor) {
        let is_freeze = |task: &mut Task| matches!(task.kind, TaskKind::Freeze { .. });
        if supervisor.is_running() || supervisor.context.snapshot.helper_status.is_some() {
            return;
        }
        let Some(task) = self.task.take_if(is_freeze) else {
            return;
        };
        // The step that it was in is of no interest.
        let _step = task.helper.kill(supervisor.console);
        supervisor.context.snapshot.helper = None;
        if let Err(error) = self.start_thaw(task.owner, Some(not_running()), supervisor) {
            finish_call(task.owner, Err(error), "", supervisor);
        }
    }

    /// Starts what is due without a call: a notified restore, or a thaw.
    fn run_due(&mut self, supervisor: &mut Supervisor) {
        let is_running = supervisor.is_running();
        let now = supervisor.context.now;
        let mut started = Ok(());
        if !is_running {
            self.due = NEVER;
        }
        let is_due = self.due <= now;
        // A held clone is not thawed with the identity of the snapshot.
        let waits_for_call = is_due && self.hold.is_some() && mmds_interface(self.source).is_none();
        if is_due && !waits_for_call {
            started = self.start_restore(None, supervisor);
            self.due = match started {
                Ok(()) => NEVER,
                // Out of memory.
                Err(_) => now.saturating_add(RETRY),
            };
        } else if let Some(hold) = &self.hold {
            let is_over = hold.until <= now;
            if waits_for_call && !is_over {
                let warning =
                    format_args!("without MMDS, only a call ends the hold {}", hold.token);
                supervisor.console.warn(&warning);
                self.due = hold.until;
            }
            if is_over {
                let warning = format_args!("the hold {} ends by itself", hold.token);
                supervisor.console.warn(&warning);
            }
            // A workload that was asked to stop must run to do so.
            if is_over || !is_running {
                started = self.start_thaw(None, None, supervisor);
            }
        }
        if let Err(CallError { error, .. }) = started {
            supervisor.console.warn(&error);
        }
    }

    /// Starts pending calls, unless a helper is running.
    fn start_pending_calls(&mut self, supervisor: &mut Supervisor) {
        for slot in 0..supervisor.api.slots() {
            let Some((key, pending)) = supervisor.api.pending_call(slot) else {
                continue;
            };
            if pending.call == SnapshotCall::Restore {
                self.preempt_notified_restore(supervisor);
            }
            if self.task.is_none() {
                self.start_call(key, pending, supervisor);
            }
        }
    }

    /// Kills a restore that the kernel triggered if it still waits for MMDS: a call has arrived, which has the
    /// document or fetches it itself.
    fn preempt_notified_restore(&mut self, supervisor: &mut Supervisor) {
        let waits_for_mmds = |task: &Task| match &task.kind {
            TaskKind::Restore { report, .. } => {
                task.owner.is_none() && report.step.is(Step::Config)
            }
            _ => false,
        };
        if self.task.as_ref().is_some_and(waits_for_mmds)
            && let Some(task) = self.task.take()
        {
            task.helper.kill(supervisor.console);
            supervisor.context.snapshot.helper = None;
            self.was_preempted = true;
            self.replaces_notified = true;
        }
    }

    fn start_call(&mut self, key: Key, pending: PendingCall, supervisor: &mut Supervisor) {
        let started = match pending.call {
            _ if self.mode == RestoreMode::Off => {
                let error = error!("PIGEON_RESTORE is off");
                Err(CallError::new(Status::NotImplemented, error))
            }
            // It has ended since the call arrived, or was asked to stop.
            _ if !supervisor.is_running() => Err(not_running()),
            SnapshotCall::Restore => self.start_restore_for_call(key, pending, supervisor),
            call => self.change_hold(key, call, supervisor),
        };
        if let Err(error) = started {
            finish_call(Some(key), Err(error), "", supervisor);
        }
    }

    /// Starts a restore for a call. It takes the place of a notified restore that is still due, unless the
    /// call is invalid.
    fn start_restore_for_call(
        &mut self,
        key: Key,
        pending: PendingCall,
        supervisor: &mut Supervisor,
    ) -> Result<(), CallError> {
        let started = self.start_restore(Some((key, pending.received_us)), supervisor);
        match &started {
            Ok(()) => {
                self.replaces_notified |= self.due != NEVER;
                self.due = NEVER;
            }
            Err(_) if self.replaces_notified => self.due = supervisor.context.now,
            Err(_) => {}
        }
        started
    }

    /// Whether the kernel has reseeded its random numbers. A call is about the unclaimed restore, if any.
    fn is_reseeded(&self, is_call: bool) -> bool {
        let unclaimed = self.unclaimed.as_ref().filter(|_| is_call);
        self.is_reseeded || unclaimed.is_some_and(|restore| restore.is_reseeded)
    }

    /// Starts a restore: for a call and the time of its arrival, or after a notification by the kernel.
    fn start_restore(
        &mut self,
        call: Option<(Key, u64)>,
        supervisor: &mut Supervisor,
    ) -> Result<(), CallError> {
        let Supervisor {
            api,
            context,
            events,
            ..
        } = supervisor;
        // Its peer was lost with the snapshot.
        events.close();
        let started_us = sys::microseconds();
        let out_of_memory = context!("make room for a restore");
        let environment = PageBox::shared(Environment::new).map_err(&out_of_memory)?;
        let mut report = PageBox::shared(|| Report::new(&context.snapshot, environment))
            .map_err(out_of_memory)?;
        let is_same = call.is_some() && self.unclaimed.is_some();
        let generation = self.generation + u64::from(!is_same);
        let is_reseeded = self.is_reseeded(call.is_some());
        let token = match (&self.hold, &self.unclaimed) {
            (Some(hold), _) => Some(hold.token.as_str()),
            (None, Some(restore)) => restore.token.as_deref(),
            (None, None) => None,
        };
        let body = match call {
            Some((key, _)) => api.body(key),
            None => &mut [],
        };
        let helper = context.with_arena(|arena, context| {
            let Context {
                cgroups,
                proc,
                scratch,
                ..
            } = context;
            let mut job = Job {
                body,
                call_received_us: call.map(|(_, received_us)| received_us),
                started_us,
                token,
                is_held: self.hold.is_some(),
                was_preempted: self.was_preempted,
                is_reseeded,
                generation,
                source: self.source,
                mmds_timeout: self.mmds_timeout,
                scratch,
            };
            let freezer = freezer(cgroups, proc);
            fork(proc, &mut |log| {
                close_all_but(freezer.as_ref(), log);
                let freezer = freezer.as_ref().filter(|_| job.is_held);
                let memory = &mut *document_memory()?;
                steps::run(&mut job, arena, memory, freezer, &mut report, log)
            })
        })?;
        let kind = TaskKind::Restore { generation, report };
        let owner = call.map(|(key, _)| key);
        self.begin_task(helper, self.mmds_timeout, owner, kind, context);
        Ok(())
    }

    /// Updates the state after a successful restore: the workload is thawed.
    fn finish_restore(
        &mut self,
        generation: u64,
        report: &Report,
        owner: Option<Key>,
        supervisor: &mut Supervisor,
    ) {
        let is_reseeded = self.is_reseeded(owner.is_some());
        self.generation = generation;
        self.is_reseeded = false;
        self.was_preempted = false;
        self.replaces_notified = false;
        let hold = self.hold.take();
        self.unclaimed = match owner {
            Some(_) => {
                // A pending notification was about this restore.
                self.due = NEVER;
                let now = supervisor.context.now;
                self.triggers.restored_by_call(is_reseeded, now);
                None
            }
            None => Some(NotifiedRestore {
                token: hold.map(|hold| hold.token),
                is_reseeded,
            }),
        };
        let context = &mut supervisor.context;
        context.snapshot.is_held = false;
        context.snapshot.applied = report.applied;
        let fields = format_args!(" generation={generation}");
        supervisor.console.info(&"restored", &fields);
        let event = format_args!("{{\"event\":\"restored\",\"generation\":{generation}}}");
        supervisor.events.send(&event);
        if let Some(signal) = report.applied.restore_signal {
            supervisor.signal_workload(signal.number());
        }
    }
}
