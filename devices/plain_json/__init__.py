"""Plain JSON: any object of fields, a reading each."""
