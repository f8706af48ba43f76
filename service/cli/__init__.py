"""The `saeserve` command. A subcommand is a module with `add_arguments(parser)` and `run(arguments) -> exit code`."""
