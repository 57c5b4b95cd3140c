"""launch.evaluate: batches as one by one, a stop that loses nothing, pairs compared, and what is refused."""

import importlib
import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import exports
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from core_rows import ROWS
from letters import Letters
from test_core import bundle

import launch.evaluate
from jaxchat.data import tinyworld
from jaxchat.data.cache import locked
from jaxchat.decode.engine import Engine, EngineConfig
from jaxchat.errors import UserError
from jaxchat.evaluation import asking, multiple_choice
from jaxchat.evaluation import evaluate as evaluation
from jaxchat.evaluation.compare import compare
from jaxchat.evaluation.core import CORE, CoreRows
from jaxchat.evaluation.evaluate import Settings, evaluate, parse_tasks
from jaxchat.evaluation.held_out import HeldOut
from jaxchat.evaluation.likelihoods import Scorer
from jaxchat.evaluation.questions import ask
from jaxchat.evaluation.records import Records, read_records
from jaxchat.loading import load_checkpoint
from jaxchat.model import Transformer
from jaxchat.sharding import Mesh, make_mesh
from jaxchat.tasks import code_of, load_task
from jaxchat.tokenizer import TokenizerConfig, train_tokenizer

LABELS = {"piqa": "multiple_choice", "winograd": "schema", "bigbench_operators": "language_modeling"}
MMLU = [
    {"question": f"What is {i}?", "subject": "small_numbers", "choices": ["a", "b", f"{i}", "d"], "answer": i % 4}
    for i in range(12)
]


@pytest.fixture(scope="module")
def engine() -> Engine:
    tokenizer = train_tokenizer(
        list(itertools.islice(tinyworld.documents("train"), 300)), vocab=400, config=TokenizerConfig()
    )
    config = small.october2025(vocab=400)
    params = jax.tree.map(jnp.asarray, small.parameters(config))
    return Engine(Transformer(config), params, tokenizer, EngineConfig(length=192, slots=4, steps=4))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    for task in CORE:
        if task.label in LABELS:
            bundle(directory, task, ROWS[LABELS[task.label]] * 2)
    for split in ("test", "dev"):
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in MMLU))
    return directory


def run(engine: Engine, data: Path, out: Path, specs: Any = ("core", "mmlu"), **settings: Any) -> dict[str, Any]:
    chosen = Settings(**{"style": "text", "max_tokens": 4} | settings)
    found = parse_tasks([f"{spec}:{data}" if spec in ("core", "mmlu") else spec for spec in specs], chosen, out)
    inputs = evaluation.read(found, engine.tokenizer, chosen.limit)
    return evaluate(engine, found, inputs, chosen, out, {}, log=lambda text: None)


def test_all_together_answer_as_one_by_one(engine: Engine, data: Path, tmp_path: Path) -> None:
    for style in ("text", "chat"):
        out = tmp_path / style
        run(engine, data, out, style=style)
        chosen, alone = Settings(style), Scorer(engine.transformer, engine.params, length=192, batch_tokens=1)  # type: ignore
        for job in parse_tasks([f"core:{data}", f"mmlu:{data}"], chosen, out):
            assert isinstance(job, evaluation.Asked)
            lines = (out / f"{job.name.replace('/', '-')}.jsonl").read_text().splitlines()[1:]
            records = {record["index"]: record for record in map(json.loads, lines)}
            for index, question in enumerate(job.questions(engine.tokenizer, None)):
                ((_, answer),) = ask(alone, [question])
                assert records[index]["scores"] == pytest.approx(answer.scores, abs=1e-4)
                ordered = sorted(answer.scores)
                if len(ordered) == 1 or ordered[-1] - ordered[-2] > 1e-4:
                    assert records[index]["right"] == answer.right


def test_a_stopped_evaluation_goes_on_and_asks_nothing_twice(
    engine: Engine, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(engine, data, tmp_path / "whole", ("core", "mmlu", "arithmetic"), limit=12)
    add, asked = Records.add, list[Any]()

    def stop(self: Records, index: int, record: Any) -> None:
        if len(asked) == 25:
            raise KeyboardInterrupt
        asked.append((self.about["task"], index))
        add(self, index, record)

    monkeypatch.setattr(Records, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        run(engine, data, tmp_path / "stopped", ("core", "mmlu", "arithmetic"), limit=12)
    with open(next((tmp_path / "stopped").glob("core-*.jsonl")), "a") as file:
        file.write('{"index": 3, "ri')  # as a kill leaves it

    def count(self: Records, index: int, record: Any) -> None:
        asked.append((self.about["task"], index))
        add(self, index, record)

    monkeypatch.setattr(Records, "add", count)
    assert run(engine, data, tmp_path / "stopped", ("core", "mmlu", "arithmetic"), limit=12) == whole
    assert len(set(asked)) == len(asked) == sum(result.get("count", 0) for result in whole.values())


def test_a_mesh_answers_as_one_device(engine: Engine, data: Path, tmp_path: Path) -> None:
    mesh = make_mesh(Mesh(data=2, tensor=2), rows=0, devices=jax.devices()[:4])
    shape = EngineConfig(length=192, slots=4, steps=4)
    params = small.parameters(engine.transformer.config)
    spread = Engine(engine.transformer, params, engine.tokenizer, shape, mesh=mesh)
    specs = ("core", "mmlu", "arithmetic")
    alone, over = (run(e, data, tmp_path / name, specs, limit=12) for name, e in (("1", engine), ("4", spread)))
    assert alone == over
    for label in LABELS:
        records = [read_records(tmp_path / name / f"core-{label}.jsonl")[1] for name in ("1", "4")]
        for index, record in records[0].items():
            np.testing.assert_allclose(record["scores"], records[1][index]["scores"], rtol=1e-5, atol=1e-5)


def test_a_mesh_that_does_not_divide_the_model_is_refused(tmp_path: Path) -> None:
    loaded = load_checkpoint(exports.write_run(tmp_path, exports.model()))
    mesh = make_mesh(Mesh(tensor=7), rows=0, devices=jax.devices()[:7])
    with pytest.raises(UserError, match=r"not a multiple of tensor=7: choose another --mesh\.tensor"):
        loaded.params(mesh)


def test_core_says_over_how_many_tasks_its_mean_is(engine: Engine, data: Path, tmp_path: Path) -> None:
    results = run(engine, data, tmp_path, ("core",))
    assert (results["core"]["tasks"], results["core"]["of"]) == (3, 22)
    centred = [results[f"core/{label}"]["centered_v1"] for label in LABELS]
    assert results["core"]["core"] == pytest.approx(sum(centred) / 3)
    assert results["core/bigbench_operators"]["truncated"] > 0, "ten examples do not fit 192 tokens"


def test_bits_per_byte_are_those_of_the_full_forward(engine: Engine, tmp_path: Path) -> None:
    texts = ["One morning Mia went out. " * 40, "Tom stayed."]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    result = run(engine, tmp_path, tmp_path / "out", (f"bpb:{path}",))["bpb"]
    nats = 0.0
    for text in texts:
        ids = [engine.tokenizer.bos, *engine.tokenizer.encode(text)]
        for i in range(0, len(ids) - 1, 192):
            part = ids[i : i + 193]
            logprobs = jax.nn.log_softmax(engine.forward(part[:-1]))
            nats -= float(sum(logprobs[t, token] for t, token in enumerate(part[1:])))
    assert result["bpb"] == pytest.approx(nats / math.log(2) / sum(map(len, texts)), rel=1e-4)


def test_there_is_no_likelihood_of_held_out_rows_without_a_target(engine: Engine) -> None:
    rows: Any = [np.zeros(4)]
    held_out = HeldOut(engine.transformer, make_mesh(Mesh(), rows=0), rows=rows, batch_rows=8)
    empty = [{"tokens": np.zeros((8, 1), np.int32), "targets": np.zeros((8, 1), np.int32)}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxchat.data.streams.every_row_once", lambda *_, **__: iter(empty))
        patch.setattr(held_out, "_score", lambda *_: (0.0, 0.0))
        with pytest.raises(UserError, match="the held-out rows have no text to score"):
            held_out({})


def test_bad_specs_and_other_evaluations_are_refused(engine: Engine, data: Path, tmp_path: Path) -> None:
    refused: dict[tuple[str, ...], str] = {
        ("cor:x",): "did you mean core",
        ("arithmetik",): "did you mean arithmetic",
        ("core/pika:x",): "CORE has no task",
        ("facts", "facts"): "named twice",
        (f"core:{tmp_path}",): "is this the CORE bundle",
    }
    for specs, said in refused.items():
        with pytest.raises(UserError, match=said):
            parse_tasks(specs, Settings("text"), tmp_path)
    run(engine, data, tmp_path, ("mmlu",), limit=2)
    with pytest.raises(UserError, match="another evaluation"):
        run(engine, data, tmp_path, ("mmlu",), limit=3)
    (other := tmp_path / "other").mkdir()
    (other / "dev.jsonl").write_text((data / "dev.jsonl").read_text())
    (other / "test.jsonl").write_text((data / "test.jsonl").read_text().replace("What is", "Which is"))
    with pytest.raises(UserError, match="another evaluation"):
        run(engine, other, tmp_path, ("mmlu",), limit=2)


def test_a_limit_of_questions_is_stratified_by_subject(engine: Engine, tmp_path: Path) -> None:
    subjects = [subject for subject in ("algebra", "law", "virology") for _ in range(40)]
    rows = [MMLU[0] | {"subject": subject, "question": f"{i}?"} for i, subject in enumerate(subjects)]
    for file in ("test", "dev"):
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (job,) = parse_tasks([f"mmlu:{tmp_path}"], Settings("text"), tmp_path)
    assert isinstance(job, evaluation.Asked)
    asked = [engine.tokenizer.decode(question.items[0].context) for question in job.questions(engine.tokenizer, 12)]
    assert [sum(f"about {subject}." in text for text in asked) for subject in dict.fromkeys(subjects)] == [4, 4, 4]


@pytest.mark.quick
def test_a_limit_of_documents_takes_some_of_every_file(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{name}{i}"}}\n' for i in range(50)))
    texts = evaluation._some_texts(f"{tmp_path}/*.jsonl", 10)
    assert sorted(text[0] for text in texts) == ["a"] * 5 + ["b"] * 5 and texts[0] != "a0"
    first = [tinyworld.document("val", i) for i in range(3)]
    assert list(evaluation._some_texts("tinyworld:val", 3)) == first, "generated in random order"


@pytest.mark.quick
def test_a_limit_of_core_samples_the_file_in_dclms_order(tmp_path: Path) -> None:
    task = next(task for task in CORE if task.label == "copa")
    rows = [{"query": "1" * (i + 1), "choices": ["a", "b"], "gold": 0, "category": "xy"[i // 50]} for i in range(100)]
    bundle(tmp_path, task, rows)
    drawn = CoreRows(task, tmp_path, "dclm").questions(Letters(), 10)
    numbers = [len(question.items[0].context) - 2 for question in drawn]
    assert numbers == sorted(numbers) and sum(number < 50 for number in numbers) == 5 and numbers != list(range(10))


BAD_ROWS = {
    '{"query": 5, "choices": ["a", "b"], "gold": 0}': "line 1: not a question with text choices",
    '{"question": "q", "choices": "abcd", "answer": 1}': "line 1: not a question with text choices",
    '{"question": "q", "choices": {"text": "ab", "label": "AB"}, "answerKey": "A"}': "line 1: not a question",
    '{"question": "q", "choices": ["a", "b"], "answer": true}': "line 1: not a question with text choices",
    '{"question": "q", "choices": ["a", "b"], "answer": 2}': "index 2 of 2 choices",
    "": "has no rows",
}


@pytest.mark.quick
@pytest.mark.parametrize("row", BAD_ROWS)
def test_a_row_that_is_no_question_is_named(row: str, tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text(row + "\n")
    with pytest.raises(UserError, match=BAD_ROWS[row]):
        multiple_choice.read("test", str(tmp_path), tmp_path)


def test_a_mistake_in_the_last_task_is_told_before_the_first_is_asked(
    engine: Engine, data: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "class Own:\n    name, tools, score = 'own', (), None\n    def problems(self, split): return 1 / 0\n"
    )
    for spec, said in {
        f"{own}:Own": "the task own failed to load its test problems: division by zero",
        f"gsm8k:{tmp_path}": "gsm8k:DIRECTORY must name their directory",
        f"bpb:{tmp_path}/none.txt": "^bpb:.*none.txt does not exist",
    }.items():
        with pytest.raises(UserError, match=said):
            run(engine, data, tmp_path / "out", ("mmlu", spec))
    assert not (tmp_path / "out").exists()


def test_two_evaluations_are_compared_question_by_question(engine: Engine, data: Path, tmp_path: Path) -> None:
    run(engine, data, tmp_path / "a", ("mmlu",))
    run(engine, data, tmp_path / "b", ("mmlu",))
    found = compare(tmp_path / "a", tmp_path / "b")["mmlu"]
    assert (found["difference"], found["p"], found["questions"]) == (0.0, 1.0, 12)
    path = tmp_path / "b" / "mmlu.jsonl"
    path.write_text(path.read_text().replace('"gold":1', '"gold":2'))
    with pytest.raises(UserError, match=r"the questions in .* differ"):
        compare(tmp_path / "a", tmp_path / "b")
    path.rename(path.with_name("other.jsonl"))
    with pytest.raises(UserError, match="no task in common"):
        compare(tmp_path / "a", tmp_path / "b")


OWN = """
from jaxchat.tasks import Problem, Score
class Own:
    name, tools, stop = "own", (), ("\\n",)
    def problems(self, split):
        return [Problem.ask(f"Say letter {i}" * (1 if i else 99), "a") for i in range(5)]
    def score(self, problem, text):
        return Score(*verdict())
"""


def judged(engine: Engine, tmp_path: Path, code: str) -> tuple[dict[str, Any], list[str]]:
    """The result of the task in `code`, evaluated with the records that are there, and what was logged."""
    (tmp_path / "own.py").write_text(code)
    chosen, said = Settings("chat", max_tokens=4), list[str]()
    found = parse_tasks([f"{tmp_path}/own.py:Own"], chosen, tmp_path)
    inputs = evaluation.read(found, engine.tokenizer, None)
    return evaluate(engine, found, inputs, chosen, tmp_path / "out", {}, log=said.append)["own"], said


def test_recorded_answers_are_judged_again_by_changed_code_and_where_they_could_not_be(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong, right = (f"{OWN}def verdict(): return ({value}, {value})\n" for value in (False, True))
    first, said = judged(engine, tmp_path, OWN)
    assert (first["accuracy"], first["errors"]) == (0, 5) and "5 of 5 answers to own could not be judged" in said[0]
    monkeypatch.setattr(engine, "generate", lambda requests: pytest.fail("asked again"))
    for code, accuracy in ((wrong, 0), (right, 0.8)):  # The first problem is longer than the context.
        result, said = judged(engine, tmp_path, code)
        assert (result["accuracy"], result["errors"], result["count"]) == (accuracy, 1, 5)
        assert said[0] == "own: the recorded answers to 4 problems are judged again, because the task's judge changed"
    assert len(judged(engine, tmp_path, right)[1]) == 1, "the result alone"
    fails = (tmp_path / "fails").write_text("")
    raising = f"import os\n{OWN}def verdict(): return (not os.remove({str(tmp_path / 'fails')!r}), True)\n"
    assert fails == 0 and judged(engine, tmp_path, raising)[0]["errors"] == 4, "one could be judged"
    for _ in range(2):
        (tmp_path / "fails").write_text("")
        result, said = judged(engine, tmp_path, raising)
    assert result["errors"] == 2 and "2 problems are judged again, because they could not be judged before" in said[0]
    assert "1 of 2 answers to own could not be judged" in said[1]
    with pytest.raises(UserError, match=r"another evaluation \(of other questions\)"):
        judged(engine, tmp_path, right.replace('"\\n",', '"?",'))


def test_the_code_of_a_task_includes_what_it_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own.py").write_text(f"{OWN}from own_help import verdict\n")
    hashes = []
    for value in (True, False, True):
        (tmp_path / "own_help.py").write_text(f"import numpy, json\ndef verdict(): return ({value}, False)\n")
        for name in [name for name in sys.modules if name == "own_help"]:
            del sys.modules[name]
        importlib.invalidate_caches()
        hashes.append(code_of(load_task(f"{tmp_path}/own.py:Own")))
    assert hashes[0] == hashes[2] != hashes[1] and all(hashes)
    assert code_of(load_task("facts")) == code_of(load_task("spelling")) != ""
    assert code_of(type("Nowhere", (), {"__module__": "nowhere"})()) == ""


def test_tests_that_were_corrected_judge_again(tmp_path: Path) -> None:
    row = dict.fromkeys(("task_id", "prompt", "canonical_solution", "entry_point"), "f")
    hashes = []
    for number, test in enumerate(("wrong", "right", "right")):
        (tmp_path / str(number)).mkdir()
        (tmp_path / f"{number}/HumanEval.jsonl").write_text(json.dumps(row | {"test": test}))
        hashes.append(code_of(load_task(f"humaneval:{tmp_path}/{number}")))
    assert hashes[0] != hashes[1] == hashes[2] != code_of(load_task("facts"))


def test_questions_without_examples_are_told(engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    other = [row | {"subject": "large_numbers"} for row in MMLU[:3]]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in MMLU + other))
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in MMLU))
    (job,) = parse_tasks([f"mmlu:{tmp_path}"], Settings("text"), tmp_path)
    job.questions(engine.tokenizer, None)
    assert "3 of 15 questions are asked without examples" in capsys.readouterr().err
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in MMLU))
    job.questions(engine.tokenizer, 12)
    assert capsys.readouterr().err == ""


def test_where_letters_are_no_tokens_the_texts_of_the_choices_are_scored_as_the_refusal_says(data: Path) -> None:
    class Pairs(Letters):
        def encode(self, text: str) -> list[int]:
            return [i for i in super().encode(text) for _ in range(2)]

    def questions(style: Any) -> Any:
        return evaluation.read(parse_tasks([f"mmlu:{data}"], Settings(style), data), Pairs(), None)["mmlu"]

    with pytest.raises(UserError, match="no single token for some answer letter: evaluate with --style=text"):
        questions("chat")
    assert len(questions("text")) == len(MMLU)


def test_what_an_evaluation_advises_about_style_and_place_can_be_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = exports.write_run(tmp_path, exports.model(), stage="pretrain")
    engine = SimpleNamespace(shape=SimpleNamespace(length=64))
    monkeypatch.setattr(asking, "load_engine", lambda *_, **__: engine)
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: {})
    monkeypatch.setattr(asking, "score_table", lambda *_: None)
    monkeypatch.setattr(asking.jax.config, "update", lambda *_: None)

    def asked(*more: str) -> str:
        launch.evaluate.main([f"--checkpoint={run}", "--tasks=arithmetic", f"--out={tmp_path}/out", *more])
        return capsys.readouterr().err

    assert "was not trained on conversations; use --style=text" in asked("--style=chat")
    assert "warning" not in asked("--style=text")
    with locked(tmp_path / "out", print):
        with pytest.raises(UserError, match=r"is writing an evaluation to .*: wait .*, or set another --out"):
            asked()
        asked(f"--out={tmp_path}/other")
    asked()
