// The /init of a benchmark's VM before the init under test, the same for all of them: loads the
// stock kernel's modules (Firecracker's kernels have the drivers built in), sets up what files in
// /bench request, deletes those, records the time, and executes /init.
#include "tiny.h"
#include <linux/rtnetlink.h>
#include <linux/veth.h>
#include <net/if.h>
#include <netinet/in.h>
#include <sched.h>
#include <sys/ioctl.h>

static char buffer[64 << 10];
static char document[64 << 10];

static void fatal(const char *what)
{
    print("bench: error ");
    print(what);
    print("\n");
    end();
}

// Calls `each` with the lines of a file.
static void lines(const char *path, void each(const char *line))
{
    char *line = slurp(path, buffer, sizeof buffer);
    while (*line) {
        char *end = line;
        while (*end && *end != '\n')
            end++;
        char *next = *end ? end + 1 : end;
        *end = 0;
        each(line);
        line = next;
    }
}

// A line of /bench/modules is a path, optionally followed by a space and parameters.
static void load(const char *line)
{
    char path[256], *end = path;
    while (*line && *line != ' ')
        *end++ = *line++;
    *end = 0;
    long file = sys_open(path, O_RDONLY);
    if (sys(finit_module, file, *line ? line + 1 : "", 0) < 0)
        fatal(path);
    sys(close, file);
    sys_unlink(path);
}

// Copies a disk to a RAM disk, if both exist.
static void copy(const char *from, const char *to)
{
    long source = sys_open(from, O_RDONLY), target = sys_open(to, O_WRONLY), count;
    if (source < 0 || target < 0)
        return;
    while ((count = sys(read, source, buffer, sizeof buffer)) > 0)
        if (sys(write, target, buffer, count) != count)
            fatal(to);
    sys(close, source);
    // Also drops its page cache.
    sys(close, target);
}

static void fill_ram_disks(void)
{
    sys_mkdir("/bench/dev", 0700);
    sys(mount, "devtmpfs", "/bench/dev", "devtmpfs", 0, NULL);
    copy("/bench/dev/vda", "/bench/dev/ram0");
    copy("/bench/dev/vdb", "/bench/dev/ram1");
    sys(umount2, "/bench/dev", 0);
    sys_rmdir("/bench/dev");
}

static void delete(const char *path)
{
    sys_unlink(path);
}

// A line of /bench/trace is a tracefs file, a space, and the text to write to it.
static void trace(const char *line)
{
    char path[256], *end = put(path, "/bench/tracing/");
    while (*line && *line != ' ')
        *end++ = *line++;
    *end = 0;
    long file = sys_open(path, O_WRONLY | O_APPEND);
    char text[512], *text_end = put(put(text, *line ? line + 1 : line), "\n");
    if (sys(write, file, text, text_end - text) < 0)
        fatal(path);
    sys(close, file);
}

// -- MMDS: a peer of eth0 in its own network namespace in this VM, so that its time is the VM's,
// and the same in each boot.

struct attribute {
    unsigned short size, type;
};

// Opens a netlink attribute at `at`; `close_attribute` sets its size.
static char *attribute(char *at, unsigned short type, const void *value, unsigned short size)
{
    struct attribute head = {(unsigned short)(sizeof head + size), type};
    memcpy(at, &head, sizeof head);
    memcpy(at + sizeof head, value, size);
    return at + ((sizeof head + size + 3) & ~3UL);
}
static void close_attribute(char *at, const char *end)
{
    ((struct attribute *)at)->size = (unsigned short)(end - at);
}

// eth0, and its peer `far` in the network namespace of `pid`.
static void make_veth(long pid)
{
    struct {
        struct nlmsghdr head;
        struct ifinfomsg link;
        char attributes[256];
    } message = {.head = {.nlmsg_type = RTM_NEWLINK,
                          .nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL}};
    static const struct ifinfomsg none;
    unsigned peer_pid = (unsigned)pid;
    char *at = attribute(message.attributes, IFLA_IFNAME, "eth0", 5);
    char *info = at;
    at = attribute(at, IFLA_LINKINFO, "", 0);
    at = attribute(at, IFLA_INFO_KIND, "veth", 4);
    char *data = at;
    at = attribute(at, IFLA_INFO_DATA, "", 0);
    char *peer = at;
    at = attribute(at, VETH_INFO_PEER, &none, sizeof none);
    at = attribute(at, IFLA_IFNAME, "far", 4);
    at = attribute(at, IFLA_NET_NS_PID, &peer_pid, sizeof peer_pid);
    close_attribute(peer, at);
    close_attribute(data, at);
    close_attribute(info, at);
    message.head.nlmsg_len = (unsigned)(at - (char *)&message);
    long netlink = sys(socket, AF_NETLINK, SOCK_RAW, NETLINK_ROUTE);
    sys(write, netlink, &message, message.head.nlmsg_len);
    struct {
        struct nlmsghdr head;
        struct nlmsgerr error;
        char rest[256];
    } answer;
    sys(read, netlink, &answer, sizeof answer);
    if (answer.error.error)
        fatal("veth");
    sys(close, netlink);
}

static void set_up_far(void)
{
    long socket = sys(socket, AF_INET, SOCK_STREAM, 0);
    struct ifreq request = {.ifr_name = "far"};
    struct sockaddr_in *address = (struct sockaddr_in *)&request.ifr_addr;
    *address = (struct sockaddr_in){AF_INET, 0, {0xfea9fea9}, {0}}; // 169.254.169.254
    long bad = sys(ioctl, socket, SIOCSIFADDR, &request);
    *address = (struct sockaddr_in){AF_INET, 0, {0x0000ffff}, {0}}; // /16
    bad |= sys(ioctl, socket, SIOCSIFNETMASK, &request);
    request.ifr_flags = IFF_UP;
    bad |= sys(ioctl, socket, SIOCSIFFLAGS, &request);
    if (bad)
        fatal("mmds: address");
    sys(close, socket);
}

// Waits until the parent, which waits for this, continues it.
static void stop(void)
{
    long self = sys(getpid);
    sys(kill, self, SIGSTOP);
}

// Serves one request after the other, on one connection after the other, like Firecracker: an empty
// reason phrase, keep-alive, a token of 48 characters.
static void serve_mmds(void)
{
    static const char TOKEN[] = "YmVuY2gtdG9rZW4tcGFkZGVkLXRvLTM2LWJ5dGVzLWxvbmch";
    struct sockaddr_in address = {AF_INET, 0x5000, {0}, {0}}; // port 80
    long listener = sys(socket, AF_INET, SOCK_STREAM, 0);
    if (sys(bind, listener, &address, sizeof address) || sys(listen, listener, 8))
        fatal("mmds: listen");
    stop(); // ready
    for (;;) {
        long connection = sys(accept, listener, NULL, NULL);
        long size = 0, count;
        while ((count = sys(read, connection, buffer + size, (long)sizeof buffer - 1 - size)) > 0) {
            size += count;
            buffer[size] = 0;
            if (!find(buffer, "\r\n\r\n"))
                continue;
            size = 0;
            const char *body = *buffer == 'P' ? TOKEN : document;
            const char *type = *buffer == 'P' ? "text/plain" : "application/json";
            static char answer[sizeof document + 256];
            char *end = put(answer, "HTTP/1.1 200 \r\nServer: Firecracker API\r\n"
                                    "Connection: keep-alive\r\nContent-Type: ");
            end = put(put(end, type), "\r\nContent-Length: ");
            end = put(put(put_number(end, length(body)), "\r\n\r\n"), body);
            sys(write, connection, answer, end - answer);
        }
        sys(close, connection);
    }
}

// Starts the peer; returns its pid.
static long start_mmds(void)
{
    long pid = sys_fork();
    if (pid == 0) {
        if (sys(unshare, CLONE_NEWNET))
            fatal("mmds: network namespace");
        stop(); // eth0 can be made
        set_up_far();
        serve_mmds();
    }
    sys(wait4, pid, NULL, WUNTRACED, NULL);
    make_veth(pid);
    sys(kill, pid, SIGCONT);
    sys(wait4, pid, NULL, WUNTRACED, NULL);
    sys(kill, pid, SIGCONT);
    return pid;
}

// --

// Prints how long the kernel took to unpack the initramfs, in microseconds, and restarts.
static void tell_unpacking(long log)
{
    unsigned long first = 0, last = 0, time;
    const char *text;
    while ((text = next_record(log, "", buffer, sizeof buffer, &time))) {
        if (find(text, "Trying to unpack rootfs"))
            first = time;
        if (find(text, "Freeing initrd memory"))
            last = time;
    }
    if (!first || !last)
        fatal("the kernel does not tell of the initramfs");
    tell("unpack_us", last - first);
    end();
}

__attribute__((used)) void begin(long *stack)
{
    char **argv = (char **)(stack + 1), **envp = argv + *stack + 1;
    sys(mknodat, AT_FDCWD, "/bench/kmsg", S_IFCHR | 0600, 1 << 8 | 11);
    long log = sys_open("/bench/kmsg", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    unsigned long kernel = now(CLOCK_MONOTONIC);
    if (*slurp("/bench/unpack", buffer, sizeof buffer))
        tell_unpacking(log);
    lines("/bench/modules", load);
    unsigned long modules = now(CLOCK_MONOTONIC) - kernel;
    fill_ram_disks();
    long mmds = *slurp("/bench/run.json", document, sizeof document) ? start_mmds() : 0;
    if (*slurp("/bench/trace", buffer, sizeof buffer)) {
        sys_mkdir("/bench/tracing", 0700);
        sys(mount, "tracefs", "/bench/tracing", "tracefs", 0, NULL);
        lines("/bench/trace", trace);
        sys(umount2, "/bench/tracing", 0);
        sys_rmdir("/bench/tracing");
    }
    unsigned long phase = number(slurp("/bench/phase", buffer, sizeof buffer));
    lines("/bench/files", delete);
    sys_unlink("/bench/kmsg");
    sys_rmdir("/bench/lib");
    sys_rmdir("/bench");

    // The kernel often waits for a tick: starts at the given phase between two.
    const unsigned long TICK = 4000000;
    sleep_until((now(CLOCK_MONOTONIC) / TICK + 2) * TICK + phase);

    char line[256], *tail = put(line, "<7>load: kernel ");
    tail = put(put_number(tail, kernel), " modules ");
    tail = put(put_number(tail, modules), " mmds ");
    tail = put(put_number(tail, (unsigned long)mmds), " ");
    tail = put(put_number(tail, mmds ? now(cpu_clock((unsigned long)mmds)) : 0), " exec ");
    tail = put(put_number(tail, now(CLOCK_PROCESS_CPUTIME_ID)), " ");
    tail = put(put_number(tail, now(CLOCK_MONOTONIC)), "\n");
    sys(write, log, line, tail - line);
    argv[0] = "/init";
    sys(execve, "/init", argv, envp);
    fatal("/init cannot be executed");
}
