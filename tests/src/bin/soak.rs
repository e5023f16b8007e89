//! `./build.sh soak [MINUTES [BOOTS [CLONES]]]`: tests that take too long for `./build.sh test`. A root and a
//! volume are booted BOOTS times (50), a VM is snapshotted and cloned CLONES times (100), each from the clone
//! before, then a VM runs under mixed load for MINUTES (20); 0 skips a part.

use std::{
    collections::HashSet,
    env, fmt,
    os::unix::net::UnixStream,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, ensure};
use pigeon_lab::{
    End, Vm,
    disk::{Image, Tree},
    guest,
    http::Client,
    process::Slot,
    vsock,
};
use serde_json::json;

/// Other VMs may run at the same time.
const TIMEOUT: Duration = Duration::from_secs(120);

fn main() -> Result<()> {
    let mut numbers = env::args().skip(1).map(|number| number.parse());
    let minutes = numbers.next().unwrap_or(Ok(20))?;
    let cycles = numbers.next().unwrap_or(Ok(50))?;
    let clones = numbers.next().unwrap_or(Ok(100))?;
    // One slot for everything: otherwise other tests could take it between two VMs.
    let slot = Arc::new(Slot::acquire()?);
    if cycles > 0 {
        durability(cycles as usize, &slot).context("durability")?;
    }
    if clones > 0 {
        lineage(clones, &slot).context("lineage")?;
    }
    if minutes > 0 {
        soak(Duration::from_secs(60 * minutes), &slot).context("soak")?;
    }
    Ok(())
}

/// Data of each boot, synced or not, must be there after the shutdown, whatever caused it.
fn durability(cycles: usize, slot: &Arc<Slot>) -> Result<()> {
    let root = Image::ext4(&Tree::busybox()?, 32)?;
    let volume = Image::ext4(&Tree::empty()?, 16)?;
    let start = Instant::now();
    for cycle in 0..cycles {
        let script = format!(
            "for dir in /var /data; do
                echo {cycle} >>$dir/synced; sync; echo {cycle} >>$dir/written
                dd if=/dev/urandom of=$dir/noise bs=4k count=$((1 + {cycle} % 9 * 40)) 2>/dev/null
            done
            trap 'exit 3' TERM
            echo written; [ {kind} != 0 ] || exit 4; while :; do sleep 0.05; done",
            kind = cycle % 3
        );
        let mounts = json!({"Mounts": [{"DevicePath": "/dev/vdb", "MountPath": "/data"}]});
        let mut vm = Vm::builder()
            .in_slot(slot)
            .name("soak-durability")
            .config(&guest::shell(&script, mounts))
            .disk(&root)
            .disk(&volume)
            .timeout(TIMEOUT)
            .quiet()
            .boot()?;
        vm.wait_for("written")?;
        match cycle % 3 {
            1 => drop(
                vm.api()?
                    .post("/v1/signals", &json!({"signal": 9}))?
                    .success()?,
            ),
            2 => vm.stop()?,
            _ => {}
        }
        let code = vm
            .api()?
            .get("/v1/exit_code")
            .and_then(|response| response.json());
        let wanted = [4, 137, 3][cycle % 3];
        // A late client finds no API.
        ensure!(code.is_err() || code.is_ok_and(|code| code["code"] == wanted));
        ensure!(vm.wait_end()? == End::Reboot, "cycle {cycle}");
        let lines: String = (0..=cycle).map(|cycle| format!("{cycle}\n")).collect();
        for (image, dir) in [(&root, "/var"), (&volume, "")] {
            image.check().with_context(|| format!("cycle {cycle}"))?;
            for name in ["synced", "written"] {
                let found = image.read(&format!("{dir}/{name}"))?;
                ensure!(found == lines, "cycle {cycle}: {dir}/{name}: {found}");
            }
        }
    }
    println!(
        "{cycles} boots of the same disks in {:.0?}: clean, nothing lost",
        start.elapsed()
    );
    Ok(())
}

/// A VM is prepared, snapshotted and restored repeatedly: no data is lost, and each clone is unique.
fn lineage(clones: u64, slot: &Arc<Slot>) -> Result<()> {
    let root = Image::ext4(&Tree::busybox()?, 32)?;
    let script = "trap 'exit 3' TERM
        n=0; while :; do n=$((n + 1)); echo $n >>/var/lines; sleep 0.05; done";
    let mut vm = Vm::builder()
        .in_slot(slot)
        .name("soak-lineage")
        .restorable()
        .config(&guest::shell(script, json!({})))
        .arg("PIGEON_CGROUPS=unified")
        .arg("PIGEON_RESTORE=host")
        .memory_mib(128)
        .disk(&root)
        .timeout(TIMEOUT)
        .quiet()
        .start()?;
    let start = Instant::now();
    let mut uuids = HashSet::new();
    let [mut slowest_prepare, mut slowest_restore] = [0.0_f64; 2];
    for clone in 1..=clones {
        let token = format!("clone-{clone}");
        let prepare = json!({"token": token, "timeout_ms": 30_000});
        let prepared = vm.api()?.post("/v1/snapshot/prepare", &prepare)?;
        let prepared = prepared.success()?.json()?;
        let freeze = prepared["freeze_ms"].as_f64().context("no freeze_ms")?;
        slowest_prepare = slowest_prepare.max(freeze);
        let snapshot = vm.snapshot()?;
        vm.kill();
        vm = snapshot.restore().start()?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
        let restore = json!({
            "token": token,
            "unix_us": now.as_micros() as u64,
            "entropy": format!("{clone:064}"),
        });
        let restored = vm.api()?.post("/v1/restore", &restore)?;
        let restored = restored.success()?.json()?;
        ensure!(restored["generation"] == clone + 1, "{restored}");
        let elapsed = restored["elapsed_us"].as_f64().context("no elapsed_us")?;
        slowest_restore = slowest_restore.max(elapsed / 1e3);
        let uuid = json!({"cmd": ["cat", "/proc/sys/kernel/random/uuid"]});
        let response = vm.api()?.post("/v1/exec", &uuid)?.success()?.json()?;
        let uuid = response["stdout"].as_str().context("no text")?;
        ensure!(uuids.insert(uuid.to_string()), "{uuid} is not unique");
    }
    let took = start.elapsed();
    let mut api = vm.api()?;
    api.post("/v1/signals", &json!({"signal": 15}))?.success()?;
    ensure!(api.get("/v1/exit_code")?.success()?.json()?["code"] == 3);
    ensure!(vm.wait_end()? == End::Reboot);
    let root = vm.image(0)?;
    root.check()?;
    let lines = root.read("/var/lines")?;
    let numbers: Vec<u64> = lines.lines().map(str::parse).collect::<Result<_, _>>()?;
    ensure!(
        numbers.iter().copied().eq(1..=numbers.len() as u64),
        "a line is missing"
    );
    println!(
        "{clones} clones, each of the one before, in {took:.0?}: clean, nothing lost, the slowest \
         preparation froze in {slowest_prepare:.1} ms, the slowest restore took {slowest_restore:.1} ms"
    );
    Ok(())
}

/// Resources of PID 1, and its response time.
struct State {
    /// Pss and page tables, KiB.
    memory: u64,
    files: u64,
    zombies: u64,
    /// Of 500 calls.
    median: Duration,
    late: Duration,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let State {
            memory,
            files,
            zombies,
            median,
            late,
        } = self;
        write!(
            f,
            "{memory} KiB, {files} files, {zombies} zombies, status in {median:.2?}, 99 % in {late:.2?}"
        )
    }
}

fn state(vm: &mut Vm) -> Result<State> {
    let mut api = vm.api()?;
    let script =
        "awk '/^Pss:/ {print $2}' /proc/1/smaps_rollup; awk '/^VmPTE:/ {print $2}' /proc/1/status
        ls /proc/1/fd | wc -l; cat /proc/[0-9]*/stat 2>/dev/null | grep -c ') Z '; true";
    let response = api
        .post("/v1/exec", &json!({"cmd": ["sh", "-c", script]}))?
        .success()?
        .json()?;
    let text = response["stdout"].as_str().context("no text")?;
    let numbers: Vec<u64> = text.lines().map(str::parse).collect::<Result<_, _>>()?;
    let [pss, tables, files, zombies] = numbers[..] else {
        anyhow::bail!("{text}");
    };
    let mut times = vec![];
    for _ in 0..500 {
        let start = Instant::now();
        api.get("/v1/status")?.success()?;
        times.push(start.elapsed());
    }
    times.sort();
    Ok(State {
        memory: pss + tables,
        files,
        zombies,
        median: times[250],
        late: times[495],
    })
}

fn soak(time: Duration, slot: &Arc<Slot>) -> Result<()> {
    let root = Image::ext4(&Tree::busybox()?, 32)?;
    // Output at full speed, and orphans, while a file exists.
    let script = "while :; do
            if [ -e /run/busy ]; then seq 1 500; (for i in 1 2 3 4 5; do (sleep 0.0$i &); done) &
            else wait; sleep 0.1; fi
        done";
    let mut vm = Vm::builder()
        .in_slot(slot)
        .name("soak")
        .config(&guest::shell(script, json!({})))
        .disk(&root)
        .timeout(TIMEOUT)
        .quiet()
        .boot()?;
    vm.wait_for("workload started")?;
    let socket = vm.vsock().context("no vsock")?.to_owned();
    // A listener with a full backlog refuses connections, like a missing one.
    let refused = AtomicU64::new(0);
    let connect = || -> Result<Client<UnixStream>> {
        let start = Instant::now();
        let stream = loop {
            match vsock::connect(&socket, vsock::API_PORT, TIMEOUT) {
                Ok(stream) => break stream,
                Err(error) if start.elapsed() > TIMEOUT => return Err(error.into()),
                Err(_) => refused.fetch_add(1, Ordering::Relaxed),
            };
            thread::sleep(Duration::from_millis(10));
        };
        stream.set_read_timeout(Some(TIMEOUT))?;
        Ok(Client::new(stream))
    };
    let busy = |vm: &mut Vm, command: &[&str]| -> Result<()> {
        let body = json!({"cmd": command});
        vm.api()?.post("/v1/exec", &body)?.success().map(drop)
    };
    let (stop, calls) = (AtomicBool::new(false), AtomicU64::new(0));
    let load = |round: &(dyn Fn() -> Result<()> + Sync)| -> Result<()> {
        while !stop.load(Ordering::Relaxed) {
            round()?;
            calls.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    };
    let status = || -> Result<()> {
        let mut api = connect()?;
        for _ in 0..20 {
            api.get("/v1/status")?.success()?;
        }
        Ok(())
    };
    let exec = || -> Result<()> {
        let body = json!({"cmd": ["sh", "-c", "head -c 100000 /dev/zero; (sleep 0.1 &)"]});
        let response = connect()?.post("/v1/exec", &body)?.success()?.json()?;
        ensure!(response["exit_code"] == 0, "{response}");
        Ok(())
    };
    // A client that disconnects while its command runs, and while it waits.
    let vanish = || -> Result<()> {
        let body = r#"{"cmd":["sleep","1000"]}"#;
        let head = format!(
            "POST /v1/exec HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        connect()?.send((head + body).as_bytes())?;
        connect()?.send(b"GET /v1/exit_code HTTP/1.1\r\nHost: x\r\n\r\n")?;
        connect()?.send(b"POST /v1/exec HTTP/1.1\r\nContent-Le")?;
        thread::sleep(Duration::from_millis(20));
        Ok(())
    };
    let round = |vm: &mut Vm, time: Duration| -> Result<State> {
        stop.store(false, Ordering::Relaxed);
        busy(vm, &["touch", "/run/busy"])?;
        thread::scope(|scope| {
            let rounds: [&(dyn Fn() -> Result<()> + Sync); 3] = [&status, &exec, &vanish];
            let loads = rounds.map(|round| scope.spawn(|| load(round)));
            let start = Instant::now();
            while start.elapsed() < time && !loads.iter().any(|load| load.is_finished()) {
                thread::sleep(Duration::from_millis(200));
            }
            stop.store(true, Ordering::Relaxed);
            loads
                .into_iter()
                .try_for_each(|load| load.join().expect("no panic"))
        })?;
        busy(vm, &["rm", "/run/busy"])?;
        // Until the console has the last output, and the guest has seen the last connection close.
        thread::sleep(Duration::from_secs(10));
        state(vm)
    };
    // Uses everything once, then again and again.
    let before = round(&mut vm, Duration::from_secs(20).min(time))?;
    println!("before: {before}");
    let mut after = round(&mut vm, time)?;
    // Other load on this machine may make calls slower for a while, but a fault does so forever.
    for _ in 0..30 {
        if after.median <= before.median * 2 {
            break;
        }
        println!("status in {:?}: once more", after.median);
        thread::sleep(Duration::from_secs(10));
        after = state(&mut vm)?;
    }
    println!(
        "after {time:?}, {} rounds of calls, {} connections refused: {after}",
        calls.load(Ordering::Relaxed),
        refused.load(Ordering::Relaxed)
    );
    ensure!(after.memory <= before.memory + 16, "memory has grown");
    ensure!(after.files <= before.files, "files stay open");
    ensure!(after.zombies == 0, "zombies stay");
    ensure!(
        after.median <= before.median * 2,
        "calls have become slower"
    );
    vm.api()?
        .post("/v1/signals", &json!({"signal": 9}))?
        .success()?;
    ensure!(vm.wait_end()? == End::Reboot);
    root.check()
}
