//! The guest's part of snapshots (`/v1/snapshot/…`, `/v1/restore`); the hypervisor takes and loads the snapshot
//! in between.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{Client, Error};

/// Parameters of the preparation of a snapshot.
#[derive(Clone, Debug, Serialize)]
pub struct Prepare {
    /// Identifies this preparation in later calls.
    pub token: String,
    /// How long freezing may take.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// Whether to sync all file systems.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sync: Option<bool>,
    /// Time after which the guest thaws itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hold_ms: Option<u64>,
}

/// The result of a preparation.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct Prepared {
    /// The token of the call.
    pub token: String,
    /// Number of frozen processes.
    #[serde(default)]
    pub frozen: u64,
    /// How long that took, in milliseconds.
    #[serde(default)]
    pub freeze_ms: f64,
    /// How long the sync took, in milliseconds.
    #[serde(default)]
    pub sync_ms: f64,
}

/// Parameters of a restore.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Restore {
    /// The token of the preparation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
    /// The time, in microseconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unix_us: Option<u64>,
    /// Random bytes for the guest's kernel, in base64.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub entropy: Option<String>,
    /// The new configuration.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub config: Option<Value>,
}

/// The result of a restore.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Restored {
    /// 1 plus the number of restores.
    pub generation: u64,
    /// Whether the kernel's random numbers were reseeded.
    #[serde(default)]
    pub reseeded: bool,
    /// By how much the clock was set, in milliseconds.
    #[serde(default)]
    pub clock_step_ms: f64,
    /// The source of the configuration.
    #[serde(default)]
    pub config: Option<String>,
    /// Names of the members that changed.
    #[serde(default)]
    pub changed: Vec<String>,
    /// How long it took, in microseconds.
    #[serde(default)]
    pub elapsed_us: u64,
}

impl Client {
    /// `POST /v1/snapshot/prepare`: freezes the workload and syncs the disks. The connections of all other calls
    /// are closed.
    pub fn prepare_snapshot(&self, prepare: &Prepare) -> Result<Prepared, Error> {
        let timeout = Duration::from_millis(prepare.timeout_ms.unwrap_or(0));
        let timeout = timeout + Client::RESPONSE_TIMEOUT;
        self.post_within(timeout, "/v1/snapshot/prepare", &json!(prepare))
    }

    /// `POST /v1/snapshot/cancel`: thaws the workload.
    pub fn cancel_snapshot(&self, token: &str) -> Result<(), Error> {
        let body = json!({"token": token});
        let _: Value = self.post_within(Client::RESPONSE_TIMEOUT, "/v1/snapshot/cancel", &body)?;
        Ok(())
    }

    /// `POST /v1/restore`: gives a clone its own identity, and thaws its workload.
    pub fn restore(&self, restore: &Restore) -> Result<Restored, Error> {
        self.post_within(Client::RESPONSE_TIMEOUT, "/v1/restore", &json!(restore))
    }
}
