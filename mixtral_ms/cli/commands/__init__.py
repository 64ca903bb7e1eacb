"""One file a command, with `main(argv) -> int`."""
