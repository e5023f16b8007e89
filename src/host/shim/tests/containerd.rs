//! The shim with a separate containerd, compared to runc: the same commands must have the same results.

mod engine;
#[path = "../../tests/common/pty.rs"]
mod pty;

use std::{
    fs::{self, File},
    io::{ErrorKind, Read},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use containerd_shim_protos::{
    api::{
        ConnectRequest, DeleteRequest, ExecProcessRequest, KillRequest, PauseRequest,
        ResumeRequest, StartRequest, UpdateTaskRequest, WaitRequest,
    },
    protobuf::well_known_types::any::Any,
    ttrpc::{Code, context},
};
use engine::{Containerd, IMAGE, Outcome, PIGEON, RUNC, TIMEOUT, code, digest};
use pigeon::process::Process;
use pty::Terminal;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{CWD, FileType, Mode, OFlags, mknodat},
    process::{Signal, kill_process},
};
use serde_json::json;

/// The results of a script of commands with a runtime. Columns of names, and pids, are normalized.
fn script(containerd: &Containerd, runtime: &str) -> Vec<(String, Outcome)> {
    let mut outcomes = vec![];
    let mut record = |what: &str, mut outcome: Outcome| {
        if what.ends_with("ls") {
            let numbered = |line: &str| {
                let words: Vec<_> = line.split_whitespace().collect();
                let is_number = |word: &str| word.parse::<u32>().is_ok();
                words
                    .into_iter()
                    .filter(|word| !is_number(word))
                    .collect::<Vec<_>>()
                    .join(" ")
            };
            outcome.stdout = outcome
                .stdout
                .lines()
                .map(numbered)
                .collect::<Vec<_>>()
                .join("\n");
        }
        // The texts of errors may differ.
        if outcome.stderr.starts_with("ctr: ") {
            outcome.stderr = "ctr: …".into();
        }
        if let Some(at) = outcome.stderr.find("level=") {
            outcome.stderr = outcome.stderr[at..].into();
        }
        outcomes.push((what.to_string(), outcome));
    };
    let loops = "trap 'echo usr1 >>/tmp/signals' USR1; trap 'exit 42' TERM; \
                 while :; do sleep 0.05; done";
    record(
        "run -d",
        containerd.ctr(&[
            "run",
            "-d",
            "--runtime",
            runtime,
            IMAGE,
            "one",
            "sh",
            "-c",
            loops,
        ]),
    );
    let exec = |number: &str, options: &[&str], command: &[&str], input: &[u8]| {
        let words = ["task", "exec", "--exec-id", number];
        containerd.ctr_with(&[&words[..], options, &["one"], command].concat(), input)
    };
    let both = ["sh", "-c", "echo out; echo error >&2; exit 7"];
    record("exec", exec("e1", &[], &both, b""));
    record("exec with input", exec("e2", &[], &["wc"], b"a\nb c\n"));
    let user = ["--user", "1000:1000", "--cwd", "/tmp"];
    let of_user = "id; pwd; cat /etc/second; env; grep -E 'Cap|NoNewPrivs' /proc/self/status; \
                   echo x >/dev/stderr";
    record(
        "exec of a user",
        exec("e3", &user, &["sh", "-c", of_user], b""),
    );
    record("exec of nothing", exec("e4", &[], &["nothing"], b""));
    record(
        "exec in no directory",
        exec("e9", &["--cwd", "/none"], &["true"], b""),
    );
    record(
        "exec that kills itself",
        exec("e5", &[], &["sh", "-c", "kill -15 $$"], b""),
    );
    // No signal is lost.
    for number in 1..6 {
        record(
            "kill -s USR1",
            containerd.ctr(&["task", "kill", "-s", "USR1", "one"]),
        );
        let look = format!(
            "end=$(($(date +%s) + 60)); while lines=$(cat /tmp/signals 2>/dev/null | wc -l); \
             [ $lines != {number} ] && [ $(date +%s) -lt $end ]; do sleep 0.05; done; echo $lines"
        );
        record("its effect", exec("e6", &[], &["sh", "-c", &look], b""));
    }
    record("ls", containerd.ctr(&["task", "ls"]));
    record("pause", containerd.ctr(&["task", "pause", "one"]));
    record("exec in what is paused", exec("e8", &[], &["true"], b""));
    record("paused ls", containerd.ctr(&["task", "ls"]));
    record("resume", containerd.ctr(&["task", "resume", "one"]));
    record("exec after it", exec("e7", &[], &["echo", "alive"], b""));
    record("the id again", exec("e7", &[], &["echo", "again"], b""));
    let metrics = containerd.ctr(&["task", "metrics", "one"]);
    assert!(metrics.stdout.contains("memory.usage"), "{metrics:?}");
    let ps = containerd.ok(&["task", "ps", "one"]);
    let columns = ps.lines().next().unwrap_or_default().split_whitespace();
    assert_eq!(columns.collect::<Vec<_>>(), ["PID", "INFO"]);
    record("rm of what runs", containerd.ctr(&["task", "rm", "one"]));
    record("kill", containerd.ctr(&["task", "kill", "one"]));
    containerd.wait_status("one", "STOPPED");
    record("kill again", containerd.ctr(&["task", "kill", "one"]));
    record("rm", containerd.ctr(&["task", "rm", "one"]));
    record("container rm", containerd.ctr(&["container", "rm", "one"]));
    // All attributes of a process, except limits that depend on the machine's memory.
    let rights = "grep -E 'Cap|NoNewPrivs|Groups|[UG]id' /proc/self/status; umask; env; pwd; id; \
                  ulimit -n; ulimit -c; ls -l /proc/self/fd/ | wc -l; readlink /proc/self/fd/1 | \
                  grep -o pipe; hostname | wc -l";
    let script = format!("{rights}; echo error >&2; cat /none; exit 3");
    let options = [
        &["--env", "A=B c", "--cwd", "/made/of two"][..],
        &[
            "--cap-add",
            "CAP_SYS_TIME",
            "--cap-drop",
            "CAP_CHOWN",
            "--allow-new-privs",
        ],
        &[
            "--annotation",
            "a=b",
            "--label",
            "c=d",
            "--cpu-shares",
            "512",
        ],
    ];
    record(
        "run",
        containerd.run(runtime, &options.concat(), "two", &["sh", "-c", &script]),
    );
    record(
        "run of nothing",
        containerd.run(runtime, &[], "three", &["nothing"]),
    );
    record(
        "the id again",
        containerd.run(runtime, &[], "three", &["true"]),
    );
    outcomes
}

#[test]
fn a_script_behaves_as_with_runc() {
    let containerd = Containerd::start();
    let expected = script(&containerd, RUNC);
    let found = script(&containerd, PIGEON);
    for (expected, found) in expected.iter().zip(&found) {
        assert_eq!(expected, found, "{}", containerd.log());
    }
    assert_eq!(expected.len(), found.len());
    containerd.assert_clean();
}

/// The output of a shell on a terminal, and its exit code.
fn session(containerd: &Containerd, words: &[&str], term: &str) -> (Vec<String>, Option<i32>) {
    let mut terminal = Terminal::spawn(containerd.command(words), (101, 33));
    let term = format!("[{term}]42");
    let mut shown = vec![];
    terminal.expect("# ");
    terminal.resize((120, 44));
    // The new size takes a moment to arrive.
    let deadline = Instant::now() + TIMEOUT;
    while Instant::now() < deadline {
        terminal.type_text("stty size\n");
        if terminal.shows("44 120", Duration::from_secs(1)) {
            break;
        }
    }
    terminal.expect("# ");
    for (typed, expected) in [
        ("echo [$TERM]$((6*7))\n", term.as_str()),
        ("tty\n", "/dev/pts/0"),
        (
            "stty -a | grep -o 'icrnl\\|onlcr\\|isig' | tr '\\n' ' '\n",
            "icrnl onlcr isig",
        ),
        (
            "trap 'echo interrupted' INT; sleep 1000 || true\n",
            "sleep 1000",
        ),
        ("\u{3}", "interrupted"),
        ("echo bell >/dev/tty; echo error $((7*6)) >&2\n", "error 42"),
    ] {
        terminal.type_text(typed);
        let is_there = terminal.shows(expected, TIMEOUT);
        assert!(is_there, "{typed:?} of {words:?}: {:?}", terminal.shown());
        shown.push(expected.to_string());
        if typed.starts_with("trap") {
            thread::sleep(Duration::from_secs(1));
        }
    }
    terminal.type_text("exit 5\n");
    (shown, terminal.wait().code())
}

/// Opens a FIFO for reading, non-blocking.
fn open_fifo(path: &Path) -> File {
    let mut options = File::options();
    let nonblocking = OFlags::NONBLOCK.bits() as i32;
    options
        .read(true)
        .custom_flags(nonblocking)
        .open(path)
        .unwrap()
}

fn wait_readable(fifo: &File) {
    let timeout = Timespec::try_from(TIMEOUT).unwrap();
    let ready = poll(&mut [PollFd::new(fifo, PollFlags::IN)], Some(&timeout));
    assert_eq!(ready.unwrap(), 1);
}

/// Reads until all writers have closed it.
fn read_to_end(fifo: &mut File) -> String {
    let mut text = vec![];
    loop {
        wait_readable(fifo);
        match fifo.read_to_end(&mut text) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            result => break result.map(drop).unwrap(),
        }
    }
    String::from_utf8(text).unwrap()
}

#[test]
fn no_output_is_lost_to_a_client_that_opens_or_reads_its_fifos_late() {
    let containerd = Containerd::start();
    containerd.run_detached(PIGEON, &[], "one", &["sleep", "1000"]);
    let client = containerd.shim_client();
    let context = || context::with_duration(TIMEOUT);
    let add = |id: &str, command: &[&str]| {
        let [stdout, stderr] = ["out", "err"].map(|name| {
            let path = containerd.place.path(&format!("{id}-{name}"));
            mknodat(CWD, &path, FileType::Fifo, Mode::RWXU, 0).unwrap();
            path
        });
        let spec = json!({"args": command, "cwd": "/", "env": ["PATH=/bin"]});
        let spec = Any {
            value: spec.to_string().into_bytes(),
            ..Any::default()
        };
        let request = ExecProcessRequest {
            id: "one".into(),
            exec_id: id.into(),
            stdout: stdout.display().to_string(),
            stderr: stderr.display().to_string(),
            spec: Some(spec).into(),
            ..ExecProcessRequest::default()
        };
        client.exec(context(), &request).unwrap();
        [stdout, stderr]
    };
    let try_start = |id: &str| {
        let request = StartRequest {
            id: "one".into(),
            exec_id: id.into(),
            ..StartRequest::default()
        };
        client.start(context(), &request)
    };
    let start = |id: &str| drop(try_start(id).unwrap());
    let kill = |id: &str| {
        let request = KillRequest {
            id: "one".into(),
            exec_id: id.into(),
            signal: 9,
            ..KillRequest::default()
        };
        client.kill(context(), &request).unwrap();
    };
    let wait = |id: &str| {
        let request = WaitRequest {
            id: "one".into(),
            exec_id: id.into(),
            ..WaitRequest::default()
        };
        client.wait(context(), &request).unwrap().exit_status
    };
    let delete = |id: &str| {
        let request = DeleteRequest {
            id: "one".into(),
            exec_id: id.into(),
            ..DeleteRequest::default()
        };
        client.delete(context(), &request).unwrap();
    };
    let both = ["sh", "-c", "echo out; echo error >&2; exit 7"];

    // A process can be started only once, and is not affected by a second attempt.
    assert_eq!(code(try_start("")), Some(Code::FAILED_PRECONDITION));
    client.pause(context(), &PauseRequest::default()).unwrap();
    assert_eq!(code(try_start("")), Some(Code::FAILED_PRECONDITION));
    client.resume(context(), &ResumeRequest::default()).unwrap();

    // A process killed before or during its start does not run.
    let paths = add("killed", &["touch", "/tmp/ran"]);
    thread::scope(|scope| {
        let started = scope.spawn(|| try_start("killed"));
        // The start waits for readers.
        thread::sleep(Duration::from_millis(500));
        kill("killed");
        assert_eq!(wait("killed"), 137);
        let fifos = paths.each_ref().map(|path| open_fifo(path));
        assert!(started.join().unwrap().is_err());
        // There is no writer.
        for mut fifo in fifos {
            assert_eq!(fifo.read(&mut [0]).unwrap(), 0);
        }
    });
    assert_eq!(code(try_start("killed")), Some(Code::FAILED_PRECONDITION));
    delete("killed");
    let paths = add("ran", &["ls", "/tmp/ran"]);
    let fifos = paths.each_ref().map(|path| open_fifo(path));
    start("ran");
    assert_eq!(wait("ran"), 1);
    drop(fifos);
    delete("ran");

    // A process is not started before its FIFOs are opened.
    let paths = add("opens", &both);
    thread::scope(|scope| {
        let started = scope.spawn(|| start("opens"));
        thread::sleep(Duration::from_secs(2));
        let mut fifos = paths.each_ref().map(|path| open_fifo(path));
        started.join().unwrap();
        assert_eq!(wait("opens"), 7);
        assert_eq!(fifos.each_mut().map(read_to_end), ["out\n", "error\n"]);
    });
    delete("opens");

    // Its exit is not reported before its output was read.
    let paths = add("reads", &both);
    let mut fifos = paths.each_ref().map(|path| open_fifo(path));
    start("reads");
    thread::scope(|scope| {
        let ended = scope.spawn(|| wait("reads"));
        fifos.iter().for_each(wait_readable);
        thread::sleep(Duration::from_millis(500));
        assert!(!ended.is_finished());
        assert_eq!(fifos.each_mut().map(read_to_end), ["out\n", "error\n"]);
        assert_eq!(ended.join().unwrap(), 7);
    });
    delete("reads");

    // The exit does not wait for a client that has disconnected, and only for a limited time for one that
    // does not read.
    for is_there in [false, true] {
        let id = format!("leaves-{is_there}");
        let paths = add(&id, &both);
        let fifos = paths.each_ref().map(|path| open_fifo(path));
        start(&id);
        let fifos = is_there.then_some(fifos);
        assert_eq!(wait(&id), 7);
        delete(&id);
        drop(fifos);
    }
    containerd.ok(&["task", "rm", "-f", "one"]);
    containerd.ok(&["container", "rm", "one"]);
    containerd.assert_clean();
}

#[test]
fn many_commands_at_once_each_return_their_output() {
    let containerd = Containerd::start();
    containerd.run_detached(PIGEON, &[], "one", &["sleep", "1000"]);
    // A second shim for the container is refused, and does not affect the first.
    let shim = containerd.shim("one").as_raw_nonzero();
    let words = fs::read_to_string(format!("/proc/{shim}/cmdline")).unwrap();
    let words = words.trim_end_matches('\0').split('\0').skip(1);
    let second = Command::new(env!("CARGO_BIN_EXE_containerd-shim-pigeon-v2"))
        .args(words)
        .arg("start")
        .env("PIGEON_STATE", containerd.state())
        .current_dir(containerd.place.0.path())
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&second.stderr);
    assert!(
        stderr.contains("another shim has this container"),
        "{stderr}"
    );
    let connected = containerd
        .shim_client()
        .connect(context::with_duration(TIMEOUT), &ConnectRequest::default())
        .unwrap();
    assert_eq!(connected.shim_pid, shim.get() as u32);
    for number in 0..40 {
        let text = format!("line {number}");
        let words = ["task", "exec", "--exec-id", "e", "one", "echo", &text];
        let outcome = containerd.ctr(&words);
        assert_eq!(
            (outcome.status, outcome.stdout),
            (Some(0), format!("{text}\n")),
            "{}",
            outcome.stderr
        );
    }
    containerd.ok(&["task", "rm", "-f", "one"]);
    containerd.ok(&["container", "rm", "one"]);
    containerd.assert_clean();
}

#[test]
fn a_terminal_behaves_as_with_runc() {
    let containerd = Containerd::start();
    let sessions = |runtime: &str| {
        let run = [
            "run",
            "--rm",
            "-t",
            "--runtime",
            runtime,
            IMAGE,
            "shell",
            "sh",
        ];
        let of_its_own = session(&containerd, &run, "xterm");
        containerd.run_detached(runtime, &[], "other", &["sleep", "1000"]);
        // An exec process has its container's environment, which was created without a terminal.
        let exec = ["task", "exec", "-t", "--exec-id", "e", "other", "sh"];
        let added = session(&containerd, &exec, "");
        containerd.ctr(&["task", "rm", "-f", "other"]);
        containerd.ok(&["container", "rm", "other"]);
        [of_its_own, added]
    };
    let expected = sessions(RUNC);
    assert_eq!(expected.each_ref().map(|(_, status)| *status), [Some(5); 2]);
    assert_eq!(sessions(PIGEON), expected);
    containerd.assert_clean();
}

#[test]
fn many_containers_leave_nothing_behind_and_pack_the_image_once() {
    let containerd = Containerd::start();
    let images = || {
        let images = fs::read_dir(containerd.state().join("images")).unwrap();
        let mut images: Vec<_> = images
            .map(|entry| {
                let entry = entry.unwrap();
                let found = entry.metadata().unwrap();
                (entry.file_name(), found.modified().unwrap(), found.len())
            })
            .collect();
        images.sort();
        images
    };
    let outcome = |code: i32| Outcome {
        status: Some(code),
        stdout: format!("hello {code}\n"),
        stderr: format!("level=warning msg=\"task exit with non-zero exit code {code}\"\n"),
    };
    let run = |number: i32| {
        let script = format!("echo hello {number}; exit {number}");
        let found = containerd.run(PIGEON, &[], &format!("n{number}"), &["sh", "-c", &script]);
        assert_eq!(
            found.status,
            outcome(number).status,
            "{found:?}\n{}",
            containerd.log()
        );
        assert_eq!(found.stdout, outcome(number).stdout);
    };
    run(1);
    let made = images();
    let erofs = made
        .iter()
        .filter(|(name, ..)| name.to_string_lossy().ends_with(".erofs"));
    assert_eq!(erofs.count(), 1, "{made:?}");
    for number in 2..=20 {
        run(number);
        containerd.assert_clean();
    }
    thread::scope(|scope| {
        for number in 21..25 {
            scope.spawn(move || run(number));
        }
    });
    assert_eq!(images(), made);
    containerd.assert_clean();
}

#[test]
fn root_images_are_removed_with_their_layers() {
    let containerd = Containerd::start();
    assert_eq!(
        containerd.run(PIGEON, &[], "one", &["true"]).status,
        Some(0)
    );
    let images = containerd.state().join("images");
    let first: Vec<_> = fs::read_dir(&images).unwrap().collect();
    assert_eq!(first.len(), 3);
    // The same image with other snapshots: its layers have other paths, and the old ones were removed.
    containerd.ok(&["image", "rm", "--sync", IMAGE]);
    let archive = containerd.place.path("image.tar");
    containerd.ok(&["image", "import", archive.to_str().unwrap()]);
    let outcome = containerd.run(PIGEON, &[], "two", &["cat", "/etc/second"]);
    assert_eq!(outcome.stdout, "of the second layer\n");
    let second: Vec<_> = fs::read_dir(&images).unwrap().collect();
    assert_eq!(second.len(), 3, "{second:?}");
    containerd.assert_clean();
}

/// A number of MiB of output.
fn exact_output(mib: u32) {
    let containerd = Containerd::start();
    let script = format!(
        "dd if=/dev/urandom of=/tmp/out bs=1M count={mib} 2>/dev/null; sha256sum </tmp/out >&2; \
         cat /tmp/out"
    );
    let words = [
        "run",
        "--rm",
        "--runtime",
        PIGEON,
        IMAGE,
        "big",
        "sh",
        "-c",
        &script,
    ];
    let mut command = containerd.command(&words);
    let (path, errors) = (containerd.place.path("out"), containerd.place.path("err"));
    command
        .stdout(File::create(&path).unwrap())
        .stderr(File::create(&errors).unwrap());
    let mut process = Process::spawn(command).unwrap();
    let status = process.wait(TIMEOUT).unwrap().expect("timed out");
    let output = fs::read(path).unwrap();
    assert!(
        status.success() && output.len() == mib as usize * (1 << 20),
        "{}",
        output.len()
    );
    let stderr = fs::read_to_string(errors).unwrap();
    assert_eq!(
        stderr.split_whitespace().next(),
        Some(digest(&output).as_str())
    );
    containerd.assert_clean();
}

#[test]
fn output_is_exact_to_the_byte() {
    exact_output(50);
}

#[test]
fn a_killed_shim_a_dead_vm_and_a_restarted_containerd_are_handled() {
    let mut containerd = Containerd::start();
    let command = [
        "sh",
        "-c",
        "trap 'exit 9' TERM; while :; do sleep 0.05; done",
    ];
    containerd.run_detached(PIGEON, &[], "stays", &command);
    containerd.restart();
    assert_eq!(containerd.status("stays").as_deref(), Some("RUNNING"));
    assert_eq!(
        containerd.ok(&["task", "exec", "--exec-id", "e", "stays", "echo", "hi"]),
        "hi\n"
    );
    // Kills the VM, not the shim.
    kill_process(containerd.pid("stays"), Signal::KILL).unwrap();
    containerd.wait_status("stays", "STOPPED");
    let removed = containerd.ctr(&["task", "rm", "stays"]);
    assert!(removed.stderr.contains("exit code 137"), "{removed:?}");
    containerd.ok(&["container", "rm", "stays"]);
    let log = containerd.log();
    assert!(
        log.contains("container: the hypervisor was killed, or failed"),
        "{log}"
    );
    containerd.assert_clean();

    containerd.run_detached(PIGEON, &[], "gone", &["sleep", "1000"]);
    let shim = containerd.shim("gone");
    kill_process(shim, Signal::KILL).unwrap();
    let deadline = Instant::now() + TIMEOUT;
    while containerd.status("gone").is_some() {
        assert!(Instant::now() < deadline, "{}", containerd.log());
        thread::sleep(Duration::from_millis(50));
    }
    containerd.ok(&["container", "rm", "gone"]);
    containerd.assert_clean();
}

#[test]
fn events_limits_mounts_and_signals_to_all_work() {
    let containerd = Containerd::start();
    let seen = containerd.place.path("events");
    let mut events = containerd.command(&["events"]);
    events
        .stdout(File::create(&seen).unwrap())
        .stderr(Stdio::null());
    let events = Process::spawn(events).unwrap();
    thread::sleep(Duration::from_millis(300));

    let folder = containerd.place.path("folder");
    fs::create_dir_all(folder.join("sub")).unwrap();
    fs::write(folder.join("sub/file"), "of the host\n").unwrap();
    let mount = |target: &str, source: &Path, options: &str| {
        format!(
            "type=bind,src={},dst={target},options={options}",
            source.display()
        )
    };
    let [read_only, written, file] = [
        mount("/ro", &folder, "rbind:ro"),
        mount("/rw", &folder, "rbind"),
        mount("/etc/file", &folder.join("sub/file"), "rbind:ro"),
    ];
    let options = [
        "--mount",
        &read_only,
        "--mount",
        &written,
        "--mount",
        &file,
        "--memory-limit",
        "100000000",
    ];
    let script = "cat /ro/sub/file /etc/file; echo x >/ro/y 2>/dev/null || echo read-only; \
                  echo mine >/rw/sub/file; cat /rw/sub/file; hostname; ulimit -n; \
                  grep -c processor /proc/cpuinfo; exec tail /dev/zero";
    let outcome = containerd.run(PIGEON, &options, "limited", &["sh", "-c", script]);
    let expected = "of the host\nof the host\nread-only\nmine\nlimited\n1024\n1\n";
    assert_eq!(
        (outcome.stdout.as_str(), outcome.status),
        (expected, Some(137)),
        "{outcome:?}"
    );
    assert_eq!(
        fs::read_to_string(folder.join("sub/file")).unwrap(),
        "of the host\n"
    );

    let children = "trap 'kill %1; exit 6' USR2; (trap 'exit 0' USR1; while :; do sleep 0.05; done) \
                    & trap '' USR1; wait; echo the other has ended";
    containerd.run_detached(PIGEON, &[], "all", &["sh", "-c", children]);
    // Refused with a message; the second under its name in containerd 2.
    let refused = containerd.ctr(&["task", "checkpoint", "all"]);
    assert!(
        refused.stderr.contains("checkpoint: a VM has snapshots"),
        "{refused:?}"
    );
    let client = containerd.shim_client();
    let context = || context::with_duration(TIMEOUT);
    let refused = client
        .update(context(), &UpdateTaskRequest::default())
        .unwrap_err();
    assert!(
        refused.to_string().contains("update: a VM keeps"),
        "{refused}"
    );
    let connected = client
        .connect(context(), &ConnectRequest::default())
        .unwrap();
    assert_eq!(
        connected.task_pid as i32,
        containerd.pid("all").as_raw_pid()
    );
    containerd.ok(&["task", "kill", "-a", "-s", "USR1", "all"]);
    containerd.wait_status("all", "STOPPED");
    let removed = containerd.ctr(&["task", "rm", "all"]);
    assert_eq!(removed.status, Some(0), "{removed:?}");
    containerd.ok(&["container", "rm", "all"]);

    // Refused with a message, before a VM is started.
    let device = mount("/x", Path::new("/dev/null"), "bind");
    let refused = containerd.run(PIGEON, &["--mount", &device], "refused", &["true"]);
    assert!(
        refused
            .stderr
            .contains("mount on /x: \"/dev/null\" is a device"),
        "{refused:?}"
    );
    assert_eq!(refused.status, Some(1));
    containerd.ctr(&["container", "rm", "refused"]);

    let deadline = Instant::now() + TIMEOUT;
    let topics = loop {
        let text = fs::read_to_string(&seen).unwrap();
        let topic = |line: &str| {
            let topic = line
                .split_whitespace()
                .find(|word| word.starts_with("/tasks/"))?;
            line.contains("\"limited\"").then(|| topic.to_string())
        };
        let topics: Vec<_> = text.lines().filter_map(topic).collect();
        if topics.iter().any(|topic| topic == "/tasks/delete") {
            break topics;
        }
        assert!(Instant::now() < deadline, "{text}");
        thread::sleep(Duration::from_millis(50));
    };
    drop(events);
    let expected =
        ["create", "start", "oom", "exit", "delete"].map(|topic| format!("/tasks/{topic}"));
    assert_eq!(topics, expected);
    containerd.assert_clean();
}

#[test]
fn a_pods_sandbox_has_no_vm_and_each_container_has_one() {
    let containerd = Containerd::start();
    let annotation_of_sandbox = "io.kubernetes.cri.container-type=sandbox";
    let start = Instant::now();
    let options = ["--annotation", annotation_of_sandbox];
    containerd.run_detached(PIGEON, &options, "pod", &["/pause"]);
    assert!(
        containerd
            .processes()
            .iter()
            .all(|line| !line.contains("qemu"))
    );
    assert_eq!(containerd.status("pod").as_deref(), Some("RUNNING"));
    assert!(start.elapsed() < Duration::from_secs(30));
    // SIGSTOP, SIGWINCH and signal 0 do not end it.
    let client = containerd.shim_client();
    let kill = |signal| {
        let request = KillRequest {
            id: "pod".into(),
            signal,
            ..KillRequest::default()
        };
        client.kill(context::with_duration(TIMEOUT), &request)
    };
    for signal in [0, 19, 28] {
        kill(signal).unwrap();
    }
    assert_eq!(code(kill(65)), Some(Code::INVALID_ARGUMENT));
    assert_eq!(containerd.status("pod").as_deref(), Some("RUNNING"));
    // Its container gets the paths of the pod's namespaces, and its hostname from a file.
    let annotation = "io.kubernetes.cri.container-type=container";
    let name = containerd.place.write("hostname", "pod-name\n");
    let name = format!(
        "type=bind,src={},dst=/etc/hostname,options=rbind:ro",
        name.display()
    );
    let pod = containerd.pid("pod").as_raw_nonzero();
    let network = format!("network:/proc/{pod}/ns/net");
    let options = [
        "--annotation",
        annotation,
        "--mount",
        &name,
        "--with-ns",
        &network,
    ];
    let outcome = containerd.run(PIGEON, &options, "web", &["hostname"]);
    assert_eq!(
        (outcome.stdout.as_str(), outcome.status),
        ("pod-name\n", Some(0)),
        "{outcome:?}"
    );
    let options = ["--annotation", annotation_of_sandbox, "--net-host"];
    let refused = containerd.run(PIGEON, &options, "host", &["/pause"]);
    assert!(
        refused.stderr.contains("no network namespace"),
        "{refused:?}"
    );
    containerd.ok(&["task", "kill", "pod"]);
    containerd.wait_status("pod", "STOPPED");
    containerd.ctr(&["task", "rm", "pod"]);
    containerd.ok(&["container", "rm", "pod"]);
    containerd.assert_clean();
}
