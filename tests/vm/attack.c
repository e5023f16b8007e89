/* Attacks on PID 1 for which no shell has a command. */
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void tried(const char *what, long result)
{
    printf("%s: %s\n", what, result == -1 ? strerrorname_np(errno) : "done");
}

/* Everything that only needs a process ID. */
static void meddle(void)
{
    char bytes[8] = "";
    struct iovec near = {bytes, sizeof bytes}, far = {(void *)0x200000, sizeof bytes};
    struct rlimit none = {0, 0};
    struct sched_param param = {1};
    cpu_set_t set;

    CPU_ZERO(&set);
    CPU_SET(0, &set);
    tried("attach", ptrace(PTRACE_ATTACH, 1, 0, 0));
    tried("seize", ptrace(PTRACE_SEIZE, 1, 0, 0));
    tried("read memory", process_vm_readv(1, &near, 1, &far, 1, 0));
    tried("write memory", process_vm_writev(1, &near, 1, &far, 1, 0));
    tried("open memory", open("/proc/1/mem", O_RDWR));
    tried("open environment", open("/proc/1/environ", O_RDONLY));
    tried("open output", open("/proc/1/fd/3", O_WRONLY));
    tried("open OOM score", open("/proc/1/oom_score_adj", O_WRONLY));
    tried("enter root", open("/proc/1/root", O_RDONLY));
    tried("limit", prlimit(1, RLIMIT_NOFILE, &none, 0));
    tried("schedule", sched_setscheduler(1, SCHED_FIFO, &param));
    tried("pin", sched_setaffinity(1, sizeof set, &set));
    tried("priority", setpriority(PRIO_PROCESS, 1, 19));
    int pidfd = syscall(SYS_pidfd_open, 1, 0);
    tried("take descriptor", syscall(SYS_pidfd_getfd, pidfd, 3, 0));
    tried("kill", kill(1, SIGKILL));
    tried("stop", kill(1, SIGSTOP));
    tried("end", kill(1, SIGTERM));
}

static void or_die(int failed)
{
    if (failed) {
        perror("PID 1");
        _exit(1);
    }
}

/* Leaves PID 1 without memory and descriptors. */
static void limits(void)
{
    struct rlimit none = {0, 0};

    or_die(prlimit(1, RLIMIT_AS, &none, 0) || prlimit(1, RLIMIT_DATA, &none, 0) ||
           prlimit(1, RLIMIT_NOFILE, &none, 0));
}

/* Leaves PID 1 without free descriptors for so many seconds. Prints its processor time meanwhile, in
   hundredths of a second. */
static void shut(int seconds)
{
    struct rlimit none = {0, 10240}, all = {10240, 10240};
    struct timespec before, after;
    clockid_t clock;

    or_die(prlimit(1, RLIMIT_NOFILE, &none, 0) || clock_getcpuclockid(1, &clock));
    or_die(clock_gettime(clock, &before));
    puts("shut");
    sleep(seconds);
    or_die(clock_gettime(clock, &after) || prlimit(1, RLIMIT_NOFILE, &all, 0));
    printf("%ld\n", (after.tv_sec - before.tv_sec) * 100 + (after.tv_nsec - before.tv_nsec) / 10000000);
}

/* Keeps PID 1 from allocating memory for so many seconds. */
static void starve(int seconds)
{
    struct rlimit none = {0, RLIM_INFINITY}, all = {RLIM_INFINITY, RLIM_INFINITY};

    or_die(prlimit(1, RLIMIT_AS, &none, 0));
    sleep(seconds);
    or_die(prlimit(1, RLIMIT_AS, &all, 0));
}

/* Keeps a file in use only by a mapping, with a dirty page. */
static void map(const char *path)
{
    int fd = open(path, O_RDWR | O_CREAT, 0644);
    if (fd < 0 || ftruncate(fd, 4096))
        abort();
    char *page = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    strcpy(page, "mapped\n");
    for (;;)
        pause();
}

/* Starts so many children, each with a child, which all exit at once. */
static void orphans(int count)
{
    int gate[2];
    if (pipe(gate))
        abort();
    for (int i = 0; i < count; i++) {
        int pid = fork();
        if (pid < 0)
            break;
        if (pid == 0) {
            close(gate[1]);
            if (fork() >= 0)
                read(gate[0], &gate, 1);
            _exit(7);
        }
    }
    close(gate[1]);
    _exit(0);
}

/* Forks endlessly, and ignores all signals that can be ignored. */
static void bomb(void)
{
    for (int i = 1; i < 32; i++)
        signal(i, SIG_IGN);
    for (;;)
        fork();
}

/* Sends each process started after this one a fatal signal as soon as it is permitted, with a
 * core where the kernel writes one. */
static void strike(void)
{
    static const int signals[] = {SIGABRT, SIGKILL, SIGSEGV};
    unsigned struck = 0;
    int last = fork();

    if (!last)
        _exit(0);
    for (int next = last + 1;; )
        for (int pid = next; pid < next + 8; pid++) {
            int failed;
            while ((failed = kill(pid, signals[struck % 3])) && errno == EPERM)
                next = pid + 1;
            if (!failed) {
                struck++;
                next = pid + 1;
            }
            if (next > pid)
                break;
        }
}

/* Kills all processes once the pipe is opened for writing. */
static void last(const char *path)
{
    int fd = open(path, O_RDONLY);
    kill(fd < 0 ? 0 : -1, SIGKILL);
}

/* Keeps the pipe of its output locked for so many seconds, with that text in it, by a child that outlives
   this process. Then writes a last line. */
static void plug(const char *text, int seconds)
{
    int pair[2];
    or_die(socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
    switch (fork()) {
    case 0:
        setsid();
        if (write(1, text, strlen(text)) >= 0)
            splice(pair[0], 0, 1, 0, 4096, 0);
        _exit(0);
    default:
        usleep(300000);
        if (fork())
            return;
        setsid();
        close(1);
        sleep(seconds);
        _exit(write(pair[1], "unplugged\n", 10) != 10);
    }
}

/* The same, while a child keeps writing single bytes to standard error. */
static void drip(int seconds)
{
    plug("", seconds);
    if (fork())
        return;
    setsid();
    for (int n = 0; n < 50 * seconds && write(2, "x", 1) == 1; n++)
        usleep(20000);
    _exit(0);
}

/* Reopens the pipe of its output, keeps it locked and closes its original end, so that PID 1's close of that
   end would be the last. */
static void lock_output(void)
{
    int pair[2], pipe = open("/proc/self/fd/1", O_WRONLY);
    or_die(pipe < 0 || socketpair(AF_UNIX, SOCK_STREAM, 0, pair) || close(1));
    splice(pair[0], 0, pipe, 0, 4096, 0);
}

/* The number of bytes that are still unread in the pipe after a second. */
static int unread_in(int pipe)
{
    int left = 1;
    for (int n = 0; left && n < 20; n++) {
        usleep(50000);
        or_die(ioctl(pipe, FIONREAD, &left));
    }
    return left;
}

/* Writes to standard error until it is no longer read, and reads the rest back. Then writes a line to
   standard output, and reports on the console once that was read. */
static void fill_stderr(void)
{
    static char piece[4096];
    int back = open("/proc/self/fd/2", O_RDONLY | O_NONBLOCK);
    FILE *console = fopen("/dev/console", "w");

    or_die(back < 0 || !console);
    do
        or_die(write(2, piece, sizeof piece) < 0);
    while (!unread_in(2));
    while (read(back, piece, sizeof piece) > 0)
        ;
    fprintf(console, "stderr full\n");
    fflush(console);
    puts("last");
    while (unread_in(1))
        ;
    fprintf(console, "stdout read\n");
}

/* The same with the pipe of its input, once it has data. */
static void stop_up(int seconds)
{
    static char piece[4096];
    int pair[2];
    or_die(socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
    while (send(pair[0], piece, sizeof piece, MSG_DONTWAIT) > 0)
        ;
    puts("full");
    if (!fork()) {
        splice(0, 0, pair[0], 0, 4096, 0);
        _exit(0);
    }
    sleep(seconds);
    while (read(pair[1], piece, sizeof piece) == sizeof piece)
        ;
    puts("empty");
    while (read(0, piece, 1) == 1)
        putchar(*piece);
}

/* Keeps its terminal's size locked: TIOCGWINSZ waits for a page fault that is never resolved. */
static void hold_size(void)
{
    char *page = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct uffdio_api api = {.api = UFFD_API};
    struct uffdio_register all = {{(unsigned long)page, 4096}, UFFDIO_REGISTER_MODE_MISSING, 0};
    int faults = syscall(SYS_userfaultfd, O_CLOEXEC);

    or_die(ioctl(faults, UFFDIO_API, &api));
    or_die(ioctl(faults, UFFDIO_REGISTER, &all));
    puts("held");
    ioctl(0, TIOCGWINSZ, page);
}

/* Takes all memory. */
static void eat(void)
{
    for (;;) {
        char *piece = malloc(1 << 20);
        if (piece)
            memset(piece, 1, 1 << 20);
    }
}

/* Takes all memory: first with files in these directories, which stay when their owner is killed, then
 * with its own pages. A process that is killed for it has a successor. */
static void fill(char **places)
{
    static char piece[1 << 14];

    /* Only the child continues. */
    while (fork())
        wait(0);
    int score = open("/proc/self/oom_score_adj", O_WRONLY);
    if (write(score, "1000", 4) != 4)
        abort();
    for (; *places; places++) {
        char name[64];
        snprintf(name, sizeof name, "%s/%d", *places, getpid());
        int file = open(name, O_WRONLY | O_CREAT, 0600);
        while (write(file, piece, sizeof piece) > 0)
            ;
        close(file);
    }
    eat();
}

/* PID 1's registers, by purpose. */
#ifdef __x86_64__
#define PC rip
#define SP rsp
#define CALL rax
#define ARGUMENTS(r, a, b, c) (r.rdi = a, r.rsi = b, r.rdx = c, r.orig_rax = -1)
enum { INSTRUCTION = 2, RETURN_ADDRESS = 8 };
#else
#define PC pc
#define SP sp
#define CALL regs[8]
#define ARGUMENTS(r, a, b, c) (r.regs[0] = a, r.regs[1] = b, r.regs[2] = c)
enum { INSTRUCTION = 4, RETURN_ADDRESS = 0 };
#endif

/* Stops PID 1, which waits in a system call, and returns its registers. */
static struct user_regs_struct stop(void)
{
    struct user_regs_struct regs;
    struct iovec all = {&regs, sizeof regs};
    or_die(ptrace(PTRACE_SEIZE, 1, 0, 0) || ptrace(PTRACE_INTERRUPT, 1, 0, 0) ||
           waitpid(1, 0, __WALL) != 1 || ptrace(PTRACE_GETREGSET, 1, NT_PRSTATUS, &all));
    return regs;
}

static void set(struct user_regs_struct regs)
{
    struct iovec all = {&regs, sizeof regs};
    or_die(ptrace(PTRACE_SETREGSET, 1, NT_PRSTATUS, &all));
}

/* Makes PID 1 call one of its own functions. */
static void panic(unsigned long function)
{
    struct user_regs_struct regs = stop();
    regs.PC = function;
    regs.SP = ((regs.SP - 1024) & ~15ul) - RETURN_ADDRESS;
    ARGUMENTS(regs, 0, 0, 0);
#ifndef __x86_64__
    int none = -1;
    struct iovec call = {&none, sizeof none};
    or_die(ptrace(PTRACE_SETREGSET, 1, NT_ARM_SYSTEM_CALL, &call));
#endif
    set(regs);
    or_die(ptrace(PTRACE_DETACH, 1, 0, 0));
}

/* Installs a seccomp filter in PID 1 that denies fork. */
static void sterilize(void)
{
    struct user_regs_struct before = stop(), regs = before;
    struct {
        struct sock_fprog program;
        struct sock_filter filter[5];
    } there = {.filter = {
                   BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
                   BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_clone, 1, 0),
                   BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_clone3, 0, 1),
                   BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EAGAIN),
                   BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
               }};
    unsigned long place = (before.SP - 1024) & ~15ul;
    there.program.len = 5;
    there.program.filter = (void *)(place + offsetof(typeof(there), filter));
    struct iovec near = {&there, sizeof there}, far = {(void *)place, sizeof there};
    or_die(process_vm_writev(1, &near, 1, &far, 1, 0) != sizeof there);
    regs.PC -= INSTRUCTION;
    ARGUMENTS(regs, SECCOMP_SET_MODE_FILTER, 0, place);
    regs.CALL = SYS_seccomp;
    set(regs);
    or_die(ptrace(PTRACE_SINGLESTEP, 1, 0, 0) || waitpid(1, 0, __WALL) != 1);
    set(before);
    or_die(ptrace(PTRACE_DETACH, 1, 0, 0));
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    setvbuf(stdout, 0, _IOLBF, 0);
    if (!strcmp(what, "meddle"))
        meddle();
    else if (!strcmp(what, "limits"))
        limits();
    else if (!strcmp(what, "shut"))
        shut(atoi(argv[2]));
    else if (!strcmp(what, "starve"))
        starve(atoi(argv[2]));
    else if (!strcmp(what, "map"))
        map(argv[2]);
    else if (!strcmp(what, "orphans"))
        orphans(atoi(argv[2]));
    else if (!strcmp(what, "bomb"))
        bomb();
    else if (!strcmp(what, "eat"))
        eat();
    else if (!strcmp(what, "fill"))
        fill(argv + 2);
    else if (!strcmp(what, "strike"))
        strike();
    else if (!strcmp(what, "last"))
        last(argv[2]);
    else if (!strcmp(what, "panic"))
        panic(strtoul(argv[2], 0, 16));
    else if (!strcmp(what, "sterilize"))
        sterilize();
    else if (!strcmp(what, "plug"))
        plug(argv[2], atoi(argv[3]));
    else if (!strcmp(what, "drip"))
        drip(atoi(argv[2]));
    else if (!strcmp(what, "lock-output"))
        lock_output();
    else if (!strcmp(what, "fill-stderr"))
        fill_stderr();
    else if (!strcmp(what, "stop-up"))
        stop_up(atoi(argv[2]));
    else if (!strcmp(what, "hold-size"))
        hold_size();
    else if (!strcmp(what, "nothing"))
        pause();
    else
        return 2;
    return 0;
}
