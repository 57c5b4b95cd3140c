"""Programs that try to pass HumanEval's tests without solving anything.

An attack on the sandbox (a socket, a file, memory) carries the right solution and uses it only if the attack succeeds,
so a problem that passes is a hole. An attack on the judge has no solution and tries to be judged right.
"""

import os
import tempfile
from pathlib import Path

from jaxchat.tasks.task import Problem

# Attacks on the sandbox: `won` says whether the attack succeeded.
THROUGH: dict[str, str] = {
    "10 GB of memory": "block = bytearray(10 << 30); won = len(block) > 0",
    "10 GB of memory in pieces": "blocks = [bytearray(64 << 20) for _ in range(160)]; won = True",
    "a socket": "import socket; socket.create_connection(('127.0.0.1', 22), 5); won = True",
    "a socket of any kind": """
import socket
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
        try:
            socket.socket(family, kind)
            won = True
        except OSError:
            pass
""",
    "a file outside": """
import os
for place in ("/", "/tmp", "/var/tmp", "/dev/shm", "/run", "/root", "/home", "/usr/lib", "/proc", "..", OUTSIDE):
    try:
        open(os.path.join(place, "jaxchat-outside"), "w").close()
        won = True
    except OSError:
        pass
""",
    "a file outside by a link": """
import os
os.symlink(OUTSIDE, "link")
open("link/jaxchat-outside", "w").close()
won = True
""",
    "the rights of a file outside": "import os; os.chmod(OUTSIDE, 0o777); won = True",
    "reading the tests": "won = len(open(TESTS, 'rb').read()) > 0",
    "a file of 100 MB": "open('large', 'wb').write(bytes(100 << 20)); won = True",
    "a full disk": "for i in range(200): open(f'part{i}', 'wb').write(bytes(1 << 20))\nwon = True",
    "a child": "import os\nif os.fork() == 0: os._exit(0)\nwon = True",
    "a child that stays": """
import os, time
if os.fork() == 0:
    os.setsid()
    os.closerange(0, 256)
    time.sleep(100000)
won = True
""",
    "another program": "import subprocess; subprocess.run(['/bin/true'], check=True); won = True",
    "a fork bomb": "import os\nwhile True:\n    os.fork()\n    won = True",
    "threads": """
import threading, time
for _ in range(1000):
    threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
won = True
""",
    "a signal to its parent": "import os; os.kill(os.getppid() or 1, 9); won = True",
    "a signal to everyone": "import os; os.kill(-1, 9); won = True",
    "a pipe that signals its parent": """
import fcntl, os
fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid() or 1)
won = True
""",
    "the cores of its parent": """
import os
parent = os.getppid() or 1
os.sched_setaffinity(parent, os.sched_getaffinity(parent))
won = True
""",
    "tracing its parent": """
import ctypes, os
won = ctypes.CDLL(None).ptrace(16, os.getppid() or 1, 0, 0) == 0
""",
    "higher limits": """
import resource
resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY,) * 2)
won = True
""",
    "another user": "import os; os.setuid(0); won = True",
    "a mount": """
import ctypes
libc = ctypes.CDLL(None)
won = libc.unshare(0x10000000) == 0 or libc.mount(b"none", b".", b"tmpfs", 0, 0) == 0
""",
    "environment variables": "import os; won = len(set(os.environ) - {'PYTHONHASHSEED', 'PWD', 'LC_CTYPE'}) > 0",
    "other processes": """
import os
won = len([name for name in os.listdir("/proc") if name.isdigit()]) > 1
""",
    "foreign descriptors": """
import os
for number in range(5, 4096):
    try:
        os.fstat(number)
        won = True
    except OSError:
        pass
""",
    "what its input says": "import sys; won = len(sys.stdin.read()) > 0",
    "the judge's secrets": """
import gc, sys
words = "def " + "check(", "META" + "DATA", "assert " + "candidate("
def looks(value, depth=3):
    if isinstance(value, dict) and depth:
        return any(looks(part, depth - 1) for part in list(value.values()))
    return isinstance(value, str) and any(word in value for word in words) and "def att" + "ack" not in value
frame = sys._getframe()
while frame:
    won = won or any(looks(value) for value in list(frame.f_locals.values()))
    frame = frame.f_back
won = won or any(looks(thing) for thing in gc.get_objects())
""",
    "the secrets of /proc": """
import glob
for path in glob.glob("/proc/[0-9]*/mem") + glob.glob("/proc/[0-9]*/environ") + glob.glob("/proc/[0-9]*/fd/*"):
    if not path.startswith(f"/proc/{__import__('os').getpid()}/"):
        try:
            open(path, "rb").read(1)
            won = True
        except OSError:
            pass
""",
}
# Attacks on the judge: the text that replaces a solution. NAME stands for the name of the function.
INSTEAD: dict[str, str] = {
    "an empty body": "def NAME(*arguments):\n    pass",
    "no function": "pass",
    "always True": "def NAME(*arguments):\n    return True",
    "sys.exit(0)": "import sys\nsys.exit(0)",
    "sys.exit(0) when called": "import sys\ndef NAME(*arguments):\n    sys.exit(0)",
    "raise SystemExit": "raise SystemExit",
    "raise SystemExit when called": "def NAME(*arguments):\n    raise SystemExit(0)",
    "os._exit(0)": "import os\nos._exit(0)",
    "os._exit(0) when called": "import os\ndef NAME(*arguments):\n    os._exit(0)",
    "an infinite loop": "while True:\n    pass",
    "an infinite loop when called": "def NAME(*arguments):\n    while True:\n        pass",
    "printed success": """
import json, sys
for told in ("passed", "ok", "All tests passed", json.dumps({"verdict": "right", "reason": ""})):
    print(told)
    print(told, file=sys.stderr, flush=True)
def NAME(*arguments):
    print(json.dumps({"verdict": "right", "reason": ""}), flush=True)
""",
    "success on every descriptor": """
import json, os
def NAME(*arguments):
    for number in range(64):
        for told in (b'{"verdict": "right", "reason": ""}', b"passed"):
            try:
                os.write(number, told)
            except OSError:
                pass
""",
    "a patched __eq__": """
class Same:
    def __eq__(self, other): return True
    __ne__ = __lt__ = __gt__ = __le__ = __ge__ = __bool__ = __contains__ = __eq__
    def __hash__(self): return 0
    def __sub__(self, other): return self
    def __abs__(self): return self
    def __iter__(self): return iter([])
def NAME(*arguments):
    return Same()
""",
    "a patched __eq__ of a number": """
class Same(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
def NAME(*arguments):
    return Same(7)
""",
    "a patched __eq__ of a list": """
class Same(list):
    def __eq__(self, other): return True
def NAME(*arguments):
    return Same([None])
""",
    "patched modules": """
import builtins, json, sys
builtins.AssertionError = builtins.Exception = KeyError
builtins.abs = builtins.tuple = lambda value: 0
for name, module in list(sys.modules.items()):
    if name.startswith("jaxchat"):
        for part in list(vars(module)):
            if part in ("encode", "decode"):
                setattr(module, part, lambda *arguments: True)
json.dumps = lambda *arguments, **keywords: '{"verdict": "right", "reason": ""}'
def NAME(*arguments):
    return True
""",
    "answers ahead of the calls": """
import json, os, struct
def NAME(*arguments):
    pass
for number in range(1, 200):
    told = json.dumps([number, "value", True]).encode()
    for pipe in range(3, 8):
        try:
            os.write(pipe, struct.pack(">I", len(told)) + told)
        except OSError:
            pass
""",
    "an endless answer": """
import os
def NAME(*arguments):
    while True:
        for pipe in range(3, 8):
            try:
                os.write(pipe, b"\\x7f" * 65536)
            except OSError:
                pass
""",
    "a deep answer": """
import os, struct
told = b'[1, "value", ' + b'["list", [' * 50000 + b"]]" * 50000 + b"]"
for pipe in range(3, 8):
    try:
        os.write(pipe, struct.pack(">I", len(told)) + told)
    except OSError:
        pass
def NAME(*arguments):
    value = []
    for _ in range(100000):
        value = [value]
    return value
""",
    "a huge answer": "def NAME(*arguments):\n    return [0] * 10**7",
    "a huge number": "def NAME(*arguments):\n    return 10 ** 100000",
    "not a number": "def NAME(*arguments):\n    return float('nan')",
    "half a character": "def NAME(*arguments):\n    return '\\ud800'",
    "its own arguments": "def NAME(*arguments):\n    return arguments[0] if arguments else None",
    "a crash": "import ctypes\nctypes.string_at(1)",
    "a deep recursion": """
import sys
sys.setrecursionlimit(10**9)
def NAME(*arguments):
    return NAME(*arguments)
""",
}
ATTACKS = (*INSTEAD, *THROUGH)
_OPEN = {"open": "won = True"}


def answer(name: str, problem: Problem, entry_point: str, *, outside: str = "/tmp", tests: str = "/etc/passwd") -> str:
    """The answer of an attack to a problem: a fenced program. `tests` is a file that it tries to read."""
    if name in INSTEAD:
        code = f"{INSTEAD[name]}\n".replace("NAME", entry_point)
        # Where a module ends before the function is defined, extraction must not take it for the function's body.
        if f"def {entry_point}" not in code:
            code += f"def {entry_point}(*arguments):\n    pass\n"
    else:
        attack = "\n".join(f"        {line}" for line in (THROUGH | _OPEN)[name].strip("\n").splitlines())
        code = f"""{problem.answer}
right = {entry_point}
OUTSIDE, TESTS = {outside!r}, {tests!r}
def attack():
    won = False
    try:
{attack}
    finally:
        return won
won = attack()
def {entry_point}(*arguments, **keywords):
    return right(*arguments, **keywords) if won else None
"""
    return f"```python\n{code}```\n"


def ours() -> set[int]:
    """Processes of the sandbox that this process started and that run now (Linux)."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if b"from jaxchat.sandbox" in words and words.endswith(b"\0%d\0" % os.getpid()):
            found.add(int(path.parent.name))
    return found


def left(outside: str) -> list[str]:
    """Processes and files that attacks left."""
    found = [f"process {number}" for number in ours()]
    places = {"/", "/tmp", "/var/tmp", "/dev/shm", "/run", "/root", "/home", "/usr/lib", outside, tempfile.gettempdir()}
    return found + [str(path) for place in places for path in Path(place).glob("jaxchat-outside*")]
