"""Where the processes of a launch find each other, on one machine or several, the first time or after some of them died."""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import psutil
import torch
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

_STORES: list[Store] = []  # that the processes of this attempt met at; none for one alone
_WORD = "last word"


def meeting_place() -> str:
    """Where the processes of a launch find each other, as `init_process_group` calls it.

    torchrun keeps its store when it starts processes again (2.13), with the addresses of those that died: the new ones would
    wait for these for ever, or be refused. They get a room of their own. How often a machine was started again is no name for
    it: one that was taken in later counts otherwise, and one that makes room for it does not count at all.
    """
    with suppress(RuntimeError):  # it is known already
        register_rendezvous_handler("room", _room_of_this_attempt)
    return "room://"


def _room_of_this_attempt(_url: str, **arguments: Any) -> Iterator[tuple[Store, int, int]]:
    for store, rank, world_size in rendezvous("env://", **arguments):
        room = store
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # else it is as new as this attempt
            room = PrefixStore(f"room {agreed_room(store, rank, world_size)}", store)
        _STORES.append(room)
        yield room, rank, world_size


def agreed_room(store: Store, rank: int, world_size: int) -> str:
    """A name that the processes of this attempt have in common, and no earlier attempt had. Collective.

    Each asks under its rank with a word of its own, and only the first process of this attempt answers to that word, so that
    what an earlier attempt left in the store misleads nobody.

    Raises:
        DistStoreError: another one does not ask or answer within the store's time-out.
    """
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"asks {rank}", own)
        room = store.get(f"answer {own}").decode()
        store.set(f"in {room} {rank}", "")
        return room
    awaited, answered = set(range(1, world_size)), set()
    patience: float = store.timeout.total_seconds()  # type: ignore[attr-defined]
    end = time.monotonic() + patience
    while awaited:
        for asking in [asking for asking in awaited if store.check([f"asks {asking}"])]:
            word = store.get(f"asks {asking}").decode()
            if word not in answered:  # of an earlier attempt, perhaps: then another follows
                store.set(f"answer {word}", own)
                answered.add(word)
        awaited = {asking for asking in awaited if not store.check([f"in {own} {asking}"])}
        if time.monotonic() > end:
            raise torch.distributed.DistStoreError(
                f"process {min(awaited)} of {world_size} did not come within {patience:.0f} seconds"
            )
        time.sleep(0.01 if awaited else 0)
    return own


def name_the_network() -> None:
    """Have Gloo use the network that leads to the machine where all meet, unless the environment names another.

    By itself it takes the address that the machine's own name resolves to, often one that only this machine reaches.
    """
    everywhere, here = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    meeting = os.environ.get("MASTER_ADDR")
    if everywhere == here or not meeting or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    with suppress(OSError):  # it cannot be resolved: the meeting tells
        family, kind, protocol, _, address = socket.getaddrinfo(meeting, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as route:
            route.connect(address)  # sends nothing
            own = route.getsockname()[0]
        if ipaddress.ip_address(own.partition("%")[0]).is_loopback:
            return
        for interface, addresses in psutil.net_if_addrs().items():
            if any(found.address.partition("%")[0] == own for found in addresses):
                os.environ["GLOO_SOCKET_IFNAME"] = interface


def leave_word(word: dict[str, Any]) -> None:
    """Leave a word for the main process where all have met, which is still there when this process is not. The first counts."""
    with suppress(RuntimeError):  # that place is gone
        for store in _STORES[-1:]:
            store.compare_set(_WORD, "", json.dumps(word))


def word_left() -> dict[str, Any]:
    """The word that another process left before it ended; empty if none did."""
    with suppress(RuntimeError):
        for store in _STORES[-1:]:
            if store.check([_WORD]):
                found: dict[str, Any] = json.loads(store.get(_WORD))
                return found
    return {}
