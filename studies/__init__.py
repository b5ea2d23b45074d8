"""Studies of the package: long runs whose results the documentation shows."""
