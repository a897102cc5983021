"""The command `albireo`, and the one place where an error becomes a line and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from albireo import __version__
from albireo.cli.bench import bench
from albireo.cli.check import check
from albireo.cli.checkpoint import checkpoint
from albireo.cli.classify import classify
from albireo.cli.generate import generate
from albireo.cli.options import NamedGroup
from albireo.cli.run import run
from albireo.cli.trace import trace
from albireo.cli.train import train
from albireo.cli.verify import verify
from albireo.errors import AlbireoError

__all__ = ["cli", "main"]

# Either name is torch's; every version reads the first.
_ALLOCATOR_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")

_HELP = """Albireo trains a large model on little hardware: device memory and host memory as one.

Begin with  albireo train opt  : it trains a small model on a text that it makes itself, within a minute or two on a
laptop, and shows where the picture of its loss is. Then give it a text of yours:

\b
  albireo train opt --data my-text.txt
  albireo train opt --model 125m --data wikitext/wikitext-2-raw-v1

Or train a model on instructions, and let it answer:

\b
  albireo train gpt2 --data alpaca_data.json --adapter lora
  albireo generate --run runs/mine --instruction "Name three colours."

Or on pictures, and let it tell them apart:

\b
  albireo train vit --data pictures/
  albireo classify --run runs/mine a.jpg b.png

Every verb has --help. A wrong value is one line and exit code 2.
"""


@click.group(
    cls=NamedGroup, help=_HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="albireo")
def cli() -> None:
    """Hold the verbs together."""


cli.add_command(train)
cli.add_command(verify)
cli.add_command(bench)
cli.add_command(generate)
cli.add_command(classify)
cli.add_command(checkpoint)
cli.add_command(run)
cli.add_command(check)
cli.add_command(trace)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code.

    0: done; 1: a check said no; 2: the input is wrong or memory cannot suffice; 130: stopped by the user, and saved.
    Anything else is a bug and comes with its traceback.

    Args:
        arguments: the words after `albireo`; those of the process if None.
    """
    if arguments is None and not any(name in os.environ for name in _ALLOCATOR_SETTINGS):
        # A process of our own, before torch reads it: the allocator maps pages where they are wanted, so that little of a
        # cap is lost in pieces that fit nothing.
        os.environ[_ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"
    try:
        code = cli.main(args=arguments, prog_name="albireo", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        # Not on standard output: that is for results, and the exit code says that this is none.
        click.echo(error.ctx.get_help(), err=True)
        code = 2
    except click.ClickException as error:
        _say(_usage(error))
        code = 2
    except click.Abort:
        _say("stopped")
        code = 130
    except KeyboardInterrupt:
        _say("stopped")
        code = 130
    except AlbireoError as error:
        _say(str(error))
        code = error.exit_code
    except BrokenPipeError:
        # Whoever read the output has gone; there is nobody to tell.
        code = 141
    except Exception:  # noqa: BLE001  whatever is left is a bug, and shows where it is
        sys.excepthook(*sys.exc_info())
        code = 70
    sys.exit(code if isinstance(code, int) else 0)


def _usage(error: click.ClickException) -> str:
    """Return click's message on one line, and where to look."""
    message = " ".join(error.format_message().split()).rstrip(".")
    context = error.ctx if isinstance(error, click.UsageError) else None
    return message if context is None else f"{message}; see {context.command_path} --help"


def _say(message: str) -> None:
    print(f"albireo: {message}", file=sys.stderr)  # noqa: T201  the one line of an error
