"""What was observed: frozen dataclasses, their JSON, and the published JSON Schema.

A record is complete in itself: it carries the versions, the model, the probe and the resolved options, so that a page
can be drawn from it a year later on another machine. Pages and tables read records and nothing else.

* Every measured value is a `Statistic` {mean, min, max, n}: first the mean over a sequence's rows, then over sequences,
  of which there were `n`; `min` and `max` are the extreme sequences.
* A value that was not measured is `null`, and `unavailable` in the same object gives the reason under the same key.
* NaN and infinity never reach JSON: `Statistic.of` refuses them, and a numerics finding names where they came from.

`to_json` / `from_json` convert, `json_schema` publishes. Pydantic reads the annotations for all three.
"""
