// The floors: devices, root, the kernel's file systems, cgroups, limit, workload, and nothing else:
// what an init costs when the kernel is all there is to wait for. The sequential one makes one system
// call after the other. With -DPARALLEL the root is mounted in a child, beside everything else, and
// RCU is expedited meanwhile: what is left then is the kernel's work.
#include "tiny.h"

#define NODEV MS_NODEV
#define NOEXEC MS_NOEXEC
#define NOSUID MS_NOSUID
#define STRICT (NODEV | NOEXEC | NOSUID)

static void make(const char *source, const char *target, const char *type, long flags,
                 const char *data)
{
    sys_mkdir(target, 0755);
    sys(mount, source, target, type, flags, data);
}

static void cgroup(const char *target, const char *controllers)
{
    make("cgroup", target, "cgroup", STRICT | MS_RELATIME, controllers);
}

static void mount_root(void)
{
    sys_mkdir("/newroot", 0755);
    sys(mount, "/dev/vda", "/newroot", "ext4", MS_RELATIME, NULL);
}

// Makes /newroot the root, with these file systems moved onto it, and empties the initramfs.
static void switch_root(const char *const *moved)
{
    char target[32];
    for (; *moved; moved++) {
        put(put(target, "/newroot"), *moved);
        sys(mount, *moved, target, NULL, MS_MOVE, NULL);
    }
    sys_unlink("/pigeon/run.json");
    sys_rmdir("/pigeon");
    sys_unlink("/init");
    sys(chdir, "/newroot");
    sys(mount, ".", "/", NULL, MS_MOVE, NULL);
    sys(chroot, ".");
    sys(chdir, "/");
}

static void mount_file_systems(void)
{
    make("devpts", "/dev/pts", "devpts", NOEXEC | NOSUID | MS_NOATIME,
         "mode=0620,gid=5,ptmxmode=666");
    make("mqueue", "/dev/mqueue", "mqueue", STRICT, NULL);
    make("tmpfs", "/dev/shm", "tmpfs", NOSUID | NODEV, "mode=1777");
    make("hugetlbfs", "/dev/hugepages", "hugetlbfs", MS_RELATIME, "pagesize=2M");
    make("proc", "/proc", "proc", STRICT, NULL);
    make("sysfs", "/sys", "sysfs", STRICT, NULL);
    make("binfmt_misc", "/proc/sys/fs/binfmt_misc", "binfmt_misc", MS_RELATIME, NULL);
    make("tmpfs", "/run", "tmpfs", NOSUID | NODEV, "mode=0755");
    sys_mkdir("/run/lock", 0755);
    sys(fchmodat, AT_FDCWD, "/run/lock", 01777);
    sys(symlinkat, "/proc/self/fd", AT_FDCWD, "/dev/fd");
    sys(symlinkat, "/proc/self/fd/0", AT_FDCWD, "/dev/stdin");
    sys(symlinkat, "/proc/self/fd/1", AT_FDCWD, "/dev/stdout");
    sys(symlinkat, "/proc/self/fd/2", AT_FDCWD, "/dev/stderr");
}

static void mount_cgroups(void)
{
    make("tmpfs", "/sys/fs/cgroup", "tmpfs", STRICT, "mode=755");
    make("cgroup2", "/sys/fs/cgroup/unified", "cgroup2", STRICT | MS_RELATIME, "nsdelegate");
    cgroup("/sys/fs/cgroup/net_cls,net_prio", "net_cls,net_prio");
    cgroup("/sys/fs/cgroup/hugetlb", "hugetlb");
    cgroup("/sys/fs/cgroup/pids", "pids");
    cgroup("/sys/fs/cgroup/freezer", "freezer");
    cgroup("/sys/fs/cgroup/cpu,cpuacct", "cpu,cpuacct");
    cgroup("/sys/fs/cgroup/devices", "devices");
    cgroup("/sys/fs/cgroup/blkio", "blkio");
    cgroup("/sys/fs/cgroup/memory", "memory");
    cgroup("/sys/fs/cgroup/perf_event", "perf_event");
    cgroup("/sys/fs/cgroup/cpuset", "cpuset");
}

#ifdef PARALLEL
static void prepare(void)
{
    static const char expedited[] = "/sys/kernel/rcu_expedited";
    static const char *const moved[] = {"/dev", "/proc", "/sys", "/run", NULL};
    make("sysfs", "/sys", "sysfs", STRICT, NULL);
    spill(expedited, "1");
    long child = sys_fork();
    if (child == 0) {
        mount_root();
        sys(exit, 0);
    }
    mount_file_systems();
    mount_cgroups();
    sys(wait4, child, NULL, 0, NULL);
    switch_root(moved);
    spill(expedited, "0");
}
#else
static void prepare(void)
{
    static const char *const moved[] = {"/dev", NULL};
    mount_root();
    switch_root(moved);
    mount_file_systems();
    mount_cgroups();
}
#endif

__attribute__((used)) void begin(long *stack)
{
    (void)stack;
    make("devtmpfs", "/dev", "devtmpfs", NOSUID, "mode=0755");
    long console = sys_open(CONSOLE, O_RDWR | O_NOCTTY);
    for (long fd = 0; fd < 3; fd++)
        sys(dup3, console, fd, 0);
    sys(close, console);
    prepare();
    sys_mkdir("/root", 0700);
    struct rlimit files = {10240, 10240};
    sys(setrlimit, RLIMIT_NOFILE, &files);
    long pid = sys_fork();
    if (pid == 0) {
        char *argv[] = {"/bin/workload", NULL}, *envp[] = {NULL};
        sys(setsid);
        sys(execve, *argv, argv, envp);
        sys(exit, 127);
    }
    // The end: reap it, leave the root clean.
    while (sys(wait4, -1, NULL, 0, NULL) != pid)
        ;
    sys(mount, NULL, "/", NULL, MS_REMOUNT | MS_RDONLY, NULL);
    sys(sync);
    end();
}
