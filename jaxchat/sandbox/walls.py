"""Ways to start a process apart from everything: bubblewrap, namespaces of our own, or what is left without them.

Behind the first two the process sees the Python installation and its system libraries, read-only, and an empty
directory in memory; no other file, no process, no network. Without them it has a directory of its own, and no rights
but those of its user.
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
ENVIRONMENT = {"PYTHONHASHSEED": "0"}  # The order of a set must not change from run to run.
PYTHON = os.path.realpath(sys.executable)
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_LIBRARIES = ("lib", "lib64")
_NEW = {"mount": 0x20000, "uts": 0x4000000, "ipc": 0x8000000, "user": 0x10000000, "pid": 0x20000000, "net": 0x40000000}
_NOSUID, _NODEV, _BIND, _REC, _PRIVATE, _DETACH = 2, 4, 4096, 16384, 1 << 18, 2
_MOUNT_SETATTR, _RECURSIVE, _HERE = 442, 0x8000, -100
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}


def command(function: str, asker: str) -> list[str]:
    """Starts a function of the package in a bare Python: no site-packages, nothing from the environment's paths.

    The last word names the process that asked, so that whatever were left of it could be told from others.
    """
    module, _, name = function.partition(":")
    code = f"import sys\nsys.path.append({ROOT!r})\nfrom jaxchat.sandbox.{module} import {name}\n{name}()"
    return [PYTHON, "-S", "-P", "-s", "-c", code, asker]


def shown() -> list[str]:
    """What a process behind a wall may read: Python, system libraries, and the code of this package."""
    own = [f"{ROOT}/jaxchat/__init__.py", f"{ROOT}/jaxchat/sandbox"]
    libraries = [os.path.join(prefix, name) for prefix in ("/", "/usr", sys.base_prefix) for name in _LIBRARIES]
    paths = [PYTHON, "/etc/ld.so.cache", *libraries, *own]
    return [path for path in dict.fromkeys(paths) if os.path.exists(path)]


def hidden() -> list[str]:
    """Folders among what is shown that hold installed packages, which may hold the very tests."""
    found = []
    for library in dict.fromkeys(f"{prefix}/{name}" for prefix in ("/usr", sys.base_prefix) for name in _LIBRARIES):
        names = os.listdir(library) if os.path.isdir(library) else []
        versions = [f"{library}/{name}" for name in names if name.startswith("python")]
        found += [f"{version}/{name}" for version in versions for name in ("site-packages", "dist-packages")]
    return [path for path in found if os.path.isdir(path)]


def files(wall: Wall, directory: str) -> tuple[list[str], list[str], str] | None:
    """What a process without a wall may reach, where Landlock holds it to that; see `landlock.confine`."""
    if wall != "limits":
        return None
    found = [landlock.without(path, hidden()) for path in shown()]
    whole = [path for parts, _ in found for path in parts]
    return whole, [path for _, between in found for path in between], directory


def spare_user() -> int | None:
    """A user that nobody is, of this process's own, where it may become one; None where it may not."""
    if os.getuid() != 0:
        return None
    try:
        with open("/proc/self/uid_map") as file:
            inside, _, count = map(int, file.readlines()[-1].split())
    except (OSError, ValueError):
        return 65534
    return inside + count // 2 + os.getpid() % (count // 4) if count > 4 else None


def start(wall: Wall, *, user: int | None, directory: str, directory_bytes: int) -> subprocess.Popen[bytes]:
    """Starts `inside.main` behind a wall, with two pipes and no other descriptor; to be called once in a process.

    Raises:
        OSError: the wall cannot be built here.
    """
    enter: Callable[[], None] | None = None
    arguments = command("inside:main", sys.argv[-1])
    if wall == "bubblewrap":
        arguments = [*_bubblewrap(user, directory_bytes), *arguments]
    elif wall == "namespaces":
        _leave(user)
        enter = _entrance(directory_bytes)
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
    apart = ["ipc", "pid", "net", "uts", "cgroup-try"]
    # Root becomes another user inside, so it keeps the right to, and no user namespace may hide the others.
    rights = ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    if user is None:
        apart, rights = [*apart, "user"], ["--uid", "65534", "--gid", "65534"]
    made = [program, *(f"--unshare-{name}" for name in apart), *rights, "--die-with-parent", "--new-session"]
    # Left to itself it makes parents that only root may enter.
    parents: set[str] = set()
    for path in shown():
        while (path := os.path.dirname(path)) != "/":
            parents.add(path)
    made += [part for path in sorted(parents, key=len) for part in ("--perms", "0755", "--dir", path)]
    made += [part for path in shown() for part in ("--ro-bind", path, path)]
    made += [part for path in hidden() for part in ("--tmpfs", path, "--remount-ro", path)]
    made += ["--perms", "0777", "--size", str(directory_bytes), "--tmpfs", HOME, "--remount-ro", "/", "--chdir", HOME]
    return [*made, "--"]


def _leave(user: int | None) -> None:
    """Puts this process into namespaces of its own but for the mounts; its next child is the first of its processes."""
    apart = _NEW["uts"] | _NEW["ipc"] | _NEW["pid"] | _NEW["net"]
    if os.getuid() == 0:
        return _check("unshare", _libc().unshare(apart))
    inside, outside = (65534, 65534), (os.getuid(), os.getgid())
    _check("unshare", _libc().unshare(apart | _NEW["user"]))
    maps = [(f"{name}_map", f"{a} {b} 1") for name, a, b in zip(("uid", "gid"), inside, outside)]
    for name, text in (("setgroups", "deny"), *maps):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _entrance(directory_bytes: int) -> Callable[[], None]:
    """What the child does before it becomes Python: a new root with what is shown, and nothing else."""
    visible, empty, pivot_root = shown(), hidden(), _PIVOT_ROOT.get(os.uname().machine)
    if pivot_root is None:
        raise OSError(f"no namespaces of our own on {os.uname().machine}")

    def enter() -> None:
        libc = _libc()
        _check("unshare", libc.unshare(_NEW["mount"]))
        _mount("none", "/", "", _REC | _PRIVATE)
        new = "/proc"  # A directory that is always there, and that nothing to be shown lies in.
        _mount("tmpfs", new, "tmpfs", _NOSUID | _NODEV, "mode=755,size=1m")
        for path in visible:
            _point(path, new + path)
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


def _point(path: str, target: str) -> None:
    """An empty directory or file to mount on."""
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    elif not os.path.exists(target):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))


def _read_only(path: str) -> None:
    """Makes a mount and all below it read-only, without devices and programs of other users (Linux 5.12)."""
    attributes = (ctypes.c_uint64 * 4)(1 | 2 | 4, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    found = _libc().syscall(_MOUNT_SETATTR, _HERE, path.encode(), _RECURSIVE, ctypes.byref(attributes), size)
    _check("mount_setattr", found)


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
    """Deletes a directory, however deep it is and whatever rights its parts have; links are not followed."""
    waiting: list[str] = [directory]
    moved = 0
    while waiting:
        place = waiting.pop()
        os.chmod(place, 0o700)
        for entry in list(os.scandir(place)):
            if entry.is_dir(follow_symlinks=False):
                # Brought up beside the others, so that no path grows longer than a system call takes.
                os.chmod(entry.path, 0o700)
                moved += 1
                waiting.append(f"{directory}.{moved}")
                os.rename(entry.path, waiting[-1])
            else:
                os.unlink(entry.path)
        os.rmdir(place)
