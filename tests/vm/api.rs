//! The API's calls, each row of the table, called from the host.

use std::{
    os::unix::net::UnixStream,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use pigeon_lab::{
    End, Vm, assets,
    disk::{Image, Tree},
    http::{Client, Response},
    process::run,
    vm::Builder,
    vsock,
    ws::Socket,
};
use serde_json::{Value, json};

/// Long, as other VMs may run at the same time.
const TIMEOUT: Duration = Duration::from_secs(180);

/// A root file system and a VM whose workload, user app, runs `script`.
fn vm(script: &str) -> Result<(Builder, Image)> {
    tree_vm(Tree::busybox()?, script)
}

fn tree_vm(tree: Tree, script: &str) -> Result<(Builder, Image)> {
    let root = Image::ext4(&tree, 48)?;
    let config = json!({
        "ExecOverride": ["/bin/sh", "-c", script],
        "UserOverride": "app",
        "ExtraEnv": {"FROM_CONFIG": "yes", "OTHER": "workload"},
    });
    let builder = Vm::builder().config(&config).disk(&root).timeout(TIMEOUT);
    Ok((builder, root))
}

/// A workload that sleeps forever.
const IDLE: &str = "exec sleep 100000";

/// `POST /v1/exec` with this body.
fn exec(api: &mut Client<UnixStream>, body: &Value) -> Result<Response> {
    api.post("/v1/exec", body)
}

/// The response to the exec of a shell command.
fn shell(api: &mut Client<UnixStream>, script: &str) -> Result<Value> {
    let response = exec(api, &json!({"cmd": ["/bin/sh", "-c", script]}))?;
    response.success()?.json()
}

/// Waits until a shell command in the guest succeeds.
fn wait_until(api: &mut Client<UnixStream>, script: &str) -> Result<()> {
    let start = Instant::now();
    while shell(api, script)?["exit_code"] != 0 {
        ensure!(start.elapsed() < TIMEOUT, "still not: {script}");
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// An error response's status and message.
fn error_of(response: &Response) -> Result<(u16, String)> {
    let error = response.json()?["error"].clone();
    let error = error
        .as_str()
        .with_context(|| format!("no error: {response}"))?;
    ensure!(response.header("content-type") == Some("application/json"));
    Ok((response.status, error.into()))
}

#[test]
fn each_path_accepts_its_methods_and_signals_reach_the_workloads_group() -> Result<()> {
    // The workload's child is in its process group and must receive the signal, too.
    let script = "trap 'echo parent got USR1' USR1; trap 'echo parent got 64' 64
        (trap 'echo child got USR1' USR1; echo child ready; while :; do sleep 100000 & wait; done) &
        echo parent ready; while :; do wait; done";
    let (builder, _root) = vm(script)?;
    let mut vm = builder.start()?;
    let mut api = vm.api()?;

    let status = api.get("/v1/status")?;
    assert_eq!(
        (status.status, status.text().as_str()),
        (200, r#"{"ok":true}"#)
    );
    assert_eq!(status.header("content-type"), Some("application/json"));
    let head = api.request("HEAD", "/v1/status", &[], b"")?;
    assert_eq!(
        (head.status, head.header("content-length")),
        (200, Some("11"))
    );
    for path in ["/", "/v1", "/v1/status/", "/v2/status", "/v1/nothing"] {
        assert_eq!(error_of(&api.get(path)?)?.0, 404, "{path}");
    }
    for (method, path, allowed) in [
        ("POST", "/v1/status", "GET, HEAD"),
        ("DELETE", "/v1/status", "GET, HEAD"),
        ("PUT", "/v1/exit_code", "GET, HEAD"),
        ("GET", "/v1/signals", "POST"),
        ("GET", "/v1/exec", "POST"),
        ("POST", "/v1/ws/exec", "GET"),
    ] {
        let response = api.request(method, path, &[], b"")?;
        assert_eq!(error_of(&response)?.0, 405, "{method} {path}");
        assert_eq!(response.header("allow"), Some(allowed), "{method} {path}");
    }
    let plain = api.get("/v1/ws/exec")?;
    assert_eq!(
        (plain.status, plain.header("upgrade")),
        (426, Some("websocket"))
    );

    vm.wait_for("parent ready")?;
    vm.wait_for("child ready")?;
    let sent = api.post("/v1/signals", &json!({"signal": 10}))?;
    assert_eq!((sent.status, sent.text().as_str()), (200, r#"{"ok":true}"#));
    vm.wait_for("parent got USR1")?;
    vm.wait_for("child got USR1")?;
    assert_eq!(api.post("/v1/signals", &json!({"signal": 64}))?.status, 200);
    vm.wait_for("parent got 64")?;
    for bad in [
        json!({"signal": 0}),
        json!({"signal": 65}),
        json!({"signal": -1}),
        json!({"signal": 1.5}),
        json!({"signal": "TERM"}),
        json!({"signal": null}),
        json!({}),
        json!([15]),
        json!(15),
    ] {
        let (status, error) = error_of(&api.post("/v1/signals", &bad)?)?;
        assert_eq!(status, 400, "{bad}");
        assert!(
            bad == json!([15]) || bad == json!(15) || error.contains("signal"),
            "{error}"
        );
    }
    assert_eq!(
        error_of(&api.request("POST", "/v1/signals", &[], b"{")?)?.0,
        400
    );
    assert_eq!(
        error_of(&api.request("POST", "/v1/signals", &[], b"")?)?.0,
        400
    );
    Ok(())
}

#[test]
fn all_waiting_clients_get_the_exit_code_of_a_killed_workload() -> Result<()> {
    let (builder, root) = vm(IDLE)?;
    let mut vm = builder.arg("PIGEON_EXIT_LINGER_MS=120000").start()?;
    // HEAD does not deliver the code: the API stays up for a client that reads it.
    let mut head = vm.api()?;
    head.send(b"HEAD /v1/exit_code HTTP/1.1\r\nHost: x\r\n\r\n")?;
    let mut api = vm.api()?;
    assert_eq!(api.post("/v1/signals", &json!({"signal": 9}))?.status, 200);
    let head = head.receive(true)?;
    assert_eq!(
        (head.status, head.header("content-length")),
        (200, Some("31"))
    );

    let (status, error) = error_of(&api.post("/v1/signals", &json!({"signal": 15}))?)?;
    assert_eq!(
        (status, error.contains("not running")),
        (409, true),
        "{error}"
    );
    // Other calls still work, and the code can be read late.
    assert_eq!(shell(&mut api, "echo late")?["stdout"], "late\n");
    let exit = api.get("/v1/exit_code")?;
    assert_eq!(exit.text(), r#"{"code":137,"oom_killed":false}"#);
    assert_eq!(vm.wait_end()?, End::Reboot);
    assert!(vm.console().contains("exit_code=137 oom_killed=false"));
    root.check()
}

#[test]
fn a_workload_that_cannot_be_executed_and_a_boot_that_fails_have_an_exit_code() -> Result<()> {
    let tree = || Tree::busybox()?.file("/plain", 0o644, "not a program\n");
    for (config, code, culprit, error) in [
        (
            json!({"ExecOverride": ["no-such-command"]}),
            127,
            "no-such-command",
            "",
        ),
        (json!({"ExecOverride": ["/plain"]}), 126, "/plain", ""),
        (
            json!({
                "ExecOverride": ["/bin/true"],
                "Mounts": [{"DevicePath": "/dev/vdz", "MountPath": "/data"}],
            }),
            125,
            "/dev/vdz",
            "/dev/vdz",
        ),
    ] {
        let root = Image::ext4(&tree()?, 32)?;
        let builder = Vm::builder().config(&config).disk(&root);
        // Long enough for a slow client to read the exit code.
        let builder = builder.arg("PIGEON_EXIT_LINGER_MS=120000");
        let mut vm = builder.timeout(TIMEOUT).boot()?;
        vm.wait_for(culprit)?;
        let exit = vm.api()?.get("/v1/exit_code")?.success()?.json()?;
        assert_eq!(
            (&exit["code"], &exit["oom_killed"]),
            (&json!(code), &json!(false))
        );
        let told = exit["error"].as_str().unwrap_or_default();
        assert!(told.contains(error), "{exit}");
        assert_eq!(vm.wait_end()?, End::Reboot);
        root.check()?;
    }
    Ok(())
}

#[test]
fn a_command_runs_with_its_options() -> Result<()> {
    let tree = Tree::busybox()?
        .file("/plain", 0o644, "not a program\n")?
        .file("/garbage", 0o755, "\x7fELF and no more")?
        .dir("/srv", 0o755)?;
    let (builder, _root) = tree_vm(tree, IDLE)?;
    let mut vm = builder.start()?;
    let mut api = vm.api()?;
    let mut run = |body: Value| exec(&mut api, &body);

    // The complete response, byte for byte.
    let hello = run(json!({"cmd": ["echo", "hello", "\"\\ \u{e9}\u{1f426}"]}))?;
    assert_eq!(hello.header("content-type"), Some("application/json"));
    assert_eq!(
        hello.text(),
        r#"{"exit_code":0,"exit_signal":0,"stdout":"hello \"\\ é🐦\n","stderr":""}"#
    );
    let script = |script: &str| json!({"cmd": ["sh", "-c", script]});
    let response = |code: i32, signal: i32, out: &str, err: &str| json!({"exit_code": code, "exit_signal": signal, "stdout": out, "stderr": err});
    let three = run(script("echo out; echo err >&2; exit 3"))?.json()?;
    assert_eq!(three, response(3, 0, "out\n", "err\n"));
    let terminated = run(script("echo before; kill -TERM $$"))?.json()?;
    assert_eq!(terminated, response(-1, 15, "before\n", ""));

    // User, working directory and environment.
    let out = |response: Response| -> Result<String> {
        let response = response.success()?.json()?;
        ensure!(response["exit_code"] == 0, "{response}");
        Ok(response["stdout"]
            .as_str()
            .unwrap_or_default()
            .trim_end()
            .into())
    };
    assert!(out(run(json!({"cmd": ["id"]}))?)?.starts_with("uid=0(root) gid=0(root)"));
    let ids = |user: &str| json!({"cmd": ["id"], "user": user});
    assert_eq!(
        out(run(ids("app"))?)?,
        "uid=1000(app) gid=1000(app) groups=44(video),50(staff),1000(app)"
    );
    assert_eq!(
        out(run(ids("app:staff"))?)?,
        "uid=1000(app) gid=50(staff) groups=50(staff)"
    );
    assert_eq!(
        out(run(ids("4242:4243"))?)?,
        "uid=4242 gid=4243 groups=4243"
    );
    assert_eq!(out(run(json!({"cmd": ["pwd"]}))?)?, "/");
    assert_eq!(out(run(json!({"cmd": ["pwd"], "cwd": "/srv"}))?)?, "/srv");
    assert_eq!(
        out(run(json!({"cmd": ["pwd"], "cwd": "/made/deep"}))?)?,
        "/made/deep"
    );
    let environment = out(run(json!({
        "cmd": ["sh", "-c", "echo $FROM_CONFIG $OTHER $MORE \"$EMPTY\"; env | grep -c ^OTHER="],
        "env": ["OTHER=first", "MORE=a=b", "EMPTY=", "OTHER=told"],
    }))?)?;
    assert_eq!(environment, "yes told a=b \n1");
    // A command's environment does not apply to the next one.
    assert_eq!(out(run(script("echo $OTHER $MORE"))?)?, "workload");

    // Initial state: three descriptors, no input, its own session, no blocked signals.
    let fds = out(run(json!({"cmd": ["ls", "/proc/self/fd"]}))?)?;
    assert_eq!(fds, "0\n1\n2\n3", "the last one is the directory itself");
    assert_eq!(
        run(json!({"cmd": ["cat"]}))?.json()?,
        response(0, 0, "", "")
    );
    let stat = out(run(script("cut -d' ' -f1,5,6,7 /proc/$$/stat"))?)?;
    let [pid, group, session, tty] = stat.split(' ').collect::<Vec<_>>()[..] else {
        panic!("{stat}");
    };
    assert!(pid == group && pid == session && tty == "0", "{stat}");
    let grep = json!({"cmd": ["grep", "-E", "Sig(Blk|Ign)", "/proc/self/status"]});
    let signals = out(run(grep)?)?;
    assert_eq!(signals.matches("0000000000000000").count(), 2, "{signals}");
    assert_eq!(out(run(script("cat /proc/$$/oom_score_adj"))?)?, "0");
    assert_eq!(out(run(script("ulimit -n"))?)?, "10240");

    // If a command cannot be started, the error has the reason.
    for (body, words) in [
        (
            json!({"cmd": ["no-such-command"]}),
            vec!["no-such-command", "ENOENT"],
        ),
        (json!({"cmd": ["/no/such"]}), vec!["/no/such", "ENOENT"]),
        // Too long for one line: the name is truncated, but not the reason or the JSON.
        (
            json!({"cmd": ["x".repeat(2000)]}),
            vec!["x", "…: ENAMETOOLONG"],
        ),
        (json!({"cmd": ["\u{1}".repeat(2000)]}), vec!["\u{1}", "…"]),
        (json!({"cmd": ["/plain"]}), vec!["/plain", "EACCES"]),
        (json!({"cmd": ["/srv"]}), vec!["/srv", "EACCES"]),
        (json!({"cmd": ["/garbage"]}), vec!["/garbage", "ENOEXEC"]),
        (
            json!({"cmd": ["id"], "cwd": "/plain"}),
            vec!["/plain", "ENOTDIR"],
        ),
        (json!({"cmd": ["id"], "user": "nosuch"}), vec!["nosuch"]),
        (json!({"cmd": ["id"], "user": "app:nosuch"}), vec!["nosuch"]),
    ] {
        let (status, error) = error_of(&run(body.clone())?)?;
        assert_eq!(status, 500, "{body} {error}");
        for word in words {
            assert!(error.contains(word), "{body}: {error}");
        }
    }
    // The error for an invalid body names the member.
    let many = |count: usize| json!({"cmd": vec!["true"; count]});
    for (body, word) in [
        (json!({}), "cmd"),
        (json!({"cmd": []}), "cmd"),
        (json!({"cmd": [""]}), "cmd"),
        (json!({"cmd": null}), "cmd"),
        (json!({"cmd": "ls"}), "cmd"),
        (json!({"cmd": ["ls", 1]}), "cmd[1]"),
        (json!({"cmd": ["l\0s"]}), "cmd[0]"),
        (json!({"cmd": ["ls"], "env": {"A": "b"}}), "env"),
        (json!({"cmd": ["ls"], "cwd": 1}), "cwd"),
        (json!({"cmd": ["ls"], "user": 0}), "user"),
        (json!({"cmd": ["ls"], "timeout_ms": "1"}), "timeout_ms"),
        (json!({"cmd": ["ls"], "timeout_ms": -1}), "timeout_ms"),
        (many(1025), "1024"),
    ] {
        let (status, error) = error_of(&run(body.clone())?)?;
        assert_eq!(status, 400, "{body} {error}");
        assert!(error.contains(word), "{body}: {error}");
    }
    assert_eq!(run(many(1024))?.json()?, response(0, 0, "", ""));
    // Unknown members are ignored.
    let more = json!({"cmd": ["echo", "x"], "tty": {"a": [1]}, "x": null});
    assert_eq!(out(run(more)?)?, "x");
    Ok(())
}

#[test]
fn a_commands_output_is_bounded_and_always_text() -> Result<()> {
    const LIMIT: usize = 1 << 20;
    let (builder, _root) = vm(IDLE)?;
    let mut vm = builder.start()?;
    let mut api = vm.api()?;

    let lossy = shell(
        &mut api,
        r"printf 'a\377b\303(\342\202(\360\237\220\0z\033'; printf '\360\237' >&2",
    )?;
    assert_eq!(
        lossy["stdout"],
        "a\u{fffd}b\u{fffd}(\u{fffd}(\u{fffd}\0z\u{1b}"
    );
    assert_eq!(lossy["stderr"], "\u{fffd}");

    // To the byte what fits, with a character cut by the limit.
    let exact = shell(
        &mut api,
        &format!("yes | head -c {LIMIT}; yes n | head -c {LIMIT} >&2"),
    )?;
    assert_eq!(exact["stdout"].as_str().map(str::len), Some(LIMIT));
    assert_eq!(
        exact["stderr"].as_str(),
        Some("n\n".repeat(LIMIT / 2).as_str())
    );
    assert!(exact.get("stdout_truncated").is_none() && exact.get("stderr_truncated").is_none());
    let over = shell(
        &mut api,
        &format!("yes é | head -c {}; echo end >&2", LIMIT + 1),
    )?;
    let expected = "é\n".repeat(LIMIT / 3 + 1).into_bytes();
    let expected = String::from_utf8_lossy(&expected[..LIMIT]).into_owned();
    assert!(over["stdout"].as_str() == Some(expected.as_str()));
    assert_eq!(
        (&over["stdout_truncated"], &over["stderr"]),
        (&json!(true), &json!("end\n"))
    );
    assert!(over.get("stderr_truncated").is_none());
    // The host may hold the last bytes for a client that is slow: a connection stays open for them.
    let mut closing = vm.api()?;
    let body = json!({"cmd": ["/bin/sh", "-c", "yes | head -c 100000"]}).to_string();
    let close = [("Connection", "close")];
    closing
        .request("POST", "/v1/exec", &close, body.as_bytes())?
        .success()?;
    let closed = thread::spawn(move || {
        let begin = Instant::now();
        closing.wait_closed().map(|()| begin.elapsed())
    });
    // The rest is drained: the command goes on to its own end. Zeros are six bytes each in JSON.
    let both = shell(
        &mut api,
        "head -c 9000000 /dev/zero; head -c 9000000 /dev/zero >&2; exit 5",
    )?;
    assert_eq!(both["exit_code"], 5);
    for name in ["stdout", "stderr"] {
        assert_eq!(both[name].as_str().map(str::len), Some(LIMIT));
        assert_eq!(both[&format!("{name}_truncated")], json!(true));
    }
    let waited = closed.join().expect("no panic")?;
    assert!(waited > Duration::from_secs(8), "{waited:?}");
    assert_eq!(api.get("/v1/status")?.status, 200);
    Ok(())
}

/// Writes a million bytes to its standard output, and exits.
const FULL: &str = r#"
#define _GNU_SOURCE
#include <fcntl.h>
#include <unistd.h>
int main(void) {
    static char zeros[1000000];
    return fcntl(1, F_SETPIPE_SZ, 1 << 20) < 0 || write(1, zeros, sizeof zeros) != sizeof zeros;
}
"#;

#[test]
fn the_output_of_a_command_that_enlarged_its_pipe_is_whole() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let [source, program] = ["full.c", "full"].map(|name| dir.path().join(name));
    std::fs::write(&source, FULL)?;
    let mut cc = assets::c_compiler()?;
    run(cc.args(["-static", "-o"]).arg(&program).arg(&source))?;
    let tree = Tree::busybox()?.file("/full", 0o755, std::fs::read(program)?)?;
    let (builder, _root) = tree_vm(tree, IDLE)?;
    let mut vm = builder.start()?;
    let response = shell(&mut vm.api()?, "exec /full")?;
    assert_eq!(response["exit_code"], 0);
    assert_eq!(response["stdout"].as_str().map(str::len), Some(1_000_000));
    let mut session = Socket::open(vm.connect(vsock::API_PORT)?, "/v1/ws/exec")?;
    session.text(&json!({"command": ["/full"]}))?;
    let end = session.wait_end()?;
    assert_eq!((end.output.len(), end.close), (1_000_000, Some(1000)));
    Ok(())
}

#[test]
fn a_command_ends_in_time_with_its_whole_group() -> Result<()> {
    let (builder, _root) = vm(IDLE)?;
    let mut vm = builder.start()?;
    let mut api = vm.api()?;

    // The timeout; output before it is returned.
    let body = json!({
        "cmd": ["sh", "-c", "sleep 7771 & echo said; exec sleep 7772"],
        "timeout_ms": 3000,
    });
    let late = exec(&mut api, &body)?.success()?.json()?;
    assert_eq!(
        late,
        json!({"exit_code": -1, "exit_signal": 9, "stdout": "said\n", "stderr": "", "timed_out": true})
    );
    wait_until(&mut api, "! ps -o args | grep -E '^sleep 777[12]'")?;

    // A grandchild that keeps the pipes open does not delay the response: it would for hours.
    let start = Instant::now();
    let left = shell(&mut api, "(sleep 7773; echo never) & echo started")?;
    assert_eq!(
        (&left["exit_code"], &left["stdout"]),
        (&json!(0), &json!("started\n"))
    );
    assert!(start.elapsed() < TIMEOUT);

    // If a client disconnects, its command is killed with all its children.
    let mut gone = vm.api()?;
    let body =
        json!({"cmd": ["sh", "-c", "sleep 7774 & sleep 7775; true"], "timeout_ms": 86_400_000});
    let body = body.to_string();
    let head = format!(
        "POST /v1/exec HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    gone.send((head + &body).as_bytes())?;
    wait_until(
        &mut api,
        "ps -o args | grep -E '^sleep 7774' && ps -o args | grep -E '^sleep 7775'",
    )?;
    drop(gone);
    wait_until(&mut api, "! ps -o args | grep -E '^sleep 777[45]'")?;

    // The same while a long response is sent; other connections are not affected.
    let mut gone = vm.api()?;
    gone.send(b"POST /v1/exec HTTP/1.1\r\nHost: x\r\nContent-Length: 43\r\n\r\n{\"cmd\":[\"head\",\"-c\",\"1000000\",\"/dev/zero\"]}")?;
    wait_until(&mut api, "! ps -o args | grep '^head'")?;
    drop(gone);

    // Commands pipelined on one connection run one after the other.
    let both = [
        r#"{"cmd":["sh","-c","sleep 0.3; echo 1"]}"#,
        r#"{"cmd":["echo","2"]}"#,
    ];
    let both = both.map(|body| {
        let length = body.len();
        format!("POST /v1/exec HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n{body}")
    });
    api.send(both.concat().as_bytes())?;
    assert_eq!(api.receive(false)?.json()?["stdout"], "1\n");
    assert_eq!(api.receive(false)?.json()?["stdout"], "2\n");
    Ok(())
}

#[test]
fn the_default_time_limit_of_a_command_is_thirty_seconds() -> Result<()> {
    let (builder, _root) = vm(IDLE)?;
    let mut vm = builder.start()?;
    let mut api = vm.api()?;
    // Measured by the guest's clock, whatever the host's load.
    let uptime = |api: &mut Client<UnixStream>| -> Result<f64> {
        let out = shell(api, "cut -d' ' -f1 /proc/uptime")?;
        Ok(out["stdout"]
            .as_str()
            .unwrap_or_default()
            .trim_end()
            .parse()?)
    };
    let start = uptime(&mut api)?;
    vm.yield_slot();
    let response = exec(&mut api, &json!({"cmd": ["sleep", "100"]}))?.json()?;
    let took = uptime(&mut api)? - start;
    assert_eq!(
        (&response["exit_code"], &response["exit_signal"]),
        (&json!(-1), &json!(9))
    );
    assert!((29.9..60.0).contains(&took), "{took} s");
    Ok(())
}

/// A program that connects to the API from inside the guest in every possible way, requests the status and
/// prints what it receives. A single byte from PID 1 is a failure.
const PROBE: &str = r#"
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <linux/vm_sockets.h>
#include <sys/time.h>
#include <unistd.h>

int main(void) {
    static const char request[] = "GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n";
    const unsigned targets[] = {VMADDR_CID_LOCAL, 3, VMADDR_CID_HOST, VMADDR_CID_ANY};
    const unsigned sources[] = {VMADDR_CID_ANY, VMADDR_CID_LOCAL, 3, VMADDR_CID_HOST};
    const unsigned ports[] = {VMADDR_PORT_ANY, 700, 10000};
    for (int t = 0; t < 4; t++) for (int s = 0; s < 4; s++) for (int p = 0; p < 3; p++) {
        int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
        struct timeval tenth = {.tv_usec = 100000}, five = {.tv_sec = 5};
        setsockopt(fd, AF_VSOCK, SO_VM_SOCKETS_CONNECT_TIMEOUT, &tenth, sizeof tenth);
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &five, sizeof five);
        struct sockaddr_vm from = {.svm_family = AF_VSOCK, .svm_cid = sources[s], .svm_port = ports[p]};
        struct sockaddr_vm to = {.svm_family = AF_VSOCK, .svm_cid = targets[t], .svm_port = 10000};
        printf("from %d:%d to %d: ", (int)sources[s], (int)ports[p], (int)targets[t]);
        if (bind(fd, (void *)&from, sizeof from)) printf("bind %s\n", strerror(errno));
        else if (connect(fd, (void *)&to, sizeof to)) printf("connect %s\n", strerror(errno));
        else {
            char response[256];
            send(fd, request, sizeof request - 1, MSG_NOSIGNAL);
            ssize_t got = recv(fd, response, sizeof response, 0);
            printf("connected, %s\n", got > 0 ? "ANSWERED" : "no answer");
        }
        close(fd);
    }
    puts("done");
}
"#;

#[test]
fn the_api_cannot_be_reached_from_inside_the_guest() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let [source, probe] = ["probe.c", "probe"].map(|name| dir.path().join(name));
    std::fs::write(&source, PROBE)?;
    let mut cc = assets::c_compiler()?;
    run(cc.args(["-static", "-o"]).arg(&probe).arg(&source))?;
    let tree = Tree::busybox()?
        .file("/probe", 0o755, std::fs::read(probe)?)?
        .file(
            "/vsock_loopback.ko",
            0o644,
            assets::module("vsock_loopback")?,
        )?;
    let (builder, _root) = tree_vm(tree, IDLE)?;
    let mut vm = builder.start()?;
    let mut api = vm.api()?;
    let mut probe = |user: &str| -> Result<String> {
        let response = exec(
            &mut api,
            &json!({"cmd": ["/probe"], "user": user, "timeout_ms": 300_000}),
        )?
        .json()?;
        let out = response["stdout"].as_str().unwrap_or_default().to_owned();
        ensure!(out.ends_with("done\n"), "{response}");
        Ok(out)
    };
    // Without loopback even the listener cannot be reached.
    let alone = probe("app")?;
    assert!(!alone.contains("ANSWERED"), "{alone}");
    let mut other = vm.api()?;
    assert_eq!(
        shell(&mut other, "insmod /vsock_loopback.ko")?["exit_code"],
        0
    );
    for user in ["app", "root"] {
        let out = probe(user)?;
        assert!(!out.contains("ANSWERED"), "{out}");
        // The probe's connection was accepted by the kernel, so it was PID 1 that closed it.
        assert!(out.contains("to 1: connected, no answer"), "{out}");
        assert!(out.contains("to 3: connected, no answer"), "{out}");
    }
    // The host is still served.
    assert_eq!(other.get("/v1/status")?.status, 200);
    assert!(vsock::connect(vm.vsock().unwrap(), vsock::API_PORT, TIMEOUT).is_ok());
    Ok(())
}
