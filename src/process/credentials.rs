//! Who a command runs as (credentials(7)).

use crate::sys::{self, SignalSet, files};
use core::ffi::CStr;
use proto::config::MAX_DOCUMENT_SIZE;
use proto::message;
use proto::message::Message;
use proto::users::{Identity, MAX_GROUPS};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Gid, Uid, set_dumpable_behavior};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

/// The root file system's users.
pub const PASSWD: &CStr = c"/etc/passwd";
/// The root file system's groups.
pub const GROUP: &CStr = c"/etc/group";

/// Resolves a user from the root file system's files; `scratch` holds their contents.
pub fn resolve(user: &str, scratch: &mut [u8], identity: &mut Identity) -> Result<(), Message> {
    let (passwd, group) = scratch
        .split_at_mut_checked(MAX_DOCUMENT_SIZE)
        .unwrap_or((&mut [], &mut []));
    let passwd = files::read_whole(PASSWD, passwd)?.unwrap_or_default();
    let group = files::read_whole(GROUP, group)?.unwrap_or_default();
    identity
        .resolve(user.as_bytes(), passwd, group)
        .map_err(|error| message!("{error}"))
}

/// Drops to the identity's credentials; groups first, as only root can set them.
///
/// This process shares PID 1's memory, so the user's signals and processes must not be able to affect or
/// trace it. It has one thread, so setting the thread's credentials is enough.
pub fn drop_to(identity: &Identity) -> Result<(), Errno> {
    let (uid, gid) = (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid));
    let mut groups = heapless::Vec::<Gid, MAX_GROUPS>::new();
    for gid in &identity.groups {
        let _fits = groups.push(Gid::from_raw(*gid));
    }
    set_thread_groups(&groups)?;
    if uid.is_root() && gid.is_root() {
        return Ok(());
    }
    sys::block_signals(SignalSet::ALL);
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)?;
    // A change of ids resets this to fs.suid_dumpable (commit_creds, kernel/cred.c).
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
}

/// Gives the user standard input, output and error, to open them by name (/dev/stdin). What everybody may
/// open (/dev/null) is left alone.
pub fn own_standard_streams(identity: &Identity) {
    const EVERYBODY: Mode = Mode::ROTH.union(Mode::WOTH);
    if identity.uid == 0 {
        return;
    }
    for stream in sys::standard_streams() {
        let mode = rustix::fs::fstat(stream).map(|status| Mode::from_raw_mode(status.st_mode));
        if mode.is_ok_and(|mode| !mode.contains(EVERYBODY)) {
            // If the owner cannot be changed, the descriptor itself still works.
            let _unchanged = rustix::fs::fchown(stream, Some(Uid::from_raw(identity.uid)), None);
        }
    }
}
