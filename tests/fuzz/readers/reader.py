"""What every reader that is fuzzed can do."""


class Reader:
    """A kind of input: `prepare` writes one, `read` has it read. At first there is a sound one.

    needs: a library without which there is nothing to fuzz, or None.
    """

    needs: str | None = None

    def prepare_sound(self):
        pass
