"""A slow link on one machine: two network namespaces, joined by a pair of virtual interfaces with a speed limit.

Linux, root, and the tools ``ip`` and ``tc``. Everything made is removed at the end, whatever happens in between.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Place:
    """Where a worker runs.

    Attributes:
        prefix: what to put before a command so that it runs here.
        address: of this end; ``interface`` is its name.
    """

    prefix: tuple[str, ...]
    address: str
    interface: str


LOOPBACK = (Place((), "127.0.0.1", "lo"), Place((), "127.0.0.1", "lo"))


def why_not() -> str | None:
    """What is missing for a throttled link on this machine, if anything."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    try:
        with link(1000):
            return None
    except (OSError, RuntimeError) as error:
        return str(error)


@contextmanager
def link(mbit: float) -> Iterator[tuple[Place, Place]]:
    """Two places with a link of ``mbit`` Mbit/s each way between them and nothing else."""
    places = (_place(0), _place(1))
    names = [place.prefix[-1] for place in places]
    made: list[str] = []
    try:
        for name in names:
            _run("ip", "netns", "add", name)
            made.append(name)
        ends = [("name", place.interface, "netns", name) for place, name in zip(places, names, strict=True)]
        _run("ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for place in places:
            _configure(place, mbit)
        yield places
    finally:
        for name in made:  # its interfaces go with it
            subprocess.run(["ip", "netns", "del", name], check=False)


def _place(end: int) -> Place:
    name = f"fulgurite-{os.getpid()}-{end}"
    return Place(("ip", "netns", "exec", name), f"10.77.0.{end + 1}", f"slow{end}")


def _configure(place: Place, mbit: float) -> None:
    _run(*place.prefix, "ip", "link", "set", "lo", "up")
    _run(*place.prefix, "ip", "address", "add", f"{place.address}/24", "dev", place.interface)
    _run(*place.prefix, "ip", "link", "set", place.interface, "up")
    limit = ("tbf", "rate", f"{mbit:g}mbit", "burst", "64k", "latency", "200ms")
    _run(*place.prefix, "tc", "qdisc", "add", "dev", place.interface, "root", *limit)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


def sent_bytes() -> int:
    """What the kernel has sent over the network from here: frames, with all headers and acknowledgements."""
    interfaces = [path for path in Path("/sys/class/net").iterdir() if path.name != "lo"]
    return sum(int((path / "statistics" / "tx_bytes").read_text()) for path in interfaces)
