// The workload of the benchmark's VMs. Its first instructions read the clock; then it prints the
// figures for `bench.mode=` on the kernel command line, one line `bench: name value` each.
#include "tiny.h"

static char buffer[64 << 10];

static void fatal(const char *what)
{
    print("bench: error ");
    print(what);
    print("\n");
    sys(exit_group, 1);
}

// The number in a file after `word` and blanks.
static unsigned long figure(const char *path, const char *word)
{
    const char *text = find(slurp(path, buffer, sizeof buffer), word);
    if (!text)
        return 0;
    for (text += length(word); *text == ' ' || *text == '\t';)
        text++;
    return number(text);
}

// Prints the figures in the loader's record of the kernel's log.
static void tell_boot(long log, unsigned long first, unsigned long cpu)
{
    unsigned long time;
    const char *text = next_record(log, "load: kernel ", buffer, sizeof buffer, &time);
    if (!text)
        fatal("the loader's record is gone");
    unsigned long kernel = number(text + length("load: kernel "));
    unsigned long modules = number(find(text, "modules ") + length("modules "));
    const char *peer = find(text, "mmds ") + length("mmds ");
    unsigned long mmds = number(peer);
    const char *mmds_cpu = find(peer, " ") + 1;
    const char *exec_cpu = find(text, "exec ") + length("exec ");
    unsigned long exec = number(find(exec_cpu, " ") + 1);
    tell("kernel_ns", kernel);
    tell("modules_ns", modules);
    tell("exec_at_ns", exec);
    tell("first_at_ns", first);
    tell("boot_ns", first - exec);
    tell("cpu_ns", cpu - number(exec_cpu));
    if (mmds)
        tell("mmds_ns", now(cpu_clock(mmds)) - number(mmds_cpu));
}

// Prints the memory of PID 1 and of the kernel, in KiB.
static void tell_memory(void)
{
    tell("rss_kib", figure("/proc/1/status", "VmRSS:"));
    tell("pss_kib", figure("/proc/1/smaps_rollup", "\nPss:"));
    tell("private_kib", figure("/proc/1/smaps_rollup", "Private_Dirty:"));
    tell("page_tables_kib", figure("/proc/1/status", "VmPTE:"));
    tell("free_kib", figure("/proc/meminfo", "MemFree:"));
    tell("available_kib", figure("/proc/meminfo", "MemAvailable:"));
}

// How often PID 1 has got the processor so far (Documentation/scheduler/sched-stats.rst). While
// that stays the same, it has executed no instruction, and so made no system call.
static unsigned long turns(void)
{
    const char *text = slurp("/proc/1/schedstat", buffer, sizeof buffer);
    for (int field = 0; field < 2; field++)
        text = find(text, " ") + 1;
    return number(text);
}

static void tell_idle(void)
{
    const unsigned long SECOND = 1000000000, MINUTE = 60 * SECOND;
    // PID 1 still handles the last output.
    sleep_until(now(CLOCK_MONOTONIC) + SECOND);
    unsigned long before = turns();
    sleep_until(now(CLOCK_MONOTONIC) + MINUTE);
    tell("idle_turns", turns() - before);
}

// Exits at an instant that it prints before, once the console is idle: in microseconds of the
// kernel log's clock, which stamps "reboot: Restarting system" on the console.
static void exit_at_an_instant(long log)
{
    const unsigned long SOON = 500 * 1000000, AWAKE = 1000000;
    unsigned long time;
    sys(lseek, log, 0, SEEK_END);
    unsigned long before = now(CLOCK_MONOTONIC);
    sys(write, log, "<7>bench: clock\n", 16);
    unsigned long after = now(CLOCK_MONOTONIC);
    if (!next_record(log, "bench: clock", buffer, sizeof buffer, &time))
        fatal("no record of the clock");
    unsigned long instant = after + SOON;
    tell("exit_at_us", time + (instant - (before + after) / 2) / 1000);
    sleep_until(instant - AWAKE);
    while (now(CLOCK_MONOTONIC) < instant)
        ;
    sys(exit_group, 7);
}

static const char tracing[] = "/sys/kernel/tracing";

// Drops the trace up to now.
static void forget_trace(void)
{
    sys(mount, "tracefs", tracing, "tracefs", 0, NULL);
    long file = sys_open("/sys/kernel/tracing/trace", O_WRONLY | O_TRUNC);
    sys(close, file);
    sys(umount2, tracing, 0);
}

static void dump_trace(void)
{
    sys(mount, "tracefs", tracing, "tracefs", 0, NULL);
    spill("/sys/kernel/tracing/tracing_on", "0");
    long size, file = sys_open("/sys/kernel/tracing/trace", O_RDONLY);
    if (file < 0)
        fatal("no trace");
    while ((size = sys(read, file, buffer, sizeof buffer - 1)) > 0) {
        buffer[size] = 0;
        print(buffer);
    }
    print("bench: trace 1\n");
    sys(umount2, tracing, 0);
}

// Starts the servers to compare the API with (servers.c).
static void serve(void)
{
    char *const argv[] = {"/bin/servers", NULL}, *const envp[] = {NULL};
    int status = -1;
    long pid = sys_fork();
    if (pid == 0) {
        sys(execve, argv[0], argv, envp);
        sys(exit_group, 127);
    }
    sys(wait4, pid, &status, 0, NULL);
    if (status)
        fatal("no servers");
}

static void wait_for_a_key(void)
{
    char key;
    sys(read, 0, &key, 1);
}

static int mode_is(const char *mode, const char *name)
{
    const char *rest = find(mode, name);
    return rest == mode;
}

__attribute__((used)) void begin(long *argv)
{
    unsigned long first = now(CLOCK_MONOTONIC), cpu = now(cpu_clock(1));
    static char line[4096];
    (void)argv;
    long log = sys_open("/dev/kmsg", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    const char *mode = find(slurp("/proc/cmdline", line, sizeof line), "bench.mode=");
    mode = mode ? mode + length("bench.mode=") : "";
    tell_boot(log, first, cpu);
    if (mode_is(mode, "full")) {
        sleep_until(now(CLOCK_MONOTONIC) + 1000000000);
        tell_memory();
        tell_idle();
    } else if (mode_is(mode, "reader")) {
        wait_for_a_key();
    } else if (mode_is(mode, "end")) {
        wait_for_a_key();
        forget_trace();
    } else if (mode_is(mode, "trace")) {
        dump_trace();
    } else if (mode_is(mode, "serve")) {
        serve();
        tell("serving", 1);
        wait_for_a_key();
    }
    exit_at_an_instant(log);
}
