"""What `demo` is made of: candidates, trials, the file that remembers them, and the watch over running calls.

This floor lies above measuring, since a trial checks accuracy, and below the run.
"""
