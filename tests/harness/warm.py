"""Runs `cl-run` for the tests without importing torch each time: every line asks for a fork of this process.

A line is a JSON object of `arguments`, `cwd`, `path` (more folders to import from), and the files `out` and `err`; the
answer is a line with the exit status.
"""

from __future__ import annotations

import json
import os
import sys

from attempt import run, warm


def child(arguments: list[str], cwd: str, path: list[str], out: str, err: str) -> None:
    """Run one command as `python -m cl` would, and end."""
    status = 1
    try:
        for number, name, mode in ((0, os.devnull, os.O_RDONLY), (1, out, os.O_WRONLY), (2, err, os.O_WRONLY)):
            os.dup2(os.open(name, mode | os.O_CREAT), number)
        os.chdir(cwd)
        sys.path[:1] = [cwd, *path]
        status = run(arguments)
        sys.stdout.flush(), sys.stderr.flush()
    finally:
        os._exit(status)


if __name__ == "__main__":
    warm()
    os.environ.pop("WANDB_SERVICE", None)  # of the tests' process, which would keep what a killed command has begun
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            child(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
