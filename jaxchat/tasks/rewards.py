"""Reward functions: each maps (task, problem, text, finish reason) to a number."""

from collections.abc import Callable, Mapping

from jaxchat.tasks.task import Problem, Task

Reward = Callable[[Task, Problem, str, str], float]
SHORT = 500  # characters


def correct(task: Task, problem: Problem, text: str, finish_reason: str) -> float:
    """1 for a right answer in the format that the task requires."""
    return float(task.score(problem, text).strict)


def lenient(task: Task, problem: Problem, text: str, finish_reason: str) -> float:
    """1 for a right answer in any format."""
    return float(task.score(problem, text).lenient)


def ending(task: Task, problem: Problem, text: str, finish_reason: str) -> float:
    """1 for an answer that ends with a stop token instead of being cut off."""
    return float(finish_reason == "stop")


def brevity(task: Task, problem: Problem, text: str, finish_reason: str) -> float:
    """1 for an answer of fewer than 500 characters, right or wrong."""
    return float(len(text) < SHORT)


REWARDS: Mapping[str, Reward] = {"correct": correct, "lenient": lenient, "ending": ending, "brevity": brevity}
