"""The coordinator listens on the given address, or on all if others could not reach that one."""

import socket
import subprocess
import sys

import jax
import pytest

from moe_jax.parallel import coordinator, distributed

# The addresses that names resolve to, and those of this host.
NAMES = {
    "me": ["127.0.1.1"],  # Debian's own entry in /etc/hosts
    "one": ["10.0.0.7"],
    "two": ["10.0.0.7", "192.168.0.7"],
    "mixed": ["10.0.0.7", "34.1.2.3"],
    "service": ["34.1.2.3"],  # NAT, or the cluster IP of a Kubernetes service
    "six": ["fd00::7"],
    "localhost": ["127.0.0.1", "::1"],
}
OURS = {"10.0.0.7", "192.168.0.7", "fd00::7", "127.0.0.1", "127.0.1.1", "::1"}


@pytest.fixture
def host(monkeypatch):
    def resolve(name, port, **_):
        numeric = name.replace(".", "").isdigit() or ":" in name
        if name not in NAMES and not numeric:
            raise socket.gaierror("unknown")
        return [(0, 0, 0, "", (address, 0)) for address in NAMES.get(name, [name])]

    monkeypatch.setattr(coordinator.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(coordinator, "_is_ours", lambda address: str(address) in OURS)
    monkeypatch.delenv("JAX_COORDINATOR_BIND_ADDRESS", raising=False)


@pytest.mark.parametrize(
    ("given", "listens"),
    [
        ("10.0.0.7:80", "10.0.0.7:80"),
        ("127.0.0.1:80", "127.0.0.1:80"),
        ("[fd00::7]:80", "[fd00::7]:80"),
        ("fd00::7:80", "[fd00::7]:80"),
        ("localhost:80", "127.0.0.1:80"),
        ("one:80", "10.0.0.7:80"),
        ("six:80", "[fd00::7]:80"),
        ("34.1.2.3:80", None),
        *((f"{name}:80", None) for name in ("me", "two", "mixed", "service", "unknown")),
    ],
)
def test_where_it_listens(host, given, listens):
    assert coordinator.bind_address(given) == listens


def test_an_address_is_ours_if_it_can_be_bound():
    assert coordinator.bind_address("127.0.0.1:0") == "127.0.0.1:0"
    assert coordinator.bind_address("192.0.2.1:0") is None  # TEST-NET-1: not an address of any host


@pytest.mark.parametrize(
    ("given", "process", "variable", "listens", "said"),
    [
        ("10.0.0.7:80", 0, None, "10.0.0.7:80", ""),
        ("10.0.0.7:80", 1, None, None, ""),
        ("service:80", 0, None, None, "service:80 does not name exactly one"),
        ("10.0.0.7:80", 0, "0.0.0.0:80", None, ""),
    ],
)
def test_what_jax_is_told(host, monkeypatch, capsys, given, process, variable, listens, said):
    told = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **named: told.append(named))
    if variable:
        monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", variable)
    distributed.start(given, 2, process)
    assert told[0]["coordinator_bind_address"] == listens
    out = capsys.readouterr().out
    assert (said in out) if said else not out


def test_two_processes_meet_there_and_nowhere_else(cli_env, tmp_path):
    """Listening sockets in Linux's format: address and port in hexadecimal, state 0A."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pair = [start(cli_env, f"127.0.0.1:{port}", number) for number in (0, 1)]
    found = [process.communicate(timeout=100)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], found
    (where,) = found[0].split()
    assert where.endswith(f"0100007F:{port:04X}")  # gRPC makes it ::ffff:127.0.0.1


PROCESS = """
import sys
from pathlib import Path
import jax
from moe_jax.parallel import distributed
given, number = sys.argv[1], int(sys.argv[2])
distributed.start(given, 2, number)
end = f":{int(given.rpartition(':')[2]):04X}"
if number == 0:
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if local.endswith(end) and state == "0A":
                print(local)
jax.distributed.shutdown()
"""


def start(env, given, number):
    command = [sys.executable, "-c", PROCESS, given, str(number)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
