"""Measurements: ``python -m bench`` runs the race and the rows, ``python -m bench --list`` names all of them."""
