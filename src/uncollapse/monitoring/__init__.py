"""A monitor of training: it looks at the model every few steps, keeps a trail, and raises alarms."""
