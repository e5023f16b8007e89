//! Holds: all processes are frozen while a snapshot is taken.

use super::calls::{close_others, finish_call, respond};
use super::helpers::{freezer, spawn};
use super::state::{Hold, Restore, TaskKind, Token};
use crate::api::{CallError, SnapshotCall, read_body};
use crate::context::NEVER;
use crate::error;
use crate::error::Error;
use crate::process::freezer::Freezer;
use crate::process::helper::HelperLog;
use crate::supervisor::Supervisor;
use crate::sys;
use proto::bodies::HoldRequest;
use proto::http::Status;
use proto::json::Quoted;
use proto::message;
use proto::message::Message;
use proto::slab::Key;

/// The response to a cancel.
const OK: &str = r#"{"ok":true}"#;
/// How long processes may take to freeze, in milliseconds, unless the call says otherwise.
const FREEZE_TIMEOUT: u64 = 2_000;
/// How long a hold lasts, in milliseconds, unless the call says otherwise.
const HOLD: u64 = 600_000;

impl Restore {
    /// Starts or cancels a hold: freezes or thaws all processes.
    pub(super) fn change_hold(
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
                respond(key, Status::Ok, &hold.response, supervisor);
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
        let kind = TaskKind::Freeze {
            token,
            hold: hold_ms.map_or(HOLD, u64::from),
        };
        self.begin_task(helper, timeout, Some(key), kind, context);
        Ok(())
    }

    /// All processes are frozen: the hold begins, for `time` milliseconds.
    pub(super) fn begin_hold(
        &mut self,
        token: Token,
        time: u64,
        held: Error,
        owner: Option<Key>,
        supervisor: &mut Supervisor,
    ) {
        let fields = format_args!(" token={}", Quoted(&token));
        supervisor.console.info(&"held for a snapshot", &fields);
        self.unclaimed = None;
        close_others(supervisor);
        if let Some(key) = owner {
            respond(key, Status::Ok, &held, supervisor);
        }
        self.hold = Some(Hold {
            token,
            until: supervisor.context.now.saturating_add(time),
            response: held,
        });
    }

    /// Ends the hold and starts thawing all processes.
    pub(super) fn start_thaw(
        &mut self,
        owner: Option<Key>,
        failure: Option<CallError>,
        supervisor: &mut Supervisor,
    ) -> Result<(), CallError> {
        let context = &mut supervisor.context;
        self.hold = None;
        context.snapshot.is_held = false;
        // A restore that waited for the end of the hold.
        if self.due != NEVER {
            self.due = context.now;
        }
        let helper = spawn(context, &|freezer, log| {
            freezer.thaw()?;
            log.result(&OK);
            Ok(())
        });
        let Ok(helper) = helper else {
            // Out of memory for a helper: PID 1 thaws them itself.
            if let Some(freezer) = freezer(&context.cgroups, &context.proc) {
                freezer.thaw()?;
            }
            let result = failure.map_or_else(|| Ok(error!("{OK}")), Err);
            finish_call(owner, result, "", supervisor);
            return Ok(());
        };
        self.begin_task(helper, 0, owner, TaskKind::Thaw { failure }, context);
        Ok(())
    }
}

/// In the helper: freezes all processes and syncs the disks.
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
    log.result(&message!(
        "{{\"ok\":true,\"token\":{},\"frozen\":{frozen},\"freeze_ms\":{},\"sync_ms\":{}}}",
        Quoted(&token),
        still.saturating_sub(start),
        sys::milliseconds().saturating_sub(still)
    ));
    Ok(())
}
