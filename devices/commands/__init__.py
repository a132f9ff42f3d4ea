"""The way down: the life of commands as pure functions, and how a command becomes what its device understands."""
