"""Rows for each kind of CORE task, made up, with spaces and lines where real ones have them."""

from typing import Any

bos = 0

ROWS: dict[str, list[dict[str, Any]]] = {
    "multiple_choice": [
        {
            "query": f"Question: What is {i} plus {i}?{' ' * (i % 3)}",
            "choices": [f"{i + 1}", f"{2 * i}", f"{2 * i}5"],
            "gold": i % 3,
        }
        for i in range(2, 11)
    ],
    "schema": [
        {
            "context_options": [f"The cat number {i} saw the dog because the {who}" for who in ("cat", "dog")],
            "continuation": f"was {'very ' * (i % 3)}loud.",
            "gold": i % 2,
        }
        for i in range(7)
    ],
    "language_modeling": [
        {"context": f"{' ' * (i % 2)}Line {i}\nThe word after {i} is{' ' * (i % 3)}", "continuation": f"wörd{i} \u4e00"}
        for i in range(8)
    ],
}

TASKS = {
    "choices": ("multiple_choice", 0, " "),
    "choices after three": ("multiple_choice", 3, "\nAnswer: "),
    "contexts": ("schema", 0, " "),
    "contexts after two": ("schema", 2, " "),
    "an end": ("language_modeling", 0, " "),
    "an end after five": ("language_modeling", 5, "\nAnswer: "),
}
