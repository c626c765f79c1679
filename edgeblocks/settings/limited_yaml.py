"""YAML in which nothing is short to write and long to use."""

from typing import Any

import yaml

from edgeblocks.files.untrusted import shown

MOST_YAML_BYTES = 2**16
_MOST_DEPTH = 8
_MOST_DIGITS = 40


class _LimitedLoader(yaml.SafeLoader):
    """YAML for settings.

    Aliases (`*name`) can stand for each other until they mean more values than any memory holds; nested values and
    whole numbers are limited; a date is a text, as a path such as 2024-05-01 is meant.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise _refused(event.start_mark, f"an alias ({shown(event.anchor)}) is not read here; write the value out")
        if self._depth >= _MOST_DEPTH:
            raise _refused(event.start_mark, f"a value is nested more than {_MOST_DEPTH} levels deep")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > _MOST_DIGITS:
            raise _refused(node.start_mark, f"a whole number has more than {_MOST_DIGITS} digits")
        return int(super().construct_yaml_int(node))


_LimitedLoader.add_constructor("tag:yaml.org,2002:int", _LimitedLoader.construct_yaml_int)
_LimitedLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _refused(mark: Any, why: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, why, mark)


def load_yaml(text: str) -> object:
    """The value of a YAML text.

    Raises:
        ValueError: not YAML, or more than settings need.
    """
    try:
        return yaml.load(text, _LimitedLoader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        # What PyYAML's constructors let through for tags that do not suit their values, such as `!!bool 5`.
        raise ValueError(f"a value does not suit its tag ({type(error).__name__}: {error})") from error
