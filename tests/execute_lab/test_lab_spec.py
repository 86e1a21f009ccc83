"""The text form of a lab, and what is refused before anything is made."""

import os
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placer.core.errors import DependencyError, ExecutionError, UsageError
from placer.execute.lab import LabSpec, require_command, require_lab


@pytest.mark.parametrize(
    ("text", "nodes", "ranks", "mbit"),
    [("2x2@200mbit", 2, 2, 200.0), ("4x1@1gbit", 4, 1, 1000.0), ("2x2", 2, 2, None), (" 1X4@2.5GBIT ", 1, 4, 2500.0)],
)
def test_text_by_hand(text, nodes, ranks, mbit):
    assert LabSpec.parse(text) == LabSpec(nodes=nodes, ranks_per_node=ranks, mbit=mbit)


@given(st.integers(1, 64), st.integers(1, 4), st.none() | st.floats(1, 100_000).map(lambda rate: round(rate, 3)))
def test_text_is_read_as_it_was_written(nodes, ranks, mbit):
    spec = LabSpec(nodes=nodes, ranks_per_node=ranks, mbit=mbit)
    assert LabSpec.parse(str(spec)) == spec
    assert spec.num_ranks == nodes * ranks


@pytest.mark.parametrize("text", ["", "2x", "2x2@", "2x2@200", "0x2", "2x2@200kbit", "-1x2", "2x2@1e3mbit", "2x2x2"])
def test_other_text_is_refused_with_an_example(text):
    with pytest.raises(UsageError, match="write NODESxRANKS@RATE such as 2x2@200mbit"):
        LabSpec.parse(text)


@pytest.mark.parametrize("text", ["65x1", "2x200", "2x2@0.5mbit", "2x2@101gbit"])
def test_sizes_that_one_machine_does_not_have_are_refused(text):
    with pytest.raises(UsageError, match=r"^lab"):
        LabSpec.parse(text)


def test_who_is_not_root_is_told_so(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda tool: f"/sbin/{tool}")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ExecutionError, match="only root may; run it as root"):
        require_lab()


def test_a_machine_without_iproute_is_told_so(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == "tc" else f"/sbin/{tool}")
    with pytest.raises(DependencyError, match="`tc`, which is not installed; install iproute2"):
        require_lab()


@pytest.mark.parametrize("command", [(), ("no-such-command-anywhere", "x")])
def test_a_command_that_does_not_exist_is_refused(command):
    with pytest.raises(UsageError, match="is not found; give one after `--`"):
        require_command(command)
