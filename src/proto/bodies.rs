//! The JSON bodies of API calls, and the text messages of a session.

use crate::arena::{Arena, Strings};
use crate::bytes::is_name_byte;
use crate::config::{Config, MAX_ARGS, MAX_ENV_ENTRIES, Mount};
use crate::json::{self, Object, Parse, Place};
use crate::message;
use crate::message::Message;
use crate::signal::Signal;
use core::ffi::CStr;
use serde::Deserialize;
use serde::de::IntoDeserializer;
use serde::de::value::Error;

/// Maximum value of a time in a request, in milliseconds: a day.
const MAX_TIMEOUT_MS: u64 = 86_400_000;
/// Maximum size of a terminal, in rows or columns (struct winsize has 16 bits, ioctl_tty(2)).
const MAX_TERMINAL_SIZE: u64 = 65_535;
/// Maximum length of a session's name, and of a token, in bytes.
pub const MAX_ID: usize = 64;

/// A decoded request body or WebSocket text message.
pub trait Request<'a>: Object<'a> {
    /// Checks what decoding does not. The error names the field.
    fn check(&self) -> Result<(), Message> {
        Ok(())
    }
}

/// Decodes a body, in place, into an empty request. The error names the invalid field, for a 400.
pub fn decode<'a>(
    body: &mut [u8],
    arena: &mut Arena<'a>,
    request: &mut dyn Request<'a>,
) -> Result<(), Message> {
    json::decode(body, arena, request)?;
    request.check()
}

/// `POST /v1/signals`.
#[derive(Clone, Copy, Debug, Default)]
pub struct SignalRequest {
    /// From 1 to 64.
    pub signal: u8,
}

impl<'a> Object<'a> for SignalRequest {
    fn member(&mut self, name: &str) -> Place<'_, 'a> {
        match name {
            "signal" => Place::Number(&mut self.signal, 1..=64),
            _ => Place::Unknown,
        }
    }
}

impl<'a> Request<'a> for SignalRequest {
    fn check(&self) -> Result<(), Message> {
        match self.signal {
            0 => Err(message!("signal: missing")),
            _ => Ok(()),
        }
    }
}

/// A command.
#[derive(Clone, Copy, Debug, Default)]
pub struct CommandSpec<'a> {
    /// Its arguments; the first is the program's name, and not empty.
    pub argv: Strings<'a>,
    /// Set on top of the workload's environment: `NAME=value`.
    pub env: Strings<'a>,
    /// Working directory; empty is the workload's.
    pub cwd: &'a CStr,
    /// As `UserOverride` in the configuration; empty is root.
    pub user: &'a str,
    /// Whether it has a terminal.
    pub tty: bool,
}

impl<'a> CommandSpec<'a> {
    /// The common members of calls; the name of the arguments differs.
    fn member(&mut self, name: &str, arguments: &str) -> Place<'_, 'a> {
        match name {
            "env" => Place::Strings(&mut self.env, MAX_ENV_ENTRIES),
            "cwd" => Place::CStr(&mut self.cwd),
            "user" => Place::Str(&mut self.user),
            _ if name == arguments => Place::Strings(&mut self.argv, MAX_ARGS),
            _ => Place::Unknown,
        }
    }

    fn check(&self, arguments: &str) -> Result<(), Message> {
        if self.argv.first().is_none_or(CStr::is_empty) {
            return Err(message!("{arguments}: must have a command"));
        }
        Ok(())
    }
}

/// `POST /v1/exec`.
#[derive(Clone, Copy, Debug, Default)]
pub struct ExecRequest<'a> {
    /// The command, whose arguments are `cmd`.
    pub spec: CommandSpec<'a>,
    /// Time limit in milliseconds; 0 is the default.
    pub timeout_ms: u32,
}

impl<'a> Object<'a> for ExecRequest<'a> {
    fn member(&mut self, name: &str) -> Place<'_, 'a> {
        match name {
            "timeout_ms" => Place::Number(&mut self.timeout_ms, 0..=MAX_TIMEOUT_MS),
            _ => self.spec.member(name, "cmd"),
        }
    }
}

impl<'a> Request<'a> for ExecRequest<'a> {
    fn check(&self) -> Result<(), Message> {
        self.spec.check("cmd")
    }
}

/// The first text message of `GET /v1/ws/exec`.
#[derive(Clone, Copy, Debug, Default)]
pub struct SessionRequest<'a> {
    /// The command, whose arguments are `command`; empty with `attach`.
    pub spec: CommandSpec<'a>,
    /// The terminal's columns; 0 is unknown.
    pub cols: u16,
    /// The terminal's rows; 0 is unknown.
    pub rows: u16,
    /// Whether each binary message begins with the number of its stream.
    pub streams: bool,
    /// Name of the session; empty is none.
    pub id: &'a str,
    /// Name of the session to attach to; empty is none.
    pub attach: &'a str,
}

impl<'a> Object<'a> for SessionRequest<'a> {
    fn member(&mut self, name: &str) -> Place<'_, 'a> {
        match name {
            "tty" => Place::Flag(&mut self.spec.tty),
            "cols" => Place::Number(&mut self.cols, 0..=MAX_TERMINAL_SIZE),
            "rows" => Place::Number(&mut self.rows, 0..=MAX_TERMINAL_SIZE),
            "streams" => Place::Flag(&mut self.streams),
            "id" => Place::Str(&mut self.id),
            "attach" => Place::Str(&mut self.attach),
            _ => self.spec.member(name, "command"),
        }
    }
}

impl<'a> Request<'a> for SessionRequest<'a> {
    fn check(&self) -> Result<(), Message> {
        let is_wrong = |id: &str| !id.is_empty() && !is_id(id);
        if is_wrong(self.id) {
            return Err(wrong_id("id"));
        }
        if is_wrong(self.attach) {
            return Err(wrong_id("attach"));
        }
        if self.attach.is_empty() {
            self.spec.check("command")
        } else if self.spec.argv.is_empty() && self.id.is_empty() {
            Ok(())
        } else {
            Err(message!("attach: must be without command and id"))
        }
    }
}

/// Whether a string is a valid session name: 1 to 64 of `A-Z a-z 0-9 . _ -`.
pub fn is_id(text: &str) -> bool {
    (1..=MAX_ID).contains(&text.len()) && text.bytes().all(is_name_byte)
}

fn wrong_id(field: &str) -> Message {
    message!("{field}: must be 1 to {MAX_ID} of A-Z a-z 0-9 . _ -")
}

/// A later text message of a session: `{"cols":N,"rows":N}` or `{"stdin":"eof"}`.
#[derive(Clone, Copy, Debug, Default)]
pub struct SessionControl {
    /// The terminal's new columns; 0 is no change.
    pub cols: u16,
    /// The terminal's new rows; 0 is no change.
    pub rows: u16,
    /// A change of standard input.
    pub stdin: Option<Stdin>,
}

/// A change of a session's standard input.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stdin {
    /// It ends.
    Eof,
}

impl Parse for Option<Stdin> {
    fn parse(&mut self, text: &str) -> Result<(), &'static str> {
        let text = IntoDeserializer::<Error>::into_deserializer(text);
        *self = Some(Stdin::deserialize(text).map_err(|_| "must be eof")?);
        Ok(())
    }
}

impl<'a> Object<'a> for SessionControl {
    fn member(&mut self, name: &str) -> Place<'_, 'a> {
        match name {
            "cols" => Place::Number(&mut self.cols, 0..=MAX_TERMINAL_SIZE),
            "rows" => Place::Number(&mut self.rows, 0..=MAX_TERMINAL_SIZE),
            "stdin" => Place::Parsed(&mut self.stdin),
            _ => Place::Unknown,
        }
    }
}

impl<'a> Request<'a> for SessionControl {}

/// `POST /v1/stop`.
#[derive(Clone, Copy, Debug, Default)]
pub struct StopRequest {
    /// The first signal; the image's own if absent.
    pub signal: Option<Signal>,
    /// Time until SIGKILL in milliseconds; the default when absent.
    pub timeout_ms: Option<u32>,
}

impl<'a> Object<'a> for StopRequest {
    fn member(&mut self, name: &str) -> Place<'_, 'a> {
        match name {
            "signal" => Place::ParsedOrNumber(&mut self.signal),
            "timeout_ms" => Place::Number(&mut self.timeout_ms, 0..=MAX_TIMEOUT_MS),
            _ => Place::Unknown,
        }
    }
}

impl<'a> Request<'a> for StopRequest {}

/// `POST /v1/mounts`: an object as in the configuration's `Mounts`.
impl<'a> Request<'a> for Mount<'a> {
    fn check(&self) -> Result<(), Message> {
        Mount::check(self)
    }
}

/// `POST /v1/snapshot/prepare`, and `POST /v1/snapshot/cancel`, for which the token is enough.
#[derive(Clone, Copy, Debug, Default)]
pub struct HoldRequest<'a> {
    /// Names the hold; 1 to 64 bytes.
    pub token: &'a str,
    /// Time for all processes to freeze in milliseconds; the default when absent.
    pub timeout_ms: Option<u32>,
    /// Whether file systems are synced; the default when absent.
    pub sync: Option<bool>,
    /// Time until the guest thaws itself in milliseconds; the default when absent.
    pub hold_ms: Option<u32>,
}

impl<'a> Object<'a> for HoldRequest<'a> {
    fn member(&mut self, name: &str) -> Place<'_, 'a> {
        match name {
            "token" => Place::Str(&mut self.token),
            "timeout_ms" => Place::Number(&mut self.timeout_ms, 0..=MAX_TIMEOUT_MS),
            "sync" => Place::Flag(self.sync.get_or_insert_default()),
            "hold_ms" => Place::Number(&mut self.hold_ms, 0..=MAX_TIMEOUT_MS),
            _ => Place::Unknown,
        }
    }
}

impl<'a> Request<'a> for HoldRequest<'a> {
    fn check(&self) -> Result<(), Message> {
        check_token(self.token)
    }
}

fn check_token(token: &str) -> Result<(), Message> {
    match token.len() {
        0 => Err(message!("token: missing")),
        1..=MAX_ID => Ok(()),
        _ => Err(message!("token: longer than {MAX_ID} bytes")),
    }
}

/// `POST /v1/restore`.
#[derive(Debug)]
pub struct RestoreRequest<'c, 'a> {
    /// The token of the hold; empty is none.
    pub token: &'a str,
    /// The time in microseconds since 1970.
    pub unix_us: Option<u64>,
    /// Random bytes in base64 (RFC 4648 section 4).
    pub entropy: &'a str,
    /// Whether there is a configuration.
    pub has_config: bool,
    /// The new configuration.
    pub config: &'c mut Config<'a>,
}

impl<'a> Object<'a> for RestoreRequest<'_, 'a> {
    fn member(&mut self, name: &str) -> Place<'_, 'a> {
        match name {
            "token" => Place::Str(&mut self.token),
            // The kernel's clocks count nanoseconds in 63 bits.
            "unix_us" => Place::Number(&mut self.unix_us, 0..=i64::MAX as u64 / 1000),
            "entropy" => Place::Str(&mut self.entropy),
            "config" => {
                self.has_config = true;
                Place::Object(self.config)
            }
            _ => Place::Unknown,
        }
    }
}

impl<'c, 'a> RestoreRequest<'c, 'a> {
    /// An empty request that decodes into this configuration.
    pub const fn new(config: &'c mut Config<'a>) -> Self {
        Self {
            token: "",
            unix_us: None,
            entropy: "",
            has_config: false,
            config,
        }
    }
}

/// Its configuration is not checked.
impl<'a> Request<'a> for RestoreRequest<'_, 'a> {
    fn check(&self) -> Result<(), Message> {
        match self.token {
            "" => Ok(()),
            token => check_token(token),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `decode` makes of a body: shown by `look`, or its error.
    macro_rules! decoded {
        ($request:ident, $body:expr, $look:expr) => {{
            let mut body = $body.as_bytes().to_vec();
            let mut memory = vec![0; body.len()];
            let mut request = $request::default();
            let decoded = decode(&mut body, &mut Arena::new(&mut memory), &mut request);
            decoded
                .map(|()| request)
                .map($look)
                .map_err(|why| why.as_str().to_owned())
        }};
    }

    fn strings(strings: Strings) -> Vec<String> {
        let shown = strings.iter().map(|string| string.to_str().unwrap());
        shown.map(str::to_owned).collect()
    }

    #[test]
    fn a_signal_is_a_number_up_to_64() {
        let signal = |body: &str| decoded!(SignalRequest, body, |request| request.signal);
        assert_eq!(signal(r#"{"signal":15}"#), Ok(15));
        assert_eq!(signal(r#"{"signal":64,"x":[null]}"#), Ok(64));
        for (body, why) in [
            ("{}", "signal: missing"),
            (r#"{"signal":null}"#, "signal: missing"),
            (r#"{"signal":0}"#, "signal: must be from 1 to 64"),
            (r#"{"signal":65}"#, "signal: must be from 1 to 64"),
            (r#"{"signal":-1}"#, "signal: must be from 1 to 64"),
            (r#"{"signal":"TERM"}"#, "signal: must be a whole number"),
            (r#"{"signal":1.5}"#, "signal: must be a whole number"),
            (r#"{"signal":1e1}"#, "signal: must be a whole number"),
            ("[]", "must be an object"),
            ("", "not JSON at byte 0"),
        ] {
            assert_eq!(signal(body), Err(why.to_owned()), "{body}");
        }
    }

    #[test]
    fn exec_takes_cmd_and_sessions_take_command() {
        let body = r#"{"cmd":["ls","-la"],"timeout_ms":5,"command":["x"],"env":["A=b"],"cwd":"/tmp","user":"app:staff"}"#;
        let exec = decoded!(ExecRequest, body, |request| (
            strings(request.spec.argv),
            strings(request.spec.env),
            request.spec.cwd.to_owned(),
            request.spec.user.to_owned(),
            request.timeout_ms
        ));
        let list = |strings: &[&str]| strings.iter().map(|string| string.to_string()).collect();
        assert_eq!(
            exec.unwrap(),
            (
                list(&["ls", "-la"]),
                list(&["A=b"]),
                c"/tmp".to_owned(),
                "app:staff".to_owned(),
                5
            )
        );
        let text = r#"{"command":["sh"],"tty":true,"cols":80,"rows":24,"cmd":["x","y"],"id":"build-1","streams":true}"#;
        let session = decoded!(SessionRequest, text, |request| (
            strings(request.spec.argv),
            request.spec.tty,
            (request.cols, request.rows),
            request.id.to_owned(),
            request.streams
        ));
        assert_eq!(
            session.unwrap(),
            (list(&["sh"]), true, (80, 24), "build-1".to_owned(), true)
        );
        for body in ["{}", r#"{"cmd":[]}"#, r#"{"cmd":["","x"]}"#] {
            let exec = decoded!(ExecRequest, body, drop);
            assert_eq!(exec.unwrap_err(), "cmd: must have a command");
        }
        let session = decoded!(SessionRequest, r#"{"cmd":["x"]}"#, drop);
        assert_eq!(session.unwrap_err(), "command: must have a command");
    }

    #[test]
    fn a_session_starts_a_command_or_attaches_by_name() {
        let attach =
            |text: &str| decoded!(SessionRequest, text, |request| request.attach.to_owned());
        assert_eq!(attach(r#"{"attach":"build-1"}"#), Ok("build-1".to_owned()));
        for text in [
            r#"{"attach":"a","command":["x"]}"#,
            r#"{"attach":"a","id":"b"}"#,
        ] {
            assert_eq!(
                attach(text),
                Err("attach: must be without command and id".to_owned())
            );
        }
        for (field, rest) in [("attach", ""), ("id", r#","command":["x"]"#)] {
            for id in ["a b", "é", "a/b", &"x".repeat(65)] {
                assert_eq!(
                    attach(&format!(r#"{{"{field}":"{id}"{rest}}}"#)),
                    Err(format!("{field}: must be 1 to 64 of A-Z a-z 0-9 . _ -"))
                );
            }
            let longest = "x".repeat(64);
            assert!(attach(&format!(r#"{{"{field}":"{longest}"{rest}}}"#)).is_ok());
        }
    }

    #[test]
    fn a_control_text_resizes_or_ends_stdin() {
        let control = |text: &str| {
            decoded!(SessionControl, text, |control| (
                control.cols,
                control.rows,
                control.stdin
            ))
        };
        assert_eq!(control(r#"{"cols":100,"rows":50}"#), Ok((100, 50, None)));
        assert_eq!(control(r#"{"stdin":"eof"}"#), Ok((0, 0, Some(Stdin::Eof))));
        assert_eq!(control(r#"{"other":1}"#), Ok((0, 0, None)));
        for (text, why) in [
            (r#"{"stdin":"end"}"#, "stdin: must be eof: end"),
            (r#"{"stdin":true}"#, "stdin: must be a string"),
            (r#"{"cols":65536}"#, "cols: must be from 0 to 65535"),
        ] {
            assert_eq!(control(text), Err(why.to_owned()));
        }
    }

    #[test]
    fn a_stop_takes_a_signal_by_name_or_number() {
        let stop = |body: &str| {
            decoded!(StopRequest, body, |request| (
                request.signal.map(Signal::number),
                request.timeout_ms
            ))
        };
        assert_eq!(stop("{}"), Ok((None, None)));
        assert_eq!(
            stop(r#"{"signal":"SIGRTMIN+3","timeout_ms":0}"#),
            Ok((Some(37), Some(0)))
        );
        assert_eq!(stop(r#"{"signal" : 2}"#), Ok((Some(2), None)));
        for (body, why) in [
            (r#"{"signal":"SIGFOO"}"#, "signal: not a signal: SIGFOO"),
            (r#"{"signal":65}"#, "signal: not a signal: 65"),
            (
                r#"{"signal":2.5}"#,
                "signal: must be a string or a whole number from 0 on",
            ),
            (
                r#"{"signal":-2}"#,
                "signal: must be a string or a whole number from 0 on",
            ),
            (
                r#"{"signal":[2]}"#,
                "signal: must be a string or a whole number from 0 on",
            ),
            (
                r#"{"timeout_ms":86400001}"#,
                "timeout_ms: must be from 0 to 86400000",
            ),
        ] {
            assert_eq!(stop(body), Err(why.to_owned()));
        }
    }

    #[test]
    fn a_mount_is_checked_as_in_the_configuration() {
        let mount = |body: &str| {
            decoded!(Mount, body, |request| (
                request.mount_path.to_owned(),
                request.read_only
            ))
        };
        assert_eq!(
            mount(r#"{"DevicePath":"/dev/vdc","MountPath":"/a","ReadOnly":true}"#),
            Ok((c"/a".to_owned(), true))
        );
        assert_eq!(
            mount(r#"{"DevicePath":"/dev/vdc","MountPath":"/dev"}"#),
            Err("MountPath: would hide /dev".to_owned())
        );
    }

    #[test]
    fn a_hold_has_a_token() {
        let prepare = |body: &str| {
            decoded!(HoldRequest, body, |request| (
                request.token.to_owned(),
                request.timeout_ms,
                request.sync,
                request.hold_ms
            ))
        };
        let token = || "a1".to_owned();
        assert_eq!(
            prepare(r#"{"token":"a1"}"#),
            Ok((token(), None, None, None))
        );
        assert_eq!(
            prepare(r#"{"token":"a1","timeout_ms":2000,"sync":false,"hold_ms":600000}"#),
            Ok((token(), Some(2000), Some(false), Some(600_000)))
        );
        assert_eq!(
            prepare(r#"{"token":"a1","sync":null}"#),
            Ok((token(), None, None, None))
        );
        for (token, why) in [
            ("".to_owned(), "token: missing"),
            ("t".repeat(65), "token: longer than 64 bytes"),
        ] {
            let body = format!(r#"{{"token":"{token}"}}"#);
            assert_eq!(prepare(&body), Err(why.to_owned()));
        }
    }

    #[test]
    fn a_restore_can_contain_a_document() {
        let decode = |body: &str, look: &dyn Fn(&RestoreRequest)| {
            let mut body = body.as_bytes().to_vec();
            let mut memory = vec![0; body.len()];
            let mut config = Config::new();
            let mut request = RestoreRequest::new(&mut config);
            let decoded = decode(&mut body, &mut Arena::new(&mut memory), &mut request);
            decoded.map_err(|why| why.as_str().to_owned())?;
            look(&request);
            Ok::<(), String>(())
        };
        decode(
            r#"{"token":"a1","unix_us":1767225600000000,"entropy":"AAE=","config":{"Hostname":"b","IPConfigs":[{"IP":"10.0.0.3","Mask":24}]}}"#,
            &|request| {
                assert_eq!((request.token, request.entropy), ("a1", "AAE="));
                assert_eq!(request.unix_us, Some(1_767_225_600_000_000));
                assert!(request.has_config);
                assert_eq!(request.config.hostname, "b");
                assert_eq!(request.config.addresses().count(), 1);
            },
        )
        .unwrap();
        for body in ["{}", r#"{"config":null}"#] {
            decode(body, &|request| {
                assert!(!request.has_config && request.unix_us.is_none());
            })
            .unwrap();
        }
        for (body, why) in [
            (
                r#"{"config":{"IPConfigs":[{"Mask":129}]}}"#,
                "config.IPConfigs[0].Mask: must be from 0 to 128",
            ),
            (r#"{"config":[]}"#, "config: must be an object"),
            (
                r#"{"unix_us":9223372036854776}"#,
                "unix_us: must be from 0 to 9223372036854775",
            ),
        ] {
            assert_eq!(decode(body, &|_| ()), Err(why.to_owned()));
        }
    }
}
