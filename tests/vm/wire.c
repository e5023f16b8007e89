// Helpers for tests of the API's files and tunnels: minimal programs that do the same over vsock, for
// comparison, and TCP servers with various behaviours.
//
//   wire vsock PORT send FILE      each connection gets the file
//   wire vsock PORT output FILE    each connection gets the output of cat FILE
//   wire vsock PORT store FILE     each connection's 8 bytes of length (this machine's order) and bytes
//                                  become the file; a byte is the answer
//   wire vsock PORT echo
//   wire vsock PORT forward TCP    to a TCP port of 127.0.0.1, as a tunnel does
//   wire tcp ADDRESS PORT echo     ADDRESS is IPv4 or IPv6
//   wire tcp ADDRESS PORT count    reads to the end, then sends the number of bytes
//   wire tcp ADDRESS PORT greet    sends "hello", closes its side, then prints the number of bytes received
//   wire tcp ADDRESS PORT deaf     accepts and never reads
//   wire tcp ADDRESS PORT reset    answers the first byte with a reset
//   wire tcp ADDRESS PORT flood N  N bytes, each the low byte of its number
//   wire stop                      stops all processes but PID 1, and new ones, for a few seconds
//   wire tcp ADDRESS PORT full     does not accept; its backlog has room for one connection
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <linux/vm_sockets.h>
#include <netinet/in.h>
#include <netinet/tcp.h>

static char buffer[256 << 10];

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static void send_all(int fd, const char *bytes, size_t size)
{
    while (size) {
        ssize_t count = write(fd, bytes, size);
        if (count < 0)
            exit(1);
        bytes += count;
        size -= (size_t)count;
    }
}

static void copy(int from, int to, uint64_t size)
{
    while (size) {
        ssize_t count = read(from, buffer, size < sizeof buffer ? size : sizeof buffer);
        if (count <= 0)
            exit(1);
        send_all(to, buffer, (size_t)count);
        size -= (uint64_t)count;
    }
}

static uint64_t count_to_end(int fd)
{
    uint64_t total = 0;
    for (ssize_t count; (count = read(fd, buffer, sizeof buffer)) > 0;)
        total += (uint64_t)count;
    return total;
}

// Copies in both directions between two sockets, until one ends.
static void forward(int one, int other)
{
    struct pollfd ends[2] = {{.fd = one, .events = POLLIN}, {.fd = other, .events = POLLIN}};
    for (;;) {
        poll(ends, 2, -1);
        for (int i = 0; i < 2; i++) {
            if (!ends[i].revents)
                continue;
            ssize_t count = read(ends[i].fd, buffer, sizeof buffer);
            if (count <= 0)
                return;
            send_all(ends[!i].fd, buffer, (size_t)count);
        }
    }
}

static void serve(int fd, const char *what, const char *argument)
{
    int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on); // has no effect on vsock
    if (!strcmp(what, "send")) {
        int file = open(argument, O_RDONLY);
        off_t size = lseek(file, 0, SEEK_END);
        lseek(file, 0, SEEK_SET);
        copy(file, fd, (uint64_t)size);
        close(file);
    } else if (!strcmp(what, "output")) {
        int ends[2];
        if (pipe(ends))
            fail("pipe");
        if (!fork()) {
            dup2(ends[1], 1);
            close(ends[1]);
            execlp("cat", "cat", argument, NULL);
            fail("cat");
        }
        close(ends[1]);
        for (ssize_t count; (count = read(ends[0], buffer, sizeof buffer)) > 0;)
            send_all(fd, buffer, (size_t)count);
        close(ends[0]);
    } else if (!strcmp(what, "store")) {
        uint64_t size;
        if (read(fd, &size, sizeof size) != sizeof size)
            fail("length");
        int file = open(argument, O_WRONLY | O_CREAT | O_TRUNC, 0644);
        copy(fd, file, size);
        close(file);
        send_all(fd, "!", 1);
    } else if (!strcmp(what, "echo")) {
        for (ssize_t count; (count = read(fd, buffer, sizeof buffer)) > 0;)
            send_all(fd, buffer, (size_t)count);
    } else if (!strcmp(what, "forward")) {
        struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(argument))};
        to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        int server = socket(AF_INET, SOCK_STREAM, 0);
        setsockopt(server, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        if (connect(server, (void *)&to, sizeof to))
            fail("connect");
        forward(fd, server);
    } else if (!strcmp(what, "count")) {
        char text[32];
        snprintf(text, sizeof text, "%llu", (unsigned long long)count_to_end(fd));
        send_all(fd, text, strlen(text));
    } else if (!strcmp(what, "greet")) {
        send_all(fd, "hello", 5);
        shutdown(fd, SHUT_WR);
        printf("heard %llu\n", (unsigned long long)count_to_end(fd));
        fflush(stdout);
    } else if (!strcmp(what, "deaf")) {
        pause();
    } else if (!strcmp(what, "reset")) {
        char byte;
        struct linger now = {1, 0};
        if (read(fd, &byte, 1) == 1)
            setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    } else if (!strcmp(what, "flood")) {
        unsigned long long left = strtoull(argument, NULL, 10), at = 0;
        while (left) {
            size_t piece = left < sizeof buffer ? (size_t)left : sizeof buffer;
            for (size_t i = 0; i < piece; i++)
                buffer[i] = (char)(at + i);
            send_all(fd, buffer, piece);
            at += piece;
            left -= piece;
        }
    }
    close(fd);
}

int main(int argc, char **argv)
{
    int fd;
    if (argc == 2 && !strcmp(argv[1], "stop")) {
        sleep(1);
        for (time_t end = time(NULL) + 5; time(NULL) < end;) {
            kill(-1, SIGSTOP);
            usleep(100);
        }
        sleep(5);
        return kill(-1, SIGCONT);
    }
    if (argc >= 4 && !strcmp(argv[1], "vsock")) {
        struct sockaddr_vm address = {.svm_family = AF_VSOCK,
                                      .svm_cid = VMADDR_CID_ANY,
                                      .svm_port = (unsigned)atoi(argv[2])};
        fd = socket(AF_VSOCK, SOCK_STREAM, 0);
        if (bind(fd, (void *)&address, sizeof address))
            fail("bind");
        argv += 3;
    } else if (argc >= 5 && !strcmp(argv[1], "tcp")) {
        struct sockaddr_in v4 = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(argv[3]))};
        struct sockaddr_in6 v6 = {.sin6_family = AF_INET6, .sin6_port = v4.sin_port};
        int is_v4 = inet_pton(AF_INET, argv[2], &v4.sin_addr);
        if (!is_v4 && !inet_pton(AF_INET6, argv[2], &v6.sin6_addr))
            fail(argv[2]);
        int on = 1;
        fd = socket(is_v4 ? AF_INET : AF_INET6, SOCK_STREAM, 0);
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
        if (is_v4 ? bind(fd, (void *)&v4, sizeof v4) : bind(fd, (void *)&v6, sizeof v6))
            fail("bind");
        argv += 4;
    } else {
        fprintf(stderr, "see the first lines of wire.c\n");
        return 2;
    }
    int is_full = !strcmp(argv[0], "full");
    if (listen(fd, is_full ? 0 : 512))
        fail("listen");
    signal(SIGCHLD, SIG_IGN);
    printf("listening\n");
    fflush(stdout);
    while (is_full)
        pause();
    for (;;) {
        int connection = accept(fd, NULL, NULL);
        if (connection < 0)
            fail("accept");
        // Those that are measured use one process, as a fast server does.
        if (!strcmp(argv[0], "send") || !strcmp(argv[0], "output") || !strcmp(argv[0], "store")) {
            serve(connection, argv[0], argv[1]);
        } else if (!fork()) {
            close(fd);
            serve(connection, argv[0], argv[1]);
            _exit(0);
        } else {
            close(connection);
        }
    }
}
