//! `POST /v1/signals`: a signal to the workload's process group.

use super::error::{CallError, not_running, refuse_while_held};
use super::io;
use crate::context;
use crate::context::Context;
use crate::sys;
use proto::bodies::SignalRequest;
use rustix::io::Errno;

/// Sends the signal that the body names.
pub fn send(body: &mut [u8], context: &mut Context) -> Result<(), CallError> {
    let mut request = SignalRequest::default();
    io::read_body(body, context.arena, &mut request)?;
    refuse_while_held(context)?;
    let sent = match context.workload.group {
        Some(group) => sys::kill_group(group, u32::from(request.signal)),
        None => Err(Errno::SRCH),
    };
    sent.map_err(|errno| match errno {
        Errno::SRCH => not_running(),
        errno => context!("send the signal")(errno).into(),
    })
}
