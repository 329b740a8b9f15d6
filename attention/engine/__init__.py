"""The run: cases one after the other in a worker process, reported as events and collected as rows."""
