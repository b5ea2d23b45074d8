"""One module a command, `diagnosis`, `ablation`, `heads` and `symmetries`, over what they share."""
