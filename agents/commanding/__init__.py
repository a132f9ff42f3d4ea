"""What the stage commands is made of."""
