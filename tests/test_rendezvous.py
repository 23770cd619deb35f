"""Processes of an attempt meet each other, and none of an earlier one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from harness import alone_on_the_cpu
from torch.distributed import HashStore, Store

from accel_trainer import rendezvous


@pytest.fixture(autouse=True)
def no_launch(tmp_path: Path) -> Iterator[None]:
    with alone_on_the_cpu(tmp_path / "cache"):
        yield


@pytest.mark.parametrize("keeps_its_store", [True, False])
def test_processes_of_an_agent_that_keeps_its_store_meet_in_a_room(
    monkeypatch: pytest.MonkeyPatch, keeps_its_store: bool
) -> None:
    store = HashStore()
    monkeypatch.setattr(rendezvous, "_STORES", [])
    monkeypatch.setattr(rendezvous, "rendezvous", lambda _url, **_: iter([(store, 0, 1)]))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(keeps_its_store))
    for _ in range(2):
        assert rendezvous.meeting_place() == "room://"
    found = [next(rendezvous._room_of_this_attempt("room://"))[0] for _ in range(2)]
    for place in found:
        place.set("address", "of this attempt")
    assert store.check(["address"]) is not keeps_its_store
    assert (found[0].num_keys(), found[1] is store) == ((2, False) if keeps_its_store else (1, True))


def test_the_first_word_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_STORES", [])
    rendezvous.leave_word({"reason": "to nobody"})
    assert rendezvous.word_left() == {}
    monkeypatch.setattr(rendezvous, "_STORES", [HashStore()])
    assert rendezvous.word_left() == {}
    rendezvous.leave_word({"reason": "out of memory"})
    rendezvous.leave_word({"reason": "ended by the launcher"})
    assert rendezvous.word_left() == {"reason": "out of memory"}


def test_gloo_is_told_the_network_that_leads_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """How it does is shown by two machines; here, where it leaves Gloo alone."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "of the user")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    rendezvous.name_the_network()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "of the user"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    for address in ("127.0.0.1", "::1", "nowhere.invalid"):
        monkeypatch.setenv("MASTER_ADDR", address)
        rendezvous.name_the_network()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # all on this machine
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    rendezvous.name_the_network()
    assert "GLOO_SOCKET_IFNAME" not in os.environ


def rooms(store: Store, world_size: int) -> list[str]:
    """What the processes of an attempt agree on."""
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(lambda rank: rendezvous.agreed_room(store, rank, world_size), reversed(range(world_size))))


def test_every_attempt_has_a_room_of_its_own() -> None:
    store = HashStore()
    store.set_timeout(timedelta(seconds=20))
    store.set("asks 1", "of one that was killed before it was answered")
    found = [rooms(store, size) for size in (2, 3, 1, 2, 3)]
    assert [len(rooms) for rooms in found] == [2, 3, 1, 2, 3]
    assert all(len(set(rooms)) == 1 for rooms in found)
    assert len({rooms[0] for rooms in found}) == 5


def test_a_process_that_never_comes_is_not_waited_for_without_end() -> None:
    store = HashStore()
    store.set_timeout(timedelta(seconds=0.2))
    store.set("asks 2", "of an earlier attempt")
    with pytest.raises(torch.distributed.DistStoreError, match="process 1 of 3 did not come within 0 seconds"):
        rendezvous.agreed_room(store, 0, 3)
