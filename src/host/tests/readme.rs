//! Runs the README's commands and compares their output with the README's.

mod common;
#[path = "common/pty.rs"]
mod pty;

use std::{
    collections::BTreeSet,
    env, fs,
    net::TcpStream,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use common::{Place, Tar, busybox_layer, docker_save};
use pigeon::{
    Arch, assets,
    process::{run, write_program},
};
use pty::{TIMEOUT, Terminal};
use serde_json::{Value, json};

/// Commands that are not run, and why.
const NOT_RUN: &[(&str, &str)] = &[
    ("./build.sh test", "it is what runs this test"),
    (
        "cargo install --locked --path src/host",
        "it builds all anew, optimised; `pigeon` is the one that is built already",
    ),
    (
        "firecracker --api-sock fc.sock --config-file config.json &",
        "it needs KVM",
    ),
    (
        "curl --unix-socket fc.sock -X PUT -H 'Content-Type: application/json' -d @run.json http://localhost/mmds",
        "it needs Firecracker",
    ),
    ("cd dist && sha256sum -c SHA256SUMS", "it needs a release"),
];

/// Commands with an exit code other than 0.
const CODES: &[(&str, i32)] = &[
    (
        "pigeon exec --json web sh -c 'echo out; echo err >&2; exit 3'",
        3,
    ),
    ("pigeon run app.tar", 125),
    ("pigeon run -m 32 app.ext4", 125),
    ("pigeon run app.ext4", 125),
];

/// The README's application. Its shell's messages about a killed `sleep` are discarded.
const SERVE: &str = "#!/bin/sh\n\
    trap 'echo \"good bye\"; exit 0' TERM\n\
    trap 'echo \"configuration read again\"' HUP\n\
    echo \"serving as $(id -un) in $(pwd)\"\n\
    while :; do sleep 0.1; done 2>/dev/null\n";

/// Its /etc/passwd.
const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n\
    app:x:1000:1000:app:/home/app:/bin/sh\n\
    nobody:x:65534:65534:nobody:/nonexistent:/bin/false\n";

/// A stand-in for docker.
const DOCKER: &str = "#!/bin/sh\n\
    [ \"$1 $2 $3\" = 'save app:latest --output' ] && cp \"${0%/*}/saved\" \"$4\"\n";

/// Runs cargo on the original manifests: through a symbolic link, cargo would treat a package as another one.
const CARGO: &str = "#!/usr/bin/env bash\n\
    set -- \"${@/#tests\\/Cargo.toml/REPOSITORY/tests/Cargo.toml}\"\n\
    set -- \"${@/#src\\/host\\/Cargo.toml/REPOSITORY/src/host/Cargo.toml}\"\n\
    [[ \" $* \" == *' --manifest-path '* ]] ||\n\
    \tset -- \"$1\" --manifest-path 'REPOSITORY/Cargo.toml' \"${@:2}\"\n\
    exec 'CARGO' \"$@\"\n";

fn readme() -> String {
    fs::read_to_string(assets::repository().join("README.md")).unwrap()
}

/// A fenced code block.
struct Block {
    language: String,
    /// The last line of text before it, or the fence of a preceding block.
    before: String,
    lines: Vec<String>,
}

fn blocks(readme: &str) -> Vec<Block> {
    let mut blocks = vec![];
    let mut before = "";
    let mut lines = readme.lines();
    while let Some(line) = lines.next() {
        let Some(language) = line.strip_prefix("```") else {
            if !line.is_empty() {
                before = line;
            }
            continue;
        };
        let mut inside = vec![];
        loop {
            match lines.next().expect("the last block has no end") {
                "```" => break,
                line => inside.push(line.to_string()),
            }
        }
        blocks.push(Block {
            language: language.into(),
            before: before.into(),
            lines: inside,
        });
        before = "```";
    }
    blocks
}

/// The parts of the README to run, in order.
#[derive(Debug)]
enum Part {
    Command { command: String, shown: Vec<String> },
    Rust(String),
    Python { code: String, shown: Vec<String> },
    Json(Value),
}

fn parts(readme: &str) -> Vec<Part> {
    let mut parts = vec![];
    for Block {
        language,
        before,
        lines,
    } in blocks(readme)
    {
        let command = |command: &str| Part::Command {
            command: command.trim().into(),
            shown: vec![],
        };
        match language.as_str() {
            "sh" => {
                let code = |line: &'_ String| line.split(" #").next().unwrap().trim().to_string();
                let commands = lines.iter().map(code).filter(|line| !line.is_empty());
                parts.extend(commands.map(|line| command(&line)));
            }
            "console" => {
                assert!(
                    lines[0].starts_with("$ "),
                    "no command before {:?}",
                    lines[0]
                );
                for line in lines {
                    if let Some(line) = line.strip_prefix("$ ") {
                        parts.push(command(line));
                    } else if let Some(Part::Command { shown, .. }) = parts.last_mut() {
                        shown.push(line);
                    }
                }
            }
            // The output of an earlier command, or a diagram.
            "text" => {
                if before == "```" {
                    let Some(Part::Python { shown, .. }) = parts.last_mut() else {
                        panic!("output without a script: {lines:?}");
                    };
                    *shown = lines;
                    continue;
                }
                let cited = before
                    .strip_prefix('`')
                    .and_then(|rest| rest.split_once("` shows this"));
                let Some((cited, _)) = cited else {
                    let is_command = |line: &String| line.starts_with("$ ");
                    assert!(!lines.iter().any(is_command), "a command: {lines:?}");
                    continue;
                };
                let earlier = parts.iter_mut().find_map(|part| match part {
                    Part::Command { command, shown } if command == cited => Some(shown),
                    _ => None,
                });
                *earlier.unwrap_or_else(|| panic!("there is no {cited} before its output")) = lines;
            }
            "rust" => parts.push(Part::Rust(lines.join("\n"))),
            "python" => parts.push(Part::Python {
                code: lines.join("\n"),
                shown: vec![],
            }),
            "json" => {
                let text = lines.join("\n");
                let json = serde_json::from_str(&text);
                parts.push(Part::Json(
                    json.unwrap_or_else(|error| panic!("{error}: {text}")),
                ));
            }
            _ => panic!("unknown kind of block: {language:?}"),
        }
    }
    parts
}

/// Whether a line matches the README's, except for parts that vary between runs.
fn is_shown(line: &str, shown: &str) -> bool {
    let columns = |line: &str| in_columns(after_kernel_time(line));
    let (line, shown) = (columns(line), columns(shown));
    let [line, shown] = [&line, &shown].map(|line| line.trim_end().split(' ').collect::<Vec<_>>());
    let stable = |words: &[&str], at: usize| {
        let unit = words.get(at + 1).copied().unwrap_or_default();
        let before = at.checked_sub(1).map_or("", |before| words[before]);
        stable(before, words[at], unit)
    };
    let same = |at: usize| match shown[at].contains('…') {
        true => is_abridged(line[at], shown[at]),
        false => stable(&line, at) == stable(&shown, at),
    };
    line.len() == shown.len() && (0..line.len()).all(same)
}

/// Progress messages of build.sh and cargo.
fn is_progress(line: &str) -> bool {
    let starts = ["==> ", "Compiling ", "Finished ", "Blocking "];
    starts
        .iter()
        .any(|start| line.trim_start().starts_with(start))
}

/// Whether a word matches the README's, in which `…` stands for any text.
fn is_abridged(word: &str, shown: &str) -> bool {
    let (start, mut middle) = shown.split_once('…').unwrap();
    let Some(mut rest) = word.strip_prefix(start) else {
        return false;
    };
    while let Some((piece, behind)) = middle.split_once('…') {
        let Some((_, after)) = rest.split_once(piece) else {
            return false;
        };
        (rest, middle) = (after, behind);
    }
    rest.ends_with(middle)
}

/// Normalizes a table's column widths, which depend on the contents.
fn in_columns(line: &str) -> String {
    let mut line = line.to_string();
    while line.contains("    ") {
        line = line.replace("    ", "   ");
    }
    line
}

fn after_kernel_time(line: &str) -> &str {
    let time = line.strip_prefix('[').and_then(|rest| rest.split_once(']'));
    match time {
        Some((time, rest)) if time.trim().parse::<f64>().is_ok() => rest,
        _ => line,
    }
}

/// Replaces a word that varies between runs, as determined by its neighbours.
fn stable(before: &str, word: &str, unit: &str) -> String {
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let prefix = word.trim_end_matches(|c: char| c.is_ascii_digit());
    let is_time = |word: &str| {
        let units = ["second", "minute", "hour", "day"];
        units.contains(&word.trim_end_matches('s'))
    };
    if is_number(before) && is_time(word) {
        "TIME".into()
    } else if is_number(word) && (matches!(unit, "MiB," | "files,") || is_time(unit)) {
        "NUMBER".into()
    } else if before == "pid" && is_number(word.trim_end_matches(',')) {
        "PID".into()
    } else if matches!(prefix, "pid=" | "/dev/pts/") && prefix != word {
        format!("{prefix}NUMBER")
    } else if (word.ends_with("-cloud-amd64") || word.ends_with("-cloud-arm64"))
        && word.starts_with(|c: char| c.is_ascii_digit())
    {
        "KERNEL".into()
    } else if before == "on" && matches!(word, "QEMU;" | "Firecracker;") {
        "HYPERVISOR;".into()
    } else {
        word.into()
    }
}

/// The lines on a terminal, without escape sequences.
fn lines_on(terminal: &Terminal) -> Vec<String> {
    let shown = terminal.shown();
    let mut text = String::new();
    let mut chars = shown.chars();
    while let Some(c) = chars.next() {
        match c {
            '\x1b' => {
                // ESC [ parameters letter
                let _ = chars.next();
                chars.find(|c| c.is_ascii_alphabetic());
            }
            '\r' => {}
            c => text.push(c),
        }
    }
    text.lines().map(String::from).collect()
}

/// The first of the README's lines that is missing on a terminal, in order.
fn missing<'a>(
    lines: &[String],
    shown: impl IntoIterator<Item = &'a String>,
) -> Option<&'a String> {
    let mut lines = lines.iter();
    shown
        .into_iter()
        .find(|shown| !lines.any(|line| is_shown(line, shown)))
}

/// Waits until a terminal has shown all these lines, possibly among others.
fn wait_for<'a>(terminal: &mut Terminal, shown: impl IntoIterator<Item = &'a String> + Clone) {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let ended = terminal.has_ended();
        if ended {
            thread::sleep(Duration::from_millis(200)); // its last output may not have arrived yet
        }
        let Some(line) = missing(&lines_on(terminal), shown.clone()) else {
            return;
        };
        assert!(
            !ended && Instant::now() < deadline,
            "the README's {line:?} is not in\n{}",
            terminal.shown()
        );
        thread::sleep(Duration::from_millis(20));
    }
}

fn assert_shown(lines: &[String], shown: &[String]) {
    let same = lines.len() == shown.len()
        && lines
            .iter()
            .zip(shown)
            .all(|(line, shown)| is_shown(line, shown));
    assert!(
        same,
        "the README shows\n{}\nand a run\n{}",
        shown.join("\n"),
        lines.join("\n")
    );
}

fn read_lines(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap();
    text.lines().map(String::from).collect()
}

fn wait_until(what: &str, mut is_there: impl FnMut() -> bool) {
    let deadline = Instant::now() + TIMEOUT;
    while !is_there() {
        assert!(Instant::now() < deadline, "never {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// A user who follows the README, with a repository and a PATH.
struct Reader {
    place: Place,
    /// Background commands, and the files with their output.
    behind: Vec<(Child, PathBuf)>,
}

impl Reader {
    fn new() -> Reader {
        let place = Place::new();
        let [clone, bin] = ["clone", "bin"].map(|name| place.path(name));
        for dir in [&clone, &bin, &place.path("runtime")] {
            fs::create_dir(dir).unwrap();
        }
        // The clone links to the repository, except for files that a user creates in it.
        for entry in fs::read_dir(assets::repository()).unwrap() {
            let entry = entry.unwrap();
            if entry.file_name() != "build" && entry.file_name() != ".git" {
                symlink(entry.path(), clone.join(entry.file_name())).unwrap();
            }
        }
        symlink(env!("CARGO_BIN_EXE_pigeon"), bin.join("pigeon")).unwrap();
        let cargo = CARGO
            .replace("REPOSITORY", assets::repository().to_str().unwrap())
            .replace(
                "CARGO'",
                &format!("{}'", assets::tool("cargo").unwrap().display()),
            );
        // Debian's packages, from the cache for tests.
        let debian = assets::debian(Arch::HOST, &["postgresql"]).unwrap();
        let mmdebstrap = format!("#!/bin/sh\nexec cat '{}'\n", debian.display());
        for (name, script) in [
            ("docker", DOCKER),
            ("cargo", &cargo),
            ("mmdebstrap", &mmdebstrap),
        ] {
            write_program(&bin.join(name), script).unwrap();
        }
        let config = json!({
            "architecture": Arch::HOST.debian_name(),
            "os": "linux",
            "config": {
                "Entrypoint": ["/home/app/serve"],
                "Env": ["PATH=/bin", "GREETING=hello"],
                "WorkingDir": "/home/app",
                "User": "app",
            },
        });
        let app = Tar::new()
            .dir("home/app", 0o750, (1000, 1000))
            .program("home/app/serve", SERVE)
            .file("etc/passwd", PASSWD)
            .bytes();
        let saved = docker_save(&[busybox_layer(Arch::HOST), app], &config, "app:latest");
        fs::write(bin.join("saved"), saved).unwrap();
        Reader {
            place,
            behind: vec![],
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.place.path("clone").join(name)
    }

    /// The path of the README's build/NAME.
    fn built(&self, name: &str) -> PathBuf {
        let dir = assets::build_dir(Arch::HOST);
        let dir = dir.strip_prefix(assets::repository()).unwrap();
        let name = name.strip_prefix("build/").unwrap();
        self.place.path("clone").join(dir).join(name)
    }

    /// A command in the repository, with this PATH.
    fn prepare(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let path = env::var("PATH").unwrap();
        let mut command = Command::new(program);
        command
            .current_dir(self.place.path("clone"))
            .env(
                "PATH",
                format!("{}:{path}", self.place.path("bin").display()),
            )
            .env("XDG_RUNTIME_DIR", self.place.path("runtime"))
            .env("XDG_STATE_HOME", self.place.path("runtime"))
            .env_remove("PIGEON_UDS")
            // The README uses the host's architecture, regardless of the tests'.
            .env_remove("PIGEON_ARCH")
            .stdin(Stdio::null());
        command
    }

    fn shell(&self, command: &str) -> Command {
        let mut shell = self.prepare("sh");
        // exec avoids another shell that would receive Ctrl-C.
        shell.args(["-c", &format!("exec {command}")]);
        shell
    }

    /// Standard output and error, by line, of a command that exits with `code`.
    fn output(&self, mut command: Command, code: i32) -> Vec<String> {
        let path = self.place.path("output");
        let file = fs::File::create(&path).unwrap();
        command.stdout(file.try_clone().unwrap()).stderr(file);
        let status = command.status().unwrap();
        let lines = read_lines(&path);
        assert_eq!(status.code(), Some(code), "{command:?}: {lines:?}");
        lines
    }

    /// Starts a command with a trailing `&` of the README.
    fn start(&mut self, command: &str) {
        let path = self.place.path("behind");
        let mut shell = self.shell(command.trim_end_matches('&'));
        shell.stdout(fs::File::create(&path).unwrap());
        self.behind.push((shell.spawn().unwrap(), path));
    }

    fn play(&mut self, command: &str, shown: &[String]) {
        match command {
            "./build.sh run" => self.run_example(command, shown),
            "./build.sh pigeon exec -it web sh" => self.talk(command, shown, 4),
            "pigeon proxy --vm web api.sock &" | "pigeon proxy --vm warm warm.sock &" => {
                self.start(command);
                let socket = command.trim_end_matches(" &").rsplit(' ').next();
                let socket = self.path(socket.expect("the socket is the last word"));
                wait_until("a socket", || socket.exists());
            }
            "pigeon forward --vm web 18080:8080 &" => {
                self.start(command);
                wait_until("a port", || TcpStream::connect("127.0.0.1:18080").is_ok());
            }
            "curl -s --unix-socket api.sock http://vm/v1/exit_code &" => {
                self.start(command);
                // It must be connected before the workload ends, as the VM does not wait for it once its
                // owner has the exit code: a person takes longer to type the next line.
                thread::sleep(Duration::from_secs(1));
            }
            "curl -s --unix-socket api.sock -d '{\"signal\":\"TERM\",\"timeout_ms\":5000}' http://vm/v1/stop" =>
            {
                let mut lines = self.output(self.shell(command), 0);
                let (mut waiter, output) = self.behind.pop().expect("a background command");
                let status = waiter.wait().unwrap();
                lines.extend(read_lines(&output));
                assert!(status.success(), "{status}: {lines:?}");
                assert_shown(&lines, shown);
                // A person takes longer than the VM's shutdown.
                self.output(self.shell("pigeon wait web"), 0);
            }
            _ if command.starts_with("build/init ") => {
                let init = self.built("build/init");
                let mut init = Arch::HOST.run_here(&init).unwrap();
                init.args(command.split(' ').skip(1));
                init.current_dir(self.place.path("clone"));
                assert_shown(&self.output(init, 0), shown);
            }
            "./build.sh pigeon ps" => {
                // The health check runs only periodically.
                let deadline = Instant::now() + TIMEOUT;
                loop {
                    let mut lines = self.output(self.shell(command), 0);
                    lines.retain(|line| !is_progress(line) && !line.starts_with("web "));
                    if Instant::now() > deadline || missing(&lines, shown).is_none() {
                        break assert_shown(&lines, shown);
                    }
                    thread::sleep(Duration::from_millis(500));
                }
            }
            _ if ["curl ", "pigeon ", "docker ", "mmdebstrap ", "./build.sh "]
                .iter()
                .any(|program| command.starts_with(program)) =>
            {
                let known = CODES.iter().find(|(known, _)| *known == command);
                let code = known.map_or(0, |(_, code)| *code);
                let mut lines = self.output(self.shell(command), code);
                lines.retain(|line| !is_progress(line));
                assert_shown(&lines, shown);
            }
            _ => {
                panic!("the README has a new command, which this test must run or list: {command}")
            }
        }
    }

    /// Runs the example until the README's ^C.
    fn run_example(&self, command: &str, shown: &[String]) {
        let mut terminal = Terminal::spawn(self.shell(command), (200, 50));
        let stop = shown.iter().position(|line| line == "^C");
        let stop = stop.expect("the example is stopped by ^C");
        wait_for(&mut terminal, &shown[..stop]);
        terminal.expect("myapp: running");
        terminal.type_text("\x03");
        let status = terminal.wait();
        // The echo of typed keys can appear anywhere in a line.
        let keyboard = Arch::HOST.has_keyboard();
        let is_expected =
            |line: &&String| *line != "^C" && (keyboard || !line.contains("ctrl-alt-del"));
        wait_for(&mut terminal, shown.iter().filter(is_expected));
        assert!(status.success(), "{}", terminal.shown());
    }

    /// Runs a shell on a terminal, and types what the README shows after its prompt.
    fn talk(&self, command: &str, shown: &[String], code: i32) {
        const PROMPT: &str = " # ";
        let mut terminal = Terminal::spawn(self.shell(command), (200, 50));
        let typed = shown.iter().filter_map(|line| line.split_once(PROMPT));
        for (_, line) in typed {
            terminal.expect(PROMPT);
            terminal.type_text(&format!("{line}\r"));
            // Waits for the echo, after which the next prompt is expected.
            terminal.expect(line);
        }
        assert_eq!(terminal.wait().code(), Some(code), "{}", terminal.shown());
        wait_for(&mut terminal, shown);
        // A busybox shell prints its version first.
        let lines = lines_on(&terminal);
        let begin = lines.iter().position(|line| is_shown(line, &shown[0]));
        assert_shown(&lines[begin.unwrap()..], shown);
    }

    /// Compiles and runs the README's driver.
    fn drive(&self, code: &str) {
        let sockets = self.place.path("runtime").join("pigeon");
        symlink(sockets.join("web.vsock"), self.path("vm.vsock")).unwrap();
        let program =
            format!("fn main() -> Result<(), Box<dyn std::error::Error>> {{\n{code}\nOk(())\n}}\n");
        let source = self.place.write("driver.rs", program);
        // Builds the library for a rustc without cargo.
        let manifest = assets::repository().join("src/host/Cargo.toml");
        let built = Path::new(env!("CARGO_BIN_EXE_pigeon")).parent().unwrap();
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args([
            "build",
            "--quiet",
            "--locked",
            "--package",
            "pigeon",
            "--lib",
        ]);
        cargo.arg("--manifest-path").arg(manifest);
        run(cargo.arg("--target-dir").arg(built.parent().unwrap())).unwrap();
        let mut rustc = self.prepare("rustc");
        rustc.args(["--edition", "2024", "-D", "warnings", "--extern"]);
        rustc.arg(format!("pigeon={}", built.join("libpigeon.rlib").display()));
        rustc.arg(format!("-Ldependency={}", built.join("deps").display()));
        rustc.arg("-o").arg(self.place.path("driver")).arg(source);
        run(&mut rustc).unwrap();
        let lines = self.output(self.prepare(self.place.path("driver")), 0);
        // The output of `uname -r` ends with a line feed, to which println! adds another one.
        let expected = ["6.1.0-56-cloud-amd64", ""].map(String::from);
        assert_shown(&lines, &expected);
    }

    fn script(&self, code: &str, shown: &[String]) {
        let script = self.place.write("session.py", code);
        let mut python = self.prepare(assets::python().unwrap());
        python.arg(script);
        assert_shown(&self.output(python, 0), shown);
    }

    fn check_json(&self, document: &Value) {
        if document.get("boot-source").is_some() {
            // Running Firecracker needs KVM.
            let initrd = document["boot-source"]["initrd_path"].as_str().unwrap();
            assert!(self.built(initrd).exists(), "no {initrd}");
            return;
        }
        assert!(
            document.get("ImageConfig").is_some(),
            "unknown document: {document}"
        );
        let path = self.place.write("run.json", document.to_string());
        let init = self.built("build/init");
        let mut init = Arch::HOST.run_here(&init).unwrap();
        init.arg("--check").arg(path);
        let output = self.output(init, 0).join("\n");
        assert!(
            output.contains("/bin/myapp") && output.contains("8080"),
            "{output}"
        );
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        for (child, _) in &mut self.behind {
            let _ = child.kill();
            let _ = child.wait();
        }
        // Removed already, unless the test has failed.
        for name in ["web", "pg"] {
            let _ = self.prepare("pigeon").args(["rm", "-f", name]).output();
        }
    }
}

#[test]
fn the_readmes_commands_do_what_it_shows() {
    let parts = parts(&readme());
    let mut reader = Reader::new();
    let (mut drivers, mut scripts) = (0, 0);
    for part in &parts {
        let begin = Instant::now();
        match part {
            Part::Command { command, .. } if NOT_RUN.iter().any(|(known, _)| known == command) => {}
            Part::Command { command, shown } => reader.play(command, shown),
            Part::Rust(code) => {
                reader.drive(code);
                drivers += 1;
            }
            Part::Python { code, shown } => {
                reader.script(code, shown);
                scripts += 1;
            }
            Part::Json(document) => reader.check_json(document),
        }
        println!("{:.1?} for {part:?}", begin.elapsed());
    }
    let documents = parts.iter().filter(|part| matches!(part, Part::Json(_)));
    assert_eq!((drivers, scripts, documents.count()), (1, 1, 2));
}

/// Text in backquotes in the README's text, including tables and across line ends.
fn spans(readme: &str) -> BTreeSet<String> {
    let mut in_block = false;
    let text = readme.lines().filter(|line| {
        let fence = line.starts_with("```");
        in_block ^= fence;
        !in_block && !fence
    });
    let text = text.collect::<Vec<_>>().join(" ").replace("\\|", "|");
    text.split('`')
        .skip(1)
        .step_by(2)
        .map(String::from)
        .collect()
}

#[test]
fn commands_named_in_the_readmes_text_exist() {
    let text = readme();
    for (command, _) in NOT_RUN {
        assert!(text.contains(command), "{command} was removed");
    }
    let init = assets::build_dir(common::arch()).join("init");
    let repository = assets::repository();
    let ask = |command: &mut Command| run(command.arg("--help")).unwrap();
    for span in spans(&text) {
        let words: Vec<_> = span.split([' ', '[', ']', '…']).collect();
        let help = match (words[0], words.get(1)) {
            ("./build.sh", Some(action)) => {
                let help = ask(&mut Command::new(repository.join("build.sh")));
                assert!(help.contains(&format!("\n  {action} ")), "no {span}");
                continue;
            }
            ("pigeon", Some(action)) => ask(Command::new(env!("CARGO_BIN_EXE_pigeon")).arg(action)),
            ("init", Some(action)) if action.starts_with('-') => {
                ask(&mut common::arch().run_here(&init).unwrap())
            }
            ("cargo", Some(&"test")) => {
                // The first command of `./build.sh test`.
                let script = fs::read_to_string(repository.join("build.sh")).unwrap();
                assert!(script.contains(&*span), "no {span}");
                continue;
            }
            ("cargo" | "firecracker", Some(_)) => {
                let named = |(known, _): &(&str, _)| {
                    let known: Vec<_> = known.split(' ').collect();
                    words.iter().all(|word| known.contains(word))
                };
                assert!(NOT_RUN.iter().any(named), "{span}?");
                continue;
            }
            _ => continue,
        };
        let there = |option: &str| {
            let named = |word: &str| word.split([',', '=', '[']).next() == Some(option);
            help.split_whitespace().any(named)
        };
        for option in words.iter().filter(|word| word.starts_with('-')) {
            // `-it` is `-i -t`.
            let mut letters = option.chars().skip(1).map(|letter| format!("-{letter}"));
            assert!(
                there(option) || (!option.starts_with("--") && letters.all(|one| there(&one))),
                "{span}: no {option} in\n{help}"
            );
        }
    }
}

#[test]
fn a_commands_output_is_compared_except_for_variable_parts() {
    for (line, shown) in [
        ("a pid=9 b", "a pid=87 b"),
        ("myapp: pid 9, started", "myapp: pid 87, started"),
        (
            "through /tmp/x/build/vm.vsock.",
            "through …/build/vm.vsock.",
        ),
        (
            "[    1.2] reboot: Restarting",
            "[   55.5] reboot: Restarting",
        ),
        (
            "app.ext4: 7 MiB, 1 files, from",
            "app.ext4: 78 MiB, 283 files, from",
        ),
        ("/dev/pts/1", "/dev/pts/0"),
        ("6.12.3-cloud-amd64", "6.1.0-56-cloud-amd64"),
        ("end ", "end"),
        ("web    up 1 second   x", "web    up 59 seconds    x"),
        (r#"{"pid":84,"time":179}"#, r#"{"pid":…,"time":…}"#),
    ] {
        assert!(is_shown(line, shown), "{line:?} is not {shown:?}");
    }
    for (line, shown) in [
        ("uid=0", "uid=1000"),
        ("a pid=9", "a pid="),
        ("1 layers", "2 layers"),
        ("[1.2] on", "[1.2] off"),
        ("a b", "a b c"),
        (r#"{"pid":84,"at":179}"#, r#"{"pid":…,"time":…}"#),
    ] {
        assert!(!is_shown(line, shown), "{line:?} is {shown:?}");
    }
    let known = parts("x\n```sh\na  # b\n```\n`a` shows this:\n\n```text\nout\n```\n");
    assert!(
        matches!(&known[..], [Part::Command { command, shown }] if command == "a" && shown == &["out"]),
        "{known:?}"
    );
}
