"""What an answer may be rewarded for. Each takes (task, problem, text, finish reason) and gives a number."""

from collections.abc import Callable, Mapping

from jaxchat.tasks.task import Problem, Task

Reward = Callable[[Task, Problem, str, str], float]
SHORT = 500  # characters


def correct(task: Task, problem: Problem, text: str, finish_reason: str) -> float:
    """1 for a right answer in the form that the task asks for."""
    return float(task.score(problem, text).strict)


def lenient(task: Task, problem: Problem, text: str, finish_reason: str) -> float:
    """1 for a right answer in any form."""
    return float(task.score(problem, text).lenient)


def ending(task: Task, problem: Problem, text: str, finish_reason: str) -> float:
    """1 for an answer that ends by itself, and does not run into the length limit."""
    return float(finish_reason == "stop")


def brevity(task: Task, problem: Problem, text: str, finish_reason: str) -> float:
    """1 for an answer below 500 characters, right or wrong."""
    return float(len(text) < SHORT)


REWARDS: Mapping[str, Reward] = {"correct": correct, "lenient": lenient, "ending": ending, "brevity": brevity}
