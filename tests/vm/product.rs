//! The results of the build, without a VM: they are reproducible, and the program checks configurations on
//! the host.

use std::{
    fs,
    os::unix::fs::symlink,
    process::{Command, Output},
};

use anyhow::{Context, Result};
use pigeon_lab::{assets, process};
use serde_json::{Value, json};

fn init(arguments: &[&str]) -> Result<Output> {
    let init = assets::build_dir().join("init");
    Ok(assets::run_here(&init)?
        .args(arguments)
        .env_clear()
        .output()?)
}

/// `--check` of a document: exit code, stdout and stderr.
fn check(document: impl AsRef<[u8]>) -> Result<(Option<i32>, String, String)> {
    let file = tempfile::NamedTempFile::new()?;
    fs::write(file.path(), document)?;
    let output = init(&["--check", file.path().to_str().expect("UTF-8")])?;
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    Ok((
        output.status.code(),
        text(&output.stdout),
        text(&output.stderr),
    ))
}

/// The document is rejected with one line that contains all these words.
fn assert_refused(document: impl AsRef<[u8]>, words: &[&str]) -> Result<()> {
    let (code, printed, error) = check(document)?;
    assert_eq!(
        (code, printed.as_str()),
        (Some(1), ""),
        "{words:?}: {error}"
    );
    assert_eq!(error.lines().count(), 1, "{error}");
    for word in words {
        assert!(error.contains(word), "no {word:?} in {error}");
    }
    Ok(())
}

/// A valid document, with the fields of `rest`.
fn with(rest: Value) -> String {
    let mut document = rest;
    document["ImageConfig"] = match document["ImageConfig"].take() {
        Value::Null => json!({"Entrypoint": ["/bin/app"]}),
        given => given,
    };
    document.to_string()
}

#[test]
fn a_build_in_another_directory_is_identical() -> Result<()> {
    let place = tempfile::Builder::new()
        .prefix("another place ")
        .tempdir()?;
    let inputs = [
        "Cargo.toml",
        "Cargo.lock",
        "build.sh",
        "rust-toolchain.toml",
        "src",
        "vendor-config",
        "vendor",
    ];
    for name in inputs {
        let original = assets::repository().join(name);
        if original.exists() {
            let copy = place.path().join(name);
            process::run(Command::new("cp").arg("-r").args([&original, &copy]))?;
        }
    }
    // Cargo reads the members of the workspace, but only builds the init.
    symlink(
        assets::repository().join("tests"),
        place.path().join("tests"),
    )?;
    let script = place.path().join("build.sh");
    process::run(
        Command::new(&script)
            .args(["initrd", "--arch", assets::arch().name()])
            .args(assets::is_minimal().then_some("--minimal"))
            .env_remove("CARGO_TARGET_DIR"),
    )?;
    for name in ["init", "initrd.cpio"] {
        let built = assets::build_dir().join(name);
        let below = built.strip_prefix(assets::repository())?;
        let same = fs::read(place.path().join(below))? == fs::read(&built)?;
        assert!(same, "{name} differs: is build/ that of this source?");
    }
    Ok(())
}

#[test]
fn the_lab_has_the_features_of_the_init() -> Result<()> {
    let features = |manifest: &str| {
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
        cargo.args(["metadata", "--no-deps", "--offline", "--format-version=1"]);
        cargo.arg("--manifest-path");
        let metadata = process::run(cargo.arg(assets::repository().join(manifest)))?;
        let metadata: Value = serde_json::from_str(&metadata)?;
        anyhow::Ok(metadata["packages"][0]["features"].clone())
    };
    let of_the_init = features("Cargo.toml")?;
    assert!(
        of_the_init["default"]
            .as_array()
            .is_some_and(|all| !all.is_empty())
    );
    let mut of_the_lab = features("tests/Cargo.toml")?;
    // Its own feature: tests that need a whole Debian.
    let own = of_the_lab.as_object_mut().context("no features")?;
    own.remove("containers").context("no containers")?;
    assert_eq!(of_the_init, of_the_lab);
    Ok(())
}

#[test]
fn when_not_pid_1_it_only_has_version_help_and_check() -> Result<()> {
    let version = init(&["--version"])?;
    let text = String::from_utf8(version.stdout)?;
    assert!(
        version.status.success() && text.starts_with("pigeon-init ") && text.lines().count() == 1,
        "{text}"
    );
    let help = init(&["--help"])?;
    let text = String::from_utf8(help.stdout)?;
    assert!(help.status.success(), "{text}");
    for word in [
        "--check",
        "--version",
        "PIGEON_CONFIG",
        "PIGEON_MMDS_TIMEOUT_MS",
        "PIGEON_EXIT_LINGER_MS",
        "INIT_LOG_LEVEL",
    ] {
        assert!(text.contains(word), "{text}");
    }
    for wrong in [&[][..], &["--check"], &["--wrong"], &["--check", "a", "b"]] {
        let output = init(wrong)?;
        assert!(
            !output.status.success() && !output.stderr.is_empty() && output.stdout.is_empty(),
            "{wrong:?}"
        );
    }
    Ok(())
}

#[test]
fn check_prints_what_the_example_would_run() -> Result<()> {
    let (code, printed, error) = check(include_bytes!("../example/run.json"))?;
    assert_eq!((code, error.as_str()), (Some(0), ""));
    for words in [
        "\"/bin/myapp\"",
        "\"--port\"",
        "\"8080\"",
        "\"PATH=/usr/local/bin:/usr/bin:/bin\"",
        "\"DATABASE_URL=postgres://...\"",
        "user: nobody",
        "/app",
        "/dev/vda",
        "/dev/vdb on /data",
        "10.0.0.2/24",
        "169.254.0.1",
        "my-app-abcdef",
        "8.8.8.8",
        "my-app.internal",
    ] {
        assert!(printed.contains(words), "no {words} in {printed}");
    }
    // Of any length.
    let script = "echo \"\u{1f426}\u{1}\"\n".repeat(1000);
    let (_, printed, _) = check(json!({"ExecOverride": ["sh", script]}).to_string())?;
    let line = format!("argv: {}\n", json!(script));
    assert!(printed.contains(&line), "{printed}");
    Ok(())
}

#[test]
fn check_refuses_what_a_boot_refuses_and_names_the_field() -> Result<()> {
    assert_refused(with(json!({"MTU": "1500"})), &["MTU"])?;
    assert_refused(with(json!({"MTU": 1500.5})), &["MTU"])?;
    assert_refused(with(json!({"Hostname": {}})), &["Hostname"])?;
    assert_refused(
        with(json!({"Hostname": "x".repeat(65)})),
        &["Hostname", "64"],
    )?;
    assert_refused(with(json!({"ExtraEnv": ["A=1"]})), &["ExtraEnv"])?;
    assert_refused(with(json!({"ExecOverride": "/bin/sh"})), &["ExecOverride"])?;
    assert_refused(
        with(json!({"ImageConfig": {"Entrypoint": ["a", 7]}})),
        &["ImageConfig.Entrypoint", "1"],
    )?;
    assert_refused(
        with(json!({"IPConfigs": [{"IP": "10.0.0.2", "Mask": 33}]})),
        &["IPConfigs[0]", "Mask"],
    )?;
    assert_refused(
        with(json!({"IPConfigs": [{"IP": "10.0.0", "Mask": 8}]})),
        &["IPConfigs[0]", "IP", "10.0.0"],
    )?;
    assert_refused(
        with(json!({"IPConfigs": [{"IP": "10.0.0.2", "Mask": 8, "Gateway": "fd00::1"}]})),
        &["IPConfigs[0]", "Gateway", "family"],
    )?;
    assert_refused(
        with(json!({"Mounts": [{"DevicePath": "/dev/vdb"}]})),
        &["Mounts[0]", "MountPath"],
    )?;
    assert_refused(
        with(json!({"Mounts": [{"DevicePath": "/dev/vdb", "MountPath": "data"}]})),
        &["MountPath"],
    )?;
    assert_refused(
        with(json!({"EtcHosts": [{"Host": "a b", "IP": "10.0.0.1"}]})),
        &["EtcHosts[0]", "Host"],
    )?;
    assert_refused(
        with(json!({"EtcResolv": {"Nameservers": ["dns"]}})),
        &["Nameservers", "dns"],
    )?;
    assert_refused(
        with(json!({"ImageConfig": {"Entrypoint": ["a\u{0}b"]}})),
        &["Entrypoint"],
    )?;
    assert_refused("{}", &["nothing to run"])?;
    let missing = init(&["--check", "/nonexistent/run.json"])?;
    assert_eq!(missing.status.code(), Some(1));
    assert!(String::from_utf8(missing.stderr)?.contains("/nonexistent/run.json: no such file"));
    Ok(())
}

#[test]
fn check_refuses_invalid_json_of_any_depth_or_size() -> Result<()> {
    for wrong in [
        "",
        " ",
        "[]",
        "null",
        "{",
        "{\"ExecOverride\":[\"a\"]}}",
        "{\"ExecOverride\":[\"a\",]}",
        "{'a':1}",
    ] {
        assert_refused(wrong, &[])?;
    }
    for scalar in ["tru", "01", "1.", "+1", "nul", "\"\\x\"", "\"\u{1}\""] {
        assert_refused(
            format!("{{\"ExecOverride\":[\"a\"],\"Foreign\":{scalar}}}"),
            &[],
        )?;
    }
    assert_refused(b"{\"ExecOverride\":[\"a\"],\"Foreign\":\"\xff\"}", &[])?;
    let deep = |levels: usize| {
        let value = "[".repeat(levels) + &"]".repeat(levels);
        format!("{{\"ExecOverride\":[\"a\"],\"Foreign\":{value}}}")
    };
    assert_eq!(check(deep(63))?.0, Some(0));
    assert_refused(deep(64), &["64"])?;
    assert_refused("[".repeat(1 << 20), &[])?;
    assert_refused(format!("{{\"Foreign\":{}", "[".repeat(1_000_000)), &["64"])?;
    let filled = |size: usize| {
        let head = "{\"ExecOverride\":[\"a\"],\"Foreign\":\"";
        format!("{head}{}\"}}", "x".repeat(size - head.len() - 2))
    };
    assert_eq!(check(filled(1 << 20))?.0, Some(0));
    assert_refused(filled((1 << 20) + 1), &["1048576"])
}

#[test]
fn check_accepts_the_documented_limits_and_names_an_exceeded_one() -> Result<()> {
    let list =
        |count: usize, item: &dyn Fn(usize) -> Value| -> Value { (0..count).map(item).collect() };
    let word = |n: usize| json!(format!("A{n}=1"));
    let address = |n: usize| json!({"IP": format!("10.0.{n}.1"), "Mask": 24});
    let mount = |n: usize| json!({"DevicePath": "/dev/vdb", "MountPath": format!("/m{n}")});
    let host = |n: usize| json!({"Host": format!("h{n}"), "IP": "10.0.0.1"});
    let build = |name: &str, count: usize| match name {
        "ExecOverride" => with(json!({"ExecOverride": list(count, &word)})),
        "Env" => with(json!({"ImageConfig": {"Entrypoint": ["a"], "Env": list(count, &word)}})),
        "ExtraEnv" => {
            let map: serde_json::Map<_, _> =
                (0..count).map(|n| (format!("A{n}"), json!("1"))).collect();
            with(json!({"ExtraEnv": map}))
        }
        "IPConfigs" => with(json!({"IPConfigs": list(count, &address)})),
        "Mounts" => with(json!({"Mounts": list(count, &mount)})),
        _ => with(json!({"EtcHosts": list(count, &host)})),
    };
    for (name, promised) in [
        ("ExecOverride", 1024),
        ("Env", 4096),
        ("ExtraEnv", 4096),
        ("IPConfigs", 64),
        ("Mounts", 64),
        ("EtcHosts", 256),
    ] {
        let (code, _, error) = check(build(name, promised))?;
        assert_eq!((code, error.as_str()), (Some(0), ""), "{name}");
        let limit = promised.to_string();
        assert_refused(build(name, promised + 1), &[name, &limit])?;
    }
    Ok(())
}
