//! Images made by buildah and umoci, in all formats that they and skopeo write, including the workload's
//! output.

mod common;

use std::{
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use common::{Place, busybox_layer, check, listing::of_ext4, owner};
use pigeon::{assets::tool, process::run};
use serde_json::{Value, json};

/// Two layers made by buildah, the upper of which removes a file of the lower one, in the formats that
/// buildah writes. `$1` is the architecture.
const BUILDAH: &str = r#"set -eu
b() { buildah --storage-driver vfs --root "$PWD/store" --runroot "$PWD/run" "$@"; }
lower=$(b from scratch)
b config --arch "$1" "$lower"
b add -q "$lower" base.tar /
b commit -q --signature-policy policy.json "$lower" lower
upper=$(b from --pull-never --signature-policy policy.json lower)
root=$(b mount "$upper")
rm "$root/bin/vi"
mkdir -p "$root/srv/www"
echo served >"$root/srv/www/index.html"
ln "$root/srv/www/index.html" "$root/srv/again"
ln -s www/index.html "$root/srv/link"
chmod 2750 "$root/srv/www"
chown -R 1000:1000 "$root/srv"
mkfifo -m 600 "$root/srv/fifo"
b unmount "$upper"
b config --entrypoint '["/bin/sh","-c","echo $WORD $0 $1 as $(id -un) in $(pwd): $(cat again)"]' \
    --cmd 'to all' --env WORD=hello --env PATH=/bin --user app --workingdir /srv --port 8080/tcp --volume /data \
    --stop-signal INT "$upper"
b commit -q --signature-policy policy.json "$upper" app
push() { b push -q --signature-policy policy.json "$@"; }
push app oci-archive:app.oci:app:latest
push app docker-archive:app.docker:app:latest
push app oci:layout:latest
push app dir:dir
push --compression-format zstd app oci:zstd:latest
push --disable-compression app oci:plain:latest
push --format v2s2 app dir:schema2
b rm -a >/dev/null
b rmi -a -f >/dev/null
rm -rf store run
"#;

/// Copies of the image made by skopeo.
const SKOPEO: &str = r#"set -eu
copy() { skopeo --insecure-policy copy -q "$@"; }
copy --dest-compress-format zstd oci:layout:latest oci:copied-zstd:latest
copy --dest-compress-format zstd:chunked docker-archive:app.docker oci-archive:chunked.oci:app
copy --dest-compress --dest-compress-format zstd oci:layout:latest dir:dir-zstd
copy --dest-decompress oci:layout:latest dir:dir-plain
copy oci-archive:app.oci docker-archive:copied.docker:app:latest
copy dir:schema2 oci-archive:copied.oci:app
copy --format v2s1 oci:layout:latest dir:schema1
cp -r layout tagged
copy docker-archive:app.docker oci:tagged:other
gzip -c app.docker >app.docker.gz
zstd -q -o app.oci.zst app.oci
xz -c app.docker >app.docker.xz
"#;

/// An image made only by umoci: unpacked, changed and packed again. `$1` is the architecture.
const UMOCI: &str = r#"set -eu
rootless=
[ "$(id -u)" = 0 ] || rootless=--rootless
umoci init --layout made
umoci new --image made:app
umoci unpack $rootless --image made:app bundle
tar -xf base.tar -C bundle/rootfs
umoci repack --image made:app bundle
umoci config --image made:app --architecture "$1" --os linux --config.entrypoint /bin/echo \
    --config.cmd made --config.cmd here --config.env PATH=/bin
rm -rf bundle
"#;

fn shell(place: &Place, script: &str) {
    let mut shell = match rustix::process::geteuid().is_root() {
        true => Command::new("sh"),
        // Files are owned by ids of a user namespace.
        false => {
            let mut buildah = Command::new(tool("buildah").unwrap());
            buildah.args(["unshare", "sh"]);
            buildah
        }
    };
    shell.args(["-c", script, "sh", common::arch().debian_name()]);
    run(shell.current_dir(place.0.path())).unwrap();
}

fn pigeon(place: &Place, words: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pigeon"));
    command
        .args(words)
        .current_dir(place.0.path())
        .env("XDG_RUNTIME_DIR", place.0.path())
        .env("XDG_STATE_HOME", place.0.path())
        .stdin(Stdio::null());
    command.output().unwrap()
}

/// Makes an image of `source`. Returns it, its configuration, and the reported form of the source.
fn make(place: &Place, source: &str, options: &[&str]) -> (PathBuf, Value, String) {
    let image = format!("{source}.ext4");
    let words = [&["rootfs", "--json"], options, &[source, &image]].concat();
    let made = pigeon(place, &words);
    assert!(made.status.success(), "{source}: {made:?}");
    let made: Value = serde_json::from_slice(&made.stdout).unwrap();
    assert_eq!(made["warnings"], json!([]), "{source}");
    let form = made["form"].as_str().unwrap().to_string();
    let image = place.path(&image);
    check(&image);
    (image, made["image_config"].clone(), form)
}

/// The output of an image's workload.
fn output_of(place: &Place, image: &Path) -> String {
    let words = ["run", "-q", "--rm", "-m", "128", image.to_str().unwrap()];
    let output = pigeon(place, &words);
    assert!(output.status.success(), "{image:?}: {output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{image:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn images_of_buildah_and_skopeo_boot_from_every_format() {
    let place = Place::new();
    place.write("base.tar", busybox_layer(common::arch()));
    let policy = r#"{"default": [{"type": "insecureAcceptAnything"}]}"#;
    place.write("policy.json", policy);
    shell(&place, BUILDAH);
    shell(&place, SKOPEO);
    let (first, config, _) = make(&place, "layout", &[]);
    let expected = json!({
        "Entrypoint": [
            "/bin/sh",
            "-c",
            "echo $WORD $0 $1 as $(id -un) in $(pwd): $(cat again)",
        ],
        "Cmd": ["to", "all"],
        "Env": ["WORD=hello", "PATH=/bin"],
        "ExposedPorts": {"8080/tcp": {}},
        "StopSignal": "INT",
        "User": "app",
        "Volumes": {"/data": {}},
        "WorkingDir": "/srv",
    });
    let sorted = |config: &Value| {
        let mut config = config.clone();
        let variables = config["Env"].as_array_mut().unwrap();
        variables.sort_by_key(Value::to_string);
        config
    };
    assert_eq!(sorted(&config), sorted(&expected));
    for (path, mode) in [
        ("/srv/www", "02750 1000 1000"),
        ("/srv/again", "0644 1000 1000"),
        ("/bin/sh", "0777 0 0"),
        ("/bin/vi", ""),
    ] {
        assert_eq!(owner(&first, path), mode, "{path}");
    }
    let paths = ["srv/www/index.html", "srv/link", "srv/fifo", "etc/passwd"].map(PathBuf::from);
    let files = |image: &Path| of_ext4(image, paths.iter());
    let (listed, inodes) = files(&first);
    assert_eq!(listed[&paths[0]].links, 2);

    for (source, expected_form, options) in [
        ("layout", "OCI image", &["-f"][..]),
        ("zstd", "OCI image", &[]),
        ("plain", "OCI image", &[]),
        ("copied-zstd", "OCI image", &[]),
        // Two names of the same image are not ambiguous; two images are.
        ("tagged", "OCI image", &["--tag", "other"]),
        ("app.oci", "OCI image", &[]),
        ("chunked.oci", "OCI image", &[]),
        ("copied.oci", "OCI image", &[]),
        ("app.oci.zst", "OCI image", &[]),
        ("app.docker", "docker save archive", &[]),
        ("copied.docker", "docker save archive", &[]),
        ("app.docker.gz", "docker save archive", &[]),
        ("app.docker.xz", "docker save archive", &[]),
        ("dir", "skopeo directory", &[]),
        ("schema2", "skopeo directory", &[]),
        ("dir-zstd", "skopeo directory", &[]),
        ("dir-plain", "skopeo directory", &[]),
    ] {
        let (image, found, form) = make(&place, source, options);
        assert_eq!(
            (form.as_str(), &found),
            (expected_form, &config),
            "{source}"
        );
        assert_eq!(files(&image), (listed.clone(), inodes), "{source}");
        let output = output_of(&place, &image);
        assert_eq!(output, "hello to all as app in /srv: served\n", "{source}");
    }
    let refused = pigeon(&place, &["rootfs", "schema1", "old.ext4"]);
    let stderr = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(stderr.contains("`skopeo copy --format v2s2`"), "{stderr}");
}

#[test]
fn images_of_umoci_boot() {
    let place = Place::new();
    place.write("base.tar", busybox_layer(common::arch()));
    shell(&place, UMOCI);
    let (image, config, form) = make(&place, "made", &[]);
    assert_eq!(form, "OCI image");
    assert_eq!(config["Entrypoint"], json!(["/bin/echo"]));
    assert_eq!(output_of(&place, &image), "made here\n");
}
