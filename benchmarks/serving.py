"""launch.serve under load, beside the engine alone in the same run; the server and its clients are two processes.

Speed: streams of one client and of many, which decode greedily to their length. Meanwhile /health is asked. Answers:
seeded requests together and alone. Leaving: many requests, a tenth of whose clients leave at random.
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
ANSWER = 32  # Tokens of a seeded answer.
EXACT = {"add_special_tokens": False}  # The prompt as it is.


def run(bench: options.Bench, arguments: list[str]) -> dict[str, Any]:
    """Tokens per second of server and engine with one and with many streams, and what else is to be shown."""
    if not bench.checkpoint or arguments:
        raise UserError("name a checkpoint alone: --checkpoint=runs/tiny/rl")
    engine = load_engine(bench.checkpoint, slots=STREAMS, adapt=True)
    length = engine.shape.length // 2
    generator = np.random.default_rng(0)
    prompts = generator.integers(10, engine.transformer.config.vocab, (SEEDED, 32)).tolist()
    params = SamplingParams(0.0, max_tokens=length, ignore_end=True)
    body = {"temperature": 0, "max_tokens": length, "ignore_eos": True, "stream": True}
    row: dict[str, Any] = {}
    with _serving(bench.checkpoint, f"--slots={STREAMS}", "--adapt", "--queue=2000", "--warm=False") as (port, pid, _):
        for count in (1, STREAMS):
            bodies = [body | EXACT | {"prompt": prompt} for prompt in prompts[:count]]
            requests = [Request(prompt, params) for prompt in prompts[:count]]
            sides: dict[str, Callable[[], Any]] = {
                "engine": partial(engine.generate, requests),
                "server": lambda bodies=bodies: asyncio.run(_watched(port, bodies)),  # type: ignore[misc]
            }
            for side in sides.values():
                side()
            seconds, found = timing.alternate(sides, bench.repeats, 0.2)
            speeds = {name: count * length / value for name, value in seconds.items()}
            row[f"streams_{count}"] = {"ratio": speeds["server"] / speeds["engine"], **speeds} | _quantiles(
                {name: [x for one in found["server"] for x in one[name]] for name in found["server"][0]}
            )
            log(f"{count} streams: {row[f'streams_{count}']}")
        row["seeded_with_adapt"] = asyncio.run(_seeded(port, prompts, engine))
        row["leaving"] = asyncio.run(_leaving(port, prompts, pid))
        log(f"{row['seeded_with_adapt']} {row['leaving']}")
    for name in ("first_ready_seconds", "ready_seconds"):  # The second start finds its programs compiled.
        with _serving(bench.checkpoint, "--queue=2000") as (port, _, row[name]):
            row["seeded"] = asyncio.run(_seeded(port, prompts, engine)) if name == "ready_seconds" else None
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

    Also the largest gap between the two tokens at which an answer first differs: of their logits plus the sampling
    noise. A gap of rounding size shows a tie."""
    bodies = [{"prompt": prompt, "seed": i, "max_tokens": ANSWER} | EXACT for i, prompt in enumerate(prompts)]

    def text(answer: tuple[float, bytes]) -> str:
        return json.loads(answer[1][answer[1].index(b"{") : answer[1].rindex(b"}") + 1])["choices"][0]["text"]

    together = [text(one) for one in await asyncio.gather(*(_ask(port, "/v1/completions", body) for body in bodies))]
    solo = [text(await _ask(port, "/v1/completions", body)) for body in bodies]
    gaps = [
        _gap(engine, prompts[seed], seed, one[: common(one, other)])
        for seed, (one, other) in enumerate(zip(together, solo))
        if one != other
    ]
    return {"count": len(bodies), "different": len(gaps), "largest_gap": max(gaps, default=0.0)}


def _gap(engine: Engine, prompt: Sequence[int], seed: int, same: str) -> float:
    """By how much the best token was ahead of the second at the first one that is not within the text `same`."""
    params = SamplingParams(1.0, max_tokens=ANSWER, seed=seed)
    tokens = engine.generate([Request(prompt, params)])[0][0].tokens
    texts = [engine.tokenizer.decode_bytes(tokens[: n + 1]) for n in range(len(tokens))]
    count = next((n for n, text in enumerate(texts) if not same.encode().startswith(text)), 0)
    ids = [*prompt, *tokens[:count]]
    logits_V = engine.forward(ids)[-1]
    uniform_V = np.asarray(noise(pack([(params, 0)]), jnp.array([len(ids) - 1]), len(logits_V)))[0]
    second, first = np.sort(logits_V - np.log(-np.log(uniform_V)))[-2:]
    return float(first - second)


async def _leaving(port: int, prompts: Sequence[Any], pid: int) -> dict[str, Any]:
    """Many requests, streamed and not, a tenth of which are left; what the server still holds afterwards."""
    chance, gate = random.Random(0), asyncio.Semaphore(2 * STREAMS)

    async def one(number: int) -> None:
        leave = chance.uniform(0, 0.5) if chance.random() < 0.1 else None
        body = {"prompt": prompts[number % len(prompts)], "max_tokens": 32, "stream": bool(number % 2)}
        async with gate:
            await _ask(port, "/v1/completions", body, leave)

    before = await _held(port, pid)
    await asyncio.gather(*map(one, range(LEAVING)))
    await asyncio.sleep(1)
    middle = await _held(port, pid)
    await asyncio.gather(*map(one, range(LEAVING)))
    await asyncio.sleep(1)
    return {"requests": LEAVING, "before": before, "after": middle, "after_as_many_again": await _held(port, pid)}


async def _held(port: int, pid: int) -> dict[str, float]:
    """What a server holds: answers, tasks, threads and memory."""
    lines = (await _ask(port, "/metrics"))[1].decode().splitlines()
    names = ("jaxchat_waiting_answers", "jaxchat_running_answers", "jaxchat_tasks")
    held = {name: float(line.split()[1]) for line in lines for name in names if line.startswith(name + " ")}
    with open(f"/proc/{pid}/status") as file:
        facts = dict(line.split(":", 1) for line in file)
    return held | {"threads": int(facts["Threads"]), "memory_mb": int(facts["VmRSS"].split()[0]) // 1024}
