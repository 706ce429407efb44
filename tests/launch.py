"""Starts scripts for the tests, in forks of a process that has imported torch (fork_server.py)."""
import atexit
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def fork_server():
    """The process of fork_server.py, one for all tests."""
    server = subprocess.Popen([sys.executable, Path(__file__).with_name("fork_server.py")], text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    atexit.register(server.stdin.close)
    return server


def run(command, cwd=ROOT, timeout=300, ranks=[{}], **env):
    """Run `python COMMAND` once for each rank, at the same time. Returns a finished process per rank.

    `ranks` has the environment variables of each rank, `env` those of all.
    """
    command = list(map(str, command))
    with tempfile.TemporaryDirectory() as folder:
        outputs = [(f"{folder}/{n}.stdout", f"{folder}/{n}.stderr") for n in range(len(ranks))]
        processes = [{"command": command, "cwd": str(cwd), "env": os.environ | env | of_rank,
                      "output": output} for of_rank, output in zip(ranks, outputs)]
        server = fork_server()
        print(json.dumps(processes), file=server.stdin, flush=True)
        if not select.select([server.stdout], [], [], timeout)[0]:
            os.killpg(server.pid, signal.SIGKILL)
            fork_server.cache_clear()
            raise subprocess.TimeoutExpired(command, timeout)
        codes = json.loads(server.stdout.readline())
        texts = [[Path(name).read_text() for name in output] for output in outputs]
    return [subprocess.CompletedProcess(command, code, *text) for code, text in zip(codes, texts)]


def free_port():
    with socket.socket() as socket_of_any_port:
        socket_of_any_port.bind(("127.0.0.1", 0))
        return socket_of_any_port.getsockname()[1]


def run_ranks(n, command, **options):
    """Run `python COMMAND` on n ranks with torchrun's environment variables, without torchrun."""
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(n)]
    return run(command, ranks=ranks, WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n), OMP_NUM_THREADS="1",
               MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), **options)
