//! Failures below containerd, which must leave nothing behind, and settings that a VM does not support.

mod engine;

use std::{
    fs::{self, File},
    io::Read,
    os::unix::fs::{MetadataExt, symlink},
    path::Path,
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use containerd_shim_protos::{
    api::PauseRequest,
    ttrpc::{Code, context},
};
use engine::{Containerd, IMAGE, PIGEON, RUNC, TIMEOUT, code};
use pigeon::process::{Process, write_program};
use rustix::{
    mount::{MountFlags, UnmountFlags, mount, unmount},
    process::{Pid, Signal, kill_process},
};

/// A tmpfs, unmounted on drop.
struct Tmpfs<'a>(&'a Path);

impl Tmpfs<'_> {
    fn mount<'a>(dir: &'a Path, options: &str, flags: MountFlags) -> Tmpfs<'a> {
        fs::create_dir_all(dir).unwrap();
        let options = std::ffi::CString::new(options).unwrap();
        mount("tmpfs", dir, "tmpfs", flags, options.as_c_str()).unwrap();
        Tmpfs(dir)
    }
}

impl Drop for Tmpfs<'_> {
    fn drop(&mut self) {
        let _ = unmount(self.0, UnmountFlags::DETACH);
    }
}

#[test]
fn what_a_vm_cannot_have_is_refused_by_name_before_it_boots() {
    let containerd = Containerd::start();
    for (options, expected) in [
        (&["--privileged"][..], "linux.devices: /dev/"),
        (
            &["--device", "/dev/null"],
            "linux.devices: /dev/null: a VM has no devices of the host",
        ),
        (
            &["--net-host"],
            "linux.namespaces: no network namespace: a VM cannot be in the host's",
        ),
        (
            &["--with-ns", "ipc:/proc/1/ns/ipc"],
            "linux.namespaces: ipc of /proc/1/ns/ipc: a VM cannot join a namespace of the host",
        ),
        (
            &["--uidmap", "0:1000:100", "--gidmap", "0:1000:100"],
            "linux.uidMappings: a VM's users are not those of the host",
        ),
        (
            &["--rootfs-propagation", "shared"],
            "linux.rootfsPropagation: shared",
        ),
        (&["--rdt-class", "x"], "linux.intelRdt: a VM cannot have it"),
        (
            &["--mount", "type=nfs,src=x,dst=/n"],
            "mount on /n: a mount of type nfs cannot be had in a VM",
        ),
        (
            &["--mount", "type=bind,src=/none,dst=/n,options=bind"],
            "unable to find \"/none\"",
        ),
        (
            &["--log-uri", "tcp://127.0.0.1:1"],
            "output to tcp:// is not supported",
        ),
        (
            &["--log-uri", "binary:///none"],
            "unable to start /none: No such file",
        ),
    ] {
        let refused = containerd.run(PIGEON, options, "refused", &["true"]);
        assert_eq!(refused.status, Some(1), "{options:?}");
        assert!(
            refused.stderr.contains(expected),
            "{options:?}: {refused:?}"
        );
        assert_eq!(containerd.ok(&["container", "ls", "-q"]), "");
    }
    assert!(containerd.images().is_empty());
    containerd.assert_clean();
}

#[test]
fn missing_host_requirements_are_named() {
    let mut containerd = Containerd::start();
    let state = containerd.state();
    let refused = |containerd: &Containerd, expected: &str| {
        let refused = containerd.run(PIGEON, &[], "refused", &["true"]);
        assert_eq!(refused.status, Some(1));
        assert!(refused.stderr.contains(expected), "{refused:?}");
        assert_eq!(containerd.ok(&["container", "ls", "-q"]), "");
        containerd.assert_clean_but_for_mounts();
    };
    {
        let _read_only = Tmpfs::mount(&state, "", MountFlags::RDONLY);
        refused(&containerd, "unable to create");
    }
    {
        // Smaller than the image.
        let _full = Tmpfs::mount(&state, "size=256k", MountFlags::empty());
        refused(&containerd, "No space left on device");
        assert!(containerd.images().is_empty());
    }

    // A missing hypervisor, and a missing directory for temporary files.
    let bin = containerd.place.path("bin");
    fs::create_dir(&bin).unwrap();
    let shim = env!("CARGO_BIN_EXE_containerd-shim-pigeon-v2");
    symlink(shim, bin.join("containerd-shim-pigeon-v2")).unwrap();
    containerd.restart_with(&[
        ("PATH", bin.display().to_string()),
        ("TMPDIR", "/none".into()),
    ]);
    refused(&containerd, "no qemu-system-");

    let long = containerd.place.path(&"x".repeat(100));
    containerd.restart_with(&[("PIGEON_STATE", long.display().to_string())]);
    refused(&containerd, "is too long by");
    assert!(!long.exists());

    // The same without faults.
    containerd.restart_with(&[("TMPDIR", "/none".into())]);
    assert_eq!(
        containerd.run(PIGEON, &[], "runs", &["true"]).status,
        Some(0)
    );
    containerd.assert_clean();
}

#[test]
fn a_snapshotter_without_layers_packs_an_image_once() {
    let containerd = Containerd::start();
    let native = ["--snapshotter", "native"];
    let run = |id: &str| {
        let outcome = containerd.run(PIGEON, &native, id, &["cat", "/etc/second"]);
        assert_eq!(outcome.stdout, "of the second layer\n", "{outcome:?}");
    };
    thread::scope(|scope| {
        scope.spawn(|| run("one"));
        scope.spawn(|| run("two"));
    });
    let [image] = &containerd.images()[..] else {
        panic!("{:?}", containerd.images());
    };
    let found = fs::metadata(image).unwrap();
    run("three");
    let again = fs::metadata(image).unwrap();
    assert_eq!(
        (again.ino(), again.ctime() >= found.ctime()),
        (found.ino(), true)
    );
    assert_eq!(containerd.images().len(), 1);
    containerd.assert_clean();
}

#[test]
fn a_shim_killed_while_it_waits_for_an_image_leaves_nothing() {
    let containerd = Containerd::start();
    assert_eq!(
        containerd.run(PIGEON, &[], "one", &["true"]).status,
        Some(0)
    );
    let [image] = &containerd.images()[..] else {
        panic!("{:?}", containerd.images());
    };
    fs::remove_file(image).unwrap();
    let lock = File::create(image.with_extension("lock")).unwrap();
    lock.lock().unwrap();
    thread::scope(|scope| {
        let run = scope.spawn(|| containerd.run(PIGEON, &[], "two", &["true"]));
        let containers = containerd.state().join("containers");
        let deadline = Instant::now() + TIMEOUT;
        let shim = loop {
            let mut dirs = fs::read_dir(&containers).unwrap().flatten();
            let number = dirs.find_map(|dir| fs::read_to_string(dir.path().join("lock")).ok());
            if let Some(number) = number.and_then(|number| number.parse().ok()) {
                break Pid::from_raw(number).unwrap();
            }
            assert!(Instant::now() < deadline);
            thread::sleep(Duration::from_millis(10));
        };
        thread::sleep(Duration::from_millis(200));
        kill_process(shim, Signal::KILL).unwrap();
        assert_eq!(run.join().unwrap().status, Some(1));
    });
    containerd.assert_clean();
    drop(lock);
    containerd.ctr(&["container", "rm", "two"]);
    assert_eq!(
        containerd.run(PIGEON, &[], "two", &["true"]).status,
        Some(0)
    );
    containerd.assert_clean();
}

#[test]
fn a_signal_while_the_vm_boots_ends_the_container() {
    let containerd = Containerd::start();
    for (signal, status) in [("TERM", "143"), ("KILL", "137")] {
        thread::scope(|scope| {
            let words = [
                "run",
                "-d",
                "--runtime",
                PIGEON,
                IMAGE,
                "early",
                "sleep",
                "1000",
            ];
            let containerd = &containerd;
            let run = scope.spawn(move || containerd.ctr(&words));
            containerd.wait_status("early", "CREATED");
            // A task that has not exited cannot be deleted, and an ignored signal has no effect.
            assert_eq!(containerd.ctr(&["task", "rm", "early"]).status, Some(1));
            containerd.ok(&["task", "kill", "-s", "WINCH", "early"]);
            // A task that was not started cannot be paused.
            let request = PauseRequest::default();
            let client = containerd.shim_client();
            let paused = client.pause(context::with_duration(TIMEOUT), &request);
            assert_eq!(code(paused), Some(Code::FAILED_PRECONDITION));
            assert_eq!(containerd.status("early").as_deref(), Some("CREATED"));
            containerd.ok(&["task", "kill", "-s", signal, "early"]);
            assert_eq!(run.join().unwrap().status, Some(1));
        });
        containerd.wait_status("early", "STOPPED");
        let removed = containerd.ctr(&["task", "rm", "early"]);
        let expected = format!("exit code {status}");
        assert!(removed.stderr.contains(&expected), "{removed:?}");
        containerd.ok(&["container", "rm", "early"]);
        containerd.assert_clean();
    }
}

#[test]
fn a_slow_reader_loses_nothing_and_a_dead_one_blocks_nothing() {
    const LINES: usize = 200_000;
    let containerd = Containerd::start();
    let count = format!("seq {LINES}; echo end >&2");
    let mut command = containerd.command(&["run", "--rm", "--runtime", PIGEON, IMAGE, "slow"]);
    command.args(["sh", "-c", &count]);
    command.stdout(Stdio::piped()).stderr(Stdio::null());
    let mut process = Process::spawn(command).unwrap();
    let mut output = process.child().stdout.take().unwrap();
    let mut text = vec![0; 2];
    output.read_exact(&mut text).unwrap();
    // Without a reader of the output, everything else still works.
    let exec = |id: &str| {
        let outcome = containerd.ctr(&["task", "exec", "--exec-id", "e", id, "echo", "hi"]);
        assert_eq!(outcome.stdout, "hi\n", "{outcome:?}");
        assert_eq!(containerd.status(id).as_deref(), Some("RUNNING"));
        assert!(containerd.ctr(&["task", "metrics", id]).status == Some(0));
    };
    exec("slow");
    thread::sleep(Duration::from_secs(3));
    exec("slow");
    output.read_to_end(&mut text).unwrap();
    let expected: String = (1..=LINES).map(|number| format!("{number}\n")).collect();
    assert!(text == expected.as_bytes(), "{} bytes", text.len());
    assert!(process.wait(TIMEOUT).unwrap().unwrap().success());
    containerd.assert_clean();

    // The container of a killed client is still available to others.
    let mut command = containerd.command(&["run", "--runtime", PIGEON, IMAGE, "left"]);
    command.args(["sh", "-c", "while echo line; do :; done"]);
    command.stdout(Stdio::piped()).stderr(Stdio::null());
    let mut process = Process::spawn(command).unwrap();
    let mut output = process.child().stdout.take().unwrap();
    output.read_exact(&mut text[..1000]).unwrap();
    process.kill();
    thread::sleep(Duration::from_secs(1));
    exec("left");
    let mut command = containerd.command(&["task", "attach", "left"]);
    command.stdout(Stdio::piped()).stderr(Stdio::null());
    let mut process = Process::spawn(command).unwrap();
    let mut output = process.child().stdout.take().unwrap();
    output.read_exact(&mut text[..500_000]).unwrap();
    drop((output, process));
    containerd.ok(&["task", "rm", "-f", "left"]);
    containerd.ok(&["container", "rm", "left"]);
    containerd.assert_clean();
}

#[test]
fn output_goes_to_files_and_programs_as_with_runc() {
    let containerd = Containerd::start();
    let logger = containerd.place.path("logger");
    // A program that ignores SIGTERM, as runc's shim does not wait before sending it.
    let text = "#!/bin/sh\ncd ${0%/*}; trap '' TERM; exec 5>&-; \
                echo $CONTAINER_ID $CONTAINER_NAMESPACE $* >taken.by; \
                cat <&3 >taken.out & cat <&4 >taken.err; wait\n";
    write_program(&logger, text).unwrap();
    let names = ["taken.out", "taken.err", "taken.by", "logs/file"];
    let outcome = |runtime: &str| {
        let program = format!("binary://{}?a=b%20c", logger.display());
        let file = format!("file://{}", containerd.place.path("logs/file").display());
        let script = "seq 100000; echo error >&2; exit 3";
        let run = |uri: &str, id: &str| {
            containerd
                .run(runtime, &["--log-uri", uri], id, &["sh", "-c", script])
                .status
        };
        let statuses = [run(&program, "program"), run(&file, "file")];
        let texts = names.map(|name| {
            let path = containerd.place.path(name);
            let bytes = fs::read(&path);
            fs::remove_file(path).unwrap();
            bytes.unwrap()
        });
        (statuses, texts)
    };
    let (statuses, texts) = outcome(RUNC);
    assert_eq!(statuses, [Some(3); 2]);
    assert_eq!(texts[1], b"error\n");
    assert_eq!(texts[2], b"program default a b c\n");
    assert_eq!(texts[0].len() + 6, texts[3].len());
    let found = outcome(PIGEON);
    assert_eq!(found.0, statuses);
    // The order of two streams in one file is undefined.
    for number in 0..3 {
        assert!(found.1[number] == texts[number], "{}", names[number]);
    }
    assert_eq!(found.1[3].len(), texts[3].len());
    containerd.assert_clean();
}

#[test]
fn names_environments_and_arguments_may_have_the_maximum_length() {
    let containerd = Containerd::start();
    let namespace = format!("a.b_c-{}", "n".repeat(70));
    let id = format!("1.x_y-{}", "i".repeat(70));
    let archive = containerd.place.path("image.tar");
    containerd.ok(&[
        "-n",
        &namespace,
        "image",
        "import",
        archive.to_str().unwrap(),
    ]);
    let value = "v".repeat(100_000);
    let variables: Vec<_> = (0..5).map(|number| format!("V{number}={value}")).collect();
    let mut words = vec!["-n", &namespace, "run", "--rm", "--runtime", PIGEON];
    for variable in &variables {
        words.extend(["--env", variable]);
    }
    let script = "echo $((${#V0} + ${#V1} + ${#V2} + ${#V3} + ${#V4})) ${#1} ${#2}; hostname";
    words.extend([IMAGE, &id, "sh", "-c", script, "sh", &value, &value]);
    let outcome = containerd.ctr(&words);
    let expected = format!("500000 100000 100000\n{}\n", &id[..12]);
    assert_eq!(outcome.stdout, expected, "{}", outcome.stderr);
    containerd.assert_clean();
}

#[test]
fn a_shim_killed_while_containerd_is_down_is_cleaned_up_after() {
    let mut containerd = Containerd::start();
    let command = ["sh", "-c", "while :; do sleep 0.05; done"];
    containerd.run_detached(PIGEON, &[], "gone", &command);
    let shim = containerd.shim("gone");
    containerd.stop();
    kill_process(shim, Signal::KILL).unwrap();
    containerd.restart();
    let deadline = Instant::now() + TIMEOUT;
    while containerd.status("gone").is_some() {
        assert!(Instant::now() < deadline, "{}", containerd.log());
        thread::sleep(Duration::from_millis(50));
    }
    containerd.ok(&["container", "rm", "gone"]);
    containerd.assert_clean();
}

#[test]
fn a_read_only_root_has_all_its_mounts_as_with_runc() {
    let containerd = Containerd::start();
    let folder = containerd.place.path("folder");
    fs::create_dir(&folder).unwrap();
    let file = containerd.place.write("folder/file", "of the host\n");
    let bind = |source: &Path, target: &str| {
        let source = source.display();
        format!("type=bind,src={source},dst={target},options=rbind:ro")
    };
    let mounts = [
        "type=tmpfs,src=tmpfs,dst=/not/there,options=size=1m".into(),
        bind(&folder, "/neither/is/this"),
        bind(&file, "/nor/this.conf"),
    ];
    let mut options = vec!["--read-only", "--cwd", "/made/by/it"];
    for mount in &mounts {
        options.extend(["--mount", mount]);
    }
    let script = "pwd; echo mine >/not/there/x; cat /not/there/x /neither/is/this/file /nor/this.conf; \
                  for path in /x /made/by/it/x /neither/is/this/x /etc/second; do \
                  echo >$path; done; awk '$2 == \"/\" {print substr($4, 1, 2)}' /proc/mounts";
    let [expected, found] = [RUNC, PIGEON].map(|runtime| {
        let outcome = containerd.run(runtime, &options, "fixed", &["sh", "-c", script]);
        containerd.ctr(&["container", "rm", "fixed"]);
        outcome
    });
    assert!(expected.stdout.ends_with("\nro\n"), "{expected:?}");
    assert_eq!(found, expected);
    containerd.assert_clean();
}
