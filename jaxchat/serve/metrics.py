"""Numbers of the server for Prometheus."""

import asyncio
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from jaxchat.serve.models import Models

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """One registry for each server, so that two in one process have numbers of their own."""

    def __init__(self, models: Models) -> None:
        self.registry = CollectorRegistry()
        about: dict[str, Any] = {"registry": self.registry, "namespace": "jaxchat"}
        self.requests = Counter("requests", "HTTP requests answered.", ["path", "status"], **about)
        self.seconds = Histogram("request_seconds", "Seconds of HTTP requests.", ["path"], buckets=SECONDS, **about)
        self.first_token = Histogram("first_token_seconds", "Seconds to the first token.", buckets=SECONDS, **about)
        self.tokens = Counter("tokens", "Tokens of prompts, of them cached, and of answers.", ["kind"], **about)
        self.ended = 0
        self._reasons = Counter("answers", "Answers by finish reason.", ["reason"], **about)
        waiting = Gauge("waiting_answers", "Answers that wait for a slot.", **about)
        running = Gauge("running_answers", "Answers that have a slot.", **about)
        loaded = Gauge("loaded_models", "Models that are loaded.", **about)
        size = Gauge("loaded_bytes", "Bytes of the loaded models.", **about)
        tasks = Gauge("tasks", "Tasks of the event loop.", **about)
        tasks.set_function(lambda: len(asyncio.all_tasks()))
        workers = lambda: [model.worker for model in models.loaded.values()]  # noqa: E731
        waiting.set_function(lambda: sum(worker.waiting for worker in workers()))
        running.set_function(lambda: sum(worker.pending - worker.waiting for worker in workers()))
        loaded.set_function(lambda: len(models.loaded))
        size.set_function(lambda: models.bytes)

    def end(self, reason: str) -> None:
        """Counts an answer that has ended."""
        self.ended += 1
        self._reasons.labels(reason).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)
