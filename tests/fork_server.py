"""Runs Python scripts in forks of a process that has imported torch: 0.1 s of CPU a start, not 3.

conftest.py writes a list of processes to stdin, as a line of JSON, and reads their exit codes. A
process has `command` (what follows `python` in a shell), `cwd`, `env` and `output`, the names of
the files for its stdout and stderr. `terminal`, if there is one, replaces these files and stdin.
"""
import atexit
import fcntl
import json
import os
import runpy
import sys
import termios
import traceback

# what the scripts import, none of it ours
import jinja2.ext, jinja2.sandbox, numpy, pytest, regex, safetensors.torch, tiktoken, tqdm, yaml    # noqa: F401
import torch, torch._dynamo, torch.distributed.fsdp, torch.distributed.run, torch.distributed.tensor


def serve():
    """Fork for each process that stdin names. Returns the process, in its fork; or None at the end."""
    for line in sys.stdin:
        pids = []
        for process in json.loads(line):
            pid = os.fork()
            if pid == 0:
                return process
            pids.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps(codes), flush=True)


def become(command, cwd, env, output, terminal=None):
    """Run `python COMMAND` in this process."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    os.dup2(os.open(terminal or os.devnull, os.O_RDONLY), 0)
    for fd, name in enumerate(output, 1):
        os.dup2(os.open(terminal or name, os.O_WRONLY | os.O_CREAT), fd)
    if terminal:                                         # Ctrl-C is for this process
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    if "OMP_NUM_THREADS" in env:
        torch.set_num_threads(int(env["OMP_NUM_THREADS"]))    # read when torch was imported
    if "PYTHONPATH" in env:
        sys.path[0:0] = env["PYTHONPATH"].split(os.pathsep)
    if command[0] == "-m":
        sys.path.insert(0, cwd)
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(command[0])))
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")


def main():
    process = serve()
    if process is None:
        return
    sys.path.pop(0)                                      # this folder
    code = 0
    try:
        become(**process)
    except SystemExit as error:
        code = error.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(bool(code)) if not isinstance(code, int) else code)    # freeing torch takes 0.8 s


main()
