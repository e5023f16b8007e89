//! A user's first steps: an archive of `docker save`, a VM, a shell in it.

mod common;
#[path = "common/pty.rs"]
mod pty;

use std::{
    fs,
    io::{Read, Write},
    path::Path,
    process::{Child, Command, Output, Stdio},
    sync::{Mutex, MutexGuard},
    thread,
    time::{Duration, Instant},
};

use common::{Place, Tar, busybox_layer, check, docker_save};
use pigeon::{Arch, Client, assets::Kernel, session::Event};
use pty::{TIMEOUT, Terminal};
use serde_json::{Value, json};

/// The image's workload: prints its user, and exits on SIGTERM. Its shell's messages about a killed `sleep`
/// are discarded, as there may be none.
const SERVE: &str = "#!/bin/sh\n\
    trap 'echo good bye; exit 3' TERM\n\
    trap 'echo reread' HUP\n\
    echo \"serving as $(id -un) in $(pwd), $GREETING\"\n\
    while :; do sleep 0.1; done 2>/dev/null\n";

/// A user's directory, and the lock for running a VM.
struct Lab {
    place: Place,
    _one_at_a_time: MutexGuard<'static, ()>,
}

impl Lab {
    fn new() -> Lab {
        static LOCK: Mutex<()> = Mutex::new(());
        let lock = LOCK.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let place = Place::new();
        let config = json!({
            "architecture": common::arch().debian_name(),
            "os": "linux",
            "config": {
                "Entrypoint": ["/bin/serve"],
                "Env": ["PATH=/bin", "GREETING=hello"],
                "WorkingDir": "/home/app",
                "User": "app",
            },
        });
        let app = Tar::new()
            .dir("home/app", 0o750, (1000, 1000))
            .program("bin/serve", SERVE)
            .program("bin/foreign", "\x7fELF of another machine")
            .bytes();
        place.write(
            "app.tar",
            docker_save(&[busybox_layer(common::arch()), app], &config, "app:latest"),
        );
        let lab = Lab {
            place,
            _one_at_a_time: lock,
        };
        let image = lab.path("app.ext4");
        let made = lab.pigeon(&["rootfs", &lab.path("app.tar"), &image]);
        assert!(made.status.success(), "{made:?}");
        lab
    }

    fn path(&self, name: &str) -> String {
        self.place.path(name).to_str().unwrap().into()
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pigeon"));
        command
            .args(words)
            .env("XDG_RUNTIME_DIR", self.place.0.path())
            .env("XDG_STATE_HOME", self.place.0.path())
            .env_remove("PIGEON_UDS")
            .stdin(Stdio::null());
        command
    }

    fn pigeon(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }

    /// Standard output and exit status.
    fn output_of(&self, words: &[&str]) -> (String, Option<i32>) {
        let output = self.pigeon(words);
        (
            String::from_utf8(output.stdout).unwrap(),
            output.status.code(),
        )
    }

    fn fed(&self, words: &[&str], input: &[u8]) -> (Vec<u8>, Option<i32>) {
        let mut child = self
            .command(words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let input = input.to_vec();
        let writer = thread::spawn(move || stdin.write_all(&input));
        let output = child.wait_with_output().unwrap();
        let _ = writer.join().unwrap(); // the command may exit before it has read its input
        (output.stdout, output.status.code())
    }

    /// A VM in the background.
    fn run(&self, words: &[&str]) -> Running {
        let log = fs::File::create(self.place.path("log")).unwrap();
        let child = self
            .command(&[&["run"], words].concat())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap();
        Running(child)
    }

    fn log(&self) -> String {
        fs::read_to_string(self.place.path("log")).unwrap()
    }

    fn wait_for(&self, text: &str) {
        let deadline = Instant::now() + TIMEOUT;
        while !self.log().contains(text) {
            assert!(Instant::now() < deadline, "no {text:?} in {}", self.log());
            thread::sleep(Duration::from_millis(20));
        }
    }
}

struct Running(Child);

impl Running {
    /// Its standard output and exit code, once it has exited.
    fn end(mut self) -> (String, Option<i32>) {
        let mut output = String::new();
        self.0
            .stdout
            .take()
            .unwrap()
            .read_to_string(&mut output)
            .unwrap();
        (output, self.0.wait().unwrap().code())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_docker_save_archive_becomes_a_vm_used_like_a_container() {
    let lab = Lab::new();
    let vm = lab.run(&["--json", &lab.path("app.ext4")]);
    lab.wait_for("serving as app in /home/app, hello");
    let uds = lab.path("pigeon/app.vsock");
    assert_eq!(
        lab.output_of(&["status"]),
        (format!("up: {uds}\n"), Some(0))
    );
    let status: Value =
        serde_json::from_str(&lab.output_of(&["status", "--json", "--uds", &uds]).0).unwrap();
    assert_eq!(status["ok"], true);
    let (listed, code) = lab.output_of(&["ps"]);
    let row = listed.lines().nth(1).unwrap();
    assert!(
        row.starts_with("app ") && row.contains(" up ") && row.contains("/bin/serve"),
        "{row}"
    );
    assert_eq!(code, Some(0));
    let listed: Value = serde_json::from_str(&lab.output_of(&["list", "--json"]).0).unwrap();
    assert_eq!(
        (&listed[0]["vm"], &listed[0]["uds"]),
        (&json!("app"), &json!(uds))
    );

    commands_as_of_docker_exec(&lab);
    input_and_output(&lab);
    a_volume_that_comes_and_goes(&lab);
    a_shell_on_a_terminal(&lab);
    the_library(Path::new(&uds));

    let wait = thread::spawn({
        let mut command = lab.command(&["wait", "--json", "--vm", "app"]);
        move || command.output().unwrap()
    });
    assert_eq!(lab.output_of(&["signal", "HUP"]), (String::new(), Some(0)));
    lab.wait_for("reread");
    assert_eq!(
        lab.output_of(&["signal", "--json", "SIGTERM"]),
        ("{\"ok\":true}\n".into(), Some(0))
    );
    let waited: Value = serde_json::from_slice(&wait.join().unwrap().stdout).unwrap();
    assert_eq!(waited, json!({"code": 3, "oom_killed": false}));
    let (output, code) = vm.end();
    let expected = json!({
        "exit": {"code": 3, "oom_killed": false},
        "end": "orderly",
        "exit_code": 3,
    });
    assert_eq!(serde_json::from_str::<Value>(&output).unwrap(), expected);
    assert_eq!(code, Some(3));
    check(&lab.place.path("app.ext4"));
    let gone = lab.pigeon(&["exec", "true"]);
    assert_eq!(gone.status.code(), Some(125));
    assert!(String::from_utf8_lossy(&gone.stderr).contains("no VM is running"));
}

fn commands_as_of_docker_exec(lab: &Lab) {
    assert_eq!(
        lab.output_of(&["exec", "echo", "a  b", "-x"]),
        ("a  b -x\n".into(), Some(0))
    );
    assert_eq!(
        lab.output_of(&["exec", "--", "sh", "-c", "exit 7"]),
        (String::new(), Some(7))
    );
    assert_eq!(lab.output_of(&["exec", "id", "-u"]).0, "0\n");
    let both = ["exec", "sh", "-c", "echo out; echo err >&2"];
    let output = lab.pigeon(&both);
    assert_eq!(
        (&output.stdout[..], &output.stderr[..]),
        (&b"out\n"[..], &b"err\n"[..])
    );
    assert_eq!(
        lab.output_of(&["exec", "-u", "app", "id", "-u"]).0,
        "1000\n"
    );
    assert_eq!(
        lab.output_of(&["exec", "-u", "7:8", "sh", "-c", "id -u; id -g"])
            .0,
        "7\n8\n"
    );
    assert_eq!(lab.output_of(&["exec", "-w", "/etc", "pwd"]).0, "/etc\n");
    let variables = [
        "exec",
        "-e",
        "A=b=c",
        "-e",
        "GREETING=bye",
        "sh",
        "-c",
        "echo $A $GREETING",
    ];
    assert_eq!(lab.output_of(&variables).0, "b=c bye\n");
    assert_eq!(
        lab.output_of(&["exec", "sh", "-c", "kill -9 $$"]),
        (String::new(), Some(137))
    );
    assert_eq!(
        lab.output_of(&["exec", "sh", "-c", "tty; cat"]),
        ("not a tty\n".into(), Some(0))
    );
    for (words, code, expected) in [
        (["exec", "-w", "/", "/no/such"], 127, "/no/such"),
        (["exec", "-w", "/", "/etc/passwd"], 126, "/etc/passwd"),
        (["exec", "-u", "nobody", "true"], 126, "nobody"),
    ] {
        let output = lab.pigeon(&words);
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        assert!(
            String::from_utf8_lossy(&output.stderr).contains(expected),
            "{output:?}"
        );
    }
    let output = lab.pigeon(&["exec", "foreign"]);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    let expected = format!(
        "foreign: neither a program for {} nor",
        common::arch().name()
    );
    assert!(stderr.contains(&expected), "{stderr}");
    assert_eq!(output.status.code(), Some(126));
    let output = lab.pigeon(&["exec", "app"]);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        stderr.ends_with("pigeon: app is a VM: give a command, as in `pigeon exec app sh`\n"),
        "{stderr}"
    );
    assert_eq!(output.status.code(), Some(127));
    let (json, code) = lab.output_of(&[
        "exec",
        "--json",
        "sh",
        "-c",
        "echo out; echo err >&2; exit 4",
    ]);
    let expected = json!({"exit_code": 4, "exit_signal": 0, "stdout": "out\n", "stderr": "err\n"});
    assert_eq!(
        (serde_json::from_str::<Value>(&json).unwrap(), code),
        (expected, Some(4))
    );
    let (json, code) = lab.output_of(&["exec", "--json", "--timeout", "0.2", "sleep", "60"]);
    assert!(
        json.contains("\"exit_signal\":9") && code == Some(137),
        "{json}"
    );
}

fn input_and_output(lab: &Lab) {
    assert_eq!(
        lab.fed(&["exec", "-i", "tr", "a-z", "A-Z"], b"hello\n"),
        (b"HELLO\n".to_vec(), Some(0))
    );
    // The command exits without reading all of its input.
    let much = vec![b'x'; 3 << 20];
    assert_eq!(
        lab.fed(&["exec", "-i", "head", "-c", "3"], &much),
        (b"xxx".to_vec(), Some(0))
    );
    assert_eq!(
        lab.fed(&["exec", "-i", "wc", "-c"], &much),
        (format!("{}\n", 3 << 20).into(), Some(0))
    );
    // Without -i the command's input is empty.
    assert_eq!(
        lab.fed(&["exec", "wc", "-c"], &much),
        (b"0\n".to_vec(), Some(0))
    );
    let (output, code) = lab.fed(&["exec", "cat", "/bin/busybox"], b"");
    assert!(
        output == fs::read(pigeon::assets::busybox(common::arch()).unwrap()).unwrap()
            && code == Some(0)
    );
    let refused = lab.pigeon(&["exec", "-it", "sh"]);
    assert!(
        String::from_utf8_lossy(&refused.stderr).contains("not a terminal"),
        "{refused:?}"
    );
    // A command is killed with its client.
    let mut client = lab.command(&["exec", "sleep", "4321"]).spawn().unwrap();
    let sleeps = || {
        lab.output_of(&["exec", "sh", "-c", "ps | grep -c '[s]leep 4321'"])
            .0
    };
    let becomes = |count: &str| {
        let deadline = Instant::now() + TIMEOUT;
        while sleeps() != count {
            assert!(Instant::now() < deadline, "never {count:?}");
        }
    };
    becomes("1\n");
    client.kill().unwrap();
    client.wait().unwrap();
    becomes("0\n");
}

fn a_volume_that_comes_and_goes(lab: &Lab) {
    let words = [
        "mount",
        "-t",
        "tmpfs",
        "-o",
        "size=4m",
        "tmpfs",
        "app:/scratch",
    ];
    assert_eq!(lab.output_of(&words), (String::new(), Some(0)));
    let (mounts, _) = lab.output_of(&["exec", "cat", "/proc/mounts"]);
    assert!(
        mounts.contains(" /scratch tmpfs ") && mounts.contains("size=4096k"),
        "{mounts}"
    );
    let again = lab.pigeon(&words);
    let stderr = String::from_utf8_lossy(&again.stderr).into_owned();
    assert_eq!(again.status.code(), Some(125));
    // Only the error is shown, and nothing of the workload.
    assert!(
        stderr.contains("/scratch") && stderr.lines().count() == 1,
        "{stderr}"
    );
    assert_eq!(
        lab.output_of(&["unmount", "/scratch"]),
        (String::new(), Some(0))
    );
    let (mounts, _) = lab.output_of(&["exec", "cat", "/proc/mounts"]);
    assert!(!mounts.contains(" /scratch "), "{mounts}");
}

fn a_shell_on_a_terminal(lab: &Lab) {
    let prompt = "/ # ";
    let mut shell = Terminal::spawn(lab.command(&["exec", "-it", "-w", "/", "sh"]), (97, 31));
    let before = shell.modes();
    shell.expect(prompt);
    shell.type_text("tty; stty size; echo $TERM\r");
    shell.expect("\r\n/dev/pts/");
    shell.expect("\r\n31 97\r\nxterm-256color\r\n");
    shell.expect(prompt);
    // The guest's terminal echoes and edits, the host's does not.
    shell.type_text("echo onx\x7fe\r");
    shell.expect("\r\none\r\n");
    shell.expect(prompt);
    shell.type_text("ls --color=auto -d /bin\r");
    shell.expect("\x1b[1;34m/bin\x1b[m\r\n");
    shell.expect(prompt);

    shell.type_text(
        "sh -c 'trap \"stty size\" WINCH; echo $((6 * 7)); while :; do sleep 0.1; done'\r",
    );
    shell.expect("\r\n42\r\n");
    shell.resize((132, 50));
    shell.expect("50 132\r\n");
    shell.type_text("\x03");
    shell.expect(prompt);
    shell.type_text("stty size\r");
    shell.expect("\r\n50 132\r\n");

    shell.type_text("sleep 1000; echo status $?\r");
    shell.expect("echo status $?\r\n");
    thread::sleep(Duration::from_millis(300));
    shell.type_text("\x03");
    shell.expect("^C");
    shell.expect(prompt);
    shell.type_text("echo \"still\" here\r");
    shell.expect("\r\nstill here\r\n");
    shell.type_text("cat\r");
    shell.expect("cat\r\n");
    // The shell reads single keys, and restores the terminal's mode only for its command.
    thread::sleep(Duration::from_millis(300));
    shell.type_text("a line\r");
    shell.expect("a line\r\na line\r\n");
    shell.type_text("\x04");
    shell.expect(prompt);
    shell.type_text("(exit 5)\r");
    shell.expect(prompt);
    shell.type_text("\x04");
    assert_eq!(shell.wait().code(), Some(5));
    let after = shell.modes();
    assert_eq!(
        (before.local_modes, before.input_modes, before.output_modes),
        (after.local_modes, after.input_modes, after.output_modes)
    );

    // A terminal without input.
    let mut top = Terminal::spawn(lab.command(&["exec", "-t", "stty", "size"]), (60, 20));
    top.expect("20 60\r");
    assert_eq!(top.wait().code(), Some(0));
}

fn the_library(uds: &Path) {
    let vm = Client::connect(uds).unwrap();
    // Unread input does not block output.
    let mut session = vm.session(&pigeon::Command::new(["cat"])).unwrap();
    let sent: Vec<u8> = (0..400_000u32).flat_map(u32::to_le_bytes).collect();
    session.send(&sent).unwrap();
    session.end_input().unwrap();
    let mut received = vec![];
    let ended = loop {
        match session.next().unwrap().unwrap() {
            Event::Output(_, bytes) => received.extend(bytes),
            Event::Exit(ended) => break ended,
        }
    };
    assert_eq!(
        (received == sent, ended.code, ended.status()),
        (true, Some(0), 0)
    );
    assert_eq!(session.next().unwrap(), None);

    let error = vm
        .session(&pigeon::Command::new(["/none"]))
        .unwrap()
        .next()
        .unwrap_err();
    assert!(matches!(error, pigeon::Error::NotStarted(_)), "{error}");
    assert!(matches!(
        vm.exec(&pigeon::Command::new(["/none"])),
        Err(pigeon::Error::NotStarted(_))
    ));
    assert!(matches!(
        vm.signal(65),
        Err(pigeon::Error::Refused { status: 400, .. })
    ));
    let output = vm
        .exec(&pigeon::Command::new(["pwd"]).dir("/etc").user("app"))
        .unwrap();
    assert_eq!((output.stdout.as_str(), output.exit_code), ("/etc\n", 0));
}

#[test]
fn keys_go_to_the_console_and_ctrl_c_is_an_orderly_stop() {
    let lab = Lab::new();
    let script = "trap 'echo stopping; sync; exit 9' TERM; read line; echo \"got: $line\"; \
                  while :; do sleep 0.1; done";
    let words = [
        "run",
        "--entrypoint",
        "sh",
        "-u",
        "root",
        &lab.path("app.ext4"),
        "-c",
        script,
    ];
    let mut vm = Terminal::spawn(lab.command(&words), (80, 24));
    let before = vm.modes();
    vm.expect("workload started");
    vm.type_text("some words\r");
    vm.expect("got: some words");
    vm.type_text("\x03");
    vm.expect("stopping the VM; once more kills it");
    vm.expect("stopping\r");
    assert_eq!(vm.wait().code(), Some(9));
    vm.expect("exit code 9");
    assert_eq!(before.local_modes, vm.modes().local_modes);
    check(&lab.place.path("app.ext4"));
}

#[test]
fn ctrl_c_twice_is_a_kill() {
    let lab = Lab::new();
    let script = "trap '' TERM; echo deaf; while :; do sleep 0.1; done";
    let words = [
        "run",
        "--entrypoint",
        "sh",
        &lab.path("app.ext4"),
        "-c",
        script,
    ];
    let mut vm = Terminal::spawn(lab.command(&words), (80, 24));
    vm.expect("deaf");
    vm.type_text("\x03");
    vm.expect("once more kills it");
    vm.type_text("\x03");
    vm.expect("pigeon: killed");
    assert_eq!(vm.wait().code(), Some(137));
    let waited = lab.pigeon(&["wait"]);
    let stderr = String::from_utf8_lossy(&waited.stderr).into_owned();
    assert_eq!(
        (&waited.stdout[..], stderr.as_str()),
        (&b"137\n"[..], "pigeon: the VM was killed\n")
    );
}

#[test]
fn a_workload_that_cannot_run_is_reported_with_the_reason() {
    let lab = Lab::new();
    let vm = lab.run(&["--json", "-u", "stranger", &lab.path("app.ext4")]);
    let (output, code) = vm.end();
    assert_eq!(code, Some(125), "{output} {}", lab.log());
    assert!(lab.log().contains("stranger"), "{}", lab.log());
    let vm = lab.run(&["--entrypoint", "/bin/none", &lab.path("app.ext4")]);
    assert_eq!(vm.end().1, Some(127), "{}", lab.log());
    // A program for another architecture, and a file that is not a program.
    let words = ["run", "-q", "--entrypoint", "/bin/foreign"];
    let output = lab.pigeon(&[&words[..], &[&lab.path("app.ext4")]].concat());
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    let expected = format!(
        "execute /bin/foreign: ENOEXEC\" uid=1000 gid=1000\npigeon: exit code 126: neither a program \
         for {} nor a script that begins with #!\n",
        common::arch().name()
    );
    assert!(stderr.ends_with(&expected), "{stderr}");
    assert_eq!(output.status.code(), Some(126));
}

#[test]
fn a_vm_in_the_background_is_controlled_by_its_name() {
    let lab = Lab::new();
    let image = lab.path("app.ext4");
    let begin = Instant::now();
    let (name, code) = lab.output_of(&["run", "-d", "--name", "web", &image]);
    assert_eq!((name.as_str(), code), ("web\n", Some(0)));
    assert!(begin.elapsed() < TIMEOUT);
    let again = lab.pigeon(&["run", "-d", "--name", "web", &image]);
    assert_eq!(again.status.code(), Some(125));
    let stderr = String::from_utf8_lossy(&again.stderr).into_owned();
    assert!(
        stderr.contains("a VM called web is running already"),
        "{stderr}"
    );
    // Its disk cannot be shared.
    let other = lab.pigeon(&["run", "-d", "--name", "other", &image]);
    let stderr = String::from_utf8_lossy(&other.stderr).into_owned();
    assert!(
        stderr.contains("is in use by another running VM"),
        "{stderr}"
    );

    let follower = thread::spawn({
        let mut command = lab.command(&["logs", "-f", "web"]);
        move || command.output().unwrap()
    });
    // The hostname, and its entry in the hosts file.
    let (names, _) = lab.output_of(&["exec", "web", "sh", "-c", "hostname; cat /etc/hosts"]);
    assert!(names.starts_with("web\n"), "{names}");
    assert!(
        names.contains("127.0.1.1\tweb") && names.contains("127.0.0.1\tlocalhost"),
        "{names}"
    );
    let (listed, _) = lab.output_of(&["ps", "-q"]);
    assert_eq!(listed, "web\n");
    let running: Value = serde_json::from_str(&lab.output_of(&["inspect", "web"]).0).unwrap();
    assert_eq!(
        (&running[0]["running"], &running[0]["name"]),
        (&json!(true), &json!("web"))
    );
    let refused = lab.pigeon(&["rm", "web"]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("`pigeon stop web`"));
    let refused = lab.pigeon(&["snapshot", "web", &lab.path("web.snapshot")]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("`pigeon run --restorable`"));

    assert_eq!(lab.output_of(&["stop", "web"]), ("web\n".into(), Some(0)));
    let followed = follower.join().unwrap();
    let expected = "serving as app in /home/app, hello\ngood bye\n";
    assert_eq!(String::from_utf8_lossy(&followed.stdout), expected);
    check(&lab.place.path("app.ext4"));

    // Its record is kept.
    assert_eq!(lab.output_of(&["ps", "-q"]).0, "");
    let (listed, _) = lab.output_of(&["ps", "-a"]);
    assert!(
        listed.contains("web ") && listed.contains("exited (3)"),
        "{listed}"
    );
    assert_eq!(lab.output_of(&["wait", "web"]), ("3\n".into(), Some(0)));
    assert_eq!(lab.output_of(&["logs", "web"]), (expected.into(), Some(0)));
    assert_eq!(
        lab.output_of(&["logs", "--since-offset", "35", "web"]).0,
        "good bye\n"
    );
    assert!(
        lab.output_of(&["logs", "--console", "web"])
            .0
            .contains("workload exited")
    );
    let ended: Value = serde_json::from_str(&lab.output_of(&["inspect", "web"]).0).unwrap();
    assert_eq!(ended[0]["exit"], json!({"code": 3, "oom_killed": false}));
    assert_eq!(lab.output_of(&["logs", "-n", "1", "web"]).0, "good bye\n");
    assert_eq!(
        lab.output_of(&["logs", "-f", "--tail", "9", "web"]).0,
        expected
    );
    let gone = lab.pigeon(&["exec", "web", "true"]);
    assert!(
        String::from_utf8_lossy(&gone.stderr).contains("has ended (exited (3)"),
        "{gone:?}"
    );
    assert_eq!(lab.output_of(&["rm", "web"]), ("web\n".into(), Some(0)));
    assert_eq!(lab.output_of(&["ps", "-a", "-q"]).0, "");
    // After a forced removal, the disk can be used immediately.
    let words = ["run", "-d", "--wait", "--name", "web", &image];
    assert_eq!(lab.output_of(&words).1, Some(0));
    let deaf = ["exec", "web", "sh", "-c", "kill -STOP -1"];
    assert_eq!(lab.output_of(&deaf).1, Some(0));
    assert_eq!(
        lab.output_of(&["rm", "-f", "web"]),
        ("web\n".into(), Some(0))
    );
    // A VM stopped during its boot ends as soon as its init is up.
    assert_eq!(
        lab.output_of(&["run", "-d", "--name", "web", &image]).1,
        Some(0)
    );
    let stopped = lab.pigeon(&["stop", "web"]);
    let stderr = String::from_utf8_lossy(&stopped.stderr).into_owned();
    assert_eq!((stopped.status.code(), stderr.as_str()), (Some(0), ""));
    assert_eq!(lab.output_of(&["rm", "web"]).1, Some(0));
    assert_eq!(lab.output_of(&words).1, Some(0));
    // An explicit signal, and the default one.
    let deadline = Instant::now() + TIMEOUT;
    let logged = |text: &str| {
        while !lab.output_of(&["logs", "web"]).0.contains(text) {
            assert!(Instant::now() < deadline, "no {text}");
        }
    };
    logged("serving");
    assert_eq!(lab.output_of(&["kill", "-s", "HUP", "web"]).1, Some(0));
    logged("reread");
    assert_eq!(lab.output_of(&["kill", "web"]), ("web\n".into(), Some(0)));
    assert_eq!(lab.output_of(&["wait", "web"]), ("137\n".into(), Some(0)));
    let running = || lab.output_of(&["ps", "-q"]).0 == "web\n";
    while running() {
        assert!(Instant::now() < deadline);
    }
    let killed = lab.pigeon(&["kill", "web"]);
    let stderr = String::from_utf8_lossy(&killed.stderr).into_owned();
    assert!(stderr.contains("has ended (exited (137)"), "{stderr}");
    check(&lab.place.path("app.ext4"));
    assert_eq!(lab.output_of(&["rm", "web"]).1, Some(0));
    // A VM without a record.
    let words = ["run", "-q", "--rm", "--entrypoint", "true", &image];
    assert_eq!(lab.output_of(&words).1, Some(0));
    assert_eq!(lab.output_of(&["ps", "-a", "-q"]).0, "");
}

#[test]
fn clones_of_a_vm_continue_under_their_own_names() {
    let lab = Lab::new();
    let image = lab.path("app.ext4");
    let words = [
        "run",
        "-d",
        "--restorable",
        "--name",
        "web",
        "-m",
        "128",
        &image,
    ];
    if common::arch() == Arch::Aarch64 {
        let refused = lab.pigeon(&words);
        let stderr = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(
            stderr.contains("snapshots on QEMU are for x86_64"),
            "{stderr}"
        );
        assert_eq!(refused.status.code(), Some(125));
        return;
    }
    assert_eq!(lab.output_of(&words), ("web\n".into(), Some(0)));
    let uuid = "cat /proc/sys/kernel/random/uuid";
    let write = "echo mine >note; sync";
    assert_eq!(
        lab.output_of(&["exec", "web", "sh", "-c", write]).1,
        Some(0)
    );
    let snapshot = lab.path("web.snapshot");
    let (output, code) = lab.output_of(&["snapshot", "web", &snapshot]);
    let taken: Value = serde_json::from_str(&output).unwrap();
    assert_eq!((code, &taken["snapshot"]), (Some(0), &json!(snapshot)));
    assert!(
        taken["frozen"].as_u64().is_some_and(|frozen| frozen > 0),
        "{taken}"
    );
    // An existing snapshot is not replaced, and the VM continues.
    let again = lab.pigeon(&["snapshot", "web", &snapshot]);
    assert_eq!(again.status.code(), Some(125));
    assert_eq!(lab.output_of(&["exec", "web", "hostname"]).0, "web\n");
    // Another snapshot command is killed while the VM is paused and its memory is being copied.
    let interrupted = lab.path("interrupted.snapshot");
    let mut command = lab
        .command(&["snapshot", "web", &interrupted])
        .spawn()
        .unwrap();
    while !Path::new(&interrupted).join("memory").exists() {
        assert_eq!(command.try_wait().unwrap(), None);
        thread::sleep(Duration::from_millis(1));
    }
    command.kill().unwrap();
    command.wait().unwrap();
    let killed = Instant::now();
    while lab.output_of(&["exec", "web", "cat", "note"]) != ("mine\n".into(), Some(0)) {
        assert!(killed.elapsed() < TIMEOUT, "the VM was not resumed");
        thread::sleep(Duration::from_millis(100));
    }

    let restored = lab.pigeon(&["restore", "--count", "2", &snapshot]);
    assert_eq!(restored.stdout, b"web-2\nweb-3\n", "{restored:?}");
    let mut uuids = std::collections::BTreeSet::new();
    for name in ["web", "web-2", "web-3"] {
        let script = format!("hostname; cat note; echo more >>note; {uuid}");
        let (output, code) = lab.output_of(&["exec", name, "sh", "-c", &script]);
        let lines: Vec<_> = output.lines().collect();
        assert_eq!((&lines[..2], code), (&[name, "mine"][..], Some(0)));
        uuids.insert(lines[2].to_string());
    }
    assert_eq!(uuids.len(), 3, "{uuids:?}");
    assert_eq!(lab.output_of(&["ps", "-q"]).0, "web\nweb-2\nweb-3\n");
    let inspected = lab.output_of(&["inspect", "web-2"]).0;
    let inspected: Value = serde_json::from_str(&inspected).unwrap();
    let disk = inspected[0]["restorable"]["disks"][0]["path"].as_str();
    let disk = disk.unwrap().to_string();
    for name in ["web-2", "web-3", "web"] {
        assert_eq!(lab.output_of(&["stop", name]).1, Some(0));
        assert_eq!(lab.output_of(&["wait", name]).0, "3\n");
        let (logs, _) = lab.output_of(&["logs", name]);
        assert!(logs.ends_with("good bye\n"), "{logs}");
    }
    let (events, _) = lab.output_of(&["events", "web-2"]);
    assert!(
        events.contains(r#""event":"restored","generation":2"#),
        "{events}"
    );
    check(Path::new(&disk));
    check(Path::new(&image));
    assert_eq!(lab.output_of(&["rm", "web-2"]).1, Some(0));
    assert!(!Path::new(&disk).exists());
}

#[test]
fn quiet_prints_only_the_workloads_output_and_returns_its_exit_code() {
    let lab = Lab::new();
    let script = "echo one; printf 'two\\n\\nthree'; exit 4";
    let words = [
        "run",
        "-q",
        "--entrypoint",
        "sh",
        &lab.path("app.ext4"),
        "-c",
        script,
    ];
    let output = lab.pigeon(&words);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "one\ntwo\n\nthree");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert_eq!(output.status.code(), Some(4));
    // A file of variables that can be read only once.
    let words = [
        "run",
        "-q",
        "--env-file",
        "/dev/stdin",
        "--entrypoint",
        "sh",
    ];
    let image = lab.path("app.ext4");
    let words = [&words[..], &[&image, "-c", "echo $COLOR"]].concat();
    let output = lab.fed(&words, b"# comment\nCOLOR=blue\n");
    assert_eq!(output, (b"blue\n".to_vec(), Some(0)));
    // Messages for a missing command, and for an image that does not boot.
    let words = ["run", "-q", "--entrypoint", "/none", &lab.path("app.ext4")];
    let output = lab.pigeon(&words);
    assert_eq!(output.status.code(), Some(127), "{output:?}");
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("/none"),
        "{output:?}"
    );
}

#[test]
fn a_workload_on_a_terminal_has_its_size_a_prompt_and_ctrl_c() {
    let lab = Lab::new();
    let words = [
        "run",
        "-it",
        "--rm",
        "--entrypoint",
        "sh",
        &lab.path("app.ext4"),
    ];
    let mut shell = Terminal::spawn(lab.command(&words), (91, 33));
    let before = shell.modes();
    let prompt = "$ ";
    shell.expect(prompt);
    shell.type_text("stty size; id -un; pwd\r");
    shell.expect("33 91\r\napp\r\n/home/app\r\n");
    shell.expect(prompt);
    shell.type_text("sleep 1000\r");
    shell.expect("sleep 1000\r\n");
    thread::sleep(Duration::from_millis(500));
    shell.type_text("\x03");
    shell.expect("^C");
    shell.expect(prompt);
    shell.resize((100, 40));
    thread::sleep(Duration::from_millis(500));
    shell.type_text("stty size; exit 6\r");
    shell.expect("40 100\r\n");
    assert_eq!(shell.wait().code(), Some(6), "{}", shell.shown());
    assert_eq!(before.local_modes, shell.modes().local_modes);
    assert_eq!(lab.output_of(&["ps", "-a", "-q"]).0, "");
    check(&lab.place.path("app.ext4"));

    // Keys typed during the boot are not lost, and only a progress message is shown.
    let words = ["run", "-it", "--rm", "--entrypoint", "sh"];
    let image = lab.path("app.ext4");
    let words = [&words[..], &[&image, "-c", "read word; echo got $word"]].concat();
    let mut early = Terminal::spawn(lab.command(&words), (80, 24));
    early.expect("booting");
    early.type_text("early\r");
    early.expect("got early");
    assert!(early.wait().success());
    assert!(!early.shown().contains("0 B"), "{}", early.shown());

    let words = [
        "run",
        "-i",
        "--entrypoint",
        "tr",
        &lab.path("app.ext4"),
        "a-z",
        "A-Z",
    ];
    assert_eq!(lab.fed(&words, b"hello\n"), (b"HELLO\n".to_vec(), Some(0)));
    let words = ["run", "-i", "--entrypoint", "/none", &lab.path("app.ext4")];
    assert_eq!(lab.fed(&words, b"").1, Some(127));
    let refused = lab.pigeon(&["run", "-it", &lab.path("app.ext4")]);
    let stderr = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(stderr.contains("not a terminal"), "{stderr}");
    assert_eq!(refused.status.code(), Some(125));
}

#[test]
fn signals_and_stops_reach_a_workload_that_has_input_or_a_terminal() {
    let lab = Lab::new();
    let image = lab.path("app.ext4");
    let run = |options: &[&str], traps: &str| {
        let script = format!("{traps}; echo ready; while :; do sleep 0.1; done 2>/dev/null");
        let words = ["run", "--name", "typed", "--rm", "--entrypoint", "sh"];
        let words = [&words[..], options, &[&image, "-c", &script]].concat();
        let mut vm = Terminal::spawn(lab.command(&words), (80, 24));
        vm.expect("ready");
        vm
    };
    let traps =
        "trap 'echo user' USR1; trap 'echo quit' QUIT; trap 'sleep 1; echo bye; exit 3' TERM";
    let mut vm = run(&["-i"], traps);
    assert_eq!(lab.output_of(&["kill", "-s", "USR1", "typed"]).1, Some(0));
    vm.expect("user");
    assert_eq!(lab.output_of(&["signal", "USR1"]).1, Some(0));
    vm.expect("user");
    vm.type_text("\x1c");
    vm.expect("quit");
    // The session of the workload is not listed.
    assert_eq!(lab.output_of(&["attach", "--json"]).0, "[]\n");
    assert_eq!(
        lab.output_of(&["stop", "typed"]),
        ("typed\n".into(), Some(0))
    );
    vm.expect("bye");
    assert_eq!(vm.wait().code(), Some(3));

    let mut vm = run(
        &["-t", "--stop-signal", "USR1"],
        "trap '' TERM; trap 'echo bye; exit 4' USR1",
    );
    vm.type_text("\x03");
    vm.expect("bye");
    assert_eq!(vm.wait().code(), Some(4), "{}", vm.shown());

    let mut vm = run(&["-it"], "trap 'echo deaf' TERM");
    let before = vm.modes();
    assert_eq!(lab.output_of(&["stop", "-t", "0.5", "typed"]).1, Some(0));
    vm.expect("deaf");
    assert_eq!(vm.wait().code(), Some(137), "{}", vm.shown());
    assert_ne!(before.local_modes, vm.modes().local_modes);
    check(&lab.place.path("app.ext4"));
}

#[test]
fn a_vm_shuts_down_in_order_when_its_output_is_no_longer_read() {
    let lab = Lab::new();
    let image = lab.path("app.ext4");
    let volume = format!("{}:/data,size=16M", lab.path("data.img"));
    let script = "echo kept >/data/x; while echo y; do sleep 0.1; done";
    let words = [
        "run",
        "-i",
        "--name",
        "unread",
        "-u",
        "root",
        "-v",
        &volume,
        "--entrypoint",
        "sh",
        &image,
        "-c",
        script,
    ];
    let mut command = lab.command(&words);
    let (mut reader, writer) = std::io::pipe().unwrap();
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(writer)
        .spawn()
        .unwrap();
    drop(command);
    reader.read_exact(&mut [0; 2]).unwrap();
    drop(reader);
    assert_eq!(child.wait().unwrap().code(), Some(141));
    let described = lab.output_of(&["inspect", "unread"]).0;
    let described: Value = serde_json::from_str(&described).unwrap();
    assert_eq!(described[0]["end"], "orderly", "{described}");
    assert_eq!(described[0]["exit_code"], 141, "{described}");
    // The file system is clean, with an empty journal.
    check(&lab.place.path("data.img"));
    let clean = common::debugfs(&lab.place.path("data.img"), "show_super_stats -h");
    assert!(!clean.contains("needs_recovery"), "{clean}");
    assert_eq!(
        common::debugfs(&lab.place.path("data.img"), "cat /x"),
        "kept\n"
    );
}

#[test]
fn a_volume_is_made_once_and_keeps_what_is_written_to_it() {
    let lab = Lab::new();
    let volume = lab.path("data.img");
    let image = lab.path("app.ext4");
    let run = |script: &str| {
        let place = format!("{volume}:/data,size=32M");
        let words = [
            "run",
            "-q",
            "-v",
            &place,
            "--entrypoint",
            "sh",
            &image,
            "-c",
            script,
        ];
        let output = lab.pigeon(&words);
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (
            text(output.stdout),
            text(output.stderr),
            output.status.code(),
        )
    };
    let (out, stderr, code) = run("stat -c '%U' /data; echo kept >/data/file; sync");
    assert_eq!((out.as_str(), code), ("app\n", Some(0)), "{stderr}");
    assert!(stderr.contains("data.img: created, 32 MiB"), "{stderr}");
    check(Path::new(&volume));
    let (out, stderr, code) = run("cat /data/file; ls -a /data | wc -l");
    assert_eq!((out.as_str(), code), ("kept\n3\n", Some(0)), "{stderr}");
    assert_eq!(stderr, "");
    check(Path::new(&volume));
}

#[test]
fn one_sigterm_ends_a_vm_that_does_not_even_boot() {
    let lab = Lab::new();
    // With too little memory x86's kernel hangs; arm's exits, so this is a program that branches to itself.
    let (kernel, memory) = match common::arch() {
        Arch::X86_64 => (Kernel::chosen(Arch::X86_64).unwrap().image(), "8"),
        Arch::Aarch64 => {
            let branch = 0x1400_0000u32.to_le_bytes();
            (lab.place.write("kernel", branch), "128")
        }
    };
    let kernel = kernel.to_str().unwrap();
    let words = [
        "run",
        "-m",
        memory,
        "--kernel",
        kernel,
        "--stop-timeout",
        "0.5",
        &lab.path("app.ext4"),
    ];
    let mut child = lab.command(&words).spawn().unwrap();
    thread::sleep(Duration::from_secs(3));
    let pid = rustix::process::Pid::from_child(&child);
    assert_eq!(child.try_wait().unwrap(), None, "it must still be running");
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let begin = Instant::now();
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(137));
    assert!(
        begin.elapsed() < Duration::from_secs(20),
        "{:?}",
        begin.elapsed()
    );
}

#[test]
fn roots_of_every_format_boot_and_can_be_shared_below_layers() {
    let lab = Lab::new();
    let script = "mount | grep ' / '; echo new >>/etc/passwd && tail -n 1 /etc/passwd; \
                  mount | grep -c '/tmp type tmpfs.*size=4096k'; ulimit -n; \
                  cat /proc/sys/net/core/somaxconn";
    let run = |image: &str, options: &[&str]| {
        let mut words = vec!["run", "-q", "--rm", "-u", "root", "--entrypoint", "sh"];
        words.extend(["--tmpfs", "/tmp:size=4m", "--ulimit", "nofile=123"]);
        words.extend([
            "--sysctl",
            "net.core.somaxconn=77",
            "--cgroup-mode",
            "unified",
        ]);
        words.extend(options);
        words.extend([image, "-c", script]);
        let output = lab.pigeon(&words);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        (String::from_utf8(output.stdout).unwrap(), stderr)
    };
    for format in ["erofs", "squashfs"] {
        let image = lab.path(&format!("app.{format}"));
        let made = lab.pigeon(&[
            "rootfs",
            "-f",
            "--format",
            format,
            &lab.path("app.tar"),
            &image,
        ]);
        assert!(made.status.success(), "{made:?}");
        let (out, stderr) = run(&image, &[]);
        assert!(
            out.contains(&format!("on / type {format} (ro,")),
            "{out}{stderr}"
        );
        assert!(
            !out.contains("new\n") && out.ends_with("\n1\n123\n77\n"),
            "{out}"
        );
        let (out, stderr) = run(&image, &["--overlay"]);
        assert!(
            out.starts_with("overlay on / type overlay (rw,"),
            "{out}{stderr}"
        );
        assert!(out.ends_with("\nnew\n1\n123\n77\n"), "{out}");
    }
    let image = lab.path("app.ext4");
    let before = fs::read(&image).unwrap();
    let (out, stderr) = run(&image, &["--read-only"]);
    assert!(
        out.contains("on / type ext4 (ro,") && !out.contains("new\n"),
        "{out}{stderr}"
    );

    // One VM runs while the other one writes.
    let name = ["run", "-d", "--name", "first", "--overlay", &image];
    assert_eq!(lab.output_of(&name).1, Some(0));
    lab.output_of(&["exec", "first", "sh", "-c", "echo first >/etc/mark"]);
    let layer = lab.path("layer.img");
    let options = format!("--overlay={layer},size=64M");
    let second = |script: &str| {
        let words = [
            "run",
            "-q",
            "--rm",
            "-u",
            "root",
            &options,
            "--entrypoint",
            "sh",
        ];
        lab.output_of(&[&words[..], &[&image, "-c", script]].concat())
    };
    let (seen, code) = second("cat /etc/mark 2>/dev/null; echo second >/etc/mark");
    assert_eq!((seen.as_str(), code), ("", Some(0)));
    check(Path::new(&layer));
    assert_eq!(second("cat /etc/mark").0, "second\n");
    check(Path::new(&layer));
    assert_eq!(
        lab.output_of(&["exec", "first", "cat", "/etc/mark"]).0,
        "first\n"
    );
    assert_eq!(lab.output_of(&["stop", "first"]).1, Some(0));
    assert!(
        fs::read(&image).unwrap() == before,
        "the shared image has changed"
    );
}

#[test]
fn a_vm_that_has_ended_is_started_again_as_it_was_run() {
    let lab = Lab::new();
    let place = lab.place.0.path();
    // The signal handler is set before the output.
    let script = "trap 'exit 5' TERM; n=$(cat /data/boots 2>/dev/null | wc -l); echo x >>/data/boots; \
                  echo \"boot $COLOR $n\"; while :; do sleep 0.1; done";
    // Relative paths and variables are those of the first run.
    let mut first = lab.command(&["run", "-d", "--wait", "--name", "db", "-e", "COLOR", "-v"]);
    first.args(["data.img:/data,size=16M", "-p", "127.0.0.1:0:9", "--uds"]);
    first.args(["db.sock", "-m", "200", "--entrypoint", "sh", "app.ext4"]);
    first.args(["-c", script]);
    let output = first.current_dir(place).env("COLOR", "blue").output();
    let output = output.unwrap();
    assert_eq!(output.stdout, b"db\n", "{output:?}");
    let status = || lab.output_of(&["ps", "-a"]).0;
    let inspect =
        || -> Value { serde_json::from_str(&lab.output_of(&["inspect", "db"]).0).unwrap() };
    let logs = |expected: &[&str]| {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let output = lab.output_of(&["logs", "db"]).0;
            // The shell's messages about signals are ignored.
            let boots = output.lines().filter(|line| line.starts_with("boot"));
            if boots.collect::<Vec<_>>() == expected {
                break;
            }
            assert!(Instant::now() < deadline, "{output}");
        }
    };
    logs(&["boot blue 0"]);
    let running = inspect();
    // A running VM is not affected.
    assert_eq!(lab.output_of(&["start", "db"]), ("db\n".into(), Some(0)));
    assert_eq!(inspect()[0]["pid"], running[0]["pid"]);

    let words = ["restart", "--wait", "db"];
    assert_eq!(lab.output_of(&words), ("db\n".into(), Some(0)));
    logs(&["boot blue 0", "boot blue 1"]);
    let restarted = inspect();
    assert_ne!(restarted[0]["pid"], running[0]["pid"]);
    for member in ["config", "memory_mib", "uds", "launch", "image", "name"] {
        assert_eq!(restarted[0][member], running[0][member], "{member}");
    }
    assert_eq!(restarted[0]["ports"].as_array().unwrap().len(), 1);

    assert_eq!(lab.output_of(&["stop", "db"]).1, Some(0));
    assert!(status().contains("exited (5)"), "{}", status());
    assert_eq!(
        lab.output_of(&["start", "--wait"]),
        ("db\n".into(), Some(0))
    );
    logs(&["boot blue 0", "boot blue 1", "boot blue 2"]);
    let (listed, _) = lab.output_of(&["ps"]);
    assert!(listed.contains(" up "), "{listed}");
    let colour = ["exec", "db", "sh", "-c", "echo $COLOR"];
    assert_eq!(lab.output_of(&colour).0, "blue\n");
    // After a restart, the last exit code counts.
    assert_eq!(lab.output_of(&["stop", "db"]).1, Some(0));
    let mut attached = Terminal::spawn(lab.command(&["start", "-ai", "db"]), (80, 24));
    attached.expect("boot blue 3");
    attached.type_text("\x03");
    assert_eq!(attached.wait().code(), Some(5));
    // A failed start does not change the record.
    fs::rename(place.join("data.img"), place.join("moved.img")).unwrap();
    fs::write(place.join("data.img"), "no file system").unwrap();
    let failed = lab.pigeon(&["start", "db"]);
    let stderr = String::from_utf8_lossy(&failed.stderr).into_owned();
    assert!(
        stderr.contains("data.img is of an unknown kind"),
        "{stderr}"
    );
    assert_eq!(
        (failed.status.code(), &failed.stdout[..]),
        (Some(125), &b""[..])
    );
    assert!(status().contains("exited (5)"), "{}", status());
    check(&place.join("moved.img"));
    assert_eq!(lab.output_of(&["rm", "db"]).1, Some(0));
    let unknown = lab.pigeon(&["restart", "db"]);
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("there is no VM called db"));
}

#[test]
fn vms_with_rm_can_be_restarted_and_those_on_a_terminal_cannot() {
    let lab = Lab::new();
    let image = lab.path("app.ext4");
    let words = ["run", "-d", "--rm", "--name", "brief", &image];
    assert_eq!(lab.output_of(&words).1, Some(0));
    assert_eq!(
        lab.output_of(&["restart", "brief"]),
        ("brief\n".into(), Some(0))
    );
    assert_eq!(lab.output_of(&["exec", "brief", "hostname"]).0, "brief\n");
    assert_eq!(lab.output_of(&["stop", "brief"]).1, Some(0));
    assert_eq!(lab.output_of(&["ps", "-a", "-q"]).0, "");

    let words = [
        "run",
        "-i",
        "--name",
        "typed",
        "--entrypoint",
        "cat",
        &image,
    ];
    assert_eq!(lab.fed(&words, b"one\n"), (b"one\n".to_vec(), Some(0)));
    for command in ["start", "restart"] {
        let refused = lab.pigeon(&[command, "typed"]);
        let stderr = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(stderr.contains("`pigeon start --attach typed`"), "{stderr}");
        assert_eq!(refused.status.code(), Some(125));
    }
    // Its command is listed, not the idle workload.
    let (listed, _) = lab.output_of(&["ps", "-a"]);
    assert!(listed.contains(" cat"), "{listed}");
    let words = ["start", "-a", "typed"];
    assert_eq!(lab.fed(&words, b"two\n"), (b"two\n".to_vec(), Some(0)));
}

#[test]
fn a_detached_run_waits_for_its_health_check_if_told_to() {
    let lab = Lab::new();
    let image = lab.path("app.ext4");
    let config = |test: &str, starts: bool| {
        let test = ["CMD-SHELL", test];
        let mut check = json!({"Test": test, "Interval": 200_000_000, "Retries": 3});
        if starts {
            // Failures during the start period do not count.
            check["StartPeriod"] = json!(100_000_000_000u64);
            check["StartInterval"] = json!(100_000_000);
        }
        let volumes = json!({"/data": {}, "/scratch": {}});
        let document = json!({"ImageConfig": {
            "Entrypoint": ["sh", "-c", "sleep 2; touch /tmp/ready; sleep 1000"],
            "Env": ["PATH=/bin"],
            "Healthcheck": check,
            "Volumes": volumes,
        }});
        lab.place.write("run.json", document.to_string());
        lab.path("run.json")
    };
    let words = ["run", "-d", "--wait", "--rm", "--tmpfs", "/scratch", "-c"];
    let run = |test: &str, starts: bool| {
        let config = config(test, starts);
        lab.pigeon(&[&words[..], &[&config, &image]].concat())
    };
    let healthy = run("test -e /tmp/ready", true);
    assert_eq!(healthy.stdout, b"app\n", "{healthy:?}");
    // The message about an unused volume also appears with -d.
    let stderr = String::from_utf8_lossy(&healthy.stderr).into_owned();
    assert!(
        stderr.contains("declares a volume at /data: -v FILE:/data"),
        "{stderr}"
    );
    assert!(!stderr.contains("/scratch"), "{stderr}");
    let ready = ["exec", "app", "ls", "/tmp/ready"];
    assert_eq!(lab.output_of(&ready), ("/tmp/ready\n".into(), Some(0)));
    let (listed, _) = lab.output_of(&["ps"]);
    assert!(listed.contains("(healthy)"), "{listed}");
    assert_eq!(lab.output_of(&["rm", "-f", "app"]).1, Some(0));
    let unhealthy = run("false", false);
    let stderr = String::from_utf8_lossy(&unhealthy.stderr).into_owned();
    assert!(stderr.contains("app is unhealthy"), "{stderr}");
    assert_eq!(unhealthy.status.code(), Some(125));
    assert_eq!(lab.output_of(&["rm", "-f", "app"]).1, Some(0));
    // A VM that ends during the wait.
    let words = ["run", "-d", "--wait", "-u", "stranger", &image];
    let ended = lab.pigeon(&words);
    let stderr = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert!(stderr.contains("has ended (exited (125)"), "{stderr}");
}

#[test]
fn a_volume_created_for_a_vm_that_fails_to_start_is_removed() {
    let lab = Lab::new();
    let image = lab.path("app.ext4");
    let [data, layer] = ["data.img", "layer.img"].map(|name| lab.path(name));
    let [volume, overlay] = [
        format!("{data}:/data,size=16M"),
        format!("--overlay={layer},size=16M"),
    ];
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let busy = format!("{}:80", listener.local_addr().unwrap().port());
    let other = format!("{}:/other", lab.path("none.img"));
    for options in [
        &["--kernel", "/none"][..],
        &["--initrd", "/none"],
        &["--volume", &other],
        &["-p", &busy],
    ] {
        let words = [&["run", "-d", "-v", &volume, &overlay], options, &[&image]].concat();
        let failed = lab.pigeon(&words);
        assert_eq!(failed.status.code(), Some(125), "{failed:?}");
        for path in [&data, &layer] {
            assert!(!Path::new(path).exists(), "{options:?}: {failed:?}");
        }
    }
    // Existing files are kept.
    let words = [
        "run",
        "-q",
        "--rm",
        "-v",
        &volume,
        "--entrypoint",
        "true",
        &image,
    ];
    assert_eq!(lab.output_of(&words).1, Some(0));
    let words = ["run", "-d", "-v", &volume, "--kernel", "/none", &image];
    assert_eq!(lab.output_of(&words).1, Some(125));
    assert!(Path::new(&data).exists());
    // A new disk cannot be used by a second VM either.
    let fresh = format!("{}:/data,size=16M", lab.path("fresh.img"));
    let second = lab.path("second.ext4");
    fs::copy(&image, &second).unwrap();
    let words = ["run", "-d", "--name", "first", "-v", &fresh, &image];
    assert_eq!(lab.output_of(&words).1, Some(0));
    let refused = lab.pigeon(&["run", "-d", "-v", &fresh, "--entrypoint", "true", &second]);
    let stderr = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        stderr.contains("fresh.img is in use by another running VM"),
        "{stderr}"
    );
    assert_eq!(lab.output_of(&["rm", "-f", "first"]).1, Some(0));
}
