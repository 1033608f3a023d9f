"""Fault campaigns: how many rounds, from which seed, and where their counts are printed.

A campaign is a test marked `faults`; `make test-faults` runs them all. Tests here without the mark are short, and
`make test` runs them too.

    FASTLT_FAULTS_ROUNDS   rounds of each campaign; by default each has the number that docs/reliability.md reports
    FASTLT_FAULTS_SEED     another seed finds other moments and other bytes (default 0)
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

CAMPAIGN_S = 3 * 3600  # a campaign's time limit, in place of that of other tests
FIGURES = pytest.StashKey[list[str]]()


def pytest_configure(config):
    config.stash[FIGURES] = []


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("faults") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(CAMPAIGN_S))


def pytest_terminal_summary(terminalreporter, config):
    if config.stash[FIGURES]:
        terminalreporter.section("figures of the fault campaigns")
        for line in config.stash[FIGURES]:
            terminalreporter.write_line(line)


@pytest.fixture
def rounds() -> Callable[[int], int]:
    """The number of rounds of a campaign, from its default."""
    return lambda default: int(os.environ.get("FASTLT_FAULTS_ROUNDS", default))


@pytest.fixture
def fault_seed() -> int:
    """The seed of a campaign's random choices."""
    return int(os.environ.get("FASTLT_FAULTS_SEED", "0"))


@pytest.fixture
def report_figure(request, capsys) -> Callable[[str], None]:
    """Tells a count of a campaign: at once, and again in the summary at the end of the session."""

    def report(text: str) -> None:
        line = f"{request.node.nodeid.removeprefix('tests/faults/')}: {text}"
        request.config.stash[FIGURES].append(line)
        with capsys.disabled():
            print(f"\n{line}", flush=True)

    return report
