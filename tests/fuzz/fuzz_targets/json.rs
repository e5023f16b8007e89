//! JSON: the configuration, the bodies of API calls, the text messages of a session. A document is
//! accepted exactly if a simple decoder on top of serde_json accepts it, with the same values.
#![no_main]

use libfuzzer_sys::fuzz_target;
use proto::arena::{Arena, Strings};
use proto::bodies::{
    ExecRequest, HoldRequest, Request, RestoreRequest, SessionControl, SessionRequest,
    SignalRequest, StopRequest, decode,
};
use proto::config::{Config, Mount, Overlay};
use proto::json::normalize;
use proto::message::Message;
use proto::rlimit::{Limit, Resource};
use proto::signal;
use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

/// A document as read by serde_json, with members in order, including duplicates.
#[derive(Debug, PartialEq)]
enum Node {
    Null,
    Flag(bool),
    /// As written in the document.
    Number(String),
    Text(String),
    List(Vec<Node>),
    Object(Vec<(String, Node)>),
}

/// serde_json's name for a number of any size (its feature arbitrary_precision).
const NUMBER: &str = "$serde_json::private::Number";

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Tree;
        impl<'de> Visitor<'de> for Tree {
            type Value = Node;
            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("a value")
            }
            fn visit_unit<E>(self) -> Result<Node, E> {
                Ok(Node::Null)
            }
            fn visit_bool<E>(self, flag: bool) -> Result<Node, E> {
                Ok(Node::Flag(flag))
            }
            fn visit_u64<E>(self, number: u64) -> Result<Node, E> {
                Ok(Node::Number(number.to_string()))
            }
            fn visit_i64<E>(self, number: i64) -> Result<Node, E> {
                Ok(Node::Number(number.to_string()))
            }
            fn visit_str<E>(self, text: &str) -> Result<Node, E> {
                Ok(Node::Text(text.to_owned()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Node, A::Error> {
                let mut list = Vec::new();
                while let Some(entry) = seq.next_element()? {
                    list.push(entry);
                }
                Ok(Node::List(list))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
                let mut members = Vec::new();
                while let Some((name, value)) = map.next_entry::<String, Node>()? {
                    match value {
                        Node::Text(digits) if name == NUMBER => return Ok(Node::Number(digits)),
                        value => members.push((name, value)),
                    }
                }
                Ok(Node::Object(members))
            }
        }
        deserializer.deserialize_any(Tree)
    }
}

impl Node {
    fn read(bytes: &[u8]) -> Option<Self> {
        serde_json::from_slice(bytes).ok()
    }

    fn depth(&self) -> usize {
        match self {
            Node::List(list) => 1 + list.iter().map(Node::depth).max().unwrap_or(0),
            Node::Object(members) => {
                1 + members
                    .iter()
                    .map(|(_, value)| value.depth())
                    .max()
                    .unwrap_or(0)
            }
            _ => 0,
        }
    }

    /// A non-negative integer, written as such.
    fn whole(&self) -> Option<u64> {
        match self {
            Node::Number(text) if text.bytes().all(|byte| byte.is_ascii_digit()) => {
                text.parse().ok()
            }
            _ => None,
        }
    }
}

/// The type of a value.
enum Kind {
    Text,
    Flag,
    Number(u64, u64),
    Strings(usize),
    Map(usize),
    Object(Fields),
    Objects(usize, Fields),
    Signal,
    Stdin,
    Address,
    Gateway,
    Rlimits,
}

type Fields = &'static [(&'static str, Kind)];

/// The values of a document by path. An empty string counts as absent.
type Values = BTreeMap<String, String>;

fn put(values: &mut Values, path: &str, value: impl ToString) {
    let value = value.to_string();
    if value.is_empty() {
        values.remove(path);
    } else {
        values.insert(path.to_owned(), value);
    }
}

/// A string that is valid as a C string.
fn text(node: &Node) -> Option<&str> {
    match node {
        Node::Text(text) if !text.contains('\0') => Some(text),
        _ => None,
    }
}

fn put_list(values: &mut Values, path: &str, list: &[String]) {
    // A list of empty strings is not an empty list.
    let shown = list.iter().map(|text| format!("{text:?},"));
    put(values, path, shown.collect::<String>());
}

/// Adds the members of an object to the values; `None` if one is invalid.
fn object(node: &Node, fields: Fields, path: &str, values: &mut Values) -> Option<()> {
    let Node::Object(members) = node else {
        return None;
    };
    for (name, value) in members {
        let known = fields.iter().find(|(field, _)| field == name);
        if let Some((_, kind)) = known
            && *value != Node::Null
        {
            member(value, kind, &format!("{path}{name}"), values)?;
        }
    }
    Some(())
}

fn member(node: &Node, kind: &Kind, path: &str, values: &mut Values) -> Option<()> {
    match kind {
        Kind::Text => put(values, path, text(node)?),
        Kind::Flag => match node {
            Node::Flag(flag) => put(values, path, flag),
            _ => return None,
        },
        Kind::Number(least, most) => {
            let number = node.whole()?;
            (*least..=*most).contains(&number).then_some(())?;
            put(values, path, number);
        }
        Kind::Strings(most) => {
            let Node::List(list) = node else {
                return None;
            };
            let list: Option<Vec<String>> = list
                .iter()
                .map(|entry| text(entry).map(str::to_owned))
                .collect();
            put_list(values, path, &list.filter(|list| list.len() <= *most)?);
        }
        Kind::Map(most) => {
            let Node::Object(members) = node else {
                return None;
            };
            let mut list = Vec::new();
            for (number, (name, value)) in members.iter().enumerate() {
                if *value != Node::Null {
                    let wrong = name.is_empty() || name.contains(['=', '\0']) || number >= *most;
                    (!wrong).then_some(())?;
                    list.push(format!("{name}={}", text(value)?));
                }
            }
            put_list(values, path, &list);
        }
        Kind::Object(fields) => object(node, fields, &format!("{path}."), values)?,
        Kind::Objects(most, fields) => {
            let Node::List(list) = node else {
                return None;
            };
            (list.len() <= *most).then_some(())?;
            values.retain(|other, _| !other.starts_with(&format!("{path}[")));
            put(values, path, list.len());
            for (at, entry) in list.iter().enumerate() {
                object(entry, fields, &format!("{path}[{at}]."), values)?;
            }
        }
        Kind::Signal => match scalar(node)?.as_str() {
            "" => put(values, path, ""),
            text => put(values, path, signal::parse(text)?.number()),
        },
        Kind::Stdin => {
            (text(node)? == "eof").then_some(())?;
            put(values, path, "eof");
        }
        Kind::Address => put(values, path, text(node)?.parse::<IpAddr>().ok()?),
        Kind::Gateway => match text(node)? {
            "" => put(values, path, ""),
            text => {
                let (address, prefix) = text.split_once('/').unwrap_or((text, "0"));
                let is_prefix = prefix.bytes().all(|byte| byte.is_ascii_digit())
                    && prefix.parse::<u128>().is_ok_and(|bits| bits <= 128);
                is_prefix.then_some(())?;
                put(values, path, address.parse::<IpAddr>().ok()?);
            }
        },
        Kind::Rlimits => {
            let Node::Object(members) = node else {
                return None;
            };
            for (name, value) in members {
                if *value != Node::Null {
                    let resource = Resource::parse(name)?;
                    let limit = Limit::parse(&scalar(value)?)?;
                    put(values, &format!("{path}.{resource:?}"), shown_limit(limit));
                }
            }
        }
    }
    Some(())
}

/// A string, or an integer as one.
fn scalar(node: &Node) -> Option<String> {
    let number = node.whole().map(|number| number.to_string());
    number.or_else(|| text(node).map(str::to_owned))
}

fn shown_limit(limit: Limit) -> String {
    format!("{:?}:{:?}", limit.soft, limit.hard)
}

const MOUNT: Fields = &[
    ("DevicePath", Kind::Text),
    ("MountPath", Kind::Text),
    ("FSType", Kind::Text),
    ("ReadOnly", Kind::Flag),
    ("Options", Kind::Text),
];

const CONFIG: Fields = &[
    (
        "ImageConfig",
        Kind::Object(&[
            ("Entrypoint", Kind::Strings(1024)),
            ("Cmd", Kind::Strings(1024)),
            ("Env", Kind::Strings(4096)),
            ("WorkingDir", Kind::Text),
            ("User", Kind::Text),
            ("StopSignal", Kind::Signal),
        ]),
    ),
    ("ExecOverride", Kind::Strings(1024)),
    ("CmdOverride", Kind::Text),
    ("UserOverride", Kind::Text),
    ("ExtraEnv", Kind::Map(4096)),
    ("MTU", Kind::Number(0, 65_535)),
    (
        "IPConfigs",
        Kind::Objects(
            64,
            &[
                ("Gateway", Kind::Gateway),
                ("IP", Kind::Address),
                ("Mask", Kind::Number(0, 128)),
                ("Device", Kind::Text),
            ],
        ),
    ),
    ("Hostname", Kind::Text),
    ("Mounts", Kind::Objects(64, MOUNT)),
    ("RootDevice", Kind::Text),
    ("RootReadOnly", Kind::Flag),
    ("RootOverlay", Kind::Text),
    (
        "EtcResolv",
        Kind::Object(&[
            ("Nameservers", Kind::Strings(16)),
            ("Search", Kind::Strings(32)),
            ("Options", Kind::Strings(32)),
        ]),
    ),
    (
        "EtcHosts",
        Kind::Objects(
            256,
            &[
                ("Host", Kind::Text),
                ("IP", Kind::Text),
                ("Desc", Kind::Text),
            ],
        ),
    ),
    ("Rlimits", Kind::Rlimits),
    ("Sysctls", Kind::Map(256)),
    ("SeparateStderr", Kind::Flag),
    ("RestoreSignal", Kind::Signal),
];

const DAY: u64 = 86_400_000;

const RESTORE: Fields = &[
    ("token", Kind::Text),
    ("unix_us", Kind::Number(0, i64::MAX as u64 / 1000)),
    ("entropy", Kind::Text),
    ("config", Kind::Object(CONFIG)),
];

fn strings(strings: Strings) -> Vec<String> {
    let shown = strings.iter().map(|string| string.to_str().unwrap());
    shown.map(str::to_owned).collect()
}

fn mount_values(mount: &Mount, path: &str, values: &mut Values) {
    for (name, value) in [
        ("DevicePath", mount.device_path),
        ("MountPath", mount.mount_path),
        ("FSType", mount.fs_type),
        ("Options", mount.options),
    ] {
        put(values, &format!("{path}{name}"), value.to_str().unwrap());
    }
    put(values, &format!("{path}ReadOnly"), mount.read_only);
}

/// The values that our decoder has found in a configuration, as far as they are accessible.
fn config_values(config: &Config, path: &str, values: &mut Values) {
    let mut put =
        |name: &str, value: &dyn ToString| put(values, &format!("{path}{name}"), value.to_string());
    let image = &config.image_config;
    for (name, list) in [
        ("ImageConfig.Entrypoint", image.entrypoint),
        ("ImageConfig.Cmd", image.cmd),
        ("ImageConfig.Env", image.env),
        ("ExecOverride", config.exec_override),
        ("ExtraEnv", config.extra_env),
        ("EtcResolv.Nameservers", config.etc_resolv.nameservers),
        ("EtcResolv.Search", config.etc_resolv.search),
        ("EtcResolv.Options", config.etc_resolv.options),
    ] {
        let shown = strings(list).into_iter().map(|text| format!("{text:?},"));
        put(name, &shown.collect::<String>());
    }
    put(
        "ImageConfig.WorkingDir",
        &image.working_dir.to_str().unwrap(),
    );
    put("ImageConfig.User", &image.user);
    put("CmdOverride", &config.cmd_override.to_str().unwrap());
    put("UserOverride", &config.user_override);
    put("Hostname", &config.hostname);
    put("RootReadOnly", &config.root_read_only);
    put("SeparateStderr", &config.separate_stderr);
    put("MTU", &config.mtu());
    put("RootDevice", &config.root_device().to_str().unwrap());
    for (name, signal) in [
        ("ImageConfig.StopSignal", image.stop_signal),
        ("RestoreSignal", config.restore_signal),
    ] {
        if let Some(signal) = signal {
            put(name, &signal.number());
        }
    }
    let sysctls = config
        .sysctls()
        .map(|(name, value)| format!("{:?},", format!("{name}={value}")));
    put("Sysctls", &sysctls.collect::<String>());
    for (resource, limit) in config.rlimits.iter() {
        put(&format!("Rlimits.{resource:?}"), &shown_limit(limit));
    }
    for (name, count) in [
        ("IPConfigs", config.ip_configs.len()),
        ("Mounts", config.mounts.len()),
        ("EtcHosts", config.etc_hosts.len()),
    ] {
        put(name, &count);
    }
    for (at, host) in config.etc_hosts.iter().enumerate() {
        for (name, value) in [("Host", host.host), ("IP", host.ip), ("Desc", host.desc)] {
            put(&format!("EtcHosts[{at}].{name}"), &value);
        }
    }
    // Incomplete ones are not accessible.
    if config.addresses().count() == config.ip_configs.len() {
        for (at, address) in config.addresses().enumerate() {
            let path = format!("IPConfigs[{at}]");
            put(&format!("{path}.IP"), &address.ip);
            put(&format!("{path}.Mask"), &address.prefix);
            put(&format!("{path}.Device"), &address.device);
            if let Some(gateway) = address.gateway {
                put(&format!("{path}.Gateway"), &gateway);
            }
        }
    }
    for (at, mount) in config.mounts.iter().enumerate() {
        mount_values(mount, &format!("{path}Mounts[{at}]."), values);
    }
}

/// Adds defaults to the values of the simple decoder, and removes inaccessible ones.
fn complete_config(config: &Config, path: &str, values: &mut Values) {
    let mut default = |name: &str, value: &str, absent: &str| {
        let known = values
            .entry(format!("{path}{name}"))
            .or_insert(value.to_owned());
        if known == absent {
            *known = value.to_owned();
        }
    };
    default("MTU", "1500", "0");
    default("RootDevice", "/dev/vda", "");
    for name in ["RootReadOnly", "SeparateStderr"] {
        default(name, "false", "");
    }
    for name in ["IPConfigs", "Mounts", "EtcHosts"] {
        default(name, "0", "");
    }
    for at in 0..config.mounts.len() {
        default(&format!("Mounts[{at}].ReadOnly"), "false", "");
    }
    for at in 0..config.ip_configs.len() {
        default(&format!("IPConfigs[{at}].Device"), "eth0", "");
    }
    if config.addresses().count() < config.ip_configs.len() {
        values.retain(|name, _| !name.starts_with(&format!("{path}IPConfigs[")));
    }
    let overlay = values
        .remove(&format!("{path}RootOverlay"))
        .unwrap_or_default();
    let expected = match overlay.split_once(':') {
        _ if overlay.starts_with('/') => format!("device {overlay}"),
        _ if overlay == "tmpfs" => "tmpfs ".to_owned(),
        Some(("tmpfs", options)) => format!("tmpfs {options}"),
        _ => String::new(),
    };
    let ours = match config.root_overlay() {
        Some(Overlay::Tmpfs(options)) => format!("tmpfs {}", options.to_str().unwrap()),
        Some(Overlay::Device(device)) => format!("device {}", device.to_str().unwrap()),
        None => String::new(),
    };
    assert_eq!(ours, expected);
}

/// Whether the document's form is invalid, which the simple decoder also detects; other errors are
/// about bodies of a valid form.
fn is_of_the_form(why: &str) -> bool {
    const BESIDE: [&str; 9] = [
        "missing",
        "longer than",
        "must have a command",
        "must be 1 to",
        "must be without",
        "not an absolute path",
        "not a type of file system",
        "would hide",
        "has '..'",
    ];
    let reason = why.split_once(": ").map_or(why, |(_, reason)| reason);
    !BESIDE.iter().any(|beside| reason.starts_with(beside))
}

/// Both decoders must agree whether the object is valid.
fn agree(ours: Result<(), &Message>, node: Option<&Node>, fields: Fields) -> Option<Values> {
    let mut values = Values::new();
    let theirs = node.and_then(|node| object(node, fields, "", &mut values));
    match ours {
        Ok(()) => {
            assert!(theirs.is_some(), "accepted, but {node:?} is invalid");
            Some(values)
        }
        Err(why) => {
            let why = why.as_str();
            assert!(
                theirs.is_none() || !is_of_the_form(why),
                "{why}, but {values:?} was accepted"
            );
            None
        }
    }
}

/// Decodes the bytes, and compares the values from `show` with those of the simple decoder, in
/// which `show` corrects the inaccessible ones.
fn same<'m, T>(
    (data, node): (&[u8], Option<&Node>),
    fields: Fields,
    memory: &'m mut Vec<u8>,
    decode: impl Fn(&mut [u8], &mut Arena<'m>) -> Result<T, Message>,
    show: impl FnOnce(&T, &mut Values, &mut Values),
) {
    memory.resize(3 * data.len(), 0);
    // An arena of the document's length is sufficient.
    let (memory, more) = memory.split_at_mut(data.len());
    let decoded = decode(&mut data.to_vec(), &mut Arena::new(memory));
    let again = decode(&mut data.to_vec(), &mut Arena::new(more));
    match (&decoded, &again) {
        (Err(why), Err(again)) => assert_eq!(why.as_str(), again.as_str()),
        _ => assert_eq!(decoded.is_ok(), again.is_ok()),
    }
    if let Some(mut theirs) = agree(decoded.as_ref().map(drop), node, fields) {
        let mut ours = Values::new();
        show(&decoded.unwrap(), &mut ours, &mut theirs);
        // An absent value is the same as the default.
        for values in [&mut ours, &mut theirs] {
            values.retain(|_, value| value != "0" && value != "false");
        }
        assert_eq!(ours, theirs);
    }
}

fn request<'a, R: Request<'a> + Default>(
    body: &mut [u8],
    arena: &mut Arena<'a>,
) -> Result<Box<R>, Message> {
    let mut request = Box::new(R::default());
    decode(body, arena, &mut *request)?;
    Ok(request)
}

/// A [`RestoreRequest`], with its configuration.
struct Restore<'a> {
    token: &'a str,
    unix_us: Option<u64>,
    entropy: &'a str,
    has_config: bool,
    config: Box<Config<'a>>,
}

fn restore<'a>(body: &mut [u8], arena: &mut Arena<'a>) -> Result<Restore<'a>, Message> {
    let mut config = Box::new(Config::new());
    let mut request = RestoreRequest::new(&mut config);
    decode(body, arena, &mut request)?;
    let RestoreRequest {
        token,
        unix_us,
        entropy,
        has_config,
        ..
    } = request;
    Ok(Restore {
        token,
        unix_us,
        entropy,
        has_config,
        config,
    })
}

fn config<'a>(document: &mut [u8], arena: &mut Arena<'a>) -> Result<Box<Config<'a>>, Message> {
    let mut config = Box::new(Config::new());
    config.decode(document, arena)?;
    Ok(config)
}

/// Adds a field to the values.
macro_rules! show {
    ($values:ident, $($name:literal = $value:expr),* $(,)?) => {
        $(put($values, $name, $value);)*
    };
}

fuzz_target!(|data: &[u8]| {
    if data
        .windows(NUMBER.len())
        .any(|part| part == NUMBER.as_bytes())
    {
        return;
    }
    let second = Node::read(data);
    let mut normalized = data.to_vec();
    let first = normalize(&mut normalized);
    let node = match &first {
        Ok(()) => {
            let node = Node::read(&normalized);
            assert!(node.is_some(), "serde_json rejects the normalized text");
            let again = normalized.clone();
            assert!(normalize(&mut normalized).is_ok() && normalized == again);
            // serde_json does not accept half a surrogate pair.
            let has_surrogates = data
                .windows(3)
                .any(|part| part.eq_ignore_ascii_case(b"\\ud"));
            assert!(second == node || (second.is_none() && has_surrogates));
            node
        }
        Err(why) => {
            let too_deep = why.as_str().contains("nested deeper");
            assert!(
                second
                    .as_ref()
                    .is_none_or(|node| too_deep && node.depth() > 64)
            );
            second
        }
    };
    let document = (data, node.as_ref());
    let mut memory = Vec::new();

    const SIGNAL: Fields = &[("signal", Kind::Number(1, 64))];
    same(
        document,
        SIGNAL,
        &mut memory,
        request::<SignalRequest>,
        |request, ours, _| {
            show!(ours, "signal" = request.signal);
        },
    );

    const EXEC: Fields = &[
        ("cmd", Kind::Strings(1024)),
        ("env", Kind::Strings(4096)),
        ("cwd", Kind::Text),
        ("user", Kind::Text),
        ("timeout_ms", Kind::Number(0, DAY)),
    ];
    same(
        document,
        EXEC,
        &mut memory,
        request::<ExecRequest>,
        |request, ours, _| {
            put_list(ours, "cmd", &strings(request.spec.argv));
            put_list(ours, "env", &strings(request.spec.env));
            show!(
                ours,
                "cwd" = request.spec.cwd.to_str().unwrap(),
                "user" = request.spec.user,
                "timeout_ms" = request.timeout_ms,
            );
        },
    );

    const SESSION: Fields = &[
        ("command", Kind::Strings(1024)),
        ("tty", Kind::Flag),
        ("env", Kind::Strings(4096)),
        ("cwd", Kind::Text),
        ("user", Kind::Text),
        ("cols", Kind::Number(0, 65_535)),
        ("rows", Kind::Number(0, 65_535)),
        ("streams", Kind::Flag),
        ("id", Kind::Text),
        ("attach", Kind::Text),
    ];
    same(
        document,
        SESSION,
        &mut memory,
        request::<SessionRequest>,
        |request, ours, _| {
            put_list(ours, "command", &strings(request.spec.argv));
            put_list(ours, "env", &strings(request.spec.env));
            show!(
                ours,
                "tty" = request.spec.tty,
                "cwd" = request.spec.cwd.to_str().unwrap(),
                "user" = request.spec.user,
                "cols" = request.cols,
                "rows" = request.rows,
                "streams" = request.streams,
                "id" = request.id,
                "attach" = request.attach,
            );
        },
    );

    const CONTROL: Fields = &[
        ("cols", Kind::Number(0, 65_535)),
        ("rows", Kind::Number(0, 65_535)),
        ("stdin", Kind::Stdin),
    ];
    same(
        document,
        CONTROL,
        &mut memory,
        request::<SessionControl>,
        |control, ours, _| {
            let stdin = control.stdin.map_or("", |_| "eof");
            show!(
                ours,
                "cols" = control.cols,
                "rows" = control.rows,
                "stdin" = stdin
            );
        },
    );

    const STOP: Fields = &[
        ("signal", Kind::Signal),
        ("timeout_ms", Kind::Number(0, DAY)),
    ];
    same(
        document,
        STOP,
        &mut memory,
        request::<StopRequest>,
        |request, ours, _| {
            show!(
                ours,
                "signal" = request.signal.map_or(0, |signal| signal.number()),
                "timeout_ms" = request.timeout_ms.unwrap_or(0),
            );
        },
    );

    same(
        document,
        MOUNT,
        &mut memory,
        request::<Mount>,
        |request, ours, _| {
            mount_values(request, "", ours);
        },
    );

    const PREPARE: Fields = &[
        ("token", Kind::Text),
        ("timeout_ms", Kind::Number(0, DAY)),
        ("sync", Kind::Flag),
        ("hold_ms", Kind::Number(0, DAY)),
    ];
    same(
        document,
        PREPARE,
        &mut memory,
        request::<HoldRequest>,
        |request, ours, _| {
            show!(
                ours,
                "token" = request.token,
                "timeout_ms" = request.timeout_ms.unwrap_or(0),
                "sync" = request.sync.unwrap_or(false),
                "hold_ms" = request.hold_ms.unwrap_or(0),
            );
        },
    );

    same(
        document,
        RESTORE,
        &mut memory,
        restore,
        |request, ours, theirs| {
            show!(
                ours,
                "token" = request.token,
                "unix_us" = request.unix_us.unwrap_or(0),
                "entropy" = request.entropy,
            );
            let given = match document.1 {
                Some(Node::Object(members)) => members
                    .iter()
                    .any(|(name, value)| name == "config" && *value != Node::Null),
                _ => false,
            };
            assert_eq!(request.has_config, given);
            config_values(&request.config, "config.", ours);
            complete_config(&request.config, "config.", theirs);
        },
    );

    same(
        document,
        CONFIG,
        &mut memory,
        config,
        |config, ours, theirs| {
            config_values(config, "", ours);
            complete_config(config, "", theirs);
            assert_eq!(config.has_command(), config.argv().count() > 0);
            if config.check().is_ok() {
                assert_eq!(config.addresses().count(), config.ip_configs.len());
                assert!(
                    config
                        .mounts
                        .iter()
                        .all(|mount| !mount.mount_path.is_empty())
                );
            }
        },
    );
});
