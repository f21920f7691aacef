"""`switchtitan lm-eval` scores local tasks of the harness as transformers' logits say."""

import importlib.util
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.trained import save_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from switchtitan.cli import export, lm_eval

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="the package lm-eval is not installed; run `pip install 'switchtitan[lm-eval]'`",
)
QUESTIONS = [
    {"question": "def size(", "choices": ["self):", "import", "1 2 3"], "answer": 0},
    {"question": "import ", "choices": ["{{", "json", "größe"], "answer": 1},
    {"question": "if y", "choices": [" 0", " is"], "answer": 1},
    {"question": "", "choices": ["def", "zzz"], "answer": 1},
]
TEXTS = ["import json\nfrom typing import Any\n" * 3, "# größe\n"]
COMMON = "dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {file}\ntest_split: test\n"
TASKS = {
    "local_choice": COMMON
    + """
task: local_choice
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 3.0}}
""",
    "local_text": COMMON
    + """
task: local_text
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list:
  - {{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}
""",
    "local_answer": COMMON
    + """
task: local_answer
output_type: generate_until
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{until: ["{until}"], max_gen_toks: 5, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
""",
}


@pytest.fixture(scope="module")
def run(corpora):
    """A tiny run with a checkpoint and an export of it."""
    folder = save_run(corpora / "lm-eval")
    export.main(["--checkpoint", str(folder)])
    return folder


def exported(run):
    return run / "exports" / "step-000000007"


@pytest.fixture(scope="module")
def theirs(run):
    """transformers' model and tokenizer of the export."""
    folder = exported(run)
    return (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder),
    )


def log_likelihoods(model, tokens):
    """The log-likelihood of every token but the first."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


@pytest.fixture
def tasks(tmp_path, run, theirs):
    """A folder of tasks whose data are local files."""
    model, tokenizer = theirs
    prompt = tokenizer("def f(", return_tensors="pt").input_ids
    generated = model.generate(prompt, do_sample=False, max_new_tokens=5, pad_token_id=0)
    answer = tokenizer.decode(generated[0, prompt.shape[1] :])
    data = {
        "local_choice": QUESTIONS,
        "local_text": [{"text": text} for text in TEXTS],
        # The second answer is wrong.
        "local_answer": [
            {"question": "def f(", "answer": answer},
            {"question": "def f(", "answer": answer + "x"},
        ],
    }
    for name, text in TASKS.items():
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(data[name]))
        (tmp_path / f"{name}.yaml").write_text(text.format(file=file, until="<never>"))
    return tmp_path


def scored(capsys, *arguments):
    """The metrics by task."""
    capsys.readouterr()
    lm_eval.main([*map(str, arguments), "--json", "-"])
    return json.loads(capsys.readouterr().out)["tasks"]


@needs_harness
def test_scores_are_those_of_transformers_logits(run, theirs, tasks, capsys):
    model, tokenizer = theirs
    arguments = ("--tasks", ",".join(TASKS), "--include-path", tasks, "--batch-size", 3)
    for target in (run, exported(run)):
        found = scored(capsys, target, *arguments, "--dtype", "float32")
        eos = tokenizer.eos_token_id

        hits = []
        for row in QUESTIONS:
            sums = []
            for choice in row["choices"]:
                # The harness moves spaces at the end of a context to the answer.
                context = tokenizer(row["question"].rstrip())["input_ids"]
                whole = tokenizer(row["question"] + choice)["input_ids"]
                if not context:
                    whole, context = [eos, *whole], [eos]
                # The model knows 16 tokens; none of these is longer.
                assert len(whole) <= 17
                sums.append(log_likelihoods(model, whole)[len(context) - 1 :].sum().item())
            hits.append(sums.index(max(sums)) == row["answer"])
        assert 0 < sum(hits) < len(hits)
        assert found["local_choice"]["acc,none"] == pytest.approx(sum(hits) / len(hits))
        assert found["local_choice"]["version"] == 3.0

        nats = 0.0
        for text in TEXTS:
            tokens = [eos, *tokenizer(text)["input_ids"]]
            # Windows of 16 inputs that overlap only at the end.
            nats -= log_likelihoods(model, tokens[:17]).sum().item()
            for start in range(17, len(tokens), 16):
                end = min(start + 16, len(tokens))
                nats -= log_likelihoods(model, tokens[end - 17 : end])[start - end :].sum().item()
        num_bytes = sum(len(text.encode()) for text in TEXTS)
        assert found["local_text"]["bits_per_byte,none"] == pytest.approx(
            nats / math.log(2) / num_bytes, rel=1e-5
        )
        assert found["local_answer"]["exact_match,none"] == 0.5


@needs_harness
def test_results_of_a_run_are_kept_beside_it_and_shown_in_tensorboard(run, tasks, capsys):
    arguments = ("--include_path", str(tasks))
    lm_eval.main([str(run), "--tasks", "local_choice", *arguments])
    shown = capsys.readouterr().out
    file = run / "lm_eval" / "step-000000007.json"
    assert "local_choice  acc " in shown
    assert shown.endswith(f"results: {file}\n")
    lm_eval.main([str(run), "--tasks", "local_choice,local_text", *arguments, "--limit", "1"])
    results = json.loads(file.read_text())
    assert results["step"] == 7
    # The second call keeps what the first one found: that of all questions.
    assert {"local_choice", "local_choice-limit-1", "local_text-limit-1"} <= results["tasks"].keys()
    choice, limited = (results["tasks"][f"local_choice{end}"] for end in ("", "-limit-1"))
    assert (choice["limit"], choice["num_fewshot"], choice["version"]) == (None, 0, 3.0)
    assert limited["limit"] == 1
    # Negative control: one question has another score.
    assert choice["acc,none"] != limited["acc,none"]
    events = EventAccumulator(str(run / "tensorboard" / "lm_eval"))
    events.Reload()
    for task, found in (("local_choice", choice), ("local_choice-limit-1", limited)):
        (point,) = events.Scalars(f"lm_eval/{task}/acc")[-1:]
        assert (point.step, point.value) == (7, pytest.approx(found["acc,none"]))


@needs_harness
def test_results_of_other_weights_are_kept_next_to_them(run, tasks, capsys):
    scored(capsys, exported(run), "--tasks", "local_text", "--include-path", tasks)
    results = json.loads((exported(run) / "lm_eval" / "results.json").read_text())
    assert results["step"] is None
    assert "local_text" in results["tasks"]


@needs_harness
def test_an_answer_ends_before_the_string_that_ends_it(run, tasks, theirs, capsys):
    (row, _) = json.loads((tasks / "local_answer.json").read_text())
    cut = row["answer"][1:3]
    (tasks / "local_answer.json").write_text(
        json.dumps([{**row, "answer": row["answer"].partition(cut)[0]}])
    )
    text = TASKS["local_answer"].format(file=tasks / "local_answer.json", until="UNTIL")
    (tasks / "local_answer.yaml").write_text(text.replace('["UNTIL"]', json.dumps([cut])))
    arguments = ("--tasks", "local_answer", "--include-path", tasks, "--dtype", "float32")
    assert scored(capsys, run, *arguments)["local_answer"]["exact_match,none"] == 1.0


@needs_harness
def test_results_of_other_weights_in_a_folder_are_kept_apart(run, tasks, tmp_path, capsys):
    folder = tmp_path / "weights"
    shutil.copytree(exported(run), folder, ignore=shutil.ignore_patterns("lm_eval"))
    arguments = (folder, "--tasks", "local_text", "--include-path", tasks)
    old = scored(capsys, *arguments)["local_text"]["bits_per_byte,none"]
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] *= 2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    new = scored(capsys, *arguments)["local_text"]["bits_per_byte,none"]
    assert new != old
    first, second = sorted((folder / "lm_eval").iterdir(), key=lambda file: len(file.name))
    assert first.name == "results.json"
    found = [json.loads(file.read_text()) for file in (first, second)]
    assert [row["tasks"]["local_text"]["bits_per_byte,none"] for row in found] == [old, new]
    assert second.name == f"results-{found[1]['fingerprint'][:8]}.json"
    # Negative control: the same weights add to their file.
    scored(capsys, *arguments, "--limit", 1)
    assert len(list((folder / "lm_eval").iterdir())) == 2
    assert json.loads(second.read_text())["tasks"].keys() == {"local_text", "local_text-limit-1"}


def fails(capsys, *arguments):
    """The message of a command that ends with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        lm_eval.main([*map(str, arguments)])
    assert stopped.value.code == 2
    return capsys.readouterr()


@needs_harness
def test_a_place_that_cannot_be_written_is_an_error_before_the_tasks_run(
    run, tasks, tmp_path, monkeypatch, capsys
):
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    arguments = (run, "--tasks", "local_choice", "--include-path", tasks)
    with monkeypatch.context() as patched:
        patched.setattr(lm_eval, "ask", lambda *_: pytest.fail("the tasks ran"))
        message = fails(capsys, *arguments, "--folder", blocked).err
    assert f"{blocked}: the results cannot be written there" in message
    assert "pass --folder FOLDER" in message
    # Negative control: another folder has the results.
    lm_eval.main([*map(str, arguments), "--folder", str(tmp_path / "results")])
    assert (tmp_path / "results" / "step-000000007.json").is_file()


@needs_harness
def test_results_that_cannot_be_written_are_printed(run, tasks, tmp_path, monkeypatch, capsys):
    def fill_disk(file, contents):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("switchtitan.cli.lm_eval_results.write_atomically", fill_disk)
    file = tmp_path / "result.json"
    arguments = (run, "--tasks", "local_choice", "--include-path", tasks, "--json", file)
    shown = fails(capsys, *arguments)
    assert "local_choice  acc " in shown.out
    assert "local_choice" in json.loads(file.read_text())["tasks"]
    assert "the results cannot be written" in shown.err
    assert "results:" not in shown.out
    # And the other way round.
    monkeypatch.undo()
    place = tmp_path / "results" / "step-000000007.json"
    shown = fails(capsys, *arguments[:-1], tmp_path, "--folder", place.parent)
    assert f"--json {tmp_path}: the file cannot be written" in shown.err
    assert "local_choice" in json.loads(place.read_text())["tasks"]


@needs_harness
def test_tasks_that_run_code_must_be_allowed(run, tasks, monkeypatch, capsys):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    file = tasks / "local_choice.yaml"
    file.write_text(file.read_text() + "unsafe_code: true\n")
    arguments = (run, "--tasks", "local_choice", "--include-path", tasks)
    message = fails(capsys, *arguments).err
    assert "--tasks local_choice: a task runs code that the model writes" in message
    assert "pass --confirm-run-unsafe-code" in message
    lm_eval.main([*map(str, arguments), "--confirm-run-unsafe-code"])
    assert "local_choice  acc " in capsys.readouterr().out


@needs_harness
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "doc_to_text: question",
            'doc_to_text: "{{no_such_column.word}}"',
            "the harness cannot run a task (UndefinedError: 'no_such_column' is undefined)",
        ),
        ("metric_list:", "no_such_key: [1", "the harness has no such task; fix {file} ("),
        ("output_type: multiple_choice", "output_type: no_such_type", "the harness cannot run"),
    ],
    ids=["template", "yaml", "output type"],
)
def test_a_mistake_in_a_task_is_one_error(run, tasks, old, new, message, capsys):
    file = tasks / "local_choice.yaml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    found = fails(capsys, run, "--tasks", "local_choice", "--include-path", tasks).err
    assert f"error: --tasks local_choice: {message.format(file=file)}" in found
    assert "Traceback" not in found


@needs_harness
def test_an_error_of_the_model_is_no_mistake_in_a_task(run, tasks, monkeypatch):
    from switchtitan.builders import harness_model

    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(harness_model.HarnessModel, "_score_batch", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        lm_eval.main([str(run), "--tasks", "local_choice", "--include-path", str(tasks)])


@needs_harness
def test_ctrl_c_ends_with_one_line(monkeypatch, capsys):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(lm_eval, "run_tasks", interrupt)
    with pytest.raises(SystemExit) as stopped:
        lm_eval.main(["some/run", "--tasks", "x"])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "\nstopped; nothing was written\n"


@needs_harness
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "no_such_task"], "--tasks no_such_task: the harness has no such task"),
        (["--tasks", ","], "expected names of tasks, joined by commas"),
        (
            ["--tasks", "x", "--include-path", "no/folder"],
            "--include-path no/folder: no such folder",
        ),
        (["--tasks", "x", "--num-fewshot", "-1"], "-1: expected an integer >= 0"),
    ],
)
def test_mistakes_end_with_status_2_and_one_message(arguments, message, run, capsys):
    with pytest.raises(SystemExit) as stopped:
        lm_eval.main([str(run), *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@needs_harness
def test_missing_data_of_a_task_is_an_error(run, tasks, capsys):
    (tasks / "local_text.json").unlink()
    with pytest.raises(SystemExit) as stopped:
        lm_eval.main([str(run), "--tasks", "local_text", "--include-path", str(tasks)])
    assert stopped.value.code == 2
    assert "--tasks local_text: the data of a task cannot be read" in capsys.readouterr().err


def test_a_missing_package_names_the_extra(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name)
    )
    with pytest.raises(SystemExit) as stopped:
        lm_eval.main(["no/such/run", "--tasks", "x"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith("run `pip install 'switchtitan[lm-eval]'`\n")
