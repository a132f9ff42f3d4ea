"""The race's competitors, each a program: ``python -m bench.rivals.NAME BOOTSTRAP INPUT OUTPUT GROUP CODEC``.

Each reads INPUT from its beginning, sends the readings of every message to OUTPUT with acks=all, commits what
is done, and goes on until SIGTERM. They run in ``.venv-rivals`` (bench/rivals.lock).
"""
