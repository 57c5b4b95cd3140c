"""The commands: `python -m launch.train` and its neighbours."""

import os
import sys
from typing import Any

if sys.platform == "win32":
    print("error: jaxchat runs on Linux and macOS; on Windows, use it in WSL: see README.md", file=sys.stderr)
    raise SystemExit(2)

from jaxchat import signals

HUGE_PAGES = "glibc.malloc.hugetlb=1"


def start_again_with_huge_pages() -> None:
    """Replaces this process by the same command with huge pages for large arrays; Linux with glibc only.

    A training step on a CPU is 8 to 11 percent faster with them. glibc reads the setting only when a program starts. A
    setting of GLIBC_TUNABLES by the user is left alone.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = HUGE_PAGES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def end_with_a_sentence(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Exception hook: reports errors of the imports, in which JAX reads its variables, as `launcher.run` does later."""
    from jaxchat import launcher

    if (problem := launcher.sentence(error)) is None:
        return sys.__excepthook__(kind, error, trace)
    launcher.log(f"error: {problem}")
    raise SystemExit(2)


if sys.argv[:1] == ["-m"]:  # Python imports this package before it runs `python -m launch.NAME`, and nothing else yet.
    start_again_with_huge_pages()
    signals.listen()
    sys.excepthook = end_with_a_sentence
