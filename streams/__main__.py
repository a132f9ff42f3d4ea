"""``python -m streams worker`` is ``faust -A streams worker``."""

from streams.core import app

if __name__ == "__main__":
    app.main()
