"""The local stack and the command `millrace`."""
