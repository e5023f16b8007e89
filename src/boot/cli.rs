//! The command line of the program when it is not PID 1: checks a configuration.

use crate::boot::{config_source, environment};
use crate::context::document_memory;
use crate::error;
use crate::error::Result;
use crate::sys::files;
use crate::sys::{self, StackStrings};
use core::ffi::CStr;
use proto::address;
use proto::config::{Host, MAX_DOCUMENT_SIZE};
use proto::environment::Environment;
use proto::json::escape;
use proto::message;
use proto::message::{Message, ToLossy};

const HELP: &str = "\
PID 1 for Firecracker micro-VMs

usage:
  init --check FILE   print what a run.json would run
  init --version
  init --help

Kernel parameters:
  PIGEON_CONFIG PIGEON_MMDS_TIMEOUT_MS PIGEON_CGROUPS PIGEON_OUTPUT PIGEON_LOG_KIB
  PIGEON_EVENTS_PORT PIGEON_EXIT_LINGER_MS PIGEON_RESTORE INIT_LOG_LEVEL
";

const VERSION: &str = concat!("pigeon-init ", env!("CARGO_PKG_VERSION"), "\n");

/// Runs the command line. Returns the exit code.
pub fn run(arguments: StackStrings, environment: &mut Environment) -> i32 {
    let mut words = arguments.iter();
    let _program = words.next();
    let option = words.next().unwrap_or_default().to_bytes();
    let (file, more) = (words.next(), words.next());
    if let (Some(path), None) = (file, more)
        && option == b"--check"
    {
        return match check(path, environment) {
            Ok(()) => 0,
            Err(why) => {
                print_error(message!("init: {}: {why}", path.lossy()));
                1
            }
        };
    }
    let text = match file {
        None if option == b"--version" => VERSION,
        None if option == b"--help" || option == b"-h" => HELP,
        _ => {
            print_error(message!("init: not PID 1; see init --help"));
            return 2;
        }
    };
    print(text.as_bytes())
}

fn check(path: &CStr, new: &mut Environment) -> Result {
    let mut memory = document_memory()?;
    let (document, strings) = memory
        .split_at_mut_checked(MAX_DOCUMENT_SIZE)
        .unwrap_or_default();
    let document = files::read_whole(path, document)?.ok_or_else(|| error!("no such file"))?;
    let config = config_source::decode_checked(document, strings)?;
    environment::fill_without_home(new, &config)?;

    for argument in config.argv() {
        print_quoted("argv", argument.to_bytes());
    }
    for entry in new.iter() {
        print_quoted("env", entry.strip_suffix(b"\0").unwrap_or(entry));
    }
    print_line("user", or_default(config.user().as_bytes(), b"root"));
    print_line(
        "directory",
        or_default(config.image_config.working_dir.to_bytes(), b"/"),
    );
    print_line("root", config.root_device().to_bytes());
    for mount in &config.mounts {
        print(b"mount: ");
        print(or_default(
            mount.device_path.to_bytes(),
            mount.fs_type.to_bytes(),
        ));
        print(b" on ");
        print(mount.mount_path.to_bytes());
        print(b"\n");
    }
    if !config.hostname.is_empty() {
        print_line("hostname", config.hostname.as_bytes());
    }
    for address in config.addresses() {
        let (ip, prefix) = (address::Text(&address.ip), u32::from(address.prefix));
        print(message!("address: {ip}/{prefix} mtu {}", config.mtu()).as_bytes());
        if let Some(gateway) = address.gateway {
            print(message!(" via {}", address::Text(&gateway)).as_bytes());
        }
        print(b"\n");
    }
    for server in config.etc_resolv.nameservers {
        print_line("nameserver", server.to_bytes());
    }
    for Host { host, ip, .. } in &config.etc_hosts {
        print(b"host: ");
        print(ip.as_bytes());
        print(b" ");
        print(host.as_bytes());
        print(b"\n");
    }
    Ok(())
}

/// The value, or the default where it is empty.
fn or_default<'a>(value: &'a [u8], default: &'a [u8]) -> &'a [u8] {
    match value.is_empty() {
        true => default,
        false => value,
    }
}

fn print_line(name: &str, value: &[u8]) {
    print(name.as_bytes());
    print(b": ");
    print(value);
    print(b"\n");
}

/// Prints the value as a JSON string of any length.
fn print_quoted(name: &str, value: &[u8]) {
    print(name.as_bytes());
    print(b": \"");
    escape(value, true, &mut |piece| print(piece.as_bytes()) == 0);
    print(b"\"\n");
}

fn print(bytes: &[u8]) -> i32 {
    let [_, stdout, _] = sys::standard_streams();
    i32::from(rustix::io::write(stdout, bytes).is_err())
}

/// Prints one line to standard error, with control characters replaced.
fn print_error(text: Message) {
    let [_, _, stderr] = sys::standard_streams();
    for byte in text.as_bytes() {
        let shown = if byte.is_ascii_control() { b'?' } else { *byte };
        let _nobody_listens = rustix::io::write(stderr, &[shown]);
    }
    let _nobody_listens = rustix::io::write(stderr, b"\n");
}
