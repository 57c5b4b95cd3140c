"""Serves checkpoints to OpenAI's clients: python -m launch.serve --checkpoint=runs/tiny (extra `serve`).

The API is that of /v1/chat/completions and /v1/completions; docs/serving.md has all of it. `runs/tiny` serves every
stage and kept step as tiny/sft, tiny/sft@300; several checkpoints are separated by spaces.
"""

import re
from dataclasses import dataclass

from jaxchat import command_line, launcher
from jaxchat.errors import missing


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Options of launch.serve."""

    checkpoint: tuple[str, ...]  # Runs such as runs/tiny, stages such as runs/tiny/rl, or runs/tiny/rl@20.
    default_model: str = ""  # Model of requests that name none; empty is the last stage.
    host: str = "127.0.0.1"  # Other addresses need --api_key or --allow_anyone.
    port: int = 8000  # 0 takes any free one.
    api_key: str = ""  # Clients must send it; the environment variable JAXCHAT_API_KEY sets it too.
    allow_anyone: bool = False  # Serve other machines without a key.
    allow_origins: tuple[str, ...] = ()  # Origins of other pages that may use the API, such as https://example.com.
    slots: int = 16  # Number of answers decoded together.
    steps: int = 8  # Tokens decoded between two looks at the queue.
    length: int = 0  # Context length; 0 is the row length of training.
    adapt: bool = False  # Decode in smaller batches while few answers run; compiles more programs.
    queue: int = 64  # Number of answers that may wait for a slot; more get 429.
    requests_per_minute: int = 0  # For each client; 0 is no limit.
    body_bytes: int = 1_000_000  # Largest body of a request.
    model_bytes: int = 8 << 30  # Limit of parameters and caches of all loaded models.
    prefix_bytes: int = 256 << 20  # Limit of the stored caches of conversations, for each model.
    warm: bool = True  # Compile everything before the first request.
    inspect: bool = True  # Serve the microscope: /inspect/..., and its half of the page.
    drain_seconds: float = 30.0  # How long a signal waits for answers under way.
    tools: tuple[str, ...] = ("calculator",)  # Tools that run in the server; none with --tools and no name.

    def __post_init__(self) -> None:
        least = {"slots": 1, "steps": 1, "body_bytes": 1}
        for name in (*least, "length", "queue", "requests_per_minute", "prefix_bytes", "drain_seconds"):
            if not getattr(self, name) >= least.get(name, 0):
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least.get(name, 0)}")
        for origin in self.allow_origins:
            if not re.fullmatch(r"\*|https?://[^/?#]+", origin):
                raise ValueError(f"allow_origins={origin} must be an origin such as https://example.com")


def main(argv: list[str]) -> dict[str, object]:
    options = command_line.parse(Serve, argv, description=__doc__)
    try:
        from jaxchat.serve import app
    except ImportError as error:
        raise missing(f"launch.serve needs more packages ({error})", "serve") from None
    return app.run(options)


if __name__ == "__main__":
    launcher.run(main)
