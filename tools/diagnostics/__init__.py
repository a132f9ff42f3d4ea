"""The checks behind `python tools/kafka_diagnostics.py`: each looks at one thing and returns findings."""
