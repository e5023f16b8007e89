//! Checks a VM's configuration document before it boots. The init checks it as well, but its errors appear
//! late and only on the console.

use anyhow::{Result, bail};
use serde_json::Value;

/// The type of a value.
#[derive(Clone, Copy)]
enum Shape {
    Text,
    Number,
    Flag,
    /// A signal's name or number.
    NumberOrText,
    Texts,
    /// An object whose values are strings.
    TextMap,
    /// An object whose values are numbers, `"unlimited"`, or `"SOFT:HARD"`.
    Limits,
    Object(Fields),
    /// A list of objects.
    Objects(Fields),
    /// Any value: only `pigeon` reads it.
    Other,
}

type Fields = &'static [(&'static str, Shape)];

use Shape::{Flag, Limits, Number, NumberOrText, Object, Objects, Other, Text, TextMap, Texts};

const IMAGE_CONFIG: Fields = &[
    ("Entrypoint", Texts),
    ("Cmd", Texts),
    ("Env", Texts),
    ("WorkingDir", Text),
    ("User", Text),
    ("StopSignal", NumberOrText),
    ("ExposedPorts", Other),
    ("Volumes", Other),
    ("Healthcheck", Other),
];
const IP_CONFIG: Fields = &[
    ("IP", Text),
    ("Mask", Number),
    ("Gateway", Text),
    ("Device", Text),
];
const MOUNT: Fields = &[
    ("DevicePath", Text),
    ("MountPath", Text),
    ("FSType", Text),
    ("ReadOnly", Flag),
    ("Options", Text),
];
const RESOLV: Fields = &[
    ("Nameservers", Texts),
    ("Search", Texts),
    ("Options", Texts),
];
const HOST: Fields = &[("Host", Text), ("IP", Text), ("Desc", Text)];
const DOCUMENT: Fields = &[
    ("ImageConfig", Object(IMAGE_CONFIG)),
    ("ExecOverride", Texts),
    ("CmdOverride", Text),
    ("UserOverride", Text),
    ("ExtraEnv", TextMap),
    ("MTU", Number),
    ("IPConfigs", Objects(IP_CONFIG)),
    ("Hostname", Text),
    ("Mounts", Objects(MOUNT)),
    ("RootDevice", Text),
    ("RootReadOnly", Flag),
    ("RootOverlay", Text),
    ("EtcResolv", Object(RESOLV)),
    ("EtcHosts", Objects(HOST)),
    ("Sysctls", TextMap),
    ("Rlimits", Limits),
    ("SeparateStderr", Flag),
    ("RestoreSignal", NumberOrText),
    ("Platform", Text),
];

/// Fails on the first field with a wrong type or wrong case, and names it. Unknown fields are ignored, as in
/// the init.
pub fn check(document: &Value) -> Result<()> {
    check_value(document, Object(DOCUMENT), "")
}

fn check_value(value: &Value, shape: Shape, path: &str) -> Result<()> {
    let wrong = |what: &str| -> Result<()> {
        let place = match path {
            "" => "the configuration".to_string(),
            path => path.into(),
        };
        let found = match value {
            Value::Null => "null".into(),
            Value::Bool(flag) => flag.to_string(),
            Value::Number(number) => format!("the number {number}"),
            Value::String(text) => format!("the string {text:?}"),
            Value::Array(_) => "a list".into(),
            Value::Object(_) => "an object".into(),
        };
        bail!("{place}: {what} expected, found {found}")
    };
    if value.is_null() && !path.is_empty() {
        return Ok(());
    }
    let below = |name: &str| match path {
        "" => name.to_string(),
        path => format!("{path}.{name}"),
    };
    match (shape, value) {
        (Text, Value::String(_)) | (Flag, Value::Bool(_)) | (Other, _) => Ok(()),
        (Number, Value::Number(number)) if number.is_u64() => Ok(()),
        (NumberOrText, Value::String(_)) => Ok(()),
        (NumberOrText, Value::Number(number)) if number.is_u64() => Ok(()),
        (Texts, Value::Array(items)) => items
            .iter()
            .enumerate()
            .try_for_each(|(at, item)| check_item(item, Text, &format!("{path}[{at}]"))),
        (TextMap, Value::Object(members)) => members
            .iter()
            .try_for_each(|(name, value)| check_item(value, Text, &below(name))),
        (Limits, Value::Object(members)) => members
            .iter()
            .try_for_each(|(name, value)| check_item(value, NumberOrText, &below(name))),
        (Object(fields), Value::Object(members)) => {
            for (name, value) in members {
                if let Some((_, shape)) = fields.iter().find(|(known, _)| known == name) {
                    check_value(value, *shape, &below(name))?;
                    continue;
                }
                let plain = |name: &str| name.replace(['_', '-'], "").to_ascii_lowercase();
                let meant = fields.iter().find(|(known, _)| plain(known) == plain(name));
                if let Some((known, _)) = meant {
                    bail!("{}: did you mean {known}?", below(name));
                }
            }
            Ok(())
        }
        (Objects(fields), Value::Array(items)) => items
            .iter()
            .enumerate()
            .try_for_each(|(at, item)| check_item(item, Object(fields), &format!("{path}[{at}]"))),
        (Text, _) => wrong("a string"),
        (Number, _) => wrong("a number that is not negative"),
        (NumberOrText, _) => wrong("a string or a number"),
        (Flag, _) => wrong("true or false"),
        (Texts, _) => wrong("a list of strings"),
        (TextMap, _) => wrong("an object of strings"),
        (Limits | Object(_), _) => wrong("an object"),
        (Objects(_), _) => wrong("a list of objects"),
    }
}

/// A member of a list or a map, which may not be null.
fn check_item(value: &Value, shape: Shape, path: &str) -> Result<()> {
    match value {
        Value::Null => bail!("{path}: null is not allowed here"),
        value => check_value(value, shape, path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn an_error_names_the_field_and_what_is_wrong_with_it() {
        for (document, expected) in [
            (
                json!({"ImageConfig": {"Entrypoint": "/s"}}),
                "ImageConfig.Entrypoint: a list of strings expected, found the string \"/s\"",
            ),
            (
                json!({"imageConfig": {}}),
                "imageConfig: did you mean ImageConfig?",
            ),
            (
                json!({"ImageConfig": {"working_dir": "/"}}),
                "ImageConfig.working_dir: did you mean WorkingDir?",
            ),
            (
                json!({"ExtraEnv": {"A": 1}}),
                "ExtraEnv.A: a string expected, found the number 1",
            ),
            (
                json!({"ExtraEnv": ["A=B"]}),
                "ExtraEnv: an object of strings expected, found a list",
            ),
            (
                json!({"IPConfigs": [{"Mask": 24}, {"Mask": "24"}]}),
                "IPConfigs[1].Mask: a number that is not negative expected, found the string \"24\"",
            ),
            (
                json!({"ExecOverride": ["a", null]}),
                "ExecOverride[1]: null is not allowed here",
            ),
            (
                json!({"Rlimits": {"NOFILE": true}}),
                "Rlimits.NOFILE: a string or a number expected, found true",
            ),
            (
                json!([]),
                "the configuration: an object expected, found a list",
            ),
        ] {
            assert_eq!(check(&document).unwrap_err().to_string(), expected);
        }
    }

    #[test]
    fn unknown_and_absent_members_are_accepted() {
        let document = json!({
            "Hostname": null,
            "Foreign": {"a": [1]},
            "ImageConfig": {"Labels": {}, "Cmd": ["a"], "StopSignal": 3},
            "Rlimits": {"NOFILE": 65536, "CORE": "unlimited"},
        });
        check(&document).unwrap();
    }
}
