"""lm-evaluation-harness on a checkpoint says what its own adapter for transformers says of the exported model."""

import gzip
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
from exports import VOCAB, model, tokenizer, write_run

import launch.convert
import launch.harness
from jaxchat.errors import UserError
from jaxchat.evaluation import harness
from jaxchat.tokenizer import chat

SHARED = Path(os.environ.get("JAXCHAT_DATA", Path(__file__).parents[2] / "shared/data")) / "core/eval_data"
LENGTH = 96
# lm-eval and what it imports are not ours to keep free of warnings.
pytestmark = pytest.mark.filterwarnings("default")

# Every kind of request, by the kind of task that makes it.
TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{query}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "num_fewshot": 1,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "pairs": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "last_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": " {{continuation}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "whole_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{context}} {{continuation}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{continuation}}",
        "generation_kwargs": {"until": ["\n", "e"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def choice_rows() -> list[dict[str, Any]]:
    words = ["fox", "bear", "tree", "water", "bird", "song", "17", "나는", "old"]
    rng = np.random.default_rng(0)

    def said(count: int) -> str:
        return " ".join(rng.choice(words, count))

    return [
        {
            "query": said(rng.integers(3, 30)),
            "choices": [said(rng.integers(1, 4)) for _ in range(3)],
            "gold": int(i % 3),
        }
        for i in range(8)
    ]


def rows_here() -> dict[str, list[dict[str, Any]]]:
    choices = choice_rows()
    texts = [{"context": row["query"], "continuation": row["choices"][0]} for row in choices]
    texts.append({"context": "small birds sang 17 songs " * 12, "continuation": "near"})  # Longer than the context.
    return {"choices": choices, "pairs": choices, "last_word": texts, "whole_text": texts, "answer": texts}


def write_tasks(directory: Path, rows: dict[str, list[dict[str, Any]]]) -> Path:
    """A YAML file (JSON is YAML) and a data file for each task."""
    for name, settings in TASKS.items():
        data = directory / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        split = {"test_split": "train", "fewshot_split": "train"}
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": str(data)}, **split, **settings}
        (directory / f"{name}.yaml").write_text(json.dumps(task))
    return directory


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
    yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_run(tmp_path_factory.mktemp("run"), model(head_std=0.1), length=LENGTH, scale=0.4)


@pytest.fixture(scope="module")
def theirs(run: str, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Any]:
    """lm-eval's adapter on the exported model: beginning texts with <|bos|>, as its tokenizer says, and not."""
    pytest.importorskip("transformers")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    out = tmp_path_factory.mktemp("exported") / "out"
    launch.convert.main([f"--checkpoint={run}", "--to=huggingface", f"--out={out}"])
    settings: dict[str, Any] = {"device": "cpu", "batch_size": 4, "dtype": "float32"}
    return {
        begins: huggingface.HFLM(str(out), add_bos_token=None if begins else False, **settings)
        for begins in (True, False)
    }


def evaluate(lm: Any, directory: Path, names: list[str], **options: Any) -> Any:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(directory), include_defaults=False)
    return lm_eval.simple_evaluate(lm, tasks=names, task_manager=manager, bootstrap_iters=0, **options)


def assert_same(ours: Any, theirs: Any) -> int:
    """Every answer and metric of two evaluations, within 1e-3 relative; returns how many examples there were."""
    count = 0
    for name, samples in theirs["samples"].items():
        assert len(samples) == len(ours["samples"][name])
        for mine, other in zip(ours["samples"][name], samples, strict=True):
            assert mine["arguments"] == other["arguments"]
            for a, b in zip(mine["filtered_resps"], other["filtered_resps"], strict=True):
                if isinstance(b, tuple | list):
                    np.testing.assert_allclose(float(a[0]), float(b[0]), rtol=1e-3)
                    assert a[1] == b[1]
                elif isinstance(b, float):
                    np.testing.assert_allclose(a, b, rtol=1e-3)
                else:
                    assert a == b
            count += 1
        for metric, value in theirs["results"][name].items():
            if isinstance(value, float):
                np.testing.assert_allclose(ours["results"][name][metric], value, rtol=1e-3, err_msg=metric)
    return count


def compare(run: str, theirs: dict[bool, Any], directory: Path) -> int:
    ours = harness.load(run)
    scored = [name for name in TASKS if name != "whole_text"]
    count = assert_same(evaluate(ours, directory, scored), evaluate(theirs[True], directory, scored))
    # With <|bos|> before the text, their adapter would score that token too, after another <|bos|>.
    rolling = ["whole_text"]
    return count + assert_same(evaluate(ours, directory, rolling), evaluate(theirs[False], directory, rolling))


def test_five_kinds_of_task_score_as_with_lm_evals_own_adapter(
    run: str, theirs: dict[bool, Any], tmp_path: Path
) -> None:
    assert compare(run, theirs, write_tasks(tmp_path, rows_here())) == 43


def test_tasks_in_turns_score_as_with_lm_evals_own_adapter(run: str, theirs: dict[bool, Any], tmp_path: Path) -> None:
    directory, names = write_tasks(tmp_path, rows_here()), ["choices", "answer"]
    asked: dict[str, Any] = {"apply_chat_template": True, "fewshot_as_multiturn": True}
    ours, others = (evaluate(lm, directory, names, **asked) for lm in (harness.load(run), theirs[True]))
    assert assert_same(ours, others) == 17
    first = ours["samples"]["choices"][0]["arguments"]
    assert "<|bos|><|user_start|>Question:" in json.dumps(first, ensure_ascii=False)


@pytest.mark.slow
def test_two_hundred_items_of_each_of_five_real_tasks_score_as_with_lm_evals_own_adapter(
    run: str, theirs: dict[bool, Any], tmp_path: Path
) -> None:
    files = {
        "choices": "world_knowledge/arc_easy.jsonl",
        "pairs": "commonsense_reasoning/piqa.jsonl",
        "last_word": "language_understanding/lambada_openai.jsonl",
        "whole_text": "language_understanding/lambada_openai.jsonl",
        "answer": "language_understanding/lambada_openai.jsonl",
    }
    if not SHARED.is_dir():
        pytest.skip(f"no data in {SHARED}")
    rows = {}
    for name, file in files.items():
        with gzip.open(SHARED / f"{file}.gz", "rt", encoding="utf-8") as lines:
            some = (row for row in map(json.loads, lines) if len(max(row.get("choices", ""), key=len, default="")) < 80)
            rows[name] = list(itertools.islice(some, 200))
    assert compare(run, theirs, write_tasks(tmp_path, rows)) == 1000


def test_a_rendered_conversation_is_read_as_training_writes_it(run: str) -> None:
    pytest.importorskip("lm_eval")
    lm = harness.load(run)
    messages = [{"role": "user", "content": "fox?"}, {"role": "assistant", "content": " bear"}]
    words = tokenizer()
    whole = chat.render(messages, words).ids
    assert lm.tok_encode(lm.apply_chat_template(messages, add_generation_prompt=False)) == whole[:-1]
    asked = lm.apply_chat_template(messages[:1])
    assert lm.tok_encode(asked) == chat.render(messages[:1], words, complete=True).ids
    assert lm.tok_encode("a <|user_end|>") == [words.bos, *words.encode("a <|user_end|>")]
    with pytest.raises(UserError, match="take turns"):
        lm.apply_chat_template([*messages, messages[1]])


def test_what_does_not_fit_is_cut_at_its_beginning_and_counted(run: str) -> None:
    pytest.importorskip("lm_eval")
    lm = harness.load(run)
    context = list(range(300, 300 + LENGTH + 3))
    (cut,) = lm._loglikelihood_tokens([(("", ""), context, [5, 6])])
    assert lm.truncated == 4
    (whole,) = lm._loglikelihood_tokens([(("", ""), context[4:], [5, 6])])
    assert cut == whole and lm.truncated == 4


@pytest.mark.parametrize(
    ("context", "continuation"),
    [
        ("wat", "er"),
        ("the bea", "r"),
        ("=", "="),
        ("the be", "ar tree"),
        ("a: wat", "er fox"),
        ("fox ", "bear"),
        ("", "fox"),
    ],
)
def test_a_continuation_that_a_token_of_the_whole_text_spans_is_scored_whole(
    context: str, continuation: str, run: str
) -> None:
    lm = harness.load(run)
    before, after = lm._encode_pair(context, continuation)
    words = tokenizer()
    assert words.decode(before[1:]) == context.rstrip()
    assert words.decode(after) == context[len(context.rstrip()) :] + continuation


@pytest.mark.parametrize("count", [1, 4, 5, 8, 9, 23])
def test_windows_score_every_token_once_after_all_that_fits(count: int) -> None:
    tokens, length = list(range(100, 100 + count)), 4
    items = harness.windows(tokens, 7, length)
    assert [token for item in items for token in item.continuation] == tokens
    assert items[0].context == [7]
    text = [7, *tokens]
    for item in items[1:]:
        start = text.index(item.continuation[0])
        assert item.context == text[start - len(item.context) : start]
        assert len(item.context) + len(item.continuation) == length + 1


def test_the_launcher_scores_a_family_that_transformers_lacks(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    checkpoint = write_run(tmp_path, small.july2026(vocab=VOCAB), length=LENGTH)
    tasks = write_tasks(tmp_path / "run", rows_here())
    names = ["choices", "last_word", "answer"]
    arguments = [f"--checkpoint={checkpoint}", f"--include_path={tasks}", f"--out={tmp_path}/out", "--limit=2"]
    found: Any = launch.harness.main([*arguments, "--tasks", *names])
    assert set(names) < set(found)
    assert 0 <= found["choices"]["acc"] <= 1
    samples = (tmp_path / "out/samples_last_word.jsonl").read_text().splitlines()
    assert len(samples) == 2 and json.loads((tmp_path / "out/results.json").read_text())["results"]


def test_bad_input_is_one_sentence(run: str, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    tasks = write_tasks(tmp_path, rows_here())

    def refusal(*arguments: str) -> str:
        with pytest.raises(UserError) as caught:
            launch.harness.main([f"--checkpoint={run}", f"--include_path={tasks}", *arguments])
        return str(caught.value)

    assert "unknown lm-eval task quiz" in refusal("--tasks", "quiz")
    assert "no checkpoint in" in refusal("--checkpoint=nowhere", "--tasks", "choices")
    assert "answers of 96 tokens but the context is 96" in refusal("--tasks", "answer", f"--max_tokens={LENGTH}")
