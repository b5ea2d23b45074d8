"""Mutations: does a test notice when one number, sign or comparison of the mathematics, the claims or the findings changes?

    make mutants                                               # a sample of 200
    python -m studies.mutants --count 40 --only measures/exact.py

Cosmic Ray's operators change one place of one module: a number by one, + to -, < to <=, a condition to its negation, True to
False, a loop to none (`drawing`). The mutants are drawn at random, every place with the same chance, so that the share that dies
is an estimate for all of them.

First all tests that may be asked run once, unchanged, and it is recorded which of them reaches which line (`reaching`). They must
pass: else every mutant they meet would seem to die. A mutant then meets the tests that reach its statement, and after them the
others of the same files, up to half a minute's worth; among both, those of its own test file come first and quick ones before slow
ones (`running`). The first failure kills. Each mutant runs in a process of its own that was forked after the slow imports; no file
is changed. Tests of other packages are not asked, so that a survivor may still be noticed by `make test`.

A mutant may be *equivalent*: it changes nothing that could be observed, as `<` to `<=` where no two numbers are equal. Those that a
person has found out are listed, each with its reason, in equivalents.toml, and are counted apart. docs/decisions/0010-mutations.md
says why this tool.
"""
