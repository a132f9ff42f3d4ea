"""Device drivers, profiles and validation: bytes to readings, commands to bytes. Plain Python."""
