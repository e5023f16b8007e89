#!/usr/bin/env bash
# Everything there is to do with pigeon-init: ./build.sh help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# The target whose core library is used; nothing of a C library is linked. musl's is there for every
# host to cross-compile with.
case ${ARCH:-$(uname -m)} in
    "$(uname -m)") target=$(uname -m)-unknown-linux-gnu ;;
    *) target=$ARCH-unknown-linux-musl ;;
esac
readonly target
readonly lab=(--locked --manifest-path tests/Cargo.toml)

# Bytes that build/init may have. It is meant to have 64 KiB: this goes down with it, never up.
readonly budget=$((107 * 1024))

help() {
    cat <<'EOF'
usage: ./build.sh COMMAND

  run [run.json [WORD...]]    build, and boot the example (or run.json) in a VM, console shown;
                              the words go on the kernel command line
  test [FILTER]               unit tests, then VM tests (those whose name contains FILTER)

  bench [--runs N] [--vs NAME=PATH[:CONFIGPATH]]... [--json FILE]
                              the figures in one table, beside the sequential floor and others

  build                       build/init, the static binary; ARCH=aarch64 cross-compiles it
  initrd [run.json]           build/initrd.cpio: the init, and the configuration if one is given
  rootfs SOURCE OUT [SIZE]    an ext4 image of a container image: docker save or OCI archive, OCI
                              folder, tar file, directory, image name; SIZE as 64M, 1G
  pigeon ARGUMENT...          the host command: run, exec, signal, wait, status; see pigeon --help
  setup                       install and fetch what VMs need
  vendor                      the crates' sources to vendor/, which build then uses, offline
  clean                       remove all that was built; --cache: and the kernel and tools fetched
EOF
}

say() { printf '==> %s\n' "$*" >&2; }
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

cache() { echo "${PIGEON_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/pigeon-init}"; }

# One static binary: no libc, no loader, no start files.
cargo_init() {
    local offline=()
    [[ ! -d vendor ]] || offline=(--offline --config vendor-config/config.toml)
    # Static, at a fixed address, without anything that only an unwinder or a debugger reads. The
    # toolchain's own linker makes the same bytes on every machine.
    cargo rustc --release --bin init --locked --target "$target" "${offline[@]}" -- \
        -C relocation-model=static -C force-unwind-tables=no \
        -C linker=rust-lld -C linker-flavor=ld.lld -C link-self-contained=no \
        -C link-arg=-static -C link-arg=--no-eh-frame-hdr -C link-arg=--build-id=none \
        -C link-arg=-znorelro -C link-arg=--icf=all -C link-arg=-Tsrc/init.ld
}

build() {
    need_rust
    [[ $target == *-gnu ]] || rustup target add "$target"
    cargo_init
    mkdir -p build
    install -m 755 "target/$target/release/init" build/init
    local size
    size=$(stat -c %s build/init)
    say "build/init: $size bytes"
    ((size <= budget)) || die "build/init has more than $budget bytes: look what has come in (nm --size-sort)"
}

# initrd RUN_JSON, which may be empty.
initrd() {
    need cpio=cpio
    build
    local stage
    stage=$(mktemp -d)
    # shellcheck disable=SC2064 # the name of now
    trap "rm -rf '$stage'" EXIT
    install -m 755 build/init "$stage/init"
    [[ -z $1 ]] || install -D -m 600 "$1" "$stage/pigeon/run.json"
    (
        cd "$stage"
        find . -mindepth 1 -exec touch -h -d @0 {} +
        find . -mindepth 1 -printf '%P\n' | LC_ALL=C sort |
            cpio --quiet --create --format=newc --reproducible --owner=+0:+0
    ) >build/initrd.cpio
    say "build/initrd.cpio: $(stat -c %s build/initrd.cpio) bytes"
}

# As the files themselves say, whoever runs this: mkfs.ext4 works under fakeroot.
rootfs() {
    (($# >= 2)) || die "usage: ./build.sh rootfs SOURCE OUT [SIZE]"
    need_rust
    need mkfs.ext4=e2fsprogs fakeroot=fakeroot
    pigeon_command rootfs "$@"
}

# pigeon_command ARGUMENT...: the host command, built.
pigeon_command() {
    cargo build "${lab[@]}" --quiet --package pigeon
    "${CARGO_TARGET_DIR:-tests/target}/debug/pigeon" "$@"
}

# The host command; with what a VM needs, when it is to boot one.
pigeon() {
    need_rust
    if [[ ${1-} == run ]]; then
        [[ -e build/initrd.cpio ]] || initrd ''
        setup
    fi
    pigeon_command "$@"
}

setup() {
    need_rust
    need qemu-system-x86_64=qemu-system-x86 fakeroot=fakeroot mkfs.ext4=e2fsprogs \
        debugfs=e2fsprogs ip=iproute2 lz4=lz4 xz=xz-utils zstd=zstd cpio=cpio socat=socat curl=curl python3=python3
    # Python's virtual environments are a package of their own in Debian.
    python3 -c 'import ensurepip' 2>/dev/null || need ensurepip=python3-venv
    if [[ ! -d $(cache)/kernel || ! -d $(cache)/busybox ]]; then
        apt update -qq # so that what is downloaded below is still there
    fi
    say "building the lab"
    cargo build "${lab[@]}"
    cargo run "${lab[@]}" --quiet --bin pigeon-lab -- setup
}

run() {
    initrd ''
    setup
    cargo run "${lab[@]}" --quiet --bin pigeon-lab -- run "$@"
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
    cargo test "${lab[@]}" --workspace --lib --bins
    cargo test "${lab[@]}" --workspace --doc
    say "VM tests (consoles are kept in build/logs)"
    cargo test "${lab[@]}" --workspace --test '*' -- "$@"
}

bench() {
    initrd ''
    setup
    cargo run "${lab[@]}" --quiet --bin bench -- "$@"
}

vendor() {
    need_rust
    cargo vendor --locked --quiet vendor >/dev/null
    say "vendor/ holds $(find vendor -maxdepth 1 -mindepth 1 -type d | wc -l) crates"
}

clean() {
    rm -rf build target tests/target vendor
    [[ ${1-} != --cache ]] || rm -rf "$(cache)"
}

case ${1-} in
    build | rootfs | pigeon | setup | run | bench | vendor | clean) "$@" ;;
    initrd) initrd "${2-}" ;;
    test) run_tests "${@:2}" ;;
    help | -h | --help) help ;;
    *) help >&2; exit 2 ;;
esac
