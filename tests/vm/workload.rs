//! The workload: its exit code, signals, orphans and output.

use std::{thread, time::Duration};

use anyhow::Result;
use pigeon_lab::{
    End, Vm, assets,
    disk::{Image, Tree},
    guest, process,
};
use serde_json::{Value, json};

fn root() -> Result<Image> {
    Image::ext4(&Tree::busybox()?, 32)
}

/// Runs `config` on `root` until the VM ends. Returns the response of `/v1/exit_code`, and the console.
fn run(config: &Value, root: &Image) -> Result<(Value, String)> {
    let builder = Vm::builder().config(config).disk(root);
    let mut vm = builder.arg("PIGEON_EXIT_LINGER_MS=60000").boot()?;
    let exit = vm.api()?.get("/v1/exit_code")?.json()?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check()?;
    Ok((exit, vm.console()))
}

/// Both the API and the console report this exit.
#[track_caller]
fn assert_exit((exit, console): &(Value, String), code: i32, oom_killed: bool) {
    assert_eq!(*exit, json!({"code": code, "oom_killed": oom_killed}));
    let words = format!("exit_code={code} oom_killed={oom_killed} ");
    let lines = console
        .lines()
        .filter(|line| line.starts_with("pigeon-init: level=info msg=\"workload exited\""));
    let lines: Vec<_> = lines.collect();
    assert!(lines.len() == 1 && lines[0].contains(&words), "{lines:?}");
}

#[test]
fn a_command_that_is_not_found_is_127() -> Result<()> {
    let config =
        json!({"ExecOverride": ["nosuch", "argument"], "ExtraEnv": {"PATH": "/usr/bin:/none"}});
    let seen = run(&config, &root()?)?;
    assert_exit(&seen, 127, false);
    assert!(seen.1.contains("execute nosuch: ENOENT"), "{}", seen.1);
    Ok(())
}

#[test]
fn a_command_that_cannot_be_executed_is_126() -> Result<()> {
    let tree = Tree::busybox()?.file("/usr/bin/data", 0o644, "#!/bin/sh\nexit 0\n")?;
    let config = json!({"ImageConfig": {"Entrypoint": ["data"], "User": "4242:4343"}});
    let seen = run(&config, &Image::ext4(&tree, 32)?)?;
    assert_exit(&seen, 126, false);
    assert!(seen.1.contains("execute data: EACCES"), "{}", seen.1);
    // Unknown numeric IDs are used as they are.
    assert!(seen.1.contains("uid=4242 gid=4343"), "{}", seen.1);
    Ok(())
}

#[test]
fn a_workload_killed_by_a_signal_is_128_and_the_signal() -> Result<()> {
    let seen = run(&guest::shell("kill -SEGV $$", json!({})), &root()?)?;
    assert_exit(&seen, 128 + 11, false);
    Ok(())
}

#[test]
fn every_signal_to_pid_1_reaches_the_workloads_process_group() -> Result<()> {
    // Both processes of the group log the signals that they receive; a process in its own session receives
    // none.
    let member = r#"
        for signal in HUP INT QUIT USR1 USR2 TERM; do trap "echo $1 $signal >>/got" $signal; done
        echo $1 ready >>/got
        while :; do sleep 0.05; done"#;
    let tree = Tree::busybox()?.file("/member", 0o755, format!("#!/bin/sh\n{member}"))?;
    let root = Image::ext4(&tree, 32)?;
    let script = r#"
        setsid /member stranger &
        # In the background the shell ignores INT and QUIT: so it is this process that is execed.
        (while [ $(grep -c ready /got 2>/dev/null || echo 0) -lt 2 ]; do sleep 0.05; done
         for signal in HUP INT QUIT USR1 USR2 TERM; do
             kill -$signal 1
             tries=0
             while ! grep -q "leader $signal" /got && [ $tries -lt 400 ]; do
                 tries=$((tries + 1)); sleep 0.05
             done
         done
         cat /got; kill -KILL $PPID 2>/dev/null; kill -KILL "$1") &
        trap '' ALRM
        exec /member leader"#;
    // The process that sends the signals leaves the group, in order to survive.
    let script = script
        .replace("        (while", "        setsid sh -c 'while")
        .replace(
            "kill -KILL $PPID 2>/dev/null; kill -KILL \"$1\") &",
            "kill -KILL $0' $$ &",
        );
    let seen = run(&guest::shell(&script, json!({})), &root)?;
    assert_exit(&seen, 137, false);
    for signal in ["HUP", "INT", "QUIT", "USR1", "USR2", "TERM"] {
        let count = |member: &str| {
            seen.1
                .lines()
                .filter(|line| *line == format!("{member} {signal}"))
                .count()
        };
        assert_eq!(
            (count("leader"), count("stranger")),
            (1, 0),
            "{signal}: {}",
            seen.1
        );
    }
    Ok(())
}

#[test]
fn a_burst_of_2000_zombies_and_a_chain_of_orphans_are_all_reaped() -> Result<()> {
    let root = root()?;
    let script = r#"
        zombies() { cat /proc/[0-9]*/stat 2>/dev/null | grep -c ') Z '; }
        none() { tries=0; while [ $(zombies) -gt 0 ] && [ $tries -lt 600 ]; do tries=$((tries + 1)); sleep 0.05; done; zombies; }
        # Parents that never wait: sleep has not even heard of its children.
        family() {
            i=0; while [ $i -lt 500 ]; do read -r line </gate & i=$((i + 1)); done
            exec sleep 1000
        }
        echo 8192 >/proc/sys/kernel/threads-max # which goes by the size of the memory
        mkfifo /gate; parents=
        for n in 1 2 3 4; do
            family & parents="$parents $!"
            while [ "$(cat /proc/$!/comm)" != sleep ]; do sleep 0.05; done
            while [ $(zombies) -lt $((n * 500)) ]; do : <>/gate; sleep 0.05; done
        done
        echo "before: $(zombies)"
        kill -KILL $parents; wait $parents
        echo "after: $(none)"
        # Each orphan of these leaves another one.
        orphan() { if [ $1 -gt 0 ]; then (orphan $(($1 - 1)) &) & fi; sleep 0.01; }
        i=0; while [ $i -lt 20 ]; do (orphan 5 &); i=$((i + 1)); done
        wait; sleep 0.3
        echo "chain: $(none)"
        exit 1"#;
    let mut vm = Vm::builder()
        .config(&guest::shell(script, json!({})))
        .disk(&root)
        .timeout(Duration::from_secs(300))
        .memory_mib(512)
        .boot()?;
    let before = vm.wait_for("before: ")?;
    let before: u32 = before.trim_start_matches("before: ").parse()?;
    assert!(before >= 2000, "{before}");
    assert_eq!(vm.wait_for("after: ")?, "after: 0");
    assert_eq!(vm.api()?.get("/v1/status")?.status, 200);
    assert_eq!(vm.wait_for("chain: ")?, "chain: 0");
    vm.wait_for("exit_code=1 oom_killed=false")?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check()
}

#[test]
fn a_workload_killed_by_the_oom_killer_is_reported_as_such() -> Result<()> {
    let root = root()?;
    let config = guest::shell("exec tail /dev/zero", json!({"UserOverride": "app"}));
    let mut vm = Vm::builder()
        .config(&config)
        .disk(&root)
        .memory_mib(96)
        .boot()?;
    let exit = vm.api()?.get("/v1/exit_code")?.json()?;
    assert_eq!(exit, json!({"code": 137, "oom_killed": true}));
    vm.wait_for("exit_code=137 oom_killed=true")?;
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check()
}

#[test]
fn an_oom_kill_in_the_workloads_own_cgroup_counts_too() -> Result<()> {
    let script = "group=/sys/fs/cgroup/memory/small; mkdir $group
        echo 8M >$group/memory.limit_in_bytes; echo $$ >$group/cgroup.procs
        exec tail /dev/zero";
    let seen = run(&guest::shell(script, json!({})), &root()?)?;
    assert_exit(&seen, 137, true);
    Ok(())
}

#[test]
fn forged_records_and_other_victims_are_not_an_oom_kill() -> Result<()> {
    let script = "group=/sys/fs/cgroup/memory/small; mkdir $group
        echo 8M >$group/memory.limit_in_bytes
        sh -c \"echo \\$\\$ >$group/cgroup.procs; exec tail /dev/zero\"
        echo \"child: $?\"
        dmesg | grep -c 'Killed process'
        echo \"<3>Out of memory: Killed process $$ (sh) total-vm:1kB, anon-rss:1kB\" >/dev/kmsg
        echo \"<6>oom-kill:constraint=CONSTRAINT_NONE,nodemask=(null),task=sh,pid=$$,uid=0\" >/dev/kmsg
        echo \"Memory cgroup out of memory: Killed process $$ (sh) total-vm:1kB\" >/dev/kmsg
        kill -KILL $$";
    let seen = run(&guest::shell(script, json!({})), &root()?)?;
    assert!(seen.1.contains("child: 137\n1\n"), "{}", seen.1);
    assert_exit(&seen, 137, false);
    Ok(())
}

#[test]
fn a_mebibyte_of_output_survives_a_stopped_console() -> Result<()> {
    const LINES: usize = 16 << 10;
    let root = root()?;
    // 64 bytes per line; the last one has no LF, and the workload exits right after it.
    let script = format!(
        "echo $$ >/run/pid; awk 'BEGIN {{ for (i = 1; i <= {LINES}; i++) printf \"%063d\\n\", i }}' >/tmp/lines; cat /tmp/lines; printf 'the end'; exit 5"
    );
    let mut vm = Vm::builder()
        .config(&guest::shell(&script, json!({})))
        .disk(&root)
        .firecrackers_console()
        .boot()?;
    vm.wait_for("msg=\"workload started\"")?;
    vm.serial().hold();
    // Until all buffers are full: the writer blocks in the pipe.
    let asleep = json!({"cmd": ["sh", "-c",
        "for p in /proc/[0-9]*; do grep -q '^cat.*/tmp/lines' $p/cmdline && cat $p/wchan; done; true"]});
    let mut api = vm.api()?;
    loop {
        let response = api.post("/v1/exec", &asleep)?.json()?;
        if response["stdout"]
            .as_str()
            .is_some_and(|text| text.contains("pipe_w"))
        {
            break;
        }
    }
    assert_eq!(api.get("/v1/status")?.json()?, json!({"ok": true}));
    vm.serial().release();
    assert_eq!(
        api.get("/v1/exit_code")?.json()?,
        json!({"code": 5, "oom_killed": false})
    );
    assert_eq!(vm.wait_end()?, End::Reboot);
    root.check()?;

    let console = vm.console();
    let is_line = |line: &&str| line.len() == 63 && line.bytes().all(|byte| byte.is_ascii_digit());
    let lines: Vec<usize> = console
        .lines()
        .filter(is_line)
        .map(|line| line.parse().unwrap())
        .collect();
    assert!(
        lines.into_iter().eq(1..=LINES),
        "lines are missing or out of order"
    );
    // Log lines start on a new line.
    assert!(console.contains("the end\npigeon-init: level=info msg=\"workload exited\""));
    Ok(())
}

#[test]
fn output_continues_after_a_command_has_hung_up_the_console() -> Result<()> {
    let root = root()?;
    // The second time, /dev/console is another device.
    for more in ["panic=1", "console=tty0"] {
        let mut vm = Vm::builder()
            .config(&guest::shell(
                "yes | head -c 1000000; echo the end",
                json!({}),
            ))
            .disk(&root)
            .firecrackers_console()
            .arg(more)
            .boot()?;
        vm.wait_for("msg=\"workload started\"")?;
        vm.serial().hold();
        let mut api = vm.api()?;
        // Whether the workload blocks on the console, with all buffers full.
        let mut is_stuck = || -> Result<bool> {
            let look = json!({"cmd": ["sh", "-c", "sleep 0.3; cat /proc/[0-9]*/wchan"]});
            let seen = api.post("/v1/exec", &look)?.json()?;
            Ok(seen["stdout"]
                .as_str()
                .is_some_and(|text| text.contains("pipe_w")))
        };
        while !is_stuck()? {}
        // A terminal that a session's leader opens becomes its controlling terminal, and is hung up when it
        // exits.
        let script = "exec 3<$(readlink /proc/$(pidof yes)/fd/0)";
        let leader = json!({"cmd": ["sh", "-c", script]});
        assert_eq!(vm.api()?.post("/v1/exec", &leader)?.json()?["exit_code"], 0);
        while !is_stuck()? {}
        let exit = thread::spawn(move || api.get("/v1/exit_code")?.json());
        vm.serial().release();
        vm.wait_for("the end")?;
        assert_eq!(
            exit.join().unwrap()?,
            json!({"code": 0, "oom_killed": false})
        );
        assert_eq!(vm.wait_end()?, End::Reboot);
        root.check()?;
    }
    Ok(())
}

/// Changes the line discipline of its standard input, or stops its output; then prints lines, and exits.
const STOP: &str = r#"
#include <stdio.h>
#include <sys/ioctl.h>
#include <termios.h>
int main(int count, char **arguments) {
    int null = 27; /* N_NULL, linux/tty.h */
    if (count > 1 ? ioctl(0, TIOCSETD, &null) : tcflow(0, TCOOFF)) return 1;
    for (int line = 0; line < 1000; line++) printf("line %d\n", line);
    return 3;
}
"#;

#[test]
fn a_workload_that_stops_the_console_stops_nothing_else() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let [source, program] = ["stop.c", "stop"].map(|name| dir.path().join(name));
    std::fs::write(&source, STOP)?;
    let mut cc = assets::c_compiler()?;
    process::run(cc.args(["-static", "-o"]).arg(&program).arg(&source))?;
    let tree = Tree::busybox()?.file("/stop", 0o755, std::fs::read(program)?)?;
    let root = Image::ext4(&tree, 32)?;
    // The shutdown writes to these files. Opening a pipe without a reader would block.
    let script = "mkfifo /run/pipe
        for file in 1/oom_score_adj sys/kernel/printk; do mount --bind /run/pipe /proc/$file; done
        exec /stop";
    for command in [script.to_string(), format!("{script} for-good")] {
        let config = guest::shell(&command, json!({}));
        let (exit, _) = run(&config, &root)?;
        assert_eq!(exit, json!({"code": 3, "oom_killed": false}), "{command}");
    }
    Ok(())
}

/// A program with an open terminal can lock all others out of it, 5 s at a time: one of its processes changes
/// the line discipline (TIOCSETD) while another one waits in it (TCSETSW).
#[test]
fn only_root_gets_the_console_as_its_terminal() -> Result<()> {
    let script =
        "test -t 0; echo terminal $?; read a; echo got $a; read b </dev/stdin; echo got $b; cat
        for name in console ttyS0 ttyAMA0; do head -c 0 /dev/$name && echo opened; done; exit 7";
    for (user, terminal) in [("0", "terminal 0"), ("4242", "terminal 1")] {
        let config = guest::shell(script, json!({"UserOverride": user}));
        let root = root()?;
        let mut vm = Vm::builder().config(&config).disk(&root).boot()?;
        vm.wait_for(terminal)?;
        for line in ["one", "two"] {
            vm.type_text(&format!("{line}\n"))?;
            vm.wait_for(&format!("got {line}"))?;
        }
        // End of input: Ctrl-D.
        vm.type_text("\x04")?;
        vm.wait_for("exit_code=7")?;
        assert_eq!(vm.wait_end()?, End::Reboot);
        assert_eq!(vm.console().contains("\nopened"), user == "0");
        root.check()?;
    }
    Ok(())
}
