"""Starts scripts for the tests, in forks of a process that has imported torch (fork_server.py)."""
import atexit
import functools
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def fork_server():
    """The process of fork_server.py, one for all tests."""
    server = subprocess.Popen([sys.executable, Path(__file__).with_name("fork_server.py")], text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    atexit.register(server.stdin.close)
    return server


def run(command, cwd=ROOT, timeout=300, ranks=[{}], terminal=None, **env):
    """Run `python COMMAND` once for each rank, at the same time. Returns a finished process per rank.

    `ranks` has the environment variables of each rank, `env` those of all. `terminal` is the name of a
    terminal that the process is started on; otherwise its stdin is empty.
    """
    command = list(map(str, command))
    with tempfile.TemporaryDirectory() as folder:
        outputs = [(f"{folder}/{n}.stdout", f"{folder}/{n}.stderr") for n in range(len(ranks))]
        processes = [{"command": command, "cwd": str(cwd), "env": os.environ | env | of_rank,
                      "output": output, "terminal": terminal} for of_rank, output in zip(ranks, outputs)]
        server = fork_server()
        print(json.dumps(processes), file=server.stdin, flush=True)
        if not select.select([server.stdout], [], [], timeout)[0]:
            os.killpg(server.pid, signal.SIGKILL)
            fork_server.cache_clear()
            raise subprocess.TimeoutExpired(command, timeout)
        codes = json.loads(server.stdout.readline())
        if terminal:
            return [subprocess.CompletedProcess(command, code) for code in codes]
        texts = [[Path(name).read_text() for name in output] for output in outputs]
    return [subprocess.CompletedProcess(command, code, *text) for code, text in zip(codes, texts)]


class Terminal:
    """`python COMMAND` on a terminal of its own (a pty), which a test types on and reads."""

    def __init__(self, *command):
        self.master, self.slave = os.openpty()    # the slave stays open: reads fail without one
        self.raw = ""
        self.position = 0                         # in the text, where the next read_until() begins
        self.processes = []
        name = os.ttyname(self.slave)
        self.thread = threading.Thread(
            target=lambda: self.processes.extend(run(command, terminal=name)), daemon=True)
        self.thread.start()

    def type(self, text):
        os.write(self.master, text.encode())

    def pid(self):
        return os.tcgetpgrp(self.master)

    def interrupt(self):
        """Type Ctrl-C when the process sleeps: waits for input, or for the terminal to take its output.

        Between its prompt and its wait, CPython would notice a signal only with the next key.
        """
        while Path(f"/proc/{self.pid()}/stat").read_text().rpartition(")")[2].split()[0] in "RD":
            time.sleep(0.01)
        self.type("\x03")

    def read_until(self, word, seconds=60):
        """The text from where the last call ended to the end of a word."""
        while word not in self.text()[self.position:]:
            is_ready = select.select([self.master], [], [], seconds)[0]
            assert is_ready, f"waiting for {word!r}: {self.text()}"
            self.raw += os.read(self.master, 1000).decode(errors="replace")
        start = self.position
        self.position = self.text().index(word, start) + len(word)
        return self.text()[start:self.position]

    def text(self):
        """All that the terminal has shown, without control sequences."""
        return re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]|\r", "", self.raw)

    def wait(self):
        """Wait for the end of the process. Returns its exit status."""
        self.thread.join(60)
        [done] = self.processes
        os.close(self.master)
        os.close(self.slave)
        return done.returncode


def free_port():
    with socket.socket() as socket_of_any_port:
        socket_of_any_port.bind(("127.0.0.1", 0))
        return socket_of_any_port.getsockname()[1]


def run_ranks(n, command, **options):
    """Run `python COMMAND` on n ranks with torchrun's environment variables, without torchrun."""
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(n)]
    return run(command, ranks=ranks, WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n), OMP_NUM_THREADS="1",
               MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), **options)
