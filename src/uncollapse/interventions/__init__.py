"""Take a component away from a live model, and put it back."""
