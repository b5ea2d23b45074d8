"""One module per command (`diagnosis`, `ablation`, `heads`, `symmetries`), and what they share."""
