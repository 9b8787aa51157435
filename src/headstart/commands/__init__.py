"""What can be typed: a module a command, imported only when it is; and what they share."""
