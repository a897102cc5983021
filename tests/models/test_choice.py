from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from albireo.errors import ModelError
from albireo.models import OPT, ModelChoice, fetch_model, resolve_model
from albireo.models import choice as choice_module


def change(folder: Path, **options: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in {**config, **options}.items() if value != "REMOVE"}))


@pytest.mark.parametrize("name", ["tiny", "125m", "6.7", "OPT-13B"])
def test_a_size(name: str) -> None:
    choice = resolve_model(name)
    assert (choice.name, choice.family, choice.folder) == (name, OPT, None)
    assert choice.size is not None
    assert choice.hub_id == OPT.sizes[choice.size].hub_id
    assert choice.config().hidden_size == OPT.sizes[choice.size].config["hidden_size"]


def test_a_size_comes_before_a_folder_of_that_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.rename(folder.with_name("tiny"))
    monkeypatch.chdir(folder.parent)
    assert resolve_model("tiny").size == "tiny"
    assert resolve_model("./tiny").folder == Path("tiny")


def test_a_folder(saved: Path) -> None:
    choice = resolve_model(str(saved))
    assert choice == ModelChoice(str(saved), OPT, folder=saved)
    assert choice.config().vocab_size == 96


def test_dropout_is_the_users_and_not_the_files(folder: Path) -> None:
    change(folder, dropout=0.1, attention_dropout=0.1, layerdrop=0.2)
    config = resolve_model(str(folder)).config(dropout=0.3)
    assert (config.dropout, config.attention_dropout, config.layerdrop) == (0.3, 0.0, 0.0)
    assert resolve_model(str(folder)).config().dropout == 0.0


def test_a_folder_cannot_choose_its_own_attention_or_code(folder: Path) -> None:
    change(
        folder,
        auto_map={"AutoConfig": "evil.Config"},
        attn_implementation="someone/kernel",
        gradient_checkpointing=True,
    )
    config = resolve_model(str(folder)).config()
    model = OPT.make_model(config)
    assert config._attn_implementation == "sdpa"
    assert not model.model.decoder.gradient_checkpointing
    assert not hasattr(config, "auto_map")


@pytest.mark.parametrize("name", ["7b", "", "no/such/folder", "/no/such/folder", "gpt-3", "a b/c", "opt-9b"])
def test_an_unknown_name_lists_the_sizes(name: str) -> None:
    with pytest.raises(ModelError, match=r"there is no model '.*': expected one of tiny, 125m, .* or a hub id"):
        resolve_model(name)


def test_a_file_is_no_folder(saved: Path) -> None:
    with pytest.raises(ModelError, match="is a file: expected a Hugging Face folder"):
        resolve_model(str(saved / "config.json"))


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json, so it is no Hugging Face model$"):
        resolve_model(str(tmp_path))


def test_a_run_s_folder_points_to_the_model_in_it(folder: Path) -> None:
    run = folder.parent
    with pytest.raises(ModelError, match=r"did you mean .*/model\?"):
        resolve_model(str(run))
    (run / "config.json").write_text('{"recipe": "opt"}')
    with pytest.raises(ModelError, match=r"has no model_type.*did you mean .*/model\?"):
        resolve_model(str(run))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", r"config\.json cannot be read as JSON"),
        ("[" * 100_000, r"config\.json cannot be read as JSON"),
        ("\xff", r"config\.json cannot be read as JSON"),
        ("[]", "does not hold a JSON object"),
        ("{}", "has no model_type"),
        ('{"model_type": 3}', "has no model_type"),
        ('{"model_type": "bert"}', "'bert' are not supported: expected one of opt"),
        ('{"model_type": "opt", "quantization_config": {"bits": 4}}', "is quantised"),
    ],
)
def test_a_malformed_configuration_is_said(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=words):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize(
    "wrong", [{"hidden_size": "wide"}, {"num_hidden_layers": None}, {"dropout": [1]}, {"vocab_size": 1.5}]
)
def test_a_configuration_of_wrong_types_is_said_in_one_line(folder: Path, wrong: dict[str, Any]) -> None:
    change(folder, **wrong)
    choice = resolve_model(str(folder))
    if "dropout" in wrong:
        assert choice.config().dropout == 0.0
        return
    with pytest.raises(ModelError, match=r"config\.json describes no opt model") as caught:
        choice.config()
    assert "\n" not in str(caught.value)


def test_a_hub_id_is_fetched_without_its_weights_first(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, bool]] = []

    def download(repository: str, *, weights: bool) -> Path:
        calls.append((repository, weights))
        return saved

    monkeypatch.setattr(choice_module, "download_model", download)
    choice = resolve_model("someone/opt-mine")
    assert choice == ModelChoice("someone/opt-mine", OPT, hub_id="someone/opt-mine", folder=saved)
    assert fetch_model(choice).folder == saved
    assert fetch_model(resolve_model("125m")).folder == saved
    assert calls == [("someone/opt-mine", False), ("someone/opt-mine", True), ("facebook/opt-125m", True)]


def test_a_local_folder_is_never_fetched(saved: Path) -> None:
    choice = resolve_model(str(saved))
    assert fetch_model(choice) is choice


@pytest.mark.parametrize("name", ["tiny", "175b"])
def test_weights_that_nobody_publishes(name: str) -> None:
    with pytest.raises(ModelError, match=f"the model {name} has no published weights: use --init random"):
        fetch_model(resolve_model(name))
