"""The command line: what can be asked for (`options`), the commands, and where results go (`output`)."""
