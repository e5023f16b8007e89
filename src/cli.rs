//! What the program does when it is not PID 1: it looks at a configuration.

use crate::sys::{Static, Words};
use pigeon_init::command::Environment;
use pigeon_init::config::{Config, DOCUMENT};
use pigeon_init::json::Text;
use pigeon_init::text::{Line, Show};
use pigeon_init::{command, text};

static DOCUMENT_BUFFER: Static<[u8; DOCUMENT]> = Static::new([0; DOCUMENT]);

const HELP: &str = "\
pigeon-init: PID 1 for Firecracker micro-VMs

usage:
  init --check FILE   read a run.json and print what would be run
  init --version
  init --help

As PID 1 it takes no arguments. The kernel command line may have
  PIGEON_CONFIG=auto|mmds|file     where the configuration comes from
  PIGEON_MMDS_TIMEOUT_MS=N         how long MMDS is asked (3000)
  PIGEON_EXIT_LINGER_MS=N          how long the exit code can be read (1000)
  INIT_LOG_LEVEL=debug|info|warn
";

/// Runs a command line; the answer is the exit code.
pub fn run(arguments: Words, environment: &mut Environment) -> i32 {
    let mut words = arguments.iter().skip(1).map(core::ffi::CStr::to_bytes);
    match (words.next(), words.next(), words.next()) {
        (Some(b"--version"), None, None) => {
            print(concat!("pigeon-init ", env!("CARGO_PKG_VERSION"), "\n"))
        }
        (Some(b"--help" | b"-h"), None, None) => print(HELP),
        (Some(b"--check"), Some(path), None) => match check(path, environment) {
            Ok(()) => 0,
            Err(why) => {
                complain(text!("init: ", path, ": ", why));
                1
            }
        },
        _ => {
            complain(text!("init: not PID 1; see init --help"));
            2
        }
    }
}

fn check(path: &[u8], environment: &mut Environment) -> Result<(), Line> {
    let Some(document) = DOCUMENT_BUFFER.take() else {
        return Err(text!("read twice"));
    };
    let mut name = heapless::Vec::<u8, { pigeon_init::config::PATH }>::new();
    let fits = name.extend_from_slice(path).is_ok() && name.push(0).is_ok();
    let name = core::ffi::CStr::from_bytes_with_nul(&name)
        .ok()
        .filter(|_| fits);
    let name = name.ok_or_else(|| text!("the path is too long"))?;
    let length = crate::files::read_found(name, document)?.ok_or_else(|| text!("no such file"))?;
    let document = document.get_mut(..length).unwrap_or(&mut []);
    let spans = Config::decode(document)?;
    let config = Config::new(document, spans);
    config.check()?;
    if !config.has_command() {
        return Err(text!("nothing to run"));
    }
    fill_environment(environment, &config)?;

    for argument in config.argv() {
        print(text!("argv: ", Quoted(argument.bytes()), "\n"));
    }
    for entry in environment.iter() {
        let entry = entry.strip_suffix(b"\0").unwrap_or(entry);
        print(text!("env: ", Quoted(entry), "\n"));
    }
    let or = |given: Text<'_>, default: &str| {
        if given.is_empty() {
            text!(default)
        } else {
            text!(given)
        }
    };
    print(text!("user: ", or(config.user(), "root"), "\n"));
    print(text!("directory: ", or(config.working_dir(), "/"), "\n"));
    print(text!("root: ", config.root_device(), "\n"));
    for mount in config.mounts() {
        print(text!(
            "mount: ",
            mount.device_path,
            " on ",
            mount.mount_path,
            "\n"
        ));
    }
    if !config.hostname().is_empty() {
        print(text!("hostname: ", config.hostname(), "\n"));
    }
    for entry in config.ip_configs() {
        let address = entry.address()?;
        let via = address
            .gateway
            .map_or(Line::new(), |gateway| text!(" via ", gateway));
        let prefix = u32::from(address.prefix);
        print(text!(
            "address: ",
            address.ip,
            "/",
            prefix,
            " mtu ",
            config.mtu(),
            via,
            "\n"
        ));
    }
    for server in config.nameservers().iter() {
        print(text!("nameserver: ", server, "\n"));
    }
    for host in config.etc_hosts() {
        print(text!("host: ", host.ip, " ", host.host, "\n"));
    }
    Ok(())
}

/// Shown as a JSON string.
struct Quoted<'a>(&'a [u8]);

impl Show for Quoted<'_> {
    fn show(&self, line: &mut Line) {
        line.quoted(self.0);
    }
}

/// The workload's environment, but for HOME, which only the root's accounts tell.
pub fn fill_environment(environment: &mut Environment, config: &Config) -> Result<(), Line> {
    let full = |_| text!("the environment is too large");
    for entry in config.environment() {
        environment.set(entry.bytes()).map_err(full)?;
    }
    environment
        .set_default(b"PATH", command::PATH)
        .map_err(full)
}

fn print(text: impl Show) -> i32 {
    let mut line = Line::new();
    text.show(&mut line);
    // SAFETY: descriptor 1 is borrowed for one write; a closed one is an error of that write.
    let output = unsafe { rustix::fd::BorrowedFd::borrow_raw(1) };
    i32::from(rustix::io::write(output, line.as_bytes()).is_err())
}

fn complain(text: Line) {
    // One line, also about a name that has lines or a terminal's commands in it.
    let mut line = Line::new();
    for byte in text.as_bytes() {
        line.put(if byte.is_ascii_control() { b'?' } else { *byte });
    }
    line.put(b'\n');
    // SAFETY: as above.
    let errors = unsafe { rustix::fd::BorrowedFd::borrow_raw(2) };
    let _nobody_listens = rustix::io::write(errors, line.as_bytes());
}
