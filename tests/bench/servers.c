// Servers to compare the API with: an echo server on vsock port 20000, a loop of bare commands on
// port 20001, and a minimal server that executes commands on port 20002.
#include "tiny.h"
#include <linux/vm_sockets.h>
#include <sched.h>

static char buffer[64 << 10];

static void fatal(const char *what)
{
    print("bench: error ");
    print(what);
    print("\n");
    sys(exit_group, 1);
}

static long listen_on(unsigned port)
{
    struct sockaddr_vm address = {
        .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = port};
    long listener = sys(socket, AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (sys(bind, listener, &address, sizeof address) || sys(listen, listener, 8))
        fatal("no vsock");
    return listener;
}

// Echoes all bytes, one connection after the other.
static void echo(long listener)
{
    for (;;) {
        long size, connection = sys(accept4, listener, NULL, NULL, SOCK_CLOEXEC);
        while ((size = sys(read, connection, buffer, sizeof buffer)) > 0)
            sys(write, connection, buffer, size);
        sys(close, connection);
    }
}

static char *command[] = {"/bin/true", NULL};
static char *const environment[] = {"PATH=/bin", NULL};
static char stack[4096] __attribute__((aligned(16)));
// The command's standard output and error, and our ends of them; none without pipes.
static int output[2] = {-1, -1}, error[2] = {-1, -1};

__attribute__((used)) static void become_command(void)
{
    if (output[1] >= 0) {
        sys(setsid);
        sys(dup3, output[1], 1, 0);
        sys(dup3, error[1], 2, 0);
    }
    sys(execve, command[0], command, environment);
    sys(exit_group, 127);
}

// vfork(2), on a stack of the child's own, so that it cannot overwrite this frame.
static long start_command(void)
{
#ifdef __x86_64__
    long pid;
    register long none __asm__("r10") = 0;
    __asm__ volatile("syscall\n test %%eax, %%eax\n jnz 1f\n call become_command\n1:"
                     : "=a"(pid)
                     : "a"(__NR_clone), "D"(CLONE_VM | CLONE_VFORK | SIGCHLD),
                       "S"(stack + sizeof stack), "d"(0), "r"(none)
                     : "rcx", "r8", "r9", "r11", "memory");
    return pid;
#endif
#ifdef __aarch64__
    register long number __asm__("x8") = __NR_clone;
    register long pid __asm__("x0") = CLONE_VM | CLONE_VFORK | SIGCHLD;
    register long top __asm__("x1") = (long)(stack + sizeof stack);
    register long none2 __asm__("x2") = 0;
    register long none3 __asm__("x3") = 0;
    register long none4 __asm__("x4") = 0;
    __asm__ volatile("svc #0\n cbnz x0, 1f\n bl become_command\n1:"
                     : "+r"(pid)
                     : "r"(number), "r"(top), "r"(none2), "r"(none3), "r"(none4)
                     : "x30", "memory");
    return pid;
#endif
}

// Reads a count, runs the command that often, and sends the time in nanoseconds.
static void spawn(long listener)
{
    char text[32];
    for (;;) {
        long size, connection = sys(accept4, listener, NULL, NULL, SOCK_CLOEXEC);
        while ((size = sys(read, connection, text, sizeof text - 1)) > 0) {
            text[size] = 0;
            unsigned long start = now(CLOCK_MONOTONIC);
            for (unsigned long left = number(text); left; left--) {
                int status = -1;
                sys(wait4, start_command(), &status, 0, NULL);
                if (status)
                    fatal("the command");
            }
            char *end = put_number(text, now(CLOCK_MONOTONIC) - start);
            sys(write, connection, text, put(end, "\n") - text);
        }
        sys(close, connection);
    }
}

// Reads both pipes to their ends into the halves of `text`, and sets the lengths.
static void read_both(char *text, long room, long *lengths)
{
    struct {
        int fd;
        short events, revents;
    } polled[2] = {{output[0], 1, 0}, {error[0], 1, 0}};
    lengths[0] = lengths[1] = 0;
    for (int open = 2; open;) {
        sys(ppoll, polled, 2, NULL, NULL);
        for (int i = 0; i < 2; i++) {
            if (!polled[i].revents)
                continue;
            long left = room / 2 - lengths[i];
            long count = sys(read, polled[i].fd, text + i * (room / 2) + lengths[i], left);
            if (count > 0) {
                lengths[i] += count;
            } else {
                sys(close, polled[i].fd);
                polled[i].fd = -1;
                open--;
            }
        }
    }
}

// Appends a JSON string of printable text.
static char *put_quoted(char *end, const char *text, long size)
{
    *end++ = '"';
    for (; size; size--, text++) {
        if (*text == '"' || *text == '\\')
            *end++ = '\\';
        *end++ = *text;
    }
    *end++ = '"';
    return end;
}

// A minimal server for /v1/exec: takes an HTTP/1.1 request with the JSON of a command of one word,
// runs it with its output in two pipes, and responds in JSON.
static void execute(long listener)
{
    static char text[8192], body[16384], answer[17000];
    for (;;) {
        long size, connection = sys(accept4, listener, NULL, NULL, SOCK_CLOEXEC);
        while ((size = sys(read, connection, buffer, sizeof buffer - 1)) > 0) {
            buffer[size] = 0;
            char *name = (char *)find(buffer, "\"cmd\":[\"");
            if (!find(buffer, "\r\n\r\n") || !name)
                fatal("not a request");
            command[0] = name += length("\"cmd\":[\"");
            while (*name != '"')
                name++;
            *name = 0;
            sys(pipe2, output, O_CLOEXEC);
            sys(pipe2, error, O_CLOEXEC);
            long pid = start_command(), lengths[2];
            sys(close, output[1]);
            sys(close, error[1]);
            read_both(text, sizeof text, lengths);
            int status = -1;
            sys(wait4, pid, &status, 0, NULL);
            char *end = put_number(put(body, "{\"exit_code\":"), (unsigned long)(status >> 8 & 255));
            end = put_number(put(end, ",\"exit_signal\":"), (unsigned long)(status & 127));
            end = put_quoted(put(end, ",\"stdout\":"), text, lengths[0]);
            end = put_quoted(put(end, ",\"stderr\":"), text + sizeof text / 2, lengths[1]);
            end = put(end, "}");
            char *head = put(answer, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                                     "Content-Length: ");
            head = put(put(put_number(head, (unsigned long)(end - body)), "\r\n\r\n"), body);
            sys(write, connection, answer, head - answer);
        }
        sys(close, connection);
    }
}

__attribute__((used)) void begin(long *argv)
{
    (void)argv;
    long echo_listener = listen_on(20000), spawn_listener = listen_on(20001);
    long exec_listener = listen_on(20002);
    if (sys_fork() == 0)
        echo(echo_listener);
    if (sys_fork() == 0)
        spawn(spawn_listener);
    if (sys_fork() == 0)
        execute(exec_listener);
    sys(exit_group, 0);
}
