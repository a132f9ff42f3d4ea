"""What is wrong with this Kafka, and what to do: `python tools/kafka_diagnostics.py --help`.

Runs with any `python` from anywhere: it finds the project's `.venv` or says what to do. The checks are in
`tools/diagnostics/`.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    root = Path(__file__).resolve().parent.parent
    sys.path[0] = str(root)
    from tools import in_venv

    in_venv.enter(root)
    from tools.diagnostics.command import main

    sys.exit(main())
