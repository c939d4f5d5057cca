"""Copies frames between two TAP devices and holds back those of one direction: a stand-in for the kernel's netem.

Run as `python -ISs delay_line.py NEAR FAR` where the devices shall be; it makes them, and says `ready`. Lines `SECONDS
LOSS` on its standard input say how long a frame from NEAR waits, and which share of them is dropped; at the input's end
it ends. Frames from FAR pass at once.
"""

import contextlib
import fcntl
import os
import random
import select
import struct
import sys
import time
from collections import deque

TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
OFFLOADS = 0x01 | 0x02 | 0x04  # Checksums and TCP segments are left to do, as between two veth: frames of up to 64 KiB.
LARGEST = 10 + 65536 + 64
MOST_WAITING = 20_000  # Frames; more than that and the line is too slow for its load, and drops, as lines do.
BURST = 64


def tap(name: str) -> int:
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
    fcntl.ioctl(device, TUNSETOFFLOAD, OFFLOADS)
    return device


def write(device: int, frame: bytes) -> None:
    with contextlib.suppress(OSError):  # A device that is down, or full: lost.
        os.write(device, frame)


def frames(device: int) -> list[bytes]:
    taken = []
    with contextlib.suppress(OSError):  # Nothing more to read, or the device is down.
        for _ in range(BURST):
            taken.append(os.read(device, LARGEST))
    return taken


def main() -> None:
    near, far = tap(sys.argv[1]), tap(sys.argv[2])
    # It must run when a frame is due, not when a busy machine gets round to it.
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    seconds, loss, chance = 0.0, 0.0, random.Random(0)
    waiting: deque[tuple[float, bytes]] = deque()
    os.write(1, b"ready\n")
    while True:
        timeout = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        readable, _, _ = select.select([near, far, 0], [], [], timeout)
        if near in readable:
            due = time.monotonic() + seconds
            for frame in frames(near):
                if len(waiting) < MOST_WAITING and chance.random() >= loss:
                    waiting.append((due, frame))
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            write(far, waiting.popleft()[1])
        if far in readable:
            for frame in frames(far):
                write(near, frame)
        if 0 in readable:
            line = os.read(0, 4096).split()
            if not line:
                return
            seconds, loss = map(float, line[-2:])


main()
