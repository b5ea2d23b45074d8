"""One pass over a corpus becomes running statistics: of sites, attention calls, output projections and sublayers."""
