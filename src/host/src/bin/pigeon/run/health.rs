//! The image's health check, run as Docker runs it. (OCI image-spec conversion.md; moby's
//! daemon/health.go)

use std::{
    path::PathBuf,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use clap::Args;
use pigeon::{Client, Command, Error};
use serde_json::{Value, json};

use crate::vms::Claim;

/// Options in place of what an image asks for.
#[derive(Args)]
#[command(next_help_heading = "Health check")]
pub struct HealthOptions {
    /// Check the workload by this shell command: exit code 0 is healthy
    #[arg(long, value_name = "COMMAND")]
    health_cmd: Option<String>,
    /// Time between two checks, such as 500ms or 1m30s [default: the image's, else 30s]
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    health_interval: Option<Duration>,
    /// How long a check may take [default: the image's, else 30s]
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    health_timeout: Option<Duration>,
    /// Failures in a row that are unhealthy [default: the image's, else 3]
    #[arg(long, value_name = "N")]
    health_retries: Option<u32>,
    /// How long failures do not count at first [default: the image's, else 0s]
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    health_start_period: Option<Duration>,
    /// Time between two checks until then [default: the image's, else 5s]
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    health_start_interval: Option<Duration>,
    /// Ignore the image's health check
    #[arg(long, conflicts_with = "health_cmd")]
    no_healthcheck: bool,
}

impl HealthOptions {
    /// Applies the options to a configuration document.
    pub fn change(&self, document: &mut Value) {
        let image = &mut document["ImageConfig"];
        if let Some(command) = &self.health_cmd {
            image["Healthcheck"] = json!({"Test": ["CMD-SHELL", command]});
        }
        if self.no_healthcheck {
            image["Healthcheck"] = json!({"Test": ["NONE"]});
        }
        for (key, time) in [
            ("Interval", self.health_interval),
            ("Timeout", self.health_timeout),
            ("StartPeriod", self.health_start_period),
            ("StartInterval", self.health_start_interval),
        ] {
            if let Some(time) = time.and_then(|time| u64::try_from(time.as_nanos()).ok()) {
                image["Healthcheck"][key] = json!(time);
            }
        }
        if let Some(retries) = self.health_retries {
            image["Healthcheck"]["Retries"] = json!(retries);
        }
    }
}

/// Parses `500ms`, `2s`, `1m30s`.
fn parse_time(text: &str) -> Result<Duration, String> {
    let seconds = || {
        let mut rest = text;
        let mut seconds = 0.0;
        while !rest.is_empty() {
            let unit_at = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
            let (number, behind) = rest.split_at(unit_at);
            let end = behind.find(|c: char| !c.is_ascii_lowercase());
            let (unit, behind) = behind.split_at(end.unwrap_or(behind.len()));
            let factor = match unit {
                "us" => 1e-6,
                "ms" => 1e-3,
                "s" => 1.0,
                "m" => 60.0,
                "h" => 3600.0,
                _ => return None,
            };
            seconds += number.parse::<f64>().ok()? * factor;
            rest = behind;
        }
        Some(seconds).filter(|_| !text.is_empty())
    };
    // The range of nanoseconds in 64 bits.
    let time = seconds().filter(|&seconds| seconds < 1e10);
    let time = time.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    time.ok_or_else(|| "a number with ms, s, m or h is expected, as in 500ms or 1m30s".into())
}

/// The health check of an image.
#[derive(Clone, Debug, PartialEq)]
pub struct HealthCheck {
    argv: Vec<String>,
    interval: Duration,
    timeout: Duration,
    /// Failures do not count during this time.
    start_period: Duration,
    /// The interval during the start period, until the first success.
    start_interval: Duration,
    retries: u32,
}

impl HealthCheck {
    /// The health check of a configuration, if there is one.
    pub fn of(document: &Value) -> Option<HealthCheck> {
        /// Docker's defaults.
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
        // In nanoseconds; 0 means the default.
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

    /// Runs it repeatedly while the VM is up, and records the result.
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
                    // A timeout counts as a failure, as in Docker.
                    Err(Error::NotStarted(_) | Error::TimedOut(_)) => false,
                    // The VM is booting, frozen, or busy.
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
