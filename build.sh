#!/usr/bin/env bash
# Builds, runs, tests and packages pigeon-init: ./build.sh help
set -euo pipefail
readonly caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"

# The lab uses the host's library, so they share a target directory.
readonly std_target=${CARGO_TARGET_DIR:-target/std}
readonly init_target=${CARGO_TARGET_DIR:-target}
readonly host=(--locked --manifest-path src/host/Cargo.toml --target-dir "$std_target")
readonly lab=(--locked --manifest-path tests/Cargo.toml --target-dir "$std_target")

help() {
    cat <<'EOF'
usage: ./build.sh COMMAND [--arch x86_64|aarch64] [--minimal] [--kernel VERSION|PATH] ...

  run [run.json [WORD...]]    builds the init, boots the example (or run.json) in a VM and shows its
                              console; the words are added to the kernel command line
  test [AREA...] [FILTER]     unit tests, then VM tests: those of the areas (files in tests/vm), or all
                              but containers; FILTER selects by name; containerd's need root

  bench [--runs N] [--vs NAME=PATH[:CONFIGPATH]]... [--json FILE]
                              the figures as a table, beside the sequential floor and other inits
  bench --kernel-parameters [--runs N]
                              what kernel parameters, initrd and root cost in a cold start
  soak [MINUTES [BOOTS [CLONES]]]
                              50 boots of the same disks, a VM cloned 100 times, then one under load
                              for 20 minutes

  build                       build/init, the static binary
  initrd [run.json]           build/initrd.cpio: the init, and the configuration if one is given
  rootfs SOURCE OUT [SIZE]    a root image from a container image: docker save or OCI archive, OCI layout,
                              tar file, directory, image name; SIZE such as 64M or 1.5G;
                              --format ext4|squashfs|erofs
  pigeon ARGUMENT...          the host command: run, exec, logs, ps, stop, cp, …; see pigeon --help
  dist                        dist/: archives of init, initrd, pigeon and shim for both architectures, with
                              checksums and bills of materials
  package                     the same for one architecture
  setup                       installs and fetches what VMs need
  vendor                      copies the crates' sources to vendor/; builds then work offline
  clean                       removes what was built; --cache: also the kernels and tools fetched

--minimal builds the init without optional features. --kernel is the VMs' kernel: a version of Debian's, such
as 6.12 (by default this release's), or a kernel image with its drivers built in. For an architecture other
than this machine's, build/ is build/ARCH/; with --minimal, the minimal/ in it.
EOF
}

say() { printf '==> %s\n' "$*" >&2; }
wrong() { printf 'build.sh: %s; see ./build.sh help\n' "$*" >&2; exit 2; }
die() { printf 'build.sh: %s\n' "$*" >&2; exit 1; }

# need COMMAND|/FILE=PACKAGE...: installs the Debian packages of the commands and files that are missing.
# Recommended packages are left out: those that are needed are named.
need() {
    local pair missing=()
    for pair; do
        [[ $pair != /* || ! -e ${pair%%=*} ]] || continue
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
    type -P cargo >/dev/null || die "cargo not found: install Rust from https://rustup.rs"
    need cc=gcc /usr/include/stdio.h=libc6-dev
}

# Size limits of build/init in KiB, with all features and without. They go down, or up for a bug fix that
# cannot be smaller.
readonly budget_whole=206 budget_minimal=154

# choose ARCH MINIMAL KERNEL: sets what is built, and for which VMs. The lab and `pigeon` read it from
# PIGEON_ARCH, PIGEON_MINIMAL and PIGEON_KERNEL.
choose() {
    case $1 in
        x86_64) qemu=qemu-system-x86 debian=amd64 ;;
        aarch64) qemu=qemu-system-arm debian=arm64 ;;
        *) die "there is no init for $1: Firecracker has x86_64 and aarch64" ;;
    esac
    if [[ $1 == "$(uname -m)" ]]; then
        out=build
        target=$1-unknown-linux-gnu
    else
        out=build/$1
        # Only the core library of this target is used, no C library, so any host can build it.
        target=$1-unknown-linux-musl
    fi
    features=() budget=$budget_whole
    if [[ -n $2 ]]; then
        out+=/minimal features=(--no-default-features) budget=$budget_minimal
    fi
    readonly out target qemu debian features budget
    export PIGEON_ARCH=$1 PIGEON_MINIMAL=$2 PIGEON_KERNEL=$3
}

cache() { echo "${PIGEON_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/pigeon-init}"; }

# cargo_init TARGET_DIR: one static binary: no libc, no loader, no start files.
cargo_init() {
    local offline=()
    [[ ! -d vendor ]] || offline=(--offline --config vendor-config/config.toml)
    # Static, at a fixed address, laid out by init.ld. The toolchain's own linker makes the same
    # bytes on every machine.
    cargo rustc --release --bin init --locked --target-dir "$1" --target "$target" \
        "${features[@]}" "${offline[@]}" -- \
        -C relocation-model=static -C force-unwind-tables=no \
        -C linker=rust-lld -C linker-flavor=ld.lld -C link-self-contained=no \
        -C link-arg=-static -C link-arg=--no-eh-frame-hdr -C link-arg=--build-id=none \
        -C link-arg=-znorelro -C link-arg=-Tsrc/init.ld
}

build() {
    need_rust
    [[ $target == *-gnu ]] || rustup target add "$target"
    cargo_init "$init_target"
    mkdir -p "$out"
    install -m 755 "$init_target/$target/release/init" "$out/init"
    local size
    size=$(stat -c %s "$out/init")
    say "$out/init: $size bytes"
    ((size <= budget * 1024)) || die "$out/init is over $budget KiB: look for what was added (nm --size-sort)"
}

# initrd RUN_JSON, which may be empty.
initrd() {
    local config=$1
    [[ -z $config || $config == /* ]] || config=$caller/$config
    need cpio=cpio zstd=zstd
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
    say "$out/initrd.cpio: $(wc -c <"$out/initrd.cpio") bytes;" \
        "$(gzip -9n <"$out/initrd.cpio" | wc -c) with gzip -9," \
        "$(zstd -19 -q <"$out/initrd.cpio" | wc -c) with zstd -19"
}

rootfs() {
    (($# >= 2)) || wrong "it is: rootfs SOURCE OUT [SIZE] [--format ext4|squashfs|erofs] [--force]"
    need_rust
    [[ " $* " != *squashfs* ]] || need sqfstar=squashfs-tools
    program pigeon rootfs "$@"
}

# program NAME ARGUMENT...: builds and runs a program of tests/ or src/host, in the directory that this script
# was called from.
program() {
    local workspace=("${lab[@]}")
    [[ $1 != pigeon ]] || workspace=("${host[@]}")
    cargo build "${workspace[@]}" --quiet --bin "$1"
    env -C "$caller" "$(realpath "$std_target")/debug/$1" "${@:2}"
}

# The host command; for `run`, with what a VM needs.
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
    # The guest's programs are compiled on this machine, and some also run on it.
    [[ $arch == "$(uname -m)" ]] || foreign=("$arch-linux-gnu-gcc=gcc-${arch/_/-}-linux-gnu"
        "/usr/$arch-linux-gnu/include/stdio.h=libc6-dev-$debian-cross" "qemu-$arch=qemu-user")
    need "qemu-system-$arch=$qemu" "${foreign[@]}" fakeroot=fakeroot mkfs.ext4=e2fsprogs \
        debugfs=e2fsprogs mksquashfs=squashfs-tools mkfs.erofs=erofs-utils umoci=umoci \
        mkfs.xfs=xfsprogs mkfs.btrfs=btrfs-progs sfdisk=fdisk fsck.vfat=dosfstools \
        bsdtar=libarchive-tools mmdebstrap=mmdebstrap newuidmap=uidmap ip=iproute2 lz4=lz4 xz=xz-utils \
        bzip2=bzip2 zstd=zstd cpio=cpio socat=socat curl=curl python3=python3
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

# Archives for both architectures. The same sources and tools make the same bytes.
dist() {
    rm -rf dist
    local arch
    for arch in x86_64 aarch64; do
        bash build.sh package --arch "$arch"
    done
    (cd dist && sha256sum -- *.tar.gz >SHA256SUMS)
    say "dist/ holds $(cd dist && echo *)"
}

# dist/pigeon-init-VERSION-ARCH.tar.gz: everything that a host needs, except for a hypervisor and a kernel.
package() {
    need_rust
    need zstd=zstd
    initrd ''
    local version name stage epoch musl=$PIGEON_ARCH-unknown-linux-musl
    version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
    name=pigeon-init-$version-$PIGEON_ARCH
    epoch=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 0)}
    stage=$(mktemp -d)
    # shellcheck disable=SC2064 # the name of now
    trap "rm -rf '$stage'" EXIT
    mkdir "$stage/$name"
    rustup target add "$musl"
    # Static, so that it runs on every distribution, and without paths of the machine that built it.
    PIGEON_DIST=1 RUSTFLAGS="-C linker=rust-lld --remap-path-prefix=$PWD=/pigeon-init \
        --remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}=/cargo" \
        cargo build --release "${host[@]}" --workspace --bins --target "$musl"
    install -m 755 "$std_target/$musl/release"/{pigeon,containerd-shim-pigeon-v2} "$out/init" \
        "$stage/$name"
    install -m 644 "$out/initrd.cpio" LICENSE README.md "$stage/$name"
    program pigeon man >"$stage/$name/pigeon.1"
    local shell
    for shell in bash zsh fish; do
        program pigeon completions "$shell" >"$stage/$name/pigeon.$shell"
    done
    materials Cargo.toml Cargo.lock "$target" "${features[@]}" >"$stage/$name/init.cdx.json"
    local lock=src/host/Cargo.lock shim=containerd-shim-pigeon-v2
    materials src/host/Cargo.toml $lock "$musl" >"$stage/$name/pigeon.cdx.json"
    materials src/host/shim/Cargo.toml $lock "$musl" >"$stage/$name/$shim.cdx.json"
    (
        cd "$stage/$name"
        gzip -9nk initrd.cpio
        zstd -19 -q -k initrd.cpio
        sha256sum -- * >SHA256SUMS
    )
    mkdir -p dist
    tar --create --directory="$stage" --format=ustar --sort=name --mtime="@$epoch" \
        --owner=0 --group=0 --numeric-owner --mode=u+rwX,go+rX-w "$name" | gzip -9n >"dist/$name.tar.gz"
    say "dist/$name.tar.gz: $(stat -c %s "dist/$name.tar.gz") bytes"
}

# materials MANIFEST LOCK TARGET OPTION...: the bill of materials of a program (CycloneDX).
materials() {
    cargo metadata --format-version 1 --locked --manifest-path "$1" --filter-platform "$3" "${@:4}" |
        cargo run --quiet "${host[@]}" --example materials -- "$2"
}

run_tests() {
    need_rust
    say "unit tests of the init"
    cargo test --locked "${features[@]}"
    initrd ''
    setup
    # The text of an error says where it comes from; a backtrace would only show the test runner.
    export RUST_LIB_BACKTRACE=0
    if [[ -z $PIGEON_MINIMAL ]]; then
        say "unit tests of the lab"
        cargo test "${host[@]}" --workspace --lib --bins
        cargo test "${lab[@]}" --lib --bins
        cargo test "${lab[@]}" --doc
    fi
    local lab_areas=() host_areas=() shim_areas=() lab_features=("${features[@]}") failed=0
    while [[ -n ${1-} ]]; do
        # It takes minutes, so it runs only by name.
        if [[ $1 == containers ]]; then
            need redis-cli=redis-tools
            lab_features+=(--features containers)
        fi
        [[ -e tests/vm/$1.rs || -e src/host/tests/$1.rs || -e src/host/shim/tests/$1.rs ]] || break
        # Both workspaces have an area `image`.
        [[ ! -e tests/vm/$1.rs ]] || lab_areas+=(--test "$1")
        [[ ! -e src/host/tests/$1.rs || -n $PIGEON_MINIMAL ]] || host_areas+=(--test "$1")
        [[ ! -e src/host/shim/tests/$1.rs ]] || shim_areas+=(--test "$1")
        shift
    done
    if ((!${#lab_areas[@]} && !${#host_areas[@]} && !${#shim_areas[@]})); then
        # Tests of features that this build lacks are left out.
        lab_areas=(--tests)
        # The host command needs all features.
        [[ -n $PIGEON_MINIMAL ]] || host_areas=(--test '*')
        # The shim's VMs have this machine's architecture, and containerd needs root.
        if [[ -n $PIGEON_MINIMAL || $PIGEON_ARCH != "$(uname -m)" ]] || ((EUID)); then
            say "containerd is left out: it needs root, all features and this machine's architecture"
        else
            shim_areas=(--test '*')
        fi
    fi
    say "VM tests (consoles are kept in $out/logs)"
    # One area that fails does not hide the others.
    if ((${#lab_areas[@]})); then
        areas tests "${lab[@]}" "${lab_features[@]}" "${lab_areas[@]}" -- "$@" || failed=1
    fi
    if ((${#host_areas[@]})); then
        # For the images that the tests read.
        need buildah=buildah skopeo=skopeo
        areas src/host "${host[@]}" "${host_areas[@]}" -- "$@" || failed=1
    fi
    if ((${#shim_areas[@]})); then
        need containerd=containerd ctr=containerd runc=runc
        local shim=("${host[@]}" --package containerd-shim-pigeon)
        areas src/host/shim "${shim[@]}" "${shim_areas[@]}" -- "$@" || failed=1
    fi
    return $failed
}

# areas DIRECTORY CARGO_OPTION... -- TEST_ARGUMENT...: runs a workspace's test programs, several at once, as most
# of the time they wait: for their turn to boot a VM (PIGEON_VMS), or for a deadline.
areas() {
    local dir=$1 options=() logs list failed
    shift
    while [[ $1 != -- ]]; do
        options+=("$1")
        shift
    done
    shift
    mkdir -p "$out/logs"
    logs=$(realpath "$out/logs")
    failed=$logs/failed
    # The names are read: they have no colours, whatever CARGO_TERM_COLOR says.
    list=$(cargo test --color never "${options[@]}" --no-run 2>&1 | tee >(cat >&2) |
        sed -n 's/^ *Executable [a-z]*\/\([a-z_]*\)\.rs (\(.*\))$/\1\n\2/p') || return
    export -f area
    rm -f "$failed"
    xargs -r -d '\n' -n 2 -P "$(($(nproc) + 1))" \
        bash -c 'area "$@"' area "$dir" "$logs" "$@" <<<"$list" || again "$dir" "$failed"
}

# area DIRECTORY LOGS TEST_ARGUMENT... NAME PROGRAM: runs one of them, and prints its output when it has ended.
area() {
    local name=${*: -2:1} program log=$2/${*: -2:1}.out failed=0 test
    program=$(realpath "${*: -1}")
    printf '==> started %s\n' "$name" >&2
    env -C "$1" "$program" "${@:3:$#-4}" >"$log" 2>&1 || failed=$?
    flock "$2" cat - "$log" <<<"     Running $name"
    # 101: some of its tests have failed, which libtest lists at the end.
    if ((failed == 101)); then
        sed -n '/^failures:$/h; //!H; ${x; s/^failures://p}' "$log" | sed -n 's/^    //p' |
            while read -r test; do
                printf '%s %s\n' "$test" "$program" >>"$2/failed"
            done
    elif ((failed)); then
        printf -- '- %s\n' "$program" >>"$2/failed"
    fi
    return $((failed != 0))
}

# again DIRECTORY LIST: runs up to three failed tests once more, one at a time: a shared machine can stall for
# seconds, longer than a test allows for.
again() {
    local test program failed=0
    # Not if there are more, or if a program did not reach the end of its tests.
    if [[ ! -s $2 ]] || grep -q '^- ' "$2" || (($(wc -l <"$2") > 3)); then
        return 1
    fi
    while read -r test program; do
        say "once more, alone: $test"
        env -C "$1" "$program" --exact "$test" </dev/null || failed=1
    done <"$2"
    ((failed)) || say "passed when alone: $(cut -d ' ' -f 1 "$2" | paste -s -d ' ')"
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

# Builds the same program with symbols, for .ci/panics, and prints its path.
symbols() {
    need_rust
    CARGO_PROFILE_RELEASE_STRIP=none CARGO_PROFILE_RELEASE_DEBUG=2 cargo_init "$init_target/symbols"
    echo "$init_target/symbols/$target/release/init"
}

vendor() {
    need_rust
    cargo vendor --locked --quiet vendor >/dev/null
    say "vendor/ holds $(find vendor -maxdepth 1 -mindepth 1 -type d | wc -l) crates"
}

clean() {
    rm -rf build dist target vendor
    [[ ${1-} != --cache ]] || rm -rf "$(cache)"
}

command=${1-}
shift $(($# > 0))
arch=${PIGEON_ARCH:-$(uname -m)} minimal=${PIGEON_MINIMAL-} kernel=${PIGEON_KERNEL-}
while (($#)); do
    case $1 in
        --arch)
            (($# > 1)) || wrong "--arch needs x86_64 or aarch64"
            arch=$2
            shift 2
            ;;
        --kernel)
            (($# > 1)) || wrong "--kernel needs a version, as 6.12, or a path"
            kernel=$2
            shift 2
            [[ $kernel != */* || $kernel == /* ]] || kernel=$caller/$kernel
            ;;
        --minimal)
            minimal=1
            shift
            ;;
        *) break ;;
    esac
done
choose "$arch" "$minimal" "$kernel"
case $command in
    build | dist | package | setup | symbols | vendor) (($# == 0)) || wrong "$command takes no ${1@Q}" ;;&
    initrd) (($# <= 1)) || wrong "initrd takes no ${2@Q}" ;;&
    build | rootfs | pigeon | dist | package | setup | run | bench | soak | symbols | vendor | clean) "$command" "$@" ;;
    initrd) initrd "${1-}" ;;
    test) run_tests "$@" ;;
    help | -h | --help) help ;;
    '') help >&2; exit 2 ;;
    *) wrong "there is no command $command" ;;
esac
