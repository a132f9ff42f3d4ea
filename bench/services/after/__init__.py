"""The same six services with the class."""
