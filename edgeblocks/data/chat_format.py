"""How a model's folder writes conversations: its chat template, run in a sandbox."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from edgeblocks.errors import DataError
from edgeblocks.files.untrusted import MalformedFileError, parse_json, read_text

_MOST_TEMPLATE_BYTES = 2**22


class NotWrittenError(Exception):
    """A record has no text, or no answer in it; the message says why."""


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """How a model's folder writes conversations."""

    template: str | None
    beginning: str
    end: str
    """The texts of its tokens for the beginning and the end of a text, empty where it has none."""

    @classmethod
    def of(cls, folder: Path) -> "ChatFormat":
        """From chat_template.jinja, or tokenizer_config.json.

        Raises:
            DataError: a file cannot be read.
        """
        config: dict[str, Any] = {}
        try:
            if (folder / "tokenizer_config.json").exists():
                told = parse_json(read_text(folder / "tokenizer_config.json", most_bytes=_MOST_TEMPLATE_BYTES))
                config = told if isinstance(told, dict) else {}
            template = config.get("chat_template")
            if (folder / "chat_template.jinja").exists():
                template = read_text(folder / "chat_template.jinja", most_bytes=_MOST_TEMPLATE_BYTES)
        except (OSError, MalformedFileError) as error:
            raise DataError(f"{folder}: its chat template cannot be read ({error}); download it again") from error
        if isinstance(template, list):  # several by name
            named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
            template = named.get("default")
        return cls(
            template=template if isinstance(template, str) else None,
            beginning=_token_text(config.get("bos_token")),
            end=_token_text(config.get("eos_token")),
        )

    def renderer(self) -> Callable[[Sequence[Mapping[str, Any]], bool], str]:
        """Writes messages as a text; the flag adds the words that ask for an answer.

        The template comes with the model and may do nothing but write: jinja's sandbox runs it.
        """
        if self.template is None:
            raise DataError(
                "the model has no chat template, which says how messages are written; take its -Instruct or -chat "
                "version, or give records of prompt and completion as texts"
            )
        from jinja2.exceptions import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> NoReturn:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False)
        environment.globals["raise_exception"] = refuse
        try:
            template = environment.from_string(self.template)
        except TemplateError as error:
            raise DataError(f"the model's chat template is no template ({error}); download it again") from error

        def render(messages: Sequence[Mapping[str, Any]], ask: bool) -> str:
            try:
                return template.render(
                    messages=list(messages),
                    add_generation_prompt=ask,
                    bos_token=self.beginning,
                    eos_token=self.end,
                )
            except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
                raise NotWrittenError(f"the model's chat template does not write it ({str(error)[:200]})") from error

        return render


def _token_text(told: object) -> str:
    if isinstance(told, dict):
        told = told.get("content")
    return told if isinstance(told, str) else ""
