//! Clones: VMs that are restored from a snapshot of another. (README, "Snapshots and clones")

use std::{
    collections::{BTreeMap, HashSet},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, ensure};
use pigeon_lab::{
    Arch, End, Vm, assets,
    disk::{Image, Tree},
    guest,
    mmds::{Mmds, Push},
    vsock::API_PORT,
    ws::Socket,
};
use serde_json::{Value, json};

/// The document of VM `number`: 0 is the one that is snapshotted, its clones are 1 and more.
fn document(number: usize) -> Value {
    const SCRIPT: &str = "trap 'echo restored at $n' USR1; trap 'exit 3' TERM
        n=0; while :; do n=$((n + 1)); echo count $n; sleep 0.05; done";
    guest::shell(
        SCRIPT,
        json!({
            "Hostname": format!("vm{number}"),
            "IPConfigs": [
                {"IP": format!("10.0.{number}.2"), "Mask": 24, "Gateway": format!("10.0.{number}.1")}
            ],
            "EtcHosts": [{"Host": "self.internal", "IP": format!("10.0.{number}.2")}],
            "EtcResolv": {"Nameservers": [format!("10.0.{number}.53")]},
            "RestoreSignal": "SIGUSR1",
        }),
    )
}

/// Whether VMs with restorable snapshots are refused, as QEMU does not support them here.
fn are_refused() -> Result<bool> {
    let refused = assets::arch() != Arch::X86_64;
    if refused {
        let error = Vm::builder().restorable().boot().err();
        let error = error.context("there is such a VM")?.to_string();
        assert!(error.contains("are for x86_64 guests"), "{error}");
    }
    Ok(refused)
}

fn exec(vm: &mut Vm, script: &str) -> Result<String> {
    let body = json!({"cmd": ["sh", "-c", script]});
    let response = vm.api()?.post("/v1/exec", &body)?.success()?.json()?;
    ensure!(response["exit_code"] == 0, "{script}: {response}");
    Ok(response["stdout"].as_str().unwrap_or_default().into())
}

fn open(vm: &mut Vm, first: &Value) -> Result<Socket> {
    let mut socket = Socket::open(vm.connect(API_PORT)?, "/v1/ws/exec")?;
    socket.text(first)?;
    Ok(socket)
}

/// The number in the workload's last line on the console.
fn count(vm: &Vm) -> Result<u64> {
    let console = vm.console();
    // The last line may be incomplete.
    let whole = console.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let mut counts = whole
        .lines()
        .rev()
        .filter_map(|line| line.strip_prefix("count "));
    Ok(counts.next().context("no line with a number")?.parse()?)
}

/// A session that prints how often it was asked, and the time.
const CLOCK: &str = "n=0; while read -r line; do n=$((n + 1)); echo $n $EPOCHREALTIME; done";

/// The VM to be cloned, and its root: it has contacted its gateway, and has two detached sessions, one named
/// `clock` and one that writes to a file.
fn original(restore: &str) -> Result<(Vm, Image)> {
    let root = Image::ext4(&Tree::busybox()?, 32)?;
    let mut vm = Vm::builder()
        .restorable()
        .mmds(Mmds::serving(document(0)))
        .arg("PIGEON_CGROUPS=unified")
        .arg(&format!("PIGEON_RESTORE={restore}"))
        .memory_mib(128)
        .disk(&root)
        .start()?;
    exec(
        &mut vm,
        "ping -c 1 -W 10 10.0.0.1 && grep 10.0.0.1 /proc/net/arp",
    )?;
    let mut clock = open(
        &mut vm,
        &json!({"command": ["sh", "-c", CLOCK], "id": "clock"}),
    )?;
    clock.binary(b"\n")?;
    clock.output_with("1 ")?;
    let writer =
        "echo writes; n=0; while :; do n=$((n + 1)); echo $n >>/var/written; sleep 0.05; done";
    open(
        &mut vm,
        &json!({"command": ["sh", "-c", writer], "id": "writer"}),
    )?
    .output_with("writes")?;
    Ok((vm, root))
}

/// Facts about a clone.
struct Facts {
    number: usize,
    /// Output of the commands of [`Facts::of`].
    found: BTreeMap<&'static str, String>,
    /// The difference between its clock and the host's, beyond the duration of the call that set it.
    clock: Duration,
    console: String,
}

impl Facts {
    fn of(vm: &mut Vm, number: usize, call: Duration) -> Result<Facts> {
        const COMMANDS: [(&str, &str); 7] = [
            (
                "address",
                "ip -o -4 address show dev eth0 | awk '{print $4}'",
            ),
            ("route", "ip route show | awk '/^default/ {print $3}'"),
            ("hostname", "hostname"),
            ("hosts", "awk '/self/ {print $1}' /etc/hosts"),
            ("resolv.conf", "cat /etc/resolv.conf"),
            ("neighbours", "grep -c '^10.0.0.1 ' /proc/net/arp || true"),
            ("generation", "cat /run/pigeon/generation || true"),
        ];
        let script: String = COMMANDS
            .iter()
            .map(|(name, command)| format!("echo '<<<{name}'; {command};"))
            .collect();
        let output = exec(vm, &script)?;
        let mut found = BTreeMap::new();
        for part in output.split("<<<").skip(1) {
            let (name, text) = part.split_once('\n').context("no name")?;
            let known = COMMANDS.iter().find(|(known, _)| *known == name);
            found.insert(known.context("which command?")?.0, text.trim().to_string());
        }
        Ok(Facts {
            number,
            found,
            clock: clock_difference(vm)?.saturating_sub(call),
            console: vm.console(),
        })
    }

    fn is(&self, name: &str, wanted: &str) -> Result<()> {
        let found = &self.found[name];
        ensure!(found == wanted, "{name}: {found}, not {wanted}");
        Ok(())
    }
}

/// The difference between a guest's clock and the host's, from its session `clock`. The fastest of several
/// responses is the most exact.
fn clock_difference(vm: &mut Vm) -> Result<Duration> {
    let mut clock = open(vm, &json!({"attach": "clock"}))?;
    let now = || SystemTime::now().duration_since(UNIX_EPOCH);
    let mut best: Option<(Duration, Duration)> = None;
    for _ in 0..20 {
        let before = now()?;
        clock.binary(b"\n")?;
        let response = clock.output_with("\n")?;
        let after = now()?;
        let time = response.split_whitespace().nth(1).context("no time")?;
        let guest = Duration::try_from_secs_f64(time.parse()?)?;
        // Zero if the guest's time lies between request and response.
        let difference = before
            .saturating_sub(guest)
            .max(guest.saturating_sub(after));
        let took = after - before;
        if best.is_none_or(|(quickest, _)| took < quickest) {
            best = Some((took, difference));
        }
    }
    let (took, difference) = best.context("no answer")?;
    ensure!(
        took < Duration::from_millis(500),
        "a response takes {took:?}"
    );
    Ok(difference)
}

/// A name, and a check that fails if this is not the clone's own.
type Check = (&'static str, fn(&Facts) -> Result<()>);

/// Properties that each clone must have of its own.
const CHECKS: [Check; 9] = [
    ("address", |facts| {
        facts.is("address", &format!("10.0.{}.2/24", facts.number))
    }),
    ("route", |facts| {
        facts.is("route", &format!("10.0.{}.1", facts.number))
    }),
    ("host name", |facts| {
        facts.is("hostname", &format!("vm{}", facts.number))
    }),
    ("hosts", |facts| {
        facts.is("hosts", &format!("10.0.{}.2", facts.number))
    }),
    ("resolv.conf", |facts| {
        let wanted = format!("nameserver 10.0.{}.53", facts.number);
        facts.is("resolv.conf", &wanted)
    }),
    ("neighbours", |facts| facts.is("neighbours", "0")),
    ("clock", |facts| {
        ensure!(
            facts.clock <= Duration::from_millis(10),
            "the clock is off by {:?}",
            facts.clock
        );
        Ok(())
    }),
    ("generation", |facts| facts.is("generation", "2")),
    ("signal", |facts| {
        ensure!(facts.console.contains("restored at "), "no signal");
        Ok(())
    }),
];

/// Checks that the workload and the writing session continue where they were in the snapshot.
fn goes_on(vm: &mut Vm, original: &Vm) -> Result<()> {
    let at = count(original)?;
    let first = vm.wait_for("count ")?;
    let first: u64 = first.trim_start_matches("count ").parse()?;
    // A line may have been in transit when the snapshot was taken.
    ensure!(
        (at + 1..=at + 2).contains(&first),
        "the clone's first line is {first}, the snapshot's last {at}"
    );
    vm.wait_for(&format!("count {}", first + 10))?;
    let written = |vm: &mut Vm| -> Result<u64> {
        let numbers = exec(vm, "cat /var/written")?;
        let numbers: Vec<u64> = numbers.lines().map(str::parse).collect::<Result<_, _>>()?;
        ensure!(
            numbers.iter().copied().eq(1..=numbers.len() as u64),
            "a line is missing: {numbers:?}"
        );
        Ok(numbers.len() as u64)
    };
    let before = written(vm)?;
    let deadline = Instant::now() + Duration::from_secs(60);
    while written(vm)? <= before {
        ensure!(
            Instant::now() < deadline,
            "the detached command does not continue"
        );
    }
    Ok(())
}

/// Shuts a clone down, and checks its disk.
fn end(mut vm: Vm) -> Result<()> {
    let mut api = vm.api()?;
    api.post("/v1/signals", &json!({"signal": 15}))?.success()?;
    assert_eq!(api.get("/v1/exit_code")?.success()?.json()?["code"], 3);
    assert_eq!(vm.wait_end()?, End::Reboot);
    vm.image(0)?.check()
}

#[test]
fn a_clone_without_a_new_document_continues_as_the_original() -> Result<()> {
    if are_refused()? {
        return Ok(());
    }
    let (mut vm, _root) = original("off")?;
    let snapshot = vm.snapshot()?;
    // Long enough that a clock that was not corrected is wrong.
    thread::sleep(Duration::from_millis(200));
    let mut clone = snapshot
        .restore()
        .mmds(Mmds::serving(document(1)))
        .start()?;
    goes_on(&mut clone, &vm)?;
    let facts = Facts::of(&mut clone, 1, Duration::ZERO)?;
    for (name, check) in CHECKS {
        ensure!(check(&facts).is_err(), "{name} is not the original's");
    }
    end(clone)?;
    // The original continues, too.
    vm.resume()?;
    assert_eq!(exec(&mut vm, "hostname")?, "vm0\n");
    Ok(())
}

/// Microseconds since 1970.
fn now() -> Result<u64> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    Ok(now.as_micros().try_into()?)
}

/// Random numbers from the host, in base64.
fn entropy(number: usize) -> String {
    format!("{number:02}").repeat(32)
}

/// Waits until a clone has completed its restore without a call.
fn wait_restored(vm: &mut Vm) -> Result<()> {
    vm.wait_for("restored at ").map(drop)
}

/// Checks all properties of a clone; the clock only if a call has set it, with the duration of the call.
fn is_its_own(vm: &mut Vm, number: usize, call: Option<Duration>) -> Result<()> {
    let facts = Facts::of(vm, number, call.unwrap_or_default())?;
    for (name, check) in CHECKS {
        if name == "clock" && call.is_none() {
            // Without KVM, the guest has no host clock to set its own from.
            continue;
        }
        check(&facts).with_context(|| format!("clone {number}: {name}"))?;
    }
    Ok(())
}

#[test]
fn clones_get_their_own_identity_from_mmds_alone() -> Result<()> {
    if are_refused()? {
        return Ok(());
    }
    let (mut vm, _root) = original("auto")?;
    let snapshot = vm.snapshot()?;
    thread::sleep(Duration::from_millis(200));
    // A driver pushes the document once the VM runs.
    let mut clones = vec![];
    for number in 1..=3 {
        let mmds = Mmds::serving(document(number)).push(Push::AfterRequests(number));
        clones.push(snapshot.restore().mmds(mmds).start()?);
    }
    let mut uuids = HashSet::new();
    for (number, clone) in (1..).zip(&mut clones) {
        wait_restored(clone)?;
        goes_on(clone, &vm)?;
        is_its_own(clone, number, None)?;
        uuids.insert(exec(clone, "cat /proc/sys/kernel/random/uuid")?);
    }
    assert_eq!(uuids.len(), clones.len());
    clones.into_iter().try_for_each(end)
}

#[test]
fn clones_of_a_prepared_vm_stay_frozen_until_restored() -> Result<()> {
    if are_refused()? {
        return Ok(());
    }
    let (mut vm, _root) = original("host")?;
    let prepare = json!({"token": "a1", "timeout_ms": 30_000});
    let prepared = vm.api()?.post("/v1/snapshot/prepare", &prepare)?;
    let prepared = prepared.success()?.json()?;
    assert_eq!(prepared["token"], "a1", "{prepared}");
    let snapshot = vm.snapshot()?;
    thread::sleep(Duration::from_millis(200));
    let mut clones = vec![];
    for _ in 1..=3 {
        clones.push(snapshot.restore().start()?);
    }
    for (number, clone) in (1..).zip(&mut clones) {
        let mut api = clone.api()?;
        assert_eq!(
            api.get("/v1/status")?.success()?.json()?,
            json!({"ok": true})
        );
        let refused = api.post("/v1/exec", &json!({"cmd": ["true"]}))?;
        assert_eq!(refused.status, 409, "{refused}");
        assert!(!clone.console().contains("count "), "it runs already");
        let restore = json!({
            "token": "a1",
            "unix_us": now()?,
            "entropy": entropy(number),
            "config": document(number),
        });
        let begin = Instant::now();
        let restored = api.post("/v1/restore", &restore)?.success()?.json()?;
        let elapsed = restored["elapsed_us"].as_u64().context("no time")?;
        let call = begin
            .elapsed()
            .saturating_sub(Duration::from_micros(elapsed));
        assert_eq!(
            (&restored["generation"], &restored["reseeded"]),
            (&json!(2), &json!(true)),
            "{restored}"
        );
        let changed = restored["changed"].as_array().context("no list")?;
        for field in ["Hostname", "IPConfigs", "EtcHosts", "EtcResolv"] {
            assert!(changed.contains(&json!(field)), "{restored}");
        }
        goes_on(clone, &vm)?;
        is_its_own(clone, number, Some(call))?;
    }
    clones.into_iter().try_for_each(end)?;
    // The original continues, too.
    vm.resume()?;
    let cancel = json!({"token": "a1"});
    vm.api()?.post("/v1/snapshot/cancel", &cancel)?.success()?;
    let at = count(&vm)?;
    vm.wait_for(&format!("count {}", at + 5))?;
    Ok(())
}

#[test]
fn a_held_clone_without_mmds_stays_frozen_until_a_call() -> Result<()> {
    if are_refused()? {
        return Ok(());
    }
    let root = Image::ext4(&Tree::busybox()?, 32)?;
    let script = "n=0; while :; do n=$((n + 1)); echo count $n; sleep 0.05; done";
    let mut vm = Vm::builder()
        .restorable()
        .config(&guest::shell(script, json!({})))
        .memory_mib(128)
        .disk(&root)
        .start()?;
    vm.wait_for("count ")?;
    let prepare = json!({"token": "a1", "timeout_ms": 30_000});
    vm.api()?
        .post("/v1/snapshot/prepare", &prepare)?
        .success()?;
    let snapshot = vm.snapshot()?;
    let restored_by = |clone: &mut Vm, call: &str| -> Result<()> {
        clone.wait_for("without MMDS, only a call ends the hold a1")?;
        thread::sleep(Duration::from_secs(1));
        let console = clone.console();
        ensure!(!console.contains("count "), "it runs already:\n{console}");
        let response = clone.api()?.post(call, &json!({"token": "a1"}))?;
        let response = response.success()?.json()?;
        clone.wait_for("msg=\"restored\" generation=2")?;
        clone.wait_for("count ")?;
        // Without entropy from the call.
        ensure!(
            call != "/v1/restore" || response["reseeded"] == true,
            "{response}"
        );
        ensure!(exec(clone, "cat /run/pigeon/generation")? == "2\n");
        Ok(())
    };
    restored_by(&mut snapshot.restore().start()?, "/v1/restore")?;
    // The restore follows the hold. A later call is about the same one.
    let mut clone = snapshot.restore().start()?;
    restored_by(&mut clone, "/v1/snapshot/cancel")?;
    let claimed = clone.api()?.post("/v1/restore", &json!({}))?;
    let claimed = claimed.success()?.json()?;
    assert_eq!(
        (&claimed["generation"], &claimed["reseeded"]),
        (&json!(2), &json!(true)),
        "{claimed}"
    );

    // What the kernel reports within 5 s after a call's restore is about that one.
    vm.resume()?;
    let mut api = vm.api()?;
    let cancel = json!({"token": "a1"});
    api.post("/v1/snapshot/cancel", &cancel)?.success()?;
    let called: f64 = exec(&mut vm, "cut -d ' ' -f 1 /proc/uptime")?
        .trim()
        .parse()?;
    api.post("/v1/restore", &json!({}))?.success()?;
    let snapshot = vm.snapshot()?;
    vm.kill();
    let mut clone = snapshot.restore().start()?;
    let report = exec(
        &mut clone,
        "until dmesg | grep 'virtual machine fork' >/run/line; do sleep 0.1; done
        sleep 1; tr -d '[]' </run/line",
    )?;
    let reported = report.split_whitespace().next().context("no time")?;
    let time = reported.parse::<f64>()? - called;
    ensure!(time < 4.0, "this machine is too slow: {time} s");
    assert_eq!(exec(&mut clone, "cat /run/pigeon/generation")?, "2\n");
    Ok(())
}

/// The first identifiers of a clone, from complete lines.
fn uuids(vm: &Vm) -> Result<Vec<String>> {
    let deadline = Instant::now() + Duration::from_secs(180);
    loop {
        let console = vm.console();
        let uuids: Vec<_> = console
            .lines()
            .filter(|line| line.len() == 36 && line.matches('-').count() == 4)
            .take(3)
            .map(String::from)
            .collect();
        if uuids.len() == 3 {
            return Ok(uuids);
        }
        ensure!(Instant::now() < deadline, "no identifiers:\n{console}");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn clones_without_a_restore_share_random_numbers() -> Result<()> {
    if are_refused()? {
        return Ok(());
    }
    let root = Image::ext4(&Tree::busybox()?, 32)?;
    // It never sleeps: an idle guest's clock would run far ahead.
    let script = "while :; do
            cat /proc/sys/kernel/random/uuid; i=0; while [ $i -lt 3000 ]; do i=$((i + 1)); done
        done";
    let mut vm = Vm::builder()
        .restorable()
        .without_generation_id()
        .deterministic()
        .config(&guest::shell(script, json!({})))
        .memory_mib(128)
        .disk(&root)
        .start()?;
    vm.api()?.get("/v1/status")?.success()?;
    uuids(&vm)?;
    let snapshot = vm.snapshot()?;
    vm.kill();
    let mut identifiers = vec![];
    for _ in 0..2 {
        identifiers.push(uuids(&snapshot.restore().without_vsock().start()?)?);
    }
    assert_eq!(identifiers[0], identifiers[1]);

    // The calls arrive at different instants, which also makes a difference: so only the init's response
    // shows that the kernel was reseeded.
    let random_uuid = |number: usize| -> Result<String> {
        let mut clone = snapshot.restore().start()?;
        let restore = json!({"entropy": entropy(number)});
        let restored = clone.api()?.post("/v1/restore", &restore)?;
        let restored = restored.success()?.json()?;
        assert_eq!(restored["reseeded"], true, "{restored}");
        exec(&mut clone, "cat /proc/sys/kernel/random/uuid")
    };
    assert_ne!(random_uuid(1)?, random_uuid(2)?);
    Ok(())
}
