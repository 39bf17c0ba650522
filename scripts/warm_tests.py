"""Run pytest many times on code that changes, in forks of one process that has the heavy imports behind it.

    with WarmTests(checkout) as tests:
        status = tests.run(["tests/functional/test_batch.py"], timeout=300.0)  # pytest's exit status; None: too long

A fork imports the package of the checkout and its tests anew; torch and its kin (`HEAVY`) are there already. Without
that, a run of 200 small test files is 200 times the import of Lightning. Posix only.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

# What a test file may import that is not the package's own.
HEAVY = (
    "numpy", "torch", "torch.nn.functional", "torch.distributed", "torch._dynamo", "torchvision", "timm", "lightning",
    "torchmetrics", "pytest", "_pytest.assertion.rewrite", "hypothesis",
)  # fmt: skip
OPTIONS = ("-q", "-x", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist")
MEMORY = 16 * 2**30  # bytes of address space: changed code may ask for a tensor of any size


class WarmTests:
    """A process that waits for lists of test files and runs each list in a fork of itself.

    Args:
        checkout: the folder with `finetune_bn` and `tests`; its files may change between two runs.
        imports: what is imported ahead, as far as it is installed.
    """

    def __init__(self, checkout: Path, imports: Sequence[str] = HEAVY) -> None:
        self.checkout = checkout
        self.imports = imports

    def __enter__(self) -> Self:
        """Start the process; its imports are done when the first run begins."""
        # Bytecode is checked against the hash of its source: a change within a second and of the same length counts.
        compiled = [sys.executable, "-m", "compileall", "-q", "--invalidation-mode", "checked-hash", "."]
        subprocess.run(compiled, cwd=self.checkout, check=True)
        environment = os.environ | {"PYTHONPATH": str(self.checkout), "OMP_NUM_THREADS": "1"}
        environment |= {"PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, str(Path(__file__).resolve()), *self.imports]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=self.checkout, env=environment, stdin=pipe, stdout=pipe, text=True)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.asked, self.answers = self.process.stdin, self.process.stdout
        return self

    def run(self, tests: list[str], timeout: float) -> int | None:
        """Run test files up to the first failure; return pytest's exit status, or None where it took too long."""
        self.asked.write(json.dumps({"tests": tests, "timeout": timeout}) + "\n")
        self.asked.flush()
        answer = self.answers.readline()
        if not answer:
            raise RuntimeError("the process that runs the tests has ended; its error is above")
        status: int | None = json.loads(answer)["status"]
        return status

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        """End the process."""
        self.asked.close()
        self.process.wait()


def _serve(imports: Sequence[str]) -> None:
    """Answer each line of the standard input with the status of its run."""
    answers = os.fdopen(os.dup(1), "w")
    silent = os.open(os.devnull, os.O_RDWR)
    os.dup2(silent, 1)
    sys.path.pop(0)  # the folder of this file
    for name in imports:
        try:
            importlib.import_module(name)
        except ImportError:
            continue
    for line in sys.stdin:
        answers.write(json.dumps({"status": _in_fork(**json.loads(line))}) + "\n")
        answers.flush()


def _in_fork(tests: list[str], timeout: float) -> int | None:
    child = os.fork()
    if not child:
        _run(tests)
    ends = time.monotonic() + timeout
    while time.monotonic() < ends:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _run(tests: list[str]) -> NoReturn:
    """Run the tests and end this process, in whatever way."""
    status = 99
    try:
        os.setsid()
        os.dup2(1, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        import pytest

        status = int(pytest.main([*OPTIONS, *tests]))
    finally:
        os._exit(status)


if __name__ == "__main__":
    _serve(sys.argv[1:])
