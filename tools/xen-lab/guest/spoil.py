"""A migration's way to the target that goes wrong where it is told to: `spoil.py HOST PORT WHERE WHAT`, in place of socat.

WHERE is a record of libxc's stream (docs/specs/libxc-migration-stream of Xen): `number:N` counts from 0, `type:T` is the
first of that type. There WHAT happens:

    cut       the connection ends
    garble    the record's type becomes one nobody knows
    hold      /run/lab/held appears, and everything waits until /run/lab/released does
"""

import os
import select
import socket
import struct
import sys
import time

MARKER = b"\xff" * 8 + b"XENF"
HEADERS = 24 + 16
CHUNK = 256 << 10
CONNECT_SECONDS = 20
HOLD_SECONDS = 300
HELD, RELEASED = "/run/lab/held", "/run/lab/released"


class Walk:
    """Goes along with the stream and says where its records begin."""

    def __init__(self, where):
        kind, _, value = where.partition(":")
        self.by_type, self.wanted = kind == "type", int(value)
        self.pending, self.skip, self.number = bytearray(), 0, 0
        self.state = "before"

    def cut_off(self, count):
        part = bytes(self.pending[:count])
        del self.pending[:count]
        return part

    def feed(self, data):
        """What can go on, in parts: (is the record wanted, bytes)."""
        self.pending += data
        while self.pending:
            if self.state == "through":
                yield False, self.cut_off(len(self.pending))
            elif self.skip:
                part = self.cut_off(min(self.skip, len(self.pending)))
                self.skip -= len(part)
                yield False, part
            elif self.state == "before":
                at = self.pending.find(MARKER)
                if at >= 0:
                    self.skip, self.state = at + HEADERS, "records"
                elif len(self.pending) >= len(MARKER):
                    yield False, self.cut_off(len(self.pending) - len(MARKER) + 1)
                    return
                else:
                    return
            elif len(self.pending) < 8:
                return
            else:
                kind, length = struct.unpack("<II", self.pending[:8])
                wanted = (kind if self.by_type else self.number) == self.wanted
                self.number += 1
                self.skip = (length + 7) & ~7
                if kind == 0:
                    self.state = "through"
                    self.skip = 0
                if wanted:
                    self.wanted = -1
                yield wanted, self.cut_off(8)


def hold():
    open(HELD, "w").close()
    end = time.monotonic() + HOLD_SECONDS
    while not os.path.exists(RELEASED):
        if time.monotonic() > end:
            sys.exit("nobody released what was held")
        time.sleep(0.1)


def connect(host, port):
    end = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            return socket.create_connection((host, port), timeout=None)
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def main():
    host, port, where, what = sys.argv[1:]
    for file in (HELD, RELEASED):
        if os.path.exists(file):
            os.unlink(file)
    conn = connect(host, int(port))
    walk, stdin_open = Walk(where), True
    while True:
        watched = [conn] + ([0] if stdin_open else [])
        ready, _, _ = select.select(watched, [], [])
        if conn in ready:
            data = conn.recv(CHUNK)
            if not data:
                return
            os.write(1, data)
        if 0 in ready:
            data = os.read(0, CHUNK)
            if not data:
                conn.sendall(bytes(walk.pending))
                conn.shutdown(socket.SHUT_WR)
                stdin_open = False
            for wanted, part in walk.feed(data):
                if wanted and what == "cut":
                    print("spoil.py: the connection ends here", file=sys.stderr)
                    return
                if wanted and what == "garble":
                    print("spoil.py: this record is garbled", file=sys.stderr)
                    part = struct.pack("<I", 0x7FFF_F00D) + part[4:]
                if wanted and what == "hold":
                    hold()
                conn.sendall(part)


main()
