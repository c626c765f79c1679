"""`chat`: a conversation with a pretrained model, or with a run that fine-tuned one."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeblocks.cli.exit_codes import verb
from edgeblocks.cli.options import Json, MemBudget
from edgeblocks.cli.screen import complain, finish_output, json_text, say, say_raw
from edgeblocks.errors import ConfigError

if TYPE_CHECKING:
    from edgeblocks.pretrained.writing import TextWriter

_ANEW = "/new"
_ASKS = "> "


@verb()
def chat(
    model: Annotated[
        Path,
        typer.Argument(help="A run of finetune, or the folder of a model with config.json.", show_default=False),
    ],
    message: Annotated[
        str | None,
        typer.Option("--message", "-m", help="Say this, print the answer, and end.", show_default=False),
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="What the model is told before everything else.", show_default=False)
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="1 draws as the model was trained, 0 takes the likeliest token.")
    ] = 0.7,
    top_p: Annotated[
        float, typer.Option(help="Draw from the smallest set of the likeliest tokens that has this probability.")
    ] = 0.95,
    tokens: Annotated[int, typer.Option(help="An answer is cut at so many tokens.", min=1)] = 512,
    length: Annotated[
        int | None,
        typer.Option(
            help="Tokens of the longest conversation, for which memory is kept.", show_default="as trained", min=2
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides what is drawn.")] = 0,
    mem_budget: MemBudget = None,
    as_json: Json = False,
) -> None:
    """Talk with a pretrained model, or with what finetune made of it, in the words of its chat template.

    In a terminal it asks for one message after the other: /new begins a new conversation, Ctrl-C ends an answer, Ctrl-D
    the conversation. Otherwise each line of the standard input is a message.
    """
    from edgeblocks import api

    said: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
    begins_with = len(said)
    is_terminal = message is None and sys.stdin.isatty() and not as_json
    with api.writer(model, mem_budget=mem_budget, length=length) as writer:
        for number, words in enumerate([message] if message is not None else _messages(is_terminal)):
            if words == _ANEW:
                del said[begins_with:]
                continue
            said.append({"role": "user", "content": words})
            try:
                answer = _answer(
                    writer, said, temperature=temperature, top_p=top_p, most_tokens=tokens, seed=seed + number,
                    quiet=as_json,
                )  # fmt: skip
            except ConfigError as error:
                if not is_terminal:
                    raise
                said.pop()
                complain(f"{error}; {_ANEW} begins a new conversation")
                continue
            said.append({"role": "assistant", "content": answer})
    if as_json:
        say(json_text(said))


def _answer(
    writer: "TextWriter",
    said: list[dict[str, str]],
    *,
    temperature: float,
    top_p: float,
    most_tokens: int,
    seed: int,
    quiet: bool,
) -> str:
    """The answer, shown as it is written; as far as it came where Ctrl-C ends it in a terminal."""
    pieces: list[str] = []

    def show(piece: str) -> None:
        pieces.append(piece)
        if not quiet:
            say_raw(piece)
            finish_output()

    try:
        return writer.answer(
            said, temperature=temperature, top_p=top_p, most_tokens=most_tokens, seed=seed, on_text=show
        )
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        return "".join(pieces)
    finally:
        if not quiet:
            say("")


def _messages(is_terminal: bool) -> Iterator[str]:
    """What the user says, until the input ends."""
    while True:
        if is_terminal:
            say_raw(_ASKS)
            finish_output()
        line = sys.stdin.readline()
        if not line:
            if is_terminal:
                say("")
            return
        if line.strip():
            yield line.strip()
