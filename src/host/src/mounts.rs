//! Volumes mounted while the workload runs (`/v1/mounts`).

use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};

use crate::{Client, Error, connection::Limit, files::escape};

/// The init itself times out on a device after 30 s.
const TIMEOUT: Duration = Duration::from_secs(45);

/// A volume, as in `Mounts` of the configuration.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Mount {
    /// The block device in the guest, such as `/dev/vdb`; a tmpfs has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_path: Option<String>,
    /// The mount point; created if absent.
    pub mount_path: String,
    /// The file system; detected from the device's superblock if absent.
    #[serde(rename = "FSType", skip_serializing_if = "Option::is_none")]
    pub fs_type: Option<String>,
    /// Mounts it read-only.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub read_only: bool,
    /// Options as in fstab(5).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub options: Option<String>,
}

impl Client {
    /// `POST /v1/mounts`: mounts a volume; waits for a device that does not exist yet.
    pub fn mount(&self, mount: &Mount) -> Result<(), Error> {
        let _: Value = self.post_within(TIMEOUT, "/v1/mounts", &json!(mount))?;
        Ok(())
    }

    /// `DELETE /v1/mounts`: unmounts a volume.
    pub fn unmount(&self, path: &str) -> Result<(), Error> {
        let target = format!("/v1/mounts?path={}", escape(path));
        self.call(Limit::Total(TIMEOUT), |http| {
            http.request("DELETE", &target, &[], b"")
        })?;
        Ok(())
    }
}
