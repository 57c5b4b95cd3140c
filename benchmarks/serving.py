"""launch.serve under load, beside the engine alone in the same run; the server and its clients are two processes.

Streams: greedy answers to one client and to many at once, with the seconds to the first token of each and those of
/health meanwhile. Seeded: the same requests all at once and one at a time. Leaving: many requests, a tenth of whose
clients leave at random moments, and what the server holds afterwards.
"""

import asyncio
import contextlib
import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks import options, report, timing
from jaxchat.decode.engine import Engine
from jaxchat.decode.prompts import common
from jaxchat.decode.requests import Request
from jaxchat.decode.sampling import SamplingParams, noise, pack
from jaxchat.errors import UserError
from jaxchat.launcher import log
from jaxchat.loading import load_engine

STREAMS, SEEDED, LEAVING = 32, 200, 1000
QUICK = 4, 8, 40  # The same with --quick.
ANSWER = 32  # Tokens of a seeded answer.
EXACT = {"add_special_tokens": False}  # The prompt as it is.


def run(bench: options.Bench, arguments: list[str]) -> dict[str, Any]:
    """Tokens per second of server and engine with one and with many streams, and the other measurements.

    The result has a row per number of streams (`ratio` is server to engine; quantiles of `first_token_seconds` and
    `health_seconds`), `seeded` (one compiled shape) and `seeded_with_adapt`, `leaving`, and the seconds from the start
    of the process until it is ready, with and without compilation."""
    if not bench.checkpoint or arguments:
        raise UserError("name a checkpoint and nothing else: --checkpoint=runs/tiny/rl")
    streams, seeded, leaving = QUICK if bench.quick else (STREAMS, SEEDED, LEAVING)
    engine = load_engine(bench.checkpoint, slots=streams, adapt=True)
    length = engine.shape.length // 2
    generator = np.random.default_rng(0)
    prompts = generator.integers(10, engine.transformer.config.vocab, (seeded, 32)).tolist()
    params = SamplingParams(0.0, max_tokens=length, ignore_end=True)
    body = {"temperature": 0, "max_tokens": length, "ignore_eos": True, "stream": True}
    row: dict[str, Any] = {}
    with _serving(bench.checkpoint, f"--slots={streams}", "--adapt", "--queue=2000", "--warm=False") as (port, pid, _):
        for count in (1, streams):
            bodies = [body | EXACT | {"prompt": prompt} for prompt in prompts[:count]]
            requests = [Request(prompt, params) for prompt in prompts[:count]]
            sides: dict[str, Callable[[], Any]] = {
                "engine": partial(engine.generate, requests),
                "server": lambda bodies=bodies: asyncio.run(_watched(port, bodies)),  # type: ignore[misc]
            }
            for side in [*sides.values()] * 2:  # The second call finds the caches that the first one filled.
                side()
            seconds, found = timing.alternate(sides, 1 if bench.quick else bench.repeats, 0.2)
            speeds = {name: count * length / value for name, value in seconds.items()}
            row[f"streams_{count}"] = {"ratio": speeds["server"] / speeds["engine"], **speeds} | _quantiles(
                {name: [x for one in found["server"] for x in one[name]] for name in found["server"][0]}
            )
            log(f"{count} streams: {row[f'streams_{count}']}")
        row["seeded_with_adapt"] = asyncio.run(_seeded(port, prompts, engine))
        row["leaving"] = asyncio.run(_leaving(port, prompts, pid, leaving, engine.shape.length))
        log(f"{row['seeded_with_adapt']} {row['leaving']}")
    for name in ("first_ready_seconds", "ready_seconds"):  # The second start finds its programs compiled.
        with _serving(bench.checkpoint, "--queue=2000") as (port, _, row[name]):
            if name == "ready_seconds":
                row["seeded"] = asyncio.run(_seeded(port, prompts, engine))
        log(f"{name}: {row[name]:.1f}")
    return row | report.surroundings(bench)


@contextlib.contextmanager
def _serving(checkpoint: str, *arguments: str) -> Iterator[tuple[int, int, float]]:
    """launch.serve until the end of the context: its port, its process, and the seconds until it was ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "launch.serve", f"--checkpoint={checkpoint}", f"--port={port}", *arguments]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            asyncio.run(_ready(port))
            yield port, server.pid, time.perf_counter() - start
        finally:
            server.terminate()


def _quantiles(columns: dict[str, list[float]]) -> dict[str, float]:
    return {f"{name}_p{q}": float(np.percentile(x, q)) for name, x in columns.items() if x for q in (50, 99)}


async def _ask(port: int, path: str, body: Any = None, leave_after: float | None = None) -> tuple[float, bytes]:
    """Seconds to the first byte of the body and the whole of it; leaves earlier if asked to."""
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        data = b"" if body is None else json.dumps(body).encode()
        head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        async with asyncio.timeout(leave_after):
            await reader.readuntil(b"\r\n\r\n")
            first = await reader.read(1)
            seconds = time.perf_counter() - start
            return seconds, first + await reader.read()
    except TimeoutError:
        return 0.0, b""
    finally:
        writer.close()


async def _ready(port: int) -> None:
    while True:
        try:
            if b'"ready":true' in (await _ask(port, "/ready"))[1]:
                return
        except OSError:
            pass
        await asyncio.sleep(0.05)


async def _watched(port: int, bodies: Sequence[Any]) -> dict[str, list[float]]:
    """Streams all bodies together; seconds to the first token of each, and of /health meanwhile."""
    health: list[float] = []

    async def watch() -> None:
        while True:
            health.append((await _ask(port, "/health"))[0])
            await asyncio.sleep(0.05)

    watching = asyncio.create_task(watch())
    answers = await asyncio.gather(*(_ask(port, "/v1/completions", body) for body in bodies))
    watching.cancel()
    assert all(b"data: [DONE]" in text for _, text in answers), "a stream was cut off"
    return {"first_token_seconds": [seconds for seconds, _ in answers], "health_seconds": health}


async def _seeded(port: int, prompts: Sequence[Any], engine: Engine) -> dict[str, Any]:
    """How many seeded answers differ when they are asked for one at a time and all at once.

    Also the largest `gap` of those that differ. One of rounding size shows a tie of floats."""
    bodies = [
        {"prompt": prompt, "seed": i, "max_tokens": ANSWER, "logprobs": 0} | EXACT for i, prompt in enumerate(prompts)
    ]

    def tokens(answer: tuple[float, bytes]) -> list[str]:
        """Their texts, or bytes where they are no text. The token that ends an answer is not among them."""
        body = json.loads(answer[1][answer[1].index(b"{") : answer[1].rindex(b"}") + 1])
        return list(body["choices"][0]["logprobs"]["tokens"])

    together = [tokens(one) for one in await asyncio.gather(*(_ask(port, "/v1/completions", body) for body in bodies))]
    solo = [tokens(await _ask(port, "/v1/completions", body)) for body in bodies]
    gaps = [
        gap(engine, prompts[seed], seed, common(one, other))
        for seed, (one, other) in enumerate(zip(together, solo))
        if one != other
    ]
    return {"count": len(bodies), "different": len(gaps), "largest_gap": max(gaps, default=0.0)}


def gap(engine: Engine, prompt: Sequence[int], seed: int, place: int) -> float:
    """By how much token number `place` of a seeded answer was ahead of the next best one when it was sampled: in nats,
    logits plus Gumbel noise."""
    params = SamplingParams(1.0, max_tokens=ANSWER, seed=seed)
    tokens = engine.generate([Request(prompt, params)])[0][0].tokens
    place = min(place, len(tokens) - 1)  # Of an answer that ended where the other went on.
    ids = [*prompt, *tokens[:place]]
    logits_V = engine.forward(ids)[-1]
    uniform_V = np.asarray(noise(pack([(params, 0)]), jnp.array([len(ids) - 1]), len(logits_V)))[0]
    noisy_V = logits_V - np.log(-np.log(uniform_V))
    return float(noisy_V[tokens[place]] - np.delete(noisy_V, tokens[place]).max())


async def _leaving(port: int, prompts: Sequence[Any], pid: int, count: int, context: int) -> dict[str, Any]:
    """Requests with short and long prompts, streamed and not; the clients of a tenth leave, while they wait, while
    their prompt is read, or later. What the server holds before, afterwards, and after as many again."""
    chance, gate = random.Random(0), asyncio.Semaphore(2 * STREAMS)
    longest, left = (context - ANSWER) // 32, 0

    async def one(number: int) -> None:
        nonlocal left
        leave = chance.uniform(0, 0.5) if chance.random() < 0.1 else None
        prompt = prompts[number % len(prompts)] * chance.choice((1, longest))
        async with gate:
            body = {"prompt": prompt, "max_tokens": ANSWER, "stream": bool(number % 2)} | EXACT
            _, answer = await _ask(port, "/v1/completions", body, leave)
            left += not answer

    held = {"before": await _held(port, pid)}
    for name in ("after", "after_as_many_again"):
        await asyncio.gather(*map(one, range(count)))
        await asyncio.sleep(1)
        held[name] = await _held(port, pid)
    return {"requests": 2 * count, "left": left, **held}


async def _held(port: int, pid: int) -> dict[str, float]:
    """What a server holds: answers, tasks, threads and memory."""
    lines = (await _ask(port, "/metrics"))[1].decode().splitlines()
    names = ("jaxchat_waiting_answers", "jaxchat_running_answers", "jaxchat_tasks")
    held = {name: float(line.split()[1]) for line in lines for name in names if line.startswith(name + " ")}
    with open(f"/proc/{pid}/status") as file:
        facts = dict(line.split(":", 1) for line in file)
    return held | {"threads": int(facts["Threads"]), "memory_mb": int(facts["VmRSS"].split()[0]) // 1024}
