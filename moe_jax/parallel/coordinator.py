"""Where the process that coordinates a run listens.

JAX listens on every address of the host, and whoever reaches its port can join or end the run.
"""

import contextlib
import ipaddress
import os
import socket

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def bind_address(coordinator: str) -> str | None:
    """The ADDRESS:PORT to listen on, for process 0.

    An address is taken as it stands.  A name counts where it means one address of this host, and
    not a loopback one: Debian's /etc/hosts gives the host's own name 127.0.1.1, which no other host
    means by it.

    Args:
      coordinator: HOST:PORT as the other processes reach it.

    Returns:
      None where only JAX's default is certain to be reached: behind a name of several addresses, of
      another host's (NAT, a service of Kubernetes), or of none.
    """
    host, _, port = coordinator.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    found = [address for address in _addresses(host) if _is_ours(address)]
    named = _literal(host) is None and host != "localhost"
    if named and (len(found) != 1 or found[0].is_loopback or len(_addresses(host)) != 1):
        return None
    if not found:
        return None
    # localhost may be two addresses: clients try both, and IPv4 is always there.
    address = min(found, key=lambda address: address.version)
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def chosen_by_user() -> bool:
    """Whether JAX's own variable says where to listen."""
    return "JAX_COORDINATOR_BIND_ADDRESS" in os.environ


def _literal(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _addresses(host: str) -> list[Address]:
    """What a name means here; [] where nothing knows it."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return sorted({ipaddress.ip_address(entry[4][0]) for entry in found}, key=str)


def _is_ours(address: Address) -> bool:
    """Whether an interface of this host has the address: only then a socket can be bound to it."""
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((str(address), 0))
        return True
    return False
