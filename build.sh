#!/usr/bin/env bash
# Everything there is to do with pigeon-init: ./build.sh help
set -euo pipefail
readonly caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"

# The lab is built of the host's library: they share what they build.
readonly std_target=${CARGO_TARGET_DIR:-target/std}
readonly host=(--locked --manifest-path src/host/Cargo.toml --target-dir "$std_target")
readonly lab=(--locked --manifest-path tests/Cargo.toml --target-dir "$std_target")

help() {
    cat <<'EOF'
usage: ./build.sh COMMAND [--arch x86_64|aarch64] ...

  run [run.json [WORD...]]    build, and boot the example (or run.json) in a VM, console shown;
                              the words go on the kernel command line
  test [AREA...] [FILTER]     unit tests, then VM tests: of these files in tests/vm, or all; those
                              whose name contains FILTER

  bench [--runs N] [--vs NAME=PATH[:CONFIGPATH]]... [--json FILE]
                              the figures in one table, beside the sequential floor and others
  soak [MINUTES [BOOTS]]      50 boots of the same disks, then one VM under load for 20 minutes

  build                       build/init, the static binary
  initrd [run.json]           build/initrd.cpio: the init, and the configuration if one is given
  rootfs SOURCE OUT [SIZE]    an image of a container image: docker save or OCI archive, OCI folder,
                              tar file, directory, image name; SIZE as 64M, 1.5G;
                              --format ext4|squashfs|erofs
  pigeon ARGUMENT...          the host command: run, exec, logs, ps, stop, cp, …; see pigeon --help
  setup                       install and fetch what VMs need
  vendor                      the crates' sources to vendor/, which build then uses, offline
  clean                       remove all that was built; --cache: and the kernel and tools fetched

For an architecture that is not this machine's, build/ is build/ARCH/.
EOF
}

say() { printf '==> %s\n' "$*" >&2; }
wrong() { printf 'build.sh: %s; ./build.sh help lists what there is\n' "$*" >&2; exit 2; }
die() { printf 'build.sh: %s\n' "$*" >&2; exit 1; }

# need COMMAND=PACKAGE...: installs the Debian packages of the commands that are missing.
need() {
    local pair missing=()
    for pair; do
        PATH=$PATH:/usr/sbin:/sbin type -P "${pair%%=*}" >/dev/null || missing+=("${pair#*=}")
    done
    ((${#missing[@]})) || return 0
    say "installing ${missing[*]}"
    apt update -qq
    apt install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

apt() {
    local as=()
    type -P apt-get >/dev/null || die "this needs Debian 12 or 13 (there is no apt-get)"
    ((EUID == 0)) || as=(sudo)
    "${as[@]}" env DEBIAN_FRONTEND=noninteractive apt-get "$@" </dev/null
}

need_rust() {
    type -P cargo >/dev/null || die "there is no cargo: https://rustup.rs installs Rust"
    need cc=gcc
}

# choose ARCH: of what is built, and of the VMs. The lab and `pigeon` hear of it by PIGEON_ARCH.
choose() {
    # The budget is KiB that build/init may have: it goes down, never up.
    case $1 in
        x86_64) qemu=qemu-system-x86 debian=amd64 budget=140 ;;
        aarch64) qemu=qemu-system-arm debian=arm64 budget=140 ;;
        *) die "there is no init for $1: Firecracker has x86_64 and aarch64" ;;
    esac
    export PIGEON_ARCH=$1
    if [[ $1 == "$(uname -m)" ]]; then
        out=build
        target=$1-unknown-linux-gnu
    else
        out=build/$1
        # Its core library is used, and nothing of a C library: this one is there for every host.
        target=$1-unknown-linux-musl
    fi
    readonly out target qemu debian budget
}

cache() { echo "${PIGEON_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/pigeon-init}"; }

# One static binary: no libc, no loader, no start files.
cargo_init() {
    local offline=()
    [[ ! -d vendor ]] || offline=(--offline --config vendor-config/config.toml)
    # Static, at a fixed address, laid out by init.ld. The toolchain's own linker makes the same
    # bytes on every machine.
    cargo rustc --release --bin init --locked --target "$target" "${offline[@]}" -- \
        -C relocation-model=static -C force-unwind-tables=no \
        -C linker=rust-lld -C linker-flavor=ld.lld -C link-self-contained=no \
        -C link-arg=-static -C link-arg=--no-eh-frame-hdr -C link-arg=--build-id=none \
        -C link-arg=-znorelro -C link-arg=-Tsrc/init.ld
}

build() {
    need_rust
    [[ $target == *-gnu ]] || rustup target add "$target"
    cargo_init
    mkdir -p "$out"
    install -m 755 "target/$target/release/init" "$out/init"
    local size
    size=$(stat -c %s "$out/init")
    say "$out/init: $size bytes"
    ((size <= budget * 1024)) || die "$out/init has more than $budget KiB: look what has come in (nm --size-sort)"
}

# initrd RUN_JSON, which may be empty.
initrd() {
    local config=$1
    [[ -z $config || $config == /* ]] || config=$caller/$config
    need cpio=cpio
    build
    local stage
    stage=$(mktemp -d)
    # shellcheck disable=SC2064 # the name of now
    trap "rm -rf '$stage'" EXIT
    install -m 755 "$out/init" "$stage/init"
    [[ -z $config ]] || install -D -m 600 "$config" "$stage/pigeon/run.json"
    (
        cd "$stage"
        find . -mindepth 1 -exec touch -h -d @0 {} +
        find . -mindepth 1 -printf '%P\n' | LC_ALL=C sort |
            cpio --quiet --create --format=newc --reproducible --owner=+0:+0
    ) >"$out/initrd.cpio"
    say "$out/initrd.cpio: $(stat -c %s "$out/initrd.cpio") bytes"
}

rootfs() {
    (($# >= 2)) || wrong "it is: rootfs SOURCE OUT [SIZE] [--format ext4|squashfs|erofs] [--force]"
    need_rust
    [[ " $* " != *squashfs* ]] || need sqfstar=squashfs-tools
    program pigeon rootfs "$@"
}

# program NAME ARGUMENT...: one of tests/ or src/host, built; paths are those of whoever calls this
# script.
program() {
    local workspace=("${lab[@]}")
    [[ $1 != pigeon ]] || workspace=("${host[@]}")
    cargo build "${workspace[@]}" --quiet --bin "$1"
    env -C "$caller" "$(realpath "$std_target")/debug/$1" "${@:2}"
}

# The host command; with what a VM needs, when it is to boot one.
pigeon() {
    need_rust
    if [[ ${1-} == run ]]; then
        [[ -e $out/initrd.cpio && ! $out/initrd.cpio -ot $out/init ]] || initrd ''
        setup
    fi
    program pigeon "$@"
}

setup() {
    need_rust
    local arch=$PIGEON_ARCH foreign=()
    # The guest's programs are compiled here, and some run here.
    [[ $out == build ]] || foreign=("$arch-linux-gnu-gcc=gcc-${arch/_/-}-linux-gnu"
        "$arch-linux-gnu-gcc=libc6-dev-$debian-cross" "qemu-$arch=qemu-user")
    need "qemu-system-$arch=$qemu" "${foreign[@]}" fakeroot=fakeroot mkfs.ext4=e2fsprogs \
        debugfs=e2fsprogs ip=iproute2 lz4=lz4 xz=xz-utils bzip2=bzip2 zstd=zstd cpio=cpio socat=socat \
        curl=curl python3=python3 umoci=umoci bsdtar=libarchive-tools sqfstar=squashfs-tools \
        fsck.erofs=erofs-utils
    # Python's virtual environments are a package of their own in Debian.
    python3 -c 'import ensurepip' 2>/dev/null || need ensurepip=python3-venv
    say "building the lab"
    cargo build "${lab[@]}"
    program pigeon-lab setup
}

run() {
    initrd ''
    setup
    program pigeon-lab run "$@"
}

run_tests() {
    need_rust
    say "unit tests of the init"
    cargo test --locked
    initrd ''
    setup
    # An error's text says where it comes from; its backtrace is the test runner's.
    export RUST_LIB_BACKTRACE=0
    say "unit tests of the lab"
    cargo test "${host[@]}" --lib --bins
    cargo test "${lab[@]}" --lib --bins
    cargo test "${lab[@]}" --doc
    local lab_areas=() host_areas=() failed=0
    while [[ -n ${1-} ]]; do
        if [[ -e tests/vm/$1.rs ]]; then
            lab_areas+=(--test "$1")
        elif [[ -e src/host/tests/$1.rs ]]; then
            host_areas+=(--test "$1")
        else
            break
        fi
        shift
    done
    if ((!${#lab_areas[@]} && !${#host_areas[@]})); then
        lab_areas=(--test '*') host_areas=(--test '*')
    fi
    say "VM tests (consoles are kept in $out/logs)"
    # One area that fails does not hide the others.
    if ((${#lab_areas[@]})); then
        cargo test "${lab[@]}" --no-fail-fast "${lab_areas[@]}" -- "$@" || failed=1
    fi
    if ((${#host_areas[@]})); then
        cargo test "${host[@]}" --no-fail-fast "${host_areas[@]}" -- "$@" || failed=1
    fi
    return $failed
}

bench() {
    initrd ''
    setup
    program bench "$@"
}

soak() {
    initrd ''
    setup
    program soak "$@"
}

# The same program with its symbols, for .ci/panics: its path.
symbols() {
    need_rust
    CARGO_TARGET_DIR=target/symbols CARGO_PROFILE_RELEASE_STRIP=none CARGO_PROFILE_RELEASE_DEBUG=2 \
        cargo_init
    echo "target/symbols/$target/release/init"
}

vendor() {
    need_rust
    cargo vendor --locked --quiet vendor >/dev/null
    say "vendor/ holds $(find vendor -maxdepth 1 -mindepth 1 -type d | wc -l) crates"
}

clean() {
    rm -rf build target vendor
    [[ ${1-} != --cache ]] || rm -rf "$(cache)"
}

command=${1-}
shift $(($# > 0))
if [[ ${1-} == --arch ]]; then
    (($# > 1)) || wrong "--arch needs x86_64 or aarch64"
    choose "$2"
    shift 2
else
    choose "${PIGEON_ARCH:-$(uname -m)}"
fi
case $command in
    build | setup | symbols | vendor) (($# == 0)) || wrong "$command takes no ${1@Q}" ;;&
    initrd) (($# <= 1)) || wrong "initrd takes no ${2@Q}" ;;&
    build | rootfs | pigeon | setup | run | bench | soak | symbols | vendor | clean) "$command" "$@" ;;
    initrd) initrd "${1-}" ;;
    test) run_tests "$@" ;;
    help | -h | --help) help ;;
    '') help >&2; exit 2 ;;
    *) wrong "there is no command $command" ;;
esac
