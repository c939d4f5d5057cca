"""Where there can be no hosts, their tests say why; in CI they do not slip away."""

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from tests.hosts import HostNetwork, HostsError, requires_hosts, why_not


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    why_not.cache_clear()
    yield
    why_not.cache_clear()


def refuse(monkeypatch: pytest.MonkeyPatch, stderr: str) -> None:
    done = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)


def test_who_is_not_root_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert why_not() == "not root"
    with pytest.raises(HostsError, match="cannot be made on this machine: not root"):
        HostNetwork(1).__enter__()


def test_a_missing_program_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "")
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "ip" else f"/bin/{name}")
    assert why_not() == "no program `ip` (Debian package iproute2)"


def test_the_kernels_refusal_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "warning\nunshare: unshare failed: Operation not permitted\n")
    assert why_not() == "no namespaces or no veth: unshare: unshare failed: Operation not permitted"


@pytest.mark.parametrize(("ci", "user", "is_skipped"), [("", 0, True), ("true", 1000, True), ("true", 0, False)])
def test_skipped_with_the_reason_but_never_as_root_in_ci(
    monkeypatch: pytest.MonkeyPatch, ci: str, user: int, is_skipped: bool
) -> None:
    refuse(monkeypatch, "no such thing")
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setenv("CI", ci)
    mark = requires_hosts().mark
    assert mark.args == (is_skipped,)
    if is_skipped:
        assert mark.kwargs["reason"].startswith("no hosts here: no")
