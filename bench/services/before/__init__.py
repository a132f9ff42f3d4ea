"""Six services with a polling loop written by hand: connect, poll, decode, handle, commit, reconnect."""
