"""The run: cases one after the other, in a worker process, told as events and read back as rows."""
