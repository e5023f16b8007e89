//! JSON: the bodies of the API's calls and the configuration. What is taken means what serde_json
//! says it means; what serde_json takes and has no known member is taken.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pigeon_init::{
    config::Config,
    json::{self, Fault, Text, Texts},
    request::{Control, Exec, Signal},
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
        assert!(ours.bytes().eq(theirs.bytes()));
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
fn agreed<T>(bytes: &[u8], ours: &Result<T, json::Error>, known: &[&str]) -> Option<Value> {
    match (ours, second(bytes)?) {
        (Ok(_), Ok(value)) => Some(value),
        (Ok(_), Err(())) => panic!("serde_json refuses it"),
        (Err(error), Ok(value)) => {
            let names = value
                .as_object()
                .map(|object| known.iter().any(|name| object.contains_key(*name)));
            assert!(
                names != Some(false) || error.fault == Fault::TooDeep,
                "{error:?}"
            );
            None
        }
        (Err(_), Err(())) => None,
    }
}

fuzz_target!(|data: &[u8]| {
    let mut bytes = data.to_vec();
    let ours = Signal::read(&mut bytes);
    if let Some(value) = agreed(data, &ours, &["signal"]) {
        same_number(ours.unwrap().signal, value.get("signal"));
    }

    let mut bytes = data.to_vec();
    let ours = Exec::read(&mut bytes);
    if let Some(value) = agreed(data, &ours, &["cmd", "env", "cwd", "user", "timeout_ms"]) {
        let ours = ours.unwrap();
        same_texts(ours.command, value.get("cmd"));
        same_texts(ours.env, value.get("env"));
        same_text(ours.cwd, value.get("cwd"));
        same_text(ours.user, value.get("user"));
        same_number(ours.timeout_ms, value.get("timeout_ms"));
    }

    let mut bytes = data.to_vec();
    let ours = Exec::read_session(&mut bytes);
    let known = ["command", "env", "cwd", "user", "tty", "cols", "rows"];
    if let Some(value) = agreed(data, &ours, &known) {
        let ours = ours.unwrap();
        same_texts(ours.command, value.get("command"));
        assert!(matches!(value.get("tty"), None | Some(Value::Null)) || value["tty"] == ours.tty);
        same_number(ours.cols, value.get("cols"));
    }

    let mut bytes = data.to_vec();
    let ours = Control::read(&mut bytes);
    if let Some(value) = agreed(data, &ours, &["cols", "rows", "stdin"]) {
        let ours = ours.unwrap();
        same_number(ours.cols, value.get("cols"));
        same_number(ours.rows, value.get("rows"));
        same_text(ours.stdin, value.get("stdin"));
    }

    let mut bytes = data.to_vec();
    let ours = Config::read(&mut bytes);
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
        let config = ours.unwrap();
        same_texts(config.exec_override, value.get("ExecOverride"));
        let image = |name| value.get("ImageConfig").and_then(|image| image.get(name));
        same_texts(config.image_config.env, image("Env"));
        same_text(config.image_config.working_dir, image("WorkingDir"));
        let _whatever = (
            config.check().is_ok(),
            config.mtu(),
            config.argv().count(),
            config.has_command(),
        );
    }
});
