"""Names of modules and tensors as keys, which torch does not allow to have dots."""


def as_key(name: str) -> str:
    """A name as a key.

    >>> as_key("self_attn.q_proj"), from_key(as_key("self_attn.q_proj"))
    ('self_attn-q_proj', 'self_attn.q_proj')
    """
    return name.replace(".", "-")


def from_key(key: str) -> str:
    """Back."""
    return key.replace("-", ".")
