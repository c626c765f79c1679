"""Settings as the command resolves them, and what it says of wrong ones."""

import pytest

from edgeblocks.errors import ConfigError
from edgeblocks.registry import family_type
from edgeblocks.settings.reading import resolve_settings


def resolve(given=(), config=None):
    return resolve_settings(dict(given), family_settings=lambda name: family_type(name).settings_type, config=config)


def problems_of(given=(), config=None):
    with pytest.raises(ConfigError) as caught:
        resolve(given, config)
    return caught.value.problems
