"""The three ways a request can fail, each carrying what the user can do next.

Every message reads: `<function>: expected <thing>, got <what came>. <likely cause>. <next call>.`
The command line prints the message alone and exits with 2; Python callers catch `UncollapseError`.
"""


class UncollapseError(Exception):
    """Anything this package refuses to do, with the reason in one line."""


class InputError(UncollapseError, ValueError):
    """The input cannot be used: a missing file, an empty text, a tensor of the wrong shape."""


class UnsupportedModel(UncollapseError):  # noqa: N818 - the public name of the contract
    """The parts of the model could not be found or, once found, not be proved.

    `found` says what was recognised, `identity` which statement about the model failed and by how much,
    `layout` is a `Layout` written out as Python to start from.
    """

    def __init__(self, message: str, *, found: str = "", identity: str = "", layout: str = "") -> None:
        super().__init__(message)
        self.found = found
        self.identity = identity
        self.layout = layout
