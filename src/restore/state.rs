//! What is held and restored, and what is at work for that.

use super::steps::Report;
use super::triggers::Triggers;
use crate::api::CallError;
use crate::boot::config_source::Source;
use crate::boot::kernel_params::{KernelParams, Restore as Mode};
use crate::context::NEVER;
use crate::error::Error;
use crate::page::PageBox;
use crate::process::helper::Helper;
use proto::bodies::ID;
use proto::slab::Key;

/// Holds and restores.
pub struct Restore {
    pub(super) mode: Mode,
    pub(super) source: Source,
    pub(super) mmds_timeout: u64,
    pub(super) triggers: Triggers,
    pub(super) hold: Option<Hold>,
    pub(super) task: Option<Task>,
    /// How often this VM was restored, and one more.
    pub(super) generation: u64,
    /// When something is done for a restore that the kernel has told of.
    pub(super) due: u64,
    /// The kernel has had new random numbers since the last restore.
    pub(super) is_reseeded: bool,
    /// A restore was killed while it asked MMDS.
    pub(super) was_cut_short: bool,
    /// The kernel has notified of a restore that a call has taken over.
    pub(super) is_notified: bool,
    /// The last restore, if nothing but the kernel's notification has asked for it so far.
    pub(super) notified: Option<NotifiedRestore>,
}

/// A restore by the kernel's notification: the call that follows is about the same one.
pub struct NotifiedRestore {
    /// Of the hold that it has ended.
    pub token: Option<Token>,
}

/// What a hold is known by.
pub type Token = heapless::String<ID>;

/// The workload stands still.
pub struct Hold {
    pub token: Token,
    /// When it ends by itself.
    pub until: u64,
    /// What the call was answered, should it come again.
    pub answer: Error,
}

/// What a helper is at.
pub struct Task {
    pub helper: Helper,
    /// When it has taken too long.
    pub deadline: u64,
    /// The call that waits for it.
    pub owner: Option<Key>,
    pub kind: Kind,
}

/// What it is for, and what is needed when it has ended.
pub enum Kind {
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
            due: NEVER,
            is_reseeded: false,
            was_cut_short: false,
            is_notified: false,
            notified: None,
        }
    }
}
