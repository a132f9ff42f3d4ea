"""Quick check of the tuned configuration, the helpers and recreation: `python tools/test_kafka_improvements.py`.

No test for pytest: it runs with any `python`, finds the project's `.venv` or says what to do, and exits 1 when a check
fails. The checks are in `tools/improvements.py`.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    root = Path(__file__).resolve().parent.parent
    sys.path[0] = str(root)
    from tools import in_venv

    in_venv.enter(root)
    from tools.improvements import main

    sys.exit(main())
