//! Made to be cloned: the workload is held still while a snapshot is taken, and what was restored from
//! one becomes a VM of its own before the workload goes on.
//!
//! PID 1 only decides here, between two turns of the event loop: what takes time is done by one helper
//! at a time, and the calls wait for it as connections of the API. This room is above the boot, whose
//! steps a restore goes once more.

mod steps;
mod triggers;

use crate::api::{CallError, PendingCall, SnapshotCall, not_running, read_body};
use crate::boot::config_source::Source;
use crate::boot::kernel_params::{KernelParams, Restore as Mode};
use crate::context;
use crate::context::{Cgroups, Context, NEVER, room};
use crate::error;
use crate::error::{Error, Log};
use crate::page::PageBox;
use crate::process::freezer::Freezer;
use crate::process::helper::{self, Helper, HelperLog};
use crate::supervisor::Supervisor;
use crate::sys::{self, Region};
use core::fmt::Display;
use proto::arena::Strings;
use proto::bodies::{HoldRequest, ID};
use proto::environment::ENV_BYTES;
use proto::http::Status;
use proto::json::Quoted;
use proto::message;
use proto::message::Message;
use proto::slab::Key;
use rustix::event::epoll::EventFlags;
use rustix::fd::OwnedFd;
use rustix::process::WaitStatus;
use steps::{Job, Report, Step};
use triggers::Triggers;

/// The answer that has nothing to tell.
const OK: &str = r#"{"ok":true}"#;
/// How long processes have to stand still, in milliseconds, unless the call says otherwise.
const FREEZE_TIMEOUT: u64 = 2_000;
/// How long a hold lasts, in milliseconds, unless the call says otherwise.
const HOLD: u64 = 600_000;
/// What a helper's exit code is counted from: it says a status, and has eight bits.
const STATUS: u16 = 300;

/// Holds and restores.
pub struct Restore {
    mode: Mode,
    source: Source,
    mmds_timeout: u64,
    triggers: Triggers,
    hold: Option<Hold>,
    task: Option<Task>,
    /// How often this VM was restored, and one more.
    generation: u64,
    /// The kernel has told of a restore that nothing was done for yet.
    is_due: bool,
    /// The kernel has had new random numbers since the last restore.
    is_reseeded: bool,
    /// A restore was killed while it asked MMDS.
    was_cut_short: bool,
    /// The last restore was the kernel's word alone; the token of the hold that it has ended.
    unclaimed: Option<Option<Token>>,
}

type Token = heapless::String<ID>;

/// The workload stands still.
struct Hold {
    token: Token,
    /// When it ends by itself.
    until: u64,
    /// What the call was answered, should it come again.
    answer: Error,
}

/// What a helper is at.
struct Task {
    helper: Helper,
    /// When it has taken too long.
    deadline: u64,
    /// The call that waits for it.
    owner: Option<Key>,
    kind: Kind,
}

enum Kind {
    Freeze {
        token: Token,
        /// How long the hold is to last, in milliseconds.
        hold: u64,
    },
    Thaw {
        /// Why the workload is not held, should the call be a prepare.
        failure: Option<CallError>,
    },
    Restore {
        generation: u64,
        report: PageBox<Report>,
        environment: Region,
    },
}

impl Restore {
    /// Nothing is held.
    pub fn new(params: &KernelParams) -> Self {
        Self {
            mode: params.restore,
            source: params.source,
            mmds_timeout: params.mmds_timeout,
            triggers: Triggers::default(),
            hold: None,
            task: None,
            generation: 1,
            is_due: false,
            is_reseeded: false,
            was_cut_short: false,
            unclaimed: None,
        }
    }

    /// The workload runs: from now on there can be snapshots of it.
    pub fn begin(&mut self, context: &mut Context) {
        if self.mode == Mode::Auto {
            self.triggers.watch(context);
        }
    }

    /// Goes on after a turn of the event loop.
    pub fn advance(&mut self, supervisor: &mut Supervisor) {
        let context = &mut supervisor.context;
        let flags = core::mem::replace(&mut context.snapshot.news, EventFlags::empty());
        if !flags.is_empty() {
            let news = self.triggers.look(flags, context);
            self.is_reseeded |= news.is_reseeded;
            // While a call's restore goes on, it is this one that the kernel speaks of: the host calls
            // because of it.
            let is_called = matches!(
                &self.task,
                Some(Task {
                    owner: Some(_),
                    kind: Kind::Restore { .. },
                    ..
                })
            );
            self.is_due |= news.is_restored && !is_called;
        }
        self.finish_task(supervisor);
        if supervisor.context.snapshot.calls > 0 {
            self.take_calls(supervisor);
        }
        if self.task.is_none() {
            self.do_what_is_due(supervisor);
        }
        supervisor.context.snapshot.deadline = match (&self.task, &self.hold) {
            (Some(task), _) => task.deadline,
            (None, Some(hold)) => hold.until,
            (None, None) => NEVER,
        };
    }

    /// What nobody has called for.
    fn do_what_is_due(&mut self, supervisor: &mut Supervisor) {
        let is_running = supervisor.is_running();
        let is_due = core::mem::take(&mut self.is_due) && is_running;
        let mut started = Ok(());
        if is_due {
            started = self.start_restore(None, supervisor);
        } else if let Some(hold) = &self.hold {
            let is_over = hold.until <= supervisor.context.now;
            if is_over {
                let warning = format_args!("the hold {} ends by itself", hold.token);
                supervisor.console.warn(&warning);
            }
            // What is asked to stop has to run for that.
            if is_over || !is_running {
                started = self.start_thaw(None, None, supervisor);
            }
        }
        if let Err(CallError { error, .. }) = started {
            supervisor.console.warn(&error);
        }
    }

    /// Takes the calls that wait while no helper is at work.
    fn take_calls(&mut self, supervisor: &mut Supervisor) {
        for place in 0..supervisor.api.places() {
            let Some((key, pending)) = supervisor.api.pending_call(place) else {
                continue;
            };
            if pending.call == SnapshotCall::Restore {
                self.cut_short(supervisor);
            }
            if self.task.is_none() {
                self.take_call(key, pending, supervisor);
            }
        }
    }

    /// A restore by the kernel's word that waits for MMDS is of no use once the host calls for one:
    /// that call has the document, or asks for it itself.
    fn cut_short(&mut self, supervisor: &mut Supervisor) {
        let waits_for_mmds = |task: &Task| match &task.kind {
            Kind::Restore { report, .. } => task.owner.is_none() && report.step.is(Step::Config),
            _ => false,
        };
        if self.task.as_ref().is_some_and(waits_for_mmds)
            && let Some(task) = self.task.take()
        {
            task.helper.give_up(supervisor.console);
            supervisor.context.snapshot.helper = None;
            self.was_cut_short = true;
        }
    }

    fn take_call(&mut self, key: Key, pending: PendingCall, supervisor: &mut Supervisor) {
        let taken = match pending.call {
            _ if self.mode == Mode::Off => {
                let error = error!("PIGEON_RESTORE is off");
                Err(CallError::new(Status::NotImplemented, error))
            }
            // It has ended since the call came, or was asked to stop.
            _ if !supervisor.is_running() => Err(not_running()),
            SnapshotCall::Restore => {
                self.start_restore(Some((key, pending.received_us)), supervisor)
            }
            call => self.change_hold(key, call, supervisor),
        };
        if let Err(error) = taken {
            finish_call(Some(key), Err(error), "", supervisor);
        }
    }

    /// The workload is to stand still, or to go on.
    fn change_hold(
        &mut self,
        key: Key,
        call: SnapshotCall,
        supervisor: &mut Supervisor,
    ) -> Result<(), CallError> {
        let Supervisor { api, context, .. } = supervisor;
        let body = api.body(key);
        let mut request = HoldRequest::default();
        read_body(body, context.arena, &mut request)?;
        let token = Token::try_from(request.token).unwrap_or_default();
        let HoldRequest {
            timeout_ms,
            sync,
            hold_ms,
            ..
        } = request;
        match &self.hold {
            Some(hold) if hold.token == token => {
                if call == SnapshotCall::Cancel {
                    return self.start_thaw(Some(key), None, supervisor);
                }
                close_others(supervisor);
                answer(key, Status::Ok, &hold.answer, supervisor);
                return Ok(());
            }
            None if call == SnapshotCall::Prepare => {}
            _ => {
                let error = error!("the workload is not held under this token");
                return Err(CallError::new(Status::Conflict, error));
            }
        }
        let timeout = timeout_ms.map_or(FREEZE_TIMEOUT, u64::from);
        let sync = sync.unwrap_or(true);
        let helper = spawn(context, &|freezer, log| {
            freeze(freezer, &token, timeout, sync, log)
        })?;
        context.snapshot.is_held = true;
        let kind = Kind::Freeze {
            token,
            hold: hold_ms.map_or(HOLD, u64::from),
        };
        self.begin_task(helper, timeout, Some(key), kind, context);
        Ok(())
    }

    /// Lets all go on; the hold is over, whether that works or not.
    fn start_thaw(
        &mut self,
        owner: Option<Key>,
        failure: Option<CallError>,
        supervisor: &mut Supervisor,
    ) -> Result<(), CallError> {
        let context = &mut supervisor.context;
        self.hold = None;
        context.snapshot.is_held = false;
        let helper = spawn(context, &|freezer, log| {
            freezer.thaw()?;
            log.answer(&OK);
            Ok(())
        });
        let Ok(helper) = helper else {
            // There is no memory for one. It has to be done, so PID 1 does it.
            if let Some(freezer) = freezer(&context.cgroups, &context.proc) {
                freezer.thaw()?;
            }
            let result = failure.map_or_else(|| Ok(error!("{OK}")), Err);
            finish_call(owner, result, "", supervisor);
            return Ok(());
        };
        self.begin_task(helper, 0, owner, Kind::Thaw { failure }, context);
        Ok(())
    }

    /// Makes this VM a new one: for a call, which came at that time, or by the kernel's word.
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
        // Its other end was there before the snapshot.
        events.close();
        let started_us = sys::microseconds();
        let out_of_memory = context!("make room for a restore");
        let mut environment = Region::shared(ENV_BYTES).map_err(&out_of_memory)?;
        let mut report =
            PageBox::shared(|| Report::new(&context.snapshot)).map_err(&out_of_memory)?;
        // A call that comes after the kernel's word is about the same restore.
        let is_same = call.is_some() && self.unclaimed.is_some();
        let generation = self.generation + u64::from(!is_same);
        let token = match (&self.hold, &self.unclaimed) {
            (Some(hold), _) => Some(hold.token.as_str()),
            (None, Some(token)) => token.as_deref(),
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
                defaults,
                scratch,
                ..
            } = context;
            let mut job = Job {
                body,
                call: call.map(|(_, received_us)| received_us),
                started_us,
                token,
                is_held: self.hold.is_some(),
                was_cut_short: self.was_cut_short,
                is_reseeded: self.is_reseeded,
                generation,
                source: self.source,
                mmds_timeout: self.mmds_timeout,
                commands: &mut defaults.environment,
                scratch,
            };
            let freezer = freezer(cgroups, proc);
            fork(proc, &mut |log| {
                match &freezer {
                    Some(freezer) => close_all_but(freezer, log),
                    None => sys::close_others(&[log.pipe()]),
                }
                let freezer = freezer.as_ref().filter(|_| job.is_held);
                let room = &mut *room()?;
                steps::run(
                    &mut job,
                    arena,
                    room,
                    freezer,
                    &mut report,
                    &mut environment,
                    log,
                )
            })
        })?;
        let kind = Kind::Restore {
            generation,
            report,
            environment,
        };
        let owner = call.map(|(key, _)| key);
        self.begin_task(helper, self.mmds_timeout, owner, kind, context);
        Ok(())
    }

    /// A helper is at work, for so many milliseconds beside what a disk may take.
    fn begin_task(
        &mut self,
        helper: Helper,
        timeout: u64,
        owner: Option<Key>,
        kind: Kind,
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

    /// What comes of a helper that has ended, or has taken too long.
    fn finish_task(&mut self, supervisor: &mut Supervisor) {
        let context = &mut supervisor.context;
        let ended = context.snapshot.ended.take();
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
            Kind::Freeze { token, hold } => match result {
                Ok(held) => {
                    let fields = format_args!(" token={}", Quoted(&token));
                    supervisor.console.info(&"held for a snapshot", &fields);
                    self.unclaimed = None;
                    close_others(supervisor);
                    if let Some(key) = owner {
                        answer(key, Status::Ok, &held, supervisor);
                    }
                    self.hold = Some(Hold {
                        token,
                        until: now.saturating_add(hold),
                        answer: held,
                    });
                    return;
                }
                Err(failure) => match self.start_thaw(owner, Some(failure), supervisor) {
                    Ok(()) => return,
                    Err(error) => Err(error),
                },
            },
            Kind::Thaw { failure } => {
                supervisor.console.info(&"the workload goes on", &"");
                failure.map_or(result, Err)
            }
            Kind::Restore {
                generation,
                report,
                environment,
            } => {
                step = report.step.name();
                if ended.is_some() {
                    // They have addresses by now, whatever has failed after that.
                    supervisor.context.snapshot.interfaces = report.interfaces.clone();
                }
                match &result {
                    Ok(_) => self.restored(generation, &report, &environment, owner, supervisor),
                    // A call that was none has cut short what the kernel has asked for.
                    Err(CallError {
                        status: Status::BadRequest | Status::Conflict,
                        ..
                    }) => self.is_due |= self.was_cut_short,
                    Err(_) => {}
                }
                result
            }
        };
        finish_call(owner, result, step, supervisor);
    }

    /// This VM is a new one, and the workload goes on.
    fn restored(
        &mut self,
        generation: u64,
        report: &Report,
        environment: &[u8],
        owner: Option<Key>,
        supervisor: &mut Supervisor,
    ) {
        self.generation = generation;
        self.is_reseeded = false;
        self.was_cut_short = false;
        let hold = self.hold.take();
        self.unclaimed = match owner {
            Some(_) => None,
            None => Some(hold.map(|hold| hold.token)),
        };
        let context = &mut supervisor.context;
        context.snapshot.is_held = false;
        context.snapshot.in_force = report.in_force;
        if let Some(length) = report.environment {
            let strings = Strings::new(environment.get(..length).unwrap_or(&[]));
            let defaults = &mut context.defaults;
            defaults.environment.clear();
            // The helper's own had the same room.
            let _fits = defaults.environment.set_all(strings);
            defaults.sets_home = report.sets_home;
        }
        let fields = format_args!(" generation={generation}");
        supervisor.console.info(&"restored", &fields);
        let event = format_args!("{{\"event\":\"restored\",\"generation\":{generation}}}");
        supervisor.events.send(&event);
        if let Some(signal) = report.in_force.restore_signal {
            supervisor.signal_workload(signal.number());
        }
    }
}

/// What to freeze and thaw.
fn freezer<'a>(cgroups: &'a Cgroups, proc: &'a OwnedFd) -> Option<Freezer<'a>> {
    Some(Freezer {
        root: cgroups.root.as_ref()?,
        workload: cgroups.workload.as_ref(),
        proc,
    })
}

/// Starts a helper that freezes or thaws.
fn spawn(
    context: &Context,
    work: &dyn Fn(&Freezer, &HelperLog) -> Result<(), CallError>,
) -> Result<Helper, CallError> {
    let Some(freezer) = freezer(&context.cgroups, &context.proc) else {
        let error = error!("there is no cgroup v2");
        return Err(CallError::new(Status::NotImplemented, error));
    };
    Ok(fork(&context.proc, &mut |log| {
        close_all_but(&freezer, log);
        work(&freezer, log)
    })?)
}

/// Starts a helper; its exit code says the status of its error.
fn fork(
    proc: &OwnedFd,
    work: &mut dyn FnMut(&HelperLog) -> Result<(), CallError>,
) -> Result<Helper, Error> {
    helper::spawn_spared(proc, &mut |log| match work(log) {
        Ok(()) => 0,
        Err(CallError { status, error }) => {
            log.fail(&error);
            i32::from(status.code().saturating_sub(STATUS))
        }
    })
}

/// What PID 1 closes must be closed, whatever this child waits for.
fn close_all_but(freezer: &Freezer, log: &HelperLog) {
    let Freezer {
        root,
        workload,
        proc,
    } = freezer;
    sys::close_others(&[root, workload.unwrap_or(root), proc, log.pipe()]);
}

/// In the helper: holds all still, and writes out what is not on the disks.
fn freeze(
    freezer: &Freezer,
    token: &str,
    timeout: u64,
    sync: bool,
    log: &HelperLog,
) -> Result<(), CallError> {
    let start = sys::milliseconds();
    let mut running = Message::new();
    let Some(frozen) = freezer.freeze(timeout, &mut running)? else {
        let error = error!("still running after {timeout} ms: {running}");
        return Err(CallError::new(Status::GatewayTimeout, error));
    };
    let still = sys::milliseconds();
    if sync {
        log.step(&"sync");
        rustix::fs::sync();
    }
    log.answer(&message!(
        "{{\"ok\":true,\"token\":{},\"frozen\":{frozen},\"freeze_ms\":{},\"sync_ms\":{}}}",
        Quoted(&token),
        still.saturating_sub(start),
        sys::milliseconds().saturating_sub(still)
    ));
    Ok(())
}

/// What a helper has found out; one that has not ended is given up.
fn result(
    helper: Helper,
    ended: Option<WaitStatus>,
    log: &mut dyn Log,
) -> Result<Error, CallError> {
    let Some(status) = ended else {
        return Err(CallError::new(Status::GatewayTimeout, helper.give_up(log)));
    };
    let lines = helper::read_lines(&helper.log, log);
    let error = match (lines.error, lines.answer) {
        (None, Some(answer)) => return Ok(answer),
        (error, _) => error.unwrap_or_else(|| error!("a helper was killed")),
    };
    let code = status.exit_status().unwrap_or(0) + i32::from(STATUS);
    let known = [Status::BadRequest, Status::Conflict, Status::GatewayTimeout];
    let known = known.iter().find(|status| i32::from(status.code()) == code);
    Err(CallError::new(
        *known.unwrap_or(&Status::InternalServerError),
        error,
    ))
}

/// Connections other than those of these calls would be cut by the snapshot, one by one.
fn close_others(supervisor: &mut Supervisor) {
    supervisor.api.close_others(&mut supervisor.context);
    supervisor.events.close();
}

/// Answers a call, unless its client is gone.
fn answer(key: Key, status: Status, body: &dyn Display, supervisor: &mut Supervisor) {
    let Supervisor { api, context, .. } = supervisor;
    api.answer(key, status, body, context);
}

/// Tells whoever asked for it what has become of it; a restore that has failed, in which step.
fn finish_call(
    owner: Option<Key>,
    result: Result<Error, CallError>,
    step: &str,
    supervisor: &mut Supervisor,
) {
    match (owner, result) {
        (Some(key), Ok(body)) => answer(key, Status::Ok, &body, supervisor),
        (Some(key), Err(CallError { status, error })) => {
            let error = Quoted(&error);
            let body = match status {
                Status::InternalServerError | Status::GatewayTimeout if !step.is_empty() => {
                    error!("{{\"error\":{error},\"step\":\"{step}\"}}")
                }
                _ => error!("{{\"error\":{error}}}"),
            };
            answer(key, status, &body, supervisor);
        }
        (None, Ok(_)) => {}
        (None, Err(CallError { error, .. })) => {
            let step = if step.is_empty() { "snapshot" } else { step };
            supervisor.console.warn(&format_args!("{step}: {error}"));
        }
    }
}
