//! What the program does when it is not PID 1: it looks at a configuration.

use crate::error::Result;
use crate::sys::files;
use crate::sys::{self, Words};
use core::ffi::CStr;
use proto::config::Config;
use proto::environment::Environment;
use proto::json::{Spans, Text, escape};
use proto::message::{Message, ToLossy};
use proto::{environment, message};

const HELP: &str = "\
PID 1 for Firecracker micro-VMs

usage:
  init --check FILE   print what a run.json would run
  init --version
  init --help

Words of the kernel command line:
  PIGEON_CONFIG PIGEON_MMDS_TIMEOUT_MS PIGEON_EXIT_LINGER_MS INIT_LOG_LEVEL
";

const VERSION: &str = concat!("pigeon-init ", env!("CARGO_PKG_VERSION"), "\n");

/// Runs a command line; the answer is the exit code.
pub fn run(arguments: Words, environment: &mut Environment, document: &mut [u8]) -> i32 {
    let mut words = arguments.iter();
    let _program = words.next();
    let option = words.next().unwrap_or_default().to_bytes();
    let (file, more) = (words.next(), words.next());
    if let (Some(path), None) = (file, more)
        && option == b"--check"
    {
        return match check(path, environment, document) {
            Ok(()) => 0,
            Err(why) => {
                complain(message!("init: {}: {why}", path.lossy()));
                1
            }
        };
    }
    let answer = match file {
        None if option == b"--version" => VERSION,
        None if option == b"--help" || option == b"-h" => HELP,
        _ => {
            complain(message!("init: not PID 1; see init --help"));
            return 2;
        }
    };
    print(answer.as_bytes())
}

fn check(path: &CStr, environment: &mut Environment, document: &mut [u8]) -> Result {
    let document = files::read_whole(path, document)?.ok_or_else(|| message!("no such file"))?;
    let mut spans = Spans::default();
    Config::decode(document, &mut spans)?;
    let config = Config::new(document, &spans);
    config.check()?;
    if !config.has_command() {
        return Err(message!("nothing to run"));
    }
    fill_environment(environment, &config)?;

    for argument in config.argv() {
        quote("argv", argument.bytes());
    }
    for entry in environment.iter() {
        quote("env", entry.strip_suffix(b"\0").unwrap_or(entry));
    }
    tell("user", or(config.user(), "root"));
    tell("directory", or(config.working_dir(), "/"));
    tell("root", config.root_device().bytes());
    for mount in config.mounts() {
        tell_both("mount", mount.device_path, " on ", mount.mount_path);
    }
    if !config.hostname().is_empty() {
        tell("hostname", config.hostname().bytes());
    }
    config.addresses(&mut |address| {
        let prefix = u32::from(address.prefix);
        let mut line = message!("{}/{prefix} mtu {}", address.ip, config.mtu());
        if let Some(gateway) = &address.gateway {
            line = message!("{line} via {gateway}");
        }
        tell("address", line.as_bytes());
        Ok(())
    })?;
    for server in config.nameservers().iter() {
        tell("nameserver", server.bytes());
    }
    for host in config.etc_hosts() {
        tell_both("host", host.ip, " ", host.host);
    }
    Ok(())
}

fn or<'a>(given: Text<'a>, default: &'a str) -> &'a [u8] {
    match given.is_empty() {
        true => default.as_bytes(),
        false => given.bytes(),
    }
}

fn tell(what: &str, value: &[u8]) {
    print(what.as_bytes());
    print(b": ");
    print(value);
    print(b"\n");
}

fn tell_both(what: &str, one: Text, between: &str, other: Text) {
    tell(what, message!("{one}{between}{other}").as_bytes());
}

/// The value as a JSON string, however long it is.
fn quote(what: &str, value: &[u8]) {
    print(what.as_bytes());
    print(b": \"");
    escape(value, true, &mut |piece| print(piece) == 0);
    print(b"\"\n");
}

/// The workload's environment, but for HOME, which only the root's accounts tell.
pub fn fill_environment(environment: &mut Environment, config: &Config) -> Result {
    let [image, extra] = config.environment();
    environment.set_all(image)?;
    environment.set_all(extra)?;
    environment.set_default(b"PATH=", environment::PATH)
}

fn print(bytes: &[u8]) -> i32 {
    let [stdout, _] = sys::standard_streams();
    i32::from(rustix::io::write(stdout, bytes).is_err())
}

/// One line, also about a name that has lines or a terminal's commands in it.
fn complain(text: Message) {
    let [_, stderr] = sys::standard_streams();
    for byte in text.as_bytes() {
        let shown = if byte.is_ascii_control() { b'?' } else { *byte };
        let _nobody_listens = rustix::io::write(stderr, &[shown]);
    }
    let _nobody_listens = rustix::io::write(stderr, b"\n");
}
