"""How a command says that it cannot go on."""


class CommandError(Exception):
    """One clear line for the person at the terminal. Exit code 1, or 2 where the command line itself is wrong."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code
