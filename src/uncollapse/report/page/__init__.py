"""What the pages of all commands share: the sheet with its style, cells, figures, curves, heads and sublayers."""
