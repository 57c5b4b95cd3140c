"""Ways to start an isolated process: bubblewrap, Linux namespaces, or resource limits only.

With bubblewrap or namespaces, the process sees only the Python installation and system libraries, read-only, and an
empty directory in memory; it sees no other processes and no network. With limits only, it gets a temporary directory
and keeps the rights of its user, less what Landlock and the system call filter refuse.
"""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Literal

from jaxchat.sandbox import landlock

Wall = Literal["bubblewrap", "namespaces", "limits"]
WALLS: tuple[Wall, ...] = ("bubblewrap", "namespaces", "limits")
HOME = "/candidate"
ENVIRONMENT = {"PYTHONHASHSEED": "0"}  # Makes the order of sets reproducible.
PYTHON = os.path.realpath(sys.executable)
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_LIBRARIES = ("lib", "lib64")
_NEW = {"mount": 0x20000, "uts": 0x4000000, "ipc": 0x8000000, "user": 0x10000000, "pid": 0x20000000, "net": 0x40000000}
_NOSUID, _NODEV, _BIND, _REC, _PRIVATE, _DETACH = 2, 4, 4096, 16384, 1 << 18, 2
_MOUNT_SETATTR, _AT_RECURSIVE, _AT_FDCWD = 442, 0x8000, -100
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}


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


def files(wall: Wall, directory: str) -> tuple[list[str], list[str], str] | None:
    """Arguments of `landlock.confine` for wall "limits"; None for the others, which restrict files themselves."""
    if wall != "limits":
        return None
    split = [landlock.without(path, hidden()) for path in shown()]
    readable = [path for parts, _ in split for path in parts]
    return readable, [path for _, between in split for path in between], directory


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


def start(wall: Wall, *, user: int | None, directory: str, directory_bytes: int) -> subprocess.Popen[bytes]:
    """Starts `inside.main` in isolation, connected by two pipes only. Call it once per process.

    Raises:
        OSError: this isolation does not work here.
    """
    enter: Callable[[], None] | None = None
    arguments = command("inside:main", sys.argv[-1])
    if wall == "bubblewrap":
        arguments = [*_bubblewrap(user, directory_bytes), *arguments]
    elif wall == "namespaces":
        _enter_namespaces(user)
        enter = _new_root(directory_bytes)
    elif user is not None:
        os.chown(directory, user, user)
    return subprocess.Popen(
        arguments,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=ENVIRONMENT,
        cwd=directory if wall == "limits" else "/",
        preexec_fn=enter,
        start_new_session=True,
        bufsize=0,
    )


def _bubblewrap(user: int | None, directory_bytes: int) -> list[str]:
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
    made += ["--perms", "0777", "--size", str(directory_bytes), "--tmpfs", HOME, "--remount-ro", "/", "--chdir", HOME]
    return [*made, "--"]


def _enter_namespaces(user: int | None) -> None:
    """Moves this process into new namespaces, except for mounts; the PID namespace applies to its next child."""
    flags = _NEW["uts"] | _NEW["ipc"] | _NEW["pid"] | _NEW["net"]
    if os.getuid() == 0:
        return _check("unshare", _libc().unshare(flags))
    inside, outside = (65534, 65534), (os.getuid(), os.getgid())
    _check("unshare", _libc().unshare(flags | _NEW["user"]))
    maps = [(f"{name}_map", f"{a} {b} 1") for name, a, b in zip(("uid", "gid"), inside, outside)]
    for name, text in (("setgroups", "deny"), *maps):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _new_root(directory_bytes: int) -> Callable[[], None]:
    """Returns the function that a child calls before it executes Python: it mounts a root with `shown()` only."""
    visible, empty, pivot_root = shown(), hidden(), _PIVOT_ROOT.get(os.uname().machine)
    if pivot_root is None:
        raise OSError(f"namespaces are not supported on {os.uname().machine}")

    def enter() -> None:
        libc = _libc()
        _check("unshare", libc.unshare(_NEW["mount"]))
        _mount("none", "/", "", _REC | _PRIVATE)
        new = "/proc"  # A mount point that always exists and contains none of the visible paths.
        _mount("tmpfs", new, "tmpfs", _NOSUID | _NODEV, "mode=755,size=1m")
        for path in visible:
            _make_mount_point(path, new + path)
            _mount(path, new + path, "", _BIND | _REC)
        for path in empty:
            _mount("tmpfs", new + path, "tmpfs", 0, "mode=755,size=4k")
        os.mkdir(new + HOME)
        _read_only(new)
        _mount("tmpfs", new + HOME, "tmpfs", _NOSUID | _NODEV, f"mode=777,size={directory_bytes},nr_inodes=4096")
        os.chdir(new)
        _check("pivot_root", libc.syscall(pivot_root, b".", b"."))
        _check("umount", libc.umount2(b".", _DETACH))
        os.chdir(HOME)

    return enter


def _make_mount_point(path: str, target: str) -> None:
    """Creates an empty directory or file `target`, on which `path` can be mounted."""
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    elif not os.path.exists(target):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))


def _read_only(path: str) -> None:
    """Makes a mount and all mounts below it read-only, nosuid and nodev (mount_setattr, Linux 5.12)."""
    attributes = (ctypes.c_uint64 * 4)(1 | 2 | 4, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    result = _libc().syscall(_MOUNT_SETATTR, _AT_FDCWD, path.encode(), _AT_RECURSIVE, ctypes.byref(attributes), size)
    _check("mount_setattr", result)


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    texts = [text.encode() for text in (source, target, kind)]
    _check(f"mount {target}", _libc().mount(*texts, ctypes.c_ulong(flags), options.encode()))


def _check(what: str, result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def remove(directory: str) -> None:
    """Deletes a directory tree of any depth and with any access modes, without following links."""
    pending: list[str] = [directory]
    moved = 0
    while pending:
        place = pending.pop()
        os.chmod(place, 0o700)
        for entry in list(os.scandir(place)):
            if entry.is_dir(follow_symlinks=False):
                # Moved next to the top directory, so that no path exceeds the length limit of system calls.
                os.chmod(entry.path, 0o700)
                moved += 1
                pending.append(f"{directory}.{moved}")
                os.rename(entry.path, pending[-1])
            else:
                os.unlink(entry.path)
        os.rmdir(place)
