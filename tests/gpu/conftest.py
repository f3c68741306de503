"""Tests of what only a GPU shows: skipped, without being imported, where there is none.

The environment variable KIT_DEVICE is `cuda` under `make test-gpu`; `cpu` is a dry run of the tests that can have one.
Each result is also written as a finding (tests/gpu/kit/findings.py) where KIT_RESULTS names a file.
"""

import os
from collections.abc import Iterator
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.kit.findings import Findings, one_line

_FINDINGS = pytest.StashKey[Findings]()


@cache
def _why_skipped() -> str | None:
    device = os.environ.get("KIT_DEVICE")
    if device not in {"cpu", "cuda"}:
        return "needs a GPU, which these tests do not see: make test-gpu runs it"
    if device == "cpu":
        return None
    import torch

    return None if torch.cuda.is_available() else "needs a GPU, and torch sees none here"


@pytest.fixture(scope="session")
def groups() -> Iterator[Any]:
    """The process groups of one process, on the device, for all files: they are made once in a process."""
    import torch.distributed as dist

    from raptr_ds.parallel.groups import initialize_process_groups
    from raptr_ds.parallel.launch import Launch, free_port

    yield initialize_process_groups(Launch(0, 0, 1, "127.0.0.1", free_port(), "tests"), 1, 1, timedelta(minutes=1))
    dist.destroy_process_group()


class _Skipped(pytest.Item):
    """Stands for the tests of a file that is not imported."""

    def runtest(self) -> None:
        """Skip."""
        pytest.skip(str(_why_skipped()))


class _SkippedFile(pytest.File):
    """A file of tests that is not imported."""

    def collect(self) -> Iterator[pytest.Item]:
        """Yield one skipped test."""
        yield _Skipped.from_parent(self, name="all")


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Leave out what cannot run here before it imports torch."""
    return None if _why_skipped() is None else _SkippedFile.from_parent(parent, path=module_path)


def pytest_configure(config: pytest.Config) -> None:
    """Write findings where a file for them is named."""
    if "KIT_RESULTS" in os.environ:
        config.stash[_FINDINGS] = Findings.of_environment(lambda line: _write_line(config, line))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Write a finding for what is decided: a test that passed, or was skipped, or failed in any of its phases."""
    report: pytest.TestReport = yield
    findings = item.config.stash.get(_FINDINGS, None)
    if findings is not None:
        _note(findings, report)
    return report  # type: ignore[return-value]


def _note(findings: Findings, report: pytest.TestReport) -> None:
    name = report.nodeid.rpartition("/")[2]
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        findings.check(False, name, one_line(crash.message if crash else str(report.longrepr)))
    elif report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        findings.figure(name, one_line(reason))
    elif report.when == "call":
        text = "; ".join(str(value) for key, value in report.user_properties if key == "finding")
        findings.check(True, name, text)


def _write_line(config: pytest.Config, line: str) -> None:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.write(f"\n{line}\n", flush=True)  # lines of their own, wherever pytest's dots have come to
