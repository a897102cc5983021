"""Folders from runs and their checkpoints, as others load them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny_instructions import write_instructions
from transformers import AutoModelForCausalLM, AutoTokenizer

from albireo.errors import AlbireoError, CheckpointError, ConfigError, RunFolderError
from albireo.training.exporting import export_checkpoint
from albireo.training.generation import GenerationOptions, generate, prompt_for
from albireo.training.plan import plan_run
from albireo.training.start import start_run
from albireo.training.trained import load_language_model

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 17, 33, 65]])


def trained(recipe: str, output: Path, **options: Any) -> Path:
    plan = plan_run(recipe=recipe, options={"model": "tiny", "eval_every": 0, **options}, output=output)
    start_run(plan, plan.make_folder())
    return output


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, cache_folder: Path) -> dict[str, Path]:
    """A run of each kind: all of the model, adapters on its base, and adapters of the other recipe."""
    root = tmp_path_factory.mktemp("runs")
    data = write_instructions(root / "mine.json", 30)
    text = root / "text.txt"
    text.write_text(
        "\n".join(
            json.loads(line)["output"] for line in write_instructions(root / "x.jsonl", 60).read_text().splitlines()
        )
    )
    shared = {"cache": str(cache_folder), "batch_size": 2, "sequence_length": 64}
    full = trained("gpt2", root / "full", data=str(data), steps=4, save_every=2, **shared)
    lora = {"adapter": "lora", "learning_rate": 0.02, "steps": 4, "save_every": 2, **shared}
    return {
        "full": full,
        "lora": trained("gpt2", root / "lora", data=str(data), **{**lora, "model": str(full / "model")}),
        "random": trained("gpt2", root / "random", data=str(data), **lora),
        "gemini": trained(
            "gpt2",
            root / "gemini",
            data=str(data),
            plugin="gemini",
            offload_optim_frac=0.5,
            offload_param_frac=1.0,
            **lora,
        ),
        "opt": trained("opt", root / "opt", data=str(text), **{**lora, "sequence_length": 16}),
        "qlora": trained(
            "gpt2", root / "qlora", data=str(data), **{**lora, "adapter": "qlora4", "model": str(full / "model")}
        ),
        "ids": trained("gpt2", root / "ids", data="random", steps=1, save_every=0, batch_size=1, sequence_length=8),
    }


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_a_run_leaves_a_model_or_an_adapter_and_says_its_size(runs: dict[str, Path]) -> None:
    assert (runs["full"] / "model").is_dir()
    assert not (runs["full"] / "adapter").exists()
    assert not (runs["lora"] / "model").exists()
    summary = json.loads((runs["lora"] / "summary.json").read_text())
    file = runs["lora"] / "adapter" / "adapter_model.safetensors"
    assert (summary["adapter_path"], summary["adapter_bytes"]) == ("adapter", file.stat().st_size)
    assert summary["trained_parameters"] == 8192 == sum(t.numel() for t in load_file(file).values())
    assert summary["parameters"] > 500_000
    assert summary["memory_before"]["host_bytes"] > 0
    assert summary["memory_after"]["host_bytes"] > 0
    full = json.loads((runs["full"] / "summary.json").read_text())
    assert full["trained_parameters"] == full["parameters"] == summary["parameters"] - 8192
    assert "adapter_bytes" not in full


def test_peft_loads_an_adapter_on_its_base(runs: dict[str, Path]) -> None:
    base = AutoModelForCausalLM.from_pretrained(runs["full"] / "model")
    before = logits_of(base)
    config = peft.PeftConfig.from_pretrained(str(runs["lora"] / "adapter"))
    assert config.base_model_name_or_path == str(runs["full"] / "model")
    model = peft.PeftModel.from_pretrained(base, str(runs["lora"] / "adapter"))
    after = logits_of(model)
    assert float((after - before).abs().max()) > 1e-3
    torch.testing.assert_close(after, logits_of(load_language_model(runs["lora"], CPU).model), rtol=1e-4, atol=1e-5)
    assert AutoTokenizer.from_pretrained(runs["lora"] / "adapter").eos_token == "<|endoftext|>"


def test_the_plugin_is_not_to_be_seen_in_an_adapter(runs: dict[str, Path]) -> None:
    plain, chunks = (load_file(runs[name] / "adapter" / "adapter_model.safetensors") for name in ("random", "gemini"))
    assert plain.keys() == chunks.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(chunks[name], tensor, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["lora", "random", "gemini", "opt", "qlora"])
def test_a_merged_model_is_one_like_any_other(runs: dict[str, Path], tmp_path: Path, name: str) -> None:
    said = export_checkpoint(runs[name], tmp_path / "whole", merge=True)
    assert said == "the model with its adapter merged of step 4"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert not any("lora" in key for key in model.state_dict())
    torch.testing.assert_close(
        logits_of(model), logits_of(load_language_model(runs[name], CPU).model), rtol=1e-4, atol=1e-5
    )
    assert len(AutoTokenizer.from_pretrained(tmp_path / "whole")) > 256


def test_the_newest_checkpoint_is_what_the_run_left(runs: dict[str, Path], tmp_path: Path) -> None:
    assert export_checkpoint(runs["full"], tmp_path / "model", merge=False) == "the model of step 4"
    for name in ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "model" / name).read_bytes() == (runs["full"] / "model" / name).read_bytes(), name
    for run in ("lora", "gemini"):
        assert export_checkpoint(runs[run], tmp_path / run, merge=False) == "the adapter of step 4"
        for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json"):
            assert (tmp_path / run / name).read_bytes() == (runs[run] / "adapter" / name).read_bytes(), name
    assert export_checkpoint(runs["full"], tmp_path / "early", merge=False, step=2) == "the model of step 2"
    assert (tmp_path / "early" / "model.safetensors").read_bytes() != (
        runs["full"] / "model" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("name", "options", "kind", "said"),
    [
        ("full", {"merge": True}, ConfigError, "has no adapter, so there is nothing to merge"),
        ("full", {"merge": False, "step": 3}, CheckpointError, "no checkpoint of step 3 .* there are: 2, 4"),
        ("ids", {"merge": False}, CheckpointError, "no whole checkpoint"),
        ("nowhere", {"merge": False}, RunFolderError, "no such folder"),
    ],
)
def test_what_cannot_be_exported_is_said(
    runs: dict[str, Path], tmp_path: Path, name: str, options: dict[str, Any], kind: type[AlbireoError], said: str
) -> None:
    with pytest.raises(kind, match=said):
        export_checkpoint(runs.get(name, tmp_path / "nowhere"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_there_is_not_written_over(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        export_checkpoint(runs["full"], tmp_path, merge=False)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["full", "lora", "random", "gemini"])
def test_an_answer_is_the_models_likeliest(runs: dict[str, Path], name: str) -> None:
    loaded = load_language_model(runs[name], CPU)
    prompt = prompt_for("gpt2", prompt=None, instruction="Say star.", input_text=None)
    answer = generate(loaded, prompt, GenerationOptions(max_new_tokens=5))
    (ids,) = loaded.tokenizer.encode_batch([prompt])
    expected: list[int] = []
    with torch.no_grad():
        while len(expected) < 5:
            token = int(loaded.model(torch.tensor([[*ids, *expected]])).logits[0, -1].argmax())
            if token == loaded.tokenizer.eos_id:
                break
            expected.append(token)
    assert answer == loaded.tokenizer.decode(expected)
    assert not loaded.note


def test_draws_hang_on_their_seed_alone(runs: dict[str, Path]) -> None:
    loaded = load_language_model(runs["opt"], CPU)
    state = torch.get_rng_state()

    def drawn(seed: int, **more: Any) -> str:
        return generate(loaded, "the star", GenerationOptions(12, temperature=1.5, seed=seed, **more))

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(4)}) > 1
    assert len({drawn(seed, top_k=1) for seed in range(3)}) == 1
    assert len({drawn(seed, top_p=1e-6) for seed in range(3)}) == 1
    assert torch.equal(torch.get_rng_state(), state)


def test_a_run_that_is_not_at_its_end_answers_from_its_checkpoint(runs: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(runs["lora"], tmp_path / "run"))
    expected = logits_of(load_language_model(folder, CPU).model)
    shutil.rmtree(folder / "adapter")
    loaded = load_language_model(folder, CPU)
    torch.testing.assert_close(logits_of(loaded.model), expected, rtol=1e-5, atol=1e-6)
    assert loaded.note == "the run has not come to its end: this is its checkpoint of step 4"
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(RunFolderError, match="has no model yet: go on with it by albireo train gpt2 --resume"):
        load_language_model(folder, CPU)


def test_random_ids_are_no_text(runs: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="trained on random ids"):
        load_language_model(runs["ids"], CPU)


def test_what_does_not_fit_is_said(runs: dict[str, Path]) -> None:
    loaded = load_language_model(runs["full"], CPU)
    with pytest.raises(ConfigError, match=r"leaves 0 for the answer: give a shorter text$"):
        generate(loaded, "star " * 1100, GenerationOptions())
    with pytest.raises(ConfigError, match="or fewer --max-new-tokens"):
        generate(loaded, "star", GenerationOptions(max_new_tokens=1024))


@pytest.mark.parametrize(
    ("recipe", "prompt", "instruction", "input_text", "said"),
    [
        ("gpt2", None, None, None, "give either --instruction"),
        ("gpt2", "a", "b", None, "give either --instruction"),
        ("gpt2", "a", None, "b", "--input goes with --instruction"),
        ("gpt2", " ", None, None, "--prompt is empty"),
        ("gpt2", None, " ", None, "--instruction is empty"),
        ("opt", None, "b", None, "trained on text, not on instructions: give --prompt"),
    ],
)
def test_a_prompt_is_one_thing(
    recipe: str, prompt: str | None, instruction: str | None, input_text: str | None, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        prompt_for(recipe, prompt=prompt, instruction=instruction, input_text=input_text)


def test_prompts() -> None:
    assert prompt_for("opt", prompt="Once", instruction=None, input_text=None) == "Once"
    assert "### Input:\nb\n" in prompt_for("gpt2", prompt=None, instruction="a", input_text="b")


@pytest.mark.parametrize("option", [{"top_k": 3}, {"top_p": 0.5}, {"seed": 1}])
def test_options_of_drawing_need_a_temperature(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="give --temperature, or leave"):
        GenerationOptions(**option)
    GenerationOptions(temperature=0.5, **option)
