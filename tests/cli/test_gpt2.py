"""`albireo train gpt2`, `generate` and `checkpoint` as a user has them: what they leave, and wrong input in one line."""

from __future__ import annotations

import json
import os
import shlex
import signal
import time
from pathlib import Path

import pytest
from tiny_instructions import records, write_instructions
from tiny_models import small_opt
from train_server import Ended, TrainServer

from albireo.data import train_tokenizer

SHORT = "--model tiny --sequence-length 64 --batch-size 2 --eval-every 0"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, cache_folder: Path) -> dict[str, Path]:
    """What the command lines name."""
    root = tmp_path_factory.mktemp("places")

    def file(name: str, content: str) -> Path:
        (root / name).write_text(content)
        return root / name

    malformed = [*records(6), {"instruction": "a"}]
    small_opt(vocab_size=64).save_pretrained(root / "opt_model")
    # A tokenizer that has no token to end an answer with.
    train_tokenizer(["one two three"] * 3, 270).save(root / "endless")
    (root / "endless" / "tokenizer_config.json").write_text('{"unk_token": "<unk>"}')
    (root / "nothing").mkdir()
    return {
        "cache": cache_folder,
        "data": write_instructions(root / "mine.json", 24),
        "lines": write_instructions(root / "mine.jsonl", 24),
        "malformed": file("malformed.json", json.dumps(malformed)),
        "text": file("text.txt", "no records"),
        "broken": file("broken.json", '[{"instruction": "a"'),
        "objects": file("objects.json", '{"data": 1}'),
        "empty": file("empty.json", "[]"),
        "single": write_instructions(root / "single.json", 1),
        "opt_model": root / "opt_model",
        "endless": root / "endless",
        "nothing": root / "nothing",
        "nowhere": root / "nowhere",
        "root": root,
    }


@pytest.fixture(scope="module")
def run(train_server: TrainServer, places: dict[str, Path]) -> Path:
    """A short run with an adapter."""
    folder = places["root"] / "run"
    ended = train(train_server, places, f"--data {{data}} --steps 3 --adapter lora --lora-rank 2 --output {folder}")
    assert ended.code == 0, ended.errors
    return folder


def train(server: TrainServer, places: dict[str, Path], arguments: str) -> Ended:
    words = shlex.split(f"train gpt2 {SHORT} --cache {{cache}} {arguments}".format(**places))
    return server.run(words)


def refused(ended: Ended, *words: str) -> None:
    assert (ended.code, ended.output) == (2, ""), ended
    last = ended.errors.splitlines()[-1]
    assert last.startswith("albireo: "), ended.errors
    assert "Traceback" not in ended.errors
    assert [line for line in ended.errors.splitlines() if line.startswith("albireo: ")] == [last]
    for word in words:
        assert word in last, last


def test_a_run_says_and_leaves_what_it_should(
    train_server: TrainServer, places: dict[str, Path], tmp_path: Path
) -> None:
    ended = train(train_server, places, f"--data {{lines}} --steps 3 --output {tmp_path / 'run'}")
    assert ended.code == 0, ended
    assert "samples    23 to train on" in ended.errors
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "checkpoints", "config.json", "loss.png", "metrics.jsonl", "model", "processor", "run.lock", "summary.json",
    }  # fmt: skip
    names = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    assert {path.name for path in (tmp_path / "run" / "model").iterdir()} == set(names)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["model_path"]) == ("finished", 3, "model")


def test_an_adapters_run_prints_what_is_trained_and_what_it_takes(
    train_server: TrainServer, places: dict[str, Path], tmp_path: Path
) -> None:
    ended = train(train_server, places, f"--data {{data}} --steps 1 --adapter lora --output {tmp_path / 'run'}")
    assert ended.code == 0, ended
    assert "LoRA of rank 8, alpha 16, on c_attn: 8,192 of " in ended.errors
    for words in ("trained ", "host memory, before", "host memory, after", "host memory, peak", "adapter file"):
        assert any(line.startswith(words) for line in ended.output.splitlines()), ended.output
    assert ended.output.splitlines()[-1] == f"adapter    {tmp_path / 'run' / 'adapter'}"


def test_an_adapters_run_under_gemini(train_server: TrainServer, places: dict[str, Path], tmp_path: Path) -> None:
    flags = "--plugin gemini --offload-optim-frac 1 --offload-param-frac 1 --mem-cap 0.01 --adapter lora --steps 2"
    ended = train(train_server, places, f"--data {{data}} {flags} --output {tmp_path / 'run'}")
    assert ended.code == 0, ended
    assert "placement  static: weights of 0 of 3 chunks stay on the device, states of 0 of 1; " in ended.errors
    assert ended.output.splitlines()[-1] == f"adapter    {tmp_path / 'run' / 'adapter'}"
    words = ["generate", "--run", str(tmp_path / "run"), "--prompt", "one", "--max-new-tokens", "3"]
    assert train_server.run(words).code == 0
    words = ["checkpoint", "export", str(tmp_path / "run"), "--output", str(tmp_path / "whole"), "--merge"]
    assert train_server.run(words).code == 0


def test_a_run_is_resumed_by_its_folder(train_server: TrainServer, places: dict[str, Path], run: Path) -> None:
    ended = train_server.run(["train", "gpt2", "--resume", str(run), "--steps", "4"])
    assert ended.code == 0, ended.errors
    assert "going on from the checkpoint of step 3" in ended.errors
    assert json.loads((run / "summary.json").read_text())["steps"] == 4


def test_ctrl_c_saves_and_a_checkpoint_answers(
    train_server: TrainServer, places: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    words = shlex.split(
        f"train gpt2 {SHORT} --cache {{cache}} --data {{data}} --steps 5000 --output {folder}".format(**places)
    )
    process = train_server.start(words)
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not metrics.exists() or not metrics.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process, signal.SIGINT)
    ended = train_server.wait()
    assert ended.code == 130, ended.errors
    assert f"go on with: albireo train gpt2 --resume {folder}" in ended.errors
    ended = train_server.run(["generate", "--run", str(folder), "--instruction", "Say star.", "--max-new-tokens", "2"])
    assert ended.code == 0, ended.errors
    assert ended.errors.startswith("note: the run has not come to its end: this is its checkpoint of step ")


def test_generate_prints_the_answer_alone(train_server: TrainServer, run: Path) -> None:
    words = ["generate", "--run", str(run), "--instruction", "Say star.", "--max-new-tokens", "3"]
    ended = train_server.run(words)
    assert (ended.code, ended.errors) == (0, "")
    assert ended.output.endswith("\n")
    assert train_server.run(words).output == ended.output
    drawn = train_server.run([*words, "--input", "one two", "--temperature", "1.5", "--seed", "4", "--top-k", "50"])
    assert (drawn.code, drawn.errors) == (0, "")
    plain = train_server.run(["generate", "--run", str(run), "--prompt", "one", "--max-new-tokens", "3"])
    assert plain.code == 0, plain.errors


def test_an_export_says_what_it_wrote(train_server: TrainServer, run: Path, tmp_path: Path) -> None:
    ended = train_server.run(["checkpoint", "export", str(run), "--output", str(tmp_path / "whole"), "--merge"])
    assert ended.code == 0, ended.errors
    assert ended.output.startswith("wrote the model with its adapter merged of step ")
    assert (tmp_path / "whole" / "model.safetensors").is_file()


WRONG = [
    ("--data {nowhere}.json", ("no such file",)),
    ("--data {text}", ("is not a file of instructions by its name", ".jsonl")),
    ("--data {broken}", ("is not JSON",)),
    ("--data {objects}", ("are malformed", 'no field "instruction"')),
    ("--data {empty}", ("holds no records",)),
    ("--data {single}", ("at least one to train on and one to evaluate on",)),
    ("--data {nothing}", ("holds no file of instructions",)),
    ("--data {malformed}", ("1 of 7 records", "record 7", 'no field "output"', "--max-malformed 0.01 allows 0")),
    ("--data {data} --max-malformed -1", ("--max-malformed",)),
    ("--data {data} --loss-on prompt", ("--loss-on", "answer")),
    ("--data {data} --bucket 0", ("--bucket",)),
    ("--data {data} --sequence-length 4", ("longer --sequence-length",)),
    ("--data {data} --sequence-length 2000", ("1024 positions",)),
    ("--data {data} --text-field body", ("No such option", "--text-field")),
    ("--data random --loss-on all", ("--loss-on all says nothing",)),
    ("--data {data} --tokenizer {endless}", ("no token that ends a text",)),
    ("--data {data} --model 125m", ("there is no model '125m'", "124m")),
    ("--data {data} --model {opt_model}", ("is of type 'opt'", "albireo train opt")),
    ("--data {data} --lora-rank 4", ("--lora-rank is for --adapter lora",)),
    ("--data {data} --adapter qlora16", ("qlora16", "lora")),
    ("--data {data} --adapter lora --lora-rank 0", ("--lora-rank",)),
    ("--data {data} --adapter lora --lora-targets q_proj", ("no module 'q_proj'", "c_attn")),
    ("--data {data} --adapter lora --lora-targets lm_head", ("lm_head is a Linear, which can have no adapter",)),
    ("--data {data} --adapter lora --lora-targets ,", ("--lora-targets needs at least one name",)),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=[arguments for arguments, _ in WRONG])
def test_wrong_input_is_one_line_and_leaves_nothing(
    train_server: TrainServer, places: dict[str, Path], tmp_path: Path, arguments: str, words: tuple[str, ...]
) -> None:
    refused(train(train_server, places, f"{arguments} --output {tmp_path / 'run'}"), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("generate --instruction a", ("--run",)),
        ("generate --run {nowhere} --instruction a", ("no such folder",)),
        ("generate --run {data} --instruction a", ("it is a file",)),
        ("generate --run {nothing} --instruction a", ("no config.json",)),
        ("generate --run {run}", ("give either --instruction",)),
        ("generate --run {run} --instruction ''", ("--instruction is empty",)),
        ("generate --run {run} --prompt a --input b", ("--input goes with --instruction",)),
        ("generate --run {run} --prompt a --top-p 0.5", ("give --temperature",)),
        ("generate --run {run} --prompt a --temperature -1", ("--temperature",)),
        ("generate --run {run} --prompt a --max-new-tokens 5000", ("fewer --max-new-tokens",)),
        ("checkpoint export {run}", ("--output",)),
        ("checkpoint export {nowhere} --output {nowhere}2", ("no such folder",)),
        ("checkpoint export {run} --output {run}", ("is there already",)),
        ("checkpoint export {run} --output {nowhere}2 --step 77", ("no checkpoint of step 77",)),
        ("train gpt2 --resume {run} --lora-rank 3", ("--lora-rank 3 cannot go on", "begun with 2")),
        ("train gpt2 --resume {run} --adapter none", ("--adapter none cannot go on",)),
        ("train opt --resume {run}", ("is for the recipe 'gpt2', and this is 'opt'",)),
        ("train vti", ("'vti'", "gpt2", "opt")),
        ("verify gpt2 --model tiny --adapter lora --lora-dropout 0.1", ("--lora-dropout 0.1", "leave it out")),
    ],
)
def test_wrong_input_of_other_verbs(
    train_server: TrainServer, places: dict[str, Path], run: Path, arguments: str, words: tuple[str, ...]
) -> None:
    before = {path.name for path in run.iterdir()}
    refused(train_server.run(shlex.split(arguments.format(**places, run=run))), *words)
    assert {path.name for path in run.iterdir()} == before
    assert not places["nowhere"].with_name("nowhere2").exists()
