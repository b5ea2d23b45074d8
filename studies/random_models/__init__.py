"""Random small Transformers that know their own truth, and what the package says of them.

    python -m studies.random_models --count 10000 --jobs 2     how many are right, unavailable, refused, silently wrong
    python -m studies.random_models --seed 17                  one model, its source, and every difference

`drawing` turns a seed into a `Specification` and that into a model; `pieces` has the parts, each written in the ways people
write it; `truth` is what a model records inside its own forward; `comparing` holds the package's figures against that.
"""
