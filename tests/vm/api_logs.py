"""The log read by Docker's own client library: python3 api_logs.py SOCKET."""

import socket
import sys

import docker
from docker.utils.socket import demux_adaptor, frames_iter

client = docker.APIClient(base_url=f"unix://{sys.argv[1]}", version="1.41")


def logs(query):
    """The response, requested as the library requests a container's log."""
    response = client._get(f"http+docker://localhost/v1/logs{query}", stream=True)
    assert response.status_code == 200, response
    media_type = response.headers["Content-Type"]
    assert media_type == "application/vnd.docker.multiplexed-stream", media_type
    return response


# As `docker logs` reads: the whole log, and incrementally.
whole = b"".join(client._multiplexed_buffer_helper(logs("")))
lines = [b"%s %d" % (name, n) for name in (b"error", b"out") for n in range(1, 6)]
assert sorted(whole.splitlines()) == lines, whole
frames = client._multiplexed_response_stream_helper(logs("?offset=6"))
assert b"".join(frames) == whole[6:]

# As `docker attach` reads from a socket, with separate streams; HTTP/1.0 has no chunks.
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
connection.sendall(b"GET /v1/logs HTTP/1.0\r\n\r\n")
head = b""
while not head.endswith(b"\r\n\r\n"):
    head += connection.recv(1)
out, error = b"", b""
for stream, piece in frames_iter(connection, tty=False):
    new_out, new_error = demux_adaptor(stream, piece)
    out, error = out + (new_out or b""), error + (new_error or b"")
assert out == b"".join(b"out %d\n" % n for n in range(1, 6)), out
assert error == b"".join(b"error %d\n" % n for n in range(1, 6)), error
print("all frames are Docker's")
