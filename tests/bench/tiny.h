// Shared by the benchmark's guest programs: system calls, numbers, the kernel's log. Without libc,
// whose start would be measured, too.
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stddef.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>

#ifdef __x86_64__
#define CONSOLE "/dev/ttyS0"

static long call(long number, long a, long b, long c, long d, long e, long f)
{
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = f;
    long answer;
    __asm__ volatile("syscall"
                     : "=a"(answer)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return answer;
}

// The program: `stack` holds argc, argv, NULL, envp, NULL (execve(2)).
void begin(long *stack);
__asm__(".globl _start\n_start: mov %rsp, %rdi\n and $-16, %rsp\n call begin\n");

// GCC calls these for assignments and initialisers (gcc's Standards, "freestanding").
void *memcpy(void *to, const void *from, unsigned long size)
{
    void *start = to;
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size)::"memory");
    return start;
}
void *memset(void *to, int byte, unsigned long size)
{
    void *start = to;
    __asm__ volatile("rep stosb" : "+D"(to), "+c"(size) : "a"(byte) : "memory");
    return start;
}
#endif

#ifdef __aarch64__
#define CONSOLE "/dev/ttyAMA0"

static long call(long number, long a, long b, long c, long d, long e, long f)
{
    register long x8 __asm__("x8") = number;
    register long x0 __asm__("x0") = a;
    register long x1 __asm__("x1") = b;
    register long x2 __asm__("x2") = c;
    register long x3 __asm__("x3") = d;
    register long x4 __asm__("x4") = e;
    register long x5 __asm__("x5") = f;
    __asm__ volatile("svc #0"
                     : "+r"(x0)
                     : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5)
                     : "memory");
    return x0;
}

void begin(long *stack);
__asm__(".globl _start\n_start: mov x0, sp\n bl begin\n");

void *memcpy(void *to, const void *from, unsigned long size)
{
    void *start = to;
    for (; size; size--)
        __asm__ volatile("ldrb w9, [%1], #1\n strb w9, [%0], #1"
                         : "+r"(to), "+r"(from)::"w9", "memory");
    return start;
}
void *memset(void *to, int byte, unsigned long size)
{
    void *start = to;
    for (; size; size--)
        __asm__ volatile("strb %w1, [%0], #1" : "+r"(to) : "r"(byte) : "memory");
    return start;
}
#endif

#define FIRST_SEVEN(n, a, b, c, d, e, f, ...) \
    call(n, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f))
#define sys(number, ...) FIRST_SEVEN(__NR_##number, ##__VA_ARGS__, 0, 0, 0, 0, 0, 0)

// Like open(2), mkdir(2) and so on: not every architecture has system calls of these names.
#define sys_open(path, flags) sys(openat, AT_FDCWD, path, flags)
#define sys_mkdir(path, mode) sys(mkdirat, AT_FDCWD, path, mode)
#define sys_unlink(path) sys(unlinkat, AT_FDCWD, path, 0)
#define sys_rmdir(path) sys(unlinkat, AT_FDCWD, path, AT_REMOVEDIR)
#define sys_fork() sys(clone, SIGCHLD)

__attribute__((unused)) static unsigned long length(const char *text)
{
    unsigned long size = 0;
    while (text[size])
        size++;
    return size;
}

__attribute__((unused)) static const char *find(const char *text, const char *word)
{
    for (; *text; text++) {
        const char *a = text, *b = word;
        while (*b && *a == *b)
            a++, b++;
        if (!*b)
            return text;
    }
    return NULL;
}

__attribute__((unused)) static unsigned long number(const char *text)
{
    unsigned long value = 0;
    for (; *text >= '0' && *text <= '9'; text++)
        value = value * 10 + (unsigned long)(*text - '0');
    return value;
}

// Appends to a string; returns its new end.
__attribute__((unused)) static char *put(char *end, const char *text)
{
    while (*text)
        *end++ = *text++;
    *end = 0;
    return end;
}
__attribute__((unused)) static char *put_number(char *end, unsigned long value)
{
    char digits[24], *first = digits + sizeof digits;
    *--first = 0;
    do
        *--first = (char)('0' + value % 10);
    while (value /= 10);
    return put(end, first);
}

__attribute__((unused)) static void print(const char *text)
{
    for (unsigned long left = length(text); left;) {
        long count = sys(write, 1, text, left);
        if (count <= 0)
            return;
        text += count;
        left -= (unsigned long)count;
    }
}

// Prints a figure for the host: `bench: name value`.
__attribute__((unused)) static void tell(const char *name, unsigned long value)
{
    char line[128], *end = put(put(put(line, "bench: "), name), " ");
    put(put_number(end, value), "\n");
    print(line);
}

// Reads a file, at most `room - 1` bytes; empty if it does not exist.
__attribute__((unused)) static char *slurp(const char *path, char *buffer, long room)
{
    long size = 0, count, file = sys_open(path, O_RDONLY);
    while (size < room - 1 && (count = sys(read, file, buffer + size, room - 1 - size)) > 0)
        size += count;
    buffer[size] = 0;
    sys(close, file);
    return buffer;
}

__attribute__((unused)) static void spill(const char *path, const char *text)
{
    long file = sys_open(path, O_WRONLY);
    sys(write, file, text, length(text));
    sys(close, file);
}

// Nanoseconds of a clock.
__attribute__((unused)) static unsigned long now(long id)
{
    struct timespec time = {0, 0};
    sys(clock_gettime, id, &time);
    return (unsigned long)time.tv_sec * 1000000000 + (unsigned long)time.tv_nsec;
}
// The clock of a process's processor time (clock_getcpuclockid(3)).
__attribute__((unused)) static long cpu_clock(unsigned long pid)
{
    return (long)(int)(~(unsigned)pid << 3 | 2);
}

__attribute__((unused)) static void sleep_until(unsigned long nanoseconds)
{
    struct timespec time = {(long)(nanoseconds / 1000000000), (long)(nanoseconds % 1000000000)};
    sys(clock_nanosleep, CLOCK_MONOTONIC, TIMER_ABSTIME, &time, NULL);
}

// Restarts the machine, which ends the VM.
__attribute__((unused, noreturn)) static void end(void)
{
    const unsigned MAGIC1 = 0xfee1dead, MAGIC2 = 672274793; // reboot(2)
    for (;;)
        sys(reboot, MAGIC1, MAGIC2, RB_AUTOBOOT, NULL);
}

// The next record of the kernel's log that contains `word`: its text, and its time in
// microseconds of the log's clock (Documentation/ABI/testing/dev-kmsg). NULL after the last one.
__attribute__((unused)) static const char *
next_record(long log, const char *word, char *buffer, long room, unsigned long *time)
{
    for (;;) {
        long size = sys(read, log, buffer, room - 1);
        if (size == -32) // EPIPE: a record was overwritten
            continue;
        if (size <= 0)
            return NULL;
        buffer[size] = 0;
        const char *text = find(buffer, ";");
        if (!text || !find(text, word))
            continue;
        const char *field = find(find(buffer, ",") + 1, ",");
        *time = number(field + 1);
        return text + 1;
    }
}
