"""`albireo classify --run RUN PICTURE...`: what a trained model takes pictures for."""

from __future__ import annotations

import json

import click

from albireo.cli.options import SectionedCommand
from albireo.config import user_path
from albireo.errors import RunFolderError

__all__ = ["classify"]

_EPILOG = """
Examples:
  albireo classify --run runs/mine a.jpg b.png
  albireo classify --run runs/mine holiday/*.jpg --top 3 --json found.json

A line a picture goes to standard output: its path, the likeliest class, and how likely it is.
"""


@click.command("classify", cls=SectionedCommand, epilog=_EPILOG)
@click.option("--run", metavar="RUN", required=True, help="The folder of a run of the recipe vit.")
@click.option(
    "--top", type=click.IntRange(min=1), default=1, metavar="N", help="So many likeliest classes. Default: 1."
)
@click.option("--json", "json_file", metavar="FILE", help="Write all probabilities to this file.")
@click.argument("pictures", nargs=-1, required=True, metavar="PICTURE...")
def classify(run: str, top: int, json_file: str | None, pictures: tuple[str, ...]) -> None:
    """Say what a trained model takes pictures for."""
    place = user_path("--run", run)
    paths = [user_path("PICTURE", picture) for picture in pictures]
    target = None if json_file is None else user_path("--json", json_file)
    from albireo.distributed import join_world
    from albireo.training.classifying import classify as look_at
    from albireo.training.classifying import load_picture_model, read_pictures

    read = read_pictures(paths)
    trained = load_picture_model(place, join_world(single=True).device)
    if trained.note:
        click.echo(f"note: {trained.note}", err=True)
    found = look_at(trained, read)
    for path, shares in zip(paths, found, strict=True):
        likeliest = list(shares.items())[:top]
        click.echo(f"{path}  " + "  ".join(f"{name} {100 * share:.1f}%" for name, share in likeliest))
    if target is not None:
        rows = [{"picture": str(path), "classes": shares} for path, shares in zip(paths, found, strict=True)]
        try:
            target.write_text(json.dumps(rows, indent=2) + "\n")
        except OSError as error:
            raise RunFolderError(f"cannot write {target}: {error.strerror or error}") from error
