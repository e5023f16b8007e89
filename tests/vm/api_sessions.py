"""Sessions with the `websockets` package: python3 api_sessions.py SOCKET."""

import asyncio
import json
import sys

from websockets.asyncio.client import unix_connect
from websockets.exceptions import ConnectionClosed



def connect():
    """A connection for a session."""
    return unix_connect(sys.argv[1], "ws://vm/v1/ws/exec")


async def to_the_end(socket):
    """All output, the last text message, and the close code."""
    output, text = b"", None
    try:
        while True:
            message = await socket.recv()
            if isinstance(message, bytes):
                assert text is None, "output after the exit"
                output += message
            else:
                text = json.loads(message)
    except ConnectionClosed as closed:
        return output, text, closed.rcvd.code if closed.rcvd else None


async def main():
    async with connect() as socket:
        await socket.send(json.dumps({"command": ["sh", "-c", "cat; exit 3"]}))
        await socket.send([b"in ", b"frag", b"ments"])
        await (await socket.ping(b"payload"))
        await socket.send(json.dumps({"stdin": "eof"}))
        end = await to_the_end(socket)
        assert end == (b"in fragments", {"Exit": {"code": 3, "signal": None}}, 1000), end

    async with connect() as socket:
        await socket.send(json.dumps({"command": ["sh"], "tty": True, "cols": 90, "rows": 30}))
        await socket.send(b"stty size; exit\n")
        output, text, code = await to_the_end(socket)
        assert b"30 90\r\n" in output and code == 1000, (output, text, code)

    async with connect() as socket:
        await socket.send(json.dumps({"command": ["no-such-command"]}))
        output, text, code = await to_the_end(socket)
        assert "no-such-command" in text["Error"]["message"] and code == 1011, (text, code)

    # The reply to a client's close frame has the same code.
    socket = await connect()
    await socket.send(json.dumps({"command": ["sleep", "5551"]}))
    await socket.close(code=1000, reason="enough")
    assert socket.close_code == 1000, socket.close_code

    # Many at once.
    async def one(number):
        async with connect() as socket:
            await socket.send(json.dumps({"command": ["echo", str(number)]}))
            output, _, code = await to_the_end(socket)
            assert (output, code) == (f"{number}\n".encode(), 1000), (number, output, code)

    await asyncio.gather(*(one(number) for number in range(20)))
    print("all sessions went well")


asyncio.run(main())
