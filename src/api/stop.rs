//! `POST /v1/stop`: an orderly stop of the workload.

use super::error::CallError;
use super::io;
use crate::context::{Context, Stop};
use crate::error;
use proto::bodies::StopRequest;
use proto::http::Status;

/// Requests a stop with the parameters in the body, which may be empty.
pub fn stop(body: &mut [u8], context: &mut Context) -> Result<(), CallError> {
    let mut request = StopRequest::default();
    if !body.is_empty() {
        io::read_body(body, context.arena, &mut request)?;
    }
    if context.workload.exit.is_some() {
        let error = error!("the workload has ended");
        return Err(CallError::new(Status::Conflict, error));
    }
    let stop = Stop {
        signal: request.signal,
        timeout: request.timeout_ms.map_or(Stop::DEFAULT.timeout, u64::from),
    };
    let waiting = context.workload.stop;
    context.workload.stop = Some(waiting.map_or(stop, |before| before.merge(stop)));
    Ok(())
}
