//! The image's health check, run as Docker runs it. (OCI image-spec conversion.md; moby's
//! daemon/health.go)

use std::{
    path::PathBuf,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use pigeon::{Client, Command, Error};
use serde_json::Value;

use crate::vms::Claim;

/// What an image asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct HealthCheck {
    argv: Vec<String>,
    interval: Duration,
    timeout: Duration,
    /// Until then failures do not count.
    start_period: Duration,
    /// In place of the interval, in the start period as long as it has never succeeded.
    start_interval: Duration,
    retries: u32,
}

impl HealthCheck {
    /// The one of a configuration, if it has one.
    pub fn of(document: &Value) -> Option<HealthCheck> {
        /// As Docker has them where the image says nothing.
        const INTERVAL: Duration = Duration::from_secs(30);
        const START_INTERVAL: Duration = Duration::from_secs(5);
        const RETRIES: u32 = 3;
        let check = &document["ImageConfig"]["Healthcheck"];
        let test: Vec<String> = check["Test"]
            .as_array()?
            .iter()
            .filter_map(|word| word.as_str().map(String::from))
            .collect();
        let argv = match test.split_first()? {
            (kind, words) if kind == "CMD" && !words.is_empty() => words.to_vec(),
            (kind, [script]) if kind == "CMD-SHELL" => {
                ["/bin/sh", "-c", script].map(String::from).to_vec()
            }
            _ => return None,
        };
        // In nanoseconds; 0 is what is usual.
        let time = |key: &str, usual| match check[key].as_u64() {
            None | Some(0) => usual,
            Some(nanoseconds) => Duration::from_nanos(nanoseconds),
        };
        let retries = check["Retries"].as_u64().and_then(|n| n.try_into().ok());
        Some(HealthCheck {
            argv,
            interval: time("Interval", INTERVAL),
            timeout: time("Timeout", INTERVAL),
            start_period: time("StartPeriod", Duration::ZERO),
            start_interval: time("StartInterval", START_INTERVAL),
            retries: retries.filter(|&retries| retries > 0).unwrap_or(RETRIES),
        })
    }

    /// Runs it from now on, as long as the VM is up, and records what it says.
    pub fn start(self, uds: PathBuf, claim: Arc<Claim>) {
        let set = move |health: &str| {
            let _ = claim.update(|record| record.health = Some(health.into()));
        };
        set("starting");
        thread::spawn(move || {
            let client = Client::new(uds);
            let command = Command::new(self.argv.clone()).timeout(self.timeout);
            let begun = Instant::now();
            let (mut succeeded, mut failures) = (false, 0);
            loop {
                let starts = !succeeded && begun.elapsed() < self.start_period;
                thread::sleep(match starts {
                    true => self.start_interval,
                    false => self.interval,
                });
                let healthy = match client.exec(&command) {
                    Ok(output) => output.exit_code == 0,
                    Err(Error::NotStarted(_)) => false,
                    // It boots, is frozen, or busy.
                    Err(_) => continue,
                };
                match healthy {
                    true => (succeeded, failures) = (true, 0),
                    false if starts => continue,
                    false => failures += 1,
                }
                match failures {
                    0 => set("healthy"),
                    _ if failures >= self.retries => set("unhealthy"),
                    _ => {}
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_health_check_has_a_command_and_times_in_nanoseconds() {
        let of = |check: Value| HealthCheck::of(&json!({"ImageConfig": {"Healthcheck": check}}));
        let check = of(json!({
            "Test": ["CMD-SHELL", "pg_isready || exit 1"],
            "Interval": 1_500_000_000,
            "Retries": 5,
        }))
        .unwrap();
        assert_eq!(check.argv, ["/bin/sh", "-c", "pg_isready || exit 1"]);
        assert_eq!(check.interval, Duration::from_millis(1500));
        assert_eq!((check.timeout, check.retries), (Duration::from_secs(30), 5));
        assert_eq!(check.start_period, Duration::ZERO);
        assert_eq!(check.start_interval, Duration::from_secs(5));
        assert_eq!(
            of(json!({"Test": ["CMD", "/a", "b"]})).unwrap().argv,
            ["/a", "b"]
        );
        for none in [
            json!({"Test": ["NONE"]}),
            json!({"Test": []}),
            json!({}),
            json!(null),
        ] {
            assert_eq!(of(none), None);
        }
    }
}
