"""Attacks on the sandbox: each program tries to get out, to stay, or to take the machine."""

import os
import platform
import shutil
import socket
import subprocess
import sys
import time

import psutil
import pytest

from riskpo.rewards.sandbox import run as sandbox
from riskpo.rewards.sandbox.run import Limits, SandboxUnavailable, require, run_program
from tests.isolation import needs_sandbox

pytestmark = needs_sandbox
LINUX = platform.system() == "Linux"


def run(program, stdin="", **limits):
    return run_program(program, stdin, limits=Limits(**{"seconds": 5.0, **limits}))


def attempt(statement):
    """A program that tries one statement and prints what came of it."""
    return (
        f"try:\n    {statement}\nexcept BaseException as e:\n    print(type(e).__name__)\n"
        "else:\n    print('done')\n"
    )


def test_a_program_reads_and_writes_its_own_streams():
    done = run("import sys\nprint(sum(map(int, sys.stdin.read().split())))", "1 2\n3")
    assert done.ok and done.output == b"6\n"
    assert run("raise KeyError('x')").errors == "KeyError: 'x'"
    assert run("import sys; sys.exit(3)").status == 3
    main = "import threading\nthreading.Thread(target=lambda: print('late')).start()"
    assert run(main).output == b"late\n"
    assert run("import atexit; atexit.register(print, 'last')").output == b"last\n"
    assert run("from hashlib import sha256; import ssl, sqlite3, decimal; print(1)").ok


@pytest.mark.parametrize(
    "statement",
    [
        "import os; os.fork()",
        "import subprocess; subprocess.run(['/bin/true'])",
        "import os; os.execv('/usr/bin/python3', ['python3'])",
        "import multiprocessing as m; m.get_context('fork').Process(target=print).start()",
    ],
)
def test_no_new_process_so_no_bomb_and_no_daemon(statement):
    assert run(attempt(statement)).output in (b"PermissionError\n", b"FileNotFoundError\n")


def test_a_bomb_of_threads_is_bounded():
    bomb = (
        "import threading, time\nn = 0\ntry:\n    while n < 5000:\n"
        "        threading.Thread(target=time.sleep, args=(9,), daemon=True).start(); n += 1\n"
        "except RuntimeError:\n    pass\nprint(n)"
    )
    assert 1 <= int(run(bomb, threads=20).output) <= 20


@pytest.mark.parametrize(
    "address, family",
    [("('127.0.0.1', PORT)", "AF_INET"), ("('192.0.2.1', 80)", "AF_INET"), ("'/x'", "AF_UNIX")],
)
def test_no_network(address, family):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = address.replace("PORT", str(listener.getsockname()[1]))
        listener.settimeout(0.2)
        statement = f"import socket as s; s.socket(s.{family}).connect({address})"
        assert run(attempt(statement)).output == b"PermissionError\n"
        with pytest.raises(TimeoutError):
            listener.accept()


@pytest.mark.parametrize(
    "path", ["/x", "/usr/lib/x", "/dev/x", "/var/x", "/home/x", "../x", os.path.expanduser("~/x")]
)
def test_nothing_can_be_written_outside_the_scratch_folder(path):
    assert run(attempt(f"open({path!r}, 'w')")).output in (
        b"OSError\n", b"PermissionError\n", b"FileNotFoundError\n"
    )  # fmt: skip
    assert not os.path.exists(path)


def test_the_scratch_folder_is_small_and_forgotten():
    assert run("open('a', 'w').write('x'); print(open('a').read())").output == b"x\n"
    assert run(attempt("open('a')")).output == b"FileNotFoundError\n"
    fill = "for i in range(40): open(str(i), 'wb').write(bytes(2**20))"
    assert run(attempt(fill), scratch_mib=4).output == b"OSError\n"
    assert run(attempt("open('a', 'wb').write(bytes(2**23))"), scratch_mib=4).output == b"OSError\n"


def test_the_files_of_this_machine_are_out_of_sight(tmp_path):
    (tmp_path / "tests.json").write_text("gold")
    for path in (tmp_path / "tests.json", __file__, sandbox.__file__, "/proc/self/environ",
                 "/proc/1/environ", "/etc/passwd", "/proc/self/root/etc/passwd"):  # fmt: skip
        assert run(attempt(f"open({str(path)!r})")).output == b"FileNotFoundError\n"
    assert run("import os; print(sorted(os.environ))").output.decode().count("'") <= 12
    assert run("import torch").errors.startswith("ModuleNotFoundError")


def test_the_packages_beside_python_are_out_of_sight():
    look = (
        "import os, sysconfig\nfor n in ('site-packages', 'dist-packages'):\n"
        "    p = os.path.join(sysconfig.get_path('stdlib'), n)\n"
        "    print(os.listdir(p) if os.path.isdir(p) else [])"
    )
    assert run(look).output == b"[]\n[]\n"


def test_no_descriptor_but_the_three_streams():
    look = (
        "import os\nfound = []\nfor i in range(3, 64):\n    try:\n"
        "        os.fstat(i); found.append(i)\n    except OSError:\n        pass\nprint(found)"
    )
    assert run(look).output == b"[]\n"


def test_no_right_is_left():
    calls = (
        "import ctypes, os\nc = ctypes.CDLL(None, use_errno=True)\n"
        "print(c.unshare(0x10000000), c.mount(b'none', b'/tmp', b'tmpfs', 0, None),"
        " c.chroot(b'/tmp'), c.ptrace(16, 1, 0, 0), c.setsid(), c.setuid(0), c.kill(1, 9),"
        " c.kill(-1, 9), c.umount(b'/tmp'), c.memfd_create(b'x', 0), c.socket(16, 3, 0))\n"
        "print(os.getuid() != 0, len({os.getuid(), os.geteuid(), *os.getresuid()}))"
    )
    assert run(calls).output == b"-1 -1 -1 -1 -1 -1 -1 -1 -1 -1 -1\nTrue 1\n"


@pytest.mark.parametrize(
    "program, limit",
    [
        ("while True: pass", "time"),
        ("import time; time.sleep(60)", "time"),
        ("import signal, time\nfor n in (14, 15, 2, 24):\n    signal.signal(n, lambda *_: 0)\n"
         "signal.alarm(0)\nsignal.setitimer(signal.ITIMER_REAL, 0)\nwhile True: pass", "time"),
        ("import os\nos.close(1); os.close(2)\nwhile True: pass", "time"),
        ("print(str(10 ** (10 ** 8)))", "time"),
        ("import atexit, time\natexit.register(time.sleep, 60)\nimport threading\n"
         "threading.Thread(target=time.sleep, args=(60,)).start()", "time"),
        ("while True: print('x' * 10**6)", "output"),
        ("import sys\nwhile True: sys.stderr.write('x' * 10**6)", ""),
    ],
)  # fmt: skip
def test_whatever_does_not_end_is_ended(program, limit):
    start = time.monotonic()
    done = run(program, seconds=1.0)
    assert done.limit == limit and not done.ok
    assert time.monotonic() - start < 6  # 1 s is the limit; the rest is a busy machine's


@pytest.mark.parametrize(
    "program",
    [
        "x = bytearray(4 * 2**30)",
        "x = []\nwhile True: x.append(bytearray(2**20))",
        "import mmap; mmap.mmap(-1, 2**33)",
        "import sys; sys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1)\nf(0)",
        "import ctypes; ctypes.string_at(0)",
        "import os; os.abort()",
        "import os; os._exit(7)",
    ],
)
def test_whatever_breaks_its_process_breaks_nothing_else(program):
    before = psutil.virtual_memory().available
    done = run(program, memory_mib=256, seconds=10.0)
    assert not done.ok and b"42" not in done.output
    assert psutil.virtual_memory().available > before - 2 * 2**30


def test_no_process_is_left_behind():
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    for program in ("while True: pass", "import os; os._exit(1)"):
        run(program, seconds=0.5)
    assert {p.pid for p in psutil.Process().children(recursive=True)} <= before


def test_a_sandbox_ends_with_a_parent_that_is_killed():
    marker = f"riskpo-test-{os.getpid()}"
    code = (
        f"from riskpo.rewards.sandbox.run import *\n"
        f"run_program('while True: pass # {marker}', '', limits=Limits(seconds=300))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    sandboxed = []
    deadline = time.monotonic() + 30
    while len(sandboxed) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
        sandboxed = psutil.Process(parent.pid).children(recursive=True)
    assert len(sandboxed) == 3
    os.kill(sandboxed[0].pid, 9)  # the outermost first: its children hear of it from the kernel
    gone, alive = psutil.wait_procs(sandboxed, timeout=5)
    parent.kill()
    parent.wait()
    assert not alive


def test_refusal_is_clear_and_never_a_weaker_sandbox(monkeypatch):
    with pytest.raises(ValueError, match="expected one of namespaces, limits"):
        run_program("", "", level="none")
    broken = sandbox.BOOT.replace(
        "; main()", "; from riskpo.rewards.sandbox import syscalls as k; k.unshare = refuse; main()"
    )
    refuse = "\ndef refuse(flags): raise PermissionError(1, 'unshare')\n"
    start, _, rest = broken.partition("from riskpo.rewards.sandbox.child")
    monkeypatch.setattr(sandbox, "BOOT", f"{start}{refuse}from riskpo.rewards.sandbox.child{rest}")
    require.cache_clear()
    try:
        with pytest.raises(SandboxUnavailable, match="unshare.*code-limits-only"):
            require()
    finally:
        require.cache_clear()


def test_the_weaker_level_keeps_its_own_promises():
    def weak(program):
        return run_program(program, "", level="limits", limits=Limits(seconds=2.0)).output

    assert weak("print(1)") == b"1\n"
    assert weak(attempt("import os; os.fork()")) == b"PermissionError\n"
    assert weak(attempt("import socket; socket.socket()")) == b"PermissionError\n"
    assert weak(attempt("import os; os.kill(os.getppid(), 9)")) == b"PermissionError\n"
    assert weak(attempt("x = bytearray(2**33)")) == b"MemoryError\n"


PYTHON = "/usr/bin/python3"


@pytest.mark.skipif(
    not (LINUX and os.geteuid() == 0 and shutil.which("setpriv") and os.path.exists(PYTHON)),
    reason="needs root, setpriv and a Python that another user may read",
)
def test_it_works_for_an_ordinary_user(tmp_path):
    code = (
        "from riskpo.rewards.sandbox.run import *\n"
        "print(run_program('import os; print(os.getuid()); os.fork()', '').errors)"
    )
    package = os.path.dirname(os.path.dirname(sandbox.__file__))
    done = subprocess.run(
        ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", PYTHON, "-B", "-c",
         code],
        env={"PYTHONPATH": package}, capture_output=True, text=True, cwd="/",
    )  # fmt: skip
    if "SandboxUnavailable" in done.stderr or "No module" in done.stderr:
        pytest.skip(f"not allowed to an ordinary user here: {done.stderr[-200:]}")
    assert "PermissionError" in done.stdout, done.stderr
