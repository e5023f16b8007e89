//! `GET /v1/sysinfo` compared with the guest's /proc.

use std::{
    collections::BTreeSet,
    os::unix::net::UnixStream,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use pigeon_lab::{
    Vm, assets,
    disk::{Image, Tree},
    http::Client,
};
use serde_json::{Value, json};

type Api = Client<UnixStream>;

/// Long, as other VMs may run at the same time.
const TIMEOUT: Duration = Duration::from_secs(180);

/// Counters of each list, without a disk's requests in progress, which may decrease.
const DISK: [&str; 10] = [
    "reads_completed",
    "reads_merged",
    "sectors_read",
    "time_reading",
    "writes_completed",
    "writes_merged",
    "sectors_written",
    "time_writing",
    "time_io",
    "time_io_weighted",
];
const NET: [&str; 16] = [
    "recv_bytes",
    "recv_packets",
    "recv_errs",
    "recv_drop",
    "recv_fifo",
    "recv_frame",
    "recv_compressed",
    "recv_multicast",
    "sent_bytes",
    "sent_packets",
    "sent_errs",
    "sent_drop",
    "sent_fifo",
    "sent_colls",
    "sent_carrier",
    "sent_compressed",
];
const CPU: [&str; 10] = [
    "user",
    "nice",
    "system",
    "idle",
    "iowait",
    "irq",
    "softirq",
    "steal",
    "guest",
    "guest_nice",
];
const MEMORY: [(&str, &str); 17] = [
    ("mem_total", "MemTotal"),
    ("mem_free", "MemFree"),
    ("mem_available", "MemAvailable"),
    ("buffers", "Buffers"),
    ("cached", "Cached"),
    ("swap_cached", "SwapCached"),
    ("active", "Active"),
    ("inactive", "Inactive"),
    ("swap_total", "SwapTotal"),
    ("swap_free", "SwapFree"),
    ("dirty", "Dirty"),
    ("writeback", "Writeback"),
    ("slab", "Slab"),
    ("shmem", "Shmem"),
    ("vmalloc_total", "VmallocTotal"),
    ("vmalloc_used", "VmallocUsed"),
    ("vmalloc_chunk", "VmallocChunk"),
];

fn shell(api: &mut Api, script: &str) -> Result<String> {
    let body = json!({"cmd": ["sh", "-c", script], "timeout_ms": 120_000});
    let response = api.post("/v1/exec", &body)?.success()?.json()?;
    ensure!(response["exit_code"] == 0, "{script}: {response}");
    Ok(response["stdout"].as_str().context("no text")?.into())
}

fn sysinfo(api: &mut Api) -> Result<Value> {
    api.get("/v1/sysinfo")?.success()?.json()
}

fn keys(object: &Value) -> BTreeSet<String> {
    let object = object.as_object().expect("an object");
    object.keys().cloned().collect()
}

fn set<'a>(names: impl IntoIterator<Item = &'a str>) -> BTreeSet<String> {
    names.into_iter().map(String::from).collect()
}

fn number(value: &Value) -> f64 {
    value
        .as_f64()
        .unwrap_or_else(|| panic!("{value} is no number"))
}

/// The numbers after a name on its line.
fn behind(text: &str, name: &str) -> Result<Vec<f64>> {
    let line = text.lines().find_map(|line| {
        let at = line.split_whitespace().position(|word| word == name)?;
        Some(line.split_whitespace().skip(at + 1))
    });
    let words = line.with_context(|| format!("no {name} in {text}"))?;
    Ok(words.filter_map(|word| word.parse().ok()).collect())
}

#[test]
fn sysinfo_matches_proc_in_the_shape_of_flys() -> Result<()> {
    let tree = Tree::busybox()?.file("/bin/wire", 0o755, assets::guest_program("wire")?)?;
    let root = Image::ext4(&tree, 48)?;
    let volume = Image::ext4(&Tree::empty()?, 16)?;
    let config = json!({
        "ExecOverride": ["/bin/sleep", "100000"],
        "Mounts": [{"DevicePath": "/dev/vdb", "MountPath": "/data"}],
    });
    let mut vm = Vm::builder()
        .config(&config)
        .disk(&root)
        .disk(&volume)
        .nic()
        .cpus(2)
        .timeout(TIMEOUT)
        .start()?;
    let mut api = vm.api()?;

    // /proc is read between two responses: each counter must lie between theirs.
    shell(
        &mut api,
        "head -c 300000 /dev/zero >/data/file; sync; echo 3 >/proc/sys/vm/drop_caches; cat /data/file",
    )?;
    let before = sysinfo(&mut api)?;
    let text = |api: &mut Api, file: &str| shell(api, &format!("cat /proc/{file}"));
    let stat = text(&mut api, "stat")?;
    let diskstats = text(&mut api, "diskstats")?;
    let net = text(&mut api, "net/dev")?.replace(':', " ");
    let meminfo = text(&mut api, "meminfo")?.replace(':', " ");
    let files: Vec<f64> = text(&mut api, "sys/fs/file-nr")?
        .split_whitespace()
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    let after = sysinfo(&mut api)?;
    println!("{after}");
    let members = ["memory", "load_average", "filefd", "cpus", "disks", "net"];
    assert_eq!(keys(&after), set(members));

    let within = |name: &str, low: &Value, real: f64, high: &Value| {
        let (low, high) = (number(low), number(high));
        assert!(low <= real && real <= high, "{name}: {low} {real} {high}");
    };
    assert_eq!(keys(&after["cpus"]), set(["0", "1"]));
    for cpu in ["0", "1"] {
        let real = behind(&stat, &format!("cpu{cpu}"))?;
        assert_eq!(keys(&after["cpus"][cpu]), set(CPU));
        for (name, ticks) in CPU.iter().zip(real) {
            let of = |info: &Value| info["cpus"][cpu][name].clone();
            // Idle time is computed at each read, and may decrease by a tick (proc_stat(5)).
            if !["idle", "iowait"].contains(name) {
                within(name, &of(&before), ticks / 100.0, &of(&after));
            }
        }
        assert!(number(&after["cpus"][cpu]["idle"]) > 0.0);
    }
    for (list, file, names, devices) in [
        ("disks", &diskstats, &DISK[..], &["vda", "vdb"][..]),
        ("net", &net, &NET[..], &["eth0"][..]),
    ] {
        let mut all = set(names.iter().copied());
        all.insert("name".into());
        if list == "disks" {
            all.insert("io_in_progress".into());
        }
        let found: Vec<_> = after[list].as_array().context("a list")?.iter().collect();
        let named: Vec<_> = found.iter().map(|device| device["name"].as_str()).collect();
        assert_eq!(
            named,
            devices.iter().map(|name| Some(*name)).collect::<Vec<_>>()
        );
        for (at, device) in devices.iter().enumerate() {
            let real = behind(file, device)?;
            assert_eq!(keys(found[at]), all);
            for (number, name) in names.iter().enumerate() {
                // The number of requests in progress is in between.
                let place = number + usize::from(list == "disks" && number >= 8);
                within(
                    name,
                    &before[list][at][*name],
                    real[place],
                    &after[list][at][*name],
                );
            }
        }
    }
    assert!(
        number(&after["disks"][1]["sectors_written"]) >= 600.0,
        "{after}"
    );
    assert_eq!(keys(&after["memory"]), set(MEMORY.map(|(name, _)| name)));
    for (name, real) in MEMORY {
        let real = behind(&meminfo, real)?[0] * 1024.0;
        let reported = number(&after["memory"][name]);
        // Free memory changes with each command.
        let slack = if name == "mem_total" || name.starts_with("swap") || name == "vmalloc_total" {
            0.0
        } else {
            16e6
        };
        assert!(
            (reported - real).abs() <= slack,
            "{name}: {reported} {real}"
        );
    }
    assert!(number(&after["memory"]["mem_total"]) > 200e6);
    assert_eq!(keys(&after["filefd"]), set(["allocated", "maximum"]));
    assert_eq!(after["filefd"]["maximum"].as_f64(), Some(files[2]));
    assert!((number(&after["filefd"]["allocated"]) - files[0]).abs() <= 100.0);
    // The kernel updates it every five seconds.
    let mut tries = 0..5;
    while {
        let reported = sysinfo(&mut api)?["load_average"].to_string();
        let real = text(&mut api, "loadavg")?;
        let real: Vec<f64> = real
            .split(' ')
            .take(3)
            .map(str::parse)
            .collect::<Result<_, _>>()?;
        let real = json!(real).to_string();
        reported != real
    } {
        ensure!(tries.next().is_some(), "the load is another");
    }

    // Under load, and with /proc hidden from all other processes.
    let user =
        |info: &Value| number(&info["cpus"]["0"]["user"]) + number(&info["cpus"]["1"]["user"]);
    let idle = sysinfo(&mut api)?;
    shell(
        &mut api,
        "for i in 1 2; do timeout 4 sh -c 'while :; do :; done' & done; sleep 5",
    )?;
    shell(&mut api, "mount -t tmpfs none /proc")?;
    let busy = sysinfo(&mut api)?;
    assert!(user(&busy) - user(&idle) > 1.5, "{idle} {busy}");
    shell(&mut api, "umount /proc")?;

    // Many requests on one connection, including HEAD.
    for _ in 0..100 {
        let head = api.request("HEAD", "/v1/sysinfo", &[], b"")?;
        assert_eq!((head.status, head.body.len()), (200, 0));
        let response = api.get("/v1/sysinfo")?;
        assert_eq!(response.header("content-type"), Some("application/json"));
        assert_eq!(response.header("connection"), None);
    }
    let wrong = api.post("/v1/sysinfo", &json!({}))?;
    assert_eq!(
        (wrong.status, wrong.header("allow")),
        (405, Some("GET, HEAD"))
    );

    // A child that is stopped times out, and does not delay others.
    shell(&mut api, "(setsid wire stop >/dev/null 2>&1 &)")?;
    thread::sleep(Duration::from_millis(1500));
    let mut other = vm.api()?;
    let mut tries = 0..50;
    let response = loop {
        api.send(b"GET /v1/sysinfo HTTP/1.1\r\nHost: x\r\n\r\n")?;
        assert_eq!(other.get("/v1/status")?.status, 200);
        let response = api.receive(false)?;
        // It finished before it was stopped.
        if response.status != 200 || tries.next().is_none() {
            break response;
        }
    };
    assert_eq!(
        (response.status, response.text()),
        (504, r#"{"error":"/proc does not answer"}"#.into())
    );
    // Until `wire stop` exits, the command that counts processes may be stopped, too.
    let start = Instant::now();
    let count = json!({"cmd": ["sh", "-c", "ps -o args | grep -c '^/init'"], "timeout_ms": 5000});
    let response = loop {
        let response = api.post("/v1/exec", &count)?.success()?.json()?;
        if response["exit_code"] != -1 {
            break response;
        }
        ensure!(start.elapsed() < TIMEOUT, "the processes are still stopped");
    };
    assert_eq!(response["stdout"], "1\n");
    assert_eq!(api.get("/v1/sysinfo")?.status, 200);
    Ok(())
}
