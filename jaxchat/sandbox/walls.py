"""Ways to start an isolated process: in bubblewrap, or with resource limits only.

In bubblewrap the process sees only the Python installation and system libraries, read-only; it sees no other processes
and no network. With limits only, it keeps the rights of its user, less what Landlock and the system call filter refuse.
In both it can write to no file.
"""

import os
import subprocess
import sys
from typing import Literal

from jaxchat.sandbox import landlock

Wall = Literal["bubblewrap", "limits"]
WALLS: tuple[Wall, ...] = ("bubblewrap", "limits")
ENVIRONMENT = {"PYTHONHASHSEED": "0"}  # Makes the order of sets reproducible.
PYTHON = os.path.realpath(sys.executable)
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_LIBRARIES = ("lib", "lib64")


def command(function: str, asker: str) -> list[str]:
    """Command that runs `function` ("module:name" in this package) in a Python without site-packages.

    `asker`, the process id of the caller, is the last argument, so that leftover processes can be attributed to it.
    """
    module, _, name = function.partition(":")
    code = f"import sys\nsys.path.append({ROOT!r})\nfrom jaxchat.sandbox.{module} import {name}\n{name}()"
    return [PYTHON, "-S", "-P", "-s", "-c", code, asker]


def shown() -> list[str]:
    """Paths that an isolated process may read: Python, system libraries and the code of this package."""
    own = [f"{ROOT}/jaxchat/__init__.py", f"{ROOT}/jaxchat/sandbox"]
    libraries = [os.path.join(prefix, name) for prefix in ("/", "/usr", sys.base_prefix) for name in _LIBRARIES]
    paths = [PYTHON, "/etc/ld.so.cache", *libraries, *own]
    return [path for path in dict.fromkeys(paths) if os.path.exists(path)]


def hidden() -> list[str]:
    """Directories of installed packages within `shown()`, which are hidden because packages may contain the tests."""
    packages = []
    for library in dict.fromkeys(f"{prefix}/{name}" for prefix in ("/usr", sys.base_prefix) for name in _LIBRARIES):
        names = os.listdir(library) if os.path.isdir(library) else []
        versions = [f"{library}/{name}" for name in names if name.startswith("python")]
        packages += [f"{version}/{name}" for version in versions for name in ("site-packages", "dist-packages")]
    return [path for path in packages if os.path.isdir(path)]


def files(wall: Wall) -> tuple[list[str], list[str]] | None:
    """Arguments of `landlock.confine` for wall "limits"; None for bubblewrap, which restricts files itself."""
    if wall != "limits":
        return None
    split = [landlock.without(path, hidden()) for path in shown()]
    return [path for parts, _ in split for path in parts], [path for _, between in split for path in between]


def spare_user() -> int | None:
    """An unused user id that differs between processes, if this process runs as root; None if it may not switch users.

    Falls back to 65534 (nobody) if the user namespace's id map cannot be read.
    """
    if os.getuid() != 0:
        return None
    try:
        with open("/proc/self/uid_map") as file:
            inside, _, count = map(int, file.readlines()[-1].split())
    except (OSError, ValueError):
        return 65534
    return inside + count // 2 + os.getpid() % (count // 4) if count > 4 else None


def start(wall: Wall, user: int | None) -> subprocess.Popen[bytes]:
    """Starts `inside.main` in isolation, connected by two pipes only.

    Raises:
        OSError: this isolation does not work here.
    """
    arguments = command("inside:main", sys.argv[-1])
    return subprocess.Popen(
        [*_bubblewrap(user), *arguments] if wall == "bubblewrap" else arguments,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=ENVIRONMENT,
        cwd="/",
        start_new_session=True,
        bufsize=0,
    )


def _bubblewrap(user: int | None) -> list[str]:
    places = [*os.environ.get("PATH", "").split(":"), "/usr/bin", "/usr/local/bin"]
    program = next((path for path in (f"{place}/bwrap" for place in places) if os.access(path, os.X_OK)), None)
    if program is None:
        raise FileNotFoundError("bwrap is not installed")
    unshared = ["ipc", "pid", "net", "uts", "cgroup-try"]
    # Root switches to `user` inside, which needs these capabilities and all user ids, hence no user namespace.
    rights = ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    if user is None:
        unshared, rights = [*unshared, "user"], ["--uid", "65534", "--gid", "65534"]
    made = [program, *(f"--unshare-{name}" for name in unshared), *rights, "--die-with-parent", "--new-session"]
    # By default bubblewrap creates parent directories that only root may enter.
    parents: set[str] = set()
    for path in shown():
        while (path := os.path.dirname(path)) != "/":
            parents.add(path)
    made += [part for path in sorted(parents, key=len) for part in ("--perms", "0755", "--dir", path)]
    made += [part for path in shown() for part in ("--ro-bind", path, path)]
    made += [part for path in hidden() for part in ("--tmpfs", path, "--remount-ro", path)]
    return [*made, "--remount-ro", "/", "--"]
