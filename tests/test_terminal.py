"""What launch.chat is asked to do, before it loads anything."""

import pytest

import launch.chat
from jaxchat.errors import UserError

BEAMS = ["--prompt=a", "--beams=2"]


@pytest.mark.parametrize(
    ("said", "argv"),
    [
        ("--score needs a text", ["--score="]),
        ("leave out --prompt", ["--score=a", "--prompt=a"]),
        ("leave out --explain", ["--score=a", "--explain"]),
        ("--beams needs a --prompt", ["--beams=2"]),
        ("--num_samples needs a --prompt", ["--num_samples=2"]),
        ("--explain needs a --prompt", ["--explain"]),
        ("leave out --num_samples", [*BEAMS, "--num_samples=2"]),
        ("leave out --explain", [*BEAMS, "--explain"]),
        ("leave out --tools", [*BEAMS, "--tools=calculator"]),
        ("leave out --stop", [*BEAMS, "--stop=a"]),
        ("leave out --temperature", [*BEAMS, "--temperature=0"]),
        ("leave out --min_p", [*BEAMS, "--min_p=0.1"]),
        ("leave out --sampling", [*BEAMS, "--sampling=greedy"]),
        ("leave out --seed", [*BEAMS, "--seed=1"]),
        ("leave out --speculative", [*BEAMS, "--speculative"]),
        ("leave out --draft", [*BEAMS, "--draft=nowhere"]),
        ("leave out --top_k", ["--score=a", "--top_k=1"]),
        ("leave out --max_tokens", ["--score=a", "--max_tokens=1"]),
        ("leave out --style", ["--score=a", "--style=chat"]),
        ("equal answers", ["--prompt=a", "--num_samples=3", "--temperature=0"]),
        ("equal answers", ["--prompt=a", "--num_samples=2", "--sampling=greedy"]),
        ("equal answers", ["--prompt=a", "--num_samples=2", "--top_k=1"]),
    ],
)
def test_options_that_would_be_left_out_in_silence_are_refused(said: str, argv: list[str]) -> None:
    with pytest.raises(UserError, match=said):
        launch.chat.main(["--checkpoint=nowhere", *argv])


def test_options_that_go_together_are_not_refused() -> None:
    for argv in (
        [],
        ["--tools=calculator", "--stop=a"],
        ["--prompt=a", "--explain", "--num_samples=2"],
        BEAMS,
        [*BEAMS, "--max_tokens=9"],
    ):
        with pytest.raises(UserError, match="no checkpoint in nowhere"):
            launch.chat.main(["--checkpoint=nowhere", *argv])
