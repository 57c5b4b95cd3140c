"""What a message advises can be done: every remedy is followed, as far as the check that refused and to the next work.

A row has a launcher's arguments, what the refusal says, and the change that this advises. The flags and values of the
change must stand in the message. Every message of the code that names a flag has a row, or its test in ELSEWHERE.
"""

import ast
import importlib
import os
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import jax
import pytest
from commands import flags
from documents import corpus, texts, write_rows
from exports import model, write_run
from remedies import LAUNCHERS, SETTINGS, TINY
from runs import last_of_each
from small import july2026

from jaxchat import checkpoint, command_line, launcher, processes, stages, terminal
from jaxchat.data.cache import locked
from jaxchat.errors import UserError
from jaxchat.evaluation import asking
from jaxchat.export import huggingface, stablehlo
from jaxchat.planning import ahead
from jaxchat.stages import running

ROOT = Path(__file__).parent.parent


class PassedError(Exception):
    """The check that refused has been passed."""


def passed(*args: Any, **settings: Any) -> Any:
    raise PassedError


@pytest.fixture
def places(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, request: Any) -> dict[str, str]:
    """Files and runs that the rows name, in a place where what takes long is replaced by `passed`."""
    place = corpus(tmp_path_factory.mktemp("remedies"))
    (place / "latin.txt").write_text(" caf\u00e9 ".join(texts(200)), encoding="latin-1", errors="replace")
    for name in ("wide.txt", "wider.txt"):
        (place / name).write_text(f"{name} ".join(texts(200)), encoding="utf-16-le")
    write_rows(place / "body.jsonl", [{"body": text} for text in texts(200)])
    (place / "nul.txt").write_text("some words and a \0 among them " * 100)
    write_rows(place / "empty.jsonl", [{"text": "", "body": text} for text in texts(200)])
    write_rows(place / "list.jsonl", [{"text": ["a"], "body": text} for text in texts(200)])
    write_rows(place / "both.jsonl", [{"text": text, "body": text} for text in texts(9, seed=1)])
    (place / "eval_data/world_knowledge").mkdir(parents=True)
    rows = [{"query": f"{i} + 1?", "choices": ["1", "2"], "gold": 0} for i in range(20)]
    write_rows(place / "eval_data/world_knowledge/arc_easy.jsonl", rows)
    (place / "gsm8k").mkdir()
    for side in ("train", "test"):
        write_rows(place / f"gsm8k/{side}.jsonl", [{"question": "1 + 1?", "answer": "#### 2"}])
    run, july = write_run(place / "a", model()), write_run(place / "b", july2026(vocab=420), stage="pretrain")
    small = [word for word in flags(place) if not word.startswith("--prompts")]
    (place / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(place)
    later = place / "runs/later/pretrain"
    checkpoint.write_experiment(later, command_line.load([*small, "--name=later"]))
    (later / "checkpoints/2").mkdir(parents=True)
    jax.devices()
    (Path(run) / "metrics.jsonl").write_text('{"step":1,"loss":1.0}\n')
    bench = {name: importlib.import_module(f"benchmarks.{name}") for name in ("training", "decoding", "accelerator")}
    for module, names in {
        bench["training"]: ("run",),
        bench["decoding"]: ("run",),
        bench["accelerator"]: ("measure_sections",),
        importlib.import_module("benchmarks.evaluation"): ("load_checkpoint",),
        importlib.import_module("benchmarks.serving"): ("load_engine",),
        running: ("compile_step",),
        terminal: ("load_engine",),
        asking: ("load_engine",),
        huggingface: ("write", "open_source"),
        stablehlo: ("write",),
        ahead: ("fits",),
    }.items():
        for name in names:
            monkeypatch.setattr(module, name, passed)
    processors = os.sched_getaffinity(0)  # A benchmark takes some only.
    request.addfinalizer(lambda: os.sched_setaffinity(0, processors))
    rl = f"{TINY}:rl --start_from={run} --directory={place}/runs --steps=1 --mesh.data=1 --micro_rows=8"
    files = {"place": str(place), "text": f"{place}/train.jsonl", "gsm8k": f"{place}/gsm8k"}
    return files | {"small": shlex.join(small), "rl": rl, "run": run, "july": july}


def changed(words: list[str], change: str) -> list[str]:
    """The words with `no WORD` left out, and others put in the place of the same flag, or at the end."""
    if change.startswith("python -m launch."):
        return shlex.split(change.removeprefix("python -m launch."))
    for part in change.split(", "):
        if part.startswith("no "):
            (gone,) = shlex.split(part[3:])
            words = [word for word in words if word.partition("=")[0] != gone and word != gone]
        else:
            first, *rest = shlex.split(part)
            name = first.partition("=")[0]
            at = [i for i, word in enumerate(words) if word.partition("=")[0] == name and name.startswith("--")]
            words = [*words[: at[-1]], first, *words[at[-1] + 1 :]] if at else [*words, first, *rest]
    return words


def refusal(act: Any, words: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        act(words)
    return str(caught.value)


def unsaid(change: str, message: str) -> list[str]:
    """The flags of a change of which the message has neither the name nor the value."""
    flags = re.findall(r"--([\w.]+)=?([\w.-]*)", change)
    return [
        name
        for name, value in flags
        if name not in ("checkpoint", "config", "start_from", "variants")
        and name.rpartition(".")[2] not in message
        and not (value and value in message)
    ]


def load(words: list[str]) -> None:
    stage = words[0] if words and words[0].endswith(":") else ""
    command_line.load([TINY + ":" * bool(stage) + stage[:-1], *words[bool(stage) :]])


def launched(words: list[str]) -> None:
    try:
        with pytest.MonkeyPatch.context() as patch:
            if words[0] in ("speedrun", "compare"):
                patch.setattr(stages, "run", passed)
            importlib.import_module(f"launch.{words[0]}").main(words[1:])
    except (PassedError, SystemExit) as end:
        assert isinstance(end, PassedError) or not end.code
    finally:
        jax.config.update("jax_compilation_cache_dir", CACHE)


CACHE = jax.config.jax_compilation_cache_dir
SEEN: set[str] = set()


@pytest.mark.parametrize("given, said, change", SETTINGS)
def test_settings_are_corrected_as_the_message_says(given: str, said: str, change: str) -> None:
    words = shlex.split(given)
    message = refusal(load, words)
    SEEN.add(message)
    assert said in message and not unsaid(change, message)
    load(changed(words, change))


def test_commands_are_corrected_as_the_message_says(places: dict[str, str]) -> None:
    wrong = []
    with locked(Path(places["place"]) / "runs/locked/pretrain", print):
        for given, said, change in LAUNCHERS:
            words = last_of_each(shlex.split(given.format(**places)))
            try:
                message = refusal(launched, words)
                SEEN.add(message)
                assert said.format(**places) in message, message
                assert unsaid(change, message) in ([], ["batch_tokens"]), message
                launched(changed(words, change.format(**places)))
            except BaseException as error:
                wrong.append(f"{given}: {type(error).__name__} {error}"[:600])
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.parametrize(
    "given, said, change",
    [
        ({processes.COUNT: "2"}, "set all three or none", {processes.COUNT: None}),
        ({processes.COUNT: "2"}, "set all three or none", {processes.ADDRESS: "a:1", processes.INDEX: "0"}),
        (dict.fromkeys((processes.ADDRESS, processes.COUNT, processes.INDEX), "2"), "number the processes from 0",
         {processes.INDEX: "1", processes.ADDRESS: "a:1"}),
        ({processes.ADDRESS: "a", processes.COUNT: "2", processes.INDEX: "0"}, "write it as HOST:PORT",
         {processes.ADDRESS: "a:1"}),
    ],
)  # fmt: skip
def test_environments_are_corrected_as_the_message_says(given: Any, said: str, change: Any) -> None:
    assert said in refusal(processes.grouped, given)
    processes.grouped({name: value for name, value in (given | change).items() if value is not None})


@pytest.mark.parametrize("advice", ["unset it", "set JAX_PLATFORMS=cpu"])
def test_a_backend_that_does_not_start_is_replaced_as_the_message_says(advice: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    problem = launcher.sentence(RuntimeError("Unable to initialize backend 'cuda': none (you may need another)"))
    assert problem is not None and advice in problem and "you may" not in problem
    name, _, value = advice.removeprefix("set ").partition("=")
    monkeypatch.delenv("JAX_PLATFORMS") if name == "unset it" else monkeypatch.setenv(name, value)
    assert launcher.sentence(RuntimeError("Unable to initialize backend 'cuda'")) is None or value == "cpu"
    assert jax.devices()


SOURCES = sorted(path for top in ("jaxchat", "launch", "benchmarks") for path in (ROOT / top).rglob("*.py"))

# The test that follows the remedy of each message with a flag that no row has.
ELSEWHERE = {
    "test_inspect_steps.py::test_launch_inspect_refuses_what_it_cannot_do": (
        "name what to look at: --checkpoint with --text or --prompt, or --run with --step",
        "--step={} must be at least 1: name a step of metrics.jsonl",
        "give --text, a text to look into, or --prompt, to look into the model",
        "--step is a step of --run: to look at a text with a checkpoint, set --checkpoint={}",
        "for a text of your own, give --checkpoint instead",
    ),
    "test_inspect_steps.py::test_what_cannot_be_looked_at_is_refused_in_a_sentence": (
        "step {} is {} steps from {}: allow it with --replay={}",
    ),
    "test_serve_launch.py::test_what_a_refusal_advises_starts_the_server": (
        "--host={} lets other machines use this server: set --api_key, or --allow_anyone=True",
        "{} port {} cannot be served ({}): set --host and --port",
        "port {} is in use: choose another with --port, or 0 for any free one",
        "but the limit is {}: set --model_bytes={} or more",
    ),
    "test_serve_faults.py::test_a_full_queue_and_a_rate_answer_429": ("answers are asked for, but this server takes",),
    "test_serve_faults.py::test_without_the_key_only_health_answers": ("may not open a WebSocket",),
    "test_prepare.py::test_a_run_without_documents_names_the_option": ("no documents to train on: set --data.train",),
    "test_advice.py::test_shares_for_other_data_name_both_remedies": (
        "{}: give one for each, or --data.{} without a value",
    ),
    "test_advice.py::test_what_cannot_be_divided_is_said": (
        "{}: {}; set --data.val",
        "there is no text to train a tokenizer on",
    ),
    "test_advice.py::test_one_document_beside_others_cannot_be_divided": (
        "no share leaves every entry of --data.train something and holds out somethi",
    ),
    "test_advice.py::test_rows_that_are_trained_on_many_times_are_said": (
        "warning: --data.train makes {} rows, each trained on {} times: add data, or",
    ),
    "test_starting.py::test_a_stage_that_has_started_knows_its_start_whatever_becomes_of_that": (
        "{}: remove {} to start again, or give this run its own --name",
    ),
    "test_tokenizer.py::test_the_vocabulary_that_a_refusal_names_works": ("--data.vocab={}, or more text",),
    "test_advice.py::test_preparation_makes_what_the_stage_uses": (
        "stage {} samples its data, so it has no rows: leave :{} out of --config",
        "stage {} takes the tokenizer of {}: leave :{} out of --config",
    ),
    "test_plan.py::test_what_does_not_fit_is_refused_with_the_smallest_change_that_does": (
        "--micro_rows={} --model.remat={}",
        "set {}--mesh.fsdp={} {}",
        "set --depth={} {}, or use more chips",
        "no depth fits; use more chips or a smaller --data.row_length",
    ),
    "test_compilation.py::test_running_out_of_memory_names_the_next_smaller_setting": ("{}: set --micro_rows={}",),
    "test_compilation.py::test_when_nothing_fits_the_next_setting_is_named": (
        "{}: set --model.remat=full",
        "{} and remat=full: use more devices with --mesh.fsdp",
    ),
    "test_compilation.py::test_a_state_that_does_not_fit_is_refused_before_anything_is_compiled": (
        "{}: split it over several with --mesh.fsdp, or take a smaller --depth",
    ),
    "test_kernels.py::test_packed_documents_are_handed_to_cudnn_as_it_counts_them": ("{}: set --attention=xla",),
    "test_kernels.py::test_kv_heads_that_a_mesh_does_not_divide_are_refused": (
        "{} kv heads cannot be split like the heads: set a smaller --mesh.tensor",
    ),
    "test_starting.py::test_without_warm_moments_a_stage_starts_from_another_optimizer_as_the_refusal_says": (
        "leave out --warm_optimizer",
    ),
    "test_compilation.py::test_products_in_float8_that_gain_nothing_are_told_of": ("has no float8 units",),
    "test_rollouts.py::test_a_problem_that_leaves_no_room_for_an_answer_is_left_out": (
        "leaves room for rl.max_tokens",
    ),
    "test_rollouts.py::test_a_batch_without_any_reward_is_refused_with_the_reason": ("could be rewarded",),
    "test_compilation.py::test_a_mesh_that_leaves_out_devices_of_a_group_is_refused_with_a_remedy_that_works": (
        "the mesh uses {}, but every device must take part: leave out --mesh.data",
    ),
    "test_processes.py::test_hosts_with_other_documents_are_told_to_use_the_same": ("what --data.train names",),
    "test_shards.py::test_a_worker_that_ends_or_hangs_is_one_sentence": (
        "start again, with fewer --data.workers if memory is short: finished shards are kept",
    ),
    "test_command_line.py::test_documents_that_changed_under_a_run_do_not_fit_its_tokenizer": (
        "were trained with another tokenizer",
    ),
    "test_command_line.py::test_documents_that_changed_under_a_run_are_not_what_it_was_trained_on": (
        "are not those that {} was trained on",
    ),
    "test_compare.py::test_equal_time_gives_the_faster_variant_more_steps": ("--equal=time needs the speed of {}",),
    "test_compare.py::test_a_measure_that_the_stage_does_not_have_is_refused": (
        "is not a number of this stage's result",
    ),
    "test_records.py::test_a_step_that_was_trained_again_is_another_evaluation": ("belongs to another evaluation",),
    "test_evaluate.py::test_what_an_evaluation_advises_about_style_and_place_can_be_done": (
        "another process is writing an evaluation",
        "was not trained on conversations",
    ),
    "test_evaluate.py::test_where_letters_are_no_tokens_the_texts_of_the_choices_are_scored_as_the_refusal_says": (
        "has no single token for some answer letter",
    ),
    "test_evaluate.py::test_there_is_no_likelihood_of_held_out_rows_without_a_target": (
        "the held-out rows have no text",
    ),
    "test_stability.py::test_a_loss_that_rises_and_stays_is_reported_once_with_step_and_rates": (
        "probably too high: lower --optimizer.scale",
    ),
    "test_stability.py::test_a_clip_limits_the_effect_of_such_a_batch": ("--optimizer.clip limits its effect",),
    "test_train.py::test_ten_steps_in_a_row_that_are_not_finite_end_the_run": ("steps in a row up to step",),
    "test_stages.py::test_a_run_that_ends_without_a_number_says_so": ("the run ended at step",),
    "test_report.py::test_the_report_says_what_was_forgotten_and_why": ("More than 5 percent were lost",),
    "test_stages.py::test_parameters_that_are_not_finite_are_never_trained": ("correct the fields of --model",),
    "test_report.py::test_without_tasks_the_report_says_how_to_ask_some": ("No problems were solved",),
    "test_prepare.py::test_a_comparison_of_some_shards_says_so": (", compared with one of {} shards of --data.train",),
    "test_prepare.py::test_held_out_texts_that_are_trained_on_are_counted": (
        "losses on them say little; remove them from --data.train or --data.val",
    ),
    "test_hub.py::test_a_data_set_of_one_file_can_be_trained_on_and_is_not_to_validate_on": (
        "has no parquet file to validate on",
    ),
    "test_sources.py::test_a_directory_without_documents_is_refused": ("only validation and test files in",),
    "test_tokenizer_training.py::test_the_launcher_trains_once_and_reports": ("bytes per token (below",),
    "test_export.py::test_an_import_succeeds_once_its_place_or_tokenizer_is_set_as_the_message_says": (
        "{} contains another tokenizer: set --out to a new run",
        "{} already exists: set --out to a new or empty directory",
        "ids: name the tokenizer of its training with --tokenizer=DIR",
        "a jaxchat tokenizer by --tokenizer=DIR",
        "tokenizer.model is not a sentencepiece model",
    ),
    "test_nanochat.py::test_missing_files_are_one_sentence_each": (
        "copy it again from the model's project, or name another tokenizer with --tokenizer=DIR",
        "no {} in {}: name its directory with --tokenizer=DIR",
        "no model_STEP.pt in {}: --checkpoint must name one of nanochat, such as {}",
    ),
    "test_config.py::test_rows_longer_than_the_learned_positions_are_refused": (
        "{}: set --data.row_length={}, or more positions",
    ),
    "test_export.py::test_bad_input_is_one_sentence": ("--dtype is the type of weights",),
    "test_imported_chat.py::test_without_a_template_the_model_continues_texts_and_refuses_conversations": (
        "this model has no chat template",
    ),
    "test_export.py::test_a_tokenizer_that_cannot_be_the_same_elsewhere_is_refused": ("this is a Unigram tokenizer",),
    "test_harness.py::test_bad_input_is_one_sentence": ("unknown lm-eval task", "a task requests answers of"),
    "test_benchmarks.py::test_another_architecture_is_refused_and_a_missing_peer_named": (
        "the peer knows the October 2025 family",
        "--peer=transformers: {}",
    ),
}
# Texts with a flag that are no message about a mistake.
NO_MISTAKE = (
    "# A chat model as two programs",
    "usage: --config",
    "  --config={}  {}",
    "--help={} ({})",
    "The options: python -m launch.bench",
    "--family=october2025 --data.vocab=4096",
    "--{}={} (now {})",
    "see --help",
)


def templates(path: Path) -> list[str]:
    """Every text of a file with a flag or a command in it, but docstrings and what is given to other programs."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    within = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    within |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in within:
            found.append(node.value)
    return [text for text in found if re.search(r"--[a-z{]|pip install|python -m launch", text)]


def test_zz_every_message_with_a_flag_is_followed() -> None:
    if not SEEN:
        pytest.skip("runs after the tests of the rows")
    listed = [*NO_MISTAKE, *(text for texts in ELSEWHERE.values() for text in texts)]
    lacking = []
    for path in SOURCES:
        for text in templates(path):
            if " " not in text.strip() or any(one in text for one in listed):
                continue
            pattern = ".*".join(map(re.escape, text.split("{}")))
            if not any(re.search(pattern, message, re.DOTALL) for message in SEEN):
                lacking.append(f"{path.relative_to(ROOT)}: {text[:110]}")
    print("\n".join(lacking))
    assert not lacking


def test_the_tests_that_follow_the_others_exist() -> None:
    found = {
        f"{path.name}::{name}"
        for path in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)\(", path.read_text(), re.MULTILINE)
    }
    messages = [text for path in SOURCES for text in templates(path)]
    assert set(ELSEWHERE) <= found, set(ELSEWHERE) - found
    stale = [
        one for texts in (*ELSEWHERE.values(), NO_MISTAKE) for one in texts if not any(one in text for text in messages)
    ]
    assert not stale, "no message says it any more"


def test_extras_that_messages_name_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    calls = [node for path in SOURCES for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    name = lambda call: getattr(call.func, "id", getattr(call.func, "attr", ""))  # noqa: E731
    named = [call for call in calls if name(call) in ("missing", "require")]
    constants = {call.args[-1].value for call in named if isinstance(call.args[-1], ast.Constant)}
    assert {"plots", "hub", "export", "harness", "interop"} <= constants <= set(extras) >= {"cuda", "tpu", "wandb"}
    written = "".join(path.read_text() for path in SOURCES)
    assert "jaxchat[" not in written and written.count("pip install -e") == 1
