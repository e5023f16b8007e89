//! A root that many VMs share: what is written goes to a layer of its own (overlayfs).

use crate::boot::file_system::{Access, FileSystem};
use crate::context;
use crate::error::Result;
use crate::process::helper::HelperLog;
use crate::sys::files;
use core::ffi::CStr;
use proto::config::Overlay;
use proto::message::ToLossy;
use rustix::mount::{MountFlags, UnmountFlags};

/// The shared root.
const LOWER: &CStr = c"/lower";
/// The file system of the layer that is written to.
const WRITABLE: &CStr = c"/writable";
/// Its directories; on a device they are there from the second boot on.
const UPPER: &CStr = c"/writable/upper";
const WORK: &CStr = c"/writable/work";
const OPTIONS: &CStr = c"lowerdir=/lower,upperdir=/writable/upper,workdir=/writable/work";

/// Mounts the root on `target` with a layer over it.
pub fn mount(root: FileSystem, layer: Overlay, target: &CStr, log: &HelperLog) -> Result {
    for directory in [LOWER, WRITABLE] {
        files::make_directory(directory, 0o700)
            .map_err(context!("create {}", directory.lossy()))?;
    }
    FileSystem {
        access: Access::Shared,
        ..root
    }
    .mount(LOWER, log)?;
    match layer {
        Overlay::Tmpfs(options) => FileSystem::tmpfs(options),
        Overlay::Device(device) => FileSystem::on(device),
    }
    .mount(WRITABLE, log)?;
    for directory in [UPPER, WORK] {
        files::make_directory(directory, 0o755)
            .map_err(context!("create {}", directory.lossy()))?;
    }
    rustix::mount::mount(
        c"overlay",
        target,
        c"overlay",
        MountFlags::RELATIME,
        OPTIONS,
    )
    .map_err(context!("mount an overlay on {}", target.lossy()))?;
    // The overlay has mounts of its own of its layers (ovl_get_layers, fs/overlayfs/super.c).
    for directory in [LOWER, WRITABLE] {
        rustix::mount::unmount(directory, UnmountFlags::empty())
            .map_err(context!("unmount {}", directory.lossy()))?;
    }
    Ok(())
}
