"""Chooses the address on which the coordinator (process 0) listens.

By default JAX listens on every address of the host, and anyone who reaches the port can join or end
the run.
"""

import contextlib
import ipaddress
import os
import socket

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def bind_address(coordinator: str) -> str | None:
    """The ADDRESS:PORT that process 0 listens on.

    An IP address is used as given.  A host name is used only if it resolves to exactly one address
    of this host that is not loopback: Debian's /etc/hosts maps the host's own name to 127.0.1.1,
    which other hosts do not resolve it to.

    Args:
      coordinator: HOST:PORT as the other processes reach it.

    Returns:
      The address, or None if only JAX's default (all addresses) is certain to be reachable: the
      name has several addresses, an address of another host (NAT, a Kubernetes service), or none.
    """
    host, _, port = coordinator.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    found = [address for address in _addresses(host) if _is_ours(address)]
    named = _literal(host) is None and host != "localhost"
    if named and (len(found) != 1 or found[0].is_loopback or len(_addresses(host)) != 1):
        return None
    if not found:
        return None
    # localhost may have two addresses: clients try both, and IPv4 always exists.
    address = min(found, key=lambda address: address.version)
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def chosen_by_user() -> bool:
    """True if the user set JAX's own variable for the address to listen on."""
    return "JAX_COORDINATOR_BIND_ADDRESS" in os.environ


def _literal(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _addresses(host: str) -> list[Address]:
    """The addresses that a name resolves to on this host; [] if it does not resolve."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return sorted({ipaddress.ip_address(entry[4][0]) for entry in found}, key=str)


def _is_ours(address: Address) -> bool:
    """True if an interface of this host has the address: only then can a socket bind to it."""
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((str(address), 0))
        return True
    return False
