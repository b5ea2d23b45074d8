"""What the printouts of all commands share: plain lines, columns of a table, findings."""
