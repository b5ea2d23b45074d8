"""Statistics and records in, verdicts out. No model runs here."""
