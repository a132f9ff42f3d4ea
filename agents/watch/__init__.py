"""What agents/alarms.py works with: what is known, and the engine of each partition."""
