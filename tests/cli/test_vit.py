"""`albireo train vit`, `classify` and `verify vit` as a user has them, and wrong input in one line."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from tiny_models import small_opt
from tiny_pictures import write_pictures
from train_server import Ended, TrainServer

SHORT = "--model tiny --batch-size 2 --eval-every 0"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, cache_folder: Path) -> dict[str, Path]:
    """What the command lines name."""
    root = tmp_path_factory.mktemp("places")
    data = write_pictures(root / "data", 8, size=32)
    damaged = write_pictures(root / "damaged", 6, size=16)
    for file in list(damaged.rglob("*.png"))[:5]:
        file.write_bytes(file.read_bytes()[:40])
    (root / "text").mkdir()
    for name in ("a", "b"):
        (root / "text" / name).mkdir()
        (root / "text" / name / "x.jpg").write_text("no picture")
    hollow = write_pictures(root / "hollow", 2)
    (hollow / "empty").mkdir()
    write_pictures(root / "stranger" / "train", 2)
    write_pictures(root / "stranger" / "test", 2, classes=("blue", "red"))
    (root / "nothing").mkdir()
    (root / "file.png").write_text("")
    (root / "note.txt").write_text("no picture")
    small_opt(vocab_size=64).save_pretrained(root / "opt_model")
    return {
        "cache": cache_folder, "data": data, "damaged": damaged, "text": root / "text", "hollow": hollow,
        "one": write_pictures(root / "one", 3, classes=("red",)), "stranger": root / "stranger",
        "single": write_pictures(root / "single", 1), "nothing": root / "nothing", "nowhere": root / "nowhere" / "at" / "all",
        "file": root / "file.png", "note": root / "note.txt", "opt_model": root / "opt_model", "root": root,
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(train_server: TrainServer, places: dict[str, Path]) -> Path:
    """A short run."""
    folder = places["root"] / "run"
    ended = train(train_server, places, f"--data {{data}} --steps 2 --output {folder}")
    assert ended.code == 0, ended.errors
    return folder


def train(server: TrainServer, places: dict[str, Path], arguments: str) -> Ended:
    return server.run(shlex.split(f"train vit {SHORT} --cache {{cache}} {arguments}".format(**places)))


def test_a_run_and_what_it_takes_pictures_for(
    train_server: TrainServer, places: dict[str, Path], run: Path, tmp_path: Path
) -> None:
    assert {path.name for path in (run / "model").iterdir()} == {
        "classes.json", "config.json", "model.safetensors", "preprocessor_config.json",
    }  # fmt: skip
    pictures = [str(places["data"] / name / "001.png") for name in ("green", "red")]
    out = tmp_path / "found.json"
    ended = train_server.run(["classify", "--run", str(run), "--top", "2", "--json", str(out), *pictures])
    assert ended.code == 0, ended.errors
    lines = ended.output.splitlines()
    assert [line.split("  ")[0] for line in lines] == pictures
    assert all("green " in line and "red " in line for line in lines)
    found = json.loads(out.read_text())
    assert [row["picture"] for row in found] == pictures
    assert all(sum(row["classes"].values()) == pytest.approx(1) for row in found)


def test_a_run_goes_on_by_its_folder(train_server: TrainServer, run: Path) -> None:
    ended = train_server.run(["train", "vit", "--resume", str(run), "--steps", "3"])
    assert ended.code == 0, ended.errors
    assert "going on from the checkpoint of step 2" in ended.errors


def test_verify(train_server: TrainServer, places: dict[str, Path]) -> None:
    words = "verify vit --model tiny --data {data} --cache {cache} --batch-size 2 --steps 1 --plugin low_level_zero"
    ended = train_server.run(shlex.split(words.format(**places)))
    assert ended.code == 0, ended.errors
    assert "passed: 1 step" in ended.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--data {nowhere}", "there is no file or folder"),
        ("--data {file}", "is a file: give a folder"),
        ("--data {nothing}", "has no folders of classes: it is empty"),
        ("--data {one}", "has one class only, red"),
        ("--data {hollow}", "the class empty has no pictures"),
        ("--data {stranger}", "the class blue is to be evaluated on"),
        ("--data {text}", "2 of 2 pictures cannot be read"),
        ("--data {damaged}", "5 of 12 pictures cannot be read"),
        ("--data {single}", "no picture is left to train on"),
        ("--data {data} --holdout 0.9", "--holdout must be at most 0.5"),
        ("--data {data} --holdout 0", "--holdout must be more than 0"),
        ("--data {data} --model gigantic", "there is no model 'gigantic'"),
        ("--data {data} --model {opt_model}", "is of type 'opt', and this recipe trains 'vit'"),
        ("--data {data} --model {nothing}", "holds no config.json"),
        ("--data {data} --sequence-length 8", "No such option"),
        ("--data {data} --workers -1", "--workers must be at least 0"),
        ("--data synthetic --max-damaged 3", "has no damaged pictures"),
        ("--data {data} --adapter lora --lora-targets c_attn", "the model has no module 'c_attn'"),
        ("--data {data} --adapter lora --lora-targets classifier", "classifier is trained as it is"),
        ("--data {data} --init pretrained", "--model tiny has no pretrained weights"),
        ("--data {data} --lora-rank 4", "is for --adapter lora"),
    ],
)
def test_wrong_input_is_one_line(
    train_server: TrainServer, places: dict[str, Path], tmp_path: Path, arguments: str, said: str
) -> None:
    ended = train(train_server, places, f"{arguments} --output {tmp_path / 'run'}")
    assert (ended.code, ended.output) == (2, ""), ended
    told = [line for line in ended.errors.splitlines() if line.startswith("albireo: ")]
    assert told == ended.errors.splitlines()[-1:], ended.errors
    assert said in told[0], told[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--run {run} {note}", "it is no picture, or it is damaged"),
        ("--run {run} {nowhere}", "No such file"),
        ("--run {nothing} {good}", "it has no config.json"),
        ("--run {run}", "Missing argument"),
    ],
)
def test_what_cannot_be_classified_is_one_line(
    train_server: TrainServer, places: dict[str, Path], run: Path, arguments: str, said: str
) -> None:
    good = places["data"] / "red" / "000.png"
    ended = train_server.run(shlex.split(f"classify {arguments}".format(**{**places, "run": run, "good": good})))
    assert (ended.code, ended.output) == (2, ""), ended
    assert said in ended.errors.splitlines()[-1], ended.errors
