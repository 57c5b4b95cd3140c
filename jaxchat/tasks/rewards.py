"""Reward functions: each maps (score, text, finish reason) of an answer to a number.

The score is a function without arguments; it raises what the task raised.
"""

from collections.abc import Callable, Mapping

from jaxchat.tasks.task import Score

Reward = Callable[[Callable[[], Score], str, str], float]
SHORT = 500  # characters


def correct(score: Callable[[], Score], text: str, finish_reason: str) -> float:
    """1 for a right answer in the format that the task requires."""
    return float(score().strict)


def lenient(score: Callable[[], Score], text: str, finish_reason: str) -> float:
    """1 for a right answer in any format."""
    return float(score().lenient)


def ending(score: Callable[[], Score], text: str, finish_reason: str) -> float:
    """1 for an answer that ends with a stop token instead of being cut off."""
    return float(finish_reason == "stop")


def brevity(score: Callable[[], Score], text: str, finish_reason: str) -> float:
    """1 for an answer of fewer than 500 characters, right or wrong."""
    return float(len(text) < SHORT)


REWARDS: Mapping[str, Reward] = {"correct": correct, "lenient": lenient, "ending": ending, "brevity": brevity}
