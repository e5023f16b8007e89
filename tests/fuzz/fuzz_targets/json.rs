//! JSON: the bodies of the API's calls and the configuration. What is taken means what serde_json
//! says it means; what serde_json takes and has no known member is taken.
#![no_main]

use libfuzzer_sys::fuzz_target;
use proto::{
    config::Config,
    json::{Spans, Text, Texts},
    request::{self, Control, Exec},
    text::Line,
};
use serde_json::Value;

/// A second opinion; `None` where the two differ by intention: half a surrogate pair is U+FFFD for
/// one and an error for the other.
fn second(bytes: &[u8]) -> Option<Result<Value, ()>> {
    let surrogates = bytes
        .windows(3)
        .any(|part| part.eq_ignore_ascii_case(b"\\ud"));
    (!surrogates).then(|| serde_json::from_slice(bytes).map_err(drop))
}

fn same_text(ours: Text, value: Option<&Value>) {
    // An absent member is empty; so is one that is null, of which there may be two.
    if let Some(Value::String(theirs)) = value {
        assert!(ours.bytes() == theirs.as_bytes());
    } else {
        assert!(matches!(value, None | Some(Value::Null)));
    }
}

fn same_texts(ours: Texts, value: Option<&Value>) {
    if let Some(Value::Array(theirs)) = value {
        assert_eq!(ours.iter().count(), theirs.len());
        for (ours, theirs) in ours.iter().zip(theirs) {
            same_text(ours, Some(theirs));
        }
    } else {
        assert!(matches!(value, None | Some(Value::Null)));
    }
}

fn same_number(ours: u32, value: Option<&Value>) {
    match value {
        Some(Value::Number(theirs)) => assert_eq!(theirs.as_u64(), Some(u64::from(ours))),
        _ => assert!(matches!(value, None | Some(Value::Null))),
    }
}

/// What they say of it, when both take the document; both must agree whether it is one.
fn agreed<T>(bytes: &[u8], ours: &Result<T, Line>, known: &[&str]) -> Option<Value> {
    match (ours, second(bytes)?) {
        (Ok(_), Ok(value)) => Some(value),
        (Ok(_), Err(())) => panic!("serde_json refuses it"),
        (Err(error), Ok(value)) => {
            let names = value
                .as_object()
                .map(|object| known.iter().any(|name| object.contains_key(*name)));
            assert!(
                names != Some(false) || error.as_bytes().ends_with(b"nested deeper than 64 levels"),
                "{}", String::from_utf8_lossy(error.as_bytes())
            );
            None
        }
        (Err(_), Err(())) => None,
    }
}

fuzz_target!(|data: &[u8]| {
    let mut spans = Spans::default();
    let mut bytes = data.to_vec();
    let ours = request::signal(&mut bytes);
    if let Some(value) = agreed(data, &ours, &["signal"]) {
        same_number(ours.unwrap(), value.get("signal"));
    }

    let mut bytes = data.to_vec();
    let ours = Exec::read(&mut bytes, &mut spans);
    if let Some(value) = agreed(data, &ours, &["cmd", "env", "cwd", "user", "timeout_ms"]) {
        let ours = ours.unwrap();
        same_texts(ours.command(), value.get("cmd"));
        same_texts(ours.env(), value.get("env"));
        same_text(ours.cwd(), value.get("cwd"));
        same_text(ours.user(), value.get("user"));
        same_number(ours.timeout_ms(), value.get("timeout_ms"));
    }

    let mut bytes = data.to_vec();
    let ours = Exec::read_session(&mut bytes, &mut spans);
    let known = ["command", "env", "cwd", "user", "tty", "cols", "rows"];
    if let Some(value) = agreed(data, &ours, &known) {
        let ours = ours.unwrap();
        same_texts(ours.command(), value.get("command"));
        assert!(matches!(value.get("tty"), None | Some(Value::Null)) || value["tty"] == ours.tty());
        same_number(ours.size().0, value.get("cols"));
        same_number(ours.size().1, value.get("rows"));
    }

    let mut bytes = data.to_vec();
    let ours = Control::read(&mut bytes, &mut spans);
    if let Some(value) = agreed(data, &ours, &["cols", "rows", "stdin"]) {
        let ours = ours.unwrap();
        same_number(ours.size().0, value.get("cols"));
        same_number(ours.size().1, value.get("rows"));
        if let Some(Value::String(theirs)) = value.get("stdin") {
            assert_eq!(ours.ends_stdin(), theirs == "eof");
        }
    }

    let mut bytes = data.to_vec();
    let ours = Config::decode(&mut bytes, &mut spans);
    let known = [
        "ImageConfig",
        "ExecOverride",
        "CmdOverride",
        "UserOverride",
        "ExtraEnv",
        "MTU",
        "IPConfigs",
        "Hostname",
        "Mounts",
        "RootDevice",
        "EtcResolv",
        "EtcHosts",
    ];
    if let Some(value) = agreed(data, &ours, &known) {
        let config = Config::new(&bytes, &spans);
        let image = |name| value.get("ImageConfig").and_then(|image| image.get(name));
        same_text(config.working_dir(), image("WorkingDir"));
        same_text(config.hostname(), value.get("Hostname"));
        let same_count = |ours: usize, value: Option<&Value>| match value {
            Some(Value::Array(theirs)) => assert_eq!(ours, theirs.len()),
            _ => assert!(matches!(value, None | Some(Value::Null))),
        };
        same_count(config.mounts().count(), value.get("Mounts"));
        same_count(config.ip_configs().count(), value.get("IPConfigs"));
        same_count(config.etc_hosts().count(), value.get("EtcHosts"));
        if let Some(Value::Array(theirs)) = value.get("ExecOverride")
            && !theirs.is_empty()
        {
            assert_eq!(config.argv().count(), theirs.len());
        }
        let entries = config.environment().into_iter().flat_map(Texts::iter);
        let mut limit = entries.map(|entry| entry.bytes().len());
        assert!(limit.all(|length| length <= data.len()));
        let _whatever = (
            config.check().is_ok(),
            config.mtu(),
            config.user(),
            config.root_device(),
        );
        let _whatever = (config.has_command(), config.nameservers().iter().count());
    }
});
