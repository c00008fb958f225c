"""Where a webhook may go: to the internet, not into the network that the service itself sees.

Whoever may make a webhook could otherwise have the service ask what only the service reaches: Ray, the database, the
metadata of a cloud machine. So a name is resolved for each delivery, all its addresses must be public, and the
connection goes to one that was looked at, not to what the name says a moment later. Proxies of the environment are
not used, since they would resolve it again.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

import httpx

from service.errors import BadRequest
from service.settings import is_loopback

Resolve = Callable[[str, int], Awaitable[list[str]]]  # name, port -> addresses

MOST_CHARACTERS = 2000
PORTS = {"http": 80, "https": 443}
HINT = "an admin of the installation may allow the host by MANTA_WEBHOOK_HOSTS"
_LOOKING = ThreadPoolExecutor(8, "names")  # of its own: `asyncio.run` ends without waiting for names that hang
_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052: an IPv4 address in its last four bytes


async def resolve(host: str, port: int) -> list[str]:
    """Addresses of a name, as the system finds them."""
    look = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    found = await asyncio.get_running_loop().run_in_executor(_LOOKING, look)
    return [str(address[0]) for *_, address in found]


def expect_url(text: str) -> httpx.URL:
    """The URL of a webhook.

    Raises:
        BadRequest: it is none, or neither https nor, on this machine, http. The message does not repeat it.
    """
    try:
        url = httpx.URL(text)
    except (httpx.InvalidURL, ValueError):
        url = httpx.URL("")
    plain = url.scheme == "http" and is_loopback(url.host)
    if not url.host or not (url.scheme == "https" or plain) or len(text) > MOST_CHARACTERS:
        raise BadRequest("got a url that is no https one, expected https://HOST/PATH", "http is for this machine only")
    if url.userinfo or url.fragment:
        raise BadRequest(
            "got a url with a user, password or fragment in it, expected none", "a receiver checks the signature"
        )
    return url


async def addresses(url: httpx.URL, allowed: Collection[str], find: Resolve = resolve) -> list[str]:
    """Addresses that a delivery may connect to.

    Args:
        url: of the webhook.
        allowed: hosts whose addresses may be private.
        find: resolves names.

    Raises:
        BadRequest: the name has none, or one that is not public.
    """
    try:
        found = await find(url.host, url.port or PORTS[url.scheme])
    except (OSError, UnicodeError):
        found = []
    if not found:
        raise BadRequest(f"got host {url.host}, which has no address", "look at its name")
    if url.host not in allowed and not all(_public(address) for address in found):
        raise BadRequest(f"got host {url.host}, expected one whose addresses are all public", HINT)
    return list(dict.fromkeys(found))


def request(url: httpx.URL, address: str, body: bytes, headers: dict[str, str]) -> httpx.Request:
    """A POST to this address of the host, under whose name its certificate is looked at."""
    where = url.copy_with(host=f"[{address}]" if ":" in address else address)
    host = {"Host": url.netloc.decode("ascii")}
    name = {"sni_hostname": url.raw_host.decode("ascii")}
    return httpx.Request("POST", where, content=body, headers=host | headers, extensions=name)


def _public(text: str) -> bool:
    """Whether the whole internet sees this address; one IPv4 address inside of an IPv6 one counts as itself."""
    address = ip_address(text.partition("%")[0])
    inner = _inner(address) if isinstance(address, IPv6Address) else None
    if inner is not None:
        return _public(str(inner))
    return address.is_global and not address.is_multicast


def _inner(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address that packets to this one end at."""
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
