"""Six small services in two forms, with the same `run`: a polling loop written by hand, and the class."""
