"""What every reader that is fuzzed can do."""


class Reader:
    """A kind of input: `prepare` writes one, `read` has it read. At first there is a sound one."""

    def prepare_sound(self):
        pass
