"""The lab's hand inside dom0: runs commands for the lab and returns their output and exit code.

One TCP connection a command, over the line that only the lab's QEMU process reaches; any number at once. Both sides
speak frames: one byte kind, four bytes length (big endian), content.

    lab -> agent   r request (JSON, first)   i input   c end of input   w window size (rows, columns: two u16)
    agent -> lab   o output   e error output   x exit code (i32, last; -N for signal N)

When the connection ends before the command does, the command's process group is killed: nothing is left of what
nobody waits for. What a command put into a session of its own lives on.
"""

import fcntl
import json
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import termios
import threading
import time

PORT = 7
FRAME_MAX = 1 << 20
CHUNK = 64 << 10
INPUT_HELD_MAX = 1 << 20
LINGER_SECONDS = 0.3


def exactly(conn, count):
    data = b""
    while len(data) < count:
        part = conn.recv(count - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def read_frame(conn):
    kind, length = struct.unpack(">cI", exactly(conn, 5))
    if length > FRAME_MAX:
        raise EOFError
    return kind, exactly(conn, length)


def write_frame(conn, kind, data):
    conn.sendall(struct.pack(">cI", kind, len(data)) + data)


def start(request):
    """The process, and its ends: input, output, error output (None with a terminal), window."""
    if request.get("terminal"):
        ours, theirs = pty.openpty()
        environment = dict(os.environ, TERM=request["terminal"])
        child = subprocess.Popen(
            ["setsid", "-c", "bash", "-l"], stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd="/root",
        )
        os.close(theirs)
        return child, ours, ours, None, ours
    child = subprocess.Popen(
        ["bash", "-c", request["command"]], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True, cwd="/root",
    )
    ends = [os.dup(end.fileno()) for end in (child.stdin, child.stdout, child.stderr)]
    for end in (child.stdin, child.stdout, child.stderr):
        end.close()
    return child, ends[0], ends[1], ends[2], None


def relay(conn, child, to_child, out, err, window):
    """Carries bytes both ways until the command has ended and said all it had to say."""
    os.set_blocking(to_child, False)
    ended = os.pidfd_open(child.pid)
    sources = {out: b"o"}
    if err is not None:
        sources[err] = b"e"
    held, input_open, last = b"", True, None
    try:
        while True:
            poll = select.poll()
            for source in sources:
                poll.register(source, select.POLLIN)
            if len(held) < INPUT_HELD_MAX:
                poll.register(conn.fileno(), select.POLLIN)
            if held and to_child not in sources:
                poll.register(to_child, select.POLLOUT)
            if last is None:
                poll.register(ended, select.POLLIN)
            ready = dict(poll.poll(50 if held or last is not None else None))
            if ended in ready:
                last = time.monotonic()
            for source in [s for s in sources if s in ready]:
                try:
                    data = os.read(source, CHUNK)
                except OSError:
                    data = b""
                if data:
                    write_frame(conn, sources[source], data)
                    last = last and time.monotonic()
                else:
                    del sources[source]
            if conn.fileno() in ready:
                kind, data = read_frame(conn)
                if kind == b"i":
                    held += data
                elif kind == b"w" and window is not None:
                    rows, columns = struct.unpack(">HH", data)
                    fcntl.ioctl(window, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
                elif kind == b"c":
                    input_open = False
            if held:
                try:
                    held = held[os.write(to_child, held):]
                except BlockingIOError:
                    pass
                except OSError:
                    held = b""
            if not input_open and not held and to_child >= 0 and window is None:
                os.close(to_child)
                to_child, input_open = -1, True
            # A process the command left behind may hold its output open for ever.
            if last is not None and (not sources or time.monotonic() - last > LINGER_SECONDS):
                write_frame(conn, b"x", struct.pack(">i", child.wait()))
                return
    finally:
        for end in {ended, to_child, out, err} - {-1, None}:
            os.close(end)


def serve(conn, token):
    child = None
    try:
        with conn:
            conn.settimeout(None)
            conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            kind, data = read_frame(conn)
            request = json.loads(data)
            if kind != b"r" or request.get("token") != token:
                return
            child, *ends = start(request)
            relay(conn, child, *ends)
    except (EOFError, OSError):
        pass
    finally:
        if child is not None and child.poll() is None:
            try:
                os.killpg(child.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            child.wait()


def main():
    with open("/run/lab/token", encoding="ascii") as file:
        token = file.read().strip()
    with socket.create_server(("0.0.0.0", PORT), backlog=32) as listener:
        while True:
            conn, _ = listener.accept()
            threading.Thread(target=serve, args=(conn, token), daemon=True).start()


main()
