"""The one error that means "the input was wrong"."""


class UserError(ValueError):
    """Bad input: a flag, a YAML key or a file that cannot be used as given.

    The message names what was given, what is allowed and what to do. The command line
    prints it without a traceback and leaves with exit status 2.
    """


class BusyError(UserError):
    """Another process is writing what was to be written."""


class MissingDependencyError(UserError):
    """An optional package is not installed; the message names the pip command."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed; "
            f'run: pip install "mixtral-ms[{extra}]"'
        )
