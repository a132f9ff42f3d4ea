"""One suite that every sink and connector has to pass, against its real server."""
