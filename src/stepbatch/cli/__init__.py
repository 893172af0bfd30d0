"""The command line; nothing here imports torch before it is known that the command makes sense."""
