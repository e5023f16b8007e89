//! Reports from the guest: the output of shell commands between markers on the console.

use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::{assets, serial::Serial};

/// A configuration whose workload is a shell that runs `script`, with the fields of `rest`.
pub fn shell(script: &str, rest: Value) -> Value {
    let mut config = rest;
    config["ExecOverride"] = json!(["/bin/sh", "-c", script]);
    config
}

/// The warnings of pigeon-init on a console, except for those about cgroup v1 controllers that the kernel
/// lacks.
pub fn warnings(console: &str) -> Vec<String> {
    let missing = assets::missing_v1_controllers().expect("a kernel to boot");
    let expected = |line: &str| {
        let of = |name: &&str| line.contains(&format!("mount cgroup on /sys/fs/cgroup/{name}:"));
        missing.iter().any(of)
    };
    let warnings = console.lines().filter(|line| line.contains("level=warn"));
    warnings
        .filter(|line| !expected(line))
        .map(String::from)
        .collect()
}

/// A shell script that runs each `(name, command)` and prints its output (both streams) and exit code between
/// markers, which [`section`] finds.
pub fn report(sections: &[(&str, &str)]) -> String {
    let part = |(name, command): &(&str, &str)| {
        format!("echo '<<< {name}'\n{{ {command}\n}} 2>&1\necho \">>> {name} $?\"\n")
    };
    sections.iter().map(part).collect()
}

/// Waits for the section `name` of a report and returns the lines of its output.
pub fn section(serial: &Serial, name: &str, timeout: Duration) -> Result<Vec<String>> {
    let (start, end) = (format!("<<< {name}"), format!(">>> {name} "));
    serial
        .wait_for_line(timeout, |line| line.starts_with(&end))
        .with_context(|| format!("no end of the section {name:?}"))?;
    let text = serial.text();
    let lines = text.lines().skip_while(|line| *line != start).skip(1);
    Ok(lines
        .take_while(|line| !line.starts_with(&end))
        .map(String::from)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::run;
    use std::process::Command;

    #[test]
    fn a_section_holds_what_its_command_printed() {
        let script = report(&[("one", "echo a; echo b >&2"), ("two", "echo c; false")]);
        let output = run(Command::new("sh").args(["-c", &script])).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let serial = Serial::record(std::io::Cursor::new(output), &log, false).unwrap();
        let section = |name| section(&serial, name, Duration::from_secs(10));
        assert_eq!(section("one").unwrap(), ["a", "b"]);
        assert_eq!(section("two").unwrap(), ["c"]);
        assert!(section("three").is_err());
        assert!(serial.text().contains("\n>>> two 1\n"));
    }
}
