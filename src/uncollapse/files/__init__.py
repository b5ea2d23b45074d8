"""Files that come in and go out: opened without waiting for anybody, read up to a bound, written whole or not at all.

`reading` is for texts and records, `writing` for records and pages. Both say what is wrong as an `OSError`; their callers
word the refusal, because they know what the file was for.
"""
