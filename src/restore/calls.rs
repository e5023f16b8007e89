//! Responses to the API calls that wait for a hold or a restore.

use crate::api::CallError;
use crate::error;
use crate::error::Error;
use crate::supervisor::Supervisor;
use core::fmt::Display;
use proto::http::Status;
use proto::json::Quoted;
use proto::slab::Key;

/// Closes all connections but those of these calls, as the snapshot would break them.
pub(super) fn close_others(supervisor: &mut Supervisor) {
    supervisor.api.close_others(&mut supervisor.context);
    supervisor.events.close();
}

/// Responds to a call, unless its client is gone.
pub(super) fn respond(key: Key, status: Status, body: &dyn Display, supervisor: &mut Supervisor) {
    let Supervisor { api, context, .. } = supervisor;
    api.respond(key, status, body, context);
}

/// Reports a result to the call that waits for it, or logs its error; for a failed restore, with the step.
pub(super) fn finish_call(
    owner: Option<Key>,
    result: Result<Error, CallError>,
    step: &str,
    supervisor: &mut Supervisor,
) {
    match (owner, result) {
        (Some(key), Ok(body)) => respond(key, Status::Ok, &body, supervisor),
        (Some(key), Err(CallError { status, error })) => {
            let error = Quoted(&error);
            let body = match status {
                Status::InternalServerError | Status::GatewayTimeout if !step.is_empty() => {
                    error!("{{\"error\":{error},\"step\":\"{step}\"}}")
                }
                _ => error!("{{\"error\":{error}}}"),
            };
            respond(key, status, &body, supervisor);
        }
        (None, Ok(_)) => {}
        (None, Err(CallError { error, .. })) => {
            let step = if step.is_empty() { "snapshot" } else { step };
            supervisor.console.warn(&format_args!("{step}: {error}"));
        }
    }
}
