"""Wrong input: exit code 2, one line on standard error that says what to do, and nothing half-written."""

import json
import os
import random
import re
import shlex
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch
from huggingface_hub import try_to_load_from_cache
from train_server import Ended, TrainServer

from albireo.data import train_tokenizer
from albireo.device import read_host_memory
from albireo.training.metrics import read_metrics
from albireo.training.plan import plan_run

ROWS = 272
POSITIONS = 64
SHORT = "--sequence-length 16 --batch-size 4"


@dataclass(frozen=True)
class Wrong:
    """A wrong command line.

    Attributes:
        name: of the case.
        arguments: what follows `albireo train opt`; a name in braces is one of `places`.
        words: what the line must say.
    """

    name: str
    arguments: str
    words: tuple[str, ...]


def said(ended: Ended, *words: str, late: bool = False) -> str:
    """Check how a refusal looks, and return its line."""
    assert ended.code == 2, ended
    assert "Traceback" not in ended.errors
    assert ended.output == ""
    lines = ended.errors.splitlines()
    assert [line for line in lines if line.startswith("albireo: ")] == lines[-1:], ended.errors
    assert late or len(lines) == 1, ended.errors
    for word in words:
        assert word in lines[-1]
    return lines[-1]


def content(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder: files with their bytes, and folders."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def write_text(path: Path, lines: int) -> Path:
    generator = random.Random(3)
    words = ["star", "double", "light", "night", "sees", "two", "one", "and", "of", "the", "albireo", "swan"]
    path.write_text("\n".join(" ".join(generator.choices(words, k=8)) + "." for _ in range(lines)))
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", 80)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, text: Path, tokenizer: Path, model: Path) -> dict[str, Path]:
    """What the command lines of the table name: wrong files and folders of all kinds."""
    root = tmp_path_factory.mktemp("places")
    made = {"text": text, "tokenizer": tokenizer, "model": model, "nowhere": root / "nowhere"}

    def file(name: str, data: str | bytes) -> None:
        made[name.partition(".")[0]] = root / name
        (root / name).write_bytes(data.encode() if isinstance(data, str) else data)

    def folder(name: str, files: Mapping[str, str | bytes]) -> None:
        made[name] = root / name
        made[name].mkdir()
        for inside, data in files.items():
            (made[name] / inside).write_bytes(data.encode() if isinstance(data, str) else data)

    def model_with(name: str, change: Callable[[Path], object]) -> None:
        made[name] = Path(shutil.copytree(model, root / name))
        change(made[name])

    def configured(**changes: Any) -> Callable[[Path], object]:
        options = json.loads((model / "config.json").read_text())
        return lambda path: (path / "config.json").write_text(json.dumps(options | changes))

    file("latin.txt", "caf\xe9 au lait\n".encode("latin-1") * 100)
    file("empty.txt", "")
    file("blank.txt", " \n\n\t\n" * 50)
    file("short.txt", "one double star\n")
    file("malformed.jsonl", '{"text": "one"}\n{"text": "two"}\n{"text": \n')
    file("fieldless.jsonl", '{"text": "one"}\n{"body": "two"}\n')
    file("number.jsonl", '{"text": 3}\n')
    file("garbage", b"\x93NUMPY\x00\xff")
    folder("nothing", {})
    folder("pictures", {"a.png": b"\x89PNG\r\n\x00\x00", "b.png": b"\x89PNG\r\n\x00\x00"})
    folder("tokenizer_malformed", {"tokenizer.json": '{"version": '})
    folder("tokenizer_half", {"vocab.json": '{"a": 0}'})
    folder("no_run", {"notes.txt": "mine"})
    made["tokenizer_small"] = root / "tokenizer_small"
    train_tokenizer(text.read_text().splitlines(keepends=True), ROWS).save(made["tokenizer_small"])
    model_with("model_unconfigured", lambda path: (path / "config.json").unlink())
    model_with("model_llama", configured(model_type="llama"))
    model_with("model_untyped", lambda path: (path / "config.json").write_text('{"recipe": "opt"}'))
    model_with("model_malformed", lambda path: (path / "config.json").write_text('{"model_type": "opt",'))
    model_with("model_wordy", configured(hidden_size="wide"))
    model_with("model_indivisible", configured(num_attention_heads=3))
    model_with("model_wider", configured(hidden_size=64, word_embed_proj_dim=64))
    model_with("model_cut", lambda path: cut(path / "model.safetensors"))
    model_with("model_weightless", lambda path: (path / "model.safetensors").unlink())
    model_with("model_pickled", lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"))
    return made


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of OPT's kind as transformers writes it, very small, without a tokenizer."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=ROWS, max_position_embeddings=POSITIONS, pad_token_id=1, bos_token_id=2, eos_token_id=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model") / "small"
    OPTForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A tokenizer with more ids than the model has rows."""
    folder = tmp_path_factory.mktemp("tokenizer")
    trained = train_tokenizer(text.read_text().splitlines(keepends=True), 400)
    assert trained.vocab_size > ROWS
    trained.save(folder)
    return folder


def filled(arguments: str, places: Mapping[str, Path]) -> list[str]:
    return [word.format(**places) for word in shlex.split(arguments)]


FLAGS = [
    Wrong("unknown flag", "--bacth-size 4", ("--bacth-size", "--batch-size", "train opt --help")),
    Wrong("flag without its value", "--steps", ("--steps", "requires an argument")),
    Wrong("word too many", "tiny", ("unexpected", "tiny", "train opt --help")),
    Wrong("batch of none", "--batch-size 0", ("--batch-size must be at least 1, not 0",)),
    Wrong("batch of all", "--batch-size 99999999999", ("--batch-size must be at most 1,000,000,000",)),
    Wrong("micro-batches without end", "--accumulate 99999999", ("--accumulate must be at most 1,000,000",)),
    Wrong("negative learning rate", "--learning-rate -1e-3", ("--learning-rate must be at least 0, not -0.001",)),
    Wrong("learning rate not a number", "--learning-rate nan", ("--learning-rate takes a finite number, not nan",)),
    Wrong("learning rate without end", "--learning-rate 1e999", ("--learning-rate takes a finite number, not inf",)),
    Wrong("no step", "--steps 0", ("--steps must be at least 1, not 0",)),
    Wrong("steps in words", "--steps abc", ("--steps", "'abc' is not a valid integer")),
    Wrong("part of a step", "--steps 2.5", ("--steps", "'2.5' is not a valid integer")),
    Wrong("epochs beyond counting", "--epochs 1e308", ("--epochs must be at most 1,000,000",)),
    Wrong("unknown precision", "--precision int8", ("--precision", "int8", "fp32", "fp16", "bf16")),
    Wrong("unknown plugin", "--plugin gemnii", ("--plugin", "gemnii", "torch_ddp")),
    Wrong("unknown schedule", "--schedule step", ("--schedule", "linear", "cosine", "constant")),
    Wrong("no rank", "--gpus 0", ("--gpus must be at least 1, not 0",)),
    Wrong("more ranks than any machine", "--gpus 5000", ("--gpus must be at most 64, not 5000",)),
    Wrong("warm-up longer than the run", "--warmup 50 --steps 10", ("--warmup 50", "run of 10 steps", "--steps")),
    Wrong("nothing held out", "--holdout 0", ("--holdout must be more than 0, not 0.0",)),
    Wrong("nearly all held out", "--holdout 0.9", ("--holdout must be at most 0.5, not 0.9",)),
    Wrong("block of one token", "--sequence-length 1", ("--sequence-length must be at least 2",)),
    Wrong("block too long", "--sequence-length 4096", ("--sequence-length 4096", "2048 positions", "use 2048 or less")),
    Wrong("seed below zero", "--seed -1", ("--seed must be at least 0",)),
    Wrong("stage of weights", "--plugin low_level_zero --zero-stage 3", ("--zero-stage must be at most 2, not 3",)),
    Wrong("no stage", "--plugin low_level_zero --zero-stage 0", ("--zero-stage must be at least 1, not 0",)),
    Wrong("stage of whole copies", "--zero-stage 1", ("--zero-stage is for --plugin low_level_zero", "leave it out")),
    Wrong("stage of torch's own", "--plugin torch_fsdp --zero-stage 2", ("--plugin torch_fsdp has no stages",)),
    Wrong("nothing to offload", "--cpu-offload", ("--cpu-offload", "low_level_zero or torch_fsdp", "leave it out")),
    Wrong(
        "fp16 that is bf16",
        "--plugin torch_ddp_fp16 --precision bf16",
        ("torch_ddp_fp16", "not in bf16", "--precision fp16"),
    ),
    Wrong(
        "share of another", "--offload-optim-frac 0.5", ("--offload-optim-frac is for --plugin gemini", "leave it out")
    ),
    Wrong("placement of another", "--plugin torch_fsdp --placement auto", ("--placement is for --plugin gemini",)),
    Wrong("no prefetch of another", "--plugin torch_fsdp --prefetch 0", ("--prefetch is for --plugin gemini",)),
    Wrong("no share of another", "--offload-param-frac 0", ("--offload-param-frac is for --plugin gemini",)),
    Wrong("room on the host of another", "--host-cap 4", ("--host-cap is for --plugin gemini", "leave it out")),
    Wrong("stream of another", "--stream-optim-frac 1", ("--stream-optim-frac is for --plugin gemini", "leave it out")),
    Wrong(
        "stream of more than all", "--plugin gemini --stream-optim-frac 1.5", ("--stream-optim-frac must be at most 1",)
    ),
    Wrong("trace of another", "--trace", ("--trace is for --plugin gemini", "leave it out")),
    Wrong("too short to be traced", "--plugin gemini --trace --steps 3", ("--trace", "step 4", "3 to do", "--steps")),
    Wrong("stage of chunks", "--plugin gemini --zero-stage 2", ("--plugin gemini has no stages", "leave it out")),
    Wrong("offload of chunks", "--plugin gemini --cpu-offload", ("--cpu-offload", "leave it out")),
    Wrong(
        "share that the cap decides",
        "--plugin gemini --placement auto --offload-optim-frac 0.5",
        ("--offload-optim-frac is for --placement static", "leave one of them out"),
    ),
    Wrong("more than all", "--plugin gemini --offload-optim-frac 1.5", ("--offload-optim-frac must be at most 1",)),
    Wrong("less than none", "--plugin gemini --shard-param-frac -0.1", ("--shard-param-frac must be at least 0",)),
    Wrong("unknown placement", "--plugin gemini --placement best", ("--placement", "best", "auto", "static")),
    Wrong("prefetch backwards", "--plugin gemini --prefetch -1", ("--prefetch must be at least 0, not -1",)),
    Wrong("negative room on the host", "--plugin gemini --host-cap -1", ("--host-cap must be at least 0",)),
    Wrong("ids need no tokenizer", "--data random --tokenizer {tokenizer}", ("--data random", "--tokenizer")),
    Wrong("made-up text has no fields", "--text-field body", ("--data synthetic", "--text-field body", "leave it out")),
]

MODELS = [
    Wrong("unknown model", "--model 7b", ("no model '7b'", "6.7b", "Hugging Face folder", "hub id")),
    Wrong("variable that is not set", "--model ''", ("--model is empty", "leave --model out")),
    Wrong("nobody's home", "--model ~nobody-of-that-name/opt", ("--model", "no home folder")),
    Wrong("name too long", f"--model {'opt' * 100}", ("--model", "File name too long")),
    Wrong("pretrained tiny", "--init pretrained", ("tiny has no pretrained weights", "leave --init out")),
    Wrong("unpublished weights", "--model 175b", ("175b has no published weights", "--init random")),
    Wrong("unknown hub id off line", "--model nobody/opt-none", ("nobody/opt-none", "cannot be reached", "local folder")),
    Wrong("folder without config", "--model {model_unconfigured}", ("model_unconfigured holds no config.json",)),
    Wrong("file for a model", "--model {text}", ("is a file", "Hugging Face folder")),
    Wrong("another type of model", "--model {model_llama}", ("'llama' are not supported", "opt")),
    Wrong("run for a model", "--model {model_untyped}", ("model_untyped/config.json has no model_type",)),
    Wrong("config cut short", "--model {model_malformed}", ("model_malformed/config.json", "JSON", "line 1")),
    Wrong("word for a width", f"--model {{model_wordy}} {SHORT}", ("model_wordy/config.json", "hidden_size", "wide")),
    Wrong("heads that do not fit", f"--model {{model_indivisible}} {SHORT}", ("model_indivisible", "num_heads")),
    Wrong("short positions", "--model {model}", ("--sequence-length 1024", "64 positions", "use 64 or less")),
    Wrong(
        "weights cut short", f"--model {{model_cut}} --tokenizer {{tokenizer_small}} {SHORT}",
        ("model_cut/model.safetensors is damaged or cut",),
    ),
    Wrong(
        "weights of another shape", f"--model {{model_wider}} --tokenizer {{tokenizer_small}} {SHORT}",
        ("model_wider/model.safetensors", "of shape", "the model of its config.json needs"),
    ),
    Wrong("no weights", f"--model {{model_weightless}} {SHORT}", ("holds no weights", "--init random")),
    Wrong("pickled weights", f"--model {{model_pickled}} {SHORT}", ("pickled weights only", "safetensors")),
    Wrong("no tokenizer beside", f"--model {{model}} {SHORT}", ("holds no tokenizer", "tokenizer.json", "--tokenizer")),
]  # fmt: skip

TOKENIZERS = [
    Wrong("no folder", "--tokenizer {nowhere}", ("no tokenizer folder", "nowhere", "tokenizer.json")),
    Wrong("empty folder", "--tokenizer {nothing}", ("nothing", "tokenizer.json", "vocab.json and merges.txt")),
    Wrong("malformed", "--tokenizer {tokenizer_malformed}", ("tokenizer_malformed/tokenizer.json", "not a tokenizer")),
    Wrong("half of it", "--tokenizer {tokenizer_half}", ("merges.txt is missing",)),
    Wrong("variable that is not set", "--tokenizer ''", ("--tokenizer is empty",)),
    Wrong(
        "more ids than rows", f"--model {{model}} --tokenizer {{tokenizer}} --data {{text}} {SHORT}",
        ("the tokenizer has", "ids", f"{ROWS} rows", "--init random"),
    ),
]  # fmt: skip

DATA = [
    Wrong("no file", "--data {nowhere}/a.txt", ("no such file or folder", "nowhere/a.txt")),
    Wrong("no file, before a model is fetched", "--model 125m --data {nowhere}/a.txt", ("no such file or folder",)),
    Wrong("no such name", "--data sinthetic", ("'sinthetic'", "owner/name/config")),
    Wrong("hub off line", "--data wikitext/wikitext-2-raw-v1", ("hub cannot be reached", "local text file", "synthetic")),
    Wrong("variable that is not set", "--data ''", ("--data is empty",)),
    Wrong("empty folder", "--data {nothing}", ("nothing holds no text files", ".txt or .jsonl")),
    Wrong("folder of pictures", "--data {pictures}", ("pictures holds no text files", "2 files there are not text")),
    Wrong("device", "--data /dev/null", ("/dev/null is neither a file nor a folder",)),
    Wrong("not UTF-8", "--data {latin}", ("latin.txt is not UTF-8", "0xe9 at offset 3", "convert")),
    Wrong("no text", "--data {garbage}", ("garbage", "UTF-8")),
    Wrong("empty file", "--data {empty}", ("empty.txt", "0 bytes", "with text in it")),
    Wrong("white space", "--data {blank}", ("blank.txt", "only white space")),
    Wrong("too short", "--data {short}", ("short.txt has", "two blocks", "256", "--sequence-length of at most")),
    Wrong("malformed JSON lines", "--data {malformed}", ("malformed.jsonl line 3 is not JSON", "at character 11")),
    Wrong("lines without the field", "--data {fieldless}", ("fieldless.jsonl line 2", '"text"', "body", "--text-field")),
    Wrong("field that is no text", "--data {number}", ("number.jsonl line 1", '"text"', "a number", "a string")),
    Wrong("cache that is a file", "--data {text} --cache {text}", ("cache folder", "cannot be written", "--cache")),
]  # fmt: skip


@pytest.mark.parametrize("wrong", [*FLAGS, *MODELS, *TOKENIZERS, *DATA], ids=lambda wrong: wrong.name)
def test_a_run_that_cannot_begin_leaves_nothing(
    train_server: TrainServer, places: dict[str, Path], cache_folder: Path, tmp_path: Path, wrong: Wrong
) -> None:
    # The folder first, so that a case may end in a flag without its value; and its parent is not there either.
    cache = [] if "--cache" in wrong.arguments else ["--cache", str(cache_folder)]
    output = ["--output", str(tmp_path / "runs" / "mine")]
    ended = train_server.run(["train", "opt", *output, *cache, *filled(wrong.arguments, places)])
    said(ended, *wrong.words)
    assert content(tmp_path) == {}


@pytest.mark.parametrize(("model", "needed_gb"), [("66b", 979.3), ("175b", 2601.8)])
def test_a_model_that_cannot_fit_is_refused_at_once(
    train_server: TrainServer, tmp_path: Path, model: str, needed_gb: float
) -> None:
    host = read_host_memory()
    if not torch.cuda.is_available() and (host is None or host.total_bytes > needed_gb * 2**30):
        pytest.skip("this machine has the memory for it, or does not say how much it has")
    arguments = ["train", "opt", "--model", model, "--init", "random", "--output", str(tmp_path / "run")]
    said(train_server.run(arguments), f"--model {model}", f"needs {needed_gb} GB", "16 bytes", "smaller --model")
    assert content(tmp_path) == {}


def test_pretrained_weights_off_line_are_not_replaced_by_random_ones(train_server: TrainServer, tmp_path: Path) -> None:
    if isinstance(try_to_load_from_cache("facebook/opt-125m", "config.json"), str):
        pytest.skip("this machine has OPT-125M in its Hugging Face cache, where it needs no hub")
    ended = train_server.run(["train", "opt", "--model", "125m", "--output", str(tmp_path / "run")])
    said(ended, "facebook/opt-125m", "cannot be reached", "--init random", "local folder")
    assert content(tmp_path) == {}


def test_a_cap_on_device_memory_where_there_is_none(train_server: TrainServer, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, whose memory --mem-cap bounds")
    ended = train_server.run(["train", "opt", "--mem-cap", "4", "--output", str(tmp_path / "run")])
    said(ended, "--mem-cap bounds a GPU's memory", "leave --mem-cap out")
    assert content(tmp_path) == {}


@pytest.mark.parametrize(
    ("arguments", "memory"),
    [
        ("--host-cap 0.001", "host"),
        ("--host-cap 0.001 --offload-optim-frac 1", "host"),
        ("--mem-cap 0.001", "device"),
        ("--mem-cap 0.001 --offload-optim-frac 1 --offload-param-frac 1", "device"),
        ("--mem-cap 0.001 --placement static", "device"),
    ],
)
def test_a_cap_that_cannot_do_is_refused_with_the_least_that_does(
    train_server: TrainServer, tmp_path: Path, cache_folder: Path, text: Path, arguments: str, memory: str
) -> None:
    if torch.cuda.is_available():
        pytest.skip("on a GPU the caps are those of the GPU, which tests/gpu has")
    shared = f"--plugin gemini --data {text} --cache {cache_folder} --steps 2 --eval-every 0 --save-every 0 {SHORT}"
    flags = ["train", "opt", *shlex.split(shared), *shlex.split(arguments)]
    line = said(
        train_server.run([*flags, "--output", str(tmp_path / "run")]), f"of {memory} memory", "raise --", late=True
    )
    least = re.search(rf"at least ([\d.]+) GB of {memory} memory, and there are 0\.00 GB", line)
    assert least is not None, line
    assert content(tmp_path) == {}
    cap = "--host-cap" if memory == "host" else "--mem-cap"
    ended = train_server.run([*flags, cap, least[1], "--output", str(tmp_path / "run")])
    assert ended.code == 0, ended.errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("tran", ("'tran'", "train", "bench", "albireo --help")),
        ("train vti", ("'vti'", "opt", "albireo train --help")),
        ("train opt --resume ''", ("--resume is empty",)),
        ("train opt --output ''", ("--output is empty",)),
        ("train opt --config ''", ("--config is empty",)),
    ],
)
def test_wrong_commands(train_server: TrainServer, arguments: str, words: tuple[str, ...]) -> None:
    said(train_server.run(shlex.split(arguments)), *words)


CONFIG_FILES = [
    ("not JSON", '{"optimizer": {"batch_size": }}', ("mine.json is not JSON", "line 1 column 30")),
    ("no object", "[1, 2]", ("mine.json must hold a JSON object", "--print-config")),
    ("unknown section", '{"optimiser": {}}', ("unknown section 'optimiser'", "'optimizer'")),
    ("section that is none", '{"optimizer": 3}', ("'optimizer' must be an object, not 3",)),
    ("unknown key", '{"optimizer": {"batchsize": 4}}', ("unknown key optimizer.batchsize", "'batch_size'")),
    ("word for a number", '{"optimizer": {"batch_size": "8"}}', ("--batch-size takes a whole number, not '8'",)),
    ("number for a switch", '{"plugin": {"tf32": 1}}', ("--tf32 takes true or false, not 1",)),
    ("word that is no choice", '{"plugin": {"precision": "int8"}}', ("--precision is one of fp32, fp16, bf16",)),
    ("empty name", '{"data": {"data": " "}}', ("--data is empty",)),
    ("number beyond floats", '{"optimizer": {"clip": 1' + "0" * 400 + "}}", ("--clip takes a finite number",)),
    ("number beyond reading", '{"schedule": {"steps": 1' + "0" * 5000 + "}}", ("mine.json is not JSON that can be",)),
    ("another recipe", '{"recipe": "vit"}', ("mine.json is for the recipe 'vit'", "'opt'")),
]  # fmt: skip


@pytest.mark.parametrize(("written", "words"), [row[1:] for row in CONFIG_FILES], ids=[row[0] for row in CONFIG_FILES])
def test_wrong_configuration_files(
    train_server: TrainServer, tmp_path: Path, written: str, words: tuple[str, ...]
) -> None:
    (tmp_path / "mine.json").write_text(written)
    output = ["--output", str(tmp_path / "run")]
    said(train_server.run(["train", "opt", "--config", str(tmp_path / "mine.json"), *output]), "mine.json", *words)
    assert content(tmp_path) == {"mine.json": written.encode()}


TOGETHER = [
    ({"plugin": "low_level_zero", "zero_stage": 3}, "", ("mine.json", "--zero-stage must be at most 2, not 3")),
    ({"plugin": "torch_ddp", "zero_stage": 1}, "", ("--zero-stage is for --plugin low_level_zero",)),
    ({"plugin": "torch_ddp", "cpu_offload": True}, "", ("--cpu-offload", "--no-cpu-offload if a file")),
    ({"cpu_offload": True, "plugin": "torch_fsdp"}, "--plugin torch_ddp", ("--cpu-offload", "--no-cpu-offload if a file")),
    (
        {"placement": "auto", "plugin": "gemini", "shard_param_frac": 0.5},
        "",
        ("--shard-param-frac is for --placement static", "leave one of them out"),
    ),
    ({"plugin": "low_level_zero", "prefetch": 2}, "", ("--prefetch is for --plugin gemini", "leave it out")),
    ({"precision": "bf16"}, "--plugin torch_ddp_fp16", ("torch_ddp_fp16", "not in bf16", "--precision fp16")),
]  # fmt: skip


@pytest.mark.parametrize(("written", "flags", "words"), TOGETHER, ids=[f"{row[0]} {row[1]}" for row in TOGETHER])
def test_plugins_of_configuration_files_that_cannot_be(
    train_server: TrainServer, tmp_path: Path, written: dict[str, object], flags: str, words: tuple[str, ...]
) -> None:
    (tmp_path / "mine.json").write_text(json.dumps({"plugin": written}))
    arguments = ["--config", str(tmp_path / "mine.json"), "--output", str(tmp_path / "run"), *shlex.split(flags)]
    said(train_server.run(["train", "opt", *arguments]), *words)
    assert list(content(tmp_path)) == ["mine.json"]


def test_a_configuration_that_is_not_there(train_server: TrainServer, tmp_path: Path) -> None:
    output = ["--output", str(tmp_path / "run")]
    said(train_server.run(["train", "opt", "--config", str(tmp_path / "no.json"), *output]), "no.json", "No such file")
    assert content(tmp_path) == {}


@pytest.mark.parametrize("files", [{}, {"notes.txt": b"mine", "model.bin": b"\0\1"}], ids=["empty", "with files"])
def test_a_folder_that_was_there_before_stays_as_it_was(
    train_server: TrainServer, tmp_path: Path, files: dict[str, bytes]
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    said(train_server.run(["train", "opt", "--data", "/no/such.txt", "--output", str(folder)]), "/no/such.txt")
    assert content(tmp_path) == {"mine": None} | {f"mine/{name}": data for name, data in files.items()}


def test_a_default_folder_leaves_nothing_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = plan_run(recipe="opt", options={}).make_folder()
    assert (tmp_path / folder.path / "config.json").exists()
    folder.discard_if_not_begun()
    assert content(tmp_path) == {}


def test_a_file_where_the_run_would_be(train_server: TrainServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        said(train_server.run(["train", "opt", "--output", str(path)]), "cannot make the run folder", "file is a file")
    assert content(tmp_path) == {"file": b"mine"}


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to the superuser, who runs this")
def test_a_folder_that_cannot_be_written(train_server: TrainServer, tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        said(train_server.run(["train", "opt", "--output", str(tmp_path / "run")]), "run", "Permission denied")
        assert content(tmp_path) == {}
    finally:
        tmp_path.chmod(stat.S_IRWXU)


@pytest.fixture(scope="module")
def finished(
    train_server: TrainServer, text: Path, model: Path, cache_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of four steps with checkpoints at the second and the last."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    flags = f"--model {model} --init random --data {text} --cache {cache_folder} --steps 4 --save-every 2 {SHORT}"
    ended = train_server.run(["train", "opt", "--output", str(folder), *shlex.split(flags)])
    assert ended.code == 0, ended.errors
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of that run, which a test may harm."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_run_is_not_written_over(train_server: TrainServer, run: Path) -> None:
    before = content(run)
    said(train_server.run(["train", "opt", "--output", str(run)]), "already holds a run", f"--resume {run}", "--output")
    assert content(run) == before


def damage_checkpoints(run: Path) -> None:
    for file in run.glob("checkpoints/*/*.safetensors"):
        cut(file)


def write_config(written: str) -> Callable[[Path], object]:
    return lambda run: (run / "config.json").write_text(written)


def nothing(run: Path) -> None:
    """Harm nothing."""


RESUMED = [
    ("folder that is not there", nothing, "--resume {nowhere}", ("no run in", "nowhere", "no such folder")),
    ("folder without a run", nothing, "--resume {no_run}", ("no run in", "no_run", "no config.json")),
    ("file", nothing, "--resume {text}", ("no run in", "it is a file")),
    ("another --output", nothing, "--resume {run} --output {nowhere}", ("--resume", "leave --output out")),
    ("damaged config", write_config('{"model": '), "--resume {run}", ("config.json is damaged at line 1", "JSON")),
    ("config of something else", write_config('{"model_type": "opt"}'), "--resume {run}", ("unknown section",)),
    ("config of another kind", write_config("[]"), "--resume {run}", ("config.json must hold a JSON object",)),
    ("wrong flag", nothing, "--resume {run} --batch-size 0", ("--batch-size must be at least 1",)),
    ("data that is not there", nothing, "--resume {run} --data {nowhere}/a.txt", ("no such file", "nowhere/a.txt")),
    ("sequence length", nothing, "--resume {run} --sequence-length 8", ("--sequence-length 8", "begun with 16")),
    ("held-out share", nothing, "--resume {run} --holdout 0.3", ("--holdout 0.3", "begun with 0.05", "new run")),
    ("fewer steps than done", nothing, "--resume {run} --steps 3", ("done 4 steps", "at 3", "more --steps")),
    ("other data", nothing, "--resume {run} --data {other}", ("another data: text ", "begin a new run")),
    ("other tokenizer", nothing, "--resume {run} --tokenizer {tokenizer}", ("another data: text", f"of {ROWS} tokens", "new run")),
    ("other model", nothing, "--resume {run} --model {model_wider}", ("step-00000004", "another model")),
    ("other rows", nothing, "--resume {run} --model tiny", ("another data: text", "tokenizer", "new run")),
    ("damaged checkpoints", damage_checkpoints, "--resume {run}", ("no checkpoint in", "whole", "--output")),
]  # fmt: skip


@pytest.mark.parametrize(("harm", "arguments", "words"), [row[1:] for row in RESUMED], ids=[row[0] for row in RESUMED])
def test_a_run_that_is_resumed_wrongly_is_unchanged(
    train_server: TrainServer,
    places: dict[str, Path],
    run: Path,
    tmp_path: Path,
    harm: Callable[[Path], object],
    arguments: str,
    words: tuple[str, ...],
) -> None:
    harm(run)
    before = content(run)
    other = write_text(tmp_path / "other.txt", 30)
    ended = train_server.run(["train", "opt", *filled(arguments, {**places, "run": run, "other": other})])
    # What a checkpoint goes with is known when it is loaded, and by then the run has said what it trains on.
    late = (
        any(word in arguments for word in ("--steps", "{other}", "--tokenizer", "--model"))
        or arguments == "--resume {run}"
    )
    said(ended, *words, late=late)
    assert content(run) == before


def test_another_size_of_model_is_refused_before_it_is_built(
    train_server: TrainServer, text: Path, cache_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    flags = ["--steps", "1", "--data", str(text), "--cache", str(cache_folder), *shlex.split(SHORT)]
    assert train_server.run(["train", "opt", "--output", str(run), *flags]).code == 0
    before = content(run)
    ended = train_server.run(["train", "opt", "--resume", str(run), "--model", "125m", "--init", "random"])
    said(ended, "--model 125m", "begun with tiny", "leave --model out")
    assert content(run) == before


def test_one_damaged_checkpoint_is_said_and_passed_over(train_server: TrainServer, run: Path) -> None:
    for file in run.glob("checkpoints/step-00000004/*.safetensors"):
        cut(file)
    ended = train_server.run(["train", "opt", "--resume", str(run)])
    assert ended.code == 0, ended.errors
    assert "warning: " in ended.errors
    assert "going on from the checkpoint of step 2" in ended.errors
    assert [row.step for row in read_metrics(run / "metrics.jsonl")[0]] == [1, 2, 3, 4]


def test_a_second_writer_is_kept_out(train_server: TrainServer, run: Path) -> None:
    before = content(run)
    with filelock.FileLock(run / "run.lock"):
        said(train_server.run(["train", "opt", "--resume", str(run), "--steps", "9"]), "another process", str(run))
    assert content(run) == before
