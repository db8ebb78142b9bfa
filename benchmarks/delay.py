"""Hold each packet of an emulated link for a while, as netem does where the kernel has it.

    ip netns exec NAMESPACE python benchmarks/delay.py NEAR FAR MILLISECONDS

Makes the two network devices (TUN) in this namespace and prints "ready". They may be moved to other namespaces now, and
must be set up. Then a line on stdin lets it pass packets from one to the other until it is ended; the devices go, too.

What is more than this program can carry, the kernel drops, and counts as "dropped" of the device that sends.
"""

import collections
import contextlib
import fcntl
import os
import select
import struct
import sys
import time

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # <linux/if_tun.h>
LARGEST_PACKET = 2048  # bytes; the devices' MTU is 1500
AT_ONCE = 64  # packets taken from one device before the other has its turn
PRIORITY = -10  # a late packet is a link that was not asked for


def open_device(name: str) -> int:
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    return device


def relay(near: int, far: int, seconds: float) -> None:
    other = {near: far, far: near}
    held = collections.deque()  # (when it is due, where, packet): all are held equally long, so the first is due first
    while True:
        wait = max(0.0, held[0][0] - time.monotonic()) if held else None
        for device in select.select(list(other), [], [], wait)[0]:
            with contextlib.suppress(BlockingIOError):
                for _ in range(AT_ONCE):
                    packet = os.read(device, LARGEST_PACKET)
                    held.append((time.monotonic() + seconds, other[device], packet))
        now = time.monotonic()
        while held and held[0][0] <= now:
            _, device, packet = held.popleft()
            with contextlib.suppress(OSError):  # it is not up
                os.write(device, packet)


def main() -> None:
    near, far = map(open_device, sys.argv[1:3])
    os.setpriority(os.PRIO_PROCESS, 0, PRIORITY)
    print("ready", flush=True)
    sys.stdin.readline()
    relay(near, far, float(sys.argv[3]) / 1000)


if __name__ == "__main__":
    main()
