//! The commands that containerd runs: `start`, the server that it starts, and `delete`.

use std::{
    env,
    fs::{self, File},
    io::{self, Read, Write},
    os::{fd::IntoRawFd, unix::net::UnixListener, unix::process::CommandExt},
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    time::SystemTime,
};

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::{
    api::DeleteResponse, create_task, protobuf::Message, ttrpc::Server,
    types::introspection::RuntimeInfo,
};

use crate::{
    RUNTIME, container,
    events::{Publisher, timestamp},
    flags::Flags,
    log,
    service::{Service, Task},
    state,
};

/// The server's socket in the container's directory.
const SOCKET: &str = "shim.sock";
/// The file with its address, which containerd reads after a restart.
const ADDRESS: &str = "address";
/// containerd's socket for events.
const EVENTS: &str = "TTRPC_ADDRESS";
/// The directory of cached kernels.
const CACHE: &str = "PIGEON_CACHE";

/// `-info`: describes the runtime.
pub fn info() -> Result<()> {
    let info = RuntimeInfo {
        name: RUNTIME.into(),
        ..RuntimeInfo::default()
    };
    Ok(info.write_to_writer(&mut io::stdout())?)
}

/// `start`, in the bundle: starts the server and prints its address.
pub fn start(flags: &Flags) -> Result<()> {
    ensure!(
        !flags.id.is_empty() && !flags.namespace.is_empty(),
        "-id and -namespace are needed"
    );
    state::sweep();
    let dir = state::container_dir(flags);
    state::check(&dir)?;
    let is_new = state::create(&dir)?;
    let started = start_server(flags);
    // An existing directory belongs to another shim, which may be alive.
    if started.is_err() && is_new {
        let _ = fs::remove_dir_all(&dir);
    }
    started?;
    let address = format!("unix://{}", dir.join(SOCKET).display());
    fs::write(ADDRESS, &address).context("unable to write the bundle's address")?;
    print!("{address}");
    Ok(io::stdout().flush()?)
}

/// Starts the server, and waits until it listens, which it signals by closing its output.
fn start_server(flags: &Flags) -> Result<()> {
    let (mut output, their_output) = io::pipe()?;
    let mut command = Command::new(env::current_exe()?);
    command
        .args(["-namespace", &flags.namespace, "-id", &flags.id])
        .args(["-address", &flags.address])
        .stdin(Stdio::null())
        .stdout(their_output.try_clone()?)
        .stderr(their_output)
        .process_group(0);
    // A systemd service has no HOME; the kernel must not come from a world-writable directory.
    if env::var_os("HOME").is_none() && env::var_os(CACHE).is_none() {
        command.env(CACHE, state::root().join("cache"));
    }
    let mut server = command.spawn().context("unable to start the server")?;
    drop(command);
    let mut message = String::new();
    output.read_to_string(&mut message)?;
    match server.try_wait()? {
        None if message.is_empty() => Ok(()),
        _ => anyhow::bail!("the server has ended: {}", message.trim_end()),
    }
}

/// Runs the server of a container until containerd shuts it down.
pub fn serve(flags: &Flags) -> Result<()> {
    pigeon::process::raise_open_files();
    let bundle = env::current_dir()?;
    let dir = state::container_dir(flags);
    let lock = state::lock(&dir)?;
    log::open(&bundle);
    let publisher = Publisher::start(env::var(EVENTS).unwrap_or_default(), &flags.namespace);
    let service = Arc::new(Service::new(flags, &dir, publisher));
    let socket = dir.join(SOCKET);
    let _ = fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket)
        .with_context(|| format!("unable to listen on {}", socket.display()))?;
    // containerd 1.6 and 1.7 call version 2 of the service, 2.0 calls version 3: the messages are the same.
    let methods = create_task(Arc::new(Task(service.clone())));
    let second = create_task(Arc::new(Task(service.clone())))
        .into_iter()
        .map(|(path, method)| (path.replace("task.v3", "task.v2"), method))
        .collect();
    let mut server = Server::new()
        .add_listener(listener.into_raw_fd())?
        .register_service(methods)
        .register_service(second);
    server.start()?;
    close_output()?;
    service.wait();
    // containerd considers a shim dead when its connection is closed, and runs `delete`.
    service.publisher.finish();
    server.shutdown();
    let _ = fs::remove_dir_all(&dir);
    drop(lock);
    Ok(())
}

/// Signals to the parent process that the server is listening.
fn close_output() -> Result<()> {
    let null = File::options().write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    Ok(())
}

/// `delete`, in the bundle: cleans up after a killed shim. Its VM was killed with it.
pub fn delete(flags: &Flags) -> Result<()> {
    let dir = state::container_dir(flags);
    state::kill(&dir)?;
    match fs::remove_dir_all(&dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("unable to remove {}", dir.display()));
        }
        _ => {}
    }
    let _ = fs::remove_file(Path::new(ADDRESS));
    let response = DeleteResponse {
        exit_status: container::KILLED,
        exited_at: Some(timestamp(SystemTime::now())).into(),
        ..DeleteResponse::default()
    };
    Ok(response.write_to_writer(&mut io::stdout())?)
}
