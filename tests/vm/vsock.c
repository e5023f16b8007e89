// Tests the lab's vsock and the guest's kernel, without pigeon-init in the VM. Once it listens on port 20000,
// it connects to port 20001 of the host and sends hello. The first byte of each accepted connection is a
// command: 'e' echoes all further bytes; 's' sends 1 MiB of that letter, and closes.
#include <sys/socket.h> // before it, which needs sockaddr

#include <linux/vm_sockets.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { GUEST_PORT = 20000, HOST_PORT = 20001, SENT = 1 << 20 };

static char buffer[64 << 10];

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static void send_all(int connection, ssize_t size)
{
    for (ssize_t sent = 0, count; sent < size; sent += count)
        if ((count = write(connection, buffer + sent, size - sent)) <= 0)
            fail("write");
}

static void serve(int connection)
{
    char order;
    if (read(connection, &order, 1) != 1)
        return;
    if (order == 's') {
        memset(buffer, order, sizeof buffer);
        for (int left = SENT; left; left -= sizeof buffer)
            send_all(connection, sizeof buffer);
    }
    for (ssize_t size; order == 'e' && (size = read(connection, buffer, sizeof buffer)) > 0;)
        send_all(connection, size);
}

int main(void)
{
    struct sockaddr_vm guest = {
        .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = GUEST_PORT};
    struct sockaddr_vm host = {
        .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = HOST_PORT};
    signal(SIGCHLD, SIG_IGN);
    int listener = socket(AF_VSOCK, SOCK_STREAM, 0), hello = socket(AF_VSOCK, SOCK_STREAM, 0);
    if (bind(listener, (struct sockaddr *)&guest, sizeof guest) || listen(listener, 64))
        fail("listen");
    if (connect(hello, (struct sockaddr *)&host, sizeof host) == 0)
        dprintf(hello, "hello\n");
    else
        perror("hello");
    close(hello);
    for (;;) {
        int connection = accept(listener, NULL, NULL);
        if (fork() == 0) {
            serve(connection);
            exit(0);
        }
        close(connection);
    }
}
