"""Help and configuration: every option is shown once, examples parse, and what is printed can be given back."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from train_server import TrainServer

from albireo import __version__
from albireo.cli.main import cli, main
from albireo.cli.options import given_options
from albireo.config import RECIPE_SECTIONS, OptionInfo, RunConfig
from albireo.training.plan import plan_run

OPTIONS = {info.name: info for info in RunConfig.options()}
# What only the other recipe has.
MORE = {info.name: info for info in RunConfig.options("gpt2") if info.name not in OPTIONS}

SHARES = ("offload_optim_frac", "offload_param_frac", "shard_param_frac")

# What has to be given beside an option so that it may be changed at all, and what else changes with it.
BESIDE = {
    "init": ["--model", "125m"],
    "text_field": ["--data", "a/b"],
    "zero_stage": ["--plugin", "low_level_zero"],
    "cpu_offload": ["--plugin", "low_level_zero"],
    **{
        key: ["--plugin", "gemini"]
        for key in ("placement", "prefetch", "host_cap", "mem_cap", "trace", "stream_optim_frac")
    },
    **{key: ["--plugin", "gemini", "--placement", "static"] for key in SHARES},
    **{key: ["--adapter", "lora"] for key in ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets")},
    "max_malformed": ["--data", "a/b"],
}
FOLLOWS = {
    "model": {"init", "sequence_length", "learning_rate", "epochs"},
    "steps": {"epochs"},
    "plugin": {"precision"},
    "placement": {*SHARES},
    "adapter": {"lora_rank", "lora_alpha", "lora_dropout", "lora_targets"},
    "lora_rank": {"lora_alpha"},
}


def commands(command: click.Command = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command and every group of them."""
    yield path
    if isinstance(command, click.Group):
        for name, inside in command.commands.items():
            yield from commands(inside, (*path, name))


def command_of(words: list[str]) -> tuple[click.Command, list[str]]:
    """Return the command that words begin with, and the rest of them."""
    command: click.Command = cli
    while isinstance(command, click.Group) and words:
        if words[0] not in command.commands:
            raise KeyError(words[0])
        command, words = command.commands[words[0]], words[1:]
    return command, words


def help_of(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("words", list(commands()), ids=lambda words: " ".join(words) or "albireo")
def test_help_shows_every_option_once_and_says_what_it_is(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    command, _ = command_of(list(words))
    options = [p for p in command.params if isinstance(p, click.Option) and not p.hidden]
    assert [option.name for option in options if not option.help] == []
    flags = [flag for option in options for flag in (*option.opts, *option.secondary_opts)]
    columns = re.findall(r"^  (-\S.*?)(?:  |$)", help_of(words, capsys), flags=re.MULTILINE)
    shown = [flag for column in columns for flag in re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", column)]
    assert sorted(shown) == sorted([*flags, "-h", "--help"])


@pytest.mark.parametrize("words", list(commands()), ids=lambda words: " ".join(words) or "albireo")
def test_help_has_an_example_that_parses(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(words, capsys)
    examples = re.findall(r"^ {2,4}(albireo .*?)(?: {3,}.*)?$", text, flags=re.MULTILINE)
    examples += re.findall(r"`(albireo .*?)`", text)
    assert examples, text
    for example in examples:
        arguments = shlex.split(example.partition(" > ")[0])[1:]
        command, rest = command_of(arguments)
        if "--help" in rest:
            continue
        assert not isinstance(command, click.Group), example
        context = command.make_context(arguments[0], list(rest))
        for recipe in RECIPE_SECTIONS:
            if command_of(["train", recipe])[0] is command:
                plan_run(recipe=recipe, options=given_options(recipe, context.params))


def test_the_version_is_the_packages(train_server: TrainServer) -> None:
    ended = train_server.run(["--version"])
    assert (ended.code, ended.output.split()[-1]) == (0, __version__)


@pytest.mark.parametrize("words", [[], ["train"], ["bench"], ["checkpoint"]])
def test_a_command_that_is_not_whole_shows_help_and_is_no_success(train_server: TrainServer, words: list[str]) -> None:
    ended = train_server.run(words)
    assert (ended.code, ended.output) == (2, "")
    assert "Usage: albireo" in ended.errors


def printed(server: TrainServer, *flags: str, recipe: str = "opt") -> dict[str, Any]:
    ended = server.run(["train", recipe, "--print-config", *flags])
    assert (ended.code, ended.errors) == (0, ""), ended
    config: dict[str, Any] = json.loads(ended.output)
    return config


def flat(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for part in config.values() if isinstance(part, dict) for name, value in part.items()}


def another_value(info: OptionInfo, value: Any) -> Any:
    """A value that an option does not have, or None if it can have no other."""
    if info.choices:
        return next((choice for choice in info.choices if choice != value), None)
    if info.kind is bool:
        return not value
    if info.kind is int:
        up = (value or 1) + 1
        return up if info.maximum is None or up <= info.maximum else up - 2
    if info.kind is float:
        up = (value or 0.0) + 0.25
        return up if info.maximum is None or up <= info.maximum else up - 0.5
    return "125m" if info.name == "model" else "/another/name"


def flags_for(info: OptionInfo, value: Any) -> list[str]:
    if info.kind is bool:
        return [info.flag if value else f"--no-{info.flag[2:]}"]
    return [info.flag, str(value)]


def test_the_printed_configuration_has_every_option(train_server: TrainServer) -> None:
    config = printed(train_server)
    assert config["recipe"] == "opt"
    assert {info.section: set() for info in OPTIONS.values()}.keys() == config.keys() - {"recipe"}
    assert flat(config).keys() == OPTIONS.keys()


@pytest.mark.parametrize("name", [*OPTIONS, *MORE])
def test_every_flag_changes_its_option_and_no_other(train_server: TrainServer, name: str) -> None:
    recipe = "opt" if name in OPTIONS else "gpt2"
    info = {**OPTIONS, **MORE}[name]
    if name == "gpus" and torch.cuda.device_count() == 1:
        pytest.skip("there is one GPU, and no more can be asked for")
    beside = BESIDE.get(name, [])
    before = flat(printed(train_server, *beside, recipe=recipe))
    value = another_value(info, before[name])
    if value is None:
        pytest.skip(f"{info.flag} has one value only: {before[name]}")
    after = flat(printed(train_server, *beside, *flags_for(info, value), recipe=recipe))
    assert after[name] == value
    changed = {other for other in after if after[other] != before[other]}
    assert {name} <= changed <= {name, *FOLLOWS.get(name, set())}


def test_what_is_printed_can_be_given_back(train_server: TrainServer, tmp_path: Path) -> None:
    flags = "--model 350m --steps 7 --batch-size 3 --learning-rate 3e-4 --no-tf32 --data a/b --text-field body --clip 0"
    config = printed(train_server, *flags.split())
    (tmp_path / "mine.json").write_text(json.dumps(config))
    assert printed(train_server, "--config", str(tmp_path / "mine.json")) == config


def test_one_recipes_configuration_is_not_anothers(train_server: TrainServer, tmp_path: Path) -> None:
    config = printed(train_server, recipe="gpt2")
    assert (config["recipe"], config["model"]["model"], config["data"]["bucket"]) == ("gpt2", "124m", 8)
    (tmp_path / "mine.json").write_text(json.dumps(config))
    assert printed(train_server, "--config", str(tmp_path / "mine.json"), recipe="gpt2") == config
    ended = train_server.run(["train", "opt", "--print-config", "--config", str(tmp_path / "mine.json")])
    assert (ended.code, ended.output) == (2, "")
    assert "is for the recipe 'gpt2', and this is 'opt'" in ended.errors


def test_defaults_that_are_given_back_are_the_defaults(train_server: TrainServer, tmp_path: Path) -> None:
    config = printed(train_server)
    (tmp_path / "mine.json").write_text(json.dumps(config))
    assert printed(train_server, "--config", str(tmp_path / "mine.json")) == config


def test_flags_win_over_a_file_which_wins_over_an_older_run(train_server: TrainServer, tmp_path: Path) -> None:
    older = {"batch_size": 2, "clip": 0.25, "seed": 5, "steps": 9}
    run = plan_run(recipe="opt", options=older, output=tmp_path / "run").make_folder()
    (tmp_path / "mine.json").write_text('{"optimizer": {"batch_size": 3, "clip": 0.5}, "schedule": {"epochs": 2.0}}')
    layers = ["--resume", str(run.path), "--config", str(tmp_path / "mine.json"), "--batch-size", "4"]
    config = printed(train_server, *layers)
    assert (config["optimizer"]["batch_size"], config["optimizer"]["clip"]) == (4, 0.5)
    schedule = config["schedule"]
    assert (schedule["seed"], schedule["steps"], schedule["epochs"]) == (5, None, 2.0)
    schedule = printed(train_server, *layers, "--steps", "6")["schedule"]
    assert (schedule["steps"], schedule["epochs"]) == (6, None)


def test_printing_the_configuration_makes_no_folder(train_server: TrainServer, tmp_path: Path) -> None:
    printed(train_server, "--output", str(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


def test_paths_are_written_down_as_they_will_be_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "synthetic").mkdir()
    (tmp_path / "mine.txt").write_text("a text")
    monkeypatch.chdir(tmp_path)
    data = plan_run(recipe="opt", options={"data": "mine.txt", "cache": "cache", "tokenizer": "owner/name"})
    assert data.config.data.data == str(tmp_path / "mine.txt")
    assert data.config.data.cache == str(tmp_path / "cache")
    assert data.config.model.tokenizer == "owner/name"
    assert plan_run(recipe="opt", options={"data": "synthetic"}).config.data.data == "synthetic"
