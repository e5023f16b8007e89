// The floors: devices, root, the kernel's file systems, cgroups, limit, workload, and nothing else:
// the cost of an init that only waits for the kernel. The sequential one makes one system call
// after the other. With -DPARALLEL the root is mounted in a child at the same time, with expedited
// RCU, so that only the kernel's work remains. With -DWHOLE it also does what
// tests/example/run.json requests: a volume, names, lo and eth0, Docker's two sysctls, a directory.
#include "tiny.h"
#ifdef WHOLE
#include <linux/ethtool.h>
#include <linux/sockios.h>
#include <net/if.h>
#include <net/route.h>
#include <netinet/in.h>
#include <sys/ioctl.h>
#endif

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
    sys(mount, "/dev/ram0", "/newroot", "ext4", MS_RELATIME, NULL);
}

#ifdef WHOLE
static void must(long result, const char *what)
{
    if (result >= 0)
        return;
    print("bench: error floor: ");
    print(what);
    print("\n");
    end();
}

static void mount_volume(const char *root)
{
    char target[32];
    put(put(target, root), "/data");
    sys_mkdir(target, 0755);
    must(sys(mount, "/dev/ram1", target, "ext4", MS_RELATIME, NULL), "volume");
}

static void replace(const char *path, const char *temporary, const char *text)
{
    long file = sys(openat, AT_FDCWD, temporary, O_WRONLY | O_CREAT | O_EXCL, 0644);
    sys(write, file, text, length(text));
    sys(close, file);
    must(sys(renameat2, AT_FDCWD, temporary, AT_FDCWD, path, 0), path);
}

static void write_names(void)
{
    static const char hosts[] = "127.0.0.1\tlocalhost\n"
                                "::1\tlocalhost ip6-localhost ip6-loopback\n"
                                "# app alias\n10.0.0.2\tmy-app.internal\n";
    sys(sethostname, "my-app-abcdef", 13);
    replace("/etc/hosts", "/etc/.hosts", hosts);
    replace("/etc/resolv.conf", "/etc/.resolv.conf", "nameserver 8.8.8.8\n");
}

static struct sockaddr address(unsigned char a, unsigned char b, unsigned char c, unsigned char d)
{
    struct sockaddr_in in = {AF_INET, 0, {0}, {0}};
    unsigned char bytes[] = {a, b, c, d};
    memcpy(&in.sin_addr, bytes, sizeof bytes);
    struct sockaddr result;
    memcpy(&result, &in, sizeof in);
    return result;
}

static void set_up_network(void)
{
    long socket = sys(socket, AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    struct ifreq lo = {.ifr_name = "lo", .ifr_flags = IFF_UP}, eth0 = {.ifr_name = "eth0"};
    must(sys(ioctl, socket, SIOCSIFFLAGS, &lo), "lo");
    eth0.ifr_mtu = 1500;
    must(sys(ioctl, socket, SIOCSIFMTU, &eth0), "MTU");
    eth0.ifr_flags = IFF_UP;
    must(sys(ioctl, socket, SIOCSIFFLAGS, &eth0), "eth0");
    struct ethtool_value checksums = {ETHTOOL_STXCSUM, 0};
    eth0.ifr_data = (void *)&checksums;
    must(sys(ioctl, socket, SIOCETHTOOL, &eth0), "checksum offload");
    eth0.ifr_addr = address(10, 0, 0, 2);
    must(sys(ioctl, socket, SIOCSIFADDR, &eth0), "address");
    eth0.ifr_netmask = address(255, 255, 255, 0);
    must(sys(ioctl, socket, SIOCSIFNETMASK, &eth0), "mask");
    // The gateway is not in the subnet.
    struct rtentry route = {.rt_dst = address(169, 254, 0, 1),
                            .rt_genmask = address(255, 255, 255, 255),
                            .rt_flags = RTF_UP | RTF_HOST,
                            .rt_dev = "eth0"};
    must(sys(ioctl, socket, SIOCADDRT, &route), "route");
    route.rt_gateway = route.rt_dst;
    route.rt_dst = route.rt_genmask = address(0, 0, 0, 0);
    route.rt_flags = RTF_UP | RTF_GATEWAY;
    must(sys(ioctl, socket, SIOCADDRT, &route), "default route");
    sys(close, socket);
    spill("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0");
    spill("/proc/sys/net/ipv4/ping_group_range", "0 2147483647");
}

static void enter_working_directory(void)
{
    sys_mkdir("/app", 0755);
    must(sys(chdir, "/app"), "/app");
}

static void unmount_volume(void)
{
    sys(umount2, "/data", 0);
}
#else
static void mount_volume(const char *root)
{
    (void)root;
}
static void write_names(void)
{
}
static void set_up_network(void)
{
}
static void enter_working_directory(void)
{
}
static void unmount_volume(void)
{
}
#endif

// Makes /newroot the root, with these file systems moved to it, and empties the initramfs.
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
        mount_volume("/newroot");
        sys(exit, 0);
    }
    mount_file_systems();
    mount_cgroups();
    set_up_network();
    sys(wait4, child, NULL, 0, NULL);
    switch_root(moved);
    spill(expedited, "0");
    write_names();
}
#else
static void prepare(void)
{
    static const char *const moved[] = {"/dev", NULL};
    mount_root();
    switch_root(moved);
    mount_file_systems();
    mount_cgroups();
    mount_volume("");
    write_names();
    set_up_network();
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
        enter_working_directory();
        sys(execve, *argv, argv, envp);
        sys(exit, 127);
    }
    // Shutdown: reaps the workload, and leaves the root clean.
    while (sys(wait4, -1, NULL, 0, NULL) != pid)
        ;
    unmount_volume();
    sys(mount, NULL, "/", NULL, MS_REMOUNT | MS_RDONLY, NULL);
    sys(sync);
    end();
}
