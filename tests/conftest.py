"""What holds for every process that runs tests: one thread each, and as many of them as there are cores."""

from __future__ import annotations

import os
import signal

import pytest

_MOST_PROCESSES = 4
# Threads of several processes wait for each other: a test of one second takes ten. Set before torch is imported, and
# for every process that a test starts.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
# No test reads what earlier runs of the user kept, nor adds to it.
os.environ["MERGEOT_CACHE"] = "off"
# A shell starts what runs in the background with Ctrl-C ignored, and so would every process that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Shares the whole suite among processes, unless ``-n`` says how many; named files are run in one."""
    options = config.option
    is_whole = config.args_source is not pytest.Config.ArgsSource.ARGS
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    is_chosen = not config.pluginmanager.hasplugin("xdist") or options.numprocesses is not None
    is_for_one = options.benchmark_only or options.usepdb or options.collectonly
    if is_whole and not (is_worker or is_chosen or is_for_one):
        options.numprocesses = min(_MOST_PROCESSES, os.cpu_count() or 1)
        # A process begins with one half of the files, so that what a file prepares is prepared once.
        options.dist = "worksteal"
