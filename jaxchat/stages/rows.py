"""Pretraining and SFT stages: batches of rows on disk, scored by bits per byte, loss and tasks."""

from collections.abc import Generator, Iterator
from typing import Any

import jax

from jaxchat import processes, sharding
from jaxchat.compilation import Setup
from jaxchat.data import prepare, streams
from jaxchat.data.cache import Log, write_json
from jaxchat.errors import UserError
from jaxchat.evaluation.held_out import HeldOut
from jaxchat.experiment import Experiment
from jaxchat.objectives.likelihood import Likelihood
from jaxchat.objectives.objective import Objective
from jaxchat.stages.scores import TaskScores, pretrained_text, rows_to_score
from jaxchat.tokenizer import Tokenizer
from jaxchat.train import State

MOST_PASSES = 16
"""Passes over the same text after which more teach little (Muennighoff et al. 2023, arXiv:2305.16264)."""


class FromText:
    """Pretraining on documents, scored by bits per byte of held-out ones; see `stages.stage.Stage` for the methods."""

    def __init__(self, e: Experiment, tokenizer: Tokenizer, tasks: TaskScores, log: Log) -> None:
        self._tokenizer, self._tasks, self._log = tokenizer, tasks, log
        self._rows = {
            split: prepare.ensure_rows(e.data, tokenizer, split, e.cache_directory, log, e.longer_rows)
            for split in ("train", "val")
        }
        self._row_hashes = [part.directory.name for part in self._rows["train"]]  # They identify the rows' content.
        processes.check_same("what --data.train names", self._row_hashes, "give every host the same documents")
        self.stream = streams.RowStream(
            self._rows["train"], e.data.weights, epochs=e.data.epochs, seed=e.seed, batch_rows=e.batch_rows
        )
        self.steps = e.steps or max(1, self.stream.rows_per_pass // e.batch_rows)
        if (passes := self.steps * e.batch_rows / self.stream.rows_per_pass) > MOST_PASSES:
            rows, fewer = self.stream.rows_per_pass, max(1, MOST_PASSES * self.stream.rows_per_pass // e.batch_rows)
            log(
                f"warning: --data.train makes {rows:,} rows, each trained on {passes:,.0f} times: add data, "
                f"or train for --steps={fewer}; repetition teaches little after some {MOST_PASSES} times"
            )
        self._batches: Iterator[Any] = iter(())

    @staticmethod
    def objective(e: Experiment) -> Objective:
        return Likelihood()

    def begin(self, setup: Setup, micro_rows: int, start: int, facts: dict[str, Any]) -> None:
        """Starts the batches at step `start`; raises `UserError` if the checkpoint was trained on other rows."""
        e = self._experiment = setup.experiment
        self.check_rows(e, facts)
        self._batches = device_batches(setup, self.stream, start, micro_rows)
        self._text, self._loss = self._held_out(setup, micro_rows)
        self._tasks.begin(setup.transformer, setup.mesh)

    def check_rows(self, e: Experiment, facts: dict[str, Any]) -> None:
        """Raises `UserError` if the checkpoint with these facts was trained on other rows."""
        if facts.get("rows", self._row_hashes) != self._row_hashes:
            raise UserError(
                f"the documents of --data.train are not those that {e.stage_directory} was trained on: "
                "restore those, or give this run its own --name"
            )

    def _held_out(self, setup: Setup, micro_rows: int) -> tuple[HeldOut | None, HeldOut | None]:
        """Evaluations on held-out data: bits per byte of text, and the loss on conversations; None for neither."""
        bytes_per_token = self._tokenizer.bytes_per_token
        return self._on_rows(setup, batch_rows=micro_rows, bytes_per_token=bytes_per_token), None

    def _on_rows(self, setup: Setup, **settings: Any) -> HeldOut:
        return HeldOut(setup.transformer, setup.mesh, rows=self._rows["val"], **settings)

    def batch_at(self, index: int, state: State) -> Any:
        return next(self._batches)

    def score(self, state: State, *, last: bool) -> dict[str, Any]:
        """Bits per byte of text, the loss on held-out conversations (SFT), and the task scores."""
        e, scores = self._experiment, dict[str, Any]()
        if self._text is not None:
            scores["val_rows"] = rows_to_score(e, self._text, last=last)
            scores["val_bpb"] = self._text(state.params, scores["val_rows"])
        if self._loss is not None:
            scores["val_loss_rows"] = rows_to_score(e, self._loss, last=last)
            scores["val_loss"] = self._loss(state.params, scores["val_loss_rows"])
        return scores | self._tasks(state.params)

    numbers = None

    def facts(self, number: int) -> dict[str, Any]:
        return {"tokens": number * self._experiment.batch_tokens, "rows": self._row_hashes}

    def total(self) -> dict[str, Any]:
        total = {"tokens": self._experiment.steps * self._experiment.batch_tokens}
        return total | ({} if self._text is None else {"val_rows_in_all": self._text.rows_in_all})

    def write_sources(self) -> None:
        """Writes the manifests of the training and held-out rows to the run directory."""
        directory = self._experiment.run_directory / "rows"
        prefix = f"{self._experiment.stage}-" if self._experiment.chats else ""
        for split, parts in self._rows.items():
            write_json(directory / f"{prefix}{split}.json", [part.manifest for part in parts])

    def close(self) -> None:
        if hasattr(self._batches, "close"):
            self._batches.close()


class FromConversations(FromText):
    """SFT on conversations, scored by the loss on held-out ones and by bits per byte of the pretraining text."""

    def _held_out(self, setup: Setup, micro_rows: int) -> tuple[HeldOut | None, HeldOut | None]:
        text = pretrained_text(setup, self._tokenizer, micro_rows, self._log)
        return text, self._on_rows(setup, batch_rows=micro_rows)


def device_batches(
    setup: Setup, stream: streams.RowStream, start: int, micro_rows: int
) -> Generator[dict[str, jax.Array], None, None]:
    """Yields batches on the devices, (micro-batches, rows, ...); a thread prefetches them."""
    e = setup.experiment
    micro, own = e.batch_rows // micro_rows, sharding.own_rows(setup.mesh, micro_rows)
    places = [first + row for first in range(0, e.batch_rows, micro_rows) for row in own]
    for _, batch in stream.prefetch(start, e.steps, places=places):
        cut = {name: column.reshape(micro, -1, *column.shape[1:]) for name, column in batch.items()}
        yield sharding.put_batch(setup.mesh, cut)
