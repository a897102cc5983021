"""The text of a run: read, tokenized and packed, or random tokens where only speed is asked for."""

from __future__ import annotations

from pathlib import Path

from albireo.config import RunConfig, TextConfig
from albireo.data import TextOptions, TextTokenizer, check_source, open_source, prepare_text
from albireo.training.language_data import LanguageData, ProgressLog, Stages, random_data
from albireo.training.progress import Progress

__all__ = ["check_run_data", "load_run_data"]


def check_run_data(config: RunConfig) -> None:
    """Say at once what is wrong with a path, or with the form of a name on the hub; nothing is read or fetched.

    Args:
        config: a resolved configuration.

    Raises:
        DataError: there is nothing of that name.
    """
    options = _options(config)
    if options.data != "random":
        check_source(options.data, text_field=options.text_field)


def load_run_data(
    config: RunConfig, *, tokenizer: TextTokenizer | None, vocab_size: int, progress: Progress
) -> LanguageData:
    """Prepare what the configuration names.

    Args:
        config: a resolved configuration.
        tokenizer: what the text is encoded with, or None to train one on it.
        vocab_size: entries of a tokenizer that is trained, and of random ids.
        progress: shows how far it is.

    Raises:
        DataError: the text cannot be read, or is too short.
        ModelError: the tokenizer cannot be trained.
    """
    data = _options(config)
    length = data.sequence_length or 2
    if data.data == "random":
        return random_data(vocab_size, length, config.schedule.seed)
    source = open_source(data.data, text_field=data.text_field)
    options = TextOptions(
        sequence_length=length,
        vocab_size=vocab_size,
        holdout_share=data.holdout,
        cache_folder=Path(data.cache) if data.cache else None,
    )
    with Stages(progress) as stages:
        text = prepare_text(source, tokenizer, options, log=ProgressLog(progress), progress=stages.told)
    # In words: where a run cannot go on, the user sees which part is another. Nothing in it says where the text lies.
    fingerprint = (
        f"text {source.fingerprint()[:12]}, tokenizer {text.tokenizer.fingerprint()[:12]} of "
        f"{text.tokenizer.vocab_size} tokens, blocks of {length}, {len(text.train)} to train on and "
        f"{len(text.held_out)} held out"
    )
    return LanguageData(text.train, text.held_out, fingerprint, text.lines, text.tokenizer)


def _options(config: RunConfig) -> TextConfig:
    if not isinstance(config.data, TextConfig):
        raise TypeError(f"expected the configuration of the recipe opt, not of {config.recipe}")
    return config.data
