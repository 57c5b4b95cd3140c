"""The rollout stream: draws problems, samples answers, computes rewards, and makes training batches.

A rollout batch is sampled with given parameters and scored by the trainer's forward pass, so that the log-probabilities
of sampler and trainer can be compared. The order of the problems is determined by the seed, and the noise of an answer
by (seed, rollout batch, round, problem, sample), so a resumed run samples the same answers.
"""

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np

from jaxchat.data.cache import Log
from jaxchat.decode.engine import Engine
from jaxchat.decode.requests import Completion, Request, check_finite
from jaxchat.decode.sampling import LARGEST, SamplingParams
from jaxchat.decode.tools import named_tools
from jaxchat.errors import UserError, first_line
from jaxchat.evaluation.solve import scores_of
from jaxchat.objectives import advantages
from jaxchat.processes import share_out
from jaxchat.rl.answers import Columns, answer_of, lay_out, micro_batches
from jaxchat.rl.settings import RL
from jaxchat.tasks import load_task, problems_of
from jaxchat.tasks.rewards import REWARDS
from jaxchat.tasks.task import Problem, Task
from jaxchat.tokenizer import Tokenizer, chat


class Group(NamedTuple):
    """A problem's prompt, its answers, the reward of each (NaN if it failed), and the parts of the rewards by name."""

    prompt: list[int]
    answers: list[Completion]
    rewards_G: np.ndarray
    parts: dict[str, list[float]]


Drawn = tuple[Task, Problem, list[int], int]  # A problem with its prompt's token ids and its sampling seed.
TokenScorer = Callable[[Any, Columns], tuple[np.ndarray, np.ndarray]]
"""Computes log-probabilities and entropies, (R, T) each, of a micro-batch's targets, given parameters."""


class RolloutStream:
    """Makes the batch of each optimizer step; samples new answers after every `rl.updates` steps."""

    def __init__(
        self,
        rl: RL,
        engine: Engine,
        score: TokenScorer,
        *,
        seed: int,
        row_length: int,
        micro_rows: int,
        reference: Any = None,
        own_copy: Callable[[Any], Any] = lambda params: params,
        downloads: Path | None = None,
        log: Log = print,
    ) -> None:
        self._rl, self._engine, self._score, self._log = rl, engine, score, log
        self._seed, self._row_length, self._micro_rows = seed, row_length, micro_rows
        self._reference, self._own_copy = reference, own_copy
        self._set_bytes = -(-engine.transformer.config.vocab // 8) if rl.truncates else 0
        tasks = [load_task(spec, downloads) for spec in rl.tasks]
        self._problems = _usable_problems(rl, tasks, engine.tokenizer, row_length, log)
        self._order = grain.MapDataset.range(len(self._problems)).seed(seed).shuffle().repeat()
        self._answers: list[Columns] = []
        self._warned: set[tuple[str, ...]] = set()
        self._failure = ""
        self.cursor = 0
        """Number of problems drawn so far; part of a checkpoint."""
        self.facts: dict[str, float] = {}
        """Metrics of the latest rollout batch."""

    def batch(self, index: int, params: Any) -> tuple[Columns, int]:
        """Columns (micro-batches, rows, T) of optimizer step `index`, and the number of micro-batches not empty."""
        rl, update = self._rl, index % self._rl.updates
        if update == 0:
            self._draw(index // rl.updates, params)
        elif not self._answers:
            raise RuntimeError(f"cannot resume at step {index}: it is not the first update of a rollout batch")
        pass_, part = divmod(update, rl.minibatches)
        order = np.random.default_rng([self._seed, index // rl.updates, pass_]).permutation(len(self._answers))
        chosen = np.sort(order[part * rl.update_samples : (part + 1) * rl.update_samples])
        columns, _ = self._rows([self._answers[i] for i in chosen])
        return micro_batches(columns, micro_rows=self._micro_rows, most=rl.update_samples // self._micro_rows)

    def _draw(self, number: int, params: Any) -> None:
        """Samples, rewards and scores rollout batch `number`."""
        rl, start = self._rl, time.perf_counter()
        self._engine.load(self._own_copy(params))
        groups, equal, drawn = self._groups(number)
        self._engine.unload()
        sampled = time.perf_counter()
        rewards_PG = np.stack([group.rewards_G for group in groups])
        self._check(number, rewards_PG, drawn, [answer for group in groups for answer in group.answers])
        self._answers = [
            answer_of(group.prompt, completion, set_bytes=self._set_bytes)
            for group in groups
            for completion in group.answers
        ]
        advantages_PG = advantages.group_advantages(rewards_PG, rl.policy.advantage)  # 0 where NaN.
        lengths_N = np.array([np.count_nonzero(answer["trained"]) for answer in self._answers])
        lengths_N[np.isnan(rewards_PG).ravel()] = 0
        weights_N, norms_N = advantages.token_weights(lengths_N, rl.policy.aggregate, longest=rl.max_tokens)
        scored = self._score_all(params)
        values = np.stack([advantages_PG.ravel(), weights_N, norms_N], axis=1).astype(np.float32)
        for answer, (advantage, weight, norm) in zip(self._answers, values):
            answer["weights"], answer["norms"] = weight * answer["trained"], norm * answer["trained"]
            answer["advantages"] += advantage
        done = time.perf_counter()
        self.facts = {
            **_summary(groups),
            **scored,
            "groups": drawn,
            "equal_groups": equal,
            "sample_seconds": sampled - start,
            "score_seconds": done - sampled,
        }

    def _check(self, number: int, rewards_PG: np.ndarray, problems: int, answers: Sequence[Completion]) -> None:
        """Raises `UserError` if no answer has a reward; warns once if no problem has answers of different reward."""
        if np.isnan(rewards_PG).all():
            raise UserError(
                f"none of the {rewards_PG.size} answers of rollout batch {number} could be rewarded "
                f"({self._failure}): correct the task or choose other --rl.rewards, then restart to resume"
            )
        if self._rl.policy.advantage != "none" and advantages.equal_groups(rewards_PG).all():
            self._warn(
                ("alike",),
                f"warning: rollout batch {number}: for each of the {problems} problems sampled all answers have the "
                "same reward, so all group advantages are 0; metrics.jsonl counts such problems as equal_groups"
                f"{cut_short(answers, self._rl.max_tokens)}",
            )

    def _warn(self, key: tuple[str, ...], text: str) -> None:
        """Logs a warning once per key."""
        if key not in self._warned:
            self._warned.add(key)
            self._log(text)

    def _groups(self, number: int) -> tuple[list[Group], int, int]:
        """Returns the groups of a rollout batch, the number of groups of equal rewards, and the number of all drawn."""
        rl, rounds, equal, start = self._rl, self._rl.rounds, 0, self.cursor
        groups: list[Group] = []
        spare: list[Group] = []
        for round_ in range(1 + rounds):
            drawn = [
                self._problems[int(self._order[self.cursor + i])] + (_seed(self._seed, number, round_, i),)
                for i in range(rl.prompts)
            ]
            self.cursor += rl.prompts
            for group in share_out(drawn, self._answered):
                is_equal = bool(advantages.equal_groups(group.rewards_G[None])[0])
                equal += is_equal
                (spare if is_equal and rounds else groups).append(group)
            if len(groups) >= rl.prompts:
                break
        return (groups + spare)[: rl.prompts], equal, self.cursor - start

    def _answered(self, drawn: Sequence[Drawn]) -> list[Group]:
        """Samples answers to problems and computes their rewards."""
        rl = self._rl
        sampling = SamplingParams(rl.temperature, **rl.truncation, max_tokens=rl.max_tokens)
        options: dict[str, Any] = {"n": rl.samples, "return_support": rl.truncates}
        requests = [
            Request(prompt, replace(sampling, seed=seed), tools=named_tools(task.tools), **options)
            for task, _, prompt, seed in drawn
        ]
        generated = self._engine.generate(requests)
        for answers in generated:
            check_finite(answers)
        # A refused request has a single answer, which holds the error.
        answered = [answers if len(answers) == rl.samples else answers * rl.samples for answers in generated]
        scores = _judged(drawn, answered)
        return [
            self._reward(task, prompt, answers, [scores.get((i, j)) for j in range(len(answers))])
            for i, ((task, _, prompt, _), answers) in enumerate(zip(drawn, answered))
        ]

    def _reward(self, task: Task, prompt: list[int], answers: list[Completion], scores: Sequence[Any]) -> Group:
        rl = self._rl
        parts: dict[str, list[float]] = {name: [] for name in dict.fromkeys((*rl.rewards, "correct", "lenient"))}
        for answer, score in zip(answers, scores):
            for name, values in parts.items():
                values.append(self._reward_of(name, task, answer, score))
        rewards_G = np.zeros(len(answers))
        for name, weight in zip(rl.rewards, rl.reward_weights):
            rewards_G += weight * np.array(parts[name])
        if rl.overlong_cushion:
            lengths_G = np.array([len(answer.tokens) for answer in answers])
            penalty_G = advantages.soft_overlong(lengths_G, longest=rl.max_tokens, cushion=rl.overlong_cushion)
            rewards_G += penalty_G
            parts["overlong"] = penalty_G.tolist()
        return Group(prompt, answers, rewards_G, parts)

    def _reward_of(self, name: str, task: Task, answer: Completion, score: Any) -> float:
        """One reward of an answer with a score (or the exception of its judge); NaN with a warning if it fails or is
        too large for float32."""

        def given() -> Any:
            if isinstance(score, Exception):
                raise score
            return score

        try:
            if answer.error:
                raise ValueError(answer.error)
            value = float(REWARDS[name](given, answer.text, answer.finish_reason))
            most = LARGEST / max(1, *map(abs, self._rl.reward_weights))
            if not abs(value) <= most:
                raise ValueError(f"it returned {value}, which is not from -{most:g} to {most:g}")
        except Exception as error:  # Tasks are user code.
            failure = f"reward {name!r} of task {task.name} failed: {first_line(error)}"
            trained = name in self._rl.rewards
            self._failure = failure if trained else self._failure
            effect = "such answers are not trained on" if trained else "its mean in metrics.jsonl skips such answers"
            self._warn((name, task.name), f"warning: {failure}; {effect}")
            return math.nan
        return value

    def _score_all(self, params: Any) -> dict[str, float]:
        """Sets log-probabilities and KL advantages of all answers; returns entropy, KL and sampler-trainer gaps."""
        columns, places = self._rows(self._answers)
        logprobs_RT, entropy_RT = self._scored(params, columns)
        reference_RT = None if self._rl.kl is None else self._scored(self._reference, columns)[0]
        kl = 0.0
        for answer, place in zip(self._answers, places):
            answer["old_logprobs"] = logprobs_RT[place]
            if reference_RT is not None:
                to_go_T = advantages.kl_to_go(answer["old_logprobs"], reference_RT[place], answer["trained"])
                answer["advantages"] -= (self._rl.kl or 0.0) * to_go_T
                kl += float(to_go_T[0]) / len(self._answers)
        trained_RT = columns["trained"] > 0
        gap_N = (columns["sampled"] - logprobs_RT)[trained_RT].astype(np.float64)
        record = {"entropy": float(entropy_RT[trained_RT].mean()), "gap_kl": float(gap_N.mean())}
        record |= {"gap_max": float(np.abs(gap_N).max()), "gap_mean": float(np.abs(gap_N).mean())}
        record |= {"gap_p99": float(np.quantile(np.abs(gap_N), 0.99))}
        return record | ({} if reference_RT is None else {"kl": kl})

    def _rows(self, answers: Sequence[Columns]) -> tuple[Columns, list[tuple[int, slice]]]:
        share_rows = self._engine.transformer.config.isolate_documents
        return lay_out(answers, row_length=self._row_length, micro_rows=self._micro_rows, share_rows=share_rows)

    def _scored(self, params: Any, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
        size = self._micro_rows
        parts = [
            self._score(params, {name: column[i : i + size] for name, column in columns.items()})
            for i in range(0, len(columns["tokens"]), size)
        ]
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def _judged(drawn: Sequence[Drawn], answered: Sequence[Sequence[Completion]]) -> dict[tuple[int, int], Any]:
    """What the tasks return for each answer, or the exception they raise, by problem and sample, in one call per task;
    an answer with an error is not judged."""
    scores: dict[tuple[int, int], Any] = {}
    for task in {id(task): task for task, *_ in drawn}.values():
        own = [i for i, (other, *_) in enumerate(drawn) if other is task]
        places = [(i, j) for i in own for j, answer in enumerate(answered[i]) if answer.error is None]
        scores |= zip(places, scores_of(task, [(drawn[i][1], answered[i][j].text) for i, j in places]))
    return scores


def _usable_problems(
    rl: RL, tasks: Sequence[Task], tokenizer: Tokenizer, row_length: int, log: Log
) -> list[tuple[Task, Problem, list[int]]]:
    """Training problems with their prompts; those that leave less than `rl.max_tokens` of a row are left out."""
    usable, too_long = [], 0
    for task in tasks:
        for number, problem in enumerate(problems_of(task, "train")):
            try:
                prompt = chat.render(problem.messages, tokenizer, complete=True).ids
            except UserError as error:
                problem_of = f"problem {number} of the task {task.name} cannot be asked"
                raise UserError(f"{problem_of}: {error}; correct it, or leave it out of problems()") from None
            if len(prompt) + rl.max_tokens > row_length:
                too_long += 1
            else:
                usable.append((task, problem, prompt))
    if not usable:
        raise UserError(
            f"no problem of {', '.join(rl.tasks)} leaves room for rl.max_tokens={rl.max_tokens} in a row of "
            f"{row_length}: raise --data.row_length or lower --rl.max_tokens"
        )
    if too_long:
        log(f"skipped {too_long:,} problems that do not fit a row of {row_length} with rl.max_tokens={rl.max_tokens}")
    return usable


def _seed(*key: int) -> int:
    """Hashes integers to a seed of 63 bits, the same in every process."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8, person=b"rollouts").digest()
    return int.from_bytes(digest, "big") >> 1


def cut_short(answers: Sequence[Completion], most: int) -> str:
    """How many answers were cut at their limit of `most` tokens, to follow a warning; "" if at most half were."""
    cut = sum(answer.finish_reason == "length" for answer in answers)
    reason = f", and {cut} of {len(answers)} answers were cut after rl.max_tokens={most}: raise it"
    return reason if 2 * cut > len(answers) else ""


def _summary(groups: Sequence[Group]) -> dict[str, float]:
    """Means over the answers of a rollout batch; `reward_NAME` is a single reward before its weight is applied."""
    answers = [answer for group in groups for answer in group.answers]
    rewards = np.concatenate([group.rewards_G for group in groups])
    record = {"reward": float(np.nanmean(rewards))}
    for name in groups[0].parts:
        values = [value for group in groups for value in group.parts[name]]
        if not np.isnan(values).all():
            record[f"reward_{name}"] = float(np.nanmean(values))
    return record | {
        "reward_errors": int(np.isnan(rewards).sum()),
        "answer_tokens": float(np.mean([len(answer.tokens) for answer in answers])),
        "ended": float(np.mean([answer.finish_reason == "stop" for answer in answers])),
        "used_tools": float(np.mean([not all(answer.sampled) for answer in answers])),
        "answers": len(answers),
    }
