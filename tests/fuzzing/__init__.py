"""Drawn cases of what nobody expects: `python -m tests.fuzzing --count 100000 --write docs/reliability.md`.

Each target takes a seed and does one case. It ends well in two ways: `computed`, or `refused` by the package in one line. Whatever
else comes out of it, an error of torch or Python, a file that is lost, a setting or a model that is left changed, is a fault, and
its seed repeats it. One module a target; `outcomes` says what it is to end well.
"""
