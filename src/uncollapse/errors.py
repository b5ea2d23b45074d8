"""The errors of this package. Each message says what the user can do next.

Every message reads: `<function>: expected <thing>, got <what came>. <likely cause>. <next call>.`
The command line prints only the message and exits with code 2. Python callers catch `UncollapseError`.
"""


class UncollapseError(Exception):
    """The package refuses to do something. The message gives the reason in one line."""


class InputError(UncollapseError, ValueError):
    """The input cannot be used: a missing file, an empty text, a tensor of the wrong shape."""


class UnsupportedModel(UncollapseError):  # noqa: N818 - the public name of the contract
    """The parts of the model could not be found, or they were found but could not be proved.

    `found` says what was recognised, and `identity` which statement about the model failed and by how much. `layout` is a
    `Layout` as Python source, to start from.
    """

    def __init__(self, message: str, *, found: str = "", identity: str = "", layout: str = "") -> None:
        super().__init__(message)
        self.found = found
        self.identity = identity
        self.layout = layout
