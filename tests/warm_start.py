"""Start the scripts of this repository in forks of a program that has imported their libraries already.

That takes seconds, and tests start scripts some hundred times. `install` replaces `subprocess.Popen`: one of `SCRIPTS`
becomes a fork from the second time on that one is started with the same settings of libraries, by environment; all
other programs are started as ever. With LEANALBERT_COLD_START=1 in a program's environment that one is, too; in the
environment of pytest, all are.
"""

import atexit
import contextlib
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

import numpy

from src.process.supervisor import end_with_parent

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPTS = {str(REPOSITORY / name) for name in
           ("run_trainer.py", "run_aux_peer.py", "finetune_mlm.py", "predict_on_lidirus.py")}  # fmt: skip
COLD = "LEANALBERT_COLD_START"
# Read when a library is imported or a process begins: each set of these values has a forking program of its own.
READ_ONCE = ("OMP_", "MKL_", "NUMBA_", "CUDA_", "LD_", "MALLOC_", "HF_", "HIVEMIND_", "TRANSFORMERS_", "DATASETS_",
             "TOKENIZERS_", "TORCH", "RANK", "WORLD_SIZE", "LOCAL_", "LC_", "LANG", "TZ", "HOME", "XDG_",
             "PYTHON")  # fmt: skip
NOT_READ = {"PYTHONPATH", "PYTHONUNBUFFERED", "TORCHINDUCTOR_CACHE_DIR", "TORCH_CPP_LOG_LEVEL"}
SERVE = "import sys; from tests.warm_start import serve; serve(int(sys.argv[1]))"
MAX_ORDER = 1 << 20  # bytes
MAX_SERVERS = 2  # half a gigabyte each


def import_libraries() -> None:
    """What the scripts import, in their order."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import arguments
    from src.console import quiet_libraries

    quiet_libraries()
    import src.auxiliary.build
    import src.trainer.build
    import tasks.evaluation
    import tasks.mlm.evaluate
    import tasks.mlm.task

    assert arguments and src and tasks


def serve(descriptor: int) -> None:
    """The program that forks: for each order that comes by a socket, until it is closed."""
    environment = dict(os.environ)  # importing changes it
    import_libraries()
    gc.freeze()  # memory that is not written to stays shared with the forks
    orders = socket.socket(fileno=descriptor)
    orders.sendall(b"!")
    wakeup, written = os.pipe()
    os.set_blocking(written, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(written, warn_on_full_buffer=False)
    running: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([orders, wakeup], [], [])
        if wakeup in ready:
            os.read(wakeup, 4096)
            tell_ends(running)
        if orders not in ready:
            continue
        order, descriptors, _, _ = socket.recv_fds(orders, MAX_ORDER, 4)
        if not order:
            return
        replies = socket.socket(fileno=descriptors[3])
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for connection in (orders, replies, *running.values()):
                connection.close()
            os.close(wakeup)
            os.close(written)
            become(json.loads(order), descriptors[:3], environment)
        for end in descriptors[:3]:
            os.close(end)
        running[pid] = replies
        replies.sendall(f"{pid}\n".encode())


def tell_ends(running: dict[int, socket.socket]) -> None:
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        with running.pop(pid) as replies, contextlib.suppress(OSError):  # nobody may be there any more
            replies.sendall(f"{status}\n".encode())


def become(order: dict, descriptors: list[int], environment: dict[str, str]) -> None:
    """In a fork: be the program that was ordered. Does not return."""
    code = 1
    try:
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        if order["session"]:
            os.setsid()
        if order["group"]:
            os.setpgid(0, 0)
        if order["ends_with_parent"]:
            end_with_parent()
        os.chdir(order["cwd"])
        # What importing has set stays, as if it had been set now.
        imported = {name: value for name, value in os.environ.items() if environment.get(name) != value}
        os.environ.clear()
        os.environ.update({**imported, **order["environment"]})
        tempfile.tempdir = None
        numpy.random.seed()
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=order["unbuffered"])
        sys.argv = [order["script"], *order["arguments"]]
        sys.orig_argv = [sys.executable, *sys.argv]
        code = 0
        runpy.run_path(order["script"], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)  # taking an interpreter with all these libraries apart takes a second


class WarmStarter:
    """Orders forks; starts the programs that fork when they are needed."""

    def __init__(self):
        # By settings of libraries; none yet after the first order.
        self._servers: dict[frozenset, socket.socket | None] = {}
        self._lock = threading.Lock()

    def server_for(self, command, environment: dict[str, str]) -> socket.socket | None:
        """Where to order a fork; nothing if the command is to be started as ever."""
        if COLD in environment or not isinstance(command, (list, tuple)) or not is_script(list(map(str, command))):
            return None
        settings = frozenset(item for item in environment.items() if is_read_once(item[0]))
        with self._lock:
            if settings not in self._servers:
                self._servers[settings] = None
            elif self._servers[settings] is None:
                running = [key for key, server in self._servers.items() if server]
                if len(running) == MAX_SERVERS:
                    self._servers.pop(running[0]).close()  # it ends
                self._servers[settings] = start_server(dict(settings))
            return self._servers[settings]


def order_fork(server: socket.socket, words: list[str], descriptors: list[int], **order) -> tuple[int, socket.socket]:
    """The new program's process id, and the socket that will bring its exit status."""
    number = 2 if words[1] == "-u" else 1
    order |= {"script": str(REPOSITORY / words[number]), "arguments": words[number + 1 :]}
    order["unbuffered"] = number == 2 or bool(order["environment"].get("PYTHONUNBUFFERED"))
    mine, theirs = socket.socketpair()
    with theirs:
        socket.send_fds(server, [json.dumps(order).encode()], [*descriptors, theirs.fileno()])
    return int(read_line(mine)), mine


def start_server(settings: dict[str, str]) -> socket.socket:
    environment = {name: value for name, value in os.environ.items() if not is_read_once(name)} | settings
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        cold_popen([sys.executable, "-c", SERVE, str(theirs.fileno())], cwd=REPOSITORY, env=environment,
                   pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)  # fmt: skip
    if mine.recv(1) != b"!":
        raise RuntimeError("the program that forks did not begin; what it said stands above")
    return mine


def is_read_once(name: str) -> bool:
    return name.startswith(READ_ONCE) and name not in NOT_READ


def is_script(words: list[str]) -> bool:
    """Whether a command starts one of `SCRIPTS`, named by its path or, in the repository, by its name."""
    words = words[:1] + words[2:] if words[1:2] == ["-u"] else words
    return len(words) > 1 and words[0] == sys.executable and str(REPOSITORY / words[1]) in SCRIPTS


def read_line(connection: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        line += connection.recv(1) or b"\n"
    return line


cold_popen = subprocess.Popen


class WarmPopen(subprocess.Popen):
    """`subprocess.Popen`, which has a fork made where it can. The fork is no child of this program: its end is told."""

    starter: WarmStarter
    _end: socket.socket | None = None

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags,
                       shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals, gid, gids, uid,
                       umask, start_new_session, process_group):  # fmt: skip
        environment = dict(os.environ if env is None else env)
        is_usual = not (shell or executable or pass_fds) and preexec_fn in (None, end_with_parent)
        server = self.starter.server_for(args, environment) if is_usual else None
        if server is None:
            super()._execute_child(
                args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell, p2cread,
                p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals, gid, gids, uid, umask,
                start_new_session, process_group,
            )  # fmt: skip
            return
        ends = (p2cread, c2pwrite, errwrite)
        descriptors = [end if end != -1 else number for number, end in enumerate(ends)]
        self.pid, self._end = order_fork(
            server, list(map(str, args)), descriptors, cwd=str(cwd or Path.cwd()), environment=environment,
            session=start_new_session, group=process_group == 0, ends_with_parent=preexec_fn is not None,
        )  # fmt: skip
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)

    def _internal_poll(self, *args, **kwargs):
        if self._end is None:
            return super()._internal_poll(*args, **kwargs)
        if self.returncode is None and self._waitpid_lock.acquire(False):
            try:
                pid, status = self._try_wait(os.WNOHANG)
                if pid:
                    self._handle_exitstatus(status)
            finally:
                self._waitpid_lock.release()
        return self.returncode

    def _try_wait(self, wait_flags):
        if self._end is None:
            return super()._try_wait(wait_flags)
        if self.returncode is not None:
            return self.pid, self.returncode
        if wait_flags & os.WNOHANG and not select.select([self._end], [], [], 0)[0]:
            return 0, 0
        status = int(read_line(self._end) or 0)
        self._end.close()
        return self.pid, status


def install(patch) -> None:
    """Until ``patch`` (pytest's monkeypatch) is undone."""
    if COLD in os.environ:
        return
    WarmPopen.starter = WarmStarter()
    patch.setattr(subprocess, "Popen", WarmPopen)
