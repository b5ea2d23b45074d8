"""What the pages of all commands share: the sheet and its style, cells, figures, curves, heads and sublayers."""
