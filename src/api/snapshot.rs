//! `/v1/snapshot/prepare`, `/v1/snapshot/cancel` and `/v1/restore`: these calls wait here until the module
//! `restore` handles them.

use super::connection::{Connection, PendingCall};
use super::{Api, Context};
use core::fmt::Display;
use proto::http::Status;
use proto::slab::Key;

impl Api {
    /// The pending call in slot `index`, which is below [`slots`](Self::slots).
    pub fn pending_call(&mut self, index: usize) -> Option<(Key, PendingCall)> {
        let key = self.connections.key_at(index)?;
        let pending = self.connections.get_mut(key)?.pending_call()?;
        Some((key, pending))
    }

    /// The number of slots.
    pub fn slots(&self) -> usize {
        self.connections.used()
    }

    /// The body of a call.
    pub fn body(&mut self, key: Key) -> &mut [u8] {
        self.connections
            .get_mut(key)
            .map_or(&mut [], Connection::body)
    }

    /// Responds to a call, unless its client is gone.
    pub fn respond(&mut self, key: Key, status: Status, body: &dyn Display, context: &mut Context) {
        self.with(key, context, &mut |connection, shared| {
            connection.respond_to_call(status, body, shared);
        });
    }

    /// Closes all connections without a pending snapshot call.
    pub fn close_others(&mut self, context: &mut Context) {
        let others = |connection: &Connection| connection.pending_call().is_none();
        self.for_each(context, &others, &mut Connection::close);
    }
}
