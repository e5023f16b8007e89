//! The state of holds and restores.

use super::steps::Report;
use super::triggers::Triggers;
use crate::api::CallError;
use crate::boot::config_source::Source;
use crate::boot::kernel_params::{KernelParams, RestoreMode};
use crate::context::NEVER;
use crate::error::Error;
use crate::page::PageBox;
use crate::process::helper::Helper;
use proto::bodies::MAX_ID;
use proto::slab::Key;

/// Holds and restores.
pub struct Restore {
    pub(super) mode: RestoreMode,
    pub(super) source: Source,
    pub(super) mmds_timeout: u64,
    pub(super) triggers: Triggers,
    pub(super) hold: Option<Hold>,
    pub(super) task: Option<Task>,
    /// 1 plus the number of restores of this VM.
    pub(super) generation: u64,
    /// When to start a notified restore.
    pub(super) due: u64,
    /// The kernel has reseeded its random numbers since the last restore.
    pub(super) is_reseeded: bool,
    /// The previous restore was killed while it waited for MMDS.
    pub(super) was_preempted: bool,
    /// A call has taken the place of a restore that the kernel triggered: if the call is invalid, that restore
    /// is due again.
    pub(super) replaces_notified: bool,
    /// The last restore, if the kernel triggered it and no call has claimed it yet.
    pub(super) unclaimed: Option<NotifiedRestore>,
}

/// A restore triggered by the kernel: the call that follows is about the same one.
pub struct NotifiedRestore {
    /// The token of the hold that it ended.
    pub token: Option<Token>,
    /// The kernel had reseeded its random numbers.
    pub is_reseeded: bool,
}

/// Identifies a hold.
pub type Token = heapless::String<MAX_ID>;

/// A hold: the workload is frozen.
pub struct Hold {
    pub token: Token,
    /// Deadline, after which the workload is thawed.
    pub until: u64,
    /// The response to the prepare call, in case it is repeated.
    pub response: Error,
}

/// The running helper.
pub struct Task {
    pub helper: Helper,
    /// When it times out.
    pub deadline: u64,
    /// The call that waits for it.
    pub owner: Option<Key>,
    pub kind: TaskKind,
}

/// What the helper does, with the data that is needed when it has exited.
pub enum TaskKind {
    Freeze {
        token: Token,
        /// How long the hold will last, in milliseconds.
        hold: u64,
    },
    Thaw {
        /// Why the workload is not held, if the call was a prepare.
        failure: Option<CallError>,
    },
    Restore {
        generation: u64,
        report: PageBox<Report>,
    },
}

impl Restore {
    /// No hold, and no restore.
    pub fn new(params: &KernelParams) -> Self {
        Self {
            mode: params.restore,
            source: params.source,
            mmds_timeout: params.mmds_timeout,
            triggers: Triggers::default(),
            hold: None,
            task: None,
            generation: 1,
            due: NEVER,
            is_reseeded: false,
            was_preempted: false,
            replaces_notified: false,
            unclaimed: None,
        }
    }
}
